//! The state machine and its hands: one lock, under which every action that must not be overtaken is done.
//!
//! Sending, waking and passing input on never block and are done under the lock, in order. Starting a command
//! releases it under the lock (see [`crate::command`]). Only the steps of a handshake, which may
//! take time, are given back to the port's reader.

use std::collections::HashMap;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use stead_agent_proto::Nonce;
use stead_agent_proto::frame::Item;
use stead_agent_proto::guest::{Action, Agent, CommandKey, Identity};
use stead_agent_proto::message::{self, ExecRequest, Phase, Rejection};

use crate::chores::Chores;
use crate::command;
use crate::drain::Drain;
use crate::freeze::Order;
use crate::inbox::Inbox;
use crate::outbox::Outbox;
use crate::setup::Setup;
use crate::shutdown;

const LAST_ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Everything the threads share.
#[derive(Debug)]
pub(crate) struct Core {
    state: Mutex<State>,
    // Held for a whole handshake, so that the steps of two never mix.
    steps: Mutex<()>,
    setup: Setup,
    freezer: Sender<Order>,
    chores: Chores,
    pub(crate) drain: Drain,
}

/// What the lock protects.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) agent: Agent,
    ports: HashMap<u32, Arc<Outbox>>,
    commands: HashMap<CommandKey, Arc<Inbox>>,
}

/// A step of a handshake that is due.
#[derive(Debug)]
struct Due {
    port: u32,
    nonce: Nonce,
    phase: Phase,
    setup: message::Setup,
}

impl Core {
    pub(crate) fn new(
        identity: Identity,
        setup: Setup,
        freezer: Sender<Order>,
        chores: Chores,
        drain: Drain,
    ) -> Self {
        Self {
            state: Mutex::new(State {
                agent: Agent::new(identity),
                ports: HashMap::new(),
                commands: HashMap::new(),
            }),
            steps: Mutex::new(()),
            setup,
            freezer,
            chores,
            drain,
        }
    }

    /// Makes a port known; what is sent to it goes into the outbox that this gives.
    pub(crate) fn open_port(&self, port: u32) -> Arc<Outbox> {
        let outbox = Arc::new(Outbox::default());
        self.lock().ports.insert(port, Arc::clone(&outbox));
        outbox
    }

    /// Forgets a port.
    pub(crate) fn close_port(self: &Arc<Self>, port: u32) {
        self.apply(|agent| agent.on_host_gone(port));
        if let Some(outbox) = self.lock().ports.remove(&port) {
            outbox.close();
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

    /// Looks at the machine under its lock.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.lock())
    }

    /// Hands an order to the freezer's thread.
    pub(crate) fn order(&self, order: Order) {
        assert!(
            self.freezer.send(order).is_ok(),
            "the freezer's thread never ends"
        );
    }

    fn apply(self: &Arc<Self>, event: impl FnOnce(&mut Agent) -> Vec<Action>) -> Option<Due> {
        let mut state = self.lock();
        let actions = event(&mut state.agent);
        let mut due = None;
        for action in actions {
            if let Some(step) = self.perform(&mut state, action) {
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
            Action::Send { port, wire } => state.send(port, wire),
            Action::Purge { port } => {
                if let Some(outbox) = state.ports.get(&port) {
                    outbox.purge();
                }
            }
            Action::Start { key, request } => self.start(state, key, request),
            Action::Stdin { key, data } => state.inbox(key, |inbox| inbox.put_stdin(data)),
            Action::StdinEnd { key } => state.inbox(key, Inbox::end_stdin),
            Action::Signal { key, signal } => state.inbox(key, |inbox| inbox.put_signal(signal)),
            Action::Wake { key } => state.inbox(key, Inbox::ring),
            Action::Freeze { limit_ms } => self.order(Order::Freeze { limit_ms }),
            Action::Thaw => self.order(Order::Thaw),
            Action::Chore { key, chore } => {
                if let Err(busy) = self.chores.put(key, chore) {
                    for answer in state.agent.chore_done(key, Err(busy)) {
                        // An answer is always a frame.
                        if let Action::Send { port, wire } = answer {
                            state.send(port, wire);
                        }
                    }
                }
            }
            Action::Shutdown { port, kind } => {
                let outbox = state.ports.get(&port).cloned();
                shutdown::begin(kind, move || {
                    if let Some(outbox) = outbox {
                        outbox.wait_until_written(LAST_ANSWER_LIMIT);
                    }
                });
            }
        }
        None
    }

    fn start(self: &Arc<Self>, state: &mut State, key: CommandKey, request: ExecRequest) {
        let begun = Inbox::new()
            .map_err(|error| crate::error::chain(&error))
            .and_then(|inbox| {
                let inbox = Arc::new(inbox);
                state.commands.insert(key, Arc::clone(&inbox));
                if let Some(outbox) = state.ports.get(&key.port) {
                    outbox.ring_for(Arc::clone(&inbox));
                }
                command::spawn(Arc::clone(self), key, request, inbox)
            });
        if let Err(step) = begun {
            state.forget(key);
            for action in state
                .agent
                .rejected(key, Rejection::Start { step, errno: 0 })
            {
                if let Action::Send { port, wire } = action {
                    state.send(port, wire);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Sends the frame of an action, when there is one.
    pub(crate) fn send_action(&mut self, action: Option<Action>) {
        if let Some(Action::Send { port, wire }) = action {
            self.send(port, wire);
        }
    }

    /// Whether the command's port takes more output.
    pub(crate) fn port_has_room(&self, key: CommandKey) -> bool {
        self.ports
            .get(&key.port)
            .is_none_or(|outbox| outbox.has_room())
    }

    /// Forgets a command of which nothing is left.
    pub(crate) fn forget(&mut self, key: CommandKey) {
        self.commands.remove(&key);
        self.agent.command_gone(key);
    }

    fn send(&mut self, port: u32, wire: Vec<u8>) {
        if let Some(outbox) = self.ports.get(&port) {
            outbox.put(wire);
        }
    }

    fn inbox(&self, key: CommandKey, put: impl FnOnce(&Inbox)) {
        if let Some(inbox) = self.commands.get(&key) {
            put(inbox);
        }
    }
}
