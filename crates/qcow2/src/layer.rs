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

/// What every view of one file shares.
#[derive(Debug)]
struct Shared {
    file: ImageFile,
    /// Where guest data lies, when that is another file; `None` also when it was not opened.
    data: Option<ImageFile>,
    header: Header,
    active_l1: Arc<[u64]>,
    slices: SliceCache,
    decompressed: Mutex<Decompressed>,
}

/// A qcow2 image, open for reading: its active state, or one of its internal snapshots
/// ([`Layer::view_of`]). Usable from several threads.
#[derive(Debug)]
pub struct Layer {
    shared: Arc<Shared>,
    l1: Arc<[u64]>,
    virtual_size: u64,
    vm_state_bytes: u64,
}

impl Layer {
    /// Opens the image at `path`. The backing file that its header may name is not touched.
    ///
    /// An image that is marked dirty or corrupt opens; see [`Header::dirty`], [`Header::corrupt`].
    ///
    /// # Errors
    /// When it cannot be read, is no qcow2 image, needs something that is not supported, its guest data
    /// cannot be read from it ([`Error::Encrypted`], [`Error::ExternalDataFile`]), or its header or L1
    /// table are not valid.
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

    /// As [`Layer::open`], with the guest data in the file at `data`, as the header must say.
    ///
    /// # Errors
    /// As [`Layer::open`]; [`Error::NoExternalData`] when the image keeps guest data itself.
    pub fn open_with_data(path: &Path, data: &Path) -> Result<Self> {
        let layer = Self::inspect(path)?.with_data(ImageFile::open(data)?)?;
        layer.require_readable()?;
        Ok(layer)
    }

    pub(crate) fn inspect_image(file: ImageFile) -> Result<Self> {
        Self::new(file)
    }

    /// The same layer with its guest data. No view was made of it yet.
    pub(crate) fn with_data(self, data: ImageFile) -> Result<Self> {
        let path = self.path().to_owned();
        let Some(shared) = Arc::into_inner(self.shared) else {
            unreachable!("a layer that was just opened has no other view");
        };
        if shared.header.external_data.is_none() {
            let data = data.path().to_owned();
            return Err(Error::NoExternalData { path, data });
        }
        let shared = Arc::new(Shared {
            data: Some(data),
            ..shared
        });
        Ok(Self { shared, ..self })
    }

    /// Opens the image at `path` for what needs no guest data: its header, its directories and
    /// [`check`](crate::check()). Encrypted images and those with an external data file open, too;
    /// reading guest data from them is refused.
    ///
    /// # Errors
    /// As [`Layer::open`], but for what is said above.
    pub fn inspect(path: &Path) -> Result<Self> {
        Self::new(ImageFile::open(path)?)
    }

    /// As [`Layer::inspect`], from an open file; `path` is only for texts.
    ///
    /// # Errors
    /// As [`Layer::inspect`].
    pub fn inspect_file(file: File, path: &Path) -> Result<Self> {
        Self::new(ImageFile::new(file, path)?)
    }

    /// As [`Layer::open`], from a storage; `path` is only for texts.
    ///
    /// # Errors
    /// As [`Layer::open`].
    pub fn from_storage(storage: Arc<dyn Storage>, path: &Path) -> Result<Self> {
        Self::from_image_file(ImageFile::on(storage, path)?)
    }

    fn from_image_file(file: ImageFile) -> Result<Self> {
        let layer = Self::new(file)?;
        layer.require_readable()?;
        Ok(layer)
    }

    fn new(file: ImageFile) -> Result<Self> {
        let header = read_header(&file)?;
        Self::with_header(file, header)
    }

    /// Opens the image in `file` as if `header` stood at its start.
    pub(crate) fn with_header(file: ImageFile, header: Header) -> Result<Self> {
        check_refcount_table(&file, &header)?;
        let entries = to_usize(u64::from(header.l1_entries));
        let l1 = file.read_words("the L1 table", header.l1_table, entries)?;
        let l1: Arc<[u64]> = l1.into();
        let layer = Self {
            l1: Arc::clone(&l1),
            virtual_size: header.virtual_size,
            vm_state_bytes: 0,
            shared: Arc::new(Shared {
                file,
                data: None,
                header,
                active_l1: l1,
                slices: SliceCache::default(),
                decompressed: Mutex::new(None),
            }),
        };
        layer.check_l1()?;
        Ok(layer)
    }

