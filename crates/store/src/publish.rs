//! Publishing: from content to a manifest that makes it a checkpoint.
//!
//! ```text
//!  begin:  lease ─▶ condemned packs ─▶ index ─▶ list of packs ─▶ the packs to rely on
//!  add:    read ─▶ hash ─▶ known? ─▶ frame ─▶ compress ─▶ pack ─▶ upload      (as often as wanted)
//!  commit: last packs ─▶ index object ─▶ lease still there? ─▶ manifest ─▶ lease removed
//! ```
//! The order of `begin` and of `commit` is what garbage collection relies on; see [`crate::gc`].

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::backend::Created;
use crate::core::{Access, CONDEMNED, Core, LEASES, Tuning, index_path, list_packs, pack_path};
use crate::error::{Error, Result};
use crate::hash::Hash;
use crate::hashing::{Batches, HashJob, HashedBatch, check_length, hash_batch};
use crate::index::{self, IndexedPack, KnownPack};
use crate::lease::{CONDEMNED_BYTES_MAX, Condemned, Lease, LeaseOwner, from_json, to_json};
use crate::manifest::{Manifest, ManifestId};
use crate::pack::{OpenFrame, PackBuilder, PackKind, StoredFrame, compressor};
use crate::pool::Ordered;
use crate::progress::Progress;
use crate::source::Source;
use crate::store::{
    BLOB_BYTES_MAX, CancelOnDrop, MANIFEST_BYTES_MAX, Store, manifest_id, manifest_path,
};
use crate::tree::{BlobRef, ChunkSize, Leaves, NewNode, TreeBuilder, TreeRef};

/// An earlier tree of the same device, and what has changed since.
#[derive(Debug, Clone)]
pub struct Base {
    /// The earlier content; its nodes must be in the store.
    pub tree: TreeRef,
    /// Every byte that may differ lies in one of these ranges; any order.
    pub changed: Vec<Range<u64>>,
}

/// What a publish stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PublishReport {
    /// Bytes read from sources (holes are not read).
    pub read_bytes: u64,
    /// Bytes of the chunks that were new, uncompressed.
    pub new_raw_bytes: u64,
    /// Bytes written to the store: packs, index objects and the manifest.
    pub stored_bytes: u64,
    /// Chunks that were stored.
    pub chunks_new: u64,
    /// Chunks that the store had already, zero chunks not counted.
    pub chunks_reused: u64,
    /// Objects written, the manifest included and the lease not.
    pub objects: u64,
    /// Whether the lease was removed. If not, gc waits for it: remove it with `break_lease`.
    pub lease_removed: bool,
}

/// A publish that has begun. Dropped without a commit it leaves no checkpoint; what it has stored is
/// deleted by the next gc.
#[derive(Debug)]
pub struct Publish {
    store: Store,
    lease: Arc<HeldLease>,
    /// Taken while an operation runs; gone for good if one fails.
    state: Option<State>,
}

/// The lease, held by the publish and by whatever operation of it still runs: an operation whose
/// caller has gone away must not lose the lease under its feet.
#[derive(Debug)]
struct HeldLease {
    id: String,
    store: Arc<dyn ObjectStore>,
    runtime: Handle,
    removed: AtomicBool,
}

impl HeldLease {
    fn object(&self) -> String {
        format!("{LEASES}/{}", self.id)
    }

    fn is_removed(&self) {
        self.removed.store(true, Ordering::Relaxed);
    }
}

impl Drop for HeldLease {
    /// Removes the lease in the background. That is safe while an upload is still in flight: nothing
    /// will ever name what it stores. Where the runtime is gone the lease stays, for
    /// [`Store::remove_leases_of`].
    fn drop(&mut self) {
        if self.removed.load(Ordering::Relaxed) {
            return;
        }
        let (store, object) = (Arc::clone(&self.store), self.object());
        drop(self.runtime.spawn(async move {
            let path = object_store::path::Path::from(object.as_str());
            if let Err(error) = store.delete(&path).await {
                warn!(%error, object, "cannot remove the lease of a dropped publish");
            }
        }));
    }
}

#[derive(Debug)]
struct State {
    /// The packs whose chunks this publish may name without storing them.
    usable: HashSet<Hash>,
    /// Chunks and nodes that this publish stores.
    fresh: HashSet<Hash>,
    trees: HashSet<TreeRef>,
    data: Writer,
    nodes: Writer,
    outbox: Outbox,
    report: PublishReport,
}

