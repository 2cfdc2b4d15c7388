//! The image file, read at positions and never behind its end.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_sys::readable;
use stead_sys::storage::Storage;

use crate::error::{Error, Result};
use crate::header::to_u64;
use crate::units::HostOffset;

/// Where the bytes come from.
#[derive(Debug, Clone)]
enum Source {
    File(Arc<File>),
    Storage(Arc<dyn Storage>),
}

/// A file opened for reading, with the length it had then.
#[derive(Debug, Clone)]
pub(crate) struct ImageFile {
    source: Source,
    path: PathBuf,
    length: u64,
}

impl ImageFile {
    pub fn open(path: &Path) -> Result<Self> {
        let file = readable::open(path).map_err(|source| Error::io("open", path, source))?;
        Self::new(file, path)
    }

    /// Takes an open file; `path` is for texts.
    pub fn new(mut file: File, path: &Path) -> Result<Self> {
        // A block device says 0 in its metadata; its end can only be sought.
        let length = file
            .seek(SeekFrom::End(0))
            .map_err(|source| Error::io("find the length of", path, source))?;
        Ok(Self {
            source: Source::File(Arc::new(file)),
            path: path.to_owned(),
            length,
        })
    }

    /// Takes a storage with the length that it has now; `path` is for texts.
    pub fn on(storage: Arc<dyn Storage>, path: &Path) -> Result<Self> {
        let length = storage
            .len()
            .map_err(|source| Error::io("find the length of", path, source))?;
        Ok(Self {
            source: Source::Storage(storage),
            path: path.to_owned(),
            length,
        })
    }

    /// The file itself; `None` for another storage.
    pub fn file(&self) -> Option<&File> {
        match &self.source {
            Source::File(file) => Some(file),
            Source::Storage(_) => None,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    /// What the file takes on its file system, in bytes; of another storage, its length.
    pub fn allocated_bytes(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        let Some(file) = self.file() else {
            return Ok(self.length);
        };
        let metadata = file
            .metadata()
            .map_err(|source| Error::io("ask for", &self.path, source))?;
        Ok(metadata.blocks().saturating_mul(512))
    }

    /// Whether `length` bytes at `at` lie in the file.
    pub fn require(&self, what: &'static str, at: HostOffset, length: u64) -> Result<()> {
        let end = at.0.checked_add(length);
        if end.is_some_and(|end| end <= self.length) {
            return Ok(());
        }
        Err(Error::OutOfFile {
            path: self.path.clone(),
            what,
            at,
            length,
            file_length: self.length,
        })
    }

    /// Fills `bytes` from `at`, or fails without a short read.
    pub fn read(&self, what: &'static str, at: HostOffset, bytes: &mut [u8]) -> Result<()> {
        self.require(what, at, to_u64(bytes.len()))?;
        let read = match &self.source {
            Source::File(file) => file.read_exact_at(bytes, at.0),
            Source::Storage(storage) => storage.read_exact_at(bytes, at.0),
        };
        read.map_err(|source| Error::io("read", &self.path, source))
    }

    /// Reads a table of big-endian words. The caller has bounded `count`.
    pub fn read_words(&self, what: &'static str, at: HostOffset, count: usize) -> Result<Vec<u64>> {
        // The bound comes before the memory.
        self.require(what, at, to_u64(count).saturating_mul(8))?;
        let mut bytes = vec![0; count * 8];
        self.read(what, at, &mut bytes)?;
        let (words, _none) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_be_bytes(*word)).collect())
    }
}
