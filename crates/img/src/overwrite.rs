//! `-n`: the target of a copy is there already.
//!
//! A device or raw file is written in place. A qcow2 image is made anew with the options and the disk length
//! that it has, and takes its place when it is whole, so that an error leaves what was there.

use std::path::Path;

use stead_qcow2::{
    Backing, Chain, Header, Layer, LayerFile, LayerFormat, NewFormat, Preallocation, Qcow2Options,
    Version,
};

use crate::failure::Failure;
use crate::format::Format;
use crate::new_image;
use crate::open_error;
use crate::target::{self, Place};

/// What is there, as it is to be again.
#[derive(Debug)]
pub(crate) struct There {
    pub format: NewFormat,
    pub disk: Option<u64>,
    pub below: Option<Chain>,
    pub place: Place,
}

/// Why it cannot be written over.
#[derive(Debug)]
pub(crate) enum Why {
    /// It does not open.
    NotOpen(String),
    /// It opens, but does not do.
    Unfit(String),
}

/// The failure for the target that the user calls `name`.
pub(crate) fn failure(name: &str, why: Why) -> Failure {
    let text = match why {
        Why::NotOpen(why) => format!("Could not open '{name}': {why}"),
        Why::Unfit(why) => why,
    };
    Failure::lines("", &text)
}

/// Looks at the target at `path` for a disk of `needed` bytes.
pub(crate) fn existing(path: &Path, kind: Format, needed: u64) -> Result<There, Why> {
    target::existing(path).map_err(Why::NotOpen)?;
    let there = match kind {
        Format::Raw => raw(path),
        Format::Qcow2 => qcow2(path),
    }?;
    let size = there.disk.unwrap_or(0);
    if size < needed {
        return Err(Why::Unfit("output file is smaller than input file".into()));
    }
    Ok(match kind {
        // What lies behind the end of the copy stays.
        Format::Raw => There {
            disk: None,
            ..there
        },
        Format::Qcow2 => there,
    })
}

fn raw(path: &Path) -> Result<There, Why> {
    let file = LayerFile {
        path: path.to_owned(),
        format: LayerFormat::Raw,
    };
    let opened = Chain::open(&[file]).map_err(|error| not_open(&error))?;
    Ok(There {
        format: NewFormat::Raw {
            preallocation: Preallocation::Off,
        },
        disk: Some(opened.len()),
        below: None,
        place: target::in_place(path).map_err(Why::NotOpen)?,
    })
}

fn not_open(error: &stead_qcow2::Error) -> Why {
    let (first, more) = open_error::words(error);
    Why::NotOpen(format!("{first}\n{more}"))
}

fn qcow2(path: &Path) -> Result<There, Why> {
    let layer = Layer::inspect(path).map_err(|error| not_open(&error))?;
    let header = layer.header();
    refuse_what_would_be_lost(header)?;
    let backing = backing(header)?;
    let below = match &backing {
        None => None,
        Some(backing) => {
            let format = Format::from(backing.format).name();
            let opened = new_image::below(path, &backing.name, Some(format));
            Some(opened.map_err(Why::NotOpen)?.0)
        }
    };
    Ok(There {
        format: NewFormat::Qcow2(options(header, backing)),
        disk: Some(header.virtual_size),
        below,
        place: target::place(path).map_err(Why::NotOpen)?,
    })
}

fn refuse_what_would_be_lost(header: &Header) -> Result<(), Why> {
    let lost = [
        (header.internal_snapshots > 0, "internal snapshots"),
        (header.bitmaps.is_some(), "bitmaps"),
        (header.external_data.is_some(), "an external data file"),
        (header.encryption.is_some(), "encryption"),
    ];
    match lost.into_iter().find(|(there, _)| *there) {
        None => Ok(()),
        Some((_, what)) => Err(Why::Unfit(format!(
            "the target has {what}, which writing over it would lose; nothing was written"
        ))),
    }
}

fn backing(header: &Header) -> Result<Option<Backing>, Why> {
    let Some(backing) = &header.backing else {
        return Ok(None);
    };
    let format = backing.format.as_deref().unwrap_or_default();
    let format = String::from_utf8_lossy(format);
    let known = Format::by_name(&format);
    let (Some(format), Ok(name)) = (known, String::from_utf8(backing.name.clone())) else {
        let text = "the target does not state the format of the image below it";
        return Err(Why::Unfit(text.into()));
    };
    Ok(Some(Backing {
        name,
        format: format.into(),
    }))
}

fn options(header: &Header, backing: Option<Backing>) -> Qcow2Options {
    Qcow2Options {
        version: match header.version {
            2 => Version::V2,
            _ => Version::V3,
        },
        cluster_size: header.cluster_size,
        refcount_bits: 1 << header.refcount_order,
        lazy_refcounts: header.lazy_refcounts(),
        extended_l2: header.extended_l2,
        compression: header.compression,
        backing,
        data_file: None,
        preallocation: Preallocation::Off,
        backing_content: None,
    }
}

impl There {
    /// Whether it is written in place.
    #[cfg(test)]
    fn in_place(&self) -> bool {
        matches!(self.place.target, stead_qcow2::Target::InPlace { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_target_is_written_in_place_and_must_be_large_enough() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("raw");
        let file = stead_sys::durable::create_scratch(&path, 0o600).expect("a file");
        file.set_len(1024).expect("longer");
        let there = existing(&path, Format::Raw, 1024).expect("large enough");
        assert!(there.in_place() && there.disk.is_none());
        drop(there);
        let error = existing(&path, Format::Raw, 1025).expect_err("too small");
        assert!(matches!(error, Why::Unfit(_)));
        let error = existing(&dir.path().join("none"), Format::Raw, 0).expect_err("absent");
        assert!(matches!(error, Why::NotOpen(_)));
    }
}
