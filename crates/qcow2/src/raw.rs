//! A raw disk: the bytes of a file, or of a part of it.

use std::ops::Range;

use stead_sys::copy;

use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::header::{SECTOR_BYTES, to_u64, to_usize};
use crate::units::HostOffset;

/// A raw disk. It is filled up with zeros to a whole sector.
#[derive(Debug, Clone)]
pub(crate) struct RawDisk {
    file: ImageFile,
    /// Where the disk starts in the file, in bytes.
    start: u64,
    /// How many bytes of the file it has.
    bytes: u64,
}

impl RawDisk {
    /// All of `file`.
    pub fn whole(file: ImageFile) -> Self {
        let bytes = file.length();
        Self {
            file,
            start: 0,
            bytes,
        }
    }

    /// The `bytes` of `file` from `start` on.
    pub fn part(file: ImageFile, start: u64, bytes: u64) -> Result<Self> {
        file.require("a part of the file", HostOffset(start), bytes)?;
        Ok(Self { file, start, bytes })
    }

    pub fn file(&self) -> &ImageFile {
        &self.file
    }

    /// The disk's length in bytes.
    pub fn length(&self) -> u64 {
        self.bytes.next_multiple_of(SECTOR_BYTES)
    }

    /// How many bytes of the file it has.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where the disk's byte `at` lies in the file.
    pub fn host(&self, at: u64) -> HostOffset {
        HostOffset(self.start + at)
    }

    /// Whether both are the same bytes of files that are the same.
    pub fn is_same_part(&self, other: &Self) -> bool {
        (self.start, self.bytes) == (other.start, other.bytes)
    }

    /// Reads from `at` on; behind the end, in the last sector, are zeros.
    pub fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let there = self.bytes.saturating_sub(at).min(to_u64(bytes.len()));
        let (data, tail) = bytes.split_at_mut(to_usize(there));
        tail.fill(0);
        if data.is_empty() {
            return Ok(());
        }
        self.file.read("raw data", self.host(at), data)
    }

    /// The next range of the disk from `at` on, up to `end`, that is no hole.
    pub fn next_data(&self, at: u64, end: u64) -> Result<Option<Range<u64>>> {
        let end = end.min(self.bytes);
        if at >= end {
            return Ok(None);
        }
        let Some(raw) = self.file.file() else {
            // Where holes cannot be asked for, everything may be data.
            return Ok(Some(at..end));
        };
        let data = copy::next_data(raw, self.host(at).0)
            .map_err(|source| Error::io("find the holes of", self.file.path(), source))?;
        let Some(data) = data else { return Ok(None) };
        let range = data.start.saturating_sub(self.start).max(at)
            ..data.end.saturating_sub(self.start).min(end);
        Ok((range.start < range.end).then_some(range))
    }

    /// Whether there is a hole at `at`, and how many of `length` bytes are alike. Behind the end is a hole.
    pub fn hole_at(&self, at: u64, length: u64) -> Result<(bool, u64)> {
        Ok(match self.next_data(at, at.saturating_add(length))? {
            None => (true, length),
            Some(data) if data.start > at => (true, data.start - at),
            Some(data) => (false, data.end - at),
        })
    }
}
