//! `convert`: a disk becomes a new image.

use std::ffi::{OsStr, OsString};
use std::num::NonZero;
use std::path::{Path, PathBuf};

use serde_json::json;
use stead_qcow2::{
    Chain, ConvertOptions, Durability, Keep, NewFiles, NewFormat, Preallocation, Verify,
};
use stead_qcow2::{convert, lost_bitmaps, predict};

use crate::command::Command;
use crate::common::{
    self, CACHE_SIZE, FORCE_SHARE, IMAGE_OPTS, NO_FOLLOW, OBJECT, PROGRESS, QUIET,
};
use crate::console::Console;
use crate::create_options::{self, Given};
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::json;
use crate::keyval;
use crate::new_image;
use crate::opened::{self, ReadLock};
use crate::overwrite;
use crate::progress::watched;
use crate::reference;
use crate::size;
use crate::snapshot_name;
use crate::target::{self, Place};

pub(crate) const COMMAND: Command = Command {
    name: "convert",
    about: "Copy a disk into a new image",
    usage: "[-f FMT] [-O FMT] [-o OPTIONS] [-B BACKING -F FMT] [-c] [-n] [-l SNAPSHOT] [-p] [-q] [options] FILE... NEW",
    help: "The new file appears when it is whole and proven; before, and after an error, what was there stays. Several FILEs\n\
           become one disk, one behind the other.\n\n\
           \x20 -f, --source-format FMT    the format of FILE; else its first bytes tell\n\
           \x20 -O, --target-format FMT    the format of NEW: raw (the default) or qcow2\n\
           \x20 -o, --target-options LIST  its options, key=value,…; -o help lists them\n\
           \x20 -B, -b, --backing FILE     the image below NEW; only what differs from it is stored\n\
           \x20 -F, --backing-format FMT   its format\n\
           \x20 -c, --compress             compress clusters\n\
           \x20 -l, --snapshot NAME        copy the internal snapshot of that id or name\n\
           \x20     --bitmaps              keep its bitmaps, joined with those of the images below\n\
           \x20     --skip-broken-bitmaps  leave out those that say nothing, instead of ending\n\
           \x20     --snapshots            keep its internal snapshots\n\
           \x20 -n, --no-create            NEW is there: a device is written in place, an image keeps its options\n\
           \x20 -S, --sparse-size SIZE     zeros of this size are left out (4k); 0: nothing is left out\n\
           \x20 -m, --parallel N           work with N threads\n\
           \x20 -p, --progress             show how far it is\n\
           \x20 -q, --quiet                print nothing\n\
           \x20 -t CACHE                   unsafe: do not wait for the disk; else everything is on it at the end\n\
           \x20     --verify content       read everything back and compare it (else tables and refcounts)\n\
           \x20     --dry-run              only say how large NEW would be\n\
           \x20     --json                 say as JSON what was made\n\
           \x20     --image-opts           FILE is an option string\n\
           \x20     --no-follow            refuse an image that needs other files\n\
           \x20     --cache-size SIZE      memory for tables (64M)\n\
           \x20 -U, --force-share          also while another process writes FILE\n\
           \x20 -W, -C, -r, -T, --target-is-zero  accepted for scripts\n\n\
           Example:\n  {program} convert -p -O qcow2 -c -o compression_type=zstd disk.raw disk.qcow2\n",
    opts: &[
        Opt::value("format", "f", &["source-format", "format"]),
        Opt::value("target-format", "O", &["target-format"]),
        Opt::value("options", "o", &["target-options", "options"]),
        Opt::value("backing", "Bb", &["backing"]),
        Opt::value("backing-format", "F", &["backing-format"]),
        Opt::flag("compress", "c", &["compress"]),
        Opt::value("snapshot", "l", &["snapshot"]),
        Opt::flag("no-create", "n", &["no-create"]),
        Opt::value("sparse-size", "S", &["sparse-size"]),
        Opt::value("parallel", "m", &["parallel"]),
        Opt::value("target-cache", "t", &["target-cache"]),
        Opt::value("source-cache", "T", &["source-cache"]),
        Opt::value("rate-limit", "r", &["rate-limit"]),
        Opt::flag("out-of-order", "W", &["oob"]),
        Opt::flag("offload", "C", &["copy-range-offloading"]),
        Opt::flag("target-is-zero", "", &["target-is-zero"]),
        Opt::flag("target-image-opts", "", &["target-image-opts"]),
        Opt::flag("bitmaps", "", &["bitmaps"]),
        Opt::flag("skip-broken-bitmaps", "", &["skip-broken-bitmaps"]),
        Opt::flag("snapshots", "", &["snapshots"]),
        Opt::flag("salvage", "", &["salvage"]),
        Opt::value("verify", "", &["verify"]),
        Opt::flag("dry-run", "", &["dry-run"]),
        Opt::flag("json", "", &["json"]),
        PROGRESS,
        QUIET,
        OBJECT,
        IMAGE_OPTS,
        NO_FOLLOW,
        CACHE_SIZE,
        FORCE_SHARE,
    ],
    run,
    last_is_operand: false,
};

