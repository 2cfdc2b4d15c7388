//! Building a template from Debian's packages.

use std::path::{Path, PathBuf};

use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use stead_sys::durable::{self, Existing};
use stead_sys::space;

use crate::apt::{Apt, KERNEL_METAPACKAGE, Package, Sources, check_package_name};
use crate::cache::{Cache, Kind, Plan};
use crate::disk::{self, DiskIdentity};
use crate::error::{OnPath, TemplateError};
use crate::kernel::Kernel;
use crate::progress::Watch;
use crate::tree::GuestTree;
use crate::{Stage, guest, initramfs, minimal, rootfs};

/// The size of a disk unless asked otherwise, in bytes.
pub const DISK_BYTES_DEFAULT: u64 = 2 << 30;

/// Packages without which a guest would not boot, load modules or show its processes.
pub const PACKAGES_NEEDED: [&str; 3] = ["kmod", "systemd-sysv", "udev"];

/// What a template has unless asked otherwise.
pub const PACKAGES_DEFAULT: [&str; 7] = [
    "ca-certificates",
    "curl",
    "git",
    "iproute2",
    "less",
    "procps",
    "python3",
];

/// The kernel's command line for a template's disk on a PCI machine. Each word has a reason:
///
/// | word | why |
/// |---|---|
/// | `console=ttyS0` | panics and a failed start can be read on the host |
/// | `root=/dev/vda rw rootfstype=ext4` | the whole first disk, writable at once, no probing |
/// | `quiet systemd.show_status=no` | each line on the serial port costs milliseconds under emulation |
/// | `panic=-1` | a panic restarts at once, so QEMU (`-no-reboot`) ends instead of hanging |
/// | `no_timer_check` | on a busy host the check misses ticks and panics; the virtual timer works |
/// | `nowatchdog` | a guest that was stopped is not a guest that hung |
/// | `mitigations=off` | the VM is the boundary; page-table switches flush all of an emulator's cache |
/// | `net.ifnames=0` | a network device keeps its name in whatever slot a restore puts it |
///
/// `tsc=reliable` is left out on purpose: on a worker with another clock rate the kernel must be able to
/// notice and change its clock.
pub const CMDLINE: &str = "console=ttyS0 root=/dev/vda rw rootfstype=ext4 quiet systemd.show_status=no \
    panic=-1 no_timer_check nowatchdog mitigations=off net.ifnames=0";

/// What a template's guest is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Base {
    /// Debian: its essential packages and [`PACKAGES_NEEDED`]; the agent is a service of systemd.
    #[default]
    Debian,
    /// Nothing but busybox and the agent, which is process 1.
    Minimal,
}

/// What makes the files under a template: the slow part, the same on every worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// What the guest is.
    pub base: Base,
    /// Debian's code name of the suite, or `None` for the suite that the host's apt is set to.
    pub suite: Option<String>,
    /// The packages to install besides those of the base; a minimal one can have none.
    pub packages: Vec<String>,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            base: Base::Debian,
            suite: None,
            packages: PACKAGES_DEFAULT.map(str::to_owned).to_vec(),
        }
    }
}

/// A template to be built.
#[derive(Debug, Clone)]
pub struct BuildSpec<'a> {
    /// Which packages.
    pub recipe: Recipe,
    /// The disk's size in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// What makes this disk another one than those built elsewhere from the same packages.
    pub identity: DiskIdentity,
    /// The guest agent, statically linked.
    pub agent: &'a Path,
    /// Where to keep what the next build can use again.
    pub cache: &'a Path,
    /// Where the template goes; made if missing.
    pub out: &'a Path,
}

/// A finished template: what a sandbox boots from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuiltTemplate {
    /// The raw disk, sparse.
    pub disk: PathBuf,
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// The kernel image.
    pub vmlinuz: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// Debian's code name, where the template was built from packages.
    pub suite: Option<String>,
    /// The kernel package, where the template was built from packages.
    pub kernel: Option<Package>,
    /// What is installed, where that is known.
    pub packages: Vec<Package>,
}

/// The names of a template's files in its folder.
pub(crate) const DISK_NAME: &str = "disk.raw";
pub(crate) const VMLINUZ_NAME: &str = "vmlinuz";
pub(crate) const INITRD_NAME: &str = "initrd";

