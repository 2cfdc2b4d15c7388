//! Index objects: which chunk is in which pack, and the view of them in memory.
//!
//! Each publish writes one index object (more if it would exceed 64 MiB), named by the BLAKE3 of its
//! bytes. It repeats the tables of the packs that the publish wrote, so it can be rebuilt from them.
//!
//! | part | bytes | content |
//! |---|---|---|
//! | header | 64 | [`IndexHeader`] |
//! | for each pack | 48 | [`IndexPack`] |
//! | | 48 each | its frame table |
//! | | 36 each | its chunk table |

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::hash::Hash;
use crate::pack::{
    CHUNK_ENTRY_BYTES, FRAME_ENTRY_BYTES, FrameEntry, HEADER_BYTES, PackKind, PackTable,
};

/// The first bytes of an index object.
pub const INDEX_MAGIC: [u8; 8] = *b"STEADIDX";
/// The format version of index objects.
pub const INDEX_VERSION: u32 = 1;
/// An index object is closed when it has reached this size, in bytes.
pub const INDEX_TARGET_BYTES: usize = 64 << 20;
/// The largest index object that is read, in bytes.
pub const INDEX_BYTES_MAX: u64 = 256 << 20;

/// The first 64 bytes of an index object.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IndexHeader {
    /// [`INDEX_MAGIC`].
    pub magic: [u8; 8],
    /// [`INDEX_VERSION`].
    pub version: U32,
    /// How many packs follow.
    pub pack_count: U32,
    /// Zero.
    pub reserved: [u8; 48],
}

/// What stands in front of a pack's tables in an index object.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IndexPack {
    /// Name of the pack.
    pub name: [u8; 32],
    /// 1 for chunks, 2 for nodes.
    pub kind: U32,
    /// Entries of its frame table.
    pub frame_count: U32,
    /// Entries of its chunk table.
    pub chunk_count: U32,
    /// Zero.
    pub reserved: U32,
}

const _: () = {
    assert!(size_of::<IndexHeader>() == 64);
    assert!(size_of::<IndexPack>() == 48);
    assert!(std::mem::offset_of!(IndexPack, chunk_count) == 40);
};

/// A pack and what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexedPack {
    /// Its name.
    pub name: Hash,
    /// Its table.
    pub table: PackTable,
}

/// Index objects that together list `packs`, each below the target size.
#[must_use]
pub fn encode(packs: &[&IndexedPack]) -> Vec<Vec<u8>> {
    let mut objects = Vec::new();
    let mut body = Vec::new();
    let mut count = 0;
    for (position, pack) in packs.iter().enumerate() {
        append_pack(&mut body, pack);
        count += 1;
        if body.len() >= INDEX_TARGET_BYTES || position + 1 == packs.len() {
            objects.push(with_header(count, &std::mem::take(&mut body)));
            count = 0;
        }
    }
    objects
}

fn append_pack(body: &mut Vec<u8>, pack: &IndexedPack) {
    let head = IndexPack {
        name: *pack.name.as_bytes(),
        kind: U32::new(pack.table.kind.code()),
        frame_count: U32::new(pack.table.frames.len() as u32),
        chunk_count: U32::new(pack.table.chunks.len() as u32),
        reserved: U32::ZERO,
    };
    body.extend_from_slice(head.as_bytes());
    body.extend_from_slice(pack.table.frames.as_bytes());
    body.extend_from_slice(pack.table.chunks.as_bytes());
}

