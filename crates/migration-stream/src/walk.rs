//! The walk: every section from the magic to the end of the file.

use std::io::{BufReader, Cursor, Read, Seek};

use crate::configuration::{self, Configuration};
use crate::description::{Description, Fields, VMDESCRIPTION};
use crate::error::{Error, Result};
use crate::input::Input;
use crate::ram::{self, Keep, PAGE_BYTES, Page, Pages, Ram, RamBlock, RamCount};

pub(crate) const MAGIC: u32 = 0x5145_564d;
pub(crate) const VERSION: u32 = 3;

pub(crate) mod mark {
    pub const EOF: u8 = 0x00;
    pub const START: u8 = 0x01;
    pub const PART: u8 = 0x02;
    pub const END: u8 = 0x03;
    pub const FULL: u8 = 0x04;
    pub const CONFIGURATION: u8 = 0x07;
    pub const COMMAND: u8 = 0x08;
    pub const FOOTER: u8 = 0x7e;
}

/// The capability of pages that have their place in the file.
const MAPPED_RAM: &str = "mapped-ram";
/// The most sections in a stream.
const MAX_SECTIONS: usize = 16_384;
/// Commands in the stream that carry no state of their own, with the length of their data in bytes.
const COMMANDS: [(u16, u16); 3] = [
    (0x01, 0), // open the return path
    (0x02, 4), // ping
    (0x0b, 0), // switchover starts
];

/// What the caller knows about the stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether it was taken with the capability `x-ignore-shared`. The stream says so too, and the
    /// two must agree: a stream without RAM needs the RAM file that belongs to it.
    pub ignore_shared: bool,
}

/// A section of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// The name, for instance `ram` or `0000:00:03.0/virtio-blk`.
    pub idstr: String,
    /// Tells devices of one name apart.
    pub instance: u32,
    /// The version of its content.
    pub version: u32,
    /// Bytes of its data, of all its parts.
    pub length: u64,
}

/// What a whole stream holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamReport {
    /// The machine type, for instance `pc-q35-7.2`.
    pub machine_type: String,
    /// The capabilities that the stream demands of the receiver.
    pub capabilities: Vec<String>,
    /// All sections, in order of their first part.
    pub sections: Vec<Section>,
    /// All RAM blocks.
    pub ram_blocks: Vec<RamBlock>,
    /// How many pages are in the stream.
    pub ram_pages: RamCount,
    /// The page size in bytes.
    pub page_size: u64,
    /// The stream's length in bytes.
    pub total_length: u64,
}

/// Walks the whole stream and says what it holds.
///
/// `stream` is read from its first byte to its last, with bounded memory.
///
/// # Errors
/// When it is not whole, not valid, not of a kind that is known, or has something behind its end. The
/// error says at which byte and in which section. See the crate for what a walk cannot find.
pub fn walk<R: Read + Seek>(stream: R, options: Options) -> Result<StreamReport> {
    walk_kind(stream, options.into())
}

/// As [`walk`], for a stream with the capability `mapped-ram`, which starts at byte `file_offset` of its file.
///
/// Proven besides is that each block's header, bitmap and pages lie where they must, and `data_pages` is how many
/// pages the bitmaps name. Pages are stepped over: nothing in the file says what they hold.
///
/// # Errors
/// As [`walk`].
///
/// # Panics
/// When `file_offset` is larger than a file can be.
pub fn walk_mapped<R: Read + Seek>(stream: R, file_offset: u64) -> Result<StreamReport> {
    assert!(file_offset < 1 << 62, "no file is that long");
    let kind = StreamKind {
        ignore_shared: false,
        mapped_at: Some(file_offset),
    };
    walk_kind(stream, kind)
}

/// What a stream is to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamKind {
    ignore_shared: bool,
    /// With `mapped-ram`: where the stream starts in its file.
    mapped_at: Option<u64>,
}

impl From<Options> for StreamKind {
    fn from(options: Options) -> Self {
        Self {
            ignore_shared: options.ignore_shared,
            mapped_at: None,
        }
    }
}

fn walk_kind<R: Read + Seek>(mut stream: R, kind: StreamKind) -> Result<StreamReport> {
    let found = Description::find(&mut stream);
    let mut input = Input::seeking(BufReader::with_capacity(64 << 10, stream));
    let description = match found {
        Ok(description) => description,
        Err(missing) => return Err(earliest_error(&mut input, kind, missing)),
    };
    let mut walker = begin(&mut input, kind)?;
    walker.check_page_size(&input, &description)?;
    let mut fields = Fields::new();
    let mut seen = vec![false; description.devices.len()];
    loop {
        let mark = walker.mark;
        match mark {
            mark::EOF => break,
            mark::FULL => {
                let id = walker.open_section(&mut input)?;
                let index = walker.device(&input, &description, &mut seen, id)?;
                let at = input.at();
                let version = walker.sections[id].section.version;
                fields.device(&mut input, &description.devices[index], version)?;
                walker.close_section(&mut input, id, at)?;
            }
            _ => walker.step(&mut input, &mut Skipped)?,
        }
        walker.next_mark(&mut input)?;
    }
    walker.check_all_there(&input, &description, &seen)?;
    walker.finish(input, &description)
}

