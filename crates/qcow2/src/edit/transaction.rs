//! A transaction: clusters taken, data written, and what the parts of it share.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_sys::share::{Shared, clone_range};
use stead_sys::storage::Storage;
use stead_sys::{durable, readable};

use crate::backing_record::BackingRecord;
use crate::content::DiskContent;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::header::{Header, extension, to_u64, to_usize};
use crate::layer::Layer;
use crate::units::{ClusterSize, HostOffset};

use super::bitmaps::Bitmap;
use super::data::GuestFile;
use super::first::FirstCluster;
use super::in_place::InPlace;
use super::records::{self, SnapshotRecord};
use super::refcounts::{Refcounts, refused};
use super::room::{BLOCK_BYTES, NewBlocks};
use super::tables::{Tables, write_new};
use super::views::LoadedTable;

/// The new state of an image while it is built beside the old one; see the module.
///
/// Every method that says that it takes a cluster gives one that the old state does not use; every method
/// that writes asserts that it does not write over the old state.
#[derive(Debug)]
pub struct Edit<'a> {
    pub(super) path: PathBuf,
    pub(super) old: Arc<Layer>,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) plan: bool,
    pub(super) first: FirstCluster,
    pub(super) old_first: Vec<u8>,
    pub(super) tables: Tables,
    pub(super) counts: Refcounts,
    pub(super) active: Vec<u64>,
    pub(super) active_changed: bool,
    pub(super) loaded: Option<LoadedTable>,
    pub(super) snapshots: Vec<SnapshotRecord>,
    pub(super) snapshots_changed: bool,
    pub(super) bitmaps: Vec<Bitmap>,
    pub(super) bitmaps_changed: bool,
    pub(super) blocks: NewBlocks,
    /// Files below, by device and number, and whether their blocks can be shared.
    sharing: Vec<((u64, u64), bool)>,
    pub(super) in_place: InPlace,
    /// The external data file, if guest data lies in one.
    pub(super) guest: Option<GuestFile>,
    /// The raw file that is written in place, once the state is built.
    pub(super) target: Option<Arc<dyn Storage>>,
    /// Who watches, and may want the change to end.
    pub(super) control: Control<'a>,
}

/// What a transaction starts from.
pub(super) struct Start<'a> {
    pub path: &'a Path,
    pub old: &'a Arc<Layer>,
    pub old_first: &'a [u8],
    pub storage: Arc<dyn Storage>,
    pub plan: bool,
    pub cache_bytes: u64,
    pub blocks: NewBlocks,
    /// The old state is damaged, and this is its repair.
    pub damaged: bool,
    /// The external data file, if guest data lies in one that is open.
    pub guest: Option<GuestFile>,
    pub control: Control<'a>,
}

impl<'a> Edit<'a> {
    pub(super) fn new(start: Start<'a>) -> Result<Self> {
        let old = start.old;
        let size = old.cluster_size();
        let storage = start.storage;
        let tables = Tables::new(Arc::clone(&storage), start.path, size, start.cache_bytes);
        let bitmaps = match records::bitmaps(old) {
            // A repair drops them.
            Err(error) if start.damaged && !matches!(error, Error::Io { .. }) => Vec::new(),
            bitmaps => bitmaps?,
        };
        let bitmaps = bitmaps.into_iter().map(Bitmap::new);
        Ok(Self {
            path: start.path.to_owned(),
            old: Arc::clone(old),
            plan: start.plan,
            first: FirstCluster::decode(start.old_first, old.header()),
            old_first: start.old_first.to_vec(),
            tables,
            counts: Refcounts::new(old, start.damaged)?,
            active: old.l1().to_vec(),
            active_changed: false,
            loaded: None,
            snapshots: records::snapshots(old)?,
            snapshots_changed: false,
            bitmaps: bitmaps.collect(),
            bitmaps_changed: false,
            blocks: start.blocks,
            sharing: Vec::new(),
            in_place: InPlace::default(),
            target: None,
            guest: start.guest,
            control: start.control,
            storage,
        })
    }

    /// An error when the caller wants the change to end.
    pub(crate) fn go_on(&self) -> Result<()> {
        self.control.go_on(&self.path)
    }

    /// The old state, which stays as it is until the switch.
    #[must_use]
    pub fn old(&self) -> &Layer {
        &self.old
    }

    /// Whether this run only finds out how much room the change needs: data that is written is dropped, so
    /// it need not be read either.
    #[must_use]
    pub fn is_plan(&self) -> bool {
        self.plan
    }

