//! Clusters of zeros as version 2 of the format can say them: nothing where nothing lies below, else data.

use std::ops::Range;

use crate::control::Control;
use crate::error::Result;
use crate::header::to_usize;
use crate::refcounts::most_references;
use crate::units::HostOffset;

use super::groups::{Group, Window};
use super::transaction::Edit;
use super::views::Mapping;

impl Edit<'_> {
    /// Takes all zero clusters out of all disk states, which read as before. What several states share stays
    /// shared.
    pub(super) fn expand_zeros(&mut self, control: &Control<'_>) -> Result<()> {
        let disks = self.disks();
        let longest = disks.iter().map(|disk| disk.length).max().unwrap_or(0);
        let end = longest.div_ceil(self.shape().l2_coverage());
        let step = self.window_step();
        for start in (0..end).step_by(to_usize(step)) {
            let mut window = self.window(&disks, start..end.min(start + step))?;
            self.expand_window(&mut window, control)?;
            self.store_window(window)?;
        }
        Ok(())
    }

    fn expand_window(&mut self, window: &mut Window, control: &Control<'_>) -> Result<()> {
        for index in Range::clone(&window.indexes) {
            control.go_on(&self.path)?;
            let mut groups = self.groups(window, index)?;
            if groups.iter().all(|group| group.table.is_none()) {
                continue;
            }
            for entry in 0..self.shape().l2_entries() {
                self.expand_entry(&mut groups, entry)?;
            }
            for group in &groups {
                window.set(index, group);
            }
        }
        Ok(())
    }

    fn expand_entry(&mut self, groups: &mut [Group], entry: u64) -> Result<()> {
        let most = most_references(self.shape().refcount_order);
        let mut shared: Option<(HostOffset, u64)> = None;
        for group in groups {
            let Mapping::Zero { host } = self.group_mapping(group, entry)? else {
                continue;
            };
            let views = group.views();
            let new = if self.first.has_backing() {
                let (at, had) = match shared.filter(|(_, had)| had + views <= most) {
                    Some((at, had)) => (at, had),
                    None => (self.zero_cluster()?, 0),
                };
                // The first reference came with the cluster.
                let more = views - u64::from(had == 0);
                self.add_references(at, 1, i64::try_from(more).unwrap_or(i64::MAX))?;
                shared = Some((at, had + views));
                Mapping::Data { host: at }
            } else {
                Mapping::Unallocated
            };
            self.set_group_mapping(group, entry, new)?;
            if let Some(host) = host {
                let views = i64::try_from(views).unwrap_or(i64::MAX);
                self.add_references(host, 1, -views)?;
            }
        }
        Ok(())
    }

    fn zero_cluster(&mut self) -> Result<HostOffset> {
        let at = self.allocate(1)?;
        let zeros = vec![0; self.size().buffer_len()];
        self.write_data(at, &zeros)?;
        Ok(at)
    }
}
