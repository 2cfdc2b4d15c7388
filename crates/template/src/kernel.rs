//! The kernel of a template: Debian's kernel for virtual machines, unpacked, never installed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{OnPath, TemplateError};
use crate::modinfo::{ModuleInfo, canonical};
use crate::program::run;
use crate::progress::Step;

/// What must be loaded before the root disk can be mounted and the agent heard: the disk, the
/// agent's port and a source of randomness, on PCI; and the root's file system.
const BOOT_MODULES: [&str; 5] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "ext4",
];

/// Module folders that a guest gets whole: packet filters, which containers and firewalls pick from.
const GUEST_FOLDERS: [&str; 4] = [
    "drivers/virtio/",
    "net/netfilter/",
    "net/ipv4/netfilter/",
    "net/ipv6/netfilter/",
];

/// Single modules a guest gets: devices a VM may have, file systems and block targets that tools
/// mount, and the virtual network devices of containers. The whole tree would be 91 MB; these and
/// what they need are about a fifth of it. One that a kernel lacks or has built in is left out.
const GUEST_MODULES: [&str; 50] = [
    // devices
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "virtio_net",
    "virtio_scsi",
    "virtio_gpu",
    "qemu_fw_cfg",
    "vsock",
    "vmw_vsock_virtio_transport",
    "vsock_loopback",
    "vmgenid",
    // file systems
    "ext4",
    "overlay",
    "fuse",
    "virtiofs",
    "9p",
    "9pnet_virtio",
    "squashfs",
    "isofs",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "nls_iso8859_1",
    "nls_utf8",
    "xfs",
    "btrfs",
    "autofs4",
    "binfmt_misc",
    "configfs",
    // block targets
    "loop",
    "nbd",
    "zram",
    "dm_mod",
    "dm_crypt",
    "dm_snapshot",
    "dm_thin_pool",
    "dm_verity",
    // networks
    "af_packet",
    "tun",
    "veth",
    "dummy",
    "bridge",
    "br_netfilter",
    "macvlan",
    "ipvlan",
    "vxlan",
    "wireguard",
    "8021q",
    "sch_fq_codel",
    "sch_htb",
];

/// The largest module that is read, in bytes.
const MODULE_BYTES_MAX: u64 = 64 << 20;

/// An unpacked kernel package.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// What `uname -r` will say.
    pub(crate) release: String,
    /// The kernel image.
    pub(crate) vmlinuz: PathBuf,
    /// The folder of its modules, named by the release.
    pub(crate) modules: PathBuf,
    /// Where each module is, by its canonical name.
    index: BTreeMap<String, PathBuf>,
    /// The modules that are part of the image, by canonical name.
    built_in: BTreeSet<String>,
}

/// A module, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// A file name without folder, ending in `.ko`.
    pub(crate) file_name: String,
    /// The uncompressed ELF file.
    pub(crate) bytes: Vec<u8>,
}

impl Kernel {
    /// Unpacks the kernel package `deb` into the folder `into`.
    pub(crate) fn unpack(deb: &Path, into: &Path, step: &Step<'_>) -> Result<Self, TemplateError> {
        let mut command = Command::new("dpkg-deb");
        command.arg("--extract").arg(deb).arg(into);
        run(&mut command, "unpacking the kernel", step)?;
        Self::open(into)
    }

    /// Finds image and modules below `root`, as a kernel package lays them out.
    fn open(root: &Path) -> Result<Self, TemplateError> {
        let parent = ["usr/lib/modules", "lib/modules"]
            .map(|folder| root.join(folder))
            .into_iter()
            .find(|folder| folder.is_dir())
            .ok_or_else(|| {
                unsuitable(
                    root,
                    "no folder of modules",
                    "usr/lib/modules or lib/modules",
                )
            })?;
        let releases = entries(&parent)?;
        let [modules] = &releases[..] else {
            return Err(unsuitable(
                &parent,
                format!("{} kernels", releases.len()),
                "one kernel",
            ));
        };
        let release = file_name(modules);
        let vmlinuz = root.join("boot").join(format!("vmlinuz-{release}"));
        if !vmlinuz.is_file() {
            return Err(unsuitable(&vmlinuz, "no such file", "the kernel's image"));
        }
        let mut index = BTreeMap::new();
        index_modules(&modules.join("kernel"), 0, &mut index)?;
        let list = modules.join("modules.builtin");
        let listed = std::fs::read_to_string(&list).on("reading", &list)?;
        Ok(Self {
            built_in: listed
                .lines()
                .filter_map(|line| module_name(Path::new(line)))
                .collect(),
            release,
            vmlinuz,
            modules: modules.clone(),
            index,
        })
    }

