//! Names: folders, links, renaming, removing.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use stead_agent_proto::files::{FileError, FileErrorKind, Replace};
use stead_agent_proto::message::Bytes;
use stead_sys::durable::Existing;
use stead_sys::folder::Attributes;

use super::error::{Tried, UNCHANGED, as_path, refused};
use super::stat::place;

/// How many components a path has that folders are made for; more do not fit into one.
const MAX_DEPTH: usize = stead_agent_proto::files::MAX_PATH_BYTES;

pub(super) fn existing(replace: Replace) -> Existing {
    match replace {
        Replace::Yes => Existing::Replace,
        Replace::No => Existing::Keep,
    }
}

/// Makes a folder, and with `parents` those above it that are missing.
pub(super) fn make_folder(path: &Bytes, parents: bool, mode: u32) -> Result<(), FileError> {
    let at = as_path(path);
    if !parents {
        return make_one(at, mode).tried("make the folder", path);
    }
    let mut missing: Vec<&Path> = Vec::new();
    for folder in at.ancestors().take(MAX_DEPTH) {
        if folder.is_dir() {
            break;
        }
        missing.push(folder);
    }
    for folder in missing.into_iter().rev() {
        let made = make_one(folder, mode);
        // Somebody else may make it at the same time.
        if made.is_err() && folder.is_dir() {
            continue;
        }
        let left = "folders above it may have been made";
        made.tried_leaving("make the folder", path, left)?;
    }
    Ok(())
}

fn make_one(path: &Path, mode: u32) -> io::Result<()> {
    let mode = Mode::from_raw_mode(mode);
    rustix::fs::mkdirat(CWD, path, mode)?;
    // Whatever the umask took away.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    Ok(rustix::fs::fchmod(folder, mode)?)
}

/// Removes a name, with `recursive` a folder with all that is in it. Links in it are removed, not followed.
pub(super) fn remove(path: &Bytes, recursive: bool) -> Result<(), FileError> {
    let attempted = "remove";
    let at = as_path(path);
    if at.file_name().is_none() {
        return Err(refused(FileErrorKind::Invalid, attempted, path, UNCHANGED));
    }
    let is_folder = fs::symlink_metadata(at).tried(attempted, path)?.is_dir();
    match (is_folder, recursive) {
        (true, true) => {
            let left = "some of what is in it may be gone";
            fs::remove_dir_all(at).tried_leaving(attempted, path, left)
        }
        (true, false) => fs::remove_dir(at).tried(attempted, path),
        (false, _) => fs::remove_file(at).tried(attempted, path),
    }
}

/// Gives a file or folder another name.
pub(super) fn rename(from: &Bytes, to: &Bytes, replace: Replace) -> Result<(), FileError> {
    let flags = match replace {
        Replace::Yes => RenameFlags::empty(),
        Replace::No => RenameFlags::NOREPLACE,
    };
    match rustix::fs::renameat_with(CWD, as_path(from), CWD, as_path(to), flags) {
        // The other file system is no fault of the request's form.
        Err(Errno::XDEV) => Err(refused(
            FileErrorKind::Other,
            "rename across file systems",
            from,
            UNCHANGED,
        )),
        done => done.tried("rename", from),
    }
}

/// Makes a symlink.
pub(super) fn make_link(path: &Bytes, target: &Bytes, replace: Replace) -> Result<(), FileError> {
    let attempted = "make the symlink";
    let (folder, name) = place(attempted, path)?;
    let target = as_path(target).as_os_str();
    folder
        .make_link(name, target, &Attributes::default(), existing(replace))
        .tried(attempted, path)
}

/// What a symlink says.
pub(super) fn read_link(path: &Bytes) -> Result<Bytes, FileError> {
    let target = fs::read_link(as_path(path)).tried("read the symlink", path)?;
    Ok(target.into_os_string().into_vec().into())
}
