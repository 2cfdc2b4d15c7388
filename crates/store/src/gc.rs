//! Garbage collection beside running publishes, without any time-out.
//!
//! # The rule
//! A pack is deleted only if it was on a *condemned* list before the leases were looked at, no lease
//! was there, and no manifest read after that needs it. What other packs hold too is not needed, if those
//! are there in their full length and it was read from them and hashed.
//!
//! ```text
//!  publish                                   gc (one at a time: `gc-lock`)
//!  P1  write the lease                       G1  mark: manifests, index, packs
//!  P2  read the condemned lists              G2  write the condemned list
//!  P3  read the index, list the packs        G3  list the leases; if there is one: stop here
//!  P4  write packs; reuse only what is       G4  mark again; what became live is spared, and so
//!      in whole packs of P3 that P2 did          is what cannot be read where it is kept besides
//!      not list                              G5  write the index without the dead packs,
//!  P5  write the index object                    delete the old index objects
//!  P6  lease still there?                    G6  delete the dead packs
//!  P7  write the manifest                    G7  delete the condemned lists
//!  P8  remove the lease
//! ```
//!
//! # Why no committed manifest loses a chunk
//! Take a manifest written at P7 and a pack *X* that it needs and that some gc deletes at G6. Each
//! object store call takes effect at one instant between its start and its answer, and a listing shows
//! everything that was there when it began and still is. Look at when the lease was there:
//!
//! 1. *The lease was there when G3 listed.* Then G3 saw it, and this gc deleted nothing.
//! 2. *The lease was removed (P8) before G3 began.* Then P7 was before G3, so G4 read the manifest (and
//!    its index object, which is older) and spared *X*. A manifest that was removed again in between
//!    is not a committed manifest any more.
//! 3. *The lease was written (P1) after G3 answered.* Then P2 began after G2 had written the list with
//!    *X*. If P2 read it, P4 did not reuse *X*. If P2 missed it, G7 had begun, so G5 and G6 were done,
//!    and P3, which came later, saw neither an index with *X* nor *X* itself. And *X* is not a pack
//!    that P4 wrote: G1 listed *X* before G3, and the names of this publish's packs contain its random
//!    id, so nobody could have written *X* under that name before.
//!
//! A gc that dies leaves its lock, its lists and perhaps packs that no index names. The lists only make
//! publishes more careful, and the next gc starts over with everything on them as a candidate again.
//! A lease that is broken by hand while its publish lives is outside this argument; P6 makes the
//! publish fail instead, unless the lease is broken in the instant between P6 and P7.
//!
//! # Why two collections do no harm to each other
//! The lock is created conditionally, but it cannot be deleted so: a client that repeats a deletion whose
//! answer was lost deletes the lock that another gc has taken meanwhile, and then a third can begin beside
//! that one. Each would take what the other has just rewritten for garbage. So a gc looks at its lock once
//! more before G5. If it finds its own, that was there from G1 on, and no other gc began before this
//! instant: what another one writes is on no list of this one. If it finds none or another, it deletes
//! nothing.
//!
//! Readers take no lease: a fetch that meets a pack which was just rewritten looks into the index
//! again. Packs of which less than half is in use are rewritten between G1 and G2, if there is no lease;
//! the old packs are then condemned like any other.

mod proof;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::backend::{Created, Listed};
use crate::core::{CONDEMNED, Core, GC_LOCK, INDEXES, PACKS, list_packs, pack_path};
use crate::error::{Error, Result};
use crate::hash::Hash;
use crate::index::IndexedPack;
use crate::lease::{Condemned, LEASE_BYTES_MAX, Lease, LeaseOwner, ListedLease, to_json};
use crate::manifest::{ManifestId, Role};
use crate::pack::{
    HEADER_BYTES, PackKind, PackTable, TRAILER_BYTES, compressor, decode_frame, decode_table,
    footer_bytes,
};
use crate::progress::Progress;
use crate::publish::{Outbox, Writer};
use crate::store::lease_of;
use crate::tree::{TreeRef, child_node, child_span};

