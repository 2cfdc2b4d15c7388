//! One image file, open for reading: what it says about each byte of the virtual disk.
//!
//! A layer must not be written while it is open: tables are kept in memory. Frozen layers are not.
//! Opening and reading never writes.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use stead_sys::storage::Storage;

use crate::cache::{SLICE_BYTES, Slice, SliceCache};
use crate::decompress::decompress;
use crate::directory::InternalSnapshot;
use crate::entry::{CompressedCluster, L1Entry, L2Entry, SUBCLUSTERS, Standard};
use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::header::{Header, SECTOR_BYTES, V3_HEADER_BYTES, to_u64, to_usize};
use crate::units::{ClusterSize, GuestOffset, HostOffset};

/// What one layer says about a range of the virtual disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// The bytes lie in the file, one after the other from here.
    Data(HostOffset),
    /// The bytes are part of one compressed cluster.
    Compressed {
        /// Where the compressed bytes are.
        cluster: CompressedCluster,
        /// How far into the decompressed cluster the extent starts, in bytes.
        skip: u64,
    },
    /// The bytes are zeros, whatever lies below.
    Zero,
    /// The layer says nothing; the layer below is seen, or zeros.
    Unallocated,
}

/// A range of the virtual disk that is of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts.
    pub start: GuestOffset,
    /// How many bytes it has; never 0.
    pub length: u64,
    /// What it is.
    pub kind: ExtentKind,
}

impl Extent {
    fn end(&self) -> u64 {
        self.start.0 + self.length
    }

    /// Whether `next`, which starts at the end of this extent, goes on with it.
    fn continues_with(&self, next: &ExtentKind) -> bool {
        match (self.kind, next) {
            (ExtentKind::Data(here), ExtentKind::Data(there)) => {
                here.0.checked_add(self.length) == Some(there.0)
            }
            (ExtentKind::Zero, ExtentKind::Zero) => true,
            (ExtentKind::Unallocated, ExtentKind::Unallocated) => true,
            _ => false,
        }
    }
}

/// The last cluster that was decompressed.
type Decompressed = Option<(HostOffset, Arc<[u8]>)>;

/// A qcow2 image, open for reading. Usable from several threads.
#[derive(Debug)]
pub struct Layer {
    file: ImageFile,
    header: Header,
    l1: Vec<u64>,
    slices: SliceCache,
    decompressed: Mutex<Decompressed>,
}

