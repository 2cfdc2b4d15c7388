//! One control group of the unified hierarchy (version 2): freezing it, thawing it, who is in it.
//!
//! Whether a group was frozen by the agent is noted at the group itself, as an extended attribute, before it is frozen:
//! the kernel keeps the note as long as the group, so an agent that starts again finds it, and a group that
//! somebody else had frozen is never thawed by the agent.
//!
//! A group may be removed at any moment. What is asked of one that is gone is answered as if it were empty.
//!
//! # Source
//! The kernel's Documentation/admin-guide/cgroup-v2.rst (`cgroup.freeze`, `cgroup.events`, `cgroup.procs`).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use crate::error::{AgentError, Attempt};

/// The note of the agent at a group that it has frozen or is about to.
const MARK: &str = "trusted.stead.frozen";
/// The longest line-oriented file of a group that is read, in bytes: some 100,000 process numbers.
const MAX_FILE_BYTES: usize = 1 << 20;
/// How many groups one folder may have.
const MAX_GROUPS: usize = 4096;

/// A control group, by its folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    path: PathBuf,
}

impl Group {
    pub(crate) fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the group where it is missing.
    pub(crate) fn make(path: &Path) -> Result<Self, AgentError> {
        match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => Ok(Self::at(path)),
            Err(error) => {
                Err(error).attempt(|| format!("make the control group {}", path.display()))
            }
        }
    }

    /// The groups directly below, in the order of their names.
    pub(crate) fn children(&self) -> Result<Vec<Self>, AgentError> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if is_gone(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error).attempt(|| format!("list {}", self.path.display())),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.attempt(|| format!("list {}", self.path.display()))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(Self::at(entry.path()));
            }
            if found.len() > MAX_GROUPS {
                return Err(AgentError::Content {
                    path: self.path.clone(),
                    found: format!("more than {MAX_GROUPS} control groups"),
                });
            }
        }
        found.sort_unstable_by(|one, other| one.path.cmp(&other.path));
        Ok(found)
    }

    /// The processes directly in the group.
    pub(crate) fn processes(&self) -> Result<Vec<i32>, AgentError> {
        let text = self.read("cgroup.procs")?.unwrap_or_default();
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Moves a process with all its threads here; says whether it was still there.
    pub(crate) fn admit(&self, pid: i32) -> Result<bool, AgentError> {
        match self.write("cgroup.procs", &pid.to_string()) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(error) => {
                Err(error).attempt(|| format!("move process {pid} to {}", self.path.display()))
            }
        }
    }

    /// Whether it has been told to freeze, by whomever.
    pub(crate) fn is_told_to_freeze(&self) -> Result<bool, AgentError> {
        Ok(self
            .read("cgroup.freeze")?
            .is_some_and(|text| text.trim() == "1"))
    }

    /// Tells the kernel to freeze or to thaw everything in it and below.
    pub(crate) fn tell(&self, freeze: bool) -> Result<(), AgentError> {
        let word = if freeze { "1" } else { "0" };
        match self.write("cgroup.freeze", word) {
            // The group is gone, and with it everything that was in it.
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => Ok(()),
            Err(error) => Err(error).attempt(|| {
                let verb = if freeze { "freeze" } else { "thaw" };
                format!("{verb} {}", self.path.display())
            }),
        }
    }

    /// Whether the agent has noted that it is the one who freezes it.
    pub(crate) fn is_marked(&self) -> Result<bool, AgentError> {
        let mut value = [0; 1];
        match rustix::fs::getxattr(&self.path, MARK, &mut value) {
            Ok(length) => Ok(length == 1 && value == *b"1"),
            Err(Errno::NODATA | Errno::NOENT | Errno::NODEV) => Ok(false),
            Err(error) => {
                Err(error).attempt(|| format!("read the note at {}", self.path.display()))
            }
        }
    }

    /// Notes that the agent freezes it, before it does.
    pub(crate) fn mark(&self) -> Result<(), AgentError> {
        match rustix::fs::setxattr(&self.path, MARK, b"1", XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => Ok(()),
            Err(error) => {
                Err(error).attempt(|| format!("note the freeze at {}", self.path.display()))
            }
        }
    }

    /// Takes the note away, after the thaw.
    pub(crate) fn unmark(&self) -> Result<(), AgentError> {
        match rustix::fs::removexattr(&self.path, MARK) {
            Ok(()) | Err(Errno::NODATA | Errno::NOENT | Errno::NODEV) => Ok(()),
            Err(error) => {
                Err(error).attempt(|| format!("take the note away at {}", self.path.display()))
            }
        }
    }

    /// What the kernel says about it, open to be waited for; nothing when it is gone.
    pub(crate) fn events(&self) -> Result<Option<Events>, AgentError> {
        match File::open(self.path.join("cgroup.events")) {
            Ok(file) => Ok(Some(Events {
                group: self.clone(),
                file,
            })),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => {
                Err(error).attempt(|| format!("open the events of {}", self.path.display()))
            }
        }
    }

    fn read(&self, name: &str) -> Result<Option<String>, AgentError> {
        let path = self.path.join(name);
        let text = File::open(&path).and_then(|file| {
            let mut text = String::new();
            io::Read::read_to_string(&mut io::Read::take(file, MAX_FILE_BYTES as u64), &mut text)?;
            Ok(text)
        });
        match text {
            Ok(text) => Ok(Some(text)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error).attempt(|| format!("read {}", path.display())),
        }
    }

    fn write(&self, name: &str, word: &str) -> Result<(), Errno> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(self.path.join(name), flags, Mode::empty())?;
        rustix::io::write(&file, word.as_bytes()).map(drop)
    }
}

/// The `cgroup.events` of a group, open.
///
/// The kernel wakes whoever polls it for priority data when it has changed since it was last read, so reading first
/// and waiting then misses nothing.
#[derive(Debug)]
pub(crate) struct Events {
    group: Group,
    file: File,
}

impl Events {
    pub(crate) fn group(&self) -> &Group {
        &self.group
    }

    /// Whether everything in the group and below is frozen now. One that is gone is: nothing of it runs.
    pub(crate) fn is_frozen(&self) -> Result<bool, AgentError> {
        Ok(self.frozen()?.unwrap_or(true))
    }

    /// Whether something in the group can run now.
    pub(crate) fn is_thawed(&self) -> Result<bool, AgentError> {
        Ok(!self.frozen()?.unwrap_or(false))
    }

    fn frozen(&self) -> Result<Option<bool>, AgentError> {
        let mut text = [0; 256];
        match rustix::io::pread(&self.file, &mut text, 0) {
            Ok(length) => Ok(Some(says_frozen(&text[..length]))),
            Err(Errno::NODEV | Errno::NOENT) => Ok(None),
            Err(error) => {
                Err(error).attempt(|| format!("read the events of {}", self.group.path.display()))
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn says_frozen(events: &[u8]) -> bool {
    events
        .split(|&byte| byte == b'\n')
        .any(|line| line == b"frozen 1")
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOENT | Errno::NODEV)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_own_word_counts_as_frozen() {
        assert!(says_frozen(b"populated 1\nfrozen 1\n"));
        assert!(says_frozen(b"frozen 1"));
        for text in [
            &b""[..],
            b"populated 1\nfrozen 0\n",
            b"frozen 10\n",
            b"unfrozen 1\n",
        ] {
            assert!(!says_frozen(text), "{}", String::from_utf8_lossy(text));
        }
    }
}
