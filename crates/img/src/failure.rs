//! Why a command ended: the text for standard error, and the exit status.

use std::io;

use stead_qcow2::Error;

use crate::open_error;

/// The exit status of a command that was ended by a signal, with everything as it was.
pub(crate) const STATUS_CANCELLED: u8 = 130;

/// The result of everything a command does.
pub(crate) type Outcome<T> = Result<T, Failure>;

/// What ends a command early.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What is printed, each line behind the program's name; empty: nothing (it has been said).
    pub text: String,
    /// Lines that stand below it as they are.
    pub more: String,
    /// The exit status.
    pub status: u8,
}

impl Failure {
    /// A failure with status 1.
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            more: String::new(),
            status: 1,
        }
    }

    /// A failure with status 1: the first line of `why` behind `what`, the others below it.
    pub fn lines(what: &str, why: &str) -> Self {
        let (first, more) = why.split_once('\n').unwrap_or((why, ""));
        Self::new(format!("{what}{first}")).with_more(more)
    }

    /// The command line is wrong: points to the help of `program`.
    pub fn usage(program: &str, text: impl Into<String>) -> Self {
        let more = format!("Try '{program} --help' for more information");
        Self::new(text).with_more(more)
    }

    /// Opening the image that the user calls `name` failed.
    pub fn open(name: &str, error: &Error) -> Self {
        let (text, more) = open_error::words(error);
        Self::new(format!("Could not open '{name}': {text}"))
            .with_more(more)
            .because_of(error)
    }

    /// The same failure with another exit status.
    pub fn with_status(mut self, status: u8) -> Self {
        self.status = status;
        self
    }

    /// The same failure, with the status of one that was wished for if `error` says so.
    pub fn because_of(self, error: &Error) -> Self {
        if let Error::Cancelled { .. } = error {
            return self.with_status(STATUS_CANCELLED);
        }
        self
    }

    /// The same failure with lines below its text.
    pub fn with_more(mut self, more: impl Into<String>) -> Self {
        self.more = more.into();
        self
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error.to_string()).because_of(&error)
    }
}

/// What the operating system says of an error, without its number.
pub(crate) fn system_words(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
