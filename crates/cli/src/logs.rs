//! `stead logs`: the console as it was written, and what is added.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use stead_engine::{Console, Engine, EngineError, Kind, Result, SandboxState, Watch};

use crate::args::LogsArgs;

/// How often the file is looked at again with `--follow`.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How much is read at once, in bytes, however long the console is.
const BLOCK_BYTES: usize = 64 << 10;
/// A line without an end is told as JSON in pieces of this, in bytes.
const LINE_BYTES_MAX: usize = 64 << 10;

pub async fn run(engine: &Engine, args: &LogsArgs, watch: &Watch, json: bool) -> Result<u8> {
    let mut console = engine.console(&args.name).await?;
    let mut out = Out::new(json);
    let from = args.tail.map_or(Ok(console.begin), |lines| {
        start_of_last_lines(&console.file, console.begin, lines)
    });
    let mut at = from.map_err(|error| unreadable(&console, error))?;
    loop {
        let goes_on = args.follow && runs(engine, &args.name).await?;
        match show(&console, at, &mut out, watch)? {
            Shown::To(end) => at = end,
            Shown::ReaderGone => return Ok(0),
        }
        if !goes_on {
            return out.end();
        }
        tokio::select! {
            () = watch.cancelled() => return Err(interrupted(&args.name)),
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
        let now = engine.console(&args.name).await?;
        if now.path != console.path {
            // It was started anew, or restored.
            at = now.begin;
            console = now;
        } else {
            // What is before has been given back, for the console became too long.
            at = at.max(now.begin);
        }
    }
}

async fn runs(engine: &Engine, name: &str) -> Result<bool> {
    let state = engine.sandbox(name).await?.state;
    Ok(matches!(
        state,
        SandboxState::Running | SandboxState::Creating
    ))
}

fn interrupted(name: &str) -> EngineError {
    EngineError::new(
        Kind::Cancelled,
        format!("show the console of {name}"),
        "interrupted",
    )
    .left("nothing was changed")
}

fn unreadable(console: &Console, error: std::io::Error) -> EngineError {
    EngineError::new(
        Kind::Internal,
        format!("read the console {}", console.path.display()),
        "",
    )
    .because(error)
}

/// How far the console was shown.
enum Shown {
    /// Up to this byte.
    To(u64),
    /// Nobody reads any more.
    ReaderGone,
}

/// Shows what there is from `at` on, a block at a time.
fn show(console: &Console, mut at: u64, out: &mut Out, watch: &Watch) -> Result<Shown> {
    let mut block = vec![0; BLOCK_BYTES];
    loop {
        if watch.is_cancelled() {
            return Err(interrupted(&console.path.display().to_string()));
        }
        let read = match console.file.read_at(&mut block, at) {
            Ok(0) => return Ok(Shown::To(at)),
            Ok(read) => read,
            Err(error) => return Err(unreadable(console, error)),
        };
        match out.write(&block[..read]) {
            Ok(()) => at += read as u64,
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                return Ok(Shown::ReaderGone);
            }
            Err(error) => return Err(unwritable(error)),
        }
    }
}

fn unwritable(error: std::io::Error) -> EngineError {
    EngineError::new(Kind::Internal, "write to standard output", "").because(error)
}

/// Where the console's bytes go: as they are, or one JSON line for each of its lines.
enum Out {
    Bytes,
    /// With the beginning of a line that has not ended yet.
    Json(Vec<u8>),
}

impl Out {
    fn new(json: bool) -> Self {
        if json {
            Self::Json(Vec::new())
        } else {
            Self::Bytes
        }
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let text = match self {
            Self::Bytes => bytes.to_owned(),
            Self::Json(begun) => json_lines(begun, bytes),
        };
        let mut out = std::io::stdout().lock();
        out.write_all(&text)?;
        out.flush()
    }

