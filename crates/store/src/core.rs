//! The synchronous core that every operation stands on: objects, the index, frames and nodes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;
use tracing::warn;
use zerocopy::IntoBytes;

use crate::backend::{Backend, Io, Listed};
use crate::error::{Error, Result};
use crate::hash::Hash;
use crate::homes::{Loss, Tried};
use crate::index::{self, Index, IndexedPack, KnownPack, Location};
use crate::pack::{self, PackKind};
use crate::pool::default_threads;
use crate::tree::{LENGTH_BYTES_MAX, Node, Nodes};

/// Uncompressed frames kept for the next reader, which is mostly a walk through the same nodes.
const FRAMES_KEPT: usize = 16;
/// How often an operation starts again when garbage collection moves objects under it.
pub(crate) const MOVED_TRIES: usize = 5;

pub(crate) const INDEXES: &str = "indexes";
pub(crate) const PACKS: &str = "packs";
pub(crate) const LEASES: &str = "leases";
pub(crate) const CONDEMNED: &str = "condemned";
pub(crate) const CONFIG: &str = "steadfast-store";
pub(crate) const GC_LOCK: &str = "gc-lock";

/// Whether a store is opened for writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing in the store is changed.
    ReadOnly,
    /// Publishing and garbage collection are allowed; opening proves that the store can be written to.
    ReadWrite,
}

/// How much an operation does at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Threads that hash, compress and decompress.
    pub threads: usize,
    /// Objects or frames fetched at the same time.
    pub parallel_reads: usize,
    /// Packs written behind the work of the publish.
    pub parallel_writes: usize,
    /// Size at which a pack is closed, in bytes.
    pub pack_target_bytes: u64,
    /// Only for tests that repeat a run exactly: ids are derived from this seed and a counter instead
    /// of being drawn at random. Two handles with one seed would write objects of the same names.
    pub id_seed: Option<u64>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            threads: default_threads(),
            parallel_reads: 8,
            parallel_writes: 2,
            pack_target_bytes: pack::PACK_TARGET_BYTES,
            id_seed: None,
        }
    }
}

/// What all handles of an open store share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) backend: Backend,
    /// The folder for index objects of this store, if there is a cache.
    pub(crate) cache: Option<PathBuf>,
    pub(crate) access: Access,
    pub(crate) id: String,
    pub(crate) tuning: Tuning,
    pub(crate) index: RwLock<Index>,
    ids_drawn: AtomicU64,
    frames: Mutex<VecDeque<((Hash, u32), Bytes)>>,
}

impl Inner {
    pub(crate) fn new(
        backend: Backend,
        cache: Option<PathBuf>,
        access: Access,
        id: String,
        tuning: Tuning,
    ) -> Self {
        Self {
            backend,
            cache,
            access,
            id,
            tuning,
            index: RwLock::default(),
            ids_drawn: AtomicU64::new(0),
            frames: Mutex::default(),
        }
    }
}

/// 32 hexadecimal digits, and the bytes they stand for.
pub(crate) type Id = (String, [u8; 16]);

impl Inner {
    /// An id that nobody else draws.
    pub(crate) fn new_id(&self) -> Result<Id> {
        match self.tuning.id_seed {
            None => random_id(),
            Some(seed) => {
                let number = self.ids_drawn.fetch_add(1, Ordering::Relaxed);
                let hash = blake3::hash([seed, number].as_bytes());
                let (bytes, _) = hash.as_bytes().as_chunks::<16>();
                Ok(id_of(bytes[0]))
            }
        }
    }
}

pub(crate) fn random_id() -> Result<Id> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| Error::Invalid {
        attempted: "draw a random id".to_owned(),
        reason: error.to_string(),
    })?;
    Ok(id_of(bytes))
}

fn id_of(bytes: [u8; 16]) -> Id {
    let text = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    (text, bytes)
}

/// An open store, on a thread that may block.
#[derive(Debug, Clone)]
pub(crate) struct Core {
    pub(crate) inner: Arc<Inner>,
    pub(crate) io: Io,
}

/// Where a pack is in the store.
pub(crate) fn pack_path(name: &Hash) -> String {
    let name = name.to_string();
    format!("{PACKS}/{}/{name}", &name[..2])
}

pub(crate) fn index_path(name: &str) -> String {
    format!("{INDEXES}/{name}")
}

impl Core {
    pub(crate) fn tuning(&self) -> Tuning {
        self.inner.tuning
    }

