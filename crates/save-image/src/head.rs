//! Everything before the payload: where its parts lie, and its bytes.
//!
//! ```text
//! 0            header, 92 bytes
//! 92           XML and a zero; cookie and a zero
//!              room for longer XML, at least 64 KiB of zeros
//! disks_at     the disks' table, 16 KiB
//! leaves_at    hashes of the payload's parts
//! record_at    the record, 4096 bytes
//! length       the payload; a multiple of 4096
//! ```

use crate::header::{HEADER_BYTES, Header};
use crate::record::{DISKS_BYTES, RECORD_BYTES};

/// What parts begin at multiples of, in bytes; direct writes want it.
pub(crate) const BLOCK_BYTES: usize = 4096;
/// What libvirt leaves for edited XML, in bytes; so do we.
const EDIT_ROOM_BYTES: usize = 64 << 10;
/// The most that XML and cookie may have together, in bytes.
pub(crate) const TEXT_BYTES_MAX: usize = 16 << 20;
/// The most that lies before a payload, in bytes, whoever wrote it.
pub(crate) const HEAD_BYTES_MAX: u64 = 128 << 20;
/// The fewest and the most parts of a payload that have hashes of their own.
const LEAVES_MIN: usize = 2048;
const LEAVES_MAX: usize = 131_072;
const HASH_BYTES: usize = 32;

/// Where everything lies, in bytes from the beginning of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub disks_at: usize,
    pub leaves_at: usize,
    /// How many leaves there is room for; even.
    pub leaf_room: usize,
    pub record_at: usize,
    pub length: usize,
}

impl Layout {
    /// The layout for texts of these lengths and a payload of about `payload_bytes`.
    pub fn new(xml: &str, cookie: Option<&str>, payload_bytes: u64) -> Self {
        let text = xml.len() + 1 + cookie.map_or(0, |cookie| cookie.len() + 1);
        assert!(
            text <= TEXT_BYTES_MAX + 2,
            "the caller has looked at the lengths"
        );
        let leaf_room = leaf_room(payload_bytes);
        let disks_at = (HEADER_BYTES + text + EDIT_ROOM_BYTES).next_multiple_of(BLOCK_BYTES);
        let leaves_at = disks_at + DISKS_BYTES;
        let record_at = (leaves_at + leaf_room * HASH_BYTES).next_multiple_of(BLOCK_BYTES);
        Self {
            disks_at,
            leaves_at,
            leaf_room,
            record_at,
            length: record_at + RECORD_BYTES,
        }
    }
}

/// One leaf for each mebibyte and some more, as far as it goes; beyond that, leaves become larger.
fn leaf_room(payload_bytes: u64) -> usize {
    let wanted = usize::try_from(payload_bytes >> 20).unwrap_or(LEAVES_MAX);
    let wanted = wanted.saturating_add(wanted / 8);
    wanted
        .clamp(LEAVES_MIN, LEAVES_MAX)
        .next_multiple_of(BLOCK_BYTES / HASH_BYTES)
}

/// The head with its texts and nothing else in it.
pub(crate) fn bytes(header: &Header, xml: &str, cookie: Option<&str>, layout: &Layout) -> Vec<u8> {
    let mut head = Vec::with_capacity(layout.length);
    head.extend_from_slice(&header.encode());
    head.extend_from_slice(xml.as_bytes());
    head.push(0);
    if let Some(cookie) = cookie {
        head.extend_from_slice(cookie.as_bytes());
        head.push(0);
    }
    assert!(head.len() <= layout.disks_at, "texts run into the record");
    head.resize(layout.length, 0);
    head
}
