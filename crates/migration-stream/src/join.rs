//! Putting the pages of one RAM block into a stream: the way back from [`crate::split_ram`].

use std::io::{self, Cursor, Write};
use std::ops::Range;

use crate::configuration::SUBSECTION;
use crate::error::Result;
use crate::input::Input;
use crate::ram::{PAGE_BYTES, RamBlock, Records, part_header, record_list};
use crate::walk::{Options, Skipped, StreamReport, begin, mark, walk_bytes};

/// The subsection that demands capabilities of the receiver.
const CAPABILITIES: &[u8] = b"configuration/capabilities";
/// How much RAM is looked at and written at a time.
const STEP_BYTES: usize = 1 << 20;

/// A stream without the pages of a RAM block, taken apart so that they can be put in.
///
/// What comes out demands no capability of the receiver, whatever the stream demanded: it is what a migration
/// without any would have sent. Everything but the block's name, its pages and that demand is byte for byte what
/// it was.
#[derive(Debug, Clone)]
pub struct Join {
    /// Up to and with the list of blocks.
    head: Vec<u8>,
    /// Everything behind the list of blocks.
    tail: Vec<u8>,
    section: u32,
    block: RamBlock,
    report: StreamReport,
}

impl Join {
    /// Takes `device_state` apart. Its RAM block `from` will be called `to`.
    ///
    /// # Errors
    /// As [`crate::walk`], and when there is no block `from`, or one `to` already.
    pub fn new(device_state: &[u8], options: Options, from: &str, to: &str) -> Result<Self> {
        let report = walk_bytes(device_state, options)?;
        let mut input = Input::new(Cursor::new(device_state));
        let mut walker = begin(&mut input, options)?;
        let first = place(&input) - 1;
        while walker.mark != mark::START {
            walker.step(&mut input, &mut Skipped)?;
            walker.next_mark(&mut input)?;
        }
        let start = place(&input) - 1;
        walker.step(&mut input, &mut Skipped)?;
        let end = place(&input);
        let mut blocks = walker.ram.blocks;
        let taken = from != to && blocks.iter().any(|block| block.name == to);
        input.require(!taken, start as u64, || {
            format!("there is a RAM block {to:?} already")
        })?;
        let Some(block) = blocks.iter_mut().find(|block| block.name == from) else {
            return Err(input.damaged(start as u64, format!("no RAM block {from:?}")));
        };
        to.clone_into(&mut block.name);
        let block = block.clone();
        let section = section_id(device_state, start);
        let mut head = without_capabilities(device_state, first)?;
        head.extend_from_slice(&device_state[first..start]);
        record_list(&mut head, section, &blocks);
        Ok(Self {
            head,
            tail: device_state[end..].to_vec(),
            section,
            block,
            report,
        })
    }

    /// The block whose pages are missing, by its new name.
    #[must_use]
    pub fn block(&self) -> &RamBlock {
        &self.block
    }

    /// What is in the stream as it was given.
    #[must_use]
    pub fn report(&self) -> &StreamReport {
        &self.report
    }

    /// The stream without pages of the block: to be loaded over RAM that is already filled.
    #[must_use]
    pub fn without_pages(&self) -> Vec<u8> {
        [self.head.as_slice(), self.tail.as_slice()].concat()
    }

    /// Writes the stream with every page of the block. `data` says where there may be anything but zeros, ascending and
    /// apart from each other; `read` fills its buffer with the block's content from an offset, and is asked for what
    /// lies there once, in order.
    ///
    /// # Errors
    /// When `read` or `out` fails. What was written is of no use then.
    pub fn write(
        &self,
        out: &mut impl Write,
        data: &[Range<u64>],
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        out.write_all(&self.head)?;
        let mut records = Records::new(&self.block.name);
        let mut content = vec![0; STEP_BYTES];
        let mut part = Vec::with_capacity(STEP_BYTES + STEP_BYTES / 32);
        part_header(&mut part, self.section);
        let mut data = data.iter().peekable();
        let mut at = 0;
        while at < self.block.length {
            let length = (self.block.length - at).min(STEP_BYTES as u64);
            let length = usize::try_from(length).map_err(io::Error::other)?;
            let offsets = (at..at + length as u64).step_by(PAGE_BYTES);
            while data.next_if(|range| range.end <= at).is_some() {}
            if data
                .peek()
                .is_none_or(|range| range.start >= at + length as u64)
            {
                offsets.for_each(|offset| records.put_zeros(&mut part, offset));
            } else {
                read(at, &mut content[..length])?;
                for (page, offset) in content.chunks_exact(PAGE_BYTES).zip(offsets) {
                    records.put(&mut part, offset, page);
                }
            }
            out.write_all(&part)?;
            part.clear();
            at += length as u64;
        }
        records.end(&mut part, self.section);
        out.write_all(&part)?;
        out.write_all(&self.tail)
    }
}

/// Where the input stands. The whole stream is in memory, so its places fit.
fn place<R: io::Read>(input: &Input<R>) -> usize {
    usize::try_from(input.at()).unwrap_or(usize::MAX)
}

/// The number of the section whose mark is at `start`; it was walked before.
fn section_id(stream: &[u8], start: usize) -> u32 {
    let mut id = [0; 4];
    id.copy_from_slice(&stream[start + 1..start + 5]);
    u32::from_be_bytes(id)
}

/// The stream's first `end` bytes, header and configuration, without the demand for capabilities.
fn without_capabilities(stream: &[u8], end: usize) -> Result<Vec<u8>> {
    let mut input = Input::new(Cursor::new(&stream[..end]));
    input.skip(9)?;
    let length = input.u32()?;
    input.skip(u64::from(length))?;
    let mut kept = stream[..place(&input)].to_vec();
    while place(&input) < end {
        let start = place(&input);
        let subsection = input.u8()?;
        assert!(subsection == SUBSECTION, "the configuration was walked");
        let name = input.name()?;
        input.skip(4)?;
        match name.as_bytes() {
            CAPABILITIES => {
                for _ in 0..input.u32()? {
                    input.name()?;
                }
                continue;
            }
            b"configuration/uuid" => input.skip(16)?,
            _ => input.skip(4)?,
        }
        kept.extend_from_slice(&stream[start..place(&input)]);
    }
    Ok(kept)
}
