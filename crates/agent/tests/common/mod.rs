//! The real agent on this machine, over a socket, touching nothing of the machine.
#![allow(
    dead_code,
    clippy::wildcard_enum_match_arm,
    reason = "each test file uses a part; a test may stop at the first surprise"
)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stead_agent_link::{AgentLink, Epoch, ExecRequest, Greeting, Identity, Reason};
use stead_agent_proto::frame::{Decoder, Direction, Item};
use stead_agent_proto::message::{GuestMessage, Hello, HostMessage, Message, Request, Seed, Setup};
use stead_agent_proto::{ExecKey, Frame, Nonce};

pub const LIMIT: Duration = Duration::from_secs(120);

/// An agent that ends with the test.
pub struct Agent {
    child: Child,
    pub socket: PathBuf,
    pub folder: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Self {
        Self::start_with(&["--no-clock", "--no-entropy", "--no-hostname"])
    }

    pub fn start_with(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let socket = folder.path().join("agent");
        let child = Command::new(env!("CARGO_BIN_EXE_stead-agent"))
            .arg("serve")
            .arg("--socket")
            .arg(&socket)
            .args(options)
            .stdin(Stdio::null())
            .spawn()
            .expect("start the agent");
        let agent = Self {
            child,
            socket,
            folder,
        };
        let end = Instant::now() + LIMIT;
        while UnixStream::connect(&agent.socket).is_err() {
            assert!(Instant::now() < end, "the agent does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub async fn link(&self) -> AgentLink {
        AgentLink::connect(&self.socket).await.expect("connect")
    }

    pub async fn ready(&self, life: u8) -> AgentLink {
        let mut link = self.link().await;
        link.handshake(&greeting(life), LIMIT)
            .await
            .expect("handshake");
        link.release().await.expect("release");
        link
    }

    pub async fn attached(&self, life: u8) -> AgentLink {
        let mut link = self.link().await;
        link.reattach(Epoch([life; 16]), LIMIT)
            .await
            .expect("attach");
        link
    }

    /// The agent's resident memory now, in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("status");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .expect("VmRSS");
        line.split_ascii_whitespace()
            .nth(1)
            .expect("number")
            .parse()
            .expect("number")
    }

    /// How many descriptors the agent has open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("fd")
            .count()
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub fn greeting(life: u8) -> Greeting {
    Greeting {
        epoch: Epoch([life; 16]),
        reason: Reason::Restore,
        identity: Identity::Keep,
    }
}

pub fn sh(script: &str) -> ExecRequest {
    ExecRequest {
        argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
        ..ExecRequest::default()
    }
}

/// Waits for what another process does.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < end, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn read_number(path: &Path) -> Option<i32> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A process that has ended or is a zombie.
pub fn has_ended(pid: i32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat
            .rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')),
        Err(_) => true,
    }
}

/// A host that says what it likes, frame by frame.
pub struct RawHost {
    pub stream: UnixStream,
    decoder: Decoder,
    pending: Vec<u8>,
    pub epoch: Epoch,
    pub nonce: Nonce,
    pub seq: u64,
}

impl RawHost {
    pub fn connect(agent: &Agent, life: u8, nonce: u64) -> Self {
        let stream = UnixStream::connect(&agent.socket).expect("connect");
        stream.set_read_timeout(Some(LIMIT)).expect("time-out");
        Self {
            stream,
            decoder: Decoder::new(),
            pending: Vec::new(),
            epoch: Epoch([life; 16]),
            nonce: Nonce(nonce),
            seq: 0,
        }
    }

    pub fn frame(&mut self, message: &HostMessage) -> Vec<u8> {
        let frame = Frame {
            direction: Direction::ToGuest,
            kind: message.kind(),
            seq: self.seq,
            epoch: self.epoch,
            nonce: self.nonce,
            payload: message.to_payload().expect("fits"),
        };
        self.seq += 1;
        frame.encode().expect("fits")
    }

    pub fn send(&mut self, message: &HostMessage) {
        let wire = self.frame(message);
        self.stream.write_all(&wire).expect("send");
    }

    /// A whole handshake; gives the last answer.
    pub fn greet(&mut self, reason: Reason) -> GuestMessage {
        self.seq = 0;
        self.send(&HostMessage::Hello(Hello { reason }));
        let setup = HostMessage::Setup(Setup {
            wall_clock_ns: 1,
            seed: Seed([3; 64]),
            identity: Identity::Keep,
        });
        loop {
            match self.next().expect("an answer") {
                GuestMessage::Hail(_) => self.send(&setup),
                answer @ (GuestMessage::Ready(_) | GuestMessage::Failed(_)) => return answer,
                _of_an_earlier_session => {}
            }
        }
    }

    /// A whole handshake and its release, with the number 1.
    pub fn ready(&mut self, reason: Reason) {
        let answer = self.greet(reason);
        assert!(matches!(answer, GuestMessage::Ready(_)), "{answer:?}");
        let request = Request::Release;
        self.send(&HostMessage::Request { id: 1, request });
        let answer = self.next();
        assert!(
            matches!(answer, Some(GuestMessage::Done { .. })),
            "{answer:?}"
        );
    }

    /// The next message of any session; nothing at the end of the connection.
    pub fn next(&mut self) -> Option<GuestMessage> {
        loop {
            let mut input = &self.pending[..];
            let item = self.decoder.next_item(&mut input);
            let taken = self.pending.len() - input.len();
            self.pending.drain(..taken);
            match item {
                Some(Item::Frame(frame)) => {
                    return Some(GuestMessage::from_frame(&frame).expect("a message"));
                }
                Some(Item::Garbage { .. }) => continue,
                None => {}
            }
            let mut buffer = [0; 65536];
            match self.stream.read(&mut buffer).expect("an answer in time") {
                0 => return None,
                count => self.pending.extend_from_slice(&buffer[..count]),
            }
        }
    }

    /// Asks for a command and says go, without waiting for either answer.
    pub fn exec(&mut self, id: u64, request: ExecRequest) {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&self.nonce.0.to_le_bytes());
        key[8..].copy_from_slice(&id.to_le_bytes());
        self.send(&HostMessage::Exec {
            id,
            key: ExecKey(key),
            again: None,
            request,
        });
        self.send(&HostMessage::Go { id });
    }
}
