//! The folder of one VM process, and how its sockets are reached.
//!
//! A socket address holds 107 bytes of path at most, and data folders may be deeper than that. QEMU
//! therefore gets bare names (it runs inside the folder), and we connect through
//! `/proc/self/fd/<folder>/<name>`, which is short whatever the folder is called.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::error::{Error, Result};

/// The name of QEMU's control socket in the VM's folder.
pub const QMP_SOCKET: &str = "qmp.sock";
/// The name of the file that collects what QEMU itself says.
pub const QEMU_LOG: &str = "qemu.log";
/// The name of the file that collects the guest's serial console.
pub const SERIAL_LOG: &str = "serial.log";

/// The name of the socket of agent port `port`.
#[must_use]
pub fn agent_socket(port: u8) -> String {
    format!("agent{port}.sock")
}

/// Connects to the socket `name` in `folder`, however long the folder's path is.
///
/// # Errors
/// When the folder or socket is missing, or nobody listens.
pub fn connect(folder: &Path, name: &str) -> Result<UnixStream> {
    dial(folder, name).map_err(|source| Error::File {
        what: "connect to the socket",
        path: folder.join(name),
        source,
    })
}

pub(crate) fn dial(folder: &Path, name: &str) -> io::Result<UnixStream> {
    let dir = File::open(folder)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
}
