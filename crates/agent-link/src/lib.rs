//! The host's end of the channel to the guest agent.
//!
//! [`AgentLink::connect`] opens one port of a VM (the unix socket of QEMU's character device),
//! [`AgentLink::connect_to`] also a vsock port; [`AgentLink::from_stream`] takes any [`Transport`]. A session begins with
//! [`AgentLink::handshake`] in a new life of the VM (boot, restore, fork, wake) or with
//! [`AgentLink::reattach`] in the same life. A new life is released when all that must come first was done; then commands
//! run, many at once over one link:
//!
//! ```no_run
//! # use std::time::Duration;
//! # use stead_agent_link::{AgentLink, ExecRequest, Greeting, Epoch, Identity, Reason, LinkError};
//! # async fn example() -> Result<(), LinkError> {
//! let mut link = AgentLink::connect("/run/vm/agent.0".as_ref()).await?;
//! let epoch = Epoch([7; 16]); // 16 random bytes
//! let greeting = Greeting { epoch, reason: Reason::Restore, identity: Identity::Keep };
//! link.handshake(&greeting, Duration::from_secs(10)).await?;
//! link.release().await?;
//! let request = ExecRequest { argv: vec!["uname".into(), "-r".into()], ..ExecRequest::default() };
//! let output = link.exec_capture(request, b"").await?;
//! # Ok(()) }
//! ```
//!
//! Everything the guest says is untrusted: sizes are bounded by frames and credit, answers must be to questions that
//! were asked, and silence or garbage ends in an error within a named time. Nobody is given up for silence without having
//! been asked.
//!
//! A task for each session does the talking, so any future may be dropped: a command whose start is dropped before it was
//! told to go does not run, one that is dropped later goes on unheard. Only a handshake that is dropped half-way leaves the link
//! unusable ([`LinkError::Abandoned`]), as does a session that has broken.
#![forbid(unsafe_code)]

mod capture;
mod command;
mod driver;
mod error;
mod exec;
pub mod files;
mod line;
mod link;
mod silence;
mod transport;
mod wire;

pub use capture::{MAX_CAPTURE_BYTES, Output};
pub use command::{Command, CommandControl, CommandInput, CommandOutput, new_key};
pub use driver::CommandEvent;
pub use error::{LinkError, Stage};
pub use exec::ExecIo;
pub use link::{AgentLink, CommandList, Frozen, Greeting};
pub use transport::{Place, Transport};

pub use stead_agent_proto::message::{
    Attachment, Bytes, CommandEntry, CommandState, ExecRequest, ExitStatus, ForkIdentity, Identity,
    OutputStream, Phase, PhaseOutcome, PhaseReport, Pty, Ready, Reason, Rejection, Resource,
    ResourceLimit, ShutdownKind, Status, WorkloadState,
};
pub use stead_agent_proto::{Epoch, ExecKey, ProtocolError};
