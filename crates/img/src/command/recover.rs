//! `recover`: finishes a change that was interrupted.

use std::path::PathBuf;

use serde_json::{Value, json};
use stead_qcow2::Error;
use stead_qcow2::edit::{JournalFile, JournalFiles, Recovery, recover, recover_storage};

use crate::command::Command;
use crate::common::{FORMAT, IMAGE_OPTS, OBJECT, QUIET};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::getopt::{Opt, Parsed};
use crate::json;
use crate::opened;
use crate::report::JSON;

/// A file that the change may read and write besides the image.
const WITH: Opt = Opt::value("with", "", &["with"]);

pub(crate) const COMMAND: Command = Command {
    name: "recover",
    about: "Finish a change that was interrupted",
    usage: "[--with FILE]... [--image-opts] [-q] [--json] FILE",
    help: "An image whose change was cut off at its last step says that it is in progress and is refused by every\n\
           other command, also by QEMU's. This finishes the change; where there is none, nothing is done. A change that\n\
           needs other files (a commit reads the layers above, and writes to a raw base) is refused, and they are named,\n\
           unless they are given: anybody can make an image that names any file.\n\n\
           \x20     --with FILE       a file that the change may read and write; can be given again and again\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20     --json            say as JSON what was done\n\
           \x20 -q, --quiet           print nothing\n\n\
           Example:\n  {program} recover --with overlay.qcow2 base.qcow2\n",
    opts: &[FORMAT, OBJECT, IMAGE_OPTS, WITH, QUIET, JSON],
    run,
    last_is_operand: false,
};

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let image = opened::operand(parsed, console)?;
    let files = allowed(parsed);
    let done = match image.window {
        None => recover(&image.path, &files),
        Some(window) => {
            let part = window.open_for_changes(&image.path);
            let (part, _lock) = part.map_err(|why| opened::not_open(&image, &why))?;
            recover_storage(part, &image.path, &files)
        }
    };
    let done = match done {
        Ok(done) => done,
        Err(error) => {
            if let Error::JournalFiles { files, .. } = &error
                && parsed.has(JSON.id)
            {
                let report = json!({ "outcome": "not-begun", "needs": needed(files) });
                console.line(&json::pretty(&report)?)?;
            }
            return Err(Failure::open(&image.given, &error));
        }
    };
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

/// The files that the user names, and no others.
fn allowed(parsed: &Parsed) -> JournalFiles {
    let named = parsed.given().filter(|(id, _)| *id == WITH.id);
    let files: Vec<PathBuf> = named.map(|(_, file)| PathBuf::from(file)).collect();
    match files.is_empty() {
        true => JournalFiles::Nothing,
        false => JournalFiles::Listed(files),
    }
}

fn needed(files: &[JournalFile]) -> Value {
    let all = files.iter().map(|file| {
        json!({
            "file": file.path.to_string_lossy(),
            "written": file.written,
        })
    });
    all.collect()
}
