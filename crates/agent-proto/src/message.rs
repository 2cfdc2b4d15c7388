//! What host and guest say to each other.
//!
//! A payload is one [`HostMessage`] or one [`GuestMessage`] in postcard encoding and nothing after it. New
//! variants are added at the end; a changed meaning takes a new [`crate::frame::VERSION`].

use std::fmt;

use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::frame::{Kind, MAX_PAYLOAD_BYTES};
use crate::{Frame, ProtocolError};

/// Bytes that need not be text: an argument, a path, output.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

impl From<&str> for Bytes {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesVisitor;
        impl Visitor<'_> for BytesVisitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(BytesVisitor)
    }
}

/// 64 random bytes for the guest's random number generator. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Seed(pub [u8; 64]);

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed(hidden)")
    }
}

impl Serialize for Seed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Bytes(self.0.to_vec()).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Bytes::deserialize(deserializer)?;
        let length = bytes.0.len();
        <[u8; 64]>::try_from(bytes.0)
            .ok()
            .map(Self)
            .ok_or_else(|| serde::de::Error::invalid_length(length, &"64 bytes"))
    }
}

/// Why the host says hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// The machine has booted.
    Boot,
    /// It was restored from a checkpoint.
    Restore,
    /// It is a fork of another.
    Fork,
    /// It was hibernated and goes on.
    Wake,
    /// The same life, another session: nothing is set up again.
    Reattach,
}

/// The first message of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Why the host says hello.
    pub reason: Reason,
}

/// The answer to a hello that begins a life: the agent is there, and nothing has been changed yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hail {
    /// The version of the agent.
    pub agent_version: String,
}

/// What the new life is set up with. Sent only when the guest has hailed: a hello may lie in a port for as long as a
/// machine boots or stands still, and the time in it would be as old.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The host's wall clock in nanoseconds since 1970-01-01 UTC.
    pub wall_clock_ns: u64,
    /// For the guest's random number generator.
    pub seed: Seed,
    /// A new name for the guest.
    pub hostname: Option<String>,
}

/// A step of the handshake, in the order in which they are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Whether the epoch may become (or is) the current one.
    Epoch,
    /// Sessions of other epochs are dropped; their commands go on unheard.
    Sessions,
    /// File systems that an earlier session left frozen are thawed.
    Thaw,
    /// The clock is set.
    Clock,
    /// The random number generator is seeded, credited and rekeyed.
    Entropy,
    /// The guest takes its new name.
    Hostname,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Epoch => "epoch",
            Self::Sessions => "sessions",
            Self::Thaw => "thaw",
            Self::Clock => "clock",
            Self::Entropy => "entropy",
            Self::Hostname => "hostname",
        })
    }
}

/// What a step of the handshake came to, when it did not fail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PhaseOutcome {
    /// It was done.
    Done,
    /// It was not done, and why that is right.
    Skipped(String),
}

/// What a step of the handshake came to, and how long it took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseReport {
    /// Which step.
    pub phase: Phase,
    /// What it came to.
    pub outcome: PhaseOutcome,
    /// How long it took, in nanoseconds.
    pub duration_ns: u64,
}

/// The answer to a setup whose steps were all done, and to a reattach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The version of the agent.
    pub agent_version: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// How far the guest's clock was behind the host's before it was set, in nanoseconds.
    pub clock_behind_ns: Option<i64>,
    /// The steps.
    pub phases: Vec<PhaseReport>,
}

/// The answer to a hello or setup of which a step failed. There is no session, and none of an earlier epoch either.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// The step that failed.
    pub phase: Phase,
    /// Why.
    pub error: String,
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
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
}

/// A stream that a command writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It ended itself with this code.
    Code(i32),
    /// A signal with this number ended it.
    Signal(i32),
    /// It ran longer than it was allowed to and was killed with its group.
    TimedOut,
}

/// How the machine is to be shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShutdownKind {
    /// Power off.
    Poweroff,
    /// Reboot.
    Reboot,
}

/// What the host asks of the agent, besides commands. Answered by [`GuestMessage::Done`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Freeze every writable file system on a block device, until thaw or for so many milliseconds.
    Freeze {
        /// When the agent thaws by itself.
        limit_ms: u64,
    },
    /// Thaw what was frozen.
    Thaw,
    /// Write what is dirty.
    Sync,
    /// Write what is dirty, then drop clean caches.
    DropCaches,
    /// Answer.
    Ping,
    /// Shut the machine down.
    Shutdown(ShutdownKind),
}

/// From the host to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// The first message of a session.
    Hello(Hello),
    /// The answer to a hail.
    Setup(Setup),
    /// Run a command.
    Exec {
        /// The host's number for it, larger than all before in the session.
        id: u64,
        /// What to run.
        request: ExecRequest,
    },
    /// Standard input for the command.
    Stdin {
        /// The command.
        id: u64,
        /// 1 to [`crate::flow::MAX_CHUNK_BYTES`] bytes.
        data: Bytes,
    },
    /// Standard input ends.
    StdinEnd {
        /// The command.
        id: u64,
    },
    /// A signal for the command's process group.
    Signal {
        /// The command.
        id: u64,
        /// 1 to 31.
        signal: i32,
    },
    /// More credit for an output stream.
    Credit {
        /// The command.
        id: u64,
        /// The stream.
        stream: OutputStream,
        /// How much more.
        bytes: u32,
    },
    /// Do something else.
    Request {
        /// The host's number for it, larger than all before in the session.
        id: u64,
        /// What to do.
        request: Request,
    },
}

