//! Another length for the virtual disk.

use crate::chain::Chain;
use crate::edit::{Done, Editor};
use crate::error::Result;

/// Gives the virtual disk the length `bytes`, a multiple of 512.
///
/// What is cut off is gone, also for a disk that grows again: bytes that are added are zeros, whatever was
/// there and whatever lies below. Bitmaps get the disk's length, with everything that is added dirty; internal
/// snapshots keep theirs. `below` is the disk of the backing files, needed to grow an image that has one.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// [`crate::Error::Refused`] when the format cannot say the length, `below` is missing, or the disk would have no
/// bytes while there are bitmaps; else as [`Editor::apply`].
pub fn resize(editor: &mut Editor, bytes: u64, below: Option<&Chain>) -> Result<Done<()>> {
    editor.apply(|edit| edit.resize(bytes, below))
}
