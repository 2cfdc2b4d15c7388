//! `commit`: what an image has itself goes into one that lies below it.

use std::ffi::OsStr;
use std::path::Path;

use serde_json::{Value, json};
use stead_qcow2::ops::commit::{self, CommitOptions, CommitReport, Incomplete, LongerBase};
use stead_qcow2::{Chain, LayerFile};

use crate::command::Command;
use crate::common::{self, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET};
use crate::console::Console;
use crate::editing;
use crate::failure::{Failure, Outcome};
use crate::getopt::{Opt, Parsed};
use crate::json;
use crate::opened::{self, Sharing};
use crate::progress::watched;
use crate::reference::Reference;
use crate::report::{self, DRY_RUN, JSON};

pub(crate) const COMMAND: Command = Command {
    name: "commit",
    about: "Put what an image has itself into one below it",
    usage: "[-f FMT | --image-opts] [-b BASE] [-d] [-p] [-q] [-t CACHE] [-r RATE] [--dry-run] [--json] FILE",
    help: "The base then shows what FILE shows, and FILE is emptied. Ctrl-C ends it as long as nothing of \
           the base was written over; what was interrupted later is finished by recover, run on the base, or on FILE where \
           the base is raw. Other images over the base show other bytes afterwards.\n\n\
           \x20 -b, --base BASE       the image to put it into, with all that lies between; FILE is not emptied;\n\
           \x20                       else the one directly below\n\
           \x20 -d                    do not empty FILE\n\
           \x20 -f, --format FMT      the format of FILE; else its first bytes tell\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20 -p, --progress        show how far it is\n\
           \x20     --dry-run         only say how much room it takes\n\
           \x20     --json            say as JSON what was done, also to each bitmap\n\
           \x20 -q, --quiet           print nothing\n\
           \x20 -t, -r                accepted for scripts\n\n\
           Example:\n  {program} commit -p overlay.qcow2\n",
    opts: &[
        FORMAT,
        Opt::value("cache", "t", &["cache"]),
        Opt::value("base", "b", &["base"]),
        Opt::flag("keep", "d", &["drop"]),
        Opt::value("rate-limit", "r", &["rate-limit"]),
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
    if let Some(limit) = common::text(parsed, "rate-limit") {
        common::size(&limit, "rate limit")?;
    }
    let name = common::one_operand(parsed, console.program())?;
    common::cache_mode(parsed, "cache", "cache")?;
    let (image, _) = editing::image(parsed, name, console)?;
    if image.window.is_some() {
        let why = "an image in a part of a file cannot be committed";
        return Err(opened::not_open(&image, why));
    }
    let (files, base) = files(parsed, &image)?;
    let options = CommitOptions {
        base,
        empty_top: !parsed.has("keep") && !parsed.has("base"),
        longer_base: LongerBase::Keep,
        incomplete: Incomplete::Mark,
        follow_data: true,
        ..CommitOptions::default()
    };
    if parsed.has(DRY_RUN.id) {
        let report = watched(parsed, |control| commit::measure(&files, &options, control))?;
        planned(parsed, &report, console)?;
        return Ok(0);
    }
    let report = watched(parsed, |control| commit::commit(&files, &options, control))?;
    done(parsed, &report, console)?;
    Ok(0)
}

/// The files of the disk, top first, and which of them is the base.
fn files(parsed: &Parsed, image: &Reference) -> Outcome<(Vec<LayerFile>, usize)> {
    // Its locks are given back: a commit takes its own, some of them for writing.
    let opened = opened::chain(image, Sharing::Locked, common::follow_all())?;
    let chain = &opened.chain;
    if chain.depth() < 2 {
        return Err(Failure::new("Image does not have a backing file"));
    }
    let base = match parsed.last("base") {
        None => 1,
        Some(name) => find(chain, name).ok_or_else(|| {
            let (name, top) = (name.to_string_lossy(), &image.given);
            Failure::new(format!(
                "Did not find '{name}' in the backing chain of '{top}'"
            ))
        })?,
    };
    let all = (0..chain.depth()).filter_map(|index| chain.file(index));
    let all = all.map(|(path, format)| LayerFile {
        path: path.to_owned(),
        format,
    });
    Ok((all.collect(), base))
}

/// The place in the chain of the image with that name. It starts in the folder of the image that names it.
fn find(chain: &Chain, name: &OsStr) -> Option<usize> {
    let is_at = |index: &usize| {
        let (Some((above, _)), Some((own, _))) = (chain.file(index - 1), chain.file(*index)) else {
            return false;
        };
        let folder = above.parent().unwrap_or(Path::new(""));
        let wanted = folder.join(name).canonicalize();
        // What cannot be found is not that image.
        matches!((wanted, own.canonicalize()), (Ok(wanted), Ok(own)) if wanted == own)
    };
    (1..chain.depth()).find(is_at)
}

fn planned(parsed: &Parsed, report: &CommitReport, console: &mut Console) -> Outcome<()> {
    if parsed.has(JSON.id) {
        return console.line(&json::pretty(&as_json(report, "not-begun"))?);
    }
    for (whose, room) in [("the base", Some(report.base)), ("the image", report.top)] {
        if let Some(room) = room {
            console.line(&format!(
                "{whose} needs {} free bytes; the file would have {} bytes, at most {} meanwhile",
                room.new_bytes, room.end_bytes, room.peak_bytes
            ))?;
        }
    }
    warn_of_bitmaps(report, console)
}

fn done(parsed: &Parsed, report: &CommitReport, console: &mut Console) -> Outcome<()> {
    if parsed.has(JSON.id) {
        return console.line(&json::pretty(&as_json(report, "done"))?);
    }
    if !parsed.has(QUIET.id) {
        console.line("Image committed.")?;
    }
    warn_of_bitmaps(report, console)
}

fn warn_of_bitmaps(report: &CommitReport, console: &mut Console) -> Outcome<()> {
    report::warn_of_bitmaps("the base", &report.bitmaps, console)
}

fn as_json(report: &CommitReport, outcome: &str) -> Value {
    json!({
        "outcome": outcome,
        "committed-bytes": report.defined_bytes,
        "verified-in-place-bytes": report.in_place_bytes,
        "room": report::room(&report.base),
        "image-room": report.top.as_ref().map(report::room),
        "bitmaps": report::bitmaps(&report.bitmaps),
    })
}
