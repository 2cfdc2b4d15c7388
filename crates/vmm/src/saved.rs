//! A state as one migration stream, as other programs keep it, and back.
//!
//! Here the RAM is a file of its own beside the device state. Elsewhere its pages are in the stream, and the block is
//! called otherwise. The guest need not stand still for either way: both work on what was captured.

use std::fs::File;
use std::io::Read;

use stead_migration_stream::{Join, Options};

use crate::error::Result;
use crate::state_stream::{self, RAM_BLOCK, StateFormat};

/// Makes ready to write the stream that a migration without capabilities would have sent; its RAM block is called
/// `name`.
///
/// # Errors
/// [`crate::Error::Stream`] when the device state is damaged.
pub fn whole_stream(device_state: &[u8], format: StateFormat, name: &str) -> Result<Join> {
    let options = Options {
        ignore_shared: format == StateFormat::IgnoreShared,
    };
    Ok(Join::new(device_state, options, RAM_BLOCK, name)?)
}

/// Reads a whole stream to its end: the pages of its RAM block `name` go into `ram`, an empty file that becomes
/// `memory_bytes` long; what is given is to be loaded as [`StateFormat::RamSplit`].
///
/// # Errors
/// [`crate::Error::Stream`] when the stream is damaged or has no such block, and when pages are missing.
pub fn take_apart(
    stream: impl Read,
    name: &str,
    ram: &File,
    memory_bytes: u64,
    state_bytes_max: u64,
) -> Result<Vec<u8>> {
    let state = state_stream::receive_block(stream, name, ram, memory_bytes, state_bytes_max)?;
    let renamed = Join::new(&state, Options::default(), name, RAM_BLOCK)?;
    Ok(renamed.without_pages())
}
