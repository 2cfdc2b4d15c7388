//! How far an operation is, and the wish that it end.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How far an operation is, in bytes of the file it reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Done so far.
    pub done: u64,
    /// How much there is; 0 where nobody knows.
    pub total: u64,
}

/// What the caller hears of an operation and can say to it. Clones share the wish to end.
#[derive(Clone)]
pub struct Control {
    tell: Arc<dyn Fn(Progress) + Send + Sync>,
    cancelled: Arc<AtomicBool>,
}

impl Control {
    /// Tells `tell` about once a mebibyte how far it is.
    pub fn new(tell: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self {
            tell: Arc::new(tell),
            cancelled: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Tells nobody.
    #[must_use]
    pub fn silent() -> Self {
        Self::new(|_progress| {})
    }

    /// Asks the operation to end with [`crate::Kind::Cancelled`]; what it has begun is then removed.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether [`Control::cancel`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(crate) fn tell(&self, done: u64, total: u64) {
        (self.tell)(Progress { done, total });
    }

    /// As an I/O error, for what runs inside a compressor.
    pub(crate) fn check(&self) -> std::io::Result<()> {
        if self.is_cancelled() {
            return Err(std::io::Error::other(Cancelled));
        }
        Ok(())
    }
}

/// The caller asked for the end.
#[derive(Debug, thiserror::Error)]
#[error("cancelled")]
pub(crate) struct Cancelled;

/// Whether an I/O error is only the caller's wish, wherever it passed through.
pub(crate) fn is_cancelled(error: &std::io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Cancelled>())
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cancelled = self.is_cancelled();
        f.debug_struct("Control")
            .field("cancelled", &cancelled)
            .finish_non_exhaustive()
    }
}
