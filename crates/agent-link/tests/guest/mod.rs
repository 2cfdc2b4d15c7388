//! A guest that says what the test likes.
#![allow(dead_code, reason = "each test file uses a part of this")]

use std::time::Duration;

use stead_agent_link::{AgentLink, Epoch, ExecRequest, Greeting, Reason};
use stead_agent_proto::frame::{Decoder, Direction, Item};
use stead_agent_proto::message::*;
use stead_agent_proto::{Frame, Nonce};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// For what must come to its end, however slow the machine is.
pub const LIMIT: Duration = Duration::from_secs(120);
/// For tests of silence only.
pub const SHORT: Duration = Duration::from_millis(300);

pub fn greeting() -> Greeting {
    Greeting {
        epoch: Epoch([1; 16]),
        reason: Reason::Restore,
        identity: Identity::Keep,
    }
}

pub fn request() -> ExecRequest {
    ExecRequest {
        argv: vec!["x".into()],
        ..ExecRequest::default()
    }
}

/// A guest that says what the test likes.
pub struct Guest {
    pub stream: UnixStream,
    pub decoder: Decoder,
    pub pending: Vec<u8>,
    pub nonce: Nonce,
    pub seq: u64,
}

impl Guest {
    /// A host that is patient.
    pub fn pair() -> (AgentLink, Self) {
        Self::pair_within(LIMIT)
    }

    pub fn pair_within(limit: Duration) -> (AgentLink, Self) {
        let (host, guest) = UnixStream::pair().unwrap();
        let mut link = AgentLink::from_stream(host);
        link.set_silence_limit(limit);
        link.set_request_limit(limit);
        (link, Self::on(guest))
    }

    pub fn on(stream: UnixStream) -> Self {
        Self {
            stream,
            decoder: Decoder::new(),
            pending: Vec::new(),
            nonce: Nonce(0),
            seq: 0,
        }
    }

    /// The number of the next request, which must be a ping.
    pub async fn pinged(&mut self) -> u64 {
        match self.next().await {
            Some((
                _,
                HostMessage::Request {
                    id,
                    request: Request::Ping,
                },
            )) => id,
            other => panic!("a ping is due: {other:?}"),
        }
    }

    pub async fn answer_ping(&mut self, id: u64) {
        let outcome = Done::Status(Box::new(Status {
            epoch: Epoch([1; 16]),
            agent_version: "t".into(),
            released: true,
            workload: WorkloadState::Running,
            resident_kib: 1,
            attached_commands: 1,
            detached_commands: 0,
            frozen: false,
            stale_frames: 0,
            garbage_bytes: 0,
        }));
        self.send(&GuestMessage::Done { id, outcome }).await;
    }

    pub async fn pong(&mut self) {
        let id = self.pinged().await;
        self.answer_ping(id).await;
    }

    /// The first command, from its request to its start.
    pub async fn start(&mut self) {
        let asked = self.next().await.unwrap().1;
        let HostMessage::Exec { id, .. } = asked else {
            panic!("a command is due: {asked:?}");
        };
        self.send(&GuestMessage::Accepted { id }).await;
        let told = self.next().await.unwrap().1;
        assert_eq!(told, HostMessage::Go { id });
        self.send(&started(id)).await;
    }

    pub async fn next(&mut self) -> Option<(Nonce, HostMessage)> {
        loop {
            let mut input = &self.pending[..];
            let item = self.decoder.next_item(&mut input);
            let taken = self.pending.len() - input.len();
            self.pending.drain(..taken);
            if let Some(Item::Frame(frame)) = item {
                return Some((frame.nonce, HostMessage::from_frame(&frame).unwrap()));
            }
            let mut buffer = [0; 65536];
            match self.stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.pending.extend_from_slice(&buffer[..count]),
            }
        }
    }

    pub fn frame(&mut self, message: &GuestMessage) -> Vec<u8> {
        let wire = self.frame_numbered(message);
        self.seq += 1;
        wire
    }

    pub fn frame_numbered(&self, message: &GuestMessage) -> Vec<u8> {
        let frame = Frame {
            direction: Direction::ToHost,
            kind: message.kind(),
            seq: self.seq,
            epoch: Epoch([1; 16]),
            nonce: self.nonce,
            payload: message.to_payload().unwrap(),
        };
        frame.encode().unwrap()
    }

    /// Whether the host still listens.
    pub async fn send(&mut self, message: &GuestMessage) -> bool {
        let wire = self.frame(message);
        self.stream.write_all(&wire).await.is_ok()
    }

    /// A whole handshake, from whichever hello is the newest.
    pub async fn greet(&mut self) {
        loop {
            let (nonce, message) = self.next().await.expect("the host goes on");
            match message {
                HostMessage::Hello(_) => self.hail(nonce).await,
                HostMessage::Setup(_) if nonce == self.nonce => break,
                _of_an_earlier_hello => {}
            }
        }
        self.send(&ready()).await;
    }

    pub async fn hail(&mut self, nonce: Nonce) {
        (self.nonce, self.seq) = (nonce, 0);
        let agent_version = "t".into();
        self.send(&GuestMessage::Hail(Hail { agent_version })).await;
    }
}

pub fn started(id: u64) -> GuestMessage {
    GuestMessage::Started {
        id,
        pid: 7,
        stdin_window_bytes: 0,
    }
}

pub fn ready() -> GuestMessage {
    GuestMessage::Ready(Ready {
        epoch: Epoch([1; 16]),
        agent_version: "t".into(),
        boot_id: "b".into(),
        phases: vec![],
        workload: WorkloadState::Running,
        released: false,
    })
}

pub async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT * 2, work)
        .await
        .expect("never a hang")
}
