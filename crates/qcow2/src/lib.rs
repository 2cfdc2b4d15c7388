//! The qcow2 disk image format: reading layers and chains of layers, checking an image, making new
//! ones, and changing those that are there. Synchronous, positioned I/O only; no QEMU is involved.
//!
//! * [`Layer`] is one image; [`Layer::extents`] says what it defines, [`Layer::header`] what it is.
//! * [`Chain`] is layers over a base: the disk as the guest sees it.
//! * [`check`] holds every reference against its refcount, and finds overlaps and leaks.
//! * [`create_overlay`] makes an empty layer, [`write_image`] and [`ImageBuilder`] a full one.
//! * [`edit`] changes an image in one step, which is done whole or not at all; [`ops`] has the changes:
//!   internal snapshots, another length, bitmaps, rebase and flatten, commit, amend, repair.
//!
//! Decoding never writes. Files are untrusted: every offset, length and count is bounded before it is
//! used, and a hostile file costs an error. What qcow2 itself cannot show is a flipped bit in guest
//! data or in a table entry that stays valid: the format has no checksums. For that there are content
//! hashes above this crate.
//!
//! # Source
//! QEMU's `docs/interop/qcow2`.

#![forbid(unsafe_code)]

mod backing_record;
mod bitmap;
mod bitmap_read;
mod cache;
mod chain;
mod check;
mod compare;
mod consistency;
mod content;
mod control;
mod counts;
mod decompress;
mod directory;
pub mod edit;
mod entry;
mod error;
mod failure;
mod file;
mod following;
mod header;
mod info;
mod layer;
mod make;
mod map;
pub mod ops;
mod raw;
mod refcounts;
mod units;
mod watch;

pub use backing_record::{BackingRecord, check_backing};
pub use bitmap::{Bitmap, BitmapCluster, GRANULARITY_BITS, MAX_BITMAP_BITS, MAX_BITMAP_NAME_BYTES};
pub use cache::DEFAULT_CACHE_BYTES;
pub use chain::{Chain, LayerFile, LayerFormat, MAX_LAYERS};
pub use check::{CheckReport, Finding, MAX_FINDINGS, Use, check, check_with};
pub use compare::{Comparison, Difference, compare, compare_with};
pub use consistency::Note;
pub use content::DiskContent;
pub use control::{Control, Progress};
pub use directory::{InternalSnapshot, StoredBitmap};
pub use entry::CompressedCluster;
pub use error::{Error, Result};
pub use failure::{Failure, FailureKind, next_step_after};
pub use following::{Follow, OpenPolicy, data_file_of, probe_format};
pub use header::{
    BackingName, BitmapsExtension, Compression, Encryption, ExternalData, FeatureName, Header,
    UnknownExtension,
};
pub use info::{
    BitmapInfo, EncryptInfo, FormatSpecific, ImageInfo, Qcow2Info, SnapshotInfo, info, info_chain,
    info_layer,
};
pub use layer::{Extent, ExtentKind, Extents, Layer};
pub use make::{
    Backing, ConvertOptions, DD_BLOCK_BYTES, DEFAULT_SPARSE_BYTES, DataFile, DdBlocks,
    DroppedBitmap, Durability, ImageBuilder, ImageOptions, Keep, MAX_VIRTUAL_BYTES, Measured,
    NewFiles, NewFormat, Preallocation, Qcow2Options, Target, Verify, Version, convert, create,
    create_overlay, dd, lost_bitmaps, measure, measure_empty, measure_with, predict, write_image,
};
pub use map::{MapEntries, MapEntry};
pub use units::{ClusterSize, GuestOffset, HostOffset};
pub use watch::{Event, Watch};

/// The example of the README is compiled, so that it stays right.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
