//! `recover`: finishes a change that was interrupted.

use serde_json::json;
use stead_qcow2::edit::{Recovery, recover, recover_storage};

use crate::command::Command;
use crate::common::{FORMAT, IMAGE_OPTS, OBJECT, QUIET};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::getopt::Parsed;
use crate::json;
use crate::opened;
use crate::report::JSON;

pub(crate) const COMMAND: Command = Command {
    name: "recover",
    about: "Finish a change that was interrupted",
    usage: "[--image-opts] [-q] [--json] FILE",
    help: "An image whose change was cut off at its last step says that it is in progress and is refused by every\n\
           other command, also by QEMU's. This finishes the change; where there is none, nothing is done.\n\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20     --json            say as JSON what was done\n\
           \x20 -q, --quiet           print nothing\n\n\
           Example:\n  {program} recover disk.qcow2\n",
    opts: &[FORMAT, OBJECT, IMAGE_OPTS, QUIET, JSON],
    run,
    last_is_operand: false,
};

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let image = opened::operand(parsed, console)?;
    let done = match image.window {
        None => recover(&image.path),
        Some(window) => {
            let part = window.open_for_changes(&image.path);
            let (part, _lock) = part.map_err(|why| opened::not_open(&image, &why))?;
            recover_storage(part, &image.path)
        }
    };
    let done = done.map_err(|error| Failure::open(&image.given, &error))?;
    let (outcome, text) = match done {
        Recovery::NothingToDo => ("nothing-to-do", "No change was in progress."),
        Recovery::Finished => ("done", "The change is finished; the image is whole."),
    };
    if parsed.has(JSON.id) {
        console.line(&json::pretty(&json!({ "outcome": outcome }))?)?;
    } else if !parsed.has(QUIET.id) {
        console.line(text)?;
    }
    Ok(0)
}
