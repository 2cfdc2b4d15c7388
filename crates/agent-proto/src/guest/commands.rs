//! Commands: noted, started once, listened to by at most one session, remembered when they have ended.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use super::replay::{ENDED_BYTES, LARGE_BYTES, LARGE_COMMANDS, Replay, SMALL_BYTES};
use super::session::{Attached, Stdin, Stream};
use super::{Action, Agent, REMEMBERED_COMMANDS, StreamKey, bounded_text};
use crate::flow::{MIN_WINDOW_BYTES, ReceiveWindow, STREAM_WINDOW_BYTES};
use crate::message::{
    Bytes, CommandEntry, CommandState, ExecRequest, ExitStatus, GuestMessage, Kept,
    LISTED_ARGV_BYTES, OutputStream, Rejection,
};
use crate::{Epoch, ExecKey};

/// How many open inputs get a whole window; more of them get the least.
const LARGE_INPUTS: usize = 32;

/// What the agent knows of commands.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub(super) struct Commands {
    pub(super) table: BTreeMap<ExecKey, Command>,
    // Those that run or whose output is held open by somebody.
    pub(super) live: BTreeSet<ExecKey>,
    // Those of the table that have ended, the oldest first.
    ended: VecDeque<ExecKey>,
    has_forgotten: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Command {
    pub(super) epoch: Epoch,
    argv: Vec<Bytes>,
    pty: bool,
    pub(super) progress: Progress,
    // Sessions are not left to another agent.
    #[serde(skip)]
    pub(super) owner: Option<StreamKey>,
    pub(super) outputs: [Replay; 2],
    pub(super) input: Option<Input>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Progress {
    Starting,
    Released,
    Running {
        pid: u32,
        started_ns: u64,
    },
    Ended {
        pid: u32,
        started_ns: u64,
        status: ExitStatus,
    },
    // The session that has said go is gone. Nothing will run, unless the key is told to go again before the thread that
    // prepares the program has asked: it is started for who has said so then.
    Withdrawn,
}

/// An input that is open.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Input {
    pub(super) received: u64,
    // What came in sessions that are gone and was not taken yet: it is taken first, and nobody gets credit for it.
    orphaned: usize,
}

impl Command {
    pub(super) fn new(
        request: &ExecRequest,
        epoch: Epoch,
        owner: StreamKey,
        capacity: usize,
    ) -> Self {
        Self {
            epoch,
            argv: listed(&request.argv),
            pty: request.pty.is_some(),
            progress: Progress::Starting,
            owner: Some(owner),
            outputs: [Replay::new(capacity), Replay::new(capacity)],
            input: (request.stdin || request.pty.is_some()).then_some(Input {
                received: 0,
                orphaned: 0,
            }),
        }
    }

    pub(super) fn state(&self) -> CommandState {
        match self.progress {
            Progress::Withdrawn => CommandState::NotRun,
            Progress::Starting | Progress::Released | Progress::Running { .. } => {
                CommandState::Running
            }
            Progress::Ended { status, .. } => CommandState::Ended(status),
        }
    }

    pub(super) fn pid(&self) -> Option<u32> {
        match self.progress {
            Progress::Starting | Progress::Withdrawn | Progress::Released => None,
            Progress::Running { pid, .. } | Progress::Ended { pid, .. } => Some(pid),
        }
    }

    fn entry(&self, key: ExecKey) -> CommandEntry {
        let started_ns = match self.progress {
            Progress::Starting | Progress::Withdrawn | Progress::Released => 0,
            Progress::Running { started_ns, .. } | Progress::Ended { started_ns, .. } => started_ns,
        };
        CommandEntry {
            key,
            epoch: self.epoch,
            argv: self.argv.clone(),
            pid: self.pid(),
            pty: self.pty,
            started_ns,
            attached: self.owner.is_some(),
            output: self.kept(),
            state: self.state(),
        }
    }

    pub(super) fn kept(&self) -> [Kept; 2] {
        [self.outputs[0].kept(), self.outputs[1].kept()]
    }

    fn kept_bytes(&self) -> usize {
        self.outputs.iter().map(Replay::len).sum()
    }
}

impl Commands {
    pub(super) fn get(&self, key: ExecKey) -> Option<&Command> {
        self.table.get(&key)
    }

