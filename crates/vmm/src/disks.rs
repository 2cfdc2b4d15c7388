//! Disks as QEMU's block nodes: their names, how a layer is added, switched to, and frozen.
//!
//! Every layer is two nodes: `vda.3` (the format) over `vda.3.f` (the file). Numbers grow with every
//! overlay and are never used twice in the life of a process, so a disk's chain is its nodes in the
//! order of their numbers, up to the one the device is attached to. A node with a higher number is an
//! overlay that was opened and never switched to. This is why nothing about nodes needs recording:
//! QEMU can always be asked.
//!
//! A node that takes the place of several is named after the numbers that it stands for: `vda.5-3` for
//! `vda.3`, `vda.4` and `vda.5` (see [`crate::relayer`]). Nodes whose numbers another one has among its own are
//! what was there before, and do not count.
//!
//! ```text
//!  virtio-blk "vda" ─▶ vda.2 ──backing──▶ vda.1 ──backing──▶ vda.0
//!                        │ write            │ read-only        │ read-only
//!                      vda.2.f            vda.1.f            vda.0.f
//! ```

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::launch::{Disk, LayerFormat};
use crate::node_names::{Numbers, file_node_name, node_name, parse_node};
use crate::qmp::Qmp;

/// One layer of a disk, as QEMU has it open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerNode {
    /// QEMU's name of the format node.
    pub node: String,
    /// The file, as QEMU was given it.
    pub path: PathBuf,
    /// The format.
    pub format: LayerFormat,
    /// Whether both nodes are open read-only.
    pub read_only: bool,
    /// The size the guest would see, in bytes.
    pub virtual_bytes: u64,
}

/// The chain of a disk, as QEMU has it open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskChain {
    /// The disk.
    pub disk: String,
    /// Base first; the last one is what the device writes to.
    pub layers: Vec<LayerNode>,
}

impl DiskChain {
    /// The layer the device writes to.
    ///
    /// # Panics
    /// Never for a chain this crate gave: it has at least one layer.
    #[must_use]
    pub fn top(&self) -> &LayerNode {
        match self.layers.last() {
            Some(top) => top,
            None => unreachable!("a chain is only made with the node its device is attached to"),
        }
    }
}

/// The options of every node of `disk`, lowest first, as `-blockdev` takes them.
pub(crate) fn chain_options(disk: &Disk) -> Vec<Value> {
    let mut options = Vec::new();
    let mut backing = None;
    for (number, layer) in (0_u32..).zip(&disk.chain) {
        let node = node_name(&disk.id, number);
        let read_only = number as usize + 1 < disk.chain.len();
        let path = layer.path.to_string_lossy();
        options.push(file_options(&node, &path, read_only));
        options.push(format_options(
            &node,
            layer.format,
            backing.as_deref(),
            read_only,
        ));
        backing = Some(node);
    }
    options
}

/// The name of the node that the device of `disk` is attached to at first.
pub(crate) fn top_node(disk: &Disk) -> String {
    let last = disk.chain.len().saturating_sub(1);
    format!("{}.{last}", disk.id)
}

pub(crate) fn file_options(node: &str, path: &str, read_only: bool) -> Value {
    json!({
        "driver": "file",
        "node-name": file_node_name(node),
        "filename": path,
        "read-only": read_only,
        "auto-read-only": false,
        "discard": "unmap",
        "locking": "on",
        "cache": { "direct": false, "no-flush": false },
    })
}

/// `backing` is written even if there is none: otherwise QEMU opens what the image's header names.
pub(crate) fn format_options(
    node: &str,
    format: LayerFormat,
    backing: Option<&str>,
    read_only: bool,
) -> Value {
    let mut options = json!({
        "driver": driver(format),
        "node-name": node,
        "file": file_node_name(node),
        "read-only": read_only,
        "auto-read-only": false,
        "discard": "unmap",
        "cache": { "direct": false, "no-flush": false },
    });
    if format == LayerFormat::Qcow2 {
        options["backing"] = backing.into();
    }
    options
}

