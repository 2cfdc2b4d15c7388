//! Standard output and standard error of a command, in the order in which they are written.

use std::io::{self, Write};

use crate::failure::{Failure, Outcome};

/// Where a command prints.
#[derive(Debug)]
pub(crate) struct Console {
    program: String,
    out: io::BufWriter<io::Stdout>,
}

impl Console {
    /// Texts on standard error start with `program`.
    pub fn new(program: &str) -> Self {
        Self {
            program: program.to_owned(),
            out: io::BufWriter::new(io::stdout()),
        }
    }

    /// The name by which the command was called.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// Prints `text` as it is on standard output.
    ///
    /// # Errors
    /// When nobody reads it: a result that was not delivered is not a success.
    pub fn print(&mut self, text: &str) -> Outcome<()> {
        let written = self.out.write_all(text.as_bytes());
        written.map_err(|error| not_printed(&error))
    }

    /// Prints `text` and an end of line on standard output.
    ///
    /// # Errors
    /// As [`Console::print`].
    pub fn line(&mut self, text: &str) -> Outcome<()> {
        self.print(text)?;
        self.print("\n")
    }

    /// Sends what was printed.
    ///
    /// # Errors
    /// As [`Console::print`].
    pub fn flush(&mut self) -> Outcome<()> {
        self.out.flush().map_err(|error| not_printed(&error))
    }

    /// Prints a line on standard error as it is, behind what was printed before.
    ///
    /// # Errors
    /// When standard output takes no more.
    pub fn error_line(&mut self, text: &str) -> Outcome<()> {
        self.flush()?;
        say(text);
        Ok(())
    }

    /// Says why the command ends.
    pub fn fail(&mut self, failure: &Failure) {
        // What could not be printed before cannot be helped now; the status tells of the failure.
        drop(self.out.flush());
        for line in failure.text.lines() {
            say(&format!("{}: {line}", self.program));
        }
        if !failure.more.is_empty() {
            say(&failure.more);
        }
    }
}

fn not_printed(error: &io::Error) -> Failure {
    Failure::new(format!("the result could not be printed: {error}"))
}

/// A line on standard error. When nobody reads that, there is nobody left to tell.
fn say(line: &str) {
    drop(writeln!(io::stderr().lock(), "{line}"));
}
