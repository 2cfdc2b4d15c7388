//! Internal snapshots of the new state.

use crate::entry::COPIED;
use crate::error::Result;
use crate::header::{MAX_INTERNAL_SNAPSHOTS, to_u64, to_usize};

use super::records::{SnapshotName, SnapshotRecord};
use super::transaction::Edit;
use super::views::View;

impl Edit<'_> {
    /// The internal snapshots of the new state.
    #[must_use]
    pub fn snapshots(&self) -> &[SnapshotRecord] {
        &self.snapshots
    }

    /// Keeps the active disk as a new internal snapshot without VM state, and gives its identifier: a number
    /// that is higher than that of every other.
    ///
    /// # Errors
    /// [`crate::Error::RefcountOverflow`]; when there are too many snapshots or the name is too long; or when a
    /// table cannot be read or written.
    pub fn create_snapshot(&mut self, called: &SnapshotName) -> Result<Vec<u8>> {
        let operation = "create an internal snapshot";
        if self.is_elsewhere() {
            let reason = "guest data lies in an external data file, where a cluster cannot be kept while the disk goes on \
                          elsewhere";
            return Err(self.refused(operation, reason));
        }
        if called.name.len() > usize::from(u16::MAX) {
            return Err(self.refused(operation, "its name has more than 65535 bytes"));
        }
        if self.snapshots.len() >= to_usize(u64::from(MAX_INTERNAL_SNAPSHOTS)) {
            return Err(self.refused(operation, format!("there are {MAX_INTERNAL_SNAPSHOTS}")));
        }
        let id = self.next_id().to_string().into_bytes();
        self.clear_copied(View::Active)?;
        let words: Vec<u64> = self.active.iter().map(|word| word & !COPIED).collect();
        self.count_view(&words, 1)?;
        let at = self.place_words(&words)?;
        let mut record = SnapshotRecord::new(&id, called, self.virtual_size());
        record.set_l1(at, u32::try_from(words.len()).unwrap_or(u32::MAX));
        self.snapshots.push(record);
        self.snapshots_changed = true;
        Ok(id)
    }

    fn next_id(&self) -> u64 {
        let number = |record: &SnapshotRecord| std::str::from_utf8(record.id()).ok()?.parse().ok();
        let highest = self.snapshots.iter().filter_map(number).max();
        highest.unwrap_or(0_u64).saturating_add(1)
    }

    /// Removes an internal snapshot.
    ///
    /// # Errors
    /// When a table cannot be read or written.
    pub fn delete_snapshot(&mut self, index: usize) -> Result<()> {
        let words = self.l1(View::Snapshot(index))?.to_vec();
        self.store_loaded()?;
        self.count_view(&words, -1)?;
        let record = self.snapshots.remove(index);
        self.release_bytes(record.l1_table(), u64::from(record.l1_entries()) * 8)?;
        self.snapshots_changed = true;
        Ok(())
    }

    /// Makes the active disk what it was in an internal snapshot, with the length it had then. VM state stays
    /// with the snapshots that have it. Every cluster that differs is marked in the bitmaps.
    ///
    /// # Errors
    /// When a table cannot be read or written, or the snapshot's tables are not valid.
    pub fn apply_snapshot(&mut self, index: usize) -> Result<()> {
        let view = View::Snapshot(index);
        let before = self.virtual_size();
        let after = self.snapshots[index].virtual_size().unwrap_or(before);
        let needed = after.div_ceil(self.shape().l2_coverage());
        let there = self.l1_entries(view)?;
        if needed > there || !after.is_multiple_of(512) {
            let reason = format!("its L1 table has {there} entries, and {needed} are needed");
            return Err(self.refused("apply an internal snapshot", reason));
        }
        self.check_bitmap_size(after)?;
        self.first.raw.virtual_size.set(after);
        self.resize_bitmaps(before, after)?;
        self.mark_differences(View::Active, view)?;
        self.clear_copied(view)?;
        // QEMU leaves the flags in a snapshot's L1 table as they were in the active one.
        let words = &self.l1(view)?[..to_usize(needed)];
        let words: Vec<u64> = words.iter().map(|word| word & !COPIED).collect();
        self.count_view(&words, 1)?;
        let old = self.active.clone();
        self.count_view(&old, -1)?;
        assert!(
            to_u64(words.len()) == needed,
            "an L1 table of the disk's length"
        );
        self.set_active(words);
        Ok(())
    }

    /// A bitmap of a disk without bytes cannot be said.
    pub(super) fn check_bitmap_size(&self, after: u64) -> Result<()> {
        if after == 0 && !self.bitmaps.is_empty() {
            let reason = "the disk would have no bytes, and there are bitmaps";
            return Err(self.refused("change the length of the disk", reason));
        }
        Ok(())
    }
}