fn driver(format: LayerFormat) -> &'static str {
    match format {
        LayerFormat::Qcow2 => "qcow2",
        LayerFormat::Raw => "raw",
    }
}

/// What `query-named-block-nodes` says of a node, as far as it is needed.
#[derive(Debug, Clone, Deserialize)]
struct NodeInfo {
    #[serde(rename = "node-name")]
    name: Option<String>,
    #[serde(rename = "ro")]
    read_only: bool,
    #[serde(rename = "drv")]
    driver: String,
    file: String,
    image: ImageInfo,
}

#[derive(Debug, Clone, Deserialize)]
struct ImageInfo {
    #[serde(rename = "virtual-size")]
    virtual_bytes: u64,
}

/// What `query-block` says of a device, as far as it is needed.
#[derive(Debug, Deserialize)]
struct DeviceInfo {
    qdev: Option<String>,
    inserted: Option<InsertedInfo>,
}

#[derive(Debug, Deserialize)]
struct InsertedInfo {
    #[serde(rename = "node-name")]
    node: Option<String>,
}

/// Everything QEMU says of its block nodes at one moment.
#[derive(Debug)]
pub(crate) struct BlockGraph {
    nodes: Vec<NodeInfo>,
    /// Disk and numbers of the node it is attached to.
    tops: Vec<(String, Numbers)>,
}

impl BlockGraph {
    pub(crate) fn query(qmp: &mut Qmp) -> Result<Self> {
        let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
        let devices: Vec<DeviceInfo> = qmp.execute("query-block", json!({}))?;
        let tops = devices.iter().filter_map(attached).collect();
        Ok(Self { nodes, tops })
    }

    /// The chain of every disk, in no particular order.
    pub(crate) fn chains(&self) -> Result<Vec<DiskChain>> {
        self.tops
            .iter()
            .map(|(disk, top)| {
                let mut layers = Vec::new();
                for numbers in self.current(disk).into_iter().filter(|n| n <= top) {
                    layers.push(self.layer(&numbers.node_name(disk))?);
                }
                if layers.is_empty() {
                    return Err(unexpected(format!(
                        "{disk} is attached to no node of its own"
                    )));
                }
                Ok(DiskChain {
                    disk: disk.clone(),
                    layers,
                })
            })
            .collect()
    }

    /// Layers that lie above what their device is attached to: opened and never switched to.
    pub(crate) fn unattached(&self) -> Result<Vec<LayerNode>> {
        let mut layers = Vec::new();
        for (disk, top) in &self.tops {
            for numbers in self.current(disk).into_iter().filter(|n| n > top) {
                layers.push(self.layer(&numbers.node_name(disk))?);
            }
        }
        Ok(layers)
    }

    /// A number no node of `disk` has had.
    fn next_number(&self, disk: &str) -> u32 {
        let files = self
            .nodes
            .iter()
            .filter_map(|node| node.name.as_deref()?.strip_suffix(".f"));
        let formats = self.nodes.iter().filter_map(|node| node.name.as_deref());
        let used = files.chain(formats).filter_map(parse_node);
        used.filter(|(id, _)| *id == disk)
            .map(|(_, numbers)| numbers.last.saturating_add(1))
            .max()
            .unwrap_or(0)
    }

    /// The numbers of all nodes of `disk`, lowest first.
    fn numbers(&self, disk: &str) -> Vec<Numbers> {
        let names = self.names().into_iter();
        let mut numbers: Vec<Numbers> = names
            .filter_map(parse_node)
            .filter(|(id, _)| *id == disk)
            .map(|(_, numbers)| numbers)
            .collect();
        numbers.sort_unstable();
        numbers
    }

    /// Those that no other node stands for.
    fn current(&self, disk: &str) -> Vec<Numbers> {
        let all = self.numbers(disk);
        let is_current = |one: &Numbers| !all.iter().any(|other| one.are_in(*other));
        all.iter().copied().filter(is_current).collect()
    }

