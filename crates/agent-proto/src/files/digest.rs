//! Digests of transfers and of blocks.

use std::fmt;

use crc_fast::CrcAlgorithm;
use serde::{Deserialize, Serialize};

use super::{Chunk, Content};

/// What a transfer is digested with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HashKind {
    /// BLAKE3: nothing is taken for something else.
    Blake3,
    /// CRC-32C: finds accidents, for guests to which hashing is dear.
    Crc32c,
}

/// The digest of a transfer's chunks.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Digest {
    /// By BLAKE3.
    Blake3([u8; 32]),
    /// By CRC-32C.
    Crc32c(u32),
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blake3(bytes) => write!(f, "blake3:{}", blake3::Hash::from_bytes(*bytes)),
            Self::Crc32c(sum) => write!(f, "crc32c:{sum:08x}"),
        }
    }
}

#[derive(Debug, Clone)]
enum Hasher {
    Blake3(Box<blake3::Hasher>),
    Crc32c(Box<crc_fast::Digest>),
}

/// Digests the chunks of a transfer, in their order.
///
/// Each counts with its place, its length and whether it is a hole, so that a hole of a terabyte costs as
/// much as an empty one.
#[derive(Debug, Clone)]
pub struct ChunkDigest {
    hasher: Hasher,
}

impl ChunkDigest {
    /// The digest of no chunks yet.
    #[must_use]
    pub fn new(kind: HashKind) -> Self {
        let hasher = match kind {
            HashKind::Blake3 => Hasher::Blake3(Box::default()),
            HashKind::Crc32c => {
                Hasher::Crc32c(Box::new(crc_fast::Digest::new(CrcAlgorithm::Crc32Iscsi)))
            }
        };
        Self { hasher }
    }

    /// Adds a chunk.
    pub fn add(&mut self, chunk: &Chunk) {
        let (mark, data): (u8, &[u8]) = match &chunk.content {
            Content::Data(data) => (1, &data.0),
            Content::Hole(_) => (0, &[]),
        };
        let mut head = [mark; 17];
        head[..8].copy_from_slice(&chunk.offset_bytes.to_le_bytes());
        head[8..16].copy_from_slice(&chunk.length_bytes().to_le_bytes());
        self.update(&head);
        self.update(data);
    }

    fn update(&mut self, bytes: &[u8]) {
        match &mut self.hasher {
            Hasher::Blake3(hasher) => {
                hasher.update(bytes);
            }
            Hasher::Crc32c(digest) => digest.update(bytes),
        }
    }

    /// The digest of the chunks so far.
    #[must_use]
    pub fn digest(&self) -> Digest {
        match &self.hasher {
            Hasher::Blake3(hasher) => Digest::Blake3(*hasher.finalize().as_bytes()),
            // The algorithm has 32 bits.
            Hasher::Crc32c(digest) => Digest::Crc32c(digest.finalize() as u32),
        }
    }
}

/// Digests the blocks of a file as [`super::FileRequest::Digest`] has them: BLAKE3 of the content, zeros for holes.
#[derive(Debug)]
pub struct BlockDigests {
    block_bytes: u64,
    filled_bytes: u64,
    hasher: blake3::Hasher,
    all_zero: bool,
    zeros: Option<[u8; 32]>,
}

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

impl BlockDigests {
    /// No block is begun.
    #[must_use]
    pub fn new(block_bytes: u32) -> Self {
        Self {
            block_bytes: u64::from(block_bytes),
            filled_bytes: 0,
            hasher: blake3::Hasher::new(),
            all_zero: true,
            zeros: None,
        }
    }

    /// How many bytes the block that is begun still takes.
    #[must_use]
    pub fn room_bytes(&self) -> u64 {
        self.block_bytes - self.filled_bytes
    }

    /// Adds bytes, at most [`BlockDigests::room_bytes`]; gives the digest of the block once it is full.
    ///
    /// # Panics
    /// When there are more: a fault of the caller.
    pub fn data(&mut self, bytes: &[u8]) -> Option<[u8; 32]> {
        assert!(
            bytes.len() as u64 <= self.room_bytes(),
            "more than a block was given"
        );
        self.catch_up();
        self.all_zero = false;
        self.hasher.update(bytes);
        self.filled_bytes += bytes.len() as u64;
        self.take_full()
    }

