//! A sandbox's console as its guest wrote it.
//!
//! The file lies in a folder that the VM's user may write to, and is opened by whoever asks, mostly root. So
//! the name is not followed if it is a link, a pipe or device is not waited for, and a file with a second
//! name is refused: each could be something else that the VM's user has put there.
//!
//! A guest can write for ever. So every command gives the room of the oldest part of a long console back, as a hole: QEMU
//! only appends, so nothing that it writes meanwhile is lost, and places in the file stay what they are for who follows
//! it. Between two commands nobody looks: what a guest writes then has no bound.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;

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

/// How much of a console's end is kept, in bytes.
const KEPT_BYTES: u64 = 16 << 20;
/// How much more than that it has when the rest is given back.
const EXCESS_BYTES: u64 = 16 << 20;
/// Room is given back in whole blocks of the file system, which are not larger than this, in bytes.
const BLOCK_BYTES: u64 = 64 << 10;

/// A console that can be read.
#[derive(Debug)]
pub struct Console {
    /// The file.
    pub path: PathBuf,
    /// The same, open for reading.
    pub file: File,
    /// From where on it is kept, in bytes; 0 unless it became too long.
    pub begin: u64,
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
        let begin = begin(&file).at("read the console", &path)?;
        Ok(Console { path, file, begin })
    }

    /// Gives back what is too much of the consoles of this worker. One that cannot be shortened stays as it is.
    pub(crate) async fn shorten_consoles(&self) -> Result<()> {
        for launch in self
            .records
            .sandboxes()
            .await?
            .iter()
            .filter_map(|one| one.launch.as_ref())
        {
            let path = self.dir.run(launch).join(stead_vmm::dir::SERIAL_LOG);
            if let Err(error) = shorten(&path, KEPT_BYTES, EXCESS_BYTES) {
                tracing::debug!(path = %path.display(), %error, "the console is not shortened");
            }
        }
        Ok(())
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
    open_as(path, OFlags::RDONLY)
}

fn open_as(path: &Path, access: OFlags) -> io::Result<File> {
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
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

/// Where what is kept begins: at a line, unless its first one is very long.
fn begin(file: &File) -> io::Result<u64> {
    let data = match rustix::fs::seek(file, SeekFrom::Data(0)) {
        Ok(0) | Err(Errno::NXIO) => return Ok(0),
        Ok(data) => data,
        Err(error) => return Err(error.into()),
    };
    let mut bytes = [0; TAIL_BYTES as usize];
    let read = file.read_at(&mut bytes, data)?;
    let end = bytes[..read].iter().position(|byte| *byte == b'\n');
    Ok(data + end.map_or(0, |end| end as u64 + 1))
}

/// Gives the room of all but the last `kept` bytes back, if there are more than `excess` beside them.
fn shorten(path: &Path, kept: u64, excess: u64) -> io::Result<()> {
    let length = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if length <= kept.saturating_add(excess) {
        return Ok(());
    }
    let file = open_as(path, OFlags::RDWR)?;
    let folder = path.parent().unwrap_or(path);
    // QEMU made it, in a folder of its own: another owner's file was put there.
    if file.metadata()?.uid() != std::fs::metadata(folder)?.uid() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it has another owner than its folder",
        ));
    }
    let end = (length - kept) / BLOCK_BYTES * BLOCK_BYTES;
    let begun = match rustix::fs::seek(&file, SeekFrom::Data(0)) {
        Ok(begun) => begun,
        Err(Errno::NXIO) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if end.saturating_sub(begun) >= excess {
        stead_sys::space::punch(&file, 0, end)?;
    }
    Ok(())
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
    fn a_long_console_keeps_its_end_and_its_places_and_what_is_appended_meanwhile() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("console");
        let file = stead_sys::durable::create_scratch(&path, 0o600).expect("create");
        let line = [vec![b'x'; 99], vec![b'\n']].concat();
        let text = line.repeat(10_000);
        file.write_all_at(&text, 0).expect("write");
        let (kept, excess) = (100_000, 200_000);
        let allocated = || stead_sys::space::allocated_bytes(&path).expect("ask");
        shorten(&path, kept, 950_000).expect("short enough");
        assert_eq!(begin(&open(&path).expect("open")).expect("begin"), 0);
        let before = allocated();
        shorten(&path, kept, excess).expect("shorten");
        assert!(
            allocated() + 800_000 < before,
            "{} of {before}",
            allocated()
        );
        file.write_all_at(b"more\n", text.len() as u64)
            .expect("QEMU appends");
        let console = open(&path).expect("open");
        let begin = begin(&console).expect("begin");
        assert!(
            (800_000..=900_000).contains(&begin) && begin.is_multiple_of(100),
            "{begin}"
        );
        let mut rest = vec![0; text.len() + 5 - usize::try_from(begin).expect("small")];
        console.read_exact_at(&mut rest, begin).expect("read");
        assert_eq!(
            rest,
            [&text[usize::try_from(begin).expect("small")..], b"more\n"].concat()
        );
        // Again there is too little to give back.
        let before = allocated();
        shorten(&path, kept, excess).expect("shorten");
        assert_eq!(allocated(), before);
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