    /// Nodes of `disk` that others stand for, the topmost first and each before the file below it. A file may have
    /// lost its format already.
    pub(crate) fn superseded(&self, disk: &str) -> Vec<String> {
        let (names, current) = (self.names(), self.current(disk));
        let files = names.iter().filter_map(|name| name.strip_suffix(".f"));
        let formats = names.iter().copied();
        let all = formats.chain(files).filter_map(parse_node);
        let own = all.filter(|(id, _)| *id == disk);
        let mut gone: Vec<Numbers> = own
            .map(|(_, numbers)| numbers)
            .filter(|numbers| current.iter().any(|other| numbers.are_in(*other)))
            .collect();
        gone.sort_unstable();
        gone.dedup();
        let pair = |numbers: &Numbers| {
            let format = numbers.node_name(disk);
            [format.clone(), file_node_name(&format)]
        };
        let both = gone.iter().rev().flat_map(pair);
        both.filter(|name| names.contains(&name.as_str())).collect()
    }

    fn names(&self) -> Vec<&str> {
        let names = self.nodes.iter();
        names.filter_map(|node| node.name.as_deref()).collect()
    }

    /// Whether there is such a node.
    pub(crate) fn has_node(&self, name: &str) -> bool {
        self.node(name).is_ok()
    }

    fn layer(&self, node: &str) -> Result<LayerNode> {
        let format = self.node(node)?;
        let file = self.node(&file_node_name(node))?;
        Ok(LayerNode {
            node: node.to_owned(),
            path: PathBuf::from(&file.file),
            format: match format.driver.as_str() {
                "qcow2" => LayerFormat::Qcow2,
                "raw" => LayerFormat::Raw,
                other => return Err(unexpected(format!("{node} has the driver {other}"))),
            },
            read_only: format.read_only && file.read_only,
            virtual_bytes: format.image.virtual_bytes,
        })
    }

    fn node(&self, name: &str) -> Result<&NodeInfo> {
        self.nodes
            .iter()
            .find(|node| node.name.as_deref() == Some(name))
            .ok_or_else(|| unexpected(format!("there is no node {name}")))
    }
}

fn attached(device: &DeviceInfo) -> Option<(String, Numbers)> {
    let id = device
        .qdev
        .as_deref()?
        .strip_prefix("/machine/peripheral/")?;
    let id = id.split('/').next()?;
    let (disk, numbers) = parse_node(device.inserted.as_ref()?.node.as_deref()?)?;
    (disk == id).then(|| (disk.to_owned(), numbers))
}

pub(crate) fn unexpected(found: String) -> Error {
    Error::Protocol {
        doing: "looking at the disks".to_owned(),
        found,
    }
}

/// An overlay that QEMU has opened and its disk does not use yet.
#[derive(Debug, Clone)]
pub(crate) struct OpenOverlay {
    /// The node the device is attached to now.
    pub(crate) below: String,
    /// The overlay's node.
    pub(crate) node: String,
}

/// Opens the qcow2 file `path` as the next overlay of `chain`, attached to nothing.
pub(crate) fn open_overlay(
    qmp: &mut Qmp,
    graph: &BlockGraph,
    chain: &DiskChain,
    path: &str,
) -> Result<OpenOverlay> {
    let node = node_name(&chain.disk, graph.next_number(&chain.disk));
    let file = file_node_name(&node);
    qmp.execute::<Value>("blockdev-add", file_options(&node, path, false))?;
    let added = qmp.execute::<Value>(
        "blockdev-add",
        format_options(&node, LayerFormat::Qcow2, None, false),
    );
    if let Err(error) = added {
        remove_node(qmp, &file);
        return Err(error);
    }
    let overlay = OpenOverlay {
        below: chain.top().node.clone(),
        node,
    };
    if let Err(error) = check_size(qmp, &overlay.node, chain) {
        close_overlay(qmp, &overlay.node);
        return Err(error);
    }
    Ok(overlay)
}

fn check_size(qmp: &mut Qmp, node: &str, chain: &DiskChain) -> Result<()> {
    let found = BlockGraph::query(qmp)?.layer(node)?.virtual_bytes;
    let expected = chain.top().virtual_bytes;
    if found == expected {
        return Ok(());
    }
    Err(Error::Disks {
        expected: format!("an overlay of {expected} bytes for {}", chain.disk),
        found: format!("one of {found} bytes"),
    })
}

