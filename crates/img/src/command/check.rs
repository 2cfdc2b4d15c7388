//! `check`: whether an image is whole.

use stead_qcow2::{
    CheckReport, Control, Error, Finding, HostOffset, Layer, Note, check, check_backing,
};
use stead_sys::signal;

use crate::command::Command;
use crate::common::{self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, QUIET};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::opened::{self, Sharing};
use crate::progress::Progress;
use crate::reference::Reference;
use crate::tree::Tree;

pub(crate) const COMMAND: Command = Command {
    name: "check",
    about: "Find what is wrong in a qcow2 image",
    usage: "[-f FMT | --image-opts] [-q] [-U] [-T CACHE] [--backing] [--output=human|json] FILE",
    help: "Nothing is written, and files that the image names are not opened without --backing. Beside what qemu-img finds: overlaps,\n\
           and damage in the tables of internal snapshots and bitmaps.\n\n\
           \x20 -f, --format FMT      the format (raw has no check); else the file's first bytes tell\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20     --output FORMAT   human or json\n\
           \x20     --backing         open the images below, too, and compare what they show with what was recorded of it\n\
           \x20                       (create and rebase --record-backing); reads all of it\n\
           \x20     --progress        show how far that is\n\
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
        Opt::flag("progress", "", &["progress"]),
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
    let image = common::image(parsed, name, "format")?;
    if opened::format_of(&image)? == Format::Raw || image.bare_file {
        let failure = Failure::new("This image format does not support checks");
        return Err(failure.with_status(STATUS_UNSUPPORTED));
    }
    let _lock = opened::lock(&image, Sharing::of(parsed))?;
    let layer = opened::inspect(&image)?;
    let mut report = check(&layer).map_err(failed)?;
    if parsed.has(BACKING.id) {
        compare_backing(parsed, &image, &mut report, console)?;
    }
    say_findings(&layer, &report, console)?;
    say_notes(&report, parsed.has("notes"), console)?;
    match output {
        Output::Json => console.line(&json(parsed, &image, &layer, &report).json())?,
        Output::Human if parsed.has("quiet") => {}
        Output::Human => console.print(&human(&layer, &report))?,
    }
    Ok(status(&report))
}

fn failed(error: Error) -> Failure {
    Failure::new(format!("Check failed: {error}"))
}

/// Holds what lies below each image against what was recorded of it.
fn compare_backing(
    parsed: &Parsed,
    image: &Reference,
    report: &mut CheckReport,
    console: &mut Console,
) -> Outcome<()> {
    let opened = opened::chain(image, Sharing::of(parsed), common::follow_all())?;
    let progress = Progress::start(parsed.has("progress") && !parsed.has("quiet"));
    let tell = |fraction| progress.tell(fraction);
    let control = Control {
        cancel: signal::note_stop().ok(),
        progress: Some(&tell),
    };
    check_backing(&opened.chain, report, &control).map_err(failed)?;
    progress.done();
    drop(progress);
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

fn say_findings(layer: &Layer, report: &CheckReport, console: &mut Console) -> Outcome<()> {
    for finding in &report.findings {
        console.error_line(&finding_line(layer, finding))?;
    }
    let told = u64::try_from(report.findings.len()).unwrap_or(u64::MAX);
    let all = report.corruptions.saturating_add(report.leaks);
    if all > told {
        console.error_line(&format!("and {} more of these", all - told))?;
    }
    if report.marked_corrupt {
        console.error_line("The image is marked corrupt: somebody found it damaged before.")?;
    }
    Ok(())
}

/// Notes in full when asked for. A possible loss is seen in every image whose disk was written since a snapshot
/// was made, so by itself it is only counted.
fn say_notes(report: &CheckReport, all: bool, console: &mut Console) -> Outcome<()> {
    let possible = |note: &&Note| matches!(note, Note::PossibleLoss { .. });
    for note in report.notes.iter().filter(|note| all || !possible(note)) {
        console.error_line(&format!("Note: {note}"))?;
    }
    let hidden = report.notes.iter().filter(possible).count();
    if hidden > 0 && !all {
        console.error_line(&format!(
            "Note: {hidden} internal snapshots have no data where the active disk has some; if the image was \
             flattened with `rebase -b \"\"`, see --notes"
        ))?;
    }
    Ok(())
}

/// A finding, in qemu-img's words where it has words for it.
fn finding_line(layer: &Layer, finding: &Finding) -> String {
    let number = |cluster: &HostOffset| cluster.0 >> layer.cluster_size().bits();
    if let Finding::Leak {
        cluster,
        refcount,
        references,
    } = finding
    {
        let number = number(cluster);
        return format!("Leaked cluster {number} refcount={refcount} reference={references}");
    }
    if let Finding::RefcountTooLow {
        cluster,
        refcount,
        references,
    } = finding
    {
        let number = number(cluster);
        return format!("ERROR cluster {number} refcount={refcount} reference={references}");
    }
    format!("ERROR {finding}")
}

fn total_clusters(layer: &Layer) -> u64 {
    layer.cluster_size().count_for(layer.virtual_size())
}

fn human(layer: &Layer, report: &CheckReport) -> String {
    let mut text = String::new();
    if report.corruptions == 0 && report.leaks == 0 {
        text.push_str("No errors were found on the image.\n");
    }
    if report.corruptions > 0 {
        let count = report.corruptions;
        text.push_str(&format!(
            "\n{count} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n"
        ));
    }
    if report.leaks > 0 {
        let count = report.leaks;
        text.push_str(&format!(
            "\n{count} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n"
        ));
    }
    text.push_str(&allocation(layer, report));
    text.push_str(&format!("Image end offset: {}\n", report.image_end.0));
    text
}

fn allocation(layer: &Layer, report: &CheckReport) -> String {
    let total = total_clusters(layer);
    let used = report.guest_clusters;
    if total == 0 {
        return String::new();
    }
    let percent = |part: u64, of: u64| 100.0 * part as f64 / of.max(1) as f64;
    format!(
        "{used}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
        percent(used, total),
        percent(report.fragmented_clusters, used),
        percent(report.compressed_clusters, used),
    )
}

fn json(parsed: &Parsed, image: &Reference, layer: &Layer, report: &CheckReport) -> Tree {
    let mut parts = vec![
        ("image-end-offset", report.image_end.0.into()),
        ("total-clusters", total_clusters(layer).into()),
        ("check-errors", 0.into()),
        ("allocated-clusters", report.guest_clusters.into()),
        ("filename", image.given.as_str().into()),
        ("format", "qcow2".into()),
    ];
    for (name, count) in [
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if count > 0 {
            parts.push((name, count.into()));
        }
    }
    let backing = parsed.has(BACKING.id);
    if !report.findings.is_empty() || !report.notes.is_empty() || backing {
        let told = |text: String| Tree::from(text);
        let findings = report
            .findings
            .iter()
            .map(|f| told(f.to_string()))
            .collect();
        let notes = report
            .notes
            .iter()
            .map(|note| told(note.to_string()))
            .collect();
        let mut more = vec![
            ("findings", Tree::List(findings)),
            ("notes", Tree::List(notes)),
            ("marked-dirty", report.marked_dirty.into()),
            ("marked-corrupt", report.marked_corrupt.into()),
        ];
        if backing {
            more.push(("backing-compared", report.backing_compared.into()));
        }
        parts.push(("stead", Tree::Map(more)));
    }
    Tree::Map(parts)
}
