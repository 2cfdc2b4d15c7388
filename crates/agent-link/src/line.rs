//! A connection to one port, and the handshake over it.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::{Instant, sleep, timeout};

use stead_agent_proto::frame::Item;
use stead_agent_proto::host::{Discarded, Event, Session};
use stead_agent_proto::message::{Hello, Identity, Ready, Reason, Seed, Setup};
use stead_agent_proto::{Epoch, Nonce};

use crate::error::{LinkError, Stage};
use crate::transport::{Place, Transport};
use crate::wire::Wire;

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

/// A connection to one port, and the session over it.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) wire: Wire,
    // Where to connect again, when it is known.
    place: Option<Place>,
    pub(crate) session: Option<Session>,
    // What came before the answer to earlier hellos of the same handshake.
    earlier: Discarded,
}

/// What is said in a handshake.
#[derive(Debug)]
pub(crate) struct Greet<'a> {
    pub(crate) epoch: Epoch,
    pub(crate) reason: Reason,
    pub(crate) identity: &'a Identity,
    pub(crate) limit: Duration,
}

impl Line {
    pub(crate) fn new(stream: Box<dyn Transport>) -> Self {
        Self {
            wire: Wire::new(stream),
            place: None,
            session: None,
            earlier: Discarded::default(),
        }
    }

    /// Connects; where QEMU may hold a port back, also disconnects and connects again, which lets go of it.
    pub(crate) async fn connect(place: Place) -> Result<Self, LinkError> {
        let end = Instant::now() + CONNECT_LIMIT;
        if place.may_be_held_back() {
            drop(connect_once(&place, end).await?);
        }
        let mut line = Self::new(connect_once(&place, end).await?);
        line.place = Some(place);
        Ok(line)
    }

    /// What was discarded in this session and in the attempts at it.
    pub(crate) fn discarded(&self) -> Discarded {
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

    /// A handshake to its end.
    pub(crate) async fn greet(&mut self, greet: &Greet<'_>) -> Result<Ready, LinkError> {
        (self.session, self.earlier) = (None, Discarded::default());
        let end = Instant::now() + greet.limit;
        let mut patience = FIRST_HELLO_AGAIN;
        if greet.reason != Reason::Reattach {
            self.reconnect(end).await?;
        }
        loop {
            self.put_hello(greet.epoch, greet.reason)?;
            match self.exchange(greet.identity, patience, end).await? {
                Some(answer) => return finish_greeting(answer),
                None if Instant::now() >= end => return Err(self.late(greet.limit)),
                None => patience = patience.saturating_mul(2),
            }
            self.reconnect(end).await?;
        }
    }

    fn late(&self, limit: Duration) -> LinkError {
        LinkError::Late {
            stage: Stage::Handshake,
            limit,
            discarded: self.discarded(),
        }
    }

    /// The last answer after a hello; nothing when one of them did not come in time.
    async fn exchange(
        &mut self,
        identity: &Identity,
        patience: Duration,
        end: Instant,
    ) -> Result<Option<Event>, LinkError> {
        let hailed = patience.min(LAST_HELLO_AGAIN);
        match self.greeting_within(hailed, end).await? {
            Some(Event::Hail(_)) => {
                self.put_setup(identity)?;
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

    /// Ends the connection and makes another: a port that QEMU holds back is let go, and nothing half-written is
    /// left. A line over a given connection keeps it.
    async fn reconnect(&mut self, end: Instant) -> Result<(), LinkError> {
        let Some(place) = &self.place else {
            return Ok(());
        };
        // The old connection ends before the new one is made: QEMU serves one at a time.
        self.wire = Wire::new(Box::new(tokio::io::empty()));
        self.wire = Wire::new(connect_once(place, end).await?);
        Ok(())
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
        Ok(())
    }

    fn put_setup(&mut self, identity: &Identity) -> Result<(), LinkError> {
        let stage = Stage::Handshake;
        let setup = Setup {
            wall_clock_ns: wall_clock_ns()?,
            seed: Seed(random("draw a seed", |bytes: [u8; 64]| bytes)?),
            identity: identity.clone(),
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
        let stage = Stage::Handshake;
        loop {
            let item = self.wire.next_item().await;
            let item = match item {
                Ok(Some(item)) => item,
                Ok(None) => {
                    let source = None;
                    return Err(LinkError::Disconnected { stage, source });
                }
                Err(source) => {
                    let source = Some(source);
                    return Err(LinkError::Disconnected { stage, source });
                }
            };
            if let Some(event) = self.take(item)? {
                return Ok(event);
            }
            // A guest that sends without end must not keep the time-out from being looked at.
            tokio::task::consume_budget().await;
        }
    }

    fn take(&mut self, item: Item) -> Result<Option<Event>, LinkError> {
        let stage = Stage::Handshake;
        match &mut self.session {
            Some(session) => session
                .on_item(item)
                .map_err(|source| LinkError::Protocol { stage, source }),
            None => Ok(None),
        }
    }
}

fn finish_greeting(answer: Event) -> Result<Ready, LinkError> {
    match answer {
        Event::Ready(ready) => Ok(ready),
        Event::Failed(failed) => Err(LinkError::StepFailed {
            phase: failed.phase,
            error: failed.error,
        }),
        Event::Hail(_)
        | Event::Accepted { .. }
        | Event::Started { .. }
        | Event::Rejected { .. }
        | Event::Known { .. }
        | Event::Attached { .. }
        | Event::Detached { .. }
        | Event::Output { .. }
        | Event::StdinCredit { .. }
        | Event::StdinClosed { .. }
        | Event::Exit { .. }
        | Event::Done { .. }
        | Event::Pong { .. }
        | Event::File { .. }
        | Event::FileData { .. }
        | Event::FileCredit { .. } => unreachable!("a session that greets gives nothing else"),
    }
}

async fn connect_once(place: &Place, end: Instant) -> Result<Box<dyn Transport>, LinkError> {
    loop {
        match place.connect().await {
            Ok(stream) => return Ok(stream),
            // As many wait at the socket as can; there is no event for "one less waits".
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                sleep(CONNECT_PAUSE).await;
            }
            Err(source) => {
                let place = place.clone();
                return Err(LinkError::Connect { place, source });
            }
        }
    }
}

pub(crate) fn random<const N: usize, T>(
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