/// Index objects are written together when there are more than this.
const INDEX_OBJECTS_MAX: usize = 32;
/// The longest footer of a pack that is read, in bytes.
const FOOTER_BYTES_MAX: u64 = crate::pack::PACK_BYTES_MAX;

/// What a garbage collection did, or with `dry_run` would have done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Nothing was changed.
    pub dry_run: bool,
    /// Checkpoints and templates that everything was measured against.
    pub manifests: u64,
    /// Chunks and nodes in use.
    pub live_chunks: u64,
    /// Packs in the store at the beginning.
    pub packs: u64,
    /// Packs that nothing needs: deleted, or left for a later gc if `waiting_for` is not empty.
    pub dead_packs: u64,
    /// Their size in bytes.
    pub dead_bytes: u64,
    /// Of these, packs whose chunks in use were written anew.
    pub rewritten_packs: u64,
    /// Bytes deleted.
    pub deleted_bytes: u64,
    /// Dead packs that were not deleted because what they hold cannot be read in the pack that was to keep
    /// it. `verify` names what is damaged.
    pub spared_packs: u64,
    /// Temporary files of dead publishes that were removed (folders only).
    pub temporary_files: u64,
    /// Publishes because of which nothing was deleted.
    pub waiting_for: Vec<ListedLease>,
}

/// What a rebuild of the index found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IndexReport {
    /// Packs that the new index names.
    pub packs: u64,
    /// Chunks and nodes in them.
    pub chunks: u64,
    /// Index objects replaced.
    pub replaced_objects: u64,
    /// Packs whose tables are damaged, with the reason; an old index object may still have told.
    pub damaged_packs: Vec<(String, String)>,
}

/// What a checkpoint occupies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of its chunks and nodes, each counted once, uncompressed.
    pub raw_bytes: u64,
    /// About how many bytes these occupy in the store.
    pub stored_bytes: u64,
    /// Of `raw_bytes`, what no other checkpoint or template needs.
    pub unique_raw_bytes: u64,
    /// Of `stored_bytes`, what no other checkpoint or template needs: what removing it would free.
    pub unique_stored_bytes: u64,
}

/// The state of the store at one marking.
struct View {
    manifests: u64,
    index_objects: Vec<Listed>,
    packs: BTreeMap<Hash, u64>,
    tables: BTreeMap<Hash, PackTable>,
    live: HashSet<Hash>,
}

/// In which pack each chunk in use is kept.
struct Homes {
    of: HashMap<Hash, Hash>,
    /// Bytes in use of each pack that is home to something.
    live_bytes: BTreeMap<Hash, u64>,
}

/// The lock that lets one gc or index rebuild run at a time.
struct GcLock<'a> {
    core: &'a Core,
    attempted: &'static str,
    lease: Lease,
}

impl<'a> GcLock<'a> {
    fn take(core: &'a Core, attempted: &'static str, owner: &LeaseOwner) -> Result<Self> {
        let lease = Lease {
            owner: owner.clone(),
            started: jiff::Timestamp::now(),
        };
        match core
            .io
            .create(GC_LOCK, &to_json(&lease).into(), LEASE_BYTES_MAX)?
        {
            Created::Ours => Ok(Self {
                core,
                attempted,
                lease,
            }),
            Created::Theirs(bytes) => Err(Error::Locked {
                attempted: attempted.to_owned(),
                holder: Box::new(lease_of(&bytes)?),
            }),
        }
    }

    fn is_held(&self) -> Result<bool> {
        Ok(self.core.gc_lock_holder()?.as_ref() == Some(&self.lease))
    }

    /// Fails if somebody has broken the lock. To be asked before the first deletion.
    fn check(&self) -> Result<()> {
        if self.is_held()? {
            return Ok(());
        }
        Err(Error::LockLost {
            attempted: self.attempted.to_owned(),
        })
    }

