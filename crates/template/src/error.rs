//! What can go wrong with a template, and what stands afterwards.

use std::io;
use std::path::{Path, PathBuf};

use crate::progress::Stage;

/// Why a template could not be built or imported.
///
/// Whatever the reason, nothing appears in the output folder that looks complete: the files of a
/// template are published one by one and the caller records them only when all of them are there.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A root file system with the owners of its files can only be unpacked by root.
    #[error(
        "{doing} needs root: the files of a guest belong to many users; nothing was changed; run it again as root or with sudo"
    )]
    NeedsRoot {
        /// What was about to be done.
        doing: &'static str,
    },
    /// The host's apt knows no Debian suite that fits.
    #[error(
        "no apt source for {wanted}: this host's apt knows {found}; nothing was changed; add a Debian source and run `apt-get update`"
    )]
    NoSource {
        /// The suite that was asked for, or `a Debian suite`.
        wanted: String,
        /// The suites that apt knows, or `none`.
        found: String,
    },
    /// A value of the request cannot be used.
    #[error("{what} is `{found}`, expected {expected}; nothing was changed")]
    Invalid {
        /// Which value.
        what: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// A program is not installed.
    #[error(
        "{doing}: `{program}` is not installed; nothing was changed; install it or run scripts/setup"
    )]
    ProgramMissing {
        /// What it was needed for.
        doing: String,
        /// The program.
        program: String,
    },
    /// A program failed.
    #[error("{doing}: `{program}` ended with {status}; it said: {said}; nothing was published")]
    ProgramFailed {
        /// What it was to do.
        doing: String,
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// The end of what it wrote to its error output.
        said: String,
    },
    /// A program took longer than any sound run of it.
    #[error(
        "{doing}: `{program}` did not end within {limit_s} s and was stopped; nothing was published"
    )]
    ProgramTooSlow {
        /// What it was to do.
        doing: String,
        /// The program.
        program: String,
        /// The limit in seconds.
        limit_s: u64,
    },
    /// A program gave an answer that makes no sense.
    #[error("{doing}: `{program}` answered {found}, expected {expected}; nothing was published")]
    Answer {
        /// What was asked.
        doing: String,
        /// The program.
        program: String,
        /// The answer.
        found: String,
        /// What a sound answer looks like.
        expected: String,
    },
    /// A file is not what it has to be.
    #[error("{path}: {found}; expected {expected}; nothing was published")]
    Unsuitable {
        /// The file.
        path: PathBuf,
        /// What was found.
        found: String,
        /// What would do.
        expected: String,
    },
    /// There is too little room.
    #[error(
        "{path}: {required_bytes} bytes are needed, {available_bytes} are free; nothing was changed; free some room or choose another folder"
    )]
    NoRoom {
        /// The folder that lacks room.
        path: PathBuf,
        /// How much the work takes.
        required_bytes: u64,
        /// How much there is.
        available_bytes: u64,
    },
    /// The caller asked to stop.
    #[error("stopped while {stage}, as asked; nothing was published")]
    Cancelled {
        /// What was going on.
        stage: Stage,
    },
    /// The file system refused.
    #[error("{doing} {path}: {source}; nothing was published")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Names what was tried on which file when an [`io::Error`] passes through.
pub(crate) trait OnPath<T> {
    /// Turns an I/O error into [`TemplateError::Io`].
    fn on(self, doing: &'static str, path: &Path) -> Result<T, TemplateError>;
}

impl<T> OnPath<T> for io::Result<T> {
    fn on(self, doing: &'static str, path: &Path) -> Result<T, TemplateError> {
        self.map_err(|source| TemplateError::Io {
            doing,
            path: path.to_owned(),
            source,
        })
    }
}