/// Builds a template. Root only, since the files of a guest belong to many users.
///
/// With a filled cache this takes seconds, with an empty one about a minute and what the mirror takes.
/// When the mirror cannot be reached and an earlier build for the same recipe is cached, that is used.
///
/// # Durability
/// When this returns `Ok`, all three files have reached the disk. After an error some of them may be in
/// `spec.out`, each of them whole.
///
/// # Errors
/// As [`TemplateError`] tells; among them that a program is missing, and that the caller asked to stop.
pub fn build(spec: &BuildSpec<'_>, watch: &Watch<'_>) -> Result<BuiltTemplate, TemplateError> {
    check(spec)?;
    let agent = std::fs::read(spec.agent).on("reading", spec.agent)?;
    check_agent(spec.agent, &agent)?;
    let cache = Cache::open(spec.cache, watch)?;
    let parts = Parts::obtain(&cache, &spec.recipe, watch)?;
    durable::create_dir(spec.out, 0o755).on("creating", spec.out)?;
    parts.assemble(&cache, spec, &agent, watch)
}

fn check(spec: &BuildSpec<'_>) -> Result<(), TemplateError> {
    spec.recipe
        .packages
        .iter()
        .try_for_each(|name| check_package_name(name))?;
    if spec.recipe.base == Base::Minimal && !spec.recipe.packages.is_empty() {
        return Err(TemplateError::Unsuitable {
            path: spec.out.to_owned(),
            found: format!(
                "a minimal template with {}",
                spec.recipe.packages.join(", ")
            ),
            expected: "one without packages: it has nothing to install them with".to_owned(),
        });
    }
    if let Some(suite) = &spec.recipe.suite {
        check_package_name(suite)?;
    }
    disk::check_size(spec.size_bytes)?;
    if geteuid().is_root() {
        Ok(())
    } else {
        Err(TemplateError::NeedsRoot {
            doing: "building a template",
        })
    }
}

/// The agent is `/init` where no library is: refuses what is no ELF file, or one that asks for a loader.
fn check_agent(path: &Path, agent: &[u8]) -> Result<(), TemplateError> {
    let found = if !agent.starts_with(b"\x7fELF") {
        "no ELF file"
    } else if asks_for_a_loader(agent) {
        "a dynamically linked program"
    } else {
        return Ok(());
    };
    Err(TemplateError::Unsuitable {
        path: path.to_owned(),
        found: found.to_owned(),
        expected: "a statically linked agent".to_owned(),
    })
}

/// Whether the ELF-64 file has a `PT_INTERP` program header.
///
/// # Source
/// System V ABI, "Program Header": table offset at 0x20, entry size at 0x36, count at 0x38; type 3.
fn asks_for_a_loader(elf: &[u8]) -> bool {
    let number = |at: usize, bytes: usize| {
        let field = at.checked_add(bytes).and_then(|end| elf.get(at..end))?;
        let value = field
            .iter()
            .rev()
            .fold(0_u64, |value, byte| (value << 8) | u64::from(*byte));
        usize::try_from(value).ok()
    };
    let header_type = |index: usize| {
        let at = index
            .checked_mul(number(0x36, 2)?)?
            .checked_add(number(0x20, 8)?)?;
        number(at, 4)
    };
    (0..number(0x38, 2).unwrap_or(0)).any(|index| header_type(index) == Some(3))
}

/// The cached files that a template is made of.
#[derive(Debug)]
struct Parts {
    base: Base,
    suite: String,
    rootfs: PathBuf,
    deb: PathBuf,
    kernel: Package,
    // Those of the root file system, as they were asked for.
    packages: Vec<Package>,
}

impl Parts {
    /// Takes both files from the cache, or makes them.
    fn obtain(cache: &Cache, recipe: &Recipe, watch: &Watch<'_>) -> Result<Self, TemplateError> {
        let step = watch.begin(Stage::Index)?;
        let sources = Sources::of_host(recipe.suite.as_deref(), &step)?;
        let apt = Apt::set_up(&cache.apt(), &sources)?;
        if let Err(error) = apt.update(&step) {
            step.go_on()?;
            step.line(&format!(
                "the index cannot be refreshed ({error}); looking for an earlier build"
            ));
            return Self::earlier(cache, &sources, recipe, watch)?.ok_or(error);
        }
        let Plan {
            packages: planned,
            kernel,
            ..
        } = plan(cache, &apt, &sources, recipe, watch)?;
        let deb = obtain_kernel(cache, &apt, &sources, &kernel, watch)?;
        let rootfs = obtain_rootfs(cache, &apt, &sources, recipe, planned.clone(), watch)?;
        Ok(Self {
            base: recipe.base,
            suite: sources.suite,
            rootfs,
            deb,
            kernel,
            packages: planned,
        })
    }

