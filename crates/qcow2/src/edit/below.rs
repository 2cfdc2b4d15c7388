//! What an image needs of the disk below it before that disk is taken away or exchanged for another.

use std::ops::Range;

use stead_sys::copy::is_zero;

use crate::chain::{Chain, StoredAs};
use crate::error::Result;
use crate::header::to_usize;
use crate::units::{ClusterSize, HostOffset};

/// The disk below an image, and the one that is to be below it.
#[derive(Debug, Clone, Copy)]
pub struct Below<'a> {
    /// The disk that is seen where the image says nothing; `None`: zeros.
    pub old: Option<&'a Chain>,
    /// The disk that is to be seen there instead; `None`: zeros.
    pub new: Option<&'a Chain>,
}

/// Where the bytes of clusters come from that the image must have itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// One after the other from a place of a member's file.
    Member { member: usize, at: HostOffset },
    /// From the disk, read.
    Disk,
    /// They are zeros.
    Zeros,
}

impl Wanted {
    /// What is wanted `length` bytes behind.
    pub fn behind(self, length: u64) -> Self {
        match self {
            Self::Member { member, at } => Self::Member {
                member,
                at: HostOffset(at.0 + length),
            },
            Self::Disk | Self::Zeros => self,
        }
    }
}

/// Neighbouring clusters that are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WantedRun {
    pub clusters: Range<u64>,
    pub what: Wanted,
}

/// Finds what is wanted, with buffers to compare in.
pub(super) struct Finder<'a> {
    below: &'a Below<'a>,
    size: ClusterSize,
    old: Vec<u8>,
    new: Vec<u8>,
}

impl<'a> Finder<'a> {
    pub fn new(below: &'a Below<'a>, size: ClusterSize) -> Self {
        let length = if below.new.is_some() {
            size.buffer_len()
        } else {
            0
        };
        Self {
            below,
            size,
            old: vec![0; length],
            new: vec![0; length],
        }
    }

    /// The first run in `clusters` that is wanted.
    pub fn next(&mut self, clusters: Range<u64>) -> Result<Option<WantedRun>> {
        let mut at = clusters.start;
        while at < clusters.end {
            let Some(found) = self.next_data(at..clusters.end)? else {
                return Ok(None);
            };
            let Some(new) = self.below.new else {
                return self.wanted(found..clusters.end).map(Some);
            };
            let alike = self.same_place(new, found..clusters.end)?;
            if alike > 0 {
                at = found + alike;
            } else if self.differs(new, found)? {
                return self.differing(found, clusters.end).map(Some);
            } else {
                at = found + 1;
            }
        }
        Ok(None)
    }

    /// The first cluster in which one of the disks may have something other than zeros.
    pub fn next_data(&self, clusters: Range<u64>) -> Result<Option<u64>> {
        let bits = self.size.bits();
        let (start, end) = (clusters.start << bits, clusters.end << bits);
        let mut first: Option<u64> = None;
        for disk in [self.below.old, self.below.new].into_iter().flatten() {
            let found = disk.next_stored(start, end)?.map(|(range, _)| range.start);
            first = first.into_iter().chain(found).min();
        }
        Ok(first.map(|first| first >> bits))
    }

    /// What the old disk has in the first of `clusters`, and in those that go on with it.
    fn wanted(&self, clusters: Range<u64>) -> Result<WantedRun> {
        let bits = self.size.bits();
        let (start, end) = (clusters.start << bits, clusters.end << bits);
        let one = clusters.start..clusters.start + 1;
        let stored = match self.below.old {
            Some(old) => old.next_stored(start, end)?,
            None => None,
        };
        let Some((range, how)) = stored else {
            let what = Wanted::Zeros;
            return Ok(WantedRun {
                clusters: one,
                what,
            });
        };
        let whole = (range.end - range.start) >> bits;
        match how {
            StoredAs::Plain { member, at } if range.start == start && whole > 0 => Ok(WantedRun {
                clusters: clusters.start..clusters.start + whole,
                what: Wanted::Member { member, at },
            }),
            StoredAs::Plain { .. } | StoredAs::Packed { .. } | StoredAs::Zeros => Ok(WantedRun {
                clusters: one,
                what: Wanted::Disk,
            }),
        }
    }

    /// How many of `clusters`, from the first on, both disks have at the same place of the same file.
    fn same_place(&self, new: &Chain, clusters: Range<u64>) -> Result<u64> {
        let bits = self.size.bits();
        let (start, end) = (clusters.start << bits, clusters.end << bits);
        let Some(old) = self.below.old else {
            return Ok(0);
        };
        let (ours, theirs) = (old.stored(start, end)?, new.stored(start, end)?);
        let same = match (ours.how, theirs.how) {
            (
                StoredAs::Plain { member, at },
                StoredAs::Plain {
                    member: other,
                    at: there,
                },
            ) => at == there && old.is_one_file(member, new, other),
            (StoredAs::Zeros, StoredAs::Zeros) => true,
            (StoredAs::Plain { .. } | StoredAs::Packed { .. } | StoredAs::Zeros, _) => false,
        };
        let length = if same {
            ours.end.min(theirs.end) - start
        } else {
            0
        };
        Ok(length >> bits)
    }

    fn differs(&mut self, new: &Chain, cluster: u64) -> Result<bool> {
        let start = cluster << self.size.bits();
        match self.below.old {
            Some(old) => old.read_padded(start, &mut self.old)?,
            None => self.old.fill(0),
        }
        new.read_padded(start, &mut self.new)?;
        Ok(self.old != self.new)
    }

    /// A cluster that differs; its old content was just read.
    fn differing(&self, cluster: u64, end: u64) -> Result<WantedRun> {
        let one = cluster..cluster + 1;
        if is_zero(&self.old) {
            let what = Wanted::Zeros;
            return Ok(WantedRun {
                clusters: one,
                what,
            });
        }
        let run = self.wanted(cluster..end)?;
        Ok(WantedRun {
            clusters: one,
            what: run.what,
        })
    }

    /// What a guest sees of a cluster through the old disk.
    pub fn read(&self, cluster: u64, bytes: &mut [u8]) -> Result<()> {
        assert!(
            to_usize(self.size.bytes()) == bytes.len(),
            "a whole cluster"
        );
        match self.below.old {
            Some(old) => old.read_padded(cluster << self.size.bits(), bytes),
            None => {
                bytes.fill(0);
                Ok(())
            }
        }
    }
}
