//! The hashes of a disk's content: one BLAKE3 hash for each MiB, so that an incremental backup hashes what changed only.

use std::collections::BTreeSet;
use std::ops::Range;

use stead_qcow2::{Chain, Result};

/// How many bytes of the disk have a hash.
pub(crate) const CHUNK_BYTES: u64 = 1 << 20;
const HASH_BYTES: usize = 32;

/// The hash of each chunk of a disk; the last one may be shorter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hashes {
    disk_bytes: u64,
    chunks: Vec<[u8; HASH_BYTES]>,
}

fn chunk_count(disk_bytes: u64) -> usize {
    usize::try_from(disk_bytes.div_ceil(CHUNK_BYTES)).unwrap_or(usize::MAX)
}

/// The bytes of chunk `index` of a disk of `disk_bytes`.
pub(crate) fn chunk_range(index: usize, disk_bytes: u64) -> Range<u64> {
    let start = index as u64 * CHUNK_BYTES;
    start..(start + CHUNK_BYTES).min(disk_bytes)
}

/// The chunks that a range of bytes touches.
pub(crate) fn chunks_of(range: &Range<u64>) -> Range<usize> {
    let first = usize::try_from(range.start / CHUNK_BYTES).unwrap_or(usize::MAX);
    first..chunk_count(range.end).max(first)
}

impl Hashes {
    /// Those of a disk of zeros.
    pub fn of_zeros(disk_bytes: u64) -> Self {
        let zeros = vec![0; CHUNK_BYTES as usize];
        let hash_of = |bytes: Range<u64>| {
            let length = usize::try_from(bytes.end - bytes.start).unwrap_or(usize::MAX);
            *blake3::hash(&zeros[..length]).as_bytes()
        };
        let count = chunk_count(disk_bytes);
        let mut chunks = vec![hash_of(0..CHUNK_BYTES); count];
        if let Some(last) = chunks.last_mut() {
            *last = hash_of(chunk_range(count - 1, disk_bytes));
        }
        Self { disk_bytes, chunks }
    }

    /// The same disk with another length; all chunks that differ for that are those of zeros.
    pub fn resized(self, disk_bytes: u64) -> Self {
        let mut new = Self::of_zeros(disk_bytes);
        let alike = usize::try_from(self.disk_bytes.min(disk_bytes) / CHUNK_BYTES);
        let alike = alike.unwrap_or(usize::MAX);
        new.chunks[..alike].copy_from_slice(&self.chunks[..alike]);
        new
    }

    pub fn decode(bytes: &[u8], disk_bytes: u64) -> Option<Self> {
        let (chunks, rest) = bytes.as_chunks::<HASH_BYTES>();
        let right = rest.is_empty() && chunks.len() == chunk_count(disk_bytes);
        right.then(|| Self {
            disk_bytes,
            chunks: chunks.to_vec(),
        })
    }

    /// The length of the hashes of a disk of `disk_bytes`, in bytes.
    pub fn encoded_bytes(disk_bytes: u64) -> u64 {
        disk_bytes.div_ceil(CHUNK_BYTES) * HASH_BYTES as u64
    }

    pub fn encode(&self) -> Vec<u8> {
        self.chunks.concat()
    }

    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    pub fn get(&self, index: usize) -> &[u8; HASH_BYTES] {
        &self.chunks[index]
    }

    pub fn set(&mut self, index: usize, hash: [u8; HASH_BYTES]) {
        self.chunks[index] = hash;
    }
}

/// The chunks of `disk` that may hold something other than zeros.
pub(crate) fn chunks_with_data(disk: &Chain) -> Result<BTreeSet<usize>> {
    let mut found = BTreeSet::new();
    let mut at = 0;
    while at < disk.len() {
        let Some(data) = disk.next_data(at)? else {
            break;
        };
        found.extend(chunks_of(&data));
        at = data.end;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_or_shorter_disk_keeps_the_hashes_of_whole_chunks_alone() {
        let mut hashes = Hashes::of_zeros(3 * CHUNK_BYTES + 512);
        assert_eq!(hashes.len(), 4);
        for index in 0..4 {
            hashes.set(index, [7; 32]);
        }
        let short = hashes.clone().resized(2 * CHUNK_BYTES + 1024);
        assert_eq!((short.get(1), short.len()), (&[7; 32], 3));
        assert_eq!(short.get(2), blake3::hash(&[0; 1024]).as_bytes());
        let long = hashes.resized(5 * CHUNK_BYTES);
        assert_eq!(long.get(2), &[7; 32]);
        assert_eq!(long.get(3), Hashes::of_zeros(CHUNK_BYTES).get(0));
        assert_eq!(
            Hashes::decode(&long.encode(), 5 * CHUNK_BYTES),
            Some(long.clone())
        );
        assert_eq!(Hashes::decode(&long.encode(), 6 * CHUNK_BYTES), None);
    }

    #[test]
    fn a_range_touches_the_chunks_that_its_first_and_last_byte_lie_in() {
        assert_eq!(chunks_of(&(0..1)), 0..1);
        assert_eq!(chunks_of(&(CHUNK_BYTES - 1..CHUNK_BYTES + 1)), 0..2);
        assert_eq!(chunks_of(&(CHUNK_BYTES..2 * CHUNK_BYTES)), 1..2);
    }
}
