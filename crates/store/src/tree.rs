//! Trees: the whole content of a device as one name.
//!
//! The content is cut into chunks of one size. A tree is a radix tree over the chunk index with a
//! fan-out of 256: a node of level 0 names up to 256 chunks, a node of level *n* up to 256 nodes of
//! level *n* − 1. A node without any child is not stored; its name is zero. There is exactly one
//! encoding for a node and one height for a length, so equal content has equal roots, and content
//! that differs in one chunk differs in one node a level.
//!
//! | offset | bytes | field of an encoded node |
//! |---|---|---|
//! | 0 | 1 | level |
//! | 1 | 7 | zero |
//! | 8 | 32 | presence: child *i* is there if bit *i* mod 8 of byte *i* / 8 is set |
//! | 40 | 32 each | names of the children that are there, in order; none is zero |

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};
use crate::hash::{HASH_BYTES, Hash};

/// Children of a node.
pub const FAN_OUT: u64 = 256;
/// The largest encoded node, in bytes.
pub const NODE_BYTES_MAX: usize = size_of::<NodeHeader>() + 256 * HASH_BYTES;
/// The longest content, in bytes (64 PiB).
pub const LENGTH_BYTES_MAX: u64 = 1 << 56;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct NodeHeader {
    level: u8,
    zero: [u8; 7],
    presence: [u8; 32],
}

const _: () = {
    assert!(size_of::<NodeHeader>() == 40);
    assert!(std::mem::offset_of!(NodeHeader, presence) == 8);
    assert!(NODE_BYTES_MAX == 8232);
};

/// The size of the pieces that content is cut into: a power of two from 4 KiB to 1 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct ChunkSize(u32);

impl ChunkSize {
    /// 64 KiB, for disks.
    pub const DISK: Self = Self(64 << 10);
    /// 16 KiB, for RAM.
    pub const RAM: Self = Self(16 << 10);

    /// A chunk size of this many bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is not a power of two from 4 KiB to 1 MiB.
    pub fn new(bytes: u32) -> Result<Self> {
        if bytes.is_power_of_two() && (4 << 10..=1 << 20).contains(&bytes) {
            return Ok(Self(bytes));
        }
        Err(Error::Invalid {
            attempted: format!("cut content into chunks of {bytes} bytes"),
            reason: "a chunk size is a power of two from 4096 to 1048576".to_owned(),
        })
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }
}

impl TryFrom<u32> for ChunkSize {
    type Error = Error;

    fn try_from(bytes: u32) -> Result<Self> {
        Self::new(bytes)
    }
}

impl From<ChunkSize> for u32 {
    fn from(size: ChunkSize) -> Self {
        size.0
    }
}

/// The name of a device's whole content. Equal content cut alike has equal references.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TreeRef {
    /// The name of the root node; zero if every byte is zero.
    pub root: Hash,
    /// How long the content is, in bytes.
    pub length_bytes: u64,
    /// How it is cut.
    pub chunk_size: ChunkSize,
}

/// A small blob in the store; it is kept as a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlobRef(pub TreeRef);

impl fmt::Display for TreeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tree {} ({} bytes)", self.root, self.length_bytes)
    }
}

impl TreeRef {
    /// How many chunks the content has, zero ones included.
    #[must_use]
    pub fn chunk_count(&self) -> u64 {
        self.length_bytes.div_ceil(self.chunk_size.bytes())
    }

    /// The length of chunk `index`: the chunk size, or less for the last one.
    #[must_use]
    pub fn chunk_bytes(&self, index: u64) -> u64 {
        let start = index.saturating_mul(self.chunk_size.bytes());
        self.length_bytes
            .saturating_sub(start)
            .min(self.chunk_size.bytes())
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.length_bytes <= LENGTH_BYTES_MAX {
            return Ok(());
        }
        Err(Error::Invalid {
            attempted: format!("use {self}"),
            reason: format!("content is at most {LENGTH_BYTES_MAX} bytes long"),
        })
    }

