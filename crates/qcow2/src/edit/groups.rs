//! L2 tables with the views that show them, so that what several views share is changed once and stays shared.
//!
//! # Invariants
//! * Views are in one group only if they have the same table at an index and see the same part of it: what
//!   lies behind the end of a shorter disk is not filled because a longer one shows it.
//! * A group's table gets one reference for each view, and so does every cluster that is put into it.

use std::ops::Range;

use crate::entry::{COPIED, L1Entry};
use crate::error::Result;
use crate::header::{to_u64, to_usize};
use crate::refcounts::most_references;
use crate::units::HostOffset;

use super::transaction::Edit;
use super::views::{Mapping, View};

/// The most words of L1 tables that a window has, of all views together.
const WINDOW_WORDS: u64 = 8 << 20;

/// A disk state and its length.
#[derive(Debug, Clone, Copy)]
pub(super) struct Disk {
    pub view: View,
    pub length: u64,
}

/// A part of the L1 tables of all views.
#[derive(Debug)]
pub(super) struct Window {
    pub indexes: Range<u64>,
    disks: Vec<Disk>,
    /// For each disk, its words from the first index on.
    words: Vec<Vec<u64>>,
    changed: Vec<bool>,
}

/// Views with one L2 table, or with none, at the same index.
#[derive(Debug)]
pub(super) struct Group {
    pub table: Option<HostOffset>,
    /// Indexes of the disks in the window.
    disks: Vec<usize>,
    /// How many bytes of their disks lie in what the table describes.
    pub visible: u64,
    /// Whether the active disk is one of them.
    pub active: bool,
    own: bool,
}

impl Group {
    /// How many views show it.
    pub fn views(&self) -> u64 {
        to_u64(self.disks.len())
    }
}

impl Edit<'_> {
    /// All disk states with their lengths.
    pub(super) fn disks(&self) -> Vec<Disk> {
        let own = self.virtual_size();
        let snapshots = self.snapshots.iter().enumerate();
        let snapshots = snapshots.map(|(index, record)| Disk {
            view: View::Snapshot(index),
            length: record.virtual_size().unwrap_or(own),
        });
        let active = Disk {
            view: View::Active,
            length: own,
        };
        std::iter::once(active).chain(snapshots).collect()
    }

    /// How many indexes a window has, so that its words fit in memory.
    pub(super) fn window_step(&self) -> u64 {
        WINDOW_WORDS / (to_u64(self.snapshots.len()) + 1)
    }

    pub(super) fn window(&mut self, disks: &[Disk], indexes: Range<u64>) -> Result<Window> {
        let mut words = Vec::new();
        for disk in disks {
            let l1 = self.l1(disk.view)?;
            let end = to_usize(indexes.end).min(l1.len());
            words.push(l1[to_usize(indexes.start).min(end)..end].to_vec());
        }
        Ok(Window {
            indexes,
            changed: vec![false; disks.len()],
            disks: disks.to_vec(),
            words,
        })
    }

    /// Puts what was changed in a window into the L1 tables.
    pub(super) fn store_window(&mut self, window: Window) -> Result<()> {
        let all = window.disks.iter().zip(window.words).zip(window.changed);
        for ((disk, words), _) in all.filter(|(_, changed)| *changed) {
            for (index, word) in (window.indexes.start..).zip(words) {
                if self.l1(disk.view)?[to_usize(index)] != word {
                    self.set_l1(disk.view, index, word)?;
                }
            }
        }
        Ok(())
    }

    /// The groups at an index of the L1 tables.
    pub(super) fn groups(&self, window: &Window, index: u64) -> Result<Vec<Group>> {
        let coverage = self.shape().l2_coverage();
        let at = to_usize(index - window.indexes.start);
        // More views than this cannot have one table.
        let most = to_usize(most_references(self.shape().refcount_order).min(1 << 20));
        let mut groups: Vec<Group> = Vec::new();
        for (number, disk) in window.disks.iter().enumerate() {
            let visible = disk.length.saturating_sub(index * coverage).min(coverage);
            let Some(word) = window.words[number].get(at).filter(|_| visible > 0) else {
                continue;
            };
            let table = self.decode_l1(*word)?.map(|entry: L1Entry| entry.table);
            let active = disk.view == View::Active;
            let fits = |group: &&mut Group| {
                group.table == table && group.visible == visible && group.disks.len() < most
            };
            match groups.iter_mut().find(fits) {
                Some(group) => {
                    group.disks.push(number);
                    group.active |= active;
                }
                None => groups.push(Group {
                    table,
                    disks: vec![number],
                    visible,
                    active,
                    own: false,
                }),
            }
        }
        Ok(groups)
    }

    /// What a group's table says of its cluster `index`.
    pub(super) fn group_mapping(&mut self, group: &Group, index: u64) -> Result<Mapping> {
        match group.table {
            None => Ok(Mapping::Unallocated),
            Some(table) => self.table_mapping(table, index),
        }
    }

    /// Sets what a group's table says of a cluster. References are the caller's.
    pub(super) fn set_group_mapping(
        &mut self,
        group: &mut Group,
        index: u64,
        new: Mapping,
    ) -> Result<()> {
        let table = self.own_group_table(group)?;
        let view = if group.active && group.views() == 1 {
            View::Active
        } else {
            // Others see it too, so no flag says that it has one reference.
            View::Snapshot(0)
        };
        self.write_entry(view, table, index, new)
    }

    /// The group's table in a cluster where it may be changed; a new one if there is none.
    fn own_group_table(&mut self, group: &mut Group) -> Result<HostOffset> {
        if let Some(table) = group.table.filter(|_| group.own) {
            return Ok(table);
        }
        let views = i64::try_from(group.views()).unwrap_or(i64::MAX);
        let at = self.allocate(1)?;
        if views > 1 {
            self.add_references(at, 1, views - 1)?;
        }
        let bytes = match group.table {
            Some(old) => self.tables.get(old)?.into(),
            None => vec![0; self.size().buffer_len()].into_boxed_slice(),
        };
        self.tables.put(at, bytes)?;
        if let Some(old) = group.table {
            // What it refers to is counted once for each view already, not once for each table.
            self.add_references(old, 1, -views)?;
        }
        (group.table, group.own) = (Some(at), true);
        Ok(at)
    }
}

impl Window {
    /// Lets the views of a group have the table that it got.
    pub fn set(&mut self, index: u64, group: &Group) {
        let Some(table) = group.table.filter(|_| group.own) else {
            return;
        };
        let copied = if group.views() == 1 { COPIED } else { 0 };
        let at = to_usize(index - self.indexes.start);
        for number in &group.disks {
            self.words[*number][at] = table.0 | copied;
            self.changed[*number] = true;
        }
    }
}
