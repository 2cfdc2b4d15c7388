//! `compare`: whether two disks have the same bytes.

use std::ffi::OsStr;

use stead_qcow2::{Comparison, Difference, compare_with};

use crate::command::Command;
use crate::common::{
    self, CACHE_SIZE, FORCE_SHARE, IMAGE_OPTS, NO_FOLLOW, OBJECT, PROGRESS, QUIET,
};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::getopt::{Opt, Parsed};
use crate::opened::{self, OpenedChain};
use crate::progress::watched_open;

pub(crate) const COMMAND: Command = Command {
    name: "compare",
    about: "Say whether two disks have the same bytes",
    usage: "[-f FMT] [-F FMT] [--image-opts] [-s] [-p] [-q] [-U] [-T CACHE] [--no-follow] FILE1 FILE2",
    help: "\x20 -f, --a-format FMT    the format of FILE1; else its first bytes tell\n\
           \x20 -F, --b-format FMT    the format of FILE2\n\
           \x20     --image-opts      both are option strings\n\
           \x20 -s, --strict          lengths and what is allocated must be equal too\n\
           \x20 -p, --progress        show how far it is\n\
           \x20 -q, --quiet           only the exit status\n\
           \x20     --no-follow       refuse an image that needs other files\n\
           \x20     --cache-size SIZE  memory for tables (64M)\n\
           \x20 -U, --force-share     also while another process writes an image\n\
           \x20 -T, --cache CACHE     accepted for scripts\n\n\
           Exit status: 0 the same, 1 different, 2 an image cannot be opened, 3 or 4 it cannot be read.\n\n\
           Example:\n  {program} compare -p before.qcow2 after.raw\n",
    opts: &[
        Opt::value("format", "f", &["a-format"]),
        Opt::value("second-format", "F", &["b-format"]),
        OBJECT,
        IMAGE_OPTS,
        Opt::flag("strict", "s", &["strict"]),
        PROGRESS,
        QUIET,
        NO_FOLLOW,
        CACHE_SIZE,
        FORCE_SHARE,
        Opt::value("cache", "T", &["cache", "source-cache"]),
    ],
    run,
    last_is_operand: false,
};

/// An image cannot be opened.
const STATUS_OPEN: u8 = 2;
/// An image cannot be read.
const STATUS_READ: u8 = 4;

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let [first, second] = parsed.operands.as_slice() else {
        let text = "Expecting two image file names";
        return Err(Failure::usage(console.program(), text));
    };
    let quiet = parsed.has("quiet");
    let not_opened = |failure: Failure| failure.with_status(STATUS_OPEN);
    common::cache_mode(parsed, "cache", "source cache").map_err(not_opened)?;
    let a = open(parsed, first, "format").map_err(not_opened)?;
    let b = open(parsed, second, "second-format").map_err(not_opened)?;
    let found = watched_open(parsed, |control| {
        compare_with(&a.chain, &b.chain, parsed.has("strict"), control)
    });
    // As from qemu-img, the verdict stands on the line of the progress.
    let (found, _line) = found.map_err(|error| {
        let failure = Failure::new(error.to_string()).with_status(STATUS_READ);
        failure.because_of(&error)
    })?;
    if !quiet {
        console.print(&text(&found))?;
        console.flush()?;
    }
    Ok(u8::from(found.difference.is_some()))
}

fn open(parsed: &Parsed, name: &OsStr, format_id: &str) -> Outcome<OpenedChain> {
    let (_, opened) = opened::disk(parsed, name, format_id)?;
    Ok(opened)
}

fn text(found: &Comparison) -> String {
    let [a, b] = found.lengths;
    let common = a.min(b);
    // The lengths are worth a word once all that both disks have is equal.
    let warning = match found.difference {
        Some(Difference::Length | Difference::Status { .. }) => "",
        Some(Difference::Content { sector, .. }) if sector < common => "",
        Some(Difference::Content { .. }) | None if a == b => "",
        Some(Difference::Content { .. }) | None => "Warning: Image size mismatch!\n",
    };
    let verdict = match found.difference {
        None => "Images are identical.".to_owned(),
        Some(Difference::Length) => "Strict mode: Image size mismatch!".to_owned(),
        Some(Difference::Status { at }) => {
            format!("Strict mode: Offset {at} block status mismatch!")
        }
        Some(Difference::Content { sector, .. }) => {
            format!("Content mismatch at offset {sector}!")
        }
    };
    format!("{warning}{verdict}\n")
}
