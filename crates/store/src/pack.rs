//! Packs: the objects that hold chunks and nodes.
//!
//! A pack is a header, frames, a footer and a trailer. A frame is a run of chunks (about 1 MiB)
//! compressed together, so that small chunks still compress as well as a long stream. The footer
//! lists the frames and the chunks in them; positions are not stored but follow from the lengths,
//! so there is one way to write a pack and no offset that could point elsewhere.
//!
//! | part | bytes | content |
//! |---|---|---|
//! | header | 64 | [`PackHeader`] |
//! | frames | `frames_bytes` | each frame's stored bytes, one after the other |
//! | frame table | 48 each | [`FrameEntry`] |
//! | chunk table | 36 each | [`ChunkEntry`], in the order of the frames |
//! | trailer | 48 | [`PackTrailer`] |
//!
//! The name of a pack is the BLAKE3 of all of it. The header holds the id of the publish that wrote
//! it, so two publishes never write a pack of one name: what one of them stores cannot be deleted
//! because the other's was condemned (see [`crate::gc`]).

use std::ops::Range;

use bytes::Bytes;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::hash::Hash;

/// The first bytes of a pack.
pub const PACK_MAGIC: [u8; 8] = *b"STEADPAK";
/// The last bytes of a pack.
pub const PACK_END: [u8; 8] = *b"STEADEND";
/// The format version of packs.
pub const PACK_VERSION: u32 = 1;
/// A pack is closed when its frames have reached this size, in bytes.
pub const PACK_TARGET_BYTES: u64 = 32 << 20;
/// The largest pack that is read, in bytes.
pub const PACK_BYTES_MAX: u64 = 128 << 20;
/// A frame is closed when its chunks have reached this size, in bytes.
pub const FRAME_TARGET_BYTES: usize = 1 << 20;
/// The largest uncompressed frame, in bytes: one byte less than the target and one more chunk.
pub const FRAME_BYTES_MAX: u32 = 2 << 20;
/// The largest chunk, in bytes.
pub const CHUNK_BYTES_MAX: u32 = 1 << 20;
/// How hard frames are compressed.
const ZSTD_LEVEL: i32 = 3;

/// The first 64 bytes of a pack.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PackHeader {
    /// [`PACK_MAGIC`].
    pub magic: [u8; 8],
    /// [`PACK_VERSION`].
    pub version: U32,
    /// 1 for chunks, 2 for nodes.
    pub kind: U32,
    /// Random id of the publish that wrote it.
    pub publish: [u8; 16],
    /// How many frames there are.
    pub frame_count: U32,
    /// How many chunks there are.
    pub chunk_count: U32,
    /// How many bytes the frames occupy.
    pub frames_bytes: U64,
    /// Zero.
    pub reserved: [u8; 16],
}

/// One frame of a pack, as its footer tells it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct FrameEntry {
    /// Bytes in the pack.
    pub stored_bytes: U32,
    /// Bytes of its chunks together.
    pub raw_bytes: U32,
    /// How many chunks it holds.
    pub chunk_count: U32,
    /// 0: the chunks as they are; 1: one zstd frame.
    pub encoding: U32,
    /// BLAKE3 of the stored bytes.
    pub hash: [u8; 32],
}

/// One chunk of a pack, as its footer tells it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ChunkEntry {
    /// Its name.
    pub hash: [u8; 32],
    /// Its length in bytes.
    pub bytes: U32,
}

/// The last 48 bytes of a pack.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PackTrailer {
    /// Bytes of the frame table and the chunk table together.
    pub footer_bytes: U64,
    /// BLAKE3 of the header, the frame table and the chunk table, one after the other.
    pub hash: [u8; 32],
    /// [`PACK_END`].
    pub magic: [u8; 8],
}

