//! Work in order: pieces of a disk are handed out to several threads, and placed in the order in which
//! they were handed out, so that the result does not depend on who was faster.
//!
//! A thread has one piece at a time and takes the next only when it is done, so the piece whose turn it is
//! is always being worked on: nobody waits for ever.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// A piece of the disk and its turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub turn: u64,
    pub range: Range<u64>,
}

/// What is next.
#[derive(Debug)]
struct Next {
    turn: u64,
    at: u64,
}

/// Hands out pieces; `find` says where from a position on there is something to do.
pub(crate) struct Queue<F> {
    next: Mutex<Next>,
    end: u64,
    step: u64,
    find: F,
}

impl<F: Fn(u64) -> Result<Option<u64>>> Queue<F> {
    /// Pieces of `step` bytes, a power of two, up to `end`.
    pub fn new(end: u64, step: u64, find: F) -> Self {
        assert!(
            step.is_power_of_two(),
            "pieces start at multiples of their length"
        );
        Self {
            next: Mutex::new(Next { turn: 0, at: 0 }),
            end,
            step,
            find,
        }
    }

    pub fn take(&self) -> Result<Option<Piece>> {
        let mut next = lock(&self.next);
        if next.at >= self.end {
            return Ok(None);
        }
        let found = (self.find)(next.at)?;
        let Some(found) = found.filter(|found| *found < self.end) else {
            next.at = self.end;
            return Ok(None);
        };
        let start = (found & !(self.step - 1)).max(next.at);
        let end = start.saturating_add(self.step).min(self.end);
        next.at = end;
        next.turn += 1;
        Ok(Some(Piece {
            turn: next.turn - 1,
            range: start..end,
        }))
    }
}

#[derive(Debug)]
struct Shared<T> {
    turn: u64,
    value: T,
    failed: Option<Error>,
    stopped: bool,
}

/// A value that is changed by one thread after the other, in turn.
#[derive(Debug)]
pub(crate) struct InTurn<T> {
    shared: Mutex<Shared<T>>,
    moved: Condvar,
}

impl<T> InTurn<T> {
    pub fn new(value: T) -> Self {
        Self {
            shared: Mutex::new(Shared {
                turn: 0,
                value,
                failed: None,
                stopped: false,
            }),
            moved: Condvar::new(),
        }
    }

    /// Waits for `turn` and changes the value; `None` when the work was stopped by an error elsewhere.
    pub fn take_turn<R>(
        &self,
        turn: u64,
        change: impl FnOnce(&mut T) -> Result<R>,
    ) -> Result<Option<R>> {
        let mut shared = lock(&self.shared);
        while shared.turn != turn && !shared.stopped {
            shared = self
                .moved
                .wait(shared)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if shared.stopped {
            return Ok(None);
        }
        let result = change(&mut shared.value)?;
        shared.turn += 1;
        self.moved.notify_all();
        Ok(Some(result))
    }

    /// Ends the work of all threads; the first error is kept.
    pub fn stop(&self, error: Error) {
        let mut shared = lock(&self.shared);
        shared.stopped = true;
        shared.failed.get_or_insert(error);
        self.moved.notify_all();
    }

    /// While this lives in a thread, a panic there ends the waiting of the others.
    pub fn guard(&self) -> Guard<'_, T> {
        Guard { order: self }
    }

    /// Whether the work was stopped.
    pub fn is_stopped(&self) -> bool {
        lock(&self.shared).stopped
    }

    /// The value at the end, or the first error.
    pub fn finish(self) -> Result<T> {
        let shared = self
            .shared
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        match shared.failed {
            Some(error) => Err(error),
            None => Ok(shared.value),
        }
    }
}

/// See [`InTurn::guard`].
pub(crate) struct Guard<'a, T> {
    order: &'a InTurn<T>,
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(&self.order.shared).stopped = true;
            self.order.moved.notify_all();
        }
    }
}

/// A panic of another thread is raised again by the scope that waits for it, so what it left does not
/// matter here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_lie_on_a_grid_and_skip_what_has_nothing_to_do() {
        let find = |at: u64| Ok((at < 5000).then(|| at.max(2500)));
        let queue = Queue::new(5500, 1024, find);
        let mut found = Vec::new();
        while let Some(piece) = queue.take().expect("no error") {
            found.push((piece.turn, piece.range));
        }
        let expected = [2048..3072, 3072..4096, 4096..5120];
        assert_eq!(found, (0..).zip(expected).collect::<Vec<_>>());
    }

    #[test]
    fn turns_are_taken_in_order_by_any_number_of_threads() {
        let order = InTurn::new(Vec::new());
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let order = &order;
                scope.spawn(move || {
                    for turn in (thread..100).step_by(4) {
                        order
                            .take_turn(turn, |all: &mut Vec<u64>| {
                                all.push(turn);
                                Ok(())
                            })
                            .expect("no error");
                    }
                });
            }
        });
        assert_eq!(
            order.finish().expect("no error"),
            (0..100).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_panic_ends_the_waiting_of_all() {
        let order = InTurn::new(());
        let panicked = std::thread::scope(|scope| {
            let panics = scope.spawn(|| {
                let _guard = order.guard();
                assert!(order.is_stopped(), "on purpose");
            });
            assert_eq!(order.take_turn(1, |()| Ok(1)).expect("stopped"), None);
            panics.join().is_err()
        });
        assert!(panicked);
    }

    #[test]
    fn an_error_ends_the_waiting_of_all() {
        let order = InTurn::new(());
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(order.take_turn(5, |()| Ok(1)).expect("stopped"), None));
            order.stop(Error::InvalidChain {
                reason: "test".into(),
            });
        });
        assert!(order.is_stopped());
        assert!(matches!(order.finish(), Err(Error::InvalidChain { .. })));
    }
}