/// The largest piece of zeros that can be asked for, in bytes.
const MAX_SPARSE_BYTES: u64 = 16 << 20;
/// The most threads that can be asked for.
const MAX_THREADS: usize = 16;

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let lists = common::lists(parsed, "options")?;
    let how = How::read(parsed)?;
    check_combinations(parsed, &lists)?;
    common::objects(parsed)?;
    refuse_two_ways(parsed)?;
    common::cache_mode(parsed, "target-cache", "cache")?;
    common::cache_mode(parsed, "source-cache", "source cache")?;
    let helps = lists.iter().any(|list| keyval::asks_for_help(list));
    if helps {
        console.print(&options_help(parsed)?)?;
        return Ok(0);
    }
    let (source_names, target_name) = operands(parsed)?;
    let source = Source::open(parsed, source_names)?;
    let job = Job::plan(parsed, &lists, &source, target_name)?;
    warn_of_bitmaps(parsed, &source.disk, console)?;
    job.run(parsed, &source, &how, console)
}

/// What is copied, and where to.
fn operands(parsed: &Parsed) -> Outcome<(&[OsString], &OsString)> {
    match parsed.operands.as_slice() {
        [sources @ .., target] if !sources.is_empty() => Ok((sources, target)),
        [..] => Err(Failure::new("Must specify image file name")),
    }
}

fn options_help(parsed: &Parsed) -> Outcome<String> {
    let format = target_format(parsed)?;
    Ok(create_options::help(format, !parsed.operands.is_empty()))
}

fn target_format(parsed: &Parsed) -> Outcome<Format> {
    let name = common::text(parsed, "target-format").unwrap_or_else(|| "raw".into());
    let format = Format::by_name(&name);
    format.ok_or_else(|| Failure::new(format!("Unknown file format '{name}'")))
}

/// How the copying is done.
struct How {
    sparse_bytes: u64,
    threads: Option<NonZero<usize>>,
    verify: Verify,
    durability: Durability,
}

impl How {
    fn read(parsed: &Parsed) -> Outcome<Self> {
        if let Some(limit) = common::text(parsed, "rate-limit") {
            common::size(&limit, "rate limit")?;
        }
        Ok(Self {
            sparse_bytes: sparse_bytes(parsed)?,
            threads: threads(parsed)?,
            verify: match common::text(parsed, "verify").as_deref() {
                None | Some("structure") => Verify::Structure,
                Some("content") => Verify::Content,
                Some(_) => {
                    return Err(Failure::new("--verify must be structure or content"));
                }
            },
            durability: match common::text(parsed, "target-cache").as_deref() {
                Some("unsafe") => Durability::Cached,
                Some(_) | None => Durability::Synced,
            },
        })
    }
}

fn sparse_bytes(parsed: &Parsed) -> Outcome<u64> {
    const WHAT: &str = "buffer size for sparse output";
    let Some(text) = common::text(parsed, "sparse-size") else {
        return Ok(stead_qcow2::DEFAULT_SPARSE_BYTES);
    };
    let bytes = size::parse(&text).map_err(|_not_a_size| common::size_syntax(WHAT))?;
    if bytes.is_multiple_of(512) && bytes <= MAX_SPARSE_BYTES {
        return Ok(bytes);
    }
    Err(Failure::new(format!(
        "Invalid {WHAT} specified. Valid sizes are multiples of 512 up to {MAX_SPARSE_BYTES}. \
         Select 0 to disable sparse detection (fully allocates output)."
    )))
}

