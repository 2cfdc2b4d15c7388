//! `resize`: another length for a virtual disk.

use stead_qcow2::Preallocation;
use stead_qcow2::ops::resize;

use crate::command::Command;
use crate::common::{self, FORMAT, IMAGE_OPTS, LONG_PROGRESS, OBJECT, QUIET};
use crate::console::Console;
use crate::create_options::{self, size_words};
use crate::editing;
use crate::failure::{Failure, Outcome, system_words};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::opened::{self, Sharing};
use crate::progress::watched;
use crate::raw_length::RawFile;
use crate::reference::Reference;
use crate::report::{self, DRY_RUN, JSON};
use crate::size::{self, BadSize, MAX_SIZE};

pub(crate) const COMMAND: Command = Command {
    name: "resize",
    about: "Give a virtual disk another length",
    usage: "[-f FMT | --image-opts] [--preallocation MODE] [--shrink] [-q] [--dry-run] [--json] FILE [+|-]SIZE",
    help: "A qcow2 image is changed in one step: after an error or a crash it is as it was, or done. Bitmaps stay true,\n\
           internal snapshots keep their length. What is added reads as zeros.\n\n\
           \x20 -f, --format FMT      raw or qcow2; else the file's first bytes tell\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20     --preallocation   off; metadata (qcow2): tables for what is added; falloc, full: take its room too\n\
           \x20     --shrink          allow to lose what lies beyond the new end\n\
           \x20     --progress        show how far it is\n\
           \x20     --dry-run         only say how much room it takes\n\
           \x20     --json            say as JSON what was done\n\
           \x20 -q, --quiet           print nothing\n\n\
           Example:\n  {program} resize disk.qcow2 +10G\n",
    opts: &[
        FORMAT,
        OBJECT,
        IMAGE_OPTS,
        Opt::value("preallocation", "", &["preallocation"]),
        Opt::flag("shrink", "", &["shrink"]),
        QUIET,
        LONG_PROGRESS,
        DRY_RUN,
        JSON,
    ],
    run,
    last_is_operand: true,
};

/// The text at the end.
const DONE: &str = "Image resized.";

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let mode = mode(parsed)?;
    let [name, size] = parsed.operands.as_slice() else {
        let text = "Expecting image file name and size";
        return Err(Failure::usage(console.program(), text));
    };
    let change = Change::parse(&size.to_string_lossy())?;
    let (image, format) = editing::image(parsed, name, console)?;
    match format {
        Format::Raw => raw(parsed, &image, change, mode, console)?,
        Format::Qcow2 => qcow2(parsed, &image, change, mode, console)?,
    }
    Ok(0)
}

fn mode(parsed: &Parsed) -> Outcome<Preallocation> {
    let Some(name) = common::text(parsed, "preallocation") else {
        return Ok(Preallocation::Off);
    };
    let mode = create_options::preallocation(&name);
    mode.ok_or_else(|| Failure::new(format!("Invalid preallocation mode '{name}'")))
}

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    To(u64),
    Longer(u64),
    Shorter(u64),
}

impl Change {
    fn parse(text: &str) -> Outcome<Self> {
        let (kind, number): (fn(u64) -> Self, &str) =
            match (text.strip_prefix('+'), text.strip_prefix('-')) {
                (Some(number), _) => (Self::Longer, number),
                (_, Some(number)) => (Self::Shorter, number),
                (None, None) => (Self::To, text),
            };
        match size::parse(number) {
            Ok(bytes) => Ok(kind(bytes)),
            Err(BadSize::Range) => Err(Failure::new(format!(
                "Value '{number}' is out of range for parameter 'size'"
            ))),
            Err(BadSize::Syntax) => Err(Failure::lines("", &size_words("size"))),
        }
    }

    /// The length that a disk of `old` bytes gets.
    fn of(self, old: u64) -> Outcome<u64> {
        let new = match self {
            Self::To(bytes) => Some(bytes),
            Self::Longer(bytes) => old.checked_add(bytes),
            Self::Shorter(bytes) => old.checked_sub(bytes),
        };
        let possible = new.filter(|new| (1..=MAX_SIZE).contains(new));
        possible.ok_or_else(|| Failure::new("New image size must be positive"))
    }
}

fn check_shrink(parsed: &Parsed, old: u64, new: u64) -> Outcome<()> {
    if new >= old || parsed.has("shrink") {
        return Ok(());
    }
    Err(Failure::new(
        "Use the --shrink option to perform a shrink operation.\n\
         warning: what lies beyond the new end would be lost",
    ))
}

fn check_growth(mode: Preallocation, old: u64, new: u64) -> Outcome<()> {
    if mode == Preallocation::Off || new > old {
        return Ok(());
    }
    Err(Failure::new(
        "Preallocation can only be used for growing images",
    ))
}

fn raw(
    parsed: &Parsed,
    image: &Reference,
    change: Change,
    mode: Preallocation,
    console: &mut Console,
) -> Outcome<()> {
    if image.window.is_some_and(|window| window.size.is_some()) {
        return Err(Failure::new("Cannot resize fixed-size raw disks"));
    }
    let start = image.window.map_or(0, |window| window.offset);
    let file =
        RawFile::open_from(&image.path, start).map_err(|why| opened::not_open(image, &why))?;
    let old = file
        .length()
        .map_err(|error| Failure::new(system_words(&error)))?;
    // A raw disk has whole sectors.
    let new = change.of(old.next_multiple_of(512))?;
    check_shrink(parsed, old, new)?;
    check_growth(mode, old, new)?;
    if mode == Preallocation::Metadata {
        return Err(Failure::new("Unsupported preallocation mode: metadata"));
    }
    if parsed.has(DRY_RUN.id) {
        return console.line(&format!("the file would have {new} bytes"));
    }
    file.resize(new, mode).map_err(|error| {
        let why = system_words(&error);
        Failure::new(format!(
            "Failed to resize: {why}; the file has its old length"
        ))
    })?;
    match parsed.has(QUIET.id) {
        true => Ok(()),
        false => console.line(DONE),
    }
}

fn qcow2(
    parsed: &Parsed,
    image: &Reference,
    change: Change,
    mode: Preallocation,
    console: &mut Console,
) -> Outcome<()> {
    let mut editor = editing::editor(image)?;
    let old = editor.layer().virtual_size();
    let new = change.of(old)?;
    check_shrink(parsed, old, new)?;
    if !new.is_multiple_of(512) {
        return Err(Failure::new("The new size must be a multiple of 512"));
    }
    check_growth(mode, old, new)?;
    // What is added must not show the disk below.
    let below = editing::below(image, &editor, Sharing::Locked)?;
    let below = below.as_ref().map(|opened| &opened.chain);
    if parsed.has(DRY_RUN.id) {
        let plan = watched(parsed, |control| {
            resize::plan(&editor, new, below, mode, control)
        });
        return report::planned(parsed, &plan?, console);
    }
    let done = watched(parsed, |control| {
        resize::resize_reserving(&mut editor, new, below, mode, control)
    })?;
    report::done(parsed, &done, DONE, console)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_added_or_taken_away() {
        let of = |text: &str| Change::parse(text).and_then(|change| change.of(1 << 20));
        assert_eq!(of("2M").expect("good"), 2 << 20);
        assert_eq!(of("+1M").expect("good"), 2 << 20);
        assert_eq!(of("-512k").expect("good"), 512 << 10);
        for bad in ["-1M", "-2M", "0", "8E", "x", "", "+", "--", "16E"] {
            assert!(of(bad).is_err(), "{bad:?}");
        }
    }
}