    /// Gives the lock back, if it is not somebody else's by now.
    fn give_back(&self) -> Result<()> {
        if self.is_held()? {
            self.core.io.delete(GC_LOCK)?;
        }
        Ok(())
    }

    /// Gives the lock back; a failure of the work itself comes first.
    fn release<T>(&self, result: Result<T>) -> Result<T> {
        match (result, self.give_back()) {
            (Ok(value), Ok(())) => Ok(value),
            (Ok(_), Err(error)) => Err(error),
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(lock)) => {
                warn!(%lock, "the gc lock could not be removed either");
                Err(error)
            }
        }
    }
}

impl Core {
    pub(crate) fn gc(
        &self,
        owner: &LeaseOwner,
        dry_run: bool,
        progress: &Progress,
    ) -> Result<GcReport> {
        if dry_run {
            return self.plan_gc(progress);
        }
        self.check_writable("gc")?;
        let lock = GcLock::take(self, "gc", owner)?;
        lock.release(self.gc_locked(&lock, progress))
    }

    /// What a gc would do, without rewriting.
    fn plan_gc(&self, progress: &Progress) -> Result<GcReport> {
        let view = self.view(progress)?;
        let homes = view.homes(&HashSet::new())?;
        let dead = view.dead(&homes);
        let mut report = view.report();
        report.dry_run = true;
        report.add_dead(&view, &dead);
        report.waiting_for = self.leases()?;
        Ok(report)
    }

    fn gc_locked(&self, lock: &GcLock<'_>, progress: &Progress) -> Result<GcReport> {
        let leftovers = self.temporary_files()?;
        let old_lists = self.io.list(CONDEMNED)?;
        let already = self.condemned()?;
        let view = self.view(progress)?;
        let homes = view.homes(&already)?;
        let mut dead = view.dead(&homes);
        let mut report = view.report();
        if self.leases()?.is_empty() {
            let rewritten = self.rewrite_sparse(&view, &homes, progress)?;
            report.rewritten_packs = rewritten.len() as u64;
            dead.extend(rewritten);
        }
        report.add_dead(&view, &dead);
        let tidy = view.index_objects.len() <= INDEX_OBJECTS_MAX && !view.names_lost_packs();
        if dead.is_empty() && old_lists.is_empty() && leftovers.is_empty() && tidy {
            return Ok(report);
        }
        let list = self.condemn(dead.iter().filter(|name| !already.contains(name)))?;
        report.waiting_for = self.leases()?;
        if report.waiting_for.is_empty() {
            self.sweep(&dead, lock, &mut report, progress)?;
            for object in old_lists.iter().map(|list| &list.path).chain(&list) {
                self.io.delete(object)?;
            }
            report.temporary_files = remove_files(&leftovers)?;
        }
        Ok(report)
    }

