//! Shutting the machine down through its init, or without one.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use rustix::system::{RebootCommand, reboot};
use stead_agent_proto::message::ShutdownKind;

const GRACE: Duration = Duration::from_secs(3);

/// Begins a shutdown after `first` has returned, on a thread of its own; through the guest's init if that may run.
pub(crate) fn begin(kind: ShutdownKind, by_init: bool, first: impl FnOnce() + Send + 'static) {
    let begun = thread::Builder::new()
        .name("shutdown".to_owned())
        .spawn(move || {
            first();
            shut_down(kind, by_init);
        });
    if let Err(error) = begun {
        eprintln!("stead-agent: cannot begin to shut down: {error}");
    }
}

fn shut_down(kind: ShutdownKind, by_init: bool) {
    let word = match kind {
        ShutdownKind::Poweroff => "poweroff",
        ShutdownKind::Reboot => "reboot",
    };
    eprintln!("stead-agent: {word}, as the host asked");
    if by_init && std::process::id() != 1 {
        if Path::new("/run/systemd/system").exists() && ask(&["systemctl", "--no-block", word]) {
            return;
        }
        if ask(&[word]) {
            return;
        }
    }
    by_hand(kind, by_init);
}

fn ask(command: &[&str]) -> bool {
    let asked = Command::new(command[0])
        .args(&command[1..])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .status();
    match asked {
        Ok(status) if status.success() => true,
        Ok(status) => {
            eprintln!("stead-agent: {command:?}: {status}");
            false
        }
        Err(error) => {
            eprintln!("stead-agent: {command:?}: {error}");
            false
        }
    }
}

/// Without an init that helps: end every process, write what is dirty, and go. Processes that stand still cannot be asked;
/// the kernel ends them as they are.
fn by_hand(kind: ShutdownKind, they_run: bool) {
    if they_run {
        signal_others(Signal::TERM);
        let end = Instant::now() + GRACE;
        while Instant::now() < end && !others().is_empty() {
            thread::sleep(Duration::from_millis(20));
        }
    }
    signal_others(Signal::KILL);
    rustix::fs::sync();
    if let Err(error) = rustix::mount::mount_remount("/", rustix::mount::MountFlags::RDONLY, "") {
        eprintln!("stead-agent: make the root read-only: {error}");
    }
    let command = match kind {
        ShutdownKind::Poweroff => RebootCommand::PowerOff,
        ShutdownKind::Reboot => RebootCommand::Restart,
    };
    if let Err(error) = reboot(command) {
        eprintln!("stead-agent: {kind:?}: {error}");
    }
}

/// Every process but this one, init and the kernel's own.
fn others() -> Vec<rustix::process::Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let own = std::process::id().to_string();
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name != "1" && *name != own)
        .filter(|name| fs::read(format!("/proc/{name}/cmdline")).is_ok_and(|line| !line.is_empty()))
        .filter_map(|name| rustix::process::Pid::from_raw(name.parse().ok()?))
        .collect()
}

fn signal_others(signal: Signal) {
    for pid in others() {
        // One that has ended meanwhile needs no signal.
        if let Err(error) = kill_process(pid, signal)
            && error != rustix::io::Errno::SRCH
        {
            eprintln!("stead-agent: signal {pid:?}: {error}");
        }
    }
}
