//! New images: an empty overlay, or a whole image written once from front to back.
//!
//! ```text
//! cluster  0        header, extensions, backing name       written last
//!          1..      L1 table                               written at the end
//!          ..       data clusters, in guest order; behind the clusters of an L2 table, the table
//!          ..       refcount blocks, refcount table        written at the end
//! ```
//! Every cluster of such an image has refcount one, and every L1 and L2 entry says so. The file
//! appears under its name only when it is whole and synced ([`stead_sys::durable`]).

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stead_sys::copy::is_zero;
use stead_sys::durable::{Existing, Partial};
use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use crate::chain::{Chain, LayerFormat};
use crate::entry::COPIED;
use crate::error::{Error, Result};
use crate::header::{
    MAGIC, MAX_BACKING_NAME_BYTES, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, RawHeader, SECTOR_BYTES,
    V3_HEADER_BYTES, extension, to_u64, to_usize,
};
use crate::units::{ClusterSize, GuestOffset};

/// The L2 entry of a cluster that reads as zeros and has no place in the file.
const ZERO_CLUSTER: u64 = 1;
/// Refcounts have 16 bits, as QEMU's.
const REFCOUNT_ORDER: u32 = 4;
const REFCOUNT_BYTES: u64 = 2;
/// Host offsets must fit the 56 bits of a table entry.
const MAX_FILE_BYTES: u64 = 1 << 56;
/// How many bytes one step of [`write_image`] reads and writes.
const STEP_BYTES: u64 = 2 << 20;

/// What a new image says about the file below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The name, at most 1023 bytes. QEMU takes it relative to the image's folder; a caller that
    /// gives QEMU the whole chain explicitly does not need it to be right.
    pub name: String,
    /// The format of the file below.
    pub format: LayerFormat,
}

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct ImageOptions {
    /// Permission bits of the file.
    pub mode: u32,
    /// The virtual disk's length in bytes, a multiple of 512.
    pub virtual_size: u64,
    /// The cluster size; [`ClusterSize::DEFAULT`] is 64 KiB.
    pub cluster_size: ClusterSize,
    /// The file below, if there is one.
    pub backing: Option<Backing>,
    /// Whether an earlier file under the name may be replaced.
    pub existing: Existing,
}

/// Makes an empty overlay of version 3 at `path`, which must not exist.
///
/// # Durability
/// When this returns `Ok`, the image and its name have been synced.
///
/// # Errors
/// When the file exists or cannot be written, or the format cannot express what was asked for:
/// then there is no new file.
pub fn create_overlay(
    path: &Path,
    mode: u32,
    virtual_size: u64,
    backing: Option<(&str, LayerFormat)>,
    cluster_size: ClusterSize,
) -> Result<File> {
    let backing = backing.map(|(name, format)| Backing {
        name: name.to_owned(),
        format,
    });
    let options = ImageOptions {
        mode,
        virtual_size,
        cluster_size,
        backing,
        existing: Existing::Keep,
    };
    ImageBuilder::create(path, options)?.finish()
}

/// Writes `ranges` of `from` as a new image at `path`: [`Chain::data`] without a backing file makes
/// a full copy, [`Chain::allocated`] over a backing file merges the top layers into one.
///
/// Ranges must be in order. They are widened to whole clusters, read through the chain, so what the
/// image says is right for every byte it defines. Clusters of zeros take no room.
///
/// # Durability
/// When this returns `Ok`, the image and its name have been synced.
///
/// # Errors
/// When reading fails, or as [`ImageBuilder`]; then there is no new file.
pub fn write_image(
    path: &Path,
    options: ImageOptions,
    from: &Chain,
    ranges: impl Iterator<Item = Result<Range<u64>>>,
) -> Result<File> {
    let size = options.cluster_size;
    let disk = options.virtual_size;
    let mut builder = ImageBuilder::create(path, options)?;
    let mut written = 0;
    for range in ranges {
        let range = range?;
        let start = size.start_of(range.start).max(written);
        let end = range.end.min(disk).next_multiple_of(size.bytes()).min(disk);
        if start < end {
            copy_range(&mut builder, from, start..end)?;
            written = end.next_multiple_of(size.bytes());
        }
    }
    builder.finish()
}