/// Chunks of a kind on their way into packs.
#[derive(Debug)]
pub(crate) struct Writer {
    kind: PackKind,
    publish: [u8; 16],
    frame: OpenFrame,
    pack: PackBuilder,
}

/// Packs on their way into the store, and what they hold.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    uploads: VecDeque<JoinHandle<Result<()>>>,
    packs: Vec<IndexedPack>,
    index: WrittenIndex,
}

/// What of the outbox has index objects.
#[derive(Debug, Default)]
struct WrittenIndex {
    packs: usize,
    bytes: u64,
    objects: u64,
}

impl Writer {
    pub(crate) fn new(kind: PackKind, publish: [u8; 16]) -> Self {
        Self {
            kind,
            publish,
            frame: OpenFrame::default(),
            pack: PackBuilder::new(kind, publish),
        }
    }

    /// Adds a chunk; the frame if that has filled it.
    pub(crate) fn push(&mut self, hash: Hash, bytes: &[u8]) -> Option<OpenFrame> {
        self.frame.push(hash, bytes);
        self.frame
            .is_full()
            .then(|| std::mem::take(&mut self.frame))
    }

    /// Adds a compressed frame and sends the pack off if that has filled it.
    pub(crate) fn store(
        &mut self,
        core: &Core,
        outbox: &mut Outbox,
        frame: StoredFrame,
    ) -> Result<()> {
        self.pack.push(frame);
        if self.pack.is_full(core.tuning().pack_target_bytes) {
            self.send(core, outbox)?;
        }
        Ok(())
    }

    fn send(&mut self, core: &Core, outbox: &mut Outbox) -> Result<()> {
        let empty = PackBuilder::new(self.kind, self.publish);
        outbox.send(core, std::mem::replace(&mut self.pack, empty))
    }

    /// Sends off what is left.
    pub(crate) fn flush(&mut self, core: &Core, outbox: &mut Outbox) -> Result<()> {
        let frame = std::mem::take(&mut self.frame);
        if !frame.is_empty() {
            let mut compressor = new_compressor()?;
            self.store(core, outbox, frame.store(&mut compressor))?;
        }
        if !self.pack.is_empty() {
            self.send(core, outbox)?;
        }
        outbox.wait(core)
    }
}

fn new_compressor() -> Result<zstd::bulk::Compressor<'static>> {
    compressor().map_err(|error| Error::Invalid {
        attempted: "compress".to_owned(),
        reason: error.to_string(),
    })
}

impl Outbox {
    fn send(&mut self, core: &Core, pack: PackBuilder) -> Result<()> {
        while self.uploads.len() >= core.tuning().parallel_writes.max(1) {
            self.wait_oldest(core)?;
        }
        let pack = pack.finish();
        let payload = PutPayload::from_iter(pack.pieces);
        let upload = core.io.put_behind(pack_path(&pack.name), payload);
        self.uploads.push_back(upload);
        self.packs.push(IndexedPack {
            name: pack.name,
            table: pack.table,
        });
        Ok(())
    }

    fn wait_oldest(&mut self, core: &Core) -> Result<()> {
        let Some(upload) = self.uploads.pop_front() else {
            return Ok(());
        };
        let attempted = "write a pack";
        let done = core.io.handle.block_on(upload);
        done.map_err(|source| Error::Worker { attempted, source })?
    }

    fn wait(&mut self, core: &Core) -> Result<()> {
        while !self.uploads.is_empty() {
            self.wait_oldest(core)?;
        }
        Ok(())
    }

    /// Writes the index objects of the packs sent, all of which must be durable; the size and number of all so far.
    pub(crate) fn write_index(&mut self, core: &Core) -> Result<(u64, u64)> {
        assert!(
            self.uploads.is_empty(),
            "packs are durable before an index names them"
        );
        let new = &self.packs[self.index.packs..];
        let (bytes, objects) = core.write_index_objects(&new.iter().collect::<Vec<_>>())?;
        let mut index = core.write_index();
        new.iter().for_each(|pack| index.add(pack));
        self.index = WrittenIndex {
            packs: self.packs.len(),
            bytes: self.index.bytes + bytes,
            objects: self.index.objects + objects.len() as u64,
        };
        Ok((self.index.bytes, self.index.objects))
    }

