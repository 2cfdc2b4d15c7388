//! `measure`: how large a new image will be.

use std::path::Path;

use serde_json::json;
use stead_qcow2::{Chain, Control, ConvertOptions, Error, Measured, NewFiles, NewFormat};
use stead_qcow2::{Target, measure_empty, measure_with, predict};
use stead_sys::durable::Existing;

use crate::command::Command;
use crate::common::{
    self, CACHE_SIZE, FORCE_SHARE, FORMAT, IMAGE_OPTS, LONG_PROGRESS, NO_FOLLOW, OBJECT, OUTPUT,
    Output,
};
use crate::console::Console;
use crate::create_options::Given;
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::json;
use crate::opened::{self, OpenedChain};
use crate::progress::watched;
use crate::snapshot_name;

pub(crate) const COMMAND: Command = Command {
    name: "measure",
    about: "Say how large a new image will be",
    usage: "[-O FMT] [-o OPTIONS] [--exact] [--output=human|json] (--size SIZE | [-f FMT] [-l SNAPSHOT] FILE)",
    help: "Two bounds of the file's length: when a copy of FILE (or an empty disk of SIZE) has been made, and when\n\
           the guest has written everything. Bitmaps need what is told beside them.\n\n\
           \x20 -O, --target-format FMT    the format of the new image: raw (the default) or qcow2\n\
           \x20 -o, --options LIST         its options, as for create\n\
           \x20 -s, --size SIZE            an empty disk of this size\n\
           \x20 -f, --format FMT           the format of FILE; else its first bytes tell\n\
           \x20     --image-opts           FILE is an option string\n\
           \x20 -l, --snapshot NAME        the internal snapshot of that id or name instead of the active state\n\
           \x20     --exact                also the exact length of the copy; reads the whole disk\n\
           \x20     --no-follow            refuse an image that needs other files\n\
           \x20     --cache-size SIZE      memory for tables (64M)\n\
           \x20     --progress             show how far it is (as JSON: on standard error)\n\
           \x20     --output FORMAT        human or json\n\
           \x20 -U, --force-share          also while another process writes the image\n\n\
           Example:\n  {program} measure -O qcow2 disk.raw\n",
    opts: &[
        FORMAT,
        OBJECT,
        IMAGE_OPTS,
        OUTPUT,
        FORCE_SHARE,
        NO_FOLLOW,
        CACHE_SIZE,
        LONG_PROGRESS,
        Opt::value("target-format", "O", &["target-format"]),
        Opt::value("options", "o", &["options", "target-options"]),
        Opt::value("size", "s", &["size"]),
        Opt::value("snapshot", "l", &["snapshot"]),
        Opt::flag("exact", "", &["exact"]),
    ],
    run,
    last_is_operand: false,
};

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let lists = common::lists(parsed, "options")?;
    let output = common::output(parsed)?;
    let size = common::text(parsed, "size").map(|text| common::size(&text, "image size"));
    let size = size.transpose()?;
    common::objects(parsed)?;
    let source = source(parsed, size)?;
    let new = new_format(parsed, &lists)?;
    let (measured, exact) = match (&source, size) {
        (Some(source), _) => (
            watched(parsed, |control| measure_with(&source.chain, &new, control))
                .map_err(|error| failure(&error))?,
            match parsed.has("exact") {
                true => Some(watched(parsed, |control| {
                    exactly(&source.chain, new, control)
                })?),
                false => None,
            },
        ),
        (None, size) => {
            let size = size.unwrap_or(0);
            (
                measure_empty(size, &new).map_err(|error| failure(&error))?,
                None,
            )
        }
    };
    match output {
        Output::Human => console.print(&human(&measured, exact))?,
        Output::Json => console.line(&as_json(&measured, exact)?)?,
    }
    Ok(0)
}

/// The disk to be copied, or nothing where only a size is given.
fn source(parsed: &Parsed, size: Option<u64>) -> Outcome<Option<OpenedChain>> {
    let name = match (parsed.operands.as_slice(), size) {
        ([_, _, ..], _) => {
            return Err(Failure::new("At most one filename argument is allowed."));
        }
        ([_], Some(_)) => {
            let text = "--size N cannot be used together with a filename.";
            return Err(Failure::new(text));
        }
        ([], None) => {
            let text = "Either --size N or one filename must be specified.";
            return Err(Failure::new(text));
        }
        ([], Some(_)) => return Ok(None),
        ([name], None) => name,
    };
    let (_, mut opened) = opened::disk(parsed, name, FORMAT.id)?;
    if let Some(wanted) = common::text(parsed, "snapshot") {
        opened.chain = snapshot_name::view(&opened.chain, &wanted)?;
    }
    Ok(Some(opened))
}

fn new_format(parsed: &Parsed, lists: &[String]) -> Outcome<NewFormat> {
    let name = common::text(parsed, "target-format").unwrap_or_else(|| "raw".into());
    let format = Format::by_name(&name);
    let format = format.ok_or_else(|| Failure::new(format!("Unknown file format '{name}'")))?;
    let given = Given::parse(format, lists).map_err(|why| {
        let (first, more) = why.split_once('\n').unwrap_or((&why, ""));
        let mut more = more.to_owned();
        if !more.is_empty() {
            more.push('\n');
        }
        more.push_str(&format!("Invalid options for file format '{format}'"));
        Failure::new(first).with_more(more)
    })?;
    let new = given.new_format(Path::new("measured"));
    new.map_err(|why| Failure::new(why.replace("version=v3", "compat=1.1")))
}

fn failure(error: &Error) -> Failure {
    if let Error::InvalidImage { reason, .. } = error
        && (reason.contains("64 TiB") || reason.contains("L1 table"))
    {
        let text = "The image size is too large (try using a larger cluster size)";
        return Failure::new(text).with_more(reason.clone());
    }
    Failure::new(error.to_string()).because_of(error)
}

/// The files that a copy makes, without making them.
fn exactly(source: &Chain, format: NewFormat, control: &Control<'_>) -> Outcome<NewFiles> {
    let options = ConvertOptions {
        format,
        ..ConvertOptions::default()
    };
    let target = Target::New {
        path: "measured".into(),
        mode: 0o600,
        existing: Existing::Replace,
    };
    Ok(predict(source, &target, &options, control)?)
}

fn human(measured: &Measured, exact: Option<NewFiles>) -> String {
    let mut text = format!(
        "required size: {}\nfully allocated size: {}\n",
        measured.required, measured.fully_allocated
    );
    if let Some(bytes) = measured.bitmaps {
        text.push_str(&format!("bitmaps size: {bytes}\n"));
    }
    if let Some(exact) = exact {
        text.push_str(&format!("exact size: {}\n", exact.file_bytes));
    }
    text
}

fn as_json(measured: &Measured, exact: Option<NewFiles>) -> Outcome<String> {
    let mut value = json!({
        "required": measured.required,
        "fully-allocated": measured.fully_allocated,
    });
    if let Some(bytes) = measured.bitmaps {
        value["bitmaps"] = bytes.into();
    }
    if let Some(exact) = exact {
        value["stead"] = json!({
            "exact": exact.file_bytes,
            "exact-allocated": exact.allocated_bytes,
        });
    }
    json::pretty(&value)
}
