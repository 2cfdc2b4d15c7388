//! How far a command is, as qemu-img shows it: with `-p` a percentage that replaces itself, without it a line
//! for each SIGUSR1. With `--json` it is a JSON line on standard error, as other commands of `stead` have it.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use serde_json::json;
use stead_qcow2::Control;
use stead_sys::signal;

use crate::common::{OUTPUT, PROGRESS, QUIET};
use crate::getopt::Parsed;
use crate::report::JSON;

/// The least step that is shown, in percent.
const STEP: f64 = 1.0;

/// Runs `work`, which is told to end when a signal says so, and shows how far it is where the user wants that.
pub(crate) fn watched<T, E>(
    parsed: &Parsed,
    work: impl FnOnce(&Control<'_>) -> Result<T, E>,
) -> Result<T, E> {
    let (done, _line) = watched_open(parsed, work)?;
    Ok(done)
}

/// As [`watched`]; the line that shows it ends when what is given beside the result is dropped.
pub(crate) fn watched_open<T, E>(
    parsed: &Parsed,
    work: impl FnOnce(&Control<'_>) -> Result<T, E>,
) -> Result<(T, Progress), E> {
    let progress = Progress::start(Shown::wanted(parsed));
    let tell = |fraction| progress.tell(fraction);
    let done = work(&Control {
        cancel: signal::note_stop().ok(),
        progress: Some(&tell),
    })?;
    progress.done();
    Ok((done, progress))
}

/// As [`watched`], for what is part of more: nothing is shown.
pub(crate) fn stoppable() -> Control<'static> {
    Control {
        cancel: signal::note_stop().ok(),
        progress: None,
    }
}

/// Where it is shown how far a command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    Nowhere,
    /// On standard output, for people.
    Percent,
    /// On standard error, for programs.
    Events,
}

impl Shown {
    fn wanted(parsed: &Parsed) -> Self {
        match parsed.has(PROGRESS.id) && !parsed.has(QUIET.id) {
            false => Self::Nowhere,
            true if parsed.has(JSON.id) || is_json(parsed) => Self::Events,
            true => Self::Percent,
        }
    }

    fn print(self, percent: f64) {
        match self {
            Self::Nowhere => {}
            Self::Percent => say(&format!("    ({percent:.2}/100%)\r")),
            Self::Events => {
                let event = json!({ "event": "progress", "done": percent, "total": 100.0 });
                drop(writeln!(io::stderr().lock(), "{event}"));
            }
        }
    }
}

/// What is on standard output is for programs.
fn is_json(parsed: &Parsed) -> bool {
    parsed
        .last(OUTPUT.id)
        .is_some_and(|output| output == "json")
}

/// What was shown last; used from any thread.
#[derive(Debug)]
pub(crate) struct Progress {
    to: Shown,
    /// In percent.
    shown: Mutex<f64>,
    /// Set by SIGUSR1, which asks once; `None` where that is shown anyway.
    asked: Option<&'static AtomicBool>,
}

impl Progress {
    /// Shows at once that nothing is done.
    fn start(to: Shown) -> Self {
        to.print(0.0);
        Self {
            to,
            shown: Mutex::new(0.0),
            // Without the note the signal ends the process, as for any program.
            asked: match to {
                Shown::Nowhere => signal::note_report().ok(),
                Shown::Percent | Shown::Events => None,
            },
        }
    }

    /// Tells how far the command is, from 0.0 to 1.0.
    fn tell(&self, fraction: f64) {
        let percent = (fraction * 100.0).clamp(0.0, 100.0);
        if self
            .asked
            .is_some_and(|asked| asked.swap(false, Ordering::Relaxed))
        {
            drop(writeln!(io::stderr().lock(), "    ({percent:.2}/100%)"));
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if percent - *shown >= STEP {
            *shown = percent;
            self.to.print(percent);
        }
    }

    /// All is done.
    fn done(&self) {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = 100.0;
        self.to.print(100.0);
    }
}

/// Ends the line that was written over and over.
impl Drop for Progress {
    fn drop(&mut self) {
        if self.to == Shown::Percent {
            say("\n");
        }
    }
}

/// Progress that nobody reads is no reason to stop.
fn say(text: &str) {
    let mut out = io::stdout().lock();
    drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
}