fn copy_range(builder: &mut ImageBuilder, from: &Chain, range: Range<u64>) -> Result<()> {
    let mut buffer = vec![0; to_usize(STEP_BYTES.min(range.end - range.start))];
    let mut at = range.start;
    while at < range.end {
        let length = STEP_BYTES.min(range.end - at);
        let bytes = &mut buffer[..to_usize(length)];
        let there = from.len().saturating_sub(at).min(length);
        let (data, behind) = bytes.split_at_mut(to_usize(there));
        from.read_at(if there == 0 { 0 } else { at }, data)?;
        behind.fill(0);
        builder.write(GuestOffset(at), bytes)?;
        at += length;
    }
    Ok(())
}

/// The L2 table being filled.
#[derive(Debug)]
struct OpenTable {
    index: u64,
    words: Vec<u64>,
}

/// Writes a new image from front to back; dropped before [`ImageBuilder::finish`], it leaves nothing.
#[derive(Debug)]
pub struct ImageBuilder {
    partial: Partial,
    path: PathBuf,
    options: ImageOptions,
    l1: Vec<u64>,
    table: Option<OpenTable>,
    /// The guest offset that may be written next.
    at: u64,
    /// The host cluster that is used next.
    next_cluster: u64,
}

impl ImageBuilder {
    /// Starts an image that will be at `path`.
    ///
    /// # Errors
    /// When the format cannot express `options` ([`Error::InvalidImage`]) or the temporary file
    /// cannot be created.
    pub fn create(path: &Path, options: ImageOptions) -> Result<Self> {
        let l1_entries = l1_entries(path, &options)?;
        first_cluster(path, &options, &Tables::default())?;
        let partial = Partial::create(path, options.mode)
            .map_err(|source| Error::io("create", path, source))?;
        let l1_clusters = options.cluster_size.count_for(l1_entries * 8);
        Ok(Self {
            partial,
            path: path.to_owned(),
            l1: vec![0; to_usize(l1_entries)],
            table: None,
            at: 0,
            next_cluster: 1 + l1_clusters,
            options,
        })
    }

    /// Writes guest data. Clusters that are all zeros are noted as such and take no room.
    ///
    /// # Errors
    /// When `at` lies before what was written, `at` or the length is not whole clusters (the end of
    /// the disk may cut the last one), the disk ends before the data, or writing fails.
    pub fn write(&mut self, at: GuestOffset, bytes: &[u8]) -> Result<()> {
        self.accept(at, to_u64(bytes.len()))?;
        let size = self.options.cluster_size;
        let mut guest = at.0;
        for run in bytes.chunks(size.buffer_len()) {
            if is_zero(run) {
                self.note_zero(guest)?;
            } else {
                self.write_cluster(guest, run)?;
            }
            guest += to_u64(run.len());
        }
        Ok(())
    }

    /// Says that a range is zeros, whatever the backing file holds there.
    ///
    /// # Errors
    /// As [`ImageBuilder::write`].
    pub fn write_zeros(&mut self, at: GuestOffset, length: u64) -> Result<()> {
        self.accept(at, length)?;
        if self.options.backing.is_none() {
            return Ok(());
        }
        let step = self.options.cluster_size.bytes();
        let mut guest = at.0;
        while guest < at.0 + length {
            self.note_zero(guest)?;
            guest += step;
        }
        Ok(())
    }

    /// Makes the image whole and lets it appear under its name.
    ///
    /// # Durability
    /// When this returns `Ok`, content, name and folder entry have been synced.
    ///
    /// # Errors
    /// When writing, syncing or renaming fails, or the file exists and may not be replaced; then
    /// there is no new file and an earlier one is as it was.
    pub fn finish(mut self) -> Result<File> {
        self.close_table()?;
        let size = self.options.cluster_size;
        let words: Vec<u8> = self.l1.iter().flat_map(|word| word.to_be_bytes()).collect();
        self.put(size.bytes(), &words)?;
        let tables = self.write_refcounts()?;
        let header = first_cluster(&self.path, &self.options, &tables)?;
        self.partial
            .file()
            .set_len(tables.clusters * size.bytes())
            .map_err(|source| Error::io("set the length of", &self.path, source))?;
        self.put(0, &header)?;
        let Self {
            partial,
            path,
            options,
            ..
        } = self;
        partial
            .publish(options.existing)
            .map_err(|source| Error::io("publish", &path, source))
    }

