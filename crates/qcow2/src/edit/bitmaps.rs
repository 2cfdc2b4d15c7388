//! The persistent dirty bitmaps of the new state.
//!
//! # Invariant
//! Bits are only ever added here, but for those behind the end of the disk. In doubt more are set.
//!
//! A bitmap is worked on cluster by cluster of its bits while single ranges are marked. One that is added, cleared
//! or merged into lies in memory whole ([`crate::Bitmap`], which takes nothing for what is all clear or all set) and
//! is written once, at the end.

use std::ops::Range;

use crate::error::Result;
use crate::header::{AUTOCLEAR_BITMAPS, BitmapsExtension, to_u64, to_usize};
use crate::units::{GuestOffset, HostOffset};

use super::records::{self, BitmapRecord};
use super::transaction::Edit;
use super::views::View;

/// A table entry: all bits of the cluster are set, and there is no cluster.
pub(super) const ALL_ONES: u64 = 1;

/// A bitmap and, once it is needed, its table.
#[derive(Debug)]
pub(super) struct Bitmap {
    pub record: BitmapRecord,
    /// What the old state has under this name, if it must not say less now.
    pub before: Option<BitmapRecord>,
    /// Bits that were set, neighbours joined.
    pub marks: Vec<Range<u64>>,
    pub(super) table: Option<Vec<u64>>,
    pub(super) changed: bool,
    /// All its bits, if it is worked on as a whole; its table then refers to nothing before it is stored.
    pub bits: Option<crate::bitmap::Bitmap>,
}

impl Bitmap {
    /// A bitmap that the old state has.
    pub fn new(record: BitmapRecord) -> Self {
        Self {
            before: Some(record.clone()),
            record,
            marks: Vec::new(),
            table: None,
            changed: false,
            bits: None,
        }
    }
}

impl Bitmap {
    fn note(&mut self, bits: Range<u64>) {
        match self.marks.last_mut() {
            Some(last) if last.start <= bits.start && bits.start <= last.end => {
                last.end = last.end.max(bits.end);
            }
            Some(_) | None => self.marks.push(bits),
        }
    }
}

