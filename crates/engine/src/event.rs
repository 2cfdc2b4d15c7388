//! What an operation tells while it runs, and how it is told to stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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

/// Passes on what a merge tells. Its figures are those of the step that it told last.
#[derive(Debug)]
pub struct MergeEvents<'a> {
    watch: &'a Watch,
    job: &'static str,
    step: Mutex<String>,
}

impl<'a> MergeEvents<'a> {
    /// Of an operation that calls itself `job`.
    #[must_use]
    pub fn new(watch: &'a Watch, job: &'static str) -> Self {
        Self {
            watch,
            job,
            step: Mutex::default(),
        }
    }

    /// Passes one on.
    pub fn tell(&self, event: stead_merge::Event) {
        let mut now = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            stead_merge::Event::Step(step) => {
                *now = step.to_string();
                self.watch.step(self.job, now.clone());
            }
            stead_merge::Event::Progress { done, total } => self.watch.progress(&now, done, total),
            stead_merge::Event::Notice(text) => self.watch.notice(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_merge_are_those_of_the_step_that_it_is_in() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&told);
        let watch = Watch::new(move |event| sink.lock().expect("lock").push(event));
        let events = MergeEvents::new(&watch, "merge");
        let progress = |done| events.tell(stead_merge::Event::Progress { done, total: 9 });
        events.tell(stead_merge::Event::Step(stead_merge::Step::Commit));
        progress(1);
        events.tell(stead_merge::Event::Step(stead_merge::Step::Prove));
        progress(2);
        let told = told.lock().expect("lock");
        let figures = told.iter().filter_map(|event| match event {
            Event::Progress { what, done, .. } => Some((what.as_str(), *done)),
            Event::Step { .. } | Event::Notice { .. } => None,
        });
        assert_eq!(figures.collect::<Vec<_>>(), [("commit", 1), ("prove", 2)]);
    }
}
