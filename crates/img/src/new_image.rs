//! What commands that make images share: the disk below a new image, and why one was not made.

use std::path::{Path, PathBuf};

use stead_qcow2::{Chain, Error};

use crate::common;
use crate::format::Format;
use crate::open_error;
use crate::opened::{self, OpenedChain, Sharing};
use crate::reference;
use crate::target;

/// Opens the disk of that name, which starts in the image's folder.
pub(crate) fn below(
    image: &Path,
    name: &str,
    format: Option<&str>,
) -> Result<(Chain, Format), String> {
    // Nothing of it is kept, so it may be in use meanwhile.
    let opened = below_shared(image, name, format, Sharing::Shared)?;
    Ok((opened.chain, opened.format))
}

/// As [`below`]; nobody writes to it meanwhile, unless `sharing` allows it.
pub(crate) fn below_shared(
    image: &Path,
    name: &str,
    format: Option<&str>,
    sharing: Sharing,
) -> Result<OpenedChain, String> {
    let folder = image.parent().unwrap_or(Path::new(""));
    let full = match reference::protocol(name.as_bytes()) {
        Some(_) => PathBuf::from(name),
        None => folder.join(name),
    };
    let mut reference = reference::from_name(full.as_os_str())?;
    if let Some(format) = format {
        let known = Format::by_name(format);
        reference.format = Some(known.ok_or_else(|| format!("Unknown driver '{format}'"))?);
    }
    opened::chain_or_why(&reference, sharing, &common::follow_all())
}

/// Why an image was not made.
pub(crate) fn words(error: &Error) -> String {
    if let Error::Io {
        action: "create",
        path,
        source,
    } = error
    {
        return target::not_created(path, source);
    }
    if let Error::InvalidImage { reason, .. } = error
        && (reason.contains("64 TiB") || reason.contains("L1 table"))
    {
        return format!(
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)\n{error}"
        );
    }
    let (first, more) = open_error::words(error);
    format!("{first}\n{more}")
}