/// Length of [`PackHeader`] in bytes.
pub const HEADER_BYTES: usize = 64;
/// Length of [`FrameEntry`] in bytes.
pub const FRAME_ENTRY_BYTES: usize = 48;
/// Length of [`ChunkEntry`] in bytes.
pub const CHUNK_ENTRY_BYTES: usize = 36;
/// Length of [`PackTrailer`] in bytes.
pub const TRAILER_BYTES: usize = 48;

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<PackHeader>() == HEADER_BYTES);
    assert!(offset_of!(PackHeader, publish) == 16);
    assert!(offset_of!(PackHeader, frame_count) == 32);
    assert!(offset_of!(PackHeader, frames_bytes) == 40);
    assert!(size_of::<FrameEntry>() == FRAME_ENTRY_BYTES);
    assert!(offset_of!(FrameEntry, hash) == 16);
    assert!(size_of::<ChunkEntry>() == CHUNK_ENTRY_BYTES);
    assert!(size_of::<PackTrailer>() == TRAILER_BYTES);
    assert!(offset_of!(PackTrailer, magic) == 40);
    assert!(
        size_of::<usize>() == 8,
        "lengths of packs are held in usize"
    );
};

/// What a pack holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PackKind {
    /// Pieces of content.
    Chunks,
    /// Nodes of trees.
    Nodes,
}

impl PackKind {
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Chunks => 1,
            Self::Nodes => 2,
        }
    }

    pub(crate) fn of_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Chunks),
            2 => Some(Self::Nodes),
            _ => None,
        }
    }

    /// The name of `bytes` stored in a pack of this kind.
    #[must_use]
    pub fn hash(self, bytes: &[u8]) -> Hash {
        match self {
            Self::Chunks => Hash::of(bytes),
            Self::Nodes => Hash::of_node(bytes),
        }
    }
}

/// What is in a pack, without the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackTable {
    /// What kind of things.
    pub kind: PackKind,
    /// The frames, in order.
    pub frames: Vec<FrameEntry>,
    /// The chunks, in the order of the frames.
    pub chunks: Vec<ChunkEntry>,
}

impl PackTable {
    /// The table from its two encoded parts; every length is checked against the others.
    ///
    /// # Errors
    /// Says what does not fit.
    pub fn decode(kind: PackKind, frames: &[u8], chunks: &[u8]) -> Result<Self, &'static str> {
        let frames = <[FrameEntry]>::ref_from_bytes(frames)
            .map_err(|_size| "a frame table of broken entries")?;
        let chunks = <[ChunkEntry]>::ref_from_bytes(chunks)
            .map_err(|_size| "a chunk table of broken entries")?;
        let mut rest = chunks;
        for frame in frames {
            check_frame(frame)?;
            let (own, others) = rest
                .split_at_checked(frame.chunk_count.get() as usize)
                .ok_or("more chunks in frames than in the chunk table")?;
            rest = others;
            check_chunks(frame, own)?;
        }
        if !rest.is_empty() {
            return Err("chunks that are in no frame");
        }
        Ok(Self {
            kind,
            frames: frames.to_vec(),
            chunks: chunks.to_vec(),
        })
    }

    /// How many bytes the pack has in all.
    #[must_use]
    pub fn pack_bytes(&self) -> u64 {
        let tables = self.frames.as_bytes().len() + self.chunks.as_bytes().len();
        self.frames_bytes() + (HEADER_BYTES + TRAILER_BYTES + tables) as u64
    }

    /// How many bytes the frames occupy in the pack.
    #[must_use]
    pub fn frames_bytes(&self) -> u64 {
        let stored = |frame: &FrameEntry| u64::from(frame.stored_bytes.get());
        self.frames.iter().map(stored).sum()
    }

    /// How many bytes its chunks have, uncompressed.
    #[must_use]
    pub fn raw_bytes(&self) -> u64 {
        let raw = |frame: &FrameEntry| u64::from(frame.raw_bytes.get());
        self.frames.iter().map(raw).sum()
    }

    /// Its frames, each with where it lies in the pack and what is in it.
    pub(crate) fn placed_frames(&self) -> impl Iterator<Item = PlacedFrame<'_>> {
        let mut rest = self.chunks.as_slice();
        let mut start = HEADER_BYTES as u64;
        (0..).zip(&self.frames).map(move |(number, entry)| {
            let (chunks, behind) = rest.split_at(entry.chunk_count.get() as usize);
            rest = behind;
            let range = start..start + u64::from(entry.stored_bytes.get());
            start = range.end;
            PlacedFrame {
                number,
                entry,
                range,
                chunks,
            }
        })
    }

    fn header(&self, publish: [u8; 16]) -> PackHeader {
        PackHeader {
            magic: PACK_MAGIC,
            version: U32::new(PACK_VERSION),
            kind: U32::new(self.kind.code()),
            publish,
            frame_count: U32::new(self.frames.len() as u32),
            chunk_count: U32::new(self.chunks.len() as u32),
            frames_bytes: U64::new(self.frames_bytes()),
            reserved: [0; 16],
        }
    }
}

