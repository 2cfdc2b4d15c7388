//! `create`: an empty image.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use stead_qcow2::{DiskContent, NewFormat, create};

use crate::command::Command;
use crate::common::{self, FORMAT, OBJECT, QUIET, RECORD_BACKING};
use crate::console::Console;
use crate::create_options::{self, Given};
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::keyval;
use crate::new_image;
use crate::opened::{OpenedChain, Sharing};
use crate::progress;
use crate::reference;
use crate::target;

pub(crate) const COMMAND: Command = Command {
    name: "create",
    about: "Make an empty image",
    usage: "[-f FMT] [-o OPTIONS] [-b BACKING [-F BACKING_FMT]] [-u] [--record-backing] [-q] FILE [SIZE]",
    help: "The file appears when it is whole and on the disk. An image that is in use is not replaced.\n\n\
           \x20 -f, --format FMT           raw (the default) or qcow2\n\
           \x20 -o, --options LIST         options of the format, key=value,…; -o help lists them\n\
           \x20 -b, --backing FILE         the image below; its name is kept as given, and starts in the folder of FILE\n\
           \x20 -F, -B, --backing-format   the format of the image below\n\
           \x20 -u, --backing-unsafe       do not look at the image below\n\
           \x20     --record-backing       read all of the image below and record what it shows, for check --backing\n\
           \x20 -q, --quiet                print nothing\n\n\
           SIZE may be left out where there is an image below.\n\n\
           Example:\n  {program} create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2\n",
    opts: &[
        FORMAT,
        OBJECT,
        Opt::value("options", "o", &["options"]),
        Opt::value("backing", "b", &["backing"]),
        Opt::value("backing-format", "FB", &["backing-format"]),
        Opt::flag("unsafe", "u", &["backing-unsafe"]),
        RECORD_BACKING,
        QUIET,
    ],
    run,
    last_is_operand: false,
};

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let lists = common::lists(parsed, "options")?;
    if lists.iter().any(|list| keyval::asks_for_help(list)) {
        console.print(&options_help(parsed)?)?;
        return Ok(0);
    }
    let (name, size) = operands(parsed, console.program())?;
    let size = size.map(|text| common::size(&text.to_string_lossy(), "image size"));
    let size = size.transpose()?;
    common::objects(parsed)?;
    let shown = name.to_string_lossy().into_owned();
    let cannot = |why: String| failure(&shown, &why);
    let given = options(parsed, &lists, name, size).map_err(cannot)?;
    if !parsed.has("quiet") {
        console.line(&given.formatting(&shown))?;
    }
    let path = reference::plain_path(name).unwrap_or_else(|_empty| PathBuf::new());
    make(&shown, &path, &given, parsed.has(RECORD_BACKING.id))?;
    Ok(0)
}

/// The first line is about the file; what follows stands below.
fn failure(name: &str, why: &str) -> Failure {
    Failure::lines(&format!("{name}: "), why)
}

fn options_help(parsed: &Parsed) -> Outcome<String> {
    let format = common::text(parsed, FORMAT.id).unwrap_or_else(|| "raw".into());
    let known = Format::by_name(&format);
    let known = known.ok_or_else(|| Failure::new(format!("Unknown file format '{format}'")))?;
    Ok(create_options::help(known, !parsed.operands.is_empty()))
}

fn operands<'a>(parsed: &'a Parsed, program: &str) -> Outcome<(&'a OsStr, Option<&'a OsStr>)> {
    match parsed.operands.as_slice() {
        [] => Err(Failure::usage(program, "Expecting image file name")),
        [name] => Ok((name, None)),
        [name, size] => Ok((name, Some(size))),
        [_, _, more, ..] => {
            let more = more.to_string_lossy();
            let text = format!("Unexpected argument: {more}");
            Err(Failure::usage(program, text))
        }
    }
}

