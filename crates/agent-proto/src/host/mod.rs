//! The host's side of one session.
//!
//! ```text
//!   Greeting ── Hail: setup ──▶ SettingUp ── Ready ──▶ Open ── request: Release ── Done: Released ──▶ Open, released
//!      │  │                        │                    ▲  (commands are accepted only then)
//!      │  └ Ready (reattach) ──────┼────────────────────┘
//!      │ Failed                    │ Failed
//!    Ended ◀───────────────────────┴────── anything the protocol forbids, from any state
//!
//!   a command:  Asked ── Accepted: go ──▶ Going ── Started ──▶ Running ── Exit ──▶ closed
//!                 │ Rejected, Known: closed  │ the same           │ Detached: closed
//!               Attaching ── Attached ───────┴──────▶ Running ────┘
//! ```
//! Before the first answer to the own nonce everything else is discarded: after a restore a hundred thousand replies of
//! an earlier life may come first. From that answer on the stream is known to be whole, and whatever is not the
//! next frame ends the session.
//!
//! Streams are opened here and closed by the guest's last word on them only, so both sides always agree which are open.

mod streams;

use std::collections::BTreeMap;

use crate::flow::MAX_CHUNK_BYTES;
use crate::frame::{DELIMITER, Direction, Fault, Item};
use crate::message::{
    Attachment, CommandState, Done, ExitStatus, Failed, GuestMessage, Hail, Hello, HostMessage,
    Message, OutputStream, Ready, Reason, Rejection, Request, Setup, Status, UNKNOWN_SESSION_SEQ,
};
use crate::{Epoch, Frame, Nonce, ProtocolError};

use streams::Stream;

/// How many frames of other sessions may come after Ready before the session ends.
pub const MAX_STALE_FRAMES: u64 = 4096;
/// How many requests may be unanswered.
pub const MAX_REQUESTS: usize = 64;

/// What came from the guest. An `id` is the one that the session gave to the stream or request.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// The agent is there: [`Session::setup`] is due.
    Hail(Hail),
    /// The epoch is acknowledged; [`Request::Release`] is due unless it was released before.
    Ready(Ready),
    /// The handshake failed; the session has ended.
    Failed(Failed),
    /// The command is noted, and nothing of it has run: [`Session::go`] is due.
    Accepted {
        /// The stream.
        id: u64,
    },
    /// The command runs.
    Started {
        /// The stream.
        id: u64,
        /// The number of its process in the guest.
        pid: u32,
    },
    /// The command does not run, or there is nothing to attach to. The stream is closed.
    Rejected {
        /// The stream.
        id: u64,
        /// Why.
        reason: Rejection,
    },
    /// The key was used before. The stream is closed.
    Known {
        /// The stream.
        id: u64,
        /// What became of the command.
        state: CommandState,
    },
    /// The session listens to the command.
    Attached {
        /// The stream.
        id: u64,
        /// Where it is taken up.
        at: Attachment,
    },
    /// The session listens no more. The stream is closed.
    Detached {
        /// The stream.
        id: u64,
        /// Why.
        reason: String,
    },
    /// Output of the command; [`Session::output_consumed`] is due when it was passed on.
    Output {
        /// The stream.
        id: u64,
        /// Which output.
        stream: OutputStream,
        /// What it wrote.
        data: Vec<u8>,
    },
    /// [`Session::stdin_room`] has grown.
    StdinCredit {
        /// The stream.
        id: u64,
    },
    /// The command reads its input no more.
    StdinClosed {
        /// The stream.
        id: u64,
    },
    /// The command has ended and all its output came before. The stream is closed.
    Exit {
        /// The stream.
        id: u64,
        /// How.
        status: ExitStatus,
    },
    /// The request was done, or why not.
    Done {
        /// The request.
        id: u64,
        /// What it came to.
        outcome: Done,
    },
    /// A ping came back.
    Pong {
        /// The request.
        id: u64,
        /// What the agent says of itself.
        status: Box<Status>,
    },
    /// An answer of an operation on files.
    File {
        /// The stream.
        id: u64,
        /// What it says.
        reply: Vec<u8>,
        /// Whether it is the last: the stream is closed.
        last: bool,
    },
    /// Data of an operation on files; [`Session::file_consumed`] is due when it was passed on.
    FileData {
        /// The stream.
        id: u64,
        /// 1 to [`MAX_CHUNK_BYTES`] bytes.
        data: Vec<u8>,
    },
    /// [`Session::file_room`] has grown.
    FileCredit {
        /// The stream.
        id: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    Greeting { reason: Option<Reason> },
    SettingUp { sent: bool },
    Open { released: bool },
    Ended,
}

