//! The host's side of one session.
//!
//! ```text
//!   Greeting ── Hail: setup ──▶ SettingUp ── Ready ──▶ Idle ── exec ──▶ Starting ── Accepted ──▶ Running ── Exit ──▶ Idle
//!      │  │                        │                   │ ▲                │ Rejected
//!      │  └ Ready (reattach) ──────┼───────────────▶ Idle└────────────────┘        (pings at any time after Ready)
//!      │ Failed                    │ Failed            └─ request ──▶ Asking ── Done ──▶ Idle
//!    Ended ◀───────────────────────┴────── anything the protocol forbids, from any state
//! ```
//! Before the first answer to the own nonce everything else is discarded: after a restore a hundred thousand replies of
//! an earlier life may come first. From that answer on the stream is known to be whole, and whatever is not the
//! next frame ends the session.

use crate::flow::{MAX_CHUNK_BYTES, ReceiveWindow, STREAM_WINDOW_BYTES, SendWindow};
use crate::frame::{DELIMITER, Direction, Fault, Item};
use crate::message::{
    Bytes, Done, ExecRequest, ExitStatus, Failed, GuestMessage, Hail, Hello, HostMessage, Message,
    OutputStream, Ready, Reason, Rejection, Request, Setup, Status, UNKNOWN_SESSION_SEQ,
};
use crate::{Epoch, Frame, Nonce, ProtocolError};

/// How many frames of other sessions may come after Ready before the session ends.
pub const MAX_STALE_FRAMES: u64 = 4096;
/// How many pings may be unanswered.
pub const MAX_PINGS: usize = 16;

/// What came from the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The agent is there: [`Session::setup`] is due.
    Hail(Hail),
    /// The handshake is complete.
    Ready(Ready),
    /// The handshake failed; the session has ended.
    Failed(Failed),
    /// The command runs.
    Accepted,
    /// The command does not run.
    Rejected(Rejection),
    /// Output of the command.
    Output {
        /// The stream.
        stream: OutputStream,
        /// What it wrote.
        data: Vec<u8>,
    },
    /// [`Session::stdin_room`] has grown.
    StdinCredit,
    /// The command reads its input no more.
    StdinClosed,
    /// The command has ended and all its output came before.
    Exit(ExitStatus),
    /// The request was done, or why not.
    Done(Done),
    /// A ping came back.
    Pong(Status),
}

#[derive(Debug)]
enum State {
    Greeting { reason: Option<Reason> },
    SettingUp { sent: bool },
    Idle,
    Starting { id: u64, stdin: bool },
    Running(Box<Running>),
    Asking { id: u64 },
    Ended,
}

#[derive(Debug)]
struct Running {
    id: u64,
    stdin: Option<SendWindow>,
    // Grants that crossed the end of the input on the way.
    late_grants: u32,
    stdout: ReceiveWindow,
    stderr: ReceiveWindow,
}

/// What the host discarded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Discarded {
    /// Frames of other epochs or sessions, or going the other way.
    pub stale_frames: u64,
    /// Bytes that were no frame.
    pub garbage_bytes: u64,
    /// What was wrong with the last of those.
    pub last_fault: Option<Fault>,
}

/// One session with the agent.
#[derive(Debug)]
pub struct Session {
    epoch: Epoch,
    nonce: Nonce,
    state: State,
    seq_in: u64,
    seq_out: u64,
    last_id: u64,
    pings: Vec<u64>,
    discarded: Discarded,
    stale_since_ready: u64,
}

impl Session {
    /// A session that has yet to say hello.
    #[must_use]
    pub fn new(epoch: Epoch, nonce: Nonce) -> Self {
        Self {
            epoch,
            nonce,
            state: State::Greeting { reason: None },
            seq_in: 0,
            seq_out: 0,
            last_id: 0,
            pings: Vec::new(),
            discarded: Discarded::default(),
            stale_since_ready: 0,
        }
    }

    /// The epoch it belongs to.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What was discarded so far.
    #[must_use]
    pub fn discarded(&self) -> Discarded {
        self.discarded
    }

