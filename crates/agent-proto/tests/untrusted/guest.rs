//! The agent's machine, told anything in any order by any host.

use std::collections::BTreeSet;

use stead_agent_proto::frame::{Decoder, Direction, Item, Kind, MAX_PAYLOAD_BYTES};
use stead_agent_proto::guest::*;
use stead_agent_proto::message::*;
use stead_agent_proto::{Epoch, ExecKey, Frame, Nonce};

use super::input::Input;

const PORTS: u32 = 2;
/// What waits to be written in answers at most: what was asked for, and one answer more.
const UNREAD_BYTES: usize = MAX_UNREAD_BYTES + MAX_PAYLOAD_BYTES;

/// An agent, what it was told to do, and the sessions that the script speaks in.
pub struct Driven {
    agent: Agent,
    decoders: [Decoder; PORTS as usize],
    /// Epoch, nonce and next number of the session of each port.
    sessions: [(Epoch, Nonce, u64); PORTS as usize],
    steps: Vec<(u32, Nonce, Phase)>,
    starts: Vec<ExecKey>,
    started: BTreeSet<ExecKey>,
    files: Vec<StreamKey>,
    /// What came for commands and operations on files, and was not reported as taken.
    input: Vec<(ExecKey, usize)>,
    data: Vec<(StreamKey, usize)>,
    nonces: u64,
    /// Which ports' writers have been told to write since they last found nothing.
    told: [bool; PORTS as usize],
    /// Handshakes and commands that came to their end.
    pub acknowledged: usize,
    pub exited: usize,
}

/// Follows a script; gives what it came to.
pub fn guest(bytes: &[u8]) -> Driven {
    let mut driven = Driven::new();
    let mut input = Input(bytes);
    while !input.is_over() {
        driven.follow(&mut input);
        driven.check();
    }
    for port in 0..PORTS {
        driven.read(port, usize::MAX);
    }
    driven
}

impl Driven {
    fn new() -> Self {
        Self {
            agent: Agent::new(Config {
                agent_version: "1".into(),
                boot_id: "b".into(),
                max_commands: 4,
                may_shut_down: true,
            }),
            decoders: Default::default(),
            sessions: [(Epoch([0; 16]), Nonce(0), 0); PORTS as usize],
            steps: Vec::new(),
            starts: Vec::new(),
            started: BTreeSet::new(),
            files: Vec::new(),
            input: Vec::new(),
            data: Vec::new(),
            nonces: 0,
            told: [false; PORTS as usize],
            acknowledged: 0,
            exited: 0,
        }
    }

    fn follow(&mut self, input: &mut Input) {
        let (kind, port) = (input.byte() % 10, u32::from(input.byte()) % PORTS);
        match kind {
            0 => self.hello(port, input),
            1 => {
                let message = input.host_message();
                self.say(port, &message, 0);
            }
            2 => {
                let (message, skew) = (input.host_message(), input.byte());
                self.say(port, &message, u64::from(skew));
            }
            3 => self.payload(port, input),
            4 => {
                let bytes = input.bytes();
                self.raw(port, &bytes);
            }
            5 => self.step(!input.one_in(8)),
            6 => self.world(input),
            7 => self.command(input),
            8 => self.read(port, usize::from(input.byte())),
            _ => {
                let actions = self.agent.on_host_gone(port);
                self.take(actions);
            }
        }
    }

    /// A session of its own begins, as a host begins one.
    fn hello(&mut self, port: u32, input: &mut Input) {
        self.nonces += 1;
        self.sessions[port as usize] = (input.epoch(), Nonce(self.nonces), 0);
        let reason = input.reason();
        self.say(port, &HostMessage::Hello(Hello { reason }), 0);
    }

    fn say(&mut self, port: u32, message: &HostMessage, skew: u64) {
        if let Ok(payload) = message.to_payload() {
            self.frame(port, message.kind(), payload, skew);
        }
    }

    /// A whole frame whose payload is anything.
    fn payload(&mut self, port: u32, input: &mut Input) {
        let kind = if input.one_in(4) {
            Kind::Handshake
        } else {
            Kind::Session
        };
        let payload = input.bytes();
        self.frame(port, kind, payload, 0);
    }

    fn frame(&mut self, port: u32, kind: Kind, payload: Vec<u8>, skew: u64) {
        let (epoch, nonce, seq) = &mut self.sessions[port as usize];
        let frame = Frame {
            direction: Direction::ToGuest,
            kind,
            seq: seq.wrapping_add(skew),
            epoch: *epoch,
            nonce: *nonce,
            payload,
        };
        *seq += u64::from(skew == 0);
        self.item(port, Item::Frame(frame));
    }

    fn raw(&mut self, port: u32, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some(item) = self.decoders[port as usize].next_item(&mut rest) {
            self.item(port, item);
        }
    }

    fn item(&mut self, port: u32, item: Item) {
        let actions = self.agent.on_item(port, item);
        self.take(actions);
    }

    fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Step {
                    port, nonce, phase, ..
                } => self.steps.push((port, nonce, phase)),
                Action::Start { key, .. } => self.starts.push(key),
                Action::Pong { key } => {
                    let answers = self.agent.pong(key, 1);
                    self.take(answers);
                }
                Action::Chore { key, .. } => {
                    let answers = self.agent.chore_done(key, Ok(()));
                    self.take(answers);
                }
                Action::FileBegin { stream, .. } => self.files.push(stream),
                Action::Stdin { key, data } => self.input.push((key, data.len())),
                Action::FileData { stream, data } => self.data.push((stream, data.len())),
                Action::Flush { port } => self.told[port as usize] = true,
                Action::StdinEnd { .. }
                | Action::Signal { .. }
                | Action::Resize { .. }
                | Action::Wake { .. }
                | Action::Freeze { .. }
                | Action::Thaw
                | Action::FreezeWorkload { .. }
                | Action::ThawWorkload
                | Action::Shutdown { .. }
                | Action::FileEnd { .. }
                | Action::FileRoom { .. }
                | Action::FileGone { .. } => {}
            }
        }
    }

    fn step(&mut self, succeeds: bool) {
        let Some((port, nonce, phase)) = self.steps.pop() else {
            return;
        };
        let outcome = if succeeds {
            Ok(PhaseOutcome::Done)
        } else {
            Err("e".repeat(9000))
        };
        let result = StepResult {
            outcome,
            detail: PhaseDetail::None,
            duration_ns: 1,
        };
        let before = self.agent.epoch();
        let actions = self.agent.step_done(port, nonce, phase, result);
        self.acknowledged += usize::from(before.is_none() && self.agent.epoch().is_some());
        self.take(actions);
    }

    /// The machine reports what it may, whether it was asked to or not.
    fn world(&mut self, input: &mut Input) {
        let fails = input.one_in(4);
        let failed = || "no".to_owned();
        let actions = match input.byte() % 6 {
            0 if fails => self.agent.workload_frozen(Err(WorkloadFailure {
                error: failed(),
                still_frozen: input.one_in(2),
            })),
            0 => self.agent.workload_frozen(Ok(())),
            1 if fails => self.agent.workload_thawed(Err(failed())),
            1 => self.agent.workload_thawed(Ok(1)),
            2 if fails => self.agent.freeze_done(Err(FreezeFailure {
                error: failed(),
                still_frozen: input.one_in(2),
            })),
            2 => self.agent.freeze_done(Ok(FrozenMounts {
                frozen: vec![Bytes(vec![b'm'; input.size().min(60_000)]); 9],
                unsupported: vec![],
            })),
            3 => self
                .agent
                .thaw_done(if fails { Err(failed()) } else { Ok(()) }),
            4 => self.agent.freeze_expired(),
            _ => self.file(input),
        };
        self.take(actions);
    }

    fn file(&mut self, input: &mut Input) -> Vec<Action> {
        let Some(stream) = self.files.last().copied() else {
            return Vec::new();
        };
        match (input.byte() % 4, self.agent.file_room(stream)) {
            (0, Some(room)) if room > 0 => {
                let bytes = input.size().clamp(1, 32 * 1024);
                self.agent.file_data(stream, vec![1; bytes])
            }
            (1, _) => match self.data.pop() {
                Some((stream, bytes)) => self.agent.file_consumed(stream, bytes),
                None => Vec::new(),
            },
            (2, _) => self.agent.file_reply(stream, vec![2; 10], input.one_in(2)),
            _ => {
                self.files.pop();
                self.agent.file_refused(stream, Rejection::Frozen)
            }
        }
    }

    fn command(&mut self, input: &mut Input) {
        let key = input.key();
        let actions = match input.byte() % 7 {
            0 => return self.start(),
            1 => self.agent.started(key, 1, 1),
            2 => {
                let (stream, bytes) = (input.stream(), input.size());
                let room = self.agent.output_room(key, stream).min(32 * 1024);
                self.agent.output(key, stream, &vec![3; bytes.min(room)])
            }
            3 => self.agent.stdin_closed(key),
            4 => {
                self.exited += usize::from(self.started.contains(&key));
                self.agent.exited(key, ExitStatus::Code(0))
            }
            5 => match self.input.pop() {
                Some((key, bytes)) => self.agent.stdin_consumed(key, bytes),
                None => Vec::new(),
            },
            _ => {
                self.agent.command_gone(key);
                Vec::new()
            }
        };
        self.take(actions);
    }

    fn start(&mut self) {
        let Some(key) = self.starts.pop() else {
            return;
        };
        if self.agent.may_start(key) {
            assert!(self.started.insert(key), "{key} was started twice");
            return;
        }
        let actions = self.agent.rejected(key, Rejection::Frozen);
        self.agent.command_gone(key);
        self.take(actions);
    }

    /// A host reads so many frames.
    fn read(&mut self, port: u32, frames: usize) {
        let mut answered = 0;
        for _ in 0..frames {
            let Some((frame, actions)) = self.agent.next_frame(port) else {
                self.told[port as usize] = false;
                break;
            };
            self.take(actions);
            let wire = frame
                .encode()
                .expect("what the agent says fits into a frame");
            assert!(wire.len() <= MAX_PAYLOAD_BYTES + 1024);
            let message = GuestMessage::from_frame(&frame).expect("it is a message");
            let is_data = matches!(
                message,
                GuestMessage::Output { .. }
                    | GuestMessage::File { .. }
                    | GuestMessage::FileData { .. }
            );
            answered += if is_data { 0 } else { frame.payload.len() };
        }
        assert!(
            answered <= UNREAD_BYTES,
            "{answered} bytes of answers waited"
        );
    }

    fn check(&self) {
        for port in 0..PORTS {
            let waits = self.agent.has_frame(port) && !self.told[port as usize];
            assert!(!waits, "a writer sleeps beside something to write");
            if let Some((epoch, _)) = self.agent.attached(port) {
                assert_eq!(
                    Some(epoch),
                    self.agent.epoch(),
                    "attached to the current epoch only"
                );
            }
        }
        assert!(!self.agent.is_released() || self.acknowledged > 0);
    }
}
