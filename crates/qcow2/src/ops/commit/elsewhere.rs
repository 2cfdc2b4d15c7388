//! The data of a commit into a base whose guest data lies in an external data file.
//!
//! What the base shows of the data file now is written over in place, through the journal; what it does not show is
//! written at once. Of a raw data file everything is written in place: read alone, it shows the disk.

use std::ops::Range;

use crate::edit::{Mapping, View};
use crate::entry::SUBCLUSTERS;
use crate::error::Result;
use crate::header::to_usize;
use crate::units::HostOffset;

use super::put::Put;

impl Put<'_, '_> {
    /// Whether a cluster of the base that is defined whole needs more than new data at its place.
    pub fn is_in_place_elsewhere(&mut self, cluster: u64) -> Result<bool> {
        if !self.edit.is_elsewhere() {
            return Ok(false);
        }
        let shown = match self.edit.mapping(View::Active, cluster)? {
            Mapping::Unallocated | Mapping::Zero { .. } => false,
            Mapping::Data { .. } | Mapping::Compressed(_) | Mapping::Subclusters { .. } => true,
        };
        Ok(shown || self.edit.is_raw_elsewhere())
    }

    /// Puts ranges of one cluster, which are not all zeros, into the data file.
    pub fn elsewhere(&mut self, cluster: u64, ranges: &[Range<u64>]) -> Result<()> {
        let old = self.edit.mapping(View::Active, cluster)?;
        let (data, zero) = match old {
            Mapping::Data { .. } => (u32::MAX, 0),
            Mapping::Subclusters { data, zero, .. } => (data, zero),
            Mapping::Zero { .. } => (0, u32::MAX),
            Mapping::Unallocated => (0, 0),
            Mapping::Compressed(_) => unreachable!("a data file has no compressed clusters"),
        };
        let touched = self.subclusters(ranges);
        if self.edit.is_raw_elsewhere() {
            for range in ranges {
                self.in_place(range.clone(), HostOffset(range.start))?;
            }
        } else {
            self.unseen(cluster, touched & !data)?;
            for range in ranges {
                self.seen(cluster, range, data)?;
            }
        }
        let data = data | touched;
        let host = HostOffset(cluster << self.size.bits());
        let new = match data {
            u32::MAX => Mapping::Data { host },
            data => Mapping::Subclusters {
                host: Some(host),
                data,
                zero: zero & !data,
            },
        };
        if new == old {
            return Ok(());
        }
        self.edit.set_mapping(View::Active, cluster, new)
    }

    /// The bytes of a subcluster, up to the disk's end; of the whole cluster without subclusters.
    fn part(&self, cluster: u64, index: u64) -> Range<u64> {
        let whole = self.bytes_of(cluster);
        if !self.extended {
            return whole;
        }
        let step = self.size.bytes() / SUBCLUSTERS;
        let start = (whole.start + index * step).min(whole.end);
        start..(start + step).min(whole.end)
    }

    fn parts(&self) -> u64 {
        if self.extended { SUBCLUSTERS } else { 1 }
    }

    /// Writes the subclusters in `which`, of which the base shows nothing now.
    fn unseen(&mut self, cluster: u64, which: u32) -> Result<()> {
        for index in (0..self.parts()).filter(|index| which >> index & 1 != 0) {
            let part = self.part(cluster, index);
            let (at, length) = (HostOffset(part.start), part.end - part.start);
            if length == 0 {
                continue;
            }
            self.edit.note_guest_blocks(part.clone())?;
            let bytes = match self.edit.is_plan() {
                true => vec![0; to_usize(length)],
                false => self.read(part)?,
            };
            self.edit.write_guest(at, &bytes)?;
            self.tell(length);
        }
        Ok(())
    }

    /// Has those parts of a range written in place that lie in the subclusters of `data`.
    fn seen(&mut self, cluster: u64, range: &Range<u64>, data: u32) -> Result<()> {
        for index in (0..self.parts()).filter(|index| data >> index & 1 != 0) {
            let part = self.part(cluster, index);
            let both = part.start.max(range.start)..part.end.min(range.end);
            if both.start < both.end {
                self.in_place(both.clone(), HostOffset(both.start))?;
            }
        }
        Ok(())
    }

    /// Zeros in a raw data file must be there for those who read it alone.
    pub fn zero_in_raw(&mut self, cluster: u64, old: Mapping) -> Result<()> {
        match old {
            Mapping::Unallocated | Mapping::Zero { .. } => Ok(()),
            Mapping::Data { .. } | Mapping::Compressed(_) | Mapping::Subclusters { .. } => {
                let bytes = self.bytes_of(cluster);
                self.in_place(bytes.clone(), HostOffset(bytes.start))
            }
        }
    }
}
