//! Where a new image goes: a new file, in the place of one that nobody uses, or a block device.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use stead_qcow2::Target;
use stead_sys::durable::Existing;
use stead_sys::image_lock::{Access, Attempt, ImageLock};
use stead_sys::readable;

use crate::failure::system_words;
use crate::opened::held;

/// Permission bits of a new file, before the umask.
const NEW_FILE_MODE: u32 = 0o644;

/// A place for a new image, with the lock on what is there now.
#[derive(Debug)]
pub(crate) struct Place {
    /// The place, as the engine takes it.
    pub target: Target,
    #[expect(dead_code, reason = "it is held, not used")]
    lock: Option<ImageLock>,
}

/// The place of that name. An image that is there and in use is not replaced.
///
/// # Errors
/// The reason, in qemu-img's words; lines below the first are ours.
pub(crate) fn place(path: &Path) -> Result<Place, String> {
    let found = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(not_created(path, &error)),
        Ok(found) => Some(found),
    };
    let Some(found) = found else {
        return new_file(path);
    };
    if found.is_dir() {
        let error = io::Error::from_raw_os_error(21);
        return Err(not_created(path, &error));
    }
    if !found.is_file() {
        return Ok(Place {
            target: Target::InPlace {
                path: path.to_owned(),
            },
            lock: None,
        });
    }
    let lock = lock(path)?;
    // The new file takes the place of what a link points to, not that of the link.
    let path = fs::canonicalize(path).map_err(|error| not_created(path, &error))?;
    Ok(Place {
        target: Target::New {
            path,
            mode: found.permissions().mode() & 0o7777,
            existing: Existing::Replace,
        },
        lock: Some(lock),
    })
}

fn new_file(path: &Path) -> Result<Place, String> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    fs::metadata(folder).map_err(|error| not_created(path, &error))?;
    Ok(Place {
        target: Target::New {
            path: path.to_owned(),
            mode: NEW_FILE_MODE,
            existing: Existing::Keep,
        },
        lock: None,
    })
}

/// The lock on a file that is to be replaced or written.
fn lock(path: &Path) -> Result<ImageLock, String> {
    let file = readable::open(path).map_err(|error| not_created(path, &error))?;
    match ImageLock::attempt(&file, Access::Write) {
        Ok(Attempt::Locked(lock)) => Ok(lock),
        Ok(Attempt::HeldBy(holders)) => Err(held("Failed to get \"write\" lock", path, &holders)),
        Err(error) => Err(not_created(path, &error)),
    }
}

/// What is said when there can be no such file.
pub(crate) fn not_created(path: &Path, error: &io::Error) -> String {
    format!(
        "Could not create '{}': {}",
        path.display(),
        system_words(error)
    )
}

/// The place of a file or device that is there already and is written in place.
///
/// # Errors
/// As [`place`].
pub(crate) fn in_place(path: &Path) -> Result<Place, String> {
    let regular = fs::metadata(path).is_ok_and(|found| found.is_file());
    Ok(Place {
        target: Target::InPlace {
            path: path.to_owned(),
        },
        lock: if regular { Some(lock(path)?) } else { None },
    })
}

/// There is something at `path`.
///
/// # Errors
/// The reason, in qemu-img's words.
pub(crate) fn existing(path: &Path) -> Result<(), String> {
    match fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!(
            "Could not open '{}': {}",
            path.display(),
            system_words(&error)
        )),
    }
}
