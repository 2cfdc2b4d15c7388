//! Numbers that must not be mixed up: where the guest sees a byte, where the file holds it, and
//! the cluster, the unit both are counted in.

use std::fmt;

use serde::Serialize;

/// A byte offset in the virtual disk, as the guest sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct GuestOffset(pub u64);

/// A byte offset in the image file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct HostOffset(pub u64);

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest offset {:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host offset {:#x}", self.0)
    }
}

/// The size of a cluster: a power of two from 512 B to 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterSize {
    bits: u8,
}

impl ClusterSize {
    /// 512 bytes, the smallest cluster.
    pub const MIN: Self = Self { bits: 9 };
    /// 2 MiB, the largest cluster that QEMU opens.
    pub const MAX: Self = Self { bits: 21 };
    /// 64 KiB, what QEMU uses when nothing is said.
    pub const DEFAULT: Self = Self { bits: 16 };

    /// The size with `bits` address bits, the header's `cluster_bits`; `None` outside 9 to 21.
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Self> {
        let bits = u8::try_from(bits).ok()?;
        (Self::MIN.bits..=Self::MAX.bits)
            .contains(&bits)
            .then_some(Self { bits })
    }

    /// The size of `bytes` bytes; `None` when that is no power of two from 512 B to 2 MiB.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        bytes
            .is_power_of_two()
            .then(|| Self::from_bits(bytes.trailing_zeros()))
            .flatten()
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        1 << self.bits
    }

    /// The size in bytes, for memory.
    #[must_use]
    pub fn buffer_len(self) -> usize {
        1 << self.bits
    }

    /// The number of address bits in a cluster, 9 to 21.
    #[must_use]
    pub fn bits(self) -> u32 {
        u32::from(self.bits)
    }

    /// How far `offset` is from the start of its cluster, in bytes.
    #[must_use]
    pub fn offset_in(self, offset: u64) -> u64 {
        offset & (self.bytes() - 1)
    }

    /// The start of the cluster that holds `offset`.
    #[must_use]
    pub fn start_of(self, offset: u64) -> u64 {
        offset & !(self.bytes() - 1)
    }

    /// How many clusters hold `bytes` bytes.
    #[must_use]
    pub fn count_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }

    /// How many table entries of 8 bytes a cluster holds.
    #[must_use]
    pub fn words(self) -> u64 {
        self.bytes() / 8
    }
}

impl Default for ClusterSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Display for ClusterSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_from_512_bytes_to_2_mib_are_cluster_sizes() {
        for bits in 0..64 {
            let found = ClusterSize::from_bytes(1 << bits);
            assert_eq!(found.is_some(), (9..=21).contains(&bits), "{bits} bits");
        }
        assert_eq!(ClusterSize::from_bytes(0), None);
        assert_eq!(ClusterSize::from_bytes(65_535), None);
        assert_eq!(ClusterSize::from_bits(u32::MAX), None);
    }
}
