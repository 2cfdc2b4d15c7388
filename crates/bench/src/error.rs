//! What a benchmark run can fail with: it says what was attempted, and keeps the cause.

use std::error::Error;

/// A figure could not be measured.
#[derive(Debug, thiserror::Error)]
#[error("{attempt}: {found}")]
pub struct BenchError {
    attempt: String,
    found: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

/// The result of measuring.
pub type Result<T> = std::result::Result<T, BenchError>;

impl BenchError {
    /// Something was found that must not be.
    pub fn new(attempt: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            attempt: attempt.into(),
            found: found.into(),
            source: None,
        }
    }

    /// The error and its causes, one a line.
    pub fn lines(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source.as_deref().map(|source| source as &dyn Error);
        while let Some(error) = cause {
            text.push_str(&format!("\n  because: {error}"));
            cause = error.source();
        }
        text
    }
}

/// Says what was attempted when something failed.
pub trait Doing<T> {
    /// Names the attempt.
    ///
    /// # Errors
    /// The same failure, with the attempt.
    fn doing(self, attempt: &str) -> Result<T>;
}

impl<T, E: Error + Send + Sync + 'static> Doing<T> for std::result::Result<T, E> {
    fn doing(self, attempt: &str) -> Result<T> {
        self.map_err(|source| BenchError {
            attempt: attempt.to_owned(),
            found: "failed".to_owned(),
            source: Some(Box::new(source)),
        })
    }
}
