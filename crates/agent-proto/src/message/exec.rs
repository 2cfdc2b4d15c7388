//! Commands: what to run, how it ended, what is known of it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Bytes;
use crate::{Epoch, ExecKey};

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The program and its arguments; the program is looked up in `PATH` unless it has a slash.
    pub argv: Vec<Bytes>,
    /// Added to (or instead of) the environment that the agent gives: `PATH`, `HOME`, `USER`,
    /// `LOGNAME` and `SHELL`.
    pub env: Vec<(Bytes, Bytes)>,
    /// The folder to start in; the user's home when there is none.
    pub cwd: Option<Bytes>,
    /// A name or a number, of the user and, after a colon, of the group; root when there is none.
    pub user: Option<String>,
    /// Whether the command gets a standard input; without, it reads end of file at once.
    pub stdin: bool,
    /// After how many milliseconds the command and its whole group are killed; 0 for never.
    pub timeout_ms: u64,
    /// A terminal for the command: its input, and all its output as standard output.
    pub pty: Option<Pty>,
    /// Limits of resources, set before the program runs.
    pub limits: Vec<ResourceLimit>,
}

/// A terminal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pty {
    /// Its height in lines.
    pub rows: u16,
    /// Its width in characters.
    pub cols: u16,
    /// What `TERM` says.
    pub term: String,
}

/// A limit of one resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ResourceLimit {
    /// Which resource.
    pub resource: Resource,
    /// The limit, in the unit of getrlimit(2); nothing for none.
    pub soft: Option<u64>,
    /// What the limit may be raised to.
    pub hard: Option<u64>,
}

/// A resource that can be limited, as getrlimit(2) has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Resource {
    /// Address space in bytes.
    AddressSpace,
    /// Size of a core file in bytes.
    Core,
    /// Processor time in seconds.
    Cpu,
    /// The data segment in bytes.
    Data,
    /// Size of a file in bytes.
    FileSize,
    /// Locked memory in bytes.
    LockedMemory,
    /// Open files.
    OpenFiles,
    /// Processes of the user.
    Processes,
    /// The stack in bytes.
    Stack,
}

/// A stream that a command writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl OutputStream {
    /// Both, in the order of their places.
    pub const ALL: [Self; 2] = [Self::Stdout, Self::Stderr];

    /// 0 for standard output, 1 for standard error.
    #[must_use]
    pub fn place(self) -> usize {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It ended itself with this code.
    Code(i32),
    /// A signal with this number ended it.
    Signal(i32),
    /// It ran longer than it was allowed to and was killed with its group.
    TimedOut,
}

/// What the agent knows of a command by its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CommandState {
    /// Nothing of it has run, and nothing will unless it is asked again.
    NotRun,
    /// It runs, or is about to.
    Running,
    /// It has ended.
    Ended(ExitStatus),
    /// It may have run or not: the agent remembers a bounded number of commands, and none from before it was started.
    Forgotten,
}

impl fmt::Display for CommandState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRun => f.write_str("it has not run"),
            Self::Running => f.write_str("it runs"),
            Self::Ended(ExitStatus::Code(code)) => write!(f, "it has ended with code {code}"),
            Self::Ended(ExitStatus::Signal(signal)) => write!(f, "signal {signal} has ended it"),
            Self::Ended(ExitStatus::TimedOut) => f.write_str("its time was over"),
            Self::Forgotten => f.write_str("the agent does not remember whether it has run"),
        }
    }
}

/// A command as [`super::Request::List`] gives it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CommandEntry {
    /// Its key.
    pub key: ExecKey,
    /// The epoch that it was begun in.
    pub epoch: Epoch,
    /// Its words, cut to [`LISTED_ARGV_BYTES`] in sum.
    pub argv: Vec<Bytes>,
    /// The number of its process in the guest, when it has one.
    pub pid: Option<u32>,
    /// Whether it has a terminal.
    pub pty: bool,
    /// When it was started, in nanoseconds since 1970-01-01 UTC by the guest's clock; 0 before that.
    pub started_ns: u64,
    /// Whether a session listens to it.
    pub attached: bool,
    /// What is kept of its output.
    pub output: [Kept; 2],
    /// Its state.
    pub state: CommandState,
}

/// How many bytes of a command's words are listed at most.
pub const LISTED_ARGV_BYTES: usize = 256;

/// Which bytes of an output stream are kept, counted from the stream's beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Kept {
    /// The first that is kept; all before it are gone.
    pub first: u64,
    /// Behind the last that was written.
    pub end: u64,
}

/// Where a session takes up a command that runs already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Attachment {
    /// The number of its process in the guest, when it is known.
    pub pid: Option<u32>,
    /// The first bytes of standard output and standard error that follow; more than was asked for when those before are gone.
    pub first: [u64; 2],
    /// The command's input, while it is open.
    pub stdin: Option<StdinState>,
}

/// The state of a command's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StdinState {
    /// How many bytes the agent has received from all sessions: what follows them is what must be sent.
    pub received: u64,
    /// The credit to begin with, in bytes.
    pub window_bytes: u32,
}

/// Why a command was not started.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Rejection {
    /// The session has as many streams open as it may.
    TooManyStreams {
        /// How many that is.
        limit: u32,
    },
    /// The file systems are frozen: the command could hang in its first write.
    Frozen,
    /// The guest's processes stand still for a capture.
    WorkloadFrozen,
    /// The epoch has not been released yet.
    NotReleased,
    /// The agent watches as many commands as it can.
    TooManyCommands {
        /// How many that is.
        limit: u32,
    },
    /// The request makes no sense: no program, a zero byte in an argument, an unknown user.
    Invalid(String),
    /// The program could not be started.
    Start {
        /// What failed.
        step: String,
        /// The operating system's error number; 0 when it is not one.
        errno: i32,
    },
    /// There is no such command to attach to.
    Unknown(CommandState),
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManyStreams { limit } => {
                write!(
                    f,
                    "the session has {limit} streams open, and no more are carried"
                )
            }
            Self::Frozen => f.write_str("the file systems are frozen"),
            Self::WorkloadFrozen => f.write_str("the guest's processes are frozen"),
            Self::NotReleased => f.write_str("the guest's new life has not been released yet"),
            Self::TooManyCommands { limit } => {
                write!(
                    f,
                    "{limit} commands run or hold their output open, and no more are watched"
                )
            }
            Self::Invalid(reason) => f.write_str(reason),
            Self::Start { step, errno: 0 } => f.write_str(step),
            Self::Start { step, errno } => {
                write!(f, "{step}: {}", std::io::Error::from_raw_os_error(*errno))
            }
            Self::Unknown(state) => write!(f, "there is nothing to attach to: {state}"),
        }
    }
}
