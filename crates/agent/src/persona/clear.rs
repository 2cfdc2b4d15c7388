//! Removing what a fork must not keep.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use stead_sys::durable;

use super::{Outcome, Step, magic_link, open_folder};

/// The longest path, in bytes, as the kernel has it.
const MAX_PATH_BYTES: usize = 4095;

/// Removes the file or folder at the absolute `path` below `root`. A symbolic link at its end is removed itself; one on the
/// way to it is refused, since what is behind it may be anything.
pub(super) fn remove(root: &Path, path: &[u8]) -> Step {
    let path = checked(path)?;
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err("the root itself cannot be cleared".to_owned());
    };
    let failed = |error: io::Error| error.to_string();
    let root = open_folder(root).map_err(failed)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let folder = match rustix::fs::openat2(&root, folder, flags, Mode::empty(), within) {
        Ok(folder) => folder,
        Err(rustix::io::Errno::NOENT) => return Ok(missing()),
        Err(rustix::io::Errno::LOOP) => {
            return Err(format!(
                "the way to it leads through a symbolic link at or above {:?}: name where it leads to",
                folder.display()
            ));
        }
        Err(error) => return Err(failed(error.into())),
    };
    // Through the open folder: nobody can put a link in its place any more.
    let at = magic_link(&folder).join(name);
    let kind = match fs::symlink_metadata(&at) {
        Ok(found) => found.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(missing()),
        Err(error) => return Err(failed(error)),
    };
    let removed = if kind.is_dir() {
        durable::remove_tree(&at)
    } else {
        durable::remove_file(&at)
    };
    removed.map_err(failed)?;
    Ok(Outcome::Done(String::new()))
}

fn missing() -> Outcome {
    Outcome::Skipped("it is not there".to_owned())
}

fn checked(path: &[u8]) -> Result<&Path, String> {
    if path.len() > MAX_PATH_BYTES || path.contains(&0) {
        return Err(format!(
            "it is no path: at most {MAX_PATH_BYTES} bytes, none of them zero"
        ));
    }
    let path = Path::new(OsStr::from_bytes(path));
    let is_plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    if !path.is_absolute() || !path.components().all(is_plain) {
        return Err("it must be an absolute path without '..'".to_owned());
    }
    Ok(path)
}