    /// The modules to load before the root disk can be mounted, in the order in which they load.
    pub(crate) fn boot_modules(&self, step: &Step<'_>) -> Result<Vec<Module>, TemplateError> {
        let mut order = Order::default();
        for name in BOOT_MODULES {
            self.load_order(name, &mut order, step)?;
        }
        Ok(order.modules)
    }

    /// The files of [`GUEST_MODULES`] and all they need, relative to [`Kernel::modules`].
    pub(crate) fn guest_modules(
        &self,
        step: &Step<'_>,
    ) -> Result<BTreeSet<PathBuf>, TemplateError> {
        let mut order = Order {
            names_only: true,
            ..Order::default()
        };
        for (name, path) in &self.index {
            let inner = path
                .strip_prefix(self.modules.join("kernel"))
                .unwrap_or(path)
                .to_string_lossy();
            let wanted = GUEST_MODULES.contains(&name.as_str())
                || GUEST_FOLDERS.iter().any(|folder| inner.starts_with(folder));
            if wanted {
                self.load_order(name, &mut order, step)?;
            }
        }
        let relative = |name: &String| {
            let path = self.index.get(name)?;
            Some(path.strip_prefix(&self.modules).ok()?.to_owned())
        };
        Ok(order.seen.iter().filter_map(relative).collect())
    }

