//! What refers to each cluster, for a repair: the walk of a check without its judgement.

use crate::bitmap_read::TableEntry;
use crate::consistency;
use crate::control::Control;
use crate::counts::{Counts, PAGE_CLUSTERS};
use crate::directory::StoredBitmap;
use crate::error::Result;
use crate::header::to_usize;
use crate::layer::Layer;
use crate::units::HostOffset;

use super::{CheckReport, Image, Use, each_window, require_place};

/// What refers to a cluster.
#[derive(Debug, Clone, Copy)]
pub(crate) struct References {
    pub cluster: u64,
    pub count: u64,
    /// It holds refcounts.
    pub refcount_block: bool,
}

/// Calls `each` for every cluster that something refers to, in order. Bitmaps whose table lies at one of the places
/// in `left_out` do not count.
pub(crate) fn for_each_reference(
    layer: &Layer,
    left_out: &[HostOffset],
    control: &Control<'_>,
    each: &mut dyn FnMut(References) -> Result<()>,
) -> Result<()> {
    let mut report = CheckReport::default();
    let mut image = Image::read(layer, &mut report)?;
    image.leave_out_bitmaps(left_out);
    each_window(&image, &mut report, &control.quiet(), |counts, _report| {
        tell_references(counts, each)
    })
}

fn tell_references(counts: &Counts, each: &mut dyn FnMut(References) -> Result<()>) -> Result<()> {
    let mut at = counts.start;
    while let Some(next) = counts.next_page(at) {
        let first = next / PAGE_CLUSTERS * PAGE_CLUSTERS;
        if first >= counts.end {
            return Ok(());
        }
        let states = counts.page(first).into_iter();
        for (page, index) in states.flat_map(|page| (0..PAGE_CLUSTERS).map(move |i| (page, i))) {
            let state = page.get(to_usize(index));
            if state.references > 0 {
                each(References {
                    cluster: first + index,
                    count: u64::from(state.references),
                    refcount_block: state.marks & Use::RefcountBlock.bit() != 0,
                })?;
            }
        }
        at = first.saturating_add(PAGE_CLUSTERS);
    }
    Ok(())
}

/// Where the tables of bitmaps lie that cannot be used, or those of all bitmaps where it cannot be told which.
pub(crate) fn unusable_bitmaps(layer: &Layer) -> Result<Vec<HostOffset>> {
    let all = layer.bitmap_directory()?.entries;
    let mut found = Vec::new();
    for stored in &all {
        let placed = require_place(layer, "a bitmap table", stored.table, stored.table_bytes());
        if placed.is_err() || !consistency::is_usable(layer, stored) || !has_bits(layer, stored)? {
            found.push(stored.table);
        }
    }
    if found.is_empty() {
        found.extend(all.iter().map(|stored| stored.table));
    }
    Ok(found)
}

/// Whether all entries of a bitmap's table can be followed.
fn has_bits(layer: &Layer, stored: &StoredBitmap) -> Result<bool> {
    let mut good = true;
    layer.for_each_entry(stored, |_, word| {
        good &= match TableEntry::decode(word) {
            Some(TableEntry::Clear | TableEntry::Full) => true,
            Some(TableEntry::Stored(at)) => require_place(layer, "bits", at, 1).is_ok(),
            None => false,
        };
        Ok(())
    })?;
    Ok(good)
}
