//! What a link goes over: one trait for all byte streams, and the places where one can be had anew.

use std::fmt;
use std::io;
use std::path::PathBuf;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio_vsock::{VsockAddr, VsockStream};

/// A byte stream to an agent: a socket of QEMU, vsock, one end of a pair, anything that reads and writes.
pub trait Transport: AsyncRead + AsyncWrite + Send + Sync + Unpin + fmt::Debug {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + fmt::Debug> Transport for T {}

/// Where an agent listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The socket of a character device of QEMU, which serves one connection at a time, or an agent's own.
    Unix(PathBuf),
    /// A vsock port.
    Vsock {
        /// The machine: 1 is this one, 2 the host, each guest has its own.
        cid: u32,
        /// The agent's port in it.
        port: u32,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(socket) => write!(f, "{}", socket.display()),
            Self::Vsock { cid, port } => write!(f, "vsock {cid}:{port}"),
        }
    }
}

impl Place {
    /// Connects once.
    pub(crate) async fn connect(&self) -> io::Result<Box<dyn Transport>> {
        match self {
            Self::Unix(socket) => Ok(Box::new(UnixStream::connect(socket).await?)),
            Self::Vsock { cid, port } => {
                let address = VsockAddr::new(*cid, *port);
                Ok(Box::new(VsockStream::connect(address).await?))
            }
        }
    }

    /// Whether a port that was full at a capture may be held back until a connection to it ends.
    pub(crate) fn may_be_held_back(&self) -> bool {
        matches!(self, Self::Unix(_))
    }
}
