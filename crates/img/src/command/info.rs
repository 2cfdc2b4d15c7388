//! `info`: what an image is.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use stead_qcow2::{Encryption, Error, InternalSnapshot, Layer, LayerFormat, StoredBitmap};
use stead_sys::space;

use crate::command::Command;
use crate::common::{self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output};
use crate::console::Console;
use crate::failure::{Failure, Outcome, system_words};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::opened::{self, Sharing};
use crate::reference::{self, Reference};
use crate::size;
use crate::snapshot_table;
use crate::tree::Tree;

pub(crate) const COMMAND: Command = Command {
    name: "info",
    about: "Say what an image is",
    usage: "[-f FMT | --image-opts] [-U] [--backing-chain] [--output=human|json] FILE",
    help: "\x20 -f, --format FMT      raw or qcow2; else the file's first bytes tell\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20     --backing-chain   the images below it too; only this opens files that the image names\n\
           \x20     --output FORMAT   human or json\n\
           \x20 -U, --force-share     also while another process writes the image\n\n\
           Example:\n  {program} info --output=json disk.qcow2 | jq '.[\"virtual-size\"]'\n",
    opts: &[
        FORMAT,
        OBJECT,
        IMAGE_OPTS,
        OUTPUT,
        FORCE_SHARE,
        Opt::flag("backing-chain", "", &["backing-chain"]),
        Opt::flag("limits", "", &["limits"]),
    ],
    run,
};

/// The most images of a chain that are listed.
const MAX_CHAIN: usize = stead_qcow2::MAX_LAYERS;

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let output = common::output(parsed)?;
    let name = common::one_operand(parsed, console.program())?;
    let image = common::image(parsed, name, "format")?;
    let sharing = Sharing::of(parsed);
    let chain = parsed.has("backing-chain");
    let images = if chain {
        whole_chain(image, sharing)?
    } else {
        vec![Image::read(image, sharing)?]
    };
    match output {
        Output::Json if chain => {
            let all = images.iter().map(Image::tree).collect();
            console.line(&Tree::List(all).json())?;
        }
        Output::Json => {
            for image in &images {
                console.line(&image.tree().json())?;
            }
        }
        Output::Human => {
            let all: Vec<String> = images.iter().map(Image::human).collect();
            console.print(&all.join("\n"))?;
        }
    }
    Ok(0)
}

/// The image and all below it.
fn whole_chain(top: Reference, sharing: Sharing) -> Outcome<Vec<Image>> {
    let mut images: Vec<Image> = Vec::new();
    let mut next = Some(top);
    while let Some(reference) = next {
        if images.len() >= MAX_CHAIN {
            let text = format!("the chain has more than {MAX_CHAIN} images");
            return Err(Failure::new(text));
        }
        let place = std::fs::canonicalize(&reference.path).ok();
        if place.is_some() && images.iter().any(|image| image.place == place) {
            let name = &reference.given;
            let text = format!("Backing file '{name}' creates an infinite loop.");
            return Err(Failure::new(text));
        }
        let mut image = Image::read(reference, sharing)?;
        image.place = place;
        next = image.below()?;
        images.push(image);
    }
    Ok(images)
}

/// What is known of one image.
struct Image {
    reference: Reference,
    format: &'static str,
    virtual_size: u64,
    disk_size: u64,
    qcow2: Option<Qcow2>,
    place: Option<PathBuf>,
}

/// What a qcow2 image says beside its size.
struct Qcow2 {
    layer: Layer,
    snapshots: Vec<InternalSnapshot>,
    bitmaps: Vec<StoredBitmap>,
}

impl Image {
    fn read(reference: Reference, sharing: Sharing) -> Outcome<Self> {
        let format = opened::format_of(&reference)?;
        let _lock = opened::lock(&reference, sharing)?;
        let cannot = |error| Failure::open(&reference.given, &error);
        let disk_size = space::allocated_bytes(&reference.path).map_err(|error| {
            let why = system_words(&error);
            opened::not_open(&reference, &why)
        })?;
        let (name, virtual_size, qcow2) = match format {
            Format::Raw => ("raw", raw_size(&reference)?, None),
            Format::Qcow2 => {
                let qcow2 = Qcow2::read(opened::inspect(&reference)?).map_err(cannot)?;
                ("qcow2", qcow2.layer.virtual_size(), Some(qcow2))
            }
        };
        Ok(Self {
            format: if reference.bare_file { "file" } else { name },
            reference,
            virtual_size,
            disk_size,
            qcow2,
            place: None,
        })
    }

