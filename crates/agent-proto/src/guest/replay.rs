//! The last bytes of an output stream, counted from the stream's beginning.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::message::Kept;

/// What is kept of each output of the first [`LARGE_COMMANDS`] commands.
pub(super) const LARGE_BYTES: usize = 64 * 1024;
/// How many commands keep that much at once.
pub(super) const LARGE_COMMANDS: usize = 16;
/// What is kept of each output of any other command.
pub(super) const SMALL_BYTES: usize = 2 * 1024;
/// What is kept of the outputs of all commands that have ended.
pub(super) const ENDED_BYTES: usize = 1024 * 1024;

// 4 MiB for at most 256 commands, whatever they write.
const _: () = assert!(
    LARGE_COMMANDS * 2 * LARGE_BYTES + 256 * 2 * SMALL_BYTES + ENDED_BYTES <= 4 * 1024 * 1024
);

/// The last bytes of an output stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Replay {
    data: VecDeque<u8>,
    // How many bytes came before the first of `data`.
    first: u64,
    capacity: usize,
}

impl Replay {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            data: VecDeque::new(),
            first: 0,
            capacity,
        }
    }

    /// Whether its counts can be: none is larger than what may be kept, or so large that it could not go on.
    pub(super) fn is_sound(&self) -> bool {
        self.capacity <= LARGE_BYTES && self.first <= u64::MAX / 2
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(super) fn len(&self) -> usize {
        self.data.len()
    }

    /// How many bytes the stream has had.
    pub(super) fn end(&self) -> u64 {
        self.first + self.data.len() as u64
    }

    pub(super) fn kept(&self) -> Kept {
        Kept {
            first: self.first,
            end: self.end(),
        }
    }

    /// Adds at the end; the oldest are dropped and counted when it is full, but none from `needed` on.
    pub(super) fn push(&mut self, bytes: &[u8], needed: u64) {
        self.data.extend(bytes);
        let unneeded = usize::try_from(needed.saturating_sub(self.first)).unwrap_or(usize::MAX);
        let over = self.data.len().saturating_sub(self.capacity).min(unneeded);
        self.data.drain(..over);
        self.first += over as u64;
    }

    /// Up to `bytes` bytes from the place `from` on.
    ///
    /// # Panics
    /// When what is at `from` is not kept any more: a fault of the caller.
    pub(super) fn read(&self, from: u64, bytes: usize) -> Vec<u8> {
        assert!(from >= self.first, "what is not kept any more is read");
        let skip = usize::try_from(from - self.first).unwrap_or(usize::MAX);
        let (front, back) = self.data.as_slices();
        let mut out = Vec::with_capacity(bytes);
        let head = front.get(skip..).unwrap_or_default();
        out.extend_from_slice(&head[..head.len().min(bytes)]);
        let tail = back
            .get(skip.saturating_sub(front.len())..)
            .unwrap_or_default();
        let left = bytes - out.len();
        out.extend_from_slice(&tail[..tail.len().min(left)]);
        out
    }

    /// Drops all that is kept; the count goes on.
    pub(super) fn clear(&mut self) {
        self.first = self.end();
        self.data = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_kept_is_the_end_of_what_was_written(
            writes in prop::collection::vec(0usize..40, 0..30), at in 0usize..200, length in 1usize..50
        ) {
            let mut replay = Replay::new(64);
            let mut all = Vec::new();
            for write in writes {
                let data: Vec<u8> = (0..write).map(|byte| (all.len() + byte) as u8).collect();
                replay.push(&data, u64::MAX);
                all.extend(data);
            }
            let kept = replay.kept();
            prop_assert_eq!(kept.end, all.len() as u64);
            prop_assert_eq!(kept.first, all.len().saturating_sub(64) as u64);
            let from = (kept.first as usize + at).min(all.len());
            let end = (from + length).min(all.len());
            prop_assert_eq!(replay.read(from as u64, length), &all[from..end]);
        }
    }
}
