//! Freezing and thawing every writable file system on a block device, on a thread of its own.
//!
//! The ioctls `FIFREEZE` and `FITHAW` have no safe wrapper, so `fsfreeze` of util-linux (or of busybox) issues
//! them. While file systems are frozen this module writes no file and logs nothing: a write would hang.
//! Whatever was frozen is thawed when one cannot be frozen, when the time is over, and when told to. What cannot be
//! thawed is tried again every second.
//!
//! A file system counts as frozen from before it is told to freeze until its thaw is certain. `fsfreeze` may hang in
//! the kernel, where a kill only takes effect later and the ioctl may still come to its end: such a process is
//! kept, and nothing is tried on its file system before it has ended.

use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use stead_agent_proto::guest::{FreezeFailure, FrozenMounts};
use stead_agent_proto::message::Bytes;

use crate::core::Core;
use crate::mounts;
use crate::reaper::{self, Owned};

/// How long file systems stay frozen at most, whatever the host asks.
const MAX_FROZEN: Duration = Duration::from_secs(60);
/// How long freezing or thawing one file system may take.
const ONE_STEP_LIMIT: Duration = Duration::from_secs(10);
/// How long one that was killed is waited for.
const KILLED_LIMIT: Duration = Duration::from_secs(1);
/// After how long it is tried again to thaw what could not be.
const THAW_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// What the kernel says to the thaw of a file system that is not frozen (`EINVAL`).
const NOT_FROZEN: &str = "Invalid argument";

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
        let mut frozen: Vec<Frozen> = Vec::new();
        let mut end: Option<Instant> = None;
        loop {
            let order = match end {
                None => orders.recv().map_err(RecvTimeoutError::from),
                Some(end) => orders.recv_timeout(end.saturating_duration_since(Instant::now())),
            };
            match order {
                Ok(Order::Freeze { limit_ms }) => {
                    let result = self.freeze_all(&mut frozen);
                    let limit = match result {
                        Ok(_) => Duration::from_millis(limit_ms).min(MAX_FROZEN),
                        Err(_) => THAW_AGAIN_AFTER,
                    };
                    end = (!frozen.is_empty()).then(|| Instant::now() + limit);
                    core.tell(|agent| agent.freeze_done(result));
                }
                Ok(Order::Thaw) => {
                    let result = self.thaw_all(&mut frozen);
                    end = (!frozen.is_empty()).then(|| Instant::now() + THAW_AGAIN_AFTER);
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

    fn freeze_all(&self, frozen: &mut Vec<Frozen>) -> Result<FrozenMounts, FreezeFailure> {
        let nothing_done = |error| FreezeFailure {
            error,
            still_frozen: false,
        };
        let Some(program) = &self.program else {
            return Err(nothing_done(
                "this agent may not freeze file systems".to_owned(),
            ));
        };
        let list = fs::read(&self.mountinfo)
            .map_err(|error| nothing_done(format!("{}: {error}", self.mountinfo.display())))?;
        let found = mounts::writable(&list);
        rustix::fs::sync();
        // Inner ones first: an outer one that is frozen would block the path to them.
        for point in found.freezable.into_iter().rev() {
            frozen.push(Frozen::untouched(point));
            if let Some(Err(error)) = frozen.last_mut().map(|last| last.freeze(program)) {
                return Err(self.undo(error, frozen));
            }
        }
        let bytes = |point: &Vec<u8>| Bytes(point.clone());
        Ok(FrozenMounts {
            frozen: frozen.iter().map(|mount| bytes(&mount.point)).collect(),
            unsupported: found.unsupported.iter().map(bytes).collect(),
        })
    }

    /// Thaws after the last of `frozen` could not be frozen. One that refused is not frozen by us; one that hung may be.
    fn undo(&self, error: String, frozen: &mut Vec<Frozen>) -> FreezeFailure {
        if frozen.last().is_some_and(|last| !last.may_be_frozen) {
            frozen.pop();
        }
        let undone = match self.thaw_all(frozen) {
            Ok(()) => "what was frozen before is thawed again".to_owned(),
            Err(error) => format!("and what was frozen before could not be thawed: {error}"),
        };
        FreezeFailure {
            error: format!("{error}; {undone}"),
            still_frozen: !frozen.is_empty(),
        }
    }

    fn thaw_all(&self, frozen: &mut Vec<Frozen>) -> Result<(), String> {
        let Some(program) = &self.program else {
            return Ok(());
        };
        let mut errors = Vec::new();
        let mut left = Vec::new();
        // The one frozen last is thawed first.
        while let Some(mut mount) = frozen.pop() {
            if let Err(error) = mount.thaw(program) {
                errors.push(error);
                left.push(mount);
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

/// A file system that is or may be frozen.
#[derive(Debug)]
struct Frozen {
    point: Vec<u8>,
    may_be_frozen: bool,
    // What was killed and has not ended: it may still freeze or thaw.
    hung: Option<Hung>,
}

/// A process that was killed and hangs in the kernel.
#[derive(Debug)]
struct Hung {
    child: Child,
    _owned: Owned,
}

/// Why a step was not done.
enum StepError {
    /// The program said so.
    Refused(String),
    /// It was not done in time, or its process was killed by somebody: the kernel may have done it, and may still do it
    /// while the process hangs.
    Unknown { why: String, hung: Option<Hung> },
}

impl Frozen {
    fn untouched(point: Vec<u8>) -> Self {
        Self {
            point,
            may_be_frozen: false,
            hung: None,
        }
    }

    fn freeze(&mut self, program: &Path) -> Result<(), String> {
        match step(program, "--freeze", &self.point) {
            Ok(()) => {
                self.may_be_frozen = true;
                Ok(())
            }
            Err(StepError::Refused(error)) => Err(self.said("freeze", &error)),
            Err(StepError::Unknown { why, hung }) => {
                self.may_be_frozen = true;
                self.hung = hung;
                Err(self.said("freeze", &why))
            }
        }
    }

    /// Thaws it; one that is not frozen any more (by the kernel's emergency thaw, or by a process that was killed) counts
    /// as thawed.
    fn thaw(&mut self, program: &Path) -> Result<(), String> {
        self.hung = match self.hung.take().map(|hung| hung.end(KILLED_LIMIT)) {
            Some(Err(hung)) => {
                self.hung = Some(hung);
                return Err(self.said("thaw", "what was killed before hangs in the kernel"));
            }
            Some(Ok(())) | None => None,
        };
        match step(program, "--unfreeze", &self.point) {
            Ok(()) => Ok(()),
            Err(StepError::Refused(error)) if error.contains(NOT_FROZEN) => Ok(()),
            Err(StepError::Refused(error)) => Err(self.said("thaw", &error)),
            Err(StepError::Unknown { why, hung }) => {
                self.hung = hung;
                Err(self.said("thaw", &why))
            }
        }
    }

    fn said(&self, what: &str, error: &str) -> String {
        format!("{what} {}: {error}", String::from_utf8_lossy(&self.point))
    }
}

impl Hung {
    /// Reaps it if it ends in time.
    fn end(mut self, limit: Duration) -> Result<(), Self> {
        match wait_for(&self.child, limit) {
            Ok(true) => {}
            Ok(false) | Err(_) => return Err(self),
        }
        match self.child.wait() {
            Ok(_) => Ok(()),
            Err(_) => Err(self),
        }
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

fn step(program: &Path, what: &str, point: &[u8]) -> Result<(), StepError> {
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
    let (child, owned) = reaper::own(start)
        .map_err(|error| StepError::Refused(format!("run {}: {error}", program.display())))?;
    if !matches!(wait_for(&child, ONE_STEP_LIMIT), Ok(true)) {
        return Err(too_long(child, owned));
    }
    let output = child
        .wait_with_output()
        .map_err(|error| StepError::Unknown {
            why: error.to_string(),
            hung: None,
        })?;
    if output.status.success() {
        return Ok(());
    }
    let text: String = String::from_utf8_lossy(&output.stderr)
        .trim()
        .chars()
        .take(500)
        .collect();
    let why = format!("{} ({})", text, output.status);
    Err(match output.status.code() {
        Some(_) => StepError::Refused(why),
        None => StepError::Unknown { why, hung: None },
    })
}

/// Kills what was not done in time.
fn too_long(mut child: Child, owned: Owned) -> StepError {
    let limit = match child.kill() {
        Ok(()) => KILLED_LIMIT,
        Err(_) => Duration::ZERO,
    };
    let hung = Hung {
        child,
        _owned: owned,
    };
    StepError::Unknown {
        why: format!("not done within {} s", ONE_STEP_LIMIT.as_secs()),
        hung: hung.end(limit).err(),
    }
}

/// Whether the child ends in time; it is not reaped.
fn wait_for(child: &Child, limit: Duration) -> io::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let limit = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
