//! Fetching: from the name of a tree to its exact bytes, from the store or from local files.
//!
//! A tree is fetched in windows of chunks. Chunks that a local file has are read from there; the
//! others are grouped by pack and frame, so that each frame is read and decompressed once a window.
//! What a pack does not give is looked for in the next one that has it ([`crate::homes`]). Wherever a
//! chunk comes from, it is hashed before it is used.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use bytes::Bytes;
use stead_sys::copy::is_zero;
use tracing::warn;

use crate::core::{Core, MOVED_TRIES, checked_chunk, pack_path};
use crate::error::{Error, Result};
use crate::hash::Hash;
use crate::hashing::{Batches, HashedBatch, LocalIndex, for_each_batch};
use crate::homes::{Loss, Tried};
use crate::index::{KnownPack, Location};
use crate::manifest::ManifestId;
use crate::pack::decode_frame;
use crate::pool::Ordered;
use crate::progress::Progress;
use crate::publish::{RangeCursor, merge};
use crate::source::Source;
use crate::store::BLOB_BYTES_MAX;
use crate::tree::{Leaves, TreeRef, describe_range};

/// Chunks dealt with at a time.
const WINDOW_CHUNKS: usize = 65536;
/// Chunks of a local file that one job reads.
const LOCAL_JOB_CHUNKS: usize = 64;
/// Neighbouring frames are read together up to this many stored bytes.
const READ_BYTES: u64 = 4 << 20;
/// Zero pages of this size are left as holes in what is fetched.
const PAGE_BYTES: usize = 4096;

/// A local file that may have some of the chunks.
#[derive(Clone)]
pub struct LocalSource {
    /// What is where in it.
    pub index: Arc<LocalIndex>,
    /// The file.
    pub source: Arc<dyn Source>,
}

impl fmt::Debug for LocalSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalSource")
            .field("length_bytes", &self.source.len())
            .field("chunks", &self.index.offsets.len())
            .finish_non_exhaustive()
    }
}

/// Where fetched bytes came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FetchReport {
    /// Bytes of chunks from the store, uncompressed.
    pub from_store_bytes: u64,
    /// Bytes of chunks from local files.
    pub from_local_bytes: u64,
    /// Bytes read from packs (compressed, whole frames).
    pub read_stored_bytes: u64,
    /// Bytes of chunks that a local file should have had and had not; they came from the store.
    pub local_mismatch_bytes: u64,
}

/// Where chunks go: offset and bytes. Called from several threads.
type Sink<'a> = dyn Fn(u64, &[u8]) -> Result<()> + Sync + 'a;

/// The chunks of one name within a window.
#[derive(Debug)]
struct Wanted {
    hash: Hash,
    indexes: Vec<u64>,
}

/// A chunk to be taken from a frame.
#[derive(Debug)]
struct Piece {
    location: Location,
    wanted: Wanted,
}

/// Neighbouring frames of a pack and what is wanted of them.
#[derive(Debug)]
struct Read {
    pack: Arc<KnownPack>,
    frames: Vec<(u32, Vec<Piece>)>,
}

impl Read {
    fn range(&self) -> Range<u64> {
        let bounds = |frame: &(u32, Vec<Piece>)| {
            let known = &self.pack.frames[frame.0 as usize];
            known.offset..known.offset + u64::from(known.entry.stored_bytes.get())
        };
        match (self.frames.first(), self.frames.last()) {
            (Some(first), Some(last)) => bounds(first).start..bounds(last).end,
            _ => 0..0,
        }
    }
}

/// What reading frames gave.
#[derive(Debug, Default)]
struct Outcome {
    delivered_bytes: u64,
    stored_bytes: u64,
    /// What must be read elsewhere.
    lost: Vec<(Wanted, Loss)>,
}

impl Outcome {
    fn add(&mut self, other: Self) {
        self.delivered_bytes += other.delivered_bytes;
        self.stored_bytes += other.stored_bytes;
        self.lost.extend(other.lost);
    }
}

/// What is wanted of each frame, by pack and number.
type Frames = BTreeMap<(Hash, u32), (Arc<KnownPack>, Vec<Piece>)>;

/// Where each chunk was looked for in vain.
type Searched = HashMap<Hash, Tried>;