    /// The level of the root: the smallest that has room for every chunk.
    pub(crate) fn root_level(&self) -> u8 {
        root_level(self.chunk_count())
    }
}

fn root_level(chunk_count: u64) -> u8 {
    let mut level = 0;
    let mut room = FAN_OUT;
    while room < chunk_count {
        room = room.saturating_mul(FAN_OUT);
        level += 1;
    }
    level
}

/// How many chunks one child of a node of `level` covers.
pub(crate) fn child_span(level: u8) -> u64 {
    FAN_OUT.saturating_pow(u32::from(level))
}

/// A decoded node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// 0 if the children are chunks.
    pub level: u8,
    /// Position and name of each child that is there, in order.
    pub children: Vec<(u8, Hash)>,
}

impl Node {
    /// The one encoding of this node.
    ///
    /// # Panics
    /// If there is no child, a zero child, or the children are not in order.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(!self.children.is_empty(), "an empty node is never encoded");
        let mut header = NodeHeader {
            level: self.level,
            zero: [0; 7],
            presence: [0; 32],
        };
        let mut before = None;
        for (at, hash) in &self.children {
            assert!(before < Some(*at), "children are in order");
            assert!(!hash.is_zero(), "zero children are left out");
            header.presence[usize::from(at / 8)] |= 1 << (at % 8);
            before = Some(*at);
        }
        let mut bytes = header.as_bytes().to_vec();
        for (_, hash) in &self.children {
            bytes.extend_from_slice(hash.as_bytes());
        }
        bytes
    }

    /// Reads a node.
    ///
    /// # Errors
    /// Says what is wrong when `bytes` is not the encoding of a node.
    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (header, names) =
            NodeHeader::ref_from_prefix(bytes).map_err(|_short| "a node shorter than 40 bytes")?;
        if header.zero != [0; 7] {
            return Err("a node with unknown fields");
        }
        let (names, rest) = names.as_chunks::<HASH_BYTES>();
        let present = (0..=255_u8)
            .filter(|at| header.presence[usize::from(at / 8)] >> (at % 8) & 1 == 1)
            .collect::<Vec<u8>>();
        if !rest.is_empty() || names.len() != present.len() || names.is_empty() {
            return Err("a node whose length does not match its presence bitmap");
        }
        let children = present
            .into_iter()
            .zip(names.iter().map(|name| Hash::from_bytes(*name)))
            .collect::<Vec<_>>();
        if children.iter().any(|(_, hash)| hash.is_zero()) {
            return Err("a node with a zero child");
        }
        Ok(Self {
            level: header.level,
            children,
        })
    }
}

/// Builds a tree from the names of its chunks, given in order. Memory: one node a level, and the
/// finished nodes until they are taken.
pub(crate) struct TreeBuilder {
    tree: TreeRef,
    /// The unfinished node of each level.
    open: Vec<OpenNode>,
    finished: Vec<NewNode>,
}

/// A finished node: its name and its encoding.
pub(crate) type NewNode = (Hash, Vec<u8>);

struct OpenNode {
    number: u64,
    children: Vec<(u8, Hash)>,
}

impl TreeBuilder {
    pub(crate) fn new(length_bytes: u64, chunk_size: ChunkSize) -> Self {
        let tree = TreeRef {
            root: Hash::ZERO,
            length_bytes,
            chunk_size,
        };
        let open = (0..=tree.root_level())
            .map(|_| OpenNode {
                number: 0,
                children: Vec::new(),
            })
            .collect();
        Self {
            tree,
            open,
            finished: Vec::new(),
        }
    }

    /// Names chunk `index`, which follows all named before; zero chunks may be left out.
    pub(crate) fn push(&mut self, index: u64, hash: Hash) {
        assert!(
            index < self.tree.chunk_count(),
            "a chunk behind the end of its tree"
        );
        self.add(0, index, hash);
    }