    /// Bytes of packs and index objects written.
    fn bytes(&self) -> u64 {
        let packs = self.packs.iter().map(|pack| pack.table.pack_bytes());
        packs.sum::<u64>() + self.index.bytes
    }

    pub(crate) fn packs(&self) -> &[IndexedPack] {
        &self.packs
    }
}

impl Core {
    /// Writes index objects for `packs`; their total size and names.
    pub(crate) fn write_index_objects(&self, packs: &[&IndexedPack]) -> Result<(u64, Vec<String>)> {
        let mut names = Vec::new();
        let mut bytes = 0;
        for object in index::encode(packs) {
            bytes += object.len() as u64;
            let name = Hash::of(&object).to_string();
            self.io.put(&index_path(&name), object.into())?;
            names.push(name);
        }
        Ok((bytes, names))
    }

    /// The packs named by any condemned list.
    pub(crate) fn condemned(&self) -> Result<HashSet<Hash>> {
        let mut packs = HashSet::new();
        for object in self.io.list(CONDEMNED)? {
            match self.io.get(&object.path, CONDEMNED_BYTES_MAX) {
                Ok(bytes) => {
                    let list: Condemned =
                        from_json(&bytes).map_err(|found| Error::damaged(&object.path, found))?;
                    packs.extend(list.packs);
                }
                // Its packs are deleted, and the index that is read next does not name them.
                Err(Error::ObjectMissing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(packs)
    }

    /// The packs whose chunks a publish may name without storing them: those that the index names, that are
    /// there in their full length, and that are not condemned. To be called with the lease written.
    fn usable_packs(&self) -> Result<HashSet<Hash>> {
        let condemned = self.condemned()?;
        self.refresh_index()?;
        let there = list_packs(&self.io)?;
        let mut usable = HashSet::new();
        let mut lost = Vec::new();
        for (name, bytes) in self.read_index().pack_sizes() {
            if there.get(&name) != Some(&bytes) {
                lost.push(name);
            } else if !condemned.contains(&name) {
                usable.insert(name);
            }
        }
        for name in lost {
            warn!(%name, "a pack that an index names is missing or cut; its chunks are stored anew");
            self.write_index().suspect(name);
        }
        Ok(usable)
    }
}

impl State {
    fn new(usable: HashSet<Hash>, publish: [u8; 16]) -> Self {
        Self {
            usable,
            fresh: HashSet::new(),
            trees: HashSet::new(),
            data: Writer::new(PackKind::Chunks, publish),
            nodes: Writer::new(PackKind::Nodes, publish),
            outbox: Outbox::default(),
            report: PublishReport::default(),
        }
    }

    /// Makes all that was added durable and readable; the size and number of the index objects so far.
    fn settle(&mut self, core: &Core) -> Result<(u64, u64)> {
        self.data.flush(core, &mut self.outbox)?;
        self.nodes.flush(core, &mut self.outbox)?;
        self.outbox.write_index(core)
    }

    /// Whether a manifest of this publish may name the chunk or node without storing it.
    fn is_known(&self, core: &Core, hash: &Hash) -> bool {
        let is_usable = |pack: &KnownPack| self.usable.contains(&pack.name);
        self.fresh.contains(hash)
            || core
                .read_index()
                .homes(hash)
                .any(|(pack, _)| is_usable(pack))
    }

    fn store_nodes(&mut self, core: &Core, nodes: Vec<NewNode>) -> Result<()> {
        for (hash, bytes) in nodes {
            if self.is_known(core, &hash) {
                continue;
            }
            self.fresh.insert(hash);
            if let Some(frame) = self.nodes.push(hash, &bytes) {
                let frame = frame.store(&mut new_compressor()?);
                self.nodes.store(core, &mut self.outbox, frame)?;
            }
        }
        Ok(())
    }
}

/// What a tree with a base is put together from.
pub(crate) struct Plan {
    /// What must be read: aligned to chunks, ascending, apart from each other.
    pub(crate) read: Vec<Range<u64>>,
    base: Option<TreeRef>,
}

impl Plan {
    /// `is_known` tells of a chunk of the base whether it can be named without being read.
    pub(crate) fn new(
        core: &Core,
        is_known: impl Fn(&Hash) -> bool,
        length: u64,
        size: ChunkSize,
        base: Option<Base>,
    ) -> Result<Self> {
        let whole = std::iter::once(0..length).collect();
        let Some(base) = base else {
            return Ok(Self {
                read: whole,
                base: None,
            });
        };
        if base.tree.chunk_size != size {
            return Err(Error::Invalid {
                attempted: format!("name content on top of {}", base.tree),
                reason: "it is cut into chunks of another size".to_owned(),
            });
        }
        let mut ranges = base.changed;
        // Where the length changes, the last chunk changes, and all behind it is new.
        if base.tree.length_bytes != length {
            ranges.push(base.tree.length_bytes.min(length).saturating_sub(1)..length);
        }
        let changed = merge(ranges, length, size);
        let mut missing = Vec::new();
        let mut cursor = RangeCursor::new(&changed);
        for leaf in Leaves::new(core, base.tree) {
            let (index, hash) = leaf?;
            let start = index * size.bytes();
            if start < length && !cursor.contains(start) && !is_known(&hash) {
                missing.push(start..start + size.bytes());
            }
        }
        missing.extend(changed);
        Ok(Self {
            read: merge(missing, length, size),
            base: Some(base.tree),
        })
    }
}

/// Ranges grown to whole chunks within the content, sorted and joined.
pub(crate) fn merge(mut ranges: Vec<Range<u64>>, length: u64, size: ChunkSize) -> Vec<Range<u64>> {
    let bytes = size.bytes();
    ranges.retain(|range| range.start < range.end && range.start < length);
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let start = range.start / bytes * bytes;
        let end = range.end.min(length).next_multiple_of(bytes).min(length);
        match merged.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            Some(_) | None => merged.push(start..end),
        }
    }
    merged
}

/// Tells of ascending positions whether they lie in one of ascending ranges.
pub(crate) struct RangeCursor<'a> {
    ranges: std::iter::Peekable<std::slice::Iter<'a, Range<u64>>>,
}