/// One tree being read.
struct TreeReader<'a> {
    core: &'a Core,
    tree: TreeRef,
    local: &'a [LocalSource],
    progress: &'a Progress,
    sink: &'a Sink<'a>,
    report: FetchReport,
}

/// A chunk in a local file.
struct LocalChunk<'a> {
    source: &'a LocalSource,
    offset: u64,
    wanted: Wanted,
}

impl TreeReader<'_> {
    /// Reads the chunks that `leaves` of the tree name.
    fn run(mut self, leaves: impl Iterator<Item = Result<(u64, Hash)>>) -> Result<FetchReport> {
        self.progress.start(self.tree.length_bytes);
        let mut leaves = leaves.fuse();
        loop {
            let window: Vec<_> = leaves.by_ref().take(WINDOW_CHUNKS).collect::<Result<_>>()?;
            if window.is_empty() {
                break;
            }
            let wanted = self.read_local(by_name(window))?;
            self.read_store(wanted)?;
        }
        self.progress.reach(self.tree.length_bytes)?;
        Ok(self.report)
    }

    /// Takes what local files have; gives back the rest.
    fn read_local(&mut self, wanted: Vec<Wanted>) -> Result<Vec<Wanted>> {
        let mut rest = Vec::new();
        let mut here = Vec::new();
        for wanted in wanted {
            match self.find_local(&wanted) {
                Some((source, offset)) => here.push(LocalChunk {
                    source,
                    offset,
                    wanted,
                }),
                None => rest.push(wanted),
            }
        }
        here.sort_by_key(|chunk| chunk.offset);
        let threads = self.core.tuning().threads;
        let this = &*self;
        let mut mismatched = Vec::new();
        let mut copied = 0;
        thread::scope(|scope| {
            let work = move |job: Vec<LocalChunk<'_>>| this.copy_local(job);
            let mut pool = Ordered::new(scope, threads, work);
            let mut here = here.into_iter();
            loop {
                while pool.in_flight() < 2 * threads.max(1) {
                    let job: Vec<_> = here.by_ref().take(LOCAL_JOB_CHUNKS).collect();
                    if job.is_empty() {
                        break;
                    }
                    pool.submit(job);
                }
                if pool.in_flight() == 0 {
                    return Ok::<_, Error>(());
                }
                let (bytes, missed) = pool.take()?;
                copied += bytes;
                mismatched.extend(missed);
            }
        })?;
        self.report.from_local_bytes += copied;
        for wanted in mismatched {
            self.report.local_mismatch_bytes += self.bytes_of(&wanted);
            rest.push(wanted);
        }
        Ok(rest)
    }

    fn find_local(&self, wanted: &Wanted) -> Option<(&LocalSource, u64)> {
        let bytes = self.chunk_bytes(wanted);
        self.local.iter().find_map(|local| {
            let fits = local.index.chunk_size == self.tree.chunk_size;
            let offset = *local.index.offsets.get(&wanted.hash).filter(|_| fits)?;
            let end = offset.checked_add(bytes)?;
            (end <= local.source.len()).then_some((local, offset))
        })
    }

    /// Copies chunks whose bytes are what their names say; gives back the others.
    fn copy_local(&self, job: Vec<LocalChunk<'_>>) -> Result<(u64, Vec<Wanted>)> {
        let mut missed = Vec::new();
        let mut copied = 0;
        let mut buffer = Vec::new();
        for LocalChunk {
            source,
            offset,
            wanted,
        } in job
        {
            buffer.resize(self.chunk_bytes(&wanted) as usize, 0);
            if let Err(error) = source.source.read_at(offset, &mut buffer) {
                warn!(%error, offset, "cannot read a local source; the store is used");
                missed.push(wanted);
            } else if Hash::of(&buffer) == wanted.hash {
                copied += self.deliver(&wanted, &buffer)?;
            } else {
                missed.push(wanted);
            }
        }
        Ok((copied, missed))
    }

    /// The length that the chunk must have. Chunks of one name have one length, so the first counts;
    /// [`TreeReader::deliver`] checks each.
    fn chunk_bytes(&self, wanted: &Wanted) -> u64 {
        self.tree.chunk_bytes(wanted.indexes[0])
    }

    fn bytes_of(&self, wanted: &Wanted) -> u64 {
        self.chunk_bytes(wanted) * wanted.indexes.len() as u64
    }

    /// Hands a proven chunk to everyone who wants it; gives the bytes delivered.
    fn deliver(&self, wanted: &Wanted, bytes: &[u8]) -> Result<u64> {
        for index in &wanted.indexes {
            if bytes.len() as u64 != self.tree.chunk_bytes(*index) {
                let found = format!(
                    "a chunk of {} bytes where {} are needed",
                    bytes.len(),
                    self.tree.chunk_bytes(*index)
                );
                let object = format!("chunk {}", wanted.hash);
                let range = || describe_range(&self.tree, *index, 1);
                return Err(Error::damaged(object, found).needed_by(range));
            }
            (self.sink)(index * self.tree.chunk_size.bytes(), bytes)?;
            self.progress.advance(bytes.len() as u64)?;
        }
        Ok((bytes.len() * wanted.indexes.len()) as u64)
    }

    /// Reads chunks from the store; what one pack does not give is looked for in the next that has it.
    fn read_store(&mut self, mut wanted: Vec<Wanted>) -> Result<()> {
        let mut searched = Searched::new();
        for _ in 0..MOVED_TRIES {
            while !wanted.is_empty() {
                let (found, nowhere) = self.plan(wanted, &searched)?;
                if found.is_empty() {
                    wanted = nowhere;
                    break;
                }
                wanted = self.read_all(found, &mut searched)?;
                wanted.extend(nowhere);
            }
            if wanted.is_empty() {
                return Ok(());
            }
            self.look_again(&wanted, &searched)?;
        }
        Err(self.core.keeps_moving("packs"))
    }

    /// Reads the index again for chunks that no pack gave; fails if it names no other pack for one of them.
    fn look_again(&self, wanted: &[Wanted], searched: &Searched) -> Result<()> {
        self.core.reload_index()?;
        for wanted in wanted {
            let Some(tried) = searched.get(&wanted.hash) else {
                continue;
            };
            if self.core.find(&wanted.hash, tried).is_none()
                && let Some(error) = tried.error()
            {
                return Err(error.needed_by(|| self.needs(wanted)));
            }
        }
        Ok(())
    }

    /// The first range of the tree that needs a chunk, for errors.
    fn needs(&self, wanted: &Wanted) -> String {
        describe_range(&self.tree, wanted.indexes[0], 1)
    }

    /// Where everything is, in the order of packs and frames, and what is nowhere but where it was looked
    /// for already.
    fn plan(&self, wanted: Vec<Wanted>, searched: &Searched) -> Result<(Vec<Read>, Vec<Wanted>)> {
        let mut frames = Frames::new();
        let mut nowhere = Vec::new();
        for wanted in wanted {
            let found = match searched.get(&wanted.hash) {
                Some(tried) => self.core.find(&wanted.hash, tried),
                None => {
                    let found = self.core.locate("chunk", &wanted.hash);
                    Some(found.map_err(|error| error.needed_by(|| self.needs(&wanted)))?)
                }
            };
            let Some((pack, location)) = found else {
                nowhere.push(wanted);
                continue;
            };
            let key = (pack.name, location.frame);
            let (_, pieces) = frames.entry(key).or_insert_with(|| (pack, Vec::new()));
            pieces.push(Piece { location, wanted });
        }
        Ok((neighbours(frames), nowhere))
    }

    /// Does all reads; gives back what these packs did not give.
    fn read_all(&mut self, reads: Vec<Read>, searched: &mut Searched) -> Result<Vec<Wanted>> {
        let mut all = Outcome::default();
        let threads = self.core.tuning().parallel_reads;
        let this = &*self;
        thread::scope(|scope| {
            let mut pool = Ordered::new(scope, threads, move |read| this.read(read));
            let mut reads = reads.into_iter();
            loop {
                while pool.in_flight() < threads.max(1) {
                    let Some(read) = reads.next() else { break };
                    pool.submit(read);
                }
                if pool.in_flight() == 0 {
                    return Ok::<_, Error>(());
                }
                all.add(pool.take()?);
            }
        })?;
        self.report.from_store_bytes += all.delivered_bytes;
        self.report.read_stored_bytes += all.stored_bytes;
        let note = |(wanted, loss): (Wanted, Loss)| {
            self.core.suspect(&loss);
            searched.entry(wanted.hash).or_default().add(loss);
            wanted
        };
        Ok(all.lost.into_iter().map(note).collect())
    }

    /// Reads neighbouring frames at once, or each for itself where that fails: a pack that is cut still has
    /// its first frames.
    fn read(&self, read: Read) -> Result<Outcome> {
        let (pack, range) = (&read.pack, read.range());
        let stored = self
            .core
            .io
            .get_range(&pack_path(&pack.name), range.clone());
        let mut outcome = Outcome::default();
        let stored = match stored {
            Ok(stored) => Some(stored),
            Err(error) => error.into_loss().map(|_found| None)?,
        };
        for (frame, pieces) in read.frames {
            let raw = match &stored {
                Some(stored) => open_frame(pack, frame, stored, range.start),
                None => self.core.read_frame(pack, frame),
            };
            outcome.add(self.take(pack, frame, pieces, raw)?);
        }
        outcome.stored_bytes = stored.map_or(0, |stored| stored.len() as u64);
        Ok(outcome)
    }

    /// Hands on what is wanted of a frame.
    fn take(
        &self,
        pack: &KnownPack,
        frame: u32,
        pieces: Vec<Piece>,
        raw: Result<Bytes>,
    ) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let raw = match raw {
            Ok(raw) => raw,
            Err(error) => {
                let loss = Loss::of(pack, frame, error)?;
                let lose = |piece: Piece| (piece.wanted, loss.clone());
                outcome.lost = pieces.into_iter().map(lose).collect();
                return Ok(outcome);
            }
        };
        for Piece { location, wanted } in pieces {
            match checked_chunk(pack, location, &raw, &wanted.hash) {
                Ok(chunk) => outcome.delivered_bytes += self.deliver(&wanted, &chunk)?,
                Err(error) => outcome.lost.push((wanted, Loss::of(pack, frame, error)?)),
            }
        }
        Ok(outcome)
    }
}

