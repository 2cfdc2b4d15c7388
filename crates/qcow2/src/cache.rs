//! Pieces of L2 tables kept in memory: a set number of bytes, the least recently used piece goes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::units::HostOffset;

/// How many bytes of L2 tables one layer keeps.
pub(crate) const CACHE_BYTES: u64 = 1 << 20;
/// A table is read in slices of at most this many bytes, so that 2 MiB clusters fit too.
pub(crate) const SLICE_BYTES: u64 = 16 << 10;
const SLICES: usize = (CACHE_BYTES / SLICE_BYTES) as usize;

/// A part of an L2 table, as words.
pub(crate) type Slice = Arc<[u64]>;

#[derive(Debug, Default)]
struct Kept {
    slices: HashMap<HostOffset, (u64, Slice)>,
    clock: u64,
}

/// The slices kept, usable from several threads.
#[derive(Debug, Default)]
pub(crate) struct SliceCache {
    kept: Mutex<Kept>,
}

impl SliceCache {
    /// The slice at `at`; `read` gets it when it is not there. Two threads may read the same one.
    pub fn get(&self, at: HostOffset, read: impl FnOnce() -> Result<Vec<u64>>) -> Result<Slice> {
        if let Some(slice) = self.find(at) {
            return Ok(slice);
        }
        let slice: Slice = read()?.into();
        self.keep(at, Arc::clone(&slice));
        Ok(slice)
    }

    fn find(&self, at: HostOffset) -> Option<Slice> {
        // What is kept is right at every step, so a panic elsewhere does not spoil it.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clock += 1;
        let now = kept.clock;
        let (used, slice) = kept.slices.get_mut(&at)?;
        *used = now;
        Some(Arc::clone(slice))
    }

    fn keep(&self, at: HostOffset, slice: Slice) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.slices.len() >= SLICES {
            let oldest = kept.slices.iter().min_by_key(|(_, (used, _))| *used);
            if let Some(oldest) = oldest.map(|(at, _)| *at) {
                kept.slices.remove(&oldest);
            }
        }
        let now = kept.clock;
        kept.slices.insert(at, (now, slice));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_never_holds_more_than_its_bound_and_keeps_what_is_used() {
        let cache = SliceCache::default();
        let word = |n: u64| move || Ok(vec![n]);
        for n in 0..1000 {
            let slice = cache.get(HostOffset(n), word(n)).expect("read");
            assert_eq!(slice[0], n);
            let first = cache.get(HostOffset(0), word(77)).expect("kept");
            assert_eq!(first[0], 0, "the slice in use was dropped");
        }
        let kept = cache.kept.lock().expect("lock");
        assert_eq!(kept.slices.len(), SLICES);
    }
}
