//! One line of life: a machine, its ports, its hosts, and the record of what has happened to it.
//!
//! A machine and its copies share nothing after the capture but their past, so they are followed one at a time: a capture
//! goes on as the source or as a copy, and both are looked at.

use stead_agent_proto::frame::Decoder;
use stead_agent_proto::host::Session;
use stead_agent_proto::message::{Hello, Phase, Reason};
use stead_agent_proto::{Epoch, ExecKey, Nonce, ProtocolError};

use crate::guest::{Guest, Order};
use crate::hosts::{Client, Doing, Keeper, Line, Outcome, Stage, Who};
use crate::ledger::Ledger;
use crate::mutant::Mutant;
use crate::port::{Port, Way};

/// What a search does and how far it goes.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub faults: u8,
    pub kinds: &'static [Kind],
    /// How often the keeper captures the machine with its workload frozen.
    pub captures: u8,
    /// How often the machine is captured in the middle of anything.
    pub abrupt_captures: u8,
    /// Whether a client runs a command.
    pub client: bool,
    /// How often each host tries again when it was left without an answer.
    pub again: u8,
    /// How many pieces to the host a port holds.
    pub room: usize,
    /// Whether the steps of a handshake are done one at a time, with all else between them.
    pub single_steps: bool,
    pub mutant: Mutant,
}

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    Lose,
    Cut,
    Repeat,
    Die,
    Restart,
    Step,
    Workload,
    Launch,
    Early,
    LateGone,
}

impl Kind {
    pub const ALL: [Self; 10] = [
        Self::Lose,
        Self::Cut,
        Self::Repeat,
        Self::Die,
        Self::Restart,
        Self::Step,
        Self::Workload,
        Self::Launch,
        Self::Early,
        Self::LateGone,
    ];
}

/// How a copy of the machine is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Copy {
    /// As another machine, with commands of its own.
    Fork,
    /// As the same machine later: who has asked for a command in it asks again.
    Wake,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub guest: Guest,
    pub ports: [Port; 2],
    pub keeper: Keeper,
    pub client: Client,
    pub ledger: Ledger,
    /// The epoch that the sandbox's record names.
    pub record: Option<Epoch>,
    /// How many captures lie between the first machine and this one.
    pub generation: u8,
    pub faults_left: u8,
    pub abrupt_left: u8,
    /// How often a host was left without an answer while nothing moved.
    pub timeouts: [u8; 2],
    /// A put-back fault: what hosts connect to is about to be registered once more.
    pub rebind: bool,
    // Every hello that was said, so that a step is known by the epoch it is for.
    hellos: Vec<(Nonce, Epoch)>,
    epochs: u8,
}

fn key(generation: u8) -> ExecKey {
    ExecKey([generation; 16])
}

impl World {
    pub fn new(bounds: &Bounds) -> Self {
        Self {
            guest: Guest::new(),
            ports: [Port::default(), Port::default()],
            keeper: Self::new_keeper(bounds, bounds.captures),
            client: Self::new_client(bounds, key(0)),
            ledger: Ledger::default(),
            record: None,
            generation: 0,
            faults_left: bounds.faults,
            abrupt_left: bounds.abrupt_captures,
            timeouts: [0; 2],
            rebind: false,
            hellos: Vec::new(),
            epochs: 0,
        }
    }

    fn new_keeper(bounds: &Bounds, captures_left: u8) -> Keeper {
        Keeper {
            line: None,
            doing: Doing::Nothing,
            epoch: None,
            hellos_left: bounds.again,
            captures_left,
            mends_left: bounds.again,
        }
    }

    fn new_client(bounds: &Bounds, key: ExecKey) -> Client {
        Client {
            line: None,
            stage: Stage::Off,
            key,
            first: None,
            epoch: None,
            pinged: false,
            hellos_left: bounds.again,
            again_left: bounds.again,
        }
    }

    pub fn line(&mut self, who: Who) -> Option<&mut Line> {
        match who {
            Who::Keeper => self.keeper.line.as_mut(),
            Who::Client => self.client.line.as_mut(),
        }
    }

    pub fn has_line(&self, who: Who) -> bool {
        match who {
            Who::Keeper => self.keeper.line.is_some(),
            Who::Client => self.client.line.is_some(),
        }
    }

    pub fn put(&mut self, who: Who, wire: Result<Vec<u8>, ProtocolError>) {
        self.ports[who.port()].put(wire.expect("a host here keeps to the protocol"));
    }

    // The guest.

    /// The guest reads a piece.
    pub fn deliver(&mut self, who: Who, bounds: &Bounds) {
        for item in self.ports[who.port()].read() {
            let item = bounds.mutant.to_guest(item);
            let actions = self.guest.agent.on_item(who as u32, item);
            self.guest.take(actions);
        }
        self.write(bounds);
    }

    /// The guest sees that no host is there.
    pub fn lose_host(&mut self, who: Who, bounds: &Bounds) {
        self.ports[who.port()].forget_host();
        let actions = self.guest.agent.on_host_gone(who as u32);
        self.guest.take(actions);
        if bounds.mutant == Mutant::ThawWhenAlone && self.guest.stands {
            self.guest.stands = false;
            self.ledger.on_workload_thawed();
        }
        self.write(bounds);
    }