impl<'a> RangeCursor<'a> {
    pub(crate) fn new(ranges: &'a [Range<u64>]) -> Self {
        Self {
            ranges: ranges.iter().peekable(),
        }
    }

    pub(crate) fn contains(&mut self, at: u64) -> bool {
        while self.ranges.next_if(|range| range.end <= at).is_some() {}
        self.ranges.peek().is_some_and(|range| range.start <= at)
    }
}

/// The chunks that are taken over from the base, ascending.
pub(crate) struct Reused<'a> {
    leaves: Option<Leaves<'a, Core>>,
    read: RangeCursor<'a>,
    size: ChunkSize,
    next: Option<(u64, Hash)>,
    length: u64,
}

impl<'a> Reused<'a> {
    pub(crate) fn new(core: &'a Core, plan: &'a Plan, length: u64, size: ChunkSize) -> Self {
        Self {
            leaves: plan.base.map(|tree| Leaves::new(core, tree)),
            read: RangeCursor::new(&plan.read),
            size,
            next: None,
            length,
        }
    }

    /// The next chunk before chunk `limit`.
    pub(crate) fn before(&mut self, limit: u64) -> Result<Option<(u64, Hash)>> {
        if self.next.is_none() {
            self.next = self.advance()?;
        }
        Ok(self.next.take_if(|(index, _)| *index < limit))
    }

    fn advance(&mut self) -> Result<Option<(u64, Hash)>> {
        let Some(leaves) = &mut self.leaves else {
            return Ok(None);
        };
        for leaf in leaves {
            let (index, hash) = leaf?;
            let start = index * self.size.bytes();
            if start < self.length && !self.read.contains(start) {
                return Ok(Some((index, hash)));
            }
        }
        self.leaves = None;
        Ok(None)
    }
}

/// One tree on its way into the store.
struct TreeJob<'a> {
    core: &'a Core,
    state: &'a mut State,
    source: &'a dyn Source,
    size: ChunkSize,
    progress: &'a Progress,
}

