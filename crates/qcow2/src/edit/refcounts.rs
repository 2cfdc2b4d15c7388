//! The refcounts of the new state, and the clusters that it may take.
//!
//! # Invariants
//! * A cluster is taken only if its refcount is 0 in the old state, and at most once in a transaction. So
//!   what the new state gives up is not used again, and nothing that the old state refers to is written.
//! * A refcount block is moved to a cluster of the new state before the first refcount in it changes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::header::{Header, MAX_REFCOUNT_TABLE_BYTES, to_u64, to_usize};
use crate::layer::Layer;
use crate::refcounts::{TableEntry, most_references, pieces, read_refcount, write_refcount};
use crate::units::{ClusterSize, HostOffset};

use super::tables::Tables;

/// How many pieces of the old refcount blocks are kept (64 KiB each at most).
const OLD_PIECES: usize = 16;
/// Host offsets must fit the 56 bits of a table entry.
const MAX_FILE_BYTES: u64 = 1 << 56;

/// The refcounts of the old state.
#[derive(Debug)]
pub(super) struct Old {
    pub layer: Arc<Layer>,
    table: Vec<u64>,
    /// The most recently used first.
    pieces: Vec<(u64, Vec<u8>)>,
    /// What is referred to though its refcount is 0, in an image that is repaired: first cluster, behind the last.
    pub referenced: BTreeMap<u64, u64>,
}

impl Old {
    /// Whether nothing refers to the cluster, so that it may be written.
    fn is_free(&mut self, cluster: u64) -> Result<bool> {
        let range = self.referenced.range(..=cluster).next_back();
        if range.is_some_and(|(_, behind)| cluster < *behind) {
            return Ok(false);
        }
        Ok(self.get(cluster)? == 0)
    }

    pub fn get(&mut self, cluster: u64) -> Result<u64> {
        let header = self.layer.header();
        let order = header.refcount_order;
        let (bytes, count) = pieces(header);
        let block = usize::try_from(cluster / header.refcounts_per_block()).ok();
        let Some(place) = block.and_then(|block| self.table.get(block).copied()) else {
            return Ok(0);
        };
        if place == 0 {
            return Ok(0);
        }
        let key = cluster / count;
        let known = self.pieces.iter().position(|(known, _)| *known == key);
        match known {
            Some(0) => {}
            Some(index) => self.pieces[..=index].rotate_right(1),
            None => {
                let within = cluster % header.refcounts_per_block() / count * bytes;
                let mut piece = vec![0; to_usize(bytes)];
                let at = HostOffset(place + within);
                self.layer.file().read("a refcount block", at, &mut piece)?;
                self.pieces.truncate(OLD_PIECES - 1);
                self.pieces.insert(0, (key, piece));
            }
        }
        Ok(read_refcount(&self.pieces[0].1, cluster % count, order))
    }
}

/// Refcounts and free clusters during a transaction.
#[derive(Debug)]
pub(super) struct Refcounts {
    pub(super) old: Old,
    pub(super) size: ClusterSize,
    pub(super) order: u32,
    pub(super) per_block: u64,
    /// Where each block of the new state lies; 0: there is none.
    pub(super) table: Vec<u64>,
    pub(super) moved: Vec<bool>,
    /// Single clusters are taken from here on.
    cursor: u64,
    /// Runs of clusters are taken from here on.
    run_cursor: u64,
    /// Runs that were taken before the cursor came there: first cluster, count.
    runs: BTreeMap<u64, u64>,
    /// Behind the last cluster taken.
    end: u64,
    /// What was taken since it was last asked for: first cluster, count.
    fresh: Vec<(u64, u64)>,
    pub(super) changed: bool,
    /// All blocks are written anew: where there is none, refcounts are 0.
    pub(super) anew: bool,
    /// A refcount came from one to more, or from more to one.
    pub(super) crossed: bool,
}

impl Refcounts {
    /// With `damaged`, blocks that cannot be read are none.
    pub fn new(layer: &Arc<Layer>, damaged: bool) -> Result<Self> {
        let header = layer.header();
        let table = old_table(layer, damaged)?;
        Ok(Self {
            size: header.cluster_size,
            order: header.refcount_order,
            per_block: header.refcounts_per_block(),
            moved: vec![false; table.len()],
            table: table.clone(),
            old: Old {
                layer: Arc::clone(layer),
                table,
                pieces: Vec::new(),
                referenced: BTreeMap::new(),
            },
            anew: false,
            cursor: 1,
            run_cursor: 1,
            runs: BTreeMap::new(),
            end: 0,
            fresh: Vec::new(),
            changed: false,
            crossed: false,
        })
    }

    /// Whether refcounts are other than in the old state, or were meanwhile.
    pub fn changed(&self) -> bool {
        self.changed
    }

    /// Whether a refcount came from one to more or back since this was last asked.
    pub fn take_crossed(&mut self) -> bool {
        std::mem::take(&mut self.crossed)
    }

    /// Behind the last cluster that was taken, in clusters.
    pub fn taken_end(&self) -> u64 {
        self.end
    }

