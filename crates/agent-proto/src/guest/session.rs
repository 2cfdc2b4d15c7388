//! One session: what comes in on it, and its streams.

use std::collections::{BTreeMap, VecDeque};

use super::files::FileStream;
use super::life::Port;
use super::{Action, Agent, StreamKey};
use crate::flow::{ReceiveWindow, SendWindow};
use crate::frame::Kind;
use crate::message::{ExecRequest, HostMessage, Message};
use crate::{Epoch, ExecKey, Frame, Nonce, ProtocolError};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Session {
    pub(super) epoch: Epoch,
    pub(super) nonce: Nonce,
    seq_in: u64,
    pub(super) seq_out: u64,
    last_id: u64,
    pub(super) control: VecDeque<(Kind, Vec<u8>)>,
    pub(super) control_bytes: usize,
    pub(super) streams: BTreeMap<u64, Stream>,
    // The stream that was served last.
    pub(super) turn: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Stream {
    /// A command of which nothing has run, and nothing will without a go.
    Noted {
        key: ExecKey,
        request: Box<ExecRequest>,
    },
    /// A command that this session listens to.
    Command(Box<Attached>),
    /// An operation on files.
    File(Box<FileStream>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Attached {
    pub(super) key: ExecKey,
    // Its host has said go and waits for news of it.
    pub(super) awaits_start: bool,
    // Up to where each output was sent, from its beginning.
    pub(super) sent: [u64; 2],
    pub(super) windows: [SendWindow; 2],
    pub(super) last_place: usize,
    pub(super) stdin: Stdin,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Stdin {
    Open(ReceiveWindow),
    ClosedByCommand(ReceiveWindow),
    Ended,
}

impl Attached {
    pub(super) fn new(key: ExecKey, sent: [u64; 2]) -> Self {
        Self {
            key,
            awaits_start: false,
            sent,
            windows: [SendWindow::default(), SendWindow::default()],
            last_place: 1,
            stdin: Stdin::Ended,
        }
    }
}

impl Session {
    /// A session whose handshake took `answers` messages each way before the one that attaches it.
    pub(super) fn new(epoch: Epoch, nonce: Nonce, answers: u64) -> Self {
        Self {
            epoch,
            nonce,
            seq_in: answers + 1,
            seq_out: answers,
            last_id: 0,
            control: VecDeque::new(),
            control_bytes: 0,
            streams: BTreeMap::new(),
            turn: 0,
        }
    }

    pub(super) fn command(&mut self, id: u64) -> Option<&mut Attached> {
        match self.streams.get_mut(&id)? {
            Stream::Command(attached) => Some(attached),
            Stream::Noted { .. } | Stream::File(_) => None,
        }
    }
}

impl Agent {
    pub(super) fn on_session(&mut self, port: u32, frame: &Frame, actions: &mut Vec<Action>) {
        let current = self.epoch() == Some(frame.epoch);
        let Some(session) = self.session(port, frame.nonce) else {
            self.stale_frames += 1;
            // Of an epoch that has passed it lay in the port when the machine was captured, or its host was told. One that this
            // agent has never lived is that of a host whose agent was restarted: nobody has told it yet.
            if current || !self.has_known(frame.epoch) {
                self.deny_session(port, frame, actions);
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
        let key = |id| StreamKey { port, nonce, id };
        match message {
            HostMessage::Hello(_) | HostMessage::Setup(_) => {
                unreachable!("the kind of the frame was checked against the message")
            }
            HostMessage::Exec {
                id,
                key: command,
                again,
                request,
            } => self.on_exec(key(id), command, again, request, actions),
            HostMessage::Go { id } => self.on_go(key(id), actions),
            HostMessage::Attach {
                id,
                key: command,
                from,
            } => self.on_attach(key(id), command, from, actions),
            HostMessage::Detach { id } => self.on_detach(key(id), actions),
            HostMessage::Stdin { id, data } => self.on_stdin(key(id), data.0, actions),
            HostMessage::StdinEnd { id } => self.on_stdin_end(key(id), actions),
            HostMessage::Signal { id, signal } => self.on_signal(key(id), signal, actions),
            HostMessage::Resize { id, rows, cols } => self.on_resize(key(id), rows, cols, actions),
            HostMessage::Credit { id, stream, bytes } => {
                self.on_credit(key(id), stream, bytes, actions)
            }
            HostMessage::Request { id, request } => self.on_request(key(id), request, actions),
            HostMessage::File { id, op } => self.on_file(key(id), op.0, actions),
            HostMessage::FileData { id, data } => self.on_file_data(key(id), data.0, actions),
            HostMessage::FileEnd { id } => self.on_file_end(key(id), actions),
            HostMessage::FileCredit { id, bytes } => self.on_file_credit(key(id), bytes, actions),
            HostMessage::FileCancel { id } => self.on_file_cancel(key(id), actions),
        }
    }

    /// Numbers in a session only grow, so that nothing is done twice.
    pub(super) fn take_id(&mut self, key: StreamKey) -> Result<(), ProtocolError> {
        match self.session(key.port, key.nonce) {
            Some(session) if key.id > session.last_id => {
                session.last_id = key.id;
                Ok(())
            }
            Some(_) | None => Err(unexpected("a number that was used before", "attached")),
        }
    }

    /// What comes for a stream that was closed while it was on its way is right; for one that never was it is not.
    pub(super) fn expect_past(
        &mut self,
        key: StreamKey,
        message: &'static str,
    ) -> Result<(), ProtocolError> {
        match self.session(key.port, key.nonce) {
            Some(session)
                if key.id <= session.last_id && !session.streams.contains_key(&key.id) =>
            {
                Ok(())
            }
            Some(_) | None => Err(unexpected(message, "without such a stream")),
        }
    }

    /// Ends whatever the port is in the middle of. Its commands go on, unheard; what was noted of others is forgotten.
    pub(super) fn end_session(&mut self, port: u32, why: &'static str, actions: &mut Vec<Action>) {
        let Some(state) = self.ports.get_mut(&port) else {
            return;
        };
        state.notices.clear();
        match std::mem::take(&mut state.port) {
            Port::Unattached | Port::Hailed { .. } => {}
            Port::Handshaking(handshake) => self.forget_handshake(port, &handshake),
            Port::Attached(session) => {
                let nonce = session.nonce;
                for (id, stream) in session.streams {
                    match stream {
                        Stream::Noted { .. } => {}
                        Stream::Command(attached) => {
                            self.commands.let_go(&attached);
                            actions.push(Action::Wake { key: attached.key });
                        }
                        Stream::File(_) => {
                            let stream = StreamKey { port, nonce, id };
                            actions.push(Action::FileGone { stream });
                        }
                    }
                }
                self.abandon_freeze(port, nonce, why, actions);
            }
        }
    }
}

pub(super) fn unexpected(message: &'static str, state: &'static str) -> ProtocolError {
    ProtocolError::Unexpected { message, state }
}
