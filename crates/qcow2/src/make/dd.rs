//! A part of a disk as a new image, as `qemu-img dd` takes it.
//!
//! As there, `count` counts from the start of the source and not from what is skipped: `bs=1M count=4 skip=1`
//! gives three blocks. dd(1) would give four; scripts written for `qemu-img` rely on three.

use std::ops::Range;

use super::convert::{ConvertOptions, NewFiles, convert};
use super::options::{Target, invalid};
use crate::chain::Chain;
use crate::control::Control;
use crate::error::Result;

/// The block size when nothing is said, in bytes.
pub const DD_BLOCK_BYTES: u64 = 512;

/// Which part of the source is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DdBlocks {
    /// The length of a block in bytes (`bs`); not 0.
    pub block_bytes: u64,
    /// How many blocks from the start of the source are looked at (`count`); `None`: all.
    pub count: Option<u64>,
    /// How many of them are left out at the start (`skip`).
    pub skip: u64,
}

impl Default for DdBlocks {
    fn default() -> Self {
        Self {
            block_bytes: DD_BLOCK_BYTES,
            count: None,
            skip: 0,
        }
    }
}

impl DdBlocks {
    /// The bytes of a source of `length` bytes; `None` where everything is skipped, which `qemu-img dd` warns of
    /// and makes an empty image.
    #[must_use]
    pub fn window(&self, length: u64) -> Option<Range<u64>> {
        let end = match self.count {
            Some(count) => length.min(count.saturating_mul(self.block_bytes)),
            None => length,
        };
        let start = self.skip.checked_mul(self.block_bytes)?;
        (start <= end).then_some(start..end)
    }
}

/// Copies a part of `source` into a new image, whose disk is filled up with zeros to a whole sector.
///
/// # Durability
/// As [`convert`].
///
/// # Errors
/// When a block has no bytes, and as [`convert`].
pub fn dd(
    source: &Chain,
    target: &Target,
    blocks: DdBlocks,
    options: &ConvertOptions<'_>,
    control: &Control<'_>,
) -> Result<NewFiles> {
    if blocks.block_bytes == 0 {
        return invalid(target.path(), "a block has 0 bytes");
    }
    let options = ConvertOptions {
        window: Some(blocks.window(source.len()).unwrap_or(0..0)),
        ..options.clone()
    };
    convert(source, target, &options, control)
}
