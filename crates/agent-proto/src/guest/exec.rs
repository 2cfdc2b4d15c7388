//! What a host says of commands: note, go, attach, detach, input, signals, credit.

use super::commands::{Command, Progress};
use super::session::{Attached, Stdin, Stream, unexpected};
use super::{Action, Agent, MAX_STREAMS, StreamKey};
use crate::flow::ReceiveWindow;
use crate::message::{
    Attachment, Bytes, CommandState, ExecRequest, GuestMessage, OutputStream, Rejection, StdinState,
};
use crate::{Epoch, ExecKey, ProtocolError};

/// How many bytes of noted requests a session holds at most.
const MAX_NOTED_BYTES: usize = 1024 * 1024;
impl Agent {
    pub(super) fn on_exec(
        &mut self,
        at: StreamKey,
        key: ExecKey,
        again: Option<Epoch>,
        request: ExecRequest,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        self.take_id(at)?;
        if let Some(known) = self.find_known(key, again) {
            self.reply(
                at,
                GuestMessage::Known {
                    id: at.id,
                    state: known,
                },
                actions,
            );
            return Ok(());
        }
        let refused = self
            .find_refusal(at)
            .or_else(|| self.find_noted_excess(at, &request))
            .or_else(|| find_fault(&request).map(|fault| Rejection::Invalid(fault.to_owned())));
        if let Some(reason) = refused {
            self.reply(at, GuestMessage::Rejected { id: at.id, reason }, actions);
            return Ok(());
        }
        let request = Box::new(request);
        self.open_stream(at, Stream::Noted { key, request });
        self.reply(at, GuestMessage::Accepted { id: at.id }, actions);
        Ok(())
    }

    /// What became of a key that was used before.
    fn find_known(&self, key: ExecKey, again: Option<Epoch>) -> Option<CommandState> {
        let state = match again {
            Some(epoch) => self.command_state(key, epoch),
            None => self.commands.get(key)?.state(),
        };
        (state != CommandState::NotRun).then_some(state)
    }

    pub(super) fn find_refusal(&mut self, at: StreamKey) -> Option<Rejection> {
        self.find_hindrance()
            .or_else(|| self.find_stream_excess(at))
    }

    pub(super) fn find_stream_excess(&mut self, at: StreamKey) -> Option<Rejection> {
        let open = self.session(at.port, at.nonce)?.streams.len();
        (open >= MAX_STREAMS).then_some(Rejection::TooManyStreams {
            limit: u32::try_from(MAX_STREAMS).unwrap_or(u32::MAX),
        })
    }

    fn find_noted_excess(&mut self, at: StreamKey, request: &ExecRequest) -> Option<Rejection> {
        let session = self.session(at.port, at.nonce)?;
        let noted = session.streams.values().map(|stream| match stream {
            Stream::Noted { request, .. } => request_bytes(request),
            Stream::Command(_) | Stream::File(_) => 0,
        });
        let sum: usize = noted.sum();
        (sum + request_bytes(request) > MAX_NOTED_BYTES).then(|| {
            let limit = session.streams.len();
            Rejection::TooManyStreams {
                limit: u32::try_from(limit).unwrap_or(u32::MAX),
            }
        })
    }

    pub(super) fn on_go(
        &mut self,
        at: StreamKey,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        let Some(Stream::Noted { key, request }) = self.take_noted(at) else {
            return Err(unexpected("go", "without a command that was accepted"));
        };
        if let Some(state) = self.find_known(key, None) {
            self.reply(at, GuestMessage::Known { id: at.id, state }, actions);
            return Ok(());
        }
        // One thread prepares a key's program, whoever has said go: with two, the one that is refused would speak for the other.
        let is_prepared = self.commands.get(key).is_some();
        let excess = (!is_prepared).then(|| self.find_command_excess()).flatten();
        if let Some(reason) = self.find_hindrance().or(excess) {
            self.reply(at, GuestMessage::Rejected { id: at.id, reason }, actions);
            return Ok(());
        }
        let Some(epoch) = self.epoch() else {
            return Ok(());
        };
        let capacity = self.commands.next_capacity();
        let command = Command::new(&request, epoch, at, capacity);
        self.commands.table.insert(key, command);
        self.commands.live.insert(key);
        let mut attached = Attached::new(key, [0; 2]);
        attached.awaits_start = true;
        self.open_stream(at, Stream::Command(Box::new(attached)));
        if !is_prepared {
            actions.push(Action::Start { key, request });
        }
        Ok(())
    }

