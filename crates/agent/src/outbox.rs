//! Frames on their way to a port, bounded, written by one thread in the order they were put in.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::inbox::Inbox;

/// From how many waiting bytes on nobody should put in more. What is under way then (a chunk of output for
/// each stream, a few answers) still fits; nothing is lost.
const FULL_BYTES: usize = 256 * 1024;
/// From how many waiting bytes on the host is taken for one that asks and never reads. Commands stop at
/// [`FULL_BYTES`], so only answers to requests lead here.
const FLOODED_BYTES: usize = 1024 * 1024;

/// Frames on their way to one port.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Vec<u8>>,
    waiting_bytes: usize,
    writing: bool,
    closed: bool,
    // The command that waits for room.
    command: Option<Arc<Inbox>>,
}

impl Outbox {
    /// Puts a frame at the end; gone when the port is closed.
    pub(crate) fn put(&self, frame: Vec<u8>) {
        let mut state = self.lock();
        if !state.closed {
            state.waiting_bytes += frame.len();
            state.frames.push_back(frame);
            self.changed.notify_all();
        }
    }

    /// Forgets all that is not being written yet.
    pub(crate) fn purge(&self) {
        let mut state = self.lock();
        state.frames.clear();
        state.waiting_bytes = 0;
        self.changed.notify_all();
    }

    /// Whether more may be put in.
    pub(crate) fn has_room(&self) -> bool {
        let state = self.lock();
        state.closed || state.waiting_bytes < FULL_BYTES
    }

    /// Has the command's bell rung whenever there is room again.
    pub(crate) fn ring_for(&self, command: Arc<Inbox>) {
        self.lock().command = Some(command);
    }

    /// Whether the other side has read so little that it must not get more answers.
    pub(crate) fn is_flooded(&self) -> bool {
        self.lock().waiting_bytes > FLOODED_BYTES
    }

    /// Waits until all was written, the port is closed, or the time is over.
    pub(crate) fn wait_until_written(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        while !state.closed && (state.writing || !state.frames.is_empty()) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// No frame is taken or written any more.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.frames.clear();
        state.waiting_bytes = 0;
        if let Some(command) = state.command.take() {
            command.ring();
        }
        self.changed.notify_all();
    }

    /// Writes frames until the port is closed or cannot be written.
    pub(crate) fn write_to(&self, port: &mut impl Write) -> io::Result<()> {
        while let Some(frame) = self.next() {
            port.write_all(&frame)?;
            self.lock().writing = false;
            self.changed.notify_all();
        }
        Ok(())
    }

    fn next(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(frame) = state.frames.pop_front() {
                let was_full = state.waiting_bytes >= FULL_BYTES;
                state.waiting_bytes -= frame.len();
                state.writing = true;
                if was_full && state.waiting_bytes < FULL_BYTES {
                    if let Some(command) = &state.command {
                        command.ring();
                    }
                    self.changed.notify_all();
                }
                return Some(frame);
            }
            state = self.wait(state);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}
