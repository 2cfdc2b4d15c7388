//! A dirty bitmap in memory: which ranges of a disk may have changed since it began. Nothing here reads or
//! writes files.
//!
//! # What always holds
//! * A bit stands for `1 << granularity_bits` bytes of the disk; the last one may stand for fewer.
//! * In doubt more bits are set, never fewer: [`Bitmap::set`] and [`Bitmap::merge`] round outwards,
//!   [`Bitmap::clear`] rounds inwards.
//! * No bit behind the end of the disk is set.
//!
//! # Memory
//! Bits are kept in pages of 512 bytes, and a page with all bits clear or all bits set takes none. With
//! [`MAX_BITMAP_BITS`] that is at most 512 MiB and their index, and 150 MiB for 64 TiB at 64 KiB.
//!
//! # As it lies in the file
//! Bit `n` is bit `n % 8` of byte `n / 8`, the lowest first. The bytes are cut into clusters, and a table
//! has an entry for each: where it lies, or that all its bits are clear ([`BitmapCluster::Clear`]) or set.
//! Bits behind the disk's end are zero.
//!
//! # Source
//! QEMU's `docs/interop/qcow2`, section *Bitmaps*. Limits are QEMU's.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::header::{to_u64, to_usize};
use crate::units::{ClusterSize, GuestOffset};

/// The most bits of a bitmap: 512 MiB of them.
pub const MAX_BITMAP_BITS: u64 = 512 << 20 << 3;
/// The longest name of a bitmap, in bytes.
pub const MAX_BITMAP_NAME_BYTES: usize = 1023;
/// The granularities that QEMU opens, as powers of two: 512 bytes to 2 GiB.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

const PAGE_WORDS: usize = 64;
const PAGE_BYTES: usize = PAGE_WORDS * 8;
const PAGE_BITS: u64 = 64 * PAGE_WORDS as u64;

/// Bits that are neither all clear (then there is no page) nor, where it is [`Page::Full`], anything else.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Page {
    Full,
    Mixed(Box<[u64; PAGE_WORDS]>),
}

/// What a cluster of a bitmap's bits is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapCluster {
    /// All bits are clear: the table entry is 0.
    Clear,
    /// All bits are set: the table entry is 1.
    Full,
    /// The bits must be stored.
    Mixed,
}

/// A dirty bitmap; see the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    name: Vec<u8>,
    granularity_bits: u8,
    disk_length: u64,
    /// It is to be tracked when the image is next used (the `auto` flag): it is enabled.
    pub auto: bool,
    /// In order; a page that is not there is clear.
    pages: BTreeMap<u64, Page>,
}

