//! What host and guest say to each other.
//!
//! A payload is one [`HostMessage`] or one [`GuestMessage`] in postcard encoding and nothing after it. New
//! variants are added at the end; a changed meaning takes a new [`crate::frame::VERSION`].

mod bytes;
mod exec;
mod handshake;
mod request;

pub use bytes::{Bytes, Seed};
pub use exec::{
    Attachment, CommandEntry, CommandState, ExecRequest, ExitStatus, Kept, LISTED_ARGV_BYTES,
    OutputStream, Pty, Rejection, Resource, ResourceLimit, StdinState,
};
pub use handshake::{
    Failed, ForkIdentity, Hail, Hello, Identity, IoctlReport, NetworkIdentity, Phase, PhaseDetail,
    PhaseOutcome, PhaseReport, Ready, Reason, Setup, WorkloadState,
};
pub use request::{Done, Request, ShutdownKind, Status};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::frame::{Kind, MAX_PAYLOAD_BYTES};
use crate::{Epoch, ExecKey, Frame, ProtocolError};

/// From the host to the guest.
///
/// An `id` names a stream or a request in the session; the host draws them, each larger than all before.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HostMessage {
    /// The first message of a session.
    Hello(Hello),
    /// The answer to a hail.
    Setup(Setup),
    /// Take note of a command. Nothing of it runs before [`HostMessage::Go`].
    Exec {
        /// The stream.
        id: u64,
        /// 128 random bits that name the command: one key never runs twice.
        key: ExecKey,
        /// The epoch in which the key was first asked for, when it is asked for again.
        again: Option<Epoch>,
        /// What to run.
        request: ExecRequest,
    },
    /// Run what was accepted.
    Go {
        /// The stream.
        id: u64,
    },
    /// Listen to a command that runs already, or has ended and left output.
    Attach {
        /// The stream.
        id: u64,
        /// The command.
        key: ExecKey,
        /// From which bytes of standard output and standard error on.
        from: [u64; 2],
    },
    /// Listen no more; the command goes on.
    Detach {
        /// The stream.
        id: u64,
    },
    /// Standard input for the command.
    Stdin {
        /// The stream.
        id: u64,
        /// 1 to [`crate::flow::MAX_CHUNK_BYTES`] bytes.
        data: Bytes,
    },
    /// Standard input ends.
    StdinEnd {
        /// The stream.
        id: u64,
    },
    /// A signal for the command's process group.
    Signal {
        /// The stream.
        id: u64,
        /// 1 to 31.
        signal: i32,
    },
    /// Another size for the command's terminal.
    Resize {
        /// The stream.
        id: u64,
        /// Lines.
        rows: u16,
        /// Characters.
        cols: u16,
    },
    /// More credit for an output stream.
    Credit {
        /// The stream.
        id: u64,
        /// Which output.
        stream: OutputStream,
        /// How much more.
        bytes: u32,
    },
    /// Do something else.
    Request {
        /// The host's number for it.
        id: u64,
        /// What to do.
        request: Request,
    },
    /// Begin an operation on files.
    File {
        /// The stream.
        id: u64,
        /// What to do, encoded by the file operations' own module.
        op: Bytes,
    },
    /// Data of an operation on files.
    FileData {
        /// The stream.
        id: u64,
        /// 1 to [`crate::flow::MAX_CHUNK_BYTES`] bytes.
        data: Bytes,
    },
    /// No data follows.
    FileEnd {
        /// The stream.
        id: u64,
    },
    /// More credit for data to the host.
    FileCredit {
        /// The stream.
        id: u64,
        /// How much more.
        bytes: u32,
    },
    /// The operation is given up.
    FileCancel {
        /// The stream.
        id: u64,
    },
}

/// The sequence number of a [`GuestMessage::SessionBroken`] about a session that the agent does not know, nor therefore
/// the number that is due in it.
pub const UNKNOWN_SESSION_SEQ: u64 = u64::MAX;