/// What a request that is unanswered asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Asked {
    Ping,
    Release,
    Other,
}

/// What the host discarded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Discarded {
    /// Frames of other epochs or sessions, or going the other way.
    pub stale_frames: u64,
    /// Bytes that were no frame.
    pub garbage_bytes: u64,
    /// What was wrong with the last of those.
    pub last_fault: Option<Fault>,
}

/// One session with the agent.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Session {
    epoch: Epoch,
    nonce: Nonce,
    state: State,
    seq_in: u64,
    seq_out: u64,
    last_id: u64,
    asked: BTreeMap<u64, Asked>,
    streams: BTreeMap<u64, Stream>,
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
            asked: BTreeMap::new(),
            streams: BTreeMap::new(),
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
            State::Open { released: false } => "waiting for the release",
            State::Open { released: true } => "open",
            State::Ended => "ended",
        }
    }

    /// Whether the guest has acknowledged the epoch and the session goes on.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Open { .. })
    }

    /// Whether the epoch is known to be released: the sandbox is ready.
    #[must_use]
    pub fn is_released(&self) -> bool {
        self.state == State::Open { released: true }
    }

    /// How many streams are open.
    #[must_use]
    pub fn open_streams(&self) -> usize {
        self.streams.len()
    }

    /// How many requests are unanswered.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.asked.len()
    }

    /// The hello to write first: bytes that end any half frame, and the frame.
    ///
    /// # Errors
    /// [`ProtocolError`] when a hello was sent before.
    pub fn hello(&mut self, hello: Hello) -> Result<Vec<u8>, ProtocolError> {
        if self.state != (State::Greeting { reason: None }) {
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
    /// [`ProtocolError`] when it has not, or the identity is longer than a frame.
    pub fn setup(&mut self, setup: Setup) -> Result<Vec<u8>, ProtocolError> {
        if self.state != (State::SettingUp { sent: false }) {
            return Err(self.unexpected("setup"));
        }
        let wire = self.wire(&HostMessage::Setup(setup))?;
        self.state = State::SettingUp { sent: true };
        Ok(wire)
    }

    /// Something other than a command; gives its number and what to write. The answer to a ping is [`Event::Pong`],
    /// to all others [`Event::Done`].
    ///
    /// # Errors
    /// [`ProtocolError`] when the session is not open, or [`MAX_REQUESTS`] are unanswered.
    pub fn request(&mut self, request: Request) -> Result<(u64, Vec<u8>), ProtocolError> {
        if !self.is_open() || self.asked.len() >= MAX_REQUESTS {
            return Err(self.unexpected("a request"));
        }
        let asked = match request {
            Request::Ping => Asked::Ping,
            Request::Release => Asked::Release,
            Request::Freeze { .. }
            | Request::Thaw
            | Request::Sync
            | Request::DropCaches
            | Request::Shutdown(_)
            | Request::FreezeWorkload { .. }
            | Request::ThawWorkload
            | Request::Query { .. }
            | Request::List => Asked::Other,
        };
        let id = self.last_id + 1;
        let wire = self.wire(&HostMessage::Request { id, request })?;
        self.last_id = id;
        self.asked.insert(id, asked);
        Ok((id, wire))
    }

    /// Ends the session: nothing more is taken or sent.
    pub fn end(&mut self) {
        self.state = State::Ended;
        self.streams.clear();
        self.asked.clear();
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
            State::SettingUp { .. } | State::Open { .. } | State::Ended => {
                Err(ProtocolError::Garbage {
                    bytes,
                    reason: fault,
                })
            }
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
        match message {
            GuestMessage::Ready(ready) => self.on_ready(ready).map(Some),
            GuestMessage::Hail(hail) => self.on_hail(hail).map(Some),
            GuestMessage::Failed(failed) if self.is_greeting() => {
                self.end();
                Ok(Some(Event::Failed(failed)))
            }
            GuestMessage::Failed(_) => Err(self.unexpected("failed")),
            GuestMessage::SessionBroken { reason } => Err(ProtocolError::EndedByPeer(reason)),
            GuestMessage::Done { id, outcome } => self.on_done(id, outcome).map(Some),
            GuestMessage::Accepted { id } => self.on_accepted(id),
            GuestMessage::Started {
                id,
                pid,
                stdin_window_bytes,
            } => self.on_started(id, pid, stdin_window_bytes),
            GuestMessage::Rejected { id, reason } => self.on_rejected(id, reason),
            GuestMessage::Known { id, state } => self.on_known(id, state),
            GuestMessage::Attached { id, at } => self.on_attached(id, at),
            GuestMessage::Detached { id, reason } => self.on_detached(id, reason),
            GuestMessage::Output { id, stream, data } => self.on_output(id, stream, data.0),
            GuestMessage::StdinCredit { id, bytes } => self.on_stdin_credit(id, bytes),
            GuestMessage::StdinClosed { id } => self.on_stdin_closed(id),
            GuestMessage::Exit { id, status } => self.on_exit(id, status),
            GuestMessage::File { id, reply, last } => self.on_file(id, reply.0, last),
            GuestMessage::FileData { id, data } => self.on_file_data(id, data.0),
            GuestMessage::FileCredit { id, bytes } => self.on_file_credit(id, bytes),
        }
    }

    fn on_ready(&mut self, ready: Ready) -> Result<Event, ProtocolError> {
        let reattach = State::Greeting {
            reason: Some(Reason::Reattach),
        };
        let reattached = self.state == reattach;
        if !reattached && self.state != (State::SettingUp { sent: true }) {
            return Err(self.unexpected("ready"));
        }
        if ready.epoch != self.epoch || (ready.released && !reattached) {
            return Err(self.unexpected("an acknowledgement of another epoch"));
        }
        self.state = State::Open {
            released: ready.released,
        };
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
            | State::Open { .. }
            | State::Ended => Err(self.unexpected("hail")),
        }
    }

    fn is_greeting(&self) -> bool {
        matches!(
            self.state,
            State::Greeting { reason: Some(_) } | State::SettingUp { sent: true }
        )
    }

    fn on_done(&mut self, id: u64, outcome: Done) -> Result<Event, ProtocolError> {
        let Some(asked) = self.asked.remove(&id).filter(|_| self.is_open()) else {
            return Err(self.unexpected("done"));
        };
        match (asked, outcome) {
            (Asked::Ping, Done::Status(status)) => Ok(Event::Pong { id, status }),
            (Asked::Ping, _) => Err(self.unexpected("another answer to a ping")),
            (Asked::Release, outcome @ Done::Released { .. }) => {
                self.state = State::Open { released: true };
                Ok(Event::Done { id, outcome })
            }
            (Asked::Other, Done::Released { .. } | Done::Status(_)) => {
                Err(self.unexpected("the answer to another request"))
            }
            (Asked::Release | Asked::Other, outcome) => Ok(Event::Done { id, outcome }),
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

const _: () = assert!(MAX_CHUNK_BYTES + 64 < crate::frame::MAX_PAYLOAD_BYTES);