fn with_header(pack_count: u32, body: &[u8]) -> Vec<u8> {
    let header = IndexHeader {
        magic: INDEX_MAGIC,
        version: U32::new(INDEX_VERSION),
        pack_count: U32::new(pack_count),
        reserved: [0; 48],
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// Reads an index object.
///
/// # Errors
/// Says what is wrong.
pub fn decode(bytes: &[u8]) -> Result<Vec<IndexedPack>, &'static str> {
    let (header, mut rest) =
        IndexHeader::ref_from_prefix(bytes).map_err(|_size| "an index that is too short")?;
    if header.magic != INDEX_MAGIC {
        return Err("no index (wrong first bytes)");
    }
    if header.version.get() != INDEX_VERSION || header.reserved != [0; 48] {
        return Err("an index of an unknown version");
    }
    let mut packs = Vec::new();
    for _ in 0..header.pack_count.get() {
        let (pack, behind) = decode_pack(rest)?;
        rest = behind;
        packs.push(pack);
    }
    if rest.is_empty() {
        Ok(packs)
    } else {
        Err("bytes behind the last pack of an index")
    }
}

fn decode_pack(bytes: &[u8]) -> Result<(IndexedPack, &[u8]), &'static str> {
    let (head, rest) =
        IndexPack::ref_from_prefix(bytes).map_err(|_size| "an index that ends within a pack")?;
    let kind = PackKind::of_code(head.kind.get()).ok_or("a pack of an unknown kind")?;
    if head.reserved.get() != 0 {
        return Err("a pack with unknown fields");
    }
    let (frames, rest) = split(rest, head.frame_count.get(), FRAME_ENTRY_BYTES)?;
    let (chunks, rest) = split(rest, head.chunk_count.get(), CHUNK_ENTRY_BYTES)?;
    let pack = IndexedPack {
        name: Hash::from_bytes(head.name),
        table: PackTable::decode(kind, frames, chunks)?,
    };
    Ok((pack, rest))
}

fn split(bytes: &[u8], count: u32, each: usize) -> Result<(&[u8], &[u8]), &'static str> {
    bytes
        .split_at_checked(count as usize * each)
        .ok_or("an index that ends within a table")
}

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) pack: u32,
    pub(crate) frame: u32,
    /// Offset within the uncompressed frame.
    pub(crate) offset: u32,
    pub(crate) bytes: u32,
}

/// A pack as the memory index keeps it.
#[derive(Debug)]
pub(crate) struct KnownPack {
    pub(crate) name: Hash,
    pub(crate) kind: PackKind,
    pub(crate) bytes: u64,
    pub(crate) frames: Vec<KnownFrame>,
}

/// A frame and where it starts in its pack.
#[derive(Debug)]
pub(crate) struct KnownFrame {
    pub(crate) offset: u64,
    pub(crate) entry: FrameEntry,
}

/// All index objects of a store, in memory: 60 to 110 bytes a chunk.
#[derive(Debug, Default)]
pub(crate) struct Index {
    packs: Vec<Arc<KnownPack>>,
    pack_names: HashSet<Hash>,
    chunks: HashMap<Hash, Location>,
    /// The further places of chunks that lie in several packs. These are few: what was stored again because
    /// its pack was lost, and what two publishes stored that did not see each other.
    copies: HashMap<Hash, Vec<Location>>,
    /// Packs that were found missing, cut or damaged: they are looked into last.
    suspect: HashSet<Hash>,
    /// The index objects this was read from.
    pub(crate) objects: BTreeSet<String>,
    /// Index objects that could not be read, with the reason.
    pub(crate) damaged: BTreeMap<String, String>,
}

impl Index {
    pub(crate) fn add(&mut self, pack: &IndexedPack) {
        if !self.pack_names.insert(pack.name) {
            return;
        }
        let number = self.packs.len() as u32;
        let mut frames = Vec::with_capacity(pack.table.frames.len());
        let mut chunks = pack.table.chunks.iter();
        let mut offset = HEADER_BYTES as u64;
        for (frame, entry) in pack.table.frames.iter().enumerate() {
            let mut within = 0;
            for chunk in chunks.by_ref().take(entry.chunk_count.get() as usize) {
                let location = Location {
                    pack: number,
                    frame: frame as u32,
                    offset: within,
                    bytes: chunk.bytes.get(),
                };
                within += location.bytes;
                self.add_place(Hash::from_bytes(chunk.hash), location);
            }
            frames.push(KnownFrame {
                offset,
                entry: *entry,
            });
            offset += u64::from(entry.stored_bytes.get());
        }
        self.packs.push(Arc::new(KnownPack {
            name: pack.name,
            kind: pack.table.kind,
            bytes: pack.table.pack_bytes(),
            frames,
        }));
    }