    /// Adds zeros, at most [`BlockDigests::room_bytes`]; gives the digest of the block once it is full. A whole
    /// block of them is hashed once.
    ///
    /// # Panics
    /// When there are more: a fault of the caller.
    pub fn hole(&mut self, length_bytes: u64) -> Option<[u8; 32]> {
        assert!(
            length_bytes <= self.room_bytes(),
            "more than a block was given"
        );
        self.filled_bytes += length_bytes;
        if !self.all_zero {
            add_zeros(&mut self.hasher, length_bytes);
        }
        self.take_full()
    }

    /// The digest of a last block that is not full; nothing when none is begun.
    pub fn last(&mut self) -> Option<[u8; 32]> {
        (self.filled_bytes > 0).then(|| self.take())
    }

    // Zeros at the beginning of a block are hashed when something else follows.
    fn catch_up(&mut self) {
        if self.all_zero {
            add_zeros(&mut self.hasher, self.filled_bytes);
        }
    }

    fn take_full(&mut self) -> Option<[u8; 32]> {
        (self.filled_bytes == self.block_bytes).then(|| self.take())
    }

    fn take(&mut self) -> [u8; 32] {
        let full = self.filled_bytes == self.block_bytes;
        let digest = match (self.all_zero && full, self.zeros) {
            (true, Some(known)) => known,
            (_, _) => {
                self.catch_up();
                *self.hasher.finalize().as_bytes()
            }
        };
        if self.all_zero && full {
            self.zeros = Some(digest);
        }
        self.hasher.reset();
        self.filled_bytes = 0;
        self.all_zero = true;
        digest
    }
}

fn add_zeros(hasher: &mut blake3::Hasher, length_bytes: u64) {
    let mut left = length_bytes;
    while left > 0 {
        let step = left.min(ZEROS.len() as u64);
        // At most the length of ZEROS.
        hasher.update(&ZEROS[..step as usize]);
        left -= step;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(offset_bytes: u64, content: Content) -> Chunk {
        Chunk {
            offset_bytes,
            content,
        }
    }

    #[test]
    fn a_digest_tells_place_order_holes_and_every_bit_apart() {
        let data = |bytes: &[u8]| Content::Data(bytes.into());
        let streams = [
            vec![],
            vec![chunk(0, data(b"ab"))],
            vec![chunk(0, data(b"ac"))],
            vec![chunk(1, data(b"ab"))],
            vec![chunk(0, data(b"a")), chunk(1, data(b"b"))],
            vec![chunk(0, data(&[0, 0]))],
            vec![chunk(0, Content::Hole(2))],
            vec![chunk(0, Content::Hole(3))],
        ];
        for kind in [HashKind::Blake3, HashKind::Crc32c] {
            let digests: Vec<String> = streams
                .iter()
                .map(|stream| {
                    let mut digest = ChunkDigest::new(kind);
                    stream.iter().for_each(|chunk| digest.add(chunk));
                    digest.digest().to_string()
                })
                .collect();
            let mut distinct = digests.clone();
            distinct.sort();
            distinct.dedup();
            assert_eq!(distinct.len(), digests.len(), "{digests:?}");
        }
    }

    #[test]
    fn digests_of_blocks_are_those_of_their_bytes_whatever_is_a_hole() {
        let block = 4096_u32;
        let expect = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
        let mut digests = BlockDigests::new(block);
        assert_eq!(digests.hole(4096), Some(expect(&[0; 4096])));
        assert_eq!(digests.hole(4096), Some(expect(&[0; 4096])));
        assert_eq!(digests.hole(4000), None);
        let mut mixed = vec![0; 4096];
        mixed[4000] = 7;
        assert_eq!(digests.data(&[7]), None);
        assert_eq!(digests.hole(95), Some(expect(&mixed)));
        assert_eq!(digests.data(&[9; 4096]), Some(expect(&[9; 4096])));
        assert_eq!(digests.last(), None);
        assert_eq!(digests.hole(5), None);
        assert_eq!(digests.last(), Some(expect(&[0; 5])));
        assert_eq!(digests.hole(4096), Some(expect(&[0; 4096])));
    }
}