/// A frame and where it lies.
#[derive(Debug, Clone)]
pub(crate) struct PlacedFrame<'a> {
    /// Counted from 0 within its pack.
    pub(crate) number: u32,
    pub(crate) entry: &'a FrameEntry,
    /// Its stored bytes within the pack.
    pub(crate) range: Range<u64>,
    pub(crate) chunks: &'a [ChunkEntry],
}

impl PlacedFrame<'_> {
    /// Name and bytes of each chunk in the uncompressed frame `raw`; the bytes are not checked.
    pub(crate) fn pieces<'raw>(&self, raw: &'raw [u8]) -> impl Iterator<Item = (Hash, &'raw [u8])> {
        let mut at = 0;
        self.chunks.iter().map(move |chunk| {
            let bytes = &raw[at..at + chunk.bytes.get() as usize];
            at += bytes.len();
            (Hash::from_bytes(chunk.hash), bytes)
        })
    }
}

fn check_frame(frame: &FrameEntry) -> Result<(), &'static str> {
    let (stored, raw) = (frame.stored_bytes.get(), frame.raw_bytes.get());
    if raw == 0 || raw > FRAME_BYTES_MAX || frame.chunk_count.get() == 0 {
        return Err("a frame of impossible length");
    }
    let fits = match frame.encoding.get() {
        0 => stored == raw,
        1 => stored > 0 && stored < raw,
        _ => return Err("a frame of unknown encoding"),
    };
    if fits {
        Ok(())
    } else {
        Err("a frame whose stored length does not fit its encoding")
    }
}

fn check_chunks(frame: &FrameEntry, chunks: &[ChunkEntry]) -> Result<(), &'static str> {
    let mut sum = 0_u64;
    for chunk in chunks {
        let bytes = chunk.bytes.get();
        if bytes == 0 || bytes > CHUNK_BYTES_MAX || chunk.hash == [0; 32] {
            return Err("a chunk of impossible length or name");
        }
        sum += u64::from(bytes);
    }
    if sum == u64::from(frame.raw_bytes.get()) {
        Ok(())
    } else {
        Err("a frame whose chunks do not fill it")
    }
}

/// A frame that is ready to be stored.
#[derive(Debug, Clone)]
pub(crate) struct StoredFrame {
    pub(crate) entry: FrameEntry,
    pub(crate) chunks: Vec<ChunkEntry>,
    pub(crate) stored: Bytes,
}

/// Chunks that are gathered to become one frame.
#[derive(Debug, Default)]
pub(crate) struct OpenFrame {
    raw: Vec<u8>,
    chunks: Vec<ChunkEntry>,
}

impl OpenFrame {
    pub(crate) fn push(&mut self, hash: Hash, bytes: &[u8]) {
        assert!(
            !bytes.is_empty() && bytes.len() <= CHUNK_BYTES_MAX as usize,
            "a chunk has from 1 byte to 1 MiB"
        );
        assert!(!self.is_full(), "a full frame is closed first");
        self.raw.extend_from_slice(bytes);
        self.chunks.push(ChunkEntry {
            hash: *hash.as_bytes(),
            bytes: U32::new(bytes.len() as u32),
        });
    }

