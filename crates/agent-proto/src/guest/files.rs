//! Operations on files: streams of bytes with credit, whose requests and answers are another module's.

use std::collections::VecDeque;

use super::commands::bounded;
use super::session::{Stream, unexpected};
use super::{Action, Agent, StreamKey};
use crate::ProtocolError;
use crate::flow::{MAX_CHUNK_BYTES, ReceiveWindow, STREAM_WINDOW_BYTES, SendWindow};
use crate::message::{Bytes, GuestMessage, Rejection};

/// How many operations are under way at most, over all sessions: each may keep a window of data.
const MAX_OPERATIONS: usize = 16;
/// What waits in the agent to be sent for one operation, at most.
const QUEUE_BYTES: usize = 64 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct FileStream {
    to_host: SendWindow,
    from_host: Option<ReceiveWindow>,
    queue: VecDeque<Queued>,
    queued_bytes: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Queued {
    Data(Vec<u8>),
    Reply { reply: Vec<u8>, last: bool },
}

impl FileStream {
    fn new() -> Self {
        Self {
            to_host: SendWindow::default(),
            from_host: Some(ReceiveWindow::new(STREAM_WINDOW_BYTES)),
            queue: VecDeque::new(),
            queued_bytes: 0,
        }
    }

    pub(super) fn has_message(&self) -> bool {
        match self.queue.front() {
            Some(Queued::Data(data)) => data.len() <= self.to_host.next_chunk_bytes(),
            Some(Queued::Reply { .. }) => true,
            None => false,
        }
    }

    pub(super) fn next(
        &mut self,
        stream: StreamKey,
        actions: &mut Vec<Action>,
    ) -> Option<GuestMessage> {
        if !self.has_message() {
            return None;
        }
        let id = stream.id;
        Some(match self.queue.pop_front()? {
            Queued::Data(data) => {
                if self.queued_bytes >= QUEUE_BYTES {
                    actions.push(Action::FileRoom { stream });
                }
                self.queued_bytes -= data.len();
                self.to_host.spend(data.len());
                GuestMessage::FileData {
                    id,
                    data: Bytes(data),
                }
            }
            Queued::Reply { reply, last } => GuestMessage::File {
                id,
                reply: Bytes(reply),
                last,
            },
        })
    }
}

impl Agent {
    /// How many bytes of data may be given to [`Agent::file_data`] now; nothing when the operation is given up.
    #[must_use]
    pub fn file_room(&mut self, stream: StreamKey) -> Option<usize> {
        self.file(stream)
            .map(|file| QUEUE_BYTES.saturating_sub(file.queued_bytes))
    }

    /// Data for the host, after all that was given before.
    ///
    /// # Panics
    /// When it is empty, more than a frame carries, or no room was left at all.
    pub fn file_data(&mut self, stream: StreamKey, data: Vec<u8>) -> Vec<Action> {
        assert!(
            (1..=MAX_CHUNK_BYTES).contains(&data.len()),
            "a frame carries 1 to {MAX_CHUNK_BYTES} bytes"
        );
        let Some(file) = self.file(stream) else {
            return Vec::new();
        };
        assert!(file.queued_bytes < QUEUE_BYTES, "no room was left");
        file.queued_bytes += data.len();
        file.queue.push_back(Queued::Data(data));
        vec![Action::Flush { port: stream.port }]
    }

    /// An answer of the operation, after all data that was given before; the stream is closed with the last.
    pub fn file_reply(&mut self, stream: StreamKey, reply: Vec<u8>, last: bool) -> Vec<Action> {
        let Some(file) = self.file(stream) else {
            return Vec::new();
        };
        file.queue.push_back(Queued::Reply { reply, last });
        vec![Action::Flush { port: stream.port }]
    }

    /// Says that the operation is not begun; the stream is closed.
    pub fn file_refused(&mut self, stream: StreamKey, reason: Rejection) -> Vec<Action> {
        if self.file(stream).is_none() {
            return Vec::new();
        }
        self.close_stream(stream);
        let (id, reason) = (stream.id, bounded(reason));
        self.send(stream, &GuestMessage::Rejected { id, reason })
    }

    /// Notes that `bytes` of the host's data were taken.
    pub fn file_consumed(&mut self, stream: StreamKey, bytes: usize) -> Vec<Action> {
        let window = self.file(stream).and_then(|file| file.from_host.as_mut());
        match window.and_then(|window| window.consume(bytes)) {
            Some(bytes) => self.send(
                stream,
                &GuestMessage::FileCredit {
                    id: stream.id,
                    bytes,
                },
            ),
            None => Vec::new(),
        }
    }

    fn file(&mut self, stream: StreamKey) -> Option<&mut FileStream> {
        match self
            .session(stream.port, stream.nonce)?
            .streams
            .get_mut(&stream.id)?
        {
            Stream::File(file) => Some(file),
            Stream::Noted { .. } | Stream::Command(_) => None,
        }
    }

    pub(super) fn on_file(
        &mut self,
        stream: StreamKey,
        op: Vec<u8>,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        self.take_id(stream)?;
        let refused = self
            .find_refusal(stream)
            .or_else(|| self.find_file_excess());
        if let Some(reason) = refused {
            let id = stream.id;
            self.reply(stream, GuestMessage::Rejected { id, reason }, actions);
            return Ok(());
        }
        self.open_stream(stream, Stream::File(Box::new(FileStream::new())));
        actions.push(Action::FileBegin { stream, op });
        Ok(())
    }

    /// Each operation may keep a window of data: so many may be under way at once over all sessions.
    fn find_file_excess(&self) -> Option<Rejection> {
        let open: usize = self
            .ports
            .values()
            .map(|state| match &state.port {
                super::Port::Attached(session) => {
                    let files = session.streams.values();
                    files
                        .filter(|stream| matches!(stream, Stream::File(_)))
                        .count()
                }
                super::Port::Unattached
                | super::Port::Hailed { .. }
                | super::Port::Handshaking(_) => 0,
            })
            .sum();
        (open >= MAX_OPERATIONS).then_some(Rejection::TooManyStreams {
            limit: u32::try_from(MAX_OPERATIONS).unwrap_or(u32::MAX),
        })
    }

    pub(super) fn on_file_data(
        &mut self,
        stream: StreamKey,
        data: Vec<u8>,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        let Some(file) = self.file(stream) else {
            return self.expect_past(stream, "file data");
        };
        let Some(window) = &mut file.from_host else {
            return Err(unexpected("file data", "past the end of the data"));
        };
        window.receive(data.len())?;
        actions.push(Action::FileData { stream, data });
        Ok(())
    }

    pub(super) fn on_file_end(
        &mut self,
        stream: StreamKey,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        let Some(file) = self.file(stream) else {
            return self.expect_past(stream, "end of file data");
        };
        if file.from_host.take().is_none() {
            return Err(unexpected("end of file data", "past the end of the data"));
        }
        actions.push(Action::FileEnd { stream });
        Ok(())
    }

    pub(super) fn on_file_credit(
        &mut self,
        stream: StreamKey,
        bytes: u32,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        let Some(file) = self.file(stream) else {
            return self.expect_past(stream, "file credit");
        };
        file.to_host.grant(bytes)?;
        actions.push(Action::Flush { port: stream.port });
        Ok(())
    }

    pub(super) fn on_file_cancel(
        &mut self,
        stream: StreamKey,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        if self.file(stream).is_none() {
            return self.expect_past(stream, "file cancel");
        }
        self.close_stream(stream);
        let (id, reason) = (stream.id, "as it was asked".to_owned());
        self.reply(stream, GuestMessage::Detached { id, reason }, actions);
        actions.push(Action::FileGone { stream });
        Ok(())
    }
}
