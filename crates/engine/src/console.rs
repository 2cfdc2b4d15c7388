//! A sandbox's console as its guest wrote it.
//!
//! The file lies in a folder that the VM's user may write to, and is opened by whoever asks, mostly root. So
//! the name is not followed if it is a link, a pipe or device is not waited for, and a file with a second
//! name is refused: each could be something else that the VM's user has put there.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::Engine;
use crate::error::{AtFile, EngineError, Result};
use crate::records::{Sandbox, SandboxState};
use crate::sandbox::wrong_state;

/// How much of the console's end an error repeats, in bytes.
const TAIL_BYTES: u64 = 4096;
/// How many of its last lines an error repeats.
const TAIL_LINES: usize = 12;
/// The longest line that an error repeats, in characters.
const LINE_CHARS: usize = 200;

/// A console that can be read.
#[derive(Debug)]
pub struct Console {
    /// The file.
    pub path: PathBuf,
    /// The same, open for reading.
    pub file: File,
}

impl Engine {
    /// The console of a sandbox's present or last start.
    ///
    /// # Errors
    /// When there is none, or it is no plain file.
    pub async fn console(&self, name: &str) -> Result<Console> {
        let sandbox = self.records.sandbox(name).await?;
        let Some(launch) = &sandbox.launch else {
            return Err(no_console(&sandbox));
        };
        let path = self.dir.run(launch).join(stead_vmm::dir::SERIAL_LOG);
        let file = open(&path).at("open the console", &path)?;
        Ok(Console { path, file })
    }

    /// The console's last lines of a start that failed, before its folder is removed.
    pub(crate) fn last_words(&self, launch: &str) -> Vec<String> {
        let path = self.dir.run(launch).join(stead_vmm::dir::SERIAL_LOG);
        match open(&path).and_then(|file| tail(&file)) {
            Ok(lines) => lines,
            Err(error) => vec![format!("(it cannot be read: {error})")],
        }
    }
}

fn no_console(sandbox: &Sandbox) -> EngineError {
    let found = match sandbox.state {
        SandboxState::Hibernated => "its console went with the VM when it was hibernated",
        SandboxState::Creating => "it has not started yet",
        SandboxState::Running | SandboxState::Stopped | SandboxState::Crashed => {
            "it was never started"
        }
    };
    wrong_state("logs", sandbox, found)
}

fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.nlink() > 1 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it is not the plain file that QEMU writes",
        ));
    }
    Ok(file)
}

/// The last lines, bounded, and without what would move a terminal's cursor or change its colours.
fn tail(file: &File) -> io::Result<Vec<String>> {
    let end = file.metadata()?.len();
    let from = end.saturating_sub(TAIL_BYTES);
    let mut bytes = vec![0; usize::try_from(end - from).unwrap_or(0)];
    file.read_exact_at(&mut bytes, from)?;
    Ok(last_lines(&String::from_utf8_lossy(&bytes)))
}

fn last_lines(text: &str) -> Vec<String> {
    let lines = text.lines().map(without_control);
    let mut kept: Vec<String> = lines.filter(|line| !line.is_empty()).collect();
    kept.drain(..kept.len().saturating_sub(TAIL_LINES));
    kept
}

/// A line without escape sequences and control characters, shortened.
fn without_control(line: &str) -> String {
    let mut clean = String::new();
    let mut chars = line.chars().peekable();
    while let Some(char) = chars.next() {
        if char == '\u{1b}' && chars.next_if_eq(&'[').is_some() {
            // Parameters, up to and with the letter that ends the sequence.
            while chars.next_if(|next| !('@'..='~').contains(next)).is_some() {}
            chars.next();
        } else if char == '\t' {
            clean.push(' ');
        } else if !char.is_control() {
            clean.push(char);
        }
    }
    clean.trim().chars().take(LINE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_repeats_a_few_clean_lines_of_a_console() {
        let many: String = (0..100).map(|n| format!("line {n}\r\n")).collect();
        let lines = last_lines(&many);
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(lines.last().map(String::as_str), Some("line 99"));
        let hostile = "\u{1b}[31;1mred\u{1b}[0m\u{7} \u{9b}2Jx\n\u{1b}]0;title\u{7}\n\n";
        assert_eq!(last_lines(hostile), ["red 2Jx", "]0;title"]);
        assert_eq!(last_lines(&"x".repeat(9999))[0].len(), LINE_CHARS);
        assert!(last_lines("\u{1b}[").is_empty());
    }

    #[test]
    fn what_is_not_the_plain_file_that_qemu_writes_is_not_opened() {
        let dir = tempfile::tempdir().expect("temp dir");
        let at = |name: &str| dir.path().join(name);
        let file = stead_sys::durable::create_scratch(&at("plain"), 0o600).expect("create");
        file.write_all_at(b"one\ntwo", 0).expect("write");
        let opened = open(&at("plain")).expect("a plain file");
        assert_eq!(tail(&opened).expect("read"), ["one", "two"]);

        std::os::unix::fs::symlink(at("plain"), at("link")).expect("link");
        assert!(open(&at("link")).is_err(), "a link");
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at("pipe"),
            rustix::fs::FileType::Fifo,
            mode,
            0,
        )
        .expect("pipe");
        assert!(open(&at("pipe")).is_err(), "a pipe");
        rustix::fs::link(at("plain"), at("second")).expect("hard link");
        assert!(open(&at("plain")).is_err(), "a file with two names");
        assert!(open(dir.path()).is_err(), "a folder");
    }
}
