//! Pseudo terminals for commands: one is opened, given to a launcher as all three streams, read, written, resized, hung up.
//!
//! ```text
//!   open ──▶ streams to the launcher ──▶ the command's controlling terminal
//!    │ own side                             │ nobody has it open any more
//!    └── read: bytes … bytes, then EIO ◀────┘        (the kernel gives what was written first)
//!    └── dropped: the command's session gets SIGHUP
//! ```
//! Until the own copies of the other side are closed (see [`Streams`]), the end cannot be seen: drop them once the launcher has
//! them.
//!
//! # Source
//! pty(7), tty_ioctl(4), termios(3).

use std::fmt;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Winsize, tcgetattr, tcsetattr,
    tcsetwinsize,
};

use crate::error::{AgentError, Attempt};
use crate::launch::Streams;

/// What a terminal is called unless the host says otherwise.
const DEFAULT_KIND: &str = "xterm-256color";
/// The longest name of a kind of terminal, in bytes.
const MAX_KIND_BYTES: usize = 64;

/// The size of a terminal in character cells. Zero says that it is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TerminalSize {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
}

impl fmt::Display for TerminalSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} rows of {} columns", self.rows, self.columns)
    }
}

/// The own side of a pseudo terminal. It does not block. Dropping it hangs the terminal up.
#[derive(Debug)]
pub(crate) struct Terminal {
    master: OwnedFd,
}

impl Terminal {
    /// Opens a terminal of the given size, with the kernel's usual settings and UTF-8 input, that belongs to user `owner`;
    /// gives the streams of the command as well.
    ///
    /// # Errors
    /// When there are no pseudo terminals (`/dev/pts` is not mounted), or none is free.
    pub(crate) fn open(size: TerminalSize, owner: u32) -> Result<(Self, Streams), AgentError> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).attempt(|| "open a pseudo terminal".to_owned())?;
        let prepare = || {
            grantpt(&master)?;
            unlockpt(&master)?;
            let other = ioctl_tiocgptpeer(&master, flags)?;
            // The group stays: it lets others write messages to the terminal where it is set up so.
            rustix::fs::fchown(&other, Some(Uid::from_raw(owner)), None::<Gid>)?;
            let mut settings = tcgetattr(&other)?;
            settings.input_modes |= InputModes::IUTF8;
            tcsetattr(&other, OptionalActions::Now, &settings)?;
            tcsetwinsize(&other, winsize(size))?;
            fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
            let again = || rustix::io::fcntl_dupfd_cloexec(&other, 3);
            Ok::<_, Errno>(Streams {
                stdin: again()?,
                stdout: again()?,
                stderr: other,
            })
        };
        let streams = prepare().attempt(|| format!("set up a terminal of {size}"))?;
        Ok((Self { master }, streams))
    }

    /// The terminal of which `master` is the own side.
    pub(crate) fn of(master: OwnedFd) -> Self {
        Self { master }
    }

    /// The own side once more, for another agent.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub(crate) fn again(&self) -> std::io::Result<OwnedFd> {
        self.master.try_clone()
    }

    /// Changes the size; whoever runs in the foreground gets SIGWINCH when it differs.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn resize(&self, size: TerminalSize) -> Result<(), AgentError> {
        tcsetwinsize(&self.master, winsize(size)).attempt(|| format!("make a terminal of {size}"))
    }

    /// The own side once more, to read or to type at. A read gives EIO when nobody has the terminal open any more and
    /// everything that was written has been read. The terminal is hung up when all are closed.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub(crate) fn side(&self) -> Result<OwnedFd, AgentError> {
        rustix::io::fcntl_dupfd_cloexec(&self.master, 3)
            .attempt(|| "have a terminal once more".to_owned())
    }

    /// The byte to type for the end of input, where the command reads whole lines. One that reads byte by byte knows no end
    /// of input but a hang-up.
    ///
    /// # Errors
    /// When the kernel fails.
    pub(crate) fn end_of_input(&self) -> Result<Option<u8>, AgentError> {
        let settings =
            tcgetattr(&self.master).attempt(|| "read a terminal's settings".to_owned())?;
        let code = settings.special_codes[SpecialCodeIndex::VEOF];
        let by_lines = settings.local_modes.contains(LocalModes::ICANON);
        Ok((by_lines && code != 0).then_some(code))
    }
}

/// What `TERM` says for a terminal that the host calls `name`.
pub(crate) fn kind(name: &str) -> &str {
    if is_kind(name.as_bytes()) {
        name
    } else {
        DEFAULT_KIND
    }
}

/// Whether it can be a kind of terminal: the name becomes part of a path in some programs.
fn is_kind(name: &[u8]) -> bool {
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_+.".contains(byte);
    !name.is_empty()
        && name.len() <= MAX_KIND_BYTES
        && !name.starts_with(b".")
        && name.iter().all(is_allowed)
}

/// Mounts `/dev/pts` where nobody has, for process 1.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn mount_terminals() -> Result<(), AgentError> {
    use rustix::mount::{MountFlags, mount};
    let point = "/dev/pts";
    match rustix::fs::mkdir(point, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error).attempt(|| format!("make the folder {point}")),
    }
    let options = c"ptmxmode=0666,mode=620,gid=5";
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    match mount("devpts", point, "devpts", flags, options) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(error).attempt(|| format!("mount {point}")),
    }
}

fn winsize(size: TerminalSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_of_terminal_is_a_plain_name() {
        assert!(is_kind(DEFAULT_KIND.as_bytes()));
        for name in [&b""[..], b"../x", b"a/b", b"a b", b"a\0", b".", &[b'a'; 65]] {
            assert!(!is_kind(name), "{}", String::from_utf8_lossy(name));
        }
    }

    #[test]
    fn what_was_written_before_the_end_is_read_before_the_end() {
        let size = TerminalSize {
            rows: 5,
            columns: 7,
        };
        let own = rustix::process::geteuid().as_raw();
        let (terminal, streams) = Terminal::open(size, own).expect("opened");
        let own = terminal.side().expect("open");
        let mut buffer = [0; 64];
        let mut read = || rustix::io::read(&own, &mut buffer).map(|count| buffer[..count].to_vec());
        assert_eq!(read(), Err(Errno::AGAIN));
        assert_eq!(terminal.end_of_input().expect("read"), Some(4));
        rustix::io::write(&streams.stderr, b"last words\n").expect("written");
        drop(streams);
        assert_eq!(read(), Ok(b"last words\r\n".to_vec()));
        assert_eq!(read(), Err(Errno::IO));
        assert_eq!(read(), Err(Errno::IO));
    }
}