    pub(crate) fn is_full(&self) -> bool {
        self.raw.len() >= FRAME_TARGET_BYTES
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Compresses the frame; one that does not shrink is stored as it is.
    pub(crate) fn store(self, compressor: &mut zstd::bulk::Compressor<'_>) -> StoredFrame {
        let mut stored = vec![0; self.raw.len().saturating_sub(1)];
        // The only failure is that the output does not fit, that is, the frame does not shrink.
        let (encoding, stored) =
            match compressor.compress_to_buffer(&self.raw, stored.as_mut_slice()) {
                Ok(length) if length > 0 => {
                    stored.truncate(length);
                    stored.shrink_to_fit();
                    (1, stored)
                }
                Ok(_) | Err(_) => (0, self.raw.clone()),
            };
        StoredFrame {
            entry: FrameEntry {
                stored_bytes: U32::new(stored.len() as u32),
                raw_bytes: U32::new(self.raw.len() as u32),
                chunk_count: U32::new(self.chunks.len() as u32),
                encoding: U32::new(encoding),
                hash: *Hash::of(&stored).as_bytes(),
            },
            chunks: self.chunks,
            stored: stored.into(),
        }
    }
}

/// A compressor for frames.
pub(crate) fn compressor() -> std::io::Result<zstd::bulk::Compressor<'static>> {
    zstd::bulk::Compressor::new(ZSTD_LEVEL)
}

/// A frame as it was read, before its chunks are trusted.
///
/// # Errors
/// Says what is wrong: the checksum, or that it does not decompress to exactly `raw_bytes`. Never
/// allocates more than `raw_bytes`, whatever the frame claims.
pub fn decode_frame(entry: &FrameEntry, stored: Bytes) -> Result<Bytes, String> {
    if stored.len() != entry.stored_bytes.get() as usize {
        return Err(format!(
            "a frame of {} bytes instead of {}",
            stored.len(),
            entry.stored_bytes
        ));
    }
    if Hash::of(&stored).as_bytes() != &entry.hash {
        return Err("a frame with a wrong checksum".to_owned());
    }
    if entry.encoding.get() == 0 {
        return Ok(stored);
    }
    let raw_bytes = entry.raw_bytes.get() as usize;
    let mut raw = vec![0; raw_bytes];
    match zstd::bulk::decompress_to_buffer(&stored, raw.as_mut_slice()) {
        Ok(length) if length == raw_bytes => Ok(raw.into()),
        Ok(length) => Err(format!(
            "a frame that decompresses to {length} bytes instead of {raw_bytes}"
        )),
        Err(error) => Err(format!("a frame that does not decompress: {error}")),
    }
}

/// A pack being put together in memory.
#[derive(Debug)]
pub(crate) struct PackBuilder {
    publish: [u8; 16],
    table: PackTable,
    frames: Vec<Bytes>,
    stored_bytes: u64,
}

/// A finished pack: its name, its bytes in pieces, and what is in it.
#[derive(Debug)]
pub(crate) struct FinishedPack {
    pub(crate) name: Hash,
    pub(crate) pieces: Vec<Bytes>,
    pub(crate) table: PackTable,
}

impl PackBuilder {
    pub(crate) fn new(kind: PackKind, publish: [u8; 16]) -> Self {
        Self {
            publish,
            table: PackTable {
                kind,
                frames: Vec::new(),
                chunks: Vec::new(),
            },
            frames: Vec::new(),
            stored_bytes: 0,
        }
    }