    fn add_place(&mut self, hash: Hash, location: Location) {
        match self.chunks.entry(hash) {
            Entry::Vacant(first) => drop(first.insert(location)),
            Entry::Occupied(_) => self.copies.entry(hash).or_default().push(location),
        }
    }

    /// Every place where a chunk or node is said to be; those in suspect packs last.
    pub(crate) fn homes(&self, hash: &Hash) -> impl Iterator<Item = (&Arc<KnownPack>, Location)> {
        let first = self.chunks.get(hash).into_iter();
        let places = first.chain(self.copies.get(hash).into_iter().flatten());
        let homes = places.map(|place| (&self.packs[place.pack as usize], *place));
        let is_suspect = |pack: &KnownPack| self.suspect.contains(&pack.name);
        let sound = homes.clone().filter(move |(pack, _)| !is_suspect(pack));
        sound.chain(homes.filter(move |(pack, _)| is_suspect(pack)))
    }

    /// Says of a pack that it is not what it must be; whether that is news.
    pub(crate) fn suspect(&mut self, pack: Hash) -> bool {
        self.suspect.insert(pack)
    }

    /// Name and size in bytes of each pack.
    pub(crate) fn pack_sizes(&self) -> impl Iterator<Item = (Hash, u64)> {
        self.packs.iter().map(|pack| (pack.name, pack.bytes))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pack::{OpenFrame, PackBuilder, compressor, decode_frame, decode_whole};

    fn pack_of(chunks: &[Vec<u8>]) -> (Vec<u8>, IndexedPack) {
        let mut builder = PackBuilder::new(PackKind::Chunks, [7; 16]);
        let mut compressor = compressor().expect("compressor");
        let mut frame = OpenFrame::default();
        for chunk in chunks {
            frame.push(Hash::of(chunk), chunk);
            if frame.is_full() {
                builder.push(std::mem::take(&mut frame).store(&mut compressor));
            }
        }
        if !frame.is_empty() {
            builder.push(frame.store(&mut compressor));
        }
        let pack = builder.finish();
        let table = pack.table.clone();
        let name = pack.name;
        (pack.pieces.concat(), IndexedPack { name, table })
    }

    fn chunks() -> Vec<Vec<u8>> {
        (0..40_u8)
            .map(|number| vec![number + 1; 65536 - usize::from(number)])
            .collect()
    }

    #[test]
    fn every_chunk_is_found_where_the_index_says() {
        let (bytes, pack) = pack_of(&chunks());
        assert_eq!(decode_whole(&bytes), Ok(pack.table.clone()));
        let mut index = Index::default();
        index.add(&pack);
        for chunk in chunks() {
            let (known, location) = index.homes(&Hash::of(&chunk)).next().expect("indexed");
            let frame = &known.frames[location.frame as usize];
            let stored = frame.offset as usize..;
            let stored = &bytes[stored][..frame.entry.stored_bytes.get() as usize];
            let raw = decode_frame(&frame.entry, stored.to_vec().into()).expect("frame");
            assert_eq!(
                raw[location.offset as usize..][..location.bytes as usize],
                chunk
            );
        }
    }

    #[test]
    fn every_pack_that_has_a_chunk_is_known_and_suspect_ones_come_last() {
        let (_, all) = pack_of(&chunks());
        let (_, some) = pack_of(&chunks()[..7]);
        let mut index = Index::default();
        index.add(&all);
        index.add(&some);
        index.add(&all);
        let homes = |index: &Index, chunk: &[u8]| -> Vec<Hash> {
            let name = Hash::of(chunk);
            index.homes(&name).map(|(pack, _)| pack.name).collect()
        };
        assert_eq!(homes(&index, &chunks()[0]), [all.name, some.name]);
        assert_eq!(homes(&index, &chunks()[7]), [all.name]);
        assert!(homes(&index, b"another").is_empty());
        assert!(index.suspect(all.name) && !index.suspect(all.name));
        assert_eq!(homes(&index, &chunks()[0]), [some.name, all.name]);
        assert_eq!(homes(&index, &chunks()[7]), [all.name]);
    }

    #[test]
    fn every_flipped_bit_of_a_pack_changes_its_name_and_those_in_tables_are_refused() {
        let (bytes, pack) = pack_of(&chunks()[..3]);
        let frames_end = HEADER_BYTES + pack.table.frames_bytes() as usize;
        for at in (0..HEADER_BYTES).chain(frames_end..bytes.len()) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x40;
            assert!(decode_whole(&changed).is_err(), "byte {at}");
            assert_ne!(Hash::of(&changed), pack.name);
        }
    }