/// Frames that follow each other in a pack, put together as long as a read stays small.
fn neighbours(frames: Frames) -> Vec<Read> {
    let mut reads: Vec<Read> = Vec::new();
    for ((_, frame), (pack, pieces)) in frames {
        match reads.last_mut() {
            Some(read) if joins(read, &pack, frame) => read.frames.push((frame, pieces)),
            Some(_) | None => reads.push(Read {
                pack,
                frames: vec![(frame, pieces)],
            }),
        }
    }
    reads
}

/// A frame out of the stored bytes of several, which start at `start` in the pack.
fn open_frame(pack: &KnownPack, frame: u32, stored: &Bytes, start: u64) -> Result<Bytes> {
    let known = &pack.frames[frame as usize];
    let at = (known.offset - start) as usize;
    let own = stored.slice(at..at + known.entry.stored_bytes.get() as usize);
    decode_frame(&known.entry, own)
        .map_err(|found| Error::damaged(pack_path(&pack.name), format!("{found} (frame {frame})")))
}

/// Whether `frame` follows what is already to be read, and the read stays small.
fn joins(read: &Read, pack: &KnownPack, frame: u32) -> bool {
    let range = read.range();
    let follows = read
        .frames
        .last()
        .is_some_and(|(last, _)| last + 1 == frame);
    follows && read.pack.name == pack.name && range.end - range.start < READ_BYTES
}