    fn find_command_excess(&self) -> Option<Rejection> {
        let limit = self.config.max_commands;
        let live = self.commands.live.len();
        let full = u32::try_from(live).map_or(true, |count| count >= limit);
        full.then_some(Rejection::TooManyCommands { limit })
    }

    pub(super) fn on_attach(
        &mut self,
        at: StreamKey,
        key: ExecKey,
        from: [u64; 2],
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        self.take_id(at)?;
        let released = self.is_released();
        let refused = (!released)
            .then_some(Rejection::NotReleased)
            .or_else(|| self.find_stream_excess(at))
            .or_else(|| self.find_unattachable(key, from));
        if let Some(reason) = refused {
            self.reply(at, GuestMessage::Rejected { id: at.id, reason }, actions);
            return Ok(());
        }
        self.take_away(key, "another session listens to it", actions);
        let window = self.commands.input_window();
        let Some(command) = self.commands.get_mut(key) else {
            return Ok(());
        };
        let kept = command.kept();
        let first = [0, 1].map(|place| from[place].max(kept[place].first));
        command.owner = Some(at);
        let stdin = command.input.as_ref().map(|input| StdinState {
            received: input.received,
            window_bytes: window,
        });
        let pid = command.pid();
        let mut attached = Attached::new(key, first);
        if stdin.is_some() {
            attached.stdin = Stdin::Open(ReceiveWindow::new(window));
        }
        self.open_stream(at, Stream::Command(Box::new(attached)));
        let at_place = Attachment { pid, first, stdin };
        let message = GuestMessage::Attached {
            id: at.id,
            at: at_place,
        };
        self.reply(at, message, actions);
        actions.push(Action::Wake { key });
        Ok(())
    }

    fn find_unattachable(&self, key: ExecKey, from: [u64; 2]) -> Option<Rejection> {
        let Some(command) = self.commands.get(key) else {
            let known = self.epoch().unwrap_or(Epoch([0; 16]));
            return Some(Rejection::Unknown(self.command_state(key, known)));
        };
        if matches!(command.progress, Progress::Starting | Progress::Withdrawn) {
            // Who has said go is still to be told of it.
            return Some(Rejection::Unknown(command.state()));
        }
        let kept = command.kept();
        let beyond = [0, 1].iter().any(|&place| from[place] > kept[place].end);
        beyond.then(|| Rejection::Invalid("the output is not that long".to_owned()))
    }

    /// Ends the stream of whoever listens to the command.
    fn take_away(&mut self, key: ExecKey, why: &str, actions: &mut Vec<Action>) {
        let Some(owner) = self.commands.get(key).and_then(|command| command.owner) else {
            return;
        };
        if let Some(attached) = self.attached_mut(owner).cloned() {
            self.commands.let_go(&attached);
        }
        self.close_stream(owner);
        let reason = why.to_owned();
        self.reply(
            owner,
            GuestMessage::Detached {
                id: owner.id,
                reason,
            },
            actions,
        );
    }

