//! One image file, open for reading: what it says about each byte of the virtual disk.
//!
//! A layer must not be written while it is open: tables are kept in memory. Frozen layers are not.
//! Opening and reading never writes.

mod extents;

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use stead_sys::storage::Storage;

use crate::cache::SliceCache;
use crate::decompress::decompress;
use crate::directory::InternalSnapshot;
use crate::entry::CompressedCluster;
use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::header::{Header, SECTOR_BYTES, V3_HEADER_BYTES, to_u64, to_usize};
use crate::units::{ClusterSize, GuestOffset, HostOffset};

pub use extents::{Extent, ExtentKind, Extents};

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

    /// As [`Layer::inspect`], from a storage; `path` is only for texts.
    ///
    /// # Errors
    /// As [`Layer::inspect`].
    pub fn inspect_storage(storage: Arc<dyn Storage>, path: &Path) -> Result<Self> {
        Self::new(ImageFile::on(storage, path)?)
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