    /// Appends `name` to `order`, after all it depends on.
    ///
    /// A name is marked as seen before its dependencies are followed, so a circle ends, and the depth is
    /// bounded by the number of modules in the package.
    fn load_order(
        &self,
        name: &str,
        order: &mut Order,
        step: &Step<'_>,
    ) -> Result<(), TemplateError> {
        if self.built_in.contains(name) || !order.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.index.get(name) else {
            let found = format!("neither a module `{name}` nor one built in");
            return Err(unsuitable(
                &self.modules,
                found,
                "a kernel with virtio on PCI and ext4",
            ));
        };
        let bytes = read_module(path, step)?;
        let info = ModuleInfo::decode(&bytes)
            .map_err(|found| unsuitable(path, found, "a kernel module"))?;
        for dependency in &info.depends {
            self.load_order(dependency, order, step)?;
        }
        if !order.names_only {
            let file_name = format!("{name}.ko");
            order.modules.push(Module { file_name, bytes });
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Order {
    seen: BTreeSet<String>,
    modules: Vec<Module>,
    names_only: bool,
}

fn unsuitable(path: &Path, found: impl Into<String>, expected: &str) -> TemplateError {
    TemplateError::Unsuitable {
        path: path.to_owned(),
        found: found.into(),
        expected: expected.to_owned(),
    }
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, TemplateError> {
    std::fs::read_dir(folder)
        .and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.path()))
                .collect()
        })
        .on("listing", folder)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The canonical name of the module in the file `path`; `None` for other files.
fn module_name(path: &Path) -> Option<String> {
    let name = file_name(path);
    [".ko", ".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .find_map(|ending| name.strip_suffix(ending))
        .map(canonical)
}

/// How deep the folders of modules may be nested; Debian's are nested six deep.
const FOLDER_DEPTH_MAX: usize = 16;

fn index_modules(
    folder: &Path,
    depth: usize,
    index: &mut BTreeMap<String, PathBuf>,
) -> Result<(), TemplateError> {
    if depth > FOLDER_DEPTH_MAX {
        return Err(unsuitable(
            folder,
            "folders nested too deeply",
            "a kernel package",
        ));
    }
    for path in entries(folder)? {
        let kind = std::fs::symlink_metadata(&path)
            .on("reading", &path)?
            .file_type();
        if kind.is_dir() {
            index_modules(&path, depth + 1, index)?;
        } else if let (true, Some(name)) = (kind.is_file(), module_name(&path)) {
            index.insert(name, path);
        }
    }
    Ok(())
}

/// Reads a module, uncompressed: suites differ in whether and how they compress modules.
fn read_module(path: &Path, step: &Step<'_>) -> Result<Vec<u8>, TemplateError> {
    let bytes = std::fs::metadata(path).on("reading", path)?.len();
    if bytes > MODULE_BYTES_MAX {
        return Err(unsuitable(
            path,
            format!("{bytes} bytes"),
            "a kernel module of at most 64 MiB",
        ));
    }
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return std::fs::read(path).on("reading", path),
    };
    let mut command = Command::new(program);
    command.arg("-dc").arg(path);
    run(&mut command, "uncompressing a kernel module", step)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::disallowed_methods,
        reason = "scratch files of a test need not last"
    )]

    use super::*;
    use crate::modinfo::tests::module_file;
    use crate::progress::{Stage, Watch};

    fn step() -> Step<'static> {
        Watch::silent().begin(Stage::Guest).expect("not cancelled")
    }

    /// A kernel package with the given modules (path below `kernel/`, dependencies), ext4 built in.
    fn package(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("temp dir");
        let folder = root.path().join("lib/modules/6.1-test");
        std::fs::create_dir_all(folder.join("kernel")).expect("folder");
        std::fs::create_dir_all(root.path().join("boot")).expect("folder");
        std::fs::write(root.path().join("boot/vmlinuz-6.1-test"), "image").expect("image");
        std::fs::write(
            folder.join("modules.builtin"),
            "kernel/fs/ext4/ext4.ko\nkernel/x/rng-core.ko\n",
        )
        .expect("list");
        for (path, depends) in modules {
            let path = folder.join("kernel").join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("folder");
            let name = module_name(&path).expect("a module");
            let info = format!("depends={depends}\0name={name}\0");
            std::fs::write(path, module_file(info.as_bytes())).expect("module");
        }
        root
    }

    const VIRTIO: [(&str, &str); 6] = [
        ("drivers/virtio/virtio.ko", "virtio_ring"),
        ("drivers/virtio/virtio_ring.ko", ""),
        ("drivers/virtio/virtio_pci.ko", "virtio,virtio_ring"),
        ("drivers/block/virtio_blk.ko", "virtio"),
        ("drivers/char/virtio_console.ko", "virtio"),
        ("drivers/char/hw_random/virtio-rng.ko", "rng-core,virtio"),
    ];

    #[test]
    fn modules_load_after_what_they_need_and_built_in_ones_not_at_all() {
        let root = package(&VIRTIO);
        let kernel = Kernel::open(root.path()).expect("a kernel");
        assert_eq!(kernel.release, "6.1-test");
        let order = kernel.boot_modules(&step()).expect("an order");
        let names: Vec<&str> = order
            .iter()
            .map(|module| module.file_name.as_str())
            .collect();
        let expected = [
            "virtio_ring.ko",
            "virtio.ko",
            "virtio_pci.ko",
            "virtio_blk.ko",
            "virtio_console.ko",
            "virtio_rng.ko",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_kernel_without_a_needed_module_is_refused() {
        let root = package(&VIRTIO[..3]);
        let kernel = Kernel::open(root.path()).expect("a kernel");
        let error = kernel.boot_modules(&step()).expect_err("no virtio_blk");
        assert!(error.to_string().contains("virtio_blk"), "{error}");
    }

    #[test]
    fn modules_that_need_each_other_end() {
        let mut modules = VIRTIO.to_vec();
        modules[1] = ("drivers/virtio/virtio_ring.ko", "virtio");
        let root = package(&modules);
        let kernel = Kernel::open(root.path()).expect("a kernel");
        assert_eq!(kernel.boot_modules(&step()).expect("an order").len(), 6);
    }

    #[test]
    fn a_guest_gets_chosen_modules_with_their_needs_and_no_others() {
        let mut modules = VIRTIO.to_vec();
        modules.extend([
            ("fs/overlayfs/overlay.ko", ""),
            ("net/netfilter/xt_mark.ko", "x_tables"),
            ("net/other/x_tables.ko", ""),
            ("drivers/sound/loud.ko", ""),
        ]);
        let root = package(&modules);
        let kernel = Kernel::open(root.path()).expect("a kernel");
        let chosen = kernel.guest_modules(&step()).expect("a choice");
        assert!(chosen.contains(Path::new("kernel/fs/overlayfs/overlay.ko")));
        assert!(chosen.contains(Path::new("kernel/net/other/x_tables.ko")));
        assert!(!chosen.iter().any(|path| path.ends_with("loud.ko")));
    }
}
