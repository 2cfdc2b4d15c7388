//! The state machine and its hands: one lock, under which every action that must not be overtaken is done.
//!
//! Waking and passing input on never block and are done under the lock, in order. What is to be written is pulled by each
//! port's writer, which is woken. Starting a command releases it under the lock (see [`crate::command`]). Only the steps of a
//! handshake, which may take time, are given back to the port's reader.

use std::collections::HashMap;
use std::collections::btree_map::Entry;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stead_agent::files::Files;
use stead_agent_proto::frame::Item;
use stead_agent_proto::guest::{Action, Agent, StreamKey};
use stead_agent_proto::message::{self, ExecRequest, ExitStatus, Phase, Rejection};
use stead_agent_proto::{ExecKey, Frame, Nonce};

use crate::chores::Chores;
use crate::command;
use crate::drain::{Drain, Left};
use crate::error::AgentError;
use crate::file_streams;
use crate::freeze;
use crate::handover::{Handover, Heir};
use crate::inbox::Inbox;
use crate::setup::Setup;
use crate::succession::{self, Given, HANDOVER_LIMIT, HANDOVER_PAUSE, Led, Unfinished};
use crate::{shutdown, standstill};

const LAST_ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Everything the threads share.
#[derive(Debug)]
pub(crate) struct Core {
    state: Mutex<State>,
    // Held for a whole handshake, so that the steps of two never mix.
    steps: Mutex<()>,
    setup: Setup,
    orders: Orders,
    chores: Chores,
    drain: Drain,
    // Rung when a command is given to the next agent, and when it stays with this one.
    handed: Condvar,
    pub(crate) files: Files,
}

/// Where the threads take their orders that freeze and thaw.
#[derive(Debug)]
pub(crate) struct Orders {
    /// File systems.
    pub(crate) freezer: Sender<freeze::Order>,
    /// Processes.
    pub(crate) standstill: Sender<standstill::Order>,
}

/// What the lock protects.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) agent: Agent,
    ports: HashMap<u32, Port>,
    commands: HashMap<ExecKey, Arc<Inbox>>,
    files: HashMap<StreamKey, Arc<file_streams::Inlet>>,
    // While another agent is to take this one's place: what the threads of commands have given. They wait then.
    given: Option<Given>,
}

/// What a port's writer waits for.
#[derive(Debug, Default)]
struct Port {
    changed: Arc<Condvar>,
    is_writing: bool,
}

/// A step of a handshake that is due.
#[derive(Debug)]
struct Due {
    port: u32,
    nonce: Nonce,
    phase: Phase,
    setup: Box<message::Setup>,
}

impl Core {
    pub(crate) fn new(
        agent: Agent,
        setup: Setup,
        orders: Orders,
        chores: Chores,
        drain: Drain,
    ) -> Self {
        Self {
            state: Mutex::new(State {
                agent,
                ports: HashMap::new(),
                commands: HashMap::new(),
                files: HashMap::new(),
                given: None,
            }),
            steps: Mutex::new(()),
            setup,
            orders,
            chores,
            drain,
            handed: Condvar::new(),
            files: Files::default(),
        }
    }

    /// Makes a port known: [`Core::next_frame`] waits for what is to be written to it.
    pub(crate) fn open_port(&self, port: u32) {
        self.lock().ports.insert(port, Port::default());
    }

    /// Forgets a port; its writer ends.
    pub(crate) fn close_port(self: &Arc<Self>, port: u32) {
        self.tell(|agent| agent.on_host_gone(port));
        if let Some(closed) = self.lock().ports.remove(&port) {
            closed.changed.notify_all();
        }
    }

    /// How many ports serve hosts.
    pub(crate) fn open_ports(&self) -> u32 {
        u32::try_from(self.lock().ports.len()).unwrap_or(u32::MAX)
    }

