//! Operations on files as streams of a session: a thread for each carries it between [`stead_agent::files`] and the machine.
//!
//! The thread waits for the host's data, for room, or for the end; what it does on the disk holds up nobody else. The
//! last reply closes the stream; data before it waits in the machine for credit.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use stead_agent::files::{Operation, Pulled};
use stead_agent_proto::files::{FileError, FileErrorKind, FileInput, FileReply, FileRequest};
use stead_agent_proto::flow::MAX_CHUNK_BYTES;
use stead_agent_proto::guest::StreamKey;

use crate::core::Core;

/// What a thread waits for.
#[derive(Debug, Default)]
pub(crate) struct Inlet {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    // At most a window of data.
    data: VecDeque<Vec<u8>>,
    room: bool,
    gone: bool,
}

impl Inlet {
    /// The host has sent data.
    pub(crate) fn put(&self, data: Vec<u8>) {
        self.change(|waiting| waiting.data.push_back(data));
    }

    /// There is room for data again.
    pub(crate) fn ring(&self) {
        self.change(|waiting| waiting.room = true);
    }

    /// The operation was given up, or its session has ended.
    pub(crate) fn close(&self) {
        self.change(|waiting| waiting.gone = true);
    }

    fn change(&self, change: impl FnOnce(&mut Waiting)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits for data; nothing when the operation was given up.
    fn take(&self) -> Option<Vec<u8>> {
        let mut waiting = self.wait_until(|waiting| !waiting.data.is_empty());
        match waiting.gone {
            true => None,
            false => waiting.data.pop_front(),
        }
    }

    /// Waits for room.
    fn wait_for_room(&self) {
        self.wait_until(|waiting| waiting.room).room = false;
    }

    fn wait_until(&self, is_so: impl Fn(&Waiting) -> bool) -> MutexGuard<'_, Waiting> {
        self.changed
            .wait_while(self.lock(), |waiting| !(waiting.gone || is_so(waiting)))
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Begins the thread of an operation.
///
/// # Errors
/// When no thread can be had.
pub(crate) fn spawn(
    core: Arc<Core>,
    stream: StreamKey,
    op: Vec<u8>,
    inlet: Arc<Inlet>,
) -> std::io::Result<()> {
    std::thread::Builder::new()
        .name("files".to_owned())
        .spawn(move || {
            match FileRequest::decode(&op) {
                Ok(request) => carry(&core, stream, core.files.open(request), &inlet),
                Err(found) => say(&core, stream, &malformed(&found.to_string())),
            }
            core.with(|state| state.forget_file(stream));
        })?;
    Ok(())
}

/// Carries the operation to its end.
fn carry(core: &Arc<Core>, stream: StreamKey, mut operation: Operation, inlet: &Inlet) {
    // While the stream is open there is room, or it is said when there is.
    while let Some(room) = core.with(|state| state.agent.file_room(stream)) {
        let room = if room > 0 { MAX_CHUNK_BYTES } else { 0 };
        match operation.pull(room) {
            Pulled::Reply(reply) => say(core, stream, &reply),
            Pulled::NoRoom => inlet.wait_for_room(),
            Pulled::WantsInput => {
                let Some(data) = inlet.take() else {
                    return;
                };
                core.tell(|agent| agent.file_consumed(stream, data.len()));
                match FileInput::decode(&data) {
                    Ok(input) => operation.push(input),
                    Err(found) => return say(core, stream, &malformed(&found.to_string())),
                }
            }
            Pulled::Ended => return,
        }
    }
}

fn say(core: &Arc<Core>, stream: StreamKey, reply: &FileReply) {
    let (encoded, last) = (reply.encode(), reply.is_last());
    core.tell(|agent| match reply.is_data() && !last {
        true => agent.file_data(stream, encoded),
        false => agent.file_reply(stream, encoded, last),
    });
}

fn malformed(found: &str) -> FileReply {
    FileReply::Failed(FileError {
        kind: FileErrorKind::Invalid,
        errno: 0,
        attempted: found.chars().take(1000).collect(),
        left: "what had the name before still has it".to_owned(),
    })
}
