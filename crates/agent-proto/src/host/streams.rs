//! The streams of a session: commands and operations on files.

use super::{Event, Session};
use crate::flow::{MIN_WINDOW_BYTES, ReceiveWindow, STREAM_WINDOW_BYTES, SendWindow};
use crate::guest::MAX_STREAMS;
use crate::message::{
    Attachment, Bytes, CommandState, ExecRequest, ExitStatus, HostMessage, OutputStream, Rejection,
};
use crate::{Epoch, ExecKey, ProtocolError};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Stream {
    /// A command was sent, and is not known to be accepted.
    Asked { takes_input: bool },
    /// It was accepted, and go has not been said.
    Accepted { takes_input: bool },
    /// Go was said.
    Going { takes_input: bool },
    /// An attachment was asked for.
    Attaching,
    /// Output may come.
    Running(Box<Running>),
    /// An operation on files.
    File(Box<File>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Running {
    stdin: Option<SendWindow>,
    // Grants that crossed the end of the input on the way.
    late_grants: u32,
    outputs: [ReceiveWindow; 2],
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct File {
    to_guest: Option<SendWindow>,
    late_grants: u32,
    from_guest: ReceiveWindow,
}

impl Running {
    fn new(stdin_window_bytes: Option<u32>) -> Self {
        Self {
            stdin: stdin_window_bytes.map(SendWindow::new),
            late_grants: 0,
            outputs: [ReceiveWindow::default(), ReceiveWindow::default()],
        }
    }
}

impl Session {
    /// The request to take note of a command; gives its stream and what to write. `again` is the epoch in which the key was
    /// first asked for, when this is not the first time.
    ///
    /// # Errors
    /// [`ProtocolError`] when the session is not open, has [`MAX_STREAMS`] streams, or the request is larger than a frame.
    pub fn exec(
        &mut self,
        key: ExecKey,
        again: Option<Epoch>,
        request: ExecRequest,
    ) -> Result<(u64, Vec<u8>), ProtocolError> {
        let takes_input = request.stdin || request.pty.is_some();
        self.open(Stream::Asked { takes_input }, |id| HostMessage::Exec {
            id,
            key,
            again,
            request,
        })
    }

    /// Has the command that was accepted run.
    ///
    /// # Errors
    /// [`ProtocolError`] when it was not accepted.
    pub fn go(&mut self, id: u64) -> Result<Vec<u8>, ProtocolError> {
        let Some(Stream::Accepted { takes_input }) = self.streams.get(&id) else {
            return Err(self.unexpected("go"));
        };
        let going = Stream::Going {
            takes_input: *takes_input,
        };
        self.streams.insert(id, going);
        self.wire(&HostMessage::Go { id })
    }

    /// The request to listen to a command that runs already; gives its stream and what to write.
    ///
    /// # Errors
    /// As [`Session::exec`].
    pub fn attach(
        &mut self,
        key: ExecKey,
        from: [u64; 2],
    ) -> Result<(u64, Vec<u8>), ProtocolError> {
        self.open(Stream::Attaching, |id| HostMessage::Attach {
            id,
            key,
            from,
        })
    }

    /// The request to listen no more, and to forget a command that was not told to go. [`Event::Detached`] follows, or
    /// whatever else closes the stream.
    ///
    /// # Errors
    /// [`ProtocolError`] when there is no such stream.
    pub fn detach(&mut self, id: u64) -> Result<Vec<u8>, ProtocolError> {
        match self.streams.get(&id) {
            Some(Stream::File(_)) => self.wire(&HostMessage::FileCancel { id }),
            Some(_) => self.wire(&HostMessage::Detach { id }),
            None => Err(self.unexpected("detach")),
        }
    }

    /// Whether the stream is open.
    #[must_use]
    pub fn is_stream_open(&self, id: u64) -> bool {
        self.streams.contains_key(&id)
    }

    /// How many bytes of input may be sent now; nothing when the command takes none.
    #[must_use]
    pub fn stdin_room(&self, id: u64) -> Option<usize> {
        let stdin = self.running(id)?.stdin.as_ref();
        stdin.map(SendWindow::next_chunk_bytes)
    }

    /// Input for the command.
    ///
    /// # Errors
    /// [`ProtocolError`] when the command takes none.
    ///
    /// # Panics
    /// When `data` is empty or more than [`Session::stdin_room`].
    pub fn stdin(&mut self, id: u64, data: &[u8]) -> Result<Vec<u8>, ProtocolError> {
        assert!(!data.is_empty(), "empty input is not sent");
        let Some(window) = self.running_mut(id).and_then(|found| found.stdin.as_mut()) else {
            return Err(self.unexpected("stdin"));
        };
        window.spend(data.len());
        let data = Bytes::from(data);
        self.wire(&HostMessage::Stdin { id, data })
    }

    /// The end of the command's input.
    ///
    /// # Errors
    /// [`ProtocolError`] when the command takes none.
    pub fn stdin_end(&mut self, id: u64) -> Result<Vec<u8>, ProtocolError> {
        match self.running_mut(id).and_then(|found| found.stdin.take()) {
            Some(_) => self.wire(&HostMessage::StdinEnd { id }),
            None => Err(self.unexpected("end of stdin")),
        }
    }

    /// A signal for the command's group.
    ///
    /// # Errors
    /// [`ProtocolError`] when the command does not run or the number is not 1 to 31.
    pub fn signal(&mut self, id: u64, signal: i32) -> Result<Vec<u8>, ProtocolError> {
        if self.running(id).is_none() {
            return Err(self.unexpected("signal"));
        }
        if !(1..=31).contains(&signal) {
            return Err(self.unexpected("a signal other than 1 to 31"));
        }
        self.wire(&HostMessage::Signal { id, signal })
    }

    /// Another size for the command's terminal.
    ///
    /// # Errors
    /// [`ProtocolError`] when the command does not run.
    pub fn resize(&mut self, id: u64, rows: u16, cols: u16) -> Result<Vec<u8>, ProtocolError> {
        match self.running(id) {
            Some(_) => self.wire(&HostMessage::Resize { id, rows, cols }),
            None => Err(self.unexpected("resize")),
        }
    }

    /// Notes that `bytes` of the output were passed on; gives the grant to write, if it is time for one.
    ///
    /// # Errors
    /// [`ProtocolError`] when the grant cannot be encoded, which no state leads to.
    pub fn output_consumed(
        &mut self,
        id: u64,
        stream: OutputStream,
        bytes: usize,
    ) -> Result<Option<Vec<u8>>, ProtocolError> {
        let Some(running) = self.running_mut(id) else {
            // The command has ended: there is nobody to grant anything to.
            return Ok(None);
        };
        match running.outputs[stream.place()].consume(bytes) {
            Some(bytes) => self
                .wire(&HostMessage::Credit { id, stream, bytes })
                .map(Some),
            None => Ok(None),
        }
    }

    /// Begins an operation on files; gives its stream and what to write.
    ///
    /// # Errors
    /// As [`Session::exec`].
    pub fn file(&mut self, op: Vec<u8>) -> Result<(u64, Vec<u8>), ProtocolError> {
        let file = File {
            to_guest: Some(SendWindow::new(STREAM_WINDOW_BYTES)),
            late_grants: 0,
            from_guest: ReceiveWindow::default(),
        };
        self.open(Stream::File(Box::new(file)), |id| HostMessage::File {
            id,
            op: Bytes(op),
        })
    }

    /// How many bytes of data may be sent for the operation now; nothing when it takes none.
    #[must_use]
    pub fn file_room(&self, id: u64) -> Option<usize> {
        match self.streams.get(&id)? {
            Stream::File(file) => file.to_guest.as_ref().map(SendWindow::next_chunk_bytes),
            Stream::Asked { .. }
            | Stream::Accepted { .. }
            | Stream::Going { .. }
            | Stream::Attaching
            | Stream::Running(_) => None,
        }
    }

    /// Data for the operation.
    ///
    /// # Errors
    /// [`ProtocolError`] when it takes none.
    ///
    /// # Panics
    /// When `data` is empty or more than [`Session::file_room`].
    pub fn file_data(&mut self, id: u64, data: &[u8]) -> Result<Vec<u8>, ProtocolError> {
        assert!(!data.is_empty(), "empty data is not sent");
        let Some(window) = self.file_mut(id).and_then(|file| file.to_guest.as_mut()) else {
            return Err(self.unexpected("file data"));
        };
        window.spend(data.len());
        let data = Bytes::from(data);
        self.wire(&HostMessage::FileData { id, data })
    }

    /// The end of the data.
    ///
    /// # Errors
    /// [`ProtocolError`] when the operation takes none.
    pub fn file_end(&mut self, id: u64) -> Result<Vec<u8>, ProtocolError> {
        match self.file_mut(id).and_then(|file| file.to_guest.take()) {
            Some(_) => self.wire(&HostMessage::FileEnd { id }),
            None => Err(self.unexpected("end of file data")),
        }
    }

    /// Notes that `bytes` of the data were passed on; gives the grant to write, if it is time for one.
    ///
    /// # Errors
    /// [`ProtocolError`] when the grant cannot be encoded, which no state leads to.
    pub fn file_consumed(
        &mut self,
        id: u64,
        bytes: usize,
    ) -> Result<Option<Vec<u8>>, ProtocolError> {
        let Some(file) = self.file_mut(id) else {
            return Ok(None);
        };
        match file.from_guest.consume(bytes) {
            Some(bytes) => self.wire(&HostMessage::FileCredit { id, bytes }).map(Some),
            None => Ok(None),
        }
    }

    fn open(
        &mut self,
        stream: Stream,
        message: impl FnOnce(u64) -> HostMessage,
    ) -> Result<(u64, Vec<u8>), ProtocolError> {
        if !self.is_open() || self.streams.len() >= MAX_STREAMS {
            return Err(self.unexpected("another stream"));
        }
        let id = self.last_id + 1;
        let wire = self.wire(&message(id))?;
        self.last_id = id;
        self.streams.insert(id, stream);
        Ok((id, wire))
    }

    fn running(&self, id: u64) -> Option<&Running> {
        match self.streams.get(&id)? {
            Stream::Running(running) => Some(running),
            Stream::Asked { .. }
            | Stream::Accepted { .. }
            | Stream::Going { .. }
            | Stream::Attaching
            | Stream::File(_) => None,
        }
    }

    fn running_mut(&mut self, id: u64) -> Option<&mut Running> {
        match self.streams.get_mut(&id)? {
            Stream::Running(running) => Some(running),
            Stream::Asked { .. }
            | Stream::Accepted { .. }
            | Stream::Going { .. }
            | Stream::Attaching
            | Stream::File(_) => None,
        }
    }

    fn file_mut(&mut self, id: u64) -> Option<&mut File> {
        match self.streams.get_mut(&id)? {
            Stream::File(file) => Some(file),
            Stream::Asked { .. }
            | Stream::Accepted { .. }
            | Stream::Going { .. }
            | Stream::Attaching
            | Stream::Running(_) => None,
        }
    }

    fn expect_running(
        &mut self,
        id: u64,
        message: &'static str,
    ) -> Result<&mut Running, ProtocolError> {
        let error = self.unexpected(message);
        self.running_mut(id).ok_or(error)
    }

    pub(super) fn on_accepted(&mut self, id: u64) -> Result<Option<Event>, ProtocolError> {
        let Some(Stream::Asked { takes_input }) = self.streams.get(&id) else {
            return Err(self.unexpected("accepted"));
        };
        let takes_input = *takes_input;
        self.streams.insert(id, Stream::Accepted { takes_input });
        Ok(Some(Event::Accepted { id }))
    }

    pub(super) fn on_started(
        &mut self,
        id: u64,
        pid: u32,
        stdin_window_bytes: u32,
    ) -> Result<Option<Event>, ProtocolError> {
        let Some(Stream::Going { takes_input }) = self.streams.get(&id) else {
            return Err(self.unexpected("started"));
        };
        let window = takes_input.then_some(stdin_window_bytes);
        self.check_window(window)?;
        self.streams
            .insert(id, Stream::Running(Box::new(Running::new(window))));
        Ok(Some(Event::Started { id, pid }))
    }

    fn check_window(&self, window_bytes: Option<u32>) -> Result<(), ProtocolError> {
        match window_bytes {
            Some(bytes) if !(MIN_WINDOW_BYTES..=STREAM_WINDOW_BYTES).contains(&bytes) => {
                Err(self.unexpected("a window out of bounds"))
            }
            Some(_) | None => Ok(()),
        }
    }

    pub(super) fn on_rejected(
        &mut self,
        id: u64,
        reason: Rejection,
    ) -> Result<Option<Event>, ProtocolError> {
        match self.streams.remove(&id) {
            Some(
                Stream::Asked { .. } | Stream::Going { .. } | Stream::Attaching | Stream::File(_),
            ) => Ok(Some(Event::Rejected { id, reason })),
            Some(Stream::Accepted { .. } | Stream::Running(_)) | None => {
                Err(self.unexpected("rejected"))
            }
        }
    }

    pub(super) fn on_known(
        &mut self,
        id: u64,
        state: CommandState,
    ) -> Result<Option<Event>, ProtocolError> {
        match self.streams.remove(&id) {
            Some(Stream::Asked { .. } | Stream::Going { .. }) => {
                Ok(Some(Event::Known { id, state }))
            }
            Some(
                Stream::Accepted { .. } | Stream::Attaching | Stream::Running(_) | Stream::File(_),
            )
            | None => Err(self.unexpected("known")),
        }
    }

    pub(super) fn on_attached(
        &mut self,
        id: u64,
        at: Attachment,
    ) -> Result<Option<Event>, ProtocolError> {
        if self.streams.get(&id) != Some(&Stream::Attaching) {
            return Err(self.unexpected("attached"));
        }
        let window = at.stdin.map(|stdin| stdin.window_bytes);
        self.check_window(window)?;
        self.streams
            .insert(id, Stream::Running(Box::new(Running::new(window))));
        Ok(Some(Event::Attached { id, at }))
    }

    pub(super) fn on_detached(
        &mut self,
        id: u64,
        reason: String,
    ) -> Result<Option<Event>, ProtocolError> {
        match self.streams.remove(&id) {
            Some(_) => Ok(Some(Event::Detached { id, reason })),
            None => Err(self.unexpected("detached")),
        }
    }

    pub(super) fn on_output(
        &mut self,
        id: u64,
        stream: OutputStream,
        data: Vec<u8>,
    ) -> Result<Option<Event>, ProtocolError> {
        let running = self.expect_running(id, "output")?;
        running.outputs[stream.place()].receive(data.len())?;
        Ok(Some(Event::Output { id, stream, data }))
    }

    pub(super) fn on_stdin_credit(
        &mut self,
        id: u64,
        bytes: u32,
    ) -> Result<Option<Event>, ProtocolError> {
        let running = self.expect_running(id, "stdin credit")?;
        let taken = grant(&mut running.stdin, &mut running.late_grants, bytes)?;
        match taken {
            Some(true) => Ok(Some(Event::StdinCredit { id })),
            Some(false) => Ok(None),
            None => Err(self.unexpected("a flood of stdin credit")),
        }
    }

    pub(super) fn on_stdin_closed(&mut self, id: u64) -> Result<Option<Event>, ProtocolError> {
        self.expect_running(id, "stdin closed")?.stdin = None;
        Ok(Some(Event::StdinClosed { id }))
    }

    pub(super) fn on_exit(
        &mut self,
        id: u64,
        status: ExitStatus,
    ) -> Result<Option<Event>, ProtocolError> {
        self.expect_running(id, "exit")?;
        self.streams.remove(&id);
        Ok(Some(Event::Exit { id, status }))
    }

    pub(super) fn on_file(
        &mut self,
        id: u64,
        reply: Vec<u8>,
        last: bool,
    ) -> Result<Option<Event>, ProtocolError> {
        if self.file_mut(id).is_none() {
            return Err(self.unexpected("file reply"));
        }
        if last {
            self.streams.remove(&id);
        }
        Ok(Some(Event::File { id, reply, last }))
    }

    pub(super) fn on_file_data(
        &mut self,
        id: u64,
        data: Vec<u8>,
    ) -> Result<Option<Event>, ProtocolError> {
        let Some(file) = self.file_mut(id) else {
            return Err(self.unexpected("file data"));
        };
        file.from_guest.receive(data.len())?;
        Ok(Some(Event::FileData { id, data }))
    }

    pub(super) fn on_file_credit(
        &mut self,
        id: u64,
        bytes: u32,
    ) -> Result<Option<Event>, ProtocolError> {
        let Some(file) = self.file_mut(id) else {
            return Err(self.unexpected("file credit"));
        };
        match grant(&mut file.to_guest, &mut file.late_grants, bytes)? {
            Some(true) => Ok(Some(Event::FileCredit { id })),
            Some(false) => Ok(None),
            None => Err(self.unexpected("a flood of file credit")),
        }
    }
}

/// Takes a grant; whether there is anything to send with it, or nothing when there are too many for a stream that has ended:
/// those that were given before the guest had seen the end are a window's worth at most.
fn grant(
    window: &mut Option<SendWindow>,
    late_grants: &mut u32,
    bytes: u32,
) -> Result<Option<bool>, ProtocolError> {
    if let Some(window) = window {
        window.grant(bytes)?;
        return Ok(Some(true));
    }
    *late_grants = late_grants.saturating_add(bytes.max(1));
    Ok((*late_grants <= STREAM_WINDOW_BYTES).then_some(false))
}
