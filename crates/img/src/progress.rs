//! How far a command is, as qemu-img shows it: with `-p` a percentage that replaces itself, without it a line
//! for each SIGUSR1.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use stead_sys::signal;

/// The least step that is shown, in percent.
const STEP: f64 = 1.0;

/// What was shown last; used from any thread.
#[derive(Debug)]
pub(crate) struct Progress {
    /// `None` where nothing is shown.
    shown: Option<Mutex<f64>>,
    /// Set by SIGUSR1, which asks once; `None` where that is shown anyway.
    asked: Option<&'static AtomicBool>,
}

impl Progress {
    /// Shows at once that nothing is done, if `show`.
    pub fn start(show: bool) -> Self {
        if show {
            print(0.0);
        }
        Self {
            shown: show.then_some(Mutex::new(0.0)),
            // Without the note the signal ends the process, as for any program.
            asked: if show {
                None
            } else {
                signal::note_report().ok()
            },
        }
    }

    /// Tells how far the command is, from 0.0 to 1.0.
    pub fn tell(&self, fraction: f64) {
        let percent = (fraction * 100.0).clamp(0.0, 100.0);
        if self
            .asked
            .is_some_and(|asked| asked.swap(false, Ordering::Relaxed))
        {
            drop(writeln!(io::stderr().lock(), "    ({percent:.2}/100%)"));
        }
        let Some(shown) = &self.shown else { return };
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        if percent - *shown >= STEP {
            *shown = percent;
            print(percent);
        }
    }

    /// All is done.
    pub fn done(&self) {
        if let Some(shown) = &self.shown {
            *shown.lock().unwrap_or_else(PoisonError::into_inner) = 100.0;
            print(100.0);
        }
    }
}

/// Ends the line that was written over and over.
impl Drop for Progress {
    fn drop(&mut self) {
        if self.shown.is_some() {
            say("\n");
        }
    }
}

fn print(percent: f64) {
    say(&format!("    ({percent:.2}/100%)\r"));
}

/// Progress that nobody reads is no reason to stop.
fn say(text: &str) {
    let mut out = io::stdout().lock();
    drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
}
