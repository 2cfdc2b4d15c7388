//! What this host offers, and what to install or change.

use std::path::{Path, PathBuf};

use serde::Serialize;
use stead_sys::{copy, durable, space};
use stead_vmm::Qemu;

use crate::error::{EngineError, Kind};
use crate::event::Watch;
use crate::host::AcceleratorChoice;
use crate::{Engine, Settings};

/// How a finding is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Advice {
    /// Works.
    Fine,
    /// Works, slower or smaller than it could.
    Note,
    /// Nothing works without it.
    Need,
}

impl Advice {
    /// The word in output.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Fine => "fine",
            Self::Note => "note",
            Self::Need => "need",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// How to take it.
    pub advice: Advice,
    /// What was looked at.
    pub what: &'static str,
    /// What was found.
    pub found: String,
    /// What to do.
    pub next: Option<String>,
}

/// Everything that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct DoctorReport {
    /// In the order in which it matters.
    pub findings: Vec<Finding>,
}

impl DoctorReport {
    /// Whether sandboxes can run here.
    #[must_use]
    pub fn usable(&self) -> bool {
        self.findings
            .iter()
            .all(|finding| finding.advice != Advice::Need)
    }
}

fn fine(what: &'static str, found: impl Into<String>) -> Finding {
    Finding {
        advice: Advice::Fine,
        what,
        found: found.into(),
        next: None,
    }
}

fn note(what: &'static str, found: impl Into<String>, next: impl Into<String>) -> Finding {
    Finding {
        advice: Advice::Note,
        what,
        found: found.into(),
        next: Some(next.into()),
    }
}

fn need(what: &'static str, found: impl Into<String>, next: impl Into<String>) -> Finding {
    Finding {
        advice: Advice::Need,
        what,
        found: found.into(),
        next: Some(next.into()),
    }
}

/// Programs that are run, what for, and the Debian package that has each.
const PROGRAMS: [(&str, &str, &str); 9] = [
    ("qemu-img", "template import of qcow2 images", "qemu-utils"),
    ("mmdebstrap", "template build", "mmdebstrap"),
    ("apt-get", "template build", "apt"),
    ("dpkg-deb", "template build", "dpkg"),
    ("mke2fs", "template build", "e2fsprogs"),
    ("e2fsck", "template build", "e2fsprogs"),
    ("debugfs", "template build", "e2fsprogs"),
    ("tar", "template build", "tar"),
    ("unshare", "template build", "util-linux"),
];

/// Free room below which a worker is said to be short, in bytes.
const ROOM_BYTES: u64 = 8 << 30;
/// Free room below which a sandbox of the usual size can neither run nor be captured, in bytes.
const ROOM_BYTES_MIN: u64 = 1 << 30;

/// Looks at everything a worker depends on, whether or not it can be opened.
pub async fn doctor(settings: Settings, watch: Watch) -> DoctorReport {
    let mut findings = Vec::new();
    let root = settings.data_dir.clone();
    match Engine::open(settings, watch).await {
        Ok(engine) => {
            findings.push(fine("data", root.display().to_string()));
            findings.extend(engine.machines().await);
            findings.extend(engine.store_and_room().await);
        }
        Err(error) => {
            findings.push(need(
                "data",
                format!("{}: {}", error.attempt(), error.found()),
                error.next_step(),
            ));
            findings.push(qemu_alone().await);
        }
    }
    findings.push(kvm_device());
    findings.extend(PROGRAMS.iter().map(program));
    findings.push(debian_sources());
    findings.push(rights());
    DoctorReport { findings }
}

impl Engine {
    /// QEMU, the machine it makes and how it runs guests.
    async fn machines(&self) -> Vec<Finding> {
        let host = match self.host(AcceleratorChoice::Auto).await {
            Ok(host) => host,
            Err(error) => return vec![no_qemu(error.to_string())],
        };
        let found = format!("{} {}", host.qemu.binary().display(), host.qemu_version());
        let machine = format!("{}, CPU {}", host.machine_type, host.cpu_model);
        let accelerator = match &host.kvm {
            Ok(()) => fine("accelerator", "kvm: a guest booted under it"),
            Err(why) => note(
                "accelerator",
                format!("tcg; kvm is not usable: {why}"),
                "guests run several times faster under KVM; enable virtualisation (nested, inside a VM)",
            ),
        };
        vec![fine("qemu", found), fine("machine", machine), accelerator]
    }

    async fn store_and_room(&self) -> Vec<Finding> {
        let (reflink, shares) = match can_reflink(&self.dir.ram()) {
            Ok(true) => (
                fine("reflink", "the data directory's file system shares blocks"),
                true,
            ),
            Ok(false) => (
                note(
                    "reflink",
                    "the data directory's file system cannot share blocks",
                    "checkpoints stop the guest for less time on XFS or btrfs",
                ),
                false,
            ),
            Err(error) => (
                need("reflink", error.to_string(), "check the data directory"),
                false,
            ),
        };
        let store = match self.store().await {
            Ok(_) => fine("store", self.store_url()),
            Err(error) => need(
                "store",
                format!("{}: {}", error.attempt(), error.found()),
                "`stead store init` makes the one named by --store",
            ),
        };
        vec![
            reflink,
            room("room", self.dir.root(), true),
            // Live RAM lies there only where the data directory shares no blocks.
            room("memory room", Path::new("/dev/shm"), !shares),
            store,
        ]
    }
}