    /// The image below, by the name in this one.
    fn below(&self) -> Outcome<Option<Reference>> {
        let Some(backing) = self.backing() else {
            return Ok(None);
        };
        let full = backing.full;
        let cannot = |why: String| {
            let shown = String::from_utf8_lossy(&full);
            Failure::new(format!("Could not open '{shown}': {why}"))
        };
        let name = std::ffi::OsStr::from_bytes(&full);
        let mut below = reference::from_name(name).map_err(cannot)?;
        if let Some(stated) = backing.format {
            let unknown = || cannot(format!("Unknown driver '{stated}'"));
            below.format = Some(Format::by_name(&stated).ok_or_else(unknown)?);
        }
        Ok(Some(below))
    }

    fn backing(&self) -> Option<Backing> {
        let header = self.qcow2.as_ref()?.layer.header();
        let name = header.backing.as_ref()?;
        Some(Backing {
            full: full_name(&self.reference.path, &name.name),
            name: name.name.clone(),
            format: name.format.as_deref().map(lossy),
        })
    }

    fn tree(&self) -> Tree {
        let mut parts = Vec::new();
        if let Some(qcow2) = &self.qcow2
            && !qcow2.snapshots.is_empty()
        {
            let all = qcow2.snapshots.iter().map(snapshot_tree).collect();
            parts.push(("snapshots", Tree::List(all)));
        }
        parts.push(("virtual-size", self.virtual_size.into()));
        parts.push(("filename", self.reference.shown.as_str().into()));
        if let Some(qcow2) = &self.qcow2 {
            parts.push(("cluster-size", qcow2.layer.cluster_size().bytes().into()));
        }
        parts.push(("format", self.format.into()));
        parts.push(("actual-size", self.disk_size.into()));
        if let Some(qcow2) = &self.qcow2 {
            let header = qcow2.layer.header();
            if header.encryption.is_some() {
                parts.push(("encrypted", true.into()));
            }
            let data = ("data", qcow2.specific());
            let specific = Tree::Map(vec![("type", "qcow2".into()), data]);
            parts.push(("format-specific", specific));
        }
        if let Some(backing) = self.backing() {
            parts.push(("full-backing-filename", lossy(&backing.full).into()));
            parts.push(("backing-filename", lossy(&backing.name).into()));
            if let Some(format) = backing.format {
                parts.push(("backing-filename-format", format.into()));
            }
        }
        let dirty = self.qcow2.as_ref().is_some_and(|q| q.layer.header().dirty);
        parts.push(("dirty-flag", dirty.into()));
        Tree::Map(parts)
    }

    fn human(&self) -> String {
        let mut text = format!(
            "image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n",
            self.reference.shown,
            self.format,
            size::human(self.virtual_size),
            self.virtual_size,
            size::human(self.disk_size),
        );
        let Some(qcow2) = &self.qcow2 else {
            return text;
        };
        let header = qcow2.layer.header();
        if header.encryption.is_some() {
            text.push_str("encrypted: yes\n");
        }
        let cluster = qcow2.layer.cluster_size().bytes();
        text.push_str(&format!("cluster_size: {cluster}\n"));
        if header.dirty {
            text.push_str("cleanly shut down: no\n");
        }
        if let Some(backing) = self.backing() {
            text.push_str(&backing.human());
        }
        text.push_str(&snapshot_table::table(&qcow2.snapshots));
        text.push_str("Format specific information:\n");
        text.push_str(&qcow2.specific().human(1));
        text
    }
}

/// What an image says of the one below.
struct Backing {
    name: Vec<u8>,
    /// The name as it must be opened from here.
    full: Vec<u8>,
    format: Option<String>,
}

