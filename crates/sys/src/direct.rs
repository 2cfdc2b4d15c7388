//! Writing past the page cache: a new file of gigabytes is synced anyway, so its bytes need not be
//! copied into memory first.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;

/// What offsets, lengths and memory of a direct write are to be multiples of, in bytes. Larger than any
/// sector in use.
pub const ALIGNMENT: u64 = 4096;

/// The same file as `file`, opened once more for writes past the page cache; `None` where the file system
/// has no such writes.
///
/// Writes through it are not durable before the file is synced.
///
/// # Errors
/// When the file cannot be opened for another reason.
pub fn reopen(file: &File) -> io::Result<Option<File>> {
    let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
    let opened = OpenOptions::new()
        .write(true)
        .custom_flags(flags)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    match opened {
        Ok(file) => Ok(Some(file)),
        // EINVAL: no direct writes here. ENOENT: no /proc.
        Err(error) if matches!(error.raw_os_error(), Some(2 | 22)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Memory that may be written past the page cache: it starts at a multiple of [`ALIGNMENT`].
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// `length` bytes of zeros.
    #[must_use]
    pub fn new(length: usize) -> Self {
        let alignment = ALIGNMENT as usize;
        let memory = vec![0; length + alignment];
        let start = memory.as_ptr().align_offset(alignment);
        assert!(start <= alignment, "bytes can be aligned");
        Self {
            memory,
            start,
            length,
        }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    /// The bytes, to be changed.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

/// Whether a write of `bytes` at `at` may go past the page cache.
#[must_use]
pub fn is_aligned(at: u64, bytes: &[u8]) -> bool {
    let alignment = ALIGNMENT as usize;
    at.is_multiple_of(ALIGNMENT)
        && bytes.len().is_multiple_of(alignment)
        && bytes.as_ptr().addr().is_multiple_of(alignment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_is_written_past_the_page_cache_is_read_through_it() {
        let file = tempfile::tempfile().expect("temp file");
        file.write_all_at(&[1; 8192], 0).expect("write");
        let mut buffer = AlignedBuffer::new(4096);
        buffer.bytes_mut().fill(2);
        assert!(is_aligned(4096, buffer.bytes()));
        assert!(!is_aligned(512, buffer.bytes()));
        assert!(!is_aligned(0, &buffer.bytes()[1..]));
        if let Some(direct) = reopen(&file).expect("reopen") {
            direct.write_all_at(buffer.bytes(), 4096).expect("direct");
            let mut found = [0; 8192];
            file.read_exact_at(&mut found, 0).expect("read");
            assert_eq!(found[4095..4097], [1, 2]);
        }
    }
}