    /// Whether the old state has nothing in the cluster, so that it may be written.
    pub fn is_new(&mut self, cluster: u64) -> Result<bool> {
        self.old.is_free(cluster)
    }

    /// The refcount in the new state.
    pub fn get(&mut self, cluster: u64, tables: &mut Tables) -> Result<u64> {
        match self.moved_block(cluster) {
            Some(at) => {
                let block = tables.get(at)?;
                Ok(read_refcount(block, cluster % self.per_block, self.order))
            }
            None if self.anew => Ok(0),
            None => self.old.get(cluster),
        }
    }

    /// Takes `count` clusters in a row that the old state does not use; their refcounts stay 0.
    pub fn take_run(&mut self, count: u64) -> Result<u64> {
        assert!(count > 0, "a run has clusters");
        if count == 1 {
            return Ok(self.take_up_to(1)?.0);
        }
        let mut start = self.run_cursor.max(self.cursor);
        let mut length = 0;
        while length < count {
            let cluster = start + length;
            self.require_place(cluster)?;
            if let Some(behind) = self.run_at(cluster) {
                (start, length) = (behind, 0);
            } else if self.old.is_free(cluster)? {
                length += 1;
            } else {
                (start, length) = (cluster + 1, 0);
            }
        }
        self.run_cursor = start + count;
        self.runs.insert(start, count);
        self.took(start, count);
        Ok(start)
    }

    /// Takes the first clusters in a row that are free, at most `most`: the first, and how many.
    pub fn take_up_to(&mut self, most: u64) -> Result<(u64, u64)> {
        assert!(most > 0, "a run has clusters");
        loop {
            self.require_place(self.cursor)?;
            if let Some(behind) = self.run_at(self.cursor) {
                self.cursor = behind;
            } else if !self.old.is_free(self.cursor)? {
                self.cursor += 1;
            } else {
                break;
            }
        }
        let start = self.cursor;
        let mut behind = start + 1;
        while behind < start + most && self.run_at(behind).is_none() && self.old.is_free(behind)? {
            self.require_place(behind)?;
            behind += 1;
        }
        self.cursor = behind;
        self.runs = self.runs.split_off(&start);
        self.took(start, behind - start);
        Ok((start, behind - start))
    }

    fn took(&mut self, start: u64, count: u64) {
        self.end = self.end.max(start + count);
        self.fresh.push((start, count));
    }