impl TreeJob<'_> {
    /// What to read and what to take over; nothing is stored yet.
    fn plan(&self, base: Option<Base>) -> Result<Plan> {
        check_length(self.source)?;
        let is_known = |hash: &Hash| self.state.is_known(self.core, hash);
        Plan::new(self.core, is_known, self.source.len(), self.size, base)
    }

    fn run(mut self, plan: &Plan) -> Result<TreeRef> {
        self.progress.start(self.source.len());
        let (core, source, size) = (self.core, self.source, self.size);
        let mut reused = Reused::new(core, plan, source.len(), size);
        let mut builder = TreeBuilder::new(source.len(), size);
        let Tuning { threads, .. } = core.tuning();
        let in_flight = 2 * threads.max(1);
        thread::scope(|scope| {
            let mut hashers =
                Ordered::new(scope, threads, move |job| hash_batch(source, size, job));
            let mut compressors = Ordered::new(scope, threads, compress);
            let mut batches = Batches::within(source, size, plan.read.clone()).fuse();
            let mut spare = Vec::new();
            loop {
                while hashers.in_flight() < in_flight {
                    let Some(range) = batches.next() else { break };
                    let buffer = spare.pop().unwrap_or_default();
                    let range = range?;
                    hashers.submit(HashJob { range, buffer });
                }
                if hashers.in_flight() == 0 {
                    break;
                }
                let batch: HashedBatch = hashers.take()?;
                self.take_over(&mut builder, &mut reused, batch.range.start / size.bytes())?;
                self.add_batch(&mut builder, &mut compressors, &batch)?;
                self.store_frames(&mut compressors, in_flight)?;
                self.progress.reach(batch.range.end)?;
                spare.push(batch.bytes);
            }
            self.take_over(&mut builder, &mut reused, u64::MAX)?;
            self.store_frames(&mut compressors, 0)
        })?;
        let (tree, nodes) = builder.finish();
        self.state.store_nodes(core, nodes)?;
        self.state.trees.insert(tree);
        self.progress.reach(source.len())?;
        Ok(tree)
    }

    /// Names the chunks of the base that come before chunk `limit`.
    fn take_over(
        &mut self,
        builder: &mut TreeBuilder,
        reused: &mut Reused<'_>,
        limit: u64,
    ) -> Result<()> {
        while let Some((index, hash)) = reused.before(limit)? {
            builder.push(index, hash);
            self.state.report.chunks_reused += 1;
            self.state.store_nodes(self.core, builder.take_finished())?;
        }
        Ok(())
    }

    fn add_batch(
        &mut self,
        builder: &mut TreeBuilder,
        compressors: &mut Ordered<OpenFrame, Result<StoredFrame>>,
        batch: &HashedBatch,
    ) -> Result<()> {
        self.state.report.read_bytes += batch.bytes.len() as u64;
        for (index, hash, bytes) in batch.chunks(self.size) {
            builder.push(index, hash);
            if hash.is_zero() {
                continue;
            }
            if self.state.is_known(self.core, &hash) {
                self.state.report.chunks_reused += 1;
                continue;
            }
            self.state.fresh.insert(hash);
            self.state.report.chunks_new += 1;
            self.state.report.new_raw_bytes += bytes.len() as u64;
            if let Some(frame) = self.state.data.push(hash, bytes) {
                compressors.submit(frame);
            }
        }
        self.state.store_nodes(self.core, builder.take_finished())
    }

    fn store_frames(
        &mut self,
        compressors: &mut Ordered<OpenFrame, Result<StoredFrame>>,
        leave: usize,
    ) -> Result<()> {
        while compressors.in_flight() > leave {
            let frame = compressors.take()?;
            let state = &mut *self.state;
            state.data.store(self.core, &mut state.outbox, frame)?;
        }
        Ok(())
    }
}

fn compress(frame: OpenFrame) -> Result<StoredFrame> {
    Ok(frame.store(&mut new_compressor()?))
}

impl Publish {
    pub(crate) async fn begin(store: &Store, owner: LeaseOwner) -> Result<Self> {
        let (lease, publish_id) = store.inner.new_id()?;
        if store.inner.access == Access::ReadOnly {
            return Err(Error::ReadOnly {
                attempted: "publish".to_owned(),
                source: None,
            });
        }
        // From here on the lease may be there, whatever the store answers.
        let held = Arc::new(HeldLease {
            id: lease,
            store: Arc::clone(&store.inner.backend.store),
            runtime: Handle::current(),
            removed: AtomicBool::new(false),
        });
        let lease = Lease {
            owner,
            started: jiff::Timestamp::now(),
        };
        let running = Arc::clone(&held);
        let begin = move |core: &Core| {
            core.io.put(&running.object(), to_json(&lease).into())?;
            core.usable_packs()
        };
        let usable = store.run("begin a publish", begin).await?;
        Ok(Self {
            store: store.clone(),
            lease: held,
            state: Some(State::new(usable, publish_id)),
        })
    }

