//! What a check finds wrong, made right where that takes no guess.
//!
//! | found | `Leaks` | `All` |
//! |---|---|---|
//! | refcounts without references | become 0 | become 0 |
//! | refcounts higher or lower than references | stay, if anything else is wrong | become as many as there are references |
//! | wrong copied flags | as above | follow from the refcounts |
//! | marks (dirty, corrupt) | go when nothing is wrong afterwards | the same |
//! | bitmaps that cannot be used, or that nobody kept | are left, and nothing else is done | are dropped |
//! | a cluster used for two things, tables that cannot be read | nothing is done: what is free cannot be told | the same |
//!
//! Guest data is never written. Bitmaps that can be used say the same afterwards. The new refcounts are written beside
//! the old ones, in clusters that nothing refers to; the image is switched to them when a check of them holds.

use std::path::Path;
use std::sync::Arc;

use stead_sys::storage::Storage;

use crate::check::{CheckReport, unusable_bitmaps};
use crate::consistency::Note;
use crate::control::Control;
use crate::edit::{BitmapsToDrop, Edit, EditOptions, Editor, Leaving, Plan, RefcountsFrom};
use crate::error::{Error, Result};

/// What is repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepairMode {
    /// Clusters that are lost are given back.
    Leaks,
    /// Everything that can be.
    All,
}

/// What a repair found and did.
#[derive(Debug, Clone)]
pub struct Repaired {
    /// What a check found before.
    pub before: CheckReport,
    /// What a check finds now.
    pub after: CheckReport,
    /// The names of bitmaps that were dropped, where they could be read.
    pub dropped_bitmaps: Vec<String>,
    /// The room that it took; `None` where there was nothing to do.
    pub room: Option<Plan>,
}

/// What a repair would find and do; nothing was written.
#[derive(Debug, Clone)]
pub struct PlannedRepair {
    /// What a check finds.
    pub before: CheckReport,
    /// The names of bitmaps that would be dropped, where they can be read.
    pub dropped_bitmaps: Vec<String>,
    /// The room that it would take; `None` where there is nothing to do.
    pub room: Option<Plan>,
}

/// What [`repair`] would do, and the room that it needs; nothing is written.
///
/// # Errors
/// As [`repair`].
pub fn plan(path: &Path, mode: RepairMode, control: &Control<'_>) -> Result<PlannedRepair> {
    let editor = Editor::open_damaged(path, EditOptions::default().watched(&control.quiet()))?;
    plan_with(&editor, mode, control)
}

/// As [`plan`], on a storage that nobody else uses; `path` is only for texts.
///
/// # Errors
/// As [`repair`].
pub fn plan_storage(
    storage: Arc<dyn Storage>,
    path: &Path,
    mode: RepairMode,
    control: &Control<'_>,
) -> Result<PlannedRepair> {
    let editor = Editor::damaged_on(
        storage,
        path,
        EditOptions::default().watched(&control.quiet()),
    )?;
    plan_with(&editor, mode, control)
}

/// Repairs the image at `path`.
///
/// # Durability
/// As [`Editor::apply`]: when this returns `Ok`, the repaired image is synced.
///
/// # Errors
/// [`Error::Refused`] when that would take a guess (see the module), with the first finding; else as
/// [`Editor::apply`]. The image is then as it was.
pub fn repair(path: &Path, mode: RepairMode, control: &Control<'_>) -> Result<Repaired> {
    let editor = Editor::open_damaged(path, EditOptions::default().watched(&control.quiet()))?;
    repair_with(editor, mode, control)
}

/// As [`repair`], on a storage that nobody else uses; `path` is only for texts.
///
/// # Errors
/// As [`repair`].
pub fn repair_storage(
    storage: Arc<dyn Storage>,
    path: &Path,
    mode: RepairMode,
    control: &Control<'_>,
) -> Result<Repaired> {
    let editor = Editor::damaged_on(
        storage,
        path,
        EditOptions::default().watched(&control.quiet()),
    )?;
    repair_with(editor, mode, control)
}

/// How an image is made right.
struct Cure {
    from: RefcountsFrom,
    drop: BitmapsToDrop,
    /// Corruptions that stay.
    left: u64,
}

impl Cure {
    /// `None` where there is nothing to do.
    fn of(editor: &Editor, mode: RepairMode, drop: BitmapsToDrop) -> Result<Option<Self>> {
        let before = editor.check();
        if is_whole(before) && drop == BitmapsToDrop::None {
            return Ok(None);
        }
        require_repairable(editor, mode)?;
        let (from, left) = match mode {
            RepairMode::Leaks if before.corruptions > 0 => {
                (RefcountsFrom::WhatIsReferenced, before.corruptions)
            }
            RepairMode::Leaks | RepairMode::All => (RefcountsFrom::References, 0),
        };
        Ok(Some(Self { from, drop, left }))
    }