    /// What was taken since this was last asked: first cluster, count.
    pub fn take_fresh(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.fresh)
    }

    /// Behind the run that `cluster` is the part of, if it is one that was taken.
    fn run_at(&self, cluster: u64) -> Option<u64> {
        let (start, count) = self.runs.range(..=cluster).next_back()?;
        let behind = start + count;
        (cluster < behind).then_some(behind)
    }

    /// Adds `change` to the refcount of a cluster.
    pub fn add(&mut self, cluster: u64, change: i64, tables: &mut Tables) -> Result<()> {
        let mut todo = vec![(cluster, change)];
        while let Some((cluster, change)) = todo.pop() {
            match self.moved_block(cluster) {
                Some(at) => self.add_in(at, cluster, change, tables)?,
                None => {
                    // The block moves first; its new and its old place have refcounts too.
                    todo.push((cluster, change));
                    self.move_block(cluster / self.per_block, &mut todo, tables)?;
                }
            }
        }
        Ok(())
    }

    fn add_in(
        &mut self,
        at: HostOffset,
        cluster: u64,
        change: i64,
        tables: &mut Tables,
    ) -> Result<()> {
        let index = cluster % self.per_block;
        let before = read_refcount(tables.get(at)?, index, self.order);
        let after = before.checked_add_signed(change);
        let place = HostOffset(cluster << self.size.bits());
        let Some(after) = after else {
            let reason =
                format!("the refcount of {place} is {before} and would become less than 0");
            return Err(not_whole(&self.old.layer, reason));
        };
        let most = most_references(self.order);
        if after > most {
            return Err(Error::RefcountOverflow {
                path: self.old.layer.path().to_owned(),
                cluster: place,
                most,
                bits: 1 << self.order,
            });
        }
        self.changed = true;
        self.crossed |= (before == 1 && after > 1) || (before > 1 && after == 1);
        write_refcount(tables.change(at)?, index, self.order, after);
        Ok(())
    }

    fn moved_block(&self, cluster: u64) -> Option<HostOffset> {
        let block = usize::try_from(cluster / self.per_block).ok()?;
        let moved = self.moved.get(block).copied().unwrap_or(false);
        moved.then(|| HostOffset(self.table[block]))
    }

    fn move_block(
        &mut self,
        block: u64,
        todo: &mut Vec<(u64, i64)>,
        tables: &mut Tables,
    ) -> Result<()> {
        let index = to_usize(block);
        assert!(
            block < MAX_REFCOUNT_TABLE_BYTES / 8,
            "places are bounded when they are taken"
        );
        if self.table.len() <= index {
            self.table.resize(index + 1, 0);
            self.moved.resize(index + 1, false);
        }
        let old = HostOffset(self.table[index]);
        let bytes = match old.0 {
            0 => vec![0; self.size.buffer_len()].into_boxed_slice(),
            _ => tables.get(old)?.into(),
        };
        let (cluster, _one) = self.take_up_to(1)?;
        let at = HostOffset(cluster << self.size.bits());
        tables.put(at, bytes)?;
        self.table[index] = at.0;
        self.moved[index] = true;
        todo.push((cluster, 1));
        if old.0 != 0 {
            todo.push((old.0 >> self.size.bits(), -1));
        }
        Ok(())
    }

    /// Gives the refcount table a place in the new state: its first byte, and its length in clusters.
    pub fn place_table(&mut self, old: &Header, tables: &mut Tables) -> Result<(HostOffset, u32)> {
        let bits = self.size.bits();
        for cluster in 0..u64::from(old.refcount_table_clusters) {
            self.add((old.refcount_table.0 >> bits) + cluster, -1, tables)?;
        }
        let mut clusters = u64::from(old.refcount_table_clusters);
        loop {
            clusters = clusters.max(self.size.count_for(to_u64(self.table.len()) * 8));
            let start = self.take_run(clusters)?;
            for cluster in start..start + clusters {
                self.add(cluster, 1, tables)?;
            }
            // Counting it may have needed blocks that it has no room for.
            if to_u64(self.table.len()) <= clusters * self.size.words() {
                let count = u32::try_from(clusters).unwrap_or(u32::MAX);
                return Ok((HostOffset(start << bits), count));
            }
            for cluster in start..start + clusters {
                self.add(cluster, -1, tables)?;
            }
        }
    }

    /// The words of the refcount table.
    pub fn table(&self) -> &[u64] {
        &self.table
    }

    /// Behind the last cluster that the new state uses, in clusters.
    pub fn used_end(&mut self, tables: &mut Tables) -> Result<u64> {
        let referenced = self.old.referenced.last_key_value();
        let referenced = referenced.map_or(0, |(_, behind)| *behind);
        Ok(self.counted_end(tables)?.max(referenced))
    }

    /// Behind the last cluster with a refcount in the new state, in clusters.
    pub(super) fn counted_end(&mut self, tables: &mut Tables) -> Result<u64> {
        for block in (0..to_u64(self.table.len())).rev() {
            if self.table[to_usize(block)] == 0 {
                continue;
            }
            let bytes = tables.get(HostOffset(self.table[to_usize(block)]))?;
            let used = |index: &u64| read_refcount(bytes, *index, self.order) != 0;
            if let Some(last) = (0..self.per_block).rev().find(used) {
                return Ok(block * self.per_block + last + 1);
            }
        }
        Ok(0)
    }

    fn require_place(&self, cluster: u64) -> Result<()> {
        let most = (MAX_FILE_BYTES >> self.size.bits())
            .min((MAX_REFCOUNT_TABLE_BYTES / 8).saturating_mul(self.per_block));
        if cluster < most {
            return Ok(());
        }
        Err(Error::Refused {
            path: self.old.layer.path().to_owned(),
            operation: "take a cluster",
            reason: format!("the file would have more than {most} clusters"),
        })
    }
}

fn not_whole(layer: &Layer, first: String) -> Error {
    Error::Damaged {
        path: layer.path().to_owned(),
        corruptions: 1,
        first,
    }
}

/// The refcount table of an image that was checked; its last cluster may be cut off by the file's end.
fn old_table(layer: &Layer, damaged: bool) -> Result<Vec<u64>> {
    let header = layer.header();
    let length = u64::from(header.refcount_table_clusters) * header.cluster_size.bytes();
    let there = layer.file_length().saturating_sub(header.refcount_table.0);
    let words = to_usize(length.min(there) / 8);
    let file = layer.file();
    let mut table = file.read_words("the refcount table", header.refcount_table, words)?;
    for word in &mut table {
        match TableEntry::decode(*word) {
            TableEntry::Reserved if !damaged => {
                let reason = format!("an entry of the refcount table is {word:#x}");
                return Err(not_whole(layer, reason));
            }
            TableEntry::Block(at) if !damaged || is_block(layer, at) => {}
            TableEntry::None => {}
            TableEntry::Reserved | TableEntry::Block(_) => *word = 0,
        }
    }
    while table.last() == Some(&0) {
        table.pop();
    }
    Ok(table)
}

/// Whether a refcount block at this place can be read.
fn is_block(layer: &Layer, at: HostOffset) -> bool {
    let size = layer.cluster_size();
    let there = layer.file().require("a refcount block", at, size.bytes());
    size.offset_in(at.0) == 0 && there.is_ok()
}

/// For texts in errors of other modules of the transaction.
pub(super) fn refused(path: &Path, operation: &'static str, reason: impl Into<String>) -> Error {
    Error::Refused {
        path: path.to_owned(),
        operation,
        reason: reason.into(),
    }
}