    /// The id of this publish's lease.
    #[must_use]
    pub fn lease_id(&self) -> &str {
        &self.lease.id
    }

    async fn with_state<T: Send + 'static>(
        &mut self,
        attempted: &'static str,
        operation: impl FnOnce(&Core, &mut State) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mut state = self.state.take().ok_or(Error::PublishBroken)?;
        let lease = Arc::clone(&self.lease);
        let operation = move |core: &Core| {
            let _held_until_the_end = lease;
            let value = operation(core, &mut state)?;
            Ok((value, state))
        };
        let (value, state) = self.store.run(attempted, operation).await?;
        self.state = Some(state);
        Ok(value)
    }

    /// Stores the content of `source`. With a base, only the changed ranges are read, and whatever of
    /// the base can no longer be relied on; the result is the same tree.
    ///
    /// # Errors
    /// When the base does not fit or its nodes cannot be read; the publish can go on without it. When
    /// the source cannot be read, the store fails, or `progress` cancels; the publish can then only be
    /// aborted.
    pub async fn add_tree(
        &mut self,
        source: Arc<dyn Source>,
        chunk_size: ChunkSize,
        base: Option<Base>,
        progress: &Progress,
    ) -> Result<TreeRef> {
        let progress = progress.clone();
        let dropped = CancelOnDrop::new(&progress);
        let operation = move |core: &Core, state: &mut State| {
            let job = TreeJob {
                core,
                state,
                source: source.as_ref(),
                size: chunk_size,
                progress: &progress,
            };
            match job.plan(base) {
                Ok(plan) => job.run(&plan).map(Ok),
                Err(error) => Ok(Err(error)),
            }
        };
        let tree = self.with_state("publish a tree", operation).await;
        dropped.disarm();
        tree?
    }

    /// Stores a small blob.
    ///
    /// # Errors
    /// When it is longer than 256 MiB, or as [`Publish::add_tree`].
    pub async fn add_blob(&mut self, bytes: &[u8]) -> Result<BlobRef> {
        if bytes.len() as u64 > BLOB_BYTES_MAX {
            return Err(Error::Invalid {
                attempted: format!("store a blob of {} bytes", bytes.len()),
                reason: format!("a blob has at most {BLOB_BYTES_MAX} bytes; store it as a tree"),
            });
        }
        let source = Arc::new(bytes.to_vec());
        let progress = Progress::silent();
        let tree = self
            .add_tree(source, ChunkSize::DISK, None, &progress)
            .await?;
        Ok(BlobRef(tree))
    }

    /// Makes a tree that the store has nameable by this publish's manifest, without reading content.
    ///
    /// # Errors
    /// When any chunk or node of it is gone or about to be deleted; the publish can go on, and the
    /// tree be stored from its source.
    pub async fn reuse_tree(&mut self, tree: &TreeRef) -> Result<()> {
        let tree = *tree;
        let operation = move |core: &Core, state: &mut State| Ok(reuse(core, state, &tree));
        self.with_state("reuse a tree", operation).await?
    }

    /// Reads `ranges` of a tree of this publish back from the store, before anything names it, and compares them with
    /// `source`; the first range that differs.
    ///
    /// # Errors
    /// When something is missing or damaged, the source cannot be read, the store fails, or `progress` cancels; the
    /// publish can then only be aborted.
    ///
    /// # Durability
    /// What was added so far is durable, though no manifest names it.
    pub async fn read_back(
        &mut self,
        tree: &TreeRef,
        source: Arc<dyn Source>,
        ranges: Vec<Range<u64>>,
        progress: &Progress,
    ) -> Result<Option<Range<u64>>> {
        let (tree, progress) = (*tree, progress.clone());
        let dropped = CancelOnDrop::new(&progress);
        let operation = move |core: &Core, state: &mut State| {
            state.settle(core)?;
            let ranges = merge(ranges, tree.length_bytes, tree.chunk_size);
            core.compare(&tree, source.as_ref(), &ranges, &progress)
        };
        let found = self.with_state("read a tree back", operation).await;
        dropped.disarm();
        found
    }

    /// The bytes of packs and index objects written so far: of all that was added, once it was read back.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.state.as_ref().map_or(0, |state| state.outbox.bytes())
    }

    /// Makes the checkpoint: when this returns `Ok`, it is there, whole and durable.
    ///
    /// # Errors
    /// When `manifest` names a tree that was not added or reused here, when the lease was broken, or
    /// the store fails. No checkpoint is there then, except if the store went away while it wrote the
    /// manifest and could not be asked whether it had; committing the same manifest again is no error.
    pub async fn commit(mut self, manifest: &Manifest) -> Result<(ManifestId, PublishReport)> {
        let (manifest, lease) = (manifest.clone(), Arc::clone(&self.lease));
        let operation =
            move |core: &Core, state: &mut State| commit(core, state, &manifest, &lease);
        self.with_state("commit a publish", operation).await
    }

    /// Ends the publish without a checkpoint. What it has stored is deleted by the next gc.
    ///
    /// # Errors
    /// When the lease cannot be removed: it then holds gc back until it is broken.
    pub async fn abort(mut self) -> Result<()> {
        if let Some(state) = self.state.take() {
            let stop = |upload: &JoinHandle<_>| upload.abort();
            state.outbox.uploads.iter().for_each(stop);
        }
        let lease = Arc::clone(&self.lease);
        let delete = move |core: &Core| {
            core.io.delete(&lease.object())?;
            lease.is_removed();
            Ok(())
        };
        self.store.run("abort a publish", delete).await
    }
}

