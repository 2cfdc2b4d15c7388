//! A connection to one port, its session, and everything but commands.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use stead_agent_proto::frame::Item;
use stead_agent_proto::host::{Discarded, Event, Session};
use stead_agent_proto::message::{
    Done, Hello, Ready, Reason, Request, Seed, Setup, ShutdownKind, Status,
};
use stead_agent_proto::{Epoch, Nonce, ProtocolError};

use crate::error::{LinkError, Stage};
use crate::wire::Wire;

/// After this much silence the agent is asked whether it is there.
const PING_AFTER: Duration = Duration::from_secs(5);
/// How long the agent may leave that unanswered, unless set otherwise.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// How long a request may take, unless set otherwise.
const REQUEST_LIMIT: Duration = Duration::from_secs(120);
/// How long a connection is tried while others wait at the socket, and how often; a handshake's own limit bounds it
/// too. QEMU lets nobody in while it is held up, as by a capture.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
const CONNECT_PAUSE: Duration = Duration::from_millis(1);
/// A hello without an answer is sent anew over another connection, first after this time and then after twice as long
/// each time: an agent that was restarted has lost what was sent before, and a port may be held back.
const FIRST_HELLO_AGAIN: Duration = Duration::from_millis(500);
/// And never less often than this: an agent may come up late.
const LAST_HELLO_AGAIN: Duration = Duration::from_secs(16);
/// A setup without an answer sends the whole exchange back to its hello after this time or the hello's, whichever is
/// longer: the agent may have been restarted, or have seen the end of an earlier connection only after the hello.
const FIRST_SETUP_AGAIN: Duration = Duration::from_secs(5);

/// What a handshake says to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// 128 random bits, drawn anew for every boot, restore, fork and wake.
    pub epoch: Epoch,
    /// What has happened to the VM. [`Reason::Reattach`] is what [`AgentLink::attach`] says.
    pub reason: Reason,
    /// A new name for the guest.
    pub hostname: Option<String>,
}

/// What a freeze has frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frozen {
    /// Where the frozen file systems are mounted in the guest.
    pub mounts: Vec<Vec<u8>>,
    /// Where writable file systems are mounted that cannot be frozen; they were written out once.
    pub unsupported: Vec<Vec<u8>>,
}

/// A connection to one port of a VM's agent.
#[derive(Debug)]
pub struct AgentLink {
    pub(crate) wire: Wire,
    // Where to connect again, when it is known.
    socket: Option<PathBuf>,
    pub(crate) session: Option<Session>,
    // What came before the answer to earlier hellos of the same handshake.
    earlier: Discarded,
    // An operation is under way, or was dropped or failed in its middle.
    pub(crate) abandoned: bool,
    pub(crate) silence_limit: Duration,
    request_limit: Duration,
}

impl AgentLink {
    /// Connects to the socket of a port. QEMU accepts one connection to a port at a time: a second one waits
    /// unanswered until the first has ended, and its handshake is late. When too many wait at the socket, it is tried for
    /// 60 s.
    ///
    /// It connects, disconnects and connects again. A port that was full when the machine was captured, and had no
    /// connection while the state was loaded, is held back by QEMU until a connection *ends* while the vCPUs run: what
    /// the guest writes to it would never come, whoever connects.
    ///
    /// # Errors
    /// [`LinkError::Connect`] when there is no such socket or nobody listens.
    pub async fn connect(socket: &Path) -> Result<Self, LinkError> {
        let end = Instant::now() + CONNECT_LIMIT;
        drop(connect_once(socket, end).await?);
        let mut link = Self::from_stream(connect_once(socket, end).await?);
        link.socket = Some(socket.to_owned());
        Ok(link)
    }

    /// A link over a connection that exists already.
    #[must_use]
    pub fn from_stream(stream: UnixStream) -> Self {
        Self {
            wire: Wire::new(stream),
            socket: None,
            session: None,
            earlier: Discarded::default(),
            abandoned: false,
            silence_limit: SILENCE_LIMIT,
            request_limit: REQUEST_LIMIT,
        }
    }

