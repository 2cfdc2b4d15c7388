//! Pieces of L2 tables kept in memory: a set number of bytes. One that was not used lately goes first.
//!
//! # How
//! The pieces stand in a queue. One that is used gets a mark; when room is needed, the first without a mark goes, and
//! those before it lose theirs and stand at the end again.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::header::to_u64;
use crate::units::HostOffset;

/// How many bytes of L2 tables a [`Layer`](crate::Layer) or a [`Chain`](crate::Chain) keeps in memory if nothing is said.
pub const DEFAULT_CACHE_BYTES: u64 = 64 << 20;
/// A table is read in slices of at most this many bytes, so that 2 MiB clusters fit too.
pub(crate) const SLICE_BYTES: u64 = 16 << 10;

/// A part of an L2 table, as words.
pub(crate) type Slice = Arc<[u64]>;

#[derive(Debug)]
struct Kept {
    slices: HashMap<HostOffset, (bool, Slice)>,
    /// The slices, the one that goes first in front.
    queue: VecDeque<HostOffset>,
    bytes: u64,
    limit_bytes: u64,
}

/// The slices kept, usable from several threads.
#[derive(Debug)]
pub(crate) struct SliceCache {
    kept: Mutex<Kept>,
}

impl Default for SliceCache {
    fn default() -> Self {
        Self {
            kept: Mutex::new(Kept {
                slices: HashMap::new(),
                queue: VecDeque::new(),
                bytes: 0,
                limit_bytes: DEFAULT_CACHE_BYTES,
            }),
        }
    }
}

impl SliceCache {
    /// Keeps at most this many bytes from now on; one slice is always kept.
    pub fn set_limit(&self, bytes: u64) {
        let mut kept = self.kept();
        kept.limit_bytes = bytes;
        kept.make_room(0);
    }

    /// The slice at `at`; `read` gets it when it is not there. Two threads may read the same one.
    pub fn get(&self, at: HostOffset, read: impl FnOnce() -> Result<Vec<u64>>) -> Result<Slice> {
        if let Some(slice) = self.kept().find(at) {
            return Ok(slice);
        }
        let slice: Slice = read()?.into();
        self.kept().keep(at, Arc::clone(&slice));
        Ok(slice)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // What is kept is right at every step, so a panic elsewhere does not spoil it.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bytes_of(slice: &Slice) -> u64 {
    to_u64(size_of_val::<[u64]>(slice))
}

impl Kept {
    fn find(&mut self, at: HostOffset) -> Option<Slice> {
        let (used, slice) = self.slices.get_mut(&at)?;
        *used = true;
        Some(Arc::clone(slice))
    }

    fn keep(&mut self, at: HostOffset, slice: Slice) {
        if self.slices.contains_key(&at) {
            return;
        }
        let bytes = bytes_of(&slice);
        self.make_room(bytes);
        self.bytes += bytes;
        self.slices.insert(at, (false, slice));
        self.queue.push_back(at);
    }

    /// Lets slices go until `bytes` more have room, or none is there.
    fn make_room(&mut self, bytes: u64) {
        while self.bytes.saturating_add(bytes) > self.limit_bytes {
            let Some(first) = self.queue.pop_front() else {
                return;
            };
            match self.slices.get_mut(&first) {
                Some((used, _)) if *used => {
                    *used = false;
                    self.queue.push_back(first);
                }
                Some(_) | None => {
                    let gone = self.slices.remove(&first);
                    self.bytes -= gone.map_or(0, |(_, slice)| bytes_of(&slice));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(n: u64) -> impl FnOnce() -> Result<Vec<u64>> {
        move || Ok(vec![n])
    }

    #[test]
    fn the_cache_never_holds_more_than_its_bound_and_keeps_what_is_used() {
        let cache = SliceCache::default();
        cache.set_limit(64 * 8);
        for n in 0..1000 {
            let slice = cache.get(HostOffset(n), word(n)).expect("read");
            assert_eq!(slice[0], n);
            let first = cache.get(HostOffset(0), word(77)).expect("kept");
            assert_eq!(first[0], 0, "the slice in use was dropped");
            let kept = cache.kept();
            assert_eq!(
                kept.slices.len(),
                64.min(usize::try_from(n).expect("small") + 1)
            );
            assert_eq!(kept.bytes, to_u64(kept.slices.len()) * 8);
            assert_eq!(kept.queue.len(), kept.slices.len());
        }
    }

    #[test]
    fn a_smaller_bound_lets_slices_go_and_one_slice_always_has_room() {
        let cache = SliceCache::default();
        for n in 0..100 {
            cache.get(HostOffset(n), word(n)).expect("read");
        }
        cache.set_limit(8 * 8);
        assert_eq!(cache.kept().slices.len(), 8);
        cache.set_limit(0);
        assert_eq!(cache.kept().slices.len(), 0);
        cache.get(HostOffset(1), word(1)).expect("read");
        assert_eq!(cache.get(HostOffset(1), word(2)).expect("kept")[0], 1);
        cache.get(HostOffset(2), word(2)).expect("read");
        assert_eq!(cache.kept().slices.len(), 1);
    }
}