/// Without a description, devices cannot be read; what breaks before them is the better answer.
fn earliest_error<R: Read>(input: &mut Input<R>, kind: StreamKind, missing: Error) -> Error {
    let mut to_first_device = || -> Result<()> {
        let mut walker = begin(input, kind)?;
        while walker.mark != mark::FULL && walker.mark != mark::EOF {
            walker.step(input, &mut Skipped)?;
            walker.next_mark(input)?;
        }
        Ok(())
    };
    to_first_device().err().unwrap_or(missing)
}

/// As [`walk`], over bytes in memory.
///
/// # Errors
/// As [`walk`].
pub fn walk_bytes(stream: &[u8], options: Options) -> Result<StreamReport> {
    walk(Cursor::new(stream), options)
}

/// Pages that nobody wants.
pub(crate) struct Skipped;

impl Pages for Skipped {
    fn page(&mut self, _: &RamBlock, _: u64, _: Page<'_>) -> Result<Keep> {
        Ok(Keep::Yes)
    }
}

/// A section, and what it is called in the stream.
#[derive(Debug)]
struct Open {
    id: u32,
    section: Section,
    /// Its last part was read.
    ended: bool,
}

/// What is known of the stream so far.
#[derive(Debug)]
pub(crate) struct Walker {
    configuration: Configuration,
    sections: Vec<Open>,
    pub ram: Ram,
    /// The mark that was read last and not yet acted on.
    pub mark: u8,
}

/// Reads the header and the configuration, up to the first mark behind them.
pub(crate) fn begin<R: Read>(input: &mut Input<R>, kind: impl Into<StreamKind>) -> Result<Walker> {
    let kind = kind.into();
    let magic = input.u32()?;
    input.require(magic == MAGIC, 0, || {
        format!("it starts with {magic:#010x}, not with \"QEVM\"")
    })?;
    let version = input.u32()?;
    input.require(version == VERSION, 4, || {
        format!("version {version}, expected {VERSION}")
    })?;
    let mark = input.u8()?;
    if mark != mark::CONFIGURATION {
        return Err(input.damaged(8, format!("{mark:#x} instead of the configuration")));
    }
    let (configuration, mark) = configuration::read(input)?;
    let at = configuration.at;
    let mapped = configuration.has(MAPPED_RAM);
    input.require(mapped || kind.mapped_at.is_none(), at, || {
        format!("capability {MAPPED_RAM} is not named")
    })?;
    for (feature, known) in [(MAPPED_RAM, kind.mapped_at.is_some()), ("multifd", false)] {
        if configuration.has(feature) && !known {
            return Err(input.unsupported(at, format!("capability {feature}")));
        }
    }
    let found = configuration.has("x-ignore-shared");
    if found != kind.ignore_shared {
        return Err(Error::IgnoreShared { at, found });
    }
    Ok(Walker {
        configuration,
        sections: Vec::new(),
        ram: Ram::new(found, kind.mapped_at),
        mark,
    })
}

impl Walker {
    pub fn next_mark<R: Read>(&mut self, input: &mut Input<R>) -> Result<()> {
        input.enter("the list of sections");
        self.mark = input.u8()?;
        Ok(())
    }

    /// Reads what the mark announces, if it needs no description: RAM, or a command.
    pub fn step<R: Read>(&mut self, input: &mut Input<R>, pages: &mut impl Pages) -> Result<()> {
        match self.mark {
            mark::START => self.ram_start(input),
            mark::PART | mark::END => self.ram_part(input, pages),
            mark::COMMAND => command(input),
            other => Err(input.damaged(input.at() - 1, format!("{other:#x} is no section"))),
        }
    }

    fn ram_start<R: Read>(&mut self, input: &mut Input<R>) -> Result<()> {
        let at = input.at() - 1;
        let id = self.open_section(input)?;
        let Section {
            idstr,
            instance,
            version,
            ..
        } = &self.sections[id].section;
        if idstr != "ram" || *instance != 0 {
            return Err(input.unsupported(at, format!("section {idstr} in several parts")));
        }
        input.require(*version == ram::VERSION, at, || {
            format!("RAM section version {version}, expected {}", ram::VERSION)
        })?;
        let start = input.at();
        self.ram.read_start(input)?;
        self.close_section(input, id, start)
    }

    fn ram_part<R: Read>(&mut self, input: &mut Input<R>, pages: &mut impl Pages) -> Result<()> {
        let at = input.at() - 1;
        let id = input.u32()?;
        let last = self.mark == mark::END;
        let known = |open: &Open| open.id == id && open.section.idstr == "ram" && !open.ended;
        let index = self.sections.iter().position(known);
        let index = index.ok_or_else(|| {
            input.damaged(at, format!("a part of section {id}, which is not open"))
        })?;
        input.enter("section ram");
        let start = input.at();
        self.ram.read_pages(input, pages)?;
        self.sections[index].ended = last;
        self.close_section(input, index, start)
    }