    fn apply(&self, edit: &mut Edit, path: &Path, control: &Control<'_>) -> Result<()> {
        control.go_on(path)?;
        edit.rebuild(self.from, &self.drop)?;
        if self.from == RefcountsFrom::References {
            edit.mark_clean();
        }
        Ok(())
    }
}

fn plan_with(editor: &Editor, mode: RepairMode, control: &Control<'_>) -> Result<PlannedRepair> {
    let drop = bitmaps_to_drop(editor, mode)?;
    let dropped_bitmaps = names(editor, &drop)?;
    let path = editor.layer().path();
    let room = match Cure::of(editor, mode, drop)? {
        Some(cure) => Some(editor.plan_with(control, |edit| cure.apply(edit, path, control))?),
        None => None,
    };
    Ok(PlannedRepair {
        before: editor.check().clone(),
        dropped_bitmaps,
        room,
    })
}

fn repair_with(mut editor: Editor, mode: RepairMode, control: &Control<'_>) -> Result<Repaired> {
    let before = editor.check().clone();
    let drop = bitmaps_to_drop(&editor, mode)?;
    let mut repaired = Repaired {
        after: before.clone(),
        dropped_bitmaps: names(&editor, &drop)?,
        room: None,
        before,
    };
    let Some(cure) = Cure::of(&editor, mode, drop)? else {
        return Ok(repaired);
    };
    let path = editor.layer().path().to_owned();
    let leaving = Leaving {
        corruptions: cure.left,
        control: *control,
        ..Leaving::default()
    };
    let done = editor.apply_leaving(leaving, |edit| cure.apply(edit, &path, control))?;
    control.tell(1, 1);
    repaired.room = Some(done.room);
    repaired.after = done.check;
    repaired.after.marked_dirty = editor.layer().header().dirty;
    repaired.after.marked_corrupt = editor.layer().header().corrupt;
    Ok(repaired)
}

fn is_whole(report: &CheckReport) -> bool {
    report.is_clean() && !report.marked_corrupt
}

fn require_repairable(editor: &Editor, mode: RepairMode) -> Result<()> {
    let report = editor.check();
    let bitmaps = match mode {
        RepairMode::Leaks => report.unusable_bitmaps,
        RepairMode::All => 0,
    };
    let overlaps = match mode {
        RepairMode::Leaks => 0,
        RepairMode::All => report.overlaps,
    };
    if report.unusable + overlaps + bitmaps == 0 {
        return Ok(());
    }
    let first = report.findings.iter().map(ToString::to_string).next();
    let reason = format!(
        "{} findings cannot be made right without a guess, and what is free cannot be told; of {} the first is: {}",
        report.unusable + overlaps + bitmaps,
        report.corruptions,
        first.unwrap_or_default()
    );
    Err(Error::Refused {
        path: editor.layer().path().to_owned(),
        operation: "repair",
        reason,
    })
}

fn bitmaps_to_drop(editor: &Editor, mode: RepairMode) -> Result<BitmapsToDrop> {
    let report = editor.check();
    let orphaned = |note: &Note| matches!(note, Note::BitmapsNotTrusted { .. } | Note::NoBitmaps);
    // Their clusters are among the leaks, so their names must not stay.
    if report.notes.iter().any(orphaned) && (report.leaks > 0 || mode == RepairMode::All) {
        return Ok(BitmapsToDrop::Directory);
    }
    if mode == RepairMode::Leaks || report.unusable_bitmaps == 0 {
        return Ok(BitmapsToDrop::None);
    }
    match unusable_bitmaps(editor.layer()) {
        Ok(tables) => Ok(BitmapsToDrop::Tables(tables)),
        Err(error @ Error::Io { .. }) => Err(error),
        Err(_unreadable) => Ok(BitmapsToDrop::Directory),
    }
}

fn names(editor: &Editor, drop: &BitmapsToDrop) -> Result<Vec<String>> {
    let BitmapsToDrop::Tables(tables) = drop else {
        return Ok(Vec::new());
    };
    let all = editor.layer().stored_bitmaps()?.into_iter();
    let dropped = all.filter(|bitmap| tables.contains(&bitmap.table));
    Ok(dropped
        .map(|bitmap| String::from_utf8_lossy(&bitmap.name).into_owned())
        .collect())
}
