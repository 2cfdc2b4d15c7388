//! The locks that QEMU puts on its images, so that neither of us writes to what the other has open.
//!
//! Each kind of access has a bit. Who does it holds byte `100 + bit` of the file, who does not want others
//! to do it holds byte `200 + bit`; all are shared locks, so holding excludes nobody. Whether two users
//! exclude each other is found by asking for the bytes of the opposite hundred: first one's own bytes are
//! taken, then the others' are looked at, so two that come at once both see it.
//!
//! | bit | access | a reader of images | a writer of images |
//! |---|---|---|---|
//! | 0 | read consistent data | does | does |
//! | 1 | write | forbids | does, forbids |
//! | 3 | resize | forbids | does, forbids |
//!
//! Locks belong to the open file description: they go when its last descriptor is closed, so a dead
//! process holds none.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

const DONE: i64 = 100;
const FORBIDDEN: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;
/// The most processes that are named.
const MAX_HOLDERS: usize = 8;

/// What is to be done with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read, while nobody writes.
    Read,
    /// Read, write and resize, while nobody else has the image open.
    Write,
}

impl Access {
    fn does(self) -> &'static [i64] {
        match self {
            Self::Read => &[READ],
            Self::Write => &[READ, WRITE, RESIZE],
        }
    }

    fn forbids(self) -> &'static [i64] {
        &[WRITE, RESIZE]
    }
}

/// A process that has the file open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// Its name, as the kernel has it.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

/// The answer to an attempt to lock.
#[derive(Debug)]
pub enum Attempt {
    /// The lock is ours.
    Locked(ImageLock),
    /// Others have the image open in a way that excludes this; these may be they (the kernel does not
    /// say who holds such a lock, only who has the file open). None where they could not be found.
    HeldBy(Vec<Holder>),
}

/// Locks on an image, until dropped.
#[derive(Debug)]
pub struct ImageLock {
    file: File,
    access: Access,
}

impl ImageLock {
    /// Locks `file`, which must be open for reading, without waiting. The lock is on its open file
    /// description, so on duplicates of the descriptor too.
    ///
    /// # Errors
    /// When the file system has no such locks or a system call fails.
    pub fn attempt(file: &File, access: Access) -> io::Result<Attempt> {
        let lock = Self {
            file: file.try_clone()?,
            access,
        };
        // An error drops `lock`, which gives back what it has.
        lock.take()?;
        if lock.excluded()? {
            drop(lock);
            return Ok(Attempt::HeldBy(holders(file)?));
        }
        Ok(Attempt::Locked(lock))
    }

    /// What the lock allows its holder.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    fn bytes(&self) -> impl Iterator<Item = i64> {
        let done = self.access.does().iter().map(|bit| DONE + bit);
        done.chain(self.access.forbids().iter().map(|bit| FORBIDDEN + bit))
    }

    fn take(&self) -> io::Result<()> {
        for byte in self.bytes() {
            let lock = range(byte, libc::F_RDLCK);
            fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock))?;
        }
        Ok(())
    }

    fn excluded(&self) -> io::Result<bool> {
        let opposite = |byte: i64| {
            if byte >= FORBIDDEN {
                byte - 100
            } else {
                byte + 100
            }
        };
        for byte in self.bytes().map(opposite) {
            let mut found = range(byte, libc::F_WRLCK);
            fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut found))?;
            if i32::from(found.l_type) != libc::F_UNLCK {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        for byte in self.bytes() {
            let lock = range(byte, libc::F_UNLCK);
            if let Err(_not_given_back) = fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)) {
                // It goes with the descriptor.
            }
        }
    }
}

fn range(byte: i64, kind: i32) -> libc::flock {
    libc::flock {
        // The three kinds are 0 to 2.
        l_type: i16::try_from(kind).unwrap_or(i16::MAX),
        l_whence: 0,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// The processes that have `file` open, others before this one.
///
/// # Errors
/// When `/proc` or `file` cannot be read; processes of other users are passed over.
pub fn holders(file: &File) -> io::Result<Vec<Holder>> {
    let this = file.metadata()?;
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|name| name.parse::<u32>().ok());
        if let Some(pid) = pid
            && pid != own
            && has_open(pid, (this.dev(), this.ino()))
        {
            found.push(holder(pid));
        }
    }
    if found.is_empty() {
        found.push(holder(own));
    }
    found.truncate(MAX_HOLDERS);
    Ok(found)
}

fn holder(pid: u32) -> Holder {
    let name = match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => name.trim().to_owned(),
        Err(_gone) => "a process".to_owned(),
    };
    Holder { pid, name }
}

/// A process that ends meanwhile, or may not be looked at, has nothing open as far as we can tell.
fn has_open(pid: u32, file: (u64, u64)) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    descriptors
        .filter_map(io::Result::ok)
        .filter_map(|descriptor| fs::metadata(descriptor.path()).ok())
        .any(|open| (open.dev(), open.ino()) == file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locked(file: &File, access: Access) -> Option<ImageLock> {
        match ImageLock::attempt(file, access).expect("a system with such locks") {
            Attempt::Locked(lock) => Some(lock),
            Attempt::HeldBy(_) => None,
        }
    }

    #[test]
    fn readers_share_an_image_and_a_writer_has_it_alone() {
        let temp = tempfile::NamedTempFile::new().expect("temp file");
        let open = || {
            let mut options = File::options();
            options
                .read(true)
                .write(true)
                .open(temp.path())
                .expect("open")
        };
        let (one, two) = (open(), open());
        let reader = locked(&one, Access::Read).expect("free");
        let other = locked(&two, Access::Read).expect("readers share");
        drop(other);
        assert!(locked(&two, Access::Write).is_none());
        drop(reader);
        let writer = locked(&one, Access::Write).expect("free");
        assert!(locked(&two, Access::Read).is_none());
        assert!(locked(&two, Access::Write).is_none());
        drop(writer);
        assert!(locked(&two, Access::Write).is_some());
    }
}
