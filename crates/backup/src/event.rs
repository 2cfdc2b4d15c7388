//! What a caller sees and decides while a backup runs.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use stead_qcow2::Control;

use crate::error::{BackupError, Kind, Result};

/// A step of a backup or a restore, told when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The disk and its bitmaps are read and everything decided.
    Plan,
    /// The content is written.
    Copy,
    /// What was written is read back.
    Prove,
    /// The hashes of the content are written.
    Hashes,
    /// The record is written: from here on there is a backup.
    Record,
    /// The new bitmap takes the place of the old one.
    Bitmap,
    /// The restored disk gets its name.
    Publish,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plan => "plan",
            Self::Copy => "copy",
            Self::Prove => "read back",
            Self::Hashes => "write the hashes",
            Self::Record => "record",
            Self::Bitmap => "begin the next bitmap",
            Self::Publish => "publish",
        })
    }
}

/// Something that is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A step begins.
    Step(Step),
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
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Is told what happens.
    pub tell: &'a (dyn Fn(Event) + Sync),
    /// Until the record is written, the backup ends with [`Kind::Cancelled`] soon after this becomes true.
    pub cancel: Option<&'a AtomicBool>,
}

impl fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("cancel", &self.cancel)
            .finish_non_exhaustive()
    }
}

impl<'a> Watch<'a> {
    pub(crate) fn step(&self, step: Step) {
        (self.tell)(Event::Step(step));
    }

    pub(crate) fn notice(&self, text: impl Into<String>) {
        (self.tell)(Event::Notice(text.into()));
    }

    pub(crate) fn progress(&self, done: u64, total: u64) {
        (self.tell)(Event::Progress { done, total });
    }

    pub(crate) fn wants_to_stop(&self) -> bool {
        self.cancel
            .is_some_and(|cancel| cancel.load(Ordering::Relaxed))
    }

    /// An error when the caller wants it to end.
    pub(crate) fn go_on(&self, attempt: &str) -> Result<()> {
        match self.wants_to_stop() {
            true => Err(BackupError::new(Kind::Cancelled, attempt, "interrupted")),
            false => Ok(()),
        }
    }

    /// The same for the qcow2 engine, which tells fractions.
    pub(crate) fn control(&self, progress: &'a (dyn Fn(f64) + Sync)) -> Control<'a> {
        Control {
            cancel: self.cancel,
            progress: Some(progress),
        }
    }
}