    pub(super) fn get_mut(&mut self, key: ExecKey) -> Option<&mut Command> {
        self.table.get_mut(&key)
    }

    /// Whether it can be what an agent has left: each that has ended is known once, and all counts can go on.
    pub(super) fn is_sound(&self) -> bool {
        let is_ended = |command: &Command| matches!(command.progress, Progress::Ended { .. });
        let ended: BTreeSet<&ExecKey> = self.ended.iter().collect();
        let known = self.table.values().filter(|command| is_ended(command));
        ended.len() == self.ended.len()
            && known.count() == ended.len()
            && ended
                .iter()
                .all(|key| self.get(**key).is_some_and(is_ended))
            && self
                .table
                .values()
                .all(|command| command.outputs.iter().all(Replay::is_sound))
    }

    /// How many live commands are listened to, and how many are not.
    pub(super) fn count_live(&self) -> (u32, u32) {
        let heard = |key: &&ExecKey| {
            self.get(**key)
                .is_some_and(|command| command.owner.is_some())
        };
        let attached = self.live.iter().filter(heard).count();
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        (count(attached), count(self.live.len() - attached))
    }

    /// Takes the end of a session for its command: nobody listens, and nobody gets credit for what it had sent. One that has
    /// not been released will not run.
    pub(super) fn let_go(&mut self, attached: &Attached) {
        let Some(command) = self.table.get_mut(&attached.key) else {
            return;
        };
        command.owner = None;
        if command.progress == Progress::Starting {
            command.progress = Progress::Withdrawn;
            return;
        }
        if let (Some(input), Stdin::Open(window)) = (&mut command.input, &attached.stdin) {
            input.orphaned += usize::try_from(window.kept_bytes()).unwrap_or(usize::MAX);
        }
    }

    /// What is kept of each output of one more command.
    pub(super) fn next_capacity(&self) -> usize {
        let is_large = |command: &&Command| {
            command.outputs[0].capacity() == LARGE_BYTES
                && !matches!(command.progress, Progress::Ended { .. })
        };
        if self.table.values().filter(is_large).count() < LARGE_COMMANDS {
            LARGE_BYTES
        } else {
            SMALL_BYTES
        }
    }

    pub(super) fn input_window(&self) -> u32 {
        let open = self
            .table
            .values()
            .filter(|command| command.input.is_some());
        if open.count() < LARGE_INPUTS {
            STREAM_WINDOW_BYTES
        } else {
            MIN_WINDOW_BYTES
        }
    }

    /// Remembers one that has ended, and forgets the oldest when there are too many.
    fn remember(&mut self, key: ExecKey) {
        self.ended.push_back(key);
        let mut kept: usize = self
            .ended
            .iter()
            .filter_map(|key| self.get(*key))
            .map(Command::kept_bytes)
            .sum();
        for old in &self.ended {
            if kept <= ENDED_BYTES {
                break;
            }
            if let Some(command) = self.table.get_mut(old)
                && command.owner.is_none()
            {
                kept -= command.kept_bytes();
                command.outputs.iter_mut().for_each(Replay::clear);
            }
        }
        if self.ended.len() > REMEMBERED_COMMANDS {
            let table = &self.table;
            let unheard = |key: &ExecKey| table.get(key).is_none_or(|old| old.owner.is_none());
            if let Some(at) = self.ended.iter().position(unheard)
                && let Some(oldest) = self.ended.remove(at)
            {
                self.table.remove(&oldest);
                self.has_forgotten = true;
            }
        }
    }

    /// All that is known of commands, the newest last.
    pub(super) fn entries(&self) -> impl Iterator<Item = CommandEntry> {
        let ended = self.ended.iter();
        let running = self
            .table
            .iter()
            .filter(|(_, command)| {
                !matches!(
                    command.progress,
                    Progress::Ended { .. } | Progress::Withdrawn
                )
            })
            .map(|(key, _)| key);
        ended
            .chain(running)
            .filter_map(|&key| self.get(key).map(|command| command.entry(key)))
    }
}

impl Agent {
    /// What is known of a command that was first asked for in `epoch`.
    #[must_use]
    pub fn command_state(&self, key: ExecKey, epoch: Epoch) -> CommandState {
        match self.commands.get(key) {
            Some(command) => command.state(),
            None if self.commands.has_forgotten || !self.has_known(epoch) => {
                CommandState::Forgotten
            }
            None => CommandState::NotRun,
        }
    }

