//! The migration stream taken out of an image.

use std::io::{self, Read, Write};
use std::path::Path;

use stead_sys::durable::{Existing, Partial};

use crate::control::Control;
use crate::error::{Kind, Result, SaveImageError};
use crate::image::SaveImage;
use crate::record::hex;
use crate::room;

const STEP_BYTES: usize = 1 << 20;

/// Writes the migration stream of a verified image as a file; returns its bytes.
///
/// # Durability
/// When this returns `Ok`, the file is on the disk under its name; before, nothing has that name.
///
/// # Errors
/// When the image is not whole, the file is in the way or cannot be written; nothing is left then.
pub fn extract(image: &SaveImage, to: &Path, existing: Existing, control: &Control) -> Result<u64> {
    let failed = |source| SaveImageError::io("write", to, source);
    let (expected, length) = verified(image, control)?;
    room::require(to, length, "write")?;
    let partial = Partial::create(to, 0o600).map_err(failed)?;
    let bytes = copy(image, &mut partial.file(), &expected, control)?;
    partial.publish(existing).map_err(failed)?;
    Ok(bytes)
}

/// As [`extract`], to any place that takes bytes; returns how many. Nothing is written before the image is verified.
///
/// # Errors
/// When the image is not whole, or writing fails; a part may have been written then.
pub fn extract_to(image: &SaveImage, to: &mut dyn Write, control: &Control) -> Result<u64> {
    let (expected, _length) = verified(image, control)?;
    copy(image, to, &expected, control)
}

/// The stream's hash and, where it is known, its bytes.
fn verified(image: &SaveImage, control: &Control) -> Result<(String, u64)> {
    let report = image.verify(control)?.require_whole()?;
    // A sparse payload is whole and no stream; the error that says so comes from here.
    drop(image.stream()?);
    let length = report.stream.map_or(0, |stream| stream.bytes);
    let hash = report.stream_hash.ok_or_else(|| changed(image))?;
    Ok((hash, length))
}

fn changed(image: &SaveImage) -> SaveImageError {
    let found = "the file changed after it was verified";
    SaveImageError::new(Kind::Damaged, image.attempt("extract"), found)
}

fn copy(image: &SaveImage, to: &mut dyn Write, expected: &str, control: &Control) -> Result<u64> {
    let mut hasher = blake3::Hasher::new();
    let bytes = copy_hashed(&mut image.stream()?, to, &mut hasher, control)
        .map_err(|source| SaveImageError::io("extract", image.path(), source))?;
    if hex(hasher.finalize().as_bytes()) != expected {
        return Err(changed(image));
    }
    Ok(bytes)
}

fn copy_hashed(
    from: &mut dyn Read,
    to: &mut dyn Write,
    hasher: &mut blake3::Hasher,
    control: &Control,
) -> io::Result<u64> {
    let mut buffer = vec![0; STEP_BYTES];
    let mut copied = 0;
    loop {
        control.check()?;
        let count = from.read(&mut buffer)?;
        if count == 0 {
            to.flush()?;
            return Ok(copied);
        }
        hasher.update(&buffer[..count]);
        to.write_all(&buffer[..count])?;
        copied += count as u64;
        control.tell(copied, 0);
    }
}
