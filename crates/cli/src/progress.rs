//! What an operation tells while it runs: a bar for people, plain lines for logs, JSON lines for programs.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use stead_engine::{Event, Watch};

use crate::args::Global;

/// How often a program is told how far a step is: often enough to follow, seldom enough to read.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// A watch that shows events as the command line wants them, on standard error.
///
/// Notices are always shown: they say what the result is worth, not how far it is.
pub fn watch(global: &Global) -> Watch {
    match (global.quiet, global.json) {
        (true, json) => Watch::new(move |event| match event {
            Event::Notice { .. } if json => print_json(&event),
            Event::Notice { text } => eprintln!("stead: {text}"),
            Event::Step { .. } | Event::Progress { .. } => {}
        }),
        (false, true) => {
            let told = Mutex::new(None);
            Watch::new(move |event| {
                if told.lock().is_ok_and(|mut told| is_due(&event, &mut told)) {
                    print_json(&event);
                }
            })
        }
        (false, false) if std::io::stderr().is_terminal() => {
            let bar = Mutex::new(Bar::new());
            Watch::new(move |event| {
                if let Ok(mut bar) = bar.lock() {
                    bar.show(event);
                }
            })
        }
        (false, false) => Watch::new(|event| match event {
            Event::Step { job, step } => eprintln!("stead: {job}: {step}"),
            Event::Notice { text } => eprintln!("stead: {text}"),
            // A step that a log shows begins and ends; how far it is in between is for those who watch.
            Event::Progress { .. } => {}
        }),
    }
}

/// Whether to tell of this event: everything but progress that comes too soon after the last one.
fn is_due(event: &Event, told: &mut Option<Instant>) -> bool {
    if let Event::Progress { done, total, .. } = event
        && done != total
        && told.is_some_and(|at| at.elapsed() < PROGRESS_EVERY)
    {
        return false;
    }
    if matches!(event, Event::Progress { .. }) {
        *told = Some(Instant::now());
    }
    true
}

fn print_json(event: &Event) {
    match serde_json::to_string(event) {
        Ok(line) => eprintln!("{line}"),
        Err(error) => eprintln!("{{\"event\":\"notice\",\"text\":\"{error}\"}}"),
    }
}

struct Bar {
    bar: ProgressBar,
}

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
        bar.set_style(ProgressStyle::default_spinner());
        Self { bar }
    }

    fn show(&mut self, event: Event) {
        match event {
            Event::Step { job, step } => {
                self.bar.enable_steady_tick(Duration::from_millis(120));
                self.bar.set_style(ProgressStyle::default_spinner());
                self.bar.set_message(format!("{job}: {step}"));
            }
            Event::Progress { what, done, total } => {
                if total > 0 {
                    let style = ProgressStyle::with_template(
                        "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}",
                    );
                    if let Ok(style) = style {
                        self.bar.set_style(style);
                    }
                    self.bar.set_length(total);
                }
                self.bar.set_position(done);
                self.bar.set_message(what);
            }
            Event::Notice { text } => {
                self.bar.suspend(|| eprintln!("stead: {text}"));
            }
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_now_and_then_and_at_its_end_and_everything_else_at_once() {
        let progress = |done| Event::Progress {
            what: "fetch".to_owned(),
            done,
            total: 9,
        };
        let step = Event::Step {
            job: "fork".to_owned(),
            step: "start".to_owned(),
        };
        let mut told = None;
        let due: Vec<bool> = [progress(1), progress(2), step, progress(3), progress(9)]
            .iter()
            .map(|event| is_due(event, &mut told))
            .collect();
        assert_eq!(due, [true, false, true, false, true]);
    }
}