    /// Guest data can be read: it is not encrypted, and not in a file that was not opened.
    pub(crate) fn require_readable(&self) -> Result<()> {
        let path = self.path().to_owned();
        if let Some(method) = self.header().encryption {
            let method = method.name().to_owned();
            return Err(Error::Encrypted { path, method });
        }
        match &self.header().external_data {
            Some(data) if self.shared.data.is_none() => Err(Error::ExternalDataFile {
                path,
                name: data.name.as_deref().map_or_else(
                    || "no name given".into(),
                    |name| String::from_utf8_lossy(name).into_owned(),
                ),
            }),
            Some(_) | None => Ok(()),
        }
    }

    /// The disk as it was when `snapshot` was made: same file, its own tables and length.
    ///
    /// Only guest data differs: [`Layer::header`], the directories and [`check`](crate::check()) are those
    /// of the whole image. Tables are cached once for all views.
    ///
    /// # Errors
    /// When the internal snapshot's L1 table cannot be read or is not valid, or is too short for its
    /// disk.
    pub fn view_of(&self, snapshot: &InternalSnapshot) -> Result<Self> {
        let virtual_size = snapshot.virtual_size.unwrap_or(self.header().virtual_size);
        self.check_snapshot_size(snapshot, virtual_size)?;
        let what = "the L1 table of an internal snapshot";
        self.require_cluster(what, snapshot.l1_table, snapshot.l1_bytes())?;
        let entries = to_usize(u64::from(snapshot.l1_entries));
        let file = &self.shared.file;
        let l1 = file.read_words(what, snapshot.l1_table, entries)?;
        let layer = Self {
            shared: Arc::clone(&self.shared),
            l1: l1.into(),
            virtual_size,
            vm_state_bytes: snapshot.vm_state_bytes,
        };
        layer.check_l1()?;
        Ok(layer)
    }

    fn check_snapshot_size(&self, snapshot: &InternalSnapshot, size: u64) -> Result<()> {
        let invalid = |field, found, expected: String| {
            Err(Error::InvalidField {
                path: self.path().to_owned(),
                field,
                found,
                expected,
            })
        };
        if !size.is_multiple_of(SECTOR_BYTES) || size > i64::MAX.unsigned_abs() {
            let expected = "a multiple of 512 below 2^63".into();
            return invalid("snapshot disk size", size, expected);
        }
        let coverage = self.header().l2_coverage();
        let needed = size
            .div_ceil(coverage)
            .saturating_add(snapshot.vm_state_bytes.div_ceil(coverage));
        let found = u64::from(snapshot.l1_entries);
        if found < needed {
            let expected = format!("at least {needed} for its disk and VM state");
            return invalid("snapshot l1_size", found, expected);
        }
        Ok(())
    }

    /// How many bytes of VM state this view has: 0 for the active state, and for an internal snapshot
    /// of a disk alone.
    #[must_use]
    pub fn vm_state_bytes(&self) -> u64 {
        self.vm_state_bytes
    }

    /// Reads VM state from `offset` on. It lies in the view's tables behind the disk's last table.
    ///
    /// # Errors
    /// When the range is not in the VM state, or a table or cluster on the way is not valid.
    pub fn read_vm_state(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let length = to_u64(bytes.len());
        let end = offset.checked_add(length);
        if end.is_none_or(|end| end > self.vm_state_bytes) {
            return Err(Error::OutOfDisk {
                start: GuestOffset(offset),
                length,
                disk_length: self.vm_state_bytes,
            });
        }
        let coverage = self.header().l2_coverage();
        let start = self.virtual_size.div_ceil(coverage) * coverage;
        let (mut at, mut rest) = (start + offset, bytes);
        while !rest.is_empty() {
            let limit = at + to_u64(rest.len());
            let extent = self.status_within(at, limit, false)?.extent;
            let (here, behind) = rest.split_at_mut(to_usize(extent.length));
            self.read_extent(extent.kind, here)?;
            (at, rest) = (extent.end(), behind);
        }
        Ok(())
    }

    fn read_extent(&self, kind: ExtentKind, bytes: &mut [u8]) -> Result<()> {
        match kind {
            ExtentKind::Data(place) => self.read_data(place, bytes),
            ExtentKind::Compressed { cluster, skip } => self.read_compressed(cluster, skip, bytes),
            ExtentKind::Zero | ExtentKind::Unallocated => {
                bytes.fill(0);
                Ok(())
            }
        }
    }