fn by_name(window: Vec<(u64, Hash)>) -> Vec<Wanted> {
    let mut numbers: HashMap<Hash, usize> = HashMap::with_capacity(window.len());
    let mut wanted: Vec<Wanted> = Vec::new();
    for (index, hash) in window {
        let number = *numbers.entry(hash).or_insert(wanted.len());
        match wanted.get_mut(number) {
            Some(same) => same.indexes.push(index),
            None => wanted.push(Wanted {
                hash,
                indexes: vec![index],
            }),
        }
    }
    wanted
}

/// Writes the pages of a chunk that are not zero.
fn write_sparse(dest: &File, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        let page = |at: usize| &bytes[at..bytes.len().min(at + PAGE_BYTES)];
        let start = at;
        while at < bytes.len() && !is_zero(page(at)) {
            at += page(at).len();
        }
        if at > start {
            let target = offset + start as u64;
            dest.write_all_at(&bytes[start..at], target)
                .map_err(|source| Error::Destination {
                    range: target..offset + at as u64,
                    source,
                })?;
        } else {
            at += page(at).len();
        }
    }
    Ok(())
}

impl Core {
    fn read_tree(
        &self,
        tree: &TreeRef,
        local: &[LocalSource],
        progress: &Progress,
        sink: &Sink<'_>,
    ) -> Result<FetchReport> {
        tree.check()?;
        let reader = TreeReader {
            core: self,
            tree: *tree,
            local,
            progress,
            sink,
            report: FetchReport::default(),
        };
        reader.run(Leaves::new(self, *tree))
    }