impl Layer {
    /// Opens the image at `path`. The backing file that its header may name is not touched.
    ///
    /// An image that is marked dirty or corrupt opens; see [`Header::dirty`], [`Header::corrupt`].
    ///
    /// # Errors
    /// When it cannot be read, is no qcow2 image, needs something that is not supported, or its
    /// header or L1 table are not valid.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_image_file(ImageFile::open(path)?)
    }

    /// As [`Layer::open`], from an open file; `path` is only for texts.
    ///
    /// # Errors
    /// As [`Layer::open`].
    pub fn from_file(file: File, path: &Path) -> Result<Self> {
        Self::from_image_file(ImageFile::new(file, path)?)
    }

    /// As [`Layer::open`], from a storage; `path` is only for texts.
    ///
    /// # Errors
    /// As [`Layer::open`].
    pub fn from_storage(storage: Arc<dyn Storage>, path: &Path) -> Result<Self> {
        Self::from_image_file(ImageFile::on(storage, path)?)
    }

    /// The disk as an internal snapshot of this image keeps it.
    ///
    /// # Errors
    /// When the snapshot's L1 table cannot be read or is not valid.
    pub fn at_snapshot(&self, snapshot: &InternalSnapshot) -> Result<Self> {
        let mut header = self.header.clone();
        header.l1_table = snapshot.l1_table;
        header.l1_entries = snapshot.l1_entries;
        header.virtual_size = snapshot.virtual_size.unwrap_or(header.virtual_size);
        let entries = u64::from(header.l1_entries);
        let needed = header.virtual_size.div_ceil(header.l2_coverage());
        let sectors = header.virtual_size.is_multiple_of(SECTOR_BYTES);
        if entries < needed || !sectors || header.virtual_size > i64::MAX.unsigned_abs() {
            return Err(Error::InvalidField {
                path: self.path().to_owned(),
                field: "snapshot l1_size",
                found: entries,
                expected: format!("at least {needed}, for a disk of whole sectors below 2^63"),
            });
        }
        Self::with_header(self.file.clone(), header)
    }

    fn from_image_file(file: ImageFile) -> Result<Self> {
        let header = read_header(&file)?;
        Self::with_header(file, header)
    }

    /// Opens the image in `file` as if `header` stood at its start.
    pub(crate) fn with_header(file: ImageFile, header: Header) -> Result<Self> {
        check_refcount_table(&file, &header)?;
        let entries = to_usize(u64::from(header.l1_entries));
        let l1 = file.read_words("the L1 table", header.l1_table, entries)?;
        let layer = Self {
            file,
            header,
            l1,
            slices: SliceCache::default(),
            decompressed: Mutex::new(None),
        };
        layer.check_l1()?;
        Ok(layer)
    }

    /// The decoded header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file's path, as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The virtual disk's length in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.header.virtual_size
    }

    /// The cluster size.
    #[must_use]
    pub fn cluster_size(&self) -> ClusterSize {
        self.header.cluster_size
    }

    /// The file's length in bytes, when it was opened.
    #[must_use]
    pub fn file_length(&self) -> u64 {
        self.file.length()
    }

    pub(crate) fn file(&self) -> &ImageFile {
        &self.file
    }

    pub(crate) fn l1(&self) -> &[u64] {
        &self.l1
    }

    /// What the layer says about `at` and the bytes that follow in the same way.
    ///
    /// The extent starts at `at` and may be shorter than it could be (it ends where a table ends);
    /// [`Layer::extents`] joins such pieces.
    ///
    /// # Errors
    /// When `at` is not on the disk, a table cannot be read, or an entry is not valid or points out
    /// of the file.
    pub fn extent_at(&self, at: GuestOffset) -> Result<Extent> {
        if at.0 >= self.virtual_size() {
            return Err(Error::OutOfDisk {
                start: at,
                length: 1,
                disk_length: self.virtual_size(),
            });
        }
        let index = at.0 / self.header.l2_coverage();
        match self.l1_entry(index)? {
            None => self.unallocated_run(at, index),
            Some(entry) => self.extent_in_table(at, entry),
        }
    }

    /// All extents from `from` to the end of the disk, in order, neighbours of one kind joined.
    ///
    /// After an error the iterator ends.
    #[must_use]
    pub fn extents(&self, from: GuestOffset) -> Extents<'_> {
        Extents {
            layer: self,
            at: from.0,
            pending: None,
            failed: None,
        }
    }

    /// Reads bytes of a [`ExtentKind::Data`] extent.
    pub(crate) fn read_data(&self, at: HostOffset, bytes: &mut [u8]) -> Result<()> {
        self.file.read("guest data", at, bytes)
    }

    /// Reads bytes of a compressed cluster, `skip` bytes into it.
    pub(crate) fn read_compressed(
        &self,
        cluster: CompressedCluster,
        skip: u64,
        bytes: &mut [u8],
    ) -> Result<()> {
        let whole = self.decompressed(cluster)?;
        let skip = to_usize(skip);
        bytes.copy_from_slice(&whole[skip..skip + bytes.len()]);
        Ok(())
    }

    fn decompressed(&self, cluster: CompressedCluster) -> Result<Arc<[u8]>> {
        if let Some((at, whole)) = &*self.last_decompressed()
            && *at == cluster.host
        {
            return Ok(Arc::clone(whole));
        }
        let mut whole = vec![0; self.cluster_size().buffer_len()];
        let there = self.file.length().saturating_sub(cluster.host.0);
        let length = cluster.max_length.min(there);
        let mut compressed = vec![0; to_usize(length)];
        self.file
            .read("a compressed cluster", cluster.host, &mut compressed)?;
        let method = self.header.compression;
        decompress(method, &compressed, &mut whole).map_err(|reason| Error::Decompress {
            path: self.path().to_owned(),
            method: method.name(),
            at: cluster.host,
            reason,
        })?;
        let whole: Arc<[u8]> = whole.into();
        *self.last_decompressed() = Some((cluster.host, Arc::clone(&whole)));
        Ok(whole)
    }

    fn last_decompressed(&self) -> std::sync::MutexGuard<'_, Decompressed> {
        self.decompressed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Every L1 entry is valid, and no L2 table is used twice: so walking all tables takes time in
    /// proportion to the file, not to what a hostile file claims.
    fn check_l1(&self) -> Result<()> {
        let mut tables = Vec::new();
        for index in 0..to_u64(self.l1.len()) {
            tables.extend(self.l1_entry(index)?.map(|entry| entry.table));
        }
        tables.sort_unstable();
        match tables.windows(2).find(|pair| pair[0] == pair[1]) {
            None => Ok(()),
            Some(pair) => Err(Error::SharedL2Table {
                path: self.path().to_owned(),
                at: pair[0],
            }),
        }
    }

    fn l1_entry(&self, index: u64) -> Result<Option<L1Entry>> {
        let word = self.l1[to_usize(index)];
        let guest = GuestOffset(index.saturating_mul(self.header.l2_coverage()));
        let entry = L1Entry::decode(word)
            .map_err(|reason| self.invalid_entry("L1 entry", guest, word, reason))?;
        if let Some(entry) = entry {
            self.require_cluster("an L2 table", entry.table, self.cluster_size().bytes())?;
        }
        Ok(entry)
    }

    fn invalid_entry(
        &self,
        what: &'static str,
        guest: GuestOffset,
        entry: u64,
        reason: &'static str,
    ) -> Error {
        Error::InvalidEntry {
            path: self.path().to_owned(),
            what,
            guest,
            entry,
            reason,
        }
    }

    /// `at` is the start of a cluster whose first `length` bytes lie in the file.
    fn require_cluster(&self, what: &'static str, at: HostOffset, length: u64) -> Result<()> {
        if self.cluster_size().offset_in(at.0) != 0 {
            return Err(Error::Unaligned {
                path: self.path().to_owned(),
                what,
                at,
            });
        }
        self.file.require(what, at, length)
    }

    /// From `at` to where the next L2 table begins, or the disk ends.
    fn unallocated_run(&self, at: GuestOffset, index: u64) -> Result<Extent> {
        let coverage = self.header.l2_coverage();
        let rest = &self.l1[to_usize(index)..];
        let empty = rest.iter().take_while(|word| **word == 0).count();
        // An entry may be only a flag without an offset: then it is one empty table.
        let empty = to_u64(empty.max(1));
        let end = (index + empty).saturating_mul(coverage);
        Ok(Extent {
            start: at,
            length: end.min(self.virtual_size()) - at.0,
            kind: ExtentKind::Unallocated,
        })
    }

    fn extent_in_table(&self, at: GuestOffset, entry: L1Entry) -> Result<Extent> {
        let view = self.slice_for(at, entry)?;
        let mut extent = self.piece(&view, at)?;
        let end = view.end.min(self.virtual_size());
        while extent.end() < end {
            // An invalid entry behind this extent is reported when it is asked for.
            let Ok(next) = self.piece(&view, GuestOffset(extent.end())) else {
                break;
            };
            if !extent.continues_with(&next.kind) {
                break;
            }
            extent.length += next.length;
        }
        Ok(extent)
    }

    fn slice_for(&self, at: GuestOffset, entry: L1Entry) -> Result<SliceView> {
        let slice_bytes = SLICE_BYTES.min(self.cluster_size().bytes());
        let per_slice = slice_bytes / self.header.l2_entry_bytes();
        let cluster = at.0 >> self.cluster_size().bits();
        let in_table = cluster % self.header.l2_entries();
        let slice_index = in_table / per_slice;
        let place = HostOffset(entry.table.0 + slice_index * slice_bytes);
        let words = self.slices.get(place, || {
            self.file
                .read_words("an L2 table", place, to_usize(slice_bytes / 8))
        })?;
        let first_cluster = cluster - in_table % per_slice;
        let start = first_cluster << self.cluster_size().bits();
        Ok(SliceView {
            words,
            start,
            end: start.saturating_add(per_slice << self.cluster_size().bits()),
        })
    }

    /// What one entry, or one run of like subclusters in it, says from `at` on.
    fn piece(&self, view: &SliceView, at: GuestOffset) -> Result<Extent> {
        let size = self.cluster_size();
        let (word, bitmap) = self.words(view, at);
        let entry = L2Entry::decode(&self.header, word, bitmap)
            .map_err(|reason| self.invalid_entry("L2 entry", at, word, reason))?;
        let within = size.offset_in(at.0);
        let (kind, end) = match entry {
            L2Entry::Compressed(cluster) => {
                self.file.require("a compressed cluster", cluster.host, 1)?;
                let skip = within;
                (ExtentKind::Compressed { cluster, skip }, size.bytes())
            }
            L2Entry::Whole { state, host, .. } => (kind_of(state, host, within), size.bytes()),
            L2Entry::Sub { bitmap, host, .. } => {
                let sub = size.bytes() / SUBCLUSTERS;
                let first = within / sub;
                let state = bitmap.state(first);
                let like = (first..SUBCLUSTERS).take_while(|index| bitmap.state(*index) == state);
                let count = to_u64(like.count());
                (kind_of(state, host, within), (first + count) * sub)
            }
        };
        let length = (end - within).min(self.virtual_size() - at.0);
        if let ExtentKind::Data(place) = kind {
            let cluster = HostOffset(place.0 - within);
            self.require_cluster("guest data", cluster, within + length)?;
        }
        Ok(Extent {
            start: at,
            length,
            kind,
        })
    }

    fn words(&self, view: &SliceView, at: GuestOffset) -> (u64, u64) {
        let index = to_usize((at.0 - view.start) >> self.cluster_size().bits());
        if self.header.extended_l2 {
            (view.words[index * 2], view.words[index * 2 + 1])
        } else {
            (view.words[index], 0)
        }
    }
}

