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
//!      └──────── Current ◀─────────┘      Handshaking ──▶ Attached
//!
//! a session's command:  Idle ── exec ──▶ Starting ── may_start ──▶ Released ── started ──▶ Running ──▶ Idle
//! file systems:         Thawed ── freeze ──▶ Freezing ──▶ Frozen ── thaw, time over, owner gone ──▶ Thawing ──▶ Thawed
//!                                                            ▲  freezing or thawing failed half-way   │
//!                                                            └── (nobody's; tried again until thawed) ─┘
//! ```
//! A hello changes nothing but its own port: it may have lain in the stream since before a capture. The agent hails,
//! and only who answers the hail is alive in this life.
//!
//! Invariants:
//! - A port is attached only to the current epoch. When the epoch changes, all sessions end first.
//! - A command is released ([`Agent::may_start`]) only for the session that asked for it, at most once, and only
//!   while that session is attached. A caller that starts the program while it holds the machine's lock
//!   can therefore not start one for an epoch that has passed.
//! - [`GuestMessage::Ready`] is sent only after every step of [`STEPS`] was reported done or skipped.
//! - An epoch that another has replaced never comes back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::flow::{ReceiveWindow, SendWindow};
use crate::frame::{Direction, Fault, Item, Kind};
use crate::message::{
    Bytes, Done, ExecRequest, ExitStatus, Failed, GuestMessage, Hail, Hello, HostMessage, Message,
    OutputStream, Phase, PhaseOutcome, PhaseReport, Ready, Reason, Rejection, Request, Setup,
    ShutdownKind, Status, UNKNOWN_SESSION_SEQ,
};
use crate::{Epoch, Frame, Nonce, ProtocolError};

/// The steps of a handshake that need the operating system, in order.
pub const STEPS: [Phase; 4] = [Phase::Thaw, Phase::Clock, Phase::Entropy, Phase::Hostname];

/// How many replaced epochs are remembered.
pub const RETIRED_EPOCHS: usize = 1024;

const ERROR_TEXT_BYTES: usize = 4096;
const MOUNT_LIST_BYTES: usize = 16 * 1024;

/// Names a command: the port and session that asked for it, and the host's number for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CommandKey {
    /// The port.
    pub port: u32,
    /// The session.
    pub nonce: Nonce,
    /// The host's number.
    pub id: u64,
}

/// Names a request that is answered later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestKey {
    /// The port.
    pub port: u32,
    /// The session.
    pub nonce: Nonce,
    /// The host's number.
    pub id: u64,
}

/// Who the agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FrozenMounts {
    /// Where the frozen file systems are mounted.
    pub frozen: Vec<Bytes>,
    /// Where writable ones are mounted that cannot be frozen.
    pub unsupported: Vec<Bytes>,
}

/// Why nothing is frozen as it was asked, and whether something is all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreezeFailure {
    /// What went wrong.
    pub error: String,
    /// Whether a file system is or may be frozen: undoing what was done has failed too.
    pub still_frozen: bool,
}

/// Something slow that the host asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chore {
    /// Write what is dirty.
    Sync,
    /// Write what is dirty, then drop clean caches.
    DropCaches,
}

