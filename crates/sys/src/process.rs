//! Processes named so that a reused process id is never taken for the one that was meant.

use std::fmt;
use std::fs;
use std::io;
use std::str::FromStr;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A process: its id and when it started, in clock ticks since boot (field 22 of proc(5) `stat`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The process id.
    pub pid: i32,
    /// The start time in clock ticks since boot.
    pub start_ticks: u64,
}

impl ProcessId {
    /// This process.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn own() -> io::Result<Self> {
        Self::of(i32::try_from(std::process::id()).unwrap_or(i32::MAX))
    }

    /// The process that has the id `pid` now.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when there is none; another error when `/proc` is unreadable.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(gone)?;
        let (state, start_ticks) = parse_stat(&stat).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("/proc/{pid}/stat is not of the known form: {stat:?}"),
            )
        })?;
        // The first thread of a process may have ended before others, which still have its files open.
        let ended = state == 'X' || (state == 'Z' && !has_other_threads(pid)?);
        if ended {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        Ok(Self { pid, start_ticks })
    }

    /// Whether this very process still runs (a zombie does not, once all its threads have ended).
    ///
    /// # Errors
    /// When `/proc` is unreadable.
    pub fn is_alive(self) -> io::Result<bool> {
        match Self::of(self.pid) {
            Ok(now) => Ok(now == self),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Kills it with `SIGKILL`; one that is gone is no error. Does not wait for its end.
    ///
    /// # Errors
    /// When the signal may not be sent.
    pub fn kill(self) -> io::Result<()> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(());
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        // The descriptor now names one process; only if it is the one meant is it signalled.
        if !self.is_alive()? {
            return Ok(());
        }
        match pidfd_send_signal(&fd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A process that ends between the opening and the reading of its file is as gone as one whose file is not there.
fn gone(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(code) if code == rustix::io::Errno::SRCH.raw_os_error() => {
            io::Error::from(io::ErrorKind::NotFound)
        }
        _ => error,
    }
}

fn has_other_threads(pid: i32) -> io::Result<bool> {
    let threads = match fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(threads) => threads,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    Ok(threads.take(2).count() > 1)
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.pid, self.start_ticks)
    }
}

/// The text is not `PID@TICKS`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a process name of the form PID@TICKS: {0:?}")]
pub struct ParseProcessIdError(String);

impl FromStr for ProcessId {
    type Err = ParseProcessIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseProcessIdError(text.to_owned());
        let (pid, ticks) = text.split_once('@').ok_or_else(wrong)?;
        match (pid.parse(), ticks.parse()) {
            (Ok(pid), Ok(start_ticks)) => Ok(Self { pid, start_ticks }),
            _ => Err(wrong()),
        }
    }
}

/// State and start time; the name in parentheses may itself hold spaces and parentheses.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some((state, start_ticks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_process_is_alive_and_one_with_another_start_is_not() {
        let own = ProcessId::own().expect("own");
        assert!(own.is_alive().expect("alive"));
        let earlier = ProcessId {
            start_ticks: own.start_ticks - 1,
            ..own
        };
        assert!(!earlier.is_alive().expect("alive"));
        earlier.kill().expect("a process that is gone is no error");
        assert_eq!(own.to_string().parse(), Ok(own));
    }

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4 1 0 0 0 1 2 0 0 20 0 1 0 4242 1 2";
        assert_eq!(parse_stat(stat), Some(('S', 4242)));
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().expect("spawn");
        let pid = i32::try_from(child.id()).expect("fits");
        let named = ProcessId::of(pid);
        while ProcessId::of(pid).is_ok() {
            std::thread::yield_now();
        }
        if let Ok(named) = named {
            assert!(!named.is_alive().expect("alive"));
        }
        child.wait().expect("wait");
    }
}