    /// What an earlier build made for the same wish, in the versions of that day.
    fn earlier(
        cache: &Cache,
        sources: &Sources,
        recipe: &Recipe,
        watch: &Watch<'_>,
    ) -> Result<Option<Self>, TemplateError> {
        let step = watch.begin(Stage::CheckCache)?;
        let whole = |kind, wish: &str| -> Result<Option<(PathBuf, Vec<Package>)>, TemplateError> {
            for file in cache.made_for(kind, wish)? {
                if let Some(record) = cache.checked(&file, &step)? {
                    return Ok(Some((file, record.packages)));
                }
            }
            Ok(None)
        };
        let rootfs = whole(Kind::RootFilesystem, &rootfs_wish(sources, recipe))?;
        let kernel = whole(Kind::Kernel, &kernel_wish(sources))?;
        let (Some((rootfs, packages)), Some((deb, kernel))) = (rootfs, kernel) else {
            return Ok(None);
        };
        let suite = sources.suite.clone();
        Ok(kernel.into_iter().next().map(|kernel| Self {
            base: recipe.base,
            suite,
            rootfs,
            deb,
            kernel,
            packages,
        }))
    }

    /// Makes the three files of a template; seconds, however long its packages took.
    fn assemble(
        &self,
        cache: &Cache,
        spec: &BuildSpec<'_>,
        agent: &[u8],
        watch: &Watch<'_>,
    ) -> Result<BuiltTemplate, TemplateError> {
        let tree = cache.scratch("tree")?;
        check_room(&tree, &self.rootfs, spec.out)?;
        rootfs::unpack(&self.rootfs, &tree, &watch.begin(Stage::Unpack)?)?;
        let step = watch.begin(Stage::Guest)?;
        let kernel = Kernel::unpack(&self.deb, &cache.scratch("kernel")?, &step)?;
        let guest = GuestTree::new(tree.clone());
        let packages = match self.base {
            Base::Debian => guest::prepare(&guest, agent, &kernel, &step)?,
            Base::Minimal => minimal::prepare(&guest, agent, self.packages.clone())?,
        };
        let step = watch.begin(Stage::Initramfs)?;
        let initrd = spec.out.join(INITRD_NAME);
        let archive =
            initramfs::archive(agent, &kernel.boot_modules(&step)?).on("packing", &initrd)?;
        publish(&initrd, &archive)?;
        let vmlinuz = spec.out.join(VMLINUZ_NAME);
        publish(
            &vmlinuz,
            &std::fs::read(&kernel.vmlinuz).on("reading", &kernel.vmlinuz)?,
        )?;
        let disk = spec.out.join(DISK_NAME);
        disk::make(&tree, spec.size_bytes, &spec.identity, &disk, watch)?;
        Ok(BuiltTemplate {
            disk,
            size_bytes: spec.size_bytes,
            vmlinuz,
            initrd,
            cmdline: match self.base {
                Base::Debian => CMDLINE.to_owned(),
                Base::Minimal => minimal::cmdline(),
            },
            suite: Some(self.suite.clone()),
            kernel: Some(self.kernel.clone()),
            packages,
        })
    }
}

fn publish(path: &Path, bytes: &[u8]) -> Result<(), TemplateError> {
    durable::publish(path, 0o644, bytes, Existing::Replace).on("writing", path)
}

/// Refuses to start what cannot be finished: the unpacked files and the disk each take about as much
/// as the archive, and the kernel's modules come on top.
fn check_room(scratch: &Path, rootfs: &Path, out: &Path) -> Result<(), TemplateError> {
    const MODULES_BYTES: u64 = 160 << 20;
    let archive_bytes = std::fs::metadata(rootfs).on("reading", rootfs)?.len();
    let required_bytes = archive_bytes + archive_bytes / 4 + MODULES_BYTES;
    for path in [scratch, out] {
        let available_bytes = space::available_bytes(path).on("measuring", path)?;
        if available_bytes < required_bytes {
            let path = path.to_owned();
            return Err(TemplateError::NoRoom {
                path,
                required_bytes,
                available_bytes,
            });
        }
    }
    Ok(())
}

/// Which versions to use: as apt decided before, while its index is the same, since it takes seconds.
fn plan(
    cache: &Cache,
    apt: &Apt,
    sources: &Sources,
    recipe: &Recipe,
    watch: &Watch<'_>,
) -> Result<Plan, TemplateError> {
    let step = watch.begin(Stage::Resolve)?;
    let (index, wish) = (apt.index_fingerprint()?, rootfs_wish(sources, recipe));
    if let Some(plan) = cache.plan(&index, &wish) {
        watch.cached(Stage::Resolve);
        return Ok(plan);
    }
    let plan = Plan {
        index,
        wish,
        packages: match recipe.base {
            Base::Debian => apt.resolve(&all_packages(recipe), &step)?,
            Base::Minimal => vec![apt.newest(minimal::PACKAGE, &step)?],
        },
        kernel: apt.kernel(&step)?,
    };
    cache.keep_plan(&plan)?;
    Ok(plan)
}

