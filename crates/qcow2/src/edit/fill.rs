//! Everything that any disk state shows of the disk below becomes the image's own: what rebase and flatten are.
//!
//! # Invariants
//! * Every view reads as before, whatever lies below afterwards.
//! * A cluster that several views show is copied once and shared, as far as refcounts can say it.
//! * What a view says itself is left alone: its data, its zeros, its VM state. What is zeros below stays
//!   unallocated where zeros will be seen.

use std::ops::Range;

use crate::control::Control;
use crate::error::Result;
use crate::header::to_usize;
use crate::refcounts::most_references;
use crate::units::{GuestOffset, HostOffset};

use super::below::{Below, Finder, Wanted, WantedRun};
use super::copies::{Copies, Copy, From};
use super::groups::{Group, Window};
use super::length::lay_over;
use super::transaction::Edit;
use super::views::Mapping;

/// What was filled in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filled {
    /// Bytes of data that the image has itself now, shared clusters once.
    pub bytes: u64,
}

/// Filling on its way.
struct Fill<'a, 'e, 'w> {
    edit: &'e mut Edit<'w>,
    finder: Finder<'a>,
    copies: Copies<'a>,
    control: &'a Control<'a>,
    /// Clusters that an L2 table describes.
    entries: u64,
}

/// Groups that can have one new cluster: they say the same now and see as much of it.
struct Sharers {
    groups: Vec<usize>,
    views: u64,
    old: Mapping,
    /// Bytes of the cluster that they see.
    seen: u64,
}

impl Edit<'_> {
    /// Has every disk state keep what it shows of the disk below, as far as it would not show the same
    /// with the other one below. `expected_bytes` is for those who look at the progress.
    ///
    /// # Errors
    /// [`crate::Error::Cancelled`]; or when a table or data cannot be read or written.
    pub fn fill(
        &mut self,
        below: &Below<'_>,
        control: &Control<'_>,
        expected_bytes: u64,
    ) -> Result<Filled> {
        if self.is_raw_elsewhere() && (below.old.is_some() || below.new.is_some()) {
            let reason =
                "its data file is raw, the whole disk by itself, so nothing can be below it";
            return Err(self.refused("change the backing file", reason));
        }
        let entries = self.shape().l2_entries();
        let disks = self.disks();
        let longest = disks.iter().map(|disk| disk.length).max().unwrap_or(0);
        let end = longest.div_ceil(self.shape().l2_coverage());
        let step = self.window_step();
        let mut fill = Fill {
            finder: Finder::new(below, self.size()),
            copies: Copies::new(below.old, control, expected_bytes),
            edit: self,
            control,
            entries,
        };
        for start in (0..end).step_by(to_usize(step)) {
            let indexes = start..end.min(start + step);
            let mut window = fill.edit.window(&disks, indexes)?;
            fill.window(&mut window)?;
            fill.edit.store_window(window)?;
        }
        fill.copies.finish(fill.edit)?;
        let bytes = fill.copies.bytes();
        Ok(Filled { bytes })
    }
}

