//! The bitmaps of the base, while QEMU has it open: made from the layers' own, in one transaction.

use stead_vmm::Qmp;
use stead_vmm::block_jobs::{self, BitmapChange, Node, NodeBitmap};

use super::{Live, Nodes, vm};
use crate::bitmaps::{Becomes, text};
use crate::error::Result;
use crate::running;

impl Live<'_> {
    pub(super) fn make_bitmaps(&self, qmp: &mut Qmp, nodes: &Nodes) -> Result<()> {
        let all = running::nodes(qmp)?;
        let in_node = |node: &str, name: &str| {
            let node = all.iter().find(|one| one.name == node)?;
            node.bitmaps.iter().find(|bitmap| bitmap.name == name)
        };
        let names = self.going.record.bitmaps.iter();
        let names = names.map(|bitmap| (text(&bitmap.name), bitmap.becomes));
        let names: Vec<(String, Becomes)> = names.collect();
        let mut changes = Vec::new();
        for (name, becomes) in &names {
            let own = in_node(&nodes.base, name);
            let sources = nodes.merged.iter().filter_map(|node| {
                let found = in_node(node, name).filter(|bitmap| !bitmap.is_inconsistent)?;
                Some((node.as_str(), found.granularity_bytes))
            });
            let sources: Vec<(&str, u64)> = sources.collect();
            match (becomes, own, sources.first()) {
                (Becomes::Pruned | Becomes::Dropped, Some(_), _) => {
                    changes.push(BitmapChange::Remove(name));
                }
                (Becomes::Carried, None, Some((_, granularity_bytes))) => {
                    changes.push(BitmapChange::Add {
                        name,
                        granularity_bytes: *granularity_bytes,
                    });
                    let from = sources.iter().map(|(node, _)| (*node, name.as_str()));
                    changes.push(BitmapChange::Merge {
                        into: name,
                        from: from.collect(),
                    });
                }
                // The base's own have recorded all that was committed; what is made already is not made again.
                (
                    Becomes::Pruned
                    | Becomes::Dropped
                    | Becomes::Carried
                    | Becomes::Merged
                    | Becomes::Marked
                    | Becomes::Left,
                    _,
                    _,
                ) => {}
            }
        }
        block_jobs::change_bitmaps(qmp, &nodes.base, &changes).map_err(|error| {
            vm("make the bitmaps in the base", error)
                .left("the data is in the base and does not count yet; the disk is read as before")
                .next("run it again, or cancel the job in QEMU")
        })
    }

    /// Bitmaps that QEMU does not have in the base as they must be, and why. Nobody writes to the disk meanwhile.
    pub(super) fn not_in_base(
        &self,
        qmp: &mut Qmp,
        nodes: &Nodes,
    ) -> Result<Vec<(String, &'static str)>> {
        let all = running::nodes(qmp)?;
        let mut faults = Vec::new();
        for wanted in &self.going.record.bitmaps {
            let name = text(&wanted.name);
            let own = find(&all, &nodes.base, &name);
            let sources = nodes.merged.iter();
            let least = sources.filter_map(|node| find(&all, node, &name));
            let least: Vec<&NodeBitmap> = least.filter(|one| !one.is_inconsistent).collect();
            faults.extend(fault_of(wanted.becomes, own, &least).map(|fault| (name, fault)));
        }
        Ok(faults)
    }

    /// Takes back what [`Live::make_bitmaps`] added: the base is not going to be the disk.
    pub(super) fn remove_added(&self, qmp: &mut Qmp, nodes: &Nodes) -> Result<()> {
        let all = running::nodes(qmp)?;
        let bitmaps = self.going.record.bitmaps.iter();
        let carried = bitmaps.filter(|bitmap| bitmap.becomes == Becomes::Carried);
        let names: Vec<String> = carried.map(|bitmap| text(&bitmap.name)).collect();
        let there = names
            .iter()
            .filter(|name| find(&all, &nodes.base, name).is_some());
        let changes: Vec<BitmapChange<'_>> = there.map(|name| BitmapChange::Remove(name)).collect();
        block_jobs::change_bitmaps(qmp, &nodes.base, &changes)
            .map_err(|error| vm("remove the new bitmaps from the base", error))
    }

    /// Bitmaps of the base that a backup can go on with, by what QEMU says.
    pub(super) fn held(&self, qmp: &mut Qmp) -> Result<Vec<String>> {
        let all = running::nodes(qmp)?;
        let base = self.going.record.layers[self.going.record.base].file();
        let bitmaps = running::node_of(&all, &base)?.bitmaps.iter();
        let held = bitmaps.filter(|one| one.is_persistent && !one.is_inconsistent);
        Ok(held.map(|one| one.name.clone()).collect())
    }
}

fn find<'a>(all: &'a [Node], node: &str, name: &str) -> Option<&'a NodeBitmap> {
    let node = all.iter().find(|one| one.name == node)?;
    node.bitmaps.iter().find(|bitmap| bitmap.name == name)
}

/// What is wrong with the base's bitmap; `least` are those of the layers, all of which it must have.
fn fault_of(
    becomes: Becomes,
    own: Option<&NodeBitmap>,
    least: &[&NodeBitmap],
) -> Option<&'static str> {
    match (becomes, own) {
        (Becomes::Left, _) | (Becomes::Pruned | Becomes::Dropped, None) => None,
        (Becomes::Pruned | Becomes::Dropped, Some(_)) => Some("is still there"),
        (Becomes::Merged | Becomes::Carried | Becomes::Marked, None) => Some("is missing"),
        (Becomes::Merged | Becomes::Carried | Becomes::Marked, Some(own)) => {
            let alike = least
                .iter()
                .filter(|one| one.granularity_bytes == own.granularity_bytes);
            if own.is_inconsistent || !own.is_persistent || !own.is_recording {
                Some("would not be stored, or does not record writes")
            } else if alike
                .map(|one| one.dirty_bytes)
                .any(|bytes| bytes > own.dirty_bytes)
            {
                Some("says less than it must")
            } else {
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(dirty_bytes: u64) -> NodeBitmap {
        NodeBitmap {
            name: "daily".to_owned(),
            granularity_bytes: 65536,
            dirty_bytes,
            is_recording: true,
            is_persistent: true,
            is_inconsistent: false,
        }
    }

    #[test]
    fn a_bitmap_that_says_less_than_a_layers_or_would_not_be_stored_is_found() {
        let (small, large) = (bitmap(65536), bitmap(131_072));
        fn of(own: Option<&NodeBitmap>, least: &[&NodeBitmap]) -> Option<&'static str> {
            fault_of(Becomes::Carried, own, least)
        }
        assert_eq!(of(Some(&large), &[&small, &large]), None);
        assert_eq!(
            of(Some(&small), &[&small, &large]),
            Some("says less than it must")
        );
        assert_eq!(of(None, &[]), Some("is missing"));
        for (persistent, recording, inconsistent) in [
            (false, true, false),
            (true, false, false),
            (true, true, true),
        ] {
            let own = NodeBitmap {
                is_persistent: persistent,
                is_recording: recording,
                is_inconsistent: inconsistent,
                ..large.clone()
            };
            assert!(of(Some(&own), &[&small]).is_some(), "{own:?}");
        }
        assert_eq!(fault_of(Becomes::Left, None, &[&small]), None);
        assert!(fault_of(Becomes::Pruned, Some(&small), &[]).is_some());
    }
}
