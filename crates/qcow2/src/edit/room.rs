//! How much room a change needs: the change itself, made on a storage that keeps its tables in a file
//! without a name and drops its data.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_sys::storage::Storage;
use stead_sys::{copy, durable};

use crate::header::{to_u64, to_usize};
use crate::units::ClusterSize;

/// What file systems give out at a time, in bytes: a hole is filled in such blocks.
pub(super) const BLOCK_BYTES: u64 = 4096;

/// The room that a change needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// The file's length when it is longest, in bytes.
    pub peak_bytes: u64,
    /// Where the last cluster that is used at any time ends, in bytes: a block device must be as long.
    pub reached_bytes: u64,
    /// The file's length afterwards, in bytes.
    pub end_bytes: u64,
    /// Bytes that the file system must have free: what lies behind the end of the file now or in its
    /// holes and is written to. Blocks that are shared with another file are none of them.
    pub new_bytes: u64,
    /// Bytes that the file system of the external data file must have free, if there is such a file.
    pub data_bytes: u64,
    /// Whether the change needs the journal, because more than the first sector changes in place.
    pub journal: bool,
}

/// A storage over another: what is written lies in a file without a name, the other is only read.
#[derive(Debug)]
pub(super) struct Scratch {
    base: Arc<dyn Storage>,
    file: File,
    size: ClusterSize,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    /// Where in the scratch file each cluster lies.
    slots: HashMap<u64, u64>,
    length: u64,
}

