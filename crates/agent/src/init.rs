//! Process 1 of an initramfs: from the kernel's first process to the root's init.
//!
//! ```text
//!   mount /proc /sys /dev ──▶ load /modules ──▶ wait for root= ──▶ mount it ──▶ move the mounts ──▶ exec init=
//!        └───────────────┴───────────────┴── any failure: say why on the console, power off ──┘
//! ```
//!
//! # Source
//! The kernel's Documentation/admin-guide/kernel-parameters.txt (`root=`, `rootfstype=`, `rootflags=`, `ro`,
//! `rw`, `init=`) and Documentation/filesystems/ramfs-rootfs-initramfs.rst.

use std::ffi::{CString, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::system::{RebootCommand, finit_module, reboot};

use crate::error::{AgentError, Attempt, chain};

const MODULES: &str = "/modules";
const NEW_ROOT: &str = "/new-root";
/// How long the root's device may take to appear.
const ROOT_LIMIT: Duration = Duration::from_secs(30);
const ROOT_PAUSE: Duration = Duration::from_millis(2);
/// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h: the kernel unpacks the module itself.
const COMPRESSED: i32 = 4;
// `RAMFS_MAGIC` and `TMPFS_MAGIC` of linux/magic.h: what an initramfs is made of.
const RAMFS_MAGIC: i64 = 0x8584_58f6;
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Becomes the root's init, or powers the machine off.
pub(crate) fn run(arguments: &[OsString]) -> ! {
    let error = match start(arguments) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    let text = format!(
        "stead-agent: cannot start the machine, powering off: {}\n",
        chain(&error)
    );
    for console in ["/dev/console", "/dev/kmsg"] {
        // One of the two may be missing; there is nobody else to tell.
        if let Ok(mut file) = OpenOptions::new().write(true).open(console)
            && file.write_all(text.as_bytes()).is_err()
        {
            continue;
        }
    }
    loop {
        match reboot(RebootCommand::PowerOff) {
            Ok(()) | Err(_) => thread::sleep(Duration::from_secs(1)),
        }
    }
}

enum Never {}

fn start(arguments: &[OsString]) -> Result<Never, AgentError> {
    mount_kernel_file_systems()?;
    load_modules(Path::new(MODULES))?;
    let line = fs::read_to_string("/proc/cmdline")
        .attempt(|| "read the kernel's command line".to_owned())?;
    let boot = BootLine::parse(&line)?;
    await_device(&boot.root)?;
    mount_root(&boot)?;
    switch_root()?;
    let error = Command::new(&boot.init).args(arguments).exec();
    Err(error).attempt(|| format!("run {} of {}", boot.init.display(), boot.root.display()))
}

/// Mounts `/proc`, `/sys` and `/dev` where they are not mounted yet.
pub(crate) fn mount_kernel_file_systems() -> Result<(), AgentError> {
    for (kind, point) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        if let Err(error) = rustix::fs::mkdir(point, rustix::fs::Mode::from_raw_mode(0o755))
            && error != Errno::EXIST
            && error != Errno::ROFS
        {
            return Err(error).attempt(|| format!("make the folder {point}"));
        }
        match mount(kind, point, kind, MountFlags::empty(), None) {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(error).attempt(|| format!("mount {point}")),
        }
    }
    Ok(())
}

/// Loads the modules that `order` in the folder names, one a line, in that order.
fn load_modules(folder: &Path) -> Result<(), AgentError> {
    let list = folder.join("order");
    let names = match fs::read_to_string(&list) {
        Ok(names) => names,
        // A kernel with everything built in needs none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).attempt(|| format!("read {}", list.display())),
    };
    for name in names
        .lines()
        .map(str::trim)
        .filter(|name| !name.is_empty() && !name.starts_with('#'))
    {
        let (path, flags) = find_module(folder, name)?;
        let file = File::open(&path).attempt(|| format!("open {}", path.display()))?;
        match finit_module(&file, c"", flags) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).attempt(|| format!("load {}", path.display())),
        }
    }
    Ok(())
}

fn find_module(folder: &Path, name: &str) -> Result<(PathBuf, i32), AgentError> {
    let plain = name.strip_suffix(".ko").unwrap_or(name);
    [
        ("ko", 0),
        ("ko.xz", COMPRESSED),
        ("ko.zst", COMPRESSED),
        ("ko.gz", COMPRESSED),
    ]
    .into_iter()
    .map(|(suffix, flags)| (folder.join(format!("{plain}.{suffix}")), flags))
    .find(|(path, _)| path.exists())
    .ok_or_else(|| AgentError::Content {
        path: folder.join("order"),
        found: format!("names {name:?}, of which there is no file"),
    })
}

/// What the kernel's command line says about the root.
#[derive(Debug, PartialEq, Eq)]
struct BootLine {
    root: PathBuf,
    kind: String,
    flags: Option<String>,
    writable: bool,
    init: PathBuf,
}

