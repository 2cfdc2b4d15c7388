//! `dd`: a part of a disk becomes a new image.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use stead_qcow2::{ConvertOptions, DD_BLOCK_BYTES, DdBlocks, NewFormat, Preallocation};
use stead_qcow2::{Qcow2Options, convert};

use crate::command::Command;
use crate::common::{self, CACHE_SIZE, FORCE_SHARE, FORMAT, IMAGE_OPTS, NO_FOLLOW, OBJECT};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::new_image;
use crate::opened;
use crate::progress::watched;
use crate::reference;
use crate::size::{self, MAX_SIZE};
use crate::target;

pub(crate) const COMMAND: Command = Command {
    name: "dd",
    about: "Copy a part of a disk into a new image",
    usage: "[-f FMT] [-O FMT] [--image-opts] [-U] [--no-follow] [bs=SIZE] [count=N] [skip=N] if=FILE of=NEW",
    help: "The new file appears when it is whole and proven.\n\n\
           \x20 if=FILE, of=NEW            from and to\n\
           \x20 bs=SIZE                    the size of a block (512)\n\
           \x20 count=N                    only the first N blocks of FILE\n\
           \x20 skip=N                     without the first N; these count too, so N blocks fewer are copied\n\
           \x20 -f, --format FMT           the format of FILE; else its first bytes tell\n\
           \x20 -O, --output-format FMT    the format of NEW: raw (the default) or qcow2\n\
           \x20     --image-opts           FILE is an option string\n\
           \x20     --no-follow            refuse an image that needs other files\n\
           \x20     --cache-size SIZE      memory for tables (64M)\n\
           \x20 -U, --force-share          also while another process writes the image\n\n\
           Example:\n  {program} dd -O raw bs=1M count=1 if=disk.qcow2 of=first-mebibyte.raw\n",
    opts: &[
        FORMAT,
        Opt::value("target-format", "O", &["output-format", "target-format"]),
        OBJECT,
        IMAGE_OPTS,
        NO_FOLLOW,
        CACHE_SIZE,
        FORCE_SHARE,
    ],
    run,
    last_is_operand: false,
};

/// The largest block, in bytes.
const MAX_BLOCK_BYTES: u64 = i32::MAX as u64;

/// What the operands say.
#[derive(Debug)]
struct Operands {
    from: Option<OsString>,
    to: Option<OsString>,
    blocks: DdBlocks,
}

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let operands = operands(parsed)?;
    let (Some(from), Some(to)) = (&operands.from, &operands.to) else {
        return Err(Failure::new("Must specify both input and output files"));
    };
    let (image, opened) = opened::disk(parsed, from, FORMAT.id)?;
    let taken = operands.blocks.window(opened.chain.len());
    if taken.is_none() {
        let program = console.program().to_owned();
        let name = &image.given;
        console.error_line(&format!(
            "{program}: {name}: cannot skip to specified offset"
        ))?;
    }
    let taken = taken.unwrap_or(0..0);
    let options = ConvertOptions {
        format: new_format(parsed)?,
        window: Some(taken),
        ..ConvertOptions::default()
    };
    let path = reference::plain_path(to).map_err(Failure::new)?;
    let cannot = |why: String| not_made(to, &why);
    let place = target::place(&path).map_err(cannot)?;
    let made = watched(parsed, |control| {
        convert(&opened.chain, &place.target, &options, control)
    });
    made.map_err(|error| cannot(new_image::words(&error)).because_of(&error))?;
    Ok(0)
}

fn not_made(name: &OsStr, why: &str) -> Failure {
    let name = name.to_string_lossy();
    Failure::lines(&format!("{name}: error while creating output image: "), why)
}

fn new_format(parsed: &Parsed) -> Outcome<NewFormat> {
    let name = common::text(parsed, "target-format").unwrap_or_else(|| "raw".into());
    match Format::by_name(&name) {
        Some(Format::Raw) => Ok(NewFormat::Raw {
            preallocation: Preallocation::Off,
        }),
        Some(Format::Qcow2) => Ok(NewFormat::Qcow2(Qcow2Options::default())),
        None => Err(Failure::new("Unknown file format")),
    }
}

fn operands(parsed: &Parsed) -> Outcome<Operands> {
    let mut operands = Operands {
        from: None,
        to: None,
        blocks: DdBlocks {
            block_bytes: DD_BLOCK_BYTES,
            ..DdBlocks::default()
        },
    };
    for operand in &parsed.operands {
        let bytes = operand.as_bytes();
        let end = bytes.iter().position(|byte| *byte == b'=');
        let (key, value) = match end {
            Some(end) => (&bytes[..end], &bytes[end + 1..]),
            None => (bytes, &[][..]),
        };
        let text = String::from_utf8_lossy(value);
        match (key, end.is_some()) {
            (b"if", true) => operands.from = Some(OsString::from_vec(value.to_vec())),
            (b"of", true) => operands.to = Some(OsString::from_vec(value.to_vec())),
            (b"bs", true) => operands.blocks.block_bytes = number(&text, "bs", 1, MAX_BLOCK_BYTES)?,
            (b"count", true) => {
                operands.blocks.count = Some(number(&text, "count", 0, MAX_SIZE)?);
            }
            (b"skip", true) => operands.blocks.skip = number(&text, "skip", 0, MAX_SIZE)?,
            _ => {
                let key = String::from_utf8_lossy(key);
                return Err(Failure::new(format!("unrecognized operand {key}")));
            }
        }
    }
    Ok(operands)
}

fn number(text: &str, what: &str, least: u64, most: u64) -> Outcome<u64> {
    match size::parse(text) {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        Ok(_) | Err(size::BadSize::Range) => Err(Failure::new(format!(
            "Invalid {what} specified. Must be between {least} and {most}."
        ))),
        Err(size::BadSize::Syntax) => Err(common::size_syntax(what)),
    }
}
