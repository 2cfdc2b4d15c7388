//! What a caller sees and decides while a merge runs.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Kind, MergeError, Result};

/// A step of a merge, told when it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The chain is read and everything decided.
    Plan,
    /// A device is extended.
    Extend,
    /// What is going to be done is written down.
    Record,
    /// The lowest layer is copied, to be the new one.
    Copy,
    /// Data and bitmaps go into the base.
    Commit,
    /// The bitmaps are made in the base, in QEMU.
    Bitmaps,
    /// QEMU lets the layer above name the base.
    Finalize,
    /// The base is read back.
    Prove,
    /// A bitmap that broke is removed from a layer above.
    Void(PathBuf),
    /// The layer above names the base.
    Rewire(PathBuf),
    /// A merged layer is removed.
    Remove(PathBuf),
    /// The record is removed.
    Finish,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plan => write!(f, "plan"),
            Self::Extend => write!(f, "extend the device"),
            Self::Record => write!(f, "record"),
            Self::Copy => write!(f, "copy"),
            Self::Commit => write!(f, "commit"),
            Self::Bitmaps => write!(f, "bitmaps"),
            Self::Finalize => write!(f, "finalize"),
            Self::Prove => write!(f, "prove"),
            Self::Void(path) => write!(f, "remove broken bitmaps from {}", path.display()),
            Self::Rewire(path) => write!(f, "rewire {}", path.display()),
            Self::Remove(path) => write!(f, "remove {}", path.display()),
            Self::Finish => write!(f, "finish"),
        }
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
    /// Until the base is changed, the merge ends with [`Kind::Cancelled`] soon after this becomes true; later it
    /// goes on to its end, which is near.
    pub cancel: Option<&'a AtomicBool>,
}

impl fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("cancel", &self.cancel)
            .finish_non_exhaustive()
    }
}

impl Watch<'_> {
    pub(crate) fn step(&self, step: Step) {
        (self.tell)(Event::Step(step));
    }

    pub(crate) fn progress(&self, fraction: f64, total: u64) {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a part of the total, to look at"
        )]
        let done = (fraction.clamp(0.0, 1.0) * total as f64) as u64;
        (self.tell)(Event::Progress { done, total });
    }

    pub(crate) fn notice(&self, text: impl Into<String>) {
        (self.tell)(Event::Notice(text.into()));
    }

    /// An error when the caller wants the merge to end.
    pub(crate) fn go_on(&self) -> Result<()> {
        match self.cancel {
            Some(cancel) if cancel.load(Ordering::Relaxed) => {
                Err(MergeError::new(Kind::Cancelled, "merge", "interrupted")
                    .left("nothing was changed"))
            }
            Some(_) | None => Ok(()),
        }
    }
}
