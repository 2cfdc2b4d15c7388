//! The RAM section: a list of blocks, then pages.
//!
//! ```text
//! be64 total | 04   for each block: name, be64 length [, be64 address with x-ignore-shared]
//! be64 offset | 02 [| 20]   [name]  00            a page of zeros
//! be64 offset | 08 [| 20]   [name]  4096 bytes    a page
//! be64 10                                         end of this part
//! ```
//! Flag 20 (*continue*) stands instead of the name where the block is that of the record before.

use std::io::Read;

use crate::error::Result;
use crate::input::Input;
use crate::mapped;
use crate::walk::mark;

/// The size of a page, in bytes. Others are refused.
pub const PAGE_BYTES: usize = 4096;
const PAGE: u64 = PAGE_BYTES as u64;
/// The most RAM blocks in a stream.
const MAX_BLOCKS: usize = 4096;
/// The version of the RAM section that is known.
pub(crate) const VERSION: u32 = 4;

mod flag {
    pub const FULL: u64 = 0x01;
    pub const ZERO: u64 = 0x02;
    pub const MEM_SIZE: u64 = 0x04;
    pub const PAGE: u64 = 0x08;
    pub const EOS: u64 = 0x10;
    pub const CONTINUE: u64 = 0x20;
    pub const XBZRLE: u64 = 0x40;
    pub const HOOK: u64 = 0x80;
    pub const COMPRESS_PAGE: u64 = 0x100;
    pub const MULTIFD_FLUSH: u64 = 0x200;
}

/// The content of a page; `None`: zeros.
pub type Page<'a> = Option<&'a [u8; PAGE_BYTES]>;

/// A RAM block, as the stream lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name.
    pub name: String,
    /// Its length in bytes, a multiple of 4096.
    pub length: u64,
    /// The guest address of a shared block; only in streams with `x-ignore-shared`.
    pub address: Option<u64>,
}

/// What the RAM section holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RamCount {
    /// Records of pages with content.
    pub data_pages: u64,
    /// Records of pages of zeros.
    pub zero_pages: u64,
}

/// What is known of RAM so far; kept from part to part.
#[derive(Debug, Default)]
pub(crate) struct Ram {
    pub blocks: Vec<RamBlock>,
    pub count: RamCount,
    /// The block of the record before.
    last: Option<usize>,
    ignore_shared: bool,
    /// Pages lie at places of the file, in which the stream starts at this byte.
    mapped_at: Option<u64>,
}

/// Takes a record; says whether to leave it in what the input keeps.
pub(crate) trait Pages {
    fn page(&mut self, block: &RamBlock, offset: u64, page: Page<'_>) -> Result<Keep>;
}

/// Whether a record stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    Yes,
    No,
}

impl Ram {
    pub fn new(ignore_shared: bool, mapped_at: Option<u64>) -> Self {
        Self {
            ignore_shared,
            mapped_at,
            ..Self::default()
        }
    }

    /// Reads the data of the first part: the list of blocks, up to its end.
    pub fn read_start<R: Read>(&mut self, input: &mut Input<R>) -> Result<()> {
        let at = input.at();
        let word = input.u64()?;
        input.require(word % PAGE == flag::MEM_SIZE, at, || {
            format!("the RAM section starts with {word:#x}, expected the list of blocks")
        })?;
        let mut left = word - flag::MEM_SIZE;
        let bounded = self.mapped_at.is_none() || left <= mapped::MAX_RAM_BYTES;
        input.require(bounded, at, || {
            let most = mapped::MAX_RAM_BYTES;
            format!("{left} bytes of RAM, expected at most {most}")
        })?;
        while left > 0 {
            let at = input.at();
            let block = self.read_block(input)?;
            let rest = left.checked_sub(block.length);
            let rest = rest.filter(|_| block.length > 0 && block.length % PAGE == 0);
            left = rest.ok_or_else(|| {
                let RamBlock { name, length, .. } = &block;
                input.damaged(
                    at,
                    format!("RAM block {name} has {length} bytes of {left} left"),
                )
            })?;
            self.check_new(input, at, &block)?;
            if let Some(file_offset) = self.mapped_at {
                self.count.data_pages += mapped::read_block(input, file_offset, block.length)?;
            }
            self.blocks.push(block);
        }
        self.read_end(input)
    }

    fn check_new<R: Read>(&self, input: &Input<R>, at: u64, block: &RamBlock) -> Result<()> {
        let twice = self.blocks.iter().any(|known| known.name == block.name);
        input.require(!twice, at, || {
            format!("RAM block {} is listed twice", block.name)
        })?;
        input.require(self.blocks.len() < MAX_BLOCKS, at, || {
            format!("more than {MAX_BLOCKS} RAM blocks")
        })
    }

    fn read_block<R: Read>(&self, input: &mut Input<R>) -> Result<RamBlock> {
        Ok(RamBlock {
            name: input.name()?,
            length: input.u64()?,
            address: self.ignore_shared.then(|| input.u64()).transpose()?,
        })
    }

    fn read_end<R: Read>(&self, input: &mut Input<R>) -> Result<()> {
        let at = input.at();
        let word = input.u64()?;
        refuse_unsupported(input, at, word % PAGE)?;
        input.require(word == flag::EOS, at, || {
            format!("the list of RAM blocks is followed by {word:#x}, expected the end of the part")
        })
    }