    /// Ends a line that the guest has not ended.
    fn end(&mut self) -> Result<u8> {
        let unended = matches!(self, Self::Json(begun) if !begun.is_empty());
        match if unended { self.write(b"\n") } else { Ok(()) } {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(unwritable(error)),
            Ok(()) | Err(_) => Ok(0),
        }
    }
}

/// The lines that `bytes` end, as JSON; the rest goes on in `begun`.
fn json_lines(begun: &mut Vec<u8>, bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    for byte in bytes {
        if *byte != b'\n' {
            begun.push(*byte);
        }
        if *byte == b'\n' || begun.len() >= LINE_BYTES_MAX {
            let line = String::from_utf8_lossy(begun);
            let value = serde_json::json!({ "line": line.trim_end_matches('\r') });
            text.extend(value.to_string().into_bytes());
            text.push(b'\n');
            begun.clear();
        }
    }
    text
}

/// Where the last `lines` lines of a file begin, looked for from its end; `first` is where its first line does.
fn start_of_last_lines(file: &std::fs::File, first: u64, lines: usize) -> std::io::Result<u64> {
    let length = file.metadata()?.len();
    let mut block = vec![0; BLOCK_BYTES];
    let mut ends_wanted = lines;
    let mut end = length;
    while end > first && lines > 0 {
        let begin = end.saturating_sub(BLOCK_BYTES as u64).max(first);
        let part = &mut block[..(end - begin) as usize];
        file.read_exact_at(part, begin)?;
        for (at, byte) in part.iter().enumerate().rev() {
            let after = begin + at as u64 + 1;
            // The file's own last line break ends a line and begins none.
            if *byte != b'\n' || after == length {
                continue;
            }
            ends_wanted -= 1;
            if ends_wanted == 0 {
                return Ok(after);
            }
        }
        end = begin;
    }
    Ok(if lines == 0 { length } else { first })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(bytes: &[u8]) -> std::fs::File {
        let file = tempfile::tempfile().expect("temp file");
        file.write_all_at(bytes, 0).expect("write");
        file
    }

    #[test]
    fn the_last_lines_are_counted_from_the_end_however_long_the_console_is() {
        let start =
            |bytes: &[u8], lines| start_of_last_lines(&file_of(bytes), 0, lines).expect("read");
        let text = b"one\ntwo\nthree\n";
        assert_eq!(start(text, 0), text.len() as u64);
        assert_eq!(start(text, 1), 8);
        assert_eq!(start(text, 2), 4);
        assert_eq!(start(text, 3), 0);
        assert_eq!(start(text, 9), 0);
        let behind = |lines| start_of_last_lines(&file_of(text), 4, lines).expect("read");
        assert_eq!((behind(1), behind(2), behind(3), behind(9)), (8, 4, 4, 4));
        assert_eq!(start(b"", 1), 0);
        assert_eq!(start(b"no end", 1), 0);
        let long = vec![b'x'; BLOCK_BYTES];
        let lines = [b"first\n".as_slice(), &long, b"\n", &long, b"\n"].concat();
        let second = 6 + BLOCK_BYTES as u64 + 1;
        assert_eq!(start(&lines, 1), second);
        assert_eq!(start(&lines, 2), 6);
        assert_eq!(start(&lines, 3), 0);
    }

    #[test]
    fn each_console_line_is_one_json_line_wherever_the_blocks_end() {
        let mut begun = Vec::new();
        let mut text = json_lines(&mut begun, b"on");
        text.extend(json_lines(&mut begun, b"e\r\n\ntw\xffo\nrest"));
        let text = String::from_utf8(text).expect("UTF-8");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                r#"{"line":"one"}"#,
                r#"{"line":""}"#,
                "{\"line\":\"tw\u{fffd}o\"}"
            ]
        );
        assert_eq!(begun, b"rest");
        let endless = json_lines(&mut begun, &vec![b'x'; LINE_BYTES_MAX]);
        assert!(!endless.is_empty() && begun.len() < LINE_BYTES_MAX);
    }
}
