//! Taking a backup away that nothing stands on.
//!
//! The mark of a backup that is not done is set first, and the record goes next: from then on there is no such backup, and
//! whoever opens the folder removes the rest.

use std::path::Path;

use stead_sys::durable;

use crate::error::{BackupError, Kind, Result};
use crate::folder::Folder;

/// Removes a backup from a folder; its id.
///
/// # Durability
/// When this returns `Ok`, it is gone. After a crash it is whole or gone.
///
/// # Errors
/// When there is no such backup, another one stands on it, somebody backs up into the folder, or the files cannot be removed.
pub fn remove(folder: &Path, wanted: &str) -> Result<String> {
    // Nothing is made where nothing is.
    let id = Folder::open(folder)?.find(wanted)?;
    let folder = Folder::open_for_writing(folder)?;
    require_no_child(&folder, &id)?;
    let record = folder.record_file(&id);
    let removed = folder
        .begin(&id)
        .and_then(|()| durable::remove_file(&record))
        .and_then(|()| folder.end(&id, false));
    removed.map_err(|source| {
        BackupError::io("remove the backup in", &folder.path, source).left(format!(
            "the backup {id} is whole or gone; the next backup removes what is left of it"
        ))
    })?;
    Ok(id)
}

fn require_no_child(folder: &Folder, id: &str) -> Result<()> {
    let stands_on_it = folder.records().find_map(|(child, record)| {
        let parent = record.as_ref().ok()?.parent.as_deref();
        (parent == Some(id)).then_some(child)
    });
    match stands_on_it {
        None => Ok(()),
        Some(child) => {
            let found = format!("the backup {child} stands on it");
            let attempt = format!("remove the backup {id}");
            Err(BackupError::new(Kind::Conflict, attempt, found)
                .next("remove those that stand on it first, the last one first"))
        }
    }
}
