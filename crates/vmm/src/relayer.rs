//! A running VM's frozen layers replaced by one file that shows the same.
//!
//! ```text
//!  before                     opened                         switched
//!  vda.6                      vda.6                          vda.6
//!    └─▶ vda.5 ─▶ … ─▶ vda.2    └─▶ vda.5 ─▶ … ─▶ vda.2        └─▶ vda.5-3 ─▶ vda.2
//!                             vda.5-3 ──────────▶ vda.2      vda.5 ─▶ … : closed
//! ```
//! The new file stands beside the old ones until the node above is told to read through it, which is one reopening
//! of that node: it is drained, changed and goes on. The guest is not stopped. Nothing is copied by QEMU and no
//! file is written by it, so there is no job that could fail half-way, and neither way is wrong at any moment.
//!
//! Called again after an interruption it goes on where it was: the nodes' names say which stand for which.
//!
//! # Source
//! QEMU QMP Reference Manual, `blockdev-reopen`: the child `backing` may be another node.

use std::path::Path;

use serde_json::{Value, json};

use crate::disks::{self, BlockGraph, DiskChain, LayerNode, file_options, format_options};
use crate::error::{Error, Result};
use crate::launch::{Layer, LayerFormat};
use crate::node_names::{Numbers, file_node_name, parse_node};
use crate::qmp::Qmp;

/// Makes the chain of `disk` be the files of `wanted`, base first.
pub(crate) fn follow(qmp: &mut Qmp, disk: &str, wanted: &[Layer]) -> Result<DiskChain> {
    let mut first_open = 0;
    loop {
        let chain = chain_of(qmp, disk)?;
        let Some(gap) = next_gap(&chain, wanted, first_open)? else {
            break;
        };
        open_instead(qmp, &chain, &gap)?;
        first_open = gap.wanted + 1;
    }
    switch(qmp, disk)?;
    close_superseded(qmp, disk)?;
    chain_of(qmp, disk)
}

fn chain_of(qmp: &mut Qmp, disk: &str) -> Result<DiskChain> {
    let chains = BlockGraph::query(qmp)?.chains()?;
    let found = chains.into_iter().find(|chain| chain.disk == disk);
    found.ok_or_else(|| Error::Disks {
        expected: format!("a disk {disk}"),
        found: "none of that name".to_owned(),
    })
}

/// Layers that one file takes the place of.
#[derive(Debug, PartialEq, Eq)]
struct Gap<'a> {
    /// Which of the wanted layers it is.
    wanted: usize,
    path: &'a Path,
    /// The indexes in the chain of the lowest and the topmost of them.
    lowest: usize,
    topmost: usize,
}

/// The first wanted layer from `from` on that does not stand directly on the one before it.
fn next_gap<'a>(chain: &DiskChain, wanted: &'a [Layer], from: usize) -> Result<Option<Gap<'a>>> {
    let mut next = 0;
    for (index, layer) in wanted.iter().enumerate() {
        let at = (next..chain.layers.len()).find(|at| chain.layers[*at].path == layer.path);
        let Some(at) = at else {
            return Err(Error::Disks {
                expected: format!("{} in the chain of {}", layer.path.display(), chain.disk),
                found: "a chain without it".to_owned(),
            });
        };
        if at > next && index >= from {
            if at + 1 == chain.layers.len() {
                return Err(Error::Disks {
                    expected: format!("the layer that {} writes to to stay", chain.disk),
                    found: "another one".to_owned(),
                });
            }
            return Ok(Some(Gap {
                wanted: index,
                path: &layer.path,
                lowest: next,
                topmost: at,
            }));
        }
        next = at + 1;
    }
    if next != chain.layers.len() {
        return Err(Error::Disks {
            expected: format!("{} layers of {}", wanted.len(), chain.disk),
            found: format!("{}, with others above", chain.layers.len()),
        });
    }
    Ok(None)
}

