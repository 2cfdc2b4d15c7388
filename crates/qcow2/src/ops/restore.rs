//! Internal snapshots that a flatten hollowed, filled again from the active disk.
//!
//! `qemu-img rebase -b ""` copies what an image needs from its backing file into the active disk only (see
//! [`crate::Note::PossibleLoss`]). While the active disk still is what the snapshot was (the guest was stopped from
//! the snapshot to the flatten), it has what the snapshot lost. The image cannot prove that: a guest that wrote to new
//! places leaves the same trace. So it is done only when the caller says that it was so, and refused where the two are
//! known to differ.

use crate::consistency::Note;
use crate::control::Control;
use crate::edit::{Done, Edit, Editor, Mapping, Plan, View};
use crate::error::{Error, Result};

const OPERATION: &str = "restore an internal snapshot from the active disk";

/// Lets the snapshot with this identifier or, else, this name show what the active disk shows where it has nothing
/// itself, and gives how many bytes that were. The caller asserts that the two were the same.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// [`Error::Refused`] when there is no such snapshot, it has lost nothing, or what both have differs; else as
/// [`Editor::apply`].
pub fn restore_from_active(editor: &mut Editor, called: &[u8]) -> Result<Done<u64>> {
    restore_from_active_with(editor, called, &Control::default())
}

/// As [`restore_from_active`], watched.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// As [`restore_from_active`]; [`Error::Cancelled`].
pub fn restore_from_active_with(
    editor: &mut Editor,
    called: &[u8],
    control: &Control<'_>,
) -> Result<Done<u64>> {
    require_restorable(editor, called)?;
    editor.apply_with(control, |edit| restore_called(edit, called))
}

/// How much room [`restore_from_active`] needs; nothing is written.
///
/// # Errors
/// As [`restore_from_active`].
pub fn plan(editor: &Editor, called: &[u8], control: &Control<'_>) -> Result<Plan> {
    require_restorable(editor, called)?;
    editor.plan_with(control, |edit| restore_called(edit, called))
}

fn restore_called(edit: &mut Edit, called: &[u8]) -> Result<u64> {
    let index = super::snapshot::find(edit, OPERATION, called)?;
    restore(edit, index)
}

fn require_restorable(editor: &Editor, called: &[u8]) -> Result<()> {
    let refused = |reason: String| Error::Refused {
        path: editor.layer().path().to_owned(),
        operation: OPERATION,
        reason,
    };
    let is_called = |part: &str| part.as_bytes() == called;
    let losses = editor.check().notes.iter().filter_map(|note| {
        let Note::PossibleLoss {
            id,
            name,
            diverged_bytes,
            incomplete,
            ..
        } = note
        else {
            return None;
        };
        Some((id, name, *diverged_bytes, *incomplete))
    });
    let losses: Vec<_> = losses.collect();
    let loss = losses.iter().find(|loss| is_called(loss.0));
    let loss = loss.or_else(|| losses.iter().find(|loss| is_called(loss.1)));
    match loss {
        None => Err(refused("it is not known to have lost anything".into())),
        Some((_, _, 0, false)) => Ok(()),
        Some((_, _, _, true)) => Err(refused("not all of it could be compared".into())),
        Some((_, _, diverged, false)) => Err(refused(format!(
            "{diverged} bytes that both have are different, so the active disk is not what the snapshot was"
        ))),
    }
}

fn restore(edit: &mut Edit, snapshot: usize) -> Result<u64> {
    let view = View::Snapshot(snapshot);
    let size = edit.old().cluster_size();
    let entries = edit.old().header().l2_entries();
    let own = edit.snapshots()[snapshot].virtual_size();
    let disk = own.unwrap_or(edit.virtual_size()).min(edit.virtual_size());
    let clusters = size.count_for(disk);
    let (mut restored, mut next) = (0, edit.next_table(View::Active, 0)?);
    while let Some(table) = next {
        next = edit.next_table(View::Active, table + 1)?;
        edit.go_on()?;
        let end = clusters.min((table + 1) * entries);
        for cluster in (table * entries).min(end)..end {
            restored += restore_cluster(edit, view, cluster)?;
        }
    }
    Ok(restored << size.bits())
}

/// Lets the snapshot share the active disk's cluster where it has none: 1 if so.
fn restore_cluster(edit: &mut Edit, view: View, cluster: u64) -> Result<u64> {
    let active = edit.mapping(View::Active, cluster)?;
    let own = edit.mapping(view, cluster)?;
    if own == active || active == Mapping::Unallocated {
        return Ok(0);
    }
    match own {
        Mapping::Unallocated => {
            edit.share_mapping(active)?;
            edit.set_mapping(view, cluster, active)?;
            Ok(1)
        }
        // The same cluster, of which the active disk has more.
        Mapping::Subclusters { host, .. } if host == active.host() && host.is_some() => {
            edit.set_mapping(view, cluster, active)?;
            Ok(1)
        }
        Mapping::Subclusters { .. } => Err(Error::Refused {
            path: edit.old().path().to_owned(),
            operation: OPERATION,
            reason: format!("guest cluster {cluster} is partly the snapshot's own"),
        }),
        Mapping::Zero { .. } | Mapping::Data { .. } | Mapping::Compressed(_) => Ok(0),
    }
}