    /// Reads the pages of a part, up to its end.
    pub fn read_pages<R: Read>(
        &mut self,
        input: &mut Input<R>,
        pages: &mut impl Pages,
    ) -> Result<()> {
        loop {
            let kept = input.kept_length();
            let at = input.at();
            let word = input.u64()?;
            if word == flag::EOS {
                return Ok(());
            }
            let flags = word % PAGE;
            refuse_unsupported(input, at, flags)?;
            input.require(self.mapped_at.is_none(), at, || {
                format!("{word:#x} in a part that has no pages with mapped-ram")
            })?;
            let block = self.block_of_record(input, at, flags)?;
            let offset = word - flags;
            let RamBlock { name, length, .. } = &self.blocks[block];
            input.require(offset < *length, at, || {
                format!("a page at {offset:#x} lies outside RAM block {name} of {length} bytes")
            })?;
            self.last = Some(block);
            if self.read_page(input, at, offset, flags, pages)? == Keep::No {
                input.forget_from(kept);
            }
        }
    }

    fn block_of_record<R: Read>(&self, input: &mut Input<R>, at: u64, flags: u64) -> Result<usize> {
        if flags & flag::CONTINUE != 0 {
            return self.last.ok_or_else(|| {
                input.damaged(
                    at,
                    "a RAM record continues a block, but there is none before",
                )
            });
        }
        let name = input.name()?;
        let found = self.blocks.iter().position(|block| block.name == name);
        found.ok_or_else(|| input.damaged(at, format!("RAM block {name:?} was not listed")))
    }

    fn read_page<R: Read>(
        &mut self,
        input: &mut Input<R>,
        at: u64,
        offset: u64,
        flags: u64,
        pages: &mut impl Pages,
    ) -> Result<Keep> {
        let Some(block) = self.last.map(|index| &self.blocks[index]) else {
            unreachable!("the record's block was just found")
        };
        match flags & !flag::CONTINUE {
            flag::ZERO => {
                self.count.zero_pages += 1;
                let fill = input.u8()?;
                input.require(fill == 0, at, || format!("a page is filled with {fill:#x}"))?;
                pages.page(block, offset, None)
            }
            flag::PAGE => {
                self.count.data_pages += 1;
                let content = input.array::<PAGE_BYTES>()?;
                pages.page(block, offset, Some(&content))
            }
            other => Err(input.damaged(at, format!("a RAM record has flags {other:#x}"))),
        }
    }
}

fn refuse_unsupported<R: Read>(input: &Input<R>, at: u64, flags: u64) -> Result<()> {
    let known: [(u64, &str); 5] = [
        (flag::FULL, "an obsolete RAM record (flag 1)"),
        (flag::XBZRLE, "capability xbzrle"),
        (flag::HOOK, "a transport's own RAM record (RDMA)"),
        (flag::COMPRESS_PAGE, "capability compress"),
        (flag::MULTIFD_FLUSH, "capability multifd"),
    ];
    match known.iter().find(|(bit, _)| flags & bit != 0) {
        None => Ok(()),
        Some((_, feature)) => Err(input.unsupported(at, *feature)),
    }
}

/// Appends the section that lists `blocks`: what [`Ram::read_start`] reads, and what stands around it.
pub(crate) fn record_list(bytes: &mut Vec<u8>, section: u32, blocks: &[RamBlock]) {
    bytes.push(mark::START);
    bytes.extend(section.to_be_bytes());
    name(bytes, "ram");
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(VERSION.to_be_bytes());
    let total: u64 = blocks.iter().map(|block| block.length).sum();
    bytes.extend((total | flag::MEM_SIZE).to_be_bytes());
    for block in blocks {
        name(bytes, &block.name);
        bytes.extend(block.length.to_be_bytes());
    }
    end(bytes, section);
}

/// Appends what stands before the pages of a part.
pub(crate) fn part_header(bytes: &mut Vec<u8>, section: u32) {
    bytes.push(mark::PART);
    bytes.extend(section.to_be_bytes());
}

fn name(bytes: &mut Vec<u8>, text: &str) {
    let length = u8::try_from(text.len());
    assert!(length.is_ok(), "a block's name has one byte of length");
    bytes.extend(length);
    bytes.extend(text.as_bytes());
}

fn end(bytes: &mut Vec<u8>, section: u32) {
    bytes.extend(flag::EOS.to_be_bytes());
    bytes.push(mark::FOOTER);
    bytes.extend(section.to_be_bytes());
}

/// Many bytes at a time: most pages of most guests are zeros, and a search for the first other byte goes one by one.
fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<64>();
    words
        .iter()
        .all(|word| word.iter().fold(0, |or, byte| or | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// Writes the records of one block's pages.
pub(crate) struct Records<'a> {
    block: &'a str,
    named: bool,
}

impl<'a> Records<'a> {
    pub fn new(block: &'a str) -> Self {
        let named = false;
        Self { block, named }
    }

    /// Appends the record of a page: the first one has the block's name, the others continue.
    pub fn put(&mut self, bytes: &mut Vec<u8>, offset: u64, page: &[u8]) {
        if is_zero(page) {
            return self.put_zeros(bytes, offset);
        }
        self.begin(bytes, offset | flag::PAGE);
        bytes.extend_from_slice(page);
    }

    /// Appends the record of a page of zeros.
    pub fn put_zeros(&mut self, bytes: &mut Vec<u8>, offset: u64) {
        self.begin(bytes, offset | flag::ZERO);
        bytes.push(0);
    }

    fn begin(&mut self, bytes: &mut Vec<u8>, word: u64) {
        let follows = if self.named { flag::CONTINUE } else { 0 };
        bytes.extend((word | follows).to_be_bytes());
        if !self.named {
            name(bytes, self.block);
            self.named = true;
        }
    }

    /// Appends what stands behind the last page of a part.
    pub fn end(self, bytes: &mut Vec<u8>, section: u32) {
        end(bytes, section);
    }
}
