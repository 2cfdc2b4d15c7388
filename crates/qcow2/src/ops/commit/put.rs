//! The data of a commit into a qcow2 base: which clusters are written over in place, and which are new.
//!
//! | the layers above define | the base's cluster | becomes |
//! |---|---|---|
//! | all of it, with data | its own | is written over |
//! | all of it, with data | shared, compressed, zeros, or none | new |
//! | all of it, with zeros | any | zeros, without a cluster |
//! | a part of it | its own, with data there | that part is written over |
//! | a part of it | shared, compressed, zeros, or none | new, with the rest as the base shows it |
//!
//! In an external data file a cluster has one place only; see `elsewhere`.
//!
//! What is read to decide is tables only, so a plan decides as the commit itself does.

use std::ops::Range;

use crate::chain::StoredAs;
use crate::edit::copies::{Copies, Copy, From};
use crate::edit::{Edit, Mapping, View};
use crate::entry::SUBCLUSTERS;
use crate::error::Result;
use crate::header::{to_u64, to_usize};
use crate::units::{ClusterSize, GuestOffset, HostOffset};

use super::Views;

/// The most bytes of new clusters that are taken at a time.
const RUN_BYTES: u64 = 16 << 20;
/// How many bytes are read at a time.
const STEP_BYTES: u64 = 1 << 20;

/// Puts what the layers above define into the base.
pub(super) fn put(edit: &mut Edit, views: &Views<'_>) -> Result<()> {
    let header = edit.old().header();
    let mut put = Put {
        size: header.cluster_size,
        extended: header.extended_l2,
        has_zeros: header.version >= 3,
        bare: header.backing.is_none(),
        end: edit.virtual_size(),
        views,
        next_data: None,
        run: 0..0,
        copies: Copies::to_read(&views.top, &views.moving),
        part: None,
        edit,
    };
    for range in views.top.allocated(views.above) {
        views.go_on()?;
        put.range(range?)?;
    }
    put.flush_part()?;
    put.flush_run()?;
    put.copies.finish(put.edit)
}

/// Parts of one cluster that the layers above define.
struct Part {
    cluster: u64,
    ranges: Vec<Range<u64>>,
}

pub(super) struct Put<'a, 'w> {
    pub edit: &'a mut Edit<'w>,
    views: &'a Views<'a>,
    pub size: ClusterSize,
    pub extended: bool,
    /// The format can say zeros.
    has_zeros: bool,
    /// Nothing lies below the base: what it does not define is zeros.
    bare: bool,
    /// The disk's end in the base's new state.
    end: u64,
    /// The last answer of `next_data`, and from where on it is right.
    next_data: Option<(u64, Range<u64>)>,
    /// Clusters that are to be new.
    run: Range<u64>,
    /// What goes into new clusters.
    copies: Copies<'a>,
    part: Option<Part>,
}

