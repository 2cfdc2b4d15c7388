//! References to the clusters of a file that is written from front to back.
//!
//! Every cluster that was taken is referenced at least once, most exactly once; only the others take
//! memory, two bytes a cluster on pages of 4096.

use std::collections::BTreeMap;

use crate::header::{to_u64, to_usize};
use crate::units::ClusterSize;

const PAGE_CLUSTERS: u64 = 4096;
type Page = Box<[u16; PAGE_CLUSTERS as usize]>;

/// References per cluster.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    taken: u64,
    others: BTreeMap<u64, Page>,
}

impl Counts {
    /// How many clusters were taken.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Takes the next `count` clusters, each referenced once; gives the first.
    pub fn take(&mut self, count: u64) -> u64 {
        let first = self.taken;
        self.taken += count;
        first
    }

    /// How often a cluster is referenced; 0 if it was not taken.
    pub fn get(&self, cluster: u64) -> u16 {
        if cluster >= self.taken {
            return 0;
        }
        let page = self.others.get(&(cluster / PAGE_CLUSTERS));
        page.map_or(1, |page| page[to_usize(cluster % PAGE_CLUSTERS)])
    }

    /// One more reference to a cluster that was taken.
    pub fn add(&mut self, cluster: u64) {
        assert!(cluster < self.taken, "the cluster was taken");
        let page = self
            .others
            .entry(cluster / PAGE_CLUSTERS)
            .or_insert_with(|| Box::new([1; PAGE_CLUSTERS as usize]));
        let count = &mut page[to_usize(cluster % PAGE_CLUSTERS)];
        assert!(*count < u16::MAX, "the caller keeps counts in their width");
        *count += 1;
    }

    /// A refcount block for the clusters from `first` on, in refcounts of `1 << order` bits.
    pub fn block(&self, first: u64, size: ClusterSize, order: u32) -> Vec<u8> {
        let mut bytes = vec![0; size.buffer_len()];
        let per_block = (size.bytes() * 8) >> order;
        let end = (first + per_block).min(self.taken);
        for cluster in first..end {
            let count = u64::from(self.get(cluster));
            put_refcount(&mut bytes, cluster - first, order, count);
        }
        bytes
    }
}

/// Sets refcount `index` of a block of zeros; below a byte, the lowest bits come first.
fn put_refcount(block: &mut [u8], index: u64, order: u32, count: u64) {
    if order < 3 {
        let bit = index << order;
        let byte = &mut block[to_usize(bit / 8)];
        *byte |= count.to_be_bytes()[7] << (bit % 8);
        return;
    }
    let width = 1_usize << (order - 3);
    let at = to_usize(index) * width;
    block[at..at + width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
}

/// How many clusters refcounts need, for `used` clusters and for themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RefcountPlan {
    pub per_block: u64,
    pub blocks: u64,
    pub table_clusters: u64,
    /// All clusters: those used before, the blocks, the table.
    pub total: u64,
}

impl RefcountPlan {
    pub fn new(used: u64, size: ClusterSize, order: u32) -> Self {
        let per_block = (size.bytes() * 8) >> order;
        let mut plan = Self {
            per_block,
            blocks: 0,
            table_clusters: 0,
            total: used,
        };
        // Each round covers the clusters of the round before; a block covers at least 64, so the sum
        // settles.
        loop {
            plan.blocks = plan.total.div_ceil(per_block);
            plan.table_clusters = size.count_for(plan.blocks * to_u64(size_of::<u64>()));
            let total = used + plan.blocks + plan.table_clusters;
            if total == plan.total {
                return plan;
            }
            plan.total = total;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_each_count_in_its_width() {
        for order in 0..=6 {
            let mut counts = Counts::default();
            counts.take(10_000);
            if order > 0 {
                counts.add(5000);
                counts.add(5000);
            }
            let per_block = (512 * 8) >> order;
            let first = 5000 / per_block * per_block;
            let size = ClusterSize::MIN;
            let block = counts.block(first, size, order);
            let bit = (5000 - first) << order;
            let width = 1_u64 << order;
            let found = if order < 3 {
                u64::from(block[to_usize(bit / 8)] >> (bit % 8)) & ((1 << width) - 1)
            } else {
                let at = to_usize(bit / 8);
                let bytes = &block[at..at + to_usize(width / 8)];
                bytes
                    .iter()
                    .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
            };
            assert_eq!(found, if order > 0 { 3 } else { 1 }, "order {order}");
        }
    }

    #[test]
    fn clusters_behind_the_last_one_taken_are_not_counted() {
        let mut counts = Counts::default();
        counts.take(3);
        counts.add(1);
        assert_eq!(
            [0, 1, 2, 3].map(|cluster| counts.get(cluster)),
            [1, 2, 1, 0]
        );
        assert_eq!(counts.block(0, ClusterSize::MIN, 3)[..5], [1, 2, 1, 0, 0]);
    }
}
