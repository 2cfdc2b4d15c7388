//! What a copy keeps beside the active disk: internal snapshots and bitmaps.
//!
//! # Bitmaps of a chain
//! A bitmap names what changed since it began. In a chain of layers it lies in pieces: each layer has, under one
//! name, what changed while that layer was the top. All pieces from the top down, without a hole, are joined;
//! what comes below the last layer that has the name was before the bitmap began. A bitmap is dropped, and why
//! is told, when a piece is in use (it was not saved), is disabled (it did not see all) while there are others, or
//! lies below a layer that lacks the name.

use std::collections::BTreeMap;

use super::first::narrow;
use super::layout::SnapshotTable;
use crate::bitmap::Bitmap;
use crate::chain::Chain;
use crate::directory::{InternalSnapshot, StoredBitmap};
use crate::error::{Error, Result};
use crate::header::to_u64;

/// What is kept of the source's top layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keep {
    /// Its internal snapshots, with their VM state.
    pub snapshots: bool,
    /// Its persistent bitmaps, joined with those of the layers below.
    pub bitmaps: bool,
}

/// A bitmap that was not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DroppedBitmap {
    /// Its name.
    pub name: Vec<u8>,
    /// Why it says nothing about the new image.
    pub reason: String,
}

/// The bitmaps of `source` that a copy cannot have, and why: what [`NewFiles::dropped_bitmaps`] will say.
///
/// [`NewFiles::dropped_bitmaps`]: super::NewFiles::dropped_bitmaps
///
/// # Errors
/// When a bitmap directory of the chain cannot be read.
pub fn lost_bitmaps(source: &Chain) -> Result<Vec<DroppedBitmap>> {
    let keep = Keep {
        snapshots: false,
        bitmaps: true,
    };
    Ok(Kept::read(source, keep)?.dropped)
}

/// An internal snapshot, and the disk as it was then.
#[derive(Debug)]
pub(crate) struct View {
    pub snapshot: InternalSnapshot,
    pub chain: Chain,
}

#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub views: Vec<View>,
    pub bitmaps: Vec<Bitmap>,
    pub dropped: Vec<DroppedBitmap>,
}

impl Kept {
    pub fn read(source: &Chain, keep: Keep) -> Result<Self> {
        let mut kept = Self::default();
        if source.is_joined() {
            return match keep == Keep::default() {
                true => Ok(kept),
                false => Err(Error::InvalidChain {
                    reason: "several disks in a row have no internal snapshots and bitmaps that could be kept"
                        .into(),
                }),
            };
        }
        let Some(top) = source.layer(0) else {
            return Ok(kept);
        };
        if keep.snapshots {
            for snapshot in top.internal_snapshots()? {
                let chain = source.view_of(&snapshot)?;
                kept.views.push(View { snapshot, chain });
            }
        }
        if keep.bitmaps {
            kept.read_bitmaps(source)?;
        }
        Ok(kept)
    }

    fn read_bitmaps(&mut self, source: &Chain) -> Result<()> {
        let mut layers = Vec::new();
        for index in 0..source.depth() {
            layers.push(match source.layer(index) {
                Some(layer) => layer.stored_bitmaps()?,
                None => Vec::new(),
            });
        }
        let mut names: BTreeMap<&[u8], Vec<Option<&StoredBitmap>>> = BTreeMap::new();
        for (index, layer) in layers.iter().enumerate() {
            for bitmap in layer {
                let pieces = names.entry(&bitmap.name).or_default();
                pieces.resize(index, None);
                pieces.push(Some(bitmap));
            }
        }
        for (name, pieces) in names {
            match joined(source, &pieces)? {
                Ok(bitmap) => self.bitmaps.push(bitmap),
                Err(reason) => self.dropped.push(DroppedBitmap {
                    name: name.to_vec(),
                    reason,
                }),
            }
        }
        Ok(())
    }
}

/// The pieces of one name, top first, as one bitmap; or why that cannot be.
fn joined(
    source: &Chain,
    pieces: &[Option<&StoredBitmap>],
) -> Result<std::result::Result<Bitmap, String>> {
    let mut all: Option<Bitmap> = None;
    for (index, piece) in pieces.iter().enumerate() {
        let layer = match (piece, source.layer(index)) {
            (Some(_), Some(layer)) => layer,
            (None, _) | (_, None) => {
                return Ok(Err(format!(
                    "layer {index} of the chain lacks it, so what changed there is not known"
                )));
            }
        };
        let Some(stored) = piece else {
            unreachable!("a piece without a layer was refused");
        };
        if pieces.len() > 1 && !stored.auto {
            return Ok(Err(format!(
                "it is disabled in layer {index} of the chain, so it did not see all changes"
            )));
        }
        let bitmap = match layer.read_bitmap(stored) {
            Ok(bitmap) => bitmap,
            Err(error @ Error::Io { .. }) => return Err(error),
            Err(error) => return Ok(Err(error.to_string())),
        };
        match &mut all {
            None => all = Some(bitmap),
            Some(all) => merge(all, &bitmap),
        }
    }
    let Some(all) = all else {
        unreachable!("a name comes with at least one piece");
    };
    Ok(Ok(all))
}

/// Joins a piece of a layer below. Where that was shorter, what lies behind its end was not there.
fn merge(all: &mut Bitmap, below: &Bitmap) {
    all.merge(below);
    let (disk, end) = (all.disk_length(), below.disk_length());
    if end < disk {
        all.set(crate::units::GuestOffset(end), disk - end);
    }
}

/// The table of internal snapshots, as bytes.
pub(crate) fn snapshot_table(views: &[View], tables: &[SnapshotTable]) -> Vec<u8> {
    assert!(views.len() == tables.len(), "each view was written");
    let mut bytes = Vec::new();
    for (view, table) in views.iter().zip(tables) {
        bytes.extend(snapshot_entry(view, table));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

fn snapshot_entry(view: &View, table: &SnapshotTable) -> Vec<u8> {
    let snapshot = &view.snapshot;
    let length = |bytes: &[u8]| narrow(to_u64(bytes.len())).to_be_bytes();
    let mut extra = snapshot.extra.clone();
    extra.resize(extra.len().max(16), 0);
    extra[..8].copy_from_slice(&snapshot.vm_state_bytes.to_be_bytes());
    extra[8..16].copy_from_slice(&view.chain.len().to_be_bytes());
    let short_state = u32::try_from(snapshot.vm_state_bytes).unwrap_or(0);
    let mut bytes = table.at.to_be_bytes().to_vec();
    bytes.extend(narrow(to_u64(table.l1.len())).to_be_bytes());
    // Both lengths were read from fields of 16 bits.
    bytes.extend(&length(&snapshot.id)[2..]);
    bytes.extend(&length(&snapshot.name)[2..]);
    bytes.extend(snapshot.date_seconds.to_be_bytes());
    bytes.extend(snapshot.date_nanoseconds.to_be_bytes());
    bytes.extend(snapshot.vm_clock_nanoseconds.to_be_bytes());
    bytes.extend(short_state.to_be_bytes());
    bytes.extend(length(&extra));
    bytes.extend(extra);
    bytes.extend(&snapshot.id);
    bytes.extend(&snapshot.name);
    bytes
}
