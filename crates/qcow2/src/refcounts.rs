//! The refcount table and its blocks, read in order of clusters.
//!
//! # Source
//! QEMU's `docs/interop/qcow2`, section *Host cluster management*.

use stead_sys::copy::is_zero;

use crate::error::Result;
use crate::header::{Header, to_u64, to_usize};
use crate::layer::Layer;
use crate::units::HostOffset;

/// Blocks are read in pieces of at most this many bytes.
const PIECE_BYTES: u64 = 64 << 10;
/// Bits 0 to 8 of a refcount table entry.
const RESERVED: u64 = 0x1ff;

/// What a refcount table entry says, before it is held against others.
pub(crate) enum TableEntry {
    None,
    Block(HostOffset),
    Reserved,
}

impl TableEntry {
    pub fn decode(word: u64) -> Self {
        match (word, word & RESERVED) {
            (0, _) => Self::None,
            (_, 0) => Self::Block(HostOffset(word)),
            _ => Self::Reserved,
        }
    }
}

/// Reads refcounts through the blocks that were found good.
pub(crate) struct Refcounts<'a> {
    layer: &'a Layer,
    blocks: Vec<Option<HostOffset>>,
    piece: Option<Piece>,
}

/// Consecutive refcounts of one block.
struct Piece {
    first_cluster: u64,
    count: u64,
    bytes: Vec<u8>,
}

impl Piece {
    fn holds(&self, cluster: u64) -> bool {
        (self.first_cluster..self.first_cluster + self.count).contains(&cluster)
    }
}

impl<'a> Refcounts<'a> {
    /// `blocks` has the block of each table entry, without those that cannot be read.
    pub fn new(layer: &'a Layer, blocks: Vec<Option<HostOffset>>) -> Self {
        Self {
            layer,
            blocks,
            piece: None,
        }
    }

    /// All refcounts that can be read; what cannot be is left out, as a reader does.
    pub fn of(layer: &'a Layer) -> Result<Self> {
        let header = layer.header();
        let length = u64::from(header.refcount_table_clusters) * header.cluster_size.bytes();
        let there = layer.file_length().saturating_sub(header.refcount_table.0);
        let words = to_usize(length.min(there) / 8);
        let table = layer
            .file()
            .read_words("the refcount table", header.refcount_table, words)?;
        let block = |word| match TableEntry::decode(word) {
            TableEntry::Block(at) => {
                let size = header.cluster_size.bytes();
                let placed = layer.file().require("a refcount block", at, size);
                placed.is_ok().then_some(at)
            }
            TableEntry::None | TableEntry::Reserved => None,
        };
        Ok(Self::new(layer, table.into_iter().map(block).collect()))
    }

    /// The refcount of a cluster; 0 where there is no block. Cheap when asked in ascending order.
    pub fn get(&mut self, cluster: u64) -> Result<u64> {
        if !self
            .piece
            .as_ref()
            .is_some_and(|piece| piece.holds(cluster))
        {
            self.piece = self.read_piece(cluster)?;
        }
        let Some(piece) = &self.piece else {
            return Ok(0);
        };
        Ok(read_refcount(
            &piece.bytes,
            cluster - piece.first_cluster,
            self.layer.header().refcount_order,
        ))
    }

    /// The refcount that `count` clusters from `first` on have, if they have all the same and it can be told
    /// at a glance.
    pub fn alike(&mut self, first: u64, count: u64) -> Result<Option<u64>> {
        let order = self.layer.header().refcount_order;
        let per_block = self.layer.header().refcounts_per_block();
        if order < 3
            || first % pieces(self.layer.header()).1 + count > pieces(self.layer.header()).1
        {
            return Ok(None);
        }
        let refcount = self.get(first)?;
        let Some(piece) = self.piece.as_ref().filter(|piece| piece.holds(first)) else {
            let block = usize::try_from(first / per_block).ok();
            let none = block.is_none_or(|block| self.blocks.get(block).is_none_or(Option::is_none));
            return Ok(none.then_some(0));
        };
        let width = 1_usize << (order - 3);
        let start = to_usize(first - piece.first_cluster) * width;
        let bytes = &piece.bytes[start..start + to_usize(count) * width];
        // All are like the one before.
        let alike = bytes[width..] == bytes[..bytes.len() - width];
        Ok(alike.then_some(refcount))
    }

    /// The first cluster at or after `from` that has a refcount block.
    pub fn next_block(&self, from: u64) -> Option<u64> {
        let per_block = self.layer.header().refcounts_per_block();
        let first = usize::try_from(from / per_block).ok()?;
        let ahead = self.blocks.get(first..)?.iter().position(Option::is_some)?;
        Some((to_u64(first + ahead) * per_block).max(from))
    }

