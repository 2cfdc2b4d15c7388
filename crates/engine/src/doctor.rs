//! What this host offers, and what to install or change.

use std::path::Path;

use serde::Serialize;
use stead_sys::{copy, durable, space};

use crate::Engine;
use crate::host::AcceleratorChoice;

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
const PROGRAMS: [(&str, &str, &str); 4] = [
    ("qemu-img", "template import of qcow2 images", "qemu-utils"),
    ("mmdebstrap", "template build", "mmdebstrap"),
    ("mke2fs", "template build", "e2fsprogs"),
    ("dpkg-deb", "template build", "dpkg"),
];

/// Free room below which a worker is said to be short, in bytes.
const ROOM_BYTES: u64 = 8 << 30;

impl Engine {
    /// Looks at everything the engine depends on.
    pub async fn doctor(&self) -> DoctorReport {
        let mut findings = Vec::new();
        match self.host(AcceleratorChoice::Auto).await {
            Ok(host) => {
                findings.push(fine(
                    "qemu",
                    format!("{} {}", host.qemu.binary().display(), host.qemu_version()),
                ));
                findings.push(fine(
                    "machine",
                    format!("{}, CPU {}", host.machine_type, host.cpu_model),
                ));
                findings.push(match &host.kvm {
                    Ok(()) => fine("accelerator", "kvm: a guest booted under it"),
                    Err(why) => note(
                        "accelerator",
                        format!("tcg; kvm is not usable: {why}"),
                        "guests run several times faster under KVM; enable virtualisation (nested, inside a VM)",
                    ),
                });
            }
            Err(error) => findings.push(need(
                "qemu",
                error.to_string(),
                "apt-get install qemu-system-x86 qemu-utils (both from one suite)",
            )),
        }
        findings.extend(PROGRAMS.iter().map(|(program, for_what, package)| {
            if on_path(program) {
                fine(program, for_what.to_string())
            } else {
                note(
                    program,
                    format!("missing; needed for {for_what}"),
                    format!("apt-get install {package}"),
                )
            }
        }));
        findings.push(self.rights());
        findings.push(self.block_sharing());
        findings.extend(self.room());
        findings.push(match self.store().await {
            Ok(_) => fine("store", self.store_url()),
            Err(error) => need(
                "store",
                error.to_string(),
                "`stead store init` makes the one named by --store",
            ),
        });
        DoctorReport { findings }
    }

    fn rights(&self) -> Finding {
        if rustix::process::geteuid().is_root() {
            fine("rights", "root: each VM runs as a user of its own")
        } else {
            note(
                "rights",
                "not root: every VM runs as you",
                "run as root to give each VM a user of its own",
            )
        }
    }

    fn block_sharing(&self) -> Finding {
        match can_reflink(&self.dir.ram()) {
            Ok(true) => fine("reflink", "the data directory's file system shares blocks"),
            Ok(false) => note(
                "reflink",
                "the data directory's file system cannot share blocks",
                "checkpoints stop the guest for less time on XFS or btrfs",
            ),
            Err(error) => note("reflink", error.to_string(), "check the data directory"),
        }
    }

    fn room(&self) -> Vec<Finding> {
        [
            ("room", self.dir.root()),
            ("memory room", Path::new("/dev/shm")),
        ]
        .into_iter()
        .map(|(what, path)| match space::available_bytes(path) {
            Ok(bytes) if bytes >= ROOM_BYTES => fine(
                what,
                format!("{} GiB free on {}", bytes >> 30, path.display()),
            ),
            Ok(bytes) => note(
                what,
                format!("{} MiB free on {}", bytes >> 20, path.display()),
                "checkpoints are refused when they would not fit",
            ),
            Err(error) => note(
                what,
                format!("{}: {error}", path.display()),
                "check the path",
            ),
        })
        .collect()
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