/// Why a command was not started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rejection {
    /// The session runs another command.
    Busy,
    /// The file systems are frozen: the command could hang in its first write.
    Frozen,
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
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => f.write_str("the session runs another command"),
            Self::Frozen => f.write_str("the file systems are frozen"),
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
        }
    }
}

/// The state of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Commands that run and are listened to.
    pub attached_commands: u32,
    /// Commands that run unheard because their session ended.
    pub detached_commands: u32,
    /// Whether file systems are frozen.
    pub frozen: bool,
    /// Frames of other epochs or sessions that were discarded since the agent began.
    pub stale_frames: u64,
    /// Bytes that were no frame and were discarded since the agent began.
    pub garbage_bytes: u64,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Done {
    /// It was done.
    Ok,
    /// The file systems are frozen.
    Frozen {
        /// Where they are mounted.
        mounts: Vec<Bytes>,
        /// Where writable file systems are mounted that cannot be frozen; they were written out.
        unsupported: Vec<Bytes>,
    },
    /// The state of the agent.
    Status(Status),
    /// It was not done.
    Failed(String),
}

/// The sequence number of a [`GuestMessage::SessionBroken`] about a session that the agent does not know, nor therefore
/// the number that is due in it.
pub const UNKNOWN_SESSION_SEQ: u64 = u64::MAX;

/// From the guest to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestMessage {
    /// The agent is there and waits for the setup.
    Hail(Hail),
    /// Commands are accepted.
    Ready(Ready),
    /// A step failed; there is no session.
    Failed(Failed),
    /// The command runs.
    Accepted {
        /// The command.
        id: u64,
    },
    /// The command does not run.
    Rejected {
        /// The command.
        id: u64,
        /// Why.
        reason: Rejection,
    },
    /// Output of the command.
    Output {
        /// The command.
        id: u64,
        /// The stream.
        stream: OutputStream,
        /// 1 to [`crate::flow::MAX_CHUNK_BYTES`] bytes.
        data: Bytes,
    },
    /// More credit for standard input.
    StdinCredit {
        /// The command.
        id: u64,
        /// How much more.
        bytes: u32,
    },
    /// The command has closed its standard input: what comes is thrown away.
    StdinClosed {
        /// The command.
        id: u64,
    },
    /// The command has ended, and all that it wrote was sent before.
    Exit {
        /// The command.
        id: u64,
        /// How.
        status: ExitStatus,
    },
    /// The answer to a request.
    Done {
        /// The request.
        id: u64,
        /// What it came to.
        outcome: Done,
    },
    /// The session has ended because of what the host sent; with the number [`UNKNOWN_SESSION_SEQ`], the agent does
    /// not know the session, and has not done what was asked in it.
    SessionBroken {
        /// What that was.
        reason: String,
    },
}

/// A message that can be a frame's payload.
pub trait Message: Serialize + DeserializeOwned {
    /// The kind of frame that carries it.
    fn kind(&self) -> Kind;

    /// What it is called in errors.
    fn name(&self) -> &'static str;

    /// The payload.
    ///
    /// # Errors
    /// [`ProtocolError::TooLarge`] when it does not fit into a frame.
    fn to_payload(&self) -> Result<Vec<u8>, ProtocolError> {
        let payload = postcard::to_stdvec(self).map_err(ProtocolError::Encode)?;
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(ProtocolError::TooLarge {
                found_bytes: payload.len(),
                limit_bytes: MAX_PAYLOAD_BYTES,
            });
        }
        Ok(payload)
    }

    /// The message in a frame: exactly one, and of the frame's kind.
    ///
    /// # Errors
    /// [`ProtocolError::Payload`] when it is not.
    fn from_frame(frame: &Frame) -> Result<Self, ProtocolError> {
        let wrong = |source| ProtocolError::Payload {
            seq: frame.seq,
            source,
        };
        let (message, rest) = postcard::take_from_bytes::<Self>(&frame.payload).map_err(wrong)?;
        if !rest.is_empty() || message.kind() != frame.kind {
            return Err(wrong(postcard::Error::DeserializeBadEncoding));
        }
        Ok(message)
    }
}

impl Message for HostMessage {
    fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) | Self::Setup(_) => Kind::Handshake,
            Self::Exec { .. }
            | Self::Stdin { .. }
            | Self::StdinEnd { .. }
            | Self::Signal { .. }
            | Self::Credit { .. }
            | Self::Request { .. } => Kind::Session,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Setup(_) => "setup",
            Self::Exec { .. } => "exec",
            Self::Stdin { .. } => "stdin",
            Self::StdinEnd { .. } => "end of stdin",
            Self::Signal { .. } => "signal",
            Self::Credit { .. } => "credit",
            Self::Request { .. } => "request",
        }
    }
}

impl Message for GuestMessage {
    fn kind(&self) -> Kind {
        match self {
            Self::Hail(_) | Self::Ready(_) | Self::Failed(_) => Kind::Handshake,
            Self::Accepted { .. }
            | Self::Rejected { .. }
            | Self::Output { .. }
            | Self::StdinCredit { .. }
            | Self::StdinClosed { .. }
            | Self::Exit { .. }
            | Self::Done { .. }
            | Self::SessionBroken { .. } => Kind::Session,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Hail(_) => "hail",
            Self::Ready(_) => "ready",
            Self::Failed(_) => "failed",
            Self::Accepted { .. } => "accepted",
            Self::Rejected { .. } => "rejected",
            Self::Output { .. } => "output",
            Self::StdinCredit { .. } => "stdin credit",
            Self::StdinClosed { .. } => "stdin closed",
            Self::Exit { .. } => "exit",
            Self::Done { .. } => "done",
            Self::SessionBroken { .. } => "session broken",
        }
    }
}
