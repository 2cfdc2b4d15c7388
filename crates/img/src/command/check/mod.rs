//! `check`: whether an image is whole; with `-r`, made whole again.

mod repair;
mod told;

use stead_qcow2::{CheckReport, Error, check_backing, check_with};

use crate::command::Command;
use crate::common::{
    self, FORCE_SHARE, FORMAT, IMAGE_OPTS, LONG_PROGRESS, OBJECT, OUTPUT, Output, QUIET,
};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::opened::{self, Sharing};
use crate::progress::watched;
use crate::reference::Reference;
use crate::report::DRY_RUN;

pub(crate) const COMMAND: Command = Command {
    name: "check",
    about: "Find what is wrong in a qcow2 image, and repair it",
    usage: "[-f FMT | --image-opts] [-r leaks|all] [--dry-run] [--backing] [-q] [-U] [-T CACHE] [--output=human|json] FILE",
    help: "Without -r nothing is written; files that the image names are not opened without --backing. Beside what qemu-img finds: overlaps,\n\
           and damage in the tables of internal snapshots and bitmaps.\n\n\
           A repair is done in one step and proven: refcounts are written anew, what cannot be used of bitmaps is dropped,\n\
           guest data is never written. What would take a guess is left, and the image as it was.\n\n\
           \x20 -r, --repair WHAT     leaks: give back room that is lost; all: what can be made right without a guess\n\
           \x20     --restore-snapshot NAME\n\
           \x20                       give the internal snapshot what it lost in a flatten by `qemu-img rebase`, from the\n\
           \x20                       active disk; needs --active-was-same\n\
           \x20     --active-was-same you state that the disk was not written between snapshot and flatten, which the image\n\
           \x20                       cannot prove\n\
           \x20     --dry-run         only say what a repair would do, and how much room it takes\n\
           \x20 -f, --format FMT      the format (raw has no check); else the file's first bytes tell\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20     --output FORMAT   human or json\n\
           \x20     --backing         open the images below, too, and compare what they show with what was recorded of it\n\
           \x20                       (create and rebase --record-backing); reads all of it\n\
           \x20     --progress        show how far it is\n\
           \x20     --notes           all that is no damage but worth knowing (as JSON always)\n\
           \x20 -q, --quiet           only what is wrong\n\
           \x20 -U, --force-share     also while another process writes the image\n\
           \x20 -T, --cache CACHE     accepted for scripts\n\n\
           Exit status: 0 whole, 1 the check could not be made, 2 damaged, 3 only room is lost (leaks),\n\
           63 the format has no check.\n\n\
           Example:\n  {program} check --output=json disk.qcow2\n",
    opts: &[
        FORMAT,
        OBJECT,
        IMAGE_OPTS,
        OUTPUT,
        FORCE_SHARE,
        QUIET,
        Opt::flag("notes", "", &["notes"]),
        BACKING,
        LONG_PROGRESS,
        Opt::value("repair", "r", &["repair"]),
        Opt::value("restore", "", &["restore-snapshot"]),
        Opt::flag("same", "", &["active-was-same"]),
        DRY_RUN,
        Opt::value("cache", "T", &["cache", "source-cache"]),
    ],
    run,
    last_is_operand: false,
};

/// What lies below is compared with what was recorded of it.
const BACKING: Opt = Opt::flag("backing", "", &["backing"]);
/// The format has no check.
const STATUS_UNSUPPORTED: u8 = 63;
/// The image is damaged.
const STATUS_CORRUPT: u8 = 2;
/// Nothing is damaged, but room is lost.
const STATUS_LEAKS: u8 = 3;

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let output = common::output(parsed)?;
    let name = common::one_operand(parsed, console.program())?;
    common::cache_mode(parsed, "cache", "source cache")?;
    let wanted = repair::wanted(parsed, console.program())?;
    let image = common::image(parsed, name, "format")?;
    if opened::format_of(&image)? == Format::Raw || image.bare_file {
        let failure = Failure::new("This image format does not support checks");
        return Err(failure.with_status(STATUS_UNSUPPORTED));
    }
    if let Some(wanted) = wanted {
        return wanted.run(parsed, &image, output, console);
    }
    look(parsed, &image, output, None, console)
}

/// Only looks; `not_repaired` says why nothing was made right.
fn look(
    parsed: &Parsed,
    image: &Reference,
    output: Output,
    not_repaired: Option<&str>,
    console: &mut Console,
) -> Outcome<u8> {
    let _lock = opened::lock(image, Sharing::of(parsed))?;
    let layer = opened::inspect(image)?;
    let mut report = watched(parsed, |control| check_with(&layer, control)).map_err(failed)?;
    if parsed.has(BACKING.id) {
        compare_backing(parsed, image, &mut report, console)?;
    }
    told::findings(&layer, &report, console)?;
    told::notes(&report, parsed.has("notes"), console)?;
    if let Some(why) = not_repaired {
        console.error_line(&format!("Nothing was repaired: {why}"))?;
    }
    match output {
        Output::Json => {
            let told = told::json(image, &layer, &report, None, parsed.has(BACKING.id));
            console.line(&told.json())?;
        }
        Output::Human if parsed.has("quiet") => {}
        Output::Human => console.print(&told::human(&layer, &report))?,
    }
    Ok(status(&report))
}

fn failed(error: Error) -> Failure {
    Failure::new(format!("Check failed: {error}")).because_of(&error)
}

/// Holds what lies below each image against what was recorded of it.
fn compare_backing(
    parsed: &Parsed,
    image: &Reference,
    report: &mut CheckReport,
    console: &mut Console,
) -> Outcome<()> {
    let opened = opened::chain(image, Sharing::of(parsed), common::follow_all())?;
    let done = watched(parsed, |control| {
        check_backing(&opened.chain, report, control)
    });
    done.map_err(failed)?;
    if report.backing_compared == 0 {
        console.error_line(
            "Note: no image recorded what lies below it (see create and rebase --record-backing), so nothing \
             was compared",
        )?;
    }
    Ok(())
}

fn status(report: &CheckReport) -> u8 {
    if report.corruptions > 0 {
        STATUS_CORRUPT
    } else if report.leaks > 0 {
        STATUS_LEAKS
    } else {
        0
    }
}
