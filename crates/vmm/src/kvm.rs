//! Whether a guest really boots under KVM.
//!
//! That `/dev/kvm` opens proves nothing: without nested virtualisation a vCPU may be made and never
//! execute an instruction. So a guest of one boot sector is started with firmware and a disk, as every VM
//! is, and must write one byte to the port that ends QEMU.

use std::os::unix::fs::{FileExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;
use stead_sys::bound_child::BoundChild;

use crate::error::{Error, Result};
use crate::launch::{RunAs, kvm_group};
use crate::machine::Accelerator;
use crate::process::{output_tail, read_some};
use crate::qemu::Qemu;

/// How long the guest may take to boot. Under KVM it takes 0.1 s, under TCG on a busy host 1 s.
const BOOT_WITHIN: Duration = Duration::from_secs(10);
/// What the guest writes; QEMU exits with twice that plus one.
const PROOF: u8 = 0x2a;
/// `mov al, PROOF; out 0xf4, al; cli; hlt; jmp hlt`.
const GUEST: [u8; 8] = [0xb0, PROOF, 0xe6, 0xf4, 0xfa, 0xf4, 0xeb, 0xfd];
/// The size of the disk; firmware does not boot from one of a single sector.
const DISK_BYTES: u64 = 1 << 20;

/// The answer, which may be kept until the host or QEMU changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmProbe {
    /// Whether a guest booted under KVM.
    pub works: bool,
    /// The CPU model it booted with, or why it did not.
    pub detail: String,
}

impl KvmProbe {
    /// Boots a guest of one sector under KVM, as the user `run_as` if given. Takes up to 10 s.
    ///
    /// # Errors
    /// When the attempt itself could not be made; that KVM does not work is an answer, not an error.
    pub fn run(qemu: &Qemu, run_as: Option<RunAs>) -> Result<Self> {
        let path = Path::new("/dev/kvm");
        if let Err(error) = std::fs::metadata(path) {
            return Ok(Self {
                works: false,
                detail: format!("/dev/kvm: {error}"),
            });
        }
        let attempt = Attempt {
            accelerator: Accelerator::Kvm,
            guest: &GUEST,
            within: BOOT_WITHIN,
            run_as,
        };
        attempt.make(qemu)
    }

    /// KVM if it was proven to work, else TCG.
    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        if self.works {
            Accelerator::Kvm
        } else {
            Accelerator::Tcg
        }
    }
}

/// One attempt to boot a guest.
struct Attempt<'a> {
    accelerator: Accelerator,
    guest: &'a [u8],
    within: Duration,
    run_as: Option<RunAs>,
}