fn threads(parsed: &Parsed) -> Outcome<Option<NonZero<usize>>> {
    let Some(text) = common::text(parsed, "parallel") else {
        return Ok(None);
    };
    let number = text.parse().ok().filter(|number| *number <= MAX_THREADS);
    let number = number.and_then(NonZero::new);
    number.map(Some).ok_or_else(|| {
        Failure::new(format!(
            "Invalid number of coroutines. Allowed number of coroutines is between 1 and {MAX_THREADS}"
        ))
    })
}

/// Options that exclude each other, and those that are refused.
fn check_combinations(parsed: &Parsed, lists: &[String]) -> Outcome<()> {
    let has = |id| parsed.has(id);
    let refusals = [
        (
            has("skip-broken-bitmaps") && !has("bitmaps"),
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
        (
            has("target-image-opts") && !has("no-create"),
            "--target-image-opts requires use of -n flag",
        ),
        (
            has("target-is-zero") && !has("no-create"),
            "--target-is-zero requires use of -n flag",
        ),
        (
            has("no-create") && !lists.is_empty(),
            "-o has no effect when skipping image creation",
        ),
        (
            has("salvage") && has("offload"),
            "Cannot use copy offloading in salvaging mode",
        ),
        (
            has("offload") && has("sparse-size"),
            "Cannot enable copy offloading when -S is used",
        ),
        (
            has("offload") && has("compress"),
            "Cannot enable copy offloading when -c is used",
        ),
        (
            has("snapshots") && has("snapshot"),
            "--snapshots cannot be used together with -l",
        ),
        (
            has("salvage"),
            "--salvage is not supported: a copy with parts missing is no success",
        ),
    ];
    match refusals.into_iter().find(|(refused, _)| *refused) {
        Some((_, why)) => Err(Failure::new(why)),
        None => Ok(()),
    }
}

fn refuse_two_ways(parsed: &Parsed) -> Outcome<()> {
    let source = parsed.has(IMAGE_OPTS.id) && parsed.has("format");
    let target = parsed.has("target-image-opts") && parsed.has("target-format");
    match source || target {
        true => Err(Failure::new(
            "--image-opts and --format are mutually exclusive",
        )),
        false => Ok(()),
    }
}

/// What is copied.
struct Source {
    disk: Chain,
    /// The format of the first image.
    format: Format,
    #[expect(dead_code, reason = "they are held, not used")]
    locks: Vec<ReadLock>,
}

impl Source {
    fn open(parsed: &Parsed, names: &[OsString]) -> Outcome<Self> {
        let mut disks = Vec::new();
        let mut formats = Vec::new();
        let mut locks = Vec::new();
        for name in names {
            let (_, opened) = opened::disk(parsed, name, "format")?;
            disks.push(opened.chain);
            formats.push(opened.format);
            locks.extend(opened.locks);
        }
        if names.len() > 1 {
            require_whole_disks(parsed)?;
        }
        let mut disk = Chain::join(disks)?;
        if let Some(wanted) = common::text(parsed, "snapshot") {
            disk = snapshot_name::view(&disk, &wanted)?;
        }
        Ok(Self {
            disk,
            format: formats[0],
            locks,
        })
    }
}

/// What belongs to one image cannot be taken from several in a row.
fn require_whole_disks(parsed: &Parsed) -> Outcome<()> {
    let refusals = [
        ("snapshot", "No support for concatenating multiple snapshot"),
        (
            "snapshots",
            "--snapshots is only possible with single source",
        ),
        (
            "bitmaps",
            "Copying bitmaps only possible with single source",
        ),
    ];
    match refusals.into_iter().find(|(id, _)| parsed.has(id)) {
        Some((_, why)) => Err(Failure::new(why)),
        None => Ok(()),
    }
}

/// What is to be made, and where.
struct Job {
    /// What the user calls the new image.
    name: String,
    kind: Format,
    format: NewFormat,
    disk: Option<u64>,
    below: Option<Chain>,
    place: Place,
}

impl Job {
    fn plan(parsed: &Parsed, lists: &[String], source: &Source, name: &OsStr) -> Outcome<Self> {
        let kind = target_format(parsed)?;
        let path = target_path(parsed, name)?;
        if parsed.has("bitmaps") {
            require_bitmaps(kind, source.format)?;
        }
        if parsed.has("no-create") {
            return Self::over(parsed, kind, &path, source, name);
        }
        let given = given(parsed, lists, kind)?;
        let over = given.get("backing_file");
        if over.is_some_and(|name| !name.is_empty()) && source.disk.is_joined() {
            return Err(Failure::new(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            ));
        }
        if parsed.has("compress") {
            check_compression(kind, &given)?;
        }
        let shown = name.to_string_lossy().into_owned();
        let cannot = |why: String| not_converted(&shown, kind, &why);
        let format = given.new_format(&path).map_err(cannot)?;
        let place = target::place(&path).map_err(cannot)?;
        let below = below(&given, &path, &shown)?;
        Ok(Self {
            // As in qemu-img, a size among the options has no effect here.
            disk: None,
            name: shown,
            kind,
            format,
            below,
            place,
        })
    }

    /// What is there is written over.
    fn over(
        parsed: &Parsed,
        kind: Format,
        path: &Path,
        source: &Source,
        name: &OsStr,
    ) -> Outcome<Self> {
        let shown = name.to_string_lossy().into_owned();
        let there = overwrite::existing(path, kind, source.disk.len());
        let there = there.map_err(|why| overwrite::failure(&shown, why))?;
        if parsed.has("compress") && kind == Format::Raw {
            return Err(Failure::new(NO_COMPRESSION));
        }
        Ok(Self {
            name: shown,
            kind,
            format: there.format,
            disk: there.disk,
            below: there.below,
            place: there.place,
        })
    }

    fn run(
        &self,
        parsed: &Parsed,
        source: &Source,
        how: &How,
        console: &mut Console,
    ) -> Outcome<u8> {
        let options = ConvertOptions {
            format: self.format.clone(),
            disk: self.disk,
            window: None,
            keep: Keep {
                snapshots: parsed.has("snapshots"),
                bitmaps: parsed.has("bitmaps"),
            },
            below: self.below.as_ref(),
            sparse_bytes: how.sparse_bytes,
            compressed: parsed.has("compress"),
            threads: how.threads,
            verify: how.verify,
            durability: how.durability,
        };
        let dry_run = parsed.has("dry-run");
        let chain = &source.disk;
        let done = watched(parsed, |control| match dry_run {
            true => predict(chain, &self.place.target, &options, control),
            false => convert(chain, &self.place.target, &options, control),
        });
        let made = done.map_err(|error| {
            let words = new_image::words(&error);
            not_converted(&self.name, self.kind, &words).because_of(&error)
        })?;
        if parsed.has("json") {
            console.line(&json::pretty(&self.report(&made, how, dry_run))?)?;
        } else if dry_run {
            console.line(&format!(
                "{} would have {} bytes",
                self.name, made.file_bytes
            ))?;
        }
        Ok(0)
    }

    fn report(&self, made: &NewFiles, how: &How, dry_run: bool) -> serde_json::Value {
        let verified = match how.verify {
            Verify::Structure => "structure",
            Verify::Content => "content",
        };
        let lossy = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
        let dropped: Vec<_> = made
            .dropped_bitmaps
            .iter()
            .map(|lost| json!({ "name": lossy(&lost.name), "reason": lost.reason }))
            .collect();
        json!({
            "filename": self.name,
            "format": self.kind.name(),
            "outcome": if dry_run { "not-begun" } else { "done" },
            "verified": if dry_run { None } else { Some(verified) },
            "file-bytes": made.file_bytes,
            "allocated-bytes": made.allocated_bytes,
            "data-file-bytes": made.data_file_bytes,
            "snapshots": made.kept_snapshots,
            "bitmaps": made.kept_bitmaps.iter().map(|name| lossy(name)).collect::<Vec<_>>(),
            "dropped-bitmaps": dropped,
        })
    }
}

const NO_COMPRESSION: &str = "Compression not supported for this file format";

fn not_converted(name: &str, kind: Format, why: &str) -> Failure {
    Failure::lines(&format!("{name}: error while converting {kind}: "), why)
}

/// Bitmaps can be kept from such a source in such a target.
fn require_bitmaps(kind: Format, source: Format) -> Outcome<()> {
    match (kind, source) {
        (Format::Raw, _) => Err(Failure::new("Format driver 'raw' does not support bitmaps")),
        (Format::Qcow2, Format::Raw) => Err(Failure::new("Source lacks bitmap support")),
        (Format::Qcow2, Format::Qcow2) => Ok(()),
    }
}

/// A bitmap of the top image that cannot be kept is an error, or with `--skip-broken-bitmaps` a warning.
fn warn_of_bitmaps(parsed: &Parsed, source: &Chain, console: &mut Console) -> Outcome<()> {
    let Some(top) = source.layer(0).filter(|_| parsed.has("bitmaps")) else {
        return Ok(());
    };
    let stored = top.stored_bitmaps()?;
    for lost in lost_bitmaps(source)? {
        let Some(bitmap) = stored.iter().find(|bitmap| bitmap.name == lost.name) else {
            continue;
        };
        let name = String::from_utf8_lossy(&lost.name);
        let kind = if bitmap.in_use {
            "inconsistent bitmap"
        } else {
            "bitmap"
        };
        if !parsed.has("skip-broken-bitmaps") {
            let program = console.program();
            return Err(Failure::new(format!("Cannot copy {kind} '{name}'")).with_more(format!(
                "Try --skip-broken-bitmaps, or use '{program} bitmap --remove' to delete it\n{}",
                lost.reason
            )));
        }
        let program = console.program().to_owned();
        let reason = lost.reason;
        console.error_line(&format!(
            "{program}: warning: Skipping {kind} '{name}'\n{reason}"
        ))?;
    }
    Ok(())
}

fn target_path(parsed: &Parsed, name: &OsStr) -> Outcome<PathBuf> {
    if parsed.has("target-image-opts") {
        let found = reference::from_options(name).map_err(Failure::new)?;
        return match found.window {
            None => Ok(found.path),
            Some(_) => Err(Failure::new("a part of a file cannot be written")),
        };
    }
    reference::plain_path(name).map_err(Failure::new)
}

/// The options of the new image with what `-B` and `-F` add.
fn given(parsed: &Parsed, lists: &[String], kind: Format) -> Outcome<Given> {
    let lines = |why: String| Failure::lines("", &why);
    let mut given = Given::parse(kind, lists).map_err(lines)?;
    for (id, option) in [
        ("backing", "backing_file"),
        ("backing-format", "backing_fmt"),
    ] {
        let Some(value) = common::text(parsed, id) else {
            continue;
        };
        if !given.knows(option) {
            let text = format!("Backing file not supported for file format '{kind}'");
            return Err(Failure::new(text));
        }
        given.set(option, &value).map_err(lines)?;
    }
    let named = given
        .get("backing_file")
        .is_some_and(|name| !name.is_empty());
    if named && given.get("backing_fmt").is_none() {
        let text = "Use of backing file requires explicit backing format";
        return Err(Failure::new(text));
    }
    Ok(given)
}

fn check_compression(kind: Format, given: &Given) -> Outcome<()> {
    let reserves = given
        .get("preallocation")
        .and_then(create_options::preallocation)
        .is_some_and(|mode| mode != Preallocation::Off);
    match (kind, reserves) {
        (Format::Raw, _) => Err(Failure::new(NO_COMPRESSION)),
        (Format::Qcow2, true) => Err(Failure::new(
            "Compression and preallocation not supported at the same time",
        )),
        (Format::Qcow2, false) => Ok(()),
    }
}

/// The disk below the new image.
fn below(given: &Given, path: &Path, shown: &str) -> Outcome<Option<Chain>> {
    let Some(name) = given.get("backing_file").filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    let opened = new_image::below(path, name, given.get("backing_fmt"));
    let (chain, _) = opened.map_err(|why| {
        let what = format!("Could not open '{shown}': Could not open backing file: ");
        Failure::lines(&what, &why)
    })?;
    Ok(Some(chain))
}