    fn accept(&mut self, at: GuestOffset, length: u64) -> Result<()> {
        let size = self.options.cluster_size;
        let disk = self.options.virtual_size;
        let Some(end) = at.0.checked_add(length).filter(|end| *end <= disk) else {
            return Err(Error::OutOfDisk {
                start: at,
                length,
                disk_length: disk,
            });
        };
        let whole = |offset| size.offset_in(offset) == 0;
        if at.0 < self.at || !whole(at.0) || !(whole(end) || end == disk) {
            let next = self.at;
            return self.invalid(format!(
                "a write of {length} bytes at {at} is not of whole clusters behind {next:#x}"
            ));
        }
        self.at = end;
        Ok(())
    }

    fn invalid<T>(&self, reason: String) -> Result<T> {
        Err(Error::InvalidImage {
            path: self.path.clone(),
            reason,
        })
    }

    fn note_zero(&mut self, guest: u64) -> Result<()> {
        if self.options.backing.is_none() {
            return Ok(());
        }
        self.set_entry(guest, ZERO_CLUSTER)
    }

    fn write_cluster(&mut self, guest: u64, bytes: &[u8]) -> Result<()> {
        // Making room for the entry may write the table before, so it comes first.
        self.open_table(guest)?;
        let host = self.allocate()?;
        self.put(host, bytes)?;
        self.set_entry(guest, host | COPIED)
    }

    fn set_entry(&mut self, guest: u64, word: u64) -> Result<()> {
        self.open_table(guest)?;
        let size = self.options.cluster_size;
        let entry = (guest >> size.bits()) % size.words();
        match &mut self.table {
            Some(table) => table.words[to_usize(entry)] = word,
            None => unreachable!("the table was just opened"),
        }
        Ok(())
    }

    fn open_table(&mut self, guest: u64) -> Result<()> {
        let size = self.options.cluster_size;
        let index = (guest >> size.bits()) / size.words();
        if self
            .table
            .as_ref()
            .is_some_and(|table| table.index == index)
        {
            return Ok(());
        }
        self.close_table()?;
        self.table = Some(OpenTable {
            index,
            words: vec![0; to_usize(size.words())],
        });
        Ok(())
    }

    fn close_table(&mut self) -> Result<()> {
        let Some(table) = self.table.take() else {
            return Ok(());
        };
        let host = self.allocate()?;
        let bytes: Vec<u8> = table.words.iter().flat_map(|w| w.to_be_bytes()).collect();
        self.put(host, &bytes)?;
        self.l1[to_usize(table.index)] = host | COPIED;
        Ok(())
    }

    /// The host offset of a new cluster.
    fn allocate(&mut self) -> Result<u64> {
        let host = self.next_cluster << self.options.cluster_size.bits();
        if host >= MAX_FILE_BYTES {
            return self.invalid("the file would be larger than 64 PiB".into());
        }
        self.next_cluster += 1;
        Ok(host)
    }

    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.partial
            .file()
            .write_all_at(bytes, at)
            .map_err(|source| Error::io("write", &self.path, source))
    }

    fn write_refcounts(&self) -> Result<Tables> {
        let size = self.options.cluster_size;
        let plan = RefcountPlan::new(self.next_cluster, size);
        if plan.table_clusters * size.bytes() > MAX_REFCOUNT_TABLE_BYTES {
            return self.invalid("its refcount table would be larger than 8 MiB".into());
        }
        let mut table = Vec::new();
        for block in 0..plan.blocks {
            let host = (self.next_cluster + block) << size.bits();
            let used = (plan.total - block * plan.per_block).min(plan.per_block);
            let mut bytes = vec![0; size.buffer_len()];
            let (counts, _none) = bytes.as_chunks_mut::<2>();
            counts[..to_usize(used)].fill(1_u16.to_be_bytes());
            self.put(host, &bytes)?;
            table.extend(host.to_be_bytes());
        }
        let refcount_table = (self.next_cluster + plan.blocks) << size.bits();
        self.put(refcount_table, &table)?;
        Ok(Tables {
            refcount_table,
            refcount_table_clusters: plan.table_clusters,
            clusters: plan.total,
        })
    }
}

/// How many clusters refcounts need for `used` clusters and for themselves.
struct RefcountPlan {
    per_block: u64,
    blocks: u64,
    table_clusters: u64,
    total: u64,
}

