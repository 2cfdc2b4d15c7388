//! Internal snapshots: create, apply, delete.

use crate::control::Control;
use crate::edit::{Done, Edit, Editor, SnapshotName, SnapshotRecord};
use crate::error::{Error, Result};

/// Keeps the active disk as a new internal snapshot, and gives its identifier.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// [`Error::RefcountOverflow`] where refcounts are too narrow for one more snapshot; else as [`Editor::apply`].
pub fn create(editor: &mut Editor, called: &SnapshotName) -> Result<Done<Vec<u8>>> {
    create_with(editor, called, &Control::default())
}

/// As [`create`], watched.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// As [`create`]; [`Error::Cancelled`].
pub fn create_with(
    editor: &mut Editor,
    called: &SnapshotName,
    control: &Control<'_>,
) -> Result<Done<Vec<u8>>> {
    editor.apply_with(control, |edit| edit.create_snapshot(called))
}

/// Makes the active disk what it was in the snapshot with this identifier or, else, this name. The disk gets
/// the length it had then. Bitmaps stay, and name everything that differs.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// [`Error::Refused`] when there is no such snapshot; else as [`Editor::apply`].
pub fn apply(editor: &mut Editor, called: &[u8]) -> Result<Done<()>> {
    apply_with(editor, called, &Control::default())
}

/// As [`apply`], watched.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// As [`apply`]; [`Error::Cancelled`].
pub fn apply_with(editor: &mut Editor, called: &[u8], control: &Control<'_>) -> Result<Done<()>> {
    editor.apply_with(control, |edit| {
        let index = find(edit, "apply an internal snapshot", called)?;
        edit.apply_snapshot(index)
    })
}

/// Removes the snapshot with this identifier or, else, this name.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// [`Error::Refused`] when there is no such snapshot; else as [`Editor::apply`].
pub fn delete(editor: &mut Editor, called: &[u8]) -> Result<Done<()>> {
    delete_with(editor, called, &Control::default())
}

/// As [`delete`], watched.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// As [`delete`]; [`Error::Cancelled`].
pub fn delete_with(editor: &mut Editor, called: &[u8], control: &Control<'_>) -> Result<Done<()>> {
    editor.apply_with(control, |edit| {
        let index = find(edit, "delete an internal snapshot", called)?;
        edit.delete_snapshot(index)
    })
}

pub(super) fn find(edit: &Edit, operation: &'static str, called: &[u8]) -> Result<usize> {
    let all = edit.snapshots();
    let by = |part: fn(&SnapshotRecord) -> &[u8]| all.iter().position(|one| part(one) == called);
    let found = by(SnapshotRecord::id).or_else(|| by(SnapshotRecord::name));
    found.ok_or_else(|| Error::Refused {
        path: edit.old().path().to_owned(),
        operation,
        reason: format!("there is none called {:?}", String::from_utf8_lossy(called)),
    })
}
