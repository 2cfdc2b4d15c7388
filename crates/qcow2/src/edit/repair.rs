//! Refcounts of a damaged image, from what refers to each cluster, and bitmaps that cannot be used.
//!
//! # Invariant
//! Nothing that anything refers to is written, whatever its refcount was.

use crate::check::{References, for_each_reference};
use crate::error::Result;
use crate::header::AUTOCLEAR_BITMAPS;
use crate::units::HostOffset;

use super::transaction::Edit;

/// What the refcounts of a repaired image are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RefcountsFrom {
    /// As many as there are references.
    References,
    /// As they were; 0 where there are no references.
    WhatIsReferenced,
}

/// Which bitmaps go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BitmapsToDrop {
    None,
    /// Those whose tables lie there.
    Tables(Vec<HostOffset>),
    /// All, with the directory.
    Directory,
}

impl BitmapsToDrop {
    fn tables(&self) -> &[HostOffset] {
        match self {
            Self::Tables(tables) => tables,
            Self::None | Self::Directory => &[],
        }
    }
}

impl Edit<'_> {
    /// Writes all refcounts anew, without those of the bitmaps that go; the first step of a repair.
    pub(crate) fn rebuild(&mut self, from: RefcountsFrom, drop: &BitmapsToDrop) -> Result<()> {
        let old = std::sync::Arc::clone(&self.old);
        let control = self.control;
        for_each_reference(&old, drop.tables(), &control, &mut |found| {
            control.go_on(old.path())?;
            self.keep_off(found)
        })?;
        self.counts.begin_anew(self.counts.order);
        for_each_reference(&old, drop.tables(), &control, &mut |found| {
            control.go_on(old.path())?;
            // Blocks of refcounts are those that are written now.
            if found.refcount_block {
                return Ok(());
            }
            let count = match from {
                RefcountsFrom::References => found.count,
                RefcountsFrom::WhatIsReferenced => self.counts.old.get(found.cluster)?,
            };
            self.counts.add_new(found.cluster, count, &mut self.tables)
        })?;
        // Flags follow from refcounts that are right, and only from those.
        self.counts.crossed = from == RefcountsFrom::References;
        self.drop_bitmaps(drop);
        self.note_taken()
    }

    /// What is referred to is not free, even where its refcount says so.
    fn keep_off(&mut self, found: References) -> Result<()> {
        if self.counts.old.get(found.cluster)? > 0 {
            return Ok(());
        }
        let ranges = &mut self.counts.old.referenced;
        match ranges.last_entry() {
            Some(mut last) if *last.get() == found.cluster => *last.get_mut() += 1,
            Some(_) | None => {
                ranges.insert(found.cluster, found.cluster + 1);
            }
        }
        Ok(())
    }

    fn drop_bitmaps(&mut self, which: &BitmapsToDrop) {
        match which {
            BitmapsToDrop::None => {}
            BitmapsToDrop::Tables(tables) => {
                let stays = |at: HostOffset| !tables.contains(&at);
                self.bitmaps.retain(|bitmap| stays(bitmap.record.table()));
                self.bitmaps_changed = true;
            }
            BitmapsToDrop::Directory => {
                self.bitmaps.clear();
                self.first.set_bitmaps(None);
                let autoclear = self.first.raw.autoclear.get() & !AUTOCLEAR_BITMAPS;
                self.first.raw.autoclear.set(autoclear);
            }
        }
    }
}