    /// Reads what stands before a section's data, and returns the section's index.
    fn open_section<R: Read>(&mut self, input: &mut Input<R>) -> Result<usize> {
        let at = input.at() - 1;
        let id = input.u32()?;
        let idstr = input.name()?;
        input.enter(format!("section {idstr}"));
        let section = Section {
            idstr,
            instance: input.u32()?,
            version: input.u32()?,
            length: 0,
        };
        self.check_new(input, at, id, &section)?;
        let ended = self.mark == mark::FULL;
        self.sections.push(Open { id, section, ended });
        Ok(self.sections.len() - 1)
    }

    fn check_new<R: Read>(
        &self,
        input: &Input<R>,
        at: u64,
        id: u32,
        section: &Section,
    ) -> Result<()> {
        let twice = self.sections.iter().any(|open| {
            let known = &open.section;
            open.id == id || known.instance == section.instance && known.idstr == section.idstr
        });
        input.require(!twice, at, || format!("section {id} is there twice"))?;
        input.require(self.sections.len() < MAX_SECTIONS, at, || {
            format!("more than {MAX_SECTIONS} sections")
        })
    }

    /// Reads the footer and counts the bytes since `start`.
    fn close_section<R: Read>(
        &mut self,
        input: &mut Input<R>,
        index: usize,
        start: u64,
    ) -> Result<()> {
        let open = &mut self.sections[index];
        let at = input.at();
        open.section.length += at - start;
        let mark = input.u8()?;
        input.require(mark == mark::FOOTER, at, || {
            format!("{mark:#x} instead of the section's footer")
        })?;
        let id = input.u32()?;
        let expected = open.id;
        input.require(id == expected, at, || {
            format!("the footer of section {id} behind section {expected}")
        })
    }

    fn device<R: Read>(
        &self,
        input: &Input<R>,
        description: &Description,
        seen: &mut [bool],
        id: usize,
    ) -> Result<usize> {
        let Section {
            idstr, instance, ..
        } = &self.sections[id].section;
        let index = description.position(idstr, *instance).ok_or_else(|| {
            let reason = format!("{idstr} instance {instance} is not in the description");
            input.damaged(input.at(), reason)
        })?;
        seen[index] = true;
        Ok(index)
    }

    fn check_page_size<R: Read>(&self, input: &Input<R>, description: &Description) -> Result<()> {
        let found = description.page_size;
        if found == PAGE_BYTES as u64 {
            return Ok(());
        }
        let at = description.at;
        Err(input.unsupported(at, format!("pages of {found} bytes, not {PAGE_BYTES}")))
    }

    fn check_all_there<R: Read>(
        &self,
        input: &Input<R>,
        description: &Description,
        seen: &[bool],
    ) -> Result<()> {
        let at = input.at() - 1;
        if let Some(index) = seen.iter().position(|seen| !seen) {
            let name = &description.devices[index].name;
            return Err(input.damaged(at, format!("section {name} is described but not there")));
        }
        self.check_ram_ended(input)
    }

    /// RAM is there, to its last part.
    pub fn check_ram_ended<R: Read>(&self, input: &Input<R>) -> Result<()> {
        let ended = self.ram_ended();
        input.require(ended, input.at() - 1, || {
            "the RAM section does not end".into()
        })
    }

    pub fn ram_ended(&self) -> bool {
        let mut ram = self
            .sections
            .iter()
            .filter(|open| open.section.idstr == "ram");
        ram.next().is_some_and(|open| open.ended)
    }

    /// From the end mark to the end of the file.
    fn finish<R: Read>(self, mut input: Input<R>, said: &Description) -> Result<StreamReport> {
        input.enter("the description of the devices");
        let at = input.at();
        let mark = input.u8()?;
        let length = u64::from(input.u32()?);
        let right = mark == VMDESCRIPTION && at == said.at && length == said.length;
        input.require(right, at, || {
            format!(
                "the end mark is not followed by the description found at byte {}",
                said.at
            )
        })?;
        input.skip(length)?;
        let end = input.at();
        let behind = input.u8_or_end()?;
        input.require(behind.is_none(), end, || {
            "something stands behind the end".into()
        })?;
        Ok(StreamReport {
            machine_type: self.configuration.machine_type,
            capabilities: self.configuration.capabilities,
            sections: self.sections.into_iter().map(|open| open.section).collect(),
            ram_blocks: self.ram.blocks,
            ram_pages: self.ram.count,
            page_size: said.page_size,
            total_length: end,
        })
    }
}

fn command<R: Read>(input: &mut Input<R>) -> Result<()> {
    let at = input.at() - 1;
    input.enter("a command");
    let command = input.u16()?;
    let length = input.u16()?;
    match COMMANDS.iter().find(|(known, _)| *known == command) {
        Some((_, expected)) => {
            input.require(length == *expected, at, || {
                format!("command {command:#x} has {length} bytes, expected {expected}")
            })?;
            input.skip(u64::from(length))
        }
        None => Err(input.unsupported(at, format!("command {command:#x} (postcopy)"))),
    }
}
