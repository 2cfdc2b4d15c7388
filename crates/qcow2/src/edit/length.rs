//! Another length for the virtual disk of the new state.
//!
//! # Invariants
//! * What is behind the end is in no table: a disk that grows again reads zeros there, never what was cut
//!   off, and never what a longer backing file has there.
//! * Internal snapshots keep the length that they have.

use std::ops::Range;

use stead_sys::copy::is_zero;

use crate::chain::Chain;
use crate::entry::SUBCLUSTERS;
use crate::error::Result;
use crate::header::{MAX_L1_BYTES, SECTOR_BYTES, to_usize};
use crate::units::GuestOffset;

use super::transaction::Edit;
use super::views::{Mapping, View};

impl Edit<'_> {
    /// Gives the virtual disk the length `after`, in bytes. Bytes that are added are zeros, and dirty in every
    /// bitmap; `below` is the disk below this image, needed to grow an image that has a backing file.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] when the format cannot say the length, or `below` is missing; or when a table
    /// or data cannot be read or written.
    pub fn resize(&mut self, after: u64, below: Option<&Chain>) -> Result<()> {
        let before = self.virtual_size();
        self.check_length(after, below)?;
        self.check_bitmap_size(after)?;
        self.keep_snapshot_lengths(before);
        self.drop_behind(before.min(after))?;
        self.fit_l1(after);
        if after > before {
            self.clear_behind(before, after)?;
            self.clear_last_cluster(before, below)?;
            self.first.raw.virtual_size.set(after);
            self.hide_below(before, after, below)?;
        } else {
            self.clear_last_cluster(after, None)?;
            self.first.raw.virtual_size.set(after);
        }
        self.resize_bitmaps(before, after)
    }

    fn check_length(&self, after: u64, below: Option<&Chain>) -> Result<()> {
        let operation = "change the length of the disk";
        if !after.is_multiple_of(SECTOR_BYTES) || after > i64::MAX.unsigned_abs() {
            let reason = format!("{after} bytes are not whole sectors below 2^63 bytes");
            return Err(self.refused(operation, reason));
        }
        let entries = after.div_ceil(self.shape().l2_coverage());
        if entries > MAX_L1_BYTES / 8 {
            let reason = format!("{after} bytes need {entries} L1 entries, more than 32 MiB");
            return Err(self.refused(operation, reason));
        }
        if after > self.virtual_size() && self.old.header().backing.is_some() && below.is_none() {
            let reason = "it has a backing file, which may have something behind the end; give the files below";
            return Err(self.refused(operation, reason));
        }
        Ok(())
    }

    /// Old snapshot entries do not say how long the disk was: it was as long as it is now.
    fn keep_snapshot_lengths(&mut self, before: u64) {
        for record in &mut self.snapshots {
            if record.virtual_size().is_none() {
                record.set_virtual_size(before);
                self.snapshots_changed = true;
            }
        }
    }

    /// Takes everything behind the first `length` bytes out of the active tables; VM state that QEMU left
    /// there too.
    fn drop_behind(&mut self, length: u64) -> Result<()> {
        let entries = self.shape().l2_entries();
        let first = self.size().count_for(length);
        let mut next = self.next_table(View::Active, first / entries)?;
        while let Some(table) = next {
            next = self.next_table(View::Active, table + 1)?;
            if table * entries < first {
                for cluster in first..(table + 1) * entries {
                    self.set_mapping(View::Active, cluster, Mapping::Unallocated)?;
                }
            } else {
                self.drop_table(View::Active, table)?;
            }
        }
        Ok(())
    }

    /// Takes everything out of the active disk: the layers below are seen, or zeros.
    ///
    /// # Errors
    /// When a table cannot be read or written.
    pub fn empty(&mut self) -> Result<()> {
        self.drop_behind(0)
    }

    fn fit_l1(&mut self, length: u64) {
        let needed = length.div_ceil(self.shape().l2_coverage()).max(1);
        if self.active.len() != to_usize(needed) {
            let mut words = std::mem::take(&mut self.active);
            words.resize(to_usize(needed), 0);
            self.set_active(words);
        }
    }

    /// Makes what follows `end` in its cluster zeros. Without `below`, a cluster that shows what lies below is
    /// left alone.
    fn clear_last_cluster(&mut self, end: u64, below: Option<&Chain>) -> Result<()> {
        let size = self.size();
        let (cluster, kept) = (end >> size.bits(), to_usize(size.offset_in(end)));
        if kept == 0 || self.is_elsewhere() && end < self.virtual_size() {
            // Of an external data file, what the old state shows is cut off by the journal.
            return Ok(());
        }
        let mapping = self.mapping(View::Active, cluster)?;
        let mut bytes = vec![0; size.buffer_len()];
        if !self.read_cluster(mapping, cluster, below, &mut bytes)? || is_zero(&bytes[kept..]) {
            return Ok(());
        }
        bytes[kept..].fill(0);
        if self.is_elsewhere() {
            return self.own_last_cluster(cluster, &bytes);
        }
        let host = self.allocate(1)?;
        self.write_guest(host, &bytes)?;
        self.set_mapping(View::Active, cluster, Mapping::Data { host })
    }

    /// Reads a cluster as the guest sees it; `false` when it is zeros, or what lies below is seen and is not
    /// known.
    fn read_cluster(
        &mut self,
        mapping: Mapping,
        cluster: u64,
        below: Option<&Chain>,
        bytes: &mut [u8],
    ) -> Result<bool> {
        let start = cluster << self.size().bits();
        match mapping {
            Mapping::Zero { .. } => return Ok(false),
            Mapping::Data { host } => self.read_guest(host, bytes)?,
            Mapping::Compressed(compressed) => self.old.read_compressed(compressed, 0, bytes)?,
            Mapping::Unallocated => {
                let Some(below) = below else {
                    return Ok(false);
                };
                read_below(below, start, bytes)?;
            }
            Mapping::Subclusters { host, data, zero } => {
                if data | zero != u32::MAX && below.is_none() && self.old.header().backing.is_some()
                {
                    return Ok(false);
                }
                let mut own = vec![0; bytes.len()];
                if let Some(host) = host.filter(|_| data != 0) {
                    self.read_guest(host, &mut own)?;
                }
                if let Some(below) = below {
                    read_below(below, start, bytes)?;
                }
                lay_over(bytes, &own, data, zero);
            }
        }
        Ok(true)
    }

    /// Lets the bytes from `before` to `after` be zeros where a longer file below would be seen.
    fn hide_below(&mut self, before: u64, after: u64, below: Option<&Chain>) -> Result<()> {
        let Some(below) = below else {
            return Ok(());
        };
        let size = self.size();
        let end = after.min(below.len());
        let mut next = (before < end).then(|| before.next_multiple_of(size.bytes()));
        while let Some(start) = next {
            let Some(range) = below.next_data(start)?.filter(|range| range.start < end) else {
                break;
            };
            let clusters =
                range.start.max(start) >> size.bits()..size.count_for(range.end.min(end));
            next = Some(clusters.end << size.bits());
            self.set_zeros(clusters)?;
        }
        Ok(())
    }

    fn set_zeros(&mut self, clusters: Range<u64>) -> Result<()> {
        for cluster in clusters {
            if self.first.raw.version.get() >= 3 {
                self.set_mapping(View::Active, cluster, Mapping::Zero { host: None })?;
                continue;
            }
            let host = self.allocate(1)?;
            let zeros = vec![0; self.size().buffer_len()];
            self.write_guest(host, &zeros)?;
            self.set_mapping(View::Active, cluster, Mapping::Data { host })?;
        }
        Ok(())
    }
}

/// Behind the end of the disk below are zeros.
fn read_below(below: &Chain, start: u64, bytes: &mut [u8]) -> Result<()> {
    let there = below.len().saturating_sub(start);
    let there = usize::try_from(there)
        .unwrap_or(usize::MAX)
        .min(bytes.len());
    let (data, behind) = bytes.split_at_mut(there);
    behind.fill(0);
    if data.is_empty() {
        return Ok(());
    }
    below.read_at(GuestOffset(start).0, data)
}

/// Puts the subclusters with data, and those of zeros, over what lies below.
pub(super) fn lay_over(bytes: &mut [u8], own: &[u8], data: u32, zero: u32) {
    let step = bytes.len() / to_usize(SUBCLUSTERS);
    for (index, (seen, own)) in bytes.chunks_mut(step).zip(own.chunks(step)).enumerate() {
        if data >> index & 1 != 0 {
            seen.copy_from_slice(own);
        } else if zero >> index & 1 != 0 {
            seen.fill(0);
        }
    }
}