    pub(super) fn on_detach(
        &mut self,
        at: StreamKey,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        let reason = "as it was asked".to_owned();
        if self.take_noted(at).is_some() {
            self.reply(at, GuestMessage::Detached { id: at.id, reason }, actions);
            return Ok(());
        }
        let Some(attached) = self.attached_mut(at).cloned() else {
            return self.expect_past(at, "detach");
        };
        let is_starting = self
            .commands
            .get(attached.key)
            .is_some_and(|command| command.progress == Progress::Starting);
        if is_starting {
            // It goes on to run: the host has said go. Only who has started can be let go.
            if let Some(command) = self.commands.get_mut(attached.key) {
                command.owner = None;
            }
        } else {
            self.commands.let_go(&attached);
        }
        self.close_stream(at);
        self.reply(at, GuestMessage::Detached { id: at.id, reason }, actions);
        actions.push(Action::Wake { key: attached.key });
        Ok(())
    }

    pub(super) fn on_stdin(
        &mut self,
        at: StreamKey,
        data: Vec<u8>,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        let Some(attached) = self.attached_mut(at) else {
            // The command ended while this was on its way.
            return self.expect_past(at, "stdin");
        };
        let key = attached.key;
        match &mut attached.stdin {
            Stdin::Open(window) => window.receive(data.len())?,
            Stdin::ClosedByCommand(window) => return window.receive(data.len()),
            Stdin::Ended => return Err(unexpected("stdin", "past the end of stdin")),
        }
        if let Some(input) = self
            .commands
            .get_mut(key)
            .and_then(|found| found.input.as_mut())
        {
            input.received += data.len() as u64;
            actions.push(Action::Stdin { key, data });
        }
        Ok(())
    }

    pub(super) fn on_stdin_end(
        &mut self,
        at: StreamKey,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        let Some(attached) = self.attached_mut(at) else {
            return self.expect_past(at, "end of stdin");
        };
        let key = attached.key;
        match std::mem::replace(&mut attached.stdin, Stdin::Ended) {
            Stdin::Open(_) => {
                if let Some(command) = self.commands.get_mut(key) {
                    command.input = None;
                }
                actions.push(Action::StdinEnd { key });
                Ok(())
            }
            Stdin::ClosedByCommand(_) => Ok(()),
            Stdin::Ended => Err(unexpected("end of stdin", "past the end of stdin")),
        }
    }

    pub(super) fn on_signal(
        &mut self,
        at: StreamKey,
        signal: i32,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        if !(1..=31).contains(&signal) {
            return Err(unexpected("signal", "limited to signals 1 to 31"));
        }
        match self.attached_mut(at).map(|attached| attached.key) {
            Some(key) => {
                actions.push(Action::Signal { key, signal });
                Ok(())
            }
            None => self.expect_past(at, "signal"),
        }
    }

    pub(super) fn on_resize(
        &mut self,
        at: StreamKey,
        rows: u16,
        cols: u16,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        match self.attached_mut(at).map(|attached| attached.key) {
            Some(key) => {
                actions.push(Action::Resize { key, rows, cols });
                Ok(())
            }
            None => self.expect_past(at, "resize"),
        }
    }

    pub(super) fn on_credit(
        &mut self,
        at: StreamKey,
        stream: OutputStream,
        bytes: u32,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        match self.attached_mut(at) {
            Some(attached) => {
                attached.windows[stream.place()].grant(bytes)?;
                actions.push(Action::Flush { port: at.port });
                Ok(())
            }
            None => self.expect_past(at, "credit"),
        }
    }

    fn take_noted(&mut self, at: StreamKey) -> Option<Stream> {
        let session = self.session(at.port, at.nonce)?;
        let is_noted = matches!(session.streams.get(&at.id), Some(Stream::Noted { .. }));
        is_noted.then(|| session.streams.remove(&at.id)).flatten()
    }
}

fn request_bytes(request: &ExecRequest) -> usize {
    let words: usize = request.argv.iter().map(|word| word.0.len() + 32).sum();
    let variables = request.env.iter();
    let env: usize = variables
        .map(|(name, value)| name.0.len() + value.0.len() + 64)
        .sum();
    words + env + 256
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
    if request
        .pty
        .as_ref()
        .is_some_and(|pty| pty.term.contains('\0'))
    {
        return Some("the name of the terminal has a zero byte");
    }
    None
}
