//! What can go wrong, for the person who reads it: tried, found, what stands now, what to do next.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Every operation's result.
pub type Result<T> = std::result::Result<T, EngineError>;

/// What to do when a file system is full.
pub(crate) const MAKE_ROOM: &str = "make room there, or remove checkpoints and run `stead gc`";

/// The class of a failure; each has its exit status (`docs/exit-codes.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Something this program did not expect; exit status 1.
    Internal,
    /// What the caller asked for makes no sense; exit status 2.
    Usage,
    /// No sandbox, template or checkpoint of that name; exit status 3.
    NotFound,
    /// Somebody else works on the object, or it is not in a state that allows this; exit status 4.
    Conflict,
    /// Content differs from what was recorded; exit status 5.
    Damaged,
    /// This host cannot run that state; exit status 6.
    Incompatible,
    /// Not enough room; exit status 7.
    NoSpace,
    /// The store is missing, refuses, or cannot be reached; exit status 8.
    Store,
    /// QEMU failed or is gone; exit status 9.
    Vm,
    /// The guest's agent does not answer as it must; exit status 10.
    Agent,
    /// The caller cancelled; exit status 130.
    Cancelled,
}

impl Kind {
    /// The exit status of the command.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Internal => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Damaged => 5,
            Self::Incompatible => 6,
            Self::NoSpace => 7,
            Self::Store => 8,
            Self::Vm => 9,
            Self::Agent => 10,
            Self::Cancelled => 130,
        }
    }

    /// What helps where nothing better is known.
    fn usual_next_step(self) -> &'static str {
        match self {
            Self::Internal => "try again with -v, which says what was done; if it stays, report it",
            Self::Usage => "`stead COMMAND --help` says what is possible",
            Self::NotFound => {
                "`stead ls`, `stead template ls` and `stead checkpoint ls` list what there is"
            }
            Self::Conflict => "try again when the other command has ended",
            Self::Damaged => {
                "`stead verify` says what in the store is damaged; nothing is repaired by itself"
            }
            Self::Incompatible => "`stead doctor` says what this host offers; use another worker",
            Self::NoSpace => MAKE_ROOM,
            Self::Store => {
                "see that --store (STEAD_STORE) names the store and that it can be reached"
            }
            Self::Vm => "`stead doctor` says whether this host can run VMs; try again",
            Self::Agent => "`stead logs` shows the guest's console; try again",
            Self::Cancelled => "run it again when you want it",
        }
    }

    /// The word for programs (`error.kind` in JSON output).
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Internal => "internal",
            Self::Usage => "usage",
            Self::NotFound => "not-found",
            Self::Conflict => "conflict",
            Self::Damaged => "damaged",
            Self::Incompatible => "incompatible",
            Self::NoSpace => "no-space",
            Self::Store => "store",
            Self::Vm => "vm",
            Self::Agent => "agent",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A failed operation.
#[derive(Debug)]
pub struct EngineError {
    kind: Kind,
    attempt: String,
    found: String,
    left: Option<Box<str>>,
    next: Option<Box<str>>,
    console: Box<[String]>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl EngineError {
    /// An error of `kind`: what was `attempt`ed ("fork checkpoint base"), and what was `found` instead.
    pub fn new(kind: Kind, attempt: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            kind,
            attempt: attempt.into(),
            found: found.into(),
            left: None,
            next: None,
            console: Box::default(),
            source: None,
        }
    }

    /// Puts the failure into another class.
    #[must_use]
    pub(crate) fn of_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// Says what stands now ("the VM runs on").
    #[must_use]
    pub fn left(mut self, left: impl Into<String>) -> Self {
        let left = match self.left {
            Some(earlier) => format!("{earlier}; {}", left.into()),
            None => left.into(),
        };
        self.left = Some(left.into());
        self
    }

