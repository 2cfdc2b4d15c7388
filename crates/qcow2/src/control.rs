//! What a caller sees and decides while something long runs.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result};

/// How far an operation is, from 0.0 to 1.0; called from any of its threads, and not too often.
pub type Progress<'a> = &'a (dyn Fn(f64) + Sync);

/// Progress and cancellation of a long operation.
#[derive(Clone, Copy, Default)]
pub struct Control<'a> {
    /// The operation ends with [`Error::Cancelled`] soon after this becomes true.
    pub cancel: Option<&'a AtomicBool>,
    /// Is told how far the operation is.
    pub progress: Option<Progress<'a>>,
}

impl std::fmt::Debug for Control<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("cancel", &self.cancel)
            .field("progress", &self.progress.is_some())
            .finish()
    }
}

impl Control<'_> {
    /// An error when the caller wants the operation on `path` to end.
    pub(crate) fn go_on(&self, path: &Path) -> Result<()> {
        match self.cancel {
            Some(cancel) if cancel.load(Ordering::Relaxed) => Err(Error::Cancelled {
                path: path.to_owned(),
            }),
            Some(_) | None => Ok(()),
        }
    }

    /// The same wish to end, and nobody who is told.
    pub(crate) fn quiet(&self) -> Self {
        Self {
            progress: None,
            ..*self
        }
    }

    /// Runs `part` with a control whose whole progress is that from `from` to `to` of this one.
    pub(crate) fn within<T>(
        &self,
        (from, to): (f64, f64),
        part: impl FnOnce(&Control<'_>) -> T,
    ) -> T {
        let Some(progress) = self.progress else {
            return part(&self.quiet());
        };
        let tell = |fraction: f64| progress(from + fraction * (to - from));
        part(&Control {
            cancel: self.cancel,
            progress: Some(&tell),
        })
    }

    /// Tells that `done` of `all` are done.
    pub(crate) fn tell(&self, done: u64, all: u64) {
        if let Some(progress) = self.progress {
            #[allow(clippy::cast_precision_loss, reason = "a fraction to look at")]
            let fraction = if all == 0 {
                1.0
            } else {
                done as f64 / all as f64
            };
            progress(fraction.min(1.0));
        }
    }
}

/// How far an operation is that plans how many bytes it moves, and then moves them.
#[derive(Debug)]
pub(crate) struct Moving<'a> {
    control: Control<'a>,
    /// Bytes that are to be moved.
    all: AtomicU64,
    /// Bytes that were moved.
    done: AtomicU64,
}

impl<'a> Moving<'a> {
    pub fn new(control: &Control<'a>) -> Self {
        Self {
            control: *control,
            all: AtomicU64::new(0),
            done: AtomicU64::new(0),
        }
    }

    /// So many bytes more are to be moved.
    pub fn plan(&self, bytes: u64) {
        self.all.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes more were moved.
    pub fn moved(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.control.tell(done, self.all.load(Ordering::Relaxed));
    }

    /// As [`Control::go_on`].
    pub fn go_on(&self, path: &Path) -> Result<()> {
        self.control.go_on(path)
    }
}
