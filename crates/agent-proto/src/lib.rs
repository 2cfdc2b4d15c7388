//! Messages, framing and the epoch state machines between host and guest.
//!
//! Host and guest talk over a raw byte stream (a virtio-serial port). A virtual machine that is
//! captured, restored or forked may have the stream cut in the middle of a frame on either side, and
//! may find whole frames of an earlier life in it. Three rules follow, and every module keeps one:
//!
//! 1. **No frame is ever put together from two lives.** [`frame`] stuffs bytes so that zero appears
//!    only between frames; a half frame ends at the next zero and fails its checksum.
//! 2. **No frame of an earlier life acts.** Each frame names its [`Epoch`] and its session's
//!    [`Nonce`]; [`guest::Agent`] and [`host::Session`] discard all others. A frame that was lost on the
//!    way shows as a gap in the sequence numbers and ends the session; it is never skipped.
//! 3. **No command runs in a life that has not been set up.** After a restore the clock is set and the
//!    random number generator reseeded before the agent answers [`message::Ready`], and only then
//!    is a command accepted. Its processes stand still from before the capture until the host has released the life.
//! 4. **No command runs twice.** It has a key of 128 random bits; it is accepted, and runs when the host says go; a key
//!    that has been used is answered with what became of it.
//!
//! This crate does no input or output, reads no clock and starts no thread: events go in, actions
//! come out.
#![forbid(unsafe_code)]

pub mod files;
pub mod flow;
pub mod frame;
pub mod guest;
pub mod host;
pub mod message;
mod stuffing;

mod identity;

pub use frame::Frame;
pub use identity::{Epoch, ExecKey, Nonce, ParseIdError};

/// How many ports an agent serves.
pub const PORT_COUNT: u32 = 8;

/// What the name of a virtio-serial port of the agent starts with; its number follows.
pub const PORT_NAME_PREFIX: &str = "org.steadfast.agent.";

/// What does not fit into a frame, or what a peer did that the protocol forbids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A message is larger than a frame may be. Nothing was sent.
    #[error(
        "message of {found_bytes} bytes is larger than the {limit_bytes} bytes that a frame holds; nothing was sent"
    )]
    TooLarge {
        /// The size of the encoded message.
        found_bytes: usize,
        /// What a frame holds at most.
        limit_bytes: usize,
    },
    /// A message could not be encoded. Nothing was sent.
    #[error("message could not be encoded, nothing was sent: {0}")]
    Encode(postcard::Error),
    /// A frame whose checksum is right holds what is not a message.
    #[error("frame {seq} is whole but its payload is not a message: {source}")]
    Payload {
        /// The frame's sequence number.
        seq: u64,
        /// What is wrong with it.
        source: postcard::Error,
    },
    /// Bytes that are no frame, inside a session that was whole so far.
    #[error("{bytes} bytes that are no frame ({reason}) inside a session")]
    Garbage {
        /// How many.
        bytes: usize,
        /// Why they are no frame.
        reason: frame::Fault,
    },
    /// Frames are missing.
    #[error("frames {expected} to {found} (exclusive) of the session are missing")]
    Gap {
        /// The number of the frame that was due.
        expected: u64,
        /// The number of the frame that came.
        found: u64,
    },
    /// More bytes than the receiver had granted.
    #[error("{found_bytes} bytes came where {granted_bytes} were granted")]
    OverGrant {
        /// What was granted.
        granted_bytes: u32,
        /// What came.
        found_bytes: u32,
    },
    /// A message that has no place in the state of the session.
    #[error("{message} has no place while the session is {state}")]
    Unexpected {
        /// The kind of message.
        message: &'static str,
        /// The state of the session.
        state: &'static str,
    },
    /// The other side does not know the session, and has not done what it was asked when it said so.
    #[error("the other side has lost the session: {0}")]
    SessionLost(String),
    /// The other side says that the session is broken.
    #[error("the other side ended the session: {0}")]
    EndedByPeer(String),
}
