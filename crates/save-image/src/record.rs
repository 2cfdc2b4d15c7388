//! The record: lengths and hashes of everything in the file, in the padding before the payload.
//!
//! ```text
//!    0  16  "STEADFAST-RECORD"
//!   16   4  version: 1
//!   20   4  bytes of a leaf, as a power of two
//!   24   8  where the record itself stands
//!   32   8  where the payload starts
//!   40   8  bytes of the payload
//!   48   8  bytes of the payload when decompressed
//!   56   4  bytes of the XML      60  4  bytes of the cookie
//!   64  32  BLAKE3 of the XML
//!   96  32  BLAKE3 of the payload
//!  128  32  BLAKE3 of the payload when decompressed
//!  160   8  where the leaves' hashes start    168  4  how many they are
//!  172   4  how many disks there are
//!  176   8  where the disks' table starts     184  4  its bytes
//!  188      zeros
//! 4048  32  BLAKE3 of everything before the payload, with "LibvirtQemudSave" at 0 and zeros in this place
//! 4080  16  "RECORD-STEADFAST"
//! ```
//! Numbers are little-endian. An entry of the disks' table: le16 length of the name, the name, le64 bytes of the
//! content, 32 bytes of its name.
//!
//! Either mark says that there is a record, so that no flipped bit makes an image look like one without.

use std::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::head::BLOCK_BYTES;
use crate::header::COMPLETE;
use crate::tree::{Hash, LEAF_LOG2_MAX, LEAF_LOG2_MIN};

/// Bytes of the record.
pub(crate) const RECORD_BYTES: usize = 4096;
/// The version that is written, and the newest one that is read.
pub const RECORD_VERSION: u32 = 1;
/// Room for the disks' table, in bytes.
pub(crate) const DISKS_BYTES: usize = 16 << 10;
const FIRST_MARK: &[u8; 16] = b"STEADFAST-RECORD";
const LAST_MARK: &[u8; 16] = b"RECORD-STEADFAST";
const HASH_BYTES: usize = 32;

#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Block {
    first_mark: [u8; 16],
    version: U32,
    leaf_log2: U32,
    record_at: U64,
    payload_at: U64,
    payload_bytes: U64,
    stream_bytes: U64,
    xml_bytes: U32,
    cookie_bytes: U32,
    xml_hash: Hash,
    payload_hash: Hash,
    stream_hash: Hash,
    leaves_at: U64,
    leaf_count: U32,
    disk_count: U32,
    disks_at: U64,
    disks_bytes: U32,
    zeros: [u8; 3860],
    head_hash: Hash,
    last_mark: [u8; 16],
}

const _: () = {
    assert!(size_of::<Block>() == RECORD_BYTES);
    assert!(offset_of!(Block, xml_hash) == 64);
    assert!(offset_of!(Block, leaves_at) == 160);
    assert!(offset_of!(Block, zeros) == 188);
    assert!(offset_of!(Block, head_hash) == 4048);
    assert!(offset_of!(Block, last_mark) == 4080);
    assert!(RECORD_BYTES.is_multiple_of(BLOCK_BYTES));
};

/// What a disk held when the VM was saved, by reference: the disk itself is not in the image.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct DiskContent {
    /// The disk's name, for instance `vda`; at most 255 bytes.
    pub name: String,
    /// Bytes of its guest-visible content.
    pub bytes: u64,
    /// The name of that content: the root of its tree of 64 KiB chunks, as the store cuts and names it
    /// (`docs/store-format.md`). In hexadecimal where it is shown.
    #[serde(serialize_with = "as_hex")]
    pub hash: [u8; 32],
}

fn as_hex<S: serde::Serializer>(hash: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex(hash))
}

pub(crate) fn hex(hash: &Hash) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

/// A record's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub leaf_log2: u32,
    pub record_at: u64,
    pub payload_at: u64,
    pub payload_bytes: u64,
    pub stream_bytes: u64,
    pub xml_bytes: u32,
    pub cookie_bytes: u32,
    pub xml_hash: Hash,
    pub payload_hash: Hash,
    pub stream_hash: Hash,
    pub leaves_at: u64,
    pub leaves: Vec<Hash>,
    pub disks_at: u64,
    pub disks: Vec<DiskContent>,
}