/// All options with what `-b`, `-F`, the size and the image below add.
fn options(
    parsed: &Parsed,
    lists: &[String],
    name: &OsStr,
    size: Option<u64>,
) -> Result<Given, String> {
    let format = common::text(parsed, FORMAT.id).unwrap_or_else(|| "raw".into());
    let format =
        Format::by_name(&format).ok_or_else(|| format!("Unknown file format '{format}'"))?;
    let path = match name.is_empty() {
        true => PathBuf::new(),
        false => reference::plain_path(name)?,
    };
    let mut given = Given::parse(format, lists)?;
    add_backing(&mut given, parsed, format)?;
    let backing = given.get("backing_file").map(ToOwned::to_owned);
    if let Some(backing) = &backing {
        if backing.is_empty() {
            return Err("Expected backing file name, got empty string".into());
        }
        if Path::new(backing) == path {
            return Err(
                "Error: Trying to create an image with the same filename as the backing file"
                    .into(),
            );
        }
    }
    if size.is_some() && given.size().is_some() {
        return Err("The image size must be specified only once".into());
    }
    if let Some(size) = size {
        given.set("size", &size.to_string())?;
    }
    let below = match backing.filter(|_| !parsed.has("unsafe")) {
        Some(backing) => Some(size_below(&path, &backing, given.get("backing_fmt"))?),
        None => None,
    };
    if given.get("backing_file").is_some() && given.get("backing_fmt").is_none() {
        return Err("Backing file specified without backing format".into());
    }
    match (given.size(), below) {
        (Some(_), _) => {}
        (None, Some(below)) => given.set("size", &below.to_string())?,
        (None, None) => return Err("Image creation needs a size parameter".into()),
    }
    Ok(given)
}

fn add_backing(given: &mut Given, parsed: &Parsed, format: Format) -> Result<(), String> {
    for (id, option, what) in [
        ("backing", "backing_file", "Backing file"),
        ("backing-format", "backing_fmt", "Backing file format"),
    ] {
        let Some(value) = common::text(parsed, id) else {
            continue;
        };
        if !given.knows(option) {
            return Err(format!("{what} not supported for file format '{format}'"));
        }
        given.set(option, &value)?;
    }
    Ok(())
}

/// The length of the disk below, in bytes.
fn size_below(image: &Path, name: &str, format: Option<&str>) -> Result<u64, String> {
    let below = new_image::below(image, name, format);
    let below = below.map_err(|why| format!("{why}\nCould not open backing image."))?;
    if format.is_none() {
        let detected = below.1;
        return Err(format!(
            "Backing file specified without backing format\nDetected format of {detected}."
        ));
    }
    Ok(below.0.len())
}

/// Records in `format` what the image below shows, and gives that image, locked.
fn record(name: &str, path: &Path, given: &Given, format: &mut NewFormat) -> Outcome<OpenedChain> {
    let cannot = |why: String| failure(name, &why);
    let (NewFormat::Qcow2(options), Some(backing)) = (format, given.get("backing_file")) else {
        let why = "there is no image below whose content could be recorded";
        return Err(failure(name, why));
    };
    let below_format = given.get("backing_fmt");
    let below = new_image::below_shared(path, backing, below_format, Sharing::Locked);
    let below = below.map_err(cannot)?;
    let content = DiskContent::of(&below.chain, &progress::stoppable());
    let content = content.map_err(|error| cannot(new_image::words(&error)).because_of(&error))?;
    options.backing_content = Some(content);
    Ok(below)
}

fn make(name: &str, path: &Path, given: &Given, record_backing: bool) -> Outcome<()> {
    let cannot = |why: String| failure(name, &why);
    let mut format = given.new_format(path).map_err(cannot)?;
    let size = given.size().unwrap_or(0);
    let disk = size.checked_next_multiple_of(512);
    let negative = "Could not resize image: Image size cannot be negative";
    let disk = disk.ok_or_else(|| failure(name, negative))?;
    let place = target::place(path).map_err(cannot)?;
    let control = progress::stoppable();
    // Nobody writes to it until the image that records it is there.
    let _below = match record_backing {
        true => Some(record(name, path, given, &mut format)?),
        false => None,
    };
    let made = create(&place.target, &format, disk, &control);
    made.map(drop)
        .map_err(|error| cannot(new_image::words(&error)).because_of(&error))
}
