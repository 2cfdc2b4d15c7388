//! Sharing a part of a file's blocks with another file.
//!
//! # Source
//! ioctl_ficlonerange(2).
#![allow(
    unsafe_code,
    reason = "no safe wrapper offers this ioctl; the call argues its safety"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::io::Errno;
use rustix::ioctl::{self, Opcode, Setter};

const FICLONERANGE: Opcode = ioctl::opcode::write::<FileCloneRange>(0x94, 13);

/// `struct file_clone_range` of linux/fs.h.
#[repr(C)]
struct FileCloneRange {
    source_fd: i64,
    source_offset: u64,
    source_length: u64,
    target_offset: u64,
}

const _: () = assert!(size_of::<FileCloneRange>() == 32);

/// A range of one file that is to be shared with another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shared {
    /// Where it starts in the source, in bytes.
    pub from: u64,
    /// Where it is to start in the target, in bytes.
    pub to: u64,
    /// Its length in bytes; not 0 (the system would take it for all the rest).
    pub length: u64,
}

/// Makes `range` of `to` share the blocks of `from`; `false` where the file system cannot, or not at
/// these offsets (they are to be whole blocks). The target grows as for a write.
///
/// # Errors
/// When the file system can share blocks but failed to, for instance for lack of space.
///
/// # Panics
/// When the length is 0.
pub fn clone_range(from: &File, to: &File, range: Shared) -> io::Result<bool> {
    assert!(range.length > 0, "a length of 0 means the rest of the file");
    let argument = FileCloneRange {
        source_fd: i64::from(from.as_raw_fd()),
        source_offset: range.from,
        source_length: range.length,
        target_offset: range.to,
    };
    // SAFETY: the opcode takes a pointer to `file_clone_range`; `FileCloneRange` has its layout (size
    // asserted above, four words of 8 bytes) and the kernel only reads it. Both files are borrowed, so
    // both descriptors stay open during the call.
    let done = unsafe { ioctl::ioctl(to, Setter::<FICLONERANGE, FileCloneRange>::new(argument)) };
    match done {
        Ok(()) => Ok(true),
        Err(
            Errno::OPNOTSUPP
            | Errno::XDEV
            | Errno::INVAL
            | Errno::NOTTY
            | Errno::NOSYS
            | Errno::PERM
            | Errno::TXTBSY,
        ) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_shared_range_reads_the_same_or_the_target_is_as_it_was() {
        let from = tempfile::tempfile().expect("temp file");
        from.write_all_at(&[7; 64 << 10], 0).expect("write");
        let to = tempfile::tempfile().expect("temp file");
        to.write_all_at(&[1; 64 << 10], 0).expect("write");
        let range = Shared {
            from: 8192,
            to: 4096,
            length: 16 << 10,
        };
        let shared = clone_range(&from, &to, range).expect("clone");
        let mut bytes = vec![0; 64 << 10];
        to.read_exact_at(&mut bytes, 0).expect("read");
        let mut expected = vec![1; 64 << 10];
        if shared {
            expected[4096..20_480].fill(7);
        }
        assert!(bytes == expected);
        assert!(!clone_range(&from, &to, Shared { from: 1, ..range }).expect("not whole blocks"));
    }
}
