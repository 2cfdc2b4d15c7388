//! A link to one port of a VM's agent: handshake, requests, and where commands begin.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use stead_agent_proto::host::Discarded;
use stead_agent_proto::message::{
    Bytes, CommandEntry, CommandState, Done, Identity, Ready, Reason, Request, ShutdownKind, Status,
};
use stead_agent_proto::{Epoch, ExecKey, ProtocolError};

use crate::driver::{Driver, Order, Reply, Shared};
use crate::error::{LinkError, Stage};
use crate::line::{Greet, Line};
use crate::transport::{Place, Transport};

/// How long the agent may leave a ping unanswered, unless set otherwise.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// How long a request may take, unless set otherwise.
const REQUEST_LIMIT: Duration = Duration::from_secs(120);

/// What a handshake says to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// 128 random bits, drawn anew for every boot, restore, fork and wake.
    pub epoch: Epoch,
    /// What has happened to the VM. [`Reason::Reattach`] is what [`AgentLink::reattach`] says.
    pub reason: Reason,
    /// Who the guest is from now on.
    pub identity: Identity,
}

/// What a freeze has frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frozen {
    /// Where the frozen file systems are mounted in the guest.
    pub mounts: Vec<Vec<u8>>,
    /// Where writable file systems are mounted that cannot be frozen; they were written out once.
    pub unsupported: Vec<Vec<u8>>,
}

/// The commands that an agent knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandList {
    /// Those that it lists, newest first.
    pub entries: Vec<CommandEntry>,
    /// How many more there are.
    pub left_out: u32,
}

/// A link to one port of a VM's agent. After its handshake many tasks use it at once.
///
/// Dropping it ends its session as soon as its commands are dropped too.
#[derive(Debug)]
pub struct AgentLink {
    state: State,
    pub(crate) silence_limit: Duration,
    request_limit: Duration,
    shared: Shared,
}