    /// The nodes finished since the last call, children before parents.
    pub(crate) fn take_finished(&mut self) -> Vec<NewNode> {
        std::mem::take(&mut self.finished)
    }

    fn add(&mut self, level: usize, index: u64, hash: Hash) {
        if hash.is_zero() {
            return;
        }
        let number = index / FAN_OUT;
        if self.open[level].number != number {
            self.close(level);
            self.open[level].number = number;
        }
        let at = (index % FAN_OUT) as u8;
        let children = &mut self.open[level].children;
        assert!(
            children.last().is_none_or(|(last, _)| *last < at),
            "chunks come in order"
        );
        children.push((at, hash));
    }

    /// Finishes the open node of `level` and hands its name to its parent.
    fn close(&mut self, level: usize) {
        let children = std::mem::take(&mut self.open[level].children);
        if children.is_empty() {
            return;
        }
        let node = Node {
            level: level as u8,
            children,
        };
        let encoded = node.encode();
        let hash = Hash::of_node(&encoded);
        self.finished.push((hash, encoded));
        if level + 1 == self.open.len() {
            self.tree.root = hash;
        } else {
            self.add(level + 1, self.open[level].number, hash);
        }
    }

    /// The tree, and the nodes that were not taken yet.
    pub(crate) fn finish(mut self) -> (TreeRef, Vec<NewNode>) {
        for level in 0..self.open.len() {
            self.close(level);
        }
        (self.tree, self.finished)
    }
}

/// Where the nodes of a tree come from.
pub(crate) trait Nodes {
    /// The node with this name; whoever asks checks its level.
    fn node(&self, hash: &Hash) -> Result<Arc<Node>>;
}

/// The chunks of a tree that are not zero, in order: index and name.
pub(crate) struct Leaves<'a, N> {
    nodes: &'a N,
    tree: TreeRef,
    stack: Vec<Position>,
    root_pending: bool,
}

struct Position {
    node: Arc<Node>,
    next: usize,
    /// The index of the first chunk below the node.
    first: u64,
}

impl<'a, N: Nodes> Leaves<'a, N> {
    pub(crate) fn new(nodes: &'a N, tree: TreeRef) -> Self {
        Self {
            nodes,
            tree,
            stack: Vec::new(),
            root_pending: !tree.root.is_zero(),
        }
    }

    fn open(&mut self, hash: &Hash, level: u8, first: u64) -> Result<()> {
        let node = child_node(self.nodes, &self.tree, hash, level, first)?;
        self.stack.push(Position {
            node,
            next: 0,
            first,
        });
        Ok(())
    }

    fn step(&mut self) -> Result<Option<(u64, Hash)>> {
        if std::mem::take(&mut self.root_pending) {
            self.tree.check()?;
            self.open(&self.tree.root.clone(), self.tree.root_level(), 0)?;
        }
        while let Some(position) = self.stack.last_mut() {
            let Some((at, hash)) = position.node.children.get(position.next).copied() else {
                self.stack.pop();
                continue;
            };
            position.next += 1;
            let level = position.node.level;
            let index = position.first + u64::from(at) * child_span(level);
            if level == 0 {
                return Ok(Some((index, hash)));
            }
            self.open(&hash, level - 1, index)?;
        }
        Ok(None)
    }
}

impl<N: Nodes> Iterator for Leaves<'_, N> {
    type Item = Result<(u64, Hash)>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            self.stack.clear();
        }
        step.transpose()
    }
}

/// Reads the node `hash` of `tree` and checks that it fits where it hangs.
pub(crate) fn child_node<N: Nodes>(
    nodes: &N,
    tree: &TreeRef,
    hash: &Hash,
    level: u8,
    first: u64,
) -> Result<Arc<Node>> {
    let range = || describe_range(tree, first, FAN_OUT.saturating_mul(child_span(level)));
    let node = nodes.node(hash).map_err(|error| error.needed_by(range))?;
    let fits = node.level == level
        && node
            .children
            .last()
            .is_none_or(|(at, _)| first + u64::from(*at) * child_span(level) < tree.chunk_count());
    if fits {
        return Ok(node);
    }
    let found = "a node that does not fit where it hangs (level, or children behind the end)";
    Err(Error::damaged(format!("node {hash}"), found).needed_by(range))
}