impl Put<'_, '_> {
    fn range(&mut self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let cluster = at >> self.size.bits();
            let whole = self.bytes_of(cluster);
            if whole.start == at && whole.end <= range.end {
                self.flush_part()?;
                at = self.whole(cluster, range.end)?;
                continue;
            }
            let end = whole.end.min(range.end);
            self.add_part(cluster, at..end)?;
            at = end;
        }
        Ok(())
    }

    /// The bytes of a cluster, up to the disk's end.
    pub fn bytes_of(&self, cluster: u64) -> Range<u64> {
        let start = cluster << self.size.bits();
        start..(start + self.size.bytes()).min(self.end)
    }

    fn add_part(&mut self, cluster: u64, range: Range<u64>) -> Result<()> {
        if let Some(part) = self.part.as_mut().filter(|part| part.cluster == cluster) {
            part.ranges.push(range);
            return Ok(());
        }
        self.flush_part()?;
        self.part = Some(Part {
            cluster,
            ranges: vec![range],
        });
        Ok(())
    }

    fn flush_part(&mut self) -> Result<()> {
        match self.part.take() {
            Some(part) => self.partial(&part),
            None => Ok(()),
        }
    }

    /// A cluster that is defined whole, in a range that goes on to `end`: where the next one starts.
    fn whole(&mut self, cluster: u64, end: u64) -> Result<u64> {
        let bytes = self.bytes_of(cluster);
        if self.is_zero(&bytes)? {
            self.zero(cluster)?;
            return self.behind_zeros(cluster, end);
        }
        if self.is_in_place_elsewhere(cluster)? {
            self.elsewhere(cluster, std::slice::from_ref(&bytes))?;
            return Ok(bytes.end);
        }
        let own = match self.edit.mapping(View::Active, cluster)? {
            Mapping::Data { host } => Some(host),
            Mapping::Subclusters {
                host: Some(host),
                data: u32::MAX,
                ..
            } => Some(host),
            Mapping::Subclusters { .. }
            | Mapping::Zero { .. }
            | Mapping::Compressed(_)
            | Mapping::Unallocated => None,
        };
        match own {
            Some(host) if self.is_own(host)? => self.in_place(bytes.clone(), host)?,
            Some(_) | None => self.add_to_run(cluster)?,
        }
        Ok(bytes.end)
    }

    /// Bytes are to be moved, in a plan; or they were.
    pub fn tell(&self, bytes: u64) {
        if self.edit.is_plan() {
            self.views.moving.plan(bytes);
        } else {
            self.views.moving.moved(bytes);
        }
    }

    /// Has a range written in place, later, and read back.
    pub fn in_place(&mut self, guest: Range<u64>, host: HostOffset) -> Result<()> {
        let length = guest.end - guest.start;
        if self.edit.is_plan() {
            self.views.moving.plan(length * 2);
        }
        if self.edit.is_elsewhere() {
            return self.edit.overwrite_guest(guest);
        }
        self.edit.overwrite(GuestOffset(guest.start), host, length)
    }

    /// Whether the cluster may be written over in place.
    fn is_own(&mut self, host: HostOffset) -> Result<bool> {
        let own = self.edit.references(host)? == 1 && !self.edit.is_new(host)?;
        Ok(own && self.edit.can_overwrite())
    }

    fn add_to_run(&mut self, cluster: u64) -> Result<()> {
        let most = (RUN_BYTES >> self.size.bits()).max(1);
        if self.run.end != cluster || self.run.end - self.run.start >= most {
            self.flush_run()?;
            self.run = cluster..cluster;
        }
        self.run.end = cluster + 1;
        Ok(())
    }

    fn flush_run(&mut self) -> Result<()> {
        let run = std::mem::replace(&mut self.run, 0..0);
        let mut next = run.start;
        while next < run.end {
            let (host, count) = self.edit.place(next, run.end - next)?;
            self.views.go_on()?;
            self.fill(next, host, count)?;
            for cluster in 0..count {
                let host = HostOffset(host.0 + (cluster << self.size.bits()));
                let data = Mapping::Data { host };
                self.edit.set_mapping(View::Active, next + cluster, data)?;
            }
            next += count;
        }
        Ok(())
    }

    /// Has new clusters made what the top shows from guest cluster `first` on.
    fn fill(&mut self, first: u64, host: HostOffset, count: u64) -> Result<()> {
        let start = first << self.size.bits();
        let whole = start + (count << self.size.bits());
        if self.edit.is_plan() {
            self.views.moving.plan(whole - start);
            return Ok(());
        }
        let end = whole.min(self.end);
        let shown = end.min(self.views.top.len()).max(start);
        let place = |at: u64| HostOffset(host.0 + at - start);
        let mut at = start;
        while at < shown {
            let (length, from) = self.source(at, shown)?;
            let to = place(at);
            self.copies.add(Copy { to, length, from }, self.edit)?;
            at += length;
        }
        if shown < end {
            self.copy_by_hand(shown..end, place(shown))?;
        }
        if end < whole {
            let rest = vec![0; to_usize(whole - end)];
            self.edit.write_guest(place(end), &rest)?;
        }
        self.views.moving.moved(whole - shown);
        Ok(())
    }

    /// Where the top's bytes from `at` on come from, and how many of them, up to `end`.
    fn source(&self, at: u64, end: u64) -> Result<(u64, From)> {
        let stored = self.views.top.stored(at, end)?;
        let length = stored.end - at;
        let from = match stored.how {
            StoredAs::Plain { member, at } if self.views.top.layer(member).is_some() => {
                From::Member { member, at }
            }
            StoredAs::Plain { .. } | StoredAs::Packed { .. } | StoredAs::Zeros => From::Disk {
                start: GuestOffset(at),
                length,
            },
        };
        Ok((length, from))
    }

    fn copy_by_hand(&mut self, guest: Range<u64>, to: HostOffset) -> Result<()> {
        let mut at = guest.start;
        while at < guest.end {
            let bytes = self.read(at..guest.end.min(at + STEP_BYTES))?;
            self.edit
                .write_guest(HostOffset(to.0 + at - guest.start), &bytes)?;
            at += to_u64(bytes.len());
        }
        Ok(())
    }

    /// What the disk has after the commit: the top's bytes and, behind its end, the base's.
    pub fn read(&self, guest: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; to_usize(guest.end - guest.start)];
        let top = guest.end.min(self.views.top.len()).max(guest.start);
        let (above, rest) = bytes.split_at_mut(to_usize(top - guest.start));
        if !above.is_empty() {
            self.views.top.read_at(guest.start, above)?;
        }
        let base = guest.end.min(self.views.base.len()).max(top);
        let (there, _zeros) = rest.split_at_mut(to_usize(base - top));
        if !there.is_empty() {
            self.views.base.read_at(top, there)?;
        }
        Ok(bytes)
    }

    /// Whether the tables say that the top shows zeros there.
    fn is_zero(&mut self, bytes: &Range<u64>) -> Result<bool> {
        if bytes.end > self.views.top.len() {
            return Ok(false);
        }
        let known = self
            .next_data
            .clone()
            .filter(|(from, data)| *from <= bytes.start && bytes.start < data.end);
        let data = match known {
            Some((_, data)) => data,
            None => {
                let found = self.views.top.next_data(bytes.start)?;
                let data = found.unwrap_or(u64::MAX - 1..u64::MAX);
                self.next_data = Some((bytes.start, data.clone()));
                data
            }
        };
        Ok(data.start >= bytes.end)
    }

    /// Behind `cluster`, which is of zeros: where something may have to be done next.
    fn behind_zeros(&mut self, cluster: u64, end: u64) -> Result<u64> {
        let next = self.bytes_of(cluster).end;
        let entries = self.edit.old().header().l2_entries();
        if !self.bare || !(cluster + 1).is_multiple_of(entries) {
            return Ok(next);
        }
        // Where there are no tables, there are zeros already.
        let table = self
            .edit
            .next_table(View::Active, (cluster + 1) / entries)?;
        let table = table.map_or(u64::MAX, |table| {
            (table * entries).saturating_mul(self.size.bytes())
        });
        let zeros = self.next_data.as_ref().map_or(next, |(_, data)| data.start);
        let skip = self.size.start_of(table.min(zeros).min(end));
        Ok(skip.max(next))
    }

    fn zero(&mut self, cluster: u64) -> Result<()> {
        let mapping = self.edit.mapping(View::Active, cluster)?;
        if self.edit.is_raw_elsewhere() {
            return self.zero_in_raw(cluster, mapping);
        }
        let zeros = match mapping {
            Mapping::Unallocated => self.bare,
            Mapping::Zero { .. } => true,
            Mapping::Subclusters { data, zero, .. } => data == 0 && zero == u32::MAX,
            Mapping::Data { .. } | Mapping::Compressed(_) => false,
        };
        let zero = Mapping::Zero { host: None };
        match mapping {
            _ if zeros => Ok(()),
            _ if self.has_zeros => self.edit.set_mapping(View::Active, cluster, zero),
            _ if self.bare => {
                let none = Mapping::Unallocated;
                self.edit.set_mapping(View::Active, cluster, none)
            }
            Mapping::Data { host } if self.is_own(host)? => {
                let bytes = self.bytes_of(cluster);
                self.in_place(bytes, host)
            }
            Mapping::Data { .. }
            | Mapping::Compressed(_)
            | Mapping::Unallocated
            | Mapping::Zero { .. }
            | Mapping::Subclusters { .. } => self.add_to_run(cluster),
        }
    }

    fn partial(&mut self, part: &Part) -> Result<()> {
        let bytes = self.bytes_of(part.cluster);
        if self.is_zero(&bytes)? {
            return self.zero(part.cluster);
        }
        if self.edit.is_elsewhere() {
            return self.elsewhere(part.cluster, &part.ranges);
        }
        let mapping = self.edit.mapping(View::Active, part.cluster)?;
        let touched = self.subclusters(&part.ranges);
        let (host, data, zero) = match mapping {
            Mapping::Data { host } => (Some(host), u32::MAX, 0),
            Mapping::Subclusters { host, data, zero } => (host, data, zero),
            Mapping::Zero { .. } => (None, 0, u32::MAX),
            Mapping::Compressed(_) => (None, u32::MAX, 0),
            Mapping::Unallocated => (None, 0, 0),
        };
        match host.filter(|_| touched & !data == 0) {
            Some(host) if self.is_own(host)? => self.overwrite(&part.ranges, host),
            Some(_) | None if self.extended => self.renew(part.cluster, data | touched, zero),
            Some(_) | None => self.add_to_run(part.cluster),
        }
    }

    fn overwrite(&mut self, ranges: &[Range<u64>], host: HostOffset) -> Result<()> {
        for range in ranges {
            let place = HostOffset(host.0 + self.size.offset_in(range.start));
            self.in_place(range.clone(), place)?;
        }
        Ok(())
    }

    /// The subclusters that ranges of one cluster touch, a bit each; all without subclusters.
    pub fn subclusters(&self, ranges: &[Range<u64>]) -> u32 {
        if !self.extended {
            return u32::MAX;
        }
        let step = self.size.bytes() / SUBCLUSTERS;
        let touched = |range: &Range<u64>| {
            let first = self.size.offset_in(range.start) / step;
            let last = self.size.offset_in(range.end - 1) / step;
            (first..=last).fold(0_u32, |mask, bit| mask | 1 << bit)
        };
        ranges.iter().map(touched).fold(0, |mask, more| mask | more)
    }

    /// A new cluster with the subclusters of `data`; the others stay as they are.
    fn renew(&mut self, cluster: u64, data: u32, zero: u32) -> Result<()> {
        let host = self.edit.allocate(1)?;
        if !self.edit.is_plan() {
            let mut bytes = self.read(self.bytes_of(cluster))?;
            bytes.resize(self.size.buffer_len(), 0);
            self.edit.write_guest(host, &bytes)?;
        }
        self.tell(self.size.bytes());
        let mapping = Mapping::Subclusters {
            host: Some(host),
            data,
            zero: zero & !data,
        };
        self.edit.set_mapping(View::Active, cluster, mapping)
    }
}
