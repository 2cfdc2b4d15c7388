//! What the agent could not do.

use std::error::Error;
use std::io;
use std::path::PathBuf;

/// What the agent could not do, and what stands then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// The command line is not understood.
    #[error("{0}")]
    Usage(String),
    /// A system call failed.
    #[error("{attempted}")]
    System {
        /// What was attempted.
        attempted: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A file says what it should not.
    #[error("{path}: {found}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What was found, and what was expected.
        found: String,
    },
    /// A bounded wait was over.
    #[error("{awaited} did not come within {limit_ms} ms")]
    Late {
        /// What was waited for.
        awaited: String,
        /// How long, in milliseconds.
        limit_ms: u64,
    },
}

/// Says what was attempted when a system call fails.
pub(crate) trait Attempt<T> {
    /// Gives the value, or an error that says what was `attempted`.
    fn attempt(self, attempted: impl FnOnce() -> String) -> Result<T, AgentError>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn attempt(self, attempted: impl FnOnce() -> String) -> Result<T, AgentError> {
        self.map_err(|source| AgentError::System {
            attempted: attempted(),
            source: source.into(),
        })
    }
}

/// The error and everything behind it, on one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}
