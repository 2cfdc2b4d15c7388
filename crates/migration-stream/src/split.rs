//! Taking the pages of one RAM block out of a stream.

use std::io::{self, BufReader, Read};

use crate::error::{Error, Result};
use crate::input::Input;
use crate::ram::{Keep, PAGE_BYTES, Page, Pages, RamBlock, RamCount};
use crate::walk::{Options, StreamReport, begin, mark, walk_bytes};

/// The most bytes that may be left of a stream without the pages taken out.
pub const MAX_DEVICE_STATE_BYTES: u64 = 512 << 20;

/// What [`split_ram`] gives.
#[derive(Debug, Clone)]
pub struct Split {
    /// The stream without the pages: a valid stream, to be loaded over RAM that is already filled.
    pub device_state: Vec<u8>,
    /// What is in it. The block is still listed, with its length.
    pub report: StreamReport,
    /// The block whose pages were taken out.
    pub block: RamBlock,
    /// How many records were taken out.
    pub taken: RamCount,
}

/// Reads a stream that was taken *without* `x-ignore-shared`, gives every page of the RAM block
/// `block_name` to `sink`, and returns the rest as a stream.
///
/// `sink` gets the page's offset in the block and its content, `None` for zeros. A page may come more
/// than once; the last one counts. Pages that never come are zeros only if the RAM was fresh: QEMU sends
/// every page of a block at least once.
///
/// Stop the VM before it is migrated. QEMU 7.2 under TCG loses pages that a running guest changes during a
/// migration (8 of 40 runs on a busy host came back with an old page, without anything of ours in between;
/// stopped: none of 40).
///
/// The rest is byte for byte what it was. No record that stays can refer to one that was taken out: a
/// record continues the block of the record before it, so behind another block's records it has a name.
/// The rest is walked before it is returned, so an `Ok` means that the input was a whole stream. Memory is
/// bounded by [`MAX_DEVICE_STATE_BYTES`], not by the size of the block.
///
/// # Errors
/// As [`crate::walk`]; [`Error::TooLarge`]; [`Error::Sink`] when `sink` fails. `sink` may have been given
/// pages before: what it wrote is of no use then.
pub fn split_ram<R: Read>(
    stream: R,
    block_name: &str,
    sink: impl FnMut(u64, Page<'_>) -> io::Result<()>,
) -> Result<Split> {
    let options = Options::default();
    let reader = BufReader::with_capacity(256 << 10, stream);
    let mut input = Input::keeping(reader, MAX_DEVICE_STATE_BYTES);
    let mut walker = begin(&mut input, options)?;
    let mut taker = Taker {
        name: block_name,
        sink,
        taken: RamCount::default(),
    };
    while !walker.ram_ended() {
        if walker.mark == mark::FULL {
            let at = input.at() - 1;
            return Err(input.unsupported(at, "a device section before the end of RAM"));
        }
        walker.step(&mut input, &mut taker)?;
        if !walker.ram.blocks.is_empty() {
            find_block(&input, &walker.ram.blocks, block_name)?;
        }
        if !walker.ram_ended() {
            walker.next_mark(&mut input)?;
        }
    }
    let block = find_block(&input, &walker.ram.blocks, block_name)?;
    input.enter("the sections behind RAM");
    input.rest()?;
    let taken = taker.taken;
    let device_state = input.into_kept();
    let report = walk_bytes(&device_state, options)?;
    Ok(Split {
        device_state,
        report,
        block,
        taken,
    })
}

fn find_block<R: Read>(input: &Input<R>, blocks: &[RamBlock], name: &str) -> Result<RamBlock> {
    let found = blocks.iter().find(|block| block.name == name);
    found.cloned().ok_or_else(|| {
        let names: Vec<&str> = blocks.iter().map(|block| block.name.as_str()).collect();
        input.damaged(input.at(), format!("no RAM block {name:?} among {names:?}"))
    })
}

/// Gives the pages of one block away.
struct Taker<'a, S> {
    name: &'a str,
    sink: S,
    taken: RamCount,
}

impl<S: FnMut(u64, Page<'_>) -> io::Result<()>> Pages for Taker<'_, S> {
    fn page(&mut self, block: &RamBlock, offset: u64, page: Page<'_>) -> Result<Keep> {
        if block.name != self.name {
            return Ok(Keep::Yes);
        }
        assert!(
            offset + PAGE_BYTES as u64 <= block.length,
            "the record was held against its block"
        );
        match page {
            None => self.taken.zero_pages += 1,
            Some(_) => self.taken.data_pages += 1,
        }
        (self.sink)(offset, page).map_err(|source| Error::Sink {
            block: block.name.clone(),
            offset,
            source,
        })?;
        Ok(Keep::No)
    }
}
