//! L1 and L2 table entries, decoded: what a table says about a piece of the virtual disk.
//!
//! # Source
//! QEMU's `docs/interop/qcow2`, sections *Cluster mapping* and *Extended L2 Entries*.

use crate::header::{Header, SECTOR_BYTES};
use crate::units::HostOffset;

/// Bit 63: the refcount of what the entry points to is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry: the cluster reads as zeros.
pub(crate) const ZERO: u64 = 1;
/// Bits 9 to 55: an offset in the file.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L1 entry that are neither offset nor flag.
const L1_RESERVED: u64 = !(OFFSET | COPIED);
/// Bits of a standard L2 entry that are neither offset nor flag.
const L2_RESERVED: u64 = !(OFFSET | COPIED | COMPRESSED | ZERO);
/// Subclusters in a cluster.
pub(crate) const SUBCLUSTERS: u64 = 32;

/// Why an entry is not valid.
pub(crate) type Invalid = &'static str;

/// An L2 table that an L1 entry points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct L1Entry {
    pub table: HostOffset,
    pub copied: bool,
}

impl L1Entry {
    /// `None`: there is no L2 table.
    pub fn decode(word: u64) -> Result<Option<Self>, Invalid> {
        if word & L1_RESERVED != 0 {
            return Err("reserved bits are set");
        }
        let table = HostOffset(word & OFFSET);
        Ok((table.0 != 0).then_some(Self {
            table,
            copied: word & COPIED != 0,
        }))
    }
}

/// Where the bytes of a compressed cluster lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressedCluster {
    /// The first byte of compressed data; not aligned.
    pub host: HostOffset,
    /// The most bytes it can have, to the end of its last sector. The file may end earlier.
    pub max_length: u64,
}

/// What a standard cluster, or a subcluster, is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standard {
    /// The layer below, or zeros, are seen.
    Unallocated,
    /// Reads as zeros.
    Zero,
    /// The data lies in the file.
    Data,
}

/// An L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum L2Entry {
    Compressed(CompressedCluster),
    /// A cluster with one state for all its bytes. `host` may be there without data (preallocated).
    Whole {
        state: Standard,
        host: Option<HostOffset>,
        copied: bool,
    },
    /// A cluster whose subclusters have a state each.
    Sub {
        bitmap: SubclusterBitmap,
        host: Option<HostOffset>,
        copied: bool,
    },
}

impl L2Entry {
    /// Decodes an entry; `bitmap` is its second word when the image has extended L2 entries.
    pub fn decode(header: &Header, word: u64, bitmap: u64) -> Result<Self, Invalid> {
        if word & COMPRESSED != 0 {
            return Self::compressed(header, word);
        }
        if word & L2_RESERVED != 0 {
            return Err("reserved bits are set");
        }
        let offset = HostOffset(word & OFFSET);
        let copied = word & COPIED != 0;
        // In a data file of its own, the first cluster of the disk lies at 0.
        let at_zero = header.external_data.is_some() && copied;
        let host = (offset.0 != 0 || at_zero).then_some(offset);
        if host.is_none() && copied {
            return Err("it is marked as allocated without an offset");
        }
        if header.extended_l2 {
            if word & ZERO != 0 {
                return Err("the zero flag is set in an extended entry");
            }
            let bitmap = SubclusterBitmap::decode(bitmap, host)?;
            return Ok(Self::Sub {
                bitmap,
                host,
                copied,
            });
        }
        let zero = word & ZERO != 0;
        if zero && header.version < 3 {
            return Err("the zero flag is set in a version 2 image");
        }
        let state = match (zero, host) {
            (true, _) => Standard::Zero,
            (false, Some(_)) => Standard::Data,
            (false, None) => Standard::Unallocated,
        };
        Ok(Self::Whole {
            state,
            host,
            copied,
        })
    }

    fn compressed(header: &Header, word: u64) -> Result<Self, Invalid> {
        if header.external_data.is_some() {
            return Err("a cluster in an external data file is compressed");
        }
        if word & COPIED != 0 {
            return Err("a compressed cluster is marked as having refcount one");
        }
        let size_bits = header.cluster_size.bits() - 8;
        let offset_bits = 62 - size_bits;
        let offset = word & ((1 << offset_bits) - 1);
        if offset >= 1 << 56 {
            return Err("reserved bits are set");
        }
        let sectors = ((word >> offset_bits) & ((1 << size_bits) - 1)) + 1;
        Ok(Self::Compressed(CompressedCluster {
            host: HostOffset(offset),
            max_length: sectors * SECTOR_BYTES - offset % SECTOR_BYTES,
        }))
    }
}

/// The second word of an extended L2 entry: one bit a subcluster for data, one for zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SubclusterBitmap {
    data: u32,
    zero: u32,
}

impl SubclusterBitmap {
    fn decode(word: u64, host: Option<HostOffset>) -> Result<Self, Invalid> {
        let [zero, data] = [word >> 32, word & u64::from(u32::MAX)];
        let bitmap = match (u32::try_from(data), u32::try_from(zero)) {
            (Ok(data), Ok(zero)) => Self { data, zero },
            _ => unreachable!("each is half of a word"),
        };
        if bitmap.data & bitmap.zero != 0 {
            return Err("a subcluster is both data and zeros");
        }
        if bitmap.data != 0 && host.is_none() {
            return Err("a subcluster has data, but the cluster has no offset");
        }
        Ok(bitmap)
    }

    /// The subclusters with data and those of zeros, a bit each, the first in bit 0.
    pub fn parts(self) -> (u32, u32) {
        (self.data, self.zero)
    }

    /// How many subclusters there are up to the last one with data.
    pub fn data_end(self) -> u64 {
        u64::from(u32::BITS - self.data.leading_zeros())
    }

    /// The state of subcluster `index`, 0 to 31.
    pub fn state(self, index: u64) -> Standard {
        assert!(index < SUBCLUSTERS, "a cluster has 32 subclusters");
        let bit = 1_u32 << index;
        if self.data & bit != 0 {
            Standard::Data
        } else if self.zero & bit != 0 {
            Standard::Zero
        } else {
            Standard::Unallocated
        }
    }
}