    /// Waits for the next frame that is to be written to the port, after the one before was written; nothing when the
    /// port is closed.
    pub(crate) fn next_frame(self: &Arc<Self>, port: u32) -> Option<Frame> {
        let mut state = self.lock();
        loop {
            let line = state.ports.get_mut(&port)?;
            line.is_writing = false;
            let changed = Arc::clone(&line.changed);
            if let Some((frame, actions)) = state.agent.next_frame(port) {
                if let Some(line) = state.ports.get_mut(&port) {
                    line.is_writing = true;
                }
                self.perform_all(&mut state, actions);
                return Some(frame);
            }
            changed.notify_all();
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until all that is to be said to the port was written, the port is closed, or the time is over.
    fn wait_until_written(&self, port: u32, limit: Duration) {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        while let Some(line) = state.ports.get(&port) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !(line.is_writing || state.agent.has_frame(port)) {
                return;
            }
            let changed = Arc::clone(&line.changed);
            state = changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Takes what came in on a port, and does all that follows from it.
    pub(crate) fn on_item(self: &Arc<Self>, port: u32, item: Item) {
        let mut due = self.apply(|agent| agent.on_item(port, item));
        if due.is_none() {
            return;
        }
        let received = Instant::now();
        let _turn = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(Due {
            port,
            nonce,
            phase,
            setup,
        }) = due
        {
            let result = self.setup.run(phase, &setup, received, self);
            due = self.apply(|agent| agent.step_done(port, nonce, phase, result));
        }
    }

    /// Tells the machine something and does what follows. Never blocks for long.
    pub(crate) fn tell(self: &Arc<Self>, event: impl FnOnce(&mut Agent) -> Vec<Action>) {
        let due = self.apply(event);
        assert!(
            due.is_none(),
            "only what a port receives begins a handshake"
        );
    }

    /// Starts the command if it may run. If not, it is refused before anybody else has the machine: its key may be told to
    /// go again at once, and that is another start.
    pub(crate) fn release<T>(
        self: &Arc<Self>,
        key: ExecKey,
        start: impl FnOnce() -> T,
    ) -> Option<T> {
        let mut state = self.lock();
        if state.may_start(key) {
            return Some(start());
        }
        let reason = Rejection::Invalid("the session has ended".to_owned());
        self.refuse_in(&mut state, key, reason);
        None
    }

    /// Notes that the command does not run, and that nothing of it is left.
    pub(crate) fn refuse(self: &Arc<Self>, key: ExecKey, reason: Rejection) {
        self.refuse_in(&mut self.lock(), key, reason);
    }

    fn refuse_in(self: &Arc<Self>, state: &mut State, key: ExecKey, reason: Rejection) {
        let answers = state.agent.rejected(key, reason);
        state.forget(key);
        self.perform_all(state, answers);
    }

    /// Notes that a command has ended and all its output was passed on; what is left is emptied until nobody has it open.
    pub(crate) fn finish(self: &Arc<Self>, status: ExitStatus, left: Left) {
        let mut state = self.lock();
        let actions = state.agent.exited(left.key(), status);
        let due = self.perform_all(&mut state, actions);
        assert!(due.is_none(), "the end of a command begins no handshake");
        // Under the lock, so that a handover finds it either running or here.
        self.drain.take_over(left);
    }

    /// Goes on with the commands of the agent before this one, and empties what others of its commands have left.
    pub(crate) fn inherit(self: &Arc<Self>, led: Vec<Led>, drained: Vec<Heir>) {
        for heir in drained {
            if let Some(key) = heir.key {
                let pipes = heir.outputs;
                self.drain
                    .take_over(Left::new(ExecKey(key), heir.pid, pipes));
            }
        }
        for led in led {
            let key = led.key;
            let begun = Inbox::new().and_then(|inbox| {
                let inbox = Arc::new(inbox);
                self.lock().commands.insert(key, Arc::clone(&inbox));
                command::revive(self, led, inbox)
            });
            if let Err(error) = begun {
                succession::complain(key, &error);
            }
        }
    }

    /// For the thread of a command: gives what another agent needs to go on with it, and waits, while one is to take the
    /// place of this one. Returns when none is, or none could.
    pub(crate) fn pause_for_handover(
        &self,
        key: ExecKey,
        give: impl Fn() -> Result<(Heir, Unfinished), AgentError>,
    ) {
        let mut state = self.lock();
        while let Some(given) = &mut state.given {
            if let Entry::Vacant(place) = given.entry(key) {
                match give() {
                    Ok(heir) => {
                        place.insert(heir);
                    }
                    Err(error) => succession::complain(key, &error),
                }
                self.handed.notify_all();
            }
            state = self
                .handed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Why no other agent could take the place of this one at the moment, if so.
    pub(crate) fn find_handover_hindrance(&self) -> Option<String> {
        let state = self.lock();
        let all = state.agent.unfinished().collect();
        state.agent.bequeath(&all).err()
    }

    /// Has every command's thread give what it has, and hands all of it to `become_other`, which returns only when it fails;
    /// then everything goes on as before.
    pub(crate) fn hand_over(
        &self,
        become_other: impl FnOnce(Handover) -> AgentError,
    ) -> AgentError {
        let mut state = self.lock();
        assert!(state.given.is_none(), "one order is followed at a time");
        state.given = Some(Given::new());
        state.commands.values().for_each(|inbox| inbox.ring());
        let end = Instant::now() + HANDOVER_LIMIT;
        while !state.have_all_given() && Instant::now() < end {
            state = self
                .handed
                .wait_timeout(state, HANDOVER_PAUSE)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let collected = self
            .drain
            .heirs()
            .and_then(|drained| state.collect(drained));
        let error = collected.map_or_else(|error| error, become_other);
        state.given = None;
        self.handed.notify_all();
        error
    }

    /// Looks at the machine under its lock.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.lock())
    }

    /// Hands an order to the freezer's thread.
    pub(crate) fn order(&self, order: freeze::Order) {
        assert!(
            self.orders.freezer.send(order).is_ok(),
            "the freezer's thread never ends"
        );
    }

    fn order_standstill(&self, order: standstill::Order) {
        assert!(
            self.orders.standstill.send(order).is_ok(),
            "the thread that freezes processes never ends"
        );
    }

    fn apply(self: &Arc<Self>, event: impl FnOnce(&mut Agent) -> Vec<Action>) -> Option<Due> {
        let mut state = self.lock();
        let actions = event(&mut state.agent);
        self.perform_all(&mut state, actions)
    }

    fn perform_all(self: &Arc<Self>, state: &mut State, actions: Vec<Action>) -> Option<Due> {
        let mut due = None;
        for action in actions {
            if let Some(step) = self.perform(state, action) {
                due = Some(step);
            }
        }
        due
    }

    fn perform(self: &Arc<Self>, state: &mut State, action: Action) -> Option<Due> {
        match action {
            Action::Step {
                port,
                nonce,
                phase,
                setup,
            } => {
                return Some(Due {
                    port,
                    nonce,
                    phase,
                    setup,
                });
            }
            Action::Flush { port } => state.flush(port),
            Action::Start { key, request } => self.start(state, key, request),
            Action::Stdin { key, data } => state.inbox(key, |inbox| inbox.put_stdin(data)),
            Action::StdinEnd { key } => state.inbox(key, Inbox::end_stdin),
            Action::Signal { key, signal } => state.inbox(key, |inbox| inbox.put_signal(signal)),
            Action::Resize { key, rows, cols } => {
                state.inbox(key, |inbox| inbox.put_size(rows, cols));
            }
            Action::Wake { key } => state.inbox(key, Inbox::ring),
            Action::Freeze { limit_ms } => self.order(freeze::Order::Freeze { limit_ms }),
            Action::Thaw => self.order(freeze::Order::Thaw),
            Action::FreezeWorkload { limit_ms } => {
                self.order_standstill(standstill::Order::Freeze { limit_ms });
            }
            Action::ThawWorkload => self.order_standstill(standstill::Order::Thaw),
            Action::Pong { key } => {
                let answers = state.agent.pong(key, resident_kib());
                self.perform_all(state, answers);
            }
            Action::Chore { key, chore } => {
                if let Err(busy) = self.chores.put(key, chore) {
                    let answers = state.agent.chore_done(key, Err(busy));
                    self.perform_all(state, answers);
                }
            }
            Action::Shutdown {
                port,
                kind,
                by_init,
            } => {
                let core = Arc::clone(self);
                shutdown::begin(kind, by_init, move || {
                    core.wait_until_written(port, LAST_ANSWER_LIMIT)
                });
            }
            Action::FileBegin { stream, op } => self.begin_file(state, stream, op),
            Action::FileData { stream, data } => state.file(stream, |inlet| inlet.put(data)),
            // What is written says itself where it ends.
            Action::FileEnd { .. } => {}
            Action::FileRoom { stream } => state.file(stream, file_streams::Inlet::ring),
            Action::FileGone { stream } => state.file(stream, file_streams::Inlet::close),
        }
        None
    }

    fn begin_file(self: &Arc<Self>, state: &mut State, stream: StreamKey, op: Vec<u8>) {
        let inlet = Arc::new(file_streams::Inlet::default());
        state.files.insert(stream, Arc::clone(&inlet));
        if let Err(error) = file_streams::spawn(Arc::clone(self), stream, op, inlet) {
            let step = format!("start a thread: {error}");
            let reason = Rejection::Start { step, errno: 0 };
            let answers = state.agent.file_refused(stream, reason);
            state.forget_file(stream);
            self.perform_all(state, answers);
        }
    }

    fn start(self: &Arc<Self>, state: &mut State, key: ExecKey, request: Box<ExecRequest>) {
        let begun = Inbox::new()
            .map_err(|error| crate::error::chain(&error))
            .and_then(|inbox| {
                let inbox = Arc::new(inbox);
                state.commands.insert(key, Arc::clone(&inbox));
                command::spawn(Arc::clone(self), key, *request, inbox)
            });
        if let Err(step) = begun {
            self.refuse_in(state, key, Rejection::Start { step, errno: 0 });
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether the command may be started now; see [`Agent::may_start`].
    pub(crate) fn may_start(&mut self, key: ExecKey) -> bool {
        self.given.is_none() && self.agent.may_start(key)
    }

    fn have_all_given(&self) -> bool {
        let has_given = |key| {
            self.given
                .as_ref()
                .is_some_and(|given| given.contains_key(&key))
        };
        self.agent.unfinished().all(has_given)
    }

    fn collect(&mut self, drained: Vec<Heir>) -> Result<Handover, AgentError> {
        let commands = &self.commands;
        let letters = |key| {
            let inbox = commands.get(&key);
            inbox.map(|inbox| inbox.look()).unwrap_or_default()
        };
        let given = self.given.get_or_insert_default();
        succession::collect(&self.agent, given, drained, letters)
    }

    /// Forgets a command of which nothing is left.
    pub(crate) fn forget(&mut self, key: ExecKey) {
        self.commands.remove(&key);
        self.agent.command_gone(key);
    }

    /// Forgets an operation on files that has ended.
    pub(crate) fn forget_file(&mut self, stream: StreamKey) {
        self.files.remove(&stream);
    }

    fn file(&self, stream: StreamKey, put: impl FnOnce(&file_streams::Inlet)) {
        if let Some(inlet) = self.files.get(&stream) {
            put(inlet);
        }
    }

    fn flush(&self, port: u32) {
        if let Some(line) = self.ports.get(&port) {
            line.changed.notify_all();
        }
    }

    fn inbox(&self, key: ExecKey, put: impl FnOnce(&Inbox)) {
        if let Some(inbox) = self.commands.get(&key) {
            put(inbox);
        }
    }
}

/// The agent's resident memory in KiB; 0 when the kernel does not say.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}
