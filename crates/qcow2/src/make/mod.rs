//! New images: empty ones, copies of chains, and how large they will be.
//!
//! | file | what |
//! |---|---|
//! | `options` | what an image is to be, and whether the format can express it |
//! | `layout` | where everything goes; pure |
//! | `counts`, `first` | refcounts and the first cluster, as bytes |
//! | `output` | the file being written |
//! | `create`, `builder` | empty images; images written by the caller from front to back |
//! | `convert`, `plan`, `copy`, `chunk`, `queue` | copies of a chain, by several threads |
//! | `kept` | internal snapshots and bitmaps of a copy |
//! | `compress` | clusters made smaller |
//! | `dd` | a part of a disk |
//! | `room` | whether it fits |
//! | `verify` | a new image is read back before it appears |
//! | `measure` | how large an image will be |
//!
//! A new file is partial, under a hidden name, until it is whole, verified and synced; then it appears.

mod builder;
mod chunk;
mod compress;
mod convert;
mod copy;
mod counts;
mod create;
mod dd;
#[cfg(test)]
mod fault;
mod first;
mod kept;
mod layout;
mod measure;
mod options;
mod output;
mod plan;
mod queue;
mod room;
mod verify;

pub use builder::{ImageBuilder, ImageOptions, create_overlay, write_image};
pub use convert::{
    ConvertOptions, DEFAULT_SPARSE_BYTES, Durability, NewFiles, Verify, convert, predict,
};
pub use create::create;
pub use dd::{DD_BLOCK_BYTES, DdBlocks, dd};
pub use kept::{DroppedBitmap, Keep, lost_bitmaps};
pub use measure::{Measured, measure, measure_empty, measure_with};
pub use options::{
    Backing, DataFile, MAX_VIRTUAL_BYTES, NewFormat, Preallocation, Qcow2Options, Target, Version,
};
