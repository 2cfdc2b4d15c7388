//! Where everything of a new image goes. Pure: it decides, and whoever uses it writes.
//!
//! ```text
//! cluster  0        header, extensions, backing name       written last
//!          1..      L1 table                               written at the end
//!          ..       data clusters, in guest order; behind the clusters of an L2 table, the table
//!          ..       refcount blocks, refcount table        written at the end
//! ```
//! Clusters are taken from front to back, and calls come in guest order, so the same calls give the same
//! image, whoever writes it and in which order. The prediction of a file's length is a layout whose
//! tables nobody writes.
//!
//! Compressed clusters lie byte behind byte. One that does not fit its host cluster goes on in the next,
//! if that is free; else it starts in a new one.

use super::counts::{Counts, RefcountPlan};
use super::first::{Tables, first_cluster, narrow};
use super::options::{Geometry, Qcow2Options};
use crate::bitmap::{Bitmap, BitmapCluster};
use crate::entry::{self, COPIED};
use crate::error::Result;
use crate::header::{BitmapsExtension, MAX_REFCOUNT_TABLE_BYTES, SECTOR_BYTES, to_u64, to_usize};
use crate::units::HostOffset;

/// Host offsets must fit the 56 bits of a table entry, and those of compressed clusters of 2 MiB 49.
const MAX_FILE_BYTES: u64 = 1 << 49;
/// All subclusters of a cluster.
pub(crate) const ALL_SUBCLUSTERS: u32 = u32::MAX;

/// A table that is complete: where it goes, and its bytes.
pub(crate) type Table = (u64, Vec<u8>);

/// An L2 entry as it lies in a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub word: u64,
    /// The second word of an extended entry, else 0.
    pub subclusters: u64,
}

impl Entry {
    /// Whether it refers to bytes in the file.
    pub fn has_bytes(self) -> bool {
        let plain = self.word & entry::OFFSET != 0 && self.word & entry::ZERO == 0;
        plain || self.word & entry::COMPRESSED != 0
    }
}

/// The L1 table of an internal snapshot.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotTable {
    pub at: u64,
    pub l1: Vec<u64>,
}

/// What an image has beside its disk.
#[derive(Debug, Default)]
pub(crate) struct Extras<'a> {
    /// The table of internal snapshots, as bytes, and how many it has.
    pub snapshots: Vec<u8>,
    pub snapshot_count: u32,
    pub bitmaps: &'a [Bitmap],
}

/// The L2 table being filled.
#[derive(Debug)]
struct OpenTable {
    index: u64,
    words: Vec<u64>,
}

/// The clusters and tables of a new image.
#[derive(Debug)]
pub(crate) struct Layout {
    geometry: Geometry,
    /// The L1 table of the view being written.
    l1: Vec<u64>,
    /// The view is the active one, whose entries say where a refcount is one.
    active: bool,
    table: Option<OpenTable>,
    complete: Vec<Table>,
    counts: Counts,
    /// Where the next compressed byte may go, inside the last cluster that has some.
    packed_end: Option<u64>,
}

impl Layout {
    pub fn new(geometry: Geometry) -> Self {
        let mut counts = Counts::default();
        counts.take(1 + geometry.size.count_for(geometry.l1_entries * 8));
        Self {
            l1: vec![0; to_usize(geometry.l1_entries)],
            active: true,
            geometry,
            table: None,
            complete: Vec::new(),
            counts,
            packed_end: None,
        }
    }

    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Begins the view of an internal snapshot, with an L1 table of `entries`. Views come before the active
    /// one, so that its entries are written when all refcounts of what it shares are known.
    pub fn begin_snapshot(&mut self, entries: u64) {
        assert!(self.table.is_none(), "the view before was ended");
        assert!(
            !self.geometry.external,
            "an external data file has one view"
        );
        self.l1 = vec![0; to_usize(entries)];
        self.active = false;
    }

