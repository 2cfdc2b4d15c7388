//! What can go wrong with a merge: tried, found, what stands now, what to do next.

use std::fmt;
use std::io;
use std::path::Path;

use serde::Serialize;
use stead_qcow2::Error;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, MergeError>;

/// The class of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
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
    /// The caller cancelled.
    Cancelled,
}

impl Kind {
    fn usual_next_step(self) -> &'static str {
        match self {
            Self::Internal => "try again with -v; if it stays, report it",
            Self::Usage => "`stead merge --help` says what is possible",
            Self::NotFound => "see that all files of the chain are there",
            Self::Conflict => "clear what stands in the way and run it again",
            Self::Damaged => "`stead img check` says what is damaged",
            Self::Incompatible => "use a newer version, or convert the image",
            Self::NoSpace => "make room, or extend the device (--extend-cmd), and run it again",
            Self::Vm => "see what QEMU says, then run it again",
            Self::Cancelled => "run it again when you want it",
        }
    }
}

/// A merge that failed or was refused.
#[derive(Debug)]
pub struct MergeError {
    kind: Kind,
    attempt: String,
    found: String,
    left: String,
    next: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl MergeError {
    pub(crate) fn new(kind: Kind, attempt: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            kind,
            attempt: attempt.into(),
            found: found.into(),
            left: "nothing was changed".into(),
            next: None,
            source: None,
        }
    }

    /// An error of the engine.
    pub(crate) fn engine(attempt: impl Into<String>, source: Error) -> Self {
        let mut error = Self::new(kind_of(&source), attempt, source.to_string());
        if let Some(next) = next_of(&source) {
            error.next = Some(next);
        }
        error.source = Some(source.into());
        error
    }

    /// An error of QEMU.
    pub(crate) fn vm(attempt: &str, source: stead_vmm::Error) -> Self {
        let mut error = Self::new(Kind::Vm, attempt, source.to_string());
        error.source = Some(source.into());
        error
    }

    /// An error of the system.
    pub(crate) fn io(attempt: &str, path: &Path, source: io::Error) -> Self {
        let attempt = format!("{attempt} {}", path.display());
        let mut error = Self::new(kind_of_io(&source), attempt, source.to_string());
        error.source = Some(source.into());
        error
    }

    pub(crate) fn left(mut self, left: impl Into<String>) -> Self {
        self.left = left.into();
        self
    }

    pub(crate) fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// Its class.
    #[must_use]
    pub fn kind(&self) -> Kind {
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

impl fmt::Display for MergeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (next, left) = (self.next_step(), &self.left);
        write!(f, "{}: {}; {left}; {next}", self.attempt, self.found)
    }
}

impl std::error::Error for MergeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = self.source.as_deref()?;
        Some(source)
    }
}

fn kind_of_io(error: &io::Error) -> Kind {
    if error.kind() == io::ErrorKind::NotFound {
        return Kind::NotFound;
    }
    let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
    if full.contains(&error.kind()) {
        Kind::NoSpace
    } else {
        Kind::Internal
    }
}

pub(crate) fn kind_of(error: &Error) -> Kind {
    if let Error::Io { source, .. } | Error::Switch { source, .. } = error {
        return kind_of_io(source);
    }
    if matches!(error, Error::NoRoom { .. }) {
        return Kind::NoSpace;
    }
    if matches!(error, Error::Cancelled { .. }) {
        return Kind::Cancelled;
    }
    let foreign = matches!(
        error,
        Error::UnknownVersion { .. }
            | Error::UnknownFeature { .. }
            | Error::UnknownFormat { .. }
            | Error::Encrypted { .. }
            | Error::ExternalDataFile { .. }
    );
    if foreign {
        return Kind::Incompatible;
    }
    let cleared = matches!(
        error,
        Error::InUse { .. }
            | Error::InProgress { .. }
            | Error::MarkedDirty { .. }
            | Error::Refused { .. }
            | Error::NotFollowed { .. }
            | Error::RefcountOverflow { .. }
            | Error::InvalidBitmap { .. }
            | Error::BitmapInUse { .. }
    );
    if cleared {
        return Kind::Conflict;
    }
    if matches!(error, Error::InvalidChain { .. }) {
        return Kind::Usage;
    }
    Kind::Damaged
}

pub(crate) fn next_of(error: &Error) -> Option<String> {
    if let Error::InProgress { path } = error {
        let path = path.display();
        return Some(format!("run `stead merge recover {path}`"));
    }
    if matches!(error, Error::InUse { .. }) {
        return Some("end the program that has it open; a running VM needs a live merge".into());
    }
    None
}