    /// Sets how long the agent may leave a ping unanswered while a command or request is under way; 30 s at first. It
    /// is pinged when it has been silent for 5 s or a third of the limit, and never given up without having been asked. A VM
    /// that may be captured meanwhile is silent for as long as it stands still.
    pub fn set_silence_limit(&mut self, limit: Duration) {
        self.silence_limit = limit;
    }

    /// Sets how long a request may take; 120 s at first.
    pub fn set_request_limit(&mut self, limit: Duration) {
        self.request_limit = limit;
    }

    /// Begins a new life of the VM. Call it when the vCPUs run, or are about to: it makes its connection anew, which lets go
    /// of a port that QEMU holds back, but only while they run.
    ///
    /// The guest drops all sessions of earlier ones, thaws, sets its clock and reseeds its
    /// random number generator. When this returns, all that was done, and commands are accepted.
    ///
    /// # Errors
    /// [`LinkError::StepFailed`] when the guest could not do a step, [`LinkError::Late`] when no answer came within
    /// `limit`, [`LinkError::Disconnected`] when the connection ended.
    pub async fn handshake(
        &mut self,
        greeting: &Greeting,
        limit: Duration,
    ) -> Result<Ready, LinkError> {
        self.greet(
            greeting.epoch,
            greeting.reason,
            greeting.hostname.as_deref(),
            limit,
        )
        .await
    }

    /// Begins another session in the life that has `epoch`; neither clock nor randomness changes.
    ///
    /// # Errors
    /// As [`AgentLink::handshake`]; [`LinkError::StepFailed`] with [`stead_agent_proto::message::Phase::Epoch`] when the
    /// guest lives another life.
    pub async fn attach(&mut self, epoch: Epoch, limit: Duration) -> Result<Ready, LinkError> {
        self.greet(epoch, Reason::Reattach, None, limit).await
    }