impl Fill<'_, '_, '_> {
    fn window(&mut self, window: &mut Window) -> Result<()> {
        let mut index = window.indexes.start;
        while index < window.indexes.end {
            // Where nothing is wanted of what is below, no table is looked at.
            let clusters = index * self.entries..window.indexes.end * self.entries;
            let Some(next) = self.finder.next_data(clusters)? else {
                return Ok(());
            };
            index = next / self.entries;
            self.control.go_on(self.edit.old.path())?;
            let mut groups = self.edit.groups(window, index)?;
            self.table(index, &mut groups)?;
            for group in &groups {
                window.set(index, group);
            }
            index += 1;
        }
        Ok(())
    }

    /// Fills what one L2 table describes.
    fn table(&mut self, index: u64, groups: &mut [Group]) -> Result<()> {
        let first = index * self.entries;
        let mut at = 0;
        while let Some(open) = self.next_open(groups, at)? {
            at = open.end;
            let mut clusters = first + open.start..first + open.end;
            while let Some(run) = self.finder.next(clusters.clone())? {
                clusters.start = run.clusters.end;
                self.run(index, groups, run)?;
            }
        }
        Ok(())
    }

    /// The next entries of the table at which a view shows what lies below.
    fn next_open(&mut self, groups: &[Group], from: u64) -> Result<Option<Range<u64>>> {
        let empty = groups.iter().filter(|group| group.table.is_none());
        let size = self.edit.size();
        let empty_end = empty.map(|group| size.count_for(group.visible)).max();
        if let Some(end) = empty_end.filter(|end| *end > from) {
            return Ok(Some(from..end));
        }
        let mut found: Option<Range<u64>> = None;
        for entry in from..self.entries {
            let open = self.is_open(groups, entry)?;
            match &mut found {
                Some(range) if open => range.end = entry + 1,
                Some(_) => break,
                None if open => found = Some(entry..entry + 1),
                None => {}
            }
        }
        Ok(found)
    }

    fn is_open(&mut self, groups: &[Group], entry: u64) -> Result<bool> {
        for group in groups {
            if self.seen(group, entry) > 0 && shows_below(self.edit.group_mapping(group, entry)?) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// How many bytes of an entry's cluster the views of a group see.
    fn seen(&self, group: &Group, entry: u64) -> u64 {
        let size = self.edit.size();
        let start = entry << size.bits();
        group.visible.saturating_sub(start).min(size.bytes())
    }

    /// Fills clusters that are wanted, as many at a time as are alike in all views.
    fn run(&mut self, index: u64, groups: &mut [Group], run: WantedRun) -> Result<()> {
        let first = index * self.entries;
        let mut at = run.clusters.start;
        while at < run.clusters.end {
            let sharers = self.sharers(groups, at - first)?;
            let mut behind = at + 1;
            if is_plain(&sharers, self.edit.size().bytes()) {
                while behind < run.clusters.end
                    && is_alike(&sharers, &self.sharers(groups, behind - first)?)
                {
                    behind += 1;
                }
            }
            let what = run
                .what
                .behind((at - run.clusters.start) << self.edit.size().bits());
            for some in &sharers {
                self.provide(index, groups, some, at..behind, what)?;
            }
            at = behind;
        }
        Ok(())
    }

    /// The groups that show what lies below at an entry, those together that can share a cluster.
    fn sharers(&mut self, groups: &[Group], entry: u64) -> Result<Vec<Sharers>> {
        let most = most_references(self.edit.shape().refcount_order);
        let mut all: Vec<Sharers> = Vec::new();
        for (number, group) in groups.iter().enumerate() {
            let seen = self.seen(group, entry);
            let old = self.edit.group_mapping(group, entry)?;
            if seen == 0 || !shows_below(old) {
                continue;
            }
            let views = group.views();
            let fits = |some: &&mut Sharers| {
                some.old == old && some.seen == seen && some.views + views <= most
            };
            match all.iter_mut().find(fits) {
                Some(some) => {
                    some.groups.push(number);
                    some.views += views;
                }
                None => all.push(Sharers {
                    groups: vec![number],
                    views,
                    old,
                    seen,
                }),
            }
        }
        Ok(all)
    }

    /// Gives clusters to all views of some groups.
    fn provide(
        &mut self,
        index: u64,
        groups: &mut [Group],
        some: &Sharers,
        clusters: Range<u64>,
        what: Wanted,
    ) -> Result<()> {
        let first = index * self.entries;
        let mut put = |fill: &mut Self, cluster: u64, new: Mapping| -> Result<()> {
            for group in &some.groups {
                let group = &mut groups[*group];
                fill.edit.set_group_mapping(group, cluster - first, new)?;
            }
            Ok(())
        };
        match (what, some.old) {
            (Wanted::Zeros, old) if self.edit.first.raw.version.get() >= 3 => {
                for cluster in clusters {
                    put(self, cluster, zeros_over(old))?;
                }
            }
            (_, Mapping::Subclusters { host, data, zero }) => {
                let to = self.take(clusters.start, 1, some.views)?.0;
                self.assemble(clusters.start, to, some)?;
                let new = match zero {
                    0 => Mapping::Data { host: to },
                    zero => Mapping::Subclusters {
                        host: Some(to),
                        data: !zero,
                        zero,
                    },
                };
                assert!(data & zero == 0, "a subcluster is one thing");
                put(self, clusters.start, new)?;
                if let Some(host) = host.filter(|_| !self.edit.is_elsewhere()) {
                    let views = i64::try_from(some.views).unwrap_or(i64::MAX);
                    self.edit.add_references(host, 1, -views)?;
                }
            }
            (what, _) => {
                let bits = self.edit.size().bits();
                let mut at = clusters.start;
                while at < clusters.end {
                    let (to, count) = self.take(at, clusters.end - at, some.views)?;
                    let here = what.behind((at - clusters.start) << bits);
                    let from = self.source(here, at..at + count, some.seen);
                    let length = count << bits;
                    self.copies.add(Copy { to, length, from }, self.edit)?;
                    for number in 0..count {
                        let host = HostOffset(to.0 + (number << bits));
                        put(self, at + number, Mapping::Data { host })?;
                    }
                    at += count;
                }
            }
        }
        Ok(())
    }

    /// Takes at most `count` clusters for guest clusters from `first` on, with a reference for each of `views`.
    fn take(&mut self, first: u64, count: u64, views: u64) -> Result<(HostOffset, u64)> {
        let (to, count) = self.edit.place(first, count)?;
        if views > 1 {
            let more = i64::try_from(views - 1).unwrap_or(i64::MAX);
            self.edit.add_references(to, count, more)?;
        }
        Ok((to, count))
    }

    /// A cluster of which only a part is seen is read, so that zeros are behind that part.
    fn source(&self, what: Wanted, clusters: Range<u64>, seen: u64) -> From {
        let size = self.edit.size();
        let whole = seen == size.bytes();
        assert!(
            whole || clusters.end - clusters.start == 1,
            "only the last is not whole"
        );
        match what {
            Wanted::Zeros => From::Zeros,
            Wanted::Member { member, at } if whole => From::Member { member, at },
            Wanted::Member { .. } | Wanted::Disk => From::Disk {
                start: GuestOffset(clusters.start << size.bits()),
                length: if whole {
                    (clusters.end - clusters.start) << size.bits()
                } else {
                    seen
                },
            },
        }
    }

    /// Writes a cluster whose subclusters come from the image and from below.
    fn assemble(&mut self, cluster: u64, to: HostOffset, some: &Sharers) -> Result<()> {
        let Mapping::Subclusters { host, data, zero } = some.old else {
            unreachable!("only clusters with subclusters are assembled");
        };
        if self.edit.is_plan() {
            return Ok(());
        }
        let mut bytes = vec![0; self.edit.size().buffer_len()];
        let mut own = bytes.clone();
        if let Some(host) = host.filter(|_| data != 0) {
            self.edit.read_guest(host, &mut own)?;
        }
        self.finder.read(cluster, &mut bytes)?;
        bytes[to_usize(some.seen)..].fill(0);
        lay_over(&mut bytes, &own, data, zero);
        if self.edit.is_elsewhere() {
            return self.edit.write_rest(cluster, &bytes);
        }
        self.edit.write_guest(to, &bytes)
    }
}

/// What zeros make of an entry that shows what lies below.
fn zeros_over(old: Mapping) -> Mapping {
    match old {
        Mapping::Subclusters { host, data, .. } => Mapping::Subclusters {
            host,
            data,
            zero: !data,
        },
        Mapping::Unallocated
        | Mapping::Zero { .. }
        | Mapping::Data { .. }
        | Mapping::Compressed(_) => Mapping::Zero { host: None },
    }
}

fn shows_below(mapping: Mapping) -> bool {
    match mapping {
        Mapping::Unallocated => true,
        Mapping::Subclusters { data, zero, .. } => data | zero != u32::MAX,
        Mapping::Zero { .. } | Mapping::Data { .. } | Mapping::Compressed(_) => false,
    }
}

/// Whether whole clusters are missing in all of them, so that neighbours can go together.
fn is_plain(all: &[Sharers], whole: u64) -> bool {
    let plain = |some: &Sharers| some.old == Mapping::Unallocated && some.seen == whole;
    all.iter().all(plain)
}

fn is_alike(all: &[Sharers], others: &[Sharers]) -> bool {
    let same = |(one, other): (&Sharers, &Sharers)| {
        one.groups == other.groups && one.old == other.old && one.seen == other.seen
    };
    all.len() == others.len() && all.iter().zip(others).all(same)
}