    /// Writes a condemned list; its object.
    fn condemn<'a>(&self, dead: impl Iterator<Item = &'a Hash>) -> Result<Option<String>> {
        let packs: Vec<Hash> = dead.copied().collect();
        if packs.is_empty() {
            return Ok(None);
        }
        let (id, _) = self.inner.new_id()?;
        let object = format!("{CONDEMNED}/{id}");
        let list = Condemned { packs };
        self.io.put(&object, to_json(&list).into())?;
        Ok(Some(object))
    }

    /// Deletes what is still dead after a second look.
    fn sweep(
        &self,
        condemned: &BTreeSet<Hash>,
        lock: &GcLock<'_>,
        report: &mut GcReport,
        progress: &Progress,
    ) -> Result<()> {
        let view = self.view(progress)?;
        let avoid = condemned.iter().copied().collect();
        let homes = view.homes(&avoid)?;
        let needed = |name: &Hash| homes.live_bytes.contains_key(name);
        let mut dead: BTreeSet<Hash> = condemned.iter().copied().filter(|n| !needed(n)).collect();
        let spared = self.irreplaceable(&view, &homes, &dead, progress)?;
        dead.retain(|name| !spared.contains(name));
        report.spared_packs = spared.len() as u64;
        lock.check()?;
        self.replace_index(&view, &dead)?;
        for name in &dead {
            self.io.delete(&pack_path(name))?;
            report.deleted_bytes += view.packs.get(name).copied().unwrap_or(0);
        }
        Ok(())
    }

    /// Writes the index without `dead` packs and without packs that are gone.
    fn replace_index(&self, view: &View, dead: &BTreeSet<Hash>) -> Result<()> {
        let stale = |name: &Hash| dead.contains(name) || !view.packs.contains_key(name);
        let clean = !view.tables.keys().any(stale);
        if clean && view.index_objects.len() <= INDEX_OBJECTS_MAX {
            return Ok(());
        }
        let kept: Vec<IndexedPack> = view
            .tables
            .iter()
            .filter(|(name, _)| !stale(name))
            .map(|(name, table)| IndexedPack {
                name: *name,
                table: table.clone(),
            })
            .collect();
        self.write_index_instead(&kept, &view.index_objects)?;
        Ok(())
    }

    /// Writes an index of `packs`, then removes the `old` objects; how many were removed.
    fn write_index_instead(&self, packs: &[IndexedPack], old: &[Listed]) -> Result<u64> {
        let (_, written) = self.write_index_objects(&packs.iter().collect::<Vec<_>>())?;
        let mut removed = 0;
        for object in old {
            if !written.contains(&object.name) {
                self.io.delete(&object.path)?;
                removed += 1;
            }
        }
        self.reload_index()?;
        self.trim_cache();
        Ok(removed)
    }

    /// Marks: manifests first, then the index, then the packs, so that whatever a manifest names is
    /// in the index that is read after it.
    fn view(&self, progress: &Progress) -> Result<View> {
        let mut trees = Vec::new();
        let mut manifests = 0;
        let mut damaged = Vec::new();
        for role in Role::ALL {
            for listed in self.manifests(role)? {
                manifests += 1;
                match listed.manifest {
                    Ok(manifest) => trees.push((listed.object, manifest.trees())),
                    Err(found) => damaged.push(format!("{}: {found}", listed.object)),
                }
            }
        }
        let index_objects = self.io.list(INDEXES)?;
        let mut tables = BTreeMap::new();
        for object in &index_objects {
            match self.load_index_object(object) {
                Ok(packs) => tables.extend(packs.into_iter().map(|p| (p.name, p.table))),
                Err(Error::Damaged { object, found, .. }) => {
                    damaged.push(format!("{object}: {found}"));
                }
                Err(error) => return Err(error),
            }
        }
        let packs = list_packs(&self.io)?;
        self.refresh_index()?;
        let mut live = HashSet::new();
        let sizes = trees.iter().flat_map(|(_, trees)| trees);
        progress.start(sizes.map(|(_, tree)| tree.length_bytes).sum());
        for (object, trees) in trees {
            for (what, tree) in trees {
                match self.mark(&tree, &mut live, progress) {
                    Ok(()) => progress.advance(tree.length_bytes)?,
                    Err(Error::Cancelled) => return Err(Error::Cancelled),
                    Err(error) => damaged.push(format!("{what} of {object}: {error}")),
                }
            }
        }
        if !damaged.is_empty() {
            return Err(Error::GcBlocked { reasons: damaged });
        }
        Ok(View {
            manifests,
            index_objects,
            packs,
            tables,
            live,
        })
    }

    /// Adds the names of all nodes and chunks of a tree.
    fn mark(&self, tree: &TreeRef, live: &mut HashSet<Hash>, progress: &Progress) -> Result<()> {
        let mut pending = Vec::new();
        if !tree.root.is_zero() {
            tree.check()?;
            pending.push((tree.root, tree.root_level(), 0));
        }
        while let Some((hash, level, first)) = pending.pop() {
            if !live.insert(hash) {
                continue;
            }
            progress.advance(0)?;
            let node = child_node(self, tree, &hash, level, first)?;
            for (at, child) in &node.children {
                if level == 0 {
                    live.insert(*child);
                } else {
                    let first = first + u64::from(*at) * child_span(level);
                    pending.push((*child, level - 1, first));
                }
            }
        }
        Ok(())
    }

    /// Writes what is in use of packs that are mostly garbage into new packs; which packs these were.
    fn rewrite_sparse(
        &self,
        view: &View,
        homes: &Homes,
        progress: &Progress,
    ) -> Result<BTreeSet<Hash>> {
        let sparse = homes.live_bytes.iter().filter(|(name, live)| {
            let total = view.tables.get(*name).map_or(0, PackTable::raw_bytes);
            live.saturating_mul(2) < total
        });
        let sparse: Vec<Hash> = sparse.map(|(name, _)| *name).collect();
        let mut rewritten = BTreeSet::new();
        if sparse.is_empty() {
            return Ok(rewritten);
        }
        let (_, id) = self.inner.new_id()?;
        let mut outbox = Outbox::default();
        let mut data = Writer::new(PackKind::Chunks, id);
        let mut nodes = Writer::new(PackKind::Nodes, id);
        let bytes = |name: &Hash| view.tables[name].raw_bytes();
        progress.start(sparse.iter().map(bytes).sum());
        for name in sparse {
            progress.advance(0)?;
            let table = &view.tables[&name];
            let writer = match table.kind {
                PackKind::Chunks => &mut data,
                PackKind::Nodes => &mut nodes,
            };
            match self.rewrite_pack(&name, table, homes, writer, &mut outbox) {
                Ok(()) => drop(rewritten.insert(name)),
                Err(Error::Damaged { object, found, .. }) => {
                    warn!(object, found, "a damaged pack is not rewritten");
                }
                Err(error) => return Err(error),
            }
            progress.advance(table.raw_bytes())?;
        }
        data.flush(self, &mut outbox)?;
        nodes.flush(self, &mut outbox)?;
        outbox.write_index(self)?;
        Ok(rewritten)
    }

    fn rewrite_pack(
        &self,
        name: &Hash,
        table: &PackTable,
        homes: &Homes,
        writer: &mut Writer,
        outbox: &mut Outbox,
    ) -> Result<()> {
        let object = pack_path(name);
        let damaged = |found: String| Error::damaged(&object, found);
        for frame in table.placed_frames() {
            let is_home = |hash: &Hash| homes.of.get(hash) == Some(name);
            let mut names = frame.chunks.iter().map(|c| Hash::from_bytes(c.hash));
            if !names.any(|hash| is_home(&hash)) {
                continue;
            }
            let stored = self.io.get_range(&object, frame.range.clone())?;
            let raw = decode_frame(frame.entry, stored).map_err(damaged)?;
            for (hash, bytes) in frame.pieces(&raw).filter(|(hash, _)| is_home(hash)) {
                if table.kind.hash(bytes) != hash {
                    return Err(damaged(format!("other bytes than chunk {hash}")));
                }
                if let Some(full) = writer.push(hash, bytes) {
                    let mut compressor =
                        compressor().map_err(|error| damaged(error.to_string()))?;
                    writer.store(self, outbox, full.store(&mut compressor))?;
                }
            }
        }
        Ok(())
    }

    /// Temporary files that a killed publish left in a folder store. They are listed before the
    /// leases, and everything in these folders is written under a lease.
    fn temporary_files(&self) -> Result<Vec<PathBuf>> {
        let Some(folder) = self.io.folder() else {
            return Ok(Vec::new());
        };
        let mut files = Vec::new();
        let parts = [PACKS, INDEXES].into_iter();
        for part in parts.chain(Role::ALL.map(Role::folder)) {
            find_temporary(&folder.join(part), &mut files).map_err(|source| Error::Cache {
                attempted: format!("look for temporary files in {part}"),
                source,
            })?;
        }
        Ok(files)
    }

    pub(crate) fn rebuild_index(&self, owner: &LeaseOwner) -> Result<IndexReport> {
        self.check_writable("rebuild the index")?;
        let lock = GcLock::take(self, "rebuild the index", owner)?;
        lock.release(self.rebuild_locked(&lock))
    }

    /// The old index objects are listed before the packs: whatever they name that is still in use is
    /// then among the packs.
    fn rebuild_locked(&self, lock: &GcLock<'_>) -> Result<IndexReport> {
        let old = self.io.list(INDEXES)?;
        let mut told = HashMap::new();
        for object in &old {
            match self.load_index_object(object) {
                Ok(packs) => told.extend(packs.into_iter().map(|p| (p.name, p.table))),
                Err(Error::Damaged { object, found, .. }) => {
                    warn!(object, found, "a damaged index object is replaced");
                }
                Err(error) => return Err(error),
            }
        }
        let mut report = IndexReport::default();
        let mut packs = Vec::new();
        for (name, bytes) in list_packs(&self.io)? {
            let table = match self.read_table(&name, bytes) {
                Ok(table) => Some(table),
                Err(Error::Damaged { object, found, .. }) => {
                    report.damaged_packs.push((object, found));
                    told.remove(&name)
                }
                Err(error) => return Err(error),
            };
            packs.extend(table.map(|table| IndexedPack { name, table }));
        }
        report.packs = packs.len() as u64;
        let chunks = |pack: &IndexedPack| pack.table.chunks.len() as u64;
        report.chunks = packs.iter().map(chunks).sum();
        lock.check()?;
        report.replaced_objects = self.write_index_instead(&packs, &old)?;
        Ok(report)
    }

    /// The table of a pack, from its footer.
    fn read_table(&self, name: &Hash, bytes: u64) -> Result<PackTable> {
        let object = pack_path(name);
        let damaged = |found: &str| Error::damaged(&object, found);
        let fixed = (HEADER_BYTES + TRAILER_BYTES) as u64;
        if bytes < fixed {
            return Err(damaged("a truncated pack"));
        }
        let trailer = self
            .io
            .get_range(&object, bytes - TRAILER_BYTES as u64..bytes)?;
        let footer = footer_bytes(&trailer, bytes).map_err(damaged)?;
        if footer > FOOTER_BYTES_MAX {
            return Err(damaged("a footer that is too long"));
        }
        let start = bytes - TRAILER_BYTES as u64 - footer;
        let header = self.io.get_range(&object, 0..HEADER_BYTES as u64)?;
        let footer = self.io.get_range(&object, start..bytes)?;
        decode_table(&header, &footer, bytes).map_err(damaged)
    }

    pub(crate) fn usage(&self, id: ManifestId) -> Result<Usage> {
        let (_, id, _) = self.resolve(&id.to_string())?;
        let mut own = HashSet::new();
        let mut others = HashSet::new();
        let mut damaged = Vec::new();
        for role in Role::ALL {
            for listed in self.manifests(role)? {
                let is_own = listed.id == Some(id);
                let live = if is_own { &mut own } else { &mut others };
                match listed.manifest {
                    Ok(manifest) => manifest
                        .trees()
                        .iter()
                        .try_for_each(|(_, tree)| self.mark(tree, live, &Progress::silent()))?,
                    Err(found) => damaged.push(format!("{}: {found}", listed.object)),
                }
            }
        }
        if !damaged.is_empty() {
            return Err(Error::Invalid {
                attempted: format!("measure the usage of {id}"),
                reason: format!("damaged manifests: {}", damaged.join("; ")),
            });
        }
        self.sum_usage(&own, &others)
    }

    fn sum_usage(&self, own: &HashSet<Hash>, others: &HashSet<Hash>) -> Result<Usage> {
        let mut usage = Usage::default();
        for hash in own {
            let (pack, location) = self.locate("chunk", hash)?;
            let frame = &pack.frames[location.frame as usize].entry;
            let raw = u64::from(location.bytes);
            let stored = raw * u64::from(frame.stored_bytes.get());
            let stored = stored.div_ceil(u64::from(frame.raw_bytes.get()));
            usage.raw_bytes += raw;
            usage.stored_bytes += stored;
            if !others.contains(hash) {
                usage.unique_raw_bytes += raw;
                usage.unique_stored_bytes += stored;
            }
        }
        Ok(usage)
    }
}

