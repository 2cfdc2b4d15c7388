//! The agent's side: one state machine over all ports.
//!
//! ```text
//! life of the machine                         a port
//!
//!   Unknown ◀──── a step failed ───┐            Unattached ◀── host gone, session broken, another life, a step failed
//!      │                           │             │      │
//!      │ setup                     │       hello │      │ hello (reattach with the current epoch)
//!      ▼                           │             ▼      │
//!   Changing ── steps, one by one ─┤           Hailed   │
//!      ▲                           │       setup │      │
//!      │ setup with another epoch  │ all done    ▼      ▼
//!      └─ Current, held or released┘      Handshaking ──▶ Attached
//!
//! a life:        held ── release (the workload goes on) ──▶ released: commands are accepted
//! a command:     noted (Exec) ── Go ──▶ Starting ── may_start ──▶ Released ── started ──▶ Running ──▶ Ended, remembered
//!                                        │   ▲ Go of another session
//!                           session gone ▼   │
//!                                       Withdrawn ── the thread that prepares it asks: no ──▶ forgotten
//! workload:      Running ── freeze ──▶ Freezing ──▶ Frozen ── thaw in the same life, release of the next ──▶ Thawing ──▶ Running
//! file systems:  Thawed ── freeze ──▶ Freezing ──▶ Frozen ── thaw, time over, owner gone ──▶ Thawing ──▶ Thawed
//!                                                     ▲  freezing or thawing failed half-way   │
//!                                                     └── (nobody's; tried again until thawed) ─┘
//! ```
//! A hello changes nothing but its own port: it may have lain in the stream since before a capture. The agent hails,
//! and only who answers the hail is alive in this life.
//!
//! What is to be written is kept here and pulled frame by frame with [`Agent::next_frame`]: a number is given to a frame
//! when it is taken, so that answers overtake output, and each stream has its turn.
//!
//! Invariants:
//! - A port is attached only to the current epoch. When the epoch changes, all sessions end first.
//! - A key is released ([`Agent::may_start`]) at most once while it is remembered, only for the session that said go, only while
//!   that session is attached, the epoch is released and neither file systems nor workload are frozen. A caller that
//!   starts the program while it holds the machine's lock can therefore not start one for an epoch that has passed.
//! - [`GuestMessage::Ready`] is sent only after every step of [`STEPS`] was reported done or skipped.
//! - A frozen workload is thawed by nothing but a request: to thaw or to shut down, in a released life, or to release.
//! - An epoch that another has replaced never comes back.

mod commands;
mod exec;
mod files;
mod freeze;
mod heritage;
mod life;
mod outgoing;
mod replay;
mod requests;
mod session;
mod workload;

use std::collections::{BTreeMap, VecDeque};

use crate::frame::{Direction, Item, Kind};
use crate::message::{
    Bytes, ExecRequest, GuestMessage, Phase, PhaseDetail, PhaseOutcome, Rejection, Setup,
    ShutdownKind, Status, WorkloadState,
};
use crate::{Epoch, ExecKey, Frame, Nonce};

pub use workload::WorkloadFailure;

use commands::Commands;
use freeze::Freeze;
use life::{Life, Port};
use session::Session;
use workload::Workload;

/// The steps of a handshake that need the operating system, in order.
pub const STEPS: [Phase; 5] = [
    Phase::FileSystems,
    Phase::Clock,
    Phase::Entropy,
    Phase::Identity,
    Phase::Ports,
];

/// How many replaced epochs are remembered.
pub const RETIRED_EPOCHS: usize = 1024;
/// How many streams a session has open at most.
pub const MAX_STREAMS: usize = 256;
/// How many commands that have ended are remembered.
pub const REMEMBERED_COMMANDS: usize = 1024;
/// How many bytes of answers wait for a host that does not read, at most.
pub const MAX_UNREAD_BYTES: usize = 1024 * 1024;

const ERROR_TEXT_BYTES: usize = 4096;

/// Names a stream or a request: the port and session that it belongs to, and the host's number for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamKey {
    /// The port.
    pub port: u32,
    /// The session.
    pub nonce: Nonce,
    /// The host's number.
    pub id: u64,
}

/// What the agent is and may do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Config {
    /// Its version.
    pub agent_version: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// How many commands may run or hold their output open, heard or unheard.
    pub max_commands: u32,
    /// Whether it may shut the machine down.
    pub may_shut_down: bool,
}

/// What was frozen.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct FrozenMounts {
    /// Where the frozen file systems are mounted.
    pub frozen: Vec<Bytes>,
    /// Where writable ones are mounted that cannot be frozen.
    pub unsupported: Vec<Bytes>,
}

