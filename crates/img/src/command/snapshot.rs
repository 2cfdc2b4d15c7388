//! `snapshot`: internal snapshots, listed, made, applied and removed.

use std::time::{SystemTime, UNIX_EPOCH};

use stead_qcow2::edit::SnapshotName;
use stead_qcow2::{Error, ops};

use crate::command::Command;
use crate::common::{self, FORCE_SHARE, FORMAT, IMAGE_OPTS, LONG_PROGRESS, OBJECT, QUIET};
use crate::console::Console;
use crate::editing::{self, OpenedEditor};
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::opened::{self, Sharing};
use crate::progress::watched;
use crate::reference::Reference;
use crate::report::{self, DRY_RUN, JSON};
use crate::snapshot_table;

pub(crate) const COMMAND: Command = Command {
    name: "snapshot",
    about: "List, make, apply and remove internal snapshots",
    usage: "[--image-opts] [-q] [-U] [-l | -c NAME | -a NAME | -d NAME] [--dry-run] [--json] FILE",
    help: "The image is changed in one step: after an error or a crash it is as it was, or done. Bitmaps stay true.\n\n\
           \x20 -l, --list            list them (the default)\n\
           \x20 -c, --create NAME     keep the active disk as it is\n\
           \x20 -a, --apply NAME      make the active disk what it was; NAME may be an id\n\
           \x20 -d, --delete NAME     remove one\n\
           \x20     --progress        show how far it is\n\
           \x20     --dry-run         only say how much room it takes\n\
           \x20     --json            say as JSON what was done\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20 -q, --quiet           print nothing\n\
           \x20 -U, --force-share     list also while another process writes the image\n\n\
           Example:\n  {program} snapshot -c before-upgrade disk.qcow2\n",
    opts: &[
        Opt::flag("list", "l", &["list"]),
        Opt::value("create", "c", &["create"]),
        Opt::value("apply", "a", &["apply"]),
        Opt::value("delete", "d", &["delete"]),
        Opt::value("format", "", &["format"]),
        OBJECT,
        IMAGE_OPTS,
        QUIET,
        FORCE_SHARE,
        LONG_PROGRESS,
        DRY_RUN,
        JSON,
    ],
    run,
    last_is_operand: false,
};

/// What is done.
enum Action {
    List,
    Create(String),
    Apply(String),
    Delete(String),
}

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let action = action(parsed, console.program())?;
    let name = common::one_operand(parsed, console.program())?;
    if let Action::List = action {
        let image = common::image(parsed, name, FORMAT.id)?;
        return list(parsed, &image, console);
    }
    if parsed.has(FORCE_SHARE.id) {
        let image = common::image(parsed, name, FORMAT.id)?;
        let why = "force-share=on can only be used with read-only images";
        return Err(opened::not_open(&image, why));
    }
    let (image, format) = editing::image(parsed, name, console)?;
    if format == Format::Raw {
        return Err(raw(&action));
    }
    let editor = editing::editor(&image)?;
    match action {
        Action::List => unreachable!("listing changes nothing"),
        Action::Create(name) => create(parsed, editor, &name, console)?,
        Action::Apply(name) => apply(parsed, editor, &name, console)?,
        Action::Delete(name) => delete(parsed, editor, &name, console)?,
    }
    Ok(0)
}

fn action(parsed: &Parsed, program: &str) -> Outcome<Action> {
    let mut found = None;
    for (id, value) in parsed.given() {
        let value = value.to_string_lossy().into_owned();
        let action = match id {
            "list" => Action::List,
            "create" => Action::Create(value),
            "apply" => Action::Apply(value),
            "delete" => Action::Delete(value),
            _ => continue,
        };
        if found.replace(action).is_some() {
            let text = "Cannot mix '-l', '-a', '-c', '-d'";
            return Err(Failure::usage(program, text));
        }
    }
    Ok(found.unwrap_or(Action::List))
}