/// `bytes a..b of tree …`, for errors.
pub(crate) fn describe_range(tree: &TreeRef, first_chunk: u64, chunks: u64) -> String {
    let start = first_chunk.saturating_mul(tree.chunk_size.bytes());
    let end = first_chunk
        .saturating_add(chunks)
        .saturating_mul(tree.chunk_size.bytes())
        .min(tree.length_bytes);
    format!("bytes {start}..{end} of {tree}")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Memory(HashMap<Hash, Vec<u8>>);

    impl Nodes for Memory {
        fn node(&self, hash: &Hash) -> Result<Arc<Node>> {
            let bytes = self.0.get(hash).ok_or(Error::PublishBroken)?;
            Ok(Arc::new(Node::decode(bytes).expect("a stored node")))
        }
    }

    fn build(length_chunks: u64, leaves: &[(u64, Hash)]) -> (TreeRef, Memory) {
        let size = ChunkSize::new(4096).expect("valid");
        let mut builder = TreeBuilder::new(length_chunks * 4096, size);
        for (index, hash) in leaves {
            builder.push(*index, *hash);
        }
        let (tree, nodes) = builder.finish();
        (tree, Memory(nodes.into_iter().collect()))
    }

    fn name(of: u64) -> Hash {
        Hash::of(&of.to_le_bytes())
    }

    #[test]
    fn the_height_is_the_smallest_with_room() {
        for (chunks, level) in [(0, 0), (1, 0), (256, 0), (257, 1), (65536, 1), (65537, 2)] {
            assert_eq!(root_level(chunks), level, "{chunks} chunks");
        }
    }

    #[test]
    fn a_tree_without_data_is_the_zero_name() {
        let (tree, memory) = build(1_000_000, &[(7, Hash::ZERO)]);
        assert_eq!(tree.root, Hash::ZERO);
        assert!(memory.0.is_empty());
        assert_eq!(Leaves::new(&memory, tree).count(), 0);
    }

    #[test]
    fn a_node_behind_the_end_is_refused() {
        let (mut tree, memory) = build(300, &[(299, name(1))]);
        tree.length_bytes = 299 * 4096;
        let error = Leaves::new(&memory, tree)
            .find_map(Result::err)
            .expect("refused");
        assert!(error.to_string().contains("does not fit"), "{error}");
    }

    proptest! {
        #[test]
        fn leaves_come_back_as_they_were_pushed(
            indexes in proptest::collection::btree_set(0_u64..200_000, 0..300)
        ) {
            let leaves: Vec<_> = indexes.iter().map(|i| (*i, name(*i % 7))).collect();
            let (tree, memory) = build(200_000, &leaves);
            let read: Vec<_> = Leaves::new(&memory, tree).collect::<Result<_>>().expect("walk");
            prop_assert_eq!(read, leaves);
        }

        #[test]
        fn any_bytes_decode_to_a_node_that_encodes_to_them_or_to_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..400)
        ) {
            if let Ok(node) = Node::decode(&bytes) {
                prop_assert_eq!(node.encode(), bytes);
            }
        }
    }

    #[test]
    fn every_changed_byte_of_a_node_is_another_node_or_an_error() {
        let (_, memory) = build(300, &[(0, name(0)), (5, name(5)), (299, name(9))]);
        for bytes in memory.0.values() {
            for at in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[at] ^= 1;
                if let Ok(node) = Node::decode(&changed) {
                    assert_ne!(Hash::of_node(&node.encode()), Hash::of_node(bytes));
                }
            }
        }
    }
}