    /// Keeps at most this many bytes of L2 tables in memory from now on, for all views of the file together;
    /// [`DEFAULT_CACHE_BYTES`](crate::DEFAULT_CACHE_BYTES) if nothing is said, and never less than one piece of 16 KiB.
    pub fn set_cache_bytes(&self, bytes: u64) {
        self.shared.slices.set_limit(bytes);
    }

    /// The decoded header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.shared.header
    }

    /// The file's path, as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.shared.file.path()
    }

    /// The virtual disk's length in bytes, in this view.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// The cluster size.
    #[must_use]
    pub fn cluster_size(&self) -> ClusterSize {
        self.shared.header.cluster_size
    }

    /// The file's length in bytes, when it was opened.
    #[must_use]
    pub fn file_length(&self) -> u64 {
        self.shared.file.length()
    }

    /// The file that [`ExtentKind::Data`] points into: the image itself, or its external data file.
    ///
    /// # Errors
    /// When guest data is encrypted or in a file that was not opened, or lies in another storage than a file.
    pub fn data_file(&self) -> Result<&File> {
        self.require_readable()?;
        self.data().file().ok_or_else(|| {
            let source = std::io::ErrorKind::Unsupported.into();
            Error::io("use as a file", self.data().path(), source)
        })
    }

    /// The path of [`Layer::data_file`], as it was given.
    #[must_use]
    pub fn data_path(&self) -> &Path {
        self.data().path()
    }

    /// The image itself, or its external data file.
    pub(crate) fn data(&self) -> &ImageFile {
        self.shared.data.as_ref().unwrap_or(&self.shared.file)
    }

    pub(crate) fn file(&self) -> &ImageFile {
        &self.shared.file
    }

    /// The external data file, when there is one and it was opened.
    pub(crate) fn external_data(&self) -> Option<&ImageFile> {
        self.shared.data.as_ref()
    }

    /// The L1 table of the active state, whatever this is a view of.
    pub(crate) fn active_l1(&self) -> &[u64] {
        &self.shared.active_l1
    }

    /// The L1 table of this view.
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
        Ok(self.status_within(at.0, self.virtual_size, false)?.extent)
    }

    /// As [`Layer::extent_at`], up to `limit`, which the L1 table covers; with the room that the file keeps
    /// for bytes that are not data. When `exact`, pieces are joined only if that room is joined, too.
    pub(crate) fn status_within(&self, at: u64, limit: u64, exact: bool) -> Result<Status> {
        let index = at / self.header().l2_coverage();
        match self.l1_entry(index)? {
            None => Ok(self.unallocated_run(at, index, limit)),
            Some(entry) => self.status_in_table(at, entry, limit, exact),
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
        self.require_readable()?;
        self.data().read("guest data", at, bytes)
    }

    /// Reads bytes of a compressed cluster, `skip` bytes into it.
    pub(crate) fn read_compressed(
        &self,
        cluster: CompressedCluster,
        skip: u64,
        bytes: &mut [u8],
    ) -> Result<()> {
        self.require_readable()?;
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
        let file = &self.shared.file;
        let there = file.length().saturating_sub(cluster.host.0);
        let length = cluster.max_length.min(there);
        let mut compressed = vec![0; to_usize(length)];
        file.read("a compressed cluster", cluster.host, &mut compressed)?;
        let method = self.header().compression;
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
        self.shared
            .decompressed
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
        let guest = GuestOffset(index.saturating_mul(self.header().l2_coverage()));
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
        self.shared.file.require(what, at, length)
    }

    /// From `at` to where the next L2 table begins, or `limit`.
    fn unallocated_run(&self, at: u64, index: u64, limit: u64) -> Status {
        let coverage = self.header().l2_coverage();
        let rest = &self.l1[to_usize(index)..];
        let empty = rest.iter().take_while(|word| **word == 0).count();
        // An entry may be only a flag without an offset: then it is one empty table.
        let empty = to_u64(empty.max(1));
        let end = (index + empty).saturating_mul(coverage);
        Status {
            extent: Extent {
                start: GuestOffset(at),
                length: end.min(limit) - at,
                kind: ExtentKind::Unallocated,
            },
            kept: None,
        }
    }

    fn status_in_table(&self, at: u64, entry: L1Entry, limit: u64, exact: bool) -> Result<Status> {
        let view = self.slice_for(at, entry)?;
        let mut status = self.piece(&view, at, limit)?;
        let end = view.end.min(limit);
        while status.extent.end() < end {
            // An invalid entry behind this extent is reported when it is asked for.
            let Ok(next) = self.piece(&view, status.extent.end(), limit) else {
                break;
            };
            let goes_on = status.extent.continues_with(&next.extent.kind);
            if !goes_on || (exact && !status.room_continues_with(&next)) {
                break;
            }
            status.extent.length += next.extent.length;
        }
        Ok(status)
    }

    fn slice_for(&self, at: u64, entry: L1Entry) -> Result<SliceView> {
        let slice_bytes = SLICE_BYTES.min(self.cluster_size().bytes());
        let per_slice = slice_bytes / self.header().l2_entry_bytes();
        let cluster = at >> self.cluster_size().bits();
        let in_table = cluster % self.header().l2_entries();
        let slice_index = in_table / per_slice;
        let place = HostOffset(entry.table.0 + slice_index * slice_bytes);
        let words = self.shared.slices.get(place, || {
            self.shared
                .file
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

    /// What one entry, or one run of like subclusters in it, says from `at` on, up to `limit`.
    fn piece(&self, view: &SliceView, at: u64, limit: u64) -> Result<Status> {
        let size = self.cluster_size();
        let (word, bitmap) = self.words(view, at);
        let entry = L2Entry::decode(self.header(), word, bitmap)
            .map_err(|reason| self.invalid_entry("L2 entry", GuestOffset(at), word, reason))?;
        let within = size.offset_in(at);
        let (state, host, end) = match entry {
            L2Entry::Compressed(cluster) => return self.compressed_piece(cluster, at, limit),
            L2Entry::Whole { state, host, .. } => (state, host, size.bytes()),
            L2Entry::Sub { bitmap, host, .. } => {
                let sub = size.bytes() / SUBCLUSTERS;
                let first = within / sub;
                let state = bitmap.state(first);
                let like = (first..SUBCLUSTERS).take_while(|index| bitmap.state(*index) == state);
                (state, host, (first + to_u64(like.count())) * sub)
            }
        };
        let length = (end - within).min(limit - at);
        let kind = kind_of(state, host, within);
        if let ExtentKind::Data(place) = kind {
            self.require_data(HostOffset(place.0 - within), within + length)?;
        }
        let room = host.map(|host| HostOffset(host.0 + within));
        Ok(Status {
            extent: Extent {
                start: GuestOffset(at),
                length,
                kind,
            },
            kept: room.filter(|_| state != Standard::Data),
        })
    }

    fn compressed_piece(&self, cluster: CompressedCluster, at: u64, limit: u64) -> Result<Status> {
        let file = &self.shared.file;
        file.require("a compressed cluster", cluster.host, 1)?;
        let skip = self.cluster_size().offset_in(at);
        Ok(Status {
            extent: Extent {
                start: GuestOffset(at),
                length: (self.cluster_size().bytes() - skip).min(limit - at),
                kind: ExtentKind::Compressed { cluster, skip },
            },
            kept: None,
        })
    }

    /// The first `length` bytes of the data cluster at `at` lie in the file that holds guest data. Where that
    /// file was not opened, only the place is checked.
    fn require_data(&self, at: HostOffset, length: u64) -> Result<()> {
        if self.header().external_data.is_some() && self.shared.data.is_none() {
            return self.require_cluster(
                "guest data",
                HostOffset(self.cluster_size().offset_in(at.0)),
                0,
            );
        }
        if self.cluster_size().offset_in(at.0) != 0 {
            return self.require_cluster("guest data", at, length);
        }
        self.data().require("guest data", at, length)
    }

    fn words(&self, view: &SliceView, at: u64) -> (u64, u64) {
        let index = to_usize((at - view.start) >> self.cluster_size().bits());
        if self.header().extended_l2 {
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

/// An extent, and the room that the file keeps for it when it is not data.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Status {
    pub extent: Extent,
    pub kept: Option<HostOffset>,
}

impl Status {
    fn room_continues_with(&self, next: &Self) -> bool {
        let expected = self
            .kept
            .map(|here| here.0.saturating_add(self.extent.length));
        expected == next.kept.map(|there| there.0)
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
