//! Files that are whole or absent.
//!
//! A file is written under a temporary name in its final folder, synced, renamed, and the folder is
//! synced. A crash leaves either nothing, a temporary file (its name starts with [`TEMP_PREFIX`],
//! and [`remove_leftovers`] takes it away), or the whole file under its name.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What the name of an unfinished file starts with.
pub const TEMP_PREFIX: &str = ".partial-";

static NEXT_TEMP: AtomicU64 = AtomicU64::new(0);

/// Whether [`publish`] may take the place of a file that is already there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Replace it atomically.
    Replace,
    /// Leave it and fail with [`io::ErrorKind::AlreadyExists`].
    Keep,
}

/// A file being written, not yet visible under its name.
///
/// Dropping it removes the temporary file; [`Partial::publish`] makes it whole.
#[derive(Debug)]
pub struct Partial {
    file: Option<File>,
    temp: PathBuf,
    target: PathBuf,
}

impl Partial {
    /// Starts a file that will become `target`, with the permission bits `mode`.
    ///
    /// # Errors
    /// When the folder of `target` is missing or not writable, or `target` has no file name.
    pub fn create(target: &Path, mode: u32) -> io::Result<Self> {
        let temp = temp_name(target)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temp)?;
        Ok(Self {
            file: Some(file),
            temp,
            target: target.to_owned(),
        })
    }

    /// The open file. Positioned reads and writes are fine, so is extending it.
    ///
    /// # Panics
    /// Never: the file is there until [`Partial::publish`] consumes `self`.
    #[must_use]
    pub fn file(&self) -> &File {
        match &self.file {
            Some(file) => file,
            None => unreachable!("only publish takes the file, and it consumes the value"),
        }
    }

    /// The temporary path, for a program that must be given one.
    #[must_use]
    pub fn temp_path(&self) -> &Path {
        &self.temp
    }

    /// Makes the file appear under its name.
    ///
    /// # Durability
    /// When this returns `Ok`, content, name and folder entry have been synced.
    ///
    /// # Errors
    /// When syncing or renaming fails, or the target exists and `existing` is [`Existing::Keep`];
    /// the temporary file is then removed and an earlier file under the name is untouched.
    pub fn publish(mut self, existing: Existing) -> io::Result<File> {
        let Some(file) = self.file.take() else {
            unreachable!("publish consumes the value, so the file is taken once")
        };
        file.sync_all()?;
        rename(&self.temp, &self.target, existing)?;
        sync_parent(&self.target)?;
        self.temp = PathBuf::new();
        Ok(file)
    }

    /// Makes the file appear under its name without syncing anything: after lost power it may be missing, or
    /// be there without its content. For files that can be made again.
    ///
    /// # Durability
    /// None. The death of a process loses nothing.
    ///
    /// # Errors
    /// As [`Partial::publish`].
    pub fn publish_unsynced(mut self, existing: Existing) -> io::Result<File> {
        let Some(file) = self.file.take() else {
            unreachable!("publish consumes the value, so the file is taken once")
        };
        rename(&self.temp, &self.target, existing)?;
        self.temp = PathBuf::new();
        Ok(file)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.temp.as_os_str().is_empty() {
            // A temporary file that stays behind is found by `remove_leftovers`.
            drop(fs::remove_file(&self.temp));
        }
    }
}

/// Writes `bytes` as the whole file `target`.
///
/// # Durability
/// When this returns `Ok`, the file has reached the disk under its name.
///
/// # Errors
/// As [`Partial::create`] and [`Partial::publish`].
pub fn publish(target: &Path, mode: u32, bytes: &[u8], existing: Existing) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let partial = Partial::create(target, mode)?;
    partial.file().write_all_at(bytes, 0)?;
    partial.publish(existing)?;
    Ok(())
}

/// Creates an empty file that a program outside will fill; for scratch files, which a crash may lose.
///
/// # Errors
/// When the file exists or cannot be created.
pub fn create_scratch(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
}