/// Closes the overlay `node`, which no device uses. A failure is logged: it costs a descriptor only.
pub(crate) fn close_overlay(qmp: &mut Qmp, node: &str) {
    remove_node(qmp, node);
    remove_node(qmp, &file_node_name(node));
}

pub(crate) fn remove_node(qmp: &mut Qmp, node: &str) {
    if let Err(error) = qmp.execute::<Value>("blockdev-del", json!({ "node-name": node })) {
        tracing::warn!(%error, node, "an unused block node was not closed");
    }
}

/// Puts every overlay above what its device is attached to: all of them, or none.
pub(crate) fn switch(qmp: &mut Qmp, overlays: &[OpenOverlay]) -> Result<()> {
    let actions: Vec<Value> = overlays
        .iter()
        .map(|overlay| {
            json!({
                "type": "blockdev-snapshot",
                "data": { "node": overlay.below, "overlay": overlay.node },
            })
        })
        .collect();
    if actions.is_empty() {
        return Ok(());
    }
    qmp.execute::<Value>("transaction", json!({ "actions": actions }))?;
    Ok(())
}

/// Reopens every layer below the tops read-only and proves it. Does nothing to those that already are.
pub(crate) fn freeze(qmp: &mut Qmp) -> Result<Vec<DiskChain>> {
    for chain in BlockGraph::query(qmp)?.chains()? {
        let mut backing: Option<&str> = None;
        let below_top = chain.layers.len() - 1;
        for layer in &chain.layers[..below_top] {
            if !layer.read_only {
                reopen_read_only(qmp, layer, backing)?;
            }
            backing = Some(&layer.node);
        }
    }
    let chains = BlockGraph::query(qmp)?.chains()?;
    for chain in &chains {
        let below_top = chain.layers.len() - 1;
        if let Some(open) = chain.layers[..below_top]
            .iter()
            .find(|layer| !layer.read_only)
        {
            return Err(Error::NotFrozen {
                disk: chain.disk.clone(),
                node: open.node.clone(),
                path: open.path.clone(),
            });
        }
    }
    Ok(chains)
}

