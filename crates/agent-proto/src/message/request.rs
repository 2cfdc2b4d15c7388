//! What the host asks of the agent besides commands and files.

use serde::{Deserialize, Serialize};

use super::{Bytes, CommandEntry, CommandState, WorkloadState};
use crate::{Epoch, ExecKey};

/// How the machine is to be shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ShutdownKind {
    /// Power off.
    Poweroff,
    /// Reboot.
    Reboot,
}

/// What the host asks of the agent, besides commands. Answered by [`super::GuestMessage::Done`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Request {
    /// Freeze every writable file system on a block device, until thaw or for so many milliseconds.
    Freeze {
        /// When the agent thaws by itself.
        limit_ms: u64,
    },
    /// Thaw what was frozen.
    Thaw,
    /// Write what is dirty.
    Sync,
    /// Write what is dirty, then drop clean caches.
    DropCaches,
    /// Answer.
    Ping,
    /// Shut the machine down.
    Shutdown(ShutdownKind),
    /// Let the guest's processes run in the epoch, and accept commands. Answered by [`Done::Released`].
    Release,
    /// Have every process but the agent stand still, until [`Request::ThawWorkload`] or the release of another epoch.
    FreezeWorkload {
        /// How long it may take until all stand still; else they go on and the request has failed.
        limit_ms: u64,
    },
    /// Let the guest's processes go on in the same life.
    ThawWorkload,
    /// Say what is known of a command.
    Query {
        /// Its key.
        key: ExecKey,
        /// The epoch in which it was first asked for.
        epoch: Epoch,
    },
    /// List the commands that run and those of which output is kept.
    List,
}

/// The state of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Status {
    /// The epoch.
    pub epoch: Epoch,
    /// The version of the agent.
    pub agent_version: String,
    /// Whether the epoch has been released.
    pub released: bool,
    /// Whether the guest's processes run.
    pub workload: WorkloadState,
    /// Commands that run and are listened to.
    pub attached_commands: u32,
    /// Commands that run unheard, and those that have ended and whose output is held open by others.
    pub detached_commands: u32,
    /// Whether file systems are frozen.
    pub frozen: bool,
    /// Frames of other epochs or sessions that were discarded since the agent began.
    pub stale_frames: u64,
    /// Bytes that were no frame and were discarded since the agent began.
    pub garbage_bytes: u64,
    /// The agent's resident memory in KiB; 0 when it is not known.
    pub resident_kib: u64,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Done {
    /// It was done.
    Ok,
    /// The file systems are frozen.
    Frozen {
        /// Where they are mounted.
        mounts: Vec<Bytes>,
        /// Where writable file systems are mounted that cannot be frozen; they were written out.
        unsupported: Vec<Bytes>,
    },
    /// The state of the agent.
    Status(Box<Status>),
    /// It was not done.
    Failed(String),
    /// The epoch is released: the guest's processes run, and commands are accepted.
    Released {
        /// How long the thaw took, in nanoseconds.
        duration_ns: u64,
    },
    /// What is known of a command.
    Command(CommandState),
    /// The commands, newest first, as many as fit.
    Commands {
        /// Those listed.
        entries: Vec<CommandEntry>,
        /// How many more there are.
        left_out: u32,
    },
}
