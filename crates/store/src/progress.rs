//! How a long operation tells where it is, and how it is stopped.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Where an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Bytes dealt with so far.
    pub done_bytes: u64,
    /// Bytes to deal with in all, as far as known; holes count as dealt with.
    pub total_bytes: u64,
}

type Callback = dyn Fn(Step) -> ControlFlow<()> + Send + Sync;

/// A listener for the steps of one operation. Answering [`ControlFlow::Break`] cancels it.
#[derive(Clone, Default)]
pub struct Progress {
    callback: Option<Arc<Callback>>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    cancelled: AtomicBool,
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress")
            .field("done_bytes", &self.state.done_bytes)
            .field("total_bytes", &self.state.total_bytes)
            .finish_non_exhaustive()
    }
}

impl Progress {
    /// No listener; the operation can still be cancelled with [`Progress::cancel`] from a clone.
    #[must_use]
    pub fn silent() -> Self {
        Self::default()
    }

    /// Calls `callback` after each step, from any thread of the operation.
    pub fn new(callback: impl Fn(Step) -> ControlFlow<()> + Send + Sync + 'static) -> Self {
        Self {
            callback: Some(Arc::new(callback)),
            state: Arc::default(),
        }
    }

    /// Makes the operation end with [`Error::Cancelled`] at its next step.
    pub fn cancel(&self) {
        self.state.cancelled.store(true, Ordering::Relaxed);
    }

    pub(crate) fn start(&self, total_bytes: u64) {
        self.state.done_bytes.store(0, Ordering::Relaxed);
        self.state.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    pub(crate) fn advance(&self, bytes: u64) -> Result<()> {
        let done = self.state.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.tell(done)
    }

    pub(crate) fn reach(&self, done_bytes: u64) -> Result<()> {
        self.state.done_bytes.store(done_bytes, Ordering::Relaxed);
        self.tell(done_bytes)
    }

    fn tell(&self, done_bytes: u64) -> Result<()> {
        let step = Step {
            done_bytes,
            total_bytes: self.state.total_bytes.load(Ordering::Relaxed),
        };
        let stop = match &self.callback {
            Some(callback) => callback(step).is_break(),
            None => false,
        };
        if stop || self.state.cancelled.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        Ok(())
    }
}
