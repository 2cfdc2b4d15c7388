//! One port: a reader and a writer.
//!
//! Both block in the kernel, which is level-triggered by nature: a connection that comes and goes across a
//! restore cannot be missed. A virtio-serial port without a host reads as empty at once; to wait for the host
//! without spinning, a delimiter is *written*, which blocks until a host is connected and means nothing to it.
//!
//! The reader waits for nothing but input: a hello must be heard however full the way out is. A host that asks
//! without reading the answers loses its session instead.

use std::io;
use std::sync::Arc;
use std::thread;

use stead_agent_proto::frame::{DELIMITER, Decoder};

use crate::core::Core;
use crate::error::{AgentError, Attempt};
use crate::transport::{AtEnd, Transport};

const READ_BYTES: usize = 32 * 1024;
const STACK_BYTES: usize = 256 * 1024;

/// Serves a port until its line ends or fails.
pub(crate) fn serve(
    core: &Arc<Core>,
    port: u32,
    line: &mut dyn Transport,
) -> Result<(), AgentError> {
    let mut second = line
        .second()
        .attempt(|| format!("open port {port} a second time"))?;
    core.open_port(port);
    let shared = Arc::clone(core);
    let writer = thread::Builder::new()
        .name(format!("port {port} out"))
        .stack_size(STACK_BYTES)
        .spawn(move || write(&shared, port, &mut *second))
        .attempt(|| format!("start a writer for port {port}"));
    let result = match writer {
        Ok(writer) => {
            let result = read(core, port, line).attempt(|| format!("read port {port}"));
            core.close_port(port);
            finish(line, writer);
            result
        }
        Err(error) => Err(error),
    };
    core.close_port(port);
    result
}

/// Waits for the writer of a connection that has ended. The writer of a virtio-serial port may be blocked until a
/// host comes; it ends by itself then.
fn finish(line: &dyn Transport, writer: thread::JoinHandle<io::Result<()>>) {
    if line.at_end() == AtEnd::Waits {
        return;
    }
    // The other side may have closed it already.
    if let Err(error) = line.close()
        && error.kind() != io::ErrorKind::NotConnected
    {
        eprintln!("stead-agent: close a connection: {error}");
    }
    // A write that failed is how a connection ends.
    drop(writer.join());
}

/// Writes what is to be said until the port is closed or cannot be written.
fn write(core: &Arc<Core>, port: u32, line: &mut dyn Transport) -> io::Result<()> {
    while let Some(frame) = core.next_frame(port) {
        line.write_all(&frame.encode().map_err(io::Error::other)?)?;
    }
    Ok(())
}

fn read(core: &Arc<Core>, port: u32, line: &mut dyn Transport) -> io::Result<()> {
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let count = match line.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // A connection that its host dropped with answers unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error),
        };
        if count == 0 {
            if line.at_end() == AtEnd::Over {
                return Ok(());
            }
            core.tell(|agent| agent.on_host_gone(port));
            decoder = Decoder::new();
            line.write_all(&[DELIMITER])?;
            continue;
        }
        let mut input = &buffer[..count];
        while let Some(item) = decoder.next_item(&mut input) {
            core.on_item(port, item);
        }
    }
}
