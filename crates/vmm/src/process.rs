//! The QEMU process: started apart from us, named, watched, and its last words.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use stead_sys::process::ProcessId;

use crate::dir;
use crate::error::{Error, Result};

/// How much of the end of a log an error repeats, in bytes.
const TAIL_BYTES: usize = 2048;
/// How long the end of a process is waited for after its connection broke.
const END_WITHIN: Duration = Duration::from_secs(2);

/// How a QEMU process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this exit code; 0 after *quit* and after the guest powered itself off.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was not started by this program, so the system does not tell.
    Unknown,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "with exit code {code}"),
            Self::Signal(signal) => write!(f, "by signal {signal}"),
            Self::Unknown => f.write_str("exit status unknown"),
        }
    }
}

/// A process that cannot be mistaken for a later one with its number.
#[derive(Debug)]
pub(crate) struct Process {
    id: ProcessId,
    pidfd: OwnedFd,
    /// Filled by the thread that waits for a child of ours.
    status: Option<Arc<OnceLock<ExitStatus>>>,
    /// Where in the log the words of this process begin.
    log_start: u64,
}

impl Process {
    /// Takes over `child`, which a thread of its own waits for from now on.
    pub(crate) fn adopt(mut child: Child, folder: &Path, log_start: u64) -> Result<Self> {
        let status = Arc::new(OnceLock::new());
        let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
        // Named before anything waits for it: until then the number cannot be reused.
        let named = open(pid);
        let filled = Arc::clone(&status);
        let waiter = std::thread::Builder::new()
            .name(format!("qemu-{pid}"))
            .spawn(move || match child.wait() {
                Ok(ended) => drop(filled.set(ended)),
                Err(error) => tracing::warn!(%error, pid, "cannot wait for QEMU"),
            });
        if let Err(source) = waiter {
            tracing::warn!(%source, pid, "no thread to wait for QEMU: it will stay as a zombie");
        }
        match named {
            Ok((id, pidfd)) => Ok(Self {
                id,
                pidfd,
                status: Some(status),
                log_start,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(died(&pid.to_string(), Exit::Unknown, folder, log_start))
            }
            Err(source) => Err(Error::System {
                what: "name the QEMU process",
                source,
            }),
        }
    }

    /// Finds the process `id` again.
    pub(crate) fn find(id: ProcessId) -> Result<Self> {
        let gone = || Error::NotRunning {
            process: id.to_string(),
        };
        match open(id.pid) {
            Ok((now, pidfd)) if now == id => Ok(Self {
                id,
                pidfd,
                status: None,
                log_start: 0,
            }),
            Ok(_other) => Err(gone()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(gone()),
            Err(source) => Err(Error::System {
                what: "find the QEMU process",
                source,
            }),
        }
    }

    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    /// Waits for its end; `None` when it still runs after `within`.
    pub(crate) fn wait(&self, within: Duration) -> Result<Option<Exit>> {
        let until = Instant::now() + within;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let bound = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut watched = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut watched, Some(&bound)) {
                Ok(0) => return Ok(None),
                Ok(_) => return Ok(Some(self.exit())),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    return Err(Error::System {
                        what: "wait for the QEMU process",
                        source: error.into(),
                    });
                }
            }
        }
    }

    /// If it has ended or does so at once, the error that says so; else `error` as it is.
    pub(crate) fn explain(&self, error: Error, folder: &Path) -> Error {
        match self.wait(END_WITHIN) {
            Ok(Some(exit)) => died(&self.id.to_string(), exit, folder, self.log_start),
            Ok(None) => error,
            Err(second) => {
                tracing::warn!(%second, "cannot tell whether QEMU has ended");
                error
            }
        }
    }

    fn exit(&self) -> Exit {
        let Some(slot) = &self.status else {
            return Exit::Unknown;
        };
        let until = Instant::now() + END_WITHIN;
        while slot.get().is_none() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        match slot.get() {
            None => Exit::Unknown,
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            },
        }
    }
}

/// Names the process that has the number `pid` and holds on to it.
fn open(pid: i32) -> io::Result<(ProcessId, OwnedFd)> {
    let raw = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Err(io::ErrorKind::NotFound.into()),
        other => other?,
    };
    Ok((ProcessId::of(pid)?, pidfd))
}

fn died(process: &str, exit: Exit, folder: &Path, log_start: u64) -> Error {
    let log_tail = match log_tail(folder, log_start) {
        Ok(tail) if tail.is_empty() => "none".to_owned(),
        Ok(tail) => tail,
        Err(error) => format!("(its log cannot be read: {error})"),
    };
    Error::Died {
        process: process.to_owned(),
        status: exit.to_string(),
        log_tail,
    }
}

/// Opens the log of the QEMU in `folder` for appending, and says where it ends now.
pub(crate) fn open_log(folder: &Path) -> io::Result<(File, u64)> {
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(folder.join(dir::QEMU_LOG))?;
    let end = log.metadata()?.len();
    Ok((log, end))
}

fn log_tail(folder: &Path, start: u64) -> io::Result<String> {
    let mut log = File::open(folder.join(dir::QEMU_LOG))?;
    let end = log.metadata()?.len();
    log.seek(SeekFrom::Start(
        start.max(end.saturating_sub(TAIL_BYTES as u64)),
    ))?;
    Ok(output_tail(&read_some(log)))
}

/// The beginning of `source`, as much as an error needs; empty if it cannot be read.
pub(crate) fn read_some(source: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Err(error) = source.take(64 << 10).read_to_end(&mut bytes) {
        tracing::warn!(%error, "QEMU's output cannot be read");
    }
    bytes
}

/// The last lines of `bytes` on one line.
pub(crate) fn output_tail(bytes: &[u8]) -> String {
    let from = bytes.len().saturating_sub(TAIL_BYTES);
    let text = String::from_utf8_lossy(&bytes[from..]);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    lines.join(" | ")
}