impl View {
    /// Whether the index names packs that are not there.
    fn names_lost_packs(&self) -> bool {
        self.tables
            .keys()
            .any(|name| !self.packs.contains_key(name))
    }

    /// Gives each chunk in use one home, a pack that is there in its full length; packs to `avoid` only
    /// where there is no other.
    fn homes(&self, avoid: &HashSet<Hash>) -> Result<Homes> {
        let is_whole =
            |name: &Hash, table: &PackTable| self.packs.get(name) == Some(&table.pack_bytes());
        let whole = self.tables.iter().filter(|(n, t)| is_whole(n, t));
        let mut order: Vec<_> = whole.collect();
        let rank = |name: &Hash, table: &PackTable| {
            (avoid.contains(name), std::cmp::Reverse(table.raw_bytes()))
        };
        order.sort_by_key(|(name, table)| rank(name, table));
        let mut homes = Homes {
            of: HashMap::new(),
            live_bytes: BTreeMap::new(),
        };
        for (name, table) in order {
            for chunk in &table.chunks {
                let hash = Hash::from_bytes(chunk.hash);
                if self.live.contains(&hash) && !homes.of.contains_key(&hash) {
                    homes.of.insert(hash, *name);
                    *homes.live_bytes.entry(*name).or_default() += u64::from(chunk.bytes.get());
                }
            }
        }
        match self.live.iter().find(|hash| !homes.of.contains_key(*hash)) {
            None => Ok(homes),
            Some(lost) => Err(Error::GcBlocked {
                reasons: vec![format!(
                    "{lost} is needed and in no pack that is there in its full length ({} such)",
                    self.live.len() - homes.of.len()
                )],
            }),
        }
    }

