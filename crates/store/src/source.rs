//! What a device's content is read from.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Readable content of a fixed length, with holes that need not be read.
pub trait Source: Send + Sync {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first range at or after `at` that may hold data; what lies between reads as zeros.
    ///
    /// # Errors
    /// When the source cannot be searched.
    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>>;

    /// Fills `buf` with the bytes at `at`; the whole range lies within [`Source::len`].
    ///
    /// # Errors
    /// When the bytes cannot all be read.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// A file or block device as a source; holes are found with `SEEK_DATA` where it works.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    length_bytes: u64,
}

impl FileSource {
    /// Reads `file`, which must not change while it is used.
    ///
    /// # Errors
    /// When its length cannot be found.
    pub fn new(file: File) -> io::Result<Self> {
        let length_bytes = (&file).seek(SeekFrom::End(0))?;
        Ok(Self { file, length_bytes })
    }

    /// The file itself.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Source for FileSource {
    fn len(&self) -> u64 {
        self.length_bytes
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        if at >= self.length_bytes {
            return Ok(None);
        }
        match stead_sys::copy::next_data(&self.file, at) {
            Ok(range) => Ok(range),
            // Block devices and some file systems know no holes: all of it may be data.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                Ok(Some(at..self.length_bytes))
            }
            Err(error) => Err(error),
        }
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }
}

/// Bytes in memory as a source.
impl Source for Vec<u8> {
    fn len(&self) -> u64 {
        self.as_slice().len() as u64
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let length = Source::len(self);
        Ok((at < length).then_some(at..length))
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = usize::try_from(at)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buf.len())?))
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}
