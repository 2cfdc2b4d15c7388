//! `amend`: what a qcow2 image is made like, changed afterwards.

use stead_qcow2::Error;
use stead_qcow2::ops::amend;

use crate::amend_options::{self, Wanted};
use crate::command::Command;
use crate::common::{self, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET};
use crate::console::Console;
use crate::data_file;
use crate::editing::{self, Changes};
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::keyval;
use crate::opened::Sharing;
use crate::progress::watched;
use crate::reference::Reference;
use crate::report::{self, DRY_RUN, JSON};

pub(crate) const COMMAND: Command = Command {
    name: "amend",
    about: "Change what a qcow2 image is made like",
    usage: "[-f FMT | --image-opts] [-p] [-q] [-t CACHE] [--force] [--dry-run] [--json] -o OPTIONS FILE",
    help: "All options are changed in one step: after an error or a crash the image is as it was. What every disk state \
           shows stays, but for what a smaller size cuts off.\n\n\
           \x20 -o, --options LIST    what is to be, key=value,…; -o help lists them\n\
           \x20 -f, --format FMT      the format of FILE; else its first bytes tell\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20 -p, --progress        show how far it is\n\
           \x20     --dry-run         only say how much room it takes\n\
           \x20     --json            say as JSON what was done\n\
           \x20 -q, --quiet           print nothing\n\
           \x20 -t, --force           accepted for scripts\n\n\
           Example:\n  {program} amend -o compat=1.1,lazy_refcounts=on disk.qcow2\n",
    opts: &[
        FORMAT,
        Opt::value("options", "o", &["options"]),
        Opt::value("cache", "t", &["cache"]),
        Opt::flag("force", "", &["force"]),
        PROGRESS,
        QUIET,
        OBJECT,
        IMAGE_OPTS,
        DRY_RUN,
        JSON,
    ],
    run,
    last_is_operand: false,
};

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let lists = common::lists(parsed, "options")?;
    if lists.is_empty() {
        let text = "Must specify options (-o)";
        return Err(Failure::usage(console.program(), text));
    }
    let helps = lists.iter().any(|list| keyval::asks_for_help(list));
    if helps && let Some(format) = common::text(parsed, FORMAT.id) {
        console.print(&help(&format)?)?;
        return Ok(0);
    }
    let [name] = parsed.operands.as_slice() else {
        return Err(Failure::new("Expecting one image file name"));
    };
    common::cache_mode(parsed, "cache", "cache")?;
    let (image, format) = editing::image(parsed, name, console)?;
    if helps {
        console.print(&help(format.name())?)?;
        return Ok(0);
    }
    if format == Format::Raw {
        return Err(no_options(format.name()));
    }
    let wanted = Wanted::parse(&lists).map_err(|why| Failure::lines("", &why))?;
    change(parsed, &image, &wanted, console)?;
    Ok(0)
}

/// The options that images of that format have.
fn help(format: &str) -> Outcome<String> {
    match Format::by_name(format) {
        Some(Format::Qcow2) => Ok(amend_options::help()),
        Some(Format::Raw) => Err(no_options(format)),
        None => Err(Failure::new(format!("Unknown file format '{format}'"))),
    }
}

fn no_options(format: &str) -> Failure {
    Failure::new(format!(
        "Format driver '{format}' does not support option amendment"
    ))
}

fn change(
    parsed: &Parsed,
    image: &Reference,
    wanted: &Wanted,
    console: &mut Console,
) -> Outcome<()> {
    let mut editor = editing::editor_for(image, Changes::Amendments)?;
    let header = editor.layer().header();
    wanted
        .check(header)
        .map_err(|why| Failure::lines("", &why))?;
    let data_file = wanted.data_file();
    let data_file = data_file.map(|name| data_file::name_for(&image.path, name));
    let data_file = data_file.transpose().map_err(Failure::new)?;
    let amendments = wanted.amendments(data_file.as_deref().map(str::as_bytes));
    let grows = wanted.size() > Some(editor.layer().virtual_size());
    let below = match grows {
        true => editing::below(image, &editor, Sharing::Locked)?,
        false => None,
    };
    let below = below.as_ref().map(|opened| &opened.chain);
    let failed = |error: Error| failed(&error);
    if parsed.has(DRY_RUN.id) {
        let plan = watched(parsed, |control| {
            amend::plan(&editor, &amendments, below, control)
        });
        return report::planned(parsed, &plan.map_err(failed)?, console);
    }
    let done = watched(parsed, |control| {
        amend::amend(&mut editor, &amendments, below, control)
    });
    let done = done.map_err(failed)?;
    report::done(parsed, &done, "", console)
}

/// In qemu-img's words where it has some.
fn failed(error: &Error) -> Failure {
    let text = error.to_string();
    if text.contains("of internal snapshot") {
        let first = "Internal snapshots prevent downgrade of image";
        return Failure::new(first).with_more(text);
    }
    Failure::new(text).because_of(error)
}
