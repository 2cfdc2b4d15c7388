//! Freezing and thawing every writable file system on a block device, on a thread of its own.
//!
//! The ioctls `FIFREEZE` and `FITHAW` have no safe wrapper, so `fsfreeze` of util-linux (or of busybox) issues
//! them. While file systems are frozen this module writes no file and logs nothing: a write would hang.
//! Whatever was frozen is thawed when one cannot be frozen, when the time is over, and when told to.

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use stead_agent_proto::guest::FrozenMounts;
use stead_agent_proto::message::Bytes;

use crate::core::Core;
use crate::{mounts, reaper};

/// How long file systems stay frozen at most, whatever the host asks.
const MAX_FROZEN: Duration = Duration::from_secs(60);
/// How long freezing or thawing one file system may take.
const ONE_STEP_LIMIT: Duration = Duration::from_secs(10);

/// What the freezer's thread is told.
#[derive(Debug)]
pub(crate) enum Order {
    /// Freeze, for so many milliseconds at most.
    Freeze {
        /// The host's bound; the agent's own is 60 s.
        limit_ms: u64,
    },
    /// Thaw what was frozen.
    Thaw,
    /// Say when all that was told before is done.
    Barrier(Sender<()>),
}

/// How to freeze.
#[derive(Debug, Clone)]
pub(crate) struct Freezer {
    /// What freezes and thaws; nothing when this agent may not.
    pub(crate) program: Option<PathBuf>,
    /// Where mounts are listed.
    pub(crate) mountinfo: PathBuf,
    /// Whether the kernel's emergency thaw is the last resort.
    pub(crate) emergency_thaw: bool,
}

/// Where `fsfreeze` is, or its bare name.
pub(crate) fn find_program() -> PathBuf {
    [
        "/usr/sbin/fsfreeze",
        "/sbin/fsfreeze",
        "/usr/bin/fsfreeze",
        "/bin/fsfreeze",
    ]
    .iter()
    .map(PathBuf::from)
    .find(|path| path.exists())
    .unwrap_or_else(|| PathBuf::from("fsfreeze"))
}

impl Freezer {
    /// Follows orders for ever.
    pub(crate) fn run(&self, core: &Arc<Core>, orders: &Receiver<Order>) {
        let mut frozen: Vec<Vec<u8>> = Vec::new();
        let mut end: Option<Instant> = None;
        loop {
            let order = match end {
                None => orders.recv().map_err(RecvTimeoutError::from),
                Some(end) => orders.recv_timeout(end.saturating_duration_since(Instant::now())),
            };
            match order {
                Ok(Order::Freeze { limit_ms }) => {
                    let result = self.freeze_all(&mut frozen);
                    if result.is_ok() {
                        end =
                            Some(Instant::now() + Duration::from_millis(limit_ms).min(MAX_FROZEN));
                    }
                    core.tell(|agent| agent.freeze_done(result));
                }
                Ok(Order::Thaw) => {
                    end = None;
                    let result = self.thaw_all(&mut frozen);
                    core.tell(|agent| agent.thaw_done(result));
                }
                Ok(Order::Barrier(passed)) => {
                    // Whoever waited may have given up.
                    if passed.send(()).is_err() {
                        continue;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    end = None;
                    core.tell(|agent| agent.freeze_expired());
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn freeze_all(&self, frozen: &mut Vec<Vec<u8>>) -> Result<FrozenMounts, String> {
        let Some(program) = &self.program else {
            return Err("this agent may not freeze file systems".to_owned());
        };
        let list = fs::read(&self.mountinfo)
            .map_err(|error| format!("{}: {error}", self.mountinfo.display()))?;
        let found = mounts::writable(&list);
        rustix::fs::sync();
        // Inner ones first: an outer one that is frozen would block the path to them.
        for point in found.freezable.into_iter().rev() {
            if let Err(error) = step(program, "--freeze", &point) {
                let undone = match self.thaw_all(frozen) {
                    Ok(()) => "what was frozen before is thawed again".to_owned(),
                    Err(error) => {
                        format!("and what was frozen before could not be thawed: {error}")
                    }
                };
                return Err(format!(
                    "freeze {}: {error}; {undone}",
                    String::from_utf8_lossy(&point)
                ));
            }
            frozen.push(point);
        }
        let bytes = |points: &[Vec<u8>]| points.iter().map(|point| Bytes(point.clone())).collect();
        Ok(FrozenMounts {
            frozen: bytes(frozen),
            unsupported: bytes(&found.unsupported),
        })
    }

    fn thaw_all(&self, frozen: &mut Vec<Vec<u8>>) -> Result<(), String> {
        let Some(program) = &self.program else {
            return Ok(());
        };
        let mut errors = Vec::new();
        let mut left = Vec::new();
        // The one frozen last is thawed first.
        while let Some(point) = frozen.pop() {
            if let Err(error) = step(program, "--unfreeze", &point) {
                errors.push(format!("thaw {}: {error}", String::from_utf8_lossy(&point)));
                left.push(point);
            }
        }
        if errors.is_empty() {
            return Ok(());
        }
        if self.emergency_thaw {
            match thaw_everything() {
                Ok(()) => errors.push("the kernel was asked to thaw everything".to_owned()),
                Err(error) => {
                    errors.push(format!("and the kernel's emergency thaw failed: {error}"))
                }
            }
        }
        left.reverse();
        *frozen = left;
        Err(errors.join("; "))
    }
}

/// The kernel's own emergency thaw; needs no program.
///
/// # Source
/// The kernel's Documentation/admin-guide/sysrq.rst, command `j`.
fn thaw_everything() -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open("/proc/sysrq-trigger")?
        .write_all(b"j")
}

fn step(program: &Path, what: &str, point: &[u8]) -> Result<(), String> {
    let start = || {
        Command::new(program)
            .arg(what)
            .arg(std::ffi::OsStr::from_bytes(point))
            .env_clear()
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
    };
    let (mut child, _owned) =
        reaper::own(start).map_err(|error| format!("run {}: {error}", program.display()))?;
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
        .map_err(|error| error.to_string())?;
    let limit = Timespec {
        tv_sec: ONE_STEP_LIMIT.as_secs() as i64,
        tv_nsec: 0,
    };
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))
        .map_err(|error| error.to_string())?;
    if ended == 0 {
        // It may hang in the kernel, where a kill only takes effect later: it is not waited for.
        child.kill().map_err(|error| error.to_string())?;
        return Err(format!("not done within {} s", ONE_STEP_LIMIT.as_secs()));
    }
    let output = child
        .wait_with_output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let text: String = String::from_utf8_lossy(&output.stderr)
        .trim()
        .chars()
        .take(500)
        .collect();
    Err(format!("{} ({})", text, output.status))
}