    /// Whether the command may be started now. True at most once for a command; the caller starts it, or reports
    /// [`Agent::rejected`] and [`Agent::command_gone`], before it hands the machine to anyone else.
    pub fn may_start(&mut self, key: ExecKey) -> bool {
        if self.find_hindrance().is_some() {
            return false;
        }
        let epoch = self.epoch();
        match self.commands.get_mut(key) {
            Some(command)
                if command.progress == Progress::Starting && Some(command.epoch) == epoch =>
            {
                command.progress = Progress::Released;
                true
            }
            Some(_) | None => false,
        }
    }

    /// Notes that the command runs as process `pid` since `now_ns` by the guest's clock.
    pub fn started(&mut self, key: ExecKey, pid: u32, now_ns: u64) -> Vec<Action> {
        let window = self.commands.input_window();
        let Some(command) = self.commands.get_mut(key) else {
            return Vec::new();
        };
        if command.progress != Progress::Released {
            return Vec::new();
        }
        let started_ns = now_ns;
        command.progress = Progress::Running { pid, started_ns };
        let (owner, takes_input) = (command.owner, command.input.is_some());
        let Some(owner) = owner else {
            return Vec::new();
        };
        match self.attached_mut(owner) {
            Some(attached) if attached.awaits_start => {
                attached.awaits_start = false;
                if takes_input {
                    attached.stdin = Stdin::Open(ReceiveWindow::new(window));
                }
            }
            // It was attached to meanwhile.
            Some(_) | None => return Vec::new(),
        }
        let message = GuestMessage::Started {
            id: owner.id,
            pid,
            stdin_window_bytes: if takes_input { window } else { 0 },
        };
        self.send(owner, &message)
    }

    /// Notes that the command could not be started, and nothing of it has run; [`Agent::command_gone`] follows.
    pub fn rejected(&mut self, key: ExecKey, reason: Rejection) -> Vec<Action> {
        let hindrance = self.find_hindrance();
        let Some(command) = self.commands.get(key) else {
            return Vec::new();
        };
        let reason = match command.progress {
            Progress::Starting | Progress::Withdrawn => hindrance.unwrap_or(reason),
            Progress::Released => reason,
            Progress::Running { .. } | Progress::Ended { .. } => return Vec::new(),
        };
        let owner = command.owner;
        self.commands.table.remove(&key);
        owner.map_or_else(Vec::new, |owner| {
            self.close_stream(owner);
            self.send(
                owner,
                &GuestMessage::Rejected {
                    id: owner.id,
                    reason: bounded(reason),
                },
            )
        })
    }

    /// How many bytes of the output may be read now; none means: wait to be woken.
    #[must_use]
    pub fn output_room(&self, key: ExecKey, stream: OutputStream) -> usize {
        let Some(command) = self.commands.get(key) else {
            // Nothing is known of it any more: what it writes is read and thrown away.
            return usize::MAX;
        };
        let output = &command.outputs[stream.place()];
        let sent = command.owner.and_then(|owner| self.sent(owner));
        match sent {
            None => usize::MAX,
            Some(sent) => {
                let unsent = output.end().saturating_sub(sent[stream.place()]);
                let unsent = usize::try_from(unsent).unwrap_or(usize::MAX);
                output.capacity().saturating_sub(unsent)
            }
        }
    }

    /// What the command wrote: kept, and sent to who listens. More than [`Agent::output_room`] allowed is kept too: somebody
    /// may have attached since.
    pub fn output(&mut self, key: ExecKey, stream: OutputStream, data: &[u8]) -> Vec<Action> {
        let place = stream.place();
        let owner = self.commands.get(key).and_then(|command| command.owner);
        let sent = owner.and_then(|owner| self.sent(owner));
        let needed = sent.map_or(u64::MAX, |sent| sent[place]);
        let Some(command) = self.commands.get_mut(key) else {
            return Vec::new();
        };
        command.outputs[place].push(data, needed);
        flush(owner)
    }