fn reuse(core: &Core, state: &mut State, tree: &TreeRef) -> Result<()> {
    let mut builder = TreeBuilder::new(tree.length_bytes, tree.chunk_size);
    let need = |state: &State, what, hash: &Hash| {
        if state.is_known(core, hash) {
            Ok(())
        } else {
            Err(core.unknown(what, hash).needed_by(|| tree.to_string()))
        }
    };
    for leaf in Leaves::new(core, *tree) {
        let (index, hash) = leaf?;
        need(state, "chunk", &hash)?;
        builder.push(index, hash);
        for (hash, _) in builder.take_finished() {
            need(state, "node", &hash)?;
        }
    }
    let (_, nodes) = builder.finish();
    nodes
        .iter()
        .try_for_each(|(hash, _)| need(state, "node", hash))?;
    state.trees.insert(*tree);
    Ok(())
}

fn commit(
    core: &Core,
    state: &mut State,
    manifest: &Manifest,
    lease: &HeldLease,
) -> Result<(ManifestId, PublishReport)> {
    for (what, tree) in manifest.trees() {
        if !state.trees.contains(&tree) {
            return Err(Error::Invalid {
                attempted: "commit a publish".to_owned(),
                reason: format!("{what} names {tree}, which was not added to this publish"),
            });
        }
    }
    let object = manifest.encode()?;
    let (_, index_objects) = state.settle(core)?;
    if !core.io.exists(&lease.object())? {
        lease.is_removed();
        return Err(Error::LeaseLost {
            lease: lease.id.clone(),
        });
    }
    let bytes = state.outbox.bytes() + object.len() as u64;
    let id = write_manifest(core, manifest, object)?;
    let mut report = state.report;
    report.objects = state.outbox.packs().len() as u64 + index_objects + 1;
    report.stored_bytes = bytes;
    // It is committed: a lease that stays is told in the report, not as a failure.
    report.lease_removed = match core.io.delete(&lease.object()) {
        Ok(()) => true,
        Err(error) => {
            warn!(%error, lease = lease.id, "the checkpoint is whole, but its lease could not be removed");
            false
        }
    };
    lease.is_removed();
    Ok((id, report))
}

/// Writes the manifest, or finds the very same one there.
fn write_manifest(core: &Core, manifest: &Manifest, object: Vec<u8>) -> Result<ManifestId> {
    let id = manifest_id(&object);
    let path = manifest_path(manifest.role, id);
    match core.io.create(&path, &object.into(), MANIFEST_BYTES_MAX)? {
        Created::Ours => Ok(id),
        Created::Theirs(_) => Err(Error::damaged(path, "other bytes than its name says")),
    }
}
