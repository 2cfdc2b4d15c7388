//! The disks of a domain, each with the files that it lies in.
//!
//! libvirt writes down the layers that somebody named. Those that it has found itself, by the names in the images, it
//! leaves out, and finds them again when it restores; so do we. An empty `<backingStore/>` says that nothing lies below.

use std::path::{Path, PathBuf};

use roxmltree::Node;
use stead_qcow2::{Chain, LayerFile, LayerFormat, OpenPolicy};

use super::node::{Read, at_slot, attribute, child, known, require};
use crate::error::Result;
use crate::layers::DEPTH_MAX;
use crate::save_restore::moved;

/// A disk as the XML says it.
pub(super) struct NamedDisk {
    pub name: String,
    /// Top first.
    pub layers: Vec<LayerFile>,
    /// Whether the lowest of them is said to have nothing below it.
    ends: bool,
}

impl NamedDisk {
    /// All layers of the disk: those that the XML leaves out are named by the images above them.
    ///
    /// # Errors
    /// When such an image or one that it names cannot be read, or states no format for it.
    pub fn whole_chain(mut self) -> Result<Vec<LayerFile>> {
        let Some(lowest) = self.layers.last().filter(|_| !self.ends) else {
            return Ok(self.layers);
        };
        let failed = |error| moved(&self.name, "").because(error);
        let chain = Chain::open_following(lowest, &OpenPolicy::NAMES).map_err(failed)?;
        let found = (1..chain.depth()).filter_map(|index| chain.file(index));
        let below: Vec<LayerFile> = found.map(layer_file).collect();
        self.layers.extend(below);
        if self.layers.len() > DEPTH_MAX {
            return Err(moved(&self.name, "it has too many layers"));
        }
        Ok(self.layers)
    }
}

fn layer_file((path, format): (&Path, LayerFormat)) -> LayerFile {
    LayerFile {
        path: path.to_owned(),
        format,
    }
}

pub(super) fn disk(node: Node<'_, '_>, slot: usize) -> Read<NamedDisk> {
    let target = child(node, "target")?;
    let name = attribute(target, "dev")?.to_owned();
    let is_plain = matches!(node.attribute("device"), None | Some("disk"))
        && node.attribute("type") == Some("file")
        && target.attribute("bus") == Some("virtio");
    require(is_plain, || {
        format!("disk {name} is not a virtio disk in a file")
    })?;
    at_slot(node, slot)?;
    let driver = child(node, "driver")?;
    guest_sees_the_same(node, driver, &name)?;
    let format = attribute(driver, "type")?;
    let mut layers = vec![layer(node, format)?];
    let mut below = child(node, "backingStore").ok();
    while let Some(node) = below.filter(|node| node.children().any(|part| part.is_element())) {
        let format = attribute(child(node, "format")?, "type")?;
        layers.push(layer(node, format)?);
        below = child(node, "backingStore").ok();
        require(layers.len() <= DEPTH_MAX, || {
            format!("disk {name} has too many layers")
        })?;
    }
    let lowest = layers.last().map(|layer| layer.format);
    let ends = below.is_some() || lowest == Some(LayerFormat::Raw);
    Ok(NamedDisk { name, layers, ends })
}

/// What changes the device that a guest sees, and with it the state, is refused.
fn guest_sees_the_same(node: Node<'_, '_>, driver: Node<'_, '_>, name: &str) -> Read<()> {
    const PARTS: [&str; 8] = [
        "driver",
        "source",
        "backingStore",
        "target",
        "boot",
        "address",
        "alias",
        "iotune",
    ];
    const HOST_ONLY: [&str; 9] = [
        "name",
        "type",
        "cache",
        "io",
        "discard",
        "detect_zeroes",
        "error_policy",
        "rerror_policy",
        "iothread",
    ];
    for part in node.children().filter(Node::is_element) {
        known(part, &PARTS, &format!("disk {name}"))?;
    }
    let other = driver
        .attributes()
        .find(|attribute| !HOST_ONLY.contains(&attribute.name()));
    if let Some(other) = other {
        return Err(format!("disk {name}'s driver has {}", other.name()));
    }
    match driver.attribute("cache") {
        Some(cache @ ("writethrough" | "directsync")) => Err(format!(
            "disk {name} has no write cache ({cache}), and ours have one"
        )),
        Some(_) | None => Ok(()),
    }
}

fn layer(node: Node<'_, '_>, format: &str) -> Read<LayerFile> {
    let source = child(node, "source")?;
    let plain = node.tag_name().name() == "disk" || node.attribute("type") == Some("file");
    require(plain, || "a disk's layer is not a file".to_owned())?;
    Ok(LayerFile {
        path: PathBuf::from(attribute(source, "file")?),
        format: match format {
            "raw" => LayerFormat::Raw,
            "qcow2" => LayerFormat::Qcow2,
            other => return Err(format!("a disk's layer is of format {other}")),
        },
    })
}
