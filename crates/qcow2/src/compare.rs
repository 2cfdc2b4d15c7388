//! Whether two disks have the same bytes, and where they first differ.

use std::path::Path;

use stead_sys::copy::is_zero;

use crate::chain::Chain;
use crate::control::Control;
use crate::error::Result;
use crate::header::{SECTOR_BYTES, to_u64, to_usize};
use crate::map::{MapEntries, MapEntry};

/// How many bytes of each disk are compared at a time.
const STEP_BYTES: u64 = 1 << 20;

/// What the first difference is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// The disks have different lengths (strict only).
    Length,
    /// One disk defines, or keeps room for, what the other does not (strict only).
    Status {
        /// The first such byte.
        at: u64,
    },
    /// The disks have different bytes.
    Content {
        /// The first such byte.
        at: u64,
        /// The start of its sector, which is what `qemu-img compare` tells.
        sector: u64,
    },
}

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Comparison {
    /// The disks' lengths in bytes.
    pub lengths: [u64; 2],
    /// The first difference; `None`: they are alike.
    pub difference: Option<Difference>,
}

impl Comparison {
    /// The lengths differ, but the longer disk is zeros from there on, and they were not compared strictly.
    #[must_use]
    pub fn only_lengths_differ(&self) -> bool {
        self.difference.is_none() && self.lengths[0] != self.lengths[1]
    }
}

/// Compares what a guest would read from two disks. `progress` is told how many bytes are done, and ends the
/// comparison with `false`.
///
/// Not strict: a shorter disk is as if zeros followed. Strict: lengths must be equal, and what one
/// disk defines (with data, with zeros, with a place in a file), the other must define in the same way.
/// Ranges that are zeros in both are not read. Memory: 2 MiB.
///
/// # Errors
/// When a disk cannot be read; see [`Chain::read_at`].
pub fn compare(
    a: &Chain,
    b: &Chain,
    strict: bool,
    mut progress: impl FnMut(u64) -> bool,
) -> Result<Option<Comparison>> {
    let lengths = [a.len(), b.len()];
    let found = |difference| {
        Ok(Some(Comparison {
            lengths,
            difference,
        }))
    };
    if strict && lengths[0] != lengths[1] {
        return found(Some(Difference::Length));
    }
    let mut sides = [Side::new(a), Side::new(b)];
    let mut buffers = [Vec::new(), Vec::new()];
    let end = a.len().max(b.len());
    let mut at = 0;
    while at < end {
        if !progress(at) {
            return Ok(None);
        }
        let kinds = [sides[0].kind_at(at)?, sides[1].kind_at(at)?];
        let length = kinds[0].end.min(kinds[1].end).min(end) - at;
        if strict && kinds[0].status != kinds[1].status {
            return found(Some(Difference::Status { at }));
        }
        let zero = [kinds[0].zero, kinds[1].zero];
        let step = if zero == [true, true] {
            length
        } else {
            length.min(STEP_BYTES)
        };
        if let Some(first) = compare_step(&[a, b], zero, at, step, &mut buffers)? {
            let sector = first - first % SECTOR_BYTES;
            return found(Some(Difference::Content { at: first, sector }));
        }
        at += step;
    }
    found(None)
}

/// As [`compare`], watched.
///
/// # Errors
/// As [`compare`]; [`Error::Cancelled`](crate::Error::Cancelled).
pub fn compare_with(
    a: &Chain,
    b: &Chain,
    strict: bool,
    control: &Control<'_>,
) -> Result<Comparison> {
    let all = a.len().max(b.len());
    let top = a.file(0).map_or(Path::new(""), |(path, _)| path);
    let mut wanted = Ok(());
    let found = compare(a, b, strict, |done| {
        control.tell(done, all);
        wanted = control.go_on(top);
        wanted.is_ok()
    })?;
    wanted?;
    let Some(found) = found else {
        unreachable!("it was not told to end early");
    };
    control.tell(1, 1);
    Ok(found)
}

/// What is known of a disk from some place to `end`.
struct Kind {
    end: u64,
    zero: bool,
    /// Defined, zero, data, with a place. Behind the end of a layer below the top, zeros are defined.
    status: [bool; 4],
}

/// A disk and the map entry that was last looked at.
struct Side<'a> {
    chain: &'a Chain,
    entries: MapEntries<'a>,
    entry: Option<MapEntry<'a>>,
}

impl<'a> Side<'a> {
    fn new(chain: &'a Chain) -> Self {
        Self {
            chain,
            entries: chain.map(0),
            entry: None,
        }
    }

    /// What is known from `at` on; behind the end, zeros. `at` never goes back.
    fn kind_at(&mut self, at: u64) -> Result<Kind> {
        if at >= self.chain.len() {
            return Ok(Kind {
                end: u64::MAX,
                zero: true,
                status: [false, true, false, false],
            });
        }
        loop {
            if let Some(entry) = self.entry
                && entry.start + entry.length > at
            {
                return Ok(Kind {
                    end: entry.start + entry.length,
                    zero: entry.zero,
                    status: [
                        entry.present || entry.depth + 1 < self.chain.depth(),
                        entry.zero,
                        entry.data,
                        entry.offset.is_some(),
                    ],
                });
            }
            self.entry = self.entries.next().transpose()?;
            assert!(self.entry.is_some(), "the map reaches to the disk's end");
        }
    }
}

/// The first byte from `at` on, in `length` bytes, that differs.
fn compare_step(
    chains: &[&Chain; 2],
    zero: [bool; 2],
    at: u64,
    length: u64,
    buffers: &mut [Vec<u8>; 2],
) -> Result<Option<u64>> {
    if zero == [true, true] {
        return Ok(None);
    }
    for ((chain, zero), buffer) in chains.iter().zip(zero).zip(buffers.iter_mut()) {
        buffer.resize(to_usize(length), 0);
        if !zero {
            chain.read_at(at, buffer)?;
        }
    }
    let [a, b] = buffers;
    let first = match zero {
        [false, false] => first_difference(a, b),
        [true, _] => first_nonzero(b),
        [_, true] => first_nonzero(a),
    };
    Ok(first.map(|first| at + first))
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<u64> {
    if a == b {
        return None;
    }
    a.iter().zip(b).position(|(a, b)| a != b).map(to_u64)
}

fn first_nonzero(bytes: &[u8]) -> Option<u64> {
    if is_zero(bytes) {
        return None;
    }
    bytes.iter().position(|byte| *byte != 0).map(to_u64)
}
