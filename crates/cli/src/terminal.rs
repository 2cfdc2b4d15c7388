//! The terminal that `stead` runs at: raw while a command in a guest has it, and as it was afterwards.

use std::future::pending;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use stead_engine::{EngineError, Kind, Pty, Result, Told};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;

/// What is assumed of a terminal that does not say.
const ROWS: u16 = 24;
const COLS: u16 = 80;
/// How much may be typed ahead of the guest, in bytes.
const TYPED_BYTES: usize = 4096;
/// Ctrl-P, then Ctrl-Q: the command is left, as docker has it.
const LEAVE: [u8; 2] = [0x10, 0x11];

/// Whether standard input is a terminal.
pub fn is_there() -> bool {
    isatty(std::io::stdin())
}

/// Height in lines and width in characters.
pub fn size() -> (u16, u16) {
    match tcgetwinsize(std::io::stdin()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        Ok(_) | Err(_) => (ROWS, COLS),
    }
}

/// A terminal for a command, like this one.
pub fn like_this() -> Pty {
    let (rows, cols) = size();
    let term = std::env::var("TERM").ok().filter(|term| !term.is_empty());
    Pty {
        rows,
        cols,
        term: term.unwrap_or_else(|| "xterm-256color".to_owned()),
    }
}

/// The terminal passes every key on as it is until this is dropped.
#[derive(Debug)]
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// # Errors
    /// When standard input is no terminal.
    pub fn begin() -> Result<Self> {
        let failed = |source| {
            EngineError::new(Kind::Internal, "set the terminal to pass all keys on", "")
                .because(source)
        };
        let before = tcgetattr(std::io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Drain, &raw).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that has gone away needs no mode.
        tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.before).unwrap_or_default();
    }
}

/// What is typed. The keys that leave the command are told, and so is a terminal that has gone away: neither is an end of
/// the command's input.
pub fn typed(tell: mpsc::Sender<Told>) -> DuplexStream {
    let (mut to_guest, from_keys) = tokio::io::duplex(TYPED_BYTES);
    tokio::spawn(async move {
        let (mut stdin, mut keys) = (tokio::io::stdin(), Keys::default());
        let mut buffer = [0; TYPED_BYTES];
        loop {
            let read = stdin.read(&mut buffer).await.unwrap_or(0);
            let (bytes, leaves) = keys.pass(&buffer[..read]);
            let taken = to_guest.write_all(&bytes).await.is_ok();
            if read == 0 || leaves {
                // Who listens has ended by itself if nobody takes this.
                tell.send(Told::Detach).await.unwrap_or_default();
                return pending().await;
            }
            if !taken {
                return;
            }
        }
    });
    from_keys
}

/// Looks for the keys that leave the command.
#[derive(Debug, Default)]
struct Keys {
    // Whether the first of them was typed last, and not passed on yet.
    is_begun: bool,
}

impl Keys {
    /// What is passed on, and whether the command is left.
    fn pass(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(typed.len().saturating_add(1));
        for &key in typed {
            match (self.is_begun, key) {
                (true, key) if key == LEAVE[1] => return (passed, true),
                (false, key) if key == LEAVE[0] => self.is_begun = true,
                (true, key) if key == LEAVE[0] => passed.push(key),
                (true, key) => {
                    passed.extend([LEAVE[0], key]);
                    self.is_begun = false;
                }
                (false, key) => passed.push(key),
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_keys_are_passed_on_but_the_two_that_leave_however_they_are_cut() {
        let mut keys = Keys::default();
        assert_eq!(keys.pass(b"ab\x11"), (b"ab\x11".to_vec(), false));
        assert_eq!(keys.pass(b"c\x10"), (b"c".to_vec(), false));
        assert_eq!(keys.pass(b"d"), (b"\x10d".to_vec(), false));
        assert_eq!(keys.pass(b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(keys.pass(b"\x11lost"), (Vec::new(), true));
    }
}
