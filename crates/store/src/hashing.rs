//! Naming content that is not in the store: whole sources, their chunks, and where they differ.

use std::collections::HashMap;
use std::ops::Range;
use std::thread;

use crate::error::{Error, Result};
use crate::hash::Hash;
use crate::pool::{Ordered, default_threads};
use crate::progress::Progress;
use crate::source::Source;
use crate::tree::{ChunkSize, TreeBuilder, TreeRef};

/// How much is read at once, in bytes.
const BATCH_BYTES: u64 = 1 << 20;

/// The pieces of a source that must be read, in order: aligned to chunks, holes left out.
pub(crate) struct Batches<'a> {
    source: &'a dyn Source,
    chunk_bytes: u64,
    ranges: std::vec::IntoIter<Range<u64>>,
    current: Range<u64>,
}

impl<'a> Batches<'a> {
    /// All of `source`.
    pub(crate) fn all(source: &'a dyn Source, chunk_size: ChunkSize) -> Self {
        let whole = 0..source.len();
        Self::within(source, chunk_size, vec![whole])
    }

    /// What lies in `ranges`, which start at chunks, end at chunks or at the end, and ascend.
    pub(crate) fn within(
        source: &'a dyn Source,
        chunk_size: ChunkSize,
        ranges: Vec<Range<u64>>,
    ) -> Self {
        Self {
            source,
            chunk_bytes: chunk_size.bytes(),
            ranges: ranges.into_iter(),
            current: 0..0,
        }
    }

    fn step(&mut self) -> Result<Option<Range<u64>>> {
        loop {
            if self.current.is_empty() {
                match self.ranges.next() {
                    Some(range) => self.current = range,
                    None => return Ok(None),
                }
                continue;
            }
            let at = self.current.start;
            let data = self.source.next_data(at).map_err(|source| Error::Source {
                range: self.current.clone(),
                source,
            })?;
            let Some(data) = data else { return Ok(None) };
            let start = data.start.max(at) / self.chunk_bytes * self.chunk_bytes;
            if start >= self.current.end {
                self.current.start = self.current.end;
                continue;
            }
            let end = data.end.next_multiple_of(self.chunk_bytes);
            let end = end.min(start + BATCH_BYTES).min(self.current.end);
            assert!(end > start, "a source's data ranges are not empty");
            self.current.start = end;
            return Ok(Some(start..end));
        }
    }
}

impl Iterator for Batches<'_> {
    type Item = Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

/// A batch to be read and hashed, with a buffer to do it in.
pub(crate) struct HashJob {
    pub(crate) range: Range<u64>,
    pub(crate) buffer: Vec<u8>,
}

/// A batch that was read and hashed.
pub(crate) struct HashedBatch {
    pub(crate) range: Range<u64>,
    pub(crate) bytes: Vec<u8>,
    /// The names of its chunks, in order.
    pub(crate) hashes: Vec<Hash>,
}

impl HashedBatch {
    /// Index, name and bytes of each chunk.
    pub(crate) fn chunks(&self, chunk_size: ChunkSize) -> impl Iterator<Item = (u64, Hash, &[u8])> {
        let first = self.range.start / chunk_size.bytes();
        let pieces = self.bytes.chunks(chunk_size.bytes() as usize);
        let named = self.hashes.iter().zip(pieces);
        named
            .zip(first..)
            .map(|((hash, bytes), index)| (index, *hash, bytes))
    }
}

/// Reads and hashes one batch.
pub(crate) fn hash_batch(
    source: &dyn Source,
    chunk_size: ChunkSize,
    job: HashJob,
) -> Result<HashedBatch> {
    let HashJob { range, mut buffer } = job;
    buffer.resize((range.end - range.start) as usize, 0);
    source
        .read_at(range.start, &mut buffer)
        .map_err(|source| Error::Source {
            range: range.clone(),
            source,
        })?;
    let pieces = buffer.chunks(chunk_size.bytes() as usize);
    let hashes = pieces.map(Hash::of_chunk).collect();
    Ok(HashedBatch {
        range,
        bytes: buffer,
        hashes,
    })
}

