//! Another length for a raw disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use stead_qcow2::Preallocation;
use stead_sys::image_lock::{Access, Attempt, ImageLock};
use stead_sys::space;

use crate::failure::system_words;
use crate::opened::held;

/// Zeros are written in pieces of this many bytes.
const STEP_BYTES: u64 = 1 << 20;

/// A raw file, locked and open for changes.
#[derive(Debug)]
pub(crate) struct RawFile {
    file: File,
    /// Where the disk starts in the file, in bytes.
    start: u64,
    _lock: ImageLock,
}

impl RawFile {
    /// Locks and opens the file, of which the disk is what follows `start`.
    ///
    /// # Errors
    /// The reason, in qemu-img's words.
    pub fn open_from(path: &Path, start: u64) -> Result<Self, String> {
        let shown = path.display();
        let cannot =
            |error: io::Error| format!("Could not open '{shown}': {}", system_words(&error));
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(cannot)?;
        match ImageLock::attempt(&file, Access::Write).map_err(cannot)? {
            Attempt::Locked(lock) => Ok(Self {
                file,
                start,
                _lock: lock,
            }),
            Attempt::HeldBy(holders) => Err(held("Failed to get \"write\" lock", path, &holders)),
        }
    }

    /// The disk's length in bytes.
    ///
    /// # Errors
    /// When the file cannot be asked.
    pub fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len().saturating_sub(self.start))
    }

    /// Gives the disk the length `bytes`. What is added reads as zeros, and takes its room as `mode` says.
    ///
    /// # Durability
    /// When this returns `Ok`, the new length has reached the disk.
    ///
    /// # Errors
    /// When there is no room or the system fails; then the file has its old length.
    pub fn resize(&self, bytes: u64, mode: Preallocation) -> io::Result<()> {
        let old = self.file.metadata()?.len();
        let bytes = self.start.saturating_add(bytes);
        let grown = self.file.set_len(bytes).and_then(|()| match mode {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc if bytes > old => {
                let reserved = space::reserve(&self.file, old, bytes - old)?;
                if reserved {
                    Ok(())
                } else {
                    self.fill(old, bytes)
                }
            }
            Preallocation::Full if bytes > old => self.fill(old, bytes),
            Preallocation::Falloc | Preallocation::Full => Ok(()),
        });
        if let Err(error) = grown {
            if bytes > old {
                self.file.set_len(old)?;
            }
            return Err(error);
        }
        self.file.sync_all()
    }

    fn fill(&self, start: u64, end: u64) -> io::Result<()> {
        let zeros = vec![0; usize::try_from(STEP_BYTES.min(end - start)).unwrap_or(0)];
        let mut at = start;
        while at < end {
            let step = STEP_BYTES.min(end - at);
            let step_bytes = usize::try_from(step).unwrap_or(0);
            self.file.write_all_at(&zeros[..step_bytes], at)?;
            at += step;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_is_zeros_and_takes_its_room_when_asked() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("raw");
        stead_sys::durable::create_scratch(&path, 0o600).expect("a file");
        let raw = RawFile::open_from(&path, 0).expect("free");
        raw.resize(1 << 20, Preallocation::Off).expect("longer");
        raw.resize(3 << 20, Preallocation::Falloc).expect("longer");
        raw.resize(5 << 20, Preallocation::Full).expect("longer");
        let taken = space::allocated_bytes(&path).expect("a file");
        assert!((4 << 20..5 << 20).contains(&taken), "{taken}");
        raw.resize(1000, Preallocation::Off).expect("shorter");
        assert_eq!(raw.length().expect("a file"), 1000);
        let error = RawFile::open_from(&path, 0).expect_err("in use");
        assert!(error.contains("write"), "{error}");
    }
}
