//! Files that come piece by piece, from a sender that may go away and come back.
//!
//! ```text
//!  begin ── pieces written ──▶ publish: attributes, sync, rename ──▶ the file, whole
//!    ▲            │ dropped: the partial file stays    │ refused
//!    └────────────┘ begin with what is kept of it      └──▶ the partial file is gone, what had the name is as it was
//! ```
//! Until it is published, a file lies beside its target under a hidden name made of the transfer's name; a
//! later [`Incoming::begin`] for the same transfer goes on with it. Whoever writes it holds a lock on it, so that
//! [`sweep`] takes only what nobody writes.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::durable::Existing;
use crate::folder::{Attributes, Folder, set_attributes};

/// When a published file must have reached the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Synced {
    /// When [`Incoming::publish`] returns.
    Now,
    /// After a later [`Folder::sync_file_system`]. A file that replaces another is synced at once all the
    /// same: lost power must leave the one or the other.
    Later,
}

/// A file of which pieces have come.
#[derive(Debug)]
pub struct Incoming {
    folder: Folder,
    target: OsString,
    partial: OsString,
    file: File,
}

impl Incoming {
    /// Begins the file that will be `target` in `folder`, or goes on with the first `keep_bytes` of the
    /// partial file that has the name `partial`. When `keep_bytes` is 0, what there is of it is thrown away.
    ///
    /// # Errors
    /// - [`Errno::ISDIR`], [`Errno::OPNOTSUPP`]: the target is a folder, or a device, pipe or socket.
    /// - [`Errno::WOULDBLOCK`]: another process writes the partial file.
    /// - [`Errno::STALE`]: the partial file is shorter than `keep_bytes`, or not ours.
    pub fn begin(
        folder: &Folder,
        target: &OsStr,
        partial: &OsStr,
        keep_bytes: u64,
    ) -> io::Result<Self> {
        must_be_replaceable(folder, target)?;
        let file = match keep_bytes {
            0 => open_new(folder, partial)?,
            _ => open_kept(folder, partial, keep_bytes)?,
        };
        Ok(Self {
            folder: folder.try_clone()?,
            target: target.to_owned(),
            partial: partial.to_owned(),
            file,
        })
    }

    /// The open file, for positioned writes. What is not written is a hole.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Removes the partial file: what came is of no use.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn abandon(self) -> io::Result<()> {
        self.folder.remove_file(&self.partial)
    }

    /// Makes the file appear under its name, `length_bytes` long. A mode or owner that is not given is that of the file
    /// which is replaced, else 0644 and our own.
    ///
    /// # Durability
    /// As `synced` says: content, attributes, name and folder entry.
    ///
    /// # Errors
    /// When an attribute, a sync or the name is refused. The partial file is then removed, and what had the name
    /// still has it.
    pub fn publish(
        self,
        length_bytes: u64,
        attributes: &Attributes,
        existing: Existing,
        synced: Synced,
    ) -> io::Result<()> {
        let published = self.try_publish(length_bytes, attributes, existing, synced);
        if published.is_err() {
            self.folder.remove_file(&self.partial)?;
        }
        published
    }

    fn try_publish(
        &self,
        length_bytes: u64,
        attributes: &Attributes,
        existing: Existing,
        synced: Synced,
    ) -> io::Result<()> {
        let before = replaced(&self.folder, &self.target)?;
        self.file.set_len(length_bytes)?;
        set_attributes(&self.file, &inherit(attributes, before.as_ref()))?;
        if synced == Synced::Later && before.is_none() {
            // Whatever has taken the name since then is not replaced by a file that is not synced.
            match self
                .folder
                .rename(&self.partial, &self.target, Existing::Keep)
            {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                done => return done,
            }
        }
        self.file.sync_all()?;
        self.folder.rename(&self.partial, &self.target, existing)?;
        self.folder.sync()
    }
}

