//! Pieces of work, handed out to threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Below this many bytes, one thread is faster.
pub const ALONE_BYTES: u64 = 8 << 20;
/// The most threads.
const MAX_THREADS: usize = 4;

/// Does `work` for each of `pieces`, which together move `bytes`: few by the calling thread alone and in order, more
/// by several threads, each with an `own` value of its own. After the first error no further piece is begun.
///
/// # Errors
/// The error of a piece.
pub fn spread<T, Own, E: Send>(
    bytes: u64,
    pieces: impl Iterator<Item = T> + Send,
    own: impl Fn() -> Own + Sync,
    work: impl Fn(&mut Own, T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let failed = AtomicBool::new(false);
    let queue = Mutex::new(pieces);
    let next = || match failed.load(Ordering::Relaxed) {
        true => None,
        false => queue.lock().unwrap_or_else(PoisonError::into_inner).next(),
    };
    let work = || {
        let mut own = own();
        while let Some(piece) = next() {
            if let Err(error) = work(&mut own, piece) {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    };
    if bytes < ALONE_BYTES {
        return work();
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.clamp(2, MAX_THREADS))
            .map(|_| scope.spawn(work))
            .collect();
        let mut result = work();
        for other in others {
            let ended = other.join();
            result = result.and(ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_piece_is_done_once_whether_by_one_thread_or_by_several() {
        for bytes in [ALONE_BYTES - 1, ALONE_BYTES] {
            let done = Mutex::new(Vec::new());
            let outcome = spread(bytes, 0..1000, Vec::new, |own, piece| {
                own.push(piece);
                done.lock().expect("not poisoned").push(piece);
                Ok::<(), ()>(())
            });
            outcome.expect("done");
            let done = done.into_inner().expect("not poisoned");
            assert_eq!(done.len(), 1000);
            assert_eq!(done.into_iter().collect::<BTreeSet<_>>().len(), 1000);
        }
    }

    #[test]
    fn after_an_error_no_further_piece_is_begun() {
        let begun = Mutex::new(0);
        let outcome = spread(
            u64::MAX,
            0..1_000_000,
            || (),
            |(), _| {
                *begun.lock().expect("not poisoned") += 1;
                Err("failed")
            },
        );
        assert_eq!(outcome, Err("failed"));
        let begun = begun.into_inner().expect("not poisoned");
        assert!((1..=MAX_THREADS).contains(&begun), "{begun}");
    }
}
