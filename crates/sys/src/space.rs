//! Room on a file system, asked before the first write.

use std::fs::File;
use std::io;
use std::path::Path;

/// Bytes that an unprivileged process may still write on the file system that holds `path`.
///
/// # Errors
/// When the file system cannot be asked.
pub fn available_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes that a file really occupies, holes not counted.
///
/// # Errors
/// When the file cannot be asked.
pub fn allocated_bytes(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path)?.blocks().saturating_mul(512))
}

/// Reserves room for a range of `file`, which reads as zeros there and grows to its end; `false` where the
/// file system cannot.
///
/// # Errors
/// When there is no room or the file system fails.
pub fn reserve(file: &File, at: u64, length: u64) -> io::Result<bool> {
    allocate(file, rustix::fs::FallocateFlags::empty(), at, length)
}

/// Makes a range inside `file` read as zeros without writing them, and gives its room back where that is
/// possible; `false` where the file system or device cannot.
///
/// # Errors
/// When the file system or device fails.
pub fn punch(file: &File, at: u64, length: u64) -> io::Result<bool> {
    use rustix::fs::FallocateFlags;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    allocate(file, flags, at, length)
}

fn allocate(
    file: &File,
    flags: rustix::fs::FallocateFlags,
    at: u64,
    length: u64,
) -> io::Result<bool> {
    use rustix::io::Errno;
    if length == 0 {
        return Ok(true);
    }
    match rustix::fs::fallocate(file, flags, at, length) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn reserved_room_is_there_and_a_punched_range_reads_as_zeros() {
        let file = tempfile::tempfile().expect("temp file");
        file.write_all_at(&[7; 1 << 20], 0).expect("write");
        if punch(&file, 64 << 10, 128 << 10).expect("punch") {
            let mut bytes = vec![1; 128 << 10];
            file.read_exact_at(&mut bytes, 64 << 10).expect("read");
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
        if reserve(&file, 1 << 20, 1 << 20).expect("reserve") {
            let stat = file.metadata().expect("stat");
            assert_eq!(stat.len(), 2 << 20);
            assert!(stat.blocks() * 512 >= (2 << 20) - (128 << 10));
        }
    }
}
