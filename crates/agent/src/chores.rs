//! Slow things that the host asks for, done one after another on a thread of their own.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use stead_agent_proto::guest::{Chore, StreamKey};

use crate::core::Core;

/// How many wait at most.
const MAX_WAITING: usize = 16;

/// Where chores are put.
#[derive(Debug)]
pub(crate) struct Chores {
    waiting: SyncSender<(StreamKey, Chore)>,
}

impl Chores {
    /// Where chores are put, and where they are taken from.
    pub(crate) fn new() -> (Self, Receiver<(StreamKey, Chore)>) {
        let (waiting, due) = sync_channel(MAX_WAITING);
        (Self { waiting }, due)
    }

    /// Puts a chore at the end, or says that too many wait.
    pub(crate) fn put(&self, key: StreamKey, chore: Chore) -> Result<(), String> {
        self.waiting
            .try_send((key, chore))
            .map_err(|error| format!("{MAX_WAITING} requests wait already: {error}"))
    }
}

/// Does chores for ever.
pub(crate) fn run(core: &Arc<Core>, due: &Receiver<(StreamKey, Chore)>) {
    while let Ok((key, chore)) = due.recv() {
        let result = perform(chore).map_err(|error| error.to_string());
        core.tell(|agent| agent.chore_done(key, result));
    }
}

fn perform(chore: Chore) -> io::Result<()> {
    rustix::fs::sync();
    match chore {
        Chore::Sync => Ok(()),
        Chore::DropCaches => OpenOptions::new()
            .write(true)
            .open("/proc/sys/vm/drop_caches")?
            .write_all(b"3\n"),
    }
}
