//! The parts of an image that a check keeps in memory: its tables and directories, but for the L2 tables, of which it keeps
//! the places.
//!
//! What cannot be walked becomes a finding here and is left out, so that the walk meets only what lies in the file.

use std::collections::BTreeMap;

use crate::directory::{InternalSnapshot, StoredBitmap};
use crate::entry::L1Entry;
use crate::error::{Error, Result};
use crate::header::{Encryption, to_u64, to_usize};
use crate::layer::Layer;
use crate::refcounts;
use crate::units::HostOffset;

use super::report::{CheckReport, Use};
use super::{require_place, unusable, usable};

/// The most L2 tables of one image, with those of internal snapshots.
const MAX_L2_TABLES: usize = 8 << 20;

/// The parts of an image that are small enough to keep, without what cannot be walked.
pub(super) struct Image<'a> {
    pub layer: &'a Layer,
    pub snapshots: Vec<InternalSnapshot>,
    pub bitmaps: Vec<StoredBitmap>,
    pub refcount_blocks: Vec<Option<HostOffset>>,
    /// Each L2 table once, in order: how often it is referenced, and whether from the active L1 table.
    pub l2_tables: Vec<L2Table>,
    /// Tables and directories: place, length, use.
    pub regions: Vec<(HostOffset, u64, Use)>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct L2Table {
    pub at: HostOffset,
    pub references: u32,
    pub active: Option<ActiveTable>,
}

/// Where the active L1 table has the L2 table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ActiveTable {
    pub index: u32,
    pub copied: bool,
}

impl<'a> Image<'a> {
    pub fn read(layer: &'a Layer, report: &mut CheckReport) -> Result<Self> {
        let header = layer.header();
        let size = header.cluster_size.bytes();
        let table_bytes = u64::from(header.refcount_table_clusters) * size;
        let mut image = Self {
            layer,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            refcount_blocks: Vec::new(),
            l2_tables: Vec::new(),
            regions: vec![
                (HostOffset(0), size, Use::Header),
                (
                    header.l1_table,
                    u64::from(header.l1_entries) * 8,
                    Use::L1Table,
                ),
                (header.refcount_table, table_bytes, Use::RefcountTable),
            ],
        };
        image.read_encryption(report);
        image.read_refcount_table(report)?;
        image.read_directories(report)?;
        image.drop_overlapping_tables(report);
        image.read_l1_tables(report)?;
        Ok(image)
    }

    pub fn leave_out_bitmaps(&mut self, tables: &[HostOffset]) {
        let stays = |at: &HostOffset| !tables.contains(at);
        self.bitmaps.retain(|bitmap| stays(&bitmap.table));
        self.regions
            .retain(|(at, _, usage)| *usage != Use::BitmapTable || stays(at));
    }

    pub fn file_clusters(&self) -> u64 {
        self.layer
            .cluster_size()
            .count_for(self.layer.file_length())
    }

    fn read_encryption(&mut self, report: &mut CheckReport) {
        let Some(Encryption::Luks {
            header,
            header_bytes,
        }) = self.layer.header().encryption
        else {
            return;
        };
        match self.place("the encryption header", header, header_bytes) {
            Ok(()) => self
                .regions
                .push((header, header_bytes, Use::EncryptionHeader)),
            Err(error) => unusable(report, Use::EncryptionHeader, error.to_string()),
        }
    }

    /// The last cluster of the table may be cut off by the end of the file; then zeros follow.
    fn read_refcount_table(&mut self, report: &mut CheckReport) -> Result<()> {
        let header = self.layer.header();
        let length = u64::from(header.refcount_table_clusters) * header.cluster_size.bytes();
        let there = self
            .layer
            .file_length()
            .saturating_sub(header.refcount_table.0);
        let words = to_usize(length.min(there) / 8);
        let file = self.layer.file();
        let table = file.read_words("the refcount table", header.refcount_table, words)?;
        self.refcount_blocks = vec![None; table.len()];
        let mut known = BTreeMap::new();
        for (index, word) in table.into_iter().enumerate() {
            match refcounts::TableEntry::decode(word) {
                refcounts::TableEntry::None => {}
                refcounts::TableEntry::Reserved => {
                    let reason = format!("entry {index} of the refcount table is {word:#x}");
                    unusable(report, Use::RefcountBlock, reason);
                }
                refcounts::TableEntry::Block(at) => {
                    let place = self.place("a refcount block", at, header.cluster_size.bytes());
                    if let Err(error) = place {
                        unusable(report, Use::RefcountBlock, error.to_string());
                    } else if let Some(other) = known.insert(at, index) {
                        let reason = format!(
                            "entries {other} and {index} of the refcount table both say {at}"
                        );
                        unusable(report, Use::RefcountBlock, reason);
                    } else {
                        self.refcount_blocks[index] = Some(at);
                    }
                }
            }
        }
        Ok(())
    }

    fn read_directories(&mut self, report: &mut CheckReport) -> Result<()> {
        let header = self.layer.header();
        if let Some(found) = usable(report, Use::SnapshotTable, self.layer.snapshot_directory())? {
            if header.internal_snapshots > 0 {
                let region = (header.snapshot_table, found.length, Use::SnapshotTable);
                self.regions.push(region);
            }
            self.snapshots = found.entries;
        }
        let bitmaps = self.layer.bitmap_directory();
        if let Some(found) = usable(report, Use::BitmapDirectory, bitmaps)? {
            if let Some(place) = header.bitmaps.filter(|_| header.bitmaps_consistent()) {
                let region = (place.directory, found.length, Use::BitmapDirectory);
                self.regions.push(region);
            }
            self.bitmaps = found.entries;
        }
        Ok(())
    }