/// Why nothing is frozen as it was asked, and whether something is all the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FreezeFailure {
    /// What went wrong.
    pub error: String,
    /// Whether a file system is or may be frozen: undoing what was done has failed too.
    pub still_frozen: bool,
}

/// Something slow that the host asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Chore {
    /// Write what is dirty.
    Sync,
    /// Write what is dirty, then drop clean caches.
    DropCaches,
}

/// What the agent must do now, in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Take frames with [`Agent::next_frame`] and write them until there is none.
    Flush {
        /// The port.
        port: u32,
    },
    /// Do a step of the handshake and report it with [`Agent::step_done`].
    Step {
        /// The port.
        port: u32,
        /// The session that is being made.
        nonce: Nonce,
        /// Which step.
        phase: Phase,
        /// What it needs.
        setup: Box<Setup>,
    },
    /// Prepare a command, ask [`Agent::may_start`], start it, and report with [`Agent::started`] or [`Agent::rejected`].
    Start {
        /// The command.
        key: ExecKey,
        /// What to run.
        request: Box<ExecRequest>,
    },
    /// Pass input on to the command and report with [`Agent::stdin_consumed`].
    Stdin {
        /// The command.
        key: ExecKey,
        /// The input.
        data: Vec<u8>,
    },
    /// Close the command's input after all that came before.
    StdinEnd {
        /// The command.
        key: ExecKey,
    },
    /// Signal the command's group.
    Signal {
        /// The command.
        key: ExecKey,
        /// 1 to 31.
        signal: i32,
    },
    /// Give the command's terminal another size.
    Resize {
        /// The command.
        key: ExecKey,
        /// Lines.
        rows: u16,
        /// Characters.
        cols: u16,
    },
    /// Look at the command again: its output has room, or nobody listens to it any more.
    Wake {
        /// The command.
        key: ExecKey,
    },
    /// Freeze the file systems, and report with [`Agent::freeze_done`].
    Freeze {
        /// When to call [`Agent::freeze_expired`].
        limit_ms: u64,
    },
    /// Thaw the file systems, and report with [`Agent::thaw_done`].
    Thaw,
    /// Have every process but the agent stand still, and report with [`Agent::workload_frozen`].
    FreezeWorkload {
        /// How long it may take.
        limit_ms: u64,
    },
    /// Let the processes go on, and report with [`Agent::workload_thawed`].
    ThawWorkload,
    /// Look how much memory the agent uses, and report with [`Agent::pong`].
    Pong {
        /// Who asked.
        key: StreamKey,
    },
    /// Do it aside, and report with [`Agent::chore_done`].
    Chore {
        /// Who asked.
        key: StreamKey,
        /// What.
        chore: Chore,
    },
    /// Shut the machine down once the port has been written.
    Shutdown {
        /// The port whose answer goes out first.
        port: u32,
        /// How.
        kind: ShutdownKind,
        /// Whether the guest's own init is to do it; else it stands still with all others, and must not run again.
        by_init: bool,
    },
    /// Begin an operation on files; answer with [`Agent::file_reply`], or refuse with [`Agent::file_refused`].
    FileBegin {
        /// The stream.
        stream: StreamKey,
        /// What to do, as its own module encodes it.
        op: Vec<u8>,
    },
    /// Data for the operation; report with [`Agent::file_consumed`] what was taken.
    FileData {
        /// The stream.
        stream: StreamKey,
        /// 1 to [`crate::flow::MAX_CHUNK_BYTES`] bytes.
        data: Vec<u8>,
    },
    /// No data follows.
    FileEnd {
        /// The stream.
        stream: StreamKey,
    },
    /// [`Agent::file_room`] has grown.
    FileRoom {
        /// The stream.
        stream: StreamKey,
    },
    /// The operation is given up: by the host, or with its session.
    FileGone {
        /// The stream.
        stream: StreamKey,
    },
}

/// What a step of the handshake came to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StepResult {
    /// Done, skipped, or why it failed.
    pub outcome: Result<PhaseOutcome, String>,
    /// What it has found and changed.
    pub detail: PhaseDetail,
    /// How long it took, in nanoseconds.
    pub duration_ns: u64,
}

/// The agent's state over all ports.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Agent {
    config: Config,
    life: Life,
    ports: BTreeMap<u32, PortState>,
    retired: VecDeque<Epoch>,
    freeze: Freeze,
    workload: Workload,
    commands: Commands,
    stale_frames: u64,
    garbage_bytes: u64,
}

