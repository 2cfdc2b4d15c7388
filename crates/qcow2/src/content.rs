//! What a disk shows, as one hash: the same for any two files that a guest cannot tell apart.
//!
//! # How
//! The disk is cut into pieces of 1 MiB. Of each piece that has a byte other than zero, in order, the piece's number
//! (8 bytes, big-endian) and its BLAKE3 hash go into one more BLAKE3, in its key derivation mode with the context
//! [`CONTEXT`]; the disk's length in bytes (8 bytes, big-endian) comes last. So holes, zero clusters and written
//! zeros are alike, and what a disk does not have takes no time.

use std::sync::atomic::{AtomicUsize, Ordering};

use stead_sys::copy::is_zero;

use crate::chain::Chain;
use crate::control::Control;
use crate::error::Result;
use crate::header::{to_u64, to_usize};

/// Sets this hash apart from every other one.
const CONTEXT: &str = "steadfast qcow2, content of a disk, version 1";
/// Bytes of a piece.
const PIECE_BYTES: u64 = 1 << 20;
/// How many pieces are handed out to threads at once.
const BATCH_PIECES: usize = 256;
/// The most threads; each has a piece in memory.
const MAX_THREADS: usize = 4;

/// The length and the hash of what a disk shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskContent {
    /// The disk's length in bytes.
    pub length: u64,
    /// The hash over all of it; see the module.
    pub hash: [u8; 32],
}

/// A piece that is not all zeros, and its hash.
type Hashed = (u64, blake3::Hash);

impl DiskContent {
    /// Reads all of `disk` that may be other than zeros, and hashes it.
    ///
    /// # Errors
    /// [`crate::Error::Cancelled`]; or when the disk cannot be read.
    pub fn of(disk: &Chain, control: &Control<'_>) -> Result<Self> {
        let length = disk.len();
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        let mut at = 0;
        while at < length {
            let pieces = next_pieces(disk, &mut at)?;
            for (piece, hash) in hash_pieces(disk, &pieces, control)? {
                hasher.update(&piece.to_be_bytes());
                hasher.update(hash.as_bytes());
            }
            control.tell(at, length);
        }
        hasher.update(&length.to_be_bytes());
        Ok(Self {
            length,
            hash: *hasher.finalize().as_bytes(),
        })
    }
}

/// The numbers of the next pieces at or after `at` that may be other than zeros; `at` goes behind them.
fn next_pieces(disk: &Chain, at: &mut u64) -> Result<Vec<u64>> {
    let mut pieces = Vec::new();
    while pieces.len() < BATCH_PIECES {
        let Some(data) = disk.first_data(*at)? else {
            *at = disk.len();
            break;
        };
        pieces.push(data / PIECE_BYTES);
        *at = (data / PIECE_BYTES + 1).saturating_mul(PIECE_BYTES);
    }
    Ok(pieces)
}

/// Those of `pieces` that are not all zeros, in order.
fn hash_pieces(disk: &Chain, pieces: &[u64], control: &Control<'_>) -> Result<Vec<Hashed>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut found = Vec::new();
        let mut buffer = vec![0; to_usize(PIECE_BYTES)];
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Some((path, _)) = disk.file(0) {
                control.go_on(path)?;
            }
            found.extend(hash_piece(disk, *piece, &mut buffer)?);
        }
        Ok(found)
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(MAX_THREADS).min(pieces.len().max(1));
    let mut found = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut found: Result<Vec<Hashed>> = work();
        for other in others {
            let theirs = other.join();
            let theirs = theirs.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            found = found.and_then(|mut found| {
                found.extend(theirs?);
                Ok(found)
            });
        }
        found
    })?;
    found.sort_unstable_by_key(|(piece, _)| *piece);
    Ok(found)
}

fn hash_piece(disk: &Chain, piece: u64, buffer: &mut [u8]) -> Result<Option<Hashed>> {
    let start = piece * PIECE_BYTES;
    let length = to_u64(buffer.len()).min(disk.len() - start);
    let bytes = &mut buffer[..to_usize(length)];
    disk.read_at(start, bytes)?;
    Ok((!is_zero(bytes)).then(|| (piece, blake3::hash(bytes))))
}