/// What the agent must do now, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Write these bytes to the port, after all that were sent before.
    Send {
        /// The port.
        port: u32,
        /// A whole frame.
        wire: Vec<u8>,
    },
    /// Forget what was to be written to the port and has not been begun.
    Purge {
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
        setup: Setup,
    },
    /// Prepare a command, ask [`Agent::may_start`], start it, and report.
    Start {
        /// The command.
        key: CommandKey,
        /// What to run.
        request: ExecRequest,
    },
    /// Pass input on to the command and report with [`Agent::stdin_consumed`].
    Stdin {
        /// The command.
        key: CommandKey,
        /// The input.
        data: Vec<u8>,
    },
    /// Close the command's input after all that came before.
    StdinEnd {
        /// The command.
        key: CommandKey,
    },
    /// Signal the command's group.
    Signal {
        /// The command.
        key: CommandKey,
        /// 1 to 31.
        signal: i32,
    },
    /// Look at the command again: it has more credit, or nobody listens to it any more.
    Wake {
        /// The command.
        key: CommandKey,
    },
    /// Freeze, and report with [`Agent::freeze_done`].
    Freeze {
        /// When to call [`Agent::freeze_expired`].
        limit_ms: u64,
    },
    /// Thaw, and report with [`Agent::thaw_done`].
    Thaw,
    /// Do it aside, and report with [`Agent::chore_done`].
    Chore {
        /// Who asked.
        key: RequestKey,
        /// What.
        chore: Chore,
    },
    /// Shut the machine down once the port has been written.
    Shutdown {
        /// The port whose answer goes out first.
        port: u32,
        /// How.
        kind: ShutdownKind,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Life {
    // `tried` is the epoch of a handshake that was not completed; it may be tried again until another
    // epoch takes its place.
    Unknown {
        tried: Option<Epoch>,
    },
    Changing {
        epoch: Epoch,
        port: u32,
        nonce: Nonce,
    },
    Current(Epoch),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Port {
    Unattached,
    Hailed { epoch: Epoch, nonce: Nonce },
    Handshaking(Handshake),
    Attached(Session),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Handshake {
    epoch: Epoch,
    nonce: Nonce,
    setup: Setup,
    due: Phase,
    reports: Vec<PhaseReport>,
    clock_behind_ns: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Session {
    epoch: Epoch,
    nonce: Nonce,
    seq_in: u64,
    seq_out: u64,
    last_id: u64,
    command: Command,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Command {
    Idle,
    Starting { id: u64, stdin: bool },
    Released { id: u64, stdin: bool },
    Running(Box<Running>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Running {
    id: u64,
    stdin: Stdin,
    stdout: SendWindow,
    stderr: SendWindow,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stdin {
    Open(ReceiveWindow),
    ClosedByCommand(ReceiveWindow),
    Ended,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Freeze {
    Thawed {
        lost: Option<&'static str>,
    },
    Freezing {
        owner: RequestKey,
        lost: Option<&'static str>,
    },
    Frozen {
        owner: Option<RequestKey>,
    },
    Thawing {
        answer: Option<RequestKey>,
        lost: Option<&'static str>,
    },
}

/// What a step of the handshake came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepResult {
    /// Done, skipped, or why it failed.
    pub outcome: Result<PhaseOutcome, String>,
    /// For the clock: how far it was behind, in nanoseconds.
    pub clock_behind_ns: Option<i64>,
    /// How long it took, in nanoseconds.
    pub duration_ns: u64,
}

/// How the output of a command may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// So many bytes may be sent now; none means: wait to be woken.
    Bytes(usize),
    /// Nobody listens any more: read the output and throw it away.
    Unheard,
}

/// The agent's state over all ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    identity: Identity,
    life: Life,
    ports: BTreeMap<u32, Port>,
    retired: VecDeque<Epoch>,
    freeze: Freeze,
    commands: BTreeSet<CommandKey>,
    stale_frames: u64,
    garbage_bytes: u64,
}

impl Agent {
    /// An agent that knows of no epoch yet.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            life: Life::Unknown { tried: None },
            ports: BTreeMap::new(),
            retired: VecDeque::new(),
            freeze: Freeze::Thawed { lost: None },
            commands: BTreeSet::new(),
            stale_frames: 0,
            garbage_bytes: 0,
        }
    }

    /// The epoch that sessions may belong to, if a handshake has been completed.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        match self.life {
            Life::Current(epoch) => Some(epoch),
            Life::Unknown { .. } | Life::Changing { .. } => None,
        }
    }

    /// The session that `port` is attached to.
    #[must_use]
    pub fn attached(&self, port: u32) -> Option<(Epoch, Nonce)> {
        match self.ports.get(&port)? {
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
        actions
    }

    /// Notes that no host is connected to `port` any more.
    pub fn on_host_gone(&mut self, port: u32) -> Vec<Action> {
        let mut actions = Vec::new();
        self.end_session(port, "the host disconnected", &mut actions);
        self.ports.remove(&port);
        actions
    }

    /// Notes that the host of `port` asks for more than it reads: its session ends, and without one what was to
    /// be written is forgotten. Whoever says hello again is answered.
    pub fn on_unread(&mut self, port: u32) -> Vec<Action> {
        let Some(Port::Attached(_)) = self.ports.get(&port) else {
            return vec![Action::Purge { port }];
        };
        let mut actions = Vec::new();
        let error = ProtocolError::Unexpected {
            message: "more requests",
            state: "full of answers that were not read",
        };
        self.break_session(port, &error, &mut actions);
        actions
    }

    /// Takes what a step of the handshake came to; ignored when the handshake is no longer under way.
    pub fn step_done(
        &mut self,
        port: u32,
        nonce: Nonce,
        phase: Phase,
        result: StepResult,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(Port::Handshaking(handshake)) = self.ports.get_mut(&port) else {
            return actions;
        };
        if handshake.nonce != nonce || handshake.due != phase {
            return actions;
        }
        match result.outcome {
            Ok(outcome) => {
                handshake.clock_behind_ns = handshake.clock_behind_ns.or(result.clock_behind_ns);
                handshake.reports.push(PhaseReport {
                    phase,
                    outcome,
                    duration_ns: result.duration_ns,
                });
                self.next_step(port, &mut actions);
            }
            Err(error) => {
                let (epoch, nonce) = (handshake.epoch, handshake.nonce);
                self.life = Life::Unknown { tried: Some(epoch) };
                self.ports.insert(port, Port::Unattached);
                actions.push(refusal(port, epoch, nonce, 1, phase, &error));
            }
        }
        actions
    }

    /// Whether the command may be started now. True at most once for a command; the caller starts it before
    /// it hands the machine to anyone else.
    pub fn may_start(&mut self, key: CommandKey) -> bool {
        let thawed = matches!(self.freeze, Freeze::Thawed { .. });
        let Some(session) = self.session(key.port, key.nonce) else {
            return false;
        };
        match session.command {
            Command::Starting { id, stdin } if id == key.id && thawed => {
                session.command = Command::Released { id, stdin };
                true
            }
            Command::Idle
            | Command::Starting { .. }
            | Command::Released { .. }
            | Command::Running(_) => false,
        }
    }

    /// Notes that the command runs.
    pub fn started(&mut self, key: CommandKey) -> Vec<Action> {
        let Some(session) = self.session(key.port, key.nonce) else {
            return Vec::new();
        };
        let Command::Released { id, stdin } = session.command else {
            return Vec::new();
        };
        if id != key.id {
            return Vec::new();
        }
        session.command = Command::Running(Box::new(Running {
            id,
            stdin: if stdin {
                Stdin::Open(ReceiveWindow::default())
            } else {
                Stdin::Ended
            },
            stdout: SendWindow::default(),
            stderr: SendWindow::default(),
        }));
        vec![session.send(key.port, &GuestMessage::Accepted { id })]
    }

    /// Notes that the command could not be started; [`Agent::command_gone`] follows.
    pub fn rejected(&mut self, key: CommandKey, reason: Rejection) -> Vec<Action> {
        let frozen = !matches!(self.freeze, Freeze::Thawed { .. });
        let Some(session) = self.session(key.port, key.nonce) else {
            return Vec::new();
        };
        let reason = match session.command {
            Command::Starting { id, .. } if id == key.id && frozen => Rejection::Frozen,
            Command::Starting { id, .. } | Command::Released { id, .. } if id == key.id => {
                bounded(reason)
            }
            Command::Idle
            | Command::Starting { .. }
            | Command::Released { .. }
            | Command::Running(_) => {
                return Vec::new();
            }
        };
        session.command = Command::Idle;
        vec![session.send(key.port, &GuestMessage::Rejected { id: key.id, reason })]
    }

    /// How many bytes of the stream may be sent now.
    #[must_use]
    pub fn room(&mut self, key: CommandKey, stream: OutputStream) -> Room {
        self.running(key).map_or(Room::Unheard, |running| {
            Room::Bytes(running.output(stream).next_chunk_bytes())
        })
    }

    /// Output for the host; nothing when nobody listens any more.
    ///
    /// # Panics
    /// When `data` is more than [`Agent::room`] allowed.
    pub fn output(&mut self, key: CommandKey, stream: OutputStream, data: &[u8]) -> Option<Action> {
        let running = self.running(key)?;
        running.output(stream).spend(data.len());
        let message = GuestMessage::Output {
            id: key.id,
            stream,
            data: Bytes::from(data),
        };
        Some(self.session(key.port, key.nonce)?.send(key.port, &message))
    }

    /// Notes that the command took `bytes` of its input.
    pub fn stdin_consumed(&mut self, key: CommandKey, bytes: usize) -> Option<Action> {
        let Stdin::Open(window) = &mut self.running(key)?.stdin else {
            return None;
        };
        let bytes = window.consume(bytes)?;
        let message = GuestMessage::StdinCredit { id: key.id, bytes };
        Some(self.session(key.port, key.nonce)?.send(key.port, &message))
    }

    /// Notes that the command has closed its input.
    pub fn stdin_closed(&mut self, key: CommandKey) -> Option<Action> {
        let running = self.running(key)?;
        let Stdin::Open(window) = &running.stdin else {
            return None;
        };
        running.stdin = Stdin::ClosedByCommand(window.clone());
        let message = GuestMessage::StdinClosed { id: key.id };
        Some(self.session(key.port, key.nonce)?.send(key.port, &message))
    }

    /// Notes that the command has ended and all its output was given to [`Agent::output`].
    pub fn exited(&mut self, key: CommandKey, status: ExitStatus) -> Option<Action> {
        self.running(key)?;
        let session = self.session(key.port, key.nonce)?;
        session.command = Command::Idle;
        Some(session.send(key.port, &GuestMessage::Exit { id: key.id, status }))
    }

    /// Notes that nothing of the command is left: it has ended and nobody holds its output open.
    pub fn command_gone(&mut self, key: CommandKey) {
        self.commands.remove(&key);
    }

    /// Takes what freezing came to: where file systems are frozen now, or why none is or should be. What is frozen
    /// against the will is nobody's: no command is accepted until [`Agent::freeze_expired`] has led to its thaw.
    pub fn freeze_done(&mut self, result: Result<FrozenMounts, FreezeFailure>) -> Vec<Action> {
        let Freeze::Freezing { owner, lost } = self.freeze else {
            return Vec::new();
        };
        match (result, lost) {
            (Ok(mounts), None) => {
                self.freeze = Freeze::Frozen { owner: Some(owner) };
                self.answer(
                    owner,
                    Done::Frozen {
                        mounts: bounded_mounts(mounts.frozen),
                        unsupported: bounded_mounts(mounts.unsupported),
                    },
                )
            }
            (Ok(_), Some(_)) => {
                self.freeze = Freeze::Thawing { answer: None, lost };
                vec![Action::Thaw]
            }
            (Err(failure), _) => {
                self.freeze = if failure.still_frozen {
                    Freeze::Frozen { owner: None }
                } else {
                    Freeze::Thawed { lost }
                };
                self.answer(owner, Done::Failed(bounded_text(failure.error)))
            }
        }
    }

    /// Notes that the time of the freeze is over, or that it is time to try again to thaw.
    pub fn freeze_expired(&mut self) -> Vec<Action> {
        let why = match self.freeze {
            Freeze::Frozen { owner: Some(_) } => "its time was over",
            Freeze::Frozen { owner: None } => "an undoing that had failed was tried again",
            Freeze::Thawed { .. } | Freeze::Freezing { .. } | Freeze::Thawing { .. } => {
                return Vec::new();
            }
        };
        self.begin_thaw(None, Some(why))
    }

    /// Takes what thawing came to. After a failure it is tried again: [`Agent::freeze_expired`] is due soon.
    pub fn thaw_done(&mut self, result: Result<(), String>) -> Vec<Action> {
        let Freeze::Thawing { answer, lost } = self.freeze else {
            return Vec::new();
        };
        let outcome = match result {
            Ok(()) => {
                self.freeze = Freeze::Thawed { lost };
                Done::Ok
            }
            Err(error) => {
                self.freeze = Freeze::Frozen { owner: None };
                Done::Failed(bounded_text(error))
            }
        };
        answer.map_or_else(Vec::new, |key| self.answer(key, outcome))
    }

    /// Takes what a chore came to.
    pub fn chore_done(&mut self, key: RequestKey, result: Result<(), String>) -> Vec<Action> {
        let outcome = result.map_or_else(|error| Done::Failed(bounded_text(error)), |()| Done::Ok);
        self.answer(key, outcome)
    }

    /// Whether any file system is or may be frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        !matches!(self.freeze, Freeze::Thawed { .. })
    }

    /// The state as [`Request::Ping`] reports it.
    #[must_use]
    pub fn status(&self) -> Status {
        let attached = self
            .commands
            .iter()
            .filter(|key| self.listens(**key))
            .count();
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Status {
            attached_commands: count(attached),
            detached_commands: count(self.commands.len() - attached),
            frozen: self.is_frozen(),
            stale_frames: self.stale_frames,
            garbage_bytes: self.garbage_bytes,
        }
    }

    fn listens(&self, key: CommandKey) -> bool {
        matches!(
            self.ports.get(&key.port),
            Some(Port::Attached(session)) if session.nonce == key.nonce && session.command.id() == Some(key.id)
        )
    }

    fn session(&mut self, port: u32, nonce: Nonce) -> Option<&mut Session> {
        match self.ports.get_mut(&port)? {
            Port::Attached(session) if session.nonce == nonce => Some(session),
            Port::Attached(_) | Port::Unattached | Port::Hailed { .. } | Port::Handshaking(_) => {
                None
            }
        }
    }

    fn running(&mut self, key: CommandKey) -> Option<&mut Running> {
        match &mut self.session(key.port, key.nonce)?.command {
            Command::Running(running) if running.id == key.id => Some(running),
            Command::Running(_)
            | Command::Idle
            | Command::Starting { .. }
            | Command::Released { .. } => None,
        }
    }

    fn answer(&mut self, key: RequestKey, outcome: Done) -> Vec<Action> {
        let message = GuestMessage::Done {
            id: key.id,
            outcome,
        };
        self.session(key.port, key.nonce)
            .map_or_else(Vec::new, |session| vec![session.send(key.port, &message)])
    }

    fn on_garbage(&mut self, port: u32, bytes: usize, fault: Fault, actions: &mut Vec<Action>) {
        self.garbage_bytes = self.garbage_bytes.saturating_add(bytes as u64);
        match (self.ports.get(&port), fault) {
            (Some(Port::Attached(_)), _) => {
                self.break_session(
                    port,
                    &ProtocolError::Garbage {
                        bytes,
                        reason: fault,
                    },
                    actions,
                );
            }
            (Some(Port::Unattached) | None, Fault::Version(_)) => {
                // Whoever speaks another version can at least read ours in the answer's header.
                actions.push(refusal(
                    port,
                    Epoch([0; 16]),
                    Nonce(0),
                    0,
                    Phase::Epoch,
                    &fault.to_string(),
                ));
            }
            (Some(Port::Unattached | Port::Hailed { .. } | Port::Handshaking(_)) | None, _) => {}
        }
    }

    fn on_handshake(&mut self, port: u32, frame: &Frame, actions: &mut Vec<Action>) {
        let (epoch, nonce) = (frame.epoch, frame.nonce);
        let is_own = self.is_own(port, epoch, nonce);
        let is_hailed = self.ports.get(&port) == Some(&Port::Hailed { epoch, nonce });
        match HostMessage::from_frame(frame) {
            Ok(HostMessage::Hello(hello)) if frame.seq == 0 && !is_own => {
                self.on_hello(port, epoch, nonce, hello, actions);
            }
            Ok(HostMessage::Setup(setup)) if frame.seq == 1 && is_hailed => {
                self.begin_life(port, epoch, nonce, setup, actions);
            }
            // A repetition, or the setup of another session.
            Ok(HostMessage::Hello(_) | HostMessage::Setup(_)) => self.stale_frames += 1,
            Ok(
                HostMessage::Exec { .. }
                | HostMessage::Stdin { .. }
                | HostMessage::StdinEnd { .. }
                | HostMessage::Signal { .. }
                | HostMessage::Credit { .. }
                | HostMessage::Request { .. },
            ) => unreachable!("the kind of the frame was checked against the message"),
            Err(error) if !is_own || is_hailed => {
                let seq = u64::from(is_hailed);
                actions.push(refusal(
                    port,
                    epoch,
                    nonce,
                    seq,
                    Phase::Epoch,
                    &error.to_string(),
                ));
            }
            Err(_) => self.stale_frames += 1,
        }
    }

    fn on_hello(
        &mut self,
        port: u32,
        epoch: Epoch,
        nonce: Nonce,
        hello: Hello,
        actions: &mut Vec<Action>,
    ) {
        self.end_session(port, "another hello came on the port", actions);
        match hello.reason {
            Reason::Reattach => self.reattach(port, epoch, nonce, actions),
            Reason::Boot | Reason::Restore | Reason::Fork | Reason::Wake => {
                if let Some(error) = self.find_passed(epoch) {
                    actions.push(refusal(port, epoch, nonce, 0, Phase::Epoch, &error));
                    return;
                }
                let agent_version = self.identity.agent_version.clone();
                let hail = GuestMessage::Hail(Hail { agent_version });
                actions.push(wire(port, epoch, nonce, 0, &hail));
                self.ports.insert(port, Port::Hailed { epoch, nonce });
            }
        }
    }

    fn find_passed(&self, epoch: Epoch) -> Option<String> {
        self.retired
            .contains(&epoch)
            .then(|| format!("epoch {epoch} has passed: another has replaced it"))
    }

    fn is_own(&self, port: u32, epoch: Epoch, nonce: Nonce) -> bool {
        match self.ports.get(&port) {
            Some(Port::Attached(session)) => (session.epoch, session.nonce) == (epoch, nonce),
            Some(Port::Handshaking(handshake)) => {
                (handshake.epoch, handshake.nonce) == (epoch, nonce)
            }
            Some(Port::Hailed {
                epoch: own,
                nonce: own_nonce,
            }) => (*own, *own_nonce) == (epoch, nonce),
            Some(Port::Unattached) | None => false,
        }
    }

    fn reattach(&mut self, port: u32, epoch: Epoch, nonce: Nonce, actions: &mut Vec<Action>) {
        let refused = match self.life {
            Life::Current(current) if current == epoch => None,
            Life::Current(current) => Some(format!("the current epoch is {current}, not {epoch}")),
            Life::Changing { .. } => Some("another handshake is under way".to_owned()),
            Life::Unknown { .. } => Some("no handshake has been completed yet".to_owned()),
        };
        if let Some(error) = refused {
            actions.push(refusal(port, epoch, nonce, 0, Phase::Epoch, &error));
            return;
        }
        let report = PhaseReport {
            phase: Phase::Epoch,
            outcome: PhaseOutcome::Done,
            duration_ns: 0,
        };
        let session = Session::new(epoch, nonce, 0);
        self.attach(port, session, None, vec![report], actions);
    }

    fn begin_life(
        &mut self,
        port: u32,
        epoch: Epoch,
        nonce: Nonce,
        setup: Setup,
        actions: &mut Vec<Action>,
    ) {
        // Another port may have begun another life since the hail.
        if let Some(error) = self.find_passed(epoch) {
            self.ports.insert(port, Port::Unattached);
            actions.push(refusal(port, epoch, nonce, 1, Phase::Epoch, &error));
            return;
        }
        let ports: Vec<u32> = self.ports.keys().copied().collect();
        for other in ports {
            self.end_session(other, "another epoch began", actions);
        }
        if self.freeze == (Freeze::Frozen { owner: None }) {
            actions.extend(self.begin_thaw(None, Some("another epoch began")));
        }
        self.retire(epoch);
        self.life = Life::Changing { epoch, port, nonce };
        let done = |phase| PhaseReport {
            phase,
            outcome: PhaseOutcome::Done,
            duration_ns: 0,
        };
        self.ports.insert(
            port,
            Port::Handshaking(Handshake {
                epoch,
                nonce,
                setup,
                due: Phase::Sessions,
                reports: vec![done(Phase::Epoch), done(Phase::Sessions)],
                clock_behind_ns: None,
            }),
        );
        self.next_step(port, actions);
    }

    /// Remembers the epoch that `next` replaces.
    fn retire(&mut self, next: Epoch) {
        let old = match self.life {
            Life::Current(old) | Life::Changing { epoch: old, .. } => old,
            Life::Unknown { tried: Some(old) } => old,
            Life::Unknown { tried: None } => return,
        };
        if old == next {
            return;
        }
        if self.retired.len() == RETIRED_EPOCHS {
            self.retired.pop_front();
        }
        self.retired.push_back(old);
    }

    fn next_step(&mut self, port: u32, actions: &mut Vec<Action>) {
        let Some(Port::Handshaking(handshake)) = self.ports.get_mut(&port) else {
            return;
        };
        let next = match STEPS.iter().position(|&phase| phase == handshake.due) {
            Some(done) => STEPS.get(done + 1),
            None => STEPS.first(),
        };
        if let Some(&phase) = next {
            handshake.due = phase;
            actions.push(Action::Step {
                port,
                nonce: handshake.nonce,
                phase,
                setup: handshake.setup.clone(),
            });
            return;
        }
        let (epoch, nonce) = (handshake.epoch, handshake.nonce);
        let reports = std::mem::take(&mut handshake.reports);
        let clock_behind_ns = handshake.clock_behind_ns;
        self.life = Life::Current(epoch);
        let session = Session::new(epoch, nonce, 1);
        self.attach(port, session, clock_behind_ns, reports, actions);
    }

    fn attach(
        &mut self,
        port: u32,
        mut session: Session,
        clock_behind_ns: Option<i64>,
        phases: Vec<PhaseReport>,
        actions: &mut Vec<Action>,
    ) {
        assert!(
            self.life == Life::Current(session.epoch),
            "a port is attached only to the current epoch"
        );
        let ready = Ready {
            agent_version: self.identity.agent_version.clone(),
            boot_id: self.identity.boot_id.clone(),
            clock_behind_ns,
            phases,
        };
        actions.push(session.send(port, &GuestMessage::Ready(ready)));
        self.ports.insert(port, Port::Attached(session));
    }

    /// Ends whatever the port is in the middle of. Its command goes on, unheard.
    fn end_session(&mut self, port: u32, why: &'static str, actions: &mut Vec<Action>) {
        let Some(state) = self.ports.insert(port, Port::Unattached) else {
            return;
        };
        match state {
            Port::Unattached | Port::Hailed { .. } => {}
            Port::Handshaking(handshake) => {
                let under_way = Life::Changing {
                    epoch: handshake.epoch,
                    port,
                    nonce: handshake.nonce,
                };
                if self.life == under_way {
                    self.life = Life::Unknown {
                        tried: Some(handshake.epoch),
                    };
                }
            }
            Port::Attached(session) => {
                actions.push(Action::Purge { port });
                if let Some(id) = session.command.id() {
                    let nonce = session.nonce;
                    actions.push(Action::Wake {
                        key: CommandKey { port, nonce, id },
                    });
                }
                self.abandon_freeze(port, session.nonce, why, actions);
            }
        }
    }

    fn abandon_freeze(
        &mut self,
        port: u32,
        nonce: Nonce,
        why: &'static str,
        actions: &mut Vec<Action>,
    ) {
        let is_owner = |key: &RequestKey| (key.port, key.nonce) == (port, nonce);
        match &mut self.freeze {
            Freeze::Freezing { owner, lost } if is_owner(owner) => *lost = Some(why),
            Freeze::Frozen { owner: Some(owner) } if is_owner(owner) => {
                actions.extend(self.begin_thaw(None, Some(why)));
            }
            Freeze::Thawed { .. }
            | Freeze::Freezing { .. }
            | Freeze::Frozen { .. }
            | Freeze::Thawing { .. } => {}
        }
    }

    fn begin_thaw(
        &mut self,
        answer: Option<RequestKey>,
        lost: Option<&'static str>,
    ) -> Vec<Action> {
        self.freeze = Freeze::Thawing { answer, lost };
        vec![Action::Thaw]
    }

    fn break_session(&mut self, port: u32, error: &ProtocolError, actions: &mut Vec<Action>) {
        let Some(Port::Attached(mut session)) = self.ports.get(&port).cloned() else {
            return;
        };
        self.end_session(port, "the session broke", actions);
        let reason = bounded_text(error.to_string());
        actions.push(session.send(port, &GuestMessage::SessionBroken { reason }));
    }

    fn on_session(&mut self, port: u32, frame: &Frame, actions: &mut Vec<Action>) {
        let current = self.epoch() == Some(frame.epoch);
        let Some(session) = self.session(port, frame.nonce) else {
            self.stale_frames += 1;
            // An agent that was restarted knows no session, of whatever epoch.
            if current || self.life == (Life::Unknown { tried: None }) {
                actions.extend(deny_session(port, frame));
            }
            return;
        };
        if !current || session.epoch != frame.epoch || frame.seq < session.seq_in {
            self.stale_frames += 1;
            return;
        }
        let expected = session.seq_in;
        session.seq_in += 1;
        let taken = if frame.seq > expected {
            Err(ProtocolError::Gap {
                expected,
                found: frame.seq,
            })
        } else {
            HostMessage::from_frame(frame)
                .and_then(|message| self.on_message(port, frame.nonce, message, actions))
        };
        if let Err(error) = taken {
            self.break_session(port, &error, actions);
        }
    }

    fn on_message(
        &mut self,
        port: u32,
        nonce: Nonce,
        message: HostMessage,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        let key = |id| CommandKey { port, nonce, id };
        match message {
            HostMessage::Hello(_) | HostMessage::Setup(_) => {
                unreachable!("the kind of the frame was checked against the message")
            }
            HostMessage::Exec { id, request } => self.on_exec(key(id), request, actions),
            HostMessage::Stdin { id, data } => self.on_stdin(key(id), data.0, actions),
            HostMessage::StdinEnd { id } => self.on_stdin_end(key(id), actions),
            HostMessage::Signal { id, signal } => {
                if !(1..=31).contains(&signal) {
                    return Err(unexpected("signal", "limited to signals 1 to 31"));
                }
                if self.running(key(id)).is_some() {
                    actions.push(Action::Signal {
                        key: key(id),
                        signal,
                    });
                }
                Ok(())
            }
            HostMessage::Credit { id, stream, bytes } => {
                if let Some(running) = self.running(key(id)) {
                    running.output(stream).grant(bytes)?;
                    actions.push(Action::Wake { key: key(id) });
                }
                Ok(())
            }
            HostMessage::Request { id, request } => {
                self.on_request(RequestKey { port, nonce, id }, request, actions)
            }
        }
    }

    /// Numbers in a session only grow, so that nothing is done twice.
    fn take_id(&mut self, port: u32, nonce: Nonce, id: u64) -> Result<(), ProtocolError> {
        match self.session(port, nonce) {
            Some(session) if id > session.last_id => {
                session.last_id = id;
                Ok(())
            }
            Some(_) | None => Err(unexpected("a number that was used before", "attached")),
        }
    }

    fn on_exec(
        &mut self,
        key: CommandKey,
        request: ExecRequest,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        self.take_id(key.port, key.nonce, key.id)?;
        let limit = self.identity.max_commands;
        let full = u32::try_from(self.commands.len()).map_or(true, |count| count >= limit);
        let frozen = self.is_frozen();
        let Some(session) = self.session(key.port, key.nonce) else {
            return Ok(());
        };
        let refused = if session.command != Command::Idle {
            Some(Rejection::Busy)
        } else if frozen {
            Some(Rejection::Frozen)
        } else if full {
            Some(Rejection::TooManyCommands { limit })
        } else {
            find_fault(&request).map(|fault| Rejection::Invalid(fault.to_owned()))
        };
        if let Some(reason) = refused {
            actions.push(session.send(key.port, &GuestMessage::Rejected { id: key.id, reason }));
            return Ok(());
        }
        session.command = Command::Starting {
            id: key.id,
            stdin: request.stdin,
        };
        self.commands.insert(key);
        actions.push(Action::Start { key, request });
        Ok(())
    }

    fn on_stdin(
        &mut self,
        key: CommandKey,
        data: Vec<u8>,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        let Some(running) = self.running(key) else {
            // The command ended while this was on its way.
            return self.expect_past(key, "stdin");
        };
        match &mut running.stdin {
            Stdin::Open(window) => {
                window.receive(data.len())?;
                actions.push(Action::Stdin { key, data });
                Ok(())
            }
            Stdin::ClosedByCommand(window) => window.receive(data.len()),
            Stdin::Ended => Err(unexpected("stdin", "past the end of stdin")),
        }
    }

    fn on_stdin_end(
        &mut self,
        key: CommandKey,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        let Some(running) = self.running(key) else {
            return self.expect_past(key, "end of stdin");
        };
        match running.stdin {
            Stdin::Open(_) => actions.push(Action::StdinEnd { key }),
            Stdin::ClosedByCommand(_) => {}
            Stdin::Ended => return Err(unexpected("end of stdin", "past the end of stdin")),
        }
        running.stdin = Stdin::Ended;
        Ok(())
    }

    fn expect_past(&mut self, key: CommandKey, message: &'static str) -> Result<(), ProtocolError> {
        match self.session(key.port, key.nonce) {
            Some(session) if key.id <= session.last_id && session.command == Command::Idle => {
                Ok(())
            }
            Some(_) | None => Err(unexpected(message, "without such a command")),
        }
    }

    fn on_request(
        &mut self,
        key: RequestKey,
        request: Request,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        self.take_id(key.port, key.nonce, key.id)?;
        match request {
            Request::Ping => {
                let status = self.status();
                actions.extend(self.answer(key, Done::Status(status)));
            }
            Request::Sync => actions.push(Action::Chore {
                key,
                chore: Chore::Sync,
            }),
            Request::DropCaches => actions.push(Action::Chore {
                key,
                chore: Chore::DropCaches,
            }),
            Request::Freeze { limit_ms } => actions.extend(self.on_freeze(key, limit_ms)),
            Request::Thaw => actions.extend(self.on_thaw(key)),
            Request::Shutdown(_) if !self.identity.may_shut_down => {
                let refused = "this agent may not shut the machine down".to_owned();
                actions.extend(self.answer(key, Done::Failed(refused)));
            }
            Request::Shutdown(kind) => {
                actions.extend(self.answer(key, Done::Ok));
                actions.push(Action::Shutdown {
                    port: key.port,
                    kind,
                });
            }
        }
        Ok(())
    }

    fn on_freeze(&mut self, key: RequestKey, limit_ms: u64) -> Vec<Action> {
        match self.freeze {
            Freeze::Thawed { .. } => {
                self.freeze = Freeze::Freezing {
                    owner: key,
                    lost: None,
                };
                vec![Action::Freeze { limit_ms }]
            }
            Freeze::Freezing { .. } | Freeze::Frozen { .. } | Freeze::Thawing { .. } => self
                .answer(
                    key,
                    Done::Failed("the file systems are frozen already or being thawed".to_owned()),
                ),
        }
    }

    fn on_thaw(&mut self, key: RequestKey) -> Vec<Action> {
        match &mut self.freeze {
            Freeze::Frozen { .. } => self.begin_thaw(Some(key), None),
            Freeze::Freezing { .. } | Freeze::Thawing { .. } => self.answer(
                key,
                Done::Failed("freezing or thawing is under way".to_owned()),
            ),
            Freeze::Thawed { lost } => {
                let why = lost.take().unwrap_or("nobody had frozen them");
                self.answer(
                    key,
                    Done::Failed(format!("the file systems were not frozen: {why}")),
                )
            }
        }
    }
}

impl Session {
    /// A session whose handshake took `answers` messages each way before the one that attaches it.
    fn new(epoch: Epoch, nonce: Nonce, answers: u64) -> Self {
        Self {
            epoch,
            nonce,
            seq_in: answers + 1,
            seq_out: answers,
            last_id: 0,
            command: Command::Idle,
        }
    }

    fn send(&mut self, port: u32, message: &GuestMessage) -> Action {
        let seq = self.seq_out;
        self.seq_out += 1;
        wire(port, self.epoch, self.nonce, seq, message)
    }
}

impl Command {
    fn id(&self) -> Option<u64> {
        match self {
            Self::Idle => None,
            Self::Starting { id, .. } | Self::Released { id, .. } => Some(*id),
            Self::Running(running) => Some(running.id),
        }
    }
}

impl Running {
    fn output(&mut self, stream: OutputStream) -> &mut SendWindow {
        match stream {
            OutputStream::Stdout => &mut self.stdout,
            OutputStream::Stderr => &mut self.stderr,
        }
    }
}

fn wire(port: u32, epoch: Epoch, nonce: Nonce, seq: u64, message: &GuestMessage) -> Action {
    let payload = message
        .to_payload()
        .expect("every text and list in it is bounded");
    let frame = Frame {
        direction: Direction::ToHost,
        kind: message.kind(),
        seq,
        epoch,
        nonce,
        payload,
    };
    Action::Send {
        port,
        wire: frame.encode().expect("the payload's size was checked"),
    }
}

/// Tells a host that asks for something in a session that has ended here, and does not know it: the end of an earlier
/// connection was seen only after its hello, or the agent was restarted. Nothing is done of what it asks here.
fn deny_session(port: u32, frame: &Frame) -> Option<Action> {
    let asks = matches!(
        HostMessage::from_frame(frame),
        Ok(HostMessage::Exec { .. } | HostMessage::Request { .. })
    );
    let reason = "the agent does not know it".to_owned();
    let message = GuestMessage::SessionBroken { reason };
    asks.then(|| {
        wire(
            port,
            frame.epoch,
            frame.nonce,
            UNKNOWN_SESSION_SEQ,
            &message,
        )
    })
}

fn refusal(port: u32, epoch: Epoch, nonce: Nonce, seq: u64, phase: Phase, error: &str) -> Action {
    let error = bounded_text(error.to_owned());
    wire(
        port,
        epoch,
        nonce,
        seq,
        &GuestMessage::Failed(Failed { phase, error }),
    )
}

fn unexpected(message: &'static str, state: &'static str) -> ProtocolError {
    ProtocolError::Unexpected { message, state }
}

fn find_fault(request: &ExecRequest) -> Option<&'static str> {
    let has_zero = |bytes: &Bytes| bytes.0.contains(&0);
    if request
        .argv
        .first()
        .is_none_or(|program| program.0.is_empty())
    {
        return Some("there is no program to run");
    }
    if request.argv.iter().any(has_zero) {
        return Some("an argument has a zero byte");
    }
    let wrong_name = |name: &Bytes| name.0.is_empty() || name.0.contains(&b'=') || has_zero(name);
    if request
        .env
        .iter()
        .any(|(name, value)| wrong_name(name) || has_zero(value))
    {
        return Some("an environment variable has an empty name, '=' in its name or a zero byte");
    }
    if request
        .cwd
        .as_ref()
        .is_some_and(|cwd| cwd.0.is_empty() || has_zero(cwd))
    {
        return Some("the folder to start in is empty or has a zero byte");
    }
    None
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

fn bounded(reason: Rejection) -> Rejection {
    match reason {
        Rejection::Invalid(text) => Rejection::Invalid(bounded_text(text)),
        Rejection::Start { step, errno } => Rejection::Start {
            step: bounded_text(step),
            errno,
        },
        Rejection::Busy | Rejection::Frozen | Rejection::TooManyCommands { .. } => reason,
    }
}

fn bounded_mounts(mounts: Vec<Bytes>) -> Vec<Bytes> {
    let mut left = MOUNT_LIST_BYTES;
    mounts
        .into_iter()
        .take_while(|mount| {
            let needed = mount.0.len() + 4;
            let fits = needed <= left;
            left = left.saturating_sub(needed);
            fits
        })
        .collect()
}
