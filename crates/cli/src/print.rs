//! Results on standard output, errors on standard error: for people, or as JSON.

use std::io::Write;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use stead_engine::EngineError;

/// Prints a value as JSON.
pub fn json<T: Serialize>(value: &T) -> u8 {
    match serde_json::to_string_pretty(value) {
        Ok(text) => line(&text),
        Err(error) => {
            plain_error(&format!("write the result as JSON: {error}"));
            1
        }
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
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => 0,
        Err(error) => {
            plain_error(&format!("write to standard output: {error}"));
            1
        }
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

/// Prints an error of the engine that the command ends with `exit_code` for.
pub fn error(error: &EngineError, exit_code: u8, as_json: bool) {
    if as_json {
        let value = serde_json::json!({
            "event": "error",
            "kind": error.kind().word(),
            "attempt": error.attempt(),
            "found": error.found(),
            "left": error.what_is_left(),
            "next": error.next_step(),
            "exit_code": exit_code,
        });
        eprintln!("{value}");
    } else {
        eprintln!("stead: {}: {}", error.attempt(), error.found());
        if let Some(left) = error.what_is_left() {
            eprintln!("  now:  {left}");
        }
        if let Some(next) = error.next_step() {
            eprintln!("  next: {next}");
        }
    }
}

/// Prints what is wrong with a command line (or the help that was asked for) and returns the exit status.
pub fn command_line(error: &clap::Error) -> u8 {
    let as_json = std::env::args_os()
        .take_while(|word| word != "--")
        .any(|word| word == "--json");
    if !error.use_stderr() || !as_json {
        if let Err(failed) = error.print()
            && failed.kind() != std::io::ErrorKind::BrokenPipe
        {
            plain_error(&format!("write the help: {failed}"));
        }
    } else {
        let text = error.to_string();
        let found = text.split("\n\n").next().unwrap_or_default();
        let value = serde_json::json!({
            "event": "error",
            "kind": stead_engine::Kind::Usage.word(),
            "attempt": "read the command line",
            "found": found.trim_start_matches("error: "),
            "left": "nothing was changed",
            "next": "try --help",
            "exit_code": error.exit_code(),
        });
        eprintln!("{value}");
    }
    u8::try_from(error.exit_code()).unwrap_or(1)
}

/// Prints an error that the engine knows nothing of.
pub fn plain_error(text: &str) {
    eprintln!("stead: {text}");
}

/// The first 12 digits of an id, as people pass them on.
pub fn short(id: &str) -> String {
    id.chars().take(12).collect()
}
