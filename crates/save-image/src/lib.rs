//! libvirt's QEMU save images: written, read, verified, converted. No QEMU, no async.
//!
//! A save image is a header of 92 bytes, the domain's XML, a cookie, padding, and QEMU's migration stream,
//! compressed or not. `docs/save-image.md` has every byte.
//!
//! # Invariants
//! - A file says `LibvirtQemudPart` until its payload and everything before it are durable. One write of one
//!   sector makes it complete, and that is made durable before anything is called done.
//! - What is written here carries a *record* in the padding, which libvirt does not look at: lengths and BLAKE3
//!   hashes of every byte of the file. [`SaveImage::verify`] names the ranges that differ.
//! - Decoding is total and never writes. Memory is bounded whatever the file says.
//! - A changed image (other XML, other compression) is a new file that takes the old one's name when it is
//!   verified and durable; before that the old one stands untouched.
//!
//! ```text
//!   Writer::create ──▶ partial ──write…──▶ partial ──finish──▶ payload durable ──▶ record durable ──▶ complete
//!                         └── drop: the file is removed ── kill: a partial file stays, and is refused
//! ```

#![forbid(unsafe_code)]

mod change;
mod codec;
mod control;
mod error;
mod extract;
mod format;
mod head;
mod header;
mod image;
mod output;
mod record;
mod replay;
mod room;
mod tree;
mod verify;
mod writer;

pub use change::{Change, convert, edit_xml};
pub use control::{Control, Progress};
pub use error::{Kind, Result, SaveImageError};
pub use extract::{extract, extract_to};
pub use format::Format;
pub use header::{ByteOrder, HEADER_BYTES, Header, State};
pub use image::{Info, RecordInfo, SaveImage, Status, probe};
pub use record::{DiskContent, RECORD_VERSION};
pub use verify::{Damage, Report, StreamFacts};
pub use writer::{Appears, Finished, NewImage, Writer, write_on};
