//! `stead logs`: the console as it was written, and what is added.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use stead_engine::{Engine, Result, SandboxState};

use crate::args::LogsArgs;
use crate::print;

/// How often the file is looked at again with `--follow`.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

pub async fn run(engine: &Engine, args: &LogsArgs) -> Result<u8> {
    let path = engine.console(&args.name).await?;
    let mut at = match show(&path, 0, args.tail) {
        Ok(at) => at,
        Err(error) => return Ok(failed(&path, &error)),
    };
    if !args.follow {
        return Ok(0);
    }
    loop {
        let state = engine.sandbox(&args.name).await?.state;
        at = match show(&path, at, None) {
            Ok(at) => at,
            Err(error) => return Ok(failed(&path, &error)),
        };
        if state != SandboxState::Running && state != SandboxState::Creating {
            return Ok(0);
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn show(path: &Path, from: u64, tail: Option<usize>) -> std::io::Result<u64> {
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    let read = file.read_to_end(&mut bytes)?;
    let from_line = tail.map_or(0, |lines| start_of_last_lines(&bytes, lines));
    let mut out = std::io::stdout().lock();
    out.write_all(&bytes[from_line..])?;
    out.flush()?;
    Ok(from + read as u64)
}

fn start_of_last_lines(bytes: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return bytes.len();
    }
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    body.iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n')
        .nth(lines - 1)
        .map_or(0, |(at, _)| at + 1)
}

fn failed(path: &Path, error: &std::io::Error) -> u8 {
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        return 0;
    }
    print::plain_error(&format!("print the console {}: {error}", path.display()));
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_counted_from_the_end() {
        let text = b"one\ntwo\nthree\n";
        assert_eq!(start_of_last_lines(text, 0), text.len());
        assert_eq!(&text[start_of_last_lines(text, 1)..], b"three\n");
        assert_eq!(&text[start_of_last_lines(text, 2)..], b"two\nthree\n");
        assert_eq!(start_of_last_lines(text, 9), 0);
        assert_eq!(start_of_last_lines(b"", 1), 0);
    }
}
