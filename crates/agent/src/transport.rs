//! What bytes to and from the host go over: one trait, and three kinds of it.
//!
//! | kind | the host may come and go | how |
//! |---|---|---|
//! | a virtio-serial port | yes, on the same file | [`File`] |
//! | a vsock connection | no: the next host is another connection | [`VsockStream`] |
//! | a unix socket, or one end of a pair | no | [`UnixStream`] |
//!
//! All of them block in the kernel, which is level-triggered by nature: nothing that comes can be missed.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vsock::VsockStream;

/// What it means that there is nothing to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtEnd {
    /// No host is there now; one may come.
    Waits,
    /// The connection has ended, for good.
    Over,
}

/// A byte stream to the host.
pub(crate) trait Transport: Read + Write + Send + Debug {
    /// Another handle to the same stream, so that one can be read while the other is written.
    fn second(&self) -> io::Result<Box<dyn Transport>>;

    /// What the end of input means.
    fn at_end(&self) -> AtEnd;

    /// Ends the connection: whoever is blocked in it goes on with an error. Nothing where hosts come and go.
    fn close(&self) -> io::Result<()>;
}

/// A virtio-serial port.
impl Transport for File {
    fn second(&self) -> io::Result<Box<dyn Transport>> {
        Ok(Box::new(self.try_clone()?))
    }

    fn at_end(&self) -> AtEnd {
        AtEnd::Waits
    }

    fn close(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for UnixStream {
    fn second(&self) -> io::Result<Box<dyn Transport>> {
        Ok(Box::new(self.try_clone()?))
    }

    fn at_end(&self) -> AtEnd {
        AtEnd::Over
    }

    fn close(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}

impl Transport for VsockStream {
    fn second(&self) -> io::Result<Box<dyn Transport>> {
        Ok(Box::new(self.try_clone()?))
    }

    fn at_end(&self) -> AtEnd {
        AtEnd::Over
    }

    fn close(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Both)
    }
}