    /// Ends the view of an internal snapshot: its L1 table has a place, and is to be written.
    pub fn end_snapshot(&mut self) -> Result<SnapshotTable> {
        assert!(!self.active, "the view is that of an internal snapshot");
        self.close_table()?;
        let l1 = std::mem::replace(&mut self.l1, vec![0; to_usize(self.geometry.l1_entries)]);
        self.active = true;
        let clusters = self.geometry.size.count_for(to_u64(l1.len()) * 8);
        let at = self.take(clusters)? << self.geometry.size.bits();
        self.complete.push((at, self.padded(big_endian(&l1))));
        Ok(SnapshotTable { at, l1 })
    }

    /// Uses for the cluster at `guest` what an earlier view uses; `false` when a refcount cannot count it.
    pub fn share(&mut self, guest: u64, entry: Entry) -> Result<bool> {
        let clusters = self.clusters_of(entry.word);
        let most = self.geometry.most_references();
        if clusters
            .clone()
            .any(|cluster| self.counts.get(cluster) >= most)
        {
            return Ok(false);
        }
        self.open_table(guest)?;
        for cluster in clusters {
            self.counts.add(cluster);
        }
        self.set_entry(guest, entry.word & !COPIED, entry.subclusters);
        Ok(true)
    }

    /// The clusters of the file that an entry written here refers to.
    fn clusters_of(&self, word: u64) -> std::ops::RangeInclusive<u64> {
        let bits = self.geometry.size.bits();
        if word & entry::COMPRESSED == 0 {
            let cluster = (word & entry::OFFSET) >> bits;
            return cluster..=cluster;
        }
        let offset_bits = 62 - (bits - 8);
        let host = word & ((1 << offset_bits) - 1);
        let sectors = (word & !entry::COMPRESSED) >> offset_bits;
        let last = host / SECTOR_BYTES + sectors;
        host >> bits..=(last * SECTOR_BYTES) >> bits
    }

    fn copied(&self) -> u64 {
        if self.active { COPIED } else { 0 }
    }

    /// The L2 tables that were completed since this was asked last; they are to be written.
    pub fn take_complete(&mut self) -> Vec<Table> {
        std::mem::take(&mut self.complete)
    }

    /// A place for the whole cluster at `guest`. `data` has a bit for each subcluster with data, the others
    /// read as zeros; without subclusters it is not looked at.
    pub fn data(&mut self, guest: u64, data: u32) -> Result<u64> {
        let zeros = if self.geometry.says_zeros() { !data } else { 0 };
        self.place(guest, u64::from(zeros) << 32 | u64::from(data))
    }

    /// A place for the cluster at `guest`, which stays undefined: it is only reserved.
    ///
    /// Without subclusters that cannot be said; then the cluster's bytes are what the place holds, zeros.
    pub fn reserve(&mut self, guest: u64) -> Result<u64> {
        self.place(guest, 0)
    }

    fn place(&mut self, guest: u64, subclusters: u64) -> Result<u64> {
        // Making room for the entry may complete the table before, so it comes first.
        self.open_table(guest)?;
        let host = if self.geometry.external {
            guest
        } else {
            self.take(1)? << self.geometry.size.bits()
        };
        self.set_entry(guest, host | self.copied(), subclusters);
        Ok(host)
    }

    /// A place for `length` bytes of compressed data, less than a cluster, of the cluster at `guest`.
    pub fn packed(&mut self, guest: u64, length: u64) -> Result<u64> {
        let bits = self.geometry.size.bits();
        assert!(
            !self.geometry.external,
            "an external data file has no compressed clusters"
        );
        assert!(
            (1..=self.geometry.size.bytes()).contains(&length),
            "a compressed cluster has bytes and fits a cluster"
        );
        self.open_table(guest)?;
        let host = match self.packed_end.filter(|at| self.fits_behind(*at, length)) {
            Some(at) => at,
            None => self.take(1)? << bits,
        };
        let joined = self.packed_end == Some(host);
        let (first, last) = (host >> bits, (host + length - 1) >> bits);
        if joined {
            self.counts.add(first);
        }
        self.take(last + 1 - self.counts.taken().min(last + 1))?;
        let end = host + length;
        self.packed_end = (self.geometry.size.offset_in(end) != 0).then_some(end);
        self.set_entry(guest, self.packed_entry(host, length), 0);
        Ok(host)
    }