/// A port and what is to be written to it before anything of its session.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct PortState {
    port: Port,
    notices: VecDeque<Frame>,
}

impl Agent {
    /// An agent that knows of no epoch yet.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            config,
            life: Life::Unknown { tried: None },
            ports: BTreeMap::new(),
            retired: VecDeque::new(),
            freeze: Freeze::Thawed { lost: None },
            workload: Workload::Running,
            commands: Commands::default(),
            stale_frames: 0,
            garbage_bytes: 0,
        }
    }

    /// The same agent, which has found the workload frozen when it was started: one before it has frozen it.
    #[must_use]
    pub fn with_frozen_workload(mut self) -> Self {
        self.workload = Workload::Frozen;
        self
    }

    /// The epoch that sessions may belong to, if a handshake has been completed.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        match self.life {
            Life::Current { epoch, .. } => Some(epoch),
            Life::Unknown { .. } | Life::Changing { .. } => None,
        }
    }

    /// Whether commands are accepted in the current epoch.
    #[must_use]
    pub fn is_released(&self) -> bool {
        matches!(self.life, Life::Current { released: true, .. })
    }

    /// Whether the processes other than the agent run.
    #[must_use]
    pub fn workload(&self) -> WorkloadState {
        self.workload.state()
    }

    /// The session that `port` is attached to.
    #[must_use]
    pub fn attached(&self, port: u32) -> Option<(Epoch, Nonce)> {
        match &self.ports.get(&port)?.port {
            Port::Attached(session) => Some((session.epoch, session.nonce)),
            Port::Unattached | Port::Hailed { .. } | Port::Handshaking(_) => None,
        }
    }

    /// Takes what came in on `port`.
    pub fn on_item(&mut self, port: u32, item: Item) -> Vec<Action> {
        let mut actions = Vec::new();
        match item {
            Item::Garbage { bytes, fault } => self.on_garbage(port, bytes, fault, &mut actions),
            Item::Frame(frame) if frame.direction == Direction::ToHost => self.stale_frames += 1,
            Item::Frame(frame) => match frame.kind {
                Kind::Handshake => self.on_handshake(port, &frame, &mut actions),
                Kind::Session => self.on_session(port, &frame, &mut actions),
            },
        }
        self.bound_unread(port, &mut actions);
        actions
    }

    /// Notes that no host is connected to `port` any more.
    pub fn on_host_gone(&mut self, port: u32) -> Vec<Action> {
        let mut actions = Vec::new();
        self.end_session(port, "the host disconnected", &mut actions);
        self.ports.remove(&port);
        actions
    }

    /// The state as [`crate::message::Request::Ping`] reports it, with the agent's resident memory.
    #[must_use]
    pub fn status(&self, resident_kib: u64) -> Status {
        let (attached, detached) = self.commands.count_live();
        Status {
            epoch: self.epoch().unwrap_or(Epoch([0; 16])),
            agent_version: self.config.agent_version.clone(),
            released: self.is_released(),
            workload: self.workload(),
            attached_commands: attached,
            detached_commands: detached,
            frozen: self.is_frozen(),
            stale_frames: self.stale_frames,
            garbage_bytes: self.garbage_bytes,
            resident_kib,
        }
    }

    fn session(&mut self, port: u32, nonce: Nonce) -> Option<&mut Session> {
        match &mut self.ports.get_mut(&port)?.port {
            Port::Attached(session) if session.nonce == nonce => Some(session),
            Port::Attached(_) | Port::Unattached | Port::Hailed { .. } | Port::Handshaking(_) => {
                None
            }
        }
    }

    /// Puts a message of the session `to` at the end of what is to be written; gone when the session is.
    fn send(&mut self, to: StreamKey, message: &GuestMessage) -> Vec<Action> {
        match self.session(to.port, to.nonce) {
            Some(session) => {
                session.put(message);
                vec![Action::Flush { port: to.port }]
            }
            None => Vec::new(),
        }
    }

    /// Why a command or an operation on files may not begin now.
    fn find_hindrance(&self) -> Option<Rejection> {
        if !self.is_released() {
            return Some(Rejection::NotReleased);
        }
        if self.workload != Workload::Running {
            return Some(Rejection::WorkloadFrozen);
        }
        self.is_frozen().then_some(Rejection::Frozen)
    }
}

fn bounded_text(mut text: String) -> String {
    if text.len() > ERROR_TEXT_BYTES {
        let end = (0..=ERROR_TEXT_BYTES)
            .rev()
            .find(|&at| text.is_char_boundary(at));
        text.truncate(end.unwrap_or(0));
    }
    text
}
