//! The RAM of a stream with the capability `mapped-ram`: every page has its place in the file.
//!
//! ```text
//! behind each entry of the list of blocks:
//! be32 1  be64 4096  be64 bitmap's place  be64 pages' place       the block's header, 28 bytes
//! a bit for each page, in words of 8 bytes                        the bitmap: which pages are there
//! nothing, up to the next mebibyte of the file
//! the pages, each at its place; those without a bit read as zeros
//! ```
//! Places are counted from the beginning of the *file*, in which the stream may start later. The list goes on behind the
//! last page's place. No page stands in the parts that follow it, which are empty.

use std::io::Read;

use crate::error::Result;
use crate::input::Input;
use crate::ram::PAGE_BYTES;

/// The version of a block's header that is known.
const VERSION: u32 = 1;
/// What the pages' place is a multiple of, in bytes.
const PAGES_ALIGNMENT: u64 = 1 << 20;
/// The most RAM of all blocks together, in bytes: holes cost nothing in a file, and bitmaps are read.
pub(crate) const MAX_RAM_BYTES: u64 = 16 << 40;
/// Pages of a word of the bitmap.
const WORD_PAGES: u64 = 64;

/// Reads a block's header and bitmap, and steps over its pages; returns how many there are.
///
/// `file_offset` is where the stream starts in its file, `length` that of the block: a multiple of a page, and not
/// more than [`MAX_RAM_BYTES`].
pub(crate) fn read_block<R: Read>(
    input: &mut Input<R>,
    file_offset: u64,
    length: u64,
) -> Result<u64> {
    let at = input.at();
    let version = input.u32()?;
    input.require(version == VERSION, at, || {
        format!("the block's header has version {version}, expected {VERSION}")
    })?;
    let page_bytes = input.u64()?;
    input.require(page_bytes == PAGE_BYTES as u64, at, || {
        format!("the block has pages of {page_bytes} bytes, expected {PAGE_BYTES}")
    })?;
    let (bitmap, pages) = (input.u64()?, input.u64()?);
    let here = file_offset + input.at();
    input.require(bitmap == here, at, || {
        format!("the bitmap's place is byte {bitmap} of the file, expected {here}")
    })?;
    let page_count = length / PAGE_BYTES as u64;
    let bitmap_bytes = page_count.div_ceil(WORD_PAGES) * (WORD_PAGES / 8);
    let expected = (here + bitmap_bytes).next_multiple_of(PAGES_ALIGNMENT);
    input.require(pages == expected, at, || {
        format!("the pages' place is byte {pages} of the file, expected {expected}")
    })?;
    let count = input.ones(bitmap_bytes)?;
    input.require(count <= page_count, at, || {
        format!("the bitmap has {count} pages, and the block {page_count}")
    })?;
    let behind = pages + length - file_offset;
    input.step_over(behind - input.at())?;
    Ok(count)
}
