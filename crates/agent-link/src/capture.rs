//! Running a command and keeping what it wrote, up to a bound.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;
use tokio::sync::mpsc;

use stead_agent_proto::message::{ExecRequest, ExitStatus};

use crate::error::LinkError;
use crate::exec::ExecIo;
use crate::link::AgentLink;

/// How much of each stream is captured; a command that writes more is killed.
pub const MAX_CAPTURE_BYTES: usize = 16 * 1024 * 1024;
const KILL: i32 = 9;

/// How a command ended and what it wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// All that it wrote to standard output.
    pub stdout: Vec<u8>,
    /// All that it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl AgentLink {
    /// Runs a command to its end and gives all that it wrote. With `stdin` not empty, or when the request asks for
    /// input, the command reads `stdin` and then the end of file.
    ///
    /// # Errors
    /// [`LinkError::TooMuchOutput`] when a stream is longer than [`MAX_CAPTURE_BYTES`]; else as [`AgentLink::exec`].
    pub async fn exec_capture(
        &self,
        mut request: ExecRequest,
        stdin: &[u8],
    ) -> Result<Output, LinkError> {
        request.stdin |= !stdin.is_empty();
        let (mut stdout, mut stderr) = (Capture::default(), Capture::default());
        let io = ExecIo {
            stdin,
            stdout: &mut stdout,
            stderr: &mut stderr,
        };
        let (_none, signals) = mpsc::channel(1);
        let mut command = self.start(request).await?;
        let result = command.carry(io, signals).await;
        if stdout.is_over || stderr.is_over {
            return Err(LinkError::TooMuchOutput {
                limit_bytes: MAX_CAPTURE_BYTES,
                killed: command.control.end(KILL).await,
            });
        }
        Ok(Output {
            status: result?,
            stdout: stdout.bytes,
            stderr: stderr.bytes,
        })
    }
}

/// Keeps what is written, up to the bound.
#[derive(Debug, Default)]
struct Capture {
    bytes: Vec<u8>,
    is_over: bool,
}

impl AsyncWrite for Capture {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.bytes.len() + data.len() > MAX_CAPTURE_BYTES {
            self.is_over = true;
            return Poll::Ready(Err(io::ErrorKind::FileTooLarge.into()));
        }
        self.bytes.extend_from_slice(data);
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
