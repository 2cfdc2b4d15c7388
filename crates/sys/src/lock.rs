//! Locks that a dead process cannot hold: `flock` on a file that says who holds it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// The longest description of a holder that is read, in bytes.
const HOLDER_BYTES_MAX: u64 = 512;

/// An exclusive lock, held until dropped or until the process ends.
///
/// It is given back in so many words, not by closing the file: a child that another thread starts at that
/// moment has the descriptor too until it runs its program, and would keep the lock as long.
///
/// The file stays: removing it would let two processes lock two files of one name.
#[derive(Debug)]
pub struct FileLock {
    file: File,
    path: PathBuf,
}

/// The answer to an attempt to lock.
#[derive(Debug)]
pub enum Attempt {
    /// The lock is ours.
    Locked(FileLock),
    /// Somebody else has it; this is what they wrote of themselves.
    HeldBy(String),
}

impl FileLock {
    /// Takes the lock at `path` if it is free and writes `holder` into it (what, who, process id).
    ///
    /// # Errors
    /// When the file cannot be created, opened or written.
    pub fn attempt(path: &Path, holder: &str) -> io::Result<Attempt> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                file.set_len(0)?;
                // A full disk must not keep out the command that would make room on it: then the holder
                // stays unnamed.
                drop(file.write_all_at(holder.as_bytes(), 0));
                Ok(Attempt::Locked(Self {
                    file,
                    path: path.to_owned(),
                }))
            }
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(Attempt::HeldBy(read_holder(&file)?)),
            Err(error) => Err(error.into()),
        }
    }

    /// Where the lock's file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if let Err(_not_given_back) = flock(&self.file, FlockOperation::Unlock) {
            // It goes with the descriptor.
        }
    }
}

fn read_holder(file: &File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.take(HOLDER_BYTES_MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
    Ok(if text.is_empty() {
        "a process that has not said who it is".to_owned()
    } else {
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_told_who_has_the_lock_until_it_is_dropped() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("lock");
        let Attempt::Locked(first) = FileLock::attempt(&path, "checkpoint, pid 1").expect("lock")
        else {
            panic!("a fresh lock is free");
        };
        match FileLock::attempt(&path, "exec, pid 2").expect("attempt") {
            Attempt::HeldBy(holder) => assert_eq!(holder, "checkpoint, pid 1"),
            Attempt::Locked(_) => panic!("two holders"),
        }
        drop(first);
        assert!(matches!(
            FileLock::attempt(&path, "exec, pid 2").expect("attempt"),
            Attempt::Locked(_)
        ));
    }

    #[test]
    fn a_dropped_lock_is_free_even_while_a_starting_child_has_its_descriptor() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("lock");
        let Attempt::Locked(first) = FileLock::attempt(&path, "checkpoint, pid 1").expect("lock")
        else {
            panic!("a fresh lock is free");
        };
        let inherited = first.file.try_clone().expect("a second descriptor");
        drop(first);
        assert!(matches!(
            FileLock::attempt(&path, "exec, pid 2").expect("attempt"),
            Attempt::Locked(_)
        ));
        drop(inherited);
    }
}
