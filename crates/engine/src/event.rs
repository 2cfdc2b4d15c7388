//! What an operation tells while it runs, and how it is told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::error::{EngineError, Kind, Result};

/// How often a wait looks whether it is still wanted.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// One thing that happened during an operation.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A step of the operation begins.
    Step {
        /// The operation, for instance `checkpoint`.
        job: String,
        /// The step, for instance `publish`.
        step: String,
    },
    /// Bytes of the current step.
    Progress {
        /// What is being moved.
        what: String,
        /// Bytes done.
        done: u64,
        /// Bytes in all, 0 when unknown.
        total: u64,
    },
    /// Something the caller should know that is no failure.
    Notice {
        /// The text.
        text: String,
    },
}

/// Where events go and where a wish to stop comes from.
#[derive(Clone)]
pub struct Watch {
    sink: Arc<dyn Fn(Event) + Send + Sync>,
    cancelled: Arc<AtomicBool>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("cancelled", &self.is_cancelled())
            .finish_non_exhaustive()
    }
}

impl Watch {
    /// Sends events to `sink`.
    pub fn new(sink: impl Fn(Event) + Send + Sync + 'static) -> Self {
        Self {
            sink: Arc::new(sink),
            cancelled: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Listens to nothing.
    #[must_use]
    pub fn silent() -> Self {
        Self::new(|_| {})
    }

    /// Asks the operation to stop at its next safe point and undo itself.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Whether somebody asked to stop.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Tells of an event.
    pub fn tell(&self, event: Event) {
        (self.sink)(event);
    }

    /// Tells something that is no failure.
    pub fn notice(&self, text: impl Into<String>) {
        self.tell(Event::Notice { text: text.into() });
    }

    /// Tells that a step of an operation begins that is no durable job.
    pub(crate) fn step(&self, job: &str, step: impl Into<String>) {
        self.tell(Event::Step {
            job: job.to_owned(),
            step: step.into(),
        });
    }

    /// The wish to stop itself, for work that looks at it without being told.
    #[must_use]
    pub fn wish_to_stop(&self) -> &AtomicBool {
        &self.cancelled
    }

    /// Tells how far something is, in bytes; a `total` of 0 is not known.
    pub fn progress(&self, what: &str, done: u64, total: u64) {
        self.tell(Event::Progress {
            what: what.to_owned(),
            done,
            total,
        });
    }

    /// Waits until somebody asks to stop.
    pub async fn cancelled(&self) {
        while !self.is_cancelled() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    pub(crate) fn check(&self, attempt: &str) -> Result<()> {
        if self.is_cancelled() {
            return Err(EngineError::new(Kind::Cancelled, attempt, "interrupted"));
        }
        Ok(())
    }
}
