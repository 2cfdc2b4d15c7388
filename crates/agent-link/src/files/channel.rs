//! What the copying of files needs of a connection to the agent.

use std::error::Error;

use stead_agent_proto::files::{FileInput, FileReply, FileRequest};

/// A connection on which one file operation runs at a time. Its calls block.
pub trait FileChannel {
    /// Begins an operation. One before it that has not ended is given up: the guest drops it, and replies to it that
    /// still come are thrown away.
    ///
    /// # Errors
    /// When the connection is broken; whether the guest has got the request is not known.
    fn request(&mut self, request: FileRequest) -> Result<(), ChannelError>;

    /// Sends what a write takes, once there is credit for it. When the guest has ended the operation meanwhile, it is
    /// thrown away, and [`FileChannel::receive`] says why.
    ///
    /// # Errors
    /// When the connection is broken.
    fn send(&mut self, input: FileInput) -> Result<(), ChannelError>;

    /// Waits for the next reply, as long as the agent is there.
    ///
    /// # Errors
    /// When the connection is broken or the guest is silent.
    fn receive(&mut self) -> Result<FileReply, ChannelError>;

    /// The next reply, if it is there.
    ///
    /// # Errors
    /// When the connection is broken.
    fn poll(&mut self) -> Result<Option<FileReply>, ChannelError>;
}

/// A connection that is broken. What is done over it can be gone on with over another.
#[derive(Debug, thiserror::Error)]
#[error("the connection to the agent is broken")]
pub struct ChannelError {
    /// Why.
    #[source]
    pub source: Box<dyn Error + Send + Sync>,
}

impl ChannelError {
    /// A connection that is broken, and why.
    pub fn new(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            source: source.into(),
        }
    }
}
