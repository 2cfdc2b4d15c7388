//! What a caller sees and decides while an operation of several steps runs.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::control::Control;
use crate::failure::{Failure, FailureKind};

/// Something that is told; `S` is a step of the operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<S> {
    /// A step begins.
    Step(S),
    /// Bytes of the step.
    Progress {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Something the caller should know that is no failure.
    Notice(String),
}

/// Where events go, and where a wish to stop comes from.
pub struct Watch<'a, S> {
    /// Is told what happens.
    pub tell: &'a (dyn Fn(Event<S>) + Sync),
    /// Until what cannot be taken back has begun, the operation ends with [`FailureKind::Cancelled`] soon after this becomes
    /// true; later it goes on to its end, which is near.
    pub cancel: Option<&'a AtomicBool>,
}

impl<S> Clone for Watch<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Watch<'_, S> {}

impl<S> fmt::Debug for Watch<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("cancel", &self.cancel)
            .finish_non_exhaustive()
    }
}

impl<'a, S> Watch<'a, S> {
    /// Tells that a step begins.
    pub fn step(&self, step: S) {
        (self.tell)(Event::Step(step));
    }

    /// Tells what is no failure.
    pub fn notice(&self, text: impl Into<String>) {
        (self.tell)(Event::Notice(text.into()));
    }

    /// Tells how many bytes of the step are done.
    pub fn progress(&self, done: u64, total: u64) {
        (self.tell)(Event::Progress { done, total });
    }

    /// Tells which part of `total` bytes is done, from 0.0 to 1.0.
    pub fn progress_of(&self, fraction: f64, total: u64) {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a part of the total, to look at"
        )]
        let done = (fraction.clamp(0.0, 1.0) * total as f64) as u64;
        self.progress(done, total);
    }

    /// Whether the caller wants it to end.
    #[must_use]
    pub fn wants_to_stop(&self) -> bool {
        self.cancel
            .is_some_and(|cancel| cancel.load(Ordering::Relaxed))
    }

    /// Goes on with `attempt`, which has changed nothing yet.
    ///
    /// # Errors
    /// [`FailureKind::Cancelled`] when the caller wants it to end.
    pub fn go_on(&self, attempt: &str) -> Result<(), Failure> {
        match self.wants_to_stop() {
            true => Err(Failure::new(FailureKind::Cancelled, attempt, "interrupted")),
            false => Ok(()),
        }
    }

    /// The same for one call of this crate, which tells fractions.
    pub fn control(&self, progress: &'a (dyn Fn(f64) + Sync)) -> Control<'a> {
        Control {
            cancel: self.cancel,
            progress: Some(progress),
        }
    }
}