/// Why a record cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unusable {
    /// A version that is not known.
    Version(u32),
    /// What contradicts what.
    Wrong(String),
}

fn wrong<T>(text: impl Into<String>) -> Result<T, Unusable> {
    Err(Unusable::Wrong(text.into()))
}

/// Whether one of the marks of a record stands in these bytes.
pub(crate) fn is_marked(block: &[u8]) -> bool {
    block.starts_with(FIRST_MARK) || block.ends_with(LAST_MARK)
}

/// The table of disks, or `None` where it does not fit.
pub(crate) fn encode_disks(disks: &[DiskContent]) -> Option<Vec<u8>> {
    let mut table = Vec::new();
    for disk in disks {
        let length = u8::try_from(disk.name.len()).ok()?;
        table.extend(u16::from(length).to_le_bytes());
        table.extend(disk.name.as_bytes());
        table.extend(disk.bytes.to_le_bytes());
        table.extend(disk.hash);
    }
    (table.len() <= DISKS_BYTES).then_some(table)
}

fn decode_disks(mut table: &[u8], count: u32) -> Option<Vec<DiskContent>> {
    let mut disks = Vec::new();
    for _ in 0..count {
        let (length, rest) = table.split_first_chunk()?;
        let (name, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
        let (bytes, rest) = rest.split_first_chunk()?;
        let (hash, rest) = rest.split_first_chunk()?;
        disks.push(DiskContent {
            name: std::str::from_utf8(name).ok()?.to_owned(),
            bytes: u64::from_le_bytes(*bytes),
            hash: *hash,
        });
        table = rest;
    }
    table.is_empty().then_some(disks)
}

impl Record {
    /// Puts the record with its tables into `head`, whose texts and header are final.
    ///
    /// # Panics
    /// When something does not fit that the layout has room for.
    pub fn put_into(&self, head: &mut [u8]) {
        let Some(disks) = encode_disks(&self.disks) else {
            unreachable!("the writer refuses disks that do not fit")
        };
        let leaves_at = place(self.leaves_at);
        let leaves = self.leaves.as_flattened();
        let disks_at = place(self.disks_at);
        let record_at = place(self.record_at);
        assert!(
            leaves_at + leaves.len() <= record_at,
            "leaves run into the record"
        );
        head[leaves_at..leaves_at + leaves.len()].copy_from_slice(leaves);
        head[disks_at..disks_at + disks.len()].copy_from_slice(&disks);
        let mut block = self.block(count(disks.len()));
        head[record_at..record_at + RECORD_BYTES].copy_from_slice(block.as_bytes());
        block.head_hash = head_hash(head, record_at);
        head[record_at..record_at + RECORD_BYTES].copy_from_slice(block.as_bytes());
    }

    fn block(&self, disks_bytes: u32) -> Block {
        Block {
            first_mark: *FIRST_MARK,
            version: RECORD_VERSION.into(),
            leaf_log2: self.leaf_log2.into(),
            record_at: self.record_at.into(),
            payload_at: self.payload_at.into(),
            payload_bytes: self.payload_bytes.into(),
            stream_bytes: self.stream_bytes.into(),
            xml_bytes: self.xml_bytes.into(),
            cookie_bytes: self.cookie_bytes.into(),
            xml_hash: self.xml_hash,
            payload_hash: self.payload_hash,
            stream_hash: self.stream_hash,
            leaves_at: self.leaves_at.into(),
            leaf_count: count(self.leaves.len()).into(),
            disk_count: count(self.disks.len()).into(),
            disks_at: self.disks_at.into(),
            disks_bytes: disks_bytes.into(),
            zeros: [0; 3860],
            head_hash: [0; HASH_BYTES],
            last_mark: *LAST_MARK,
        }
    }

    /// Reads the record that ends `head`; `None` where there is none.
    ///
    /// # Errors
    /// When a mark is there and the record cannot be believed.
    pub fn read_from(head: &[u8]) -> Result<Option<Self>, Unusable> {
        let Some(record_at) = head.len().checked_sub(RECORD_BYTES) else {
            return Ok(None);
        };
        let bytes = &head[record_at..];
        if !head.len().is_multiple_of(BLOCK_BYTES) || !is_marked(bytes) {
            return Ok(None);
        }
        let Ok(block) = Block::read_from_bytes(bytes) else {
            return wrong("it is cut off");
        };
        if block.version.get() != RECORD_VERSION && block.first_mark == *FIRST_MARK {
            return Err(Unusable::Version(block.version.get()));
        }
        if block.head_hash != head_hash(head, record_at) {
            return wrong(
                "the header, the XML, the cookie, the padding or the record itself was changed",
            );
        }
        let record = Self::decode(&block, head)?;
        record.check(head)?;
        Ok(Some(record))
    }

    /// The record's content; that its tables lie in the head is checked here.
    fn decode(block: &Block, head: &[u8]) -> Result<Self, Unusable> {
        let leaf_bytes = u64::from(block.leaf_count.get()) * HASH_BYTES as u64;
        let Some(leaves) = part(head, block.leaves_at.get(), leaf_bytes) else {
            return wrong("its hashes lie outside");
        };
        let disks = part(head, block.disks_at.get(), block.disks_bytes.get().into())
            .and_then(|table| decode_disks(table, block.disk_count.get()));
        let Some(disks) = disks else {
            return wrong("its table of disks makes no sense");
        };
        Ok(Self {
            leaf_log2: block.leaf_log2.get(),
            record_at: block.record_at.get(),
            payload_at: block.payload_at.get(),
            payload_bytes: block.payload_bytes.get(),
            stream_bytes: block.stream_bytes.get(),
            xml_bytes: block.xml_bytes.get(),
            cookie_bytes: block.cookie_bytes.get(),
            xml_hash: block.xml_hash,
            payload_hash: block.payload_hash,
            stream_hash: block.stream_hash,
            leaves_at: block.leaves_at.get(),
            leaves: leaves.as_chunks::<HASH_BYTES>().0.to_vec(),
            disks_at: block.disks_at.get(),
            disks,
        })
    }

    /// What was written on purpose can still contradict itself: its hash is no signature.
    fn check(&self, head: &[u8]) -> Result<(), Unusable> {
        if self.payload_at != head.len() as u64
            || self.record_at + RECORD_BYTES as u64 != self.payload_at
        {
            return wrong("it stands at another place than it says");
        }
        if !(LEAF_LOG2_MIN..=LEAF_LOG2_MAX).contains(&self.leaf_log2) {
            return wrong(format!("parts of 2^{} bytes", self.leaf_log2));
        }
        if self.payload_bytes.div_ceil(1 << self.leaf_log2) != self.leaves.len() as u64 {
            return wrong("it has another number of hashes than the payload has parts");
        }
        Ok(())
    }
}

/// Places in a head are small.
fn place(at: u64) -> usize {
    usize::try_from(at).expect("a place in memory")
}

/// So are numbers of things in it.
fn count(number: usize) -> u32 {
    u32::try_from(number).expect("a number of things in a head")
}

fn part(bytes: &[u8], at: u64, length: u64) -> Option<&[u8]> {
    let start = usize::try_from(at).ok()?;
    let end = usize::try_from(at.checked_add(length)?).ok()?;
    bytes.get(start..end)
}

/// The hash of the head as it is when the image is complete, the place of the hash itself left out.
fn head_hash(head: &[u8], record_at: usize) -> Hash {
    let hash_at = record_at + offset_of!(Block, head_hash);
    let mut hasher = blake3::Hasher::new();
    hasher.update(COMPLETE);
    hasher.update(&head[COMPLETE.len()..hash_at]);
    hasher.update(&[0; HASH_BYTES]);
    hasher.update(&head[hash_at + HASH_BYTES..]);
    *hasher.finalize().as_bytes()
}
