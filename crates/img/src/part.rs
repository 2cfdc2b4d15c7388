//! A part of a file that is an image: a raw disk, or the file of a qcow2 image
//! (`json:{"driver":"qcow2","file":{"driver":"raw","offset":…,"size":…,"file":{…}}}`).
//!
//! A part has the room that it has: a change that needs more is refused before anything is written.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use stead_sys::image_lock::{Access, Attempt, ImageLock};
use stead_sys::part::PartStorage;
use stead_sys::readable;
use stead_sys::storage::{FileStorage, Storage};

use crate::failure::system_words;
use crate::opened::held;

/// The disks of both programs have whole sectors of this many bytes.
const SECTOR_BYTES: u64 = 512;

/// Which part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// Where it starts, in bytes.
    pub offset: u64,
    /// How many bytes it has; `None`: to the end of the file.
    pub size: Option<u64>,
}

impl Window {
    /// How many bytes it has in a file of `length` bytes.
    ///
    /// # Errors
    /// The text where the file ends before, or the size is not in whole sectors.
    pub fn bytes_of(&self, length: u64) -> Result<u64, String> {
        let offset = self.offset;
        if self
            .size
            .is_some_and(|size| !size.is_multiple_of(SECTOR_BYTES))
        {
            return Err(format!("Specified size is not multiple of {SECTOR_BYTES}"));
        }
        if offset > length {
            return Err(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({length})"
            ));
        }
        let size = self.size.unwrap_or(length - offset);
        let end = offset.checked_add(size);
        if end.is_some_and(|end| end <= length) {
            return Ok(size);
        }
        Err(format!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  \
             actual size of the containing file ({length})"
        ))
    }

    /// How many bytes it has in the file at `path`.
    ///
    /// # Errors
    /// The reason, in qemu-img's words.
    pub fn bytes_in(&self, path: &Path) -> Result<u64, String> {
        let cannot = |error: io::Error| not_opened(path, &error);
        let storage = FileStorage::new(readable::open(path).map_err(cannot)?);
        let length = storage.and_then(|file| file.len()).map_err(cannot)?;
        self.bytes_of(length)
    }

    /// The part as a storage to be read.
    ///
    /// # Errors
    /// The reason, in qemu-img's words.
    pub fn open(&self, path: &Path) -> Result<Arc<dyn Storage>, String> {
        let cannot = |error: io::Error| not_opened(path, &error);
        self.storage(readable::open(path).map_err(cannot)?, path)
    }

    /// The part as a storage to be written, and the lock on the whole file.
    ///
    /// # Errors
    /// The reason, in qemu-img's words.
    pub fn open_for_changes(&self, path: &Path) -> Result<(Arc<dyn Storage>, ImageLock), String> {
        let cannot = |error: io::Error| not_opened(path, &error);
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(cannot)?;
        match ImageLock::attempt(&file, Access::Write).map_err(cannot)? {
            Attempt::Locked(lock) => Ok((self.storage(file, path)?, lock)),
            Attempt::HeldBy(holders) => Err(held("Failed to get \"write\" lock", path, &holders)),
        }
    }

    fn storage(&self, file: File, path: &Path) -> Result<Arc<dyn Storage>, String> {
        let cannot = |error: io::Error| not_opened(path, &error);
        let whole = FileStorage::new(file).map_err(cannot)?;
        let bytes = self.bytes_of(whole.len().map_err(cannot)?)?;
        let part = PartStorage::new(whole, self.offset, bytes).map_err(cannot)?;
        Ok(Arc::new(part))
    }
}

fn not_opened(path: &Path, error: &io::Error) -> String {
    format!(
        "Could not open '{}': {}",
        path.display(),
        system_words(error)
    )
}