    /// Whether compressed bytes can go on at `at`: its cluster counts one more, and what does not fit
    /// there finds the next cluster free.
    fn fits_behind(&self, at: u64, length: u64) -> bool {
        let size = self.geometry.size;
        let cluster = at >> size.bits();
        let room = size.bytes() - size.offset_in(at);
        self.counts.get(cluster) < self.geometry.most_references()
            && (length <= room || cluster + 1 == self.counts.taken())
    }

    fn packed_entry(&self, host: u64, length: u64) -> u64 {
        let sectors = (host + length - 1) / SECTOR_BYTES - host / SECTOR_BYTES;
        let offset_bits = 62 - (self.geometry.size.bits() - 8);
        entry::COMPRESSED | sectors << offset_bits | host
    }

    /// Says that the cluster at `guest` reads as zeros, where something else would be seen.
    ///
    /// # Panics
    /// When that would have to be said and version 2 of the format cannot.
    pub fn zero(&mut self, guest: u64) -> Result<()> {
        if !self.geometry.says_zeros() {
            return Ok(());
        }
        assert!(
            self.geometry.has_zero_entries(),
            "zeros are written as data in version 2"
        );
        self.open_table(guest)?;
        match self.geometry.extended_l2 {
            true => self.set_entry(guest, 0, u64::from(ALL_SUBCLUSTERS) << 32),
            false => self.set_entry(guest, entry::ZERO, 0),
        }
        Ok(())
    }

    fn set_entry(&mut self, guest: u64, word: u64, subclusters: u64) {
        let geometry = &self.geometry;
        let index = (guest >> geometry.size.bits()) % geometry.l2_entries();
        let at = to_usize(index * geometry.entry_words());
        let Some(table) = &mut self.table else {
            unreachable!("the table was opened before");
        };
        assert!(
            table.index == guest / geometry.l2_coverage(),
            "the open table is that of the cluster"
        );
        table.words[at] = word;
        if geometry.extended_l2 {
            table.words[at + 1] = subclusters;
        }
    }

    fn open_table(&mut self, guest: u64) -> Result<()> {
        let index = guest / self.geometry.l2_coverage();
        let open = self.table.as_ref().map(|table| table.index);
        if open == Some(index) {
            return Ok(());
        }
        assert!(
            open.is_none_or(|open| open < index),
            "calls come in guest order"
        );
        self.close_table()?;
        self.table = Some(OpenTable {
            index,
            words: vec![0; to_usize(self.geometry.size.words())],
        });
        Ok(())
    }

    fn close_table(&mut self) -> Result<()> {
        let Some(table) = self.table.take() else {
            return Ok(());
        };
        let host = self.take(1)? << self.geometry.size.bits();
        self.l1[to_usize(table.index)] = host | self.copied();
        self.complete.push((host, big_endian(&table.words)));
        Ok(())
    }

    fn take(&mut self, count: u64) -> Result<u64> {
        let end = self.counts.taken() + count;
        if end > MAX_FILE_BYTES >> self.geometry.size.bits() {
            return self
                .geometry
                .invalid("the file would be larger than 512 TiB".into());
        }
        Ok(self.counts.take(count))
    }

