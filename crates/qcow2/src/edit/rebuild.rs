//! All refcounts written anew: with another width, or from what refers to each cluster.

use crate::control::Control;
use crate::error::{Error, Result};
use crate::header::MAX_REFCOUNT_TABLE_BYTES;
use crate::refcounts::{most_references, read_refcount};
use crate::units::HostOffset;

use super::refcounts::{Refcounts, refused};
use super::tables::Tables;
use super::transaction::Edit;

/// Blocks of refcounts that are replaced.
pub(super) struct Replaced {
    table: Vec<u64>,
    order: u32,
    per_block: u64,
}

impl Refcounts {
    /// From here on there is no refcount but those that are added.
    pub(super) fn begin_anew(&mut self, order: u32) -> Replaced {
        let replaced = Replaced {
            table: std::mem::take(&mut self.table),
            order: self.order,
            per_block: self.per_block,
        };
        self.moved.clear();
        self.order = order;
        self.per_block = (self.size.bytes() * 8) >> order;
        (self.anew, self.changed) = (true, true);
        replaced
    }

    /// Gives all refcounts a width of `1 << order` bits.
    fn set_order(&mut self, order: u32, tables: &mut Tables, control: &Control<'_>) -> Result<()> {
        let clusters = self.counted_end(tables)?;
        self.require_table_for(clusters, order)?;
        let replaced = self.begin_anew(order);
        for (index, place) in (0..).zip(&replaced.table).filter(|(_, place)| **place != 0) {
            control.go_on(self.old.layer.path())?;
            let block: Vec<u8> = tables.get(HostOffset(*place))?.into();
            for within in 0..replaced.per_block {
                let count = read_refcount(&block, within, replaced.order);
                if count > 0 {
                    self.add_new(index * replaced.per_block + within, count, tables)?;
                }
            }
        }
        for place in replaced.table.iter().filter(|place| **place != 0) {
            self.add(place >> self.size.bits(), -1, tables)?;
        }
        Ok(())
    }

    /// Adds the first references of a cluster.
    pub(super) fn add_new(&mut self, cluster: u64, count: u64, tables: &mut Tables) -> Result<()> {
        let most = most_references(self.order);
        if count == 0 {
            return Ok(());
        }
        match i64::try_from(count) {
            Ok(change) if count <= most => self.add(cluster, change, tables),
            Ok(_) | Err(_) => Err(Error::RefcountOverflow {
                path: self.old.layer.path().to_owned(),
                cluster: HostOffset(cluster << self.size.bits()),
                most,
                bits: 1 << self.order,
            }),
        }
    }

    /// A table for so many clusters is not larger than the format allows.
    fn require_table_for(&self, clusters: u64, order: u32) -> Result<()> {
        let blocks = clusters.div_ceil((self.size.bytes() * 8) >> order);
        if blocks < MAX_REFCOUNT_TABLE_BYTES / 8 {
            return Ok(());
        }
        let reason = format!("{clusters} clusters would need a refcount table above 8 MiB");
        Err(refused(
            self.old.layer.path(),
            "write refcounts anew",
            reason,
        ))
    }
}

impl Edit<'_> {
    /// Gives refcounts another width: `1 << order` bits, `order` from 0 to 6.
    ///
    /// # Errors
    /// [`Error::RefcountOverflow`] when one of them is too large for it; [`Error::Refused`] when the table of
    /// refcounts would be too large; or when a table cannot be read or written.
    ///
    /// # Panics
    /// When `order` is above 6.
    pub fn set_refcount_order(&mut self, order: u32) -> Result<()> {
        assert!(order <= 6, "refcounts have at most 64 bits");
        if order == self.counts.order {
            return Ok(());
        }
        let control = self.control;
        self.counts.set_order(order, &mut self.tables, &control)?;
        self.first.raw.refcount_order.set(order);
        self.note_taken()
    }
}
