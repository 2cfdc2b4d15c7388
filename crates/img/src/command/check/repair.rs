//! `check -r`: an image is made right, and checked again.

use stead_qcow2::edit::Plan;
use stead_qcow2::ops::repair::{self, PlannedRepair, RepairMode};
use stead_qcow2::ops::restore;
use stead_qcow2::{Control, Error};

use crate::common::{FORCE_SHARE, Output};
use crate::console::Console;
use crate::editing;
use crate::failure::{Failure, Outcome};
use crate::getopt::Parsed;
use crate::opened;
use crate::progress::{self, watched};
use crate::reference::Reference;
use crate::report::DRY_RUN;

use super::told::{self, Repaired};

/// What is to be made right.
pub(super) struct Wanted {
    mode: Option<RepairMode>,
    /// Internal snapshots that lost something.
    snapshots: Vec<String>,
}

/// What the command line says; `None` where it is only to be looked.
pub(super) fn wanted(parsed: &Parsed, program: &str) -> Outcome<Option<Wanted>> {
    let given = parsed.given().filter(|(id, _)| *id == "restore");
    let wanted = Wanted {
        mode: mode(parsed, program)?,
        snapshots: given
            .map(|(_, name)| name.to_string_lossy().into_owned())
            .collect(),
    };
    if !wanted.snapshots.is_empty() && !parsed.has("same") {
        return Err(Failure::new(
            "--restore-snapshot needs --active-was-same: the active disk must be what the internal snapshot was\n\
             The image cannot prove that nothing was written between the snapshot and the flatten; only you can say it.",
        ));
    }
    let nothing = wanted.mode.is_none() && wanted.snapshots.is_empty();
    if nothing && parsed.has(DRY_RUN.id) {
        return Err(Failure::new("--dry-run needs -r or --restore-snapshot"));
    }
    Ok((!nothing).then_some(wanted))
}

fn mode(parsed: &Parsed, program: &str) -> Outcome<Option<RepairMode>> {
    let Some(name) = parsed.last("repair") else {
        return Ok(None);
    };
    match name.to_string_lossy().as_ref() {
        "leaks" => Ok(Some(RepairMode::Leaks)),
        "all" => Ok(Some(RepairMode::All)),
        other => {
            let text = format!("Unknown option value for -r (expecting 'leaks' or 'all'): {other}");
            Err(Failure::usage(program, text))
        }
    }
}

impl Wanted {
    /// Makes it right and checks again: the exit status of that check.
    pub fn run(
        &self,
        parsed: &Parsed,
        image: &Reference,
        output: Output,
        console: &mut Console,
    ) -> Outcome<u8> {
        if parsed.has(FORCE_SHARE.id) {
            let why = "force-share=on can only be used with read-only images";
            return Err(opened::not_open(image, why));
        }
        if parsed.has(DRY_RUN.id) {
            return self.plan(parsed, image, output, console);
        }
        let mut repaired = Repaired::default();
        if let Some(mode) = self.mode {
            let layer = opened::inspect(image)?;
            match watched(parsed, |control| repaired_image(image, mode, control))? {
                Ok(done) => {
                    told::findings(&layer, &done.before, console)?;
                    repaired = Repaired::of(&done);
                }
                Err(Error::Refused { reason, .. }) => {
                    return super::look(parsed, image, output, Some(&reason), console);
                }
                Err(error) => return Err(failed(image, &error)),
            }
        }
        for name in &self.snapshots {
            let bytes = restored(parsed, image, name)?;
            repaired.restored.push((name.clone(), bytes));
        }
        finish(parsed, image, output, &repaired, console)
    }

    fn plan(
        &self,
        parsed: &Parsed,
        image: &Reference,
        output: Output,
        console: &mut Console,
    ) -> Outcome<u8> {
        let mut rooms: Vec<Option<Plan>> = Vec::new();
        if let Some(mode) = self.mode {
            match planned(image, mode)? {
                Ok(plan) => {
                    dropped(&plan, console)?;
                    rooms.push(plan.room);
                }
                Err(Error::Refused { reason, .. }) => {
                    return super::look(parsed, image, output, Some(&reason), console);
                }
                Err(error) => return Err(failed(image, &error)),
            }
        }
        for name in &self.snapshots {
            let editor = editing::editor(image)?;
            let control = progress::stoppable();
            rooms.push(Some(restore::plan(&editor, name.as_bytes(), &control)?));
        }
        console.print(&told::plan(output, &rooms)?)?;
        Ok(0)
    }
}

/// The repair of an image, or of one in a part of a file.
fn repaired_image(
    image: &Reference,
    mode: RepairMode,
    control: &Control<'_>,
) -> Outcome<Result<repair::Repaired, Error>> {
    let Some(window) = image.window else {
        return Ok(repair::repair(&image.path, mode, control));
    };
    let part = window.open_for_changes(&image.path);
    let (part, _lock) = part.map_err(|why| opened::not_open(image, &why))?;
    Ok(repair::repair_storage(part, &image.path, mode, control))
}

/// As [`repaired_image`], of the plan.
fn planned(image: &Reference, mode: RepairMode) -> Outcome<Result<PlannedRepair, Error>> {
    let control = progress::stoppable();
    let Some(window) = image.window else {
        return Ok(repair::plan(&image.path, mode, &control));
    };
    let part = window.open_for_changes(&image.path);
    let (part, _lock) = part.map_err(|why| opened::not_open(image, &why))?;
    Ok(repair::plan_storage(part, &image.path, mode, &control))
}

fn failed(image: &Reference, error: &Error) -> Failure {
    if let Error::Switch { .. } | Error::NoRoom { .. } | Error::Cancelled { .. } = error {
        return Failure::new(format!("Check failed: {error}")).because_of(error);
    }
    Failure::open(&image.given, error)
}

/// How many bytes the internal snapshot got back.
fn restored(parsed: &Parsed, image: &Reference, name: &str) -> Outcome<u64> {
    let mut editor = editing::editor(image)?;
    let done = watched(parsed, |control| {
        restore::restore_from_active_with(&mut editor, name.as_bytes(), control)
    })?;
    Ok(done.value)
}

fn dropped(plan: &PlannedRepair, console: &mut Console) -> Outcome<()> {
    for name in &plan.dropped_bitmaps {
        console.error_line(&format!(
            "The bitmap '{name}' would be dropped: it cannot be used"
        ))?;
    }
    Ok(())
}

/// Says what was done, and what a new check finds.
fn finish(
    parsed: &Parsed,
    image: &Reference,
    output: Output,
    repaired: &Repaired,
    console: &mut Console,
) -> Outcome<u8> {
    for name in &repaired.dropped_bitmaps {
        console.error_line(&format!(
            "The bitmap '{name}' was dropped: it could not be used; make a full backup"
        ))?;
    }
    let quiet = parsed.has("quiet") || output == Output::Json;
    if !quiet {
        console.print(&told::repaired(repaired))?;
    }
    let _lock = opened::lock(image, opened::Sharing::Locked)?;
    let layer = opened::inspect(image)?;
    let report = stead_qcow2::check(&layer);
    let report = report.map_err(|error| Failure::new(format!("Check failed: {error}")))?;
    if repaired.is_something() {
        told::findings(&layer, &report, console)?;
    }
    told::notes(&report, parsed.has("notes"), console)?;
    if output == Output::Json {
        let tree = told::json(image, &layer, &report, Some(repaired), false);
        console.line(&tree.json())?;
    } else if !quiet {
        console.print(&told::human(&layer, &report))?;
    }
    Ok(super::status(&report))
}
