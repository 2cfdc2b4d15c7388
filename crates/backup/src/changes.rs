//! What changed on a disk since a bitmap began, over all layers of its chain.
//!
//! The *origin* is the lowest layer that has the bitmap: it was the active one when the bitmap began, and what lies below
//! it was not written since. Of the origin, the bitmap says what changed. Layers above it came later, so all that they
//! define was written since, whether they have the bitmap or not; what theirs names is added.

use stead_qcow2::{Bitmap, Chain, GuestOffset, Layer, Result, StoredBitmap};

/// What changed, or why that cannot be told.
pub(crate) type Told = std::result::Result<Bitmap, String>;

/// What changed on `chain` since the bitmap `name` began, when the disk had `then_bytes`.
pub(crate) fn changed_since(chain: &Chain, name: &[u8], then_bytes: u64) -> Result<Told> {
    let Some((origin, stored)) = origin(chain, name)? else {
        return Ok(Err("no layer has it".into()));
    };
    let Some(layer) = chain.layer(origin) else {
        unreachable!("a raw layer has no bitmap");
    };
    if let Some(why) = refusal(&stored) {
        return Ok(Err(format!("in {} {why}", layer.path().display())));
    }
    let mut changed = Bitmap::new(name, stored.granularity_bits, chain.len())?;
    changed.merge(&layer.read_bitmap(&stored)?);
    for index in 0..origin {
        add_layer(&mut changed, chain, index, name)?;
    }
    add_growth(&mut changed, chain, then_bytes)?;
    Ok(Ok(changed))
}

/// The lowest layer that has the bitmap.
fn origin(chain: &Chain, name: &[u8]) -> Result<Option<(usize, StoredBitmap)>> {
    for index in (0..chain.depth()).rev() {
        let Some(layer) = chain.layer(index) else {
            continue;
        };
        if let Some(stored) = find(layer, name)? {
            return Ok(Some((index, stored)));
        }
    }
    Ok(None)
}

pub(crate) fn find(layer: &Layer, name: &[u8]) -> Result<Option<StoredBitmap>> {
    let all = layer.stored_bitmaps()?;
    Ok(all.into_iter().find(|stored| stored.name == name))
}

/// Why a bitmap does not say what changed.
fn refusal(stored: &StoredBitmap) -> Option<&'static str> {
    if stored.in_use {
        Some("it was not saved when the disk was last used (a crash, or a VM that was killed)")
    } else if !stored.is_known() {
        Some("it is of a kind that is not known")
    } else if !stored.auto {
        Some("it is disabled, so later writes were not noted")
    } else {
        None
    }
}

/// Adds all that the layer at `index`, above the origin, defines and names.
fn add_layer(changed: &mut Bitmap, chain: &Chain, index: usize, name: &[u8]) -> Result<()> {
    let Some(alone) = chain.below(index) else {
        unreachable!("the layer is above another");
    };
    for range in alone.allocated(1) {
        let range = range?;
        changed.set(GuestOffset(range.start), range.end - range.start);
    }
    if let Some(layer) = chain.layer(index)
        && let Some(stored) = find(layer, name)?
        && refusal(&stored).is_none()
    {
        changed.merge(&layer.read_bitmap(&stored)?);
    }
    Ok(())
}

/// Adds what is not zeros behind the end that the disk had: the earlier backup shows zeros there.
fn add_growth(changed: &mut Bitmap, chain: &Chain, then_bytes: u64) -> Result<()> {
    let mut at = then_bytes;
    while at < chain.len() {
        let Some(data) = chain.next_data(at)? else {
            break;
        };
        changed.set(GuestOffset(data.start), data.end - data.start);
        at = data.end;
    }
    Ok(())
}
