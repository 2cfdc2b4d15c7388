//! Where a stream breaks.

use std::io;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a stream could not be read to its end. Nothing is ever written by this crate, so nothing changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The stream ends too early: it was cut off.
    #[error(
        "migration stream cut off at byte {at}, in {section}: {wanted} more bytes expected; take another copy"
    )]
    CutOff {
        /// Where bytes are missing: the length of what is there.
        at: u64,
        /// The section being read.
        section: String,
        /// How many bytes the next item needs.
        wanted: u64,
    },
    /// Bytes are not what the format demands.
    #[error("migration stream damaged at byte {at}, in {section}: {reason}; take another copy")]
    Damaged {
        /// Where the item in question starts.
        at: u64,
        /// The section being read.
        section: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// The stream is of a kind that this reader does not know.
    #[error(
        "migration stream not supported at byte {at}, in {section}: {feature}; save the state without it"
    )]
    Unsupported {
        /// Where it shows.
        at: u64,
        /// The section being read.
        section: String,
        /// What it is.
        feature: String,
    },
    /// The stream was taken with, or without, `x-ignore-shared`, and the caller says otherwise.
    #[error(
        "migration stream at byte {at} says that x-ignore-shared was {}, but it was expected to be {}; \
         it does not belong to this RAM file", on(*found), on(!*found)
    )]
    IgnoreShared {
        /// Where it says so.
        at: u64,
        /// What it says.
        found: bool,
    },
    /// What is left of the stream without the removed pages is too large to keep in memory.
    #[error(
        "migration stream at byte {at}: more than {limit} bytes remain besides the pages of the block"
    )]
    TooLarge {
        /// Where the limit was reached.
        at: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The stream cannot be read.
    #[error("migration stream cannot be read at byte {at}: {source}")]
    Io {
        /// How far it was read.
        at: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The receiver of the pages failed.
    #[error("page at {offset:#x} of RAM block {block} cannot be written: {source}")]
    Sink {
        /// The RAM block.
        block: String,
        /// The page's offset in it, in bytes.
        offset: u64,
        /// What the receiver said.
        source: io::Error,
    },
}

fn on(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}