    #[test]
    fn a_pack_cut_anywhere_is_refused() {
        let (bytes, _) = pack_of(&chunks()[..3]);
        for length in 0..bytes.len() {
            assert!(decode_whole(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_frame_that_would_decompress_to_gigabytes_costs_its_announced_length() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).expect("compress");
        let entry = FrameEntry {
            stored_bytes: U32::new(bomb.len() as u32),
            raw_bytes: U32::new(1 << 20),
            chunk_count: U32::new(1),
            encoding: U32::new(1),
            hash: *Hash::of(&bomb).as_bytes(),
        };
        let error = decode_frame(&entry, bomb.into()).expect_err("too long");
        assert!(error.contains("does not decompress"), "{error}");
    }

    #[test]
    fn an_index_comes_back_as_it_was_written() {
        let (_, first) = pack_of(&chunks());
        let (_, second) = pack_of(&chunks()[..1]);
        let objects = encode(&[&first, &second]);
        assert_eq!(objects.len(), 1);
        assert_eq!(decode(&objects[0]), Ok(vec![first, second]));
        for length in 0..objects[0].len() {
            assert!(decode(&objects[0][..length]).is_err(), "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_pack_and_index_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..600),
            counts in any::<[u32; 4]>(),
        ) {
            assert!(decode_whole(&bytes).is_err());
            let mut index = with_header(counts[0] % 4, &bytes);
            if index.len() > 112 {
                index[96..100].copy_from_slice(&(counts[1] % 3).to_le_bytes());
                index[100..104].copy_from_slice(&(counts[2] % 9).to_le_bytes());
                index[104..108].copy_from_slice(&(counts[3] % 9).to_le_bytes());
                index[108..112].fill(0);
            }
            if let Ok(packs) = decode(&index) {
                let packs: Vec<_> = packs.iter().collect();
                prop_assert!(packs.is_empty() || encode(&packs) == [index]);
            }
        }

        #[test]
        fn a_changed_table_with_a_right_checksum_is_a_table_or_an_error(
            at in 0_usize..(48 + 40 * 36), value in any::<u8>()
        ) {
            let (bytes, pack) = pack_of(&chunks()[..3]);
            let frames_end = HEADER_BYTES + pack.table.frames_bytes() as usize;
            let tables_end = bytes.len() - crate::pack::TRAILER_BYTES;
            let mut tables = bytes[frames_end..tables_end].to_vec();
            let at = at % tables.len();
            tables[at] = value;
            let (frames, chunks) = tables.split_at(FRAME_ENTRY_BYTES);
            if let Ok(table) = PackTable::decode(PackKind::Chunks, frames, chunks) {
                prop_assert!(table.raw_bytes() <= u64::from(crate::pack::FRAME_BYTES_MAX));
            }
        }
    }
}
