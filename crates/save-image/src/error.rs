//! What can go wrong: tried, found, what stands now, what to do next.

use std::fmt;
use std::io;
use std::path::Path;

use crate::control::is_cancelled;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, SaveImageError>;

/// The class of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The file is something else.
    NotSaveImage,
    /// The image was never completed: its writer was killed, or is still at work.
    Incomplete,
    /// A newer program wrote it.
    NewerVersion,
    /// The file ends before what it says it holds.
    CutOff,
    /// Content differs from what was recorded, or makes no sense.
    Damaged,
    /// The payload is compressed in another way than the header says.
    WrongCompression,
    /// A valid image of a kind that this operation cannot work on.
    Unsupported,
    /// No file of that name.
    NotFound,
    /// The file is there already.
    Exists,
    /// What the caller asked for makes no sense.
    Usage,
    /// Not enough room.
    NoSpace,
    /// The caller cancelled.
    Cancelled,
    /// The system failed.
    Io,
}

/// A failed operation on a save image.
#[derive(Debug)]
pub struct SaveImageError {
    kind: Kind,
    attempt: String,
    found: String,
    left: String,
    next: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl SaveImageError {
    /// An error of `kind`: what was attempted, what was found, and what helps. Nothing was changed unless
    /// [`SaveImageError::leaving`] says otherwise.
    pub(crate) fn new(kind: Kind, attempt: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            kind,
            attempt: attempt.into(),
            found: found.into(),
            left: "nothing was changed".to_owned(),
            next: kind.usual_next_step().to_owned(),
            source: None,
        }
    }

    /// Says what stands now.
    pub(crate) fn leaving(mut self, left: impl Into<String>) -> Self {
        self.left = left.into();
        self
    }

    /// Says what to do next.
    pub(crate) fn next(mut self, next: impl Into<String>) -> Self {
        self.next = next.into();
        self
    }

    /// Keeps the cause.
    pub(crate) fn because(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Tells the caller's own wish, no room, a missing file and one in the way apart from other failures of the
    /// system.
    pub(crate) fn io(attempt: &str, path: &Path, source: io::Error) -> Self {
        if is_cancelled(&source) {
            let attempt = format!("{attempt} {}", path.display());
            return Self::new(Kind::Cancelled, attempt, "cancelled");
        }
        let is = |kinds: &[io::ErrorKind]| kinds.contains(&source.kind());
        let kind = if is(&[io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded]) {
            Kind::NoSpace
        } else if is(&[io::ErrorKind::NotFound]) {
            Kind::NotFound
        } else if is(&[io::ErrorKind::AlreadyExists]) {
            Kind::Exists
        } else {
            Kind::Io
        };
        let attempt = format!("{attempt} {}", path.display());
        Self::new(kind, attempt, "").because(source)
    }

    /// The class of the failure.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What was tried.
    #[must_use]
    pub fn attempt(&self) -> &str {
        &self.attempt
    }

    /// What was found instead, causes included.
    #[must_use]
    pub fn found(&self) -> String {
        match &self.source {
            Some(source) if self.found.is_empty() => source.to_string(),
            Some(source) => format!("{}: {source}", self.found),
            None => self.found.clone(),
        }
    }

    /// What stands now.
    #[must_use]
    pub fn what_is_left(&self) -> &str {
        &self.left
    }

    /// What to do next.
    #[must_use]
    pub fn next_step(&self) -> &str {
        &self.next
    }
}

impl Kind {
    fn usual_next_step(self) -> &'static str {
        match self {
            Self::NotSaveImage => "name a file that virsh save or stead save wrote",
            Self::Incomplete => "save the VM again; this file cannot be restored",
            Self::NewerVersion => "use the version that wrote it, or a newer one",
            Self::CutOff | Self::Damaged => "take another copy of the file",
            Self::WrongCompression => "see what wrote the file; stead save info shows its header",
            Self::Unsupported => "restore it with libvirt and save the VM in another format",
            Self::NotFound => "name a file that is there",
            Self::Exists => "name another file, or remove that one first",
            Self::Usage => "stead save COMMAND --help says what is possible",
            Self::NoSpace => "make room there and try again",
            Self::Cancelled => "run it again when you want it",
            Self::Io => "see what the system says, and try again",
        }
    }
}

impl fmt::Display for SaveImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (attempt, found) = (&self.attempt, self.found());
        write!(f, "{attempt}: {found}; {}. {}", self.left, self.next)
    }
}

impl std::error::Error for SaveImageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}