    /// Gives everything that was not yet written to `put`, the first cluster last; tells the file's length
    /// in bytes.
    ///
    /// # Errors
    /// When the format cannot express the refcounts, or those of `put`.
    pub fn finish(
        mut self,
        options: &Qcow2Options,
        extras: &Extras<'_>,
        mut put: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<u64> {
        assert!(self.active, "the active view is the last");
        self.close_table()?;
        for (at, bytes) in self.take_complete() {
            put(at, &bytes)?;
        }
        let size = self.geometry.size;
        let mut tables = Tables::default();
        if !self.l1.is_empty() {
            tables.l1_table = HostOffset(size.bytes());
            put(size.bytes(), &self.padded(big_endian(&self.l1)))?;
        }
        if extras.snapshot_count > 0 {
            tables.internal_snapshots = extras.snapshot_count;
            let table = extras.snapshots.clone();
            tables.snapshot_table = HostOffset(self.put_new(table, &mut put)?);
        }
        if !extras.bitmaps.is_empty() {
            tables.bitmaps = Some(self.put_bitmaps(extras.bitmaps, &mut put)?);
        }
        let clusters = self.put_refcounts(&mut tables, &mut put)?;
        let first = first_cluster(&self.geometry, options, &tables)?;
        put(0, &self.padded(first))?;
        Ok(clusters << size.bits())
    }

    /// Puts bytes into new clusters; tells where.
    fn put_new(
        &mut self,
        bytes: Vec<u8>,
        put: &mut impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<u64> {
        let size = self.geometry.size;
        let at = self.take(size.count_for(to_u64(bytes.len())))? << size.bits();
        put(at, &self.padded(bytes))?;
        Ok(at)
    }

    fn put_bitmaps(
        &mut self,
        bitmaps: &[Bitmap],
        put: &mut impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<BitmapsExtension> {
        let size = self.geometry.size;
        let mut directory = Vec::new();
        for bitmap in bitmaps {
            let mut words = Vec::new();
            for index in 0..bitmap.table_entries(size) {
                words.push(match bitmap.cluster(size, index) {
                    BitmapCluster::Clear => 0,
                    BitmapCluster::Full => 1,
                    BitmapCluster::Mixed => {
                        let mut bytes = vec![0; size.buffer_len()];
                        bitmap.cluster_bytes(size, index, &mut bytes);
                        self.put_new(bytes, put)?
                    }
                });
            }
            let table = if words.is_empty() {
                0
            } else {
                self.put_new(big_endian(&words), put)?
            };
            directory.extend(bitmap_entry(bitmap, table, to_u64(words.len())));
        }
        let directory_length = to_u64(directory.len());
        Ok(BitmapsExtension {
            count: narrow(to_u64(bitmaps.len())),
            directory_length,
            directory: HostOffset(self.put_new(directory, put)?),
        })
    }

    fn put_refcounts(
        &mut self,
        tables: &mut Tables,
        put: &mut impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<u64> {
        let size = self.geometry.size;
        let order = self.geometry.refcount_order;
        let used = self.counts.taken();
        let plan = RefcountPlan::new(used, size, order);
        if plan.table_clusters * size.bytes() > MAX_REFCOUNT_TABLE_BYTES {
            return self.geometry.invalid(
                "its refcount table would be larger than 8 MiB; take larger clusters".into(),
            );
        }
        self.take(plan.total - used)?;
        let mut words = Vec::new();
        for block in 0..plan.blocks {
            let host = (used + block) << size.bits();
            put(
                host,
                &self.counts.block(block * plan.per_block, size, order),
            )?;
            words.push(host);
        }
        tables.refcount_table = HostOffset((used + plan.blocks) << size.bits());
        tables.refcount_table_clusters = plan.table_clusters;
        put(tables.refcount_table.0, &self.padded(big_endian(&words)))?;
        Ok(plan.total)
    }

    /// Filled up to whole clusters, so that nothing of an earlier content is left on a device.
    fn padded(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        let size = self.geometry.size;
        let whole = size.count_for(to_u64(bytes.len())) * size.bytes();
        bytes.resize(to_usize(whole), 0);
        bytes
    }
}

fn big_endian(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// A directory entry: a bitmap that is tracked when the image is next used, if it was.
fn bitmap_entry(bitmap: &Bitmap, table: u64, table_entries: u64) -> Vec<u8> {
    let name = bitmap.name();
    let mut bytes = table.to_be_bytes().to_vec();
    bytes.extend(narrow(table_entries).to_be_bytes());
    bytes.extend((u32::from(bitmap.auto) << 1).to_be_bytes());
    bytes.extend([1, bitmap.granularity_bits()]);
    // A name has at most 1023 bytes, and there is no extra data.
    bytes.extend(&narrow(to_u64(name.len())).to_be_bytes()[2..]);
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(name);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}
