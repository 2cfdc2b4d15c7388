//! What goes out of a port: frames are made when they are taken.
//!
//! Notices (hails, refusals, ends of sessions) go first, then a session's answers in the order they were given, then its
//! streams: each in turn one chunk. A stream that could go on for ever waits as long as every other one needs for a chunk.

use super::life::Port;
use super::session::{Attached, Session, Stream};
use super::{Action, Agent, Commands, MAX_UNREAD_BYTES, StreamKey, bounded_text};
use crate::flow::MAX_CHUNK_BYTES;
use crate::frame::{Direction, Kind};
use crate::message::{
    Bytes, CommandState, Failed, GuestMessage, HostMessage, Message, OutputStream,
    UNKNOWN_SESSION_SEQ,
};
use crate::{Epoch, Frame, Nonce, ProtocolError};

impl Agent {
    /// The next frame to be written to `port`, and what follows from its leaving; nothing when all that can be said now is said.
    pub fn next_frame(&mut self, port: u32) -> Option<(Frame, Vec<Action>)> {
        let state = self.ports.get_mut(&port)?;
        if let Some(frame) = state.notices.pop_front() {
            return Some((frame, Vec::new()));
        }
        let Port::Attached(session) = &mut state.port else {
            return None;
        };
        let mut actions = Vec::new();
        let (kind, payload) = match session.control.pop_front() {
            Some(message) => {
                session.control_bytes -= message.1.len();
                message
            }
            None => {
                let message = session.next_of_streams(port, &mut self.commands, &mut actions)?;
                (message.kind(), payload(&message))
            }
        };
        let frame = Frame {
            direction: Direction::ToHost,
            kind,
            seq: session.seq_out,
            epoch: session.epoch,
            nonce: session.nonce,
            payload,
        };
        session.seq_out += 1;
        Some((frame, actions))
    }

    /// Whether [`Agent::next_frame`] has something to give.
    #[must_use]
    pub fn has_frame(&self, port: u32) -> bool {
        let Some(state) = self.ports.get(&port) else {
            return false;
        };
        let Port::Attached(session) = &state.port else {
            return !state.notices.is_empty();
        };
        !state.notices.is_empty()
            || !session.control.is_empty()
            || session
                .streams
                .values()
                .any(|stream| stream.has_message(&self.commands))
    }

    /// A host that asks for more than it reads loses its session, and without one the answers.
    pub(super) fn bound_unread(&mut self, port: u32, actions: &mut Vec<Action>) {
        let Some(state) = self.ports.get_mut(&port) else {
            return;
        };
        let noticed: usize = state
            .notices
            .iter()
            .map(|frame| frame.payload.len() + 64)
            .sum();
        if noticed > MAX_UNREAD_BYTES / 4 {
            state.notices.clear();
        }
        let Port::Attached(session) = &state.port else {
            return;
        };
        if session.control_bytes > MAX_UNREAD_BYTES {
            let error = ProtocolError::Unexpected {
                message: "more requests",
                state: "full of answers that were not read",
            };
            self.break_session(port, &error, actions);
        }
    }

    /// Ends what the port is in the middle of, and tells its host why if it still listens.
    pub(super) fn dismiss(&mut self, port: u32, why: &'static str, actions: &mut Vec<Action>) {
        let told = match self.ports.get(&port).map(|state| &state.port) {
            Some(Port::Attached(session)) => Some(broken(session, why.to_owned())),
            Some(Port::Unattached | Port::Hailed { .. } | Port::Handshaking(_)) | None => None,
        };
        self.end_session(port, why, actions);
        if let Some(frame) = told {
            self.notice(port, frame, actions);
        }
    }

    pub(super) fn break_session(
        &mut self,
        port: u32,
        error: &ProtocolError,
        actions: &mut Vec<Action>,
    ) {
        let Some(Port::Attached(session)) = self.ports.get(&port).map(|state| &state.port) else {
            return;
        };
        let told = broken(session, bounded_text(error.to_string()));
        self.end_session(port, "the session broke", actions);
        self.notice(port, told, actions);
    }

    /// Tells a host that asks for something in a session that has ended here, and does not know it: the end of an earlier
    /// connection was seen only after its hello, or the agent was restarted. Nothing is done of what it asks here.
    pub(super) fn deny_session(&mut self, port: u32, frame: &Frame, actions: &mut Vec<Action>) {
        let asks = matches!(
            HostMessage::from_frame(frame),
            Ok(HostMessage::Exec { .. }
                | HostMessage::Go { .. }
                | HostMessage::Attach { .. }
                | HostMessage::File { .. }
                | HostMessage::Request { .. })
        );
        if asks {
            let reason = "the agent does not know it".to_owned();
            let message = GuestMessage::SessionBroken { reason };
            let denial = self::frame(frame.epoch, frame.nonce, UNKNOWN_SESSION_SEQ, &message);
            self.notice(port, denial, actions);
        }
    }
}

