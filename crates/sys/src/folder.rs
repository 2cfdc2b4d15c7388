//! Folders held open, and names looked up in them without following a link.
//!
//! A path is looked up anew by every call, and whoever may write to one of its folders can put a symlink
//! there in between. A [`Folder`] is looked up once; what is done with it stays in it: every name is one
//! component, and a link of that name is never followed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use crate::durable::Existing;

static NEXT_LINK: AtomicU64 = AtomicU64::new(0);

const FOLDER: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// What a file is to be given; what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Numbers of user and group.
    pub owner: Option<(u32, u32)>,
    /// When the content was last changed: seconds and nanoseconds since 1970-01-01 UTC.
    pub modified: Option<(i64, u32)>,
}

/// A folder that is held open.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Folder {
    /// Opens a folder by its path, links followed: the path is the caller's own.
    ///
    /// # Errors
    /// When it is missing, no folder or not readable.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = rustix::fs::open(path, FOLDER, Mode::empty())?;
        Ok(Self { fd })
    }

    /// Another handle of the same folder.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
        })
    }

    /// The folder of this name in it.
    ///
    /// # Errors
    /// When there is none; a link to one is none ([`io::ErrorKind::NotADirectory`]).
    pub fn child(&self, name: &OsStr) -> io::Result<Self> {
        let flags = FOLDER.union(OFlags::NOFOLLOW);
        let fd = rustix::fs::openat(&self.fd, component(name)?, flags, Mode::empty())?;
        Ok(Self { fd })
    }

    /// The folder of this name in it, made when it is not there; a new one has the permission bits 0700 until
    /// [`Folder::set_attributes`].
    ///
    /// # Errors
    /// When it cannot be made, or the name is that of something else.
    pub fn make_child(&self, name: &OsStr) -> io::Result<Self> {
        match rustix::fs::mkdirat(&self.fd, component(name)?, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => self.child(name),
            Err(error) => Err(error.into()),
        }
    }

    /// What the name stands for; a link for itself.
    ///
    /// # Errors
    /// When it is not there.
    pub fn stat(&self, name: &OsStr) -> io::Result<Stat> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::statat(&self.fd, component(name)?, flags)?)
    }

    /// Opens a file for reading. A link is not followed, a pipe not waited for.
    ///
    /// # Errors
    /// When it is missing, a link or not readable.
    pub fn file(&self, name: &OsStr) -> io::Result<File> {
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, component(name)?, flags, Mode::empty())?;
        Ok(fd.into())
    }

    /// The names in it, in no order.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                names.push(OsStr::from_bytes(name).to_owned());
            }
        }
        Ok(names)
    }

    /// Which file system it is on.
    ///
    /// # Errors
    /// When it cannot be examined.
    pub fn device(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.fd)?.st_dev)
    }

    /// What the link of this name says.
    ///
    /// # Errors
    /// When there is none.
    pub fn link(&self, name: &OsStr) -> io::Result<OsString> {
        let target = rustix::fs::readlinkat(&self.fd, component(name)?, Vec::new())?;
        Ok(OsStr::from_bytes(target.as_bytes()).to_owned())
    }

    /// Makes a link that says `target`, with this owner and time, in one step. It takes the place of anything but
    /// a folder when `existing` allows it.
    ///
    /// # Errors
    /// When the name is taken or cannot be made; then nothing has changed.
    pub fn make_link(
        &self,
        name: &OsStr,
        target: &OsStr,
        attributes: &Attributes,
        existing: Existing,
    ) -> io::Result<()> {
        let number = NEXT_LINK.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let temp = format!("{}{process}-link-{number}", crate::durable::TEMP_PREFIX);
        let temp = OsStr::new(&temp);
        self.remove_file(temp)?;
        rustix::fs::symlinkat(target, &self.fd, temp)?;
        let done = self
            .set_attributes_of(temp, attributes)
            .and_then(|()| self.rename(temp, component(name)?, existing));
        if done.is_err() {
            self.remove_file(temp)?;
        }
        done
    }

    /// Renames within the folder.
    ///
    /// # Errors
    /// When the new name is taken and `existing` is [`Existing::Keep`], or it cannot be done.
    pub fn rename(&self, from: &OsStr, to: &OsStr, existing: Existing) -> io::Result<()> {
        let flags = match existing {
            Existing::Replace => RenameFlags::empty(),
            Existing::Keep => RenameFlags::NOREPLACE,
        };
        let (from, to) = (component(from)?, component(to)?);
        Ok(rustix::fs::renameat_with(
            &self.fd, from, &self.fd, to, flags,
        )?)
    }

    /// Removes a name that is no folder's; one that is already gone is no error.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove_file(&self, name: &OsStr) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.fd, component(name)?, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives the folder itself attributes.
    ///
    /// # Errors
    /// When one is refused; those before it are given.
    pub fn set_attributes(&self, attributes: &Attributes) -> io::Result<()> {
        set_attributes(&self.fd, attributes)
    }

    /// Gives a link, or another name, owner and time; a link has no mode.
    ///
    /// # Errors
    /// When one is refused; those before it are given.
    pub fn set_attributes_of(&self, name: &OsStr, attributes: &Attributes) -> io::Result<()> {
        let (name, flags) = (component(name)?, AtFlags::SYMLINK_NOFOLLOW);
        if let Some((uid, gid)) = attributes.owner {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            rustix::fs::chownat(&self.fd, name, Some(uid), Some(gid), flags)?;
        }
        if let Some(times) = times(attributes) {
            rustix::fs::utimensat(&self.fd, name, &times, flags)?;
        }
        Ok(())
    }

    /// Writes the folder's entries to the disk.
    ///
    /// # Errors
    /// When that fails.
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.fd)?)
    }

    /// Writes the whole file system that the folder is on to the disk.
    ///
    /// # Errors
    /// When that fails.
    pub fn sync_file_system(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.fd)?)
    }
}

