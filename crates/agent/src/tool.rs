//! Running one of the guest's own programs to its end, within a bound.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::reaper;

/// Where programs are looked for.
const FOLDERS: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];
/// How much of what a program complains is passed on, in characters.
const MAX_COMPLAINT_CHARS: usize = 500;

/// Where the program is, if the guest has it.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
}

/// Runs it; gives what it says, or what is wrong if it does not succeed within the limit. One that is too slow is killed;
/// so is one that says more than a pipe holds (64 KiB), since nobody listens before its end.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    command
        .env_clear()
        .env("PATH", FOLDERS.join(":"))
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let (mut child, owned) =
        reaper::own(|| command.spawn()).map_err(|error| format!("run {name}: {error}"))?;
    let in_time = ends_within(&child, limit);
    if !matches!(in_time, Ok(true)) {
        // One that has ended meanwhile takes the signal without a complaint.
        child
            .kill()
            .map_err(|error| format!("{name} is too slow and cannot be killed: {error}"))?;
    }
    let output = child.wait_with_output();
    drop(owned);
    let output = output.map_err(|error| format!("wait for {name}: {error}"))?;
    match in_time {
        Ok(true) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        }
        Ok(true) => Err(format!(
            "{name}: {} ({})",
            complaint(&output.stderr),
            output.status
        )),
        Ok(false) => Err(format!("{name}: not done within {} s", limit.as_secs())),
        Err(error) => Err(format!("wait for {name}: {error}")),
    }
}

fn complaint(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    text.trim().chars().take(MAX_COMPLAINT_CHARS).collect()
}

fn ends_within(child: &std::process::Child, limit: Duration) -> rustix::io::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)))
        .map(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_fails_is_quoted_and_one_that_hangs_is_killed() {
        let sh = |script: &str| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]);
            command
        };
        let second = Duration::from_secs(60);
        assert_eq!(run(&mut sh("echo yes"), second), Ok("yes\n".to_owned()));
        let error = run(&mut sh("echo no >&2; exit 3"), second).expect_err("3");
        assert_eq!(error, "/bin/sh: no (exit status: 3)");
        let error = run(&mut sh("exec sleep 100"), Duration::from_millis(20)).expect_err("slow");
        assert_eq!(error, "/bin/sh: not done within 0 s");
        assert!(find("sh").is_some() && find("no-such-program").is_none());
    }
}