impl Session {
    /// Puts an answer behind all others.
    pub(super) fn put(&mut self, message: &GuestMessage) {
        let payload = payload(message);
        self.control_bytes += payload.len();
        self.control.push_back((message.kind(), payload));
    }

    /// A message of the first stream after the one that was served last that has one.
    fn next_of_streams(
        &mut self,
        port: u32,
        commands: &mut Commands,
        actions: &mut Vec<Action>,
    ) -> Option<GuestMessage> {
        let (nonce, turn) = (self.nonce, self.turn);
        let after = self.streams.range(turn.saturating_add(1)..);
        let id = after
            .chain(self.streams.range(..=turn))
            .find(|(_, stream)| stream.has_message(commands))
            .map(|(&id, _)| id)?;
        self.turn = id;
        let stream = self.streams.get_mut(&id)?;
        let message = match stream {
            Stream::Noted { .. } => None,
            Stream::Command(attached) => attached.next(id, commands, actions),
            Stream::File(file) => {
                let key = StreamKey { port, nonce, id };
                file.next(key, actions)
            }
        };
        let closes = match &message {
            Some(GuestMessage::Exit { .. } | GuestMessage::File { last: true, .. }) => true,
            Some(_) | None => false,
        };
        if closes {
            self.streams.remove(&id);
        }
        message
    }
}

impl Stream {
    fn has_message(&self, commands: &Commands) -> bool {
        match self {
            Self::Noted { .. } => false,
            Self::Command(attached) => attached.has_message(commands),
            Self::File(file) => file.has_message(),
        }
    }
}

impl Attached {
    fn unsent(&self, commands: &Commands, place: usize) -> u64 {
        commands.get(self.key).map_or(0, |command| {
            command.outputs[place]
                .end()
                .saturating_sub(self.sent[place])
        })
    }

    fn chunk_bytes(&self, commands: &Commands, place: usize) -> usize {
        let unsent = usize::try_from(self.unsent(commands, place)).unwrap_or(usize::MAX);
        unsent
            .min(self.windows[place].next_chunk_bytes())
            .min(MAX_CHUNK_BYTES)
    }

    fn is_at_its_end(&self, commands: &Commands) -> bool {
        let ended = commands
            .get(self.key)
            .is_some_and(|command| matches!(command.state(), CommandState::Ended(_)));
        ended
            && [0, 1]
                .iter()
                .all(|&place| self.unsent(commands, place) == 0)
    }

    fn has_message(&self, commands: &Commands) -> bool {
        [0, 1]
            .iter()
            .any(|&place| self.chunk_bytes(commands, place) > 0)
            || self.is_at_its_end(commands)
    }

    fn next(
        &mut self,
        id: u64,
        commands: &mut Commands,
        actions: &mut Vec<Action>,
    ) -> Option<GuestMessage> {
        // The other output than the last time, if it has anything.
        let places = [1 - self.last_place, self.last_place];
        for place in places {
            let bytes = self.chunk_bytes(commands, place);
            if bytes > 0 {
                return Some(self.take(id, place, bytes, commands, actions));
            }
        }
        let command = commands.get_mut(self.key)?;
        let CommandState::Ended(status) = command.state() else {
            return None;
        };
        command.owner = None;
        Some(GuestMessage::Exit { id, status })
    }

    fn take(
        &mut self,
        id: u64,
        place: usize,
        bytes: usize,
        commands: &mut Commands,
        actions: &mut Vec<Action>,
    ) -> GuestMessage {
        let key = self.key;
        let unsent = self.unsent(commands, place);
        let command = commands.get_mut(key).expect("it has unsent output");
        let output = &command.outputs[place];
        let data = output.read(self.sent[place], bytes);
        if unsent >= output.capacity() as u64 {
            // Its thread waits for room.
            actions.push(Action::Wake { key });
        }
        self.windows[place].spend(data.len());
        self.sent[place] += data.len() as u64;
        self.last_place = place;
        GuestMessage::Output {
            id,
            stream: OutputStream::ALL[place],
            data: Bytes(data),
        }
    }
}

fn payload(message: &GuestMessage) -> Vec<u8> {
    message
        .to_payload()
        .expect("every text and list in it is bounded")
}

pub(super) fn frame(epoch: Epoch, nonce: Nonce, seq: u64, message: &GuestMessage) -> Frame {
    Frame {
        direction: Direction::ToHost,
        kind: message.kind(),
        seq,
        epoch,
        nonce,
        payload: payload(message),
    }
}

fn broken(session: &Session, reason: String) -> Frame {
    let message = GuestMessage::SessionBroken { reason };
    frame(session.epoch, session.nonce, session.seq_out, &message)
}

pub(super) fn refusal(epoch: Epoch, nonce: Nonce, seq: u64, failed: Failed) -> Frame {
    let message = GuestMessage::Failed(failed);
    assert!(
        message.kind() == Kind::Handshake,
        "a refusal comes instead of a session"
    );
    frame(epoch, nonce, seq, &message)
}