    /// The virtual disk's length in the new state, in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.first.raw.virtual_size.get()
    }

    /// Names another backing file (name, format), or none. What the guest sees is the caller's care.
    pub fn set_backing(&mut self, backing: Option<(&[u8], Option<&[u8]>)>) {
        self.first.set_backing(backing);
    }

    /// Records what the backing file of the new state shows, or takes away what was recorded. A record stays when
    /// only the name changes: it is about the name that it holds (see [`BackingRecord`]).
    ///
    /// # Panics
    /// When something is to be recorded and there is no backing file.
    pub fn record_backing(&mut self, content: Option<DiskContent>) {
        let record = content.map(|content| {
            let name = self.first.backing_name();
            assert!(name.is_some(), "a record of no backing file");
            BackingRecord::new(name.unwrap_or_default(), content).encode()
        });
        self.first.set_extension(extension::BACKING_CONTENT, record);
    }

    pub(super) fn size(&self) -> ClusterSize {
        self.old.cluster_size()
    }

    /// What no transaction changes: cluster size, refcount width, kind of L2 entries.
    pub(super) fn shape(&self) -> &Header {
        self.old.header()
    }

    pub(super) fn refused(&self, operation: &'static str, reason: impl Into<String>) -> Error {
        refused(&self.path, operation, reason)
    }

    pub(super) fn io(&self, action: &'static str) -> impl FnOnce(io::Error) -> Error {
        let path = self.path.clone();
        move |source| Error::io(action, &path, source)
    }

    /// Takes `count` clusters in a row with refcount one. The new state must refer to them, or
    /// [`Edit::release`] them.
    ///
    /// # Errors
    /// When the file would become too large, or a table cannot be read or written.
    pub fn allocate(&mut self, count: u64) -> Result<HostOffset> {
        let first = self.counts.take_run(count)?;
        self.own(first, count)
    }

    /// Takes the first free clusters in a row, at most `most`, with refcount one: where, and how many.
    ///
    /// # Errors
    /// As [`Edit::allocate`].
    pub fn allocate_up_to(&mut self, most: u64) -> Result<(HostOffset, u64)> {
        let (first, count) = self.counts.take_up_to(most)?;
        Ok((self.own(first, count)?, count))
    }

    fn own(&mut self, first: u64, count: u64) -> Result<HostOffset> {
        for cluster in first..first + count {
            self.counts.add(cluster, 1, &mut self.tables)?;
        }
        self.note_taken()?;
        Ok(HostOffset(first << self.size().bits()))
    }

    /// As [`Edit::allocate`]; clusters from `end` on, in clusters, stay holes and are not counted as room.
    pub(super) fn allocate_holes(&mut self, count: u64, end: u64) -> Result<HostOffset> {
        let first = self.counts.take_run(count)?;
        let fresh = self.counts.take_fresh();
        let host = self.own(first, count)?;
        let bits = self.size().bits();
        for (start, taken) in fresh {
            let behind = match start == first {
                true => (start + taken).min(end.max(start)),
                false => start + taken,
            };
            if self.plan {
                let added = self.blocks.add(start << bits, (behind - start) << bits);
                added.map_err(self.io("find the holes of"))?;
            }
        }
        Ok(host)
    }

    /// Counts the room of what was taken.
    pub(super) fn note_taken(&mut self) -> Result<()> {
        let bits = self.size().bits();
        for (first, count) in self.counts.take_fresh() {
            if self.plan {
                let added = self.blocks.add(first << bits, count << bits);
                added.map_err(self.io("find the holes of"))?;
            }
        }
        Ok(())
    }

    /// Takes a reference away from each of `count` clusters.
    ///
    /// # Errors
    /// When there is none, or a table cannot be read or written.
    pub fn release(&mut self, at: HostOffset, count: u64) -> Result<()> {
        self.add_references(at, count, -1)
    }

    /// Adds a reference to each of `count` clusters.
    ///
    /// # Errors
    /// [`Error::RefcountOverflow`], or when a table cannot be read or written.
    pub fn share(&mut self, at: HostOffset, count: u64) -> Result<()> {
        self.add_references(at, count, 1)
    }

    pub(super) fn add_references(&mut self, at: HostOffset, count: u64, change: i64) -> Result<()> {
        let first = at.0 >> self.size().bits();
        for cluster in first..first + count {
            self.counts.add(cluster, change, &mut self.tables)?;
        }
        Ok(())
    }

    /// How many references the new state has to the cluster at `at`.
    ///
    /// # Errors
    /// When a refcount block cannot be read.
    pub fn references(&mut self, at: HostOffset) -> Result<u64> {
        let cluster = at.0 >> self.size().bits();
        self.counts.get(cluster, &mut self.tables)
    }

    /// Whether the cluster at `at` is one that the old state does not use, so that it may be written.
    ///
    /// # Errors
    /// When a refcount block cannot be read.
    pub fn is_new(&mut self, at: HostOffset) -> Result<bool> {
        self.counts.is_new(at.0 >> self.size().bits())
    }

    /// Writes bytes into clusters that this transaction took; guest data that may lie elsewhere by
    /// [`Edit::write_guest`].
    ///
    /// # Errors
    /// When writing fails.
    ///
    /// # Panics
    /// When a cluster belongs to the old state.
    pub fn write_data(&mut self, at: HostOffset, bytes: &[u8]) -> Result<()> {
        self.require_new(at, to_u64(bytes.len()))?;
        if self.plan {
            return Ok(());
        }
        let written = self.storage.write_all_at(bytes, at.0);
        written.map_err(self.io("write data of"))
    }

    /// Takes off the plan what new clusters of the image share with a file from `from` on, where the file system can
    /// share them.
    pub(super) fn note_shared(
        &mut self,
        at: HostOffset,
        source: &File,
        from: u64,
        length: u64,
    ) -> Result<()> {
        let aligned = [at.0, from, length].iter().all(|n| n % BLOCK_BYTES == 0);
        if !self.plan || !aligned || self.guest.is_some() || !self.can_share(source)? {
            return Ok(());
        }
        let shared = self.blocks.share(at.0, length);
        shared.map_err(self.io("find the holes of"))
    }

    /// Whether the image can have blocks of `source`: found by trying, with a file without a name beside the image.
    fn can_share(&mut self, source: &File) -> Result<bool> {
        let identity = readable::identity(source).map_err(self.io("identify a file below"))?;
        if let Some((_, can)) = self.sharing.iter().find(|(known, _)| *known == identity) {
            return Ok(*can);
        }
        let can = self.blocks.has_file() && self.try_share(source)?;
        self.sharing.push((identity, can));
        Ok(can)
    }

    fn try_share(&self, source: &File) -> Result<bool> {
        let block = Shared {
            from: 0,
            to: 0,
            length: BLOCK_BYTES,
        };
        let path = std::fs::canonicalize(&self.path).map_err(self.io("find"))?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        // Where no file can be made, nothing is known, and room for everything is asked for.
        let Ok(beside) = durable::nameless(folder) else {
            return Ok(false);
        };
        clone_range(source, &beside, block).map_err(self.io("share blocks with"))
    }

    /// Reads bytes of the file: those of the old state, or what this transaction wrote.
    pub(super) fn read(&self, at: HostOffset, bytes: &mut [u8]) -> Result<()> {
        let read = self.storage.read_exact_at(bytes, at.0);
        read.map_err(self.io("read"))
    }

    /// Writes tables into clusters that this transaction took; the last one is filled up with zeros.
    pub(super) fn write_tables(&mut self, at: HostOffset, mut bytes: Vec<u8>) -> Result<()> {
        let whole = to_u64(bytes.len()).next_multiple_of(self.size().bytes());
        bytes.resize(to_usize(whole), 0);
        self.require_new(at, whole)?;
        let written = write_new(self.storage.as_ref(), at, &bytes);
        written.map_err(self.io("write a table of"))
    }

    pub(super) fn require_new(&mut self, at: HostOffset, length: u64) -> Result<()> {
        let bits = self.size().bits();
        let behind = (at.0 + length).div_ceil(self.size().bytes());
        for cluster in at.0 >> bits..behind {
            let new = self.counts.is_new(cluster)?;
            assert!(new, "a write to a cluster of the old state, at {at}");
        }
        Ok(())
    }

    /// Writes a table of words into new clusters: where it is.
    pub(super) fn place_words(&mut self, words: &[u64]) -> Result<HostOffset> {
        let bytes = records::encode_words(words);
        self.place_bytes(bytes)
    }

    pub(super) fn place_bytes(&mut self, bytes: Vec<u8>) -> Result<HostOffset> {
        let clusters = self.size().count_for(to_u64(bytes.len()));
        if clusters == 0 {
            return Ok(HostOffset(0));
        }
        let at = self.allocate(clusters)?;
        self.write_tables(at, bytes)?;
        Ok(at)
    }

    /// Gives up the clusters of a table of `length` bytes.
    pub(super) fn release_bytes(&mut self, at: HostOffset, length: u64) -> Result<()> {
        let clusters = self.size().count_for(length);
        self.release(at, clusters)
    }
}