/// Hashes all batches on several threads and hands them out in order, a few in memory at a time.
pub(crate) fn for_each_batch(
    source: &dyn Source,
    chunk_size: ChunkSize,
    batches: Batches<'_>,
    threads: usize,
    mut each: impl FnMut(&HashedBatch) -> Result<()>,
) -> Result<()> {
    thread::scope(|scope| {
        let work = move |job| hash_batch(source, chunk_size, job);
        let mut pool = Ordered::new(scope, threads, work);
        let mut spare = Vec::new();
        let mut batches = batches.fuse();
        loop {
            while pool.in_flight() < 2 * threads.max(1) {
                let Some(range) = batches.next() else { break };
                let buffer = spare.pop().unwrap_or_default();
                pool.submit(HashJob {
                    range: range?,
                    buffer,
                });
            }
            if pool.in_flight() == 0 {
                return Ok(());
            }
            let batch = pool.take()?;
            each(&batch)?;
            spare.push(batch.bytes);
        }
    })
}

/// The tree that names the content of `source`: several threads of BLAKE3, no compression.
///
/// `threads` 0 means one a processor.
///
/// # Errors
/// [`Error::Source`] when it cannot be read, [`Error::Cancelled`] when `progress` says so.
pub fn hash_source(
    source: &dyn Source,
    chunk_size: ChunkSize,
    threads: usize,
    progress: &Progress,
) -> Result<TreeRef> {
    name_chunks(source, chunk_size, threads, progress, |_, _| {})
}

fn name_chunks(
    source: &dyn Source,
    chunk_size: ChunkSize,
    threads: usize,
    progress: &Progress,
    mut each: impl FnMut(u64, Hash),
) -> Result<TreeRef> {
    check_length(source)?;
    progress.start(source.len());
    let threads = if threads == 0 {
        default_threads()
    } else {
        threads
    };
    let mut builder = TreeBuilder::new(source.len(), chunk_size);
    let batches = Batches::all(source, chunk_size);
    for_each_batch(source, chunk_size, batches, threads, |batch| {
        let first = batch.range.start / chunk_size.bytes();
        for (index, hash) in (first..).zip(&batch.hashes) {
            builder.push(index, *hash);
            each(index, *hash);
        }
        drop(builder.take_finished());
        progress.reach(batch.range.end)
    })?;
    progress.reach(source.len())?;
    Ok(builder.finish().0)
}

pub(crate) fn check_length(source: &dyn Source) -> Result<()> {
    TreeRef {
        root: Hash::ZERO,
        length_bytes: source.len(),
        chunk_size: ChunkSize::DISK,
    }
    .check()
}

/// Where the chunks of a local file are, so that a fetch can take them from there.
///
/// What it says is never trusted: a chunk read through it is hashed before it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalIndex {
    pub(crate) chunk_size: ChunkSize,
    pub(crate) length_bytes: u64,
    pub(crate) offsets: HashMap<Hash, u64>,
}

impl LocalIndex {
    /// How many different chunks it knows; zero chunks are none.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.offsets.len() as u64
    }

    /// Reads and hashes `source`; gives its tree too. `threads` 0 means one a processor.
    ///
    /// # Errors
    /// As [`hash_source`].
    pub fn hash(
        source: &dyn Source,
        chunk_size: ChunkSize,
        threads: usize,
        progress: &Progress,
    ) -> Result<(TreeRef, Self)> {
        let mut offsets = HashMap::new();
        let tree = name_chunks(source, chunk_size, threads, progress, |index, hash| {
            if !hash.is_zero() {
                offsets.entry(hash).or_insert(index * chunk_size.bytes());
            }
        })?;
        let index = Self {
            chunk_size,
            length_bytes: tree.length_bytes,
            offsets,
        };
        Ok((tree, index))
    }
}
