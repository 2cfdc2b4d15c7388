//! Bitmaps read back from the new state, before it is switched to: none may say less than it has to.

use std::ops::Range;

use crate::error::Result;
use crate::header::{to_u64, to_usize};
use crate::layer::Layer;
use crate::units::HostOffset;

use super::bitmaps::{ALL_ONES, Bitmap};
use super::records::BitmapRecord;

/// A bitmap in one state of the image.
struct Stored<'a> {
    layer: &'a Layer,
    table: Vec<u64>,
}

impl<'a> Stored<'a> {
    fn read(layer: &'a Layer, record: &BitmapRecord) -> Result<Self> {
        let count = to_usize(u64::from(record.table_entries()));
        let file = layer.file();
        let table = file.read_words("the table of a bitmap", record.table(), count)?;
        Ok(Self { layer, table })
    }

    /// One cluster of bits. The file may end in its last cluster; then zeros follow.
    fn bits(&self, cluster: usize) -> Result<Vec<u8>> {
        let length = self.layer.cluster_size().buffer_len();
        let word = self.table.get(cluster).copied().unwrap_or(0);
        if word <= ALL_ONES {
            let all = if word == ALL_ONES { 0xff } else { 0 };
            return Ok(vec![all; length]);
        }
        let mut bytes = vec![0; length];
        let there = self.layer.file_length().saturating_sub(word);
        let there = to_usize(there.min(to_u64(length)));
        let file = self.layer.file();
        file.read(
            "the bits of a bitmap",
            HostOffset(word),
            &mut bytes[..there],
        )?;
        Ok(bytes)
    }
}

/// Whether a bitmap of the new state has all bits that it had in the old one, up to the end of the disk, and
/// all that the change set.
pub(super) fn says_enough(bitmap: &Bitmap, old: &Layer, new: &Layer) -> Result<bool> {
    if let Some(bits) = &bitmap.bits
        && !is_stored(bits, new)?
    {
        return Ok(false);
    }
    let now = Stored::read(new, &bitmap.record)?;
    let per_cluster = new.cluster_size().bytes() * 8;
    let granularity = u32::from(bitmap.record.granularity_bits());
    let disk_bits = new.virtual_size().div_ceil(1 << granularity);
    if to_u64(now.table.len()) != disk_bits.div_ceil(per_cluster) {
        return Ok(false);
    }
    if let Some(record) = &bitmap.before {
        let before = Stored::read(old, record)?;
        let both = before.table.iter().zip(&now.table).enumerate();
        for (cluster, (was, is)) in both {
            let left = disk_bits - to_u64(cluster) * per_cluster;
            let same = was == is || *was == 0;
            if !same && !holds(&before.bits(cluster)?, &now.bits(cluster)?, left) {
                return Ok(false);
            }
        }
    }
    for range in &bitmap.marks {
        if !has_all(&now, range, per_cluster, disk_bits)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the new state has exactly these bits under this name.
fn is_stored(bits: &crate::bitmap::Bitmap, new: &Layer) -> Result<bool> {
    let all = new.stored_bitmaps()?;
    match all.iter().find(|stored| stored.name == bits.name()) {
        Some(stored) => Ok(new.read_bitmap(stored)? == *bits),
        None => Ok(false),
    }
}

/// Whether the first `count` bits of `is` have every bit of `was`.
fn holds(was: &[u8], is: &[u8], count: u64) -> bool {
    was.iter().zip(is).enumerate().all(|(index, (was, is))| {
        let mask = match count.saturating_sub(to_u64(index) * 8) {
            left if left >= 8 => 0xff,
            left => (1_u8 << left) - 1,
        };
        was & !is & mask == 0
    })
}

/// Whether every bit of `range` that lies on the disk is set.
fn has_all(now: &Stored<'_>, range: &Range<u64>, per_cluster: u64, disk_bits: u64) -> Result<bool> {
    let end = range.end.min(disk_bits);
    let mut bit = range.start;
    while bit < end {
        let cluster = bit / per_cluster;
        let bytes = now.bits(to_usize(cluster))?;
        let behind = end.min((cluster + 1) * per_cluster);
        let set = |bit: u64| {
            let within = bit % per_cluster;
            bytes[to_usize(within / 8)] >> (within % 8) & 1 != 0
        };
        if !(bit..behind).all(set) {
            return Ok(false);
        }
        bit = behind;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::holds;

    #[test]
    fn a_bit_that_is_lost_is_seen_up_to_the_end_of_the_disk_and_not_behind_it() {
        assert!(holds(&[0b101, 1], &[0b111, 1], 16));
        for (was, is, count, enough) in [
            ([0, 0b1000], [0, 0], 12, false),
            ([0, 0b1000], [0, 0], 11, true),
            ([0x80, 0], [0, 0xff], 16, false),
            ([0x80, 0], [0, 0xff], 0, true),
        ] {
            assert_eq!(holds(&was, &is, count), enough, "{was:?} {is:?} {count}");
        }
    }
}