impl Edit<'_> {
    /// The persistent bitmaps of the new state; none where the image says that they cannot be trusted.
    pub fn bitmaps(&self) -> impl Iterator<Item = &BitmapRecord> {
        self.bitmaps.iter().map(|bitmap| &bitmap.record)
    }

    /// Notes in every enabled bitmap that the bytes of `range` may be others than before.
    ///
    /// # Errors
    /// When a bitmap cannot be read or written.
    pub fn mark_dirty(&mut self, range: Range<u64>) -> Result<()> {
        for index in 0..self.bitmaps.len() {
            let record = &self.bitmaps[index].record;
            if record.enabled() && !record.in_use() {
                self.mark(index, range.clone())?;
            }
        }
        Ok(())
    }

    /// Sets the bits of `range` in one bitmap.
    ///
    /// # Errors
    /// When the bitmap cannot be read or written.
    pub fn mark(&mut self, bitmap: usize, range: Range<u64>) -> Result<()> {
        let granularity = u32::from(self.bitmaps[bitmap].record.granularity_bits());
        let end = range.end.min(self.virtual_size());
        if range.start >= end {
            return Ok(());
        }
        if let Some(bits) = &mut self.bitmaps[bitmap].bits {
            bits.set(GuestOffset(range.start), end - range.start);
            return Ok(());
        }
        let (first, last) = (range.start >> granularity, (end - 1) >> granularity);
        self.bitmaps[bitmap].note(first..last + 1);
        let per_cluster = self.size().bytes() * 8;
        for cluster in first / per_cluster..=last / per_cluster {
            let base = cluster * per_cluster;
            let bits = first.max(base) - base..last.min(base + per_cluster - 1) - base + 1;
            self.set_bits(bitmap, cluster, bits)?;
        }
        Ok(())
    }

    /// Sets bits of one cluster of bits.
    fn set_bits(&mut self, bitmap: usize, cluster: u64, bits: Range<u64>) -> Result<()> {
        let at = self.own_bits(bitmap, cluster)?;
        let Some(at) = at else {
            return Ok(());
        };
        let bytes = self.tables.change(at)?;
        for bit in bits {
            bytes[to_usize(bit / 8)] |= 1 << (bit % 8);
        }
        Ok(())
    }

    /// The cluster of bits, where it may be changed; `None` when all its bits are set anyway.
    fn own_bits(&mut self, bitmap: usize, cluster: u64) -> Result<Option<HostOffset>> {
        let word = self.bitmap_table(bitmap)?[to_usize(cluster)];
        if word == ALL_ONES {
            return Ok(None);
        }
        if word != 0 && self.counts.is_new(word >> self.size().bits())? {
            return Ok(Some(HostOffset(word)));
        }
        let bytes: Box<[u8]> = match word {
            0 => vec![0; self.size().buffer_len()].into_boxed_slice(),
            _ => self.bits_of(HostOffset(word))?,
        };
        let at = self.allocate(1)?;
        self.tables.put(at, bytes)?;
        if word != 0 {
            self.release(HostOffset(word), 1)?;
        }
        self.set_table_word(bitmap, cluster, at.0)?;
        Ok(Some(at))
    }

    /// The last cluster of a file may be cut off; then zeros follow.
    pub(super) fn bits_of(&mut self, at: HostOffset) -> Result<Box<[u8]>> {
        let there = self.old.file_length().saturating_sub(at.0);
        if there >= self.size().bytes() || self.counts.is_new(at.0 >> self.size().bits())? {
            return Ok(self.tables.get(at)?.into());
        }
        let mut bytes = vec![0; self.size().buffer_len()];
        self.read(at, &mut bytes[..to_usize(there)])?;
        Ok(bytes.into_boxed_slice())
    }

    pub(super) fn bitmap_table(&mut self, bitmap: usize) -> Result<&[u64]> {
        if self.bitmaps[bitmap].table.is_none() {
            let record = &self.bitmaps[bitmap].record;
            let mut bytes = vec![0; to_usize(u64::from(record.table_entries())) * 8];
            self.read(record.table(), &mut bytes)?;
            let (words, _none) = bytes.as_chunks::<8>();
            let words = words.iter().map(|word| u64::from_be_bytes(*word));
            self.bitmaps[bitmap].table = Some(words.collect());
        }
        match &self.bitmaps[bitmap].table {
            Some(table) => Ok(table),
            None => unreachable!("it was just read"),
        }
    }

    fn set_table_word(&mut self, bitmap: usize, index: u64, word: u64) -> Result<()> {
        self.bitmap_table(bitmap)?;
        let bitmap = &mut self.bitmaps[bitmap];
        if let Some(table) = &mut bitmap.table {
            table[to_usize(index)] = word;
            bitmap.changed = true;
        }
        Ok(())
    }

    /// Gives all bitmaps the length of the disk, which has `before` bytes and gets `after`: bits behind the
    /// end go, and what is new is dirty, in disabled bitmaps too, since nobody recorded what was there.
    pub(super) fn resize_bitmaps(&mut self, before: u64, after: u64) -> Result<()> {
        for bitmap in 0..self.bitmaps.len() {
            self.resize_bitmap(bitmap, after)?;
            if after > before && !self.bitmaps[bitmap].record.in_use() {
                self.mark(bitmap, before..after)?;
            }
        }
        Ok(())
    }

    fn resize_bitmap(&mut self, bitmap: usize, after: u64) -> Result<()> {
        if let Some(bits) = &mut self.bitmaps[bitmap].bits {
            return bits.set_disk_length(after);
        }
        let granularity = u32::from(self.bitmaps[bitmap].record.granularity_bits());
        let bits = after.div_ceil(1 << granularity);
        let per_cluster = self.size().bytes() * 8;
        let clusters = bits.div_ceil(per_cluster);
        let there = to_u64(self.bitmap_table(bitmap)?.len());
        for cluster in clusters..there {
            let word = self.bitmap_table(bitmap)?[to_usize(cluster)];
            if word > ALL_ONES {
                self.release(HostOffset(word), 1)?;
            }
        }
        let entry = &mut self.bitmaps[bitmap];
        if let Some(table) = &mut entry.table
            && clusters != there
        {
            table.resize(to_usize(clusters), 0);
            entry.changed = true;
        }
        if !bits.is_multiple_of(per_cluster) && clusters <= there {
            self.clear_tail(bitmap, clusters - 1, bits % per_cluster)?;
        }
        Ok(())
    }

    /// Clears the bits of a cluster from `first` on.
    fn clear_tail(&mut self, bitmap: usize, cluster: u64, first: u64) -> Result<()> {
        let word = self.bitmap_table(bitmap)?[to_usize(cluster)];
        if word == 0 {
            return Ok(());
        }
        if word == ALL_ONES {
            let at = self.allocate(1)?;
            let ones = vec![0xff; self.size().buffer_len()];
            self.tables.put(at, ones.into_boxed_slice())?;
            self.set_table_word(bitmap, cluster, at.0)?;
        } else if !has_bits_from(&self.bits_of(HostOffset(word))?, first) {
            return Ok(());
        }
        let Some(at) = self.own_bits(bitmap, cluster)? else {
            unreachable!("the entry has a cluster")
        };
        let bytes = self.tables.change(at)?;
        bytes[to_usize(first / 8)] &= (1 << (first % 8)) - 1;
        bytes[to_usize(first / 8) + 1..].fill(0);
        Ok(())
    }

    /// Writes the tables that changed and the directory.
    pub(super) fn store_bitmaps(&mut self) -> Result<()> {
        for index in 0..self.bitmaps.len() {
            self.store_bits(index)?;
            let bitmap = &mut self.bitmaps[index];
            if !std::mem::take(&mut bitmap.changed) {
                continue;
            }
            let (at, length) = (
                bitmap.record.table(),
                u64::from(bitmap.record.table_entries()) * 8,
            );
            let Some(table) = bitmap.table.clone() else {
                unreachable!("a table that changed was read")
            };
            self.release_bytes(at, length)?;
            let at = self.place_words(&table)?;
            let entries = u32::try_from(table.len()).unwrap_or(u32::MAX);
            self.bitmaps[index].record.set_table(at, entries);
            self.bitmaps_changed = true;
        }
        if self.bitmaps_changed {
            self.store_directory()?;
        }
        Ok(())
    }

    fn store_directory(&mut self) -> Result<()> {
        let consistent = self.old.header().bitmaps_consistent();
        if let Some(old) = self.old.header().bitmaps.filter(|_| consistent) {
            self.release_bytes(old.directory, old.directory_length)?;
        }
        let bytes = records::encode_bitmaps(self.bitmaps.iter().map(|bitmap| &bitmap.record));
        let directory_length = to_u64(bytes.len());
        let directory = self.place_bytes(bytes)?;
        let count = u32::try_from(self.bitmaps.len()).unwrap_or(u32::MAX);
        let extension = (count > 0).then_some(BitmapsExtension {
            count,
            directory_length,
            directory,
        });
        let autoclear = self.first.raw.autoclear.get() & !AUTOCLEAR_BITMAPS;
        let bit = if count > 0 { AUTOCLEAR_BITMAPS } else { 0 };
        self.first.raw.autoclear.set(autoclear | bit);
        self.first.set_bitmaps(extension);
        Ok(())
    }

    /// Notes in every enabled bitmap the clusters in which two views may differ. Both must cover the disk.
    pub(super) fn mark_differences(&mut self, one: View, other: View) -> Result<()> {
        let enabled = |bitmap: &Bitmap| bitmap.record.enabled() && !bitmap.record.in_use();
        if !self.bitmaps.iter().any(enabled) {
            return Ok(());
        }
        let coverage = self.shape().l2_coverage();
        let entries = self.virtual_size().div_ceil(coverage);
        for index in 0..entries {
            let [here, there] = [one, other].map(|view| self.table_at(view, index));
            let (here, there) = (here?, there?);
            if here == there {
                continue;
            }
            self.go_on()?;
            for cluster in 0..self.shape().l2_entries() {
                self.mark_difference(here, there, (index, cluster))?;
            }
        }
        Ok(())
    }

    fn mark_difference(
        &mut self,
        here: Option<HostOffset>,
        there: Option<HostOffset>,
        place: (u64, u64),
    ) -> Result<()> {
        let mut mapping = |table: Option<HostOffset>| match table {
            Some(table) => self.table_mapping(table, place.1).map(Some),
            None => Ok(None),
        };
        let unallocated = super::views::Mapping::Unallocated;
        let [one, other] = [mapping(here)?, mapping(there)?].map(|m| m.unwrap_or(unallocated));
        if one == other {
            return Ok(());
        }
        let cluster = place.0 * self.shape().l2_entries() + place.1;
        let start = cluster << self.size().bits();
        self.mark_dirty(start..start + self.size().bytes())
    }
}

/// Whether any bit from `first` on is set.
fn has_bits_from(bytes: &[u8], first: u64) -> bool {
    let at = to_usize(first / 8);
    bytes[at] >> (first % 8) != 0 || bytes[at + 1..].iter().any(|byte| *byte != 0)
}
