//! `map`: where each byte of a disk lies.

use stead_qcow2::MapEntry;

use crate::command::Command;
use crate::common::{
    self, CACHE_SIZE, FORCE_SHARE, FORMAT, IMAGE_OPTS, LONG_PROGRESS, NO_FOLLOW, OBJECT, OUTPUT,
    Output,
};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::getopt::{Opt, Parsed};
use crate::opened;
use crate::progress::watched;
use crate::reference::Reference;

pub(crate) const COMMAND: Command = Command {
    name: "map",
    about: "Say where each byte of a disk lies",
    usage: "[-f FMT | --image-opts] [-s OFFSET] [-l LENGTH] [-U] [--no-follow] [--output=human|json] FILE",
    help: "For people, ranges with data and the file that holds them; as JSON, all ranges.\n\n\
           \x20 -f, --format FMT           raw or qcow2; else the file's first bytes tell\n\
           \x20     --image-opts           FILE is an option string\n\
           \x20 -s, --start-offset OFFSET  where to start\n\
           \x20 -l, --max-length LENGTH    how much to tell\n\
           \x20     --output FORMAT        human or json\n\
           \x20     --no-follow            refuse an image that needs other files\n\
           \x20     --cache-size SIZE      memory for tables (64M)\n\
           \x20     --progress             show how far it is (as JSON: on standard error)\n\
           \x20 -U, --force-share          also while another process writes the image\n\n\
           Example:\n  {program} map --output=json disk.qcow2\n",
    opts: &[
        FORMAT,
        OBJECT,
        IMAGE_OPTS,
        OUTPUT,
        FORCE_SHARE,
        NO_FOLLOW,
        CACHE_SIZE,
        LONG_PROGRESS,
        Opt::value("start", "s", &["start-offset"]),
        Opt::value("length", "l", &["max-length"]),
    ],
    run,
    last_is_operand: false,
};

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let output = common::output(parsed)?;
    let size = |id, what| common::text(parsed, id).map(|text| common::size(&text, what));
    let start = size("start", "start offset").transpose()?.unwrap_or(0);
    let length = size("length", "max length").transpose()?;
    let name = common::one_operand(parsed, console.program())?;
    let (image, opened) = opened::disk(parsed, name, FORMAT.id)?;
    let end = length.and_then(|length| start.checked_add(length));
    let end = end.unwrap_or(u64::MAX).min(opened.chain.len());
    watched(parsed, |control| {
        let entries = opened.chain.map(start).watched(control);
        let entries = entries.map_while(|entry| match entry {
            Ok(entry) => clipped(entry, end).map(Ok),
            Err(error) => Some(Err(error)),
        });
        match output {
            Output::Human => human(&image, entries, console),
            Output::Json => json(start, entries, console),
        }
    })?;
    Ok(0)
}

/// The entry up to `end`, or nothing if it starts there or behind.
fn clipped(mut entry: MapEntry<'_>, end: u64) -> Option<MapEntry<'_>> {
    if entry.start >= end {
        return None;
    }
    entry.length = entry.length.min(end - entry.start);
    Some(entry)
}

/// The entries of a map.
type Entry<'a> = Result<MapEntry<'a>, stead_qcow2::Error>;

fn human<'a>(
    image: &Reference,
    entries: impl Iterator<Item = Entry<'a>>,
    console: &mut Console,
) -> Outcome<()> {
    console.line("Offset          Length          Mapped to       File")?;
    for entry in entries {
        let entry = entry?;
        if !entry.data || entry.zero {
            continue;
        }
        let (Some(offset), Some(file)) = (entry.offset, entry.file) else {
            return Err(Failure::new(
                "File contains external, encrypted or compressed clusters.",
            ));
        };
        let [start, length, offset] = [entry.start, entry.length, offset].map(hexadecimal);
        let file = match &image.part_name {
            Some(name) if file == image.path => name.clone(),
            Some(_) | None => file.display().to_string(),
        };
        console.line(&format!("{start:<16}{length:<16}{offset:<16}{file}"))?;
    }
    Ok(())
}

fn hexadecimal(number: u64) -> String {
    match number {
        0 => "0".into(),
        number => format!("{number:#x}"),
    }
}

fn json<'a>(
    start: u64,
    entries: impl Iterator<Item = Entry<'a>>,
    console: &mut Console,
) -> Outcome<()> {
    console.print("[")?;
    let mut some = false;
    for entry in entries {
        console.print(if some { ",\n" } else { "" })?;
        console.print(&json_line(&entry?))?;
        some = true;
    }
    if !some {
        let nothing = format!(
            "{{ \"start\": {start}, \"length\": 0, \"depth\": 0, \"present\": false, \
             \"zero\": false, \"data\": false, \"compressed\": false}}"
        );
        console.print(&nothing)?;
    }
    console.line("]")
}

/// On one line, which scripts that read lines rely on.
fn json_line(entry: &MapEntry<'_>) -> String {
    let offset = match entry.offset {
        Some(offset) => format!(", \"offset\": {offset}"),
        None => String::new(),
    };
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
         \"data\": {}, \"compressed\": {}{offset}}}",
        entry.start,
        entry.length,
        entry.depth,
        entry.present,
        entry.zero,
        entry.data,
        entry.compressed,
    )
}