    /// Notes that the command took `bytes` of its input.
    pub fn stdin_consumed(&mut self, key: ExecKey, bytes: usize) -> Vec<Action> {
        let Some(command) = self.commands.get_mut(key) else {
            return Vec::new();
        };
        let (Some(input), owner) = (&mut command.input, command.owner) else {
            return Vec::new();
        };
        let unpaid = input.orphaned.min(bytes);
        input.orphaned -= unpaid;
        let Some(owner) = owner.filter(|_| bytes > unpaid) else {
            return Vec::new();
        };
        let Some(Stdin::Open(window)) = self.attached_mut(owner).map(|found| &mut found.stdin)
        else {
            return Vec::new();
        };
        let id = owner.id;
        match window.consume(bytes - unpaid) {
            Some(bytes) => self.send(owner, &GuestMessage::StdinCredit { id, bytes }),
            None => Vec::new(),
        }
    }

    /// Notes that the command has closed its input.
    pub fn stdin_closed(&mut self, key: ExecKey) -> Vec<Action> {
        let Some(command) = self.commands.get_mut(key) else {
            return Vec::new();
        };
        command.input = None;
        let Some(owner) = command.owner else {
            return Vec::new();
        };
        let Some(attached) = self.attached_mut(owner) else {
            return Vec::new();
        };
        let Stdin::Open(window) = &attached.stdin else {
            return Vec::new();
        };
        attached.stdin = Stdin::ClosedByCommand(window.clone());
        self.send(owner, &GuestMessage::StdinClosed { id: owner.id })
    }

    /// Notes that the command has ended and all its output was given to [`Agent::output`].
    pub fn exited(&mut self, key: ExecKey, status: ExitStatus) -> Vec<Action> {
        let Some(command) = self.commands.get_mut(key) else {
            return Vec::new();
        };
        let Progress::Running { pid, started_ns } = command.progress else {
            return Vec::new();
        };
        command.progress = Progress::Ended {
            pid,
            started_ns,
            status,
        };
        command.input = None;
        let owner = command.owner;
        self.commands.remember(key);
        flush(owner)
    }

    /// Notes that nothing of the command is left: it has ended and nobody holds its output open.
    pub fn command_gone(&mut self, key: ExecKey) {
        self.commands.live.remove(&key);
    }

    fn sent(&self, at: StreamKey) -> Option<[u64; 2]> {
        let super::Port::Attached(session) = &self.ports.get(&at.port)?.port else {
            return None;
        };
        match session.streams.get(&at.id)? {
            Stream::Command(attached) if session.nonce == at.nonce => Some(attached.sent),
            Stream::Command(_) | Stream::Noted { .. } | Stream::File(_) => None,
        }
    }

    pub(super) fn attached_mut(&mut self, at: StreamKey) -> Option<&mut Attached> {
        self.session(at.port, at.nonce)?.command(at.id)
    }

    pub(super) fn open_stream(&mut self, at: StreamKey, stream: Stream) {
        if let Some(session) = self.session(at.port, at.nonce) {
            session.streams.insert(at.id, stream);
        }
    }

    pub(super) fn close_stream(&mut self, at: StreamKey) {
        if let Some(session) = self.session(at.port, at.nonce) {
            session.streams.remove(&at.id);
        }
    }

    pub(super) fn reply(
        &mut self,
        at: StreamKey,
        message: GuestMessage,
        actions: &mut Vec<Action>,
    ) {
        let sent = self.send(at, &message);
        actions.extend(sent);
    }
}

fn flush(owner: Option<StreamKey>) -> Vec<Action> {
    owner
        .map(|owner| Action::Flush { port: owner.port })
        .into_iter()
        .collect()
}

fn listed(argv: &[Bytes]) -> Vec<Bytes> {
    let mut left = LISTED_ARGV_BYTES;
    let mut out = Vec::new();
    for word in argv.iter().take(LISTED_ARGV_BYTES / 4) {
        if left == 0 {
            break;
        }
        let length = word.0.len().min(left);
        out.push(Bytes::from(&word.0[..length]));
        left -= length;
    }
    out
}

pub(super) fn bounded(reason: Rejection) -> Rejection {
    match reason {
        Rejection::Invalid(text) => Rejection::Invalid(bounded_text(text)),
        Rejection::Start { step, errno } => Rejection::Start {
            step: bounded_text(step),
            errno,
        },
        Rejection::TooManyStreams { .. }
        | Rejection::Frozen
        | Rejection::WorkloadFrozen
        | Rejection::NotReleased
        | Rejection::TooManyCommands { .. }
        | Rejection::Unknown(_) => reason,
    }
}
