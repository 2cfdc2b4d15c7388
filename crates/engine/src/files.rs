//! Files of a guest, over one of its agent ports.

use stead_agent_link::files::{
    ChannelError, FileChannel, FileInput, FileReply, FileRequest, FileStream,
};

use crate::Engine;
use crate::error::Result;
use crate::exec::{Session, agent_error};

/// A connection for operations on the files of a guest. Its calls block: they are for a thread without an executor.
pub struct GuestFiles {
    stream: FileStream,
    // Holds the port for as long as the stream is used.
    _session: Session,
}

impl std::fmt::Debug for GuestFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GuestFiles")
    }
}

impl FileChannel for GuestFiles {
    fn request(&mut self, request: FileRequest) -> std::result::Result<(), ChannelError> {
        self.stream.request(request)
    }

    fn send(&mut self, input: FileInput) -> std::result::Result<(), ChannelError> {
        self.stream.send(input)
    }

    fn receive(&mut self) -> std::result::Result<FileReply, ChannelError> {
        self.stream.receive()
    }

    fn poll(&mut self) -> std::result::Result<Option<FileReply>, ChannelError> {
        self.stream.poll()
    }
}

impl Engine {
    /// A connection for operations on the files of a sandbox's guest.
    ///
    /// # Errors
    /// When the sandbox does not run, or its agent cannot be reached.
    pub async fn files(&self, name: &str) -> Result<GuestFiles> {
        let (sandbox, mut session) = self.command_session(name).await?;
        let stream = session
            .link()
            .files()
            .map_err(|source| agent_error("reach the files of", &sandbox, source))?;
        Ok(GuestFiles {
            stream,
            _session: session,
        })
    }
}
