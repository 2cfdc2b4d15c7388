//! Before packs are deleted: whether what they hold and is in use can be read where it is kept.
//!
//! A listing shows that a pack is there and how long it is, not that it can be read. So each copy that is to
//! stay is read and hashed before the other one goes. Such copies are few (content that was stored again,
//! and what has just been rewritten), so this costs reading about what is deleted.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tracing::warn;

use super::{Homes, View};
use crate::core::{Core, pack_path};
use crate::error::Result;
use crate::hash::Hash;
use crate::pack::{PackKind, PlacedFrame};
use crate::progress::Progress;
use crate::verify::check_frame;

/// For each pack that is to keep something: the names of that, each with the packs that go.
type Kept = BTreeMap<Hash, HashMap<Hash, Vec<Hash>>>;

impl Core {
    /// The packs of `dead` that must stay after all: something in use that they hold cannot be read where
    /// it is to be kept.
    pub(super) fn irreplaceable(
        &self,
        view: &View,
        homes: &Homes,
        dead: &BTreeSet<Hash>,
        progress: &Progress,
    ) -> Result<BTreeSet<Hash>> {
        let mut spared = BTreeSet::new();
        for (home, copies) in kept(view, homes, dead) {
            let table = &view.tables[&home];
            for frame in table.placed_frames() {
                let names = frame.chunks.iter().map(|c| Hash::from_bytes(c.hash));
                let going = names.filter_map(|name| copies.get(&name)).flatten();
                let going: BTreeSet<Hash> = going.copied().collect();
                progress.advance(0)?;
                if going.is_subset(&spared) || self.is_whole(&home, table.kind, &frame)? {
                    continue;
                }
                spared.extend(going);
            }
        }
        Ok(spared)
    }

    /// Whether a frame can be read and everything in it is what its name says.
    fn is_whole(&self, pack: &Hash, kind: PackKind, frame: &PlacedFrame<'_>) -> Result<bool> {
        let object = pack_path(pack);
        let found = match self.io.get_range(&object, frame.range.clone()) {
            Ok(stored) => check_frame(kind, frame, stored).err(),
            Err(error) => {
                let found = error.into_loss()?;
                Some(found.unwrap_or_else(|| "it is missing".to_owned()))
            }
        };
        let Some(found) = found else { return Ok(true) };
        let frame = frame.number;
        warn!(
            object,
            frame, found, "not deleting the other copies of what it holds"
        );
        Ok(false)
    }
}

fn kept(view: &View, homes: &Homes, dead: &BTreeSet<Hash>) -> Kept {
    let mut kept = Kept::new();
    for (name, table) in dead
        .iter()
        .filter_map(|name| view.tables.get_key_value(name))
    {
        for chunk in &table.chunks {
            let hash = Hash::from_bytes(chunk.hash);
            if let Some(home) = homes.of.get(&hash) {
                let copies = kept.entry(*home).or_default();
                copies.entry(hash).or_default().push(*name);
            }
        }
    }
    kept
}