/// From the guest to the host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GuestMessage {
    /// The agent is there and waits for the setup.
    Hail(Hail),
    /// The epoch is acknowledged.
    Ready(Ready),
    /// A step failed; there is no session.
    Failed(Failed),
    /// The command is noted, and nothing of it has run.
    Accepted {
        /// The stream.
        id: u64,
    },
    /// The command runs.
    Started {
        /// The stream.
        id: u64,
        /// The number of its process in the guest.
        pid: u32,
        /// The credit for its input to begin with, in bytes; 0 when it takes none.
        stdin_window_bytes: u32,
    },
    /// The command does not run, or there is nothing to attach to. The stream is closed.
    Rejected {
        /// The stream.
        id: u64,
        /// Why.
        reason: Rejection,
    },
    /// The key was used before: nothing was begun. The stream is closed.
    Known {
        /// The stream.
        id: u64,
        /// What became of the command.
        state: CommandState,
    },
    /// The session listens to the command; its output follows.
    Attached {
        /// The stream.
        id: u64,
        /// Where it is taken up.
        at: Attachment,
    },
    /// The session listens no more, and the command goes on. The stream is closed.
    Detached {
        /// The stream.
        id: u64,
        /// Why.
        reason: String,
    },
    /// Output of the command.
    Output {
        /// The stream.
        id: u64,
        /// Which output.
        stream: OutputStream,
        /// 1 to [`crate::flow::MAX_CHUNK_BYTES`] bytes.
        data: Bytes,
    },
    /// More credit for standard input.
    StdinCredit {
        /// The stream.
        id: u64,
        /// How much more.
        bytes: u32,
    },
    /// The command has closed its standard input: what comes is thrown away.
    StdinClosed {
        /// The stream.
        id: u64,
    },
    /// The command has ended, and all that it wrote was sent before. The stream is closed.
    Exit {
        /// The stream.
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
    /// The session has ended because of what the host sent or did; with the number [`UNKNOWN_SESSION_SEQ`], the agent does
    /// not know the session, and has not done what was asked in it.
    SessionBroken {
        /// What that was.
        reason: String,
    },
    /// An answer of an operation on files.
    File {
        /// The stream.
        id: u64,
        /// What it says, encoded by the file operations' own module.
        reply: Bytes,
        /// Whether it is the last: the stream is closed.
        last: bool,
    },
    /// Data of an operation on files.
    FileData {
        /// The stream.
        id: u64,
        /// 1 to [`crate::flow::MAX_CHUNK_BYTES`] bytes.
        data: Bytes,
    },
    /// More credit for data to the guest.
    FileCredit {
        /// The stream.
        id: u64,
        /// How much more.
        bytes: u32,
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
            | Self::Go { .. }
            | Self::Attach { .. }
            | Self::Detach { .. }
            | Self::Stdin { .. }
            | Self::StdinEnd { .. }
            | Self::Signal { .. }
            | Self::Resize { .. }
            | Self::Credit { .. }
            | Self::Request { .. }
            | Self::File { .. }
            | Self::FileData { .. }
            | Self::FileEnd { .. }
            | Self::FileCredit { .. }
            | Self::FileCancel { .. } => Kind::Session,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Setup(_) => "setup",
            Self::Exec { .. } => "exec",
            Self::Go { .. } => "go",
            Self::Attach { .. } => "attach",
            Self::Detach { .. } => "detach",
            Self::Stdin { .. } => "stdin",
            Self::StdinEnd { .. } => "end of stdin",
            Self::Signal { .. } => "signal",
            Self::Resize { .. } => "resize",
            Self::Credit { .. } => "credit",
            Self::Request { .. } => "request",
            Self::File { .. } => "file",
            Self::FileData { .. } => "file data",
            Self::FileEnd { .. } => "end of file data",
            Self::FileCredit { .. } => "file credit",
            Self::FileCancel { .. } => "file cancel",
        }
    }
}

impl Message for GuestMessage {
    fn kind(&self) -> Kind {
        match self {
            Self::Hail(_) | Self::Ready(_) | Self::Failed(_) => Kind::Handshake,
            Self::Accepted { .. }
            | Self::Started { .. }
            | Self::Rejected { .. }
            | Self::Known { .. }
            | Self::Attached { .. }
            | Self::Detached { .. }
            | Self::Output { .. }
            | Self::StdinCredit { .. }
            | Self::StdinClosed { .. }
            | Self::Exit { .. }
            | Self::Done { .. }
            | Self::SessionBroken { .. }
            | Self::File { .. }
            | Self::FileData { .. }
            | Self::FileCredit { .. } => Kind::Session,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Hail(_) => "hail",
            Self::Ready(_) => "ready",
            Self::Failed(_) => "failed",
            Self::Accepted { .. } => "accepted",
            Self::Started { .. } => "started",
            Self::Rejected { .. } => "rejected",
            Self::Known { .. } => "known",
            Self::Attached { .. } => "attached",
            Self::Detached { .. } => "detached",
            Self::Output { .. } => "output",
            Self::StdinCredit { .. } => "stdin credit",
            Self::StdinClosed { .. } => "stdin closed",
            Self::Exit { .. } => "exit",
            Self::Done { .. } => "done",
            Self::SessionBroken { .. } => "session broken",
            Self::File { .. } => "file reply",
            Self::FileData { .. } => "file data",
            Self::FileCredit { .. } => "file credit",
        }
    }
}