    pub fn write(&mut self, bounds: &Bounds) {
        let agent = &self.guest.agent;
        if let Some(epoch) = agent
            .epoch()
            .filter(|_| agent.is_released() && !self.guest.stands)
        {
            self.ledger.on_released(epoch);
        }
        for who in Who::ALL {
            let port = &mut self.ports[who.port()];
            self.guest.write(who as u32, port, bounds.room);
        }
    }

    pub fn step(&mut self, succeeds: bool, bounds: &Bounds) {
        let (nonce, phase) = self.guest.step(succeeds);
        let hello = self.hellos.iter().find(|(known, _)| *known == nonce);
        let epoch = hello.map(|(_, epoch)| *epoch);
        if succeeds {
            self.ledger.on_step(epoch, nonce, phase);
            bounds.mutant.after_step(self, phase);
        }
        let more = !bounds.single_steps && succeeds;
        if more && self.guest.steps.iter().any(|(_, next, _)| *next == nonce) {
            self.step(true, bounds);
        }
        self.write(bounds);
    }

    pub fn launch(&mut self, bounds: &Bounds) {
        let stands = self.guest.stands;
        let started = self
            .guest
            .launch(|agent, key| bounds.mutant.may_start(agent, key));
        if let Some(key) = started {
            self.ledger.on_run(key.0[0], stands);
        }
        self.write(bounds);
    }

    /// The oldest command cannot be prepared.
    pub fn fail_launch(&mut self, bounds: &Bounds) {
        self.guest.refuse();
        self.write(bounds);
    }

    pub fn follow(&mut self, succeeds: bool, bounds: &Bounds) {
        if self.guest.follow(succeeds) == Order::Thaw && succeeds {
            self.ledger.on_workload_thawed();
        }
        self.write(bounds);
    }

    pub fn restart_agent(&mut self) {
        self.guest.restart();
        self.ledger.agent_restarted();
        for port in &mut self.ports {
            port.forget_decoder();
        }
    }

    /// Registers once more: what waits is not looked at until more comes.
    pub fn rebind(&mut self, bounds: &Bounds) {
        self.rebind = false;
        let counted = bounds.mutant == Mutant::SecondRebind;
        if counted && let Some((nonce, epoch)) = self.hellos.last().copied() {
            let phase = Phase::Ports;
            self.ledger.on_step(Some(epoch), nonce, phase);
        }
        for port in &mut self.ports {
            port.asleep = port.has(Way::ToGuest);
        }
    }

    // The hosts' connections.

    /// Makes a new connection, which ends the one before.
    pub fn connect(&mut self, who: Who) {
        self.ports[who.port()].connect();
    }

    /// Begins a session in the connection there is.
    pub fn hello(&mut self, who: Who, epoch: Epoch, reason: Reason) {
        let nonce = Nonce(self.hellos.len() as u64 + 1);
        self.hellos.push((nonce, epoch));
        let mut session = Session::new(epoch, nonce);
        let wire = session.hello(Hello { reason });
        self.put(who, wire);
        let line = Some(Line {
            session,
            nonce,
            decoder: Decoder::new(),
        });
        match who {
            Who::Keeper => (self.keeper.line, self.keeper.epoch) = (line, Some(epoch)),
            Who::Client => (self.client.line, self.client.epoch) = (line, Some(epoch)),
        }
    }

    pub fn draw_epoch(&mut self) -> Epoch {
        self.epochs += 1;
        Epoch([self.epochs; 16])
    }

    /// The state of the machine is taken as it is, and another is made of it.
    pub fn copy(&mut self, how: Copy, is_abrupt: bool, bounds: &Bounds) {
        self.ledger.begin_life(is_abrupt, self.guest.stands);
        self.generation += 1;
        self.record = None;
        for port in &mut self.ports {
            port.connect();
        }
        self.keeper = Self::new_keeper(bounds, self.keeper.captures_left);
        let knows = match self.client.stage {
            Stage::Off | Stage::Over(Outcome::Exited | Outcome::Known | Outcome::NotRun) => false,
            Stage::Attaching
            | Stage::Asked(_)
            | Stage::Going(_)
            | Stage::Running(_)
            | Stage::Refused(_)
            | Stage::Postponed
            | Stage::Over(Outcome::Forgotten | Outcome::Unknown(_)) => true,
        };
        let old = std::mem::replace(
            &mut self.client,
            Self::new_client(bounds, key(self.generation)),
        );
        if how == Copy::Wake && knows {
            (self.client.key, self.client.first) = (old.key, old.first);
        }
    }

    pub fn is_copy(&self) -> bool {
        self.generation > 0
    }

    /// Whether a keeper could be asked to greet the machine: its agent has said that it lives another life.
    pub fn is_suspected(&self) -> bool {
        let refused =
            matches!(self.client.stage, Stage::Refused(epoch) if Some(epoch) == self.record);
        refused && self.keeper.doing == Doing::Ready
    }
}