    pub(crate) fn fetch_tree(
        &self,
        tree: &TreeRef,
        dest: &File,
        local: &[LocalSource],
        progress: &Progress,
    ) -> Result<FetchReport> {
        tree.check()?;
        let length = tree.length_bytes;
        dest.set_len(0)
            .and_then(|()| dest.set_len(length))
            .map_err(|source| Error::Destination {
                range: 0..length,
                source,
            })?;
        let sink = |offset, bytes: &[u8]| write_sparse(dest, offset, bytes);
        self.read_tree(tree, local, progress, &sink)
    }

    pub(crate) fn fetch_blob(&self, tree: &TreeRef) -> Result<Vec<u8>> {
        if tree.length_bytes > BLOB_BYTES_MAX {
            return Err(Error::Invalid {
                attempted: format!("fetch {tree} as a blob"),
                reason: format!("a blob has at most {BLOB_BYTES_MAX} bytes"),
            });
        }
        let blob = Mutex::new(vec![0; tree.length_bytes as usize]);
        let sink = |offset: u64, bytes: &[u8]| {
            let mut blob = blob.lock().unwrap_or_else(PoisonError::into_inner);
            blob[offset as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        self.read_tree(tree, &[], &Progress::silent(), &sink)?;
        Ok(blob.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn verify_manifest(&self, id: ManifestId, progress: &Progress) -> Result<()> {
        let (_, id, object) = self.resolve(&id.to_string())?;
        let manifest = self.read_manifest(&object, id)?;
        for (what, tree) in manifest.trees() {
            self.read_tree(&tree, &[], progress, &|_, _| Ok(()))
                .map_err(|error| error.needed_by(|| format!("{what} of {object}")))?;
        }
        Ok(())
    }

    /// The first of `ranges`, which are whole chunks in ascending order, in which what the store has of `tree` is not
    /// what `source` has.
    pub(crate) fn compare(
        &self,
        tree: &TreeRef,
        source: &dyn Source,
        ranges: &[Range<u64>],
        progress: &Progress,
    ) -> Result<Option<Range<u64>>> {
        tree.check()?;
        assert!(
            tree.length_bytes == source.len(),
            "a tree is as long as the source that it was made of"
        );
        let (chunk, first) = (tree.chunk_size.bytes(), Mutex::new(None));
        let differs = |at: u64, bytes: u64| {
            let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
            let found = first.take_if(|known: &mut Range<u64>| known.start < at);
            *first = found.or(Some(at..at + bytes));
        };
        let sink = |at: u64, bytes: &[u8]| {
            let mut own = vec![0; bytes.len()];
            read_source(source, at, &mut own)?;
            if own != bytes {
                differs(at, bytes.len() as u64);
            }
            Ok(())
        };
        let reader = TreeReader {
            core: self,
            tree: *tree,
            local: &[],
            progress,
            sink: &sink,
            report: FetchReport::default(),
        };
        let mut wanted = RangeCursor::new(ranges);
        let mut named = HashSet::new();
        let within = |leaf: &Result<(u64, Hash)>| match leaf {
            Ok((index, _)) => wanted.contains(index * chunk),
            Err(_) => true,
        };
        let note = |leaf: &Result<(u64, Hash)>| {
            if let Ok((index, _)) = leaf {
                named.insert(*index);
            }
        };
        reader.run(Leaves::new(self, *tree).filter(within).inspect(note))?;
        // What the tree does not name is zeros.
        let data = data_within(source, ranges)?;
        let data = merge(data, tree.length_bytes, tree.chunk_size);
        for index in chunks_in(&data, chunk).filter(|index| !named.contains(index)) {
            let mut own = vec![0; tree.chunk_bytes(index) as usize];
            read_source(source, index * chunk, &mut own)?;
            if !is_zero(&own) {
                differs(index * chunk, own.len() as u64);
            }
        }
        Ok(first.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn local_index(&self, tree: &TreeRef) -> Result<LocalIndex> {
        let mut offsets = HashMap::new();
        for leaf in Leaves::new(self, *tree) {
            let (index, hash) = leaf?;
            offsets
                .entry(hash)
                .or_insert(index * tree.chunk_size.bytes());
        }
        Ok(LocalIndex {
            chunk_size: tree.chunk_size,
            length_bytes: tree.length_bytes,
            offsets,
        })
    }

    pub(crate) fn locate_damage(
        &self,
        tree: &TreeRef,
        source: &dyn Source,
        progress: &Progress,
    ) -> Result<Vec<Range<u64>>> {
        tree.check()?;
        progress.start(source.len());
        let mut compare = Compare {
            tree: *tree,
            leaves: Leaves::new(self, *tree),
            next: None,
            differing: Vec::new(),
        };
        let batches = Batches::all(source, tree.chunk_size);
        let threads = self.tuning().threads;
        for_each_batch(source, tree.chunk_size, batches, threads, |batch| {
            compare.batch(batch)?;
            progress.reach(batch.range.end)
        })?;
        compare.expect_until(u64::MAX)?;
        let (own, other) = (tree.length_bytes, source.len());
        if own != other {
            compare.add(own.min(other)..own.max(other));
        }
        Ok(compare.differing)
    }
}

fn read_source(source: &dyn Source, at: u64, buffer: &mut [u8]) -> Result<()> {
    let range = at..at + buffer.len() as u64;
    let read = source.read_at(at, buffer);
    read.map_err(|source| Error::Source { range, source })
}

/// Where in `ranges` the source may have other than zeros.
fn data_within(source: &dyn Source, ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>> {
    let mut data = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let found = source.next_data(at).map_err(|source| {
                let range = range.clone();
                Error::Source { range, source }
            })?;
            let Some(found) = found.filter(|found| found.start < range.end) else {
                break;
            };
            at = found.end;
            data.push(found.start..found.end.min(range.end));
        }
    }
    Ok(data)
}

/// The numbers of the chunks in ranges that begin at chunks.
fn chunks_in(ranges: &[Range<u64>], chunk: u64) -> impl Iterator<Item = u64> + '_ {
    let numbers = move |range: &Range<u64>| range.start / chunk..range.end.div_ceil(chunk);
    ranges.iter().flat_map(numbers)
}

/// A tree and the chunks of a file, compared in order.
struct Compare<'a> {
    tree: TreeRef,
    leaves: Leaves<'a, Core>,
    next: Option<(u64, Hash)>,
    differing: Vec<Range<u64>>,
}

impl Compare<'_> {
    fn peek(&mut self) -> Result<Option<(u64, Hash)>> {
        if self.next.is_none() {
            self.next = self.leaves.next().transpose()?;
        }
        Ok(self.next)
    }

    /// Chunks of the tree before chunk `limit` that the file has as holes.
    fn expect_until(&mut self, limit: u64) -> Result<()> {
        while let Some((index, _)) = self.peek()?.filter(|(index, _)| *index < limit) {
            self.next = None;
            self.add_chunk(index);
        }
        Ok(())
    }

    fn batch(&mut self, batch: &HashedBatch) -> Result<()> {
        for (index, hash, _) in batch.chunks(self.tree.chunk_size) {
            if index >= self.tree.chunk_count() {
                break;
            }
            self.expect_until(index)?;
            let expected = match self.peek()? {
                Some((at, expected)) if at == index => {
                    self.next = None;
                    expected
                }
                Some(_) | None => Hash::ZERO,
            };
            if hash != expected {
                self.add_chunk(index);
            }
        }
        Ok(())
    }

    fn add_chunk(&mut self, index: u64) {
        let start = index * self.tree.chunk_size.bytes();
        self.add(start..start + self.tree.chunk_bytes(index));
    }

    fn add(&mut self, range: Range<u64>) {
        match self.differing.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            Some(_) | None => self.differing.push(range),
        }
    }
}