/// Opens the file that takes the layers' place, over what they stand on.
fn open_instead(qmp: &mut Qmp, chain: &DiskChain, gap: &Gap<'_>) -> Result<()> {
    let ends = [&chain.layers[gap.topmost], &chain.layers[gap.lowest]];
    let [last, first] = ends.map(|layer| parse_node(&layer.node).map(|(_, numbers)| numbers));
    let (Some(last), Some(first)) = (last, first) else {
        unreachable!("chains are made of nodes with numbers");
    };
    let numbers = Numbers {
        last: last.last,
        first: first.first,
    };
    let node = numbers.node_name(&chain.disk);
    let below = gap.lowest.checked_sub(1).map(|at| &chain.layers[at].node);
    let path = gap.path.to_string_lossy();
    let file = file_node_name(&node);
    if !BlockGraph::query(qmp)?.has_node(&file) {
        qmp.execute::<Value>("blockdev-add", file_options(&node, &path, true))?;
    }
    let below = below.map(String::as_str);
    let options = format_options(&node, LayerFormat::Qcow2, below, true);
    if let Err(error) = qmp.execute::<Value>("blockdev-add", options) {
        disks::remove_node(qmp, &file);
        return Err(error);
    }
    let opened = chain_of(qmp, &chain.disk)?;
    let (old, new) = (&chain.layers[gap.topmost], node_of(&opened, &node)?);
    if old.virtual_bytes != new.virtual_bytes {
        disks::close_overlay(qmp, &node);
        return Err(Error::Disks {
            expected: format!("a layer of {} bytes", old.virtual_bytes),
            found: format!("one of {} bytes", new.virtual_bytes),
        });
    }
    Ok(())
}

fn node_of<'a>(chain: &'a DiskChain, node: &str) -> Result<&'a LayerNode> {
    let found = chain.layers.iter().find(|layer| layer.node == node);
    found.ok_or_else(|| disks::unexpected(format!("{node} was opened and is not there")))
}

/// Lets every node read through the one that the chain has below it.
fn switch(qmp: &mut Qmp, disk: &str) -> Result<()> {
    if BlockGraph::query(qmp)?.superseded(disk).is_empty() {
        return Ok(());
    }
    let chain = chain_of(qmp, disk)?;
    for pair in chain.layers.windows(2) {
        let (below, above) = (&pair[0], &pair[1]);
        let stands_for_more = parse_node(&below.node).is_some_and(|(_, n)| n.first != n.last);
        if stands_for_more {
            let options = format_options(
                &above.node,
                above.format,
                Some(&below.node),
                above.read_only,
            );
            qmp.execute::<Value>("blockdev-reopen", json!({ "options": [options] }))?;
        }
    }
    Ok(())
}

/// Closes what is not in the chain any more. QEMU refuses that for a node that anything reads through, so this is
/// the proof that nothing does.
fn close_superseded(qmp: &mut Qmp, disk: &str) -> Result<()> {
    for node in BlockGraph::query(qmp)?.superseded(disk) {
        qmp.execute::<Value>("blockdev-del", json!({ "node-name": node }))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(paths: &[&str]) -> DiskChain {
        let layers = (0..).zip(paths).map(|(number, path)| LayerNode {
            node: format!("vda.{number}"),
            path: path.into(),
            format: LayerFormat::Qcow2,
            read_only: true,
            virtual_bytes: 1024,
        });
        DiskChain {
            disk: "vda".to_owned(),
            layers: layers.collect(),
        }
    }

    fn wanted(paths: &[&str]) -> Vec<Layer> {
        let layers = paths.iter().map(|path| Layer {
            path: path.into(),
            format: LayerFormat::Qcow2,
        });
        layers.collect()
    }

    #[test]
    fn what_is_missing_below_a_wanted_layer_is_what_it_takes_the_place_of() {
        let chain = chain(&["/base", "/a", "/b", "/c", "/d", "/active"]);
        let gap = |paths: &[&str], from| {
            let wanted = wanted(paths);
            let gap = next_gap(&chain, &wanted, from);
            gap.map(|gap| gap.map(|gap| (gap.wanted, gap.lowest, gap.topmost)))
        };
        let all = ["/base", "/a", "/b", "/c", "/d", "/active"];
        assert_eq!(gap(&all, 0).expect("fits"), None);
        let two = ["/base", "/b", "/d", "/active"];
        assert_eq!(gap(&two, 0).expect("fits"), Some((1, 1, 2)));
        assert_eq!(gap(&two, 2).expect("fits"), Some((2, 3, 4)));
        assert_eq!(gap(&["/d", "/active"], 0).expect("fits"), Some((0, 0, 4)));
        for wrong in [
            &["/base", "/other", "/active"][..],
            &["/active", "/base"],
            &["/base", "/active"],
            &["/base", "/a", "/b", "/c", "/d"],
        ] {
            assert!(gap(wrong, 0).is_err(), "{wrong:?}");
        }
    }
}
