//! Where an image's bytes lie: six calls, so that every write, every sync and every fault of an operation
//! can be put in a test's hand.
use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::OnceLock;

use rustix::fs::copy_file_range;
use rustix::io::Errno;

use crate::direct::{self, ALIGNMENT, AlignedBuffer};
use crate::share::{self, Shared};
use crate::space;

/// How many bytes one step of a copy by reading and writing moves.
const STEP_BYTES: usize = 1 << 20;
/// From how many bytes on a copy goes past the page cache.
const DIRECT_BYTES: u64 = 1 << 20;
/// From how many bytes on room is taken before a copy through the page cache: at once, and not page by page when it is
/// written out, which takes ext4 three times as long.
const RESERVED_BYTES: u64 = 1 << 20;
/// How many bytes one step of a copy past the page cache moves.
const DIRECT_STEP_BYTES: usize = 2 << 20;

/// A file as an image needs it: positioned calls only, usable from several threads.
#[allow(
    clippy::len_without_is_empty,
    reason = "nobody asks whether an image has no bytes"
)]
pub trait Storage: Debug + Send + Sync {
    /// The length in bytes; that of the device for a block device.
    ///
    /// # Errors
    /// When the system cannot tell.
    fn len(&self) -> io::Result<u64>;

    /// Fills `bytes` from `at` on.
    ///
    /// # Errors
    /// When reading fails or the end comes first.
    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `at`, making the file longer where it must.
    ///
    /// # Durability
    /// None before [`Storage::sync`].
    ///
    /// # Errors
    /// When writing fails; a part may have been written.
    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Cuts the file off, or makes it longer with zeros. A block device keeps its length: it accepts any
    /// that it has room for.
    ///
    /// # Durability
    /// None before [`Storage::sync`].
    ///
    /// # Errors
    /// When the system refuses.
    fn set_len(&self, length: u64) -> io::Result<()>;

    /// The most bytes that it can have, where it cannot grow as it likes; `None`: the file system decides.
    ///
    /// # Errors
    /// When the system cannot tell.
    fn room(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// Keeps room for `length` bytes at `at`, which lie behind the end, become part of the file and read as zeros;
    /// `false` where that cannot be, and nothing was done.
    ///
    /// # Errors
    /// When there is no room, or the system fails.
    fn reserve(&self, _at: u64, _length: u64) -> io::Result<bool> {
        Ok(false)
    }

    /// Waits until everything written before is on the disk, with what is needed to read it back.
    ///
    /// # Errors
    /// When the system cannot promise that; what was written since the last sync may then be lost.
    fn sync(&self) -> io::Result<()>;

    /// Makes `length` bytes at `at` those of `source` at `from`.
    ///
    /// # Errors
    /// When reading or writing fails or `source` ends first; a part may have been written.
    fn copy_from(&self, source: &File, from: u64, at: u64, length: u64) -> io::Result<()> {
        copy_by_hand(self, source, Span { from, at, length })
    }

    /// As [`Storage::copy_from`], for bytes that are read again soon: those that cannot be shared stay in memory.
    ///
    /// # Errors
    /// As [`Storage::copy_from`].
    fn copy_to_read(&self, source: &File, from: u64, at: u64, length: u64) -> io::Result<()> {
        copy_by_hand(self, source, Span { from, at, length })
    }
}

/// A range to be copied: `length` bytes from `from` to `at`.
#[derive(Debug, Clone, Copy)]
struct Span {
    from: u64,
    at: u64,
    length: u64,
}

impl Span {
    fn shared(self) -> Shared {
        Shared {
            from: self.from,
            to: self.at,
            length: self.length,
        }
    }

    /// What is left after `done` bytes.
    fn behind(self, done: u64) -> Self {
        Self {
            from: self.from + done,
            at: self.at + done,
            length: self.length - done,
        }
    }
}

fn copy_by_hand<S: Storage + ?Sized>(storage: &S, source: &File, span: Span) -> io::Result<()> {
    let step = usize::try_from(span.length).unwrap_or(STEP_BYTES);
    let mut buffer = vec![0; step.min(STEP_BYTES)];
    let mut left = span;
    while left.length > 0 {
        let length = usize::try_from(left.length).unwrap_or(STEP_BYTES);
        let bytes = &mut buffer[..length.min(STEP_BYTES)];
        source.read_exact_at(bytes, left.from)?;
        storage.write_all_at(bytes, left.at)?;
        left = left.behind(bytes.len() as u64);
    }
    Ok(())
}

/// A regular file or a block device.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    device: bool,
    /// The same file for writes past the page cache, once it was asked for.
    direct: OnceLock<Option<File>>,
}

impl FileStorage {
    /// Takes an open file.
    ///
    /// # Errors
    /// When the system cannot say what kind of file it is.
    pub fn new(file: File) -> io::Result<Self> {
        let device = file.metadata()?.file_type().is_block_device();
        Ok(Self {
            file,
            device,
            direct: OnceLock::new(),
        })
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether the length is that of a device and cannot change.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.device
    }
}