/// An empty file without a name in the folder for temporary files; it is gone when it is closed.
///
/// # Errors
/// When the folder does not allow it.
pub fn nameless() -> io::Result<File> {
    let flags = rustix::fs::OFlags::TMPFILE.bits().cast_signed();
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .mode(0o600)
        .open(std::env::temp_dir())
}

/// Creates `path` and its missing parents, new ones with the permission bits `mode`.
///
/// # Errors
/// When a folder cannot be created.
pub fn create_dir(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        create_dir(parent, mode)?;
    }
    match fs::DirBuilder::new().mode(mode).create(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Moves a file or folder within one file system.
///
/// # Durability
/// When this returns `Ok`, both folders have been synced.
///
/// # Errors
/// When the target exists and `existing` is [`Existing::Keep`], or the rename fails.
pub fn move_to(from: &Path, to: &Path, existing: Existing) -> io::Result<()> {
    rename(from, to, existing)?;
    sync_parent(to)?;
    sync_parent(from)
}

/// Removes a file; one that is already gone is no error.
///
/// # Errors
/// When the file is there and cannot be removed.
pub fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes a folder with everything in it; one that is already gone is no error.
///
/// # Errors
/// When something in it cannot be removed.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes the temporary files that a crash left in `folder` and returns how many there were.
///
/// Call it only where no other process is writing into `folder`.
///
/// # Errors
/// When the folder cannot be read or a leftover cannot be removed.
pub fn remove_leftovers(folder: &Path) -> io::Result<usize> {
    let mut removed = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(TEMP_PREFIX) {
            fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Syncs the folder that holds `path`, so that its entry survives power loss.
///
/// # Errors
/// When the folder cannot be opened or synced.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)?.sync_all()
}

fn rename(from: &Path, to: &Path, existing: Existing) -> io::Result<()> {
    match existing {
        Existing::Replace => fs::rename(from, to),
        Existing::Keep => Ok(rustix::fs::renameat_with(
            rustix::fs::CWD,
            from,
            rustix::fs::CWD,
            to,
            rustix::fs::RenameFlags::NOREPLACE,
        )?),
    }
}

fn temp_name(target: &Path) -> io::Result<PathBuf> {
    let name = target.file_name().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} has no file name", target.display()),
        )
    })?;
    let mut temp = OsString::from(TEMP_PREFIX);
    temp.push(format!(
        "{}-{}-",
        std::process::id(),
        NEXT_TEMP.fetch_add(1, Ordering::Relaxed)
    ));
    temp.push(name);
    Ok(target.with_file_name(temp))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_not_published_is_not_there() {
        let dir = tempfile::tempdir().expect("temp dir");
        let target = dir.path().join("image");
        let partial = Partial::create(&target, 0o600).expect("create");
        assert!(!target.exists());
        drop(partial);
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[test]
    fn keep_refuses_to_replace_and_leaves_the_earlier_file() {
        let dir = tempfile::tempdir().expect("temp dir");
        let target = dir.path().join("image");
        publish(&target, 0o600, b"first", Existing::Keep).expect("first");
        let error = publish(&target, 0o600, b"second", Existing::Keep).expect_err("exists");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&target).expect("read"), b"first");
        publish(&target, 0o600, b"second", Existing::Replace).expect("replace");
        assert_eq!(fs::read(&target).expect("read"), b"second");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
    }

    #[test]
    fn leftovers_of_a_crash_are_taken_away_and_nothing_else() {
        let dir = tempfile::tempdir().expect("temp dir");
        let partial = Partial::create(&dir.path().join("image"), 0o600).expect("create");
        std::mem::forget(partial);
        publish(&dir.path().join("whole"), 0o600, b"x", Existing::Keep).expect("publish");
        assert_eq!(remove_leftovers(dir.path()).expect("clean"), 1);
        assert!(dir.path().join("whole").exists());
    }
}
