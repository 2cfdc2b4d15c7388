//! The proof of a backup: what it shows is read back, compared with the disk, and hashed.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use stead_qcow2::{Chain, Result};

use crate::content::{CHUNK_BYTES, Hashes, chunk_range, chunks_with_data};
use crate::event::Watch;

/// The most threads that read and hash.
const MAX_THREADS: usize = 4;

/// What comparing found.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Everything is alike; these are the hashes.
    Alike(Hashes),
    /// The first MiB in which something differs.
    Differs(Range<u64>),
    /// The caller wants it to end.
    Stopped,
}

/// Compares `backup` with `disk` in `chunks` and gives `known` with the hashes of those.
pub(crate) fn compare(
    disk: &Chain,
    backup: &Chain,
    chunks: &BTreeSet<usize>,
    known: Hashes,
    watch: Watch<'_>,
) -> Result<Outcome> {
    let with_data = &chunks_with_data(disk)? | &chunks_with_data(backup)?;
    let work: Vec<usize> = chunks.intersection(&with_data).copied().collect();
    let zeros = Hashes::of_zeros(disk.len());
    let mut hashes = known;
    for chunk in chunks.difference(&with_data) {
        hashes.set(*chunk, *zeros.get(*chunk));
    }
    let hashes = Mutex::new(hashes);
    let each = |chunk: usize, buffers: &mut [Vec<u8>; 2]| {
        let bytes = chunk_range(chunk, disk.len());
        for (side, buffer) in [disk, backup].into_iter().zip(buffers.iter_mut()) {
            read(side, &bytes, buffer)?;
        }
        if buffers[0] != buffers[1] {
            return Ok(false);
        }
        let hash = *blake3::hash(&buffers[1]).as_bytes();
        locked(&hashes).set(chunk, hash);
        Ok(true)
    };
    let found = for_all(&work, each, watch)?;
    let hashes = locked(&hashes).clone();
    Ok(match found {
        End::All => Outcome::Alike(hashes),
        End::At(chunk) => Outcome::Differs(chunk_range(chunk, disk.len())),
        End::Stopped => Outcome::Stopped,
    })
}

/// The first of `chunks` of `disk` that does not have its hash.
pub(crate) fn find_damage(
    disk: &Chain,
    chunks: &[usize],
    hashes: &Hashes,
    watch: Watch<'_>,
) -> Result<End> {
    let each = |chunk: usize, buffers: &mut [Vec<u8>; 2]| {
        let [buffer, _] = buffers;
        read(disk, &chunk_range(chunk, disk.len()), buffer)?;
        Ok(blake3::hash(buffer).as_bytes() == hashes.get(chunk))
    };
    for_all(chunks, each, watch)
}

fn read(disk: &Chain, bytes: &Range<u64>, buffer: &mut Vec<u8>) -> Result<()> {
    buffer.resize(
        usize::try_from(bytes.end - bytes.start).unwrap_or(usize::MAX),
        0,
    );
    disk.read_at(bytes.start, buffer)
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A thread that panicked ends the whole scope with its panic.
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How a walk over chunks ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    All,
    /// This chunk is not right.
    At(usize),
    Stopped,
}

/// Calls `each` for all chunks, from several threads, until one is not right.
fn for_all(
    chunks: &[usize],
    each: impl Fn(usize, &mut [Vec<u8>; 2]) -> Result<bool> + Sync,
    watch: Watch<'_>,
) -> Result<End> {
    let next = AtomicUsize::new(0);
    let ended = Mutex::new(Ok(End::All));
    let total = chunks.len() as u64 * CHUNK_BYTES;
    let walk = || {
        let mut buffers = [Vec::new(), Vec::new()];
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = chunks.get(index) else {
                break;
            };
            let end = match each(*chunk, &mut buffers) {
                Ok(true) if watch.wants_to_stop() => Ok(End::Stopped),
                Ok(true) => {
                    watch.progress((index as u64 + 1) * CHUNK_BYTES, total);
                    continue;
                }
                Ok(false) => Ok(End::At(*chunk)),
                Err(error) => Err(error),
            };
            next.store(chunks.len(), Ordering::Relaxed);
            note(&mut locked(&ended), end);
            break;
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..cores.clamp(1, MAX_THREADS) {
            scope.spawn(walk);
        }
    });
    ended
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An error counts more than damage, and damage more than a wish to stop; of damage, the lowest.
fn note(known: &mut Result<End>, new: Result<End>) {
    let worse = match (&*known, &new) {
        (Err(_), _) => false,
        (Ok(_), Err(_)) => true,
        (Ok(End::At(old)), Ok(End::At(new))) => new < old,
        (Ok(End::At(_)), Ok(End::All | End::Stopped)) => false,
        (Ok(End::All | End::Stopped), Ok(_)) => true,
    };
    if worse {
        *known = new;
    }
}
