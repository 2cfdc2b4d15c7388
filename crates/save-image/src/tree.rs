//! BLAKE3 of the payload, with the hash of every part of it kept.
//!
//! The parts (*leaves*) are subtrees of BLAKE3's own tree, so the root is the plain BLAKE3 hash of the payload, which
//! any other program computes too. A leaf has a mebibyte; when there are more leaves than there is room for,
//! neighbours are merged and a leaf has twice as many bytes from then on.

use blake3::Hasher;
use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

/// The hash of a part, or of the whole.
pub(crate) type Hash = [u8; 32];

/// The fewest bytes of a leaf, as a power of two.
pub(crate) const LEAF_LOG2_MIN: u32 = 20;
/// The most: more than any file has.
pub(crate) const LEAF_LOG2_MAX: u32 = 50;

/// The hashes of everything that was put in so far.
#[derive(Debug)]
pub(crate) struct Tree {
    room: usize,
    leaf_log2: u32,
    leaves: Vec<Hash>,
    /// The leaf being filled.
    current: Hasher,
    in_current: u64,
    total: u64,
    /// Whether a full tree may make its leaves larger.
    grows: bool,
}

/// A finished tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leaves {
    pub leaf_log2: u32,
    pub hashes: Vec<Hash>,
    pub root: Hash,
    pub total: u64,
}

impl Tree {
    /// An empty tree with at most `room` leaves, an even number.
    pub fn new(room: usize) -> Self {
        assert!(room >= 2 && room.is_multiple_of(2), "leaves merge in pairs");
        Self {
            room,
            leaf_log2: LEAF_LOG2_MIN,
            leaves: Vec::new(),
            current: Hasher::new(),
            in_current: 0,
            total: 0,
            grows: true,
        }
    }

    /// An empty tree with leaves of `1 << leaf_log2` bytes, however many.
    pub fn with_leaves(leaf_log2: u32) -> Self {
        let mut tree = Self::new(2);
        tree.leaf_log2 = leaf_log2;
        tree.grows = false;
        tree
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.in_current == 1 << self.leaf_log2 {
                self.close_leaf();
            }
            let left = (1 << self.leaf_log2) - self.in_current;
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(count);
            self.current.update(now);
            self.in_current += count as u64;
            self.total += count as u64;
            bytes = later;
        }
    }

    fn close_leaf(&mut self) {
        self.leaves.push(self.current.finalize_non_root());
        if self.grows && self.leaves.len() == self.room {
            self.leaves = self
                .leaves
                .chunks_exact(2)
                .map(|pair| merge_subtrees_non_root(&pair[0], &pair[1], Mode::Hash))
                .collect();
            self.leaf_log2 += 1;
        }
        self.current = Hasher::new();
        self.current.set_input_offset(self.total);
        self.in_current = 0;
    }

    pub fn finish(mut self) -> Leaves {
        let root = if self.leaves.is_empty() {
            *self.current.finalize().as_bytes()
        } else {
            self.leaves.push(self.current.finalize_non_root());
            root_of(&self.leaves)
        };
        if self.leaves.is_empty() && self.total > 0 {
            self.leaves.push(self.current.finalize_non_root());
        }
        Leaves {
            leaf_log2: self.leaf_log2,
            hashes: self.leaves,
            root,
            total: self.total,
        }
    }
}

fn root_of(leaves: &[Hash]) -> Hash {
    let (left, right) = leaves.split_at(left_count(leaves.len()));
    *merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash).as_bytes()
}

fn subtree(leaves: &[Hash]) -> ChainingValue {
    if let [only] = leaves {
        return *only;
    }
    let (left, right) = leaves.split_at(left_count(leaves.len()));
    merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
}

/// The largest power of two below `count`.
fn left_count(count: usize) -> usize {
    assert!(count > 1, "one leaf has no halves");
    1 << (count - 1).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_the_plain_blake3_hash_whatever_the_room_and_the_pieces() {
        let bytes: Vec<u8> = (0..9_500_000_u32).map(|n| (n % 253) as u8).collect();
        let mib = 1 << 20;
        for length in [
            0,
            1,
            mib - 1,
            mib,
            mib + 1,
            2 * mib,
            3 * mib,
            8 * mib,
            9_500_000,
        ] {
            for room in [2, 4, 64] {
                let mut tree = Tree::new(room);
                bytes[..length]
                    .chunks(700_001)
                    .for_each(|piece| tree.update(piece));
                let leaves = tree.finish();
                assert_eq!(leaves.root, *blake3::hash(&bytes[..length]).as_bytes());
                assert!(leaves.hashes.len() <= room, "{length} {room}");
                assert_eq!(leaves.hashes.len(), length.div_ceil(1 << leaves.leaf_log2));
                let mut again = Tree::with_leaves(leaves.leaf_log2);
                again.update(&bytes[..length]);
                assert_eq!(again.finish(), leaves);
            }
        }
    }
}
