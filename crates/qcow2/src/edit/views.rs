//! L1 and L2 tables of the active disk and of the internal snapshots, entry by entry.
//!
//! # Invariants
//! * A table is changed only where this transaction has it alone: a table of the old state, or one that
//!   others share, is copied first.
//! * A cluster has one reference for each view that shows it, also where views share an L2 table.
//! * An entry that is replaced gives its references up.
//! * The copied flags of the active tables are set right when the transaction ends, whatever was done.

use crate::entry::{
    COMPRESSED, COPIED, CompressedCluster, L1Entry, L2Entry, OFFSET, Standard, ZERO,
};
use crate::error::{Error, Result};
use crate::header::{SECTOR_BYTES, to_u64, to_usize};
use crate::units::{GuestOffset, HostOffset};

use super::transaction::Edit;

/// A disk state in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// What the guest sees and writes.
    Active,
    /// The internal snapshot with this index in the table.
    Snapshot(usize),
}

/// What an L2 entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// The layer below is seen, or zeros.
    Unallocated,
    /// Zeros. `host` is room kept for data.
    Zero {
        /// The room, if there is any.
        host: Option<HostOffset>,
    },
    /// Data of a whole cluster.
    Data {
        /// Where it is.
        host: HostOffset,
    },
    /// Compressed data.
    Compressed(CompressedCluster),
    /// A cluster with 32 subclusters, in an image that has them.
    Subclusters {
        /// Where the data is.
        host: Option<HostOffset>,
        /// Subclusters with data, the first in bit 0.
        data: u32,
        /// Subclusters of zeros.
        zero: u32,
    },
}

impl Mapping {
    fn of(entry: L2Entry) -> Self {
        match entry {
            L2Entry::Compressed(cluster) => Self::Compressed(cluster),
            L2Entry::Whole { state, host, .. } => match (state, host) {
                (Standard::Data, Some(host)) => Self::Data { host },
                (Standard::Zero, host) => Self::Zero { host },
                (Standard::Data | Standard::Unallocated, _) => Self::Unallocated,
            },
            L2Entry::Sub { bitmap, host, .. } => {
                let (data, zero) = bitmap.parts();
                match (host, data, zero) {
                    (None, 0, 0) => Self::Unallocated,
                    (host, data, zero) => Self::Subclusters { host, data, zero },
                }
            }
        }
    }

    /// The cluster of the file, where it is a whole one.
    #[must_use]
    pub fn host(&self) -> Option<HostOffset> {
        match self {
            Self::Unallocated | Self::Compressed(_) => None,
            Self::Zero { host } | Self::Subclusters { host, .. } => *host,
            Self::Data { host } => Some(*host),
        }
    }

    /// The words of the entry, without the copied flag.
    fn encode(self, extended: bool, cluster_bits: u32) -> (u64, u64) {
        let place = |host: Option<HostOffset>| host.map_or(0, |host| host.0);
        match self {
            Self::Unallocated => (0, 0),
            Self::Zero { host } if extended => (place(host), u64::MAX << 32),
            Self::Zero { host } => (place(host) | ZERO, 0),
            Self::Data { host } if extended => (host.0, u64::from(u32::MAX)),
            Self::Data { host } => (host.0, 0),
            Self::Compressed(cluster) => (encode_compressed(cluster, cluster_bits), 0),
            Self::Subclusters { host, data, zero } => {
                (place(host), u64::from(zero) << 32 | u64::from(data))
            }
        }
    }
}

fn encode_compressed(cluster: CompressedCluster, cluster_bits: u32) -> u64 {
    let offset_bits = 62 - (cluster_bits - 8);
    assert!(
        cluster.host.0 >> offset_bits.min(56) == 0,
        "a place that the entry can say"
    );
    let sectors = (cluster.host.0 % SECTOR_BYTES + cluster.max_length).div_ceil(SECTOR_BYTES);
    COMPRESSED | (sectors - 1) << offset_bits | cluster.host.0
}