    /// Says what to do next.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into().into());
        self
    }

    /// Keeps the last lines of the console of a guest that could not be started.
    #[must_use]
    pub(crate) fn with_console(mut self, lines: Vec<String>) -> Self {
        self.console = lines.into();
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
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
        let mut text = self.found.clone();
        let mut cause = self
            .source
            .as_deref()
            .map(|source| source as &dyn std::error::Error);
        while let Some(error) = cause {
            let line = error.to_string();
            if !text.contains(&line) {
                if !text.is_empty() {
                    text.push_str(": ");
                }
                text.push_str(&line);
            }
            cause = error.source();
        }
        text
    }

    /// What stands now.
    #[must_use]
    pub fn what_is_left(&self) -> Option<&str> {
        self.left.as_deref()
    }

    /// What to do next: what was said of this failure, else what helps with its class.
    #[must_use]
    pub fn next_step(&self) -> &str {
        match &self.next {
            Some(next) => next,
            None => self.kind.usual_next_step(),
        }
    }

    /// The last lines of the console of a guest that could not be started.
    #[must_use]
    pub fn console(&self) -> &[String] {
        &self.console
    }

    pub(crate) fn not_found(what: &'static str, name: &str, list: &'static str) -> Self {
        Self::new(
            Kind::NotFound,
            format!("find {what} {name}"),
            format!("no {what} has this name or id"),
        )
        .next(format!("{list} lists what there is"))
    }

    pub(crate) fn usage(attempt: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Kind::Usage, attempt, found)
    }

    pub(crate) fn internal(attempt: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Kind::Internal, attempt, found)
    }

    pub(crate) fn file(attempt: &str, path: &Path, source: io::Error) -> Self {
        let full = matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        );
        let kind = if full { Kind::NoSpace } else { Kind::Internal };
        let error = Self::new(kind, format!("{attempt} {}", path.display()), "").because(source);
        if full { error.next(MAKE_ROOM) } else { error }
    }

    pub(crate) fn no_space(
        attempt: impl Into<String>,
        path: &Path,
        required_bytes: u64,
        available_bytes: u64,
    ) -> Self {
        Self::new(
            Kind::NoSpace,
            attempt,
            format!(
                "{} needs {required_bytes} bytes, has {available_bytes}",
                path.display()
            ),
        )
        .left("nothing was changed")
        .next(MAKE_ROOM)
    }
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.attempt, self.found())?;
        if let Some(left) = &self.left {
            write!(f, "; {left}")?;
        }
        if let Some(next) = &self.next {
            write!(f, ". {next}")?;
        }
        Ok(())
    }
}

impl std::error::Error for EngineError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source
            .as_deref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}

impl From<sqlx::Error> for EngineError {
    fn from(source: sqlx::Error) -> Self {
        Self::new(Kind::Internal, "use the worker's database", "")
            .because(source)
            .next("check that the data directory is writable and has room")
    }
}

/// Turns an I/O result into ours, naming the file.
pub(crate) trait AtFile<T> {
    /// Names what was tried with which file.
    fn at(self, attempt: &str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T> AtFile<T> for io::Result<T> {
    fn at(self, attempt: &str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|source| EngineError::file(attempt, &path.into(), source))
    }
}

/// The same error in our words. What stands now is for the caller to say: he may undo more than the merge.
impl From<stead_merge::MergeError> for EngineError {
    fn from(error: stead_merge::MergeError) -> Self {
        let kind = match error.kind() {
            stead_merge::Kind::Internal => Kind::Internal,
            stead_merge::Kind::Usage => Kind::Usage,
            stead_merge::Kind::NotFound => Kind::NotFound,
            stead_merge::Kind::Conflict => Kind::Conflict,
            stead_merge::Kind::Damaged => Kind::Damaged,
            stead_merge::Kind::Incompatible => Kind::Incompatible,
            stead_merge::Kind::NoSpace => Kind::NoSpace,
            stead_merge::Kind::Vm => Kind::Vm,
            stead_merge::Kind::Store => Kind::Store,
            stead_merge::Kind::Cancelled => Kind::Cancelled,
        };
        Self::new(kind, error.attempt(), error.found()).next(error.next_step())
    }
}