fn kind_of(state: Standard, host: Option<HostOffset>, within: u64) -> ExtentKind {
    match (state, host) {
        (Standard::Data, Some(host)) => ExtentKind::Data(HostOffset(host.0 + within)),
        (Standard::Data, None) => unreachable!("the entry was decoded, so data has an offset"),
        (Standard::Zero, _) => ExtentKind::Zero,
        (Standard::Unallocated, _) => ExtentKind::Unallocated,
    }
}

/// A slice and the guest range that it describes.
struct SliceView {
    words: Slice,
    start: u64,
    end: u64,
}

fn read_header(file: &ImageFile) -> Result<Header> {
    let mut first = vec![0; V3_HEADER_BYTES.min(to_usize(file.length().min(1 << 20)))];
    file.read("the header", HostOffset(0), &mut first)?;
    let cluster_size = Header::cluster_size_of(&first, file.path())?;
    let length = cluster_size.bytes().min(file.length());
    let mut first = vec![0; to_usize(length)];
    file.read("the header", HostOffset(0), &mut first)?;
    Header::decode(&first, file.path())
}

/// The refcount table lies in the file, but for the end of its last cluster.
fn check_refcount_table(file: &ImageFile, header: &Header) -> Result<()> {
    let clusters = u64::from(header.refcount_table_clusters);
    let but_last = (clusters - 1) * header.cluster_size.bytes();
    file.require("the refcount table", header.refcount_table, but_last + 8)
}

/// The extents of a layer in guest order; see [`Layer::extents`].
#[derive(Debug)]
pub struct Extents<'a> {
    layer: &'a Layer,
    at: u64,
    pending: Option<Extent>,
    failed: Option<Error>,
}

impl Extents<'_> {
    /// The next piece, or `None` at the end of the disk or at an error, which is kept.
    fn next_piece(&mut self) -> Option<Extent> {
        if let Some(extent) = self.pending.take() {
            return Some(extent);
        }
        if self.failed.is_some() || self.at >= self.layer.virtual_size() {
            return None;
        }
        match self.layer.extent_at(GuestOffset(self.at)) {
            Ok(extent) => {
                self.at = extent.end();
                Some(extent)
            }
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let Some(mut extent) = self.next_piece() else {
            let error = self.failed.take()?;
            self.at = u64::MAX;
            return Some(Err(error));
        };
        while let Some(next) = self.next_piece() {
            if !extent.continues_with(&next.kind) {
                self.pending = Some(next);
                break;
            }
            extent.length += next.length;
        }
        Some(Ok(extent))
    }
}