impl Scratch {
    pub fn new(base: Arc<dyn Storage>, size: ClusterSize) -> io::Result<Self> {
        let length = base.len()?;
        Ok(Self {
            base,
            file: durable::nameless(&std::env::temp_dir())?,
            size,
            written: Mutex::new(Written {
                slots: HashMap::new(),
                length,
            }),
        })
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a part of one cluster; behind the end of the base are zeros.
    fn read_part(&self, written: &Written, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let within = self.size.offset_in(at);
        if let Some(slot) = written.slots.get(&self.size.start_of(at)) {
            return self.file.read_exact_at(bytes, slot + within);
        }
        let there = self.base.len()?.saturating_sub(at).min(to_u64(bytes.len()));
        let (data, behind) = bytes.split_at_mut(to_usize(there));
        behind.fill(0);
        if data.is_empty() {
            return Ok(());
        }
        self.base.read_exact_at(data, at)
    }

    /// Runs `each` for the parts of a range that lie in one cluster: place, start and end in the bytes.
    fn parts(
        &self,
        at: u64,
        length: usize,
        mut each: impl FnMut(u64, usize, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut start = 0;
        while start < length {
            let place = at + to_u64(start);
            let left = self.size.bytes() - self.size.offset_in(place);
            let end = length.min(start + to_usize(left));
            each(place, start, end)?;
            start = end;
        }
        Ok(())
    }
}

impl Storage for Scratch {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written().length)
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let written = self.written();
        let end = at.checked_add(to_u64(bytes.len()));
        if end.is_none_or(|end| end > written.length) {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        self.parts(at, bytes.len(), |place, start, end| {
            self.read_part(&written, &mut bytes[start..end], place)
        })
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut written = self.written();
        self.parts(at, bytes.len(), |place, start, end| {
            let (cluster, within) = (self.size.start_of(place), self.size.offset_in(place));
            let fresh = to_u64(written.slots.len()) << self.size.bits();
            let slot = match written.slots.get(&cluster) {
                Some(slot) => *slot,
                None => {
                    if end - start < self.size.buffer_len() {
                        let mut whole = vec![0; self.size.buffer_len()];
                        self.read_part(&written, &mut whole, cluster)?;
                        self.file.write_all_at(&whole, fresh)?;
                    }
                    written.slots.insert(cluster, fresh);
                    fresh
                }
            };
            self.file.write_all_at(&bytes[start..end], slot + within)
        })?;
        written.length = written.length.max(at + to_u64(bytes.len()));
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.written().length = length;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Counts the blocks that a change fills which the file does not have yet.
#[derive(Debug)]
pub(crate) struct NewBlocks {
    file: Option<File>,
    length: u64,
    counted: BTreeMap<u64, u64>,
    bytes: u64,
}

impl NewBlocks {
    /// `file` is where to look for holes; without it, everything in `length` is there.
    pub fn new(file: Option<File>, length: u64) -> Self {
        Self {
            file,
            length,
            counted: BTreeMap::new(),
            bytes: 0,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the image is a file of a file system.
    pub fn has_file(&self) -> bool {
        self.file.is_some()
    }

    /// Counts a range that is going to be written.
    pub fn add(&mut self, at: u64, length: u64) -> io::Result<()> {
        let start = at / BLOCK_BYTES * BLOCK_BYTES;
        let end = (at + length).next_multiple_of(BLOCK_BYTES);
        let mut place = start;
        while place < end {
            let behind = match self.counted.range(..=place).next_back() {
                Some((_, counted)) if *counted > place => *counted,
                _ => {
                    let next = self
                        .counted
                        .range(place..)
                        .next()
                        .map_or(end, |(at, _)| *at);
                    let next = next.min(end);
                    self.bytes += self.missing(place, next)?;
                    next
                }
            };
            place = behind;
        }
        self.join(start, end);
        Ok(())
    }

    /// A range that was counted gets blocks that another file has: it needs no room of its own.
    pub fn share(&mut self, at: u64, length: u64) -> io::Result<()> {
        self.bytes = self.bytes.saturating_sub(self.missing(at, at + length)?);
        Ok(())
    }

    /// How many bytes of a range are in no block of the file.
    fn missing(&self, start: u64, end: u64) -> io::Result<u64> {
        let file_end = self.length.next_multiple_of(BLOCK_BYTES);
        let inside = end.min(file_end);
        let behind = end - inside.max(start);
        let Some(file) = &self.file else {
            return Ok(behind);
        };
        let (mut at, mut there) = (start, 0);
        while at < inside {
            let Some(data) = copy::next_data(file, at)? else {
                break;
            };
            let data_end = data.end.next_multiple_of(BLOCK_BYTES).min(inside);
            there += data_end.saturating_sub(data.start.max(at));
            at = data_end.max(data.end);
        }
        Ok(behind + inside.saturating_sub(start).saturating_sub(there))
    }

    fn join(&mut self, start: u64, end: u64) {
        let (mut start, mut end) = (start, end);
        let touching = |range: (&u64, &u64)| (*range.0, *range.1);
        while let Some((at, behind)) = self.counted.range(..=end).next_back().map(touching)
            && behind >= start
        {
            self.counted.remove(&at);
            (start, end) = (start.min(at), end.max(behind));
        }
        self.counted.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_once_and_only_where_the_file_has_none() {
        let file = tempfile::tempfile().expect("temp file");
        file.set_len(64 << 10).expect("grow");
        file.write_all_at(&[1; 8192], 16 << 10).expect("write");
        let mut blocks = NewBlocks::new(Some(file), 64 << 10);
        for (at, length, sum) in [
            (16 << 10, 8192, 0),
            (512, 512, 4096),
            (1024, 512, 4096),
            (60 << 10, 8192, 12_288),
            (8192, 16 << 10, 20_480),
            (0, 72 << 10, (72 << 10) - 8192),
        ] {
            blocks.add(at, length).expect("count");
            assert_eq!(blocks.bytes(), sum, "{at} {length}");
        }
        assert_eq!(blocks.counted.len(), 1);
        // Blocks that are there were not counted, so nothing is taken off for them.
        blocks.share(0, 32 << 10).expect("count");
        assert_eq!(blocks.bytes(), (72 << 10) - 8192 - ((32 << 10) - 8192));
    }

    #[test]
    fn a_scratch_storage_reads_what_was_written_over_its_base_and_leaves_the_base() {
        let file = tempfile::tempfile().expect("temp file");
        file.write_all_at(&[7; 5000], 0).expect("write");
        let base = stead_sys::storage::FileStorage::new(file).expect("a file");
        let base: Arc<dyn Storage> = Arc::new(base);
        let scratch = Scratch::new(Arc::clone(&base), ClusterSize::MIN).expect("scratch");
        scratch.write_all_at(&[1; 1000], 300).expect("write");
        scratch.write_all_at(&[2; 10], 6000).expect("write");
        let mut model = vec![7; 5000];
        model.resize(6010, 0);
        model[300..1300].fill(1);
        model[6000..].fill(2);
        let mut found = vec![0; 6010];
        scratch.read_exact_at(&mut found, 0).expect("read");
        assert!(found == model);
        assert_eq!(base.len().expect("length"), 5000);
    }
}
