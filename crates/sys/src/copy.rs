//! Copies of large sparse files: shared blocks where the file system has them, data only elsewhere.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// How many bytes one copy step moves.
const STEP_BYTES: usize = 1 << 20;

/// How a copy was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The file system shares the blocks (`FICLONE`); nothing was copied.
    Reflink,
    /// The bytes of the data ranges were copied; holes stayed holes.
    Sparse,
}

/// Makes `to` the same as `from`: by reflink if the file system can, else by a sparse copy.
///
/// `to` should be empty. Nothing is synced.
///
/// # Errors
/// When reading or writing fails, for instance for lack of space.
pub fn clone_or_copy(from: &File, to: &File) -> io::Result<Method> {
    if reflink(from, to)? {
        return Ok(Method::Reflink);
    }
    sparse(from, to)?;
    Ok(Method::Sparse)
}

/// Shares all blocks of `from` with `to`; `false` where the file system cannot.
///
/// # Errors
/// When the file system can share blocks but failed to.
pub fn reflink(from: &File, to: &File) -> io::Result<bool> {
    use rustix::io::Errno;
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// Copies the data ranges of `from` to `to`, which gets the same length.
///
/// Two threads share the work, since one does not saturate the memory bus.
///
/// # Errors
/// When reading or writing fails.
pub fn sparse(from: &File, to: &File) -> io::Result<()> {
    to.set_len(from.metadata()?.len())?;
    let steps: Vec<Range<u64>> = data_ranges(from)?.into_iter().flat_map(split).collect();
    let middle = steps.len() / 2;
    let (low, high) = steps.split_at(middle);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| copy_steps(from, to, high));
        let own = copy_steps(from, to, low);
        match other.join() {
            Ok(result) => own.and(result),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn split(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range
        .step_by(STEP_BYTES)
        .map(move |start| start..end.min(start.saturating_add(STEP_BYTES as u64)))
}

fn copy_steps(from: &File, to: &File, steps: &[Range<u64>]) -> io::Result<()> {
    let mut buffer = vec![0; STEP_BYTES];
    for step in steps {
        let length = usize::try_from(step.end - step.start).unwrap_or(STEP_BYTES);
        let bytes = &mut buffer[..length];
        from.read_exact_at(bytes, step.start)?;
        to.write_all_at(bytes, step.start)?;
    }
    Ok(())
}

/// The ranges of `file` that hold data, in order; what lies between them reads as zeros.
///
/// # Errors
/// When the file cannot be searched.
pub fn data_ranges(file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while let Some(range) = next_data(file, at)? {
        at = range.end;
        ranges.push(range);
    }
    Ok(ranges)
}

/// The first range at or after `at` that holds data, or `None` when only a hole follows. A block device knows no
/// holes: all of it is data.
///
/// # Errors
/// When the file cannot be searched.
pub fn next_data(file: &File, at: u64) -> io::Result<Option<Range<u64>>> {
    use rustix::fs::{SeekFrom, seek};
    use rustix::io::Errno;
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL) => {
            let end = seek(file, SeekFrom::End(0))?;
            return Ok((at < end).then_some(at..end));
        }
        Err(error) => return Err(error.into()),
    };
    let end = seek(file, SeekFrom::Hole(start))?;
    Ok((end > start).then_some(start..end))
}

/// Whether every byte is zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks
        .iter()
        .all(|chunk| chunk.iter().fold(0, |or, byte| or | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_reads_the_same_and_its_holes_stay_holes() {
        let from = tempfile::tempfile().expect("temp file");
        from.set_len(64 << 20).expect("grow");
        from.write_all_at(&[7; 3 << 20], 5 << 20).expect("write");
        from.write_all_at(b"end", (64 << 20) - 3).expect("write");
        let to = tempfile::tempfile().expect("temp file");
        sparse(&from, &to).expect("copy");
        assert_eq!(to.metadata().expect("stat").len(), 64 << 20);
        assert_eq!(
            data_ranges(&from).expect("ranges"),
            data_ranges(&to).expect("ranges")
        );
        for range in data_ranges(&from).expect("ranges") {
            let length = usize::try_from(range.end - range.start).expect("fits");
            let (mut a, mut b) = (vec![0; length], vec![1; length]);
            from.read_exact_at(&mut a, range.start).expect("read");
            to.read_exact_at(&mut b, range.start).expect("read");
            assert_eq!(a, b);
        }
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut bytes = vec![0; 200];
        assert!(is_zero(&bytes));
        for at in 0..bytes.len() {
            bytes[at] = 0x10;
            assert!(!is_zero(&bytes), "byte {at}");
            bytes[at] = 0;
        }
    }
}
