//! Who this worker is to the others that use its store.
//!
//! Hosts are cloned, with their names and paths, and sometimes with a data directory in them. So a worker is
//! known by a random id, and what it may call dead are processes that it can see, and those of boots that this
//! data directory was there to see the end of. A clone that was given the data directory too has the same id;
//! its boots are others, and neither knows those of the other.

use std::fs;
use std::io;
use std::path::Path;

use stead_sys::durable::{self, Existing};

use crate::error::{AtFile, EngineError, Result};
use crate::id;
use crate::paths::DataDir;

/// How many boots are remembered. A lease of an older one is left to the operator.
const BOOTS_MAX: usize = 256;

/// A worker in one boot of its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Worker {
    /// 32 hex digits, drawn once for the data directory.
    pub id: String,
    /// The boot id, a slash, and the number of the process namespace: in containers each has its own.
    pub boot: String,
    /// The other boots in which this data directory was used.
    pub earlier_boots: Vec<String>,
}

impl Worker {
    /// The worker of a data directory, and the boot in which this process runs.
    ///
    /// # Errors
    /// When its files cannot be read or written.
    ///
    /// # Durability
    /// When this returns, id and boot are durable.
    pub(crate) fn of(dir: &DataDir) -> Result<Self> {
        let boot = this_boot()?;
        Ok(Self {
            id: worker_id(&dir.worker_id())?,
            earlier_boots: note_boot(&dir.boots(), &boot)?,
            boot,
        })
    }
}

/// The id in the file, which is made if it is missing. Of two processes that make it, one wins.
fn worker_id(path: &Path) -> Result<String> {
    if let Some(found) = read(path)? {
        return check_id(path, found);
    }
    let fresh = id::long()?;
    match durable::publish(path, 0o600, fresh.as_bytes(), Existing::Keep) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            check_id(path, read(path)?.unwrap_or_default())
        }
        written => written.at("write", path).map(|()| fresh),
    }
}

fn check_id(path: &Path, found: String) -> Result<String> {
    if found.len() == 32 && found.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(found);
    }
    Err(EngineError::internal(
        format!("read {}", path.display()),
        "it does not hold 32 hexadecimal digits",
    )
    .left("nothing was changed")
    .next("if no other process of this worker runs, remove it: a new id is made, and leases of the old one must be broken by hand"))
}

/// Adds a boot to those in the file; gives the others.
fn note_boot(path: &Path, boot: &str) -> Result<Vec<String>> {
    let text = read(path)?.unwrap_or_default();
    let mut earlier: Vec<String> = text.lines().map(str::to_owned).collect();
    if let Some(known) = earlier.iter().position(|other| other == boot) {
        earlier.remove(known);
        return Ok(earlier);
    }
    earlier.drain(..earlier.len().saturating_sub(BOOTS_MAX - 1));
    let lines = earlier.iter().map(String::as_str).chain([boot]);
    let text: String = lines.map(|line| format!("{line}\n")).collect();
    durable::publish(path, 0o600, text.as_bytes(), Existing::Replace).at("write", path)?;
    Ok(earlier)
}

fn this_boot() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let boot = fs::read_to_string(path).at("read", path)?;
    let path = "/proc/self/ns/pid";
    let namespace = fs::read_link(path).at("read", path)?;
    let namespace = namespace.to_string_lossy();
    let number = namespace.trim_matches(|c: char| !c.is_ascii_digit());
    Ok(format!("{}/{number}", boot.trim()))
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at("read", path),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::thread;

    use super::*;

    fn data_dir() -> (tempfile::TempDir, DataDir) {
        let folder = tempfile::tempdir().expect("folder");
        let dir = DataDir::open(folder.path()).expect("data directory");
        (folder, dir)
    }

    #[test]
    fn a_worker_keeps_its_id_and_two_that_make_it_at_once_have_the_same() {
        let (_folder, dir) = data_dir();
        let ids: BTreeSet<String> = thread::scope(|scope| {
            let make = || Worker::of(&dir).expect("worker").id;
            let all: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
            let all = all.into_iter().map(|one| one.join().expect("thread"));
            all.collect()
        });
        assert_eq!(ids.len(), 1, "{ids:?}");
        let (_other_folder, other) = data_dir();
        assert!(!ids.contains(&Worker::of(&other).expect("worker").id));
    }

    #[test]
    fn a_file_that_holds_no_id_is_refused_and_left() {
        let (_folder, dir) = data_dir();
        let path = dir.worker_id();
        for wrong in ["", "0123", &"g".repeat(32)] {
            durable::publish(&path, 0o600, wrong.as_bytes(), Existing::Replace).expect("write");
            assert!(Worker::of(&dir).is_err(), "{wrong:?}");
            assert_eq!(fs::read_to_string(&path).expect("read"), wrong);
        }
    }

    #[test]
    fn earlier_boots_are_remembered_and_this_one_is_none_of_them() {
        let (_folder, dir) = data_dir();
        let path = dir.boots();
        let note = |boot: &str| note_boot(&path, boot).expect("note");
        assert!(note("a/1").is_empty() && note("a/1").is_empty());
        assert_eq!(note("b/1"), ["a/1"]);
        assert_eq!(note("b/2"), ["a/1", "b/1"], "another process namespace");
        for number in 0..2 * BOOTS_MAX {
            note(&format!("{number}/1"));
        }
        let kept = note("last/1");
        assert_eq!(kept.len(), BOOTS_MAX - 1);
        assert!(!kept.contains(&"a/1".to_owned()), "the oldest is dropped");
        assert_eq!(note("last/1"), kept);
        let worker = Worker::of(&dir).expect("worker");
        assert!(!worker.earlier_boots.contains(&worker.boot));
        assert!(worker.earlier_boots.contains(&"last/1".to_owned()));
        let (boot, namespace) = worker.boot.split_once('/').expect("two parts");
        assert!(boot.len() == 36 && namespace.parse::<u64>().is_ok());
    }
}
