//! Another length for the virtual disk.

use crate::chain::Chain;
use crate::control::Control;
use crate::edit::{Done, Edit, Editor, Plan};
use crate::error::Result;
use crate::make::Preallocation;

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

/// As [`resize`], with room for what is added: the clusters behind the one that the disk ended in, which read as zeros;
/// watched.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// As [`resize`]; [`crate::Error::Cancelled`].
pub fn resize_reserving(
    editor: &mut Editor,
    bytes: u64,
    below: Option<&Chain>,
    mode: Preallocation,
    control: &Control<'_>,
) -> Result<Done<()>> {
    editor.apply_with(control, |edit| change(edit, bytes, below, mode))
}

/// How much room [`resize_reserving`] needs; nothing is written.
///
/// # Errors
/// As [`resize`]; [`crate::Error::Cancelled`].
pub fn plan(
    editor: &Editor,
    bytes: u64,
    below: Option<&Chain>,
    mode: Preallocation,
    control: &Control<'_>,
) -> Result<Plan> {
    editor.plan_with(control, |edit| change(edit, bytes, below, mode))
}

fn change(edit: &mut Edit, bytes: u64, below: Option<&Chain>, mode: Preallocation) -> Result<()> {
    let size = edit.old().cluster_size();
    let before = size.count_for(edit.virtual_size());
    edit.resize(bytes, below)?;
    edit.reserve(before..size.count_for(bytes).max(before), mode)
}