/// The L1 table of an internal snapshot, while it is worked on.
#[derive(Debug)]
pub(super) struct LoadedTable {
    index: usize,
    words: Vec<u64>,
    changed: bool,
}

impl Edit<'_> {
    /// Entries of a view's L1 table.
    ///
    /// # Errors
    /// When the table cannot be read, or the table that was worked on before cannot be written.
    pub fn l1_entries(&mut self, view: View) -> Result<u64> {
        Ok(to_u64(self.l1(view)?.len()))
    }

    /// The index of the next L2 table of a view at or behind `index`; each covers
    /// [`crate::Header::l2_entries`] clusters.
    ///
    /// # Errors
    /// As [`Edit::l1_entries`].
    pub fn next_table(&mut self, view: View, index: u64) -> Result<Option<u64>> {
        let rest = self.l1(view)?.iter().enumerate().skip(to_usize(index));
        let found = rest
            .filter(|(_, word)| **word & OFFSET != 0)
            .map(|(at, _)| to_u64(at));
        Ok(found.min())
    }

    /// What a view says of guest cluster `cluster`.
    ///
    /// # Errors
    /// When a table cannot be read or an entry is not valid.
    pub fn mapping(&mut self, view: View, cluster: u64) -> Result<Mapping> {
        let entries = self.shape().l2_entries();
        match self.l1_entry(view, cluster / entries)? {
            None => Ok(Mapping::Unallocated),
            Some(entry) => self.table_mapping(entry.table, cluster % entries),
        }
    }

    /// Sets what a view says of guest cluster `cluster`. The reference that came with the new cluster
    /// ([`Edit::allocate`], [`Edit::share`]) now is the entry's; those of the old entry are given up. An entry
    /// that keeps its cluster keeps its reference.
    ///
    /// # Errors
    /// When a table cannot be read or written, an entry is not valid, or the view has no such cluster.
    pub fn set_mapping(&mut self, view: View, cluster: u64, new: Mapping) -> Result<()> {
        let entries = self.shape().l2_entries();
        if cluster / entries >= self.l1_entries(view)? {
            return Err(self.refused("map a cluster", format!("there is no cluster {cluster}")));
        }
        let version = self.first.raw.version.get();
        if version < 3 && matches!(new, Mapping::Zero { .. }) {
            let reason = "version 2 has no clusters of zeros";
            return Err(self.refused("map a cluster", reason));
        }
        if new == Mapping::Unallocated && self.mapping(view, cluster)? == Mapping::Unallocated {
            return Ok(());
        }
        let table = self.own_table(view, cluster / entries)?;
        let old = self.table_mapping(table, cluster % entries)?;
        self.write_entry(view, table, cluster % entries, new)?;
        let (was, is) = (self.clusters_of(old), self.clusters_of(new));
        if was != is
            && let Some((at, count)) = was
        {
            self.release(at, count)?;
        }
        Ok(())
    }

    pub(super) fn write_entry(
        &mut self,
        view: View,
        table: HostOffset,
        index: u64,
        new: Mapping,
    ) -> Result<()> {
        let extended = self.shape().extended_l2;
        let (mut word, bitmap) = new.encode(extended, self.size().bits());
        if let Some(host) = new.host()
            && view == View::Active
            && (self.is_elsewhere() || self.references(host)? == 1)
        {
            word |= COPIED;
        }
        if extended {
            self.tables.set_word(table, index * 2, word)?;
            return self.tables.set_word(table, index * 2 + 1, bitmap);
        }
        self.tables.set_word(table, index, word)
    }

    /// Adds a reference to everything that an entry refers to, for another entry that is to say the same.
    ///
    /// # Errors
    /// As [`Edit::share`].
    pub fn share_mapping(&mut self, mapping: Mapping) -> Result<()> {
        match self.clusters_of(mapping) {
            Some((at, count)) => self.share(at, count),
            None => Ok(()),
        }
    }

    /// The host clusters that an entry refers to: the first, and how many.
    fn clusters_of(&self, mapping: Mapping) -> Option<(HostOffset, u64)> {
        if self.is_elsewhere() {
            return None;
        }
        if let Some(host) = mapping.host() {
            return Some((host, 1));
        }
        let Mapping::Compressed(cluster) = mapping else {
            return None;
        };
        let size = self.size();
        let start = size.start_of(cluster.host.0);
        // Its last sector may lie behind the end of the file, where no cluster is.
        let end = (cluster.host.0 + cluster.max_length).div_ceil(size.bytes());
        let file_end = self.old.file_length().div_ceil(size.bytes());
        let behind = end.min(file_end.max(self.counts.taken_end()));
        let count = behind.saturating_sub(start >> size.bits());
        (count > 0).then_some((HostOffset(start), count))
    }

    pub(super) fn table_mapping(&mut self, table: HostOffset, index: u64) -> Result<Mapping> {
        let (word, bitmap) = self.entry_words(table, index)?;
        self.decode(word, bitmap).map(Mapping::of)
    }

    fn entry_words(&mut self, table: HostOffset, index: u64) -> Result<(u64, u64)> {
        if !self.shape().extended_l2 {
            return Ok((self.tables.word(table, index)?, 0));
        }
        let word = self.tables.word(table, index * 2)?;
        Ok((word, self.tables.word(table, index * 2 + 1)?))
    }

    fn decode(&self, word: u64, bitmap: u64) -> Result<L2Entry> {
        L2Entry::decode(self.shape(), word, bitmap).map_err(|reason| Error::InvalidEntry {
            path: self.path.clone(),
            what: "L2 entry",
            guest: GuestOffset(0),
            entry: word,
            reason,
        })
    }

    fn l1_entry(&mut self, view: View, index: u64) -> Result<Option<L1Entry>> {
        let words = self.l1(view)?;
        let word = words.get(to_usize(index)).copied().unwrap_or(0);
        self.decode_l1(word)
    }

    /// The L2 table at `index` of a view.
    pub(super) fn table_at(&mut self, view: View, index: u64) -> Result<Option<HostOffset>> {
        Ok(self.l1_entry(view, index)?.map(|entry| entry.table))
    }

    pub(super) fn decode_l1(&self, word: u64) -> Result<Option<L1Entry>> {
        L1Entry::decode(word).map_err(|reason| Error::InvalidEntry {
            path: self.path.clone(),
            what: "L1 entry",
            guest: GuestOffset(0),
            entry: word,
            reason,
        })
    }

    pub(super) fn set_l1(&mut self, view: View, index: u64, word: u64) -> Result<()> {
        let index = to_usize(index);
        match view {
            View::Active => {
                self.active[index] = word;
                self.active_changed = true;
            }
            View::Snapshot(snapshot) => {
                let table = self.load(snapshot)?;
                table.words[index] = word & !COPIED;
                table.changed = true;
            }
        }
        Ok(())
    }

    pub(super) fn l1(&mut self, view: View) -> Result<&[u64]> {
        self.require_guest_file()?;
        match view {
            View::Active => Ok(&self.active),
            View::Snapshot(index) => Ok(&self.load(index)?.words),
        }
    }

    /// Loads a snapshot's L1 table in place of the one that was worked on before.
    fn load(&mut self, index: usize) -> Result<&mut LoadedTable> {
        if self
            .loaded
            .as_ref()
            .is_none_or(|table| table.index != index)
        {
            self.store_loaded()?;
            let words = self.read_snapshot_l1(index)?;
            self.loaded = Some(LoadedTable {
                index,
                words,
                changed: false,
            });
        }
        match &mut self.loaded {
            Some(table) => Ok(table),
            None => unreachable!("it was just loaded"),
        }
    }

    fn read_snapshot_l1(&self, index: usize) -> Result<Vec<u64>> {
        let record = &self.snapshots[index];
        let count = to_usize(u64::from(record.l1_entries()));
        let mut bytes = vec![0; count * 8];
        self.read(record.l1_table(), &mut bytes)?;
        let (words, _none) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_be_bytes(*word)).collect())
    }

    /// Writes the snapshot's L1 table that was worked on, to a new place.
    pub(super) fn store_loaded(&mut self) -> Result<()> {
        let Some(table) = self.loaded.take().filter(|table| table.changed) else {
            return Ok(());
        };
        let record = &self.snapshots[table.index];
        let (at, length) = (record.l1_table(), u64::from(record.l1_entries()) * 8);
        self.release_bytes(at, length)?;
        let at = self.place_words(&table.words)?;
        let entries = u32::try_from(table.words.len()).unwrap_or(u32::MAX);
        self.snapshots[table.index].set_l1(at, entries);
        self.snapshots_changed = true;
        Ok(())
    }

    /// The L2 table at `index` of a view, in a cluster where it may be changed; a new one if there is none.
    fn own_table(&mut self, view: View, index: u64) -> Result<HostOffset> {
        self.go_on()?;
        let Some(entry) = self.l1_entry(view, index)? else {
            let at = self.allocate(1)?;
            let empty = vec![0; self.size().buffer_len()];
            self.tables.put(at, empty.into_boxed_slice())?;
            self.set_l1(view, index, at.0 | COPIED)?;
            return Ok(at);
        };
        let new = self.counts.is_new(entry.table.0 >> self.size().bits())?;
        if new && self.references(entry.table)? == 1 {
            return Ok(entry.table);
        }
        let at = self.allocate(1)?;
        let bytes = self.tables.get(entry.table)?.into();
        self.tables.put(at, bytes)?;
        // What it refers to is counted once for each view already, not once for each table.
        self.release(entry.table, 1)?;
        self.set_l1(view, index, at.0 | COPIED)?;
        Ok(at)
    }

    /// Adds `change` to the references of everything that an L2 table refers to.
    fn count_table(&mut self, table: HostOffset, change: i64) -> Result<()> {
        self.go_on()?;
        for index in 0..self.shape().l2_entries() {
            let (word, bitmap) = self.entry_words(table, index)?;
            if word == 0 {
                continue;
            }
            let mapping = Mapping::of(self.decode(word, bitmap)?);
            if let Some((at, count)) = self.clusters_of(mapping) {
                self.add_references(at, count, change)?;
            }
        }
        Ok(())
    }

    /// Adds `change` to the references of everything that an L1 table refers to, L2 tables included.
    pub(super) fn count_view(&mut self, l1: &[u64], change: i64) -> Result<()> {
        for word in l1 {
            if let Some(entry) = self.decode_l1(*word)? {
                self.count_table(entry.table, change)?;
                self.add_references(entry.table, 1, change)?;
            }
        }
        Ok(())
    }

    /// Takes an L2 table out of a view, with the references of everything in it.
    pub(super) fn drop_table(&mut self, view: View, index: u64) -> Result<()> {
        if let Some(entry) = self.l1_entry(view, index)? {
            self.count_table(entry.table, -1)?;
            self.release(entry.table, 1)?;
            self.set_l1(view, index, 0)?;
        }
        Ok(())
    }

    /// Takes the copied flags out of all L2 tables of a view, which others are about to share.
    pub(super) fn clear_copied(&mut self, view: View) -> Result<()> {
        let mut next = self.next_table(view, 0)?;
        while let Some(index) = next {
            next = self.next_table(view, index + 1)?;
            let Some(entry) = self.l1_entry(view, index)? else {
                continue;
            };
            if self.has_copied(entry.table)? {
                let table = self.own_table(view, index)?;
                self.rewrite_copied(table, &mut |_, _| Ok(false))?;
            }
        }
        Ok(())
    }

    fn has_copied(&mut self, table: HostOffset) -> Result<bool> {
        self.go_on()?;
        let step = if self.shape().extended_l2 { 16 } else { 8 };
        let entries = self.tables.get(table)?.chunks_exact(step);
        // A compressed entry never has the flag: the bit there would not be valid.
        Ok(entries.into_iter().any(|entry| entry[0] & 0x80 != 0))
    }

    fn rewrite_copied(
        &mut self,
        table: HostOffset,
        wanted: &mut dyn FnMut(&mut Self, HostOffset) -> Result<bool>,
    ) -> Result<()> {
        let step = if self.shape().extended_l2 { 2 } else { 1 };
        for index in 0..self.shape().l2_entries() {
            let word = self.tables.word(table, index * step)?;
            if let Some(host) = plain_host(word) {
                let copied = if wanted(self, host)? { COPIED } else { 0 };
                let new = word & !COPIED | copied;
                if new != word {
                    self.tables.set_word(table, index * step, new)?;
                }
            }
        }
        Ok(())
    }

    /// Makes the copied flags of the active tables fit the refcounts.
    pub(super) fn settle_copied(&mut self) -> Result<()> {
        if !self.counts.take_crossed() {
            return Ok(());
        }
        for index in 0..to_u64(self.active.len()) {
            let Some(entry) = self.decode_l1(self.active[to_usize(index)])? else {
                continue;
            };
            let table = if self.flags_differ(entry.table)? {
                let table = self.own_table(View::Active, index)?;
                self.rewrite_copied(table, &mut |edit, host| Ok(edit.references(host)? == 1))?;
                table
            } else {
                entry.table
            };
            let copied = if self.references(table)? == 1 {
                COPIED
            } else {
                0
            };
            if self.active[to_usize(index)] != table.0 | copied {
                self.set_l1(View::Active, index, table.0 | copied)?;
            }
        }
        Ok(())
    }

    /// Whether a flag of the active L2 table at `table` does not fit the refcount.
    fn flags_differ(&mut self, table: HostOffset) -> Result<bool> {
        self.go_on()?;
        if self.is_elsewhere() {
            // There all of them are set.
            return Ok(false);
        }
        if self.references(table)? > 1 {
            // What a shared table refers to is shared too.
            return self.has_copied(table);
        }
        let step = if self.shape().extended_l2 { 2 } else { 1 };
        for index in 0..self.shape().l2_entries() {
            let word = self.tables.word(table, index * step)?;
            if let Some(host) = plain_host(word)
                && (self.references(host)? == 1) != (word & COPIED != 0)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Puts another L1 table in the place of the active one. References are the caller's.
    pub(super) fn set_active(&mut self, words: Vec<u64>) {
        self.active = words;
        self.active_changed = true;
    }
}

/// The cluster of an entry that is not compressed.
fn plain_host(word: u64) -> Option<HostOffset> {
    let host = HostOffset(word & OFFSET);
    (word & COMPRESSED == 0 && host.0 != 0).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compressed_cluster_is_decoded_as_it_was_encoded() {
        for bits in 9..=21 {
            for host in [512, 513, 70_001, (1 << 40) + 511] {
                for length in [1, 511, 512, 1000, 1 << bits] {
                    let sectors_end = (host % 512 + length as u64).next_multiple_of(512);
                    let cluster = CompressedCluster {
                        host: HostOffset(host),
                        max_length: sectors_end - host % 512,
                    };
                    if sectors_end / 512 > 1 << (bits - 8) {
                        continue;
                    }
                    let word = encode_compressed(cluster, bits);
                    let offset_bits = 62 - (bits - 8);
                    assert_eq!(word & ((1 << offset_bits) - 1), host);
                    let sectors = (word >> offset_bits & ((1 << (bits - 8)) - 1)) + 1;
                    assert_eq!(sectors * 512 - host % 512, cluster.max_length);
                }
            }
        }
    }
}