fn list(parsed: &Parsed, image: &Reference, console: &mut Console) -> Outcome<u8> {
    let format = opened::format_of(image)?;
    let _lock = opened::lock(image, Sharing::of(parsed))?;
    let found = opened::describe(image, format)?;
    console.print(&snapshot_table::table(&found.snapshots))?;
    Ok(0)
}

/// A raw disk has no internal snapshots.
fn raw(action: &Action) -> Failure {
    Failure::new(match action {
        Action::List => unreachable!("a raw disk lists none"),
        Action::Create(name) => {
            format!("Could not create snapshot '{name}': -95 (Operation not supported)")
        }
        Action::Apply(name) => {
            format!("Could not apply snapshot '{name}': Block driver does not support snapshots")
        }
        Action::Delete(name) => format!("Could not delete snapshot '{name}': snapshot not found"),
    })
}

fn create(
    parsed: &Parsed,
    mut editor: OpenedEditor,
    name: &str,
    console: &mut Console,
) -> Outcome<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default();
    let called = SnapshotName {
        name: name.as_bytes().to_vec(),
        date_seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
        date_nanoseconds: now.subsec_nanos(),
    };
    let cannot = |error: Error| failure("create", name, &error);
    if parsed.has(DRY_RUN.id) {
        let plan = watched(parsed, |control| {
            editor.plan_with(control, |edit| edit.create_snapshot(&called))
        });
        return report::planned(parsed, &plan.map_err(cannot)?, console);
    }
    let done = watched(parsed, |control| {
        ops::snapshot::create_with(&mut editor, &called, control)
    });
    let done = done.map_err(cannot)?;
    report::done(parsed, &done, "", console)
}

fn apply(
    parsed: &Parsed,
    mut editor: OpenedEditor,
    name: &str,
    console: &mut Console,
) -> Outcome<()> {
    let cannot = |error: Error| failure("apply", name, &error);
    let all = editor.layer().internal_snapshots().map_err(cannot)?;
    let by_id = all.iter().position(|one| one.id == name.as_bytes());
    let by_name = || all.iter().position(|one| one.name == name.as_bytes());
    let Some(index) = by_id.or_else(by_name) else {
        return Err(Failure::new(format!(
            "Could not apply snapshot '{name}': Failed to load snapshot: No such file or directory"
        )));
    };
    if parsed.has(DRY_RUN.id) {
        let plan = watched(parsed, |control| {
            editor.plan_with(control, |edit| edit.apply_snapshot(index))
        });
        return report::planned(parsed, &plan.map_err(cannot)?, console);
    }
    let done = watched(parsed, |control| {
        ops::snapshot::apply_with(&mut editor, &all[index].id, control)
    });
    let done = done.map_err(cannot)?;
    report::done(parsed, &done, "", console)
}

/// By name only, as qemu-img: an id that is also another snapshot's name must not remove the wrong one.
fn delete(
    parsed: &Parsed,
    mut editor: OpenedEditor,
    name: &str,
    console: &mut Console,
) -> Outcome<()> {
    let cannot = |error: Error| failure("delete", name, &error);
    let all = editor.layer().internal_snapshots().map_err(cannot)?;
    let Some(index) = all.iter().position(|one| one.name == name.as_bytes()) else {
        return Err(Failure::new(format!(
            "Could not delete snapshot '{name}': snapshot not found"
        )));
    };
    if parsed.has(DRY_RUN.id) {
        let plan = watched(parsed, |control| {
            editor.plan_with(control, |edit| edit.delete_snapshot(index))
        });
        return report::planned(parsed, &plan.map_err(cannot)?, console);
    }
    let done = watched(parsed, |control| {
        ops::snapshot::delete_with(&mut editor, &all[index].id, control)
    });
    let done = done.map_err(cannot)?;
    report::done(parsed, &done, "", console)
}

fn failure(what: &str, name: &str, error: &Error) -> Failure {
    Failure::new(format!("Could not {what} snapshot '{name}': {error}")).because_of(error)
}