/// Of a worker that cannot be opened.
async fn qemu_alone() -> Finding {
    let found = crate::blocking(|| {
        Qemu::detect(None)
            .map_err(|source| EngineError::new(Kind::Vm, "find QEMU", "").because(source))
    });
    match found.await {
        Ok(qemu) => fine(
            "qemu",
            format!("{} {}", qemu.binary().display(), qemu.version()),
        ),
        Err(error) => no_qemu(error.found()),
    }
}

fn no_qemu(found: String) -> Finding {
    need(
        "qemu",
        found,
        "apt-get install qemu-system-x86 qemu-utils (both from one suite)",
    )
}

/// Whether this user may use `/dev/kvm`. That a guest boots under it is another finding.
fn kvm_device() -> Finding {
    let path = Path::new("/dev/kvm");
    match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
    {
        Ok(_) => fine("/dev/kvm", "may be opened"),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => note(
            "/dev/kvm",
            error.to_string(),
            "add this user to the group kvm, or run as root",
        ),
        Err(error) => note(
            "/dev/kvm",
            error.to_string(),
            "load the module kvm_intel or kvm_amd; inside a VM, enable nested virtualisation",
        ),
    }
}

fn program((program, for_what, package): &(&'static str, &str, &str)) -> Finding {
    if on_path(program) {
        fine(program, (*for_what).to_owned())
    } else {
        note(
            program,
            format!("missing; needed for {for_what}"),
            format!("apt-get install {package}"),
        )
    }
}

/// Where `template build` takes packages from.
fn debian_sources() -> Finding {
    let what = "apt sources";
    let folder = std::fs::read_dir("/etc/apt/sources.list.d").into_iter();
    let files = folder.flatten().flatten().map(|entry| entry.path());
    let named = files
        .chain([PathBuf::from("/etc/apt/sources.list")])
        .filter(|path| std::fs::read_to_string(path).is_ok_and(|text| names_a_source(&text)))
        .count();
    match named {
        0 => note(
            what,
            "no file names a Debian source; template build needs one",
            "add one below /etc/apt/sources.list.d, or import a template",
        ),
        files => fine(what, format!("{files} files name some")),
    }
}

/// Whether a file of apt's, in the one-line or the deb822 form, names a source of binary packages.
fn names_a_source(text: &str) -> bool {
    text.lines().map(str::trim_start).any(|line| {
        line.starts_with("deb ")
            || line.starts_with("deb\t")
            || line.starts_with("deb [")
            || line
                .strip_prefix("Types:")
                .is_some_and(|types| types.split_whitespace().any(|word| word == "deb"))
    })
}

fn rights() -> Finding {
    if rustix::process::geteuid().is_root() {
        fine("rights", "root: each VM runs as a user of its own")
    } else {
        note(
            "rights",
            "not root: every VM runs as you, and `template build` is refused",
            "run as root to give each VM a user of its own and to build templates",
        )
    }
}

/// How much room is left; too little is a failure only where it is needed.
fn room(what: &'static str, path: &Path, needed: bool) -> Finding {
    let bytes = match space::available_bytes(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            return note(
                what,
                format!("{}: {error}", path.display()),
                "check the path",
            );
        }
    };
    let found = format!("{} MiB free on {}", bytes >> 20, path.display());
    if bytes >= ROOM_BYTES || !needed {
        fine(what, found)
    } else if bytes >= ROOM_BYTES_MIN {
        note(
            what,
            found,
            "checkpoints are refused when they would not fit",
        )
    } else {
        need(
            what,
            format!(
                "{found}; a sandbox of the usual size needs {} MiB",
                ROOM_BYTES_MIN >> 20
            ),
            "make room there, or name another folder with --data-dir",
        )
    }
}

/// Whether files in `folder` can share blocks, found by trying.
pub(crate) fn can_reflink(folder: &Path) -> std::io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let source = match durable::nameless(folder) {
        Ok(source) => source,
        // A file system that has neither.
        Err(error) if error.kind() == std::io::ErrorKind::Unsupported => return Ok(false),
        Err(error) => return Err(error),
    };
    source.write_all_at(&[1; 4096], 0)?;
    copy::reflink(&source, &durable::nameless(folder)?)
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|folder| folder.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debian_source_is_found_in_both_forms_of_apt_s_files() {
        for yes in [
            "deb http://deb.example/debian stable main",
            "# a\n  deb [signed-by=/k] http://deb.example/debian stable main\n",
            "Types: deb deb-src\nURIs: http://deb.example/debian\n",
        ] {
            assert!(names_a_source(yes), "{yes}");
        }
        for no in [
            "",
            "# deb http://deb.example/debian stable main",
            "deb-src http://deb.example/debian stable main",
            "Types: deb-src\nURIs: http://deb.example/debian\n",
        ] {
            assert!(!names_a_source(no), "{no}");
        }
    }
}
