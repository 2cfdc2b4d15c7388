//! A failure of an operation on images, for the person who reads it: tried, found, what stands now, what to do next.
//!
//! Operations that are more than one call of this crate (merges, backups) fail with it; the classes of [`Error`] are here,
//! so that the same thing found has the same class and the same advice wherever it is found.

use std::fmt;
use std::io;
use std::path::Path;

use serde::Serialize;

use crate::error::Error;

/// The class of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// Something that was not expected.
    Internal,
    /// What was asked for makes no sense.
    Usage,
    /// A file is not there.
    NotFound,
    /// A file is in use, or something stands in the way that the caller can clear.
    Conflict,
    /// An image is damaged, or what was written is not what should have been.
    Damaged,
    /// An image has what this program does not know.
    Incompatible,
    /// Not enough room.
    NoSpace,
    /// QEMU refuses, failed, or is gone.
    Vm,
    /// A store is missing, refuses, or cannot be reached.
    Store,
    /// The caller cancelled.
    Cancelled,
}

impl FailureKind {
    fn usual_next_step(self) -> &'static str {
        match self {
            Self::Internal => "try again with -v; if it stays, report it",
            Self::Usage => "`--help` behind the command says what is possible",
            Self::NotFound => "see that all files are there",
            Self::Conflict => "clear what stands in the way and run it again",
            Self::Damaged => "`stead img check` says what is damaged",
            Self::Incompatible => "use a newer version, or convert the image",
            Self::NoSpace => "make room, or extend the device, and run it again",
            Self::Vm => "see what QEMU says, then run it again",
            Self::Store => "see that the store is named right and can be reached",
            Self::Cancelled => "run it again when you want it",
        }
    }

    /// The class of an error of the system.
    #[must_use]
    pub fn of_io(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::NotFound {
            return Self::NotFound;
        }
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        if full.contains(&error.kind()) {
            Self::NoSpace
        } else {
            Self::Internal
        }
    }

    /// The class of an error of this crate.
    #[must_use]
    pub fn of(error: &Error) -> Self {
        if let Error::Io { source, .. } | Error::Switch { source, .. } = error {
            return Self::of_io(source);
        }
        if matches!(error, Error::NoRoom { .. }) {
            return Self::NoSpace;
        }
        if matches!(error, Error::Cancelled { .. }) {
            return Self::Cancelled;
        }
        if is_foreign(error) {
            return Self::Incompatible;
        }
        if stands_in_the_way(error) {
            return Self::Conflict;
        }
        if matches!(error, Error::InvalidChain { .. }) {
            return Self::Usage;
        }
        Self::Damaged
    }
}

fn is_foreign(error: &Error) -> bool {
    matches!(
        error,
        Error::UnknownVersion { .. }
            | Error::UnknownFeature { .. }
            | Error::UnknownFormat { .. }
            | Error::Encrypted { .. }
            | Error::ExternalDataFile { .. }
    )
}

fn stands_in_the_way(error: &Error) -> bool {
    matches!(
        error,
        Error::InUse { .. }
            | Error::InProgress { .. }
            | Error::JournalFiles { .. }
            | Error::MarkedDirty { .. }
            | Error::Refused { .. }
            | Error::NotFollowed { .. }
            | Error::RefcountOverflow { .. }
            | Error::InvalidBitmap { .. }
            | Error::BitmapInUse { .. }
    )
}

/// What to do about an error of this crate, where something better is known than for its class.
#[must_use]
pub fn next_step_after(error: &Error) -> Option<String> {
    if let Error::InProgress { path } = error {
        let path = path.display();
        return Some(format!(
            "run `stead img recover {path}`; or `stead merge recover {path}` where a merge was not finished"
        ));
    }
    if let Error::JournalFiles { path, .. } = error {
        let path = path.display();
        return Some(format!(
            "if those files are the image's own, run `stead img recover --with FILE {path}` with each of them"
        ));
    }
    if matches!(error, Error::InUse { .. }) {
        return Some(
            "end the program that has it open; a VM that runs is reached with --qmp".into(),
        );
    }
    None
}

/// An operation that failed or was refused.
#[derive(Debug)]
pub struct Failure {
    kind: FailureKind,
    attempt: String,
    found: String,
    left: String,
    next: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Failure {
    /// A failure that changed nothing: what was attempted, and what was found instead.
    pub fn new(kind: FailureKind, attempt: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            kind,
            attempt: attempt.into(),
            found: found.into(),
            left: "nothing was changed".into(),
            next: None,
            source: None,
        }
    }

    /// One by an error of this crate.
    pub fn engine(attempt: impl Into<String>, source: Error) -> Self {
        let mut error = Self::new(FailureKind::of(&source), attempt, source.to_string());
        error.next = next_step_after(&source);
        error.because(source)
    }

    /// One by an error of the system.
    pub fn io(attempt: &str, path: &Path, source: io::Error) -> Self {
        let attempt = format!("{attempt} {}", path.display());
        Self::new(FailureKind::of_io(&source), attempt, source.to_string()).because(source)
    }

    /// Says what stands now.
    #[must_use]
    pub fn left(mut self, left: impl Into<String>) -> Self {
        self.left = left.into();
        self
    }

    /// Says what to do next.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Its class.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        self.kind
    }

    /// What was tried.
    #[must_use]
    pub fn attempt(&self) -> &str {
        &self.attempt
    }

    /// Why it was not to be.
    #[must_use]
    pub fn found(&self) -> &str {
        &self.found
    }

    /// What stands now.
    #[must_use]
    pub fn what_is_left(&self) -> &str {
        &self.left
    }

    /// What to do.
    #[must_use]
    pub fn next_step(&self) -> &str {
        match &self.next {
            Some(next) => next,
            None => self.kind.usual_next_step(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (next, left) = (self.next_step(), &self.left);
        write!(f, "{}: {}; {left}; {next}", self.attempt, self.found)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = self.source.as_deref()?;
        Some(source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_a_journal_names_stand_in_the_way_and_are_no_damage() {
        let error = Error::JournalFiles {
            path: "a.qcow2".into(),
            files: Vec::new(),
        };
        let failure = Failure::engine("open the disk", error);
        assert_eq!(failure.kind(), FailureKind::Conflict);
        assert!(failure.next_step().contains("--with FILE a.qcow2"));
        let text = failure.to_string();
        assert!(text.starts_with("open the disk: "), "{text}");
        assert!(text.contains("; nothing was changed; if those"), "{text}");
    }
}