impl FileStorage {
    fn direct(&self) -> io::Result<Option<&File>> {
        if let Some(known) = self.direct.get() {
            return Ok(known.as_ref());
        }
        let opened = direct::reopen(&self.file)?;
        Ok(self.direct.get_or_init(|| opened).as_ref())
    }

    /// Copies whole blocks of a long range past the page cache, as far as that is possible here; how many bytes
    /// it did. What was copied has to reach the disk anyway, and a second copy in memory costs as much time.
    fn copy_directly(&self, source: &File, span: Span) -> io::Result<u64> {
        let length = span.length / ALIGNMENT * ALIGNMENT;
        if length < DIRECT_BYTES || !span.at.is_multiple_of(ALIGNMENT) {
            return Ok(0);
        }
        let Some(to) = self.direct()? else {
            return Ok(0);
        };
        let mut buffer = AlignedBuffer::new(DIRECT_STEP_BYTES);
        let mut done = 0;
        while done < length {
            let left = usize::try_from(length - done).unwrap_or(DIRECT_STEP_BYTES);
            let bytes = &mut buffer.bytes_mut()[..left.min(DIRECT_STEP_BYTES)];
            source.read_exact_at(bytes, span.from + done)?;
            match to.write_all_at(bytes, span.at + done) {
                Ok(()) => done += bytes.len() as u64,
                // Blocks that are larger than usual: the page cache knows them.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

impl Storage for FileStorage {
    fn len(&self) -> io::Result<u64> {
        if self.device {
            // A block device says 0 in its metadata; its end can only be sought.
            return (&self.file).seek(SeekFrom::End(0));
        }
        Ok(self.file.metadata()?.len())
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        if !self.device {
            return self.file.set_len(length);
        }
        if length > self.len()? {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        Ok(())
    }

    fn reserve(&self, at: u64, length: u64) -> io::Result<bool> {
        match self.device {
            true => Ok(false),
            false => space::reserve(&self.file, at, length),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn copy_from(&self, source: &File, from: u64, at: u64, length: u64) -> io::Result<()> {
        let span = Span { from, at, length };
        if length == 0 || share::clone_range(source, &self.file, span.shared())? {
            return Ok(());
        }
        let done = self.copy_directly(source, span)?;
        let left = span.behind(done);
        let done = copy_in_kernel(&self.file, source, left)?;
        copy_by_hand(self, source, left.behind(done))
    }

    fn copy_to_read(&self, source: &File, from: u64, at: u64, length: u64) -> io::Result<()> {
        let span = Span { from, at, length };
        if length == 0 || share::clone_range(source, &self.file, span.shared())? {
            return Ok(());
        }
        if length >= RESERVED_BYTES && !self.reserve(at, length)? {
            // Then the file system finds room for each page when it writes it out.
        }
        copy_by_hand(self, source, span)
    }
}

/// Copies without passing through our memory as far as the kernel does so; how many bytes it did.
fn copy_in_kernel(to: &File, source: &File, span: Span) -> io::Result<u64> {
    let mut done = 0;
    while done < span.length {
        let (mut from, mut at) = (span.from + done, span.at + done);
        let left = usize::try_from(span.length - done).unwrap_or(usize::MAX >> 1);
        match copy_file_range(source, Some(&mut from), to, Some(&mut at), left) {
            Ok(0) => break,
            Ok(copied) => done += copied as u64,
            Err(
                Errno::OPNOTSUPP
                | Errno::XDEV
                | Errno::INVAL
                | Errno::NOSYS
                | Errno::PERM
                | Errno::TXTBSY,
            ) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage() -> FileStorage {
        FileStorage::new(tempfile::tempfile().expect("temp file")).expect("a file")
    }

    #[test]
    fn a_copy_puts_the_bytes_of_the_source_where_they_are_wanted_and_nothing_else() {
        let source = storage();
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        source.write_all_at(&bytes, 0).expect("write");
        let spans = [
            (0, 0, 4096),
            (7, 513, 2_500_000),
            (4096, 8192, 4096),
            (513, 4096, 2_900_001),
        ];
        for (from, at, length) in spans {
            let [start, place, count] = [from, at, length].map(|n: u64| n as usize);
            let mut expected = vec![9; place + count + 100];
            for way in 0..3 {
                let to = storage();
                to.write_all_at(&expected, 0).expect("write");
                let copied = match way {
                    0 => copy_by_hand(&to, source.file(), Span { from, at, length }),
                    1 => to.copy_from(source.file(), from, at, length),
                    _ => to.copy_to_read(source.file(), from, at, length),
                };
                copied.expect("copy");
                let mut found = vec![0; expected.len()];
                to.read_exact_at(&mut found, 0).expect("read");
                let mut wanted = expected.clone();
                wanted[place..place + count].copy_from_slice(&bytes[start..start + count]);
                assert!(found == wanted, "{from} {at} {length} {way}");
            }
            expected.fill(9);
        }
    }

    #[test]
    fn a_source_that_ends_early_is_an_error() {
        let (source, to) = (storage(), storage());
        source.write_all_at(&[1; 1000], 0).expect("write");
        let error = to.copy_from(source.file(), 500, 0, 1000).expect_err("ends");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