impl Backing {
    fn human(&self) -> String {
        let name = lossy(&self.name);
        let place = match self.full == self.name {
            true => String::new(),
            false => format!(" (actual path: {})", lossy(&self.full)),
        };
        let format = match &self.format {
            Some(format) => format!("backing file format: {format}\n"),
            None => String::new(),
        };
        format!("backing file: {name}{place}\n{format}")
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A name in the image at `image`: if it is no absolute path and has no protocol, it starts in the
/// image's folder.
fn full_name(image: &Path, name: &[u8]) -> Vec<u8> {
    if name.starts_with(b"/") || reference::protocol(name).is_some() {
        return name.to_vec();
    }
    let image = image.as_os_str().as_bytes();
    let folder = image.iter().rposition(|byte| *byte == b'/');
    let folder = folder.map_or(&[][..], |end| &image[..=end]);
    [folder, name].concat()
}

/// The length of a raw disk: whole sectors, or the part of the file that is used.
fn raw_size(reference: &Reference) -> Outcome<u64> {
    let length =
        file_length(&reference.path).map_err(|error| Failure::open(&reference.given, &error))?;
    let Some(window) = reference.window else {
        return Ok(length.next_multiple_of(512));
    };
    let size = match window.size {
        Some(size) => size,
        None => length.saturating_sub(window.offset),
    };
    let end = window.offset.checked_add(size);
    if end.is_none_or(|end| end > length) {
        let offset = window.offset;
        return Err(opened::not_open(
            reference,
            &format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  \
                 actual size of the containing file ({length})"
            ),
        ));
    }
    Ok(size.next_multiple_of(512))
}

fn file_length(path: &Path) -> Result<u64, Error> {
    let file = stead_qcow2::LayerFile {
        path: path.to_owned(),
        format: LayerFormat::Raw,
    };
    // A block device says 0 in its metadata; opening it as a disk finds its end.
    let disk = stead_qcow2::Chain::open(&[file])?;
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => Ok(metadata.len()),
        Ok(_) | Err(_) => Ok(disk.len()),
    }
}

impl Qcow2 {
    fn read(layer: Layer) -> Result<Self, Error> {
        Ok(Self {
            snapshots: layer.internal_snapshots()?,
            bitmaps: layer.stored_bitmaps()?,
            layer,
        })
    }

    fn specific(&self) -> Tree {
        let header = self.layer.header();
        let version_3 = header.version >= 3;
        let mut parts = vec![
            ("compat", if version_3 { "1.1" } else { "0.10" }.into()),
            ("compression-type", header.compression.name().into()),
        ];
        if version_3 {
            parts.push(("lazy-refcounts", header.lazy_refcounts().into()));
            if !self.bitmaps.is_empty() {
                let all = self.bitmaps.iter().map(bitmap_tree).collect();
                parts.push(("bitmaps", Tree::List(all)));
            }
        }
        parts.push(("refcount-bits", (1 << header.refcount_order).into()));
        if let Some(encryption) = &header.encryption {
            let format = match encryption {
                Encryption::Aes => "aes",
                Encryption::Luks { .. } => "luks",
            };
            parts.push(("encrypt", Tree::Map(vec![("format", format.into())])));
        }
        if let Some(data) = &header.external_data {
            if let Some(name) = &data.name {
                parts.push(("data-file", lossy(name).into()));
            }
            parts.push(("data-file-raw", data.raw.into()));
        }
        if version_3 {
            parts.push(("corrupt", header.corrupt.into()));
            parts.push(("extended-l2", header.extended_l2.into()));
        }
        Tree::Map(parts)
    }
}

fn bitmap_tree(bitmap: &StoredBitmap) -> Tree {
    let mut flags = Vec::new();
    if bitmap.in_use {
        flags.push("in-use".into());
    }
    if bitmap.auto {
        flags.push("auto".into());
    }
    let granularity = 1_u64.checked_shl(u32::from(bitmap.granularity_bits));
    Tree::Map(vec![
        ("flags", Tree::List(flags)),
        ("name", lossy(&bitmap.name).into()),
        ("granularity", granularity.unwrap_or(0).into()),
    ])
}

fn snapshot_tree(snapshot: &InternalSnapshot) -> Tree {
    const SECOND: u64 = 1_000_000_000;
    let clock = snapshot.vm_clock_nanoseconds;
    let mut parts = vec![
        ("id", lossy(&snapshot.id).into()),
        ("name", lossy(&snapshot.name).into()),
        ("vm-state-size", snapshot.vm_state_bytes.into()),
        ("date-sec", u64::from(snapshot.date_seconds).into()),
        ("date-nsec", u64::from(snapshot.date_nanoseconds).into()),
        ("vm-clock-sec", (clock / SECOND).into()),
        ("vm-clock-nsec", (clock % SECOND).into()),
    ];
    if let Some(count) = snapshot.icount {
        parts.push(("icount", count.into()));
    }
    Tree::Map(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_an_image_starts_in_the_images_folder() {
        let full = |image: &str, name: &str| lossy(&full_name(Path::new(image), name.as_bytes()));
        assert_eq!(full("a", "b"), "b");
        assert_eq!(full("d/a", "b"), "d/b");
        assert_eq!(full("/d/a", "../b"), "/d/../b");
        assert_eq!(full("d/a", "/b"), "/b");
        assert_eq!(full("d/a", "nbd://h/b"), "nbd://h/b");
        assert_eq!(full("d/a", "./b:c"), "d/./b:c");
    }
}