    /// Calls `each` for every cluster in ascending order whose refcount is not 0, from `from` to `end`.
    pub fn for_each_used(
        &mut self,
        from: u64,
        end: u64,
        mut each: impl FnMut(u64, u64),
    ) -> Result<()> {
        let order = self.layer.header().refcount_order;
        let per_block = self.layer.header().refcounts_per_block();
        let per_piece = pieces(self.layer.header()).1;
        let end = end.min(to_u64(self.blocks.len()).saturating_mul(per_block));
        let mut cluster = from / per_piece * per_piece;
        while cluster < end {
            if self.blocks[to_usize(cluster / per_block)].is_none() {
                cluster = (cluster / per_block + 1) * per_block;
                continue;
            }
            if let Some(piece) = self.read_piece(cluster)?
                && !is_zero(&piece.bytes)
            {
                for index in 0..per_piece.min(end - cluster) {
                    let refcount = read_refcount(&piece.bytes, index, order);
                    if refcount > 0 && cluster + index >= from {
                        each(cluster + index, refcount);
                    }
                }
            }
            cluster += per_piece;
        }
        Ok(())
    }

    /// The piece that holds `cluster`'s refcount.
    fn read_piece(&self, cluster: u64) -> Result<Option<Piece>> {
        let header = self.layer.header();
        let per_block = header.refcounts_per_block();
        let (bytes, count) = pieces(header);
        let block = usize::try_from(cluster / per_block).ok();
        let block = block.and_then(|index| self.blocks.get(index).copied().flatten());
        let Some(block) = block else {
            return Ok(None);
        };
        let index = cluster % per_block / count;
        let mut piece = Piece {
            first_cluster: cluster / count * count,
            count,
            bytes: vec![0; to_usize(bytes)],
        };
        let at = HostOffset(block.0 + index * bytes);
        self.layer
            .file()
            .read("a refcount block", at, &mut piece.bytes)?;
        Ok(Some(piece))
    }
}

/// Bytes and refcounts of a piece.
pub(crate) fn pieces(header: &Header) -> (u64, u64) {
    let bytes = PIECE_BYTES.min(header.cluster_size.bytes());
    (bytes, (bytes * 8) >> header.refcount_order)
}

/// Refcount `index` of a block; below a byte, the lowest bits come first.
pub(crate) fn read_refcount(block: &[u8], index: u64, order: u32) -> u64 {
    if order < 3 {
        let bit = index << order;
        let byte = u64::from(block[to_usize(bit / 8)]);
        let mask = (1 << (1_u32 << order)) - 1;
        return (byte >> (bit % 8)) & mask;
    }
    let width = 1_usize << (order - 3);
    let at = to_usize(index) * width;
    let be = |value, byte: &u8| value << 8 | u64::from(*byte);
    block[at..at + width].iter().fold(0, be)
}

/// Sets refcount `index` of a block; `value` fits the width.
pub(crate) fn write_refcount(block: &mut [u8], index: u64, order: u32, value: u64) {
    assert!(value <= most_references(order), "a refcount that fits");
    if order < 3 {
        let bit = index << order;
        let shift = bit % 8;
        let byte = &mut block[to_usize(bit / 8)];
        let mask = most_references(order) << shift;
        let [kept, new] = [u64::from(*byte) & !mask, value << shift];
        *byte = (kept | new).to_le_bytes()[0];
        return;
    }
    let width = 1_usize << (order - 3);
    let at = to_usize(index) * width;
    block[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

/// The largest refcount of `1 << order` bits.
pub(crate) fn most_references(order: u32) -> u64 {
    u64::MAX >> (64 - (1_u32 << order))
}

#[cfg(test)]
mod tests {
    use super::{most_references, read_refcount, write_refcount};

    #[test]
    fn a_refcount_of_every_width_is_read_back_as_written_and_its_neighbours_stay() {
        for order in 0..=6 {
            let count = (64 * 8) >> order;
            for index in [0, 1, count / 2, count - 1] {
                for filling in [0, 0xff] {
                    let mut block = [filling; 64];
                    for value in [most_references(order), 1, 0] {
                        write_refcount(&mut block, index, order, value);
                        assert_eq!(read_refcount(&block, index, order), value);
                        for other in (0..count).filter(|other| *other != index) {
                            let expected = if filling == 0 {
                                0
                            } else {
                                most_references(order)
                            };
                            assert_eq!(read_refcount(&block, other, order), expected);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn refcounts_of_every_width_are_read_as_the_format_lays_them_out() {
        let block: Vec<u8> = (1..=64).collect();
        assert_eq!(read_refcount(&[0b1010_0110], 0, 0), 0);
        assert_eq!(read_refcount(&[0b1010_0110], 1, 0), 1);
        assert_eq!(read_refcount(&[0b1010_0110], 7, 0), 1);
        assert_eq!(read_refcount(&[0b1110_0100], 2, 1), 2);
        assert_eq!(read_refcount(&[0, 0xa5], 2, 2), 5);
        assert_eq!(read_refcount(&[0, 0xa5], 3, 2), 10);
        assert_eq!(read_refcount(&block, 2, 3), 3);
        assert_eq!(read_refcount(&block, 1, 4), 0x0304);
        assert_eq!(read_refcount(&block, 1, 5), 0x0506_0708);
        assert_eq!(read_refcount(&block, 1, 6), 0x090a_0b0c_0d0e_0f10);
    }
}