/// Removes partial files in `folder` whose names begin with `prefix`, that have not been written to for `age` and that nobody
/// writes now; returns how many. Looks at `limit` entries at most.
///
/// # Errors
/// When the folder cannot be read or a partial file cannot be removed.
pub fn sweep(folder: &Folder, prefix: &str, age: Duration, limit: usize) -> io::Result<usize> {
    let mut removed = 0;
    for entry in rustix::fs::Dir::read_from(folder)?.take(limit) {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        let name = OsStr::from_bytes(name);
        if name.as_bytes().starts_with(prefix.as_bytes()) && is_left_over(folder, name, age)? {
            folder.remove_file(name)?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn is_left_over(folder: &Folder, name: &OsStr, age: Duration) -> io::Result<bool> {
    let file = match folder.file(name) {
        Ok(file) => file,
        Err(_gone_or_not_ours) => return Ok(false),
    };
    let metadata = file.metadata()?;
    let idle = SystemTime::now().duration_since(metadata.modified()?);
    // A time in the future is not old.
    let old = idle.is_ok_and(|idle| idle >= age);
    Ok(old && metadata.is_file() && lock(&file).is_ok())
}

fn must_be_replaceable(folder: &Folder, target: &OsStr) -> io::Result<()> {
    let stat = match folder.stat(target) {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::Symlink => Ok(()),
        FileType::Directory => Err(Errno::ISDIR.into()),
        FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => Err(Errno::OPNOTSUPP.into()),
    }
}

/// Mode and owner of the regular file that has the name, and whether anything has it.
fn replaced(folder: &Folder, target: &OsStr) -> io::Result<Option<Attributes>> {
    match folder.stat(target) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
            Ok(Some(Attributes {
                mode: Some(stat.st_mode & 0o7777),
                owner: Some((stat.st_uid, stat.st_gid)),
                modified: None,
            }))
        }
        Ok(_link) => Ok(Some(Attributes::default())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn inherit(attributes: &Attributes, before: Option<&Attributes>) -> Attributes {
    let before = before.copied().unwrap_or_default();
    Attributes {
        mode: attributes.mode.or(before.mode).or(Some(0o644)),
        owner: attributes.owner.or(before.owner),
        modified: attributes.modified,
    }
}

fn open_new(folder: &Folder, partial: &OsStr) -> io::Result<File> {
    if let Ok(file) = folder.file(partial) {
        lock(&file)?;
    }
    folder.remove_file(partial)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(
        folder,
        partial,
        flags,
        Mode::RUSR | Mode::WUSR,
    )?);
    lock(&file)?;
    Ok(file)
}

fn open_kept(folder: &Folder, partial: &OsStr, keep_bytes: u64) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = match rustix::fs::openat(folder, partial, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Err(Errno::STALE.into()),
        Err(error) => return Err(error.into()),
    };
    let file = File::from(fd);
    lock(&file)?;
    let stat = rustix::fs::fstat(&file)?;
    // In a folder that others may write to, a file of this name may be one that they still hold open.
    let ours = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && stat.st_uid == rustix::process::geteuid().as_raw()
        && stat.st_nlink == 1;
    if !ours || u64::try_from(stat.st_size).is_ok_and(|length| length < keep_bytes) {
        return Err(Errno::STALE.into());
    }
    file.set_len(keep_bytes)?;
    Ok(file)
}

fn lock(file: &File) -> io::Result<()> {
    Ok(rustix::fs::flock(
        file,
        FlockOperation::NonBlockingLockExclusive,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{FileExt, PermissionsExt};

    const TARGET: &str = "target";
    const PARTIAL: &str = ".part-1";

    fn begin(folder: &Folder, keep_bytes: u64) -> io::Result<Incoming> {
        Incoming::begin(folder, OsStr::new(TARGET), OsStr::new(PARTIAL), keep_bytes)
    }

    fn publish(incoming: Incoming, length_bytes: u64, existing: Existing) -> io::Result<()> {
        incoming.publish(
            length_bytes,
            &Attributes::default(),
            existing,
            Synced::Later,
        )
    }

    #[test]
    fn a_file_appears_whole_with_the_mode_of_the_one_it_replaces() {
        let dir = tempfile::tempdir().expect("temp dir");
        let folder = Folder::open(dir.path()).expect("open");
        let target = dir.path().join(TARGET);
        crate::durable::publish(&target, 0o640, b"before", Existing::Keep).expect("file");
        let incoming = begin(&folder, 0).expect("begin");
        incoming.file().write_all_at(b"after", 0).expect("write");
        assert_eq!(fs::read(&target).expect("read"), b"before");
        publish(incoming, 8, Existing::Replace).expect("publish");
        assert_eq!(fs::read(&target).expect("read"), b"after\0\0\0");
        let mode = fs::metadata(&target).expect("stat").permissions().mode();
        assert_eq!(mode & 0o7777, 0o640);
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
    }

    #[test]
    fn a_dropped_one_goes_on_from_what_is_kept_and_no_further() {
        let dir = tempfile::tempdir().expect("temp dir");
        let folder = Folder::open(dir.path()).expect("open");
        let incoming = begin(&folder, 0).expect("begin");
        incoming
            .file()
            .write_all_at(b"0123456789", 0)
            .expect("write");
        assert_eq!(
            begin(&folder, 4).expect_err("in use").kind(),
            io::ErrorKind::WouldBlock
        );
        drop(incoming);
        let stale = begin(&folder, 11).expect_err("longer than it is");
        assert_eq!(stale.raw_os_error(), Some(Errno::STALE.raw_os_error()));
        let incoming = begin(&folder, 4).expect("go on");
        incoming.file().write_all_at(b"xy", 4).expect("write");
        publish(incoming, 6, Existing::Keep).expect("publish");
        assert_eq!(fs::read(dir.path().join(TARGET)).expect("read"), b"0123xy");
    }

    #[test]
    fn a_taken_name_is_kept_and_the_partial_file_goes() {
        let dir = tempfile::tempdir().expect("temp dir");
        let folder = Folder::open(dir.path()).expect("open");
        let incoming = begin(&folder, 0).expect("begin");
        let target = dir.path().join(TARGET);
        crate::durable::publish(&target, 0o600, b"theirs", Existing::Keep).expect("file");
        let error = publish(incoming, 0, Existing::Keep).expect_err("taken");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&target).expect("read"), b"theirs");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
    }

    #[test]
    fn a_sweep_takes_what_nobody_writes_and_nothing_else() {
        let dir = tempfile::tempdir().expect("temp dir");
        let folder = Folder::open(dir.path()).expect("open");
        crate::durable::publish(&dir.path().join("part"), 0o600, b"", Existing::Keep)
            .expect("file");
        let incoming = begin(&folder, 0).expect("begin");
        let sweep = |age| sweep(&folder, ".part-", age, 100).expect("sweep");
        assert_eq!(sweep(Duration::ZERO), 0, "it is written");
        drop(incoming);
        assert_eq!(sweep(Duration::from_secs(60)), 0, "it is new");
        assert_eq!(sweep(Duration::ZERO), 1);
        assert!(dir.path().join("part").exists());
    }

    #[test]
    fn a_partial_file_that_has_a_second_name_is_not_gone_on_with() {
        let dir = tempfile::tempdir().expect("temp dir");
        let folder = Folder::open(dir.path()).expect("open");
        drop(begin(&folder, 0).expect("begin"));
        let partial = dir.path().join(PARTIAL);
        crate::durable::publish(&partial, 0o600, b"0123", Existing::Replace).expect("file");
        fs::hard_link(&partial, dir.path().join("second")).expect("link");
        assert!(begin(&folder, 2).is_err());
    }
}
