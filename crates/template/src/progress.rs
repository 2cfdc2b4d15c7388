//! How far a build is, and how to stop it.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::TemplateError;

/// One step of a build or an import, in the order in which they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Waiting for another build that uses the same cache.
    Waiting,
    /// Refreshing the package index from the host's Debian sources.
    Index,
    /// Working out which packages, in which versions, belong to the template.
    Resolve,
    /// Downloading the kernel package.
    Kernel,
    /// Installing the packages into a new root file system; the slow step, skipped when cached.
    RootFilesystem,
    /// Checking what the cache holds against its records.
    CheckCache,
    /// Unpacking the cached root file system.
    Unpack,
    /// Adding the agent, its unit, the kernel modules and the settings of a guest.
    Guest,
    /// Writing the initial RAM disk.
    Initramfs,
    /// Making the disk.
    Disk,
    /// Checking the finished disk.
    CheckDisk,
    /// Checking the files of an import.
    Inspect,
    /// Making a raw disk of an imported one.
    Convert,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting for another build",
            Self::Index => "refreshing the package index",
            Self::Resolve => "resolving packages",
            Self::Kernel => "downloading the kernel",
            Self::RootFilesystem => "installing packages",
            Self::CheckCache => "checking the cache",
            Self::Unpack => "unpacking the root file system",
            Self::Guest => "preparing the guest",
            Self::Initramfs => "writing the initial RAM disk",
            Self::Disk => "making the disk",
            Self::CheckDisk => "checking the disk",
            Self::Inspect => "checking the imported files",
            Self::Convert => "converting the disk",
        })
    }
}

/// News of a running build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress<'a> {
    /// A stage has begun.
    Stage(Stage),
    /// A stage had nothing to do, since its result is cached.
    Cached(Stage),
    /// A line that an outside program wrote; for a log, not for a decision.
    Line(&'a str),
}

/// Listens to a build and can stop it. One value serves one build; `cancel` may be set from any thread.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    report: &'a (dyn Fn(Progress<'_>) + Sync),
    cancel: &'a AtomicBool,
}

impl fmt::Debug for Watch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("cancelled", &self.is_cancelled())
            .finish_non_exhaustive()
    }
}

impl<'a> Watch<'a> {
    /// Sends news to `report`, which must return soon, and stops once `cancel` is true.
    pub fn new(report: &'a (dyn Fn(Progress<'_>) + Sync), cancel: &'a AtomicBool) -> Self {
        Self { report, cancel }
    }

    /// Says nothing and never stops.
    #[must_use]
    pub fn silent() -> Watch<'static> {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Watch {
            report: &|_| {},
            cancel: &NEVER,
        }
    }

    /// Whether the caller asked to stop.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    pub(crate) fn line(&self, line: &str) {
        (self.report)(Progress::Line(line));
    }

    pub(crate) fn cached(&self, stage: Stage) {
        (self.report)(Progress::Cached(stage));
    }

    /// Begins `stage`, unless the caller asked to stop.
    pub(crate) fn begin(&self, stage: Stage) -> Result<Step<'a>, TemplateError> {
        let step = Step {
            watch: *self,
            stage,
        };
        step.go_on()?;
        (self.report)(Progress::Stage(stage));
        Ok(step)
    }
}

/// A stage under way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step<'a> {
    watch: Watch<'a>,
    stage: Stage,
}

impl Step<'_> {
    /// How often a wait looks whether to stop.
    pub(crate) const POLL: Duration = Duration::from_millis(20);

    /// Fails once the caller asked to stop.
    pub(crate) fn go_on(&self) -> Result<(), TemplateError> {
        if self.watch.is_cancelled() {
            Err(TemplateError::Cancelled { stage: self.stage })
        } else {
            Ok(())
        }
    }

    pub(crate) fn line(&self, line: &str) {
        self.watch.line(line);
    }
}