    /// Tables that cannot be read, or lie over another table, are reported here and not walked. So the
    /// tables that are walked are together no longer than the file.
    fn drop_overlapping_tables(&mut self, report: &mut CheckReport) {
        let mut taken = Regions::default();
        for (at, length, _) in &self.regions {
            taken.take(*at, *length);
        }
        let layer = self.layer;
        let mut good = |at: HostOffset, length: u64, usage: Use| {
            let placed = require_place(layer, "a table", at, length);
            if let Err(error) = placed {
                unusable(report, usage, error.to_string());
                return false;
            }
            if !taken.take(at, length) {
                let reason = format!("the table at {at} with {length} bytes lies over another");
                unusable(report, usage, reason);
                return false;
            }
            true
        };
        self.snapshots
            .retain(|entry| good(entry.l1_table, entry.l1_bytes(), Use::SnapshotL1Table));
        self.bitmaps
            .retain(|entry| good(entry.table, entry.table_bytes(), Use::BitmapTable));
        let l1 = |s: &InternalSnapshot| (s.l1_table, s.l1_bytes(), Use::SnapshotL1Table);
        self.regions.extend(self.snapshots.iter().map(l1));
        let table = |b: &StoredBitmap| (b.table, b.table_bytes(), Use::BitmapTable);
        self.regions.extend(self.bitmaps.iter().map(table));
    }

    pub fn place(&self, what: &'static str, at: HostOffset, length: u64) -> Result<()> {
        require_place(self.layer, what, at, length)
    }

    fn read_l1_tables(&mut self, report: &mut CheckReport) -> Result<()> {
        let mut tables: Vec<L2Table> = Vec::new();
        let active = self.layer.active_l1().iter().enumerate();
        for (index, word) in active {
            // The layer was opened, so its own entries are valid.
            if let Ok(Some(entry)) = L1Entry::decode(*word) {
                let index = u32::try_from(index).unwrap_or(u32::MAX);
                let copied = entry.copied;
                tables.push(L2Table {
                    at: entry.table,
                    references: 1,
                    active: Some(ActiveTable { index, copied }),
                });
            }
        }
        for snapshot in &self.snapshots {
            let count = to_usize(u64::from(snapshot.l1_entries));
            let what = "the L1 table of an internal snapshot";
            let words = self
                .layer
                .file()
                .read_words(what, snapshot.l1_table, count)?;
            for word in words {
                tables.extend(self.snapshot_l2_table(word, report));
            }
            tables = merged(tables);
            if tables.len() > MAX_L2_TABLES {
                return Err(Error::InvalidField {
                    path: self.layer.path().to_owned(),
                    field: "number of L2 tables",
                    found: to_u64(tables.len()),
                    expected: format!("at most {MAX_L2_TABLES}"),
                });
            }
        }
        self.l2_tables = merged(tables);
        Ok(())
    }

    fn snapshot_l2_table(&self, word: u64, report: &mut CheckReport) -> Option<L2Table> {
        let reason = match L1Entry::decode(word) {
            Ok(None) => return None,
            Err(reason) => format!("an L1 entry of an internal snapshot is {word:#x}: {reason}"),
            Ok(Some(entry)) => {
                let length = self.layer.cluster_size().bytes();
                match self.place("an L2 table", entry.table, length) {
                    Err(error) => error.to_string(),
                    Ok(()) => {
                        return Some(L2Table {
                            at: entry.table,
                            references: 1,
                            active: None,
                        });
                    }
                }
            }
        };
        unusable(report, Use::L2Table, reason);
        None
    }
}

/// Each table once, with the sum of its references.
fn merged(mut tables: Vec<L2Table>) -> Vec<L2Table> {
    tables.sort_unstable();
    tables.dedup_by(|next, kept| {
        let same = next.at == kept.at;
        if same {
            kept.references = kept.references.saturating_add(next.references);
            kept.active = kept.active.or(next.active);
        }
        same
    });
    tables
}

/// Ranges of the file that do not overlap.
#[derive(Default)]
struct Regions {
    ends: BTreeMap<u64, u64>,
}

impl Regions {
    /// Takes a range; `false` when a part of it is taken already.
    fn take(&mut self, at: HostOffset, length: u64) -> bool {
        let end = at.0.saturating_add(length);
        let before = self.ends.range(..end).next_back();
        if length > 0 && before.is_some_and(|(_, taken)| *taken > at.0) {
            return false;
        }
        self.ends.insert(at.0, end);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_that_overlap_in_any_way_are_not_taken() {
        let mut regions = Regions::default();
        assert!(regions.take(HostOffset(100), 10));
        for (at, length) in [(100, 10), (95, 6), (109, 1), (90, 100), (105, 2)] {
            assert!(!regions.take(HostOffset(at), length), "{at} {length}");
        }
        assert!(regions.take(HostOffset(110), 5));
        assert!(regions.take(HostOffset(90), 10));
    }
}