impl RefcountPlan {
    fn new(used: u64, size: ClusterSize) -> Self {
        let per_block = size.bytes() / REFCOUNT_BYTES;
        let mut plan = Self {
            per_block,
            blocks: 0,
            table_clusters: 0,
            total: used,
        };
        // Each round covers the clusters of the round before; a block covers at least 256, so the
        // sum settles.
        loop {
            plan.blocks = plan.total.div_ceil(per_block);
            plan.table_clusters = size.count_for(plan.blocks * 8);
            let total = used + plan.blocks + plan.table_clusters;
            if total == plan.total {
                return plan;
            }
            plan.total = total;
        }
    }
}

/// Where the parts that are written last have come to lie.
#[derive(Default)]
struct Tables {
    refcount_table: u64,
    refcount_table_clusters: u64,
    clusters: u64,
}

fn l1_entries(path: &Path, options: &ImageOptions) -> Result<u64> {
    let invalid = |reason: String| {
        Err(Error::InvalidImage {
            path: path.to_owned(),
            reason,
        })
    };
    let disk = options.virtual_size;
    if !disk.is_multiple_of(SECTOR_BYTES) {
        return invalid(format!(
            "its virtual size of {disk} bytes is not a multiple of 512"
        ));
    }
    let size = options.cluster_size;
    let entries = disk.div_ceil(size.words() << size.bits()).max(1);
    if entries * 8 > MAX_L1_BYTES {
        return invalid(format!(
            "{disk} bytes in clusters of {size} need an L1 table above 32 MiB; take larger clusters"
        ));
    }
    Ok(entries)
}

/// The header, its extensions and the backing name.
fn first_cluster(path: &Path, options: &ImageOptions, tables: &Tables) -> Result<Vec<u8>> {
    let extensions = extensions(options);
    let name = options.backing.as_ref().map_or("", |backing| &backing.name);
    let name_at = to_u64(V3_HEADER_BYTES + extensions.len());
    let fits = name_at + to_u64(name.len()) <= options.cluster_size.bytes();
    let name_length = u32::try_from(name.len()).unwrap_or(u32::MAX);
    let empty = options.backing.is_some() && name.is_empty();
    if empty || name_length > MAX_BACKING_NAME_BYTES || !fits {
        return Err(Error::InvalidImage {
            path: path.to_owned(),
            reason: format!(
                "a backing name of {} bytes is empty, longer than 1023 bytes, or does not fit \
                 the first cluster",
                name.len()
            ),
        });
    }
    let l1_entries = l1_entries(path, options)?;
    let header = RawHeader {
        magic: MAGIC,
        version: U32::new(3),
        backing_offset: U64::new(if name.is_empty() { 0 } else { name_at }),
        backing_length: U32::new(name_length),
        cluster_bits: U32::new(options.cluster_size.bits()),
        virtual_size: U64::new(options.virtual_size),
        encryption: U32::ZERO,
        l1_entries: U32::new(narrow(l1_entries)),
        l1_offset: U64::new(options.cluster_size.bytes()),
        refcount_table_offset: U64::new(tables.refcount_table),
        refcount_table_clusters: U32::new(narrow(tables.refcount_table_clusters)),
        internal_snapshots: U32::ZERO,
        snapshot_table_offset: U64::ZERO,
        incompatible: U64::ZERO,
        compatible: U64::ZERO,
        autoclear: U64::ZERO,
        refcount_order: U32::new(REFCOUNT_ORDER),
        header_length: U32::new(104),
    };
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(extensions);
    bytes.extend(name.as_bytes());
    Ok(bytes)
}

fn extensions(options: &ImageOptions) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(backing) = &options.backing {
        let format: &[u8] = match backing.format {
            LayerFormat::Raw => b"raw",
            LayerFormat::Qcow2 => b"qcow2",
        };
        bytes.extend(extension::BACKING_FORMAT.to_be_bytes());
        bytes.extend(narrow(to_u64(format.len())).to_be_bytes());
        bytes.extend(format);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend(extension::END.to_be_bytes());
    bytes.extend(0_u32.to_be_bytes());
    bytes
}

/// A number that a table's limit has bounded, as a field of 32 bits.
fn narrow(number: u64) -> u32 {
    match u32::try_from(number) {
        Ok(number) => number,
        Err(_too_large) => unreachable!("{number} was bounded before"),
    }
}