/// Reopening flushes, clears the image's dirty state and gives up the write lock.
fn reopen_read_only(qmp: &mut Qmp, layer: &LayerNode, backing: Option<&str>) -> Result<()> {
    let path = layer.path.to_string_lossy();
    let options = [
        format_options(&layer.node, layer.format, backing, true),
        file_options(&layer.node, &path, true),
    ];
    qmp.execute::<Value>("blockdev-reopen", json!({ "options": options }))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shaped like the answers of QEMU 10.0: more fields, throttling groups, unnamed nodes.
    fn graph() -> BlockGraph {
        let node = |name: Value, driver: &str, file: &str, ro: bool| {
            json!({
                "iops_rd": 0, "detect_zeroes": "off", "active": true, "children": [],
                "image": {"virtual-size": 1024, "filename": "x", "format": driver, "children": []},
                "ro": ro, "node-name": name, "drv": driver, "file": file, "cache": {"no-flush": false},
            })
        };
        let nodes = [
            node(json!("vda.10.f"), "file", "/l/10", false),
            node(json!("vda.10"), "qcow2", "json:{}", false),
            node(json!("vda.9.f"), "file", "/l/9", false),
            node(json!("vda.9"), "qcow2", "json:{}", false),
            node(json!("vda.2.f"), "file", "/l/2", true),
            node(json!("vda.2"), "raw", "/l/2", true),
            node(json!("#block042"), "file", "/other", true),
        ];
        let devices = json!([
            {"device": "", "qdev": "/machine/peripheral/vda/virtio-backend", "removable": false,
             "inserted": {"node-name": "vda.9", "ro": false}},
            {"device": "floppy0", "qdev": "/machine/unattached/device[3]"},
        ]);
        let devices: Vec<DeviceInfo> = serde_json::from_value(devices).expect("devices");
        BlockGraph {
            nodes: nodes
                .into_iter()
                .map(|node| serde_json::from_value(node).expect("node"))
                .collect(),
            tops: devices.iter().filter_map(attached).collect(),
        }
    }

    #[test]
    fn a_chain_is_ordered_by_number_and_ends_where_the_device_is_attached() {
        let graph = graph();
        let chains = graph.chains().expect("chains");
        assert_eq!(chains.len(), 1);
        let nodes: Vec<&str> = chains[0].layers.iter().map(|l| l.node.as_str()).collect();
        assert_eq!(nodes, ["vda.2", "vda.9"]);
        assert_eq!(chains[0].top().path, PathBuf::from("/l/9"));
        assert_eq!(chains[0].layers[0].format, LayerFormat::Raw);
        assert!(chains[0].layers[0].read_only && !chains[0].layers[1].read_only);
        let unattached = graph.unattached().expect("layers");
        assert_eq!(unattached.len(), 1);
        assert_eq!(unattached[0].path, PathBuf::from("/l/10"));
        assert_eq!(graph.next_number("vda"), 11, "a number is not used twice");
        assert_eq!(graph.next_number("vdb"), 0);
    }

    #[test]
    fn a_node_that_stands_for_several_takes_their_place_in_the_chain() {
        let mut graph = graph();
        for name in ["vda.9-2", "vda.9-2.f"] {
            let mut node = graph.node("vda.2").expect("node").clone();
            node.name = Some(name.to_owned());
            node.driver = if name.ends_with('f') { "file" } else { "qcow2" }.to_owned();
            graph.nodes.push(node);
        }
        let twelve = graph.node("vda.10").expect("node").clone();
        graph.nodes.push(NodeInfo {
            name: Some("vda.12".to_owned()),
            ..twelve.clone()
        });
        graph.nodes.push(NodeInfo {
            name: Some("vda.12.f".to_owned()),
            driver: "file".to_owned(),
            ..twelve
        });
        graph.tops = vec![("vda".to_owned(), Numbers::one(10))];
        let chains = graph.chains().expect("chains");
        let nodes: Vec<&str> = chains[0].layers.iter().map(|l| l.node.as_str()).collect();
        assert_eq!(nodes, ["vda.9-2", "vda.10"]);
        assert_eq!(
            graph.superseded("vda"),
            ["vda.9", "vda.9.f", "vda.2", "vda.2.f"]
        );
        graph
            .nodes
            .retain(|node| node.name.as_deref() != Some("vda.9"));
        assert_eq!(graph.superseded("vda"), ["vda.9.f", "vda.2", "vda.2.f"]);
        assert_eq!(graph.next_number("vda"), 13);
        assert_eq!(
            parse_node("vda.2-9"),
            None,
            "numbers are the last one first"
        );
    }

    #[test]
    fn only_the_top_layer_is_opened_for_writing_and_no_header_is_followed() {
        let layer = |path: &str, format| crate::Layer {
            path: path.into(),
            format,
        };
        let disk = Disk {
            id: "vda".to_owned(),
            chain: vec![
                layer("/a,b", LayerFormat::Raw),
                layer("/c", LayerFormat::Qcow2),
                layer("/d", LayerFormat::Qcow2),
            ],
        };
        let options = chain_options(&disk);
        let writable: Vec<&Value> = options
            .iter()
            .filter(|node| node["read-only"] == false)
            .map(|node| &node["node-name"])
            .collect();
        assert_eq!(writable, ["vda.2.f", "vda.2"]);
        assert_eq!(options[0]["filename"], "/a,b");
        assert!(
            options[1].get("backing").is_none(),
            "raw has no backing file"
        );
        assert_eq!(options[3]["backing"], "vda.0");
        assert_eq!(options[5]["backing"], "vda.1");
        let alone = Disk {
            id: "vdb".to_owned(),
            chain: vec![layer("/e", LayerFormat::Qcow2)],
        };
        assert_eq!(chain_options(&alone)[1].get("backing"), Some(&Value::Null));
    }
}