#[derive(Debug)]
enum State {
    /// No session yet, or none any more.
    Line(Box<Line>),
    /// A driver has the line.
    Driven {
        epoch: Epoch,
        orders: mpsc::UnboundedSender<Order>,
        driver: JoinHandle<Line>,
    },
    /// A handshake was dropped half-way.
    Abandoned,
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
        Self::connect_to(Place::Unix(socket.to_owned())).await
    }

    /// Connects to an agent wherever it listens; as [`AgentLink::connect`] where that is a socket. Over vsock each link is a
    /// connection of its own.
    ///
    /// # Errors
    /// [`LinkError::Connect`] when there is no such place or nobody listens there.
    pub async fn connect_to(place: Place) -> Result<Self, LinkError> {
        Line::connect(place).await.map(Self::from_line)
    }

    /// A link over a connection that exists already, of whatever kind.
    #[must_use]
    pub fn from_stream(stream: impl Transport + 'static) -> Self {
        Self::from_line(Line::new(Box::new(stream)))
    }

    fn from_line(line: Line) -> Self {
        Self {
            state: State::Line(Box::new(line)),
            silence_limit: SILENCE_LIMIT,
            request_limit: REQUEST_LIMIT,
            shared: Arc::default(),
        }
    }

    /// Sets how long the agent may leave a ping unanswered while a command or request is under way; 30 s at first. It
    /// is pinged when it has been silent for 5 s or a third of the limit, and never given up without having been asked. A VM
    /// that may be captured meanwhile is silent for as long as it stands still.
    pub fn set_silence_limit(&mut self, limit: Duration) {
        self.silence_limit = limit;
        if let State::Driven { orders, .. } = &self.state {
            // A driver that has ended needs no limit.
            drop(orders.send(Order::SilenceLimit(limit)));
        }
    }

    /// Sets how long a request may take; 120 s at first.
    pub fn set_request_limit(&mut self, limit: Duration) {
        self.request_limit = limit;
    }

    /// Begins a new life of the VM. Call it when the vCPUs run, or are about to: it makes its connection anew, which lets go
    /// of a port that QEMU holds back, but only while they run.
    ///
    /// The guest drops all sessions of earlier ones, thaws its file systems, sets its clock, reseeds its
    /// random number generator and becomes who it is to be. When this returns, all that was done; commands are accepted
    /// after [`AgentLink::release`], and the guest's processes, if they were frozen for the capture, stand still until then.
    ///
    /// # Errors
    /// [`LinkError::StepFailed`] when the guest could not do a step, [`LinkError::Late`] when no answer came within
    /// `limit`, [`LinkError::Disconnected`] when the connection ended.
    pub async fn handshake(
        &mut self,
        greeting: &Greeting,
        limit: Duration,
    ) -> Result<Ready, LinkError> {
        self.greet(&Greet {
            epoch: greeting.epoch,
            reason: greeting.reason,
            identity: &greeting.identity,
            limit,
        })
        .await
    }

    /// Begins another session in the life that has `epoch`; neither clock nor randomness changes.
    ///
    /// # Errors
    /// As [`AgentLink::handshake`]; [`LinkError::StepFailed`] with [`stead_agent_proto::message::Phase::Epoch`] when the
    /// guest lives another life.
    pub async fn reattach(&mut self, epoch: Epoch, limit: Duration) -> Result<Ready, LinkError> {
        self.greet(&Greet {
            epoch,
            reason: Reason::Reattach,
            identity: &Identity::Keep,
            limit,
        })
        .await
    }

    async fn greet(&mut self, greet: &Greet<'_>) -> Result<Ready, LinkError> {
        let mut line = self.take_line().await?;
        let greeted = line.greet(greet).await;
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = line.discarded();
        if greeted.is_err() {
            self.state = State::Line(line);
            return greeted;
        }
        let (orders, taken) = mpsc::unbounded_channel();
        let shared = Arc::clone(&self.shared);
        let driver = Driver::new(*line, taken, self.silence_limit, shared);
        self.state = State::Driven {
            epoch: greet.epoch,
            orders,
            driver: tokio::spawn(driver.run()),
        };
        greeted
    }

    async fn take_line(&mut self) -> Result<Box<Line>, LinkError> {
        match std::mem::replace(&mut self.state, State::Abandoned) {
            State::Line(line) => Ok(line),
            State::Driven { orders, driver, .. } => {
                // One that has ended already gives the line back as well.
                drop(orders.send(Order::Stop));
                let line = driver.await.map_err(|error| LinkError::Host {
                    attempted: "end an earlier session",
                    source: error.into(),
                })?;
                Ok(Box::new(line))
            }
            State::Abandoned => Err(LinkError::Abandoned {
                state: "in a handshake",
            }),
        }
    }

    /// The epoch of the session.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        match &self.state {
            State::Driven { epoch, .. } => Some(*epoch),
            State::Line(_) | State::Abandoned => None,
        }
    }

    /// What was discarded in this session: stale frames and bytes that are no frame.
    #[must_use]
    pub fn discarded(&self) -> Discarded {
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the guest's processes run in the epoch that the handshake has begun: the sandbox is ready, and commands are
    /// accepted. Gives how long the guest took.
    ///
    /// # Errors
    /// [`LinkError::RequestFailed`] when they could not be thawed; they stand still then, and no command is accepted.
    pub async fn release(&self) -> Result<Duration, LinkError> {
        let done = self.done(Request::Release, "release").await?;
        let Done::Released { duration_ns } = done else {
            return Err(unfulfilled("release", done));
        };
        Ok(Duration::from_nanos(duration_ns))
    }

    /// Has every process of the guest but the agent stand still. They do until [`AgentLink::thaw_workload`] or, in another
    /// life, [`AgentLink::release`]: neither time nor the end of this link lets them go on.
    ///
    /// # Errors
    /// [`LinkError::RequestFailed`] when they do not stand still within `limit`.
    pub async fn freeze_workload(&self, limit: Duration) -> Result<(), LinkError> {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.simple(Request::FreezeWorkload { limit_ms }, "freeze processes")
            .await
    }

    /// Lets the guest's processes go on in the life they were frozen in.
    ///
    /// # Errors
    /// [`LinkError::RequestFailed`] when they could not be thawed.
    pub async fn thaw_workload(&self) -> Result<(), LinkError> {
        self.simple(Request::ThawWorkload, "thaw processes").await
    }

    /// Freezes every writable file system on a block device. The agent thaws by itself after `limit` (60 s at most), when
    /// this link ends, and when another epoch begins.
    ///
    /// # Errors
    /// [`LinkError::RequestFailed`] when one could not be frozen; those that were are thawed again.
    pub async fn freeze(&self, limit: Duration) -> Result<Frozen, LinkError> {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let plain = |list: Vec<Bytes>| list.into_iter().map(|bytes| bytes.0).collect();
        let done = self.done(Request::Freeze { limit_ms }, "freeze").await?;
        let Done::Frozen {
            mounts,
            unsupported,
        } = done
        else {
            return Err(unfulfilled("freeze", done));
        };
        Ok(Frozen {
            mounts: plain(mounts),
            unsupported: plain(unsupported),
        })
    }

    /// Thaws what was frozen.
    ///
    /// # Errors
    /// [`LinkError::RequestFailed`] also when nothing was frozen any more, and why: what was captured meanwhile is
    /// then not consistent.
    pub async fn thaw(&self) -> Result<(), LinkError> {
        self.simple(Request::Thaw, "thaw").await
    }

    /// Has the guest write all that is dirty.
    ///
    /// # Errors
    /// [`LinkError`] when the guest does not say that it did.
    pub async fn sync(&self) -> Result<(), LinkError> {
        self.simple(Request::Sync, "sync").await
    }

    /// Has the guest write all that is dirty and drop its clean caches, so that the next read comes from the disk.
    ///
    /// # Errors
    /// [`LinkError`] when the guest does not say that it did.
    pub async fn drop_caches(&self) -> Result<(), LinkError> {
        self.simple(Request::DropCaches, "drop caches").await
    }

    /// Asks the agent how it is.
    ///
    /// # Errors
    /// [`LinkError`] when it does not say.
    pub async fn ping(&self) -> Result<Status, LinkError> {
        let limit = self.request_limit.min(self.silence_limit);
        match self.request(Request::Ping, "ping", limit).await? {
            Reply::Status(status) => Ok(*status),
            Reply::Done(other) => Err(unfulfilled("ping", other)),
        }
    }

    /// What the agent knows of a command that was first asked for in `epoch`.
    ///
    /// # Errors
    /// [`LinkError`] when it does not say.
    pub async fn query(&self, key: ExecKey, epoch: Epoch) -> Result<CommandState, LinkError> {
        let done = self.done(Request::Query { key, epoch }, "query").await?;
        let Done::Command(state) = done else {
            return Err(unfulfilled("query", done));
        };
        Ok(state)
    }

    /// The commands that run, and those that have ended and are remembered.
    ///
    /// # Errors
    /// [`LinkError`] when the agent does not say.
    pub async fn list(&self) -> Result<CommandList, LinkError> {
        let done = self.done(Request::List, "list").await?;
        let Done::Commands { entries, left_out } = done else {
            return Err(unfulfilled("list", done));
        };
        Ok(CommandList { entries, left_out })
    }

    /// Shuts the guest down; returns when it has agreed. QEMU's own end (or reset) shows when it is done.
    ///
    /// # Errors
    /// [`LinkError`] when the guest does not agree.
    pub async fn shutdown(&self, kind: ShutdownKind) -> Result<(), LinkError> {
        self.simple(Request::Shutdown(kind), "shutdown").await
    }

    async fn simple(&self, request: Request, name: &'static str) -> Result<(), LinkError> {
        let done = self.done(request, name).await?;
        if done == Done::Ok {
            return Ok(());
        }
        Err(unfulfilled(name, done))
    }

    async fn done(&self, request: Request, name: &'static str) -> Result<Done, LinkError> {
        match self.request(request, name, self.request_limit).await? {
            Reply::Done(done) => Ok(done),
            Reply::Status(_) => {
                let error = "an answer to another request".to_owned();
                Err(LinkError::RequestFailed {
                    request: name,
                    error,
                })
            }
        }
    }

    async fn request(
        &self,
        request: Request,
        name: &'static str,
        limit: Duration,
    ) -> Result<Reply, LinkError> {
        let stage = Stage::Request(name);
        let (answer, answered) = oneshot::channel();
        self.give(
            stage,
            Order::Request {
                request,
                name,
                answer,
            },
        )?;
        self.within(stage, limit, answered).await
    }

    pub(crate) fn give(&self, stage: Stage, order: Order) -> Result<(), LinkError> {
        self.orders(stage)?
            .send(order)
            .ok()
            .ok_or(LinkError::Abandoned { state: "ended" })
    }

    pub(crate) fn orders(&self, stage: Stage) -> Result<&mpsc::UnboundedSender<Order>, LinkError> {
        match &self.state {
            State::Driven { orders, .. } => Ok(orders),
            State::Line(_) => {
                let source = ProtocolError::Unexpected {
                    message: "anything but a handshake",
                    state: "not begun",
                };
                Err(LinkError::Unsendable { stage, source })
            }
            State::Abandoned => Err(LinkError::Abandoned {
                state: "in a handshake",
            }),
        }
    }

    /// Waits for the driver's answer.
    pub(crate) async fn within<T>(
        &self,
        stage: Stage,
        limit: Duration,
        answered: oneshot::Receiver<Result<T, LinkError>>,
    ) -> Result<T, LinkError> {
        match timeout(limit, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_ended)) => Err(LinkError::Abandoned { state: "ended" }),
            Err(_) => Err(LinkError::Late {
                stage,
                limit,
                discarded: self.discarded(),
            }),
        }
    }
}

fn unfulfilled(request: &'static str, outcome: Done) -> LinkError {
    let error = match outcome {
        Done::Failed(error) => error,
        Done::Ok
        | Done::Frozen { .. }
        | Done::Status(_)
        | Done::Released { .. }
        | Done::Command(_)
        | Done::Commands { .. } => "an answer to another request".to_owned(),
    };
    LinkError::RequestFailed { request, error }
}