    /// The epoch of the session.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        self.session.as_ref().map(Session::epoch)
    }

    /// What was discarded in this session: stale frames and bytes that are no frame.
    #[must_use]
    pub fn discarded(&self) -> Discarded {
        let own = self
            .session
            .as_ref()
            .map(Session::discarded)
            .unwrap_or_default();
        Discarded {
            stale_frames: self.earlier.stale_frames.saturating_add(own.stale_frames),
            garbage_bytes: self.earlier.garbage_bytes.saturating_add(own.garbage_bytes),
            last_fault: own.last_fault.or(self.earlier.last_fault),
        }
    }

    /// Freezes every writable file system on a block device. The agent thaws by itself after `limit` (60 s at most), when
    /// this link ends, and when another epoch begins.
    ///
    /// # Errors
    /// [`LinkError::RequestFailed`] when one could not be frozen; those that were are thawed again.
    pub async fn freeze(&mut self, limit: Duration) -> Result<Frozen, LinkError> {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let plain = |list: Vec<stead_agent_proto::message::Bytes>| {
            list.into_iter().map(|bytes| bytes.0).collect()
        };
        match self.request(Request::Freeze { limit_ms }, "freeze").await? {
            Done::Frozen {
                mounts,
                unsupported,
            } => Ok(Frozen {
                mounts: plain(mounts),
                unsupported: plain(unsupported),
            }),
            other @ (Done::Ok | Done::Status(_) | Done::Failed(_)) => {
                Err(unfulfilled("freeze", other))
            }
        }
    }

    /// Thaws what was frozen.
    ///
    /// # Errors
    /// [`LinkError::RequestFailed`] also when nothing was frozen any more, and why: what was captured meanwhile is
    /// then not consistent.
    pub async fn thaw(&mut self) -> Result<(), LinkError> {
        self.simple(Request::Thaw, "thaw").await
    }

    /// Has the guest write all that is dirty.
    ///
    /// # Errors
    /// [`LinkError`] when the guest does not say that it did.
    pub async fn sync(&mut self) -> Result<(), LinkError> {
        self.simple(Request::Sync, "sync").await
    }

    /// Has the guest write all that is dirty and drop its clean caches, so that the next read comes from the disk.
    ///
    /// # Errors
    /// [`LinkError`] when the guest does not say that it did.
    pub async fn drop_caches(&mut self) -> Result<(), LinkError> {
        self.simple(Request::DropCaches, "drop caches").await
    }

    /// Asks the agent how it is.
    ///
    /// # Errors
    /// [`LinkError`] when it does not say.
    pub async fn ping(&mut self) -> Result<Status, LinkError> {
        let stage = Stage::Request("ping");
        let session = self.begin(stage)?;
        let frame = session
            .ping()
            .map_err(|source| LinkError::Unsendable { stage, source })?;
        self.wire.outgoing.put(frame);
        let end = Instant::now() + self.request_limit.min(self.silence_limit);
        loop {
            if let Event::Pong(status) = self.next_event(stage, end).await? {
                self.abandoned = false;
                return Ok(status);
            }
        }
    }

    /// Shuts the guest down; returns when it has agreed. QEMU's own end (or reset) shows when it is done.
    ///
    /// # Errors
    /// [`LinkError`] when the guest does not agree.
    pub async fn shutdown(&mut self, kind: ShutdownKind) -> Result<(), LinkError> {
        self.simple(Request::Shutdown(kind), "shutdown").await
    }

    async fn simple(&mut self, request: Request, name: &'static str) -> Result<(), LinkError> {
        match self.request(request, name).await? {
            Done::Ok => Ok(()),
            other @ (Done::Frozen { .. } | Done::Status(_) | Done::Failed(_)) => {
                Err(unfulfilled(name, other))
            }
        }
    }

    async fn request(&mut self, request: Request, name: &'static str) -> Result<Done, LinkError> {
        match self.request_once(request.clone(), name).await {
            Err(error) => {
                self.replace_lost_session(error).await?;
                self.request_once(request, name).await
            }
            done => done,
        }
    }

    async fn request_once(
        &mut self,
        request: Request,
        name: &'static str,
    ) -> Result<Done, LinkError> {
        let stage = Stage::Request(name);
        let session = self.begin(stage)?;
        let frame = session
            .request(request)
            .map_err(|source| LinkError::Unsendable { stage, source })?;
        self.wire.outgoing.put(frame);
        let end = Instant::now() + self.request_limit;
        loop {
            if let Event::Done(outcome) = self.next_event(stage, end).await? {
                self.abandoned = false;
                return Ok(outcome);
            }
        }
    }

    /// Marks an operation as begun; it unmarks itself when it has come to its end.
    pub(crate) fn begin(&mut self, stage: Stage) -> Result<&mut Session, LinkError> {
        let Some(session) = &mut self.session else {
            let source = ProtocolError::Unexpected {
                message: "anything but a handshake",
                state: "not begun",
            };
            return Err(LinkError::Unsendable { stage, source });
        };
        if self.abandoned || !session.is_idle() {
            let state = session.state_name();
            return Err(LinkError::Abandoned { state });
        }
        self.abandoned = true;
        Ok(session)
    }

    /// The next thing that the guest says. Pings it when it is silent, and gives up on it when it stays so or at `end`.
    /// What has come is taken before the clock is looked at: this process may have been the one that stood still.
    pub(crate) async fn next_event(
        &mut self,
        stage: Stage,
        end: Instant,
    ) -> Result<Event, LinkError> {
        let begin = Instant::now();
        let mut silence = Silence::new(self.silence_limit);
        loop {
            let item = tokio::select! {
                biased;
                item = self.wire.next_item() => Some(item),
                () = sleep_until(silence.wake_at().min(end)) => None,
            };
            if let Some(item) = item
                && let Some(event) = self.take(item, stage)?
            {
                return Ok(event);
            }
            if Instant::now() >= end {
                return Err(self.late(stage, end - begin));
            }
            self.look_at(&mut silence, stage)?;
        }
    }

    /// Pings the agent when it has been silent for long, and gives up on it when that was not answered.
    pub(crate) fn look_at(&mut self, silence: &mut Silence, stage: Stage) -> Result<(), LinkError> {
        match silence.at(Instant::now()) {
            Quiet::Short => Ok(()),
            Quiet::Long => self.put_ping(stage),
            Quiet::TooLong => Err(self.late(stage, silence.limit)),
        }
    }

    /// Asks the agent whether it is there, unless it has been asked already.
    pub(crate) fn put_ping(&mut self, stage: Stage) -> Result<(), LinkError> {
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        if session.unanswered_pings() == 0 {
            let frame = session
                .ping()
                .map_err(|source| LinkError::Unsendable { stage, source })?;
            self.wire.outgoing.put(frame);
        }
        Ok(())
    }

    pub(crate) fn take(
        &mut self,
        item: io::Result<Option<Item>>,
        stage: Stage,
    ) -> Result<Option<Event>, LinkError> {
        let item = match item {
            Ok(Some(item)) => item,
            Ok(None) => {
                return Err(LinkError::Disconnected {
                    stage,
                    source: None,
                });
            }
            Err(source) => {
                let source = Some(source);
                return Err(LinkError::Disconnected { stage, source });
            }
        };
        match &mut self.session {
            Some(session) => session
                .on_item(item)
                .map_err(|source| LinkError::Protocol { stage, source }),
            None => Ok(None),
        }
    }

    pub(crate) fn late(&self, stage: Stage, limit: Duration) -> LinkError {
        LinkError::Late {
            stage,
            limit,
            discarded: self.discarded(),
        }
    }

    async fn greet(
        &mut self,
        epoch: Epoch,
        reason: Reason,
        hostname: Option<&str>,
        limit: Duration,
    ) -> Result<Ready, LinkError> {
        (self.session, self.earlier) = (None, Discarded::default());
        let end = Instant::now() + limit;
        let late = |link: &Self| link.late(Stage::Handshake, limit);
        let mut patience = FIRST_HELLO_AGAIN;
        if reason != Reason::Reattach {
            self.reconnect(end).await?;
        }
        loop {
            self.put_hello(epoch, reason)?;
            match self.exchange(hostname, patience, end).await? {
                Some(answer) => return self.finish_greeting(answer),
                None if Instant::now() >= end => return Err(late(self)),
                None => patience = patience.saturating_mul(2),
            }
            self.reconnect(end).await?;
        }
    }

    /// The last answer after a hello; nothing when one of them did not come in time.
    async fn exchange(
        &mut self,
        hostname: Option<&str>,
        patience: Duration,
        end: Instant,
    ) -> Result<Option<Event>, LinkError> {
        match self
            .greeting_within(patience.min(LAST_HELLO_AGAIN), end)
            .await?
        {
            Some(Event::Hail(_)) => {
                self.put_setup(hostname)?;
                let patience = patience.max(FIRST_SETUP_AGAIN);
                self.greeting_within(patience, end).await
            }
            answer => Ok(answer),
        }
    }

    async fn greeting_within(
        &mut self,
        patience: Duration,
        end: Instant,
    ) -> Result<Option<Event>, LinkError> {
        let left = end.saturating_duration_since(Instant::now());
        match timeout(patience.min(left), self.next_greeting()).await {
            Ok(answer) => answer.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Makes another session of the same life when the agent has lost this one and said so to what was asked, of which it
    /// has done nothing then. While a ping is unanswered, it may have been said to that one: the request may have been carried
    /// out before. Gives the error back when it is not so.
    pub(crate) async fn replace_lost_session(&mut self, error: LinkError) -> Result<(), LinkError> {
        let lost = matches!(
            error,
            LinkError::Protocol {
                source: ProtocolError::SessionLost(_),
                ..
            }
        );
        let certainly = lost && self.has_answered_pings();
        match self.epoch().filter(|_| certainly) {
            Some(epoch) => self.attach(epoch, self.silence_limit).await.map(drop),
            None => Err(error),
        }
    }

    /// Ends the connection and makes another: a port that QEMU holds back is let go, and nothing half-written is
    /// left. A link over a given connection keeps it.
    async fn reconnect(&mut self, end: Instant) -> Result<(), LinkError> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        // The old connection ends before the new one is made: QEMU serves one at a time.
        let (placeholder, _) = UnixStream::pair().map_err(|source| LinkError::Host {
            attempted: "make a socket pair",
            source,
        })?;
        self.wire = Wire::new(placeholder);
        self.wire = Wire::new(connect_once(socket, end).await?);
        Ok(())
    }

    fn finish_greeting(&mut self, answer: Event) -> Result<Ready, LinkError> {
        match answer {
            Event::Ready(ready) => {
                self.abandoned = false;
                Ok(ready)
            }
            Event::Failed(failed) => Err(LinkError::StepFailed {
                phase: failed.phase,
                error: failed.error,
            }),
            Event::Hail(_)
            | Event::Accepted
            | Event::Rejected(_)
            | Event::Output { .. }
            | Event::StdinCredit
            | Event::StdinClosed
            | Event::Exit(_)
            | Event::Done(_)
            | Event::Pong(_) => unreachable!("a session that greets gives nothing else"),
        }
    }

    fn put_hello(&mut self, epoch: Epoch, reason: Reason) -> Result<(), LinkError> {
        let stage = Stage::Handshake;
        let mut session = Session::new(epoch, Nonce(random("draw a nonce", u64::from_ne_bytes)?));
        let frame = session
            .hello(Hello { reason })
            .map_err(|source| LinkError::Unsendable { stage, source })?;
        self.wire.outgoing.put(frame);
        self.earlier = self.discarded();
        self.session = Some(session);
        self.abandoned = true;
        Ok(())
    }

    fn put_setup(&mut self, hostname: Option<&str>) -> Result<(), LinkError> {
        let stage = Stage::Handshake;
        let setup = Setup {
            wall_clock_ns: wall_clock_ns()?,
            seed: Seed(random("draw a seed", |bytes: [u8; 64]| bytes)?),
            hostname: hostname.map(str::to_owned),
        };
        if let Some(session) = &mut self.session {
            let frame = session
                .setup(setup)
                .map_err(|source| LinkError::Unsendable { stage, source })?;
            self.wire.outgoing.put(frame);
        }
        Ok(())
    }

    /// The next answer to the hello or the setup.
    async fn next_greeting(&mut self) -> Result<Event, LinkError> {
        loop {
            let item = self.wire.next_item().await;
            if let Some(event) = self.take(item, Stage::Handshake)? {
                return Ok(event);
            }
            // A guest that sends without end must not keep the time-out from being looked at.
            tokio::task::consume_budget().await;
        }
    }
}

