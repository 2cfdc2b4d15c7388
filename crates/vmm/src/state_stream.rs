//! The device state stream: received while the guest stands still, checked before it is trusted.
//!
//! QEMU gets one end of a socket pair, so there is no file, no name and no permission to get wrong. A
//! thread reads the other end from before the pause, so QEMU never waits for us.

use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver as Channel, RecvTimeoutError, sync_channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use stead_migration_stream::{Options, StreamReport, split_ram, walk_bytes};

use crate::error::{Error, Result};
use crate::ram_pages::PageWriter;

/// How a device state stream was made, and therefore how it must be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateFormat {
    /// Made with the capability `x-ignore-shared`; the RAM was a shared file and is not in the stream.
    IgnoreShared,
    /// Made without it; the RAM's pages were split off the stream.
    RamSplit,
}

/// QEMU's name for the block of the guest's RAM: the id of the memory backend.
pub(crate) const RAM_BLOCK: &str = "ram0";

/// Walks `stream` to its end mark.
///
/// # Errors
/// [`Error::Stream`] when it is damaged, cut off, or has something behind its end.
pub(crate) fn verify(stream: &[u8], format: StateFormat) -> Result<StreamReport> {
    let options = Options {
        ignore_shared: format == StateFormat::IgnoreShared,
    };
    Ok(walk_bytes(stream, options)?)
}

type Outcome = Result<Vec<u8>>;

/// The thread that reads the stream.
#[derive(Debug)]
pub(crate) struct Receiver {
    ours: UnixStream,
    outcome: Mutex<Channel<Outcome>>,
}

impl Receiver {
    /// Starts reading; gives the end that QEMU is to write to.
    ///
    /// With `split_into` (a file and the RAM's size), the pages of the RAM go there.
    pub(crate) fn start(
        split_into: Option<(&File, u64)>,
        bytes_max: u64,
    ) -> Result<(Self, UnixStream)> {
        let system = |what| move |source| Error::System { what, source };
        let (ours, theirs) =
            UnixStream::pair().map_err(system("make a socket pair for the device state"))?;
        let reader = ours
            .try_clone()
            .map_err(system("duplicate a socket for the device state"))?;
        let ram = split_into
            .map(|(file, bytes)| file.try_clone().map(|file| (file, bytes)))
            .transpose()
            .map_err(system("duplicate the file for the RAM"))?;
        let (sender, outcome) = sync_channel(1);
        std::thread::Builder::new()
            .name("device-state".to_owned())
            .spawn(move || {
                let received = receive(&reader, ram, bytes_max);
                // Tells QEMU at once that nobody reads any more; after the end it means nothing.
                let closed = reader.shutdown(Shutdown::Both);
                tracing::debug!(?closed, "the device state was read");
                if sender.send(received).is_err() {
                    tracing::debug!("nobody waits for the device state any more");
                }
            })
            .map_err(system("start a thread for the device state"))?;
        let outcome = Mutex::new(outcome);
        Ok((Self { ours, outcome }, theirs))
    }

    /// The stream, once QEMU has closed its end.
    pub(crate) fn finish(&self, within: Duration) -> Outcome {
        let outcome = match self.outcome.lock() {
            Ok(channel) => channel.recv_timeout(within),
            Err(poisoned) => poisoned.into_inner().recv_timeout(within),
        };
        match outcome {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => Err(Error::Unanswered {
                command: "close the device state stream".to_owned(),
                within,
            }),
            Err(RecvTimeoutError::Disconnected) => Err(Error::System {
                what: "read the device state",
                source: io::Error::other("the reading thread ended without a word"),
            }),
        }
    }

    /// Why the reader gave up, if it did.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.finish(Duration::from_millis(10))
            .err()
            .filter(|error| !matches!(error, Error::Unanswered { .. }))
    }

    /// Ends the thread; QEMU sees a broken connection.
    pub(crate) fn abort(&self) {
        if let Err(error) = self.ours.shutdown(Shutdown::Both) {
            tracing::debug!(%error, "the device state stream was closed already");
        }
    }
}

fn receive(stream: &UnixStream, ram: Option<(File, u64)>, bytes_max: u64) -> Outcome {
    match ram {
        None => receive_whole(stream, bytes_max),
        Some((file, memory_bytes)) => {
            receive_block(stream, RAM_BLOCK, &file, memory_bytes, bytes_max)
        }
    }
}

/// Reads a stream that holds the RAM: its pages go into `file`, the rest is given.
pub(crate) fn receive_block(
    stream: impl Read,
    block: &str,
    file: &File,
    memory_bytes: u64,
    bytes_max: u64,
) -> Outcome {
    let system = |source| Error::System {
        what: "write the RAM",
        source,
    };
    let file = file.try_clone().map_err(system)?;
    let mut pages = PageWriter::new(file, memory_bytes).map_err(system)?;
    let split = split_ram(stream, block, |offset, page| pages.put(offset, page))?;
    let missing = pages.finish().map_err(system)?;
    if missing != 0 || split.block.length != memory_bytes {
        return Err(Error::RamIncomplete {
            expected_bytes: memory_bytes,
            block_bytes: split.block.length,
            missing_pages: missing,
        });
    }
    check_length(split.device_state, bytes_max)
}

fn check_length(bytes: Vec<u8>, bytes_max: u64) -> Outcome {
    if bytes.len() as u64 > bytes_max {
        return Err(Error::StateTooLong {
            limit_bytes: bytes_max,
        });
    }
    Ok(bytes)
}

fn receive_whole(stream: &UnixStream, bytes_max: u64) -> Outcome {
    let mut bytes = Vec::with_capacity(1 << 20);
    let mut bounded = stream.take(bytes_max.saturating_add(1));
    bounded
        .read_to_end(&mut bytes)
        .map_err(|source| Error::System {
            what: "read the device state",
            source,
        })?;
    check_length(bytes, bytes_max)
}