    /// Packs that are home to nothing, those that no index names included.
    fn dead(&self, homes: &Homes) -> BTreeSet<Hash> {
        let is_home = |name: &Hash| homes.live_bytes.contains_key(name);
        self.packs.keys().copied().filter(|n| !is_home(n)).collect()
    }

    fn report(&self) -> GcReport {
        GcReport {
            manifests: self.manifests,
            live_chunks: self.live.len() as u64,
            packs: self.packs.len() as u64,
            ..GcReport::default()
        }
    }
}

impl GcReport {
    fn add_dead(&mut self, view: &View, dead: &BTreeSet<Hash>) {
        self.dead_packs = dead.len() as u64;
        self.dead_bytes = dead.iter().filter_map(|name| view.packs.get(name)).sum();
    }
}

/// Files that the object store was still writing: `NAME#NUMBER`.
fn find_temporary(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            find_temporary(&entry.path(), files)?;
        } else if let Some((_, number)) = name.split_once('#')
            && number.bytes().all(|digit| digit.is_ascii_digit())
        {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn remove_files(files: &[PathBuf]) -> Result<u64> {
    for file in files {
        stead_sys::durable::remove_file(file).map_err(|source| Error::Cache {
            attempted: format!("remove {}", file.display()),
            source,
        })?;
    }
    Ok(files.len() as u64)
}