/// For how long the agent has said nothing, and since when it has been asked whether it is there.
#[derive(Debug)]
pub(crate) struct Silence {
    limit: Duration,
    heard: Instant,
    asked: Option<Instant>,
}

/// What a silence comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quiet {
    /// Nothing yet.
    Short,
    /// The agent is to be asked now.
    Long,
    /// It was asked, and has not answered.
    TooLong,
}

impl Silence {
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit,
            heard: Instant::now(),
            asked: None,
        }
    }

    /// Notes that the agent has said something.
    pub(crate) fn end(&mut self) {
        (self.heard, self.asked) = (Instant::now(), None);
    }

    /// When to look again.
    pub(crate) fn wake_at(&self) -> Instant {
        match self.asked {
            Some(asked) => asked + self.limit,
            None => self.heard + PING_AFTER.min(self.limit / 3),
        }
    }

    fn at(&mut self, now: Instant) -> Quiet {
        if now < self.wake_at() {
            return Quiet::Short;
        }
        match self.asked {
            Some(_) => Quiet::TooLong,
            None => {
                self.asked = Some(now);
                Quiet::Long
            }
        }
    }
}

async fn connect_once(socket: &Path, end: Instant) -> Result<UnixStream, LinkError> {
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            // As many wait at the socket as can; there is no event for "one less waits".
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                sleep(CONNECT_PAUSE).await;
            }
            Err(source) => {
                let socket = socket.to_owned();
                return Err(LinkError::Connect { socket, source });
            }
        }
    }
}

fn unfulfilled(request: &'static str, outcome: Done) -> LinkError {
    let error = match outcome {
        Done::Failed(error) => error,
        Done::Ok | Done::Frozen { .. } | Done::Status(_) => {
            "an answer to another request".to_owned()
        }
    };
    LinkError::RequestFailed { request, error }
}

fn random<const N: usize, T>(
    attempted: &'static str,
    make: impl FnOnce([u8; N]) -> T,
) -> Result<T, LinkError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| LinkError::Host {
        attempted,
        source: error.into(),
    })?;
    Ok(make(bytes))
}

fn wall_clock_ns() -> Result<u64, LinkError> {
    let attempted = "read the clock";
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|error| LinkError::Host {
            attempted,
            source: io::Error::other(error),
        })?;
    u64::try_from(since.as_nanos()).map_err(|error| LinkError::Host {
        attempted,
        source: io::Error::other(error),
    })
}
