//! The host's session, told anything in any order by a guest, while its users ask for anything.

use stead_agent_proto::frame::{Decoder, Direction, Item, Kind};
use stead_agent_proto::guest::MAX_STREAMS;
use stead_agent_proto::host::{Event, MAX_REQUESTS, Session};
use stead_agent_proto::message::*;
use stead_agent_proto::{Epoch, Frame, Nonce, ProtocolError};

use super::input::Input;

const EPOCH: Epoch = Epoch([1; 16]);
const NONCE: Nonce = Nonce(1);

/// A session and what has come of it.
pub struct Driven {
    session: Session,
    decoder: Decoder,
    next: u64,
    has_ended: bool,
    /// What came and was not reported as passed on.
    outputs: Vec<(u64, OutputStream, usize)>,
    data: Vec<(u64, usize)>,
    pub acknowledged: bool,
    pub released: bool,
    pub exited: usize,
}

/// Follows a script; gives what it came to.
pub fn host(bytes: &[u8]) -> Driven {
    let mut driven = Driven {
        session: Session::new(EPOCH, NONCE),
        decoder: Decoder::new(),
        next: 0,
        has_ended: false,
        outputs: Vec::new(),
        data: Vec::new(),
        acknowledged: false,
        released: false,
        exited: 0,
    };
    let mut input = Input(bytes);
    while !input.is_over() {
        driven.follow(&mut input);
        driven.check();
    }
    driven
}

impl Driven {
    fn follow(&mut self, input: &mut Input) {
        match input.byte() % 8 {
            0..=2 => {
                let message = input.guest_message();
                if let Ok(payload) = message.to_payload() {
                    self.frame(message.kind(), payload, 0);
                }
            }
            3 => {
                let (payload, skew) = (input.bytes(), input.byte() % 3);
                self.frame(Kind::Session, payload, u64::from(skew));
            }
            4 => {
                let bytes = input.bytes();
                let mut rest = &bytes[..];
                while let Some(item) = self.decoder.next_item(&mut rest) {
                    self.item(item);
                }
            }
            _ => self.user(input),
        }
    }

    fn frame(&mut self, kind: Kind, payload: Vec<u8>, skew: u64) {
        let frame = Frame {
            direction: Direction::ToHost,
            kind,
            seq: self.next + skew,
            epoch: EPOCH,
            nonce: NONCE,
            payload,
        };
        self.next += u64::from(skew == 0);
        self.item(Item::Frame(frame));
    }

    fn item(&mut self, item: Item) {
        match self.session.on_item(item) {
            Ok(Some(Event::Ready(ready))) => {
                assert_eq!(ready.epoch, EPOCH, "no other epoch is acknowledged");
                self.acknowledged = true;
            }
            Ok(Some(Event::Exit { id, .. })) => {
                assert!(
                    !self.session.is_stream_open(id),
                    "an exit closes the stream"
                );
                self.exited += 1;
            }
            Ok(Some(Event::Output { id, stream, data })) => {
                self.outputs.push((id, stream, data.len()));
            }
            Ok(Some(Event::FileData { id, data })) => self.data.push((id, data.len())),
            Ok(Some(Event::Failed(_))) | Err(_) => self.has_ended = true,
            Ok(_) => {}
        }
    }

    /// Somebody asks for something; that it has no place is an error and nothing more.
    fn user(&mut self, input: &mut Input) {
        let (kind, id) = (input.byte() % 16, input.id());
        let asked = match kind {
            0 => self
                .session
                .hello(Hello {
                    reason: input.reason(),
                })
                .map(drop),
            1 => self.session.setup(input.setup()).map(drop),
            2 => self.session.request(input.request()).map(drop),
            3 => {
                let (key, request) = (input.key(), input.exec());
                self.session.exec(key, None, request).map(drop)
            }
            4 => self.session.go(id).map(drop),
            5 => self.session.attach(input.key(), [0, 0]).map(drop),
            6 => self.session.detach(id).map(drop),
            7 => self.stdin(id, input.size()),
            8 => self.session.stdin_end(id).map(drop),
            9 => self.session.signal(id, i32::from(input.byte())).map(drop),
            10 => self.session.resize(id, 1, 1).map(drop),
            11 => self
                .session
                .file(vec![1; input.size().min(70_000)])
                .map(drop),
            12 => self.file_data(id, input.size()),
            13 => self.session.file_end(id).map(drop),
            14 => self.outputs.pop().map_or(Ok(()), |(id, stream, bytes)| {
                self.session.output_consumed(id, stream, bytes).map(drop)
            }),
            _ => self.data.pop().map_or(Ok(()), |(id, bytes)| {
                self.session.file_consumed(id, bytes).map(drop)
            }),
        };
        assert!(
            !self.has_ended || kind > 13 || asked.is_err(),
            "what has ended sends nothing"
        );
    }

    fn stdin(&mut self, id: u64, wanted: usize) -> Result<(), ProtocolError> {
        let bytes = wanted.min(self.session.stdin_room(id).unwrap_or(1));
        if bytes == 0 {
            return Err(ProtocolError::SessionLost("nothing to send".into()));
        }
        self.session.stdin(id, &vec![1; bytes]).map(drop)
    }

    fn file_data(&mut self, id: u64, wanted: usize) -> Result<(), ProtocolError> {
        let bytes = wanted.min(self.session.file_room(id).unwrap_or(1));
        if bytes == 0 {
            return Err(ProtocolError::SessionLost("nothing to send".into()));
        }
        self.session.file_data(id, &vec![1; bytes]).map(drop)
    }

    fn check(&mut self) {
        assert!(self.session.open_streams() <= MAX_STREAMS);
        assert!(self.session.unanswered() <= MAX_REQUESTS);
        self.released |= self.session.is_released();
        assert!(
            !self.released || self.acknowledged,
            "released without an acknowledgement"
        );
        assert!(!self.has_ended || !self.session.is_open());
    }
}