impl Bitmap {
    /// A bitmap with all bits clear.
    ///
    /// # Errors
    /// [`Error::InvalidBitmap`] when the name is empty or longer than [`MAX_BITMAP_NAME_BYTES`], the granularity
    /// is not in [`GRANULARITY_BITS`], or there would be more than [`MAX_BITMAP_BITS`].
    pub fn new(name: &[u8], granularity_bits: u8, disk_length: u64) -> Result<Self> {
        let invalid = |reason: String| {
            Err(Error::InvalidBitmap {
                name: String::from_utf8_lossy(name).into_owned(),
                reason,
            })
        };
        if name.is_empty() || name.len() > MAX_BITMAP_NAME_BYTES {
            return invalid(format!(
                "its name has {} bytes, and may have 1 to {MAX_BITMAP_NAME_BYTES}",
                name.len()
            ));
        }
        if !GRANULARITY_BITS.contains(&granularity_bits) {
            return invalid(format!(
                "a granularity of 2^{granularity_bits} bytes is not from 512 bytes to 2 GiB"
            ));
        }
        let bitmap = Self {
            name: name.to_vec(),
            granularity_bits,
            disk_length,
            auto: true,
            pages: BTreeMap::new(),
        };
        if bitmap.bits() > MAX_BITMAP_BITS {
            return invalid(format!(
                "it would have {} bits, more than {MAX_BITMAP_BITS}; take a larger granularity",
                bitmap.bits()
            ));
        }
        Ok(bitmap)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// How many bytes of the disk a bit stands for, as a power of two.
    #[must_use]
    pub fn granularity_bits(&self) -> u8 {
        self.granularity_bits
    }

    /// How many bytes of the disk a bit stands for.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// The length of the disk that it describes, in bytes.
    #[must_use]
    pub fn disk_length(&self) -> u64 {
        self.disk_length
    }

    /// How many bits it has.
    #[must_use]
    pub fn bits(&self) -> u64 {
        self.disk_length.div_ceil(self.granularity())
    }

    /// Marks a range as changed, with all that shares a bit with it. What lies behind the disk is left out.
    pub fn set(&mut self, start: GuestOffset, length: u64) {
        let end = start.0.saturating_add(length).min(self.disk_length);
        if start.0 < end {
            let bits = start.0 >> self.granularity_bits..end.div_ceil(self.granularity());
            self.fill(bits, true);
        }
    }

    /// Marks the whole disk as changed.
    pub fn set_all(&mut self) {
        self.set(GuestOffset(0), self.disk_length);
    }

    /// Marks a range as not changed, but for what shares a bit with something outside of it.
    pub fn clear(&mut self, start: GuestOffset, length: u64) {
        let end = start.0.saturating_add(length);
        // The last bit may stand for less than a whole granule.
        let end = if end >= self.disk_length {
            self.bits()
        } else {
            end >> self.granularity_bits
        };
        self.fill(start.0.div_ceil(self.granularity())..end, false);
    }

    /// Marks the whole disk as not changed.
    pub fn clear_all(&mut self) {
        self.pages.clear();
    }

    /// Whether the byte at `at` may have changed; `false` behind the disk's end.
    #[must_use]
    pub fn is_dirty(&self, at: GuestOffset) -> bool {
        let bit = at.0 >> self.granularity_bits;
        self.next_set(bit) == Some(bit) && at.0 < self.disk_length
    }

    /// The ranges that may have changed, in bytes, in order, neighbours joined.
    pub fn dirty_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next_set(at)?;
            at = self.next_clear(first);
            let end = at << self.granularity_bits;
            Some(first << self.granularity_bits..end.min(self.disk_length))
        })
    }

    /// How many bytes may have changed.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_ranges()
            .map(|range| range.end - range.start)
            .sum()
    }

    /// Marks what `other` has marked, too, whatever its granularity and length are.
    pub fn merge(&mut self, other: &Self) {
        for range in other.dirty_ranges() {
            self.set(GuestOffset(range.start), range.end - range.start);
        }
    }

    /// Follows a disk that became longer or shorter. What is new is not marked; what is behind the new end
    /// is forgotten.
    ///
    /// # Errors
    /// As [`Bitmap::new`], when there would be too many bits; then nothing was changed.
    pub fn set_disk_length(&mut self, disk_length: u64) -> Result<()> {
        let new = Self::new(&self.name, self.granularity_bits, disk_length)?;
        // The last bit may have stood for a part of what it stands for now, which is more, so never fewer.
        let (bits, end) = (new.bits(), self.bits());
        self.fill(bits.min(end)..end, false);
        self.disk_length = disk_length;
        Ok(())
    }

    /// Entries of its table in an image with clusters of `size`.
    #[must_use]
    pub fn table_entries(&self, size: ClusterSize) -> u64 {
        table_entries(self.disk_length, self.granularity_bits, size)
    }

    /// What cluster `index` of its bits is.
    ///
    /// # Panics
    /// When the table has no such entry.
    #[must_use]
    pub fn cluster(&self, size: ClusterSize, index: u64) -> BitmapCluster {
        let bits = self.bits_of(size, index);
        let end = bits.end;
        match self.next_set(bits.start) {
            None => BitmapCluster::Clear,
            Some(first) if first >= end => BitmapCluster::Clear,
            Some(first) if first == bits.start && self.next_clear(first) >= end => {
                BitmapCluster::Full
            }
            Some(_) => BitmapCluster::Mixed,
        }
    }

    /// The bytes of cluster `index`, as they lie in the file, into `bytes`, which has a cluster's length.
    ///
    /// # Panics
    /// When the table has no such entry, or `bytes` has another length.
    pub fn cluster_bytes(&self, size: ClusterSize, index: u64, bytes: &mut [u8]) {
        assert!(bytes.len() == size.buffer_len(), "the bytes of one cluster");
        let first_page = self.bits_of(size, index).start / PAGE_BITS;
        for (place, part) in bytes.chunks_exact_mut(PAGE_BYTES).enumerate() {
            match self.pages.get(&(first_page + to_u64(place))) {
                None => part.fill(0),
                Some(Page::Full) => part.fill(0xff),
                Some(Page::Mixed(words)) => {
                    let (parts, _none) = part.as_chunks_mut::<8>();
                    for (part, word) in parts.iter_mut().zip(words.iter()) {
                        *part = word.to_le_bytes();
                    }
                }
            }
        }
    }

    /// Takes the bytes of cluster `index`; bits behind the disk's end are dropped, and whether there were
    /// any is the answer.
    pub(crate) fn load_cluster(&mut self, size: ClusterSize, index: u64, bytes: &[u8]) -> bool {
        let first_page = self.bits_of(size, index).start / PAGE_BITS;
        for (place, part) in bytes.chunks_exact(PAGE_BYTES).enumerate() {
            let (parts, _none) = part.as_chunks::<8>();
            let mut words = Box::new([0; PAGE_WORDS]);
            for (word, part) in words.iter_mut().zip(parts) {
                *word = u64::from_le_bytes(*part);
            }
            self.put_page(first_page + to_u64(place), words);
        }
        let end = (index + 1).saturating_mul(size.bytes() * 8);
        let tail = self.next_set(self.bits()).is_some();
        self.fill(self.bits()..end.max(self.bits()), false);
        tail
    }

    /// Sets all bits of cluster `index`, up to the disk's end.
    pub(crate) fn load_full_cluster(&mut self, size: ClusterSize, index: u64) {
        let bits = self.bits_of(size, index);
        self.fill(bits.start..bits.end.min(self.bits()), true);
    }

    fn bits_of(&self, size: ClusterSize, index: u64) -> Range<u64> {
        assert!(
            index < self.table_entries(size),
            "the table has no such entry"
        );
        let step = size.bytes() * 8;
        index * step..(index + 1) * step
    }

    fn put_page(&mut self, index: u64, words: Box<[u64; PAGE_WORDS]>) {
        if words.iter().all(|word| *word == 0) {
            self.pages.remove(&index);
        } else if words.iter().all(|word| *word == u64::MAX) {
            self.pages.insert(index, Page::Full);
        } else {
            self.pages.insert(index, Page::Mixed(words));
        }
    }

    fn fill(&mut self, bits: Range<u64>, value: bool) {
        let mut at = bits.start;
        while at < bits.end {
            let index = at / PAGE_BITS;
            let page_end = (index + 1) * PAGE_BITS;
            let end = page_end.min(bits.end);
            match (at.is_multiple_of(PAGE_BITS) && end == page_end, value) {
                (true, true) => drop(self.pages.insert(index, Page::Full)),
                (true, false) => drop(self.pages.remove(&index)),
                (false, _) => {
                    self.fill_part(index, at % PAGE_BITS..at % PAGE_BITS + end - at, value)
                }
            }
            at = end;
        }
    }

    /// `bits` are counted from the start of the page.
    fn fill_part(&mut self, index: u64, bits: Range<u64>, value: bool) {
        let mut words = match self.pages.remove(&index) {
            None => Box::new([0; PAGE_WORDS]),
            Some(Page::Full) => Box::new([u64::MAX; PAGE_WORDS]),
            Some(Page::Mixed(words)) => words,
        };
        for word in bits.start / 64..bits.end.div_ceil(64) {
            let low = bits.start.saturating_sub(word * 64);
            let high = (bits.end - word * 64).min(64);
            let mask = (u64::MAX >> (64 - (high - low))) << low;
            let word = &mut words[to_usize(word)];
            *word = if value { *word | mask } else { *word & !mask };
        }
        self.put_page(index, words);
    }

    /// The first set bit at or after `from`.
    fn next_set(&self, from: u64) -> Option<u64> {
        let first = from / PAGE_BITS;
        self.pages.range(first..).find_map(|(index, page)| {
            let start = index * PAGE_BITS;
            let within = from.max(start) - start;
            match page {
                Page::Full => Some(start + within),
                Page::Mixed(words) => find_bit(words, within, false).map(|bit| start + bit),
            }
        })
    }

    /// The first clear bit at or after `from`, at most the number of bits.
    fn next_clear(&self, from: u64) -> u64 {
        let mut at = from;
        loop {
            let start = at / PAGE_BITS * PAGE_BITS;
            let clear = match self.pages.get(&(at / PAGE_BITS)) {
                None => Some(at - start),
                Some(Page::Full) => None,
                Some(Page::Mixed(words)) => find_bit(words, at - start, true),
            };
            if let Some(clear) = clear {
                return (start + clear).min(self.bits());
            }
            at = start + PAGE_BITS;
        }
    }
}