/// Gives an open file attributes: the owner first, since a change of it takes the set-user bit away.
///
/// # Errors
/// When one is refused; those before it are given.
pub fn set_attributes(file: impl AsFd, attributes: &Attributes) -> io::Result<()> {
    if let Some((uid, gid)) = attributes.owner {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::fchown(&file, Some(uid), Some(gid))?;
    }
    if let Some(mode) = attributes.mode {
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
    }
    if let Some(times) = times(attributes) {
        rustix::fs::futimens(&file, &times)?;
    }
    Ok(())
}

fn times(attributes: &Attributes) -> Option<Timestamps> {
    let (seconds, nanoseconds) = attributes.modified?;
    Some(Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds.into(),
        },
    })
}

fn component(name: &OsStr) -> io::Result<&OsStr> {
    let bytes = name.as_bytes();
    let leads_elsewhere = matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/');
    match leads_elsewhere {
        false => Ok(name),
        true => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is no name in a folder", name.display()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn no_name_leads_out_of_a_folder() {
        let outside = tempfile::tempdir().expect("temp dir");
        let inside = tempfile::tempdir().expect("temp dir");
        let folder = Folder::open(inside.path()).expect("open");
        symlink(outside.path(), inside.path().join("link")).expect("link");
        for name in ["link", "..", ".", "", "a/b", "/"] {
            let name = OsStr::new(name);
            assert!(folder.child(name).is_err(), "{name:?}");
            assert!(folder.make_child(name).is_err(), "{name:?}");
            assert!(folder.file(name).is_err(), "{name:?}");
        }
        assert!(folder.make_child(OsStr::new("real")).is_ok());
    }

    #[test]
    fn a_link_takes_the_place_of_a_file_in_one_step_and_only_if_allowed() {
        let dir = tempfile::tempdir().expect("temp dir");
        let folder = Folder::open(dir.path()).expect("open");
        let (name, none) = (OsStr::new("name"), Attributes::default());
        crate::durable::publish(&dir.path().join(name), 0o600, b"x", Existing::Keep).expect("file");
        let to =
            |target: &str, existing| folder.make_link(name, OsStr::new(target), &none, existing);
        let error = to("first", Existing::Keep).expect_err("taken");
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(folder.file(name).is_ok());
        to("first", Existing::Replace).expect("replaced");
        assert_eq!(folder.link(name).expect("link"), "first");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
    }
}
