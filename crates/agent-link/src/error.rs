//! What went wrong on the way to the agent, and what stands then.

use std::fmt;
use std::io;
use std::time::Duration;

use stead_agent_proto::ProtocolError;
use stead_agent_proto::host::Discarded;
use stead_agent_proto::message::{CommandState, Phase, Rejection};

use crate::transport::Place;

/// Where on the way something went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Hello was or is being sent, Ready is awaited.
    Handshake,
    /// A command was sent, and whether it runs is not known.
    Start,
    /// A command that runs already was asked for.
    Attach,
    /// A command runs.
    Run,
    /// A request was sent.
    Request(&'static str),
}

impl Stage {
    /// What is known of the VM when this stage fails.
    #[must_use]
    pub fn standing(self) -> &'static str {
        match self {
            Self::Handshake => "the VM is not ready and no command has been sent to it",
            Self::Start => {
                "whether the command was started is not known; if it was, it runs on unheard"
            }
            Self::Attach | Self::Run => {
                "the VM is as it was; the command, if it still runs, runs on unheard"
            }
            Self::Request(_) => {
                "whether the request was carried out is not known; frozen file systems thaw by themselves"
            }
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handshake => f.write_str("handshake"),
            Self::Start => f.write_str("start of a command"),
            Self::Attach => f.write_str("attachment to a command"),
            Self::Run => f.write_str("command"),
            Self::Request(name) => write!(f, "request {name}"),
        }
    }
}

/// What went wrong on the way to the agent.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The agent's port cannot be connected to.
    #[error("connect to the agent's port {place}; the VM was not touched. Does it run?")]
    Connect {
        /// Where it was tried.
        place: Place,
        /// Why not.
        source: io::Error,
    },
    /// The connection failed or ended: QEMU has gone, or gave the port to somebody else.
    #[error("{stage} with the agent: the connection ended; {standing}", standing = stage.standing())]
    Disconnected {
        /// Where.
        stage: Stage,
        /// Why, when the operating system said.
        source: Option<io::Error>,
    },
    /// The agent did not answer in time.
    #[error(
        "{stage} with the agent: no answer within {limit:?}{found}; {standing}. Is the VM running, and is its agent up?",
        found = Found(discarded), standing = stage.standing()
    )]
    Late {
        /// Where.
        stage: Stage,
        /// How long was waited.
        limit: Duration,
        /// What came instead.
        discarded: Discarded,
    },
    /// A step of the handshake failed in the guest.
    #[error(
        "handshake with the agent: step {phase} failed in the guest: {error}; the VM runs but accepts no commands"
    )]
    StepFailed {
        /// Which step.
        phase: Phase,
        /// What the guest says.
        error: String,
    },
    /// The guest said what the protocol forbids. The session has ended.
    #[error("{stage} with the agent: the guest broke the protocol; {standing}", standing = stage.standing())]
    Protocol {
        /// Where.
        stage: Stage,
        /// What it was.
        source: ProtocolError,
    },
    /// What was asked does not fit the protocol or the state of the link. Nothing was sent.
    #[error("{stage} with the agent: nothing was sent")]
    Unsendable {
        /// Where.
        stage: Stage,
        /// Why not.
        source: ProtocolError,
    },
    /// The guest did not start the command. Nothing of it has run.
    #[error("the guest did not start the command: {reason}; nothing of it has run")]
    Rejected {
        /// Why not.
        reason: Rejection,
    },
    /// The command's key was used before: nothing was begun by asking again.
    #[error("the command was asked for before: {state}; nothing was started by this")]
    Known {
        /// What became of it.
        state: CommandState,
    },
    /// This link listens to the command no more, and it goes on.
    #[error("the command is listened to no more: {reason}; it goes on")]
    Detached {
        /// Why.
        reason: String,
    },
    /// The guest did not do what was requested.
    #[error("request {request}: the guest says: {error}")]
    RequestFailed {
        /// What was requested.
        request: &'static str,
        /// What the guest says.
        error: String,
    },
    /// An earlier operation on this link was dropped half-way or failed.
    #[error("this link was abandoned in the middle of an operation ({state}): connect anew")]
    Abandoned {
        /// The state of its session.
        state: &'static str,
    },
    /// The command's input could not be read or its output not be written on the host. Its group was sent SIGHUP.
    #[error(
        "{attempted} on the host; the command was sent SIGHUP and runs on unheard if it ignores it"
    )]
    Local {
        /// What was attempted.
        attempted: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A command wrote more than is captured. Its group was sent SIGKILL.
    #[error(
        "the command wrote more than the {limit_bytes} bytes that are captured of a stream; {}",
        if *killed { "it was killed" } else { "it was sent SIGKILL, which the agent has not confirmed" }
    )]
    TooMuchOutput {
        /// How much is captured.
        limit_bytes: usize,
        /// Whether the agent has confirmed that it took the signal.
        killed: bool,
    },
    /// The host has no random bytes or no clock.
    #[error("{attempted} on the host; nothing was sent")]
    Host {
        /// What was attempted.
        attempted: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Why a session has ended, for everybody who waits for something in it.
#[derive(Debug, Clone)]
pub(crate) enum Broken {
    /// The connection failed or ended, and the error's kind and text.
    Disconnected(Option<(io::ErrorKind, String)>),
    /// The guest said what the protocol forbids.
    Protocol(ProtocolError),
    /// The agent was silent.
    Late {
        limit: Duration,
        discarded: Discarded,
    },
}

impl Broken {
    pub(crate) fn disconnected(error: &io::Error) -> Self {
        Self::Disconnected(Some((error.kind(), error.to_string())))
    }

    /// The error for one who waited at `stage`.
    pub(crate) fn at(&self, stage: Stage) -> LinkError {
        match self.clone() {
            Self::Disconnected(source) => LinkError::Disconnected {
                stage,
                source: source.map(|(kind, text)| io::Error::new(kind, text)),
            },
            Self::Protocol(source) => LinkError::Protocol { stage, source },
            Self::Late { limit, discarded } => LinkError::Late {
                stage,
                limit,
                discarded,
            },
        }
    }
}

/// What came instead of an answer.
struct Found<'a>(&'a Discarded);

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Discarded {
            stale_frames,
            garbage_bytes,
            last_fault,
        } = self.0;
        if *stale_frames == 0 && *garbage_bytes == 0 {
            return f.write_str(" (nothing came)");
        }
        write!(
            f,
            " ({stale_frames} stale frames and {garbage_bytes} bytes that are no frame came"
        )?;
        if let Some(fault) = last_fault {
            write!(f, ", the last: {fault}")?;
        }
        f.write_str(")")
    }
}
