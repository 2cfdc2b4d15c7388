//! Data that is written in place while an image is in progress, and read back before it is switched.
//!
//! ```text
//! marked ──all ranges written──▶ ──synced, and meanwhile read back and compared──▶ first sector
//! ```
//! # Invariants
//! * Every range can be written again: what it gets is read from files that do not change before the switch. So the
//!   order in which threads write them means nothing.
//! * Nothing is compared before all is written: a write that went to the place of another one is found.
//! * The first sector follows only when everything is synced and everything was found again.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stead_sys::spread::{ALONE_BYTES, spread};
use stead_sys::storage::Storage;

use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::header::to_usize;
use crate::units::{GuestOffset, HostOffset};

use super::in_place::{InPlaceRange, Journal};
use super::switch::Switch;

/// How many bytes one step moves.
const STEP_BYTES: u64 = 1 << 20;
/// Whenever so many bytes more were written, one thread has them put on the disk while the others go on.
const WRITTEN_OUT_BYTES: u64 = 64 << 20;

impl Switch<'_> {
    /// Writes what is to be written in place, and gives the disk that it comes from. Nothing is synced for good.
    pub fn redo(&self, journal: &Journal) -> Result<Option<Chain>> {
        let chain = self.sources(journal);
        let chain = chain.map_err(|error| self.unrecoverable(error.to_string()))?;
        let to = self.written_to();
        if let Some(target) = &journal.target {
            let length = to.len().map_err(self.failed("asking for the length"))?;
            if length != target.length {
                let set = to.set_len(target.length);
                set.map_err(self.failed("setting the length of the other file"))?;
            }
        }
        if let Some(chain) = &chain {
            self.write_ranges(journal, chain)?;
        }
        assert!(
            chain.is_some() || journal.ranges.is_empty(),
            "ranges have sources"
        );
        Ok(chain)
    }

    fn write_ranges(&self, journal: &Journal, sources: &Chain) -> Result<()> {
        let to = self.written_to();
        let written = AtomicU64::new(0);
        let steps = journal.ranges.iter().flat_map(steps);
        spread(moved_bytes(journal), steps, buffer, |buffer, step| {
            let bytes = &mut buffer[..to_usize(step.length)];
            self.read_source(sources, step, bytes)?;
            let put = to.write_all_at(bytes, step.host.0);
            put.map_err(self.failed("a write"))?;
            self.tell(step.length);
            let before = written.fetch_add(step.length, Ordering::Relaxed);
            if before / WRITTEN_OUT_BYTES < (before + step.length) / WRITTEN_OUT_BYTES {
                to.sync().map_err(self.failed("a sync"))?;
            }
            Ok(())
        })
    }

    /// Syncs all that was written, and reads what was written in place back; how many bytes those were. Little data
    /// is read when the sync has ended, much of it meanwhile.
    pub fn settle(&self, journal: &Journal, sources: Option<&Chain>) -> Result<u64> {
        let bytes = moved_bytes(journal);
        let verify = || match sources {
            Some(sources) => self.verify(journal, sources),
            None => Ok(()),
        };
        if bytes < ALONE_BYTES {
            self.sync_both()?;
            verify()?;
            return Ok(bytes);
        }
        std::thread::scope(|scope| {
            let syncing = scope.spawn(|| self.sync_both());
            let verified = verify();
            let synced = syncing.join();
            synced.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            verified
        })?;
        Ok(bytes)
    }

    fn sync_both(&self) -> Result<()> {
        if let Some(target) = self.target {
            target.sync().map_err(self.failed("a sync"))?;
        }
        self.sync()
    }

    /// Reads back what was written in place, while the image is still in progress, so that a recovery can write it
    /// again.
    fn verify(&self, journal: &Journal, sources: &Chain) -> Result<()> {
        let to = self.written_to();
        let steps = journal.ranges.iter().flat_map(steps);
        let buffers = || (buffer(), buffer());
        spread(moved_bytes(journal), steps, buffers, |buffers, step| {
            let (expected, found) = buffers;
            let length = to_usize(step.length);
            self.read_source(sources, step, &mut expected[..length])?;
            let read = to.read_exact_at(&mut found[..length], step.host.0);
            read.map_err(self.failed("reading data back"))?;
            if found[..length] != expected[..length] {
                return Err(self.lost(journal, step));
            }
            self.tell(step.length);
            Ok(())
        })
    }

    /// The file that the ranges lie in.
    fn written_to(&self) -> &Arc<dyn Storage> {
        self.target.unwrap_or(self.storage)
    }

    fn read_source(&self, sources: &Chain, step: InPlaceRange, bytes: &mut [u8]) -> Result<()> {
        let read = sources.read_at(step.guest.0, bytes);
        read.map_err(|error| self.unrecoverable(error.to_string()))
    }

    fn lost(&self, journal: &Journal, step: InPlaceRange) -> Error {
        let path = journal.target.as_ref().map_or(self.path, |to| &to.path);
        let text = format!(
            "the {} bytes at {} of {} are not those that were written; the storage is faulty",
            step.length,
            step.host,
            path.display()
        );
        self.failed("reading data back")(io::Error::new(io::ErrorKind::InvalidData, text))
    }

    fn tell(&self, bytes: u64) {
        if let Some(moving) = self.moving {
            moving.moved(bytes);
        }
    }
}

fn buffer() -> Vec<u8> {
    vec![0; to_usize(STEP_BYTES)]
}

/// How many bytes are written in place.
fn moved_bytes(journal: &Journal) -> u64 {
    let lengths = journal.ranges.iter().map(|range| range.length);
    lengths.fold(0, u64::saturating_add)
}

/// A range in pieces that are moved at once.
fn steps(range: &InPlaceRange) -> impl Iterator<Item = InPlaceRange> + use<> {
    let range = *range;
    let starts = (0..range.length).step_by(to_usize(STEP_BYTES));
    starts.map(move |start| InPlaceRange {
        guest: GuestOffset(range.guest.0 + start),
        host: HostOffset(range.host.0 + start),
        length: STEP_BYTES.min(range.length - start),
    })
}