    pub(crate) fn check_writable(&self, attempted: &str) -> Result<()> {
        match self.inner.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(Error::ReadOnly {
                attempted: attempted.to_owned(),
                source: None,
            }),
        }
    }

    /// Reads the index objects that are new. Where one has vanished, all are read again, so that nothing
    /// stays known that only that one said.
    pub(crate) fn refresh_index(&self) -> Result<()> {
        for _ in 0..MOVED_TRIES {
            let listed = self.io.list(INDEXES)?;
            let names: BTreeSet<String> = listed.iter().map(|o| o.name.clone()).collect();
            if !self.read_index().objects.is_subset(&names) {
                return self.reload_index();
            }
            if self.load_new(&listed)? {
                return Ok(());
            }
        }
        Err(self.keeps_moving(INDEXES))
    }

    /// Forgets the index and reads every index object again. Whoever asks meanwhile waits: half an index
    /// would not name what is there.
    pub(crate) fn reload_index(&self) -> Result<()> {
        let mut index = self.write_index();
        for _ in 0..MOVED_TRIES {
            *index = Index::default();
            if self.load_all(&mut index)? {
                return Ok(());
            }
        }
        Err(self.keeps_moving(INDEXES))
    }

    /// Loads every index object; `false` when one of them has vanished meanwhile.
    fn load_all(&self, index: &mut Index) -> Result<bool> {
        for object in self.io.list(INDEXES)? {
            if !take_in(index, &object, self.load_index_object(&object))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Loads what is not loaded; `false` when one of them has vanished meanwhile.
    fn load_new(&self, listed: &[Listed]) -> Result<bool> {
        self.write_index().damaged.clear();
        for object in listed {
            if self.read_index().objects.contains(&object.name) {
                continue;
            }
            let loaded = self.load_index_object(object);
            if !take_in(&mut self.write_index(), object, loaded)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// One index object, from the cache if it is there whole.
    pub(crate) fn load_index_object(&self, object: &Listed) -> Result<Vec<IndexedPack>> {
        if let Some(packs) = self.cached_index(&object.name) {
            return Ok(packs);
        }
        let (bytes, packs) = self.fetch_index_object(object)?;
        self.keep_in_cache(&object.name, &bytes);
        Ok(packs)
    }

    /// One index object as it is in the store itself.
    pub(crate) fn fetch_index_object(&self, object: &Listed) -> Result<(Bytes, Vec<IndexedPack>)> {
        let bytes = self.io.get(&object.path, index::INDEX_BYTES_MAX)?;
        let name = Hash::of(&bytes).to_string();
        if name != object.name {
            let found = format!("its content has the name {name}");
            return Err(Error::damaged(&object.path, found));
        }
        match index::decode(&bytes) {
            Ok(packs) => Ok((bytes, packs)),
            Err(found) => Err(Error::damaged(&object.path, found)),
        }
    }

    fn cached_index(&self, name: &str) -> Option<Vec<IndexedPack>> {
        let hash: Hash = name.parse().ok()?;
        let path = self.inner.cache.as_ref()?.join(name);
        let bytes = std::fs::read(path).ok()?;
        if Hash::of(&bytes) != hash {
            warn!(name, "a damaged index object in the cache is ignored");
            return None;
        }
        index::decode(&bytes).ok()
    }

    /// The cache only saves time: a failure to write it is told, not fatal.
    fn keep_in_cache(&self, name: &str, bytes: &[u8]) {
        use stead_sys::durable::{Existing, publish};
        let Some(folder) = &self.inner.cache else {
            return;
        };
        if let Err(error) = publish(&folder.join(name), 0o600, bytes, Existing::Replace) {
            warn!(%error, name, "cannot keep an index object in the cache");
        }
    }

    /// Removes index objects from the cache that the store no longer has.
    pub(crate) fn trim_cache(&self) {
        let Some(folder) = &self.inner.cache else {
            return;
        };
        let Ok(entries) = std::fs::read_dir(folder) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let stale = name.parse::<Hash>().is_ok() && !self.read_index().objects.contains(&name);
            if stale && let Err(error) = stead_sys::durable::remove_file(&entry.path()) {
                warn!(%error, name, "cannot remove a stale index object from the cache");
            }
        }
    }

    pub(crate) fn read_index(&self) -> std::sync::RwLockReadGuard<'_, Index> {
        let index = self.inner.index.read();
        index.unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write_index(&self) -> std::sync::RwLockWriteGuard<'_, Index> {
        let index = self.inner.index.write();
        index.unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn keeps_moving(&self, what: &str) -> Error {
        Error::ObjectMissing {
            object: format!(
                "{what} of {} (they kept changing while read)",
                self.io.url()
            ),
            affects: None,
        }
    }

    pub(crate) fn unknown(&self, what: &'static str, hash: &Hash) -> Error {
        Error::Unknown {
            what,
            hash: *hash,
            damaged_indexes: self.read_index().damaged.keys().cloned().collect(),
            affects: None,
        }
    }

    /// One frame, checked against its checksum and decompressed; its chunks are not checked yet.
    pub(crate) fn read_frame(&self, pack: &KnownPack, frame: u32) -> Result<Bytes> {
        let object = pack_path(&pack.name);
        let known = &pack.frames[frame as usize];
        let end = known.offset + u64::from(known.entry.stored_bytes.get());
        let stored = self.io.get_range(&object, known.offset..end)?;
        pack::decode_frame(&known.entry, stored)
            .map_err(|found| Error::damaged(object, format!("{found} (frame {frame})")))
    }

    fn kept_frame(&self, pack: &KnownPack, frame: u32) -> Result<Bytes> {
        let key = (pack.name, frame);
        let lock = || {
            self.inner
                .frames
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        if let Some((_, raw)) = lock().iter().find(|(k, _)| *k == key) {
            return Ok(raw.clone());
        }
        let raw = self.read_frame(pack, frame)?;
        let mut frames = lock();
        frames.push_back((key, raw.clone()));
        if frames.len() > FRAMES_KEPT {
            frames.pop_front();
        }
        Ok(raw)
    }

    /// The node in one of its places.
    fn node_at(&self, pack: &KnownPack, location: Location, hash: &Hash) -> Result<Node> {
        let raw = self.kept_frame(pack, location.frame)?;
        let wrong = |found: &str| {
            let found = format!("{found} ({hash})");
            Error::damaged(pack_path(&pack.name), found)
        };
        if pack.kind != PackKind::Nodes {
            return Err(wrong("a pack of chunks where a node should be"));
        }
        let bytes = checked_chunk(pack, location, &raw, hash)?;
        Node::decode(&bytes).map_err(wrong)
    }
}

/// Adds what an index object says; `false` when it has vanished since it was listed.
fn take_in(index: &mut Index, object: &Listed, loaded: Result<Vec<IndexedPack>>) -> Result<bool> {
    match loaded {
        Ok(packs) => {
            packs.iter().for_each(|pack| index.add(pack));
            index.objects.insert(object.name.clone());
        }
        Err(Error::ObjectMissing { .. }) => return Ok(false),
        Err(Error::Damaged { object, found, .. }) => {
            warn!(object, found, "damaged index object");
            index.damaged.insert(object, found);
        }
        Err(error) => return Err(error),
    }
    Ok(true)
}

/// The bytes of one chunk within its uncompressed frame, proven to be what its name says.
pub(crate) fn checked_chunk(
    pack: &KnownPack,
    location: Location,
    raw: &Bytes,
    hash: &Hash,
) -> Result<Bytes> {
    let start = location.offset as usize;
    let bytes = raw.slice(start..start + location.bytes as usize);
    let name = pack.kind.hash(&bytes);
    if name == *hash {
        return Ok(bytes);
    }
    let found = format!(
        "frame {} holds {name} where its table says {hash}",
        location.frame
    );
    Err(Error::damaged(pack_path(&pack.name), found))
}

impl Nodes for Core {
    fn node(&self, hash: &Hash) -> Result<Arc<Node>> {
        let mut tried = Tried::default();
        for _ in 0..MOVED_TRIES {
            while let Some((pack, location)) = self.find(hash, &tried) {
                let error = match self.node_at(&pack, location, hash) {
                    Ok(node) => return Ok(Arc::new(node)),
                    Err(error) => error,
                };
                let loss = Loss::of(&pack, location.frame, error)?;
                self.suspect(&loss);
                tried.add(loss);
            }
            if self.look_again(hash, &tried)?.is_none() {
                return Err(tried.error().unwrap_or_else(|| self.unknown("node", hash)));
            }
        }
        Err(self.keeps_moving("nodes"))
    }
}

/// The name of a listed pack; none if readers would not find it under that name where it lies.
pub(crate) fn pack_name(object: &Listed) -> Option<Hash> {
    let name = object.name.parse().ok()?;
    (object.path == pack_path(&name)).then_some(name)
}

/// The packs that are in the store: name and size in bytes.
pub(crate) fn list_packs(io: &Io) -> Result<BTreeMap<Hash, u64>> {
    let listed = io.list(PACKS)?;
    let packs = listed
        .iter()
        .filter_map(|object| Some((pack_name(object)?, object.bytes)));
    Ok(packs
        .filter(|(_, bytes)| *bytes <= LENGTH_BYTES_MAX)
        .collect())
}