/// The first bit at or after `from` that is set, or clear when `inverted`.
fn find_bit(words: &[u64; PAGE_WORDS], from: u64, inverted: bool) -> Option<u64> {
    let flip = if inverted { u64::MAX } else { 0 };
    let first = from / 64;
    (first..to_u64(PAGE_WORDS)).find_map(|index| {
        let mut word = words[to_usize(index)] ^ flip;
        if index == first {
            word &= u64::MAX << (from % 64);
        }
        (word != 0).then(|| index * 64 + u64::from(word.trailing_zeros()))
    })
}

/// Entries of a bitmap's table.
pub(crate) fn table_entries(disk_length: u64, granularity_bits: u8, size: ClusterSize) -> u64 {
    let bits = disk_length.div_ceil(1 << granularity_bits);
    size.count_for(bits.div_ceil(8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: u64 = 9_000_000;

    /// One bool for each 512 bytes of the disk.
    fn model(bitmap: &Bitmap) -> Vec<bool> {
        (0..bitmap.disk_length().div_ceil(512))
            .map(|sector| bitmap.is_dirty(GuestOffset(sector * 512)))
            .collect()
    }

    #[derive(Debug, Clone)]
    enum Change {
        Set(u64, u64),
        Clear(u64, u64),
        Length(u64),
    }

    fn change() -> impl Strategy<Value = Change> {
        let range = || (0..DISK + 5000, prop_oneof![0..3000_u64, 0..DISK]);
        prop_oneof![
            4 => range().prop_map(|(at, length)| Change::Set(at, length)),
            2 => range().prop_map(|(at, length)| Change::Clear(at, length)),
            1 => (DISK / 2..DISK * 2).prop_map(Change::Length),
        ]
    }

    /// What must be marked, and what may be, sector by sector.
    fn apply(bitmap: &mut Bitmap, must: &mut Vec<bool>, change: &Change) {
        let mark = |must: &mut Vec<bool>, from: u64, to: u64, value| {
            let end = to_usize(to).min(must.len());
            must[to_usize(from).min(end)..end].fill(value);
        };
        match *change {
            Change::Set(at, length) => {
                bitmap.set(GuestOffset(at), length);
                if length > 0 {
                    mark(must, at / 512, (at + length).div_ceil(512), true);
                }
            }
            Change::Clear(at, length) => {
                bitmap.clear(GuestOffset(at), length);
                mark(must, at / 512, (at + length).div_ceil(512), false);
            }
            Change::Length(length) => {
                let length = length / 512 * 512;
                bitmap.set_disk_length(length).expect("few bits");
                must.resize(to_usize(length / 512), false);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn what_was_marked_and_not_cleared_is_marked(
            bits in 9_u8..18,
            changes in proptest::collection::vec(change(), 1..30),
        ) {
            let disk = DISK / 512 * 512;
            let mut bitmap = Bitmap::new(b"b", bits, disk).expect("valid");
            let mut must = vec![false; to_usize(disk / 512)];
            for change in &changes {
                apply(&mut bitmap, &mut must, change);
            }
            let found = model(&bitmap);
            prop_assert_eq!(found.len(), must.len());
            let missing = must.iter().zip(&found).position(|(must, found)| *must && !found);
            prop_assert_eq!(missing, None);
            let bytes: u64 = bitmap.dirty_ranges().map(|range| range.end - range.start).sum();
            prop_assert_eq!(bytes, found.iter().filter(|dirty| **dirty).count() as u64 * 512);
        }

        #[test]
        fn with_the_granularity_of_a_sector_marks_are_exact(
            ranges in proptest::collection::vec((0..DISK / 512, 0..200_u64, any::<bool>()), 1..30),
        ) {
            let disk = DISK / 512 * 512;
            let mut bitmap = Bitmap::new(b"b", 9, disk).expect("valid");
            let mut expected = vec![false; to_usize(disk / 512)];
            for (first, count, value) in ranges {
                let (start, length) = (GuestOffset(first * 512), count * 512);
                if value { bitmap.set(start, length) } else { bitmap.clear(start, length) }
                let end = to_usize(first + count).min(expected.len());
                expected[to_usize(first)..end].fill(value);
            }
            prop_assert_eq!(model(&bitmap), expected);
        }

        #[test]
        fn bits_written_to_clusters_and_loaded_are_the_same(
            bits in 9_u8..18,
            cluster_bits in 9_u32..17,
            changes in proptest::collection::vec(change(), 1..20),
        ) {
            let size = ClusterSize::from_bits(cluster_bits).expect("valid");
            let mut bitmap = Bitmap::new(b"b", bits, DISK / 512 * 512).expect("valid");
            for change in &changes {
                apply(&mut bitmap, &mut vec![false; 100_000], change);
            }
            let mut loaded = Bitmap::new(b"b", bits, bitmap.disk_length()).expect("valid");
            let mut bytes = vec![0; size.buffer_len()];
            for index in 0..bitmap.table_entries(size) {
                match bitmap.cluster(size, index) {
                    BitmapCluster::Clear => {}
                    BitmapCluster::Full => loaded.load_full_cluster(size, index),
                    BitmapCluster::Mixed => {
                        bitmap.cluster_bytes(size, index, &mut bytes);
                        prop_assert!(!loaded.load_cluster(size, index, &bytes));
                    }
                }
            }
            prop_assert_eq!(loaded, bitmap);
        }

        #[test]
        fn a_merge_marks_everything_of_both_and_nothing_that_shares_no_bit_with_either(
            own in 9_u8..18,
            other in 9_u8..18,
            ranges in proptest::collection::vec((0..DISK, 0..100_000_u64, any::<bool>()), 1..20),
        ) {
            let disk = DISK / 512 * 512;
            let mut a = Bitmap::new(b"a", own, disk).expect("valid");
            let mut b = Bitmap::new(b"b", other, disk).expect("valid");
            for (at, length, first) in ranges {
                if first { a.set(GuestOffset(at), length) } else { b.set(GuestOffset(at), length) }
            }
            let (before, theirs) = (model(&a), model(&b));
            a.merge(&b);
            let step = to_usize(a.granularity() / 512);
            for (sector, merged) in model(&a).into_iter().enumerate() {
                let granule = sector / step * step..((sector / step + 1) * step).min(theirs.len());
                let expected = before[sector] || theirs[granule].contains(&true);
                prop_assert_eq!(merged, expected, "sector {}", sector);
            }
        }
    }

    #[test]
    fn a_bitmap_of_64_tib_at_64_kib_takes_little_memory_even_when_it_is_full_of_holes() {
        let disk = 64 << 40;
        let mut bitmap = Bitmap::new(b"big", 16, disk).expect("valid");
        bitmap.set_all();
        assert_eq!(bitmap.dirty_bytes(), disk);
        assert!(bitmap.pages.values().all(|page| *page == Page::Full));
        for hole in 0..1000 {
            bitmap.clear(GuestOffset(hole << 33), 1 << 16);
        }
        assert_eq!(bitmap.dirty_ranges().count(), 1000);
        let mixed = bitmap.pages.values().filter(|page| **page != Page::Full);
        assert_eq!(mixed.count(), 1000);
        let error = Bitmap::new(b"big", 9, disk).expect_err("too many bits");
        assert!(matches!(error, Error::InvalidBitmap { .. }), "{error}");
    }

    #[test]
    fn bits_behind_the_end_of_the_disk_are_dropped_and_told() {
        let size = ClusterSize::MIN;
        let mut bitmap = Bitmap::new(b"b", 9, 512 * 10).expect("valid");
        assert!(bitmap.load_cluster(size, 0, &[0xff; 512]));
        assert_eq!(bitmap.dirty_bytes(), 512 * 10);
        let mut bytes = [0xee; 512];
        bitmap.cluster_bytes(size, 0, &mut bytes);
        assert_eq!(bytes[..3], [0xff, 0x03, 0]);
        assert_eq!(bitmap.cluster(size, 0), BitmapCluster::Mixed);
    }

    #[test]
    fn names_and_granularities_that_qemu_does_not_open_are_refused() {
        let long = vec![b'x'; MAX_BITMAP_NAME_BYTES + 1];
        for (name, bits) in [
            (&b""[..], 16),
            (&long, 16),
            (b"b", 8),
            (b"b", 32),
            (b"b", 255),
        ] {
            let error = Bitmap::new(name, bits, 1 << 20).expect_err("refused");
            assert!(matches!(error, Error::InvalidBitmap { .. }), "{error}");
        }
    }
}