impl Attempt<'_> {
    fn make(&self, qemu: &Qemu) -> Result<KvmProbe> {
        let no = |detail| KvmProbe {
            works: false,
            detail,
        };
        let model = match qemu.default_cpu_model(self.accelerator) {
            Ok(model) => model,
            Err(Error::Unusable { found, .. }) => return Ok(no(found)),
            Err(error) => return Err(error),
        };
        let folder = tempfile::tempdir().map_err(system("make a folder for the probe's disk"))?;
        let disk = folder.path().join("disk");
        self.write_disk(folder.path(), &disk)
            .map_err(system("write the probe's disk"))?;
        let mut child = self.spawn(qemu, &model, &disk)?;
        let Some(status) = self.wait(&mut child)? else {
            return Ok(no(format!("a guest did not boot within {:?}", self.within)));
        };
        if status.code() == Some(i32::from(PROOF) * 2 + 1) {
            return Ok(KvmProbe {
                works: true,
                detail: model,
            });
        }
        let said = child.child.stderr.take().map(read_some).unwrap_or_default();
        let said = output_tail(&said);
        Ok(no(format!("QEMU ended with {status}: {said}")))
    }

    fn write_disk(&self, folder: &Path, disk: &Path) -> std::io::Result<()> {
        let image = stead_sys::durable::create_scratch(disk, 0o600)?;
        image.set_len(DISK_BYTES)?;
        image.write_all_at(self.guest, 0)?;
        image.write_all_at(&[0x55, 0xaa], 510)?;
        if let Some(user) = self.run_as {
            chown(disk, Some(user.uid), Some(user.gid))?;
            chown(folder, Some(user.uid), Some(user.gid))?;
        }
        Ok(())
    }

    fn spawn(&self, qemu: &Qemu, model: &str, disk: &Path) -> Result<BoundChild> {
        let machine = format!(
            "{},accel={}",
            qemu.default_machine_type()?,
            self.accelerator
        );
        let disk = json!({
            "driver": "raw", "node-name": "disk", "read-only": true,
            "file": { "driver": "file", "filename": disk.to_string_lossy(), "read-only": true },
        });
        let mut command = Command::new(qemu.binary());
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-vga", "none", "-m", "32", "-machine", &machine])
            .args([
                "-sandbox",
                "on,obsolete=deny,elevateprivileges=deny,spawn=deny",
            ])
            .args(["-cpu", &format!("{model},enforce=on")])
            .args(["-blockdev", &disk.to_string()])
            .args(["-device", "virtio-blk-pci,drive=disk"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(user) = self.run_as {
            let group = match self.accelerator {
                Accelerator::Kvm => kvm_group(user)?,
                Accelerator::Tcg => user.gid,
            };
            command.gid(group).uid(user.uid);
        }
        // A guest that hangs runs for ever, and in a folder that nobody looks for: it must not outlive us.
        BoundChild::spawn(&mut command).map_err(|source| Error::Unusable {
            binary: qemu.binary().to_owned(),
            found: source.to_string(),
        })
    }

    /// Waits for the end of the guest and brings it about in time; `None` when it had to be killed.
    fn wait(&self, bound: &mut BoundChild) -> Result<Option<ExitStatus>> {
        let child = &mut bound.child;
        let until = Instant::now() + self.within;
        while Instant::now() < until {
            if let Some(status) = child.try_wait().map_err(system("wait for the probe"))? {
                return Ok(Some(status));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().map_err(system("end the probe"))?;
        child.wait().map_err(system("wait for the probe's end"))?;
        Ok(None)
    }
}

fn system(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::System { what, source }
}

#[cfg(test)]
mod tests {
    use stead_sys::process::ProcessId;

    use super::*;

    fn attempt(guest: &[u8], within: Duration) -> KvmProbe {
        let qemu = Qemu::detect(None).expect("QEMU is installed");
        let attempt = Attempt {
            accelerator: Accelerator::Tcg,
            guest,
            within,
            run_as: None,
        };
        attempt.make(&qemu).expect("attempt")
    }

    #[test]
    fn the_probe_says_yes_where_a_guest_boots() {
        let answer = attempt(&GUEST, Duration::from_secs(60));
        assert!(answer.works, "{}", answer.detail);
    }

    /// Names the child process below.
    const PROBING: &str = "STEAD_TEST_BOOTING";

    /// Run by the test below, in a process that is killed. The thread that probes is not its first.
    #[test]
    fn a_process_that_boots_a_guest_which_hangs_and_waits_to_be_killed() {
        if std::env::var_os(PROBING).is_some() {
            assert!(!attempt(&GUEST[4..], Duration::from_secs(60)).works);
        }
    }

    /// The process that `parent` has started to boot the guest.
    fn booting(parent: u32) -> Option<ProcessId> {
        let ours = |entry: std::io::Result<std::fs::DirEntry>| {
            let folder = entry.ok()?.path();
            let status = std::fs::read_to_string(folder.join("status")).ok()?;
            let line = std::fs::read_to_string(folder.join("cmdline")).ok()?;
            let is_it =
                status.contains(&format!("\nPPid:\t{parent}\n")) && line.contains("isa-debug-exit");
            is_it
                .then(|| folder.file_name()?.to_str()?.parse().ok())
                .flatten()
        };
        let pid = std::fs::read_dir("/proc").ok()?.find_map(ours)?;
        ProcessId::of(pid).ok()
    }

    fn within<T>(mut found: impl FnMut() -> Option<T>) -> Option<T> {
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until {
            if let Some(found) = found() {
                return Some(found);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    #[test]
    fn a_probe_ends_when_who_probes_is_killed() {
        let this = std::env::current_exe().expect("this program");
        let mut asking = Command::new(this)
            .args([
                "--exact",
                "kvm::tests::a_process_that_boots_a_guest_which_hangs_and_waits_to_be_killed",
            ])
            .env(PROBING, "1")
            .stdout(Stdio::null())
            .spawn()
            .expect("spawn");
        let qemu = within(|| booting(asking.id())).expect("a guest is booted");
        asking.kill().expect("kill");
        asking.wait().expect("wait");
        let ended = || (!qemu.is_alive().expect("ask")).then_some(());
        within(ended).expect("QEMU ends with who started it");
    }

    /// The twin: QEMU starts and the firmware runs, but the guest proves nothing.
    #[test]
    fn the_probe_says_no_where_only_qemu_runs() {
        let answer = attempt(&GUEST[4..], Duration::from_secs(2));
        assert!(!answer.works);
        assert_eq!(answer.detail, "a guest did not boot within 2s");
        let wrong_value = [0xb0, PROOF + 1, 0xe6, 0xf4, 0xf4];
        assert!(!attempt(&wrong_value, BOOT_WITHIN).works);
    }
}
