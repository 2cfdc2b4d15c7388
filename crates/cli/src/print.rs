//! Results on standard output, errors on standard error: for people, or as JSON.
//!
//! With `--json`, standard output holds one JSON document and standard error nothing but JSON lines.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use stead_engine::{EngineError, Kind};

/// Whether programs read what is printed; decided once, from the command line.
static AS_JSON: AtomicBool = AtomicBool::new(false);

/// From now on, everything is printed for programs.
pub fn speak_json() {
    AS_JSON.store(true, Ordering::Relaxed);
}

fn as_json() -> bool {
    AS_JSON.load(Ordering::Relaxed)
}

/// Prints a value as JSON.
pub fn json<T: Serialize>(value: &T) -> u8 {
    match serde_json::to_string_pretty(value) {
        Ok(text) => line(&text),
        Err(source) => internal("write the result as JSON", source),
    }
}

/// Prints a line.
pub fn line(text: &str) -> u8 {
    bytes(format!("{text}\n").as_bytes())
}

/// Prints bytes as they are; a reader that has gone away is no failure of ours, another is.
pub fn bytes(bytes: &[u8]) -> u8 {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => 0,
        Err(source) if source.kind() == std::io::ErrorKind::BrokenPipe => 0,
        Err(source) => internal("write to standard output", source),
    }
}

/// Prints rows under a heading, or the heading alone.
pub fn table<const N: usize>(
    heading: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> u8 {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(heading);
    for row in rows {
        table.add_row(row);
    }
    let text: Vec<String> = table.lines().map(|line| line.trim().to_owned()).collect();
    line(&text.join("\n"))
}

/// Prints names and values.
pub fn fields(rows: &[(&str, String)]) -> u8 {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let text: Vec<String> = rows
        .iter()
        .map(|(name, value)| format!("{name:width$}  {value}").trim_end().to_owned())
        .collect();
    line(&text.join("\n"))
}

/// Prints an error that the command ends with `exit_code` for, and returns that.
pub fn error(error: &EngineError, exit_code: u8) -> u8 {
    let text = if as_json() {
        error_as_json(error, exit_code)
    } else {
        error_for_people(error)
    };
    // In one piece, so that two commands that share a terminal do not mix their lines.
    eprintln!("{text}");
    exit_code
}

fn error_as_json(error: &EngineError, exit_code: u8) -> String {
    let mut value = serde_json::json!({
        "event": "error",
        "kind": error.kind().word(),
        "attempt": error.attempt(),
        "found": error.found(),
        "left": error.what_is_left(),
        "next": error.next_step(),
        "exit_code": exit_code,
    });
    if !error.console().is_empty() {
        value["console"] = error.console().into();
    }
    value.to_string()
}

fn error_for_people(error: &EngineError) -> String {
    let mut text = format!("stead: {}: {}", error.attempt(), error.found());
    for line in error.console() {
        text.push_str("\n  | ");
        text.push_str(line);
    }
    if let Some(left) = error.what_is_left() {
        text.push_str("\n  now:  ");
        text.push_str(left);
    }
    text.push_str("\n  next: ");
    text.push_str(error.next_step());
    text
}

/// Prints a failure of the command itself and returns its exit status.
pub fn internal(attempt: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> u8 {
    let failed = EngineError::new(Kind::Internal, attempt, "").because(source);
    error(&failed, Kind::Internal.exit_code())
}

/// Prints what is wrong with a command line (or the help that was asked for) and returns the exit status.
pub fn command_line(error: &clap::Error) -> u8 {
    let code = u8::try_from(error.exit_code()).unwrap_or(1);
    let wants_json = std::env::args_os()
        .take_while(|word| word != "--")
        .any(|word| word == "--json");
    if wants_json && error.use_stderr() {
        speak_json();
        let text = error.to_string();
        let found = text.split("\n\n").next().unwrap_or_default();
        let found = found.trim_start_matches("error: ");
        let refused = EngineError::new(Kind::Usage, "read the command line", found)
            .left("nothing was changed")
            .next("try --help");
        return self::error(&refused, code);
    }
    match error.print() {
        Err(source) if source.kind() != std::io::ErrorKind::BrokenPipe => {
            internal("write the help", source)
        }
        Ok(()) | Err(_) => code,
    }
}

/// The first 12 digits of an id, as people pass them on.
pub fn short(id: &str) -> String {
    id.chars().take(12).collect()
}
