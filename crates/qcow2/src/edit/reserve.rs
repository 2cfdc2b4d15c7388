//! Room for guest clusters that have none yet, taken before anybody writes to them.
//!
//! # Invariant
//! What is reserved reads as zeros: it lies behind the old end of the file, where a regular file has zeros, or zeros
//! are written to it.

use std::ops::Range;

use crate::error::Result;
use crate::header::to_usize;
use crate::make::Preallocation;
use crate::units::HostOffset;

use super::transaction::Edit;
use super::views::{Mapping, View};

/// How many bytes are reserved in a row, at most.
const RUN_BYTES: u64 = 64 << 20;
/// Zeros are written in pieces of this many bytes.
const ZEROS_BYTES: u64 = 1 << 20;

impl Edit<'_> {
    /// Gives each guest cluster of the active disk in `clusters`, which all read as zeros and have no room, one of
    /// its own.
    ///
    /// # Errors
    /// When the file would become too large, or a table or zeros cannot be written.
    pub(crate) fn reserve(&mut self, clusters: Range<u64>, mode: Preallocation) -> Result<()> {
        if mode == Preallocation::Off {
            return Ok(());
        }
        let most = (RUN_BYTES >> self.size().bits()).max(1);
        let mut at = clusters.start;
        while at < clusters.end {
            self.go_on()?;
            let count = most.min(clusters.end - at);
            let host = self.take_reserved(count, mode)?;
            self.make_zeros(host, count, mode)?;
            for index in 0..count {
                let host = HostOffset(host.0 + (index << self.size().bits()));
                self.set_mapping(View::Active, at + index, Mapping::Data { host })?;
            }
            at += count;
        }
        Ok(())
    }

    /// Takes clusters in a row. Those that stay holes need no room yet.
    fn take_reserved(&mut self, count: u64, mode: Preallocation) -> Result<HostOffset> {
        if mode != Preallocation::Metadata {
            return self.allocate(count);
        }
        let end = self.old.file_length() >> self.size().bits();
        self.allocate_holes(count, end)
    }

    fn make_zeros(&mut self, host: HostOffset, count: u64, mode: Preallocation) -> Result<()> {
        let end = host.0 + (count << self.size().bits());
        let old = match mode {
            Preallocation::Full => end,
            Preallocation::Off | Preallocation::Metadata | Preallocation::Falloc => {
                self.old.file_length().clamp(host.0, end)
            }
        };
        self.write_zeros(host.0..old)?;
        if mode == Preallocation::Falloc && old < end && !self.reserve_blocks(old..end)? {
            self.write_zeros(old..end)?;
        }
        Ok(())
    }

    /// Whether the file system keeps the room.
    fn reserve_blocks(&self, bytes: Range<u64>) -> Result<bool> {
        if self.is_plan() {
            return Ok(true);
        }
        let reserved = self.storage.reserve(bytes.start, bytes.end - bytes.start);
        reserved.map_err(self.io("reserve room in"))
    }

    fn write_zeros(&mut self, bytes: Range<u64>) -> Result<()> {
        let zeros = vec![0; to_usize(ZEROS_BYTES.min(bytes.end - bytes.start))];
        let mut at = bytes.start;
        while at < bytes.end {
            self.go_on()?;
            let step = to_usize(ZEROS_BYTES.min(bytes.end - at));
            self.write_data(HostOffset(at), &zeros[..step])?;
            at += ZEROS_BYTES;
        }
        Ok(())
    }
}