impl BootLine {
    /// The last word on each matter counts; after `--` all is for init.
    fn parse(line: &str) -> Result<Self, AgentError> {
        let (mut root, mut kind, mut flags, mut writable, mut init) =
            (None, None, None, false, None);
        for word in line
            .split_ascii_whitespace()
            .take_while(|word| *word != "--")
        {
            match word.split_once('=') {
                Some(("root", value)) => root = Some(value),
                Some(("rootfstype", value)) => kind = Some(value),
                Some(("rootflags", value)) => flags = Some(value),
                Some(("init", value)) => init = Some(value),
                Some(_) => {}
                None if word == "rw" => writable = true,
                None if word == "ro" => writable = false,
                None => {}
            }
        }
        let wrong = |found: String| AgentError::Content {
            path: PathBuf::from("/proc/cmdline"),
            found,
        };
        let root = root.ok_or_else(|| wrong("has no root=".to_owned()))?;
        if !root.starts_with("/dev/") || root.contains("..") {
            return Err(wrong(format!("root={root} is not a device below /dev")));
        }
        Ok(Self {
            root: PathBuf::from(root),
            kind: kind.unwrap_or("ext4").to_owned(),
            flags: flags.map(str::to_owned),
            writable,
            init: PathBuf::from(init.unwrap_or("/sbin/init")),
        })
    }
}

fn await_device(device: &Path) -> Result<(), AgentError> {
    let end = Instant::now() + ROOT_LIMIT;
    while !device.exists() {
        if Instant::now() >= end {
            return Err(AgentError::Late {
                awaited: format!("the root's device {}", device.display()),
                limit_ms: u64::try_from(ROOT_LIMIT.as_millis()).unwrap_or(u64::MAX),
            });
        }
        thread::sleep(ROOT_PAUSE);
    }
    Ok(())
}

fn mount_root(boot: &BootLine) -> Result<(), AgentError> {
    fs::create_dir_all(NEW_ROOT).attempt(|| format!("make the folder {NEW_ROOT}"))?;
    let flags = if boot.writable {
        MountFlags::empty()
    } else {
        MountFlags::RDONLY
    };
    let data = boot
        .flags
        .as_deref()
        .map(CString::new)
        .transpose()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
        .attempt(|| "read rootflags=".to_owned())?;
    mount(
        &boot.root,
        NEW_ROOT,
        boot.kind.as_str(),
        flags,
        data.as_deref(),
    )
    .attempt(|| format!("mount {} as {}", boot.root.display(), boot.kind))
}

fn switch_root() -> Result<(), AgentError> {
    for point in ["/proc", "/sys", "/dev"] {
        let target = format!("{NEW_ROOT}{point}");
        mount_move(point, target.as_str()).attempt(|| format!("move {point} to {target}"))?;
    }
    free_initramfs();
    rustix::process::chdir(NEW_ROOT).attempt(|| format!("go to {NEW_ROOT}"))?;
    mount_move(".", "/").attempt(|| "move the new root to /".to_owned())?;
    rustix::process::chroot(".").attempt(|| "make the new root the root".to_owned())?;
    rustix::process::chdir("/").attempt(|| "go to the new root".to_owned())
}

/// Gives back the memory of the initramfs; what cannot be removed stays, which costs memory only.
fn free_initramfs() {
    let is_initramfs = rustix::fs::statfs("/").is_ok_and(|found| {
        let kind = found.f_type;
        kind == RAMFS_MAGIC || kind == TMPFS_MAGIC
    });
    if !is_initramfs {
        return;
    }
    for result in [fs::remove_dir_all(MODULES), fs::remove_file("/init")] {
        if let Err(error) = result
            && error.kind() != io::ErrorKind::NotFound
        {
            eprintln!("stead-agent: free the initramfs: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_counts_and_what_follows_two_dashes_is_for_init() {
        let boot = BootLine::parse(
            "ro root=/dev/vda quiet root=/dev/vdb rw init=/bin/sh -- ro root=/dev/x",
        )
        .expect("good");
        assert_eq!(boot.root, Path::new("/dev/vdb"));
        assert_eq!(boot.init, Path::new("/bin/sh"));
        assert!(boot.writable);
        let plain = BootLine::parse("root=/dev/vda").expect("good");
        assert_eq!((plain.kind.as_str(), plain.writable), ("ext4", false));
        assert_eq!(plain.init, Path::new("/sbin/init"));
    }

    #[test]
    fn a_root_that_is_no_device_is_refused() {
        assert!(BootLine::parse("quiet").is_err());
        assert!(BootLine::parse("root=UUID=1").is_err());
        assert!(BootLine::parse("root=/dev/../etc/passwd").is_err());
    }

    #[test]
    fn a_module_without_a_file_is_named() {
        let folder = tempfile::tempdir().expect("folder");
        let error = find_module(folder.path(), "virtio_ring").expect_err("no file");
        assert!(error.to_string().contains("virtio_ring"), "{error}");
        load_modules(folder.path()).expect("no list, no modules");
    }
}
