//! The host's end of the channel to the guest agent.
//!
//! [`AgentLink::connect`] opens one port of a VM (the unix socket of QEMU's character device). A session begins with
//! [`AgentLink::handshake`] in a new life of the VM (boot, restore, fork, wake) or with
//! [`AgentLink::attach`] in the same life. Then commands run, one at a time on each port:
//!
//! ```no_run
//! # use std::time::Duration;
//! # use stead_agent_link::{AgentLink, ExecRequest, Greeting, Epoch, Reason, LinkError};
//! # async fn example() -> Result<(), LinkError> {
//! let mut link = AgentLink::connect("/run/vm/agent.0".as_ref()).await?;
//! let epoch = Epoch([7; 16]); // 16 random bytes
//! let greeting = Greeting { epoch, reason: Reason::Restore, hostname: None };
//! link.handshake(&greeting, Duration::from_secs(10)).await?;
//! let request = ExecRequest { argv: vec!["uname".into(), "-r".into()], ..ExecRequest::default() };
//! let output = link.exec_capture(request, b"").await?;
//! # Ok(()) }
//! ```
//!
//! Everything the guest says is untrusted: sizes are bounded by frames and credit, answers must be to questions that
//! were asked, and silence or garbage ends in an error within a named time. Nobody is given up for silence without having
//! been asked.
//!
//! An operation whose future is dropped half-way leaves the link without a known state: every later call gives
//! [`LinkError::Abandoned`], and a new connection is needed. The guest then lets the command go on unheard.
#![forbid(unsafe_code)]

mod capture;
mod error;
mod exec;
pub mod files;
mod link;
mod wire;

pub use capture::{MAX_CAPTURE_BYTES, Output};
pub use error::{LinkError, Stage};
pub use exec::{ExecIo, Running};
pub use link::{AgentLink, Frozen, Greeting};
pub use stead_agent_proto::message::{
    Bytes, ExecRequest, ExitStatus, Phase, PhaseOutcome, PhaseReport, Ready, Reason, Rejection,
    ShutdownKind, Status,
};
pub use stead_agent_proto::{Epoch, ProtocolError};
