//! `info`: what an image is.

use std::ffi::OsStr;
use std::path::PathBuf;

use stead_qcow2::{BitmapInfo, FormatSpecific, ImageInfo, Qcow2Info};

use crate::command::Command;
use crate::common::{self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::json;
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
    last_is_operand: false,
};

/// The most images of a chain that are listed.
const MAX_CHAIN: usize = stead_qcow2::MAX_LAYERS;

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let output = common::output(parsed)?;
    let image = opened::operand(parsed, console)?;
    let sharing = Sharing::of(parsed);
    let chain = parsed.has("backing-chain");
    let images = if chain {
        whole_chain(image, sharing)?
    } else {
        vec![Image::read(image, sharing)?]
    };
    match output {
        Output::Json if chain => {
            let all: Vec<&ImageInfo> = images.iter().map(|image| &image.info).collect();
            console.line(&json::pretty(&all)?)?;
        }
        Output::Json => {
            for image in &images {
                console.line(&json::pretty(&image.info)?)?;
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

/// One image of those that are listed.
struct Image {
    info: ImageInfo,
    place: Option<PathBuf>,
}

impl Image {
    fn read(reference: Reference, sharing: Sharing) -> Outcome<Self> {
        let format = opened::format_of(&reference)?;
        let _lock = opened::lock(&reference, sharing)?;
        let found = opened::describe(&reference, format)?;
        Ok(Self {
            info: ImageInfo {
                filename: reference.shown,
                format: if reference.bare_file {
                    "file"
                } else {
                    found.format
                },
                ..found
            },
            place: None,
        })
    }

    /// The image below, by the name in this one.
    fn below(&self) -> Outcome<Option<Reference>> {
        let Some(name) = &self.info.full_backing_filename else {
            return Ok(None);
        };
        let cannot = |why: String| Failure::new(format!("Could not open '{name}': {why}"));
        let mut below = reference::from_name(OsStr::new(name)).map_err(cannot)?;
        if let Some(stated) = &self.info.backing_filename_format {
            let unknown = || cannot(format!("Unknown driver '{stated}'"));
            below.format = Some(Format::by_name(stated).ok_or_else(unknown)?);
        }
        Ok(Some(below))
    }

    fn human(&self) -> String {
        let info = &self.info;
        let mut text = format!(
            "image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n",
            info.filename,
            info.format,
            size::human(info.virtual_size),
            info.virtual_size,
            size::human(info.actual_size),
        );
        if info.encrypted {
            text.push_str("encrypted: yes\n");
        }
        if let Some(bytes) = info.cluster_size {
            text.push_str(&format!("cluster_size: {bytes}\n"));
        }
        if info.dirty_flag {
            text.push_str("cleanly shut down: no\n");
        }
        text.push_str(&backing_lines(info));
        text.push_str(&snapshot_table::table(&info.snapshots));
        if let Some(FormatSpecific::Qcow2(specific)) = &info.format_specific {
            text.push_str("Format specific information:\n");
            text.push_str(&specific_tree(specific).human(1));
        }
        text
    }
}

fn backing_lines(info: &ImageInfo) -> String {
    let (Some(name), Some(full)) = (&info.backing_filename, &info.full_backing_filename) else {
        return String::new();
    };
    let place = match name == full {
        true => String::new(),
        false => format!(" (actual path: {full})"),
    };
    let format = match &info.backing_filename_format {
        Some(format) => format!("backing file format: {format}\n"),
        None => String::new(),
    };
    format!("backing file: {name}{place}\n{format}")
}

/// In the order in which qemu-img prints it.
fn specific_tree(info: &Qcow2Info) -> Tree {
    let text = |text: &String| Tree::from(text.as_str());
    let bitmaps = match info.bitmaps.is_empty() {
        true => None,
        false => Some(Tree::List(info.bitmaps.iter().map(bitmap_tree).collect())),
    };
    let encrypt = info.encrypt.as_ref();
    let parts = [
        ("compat", Some(info.compat.into())),
        ("compression-type", Some(info.compression_type.into())),
        ("lazy-refcounts", info.lazy_refcounts.map(Tree::from)),
        ("bitmaps", bitmaps),
        ("refcount-bits", Some(info.refcount_bits.into())),
        (
            "encrypt",
            encrypt.map(|encrypt| Tree::Map(vec![("format", encrypt.format.into())])),
        ),
        ("data-file", info.data_file.as_ref().map(text)),
        ("data-file-raw", info.data_file_raw.map(Tree::from)),
        ("corrupt", info.corrupt.map(Tree::from)),
        ("extended-l2", info.extended_l2.map(Tree::from)),
    ];
    let there = parts
        .into_iter()
        .filter_map(|(name, part)| Some((name, part?)));
    Tree::Map(there.collect())
}

fn bitmap_tree(bitmap: &BitmapInfo) -> Tree {
    let flags = bitmap.flags.iter().map(|flag| Tree::from(*flag)).collect();
    Tree::Map(vec![
        ("flags", Tree::List(flags)),
        ("name", bitmap.name.as_str().into()),
        ("granularity", bitmap.granularity.into()),
    ])
}