    pub(crate) fn push(&mut self, frame: StoredFrame) {
        self.stored_bytes += frame.stored.len() as u64;
        self.table.frames.push(frame.entry);
        self.table.chunks.extend(frame.chunks);
        self.frames.push(frame.stored);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(crate) fn is_full(&self, target_bytes: u64) -> bool {
        self.stored_bytes >= target_bytes
    }

    pub(crate) fn finish(self) -> FinishedPack {
        let header = self.table.header(self.publish);
        let frames = self.table.frames.as_bytes();
        let chunks = self.table.chunks.as_bytes();
        let trailer = PackTrailer {
            footer_bytes: U64::new((frames.len() + chunks.len()) as u64),
            hash: table_hash(header.as_bytes(), frames, chunks),
            magic: PACK_END,
        };
        let mut footer = Vec::with_capacity(frames.len() + chunks.len() + TRAILER_BYTES);
        footer.extend_from_slice(frames);
        footer.extend_from_slice(chunks);
        footer.extend_from_slice(trailer.as_bytes());
        let mut pieces = vec![Bytes::copy_from_slice(header.as_bytes())];
        pieces.extend(self.frames);
        pieces.push(footer.into());
        let mut hasher = blake3::Hasher::new();
        for piece in &pieces {
            hasher.update(piece);
        }
        FinishedPack {
            name: Hash::from_bytes(*hasher.finalize().as_bytes()),
            pieces,
            table: self.table,
        }
    }
}

fn table_hash(header: &[u8], frames: &[u8], chunks: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header).update(frames).update(chunks);
    *hasher.finalize().as_bytes()
}

/// How many bytes the two tables in front of this trailer have.
///
/// # Errors
/// Says what is wrong with the trailer, or that it does not fit into a pack of `pack_bytes`.
pub fn footer_bytes(trailer: &[u8], pack_bytes: u64) -> Result<u64, &'static str> {
    let trailer = PackTrailer::ref_from_bytes(trailer).map_err(|_size| "no trailer")?;
    if trailer.magic != PACK_END {
        return Err("no mark at the end");
    }
    let footer = trailer.footer_bytes.get();
    let room = pack_bytes.saturating_sub((HEADER_BYTES + TRAILER_BYTES) as u64);
    if footer > room {
        return Err("a footer longer than the pack");
    }
    Ok(footer)
}

/// Reads header, tables and trailer of a pack of `pack_bytes` bytes; `footer` is everything behind
/// the frames.
///
/// # Errors
/// Says what is wrong.
pub fn decode_table(
    header: &[u8],
    footer: &[u8],
    pack_bytes: u64,
) -> Result<PackTable, &'static str> {
    let fields =
        PackHeader::ref_from_bytes(header).map_err(|_size| "a header that is too short")?;
    if fields.magic != PACK_MAGIC {
        return Err("no pack (wrong first bytes)");
    }
    if fields.version.get() != PACK_VERSION {
        return Err("a pack of an unknown version");
    }
    let kind = PackKind::of_code(fields.kind.get()).ok_or("a pack of an unknown kind")?;
    let (tables, trailer) = footer
        .split_last_chunk::<TRAILER_BYTES>()
        .ok_or("a footer that is too short")?;
    if footer_bytes(trailer, pack_bytes)? != tables.len() as u64 {
        return Err("a footer of another length than its trailer says");
    }
    let frames_bytes = u64::from(fields.frame_count.get()) * FRAME_ENTRY_BYTES as u64;
    let (frames, chunks) = usize::try_from(frames_bytes)
        .ok()
        .and_then(|length| tables.split_at_checked(length))
        .ok_or("more frames than the footer has room for")?;
    let trailer = PackTrailer::ref_from_bytes(trailer).map_err(|_size| "no trailer")?;
    if table_hash(header, frames, chunks) != trailer.hash {
        return Err("a footer with a wrong checksum");
    }
    let table = PackTable::decode(kind, frames, chunks)?;
    let counts_fit = table.chunks.len() == fields.chunk_count.get() as usize;
    if !counts_fit || table.pack_bytes() != pack_bytes || fields.reserved != [0; 16] {
        return Err("a header that does not fit the footer");
    }
    Ok(table)
}

/// Reads the table of a whole pack.
///
/// # Errors
/// Says what is wrong.
pub fn decode_whole(pack: &[u8]) -> Result<PackTable, &'static str> {
    let length = pack.len() as u64;
    let header = pack
        .first_chunk::<HEADER_BYTES>()
        .ok_or("a truncated pack")?;
    let trailer = pack
        .last_chunk::<TRAILER_BYTES>()
        .ok_or("a truncated pack")?;
    let footer = footer_bytes(trailer, length)? as usize + TRAILER_BYTES;
    decode_table(header, &pack[pack.len() - footer..], length)
}