    /// What state it is in, for errors.
    #[must_use]
    pub fn state_name(&self) -> &'static str {
        match self.state {
            State::Greeting { .. } => "greeting",
            State::SettingUp { .. } => "setting the guest up",
            State::Idle => "idle",
            State::Starting { .. } => "starting a command",
            State::Running(_) => "running a command",
            State::Asking { .. } => "waiting for an answer",
            State::Ended => "ended",
        }
    }

    /// Whether it may begin something new.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// The hello to write first: bytes that end any half frame, and the frame.
    ///
    /// # Errors
    /// [`ProtocolError`] when a hello was sent before.
    pub fn hello(&mut self, hello: Hello) -> Result<Vec<u8>, ProtocolError> {
        if !matches!(self.state, State::Greeting { reason: None }) {
            return Err(self.unexpected("hello"));
        }
        let mut wire = vec![DELIMITER; 4];
        wire.extend(self.wire(&HostMessage::Hello(hello))?);
        self.state = State::Greeting {
            reason: Some(hello.reason),
        };
        Ok(wire)
    }

    /// What the guest is to be set up with, once it has hailed.
    ///
    /// # Errors
    /// [`ProtocolError`] when it has not, or the host name is longer than a frame.
    pub fn setup(&mut self, setup: Setup) -> Result<Vec<u8>, ProtocolError> {
        if !matches!(self.state, State::SettingUp { sent: false }) {
            return Err(self.unexpected("setup"));
        }
        let wire = self.wire(&HostMessage::Setup(setup))?;
        self.state = State::SettingUp { sent: true };
        Ok(wire)
    }

    /// The request to run a command.
    ///
    /// # Errors
    /// [`ProtocolError`] when the session is not idle, or the request is larger than a frame.
    pub fn exec(&mut self, request: ExecRequest) -> Result<Vec<u8>, ProtocolError> {
        self.must_be_idle("exec")?;
        let (id, stdin) = (self.last_id + 1, request.stdin);
        let wire = self.wire(&HostMessage::Exec { id, request })?;
        self.last_id = id;
        self.state = State::Starting { id, stdin };
        Ok(wire)
    }

    /// How many bytes of input may be sent now; nothing when the command takes none.
    #[must_use]
    pub fn stdin_room(&self) -> Option<usize> {
        match &self.state {
            State::Running(running) => running.stdin.as_ref().map(SendWindow::next_chunk_bytes),
            State::Greeting { .. }
            | State::SettingUp { .. }
            | State::Idle
            | State::Starting { .. }
            | State::Asking { .. }
            | State::Ended => None,
        }
    }

    /// Input for the command.
    ///
    /// # Errors
    /// [`ProtocolError`] when the command takes none.
    ///
    /// # Panics
    /// When `data` is empty or more than [`Session::stdin_room`].
    pub fn stdin(&mut self, data: &[u8]) -> Result<Vec<u8>, ProtocolError> {
        assert!(!data.is_empty(), "empty input is not sent");
        let Some((id, window)) = self.open_stdin() else {
            return Err(self.unexpected("stdin"));
        };
        window.spend(data.len());
        self.wire(&HostMessage::Stdin {
            id,
            data: Bytes::from(data),
        })
    }

    /// The end of the command's input.
    ///
    /// # Errors
    /// [`ProtocolError`] when the command takes none.
    pub fn stdin_end(&mut self) -> Result<Vec<u8>, ProtocolError> {
        let Some((id, _)) = self.open_stdin() else {
            return Err(self.unexpected("end of stdin"));
        };
        self.close_stdin();
        self.wire(&HostMessage::StdinEnd { id })
    }

    /// A signal for the command's group.
    ///
    /// # Errors
    /// [`ProtocolError`] when no command runs or the number is not 1 to 31.
    pub fn signal(&mut self, signal: i32) -> Result<Vec<u8>, ProtocolError> {
        match &self.state {
            State::Running(running) if (1..=31).contains(&signal) => {
                let id = running.id;
                self.wire(&HostMessage::Signal { id, signal })
            }
            State::Running(_) => Err(ProtocolError::Unexpected {
                message: "a signal other than 1 to 31",
                state: "running a command",
            }),
            State::Greeting { .. }
            | State::SettingUp { .. }
            | State::Idle
            | State::Starting { .. }
            | State::Asking { .. }
            | State::Ended => Err(self.unexpected("signal")),
        }
    }

    /// Notes that `bytes` of the output were passed on; gives the grant to write, if it is time for one.
    ///
    /// # Errors
    /// [`ProtocolError`] when the grant cannot be encoded, which no state leads to.
    pub fn output_consumed(
        &mut self,
        stream: OutputStream,
        bytes: usize,
    ) -> Result<Option<Vec<u8>>, ProtocolError> {
        let State::Running(running) = &mut self.state else {
            // The command has ended: there is nobody to grant anything to.
            return Ok(None);
        };
        let id = running.id;
        match running.output(stream).consume(bytes) {
            Some(bytes) => self
                .wire(&HostMessage::Credit { id, stream, bytes })
                .map(Some),
            None => Ok(None),
        }
    }

    /// Something other than a command; [`Session::ping`] for pings.
    ///
    /// # Errors
    /// [`ProtocolError`] when the session is not idle.
    pub fn request(&mut self, request: Request) -> Result<Vec<u8>, ProtocolError> {
        self.must_be_idle("request")?;
        let id = self.last_id + 1;
        let wire = self.wire(&HostMessage::Request { id, request })?;
        self.last_id = id;
        self.state = State::Asking { id };
        Ok(wire)
    }

    /// A ping, at any time after Ready; the answer is [`Event::Pong`].
    ///
    /// # Errors
    /// [`ProtocolError`] before Ready, or when [`MAX_PINGS`] are unanswered.
    pub fn ping(&mut self) -> Result<Vec<u8>, ProtocolError> {
        if matches!(
            self.state,
            State::Greeting { .. } | State::SettingUp { .. } | State::Ended
        ) || self.pings.len() >= MAX_PINGS
        {
            return Err(self.unexpected("ping"));
        }
        let id = self.last_id + 1;
        let wire = self.wire(&HostMessage::Request {
            id,
            request: Request::Ping,
        })?;
        self.last_id = id;
        self.pings.push(id);
        Ok(wire)
    }

    /// How many pings are unanswered.
    #[must_use]
    pub fn unanswered_pings(&self) -> usize {
        self.pings.len()
    }

    /// Ends the session: nothing more is taken or sent.
    pub fn end(&mut self) {
        self.state = State::Ended;
    }

    /// Takes what came from the guest; nothing when it was discarded.
    ///
    /// # Errors
    /// [`ProtocolError`] when it is against the protocol; the session has ended then.
    pub fn on_item(&mut self, item: Item) -> Result<Option<Event>, ProtocolError> {
        let taken = match item {
            Item::Garbage { bytes, fault } => self.on_garbage(bytes, fault),
            Item::Frame(frame) => self.on_frame(&frame),
        };
        if taken.is_err() {
            self.end();
        }
        taken
    }

    fn on_garbage(&mut self, bytes: usize, fault: Fault) -> Result<Option<Event>, ProtocolError> {
        self.discarded.garbage_bytes = self.discarded.garbage_bytes.saturating_add(bytes as u64);
        self.discarded.last_fault = Some(fault);
        match self.state {
            State::Greeting { .. } => Ok(None),
            State::SettingUp { .. }
            | State::Idle
            | State::Starting { .. }
            | State::Running(_)
            | State::Asking { .. }
            | State::Ended => Err(ProtocolError::Garbage {
                bytes,
                reason: fault,
            }),
        }
    }

    fn on_frame(&mut self, frame: &Frame) -> Result<Option<Event>, ProtocolError> {
        let own = frame.direction == Direction::ToHost
            && (frame.epoch, frame.nonce) == (self.epoch, self.nonce)
            && frame.seq >= self.seq_in;
        if !own {
            return self.on_stale();
        }
        if frame.seq == UNKNOWN_SESSION_SEQ
            && let GuestMessage::SessionBroken { reason } = GuestMessage::from_frame(frame)?
        {
            return Err(ProtocolError::SessionLost(reason));
        }
        if frame.seq > self.seq_in {
            return Err(ProtocolError::Gap {
                expected: self.seq_in,
                found: frame.seq,
            });
        }
        self.seq_in += 1;
        self.on_message(GuestMessage::from_frame(frame)?)
    }

    fn on_stale(&mut self) -> Result<Option<Event>, ProtocolError> {
        self.discarded.stale_frames += 1;
        if !matches!(self.state, State::Greeting { .. }) {
            self.stale_since_ready += 1;
        }
        if self.stale_since_ready > MAX_STALE_FRAMES {
            return Err(self.unexpected("a flood of frames of other sessions"));
        }
        Ok(None)
    }

    fn on_message(&mut self, message: GuestMessage) -> Result<Option<Event>, ProtocolError> {
        let event = match message {
            GuestMessage::Ready(ready) => return self.on_ready(ready).map(Some),
            GuestMessage::Hail(hail) => return self.on_hail(hail).map(Some),
            GuestMessage::Failed(failed) if self.is_greeting() => {
                self.end();
                Event::Failed(failed)
            }
            GuestMessage::Failed(_) => return Err(self.unexpected("failed")),
            GuestMessage::Accepted { id } => return self.on_accepted(id).map(Some),
            GuestMessage::Rejected { id, reason } => {
                match self.state {
                    State::Starting { id: own, .. } if own == id => self.state = State::Idle,
                    State::Greeting { .. }
                    | State::SettingUp { .. }
                    | State::Idle
                    | State::Starting { .. }
                    | State::Running(_)
                    | State::Asking { .. }
                    | State::Ended => {
                        return Err(self.unexpected("rejected"));
                    }
                }
                Event::Rejected(reason)
            }
            GuestMessage::Output { id, stream, data } => {
                self.running(id, "output")?
                    .output(stream)
                    .receive(data.0.len())?;
                Event::Output {
                    stream,
                    data: data.0,
                }
            }
            GuestMessage::StdinCredit { id, bytes } => {
                let running = self.running(id, "stdin credit")?;
                let Some(window) = &mut running.stdin else {
                    // Granted before the guest had seen the end of the input; a window's worth at most.
                    running.late_grants = running.late_grants.saturating_add(bytes.max(1));
                    if running.late_grants > STREAM_WINDOW_BYTES {
                        return Err(self.unexpected("a flood of stdin credit"));
                    }
                    return Ok(None);
                };
                window.grant(bytes)?;
                Event::StdinCredit
            }
            GuestMessage::StdinClosed { id } => {
                self.running(id, "stdin closed")?;
                self.close_stdin();
                Event::StdinClosed
            }
            GuestMessage::Exit { id, status } => {
                self.running(id, "exit")?;
                self.state = State::Idle;
                Event::Exit(status)
            }
            GuestMessage::Done { id, outcome } => return self.on_done(id, outcome).map(Some),
            GuestMessage::SessionBroken { reason } => {
                return Err(ProtocolError::EndedByPeer(reason));
            }
        };
        Ok(Some(event))
    }

    fn on_ready(&mut self, ready: Ready) -> Result<Event, ProtocolError> {
        let reattached = matches!(
            self.state,
            State::Greeting {
                reason: Some(Reason::Reattach)
            }
        );
        if !reattached && !matches!(self.state, State::SettingUp { sent: true }) {
            return Err(self.unexpected("ready"));
        }
        self.state = State::Idle;
        Ok(Event::Ready(ready))
    }

    fn on_hail(&mut self, hail: Hail) -> Result<Event, ProtocolError> {
        match self.state {
            State::Greeting {
                reason: Some(Reason::Boot | Reason::Restore | Reason::Fork | Reason::Wake),
            } => {
                self.state = State::SettingUp { sent: false };
                Ok(Event::Hail(hail))
            }
            State::Greeting {
                reason: Some(Reason::Reattach) | None,
            }
            | State::SettingUp { .. }
            | State::Idle
            | State::Starting { .. }
            | State::Running(_)
            | State::Asking { .. }
            | State::Ended => Err(self.unexpected("hail")),
        }
    }

    fn is_greeting(&self) -> bool {
        matches!(
            self.state,
            State::Greeting { reason: Some(_) } | State::SettingUp { sent: true }
        )
    }

    fn on_accepted(&mut self, id: u64) -> Result<Event, ProtocolError> {
        match self.state {
            State::Starting { id: own, stdin } if own == id => {
                self.state = State::Running(Box::new(Running {
                    id,
                    stdin: stdin.then(SendWindow::default),
                    late_grants: 0,
                    stdout: ReceiveWindow::default(),
                    stderr: ReceiveWindow::default(),
                }));
                Ok(Event::Accepted)
            }
            State::Greeting { .. }
            | State::SettingUp { .. }
            | State::Idle
            | State::Starting { .. }
            | State::Running(_)
            | State::Asking { .. }
            | State::Ended => Err(self.unexpected("accepted")),
        }
    }

    fn on_done(&mut self, id: u64, outcome: Done) -> Result<Event, ProtocolError> {
        if let Some(at) = self.pings.iter().position(|&ping| ping == id) {
            self.pings.swap_remove(at);
            return match outcome {
                Done::Status(status) => Ok(Event::Pong(status)),
                Done::Ok | Done::Frozen { .. } | Done::Failed(_) => {
                    Err(self.unexpected("another answer to a ping"))
                }
            };
        }
        match self.state {
            State::Asking { id: own } if own == id => {
                self.state = State::Idle;
                Ok(Event::Done(outcome))
            }
            State::Greeting { .. }
            | State::SettingUp { .. }
            | State::Idle
            | State::Starting { .. }
            | State::Running(_)
            | State::Asking { .. }
            | State::Ended => Err(self.unexpected("done")),
        }
    }

    fn running(&mut self, id: u64, message: &'static str) -> Result<&mut Running, ProtocolError> {
        let state = self.state_name();
        match &mut self.state {
            State::Running(running) if running.id == id => Ok(running),
            State::Greeting { .. }
            | State::SettingUp { .. }
            | State::Idle
            | State::Starting { .. }
            | State::Running(_)
            | State::Asking { .. }
            | State::Ended => Err(ProtocolError::Unexpected { message, state }),
        }
    }

    fn open_stdin(&mut self) -> Option<(u64, &mut SendWindow)> {
        match &mut self.state {
            State::Running(running) => {
                let id = running.id;
                running.stdin.as_mut().map(|window| (id, window))
            }
            State::Greeting { .. }
            | State::SettingUp { .. }
            | State::Idle
            | State::Starting { .. }
            | State::Asking { .. }
            | State::Ended => None,
        }
    }

    fn close_stdin(&mut self) {
        if let State::Running(running) = &mut self.state {
            running.stdin = None;
        }
    }

    fn must_be_idle(&self, message: &'static str) -> Result<(), ProtocolError> {
        if self.is_idle() {
            Ok(())
        } else {
            Err(self.unexpected(message))
        }
    }

    fn unexpected(&self, message: &'static str) -> ProtocolError {
        ProtocolError::Unexpected {
            message,
            state: self.state_name(),
        }
    }

    fn wire(&mut self, message: &HostMessage) -> Result<Vec<u8>, ProtocolError> {
        let frame = Frame {
            direction: Direction::ToGuest,
            kind: message.kind(),
            seq: self.seq_out,
            epoch: self.epoch,
            nonce: self.nonce,
            payload: message.to_payload()?,
        };
        let wire = frame.encode()?;
        self.seq_out += 1;
        Ok(wire)
    }
}

impl Running {
    fn output(&mut self, stream: OutputStream) -> &mut ReceiveWindow {
        match stream {
            OutputStream::Stdout => &mut self.stdout,
            OutputStream::Stderr => &mut self.stderr,
        }
    }
}

const _: () = assert!(MAX_CHUNK_BYTES + 64 < crate::frame::MAX_PAYLOAD_BYTES);
