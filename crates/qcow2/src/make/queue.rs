//! Work in order: pieces of a disk are handed out to several threads, and placed in the order in which
//! they were handed out, so that the result does not depend on who was faster.
//!
//! The piece whose turn it is always has a buffer and a thread that works on it: nobody waits for ever.

use std::collections::BTreeMap;
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

    /// No further piece is handed out.
    pub fn stop(&self) {
        lock(&self.next).at = self.end;
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

/// What a thread is to do next.
#[derive(Debug)]
pub(crate) enum Task<C> {
    /// Take a piece and load it.
    Load(C),
    /// Write what was placed.
    Write(C),
    /// Nothing is left.
    Done,
}

#[derive(Debug)]
struct State<T, C> {
    value: T,
    /// Whose turn it is.
    turn: u64,
    free: Vec<C>,
    /// Loaded, and not yet placed.
    loaded: BTreeMap<u64, C>,
    /// Placed, and not yet written.
    placed: Vec<C>,
    /// How many are being loaded or written.
    busy: usize,
    /// No piece is left to be loaded.
    drained: bool,
    stopped: bool,
    failed: Option<Error>,
}

/// A number of buffers, each loaded by one thread, placed in turn, and written by one thread.
///
/// ```text
/// free ──▶ being loaded ──▶ loaded ──(its turn)──▶ placed ──▶ being written ──▶ free
/// ```
/// A thread that is slow, or that the system lets wait, keeps back only its own piece: the others load ahead
/// until all buffers are in use.
#[derive(Debug)]
pub(crate) struct Pipeline<T, C> {
    state: Mutex<State<T, C>>,
    moved: Condvar,
}

impl<T, C> Pipeline<T, C> {
    /// `value` is what pieces are placed into.
    pub fn new(value: T, buffers: Vec<C>) -> Self {
        assert!(!buffers.is_empty(), "work needs a buffer");
        Self {
            state: Mutex::new(State {
                value,
                turn: 0,
                free: buffers,
                loaded: BTreeMap::new(),
                placed: Vec::new(),
                busy: 0,
                drained: false,
                stopped: false,
                failed: None,
            }),
            moved: Condvar::new(),
        }
    }

    /// Waits until there is something to do. What is placed is written before more is loaded.
    pub fn next(&self) -> Task<C> {
        let mut state = lock(&self.state);
        loop {
            if state.stopped {
                return Task::Done;
            }
            let task = match state.placed.pop() {
                Some(buffer) => Some(Task::Write(buffer)),
                None if state.drained => None,
                None => state.free.pop().map(Task::Load),
            };
            if let Some(task) = task {
                state.busy += 1;
                return task;
            }
            if state.drained && state.busy == 0 {
                assert!(state.loaded.is_empty(), "every piece had its turn");
                return Task::Done;
            }
            state = self
                .moved
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A piece is loaded; it and those behind it are placed as far as it is their turn.
    pub fn loaded(
        &self,
        turn: u64,
        buffer: C,
        mut place: impl FnMut(&mut T, &mut C) -> Result<()>,
    ) -> Result<()> {
        let mut state = lock(&self.state);
        let state = &mut *state;
        state.busy -= 1;
        state.loaded.insert(turn, buffer);
        while let Some(mut buffer) = state.loaded.remove(&state.turn) {
            place(&mut state.value, &mut buffer)?;
            state.turn += 1;
            state.placed.push(buffer);
        }
        self.moved.notify_all();
        Ok(())
    }

    /// A buffer was written.
    pub fn written(&self, buffer: C) {
        let mut state = lock(&self.state);
        state.busy -= 1;
        state.free.push(buffer);
        self.moved.notify_all();
    }

    /// There was no piece left for a buffer.
    pub fn drained(&self, buffer: C) {
        lock(&self.state).drained = true;
        self.written(buffer);
    }

    /// Ends the work of all threads; the first error is kept.
    pub fn stop(&self, error: Error) {
        let mut state = lock(&self.state);
        state.stopped = true;
        state.failed.get_or_insert(error);
        self.moved.notify_all();
    }

    /// While this lives in a thread, a panic there ends the waiting of the others.
    pub fn guard(&self) -> Guard<'_, T, C> {
        Guard { pipeline: self }
    }

    /// The value at the end, or the first error.
    pub fn finish(self) -> Result<T> {
        let state = self
            .state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        match state.failed {
            Some(error) => Err(error),
            None => Ok(state.value),
        }
    }
}

/// See [`Pipeline::guard`].
pub(crate) struct Guard<'a, T, C> {
    pipeline: &'a Pipeline<T, C>,
}

impl<T, C> Drop for Guard<'_, T, C> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(&self.pipeline.state).stopped = true;
            self.pipeline.moved.notify_all();
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

    /// Works off `pieces` pieces with as many threads as there are buffers in all; what was placed, in order.
    fn work_off(pieces: u64, buffers: usize, fail_at: Option<u64>) -> Result<Vec<u64>> {
        let queue = Queue::new(pieces * 8, 8, |at| Ok(Some(at)));
        let pipeline = Pipeline::new(Vec::new(), vec![0_u64; buffers]);
        let work = || -> Result<()> {
            let _guard = pipeline.guard();
            loop {
                match pipeline.next() {
                    Task::Done => return Ok(()),
                    Task::Write(buffer) => pipeline.written(buffer),
                    Task::Load(mut buffer) => {
                        let Some(piece) = queue.take()? else {
                            pipeline.drained(buffer);
                            continue;
                        };
                        buffer = piece.range.start / 8;
                        assert!(fail_at != Some(buffer + 1000), "on purpose");
                        pipeline.loaded(piece.turn, buffer, |all, buffer| {
                            if fail_at == Some(*buffer) {
                                let reason = "on purpose".into();
                                return Err(Error::InvalidChain { reason });
                            }
                            all.push(*buffer);
                            Ok(())
                        })?;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..buffers {
                scope.spawn(|| {
                    if let Err(error) = work() {
                        pipeline.stop(error);
                    }
                });
            }
        });
        pipeline.finish()
    }

    #[test]
    fn pieces_are_placed_in_order_by_any_number_of_threads() {
        for buffers in [1, 2, 7] {
            let placed = work_off(500, buffers, None).expect("no error");
            assert_eq!(placed, (0..500).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_ends_the_waiting_of_all() {
        let error = work_off(500, 4, Some(77)).expect_err("failed");
        assert!(matches!(error, Error::InvalidChain { .. }), "{error}");
    }

    #[test]
    fn a_panic_ends_the_waiting_of_all() {
        let work = std::panic::catch_unwind(|| work_off(500, 4, Some(1077)));
        assert!(work.is_err(), "the scope raises it again");
    }
}