/// Those of a Debian template that are named.
fn all_packages(recipe: &Recipe) -> Vec<String> {
    let needed = PACKAGES_NEEDED.iter().map(|name| (*name).to_owned());
    let mut packages: Vec<String> = needed.chain(recipe.packages.iter().cloned()).collect();
    packages.sort();
    packages.dedup();
    packages
}

/// What is asked of the cache, without versions. The number changes with how archives are made.
fn rootfs_wish(sources: &Sources, recipe: &Recipe) -> String {
    match recipe.base {
        Base::Debian => format!(
            "root file system 1 of {} with {}",
            sources.suite,
            all_packages(recipe).join(" ")
        ),
        Base::Minimal => format!("minimal root file system 1 of {}", sources.suite),
    }
}

fn kernel_wish(sources: &Sources) -> String {
    format!("kernel {KERNEL_METAPACKAGE} of {}", sources.suite)
}

fn obtain_kernel(
    cache: &Cache,
    apt: &Apt,
    sources: &Sources,
    kernel: &Package,
    watch: &Watch<'_>,
) -> Result<PathBuf, TemplateError> {
    let (wish, packages) = (kernel_wish(sources), vec![kernel.clone()]);
    let file = cache.place(Kind::Kernel, &wish, &packages);
    let step = watch.begin(Stage::Kernel)?;
    if cache.checked(&file, &step)?.is_some() {
        watch.cached(Stage::Kernel);
        return Ok(file);
    }
    let deb = apt.download(kernel, &cache.scratch("download")?, &step)?;
    publish(&file, &std::fs::read(&deb).on("reading", &deb)?)?;
    cache.record(Kind::Kernel, &file, &wish, packages, &step)?;
    Ok(file)
}

fn obtain_rootfs(
    cache: &Cache,
    apt: &Apt,
    sources: &Sources,
    recipe: &Recipe,
    planned: Vec<Package>,
    watch: &Watch<'_>,
) -> Result<PathBuf, TemplateError> {
    let wish = rootfs_wish(sources, recipe);
    let file = cache.place(Kind::RootFilesystem, &wish, &planned);
    let step = watch.begin(Stage::RootFilesystem)?;
    if cache.checked(&file, &step)?.is_some() {
        watch.cached(Stage::RootFilesystem);
        return Ok(file);
    }
    let scratch = cache.scratch("install")?;
    match recipe.base {
        Base::Debian => {
            let packages = all_packages(recipe);
            rootfs::install(sources, apt, &packages, &file, &scratch, &step)?;
        }
        Base::Minimal => minimal::install(apt, &planned, &file, &scratch, &step)?,
    }
    cache.record(Kind::RootFilesystem, &file, &wish, planned, &step)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF-64 file with one program header of type `kind`.
    fn elf(kind: u32) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        file[..4].copy_from_slice(b"\x7fELF");
        file[0x20] = 64;
        file[0x36] = 56;
        file[0x38] = 1;
        file[64..68].copy_from_slice(&kind.to_le_bytes());
        file
    }

    #[test]
    fn an_agent_must_be_statically_linked() {
        let path = Path::new("agent");
        check_agent(path, &elf(1)).expect("PT_LOAD only");
        assert!(
            check_agent(path, &elf(3))
                .expect_err("PT_INTERP")
                .to_string()
                .contains("dynamically")
        );
        assert!(check_agent(path, b"#!/bin/sh\n").is_err());
        assert!(check_agent(path, b"").is_err());
    }

    #[test]
    fn a_hostile_agent_file_is_judged_without_panic() {
        for length in 0..120 {
            asks_for_a_loader(&elf(3)[..length]);
        }
        for at in 0..120 {
            let mut file = elf(3);
            file[at] = 0xff;
            asks_for_a_loader(&file);
        }
        asks_for_a_loader(&[0xff; 200]);
    }

    #[test]
    fn needed_packages_are_always_there_once() {
        let recipe = Recipe {
            base: Base::Debian,
            suite: None,
            packages: vec!["udev".to_owned(), "git".to_owned()],
        };
        assert_eq!(
            all_packages(&recipe),
            ["git", "kmod", "systemd-sysv", "udev"]
        );
    }
}
