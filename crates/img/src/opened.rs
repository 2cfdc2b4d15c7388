//! Opening what a reference names.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use stead_qcow2::Layer;

use crate::failure::{Failure, Outcome, system_words};
use crate::format::{Format, PROBE_BYTES, Probed, probe};
use crate::reference::Reference;

/// The format of the image: the stated one, else what the file's first bytes say.
pub(crate) fn format_of(reference: &Reference) -> Outcome<Format> {
    let first = first_bytes(&reference.path).map_err(|why| not_open(reference, &why))?;
    if let Some(format) = reference.format {
        return Ok(format);
    }
    match probe(&first) {
        Probed::Known(format) => Ok(format),
        Probed::Foreign(name) => Err(not_open(
            reference,
            &format!("Unknown driver '{name}' (what the file looks like); give -f raw if it is a raw disk"),
        )),
    }
}

/// One qcow2 image, without what lies below it.
pub(crate) fn layer(reference: &Reference) -> Outcome<Layer> {
    Layer::open(&reference.path).map_err(|error| Failure::open(&reference.given, &error))
}

/// The failure to open, in qemu-img's words.
pub(crate) fn not_open(reference: &Reference, why: &str) -> Failure {
    Failure::new(format!("Could not open '{}': {why}", reference.given))
}

fn first_bytes(path: &Path) -> Result<Vec<u8>, String> {
    let shown = path.display();
    let cannot = |error: io::Error| format!("Could not open '{shown}': {}", system_words(&error));
    let file = File::open(path).map_err(cannot)?;
    if file.metadata().map_err(cannot)?.is_dir() {
        return Err(format!(
            "'file' driver requires '{shown}' to be a regular file"
        ));
    }
    let mut first = Vec::new();
    let limit = u64::try_from(PROBE_BYTES).unwrap_or(u64::MAX);
    file.take(limit).read_to_end(&mut first).map_err(cannot)?;
    Ok(first)
}
