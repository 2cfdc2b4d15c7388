//! A command: its handles on the host.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use stead_agent_proto::flow::MAX_CHUNK_BYTES;
use stead_agent_proto::message::{Attachment, ExecRequest, OutputStream};
use stead_agent_proto::{Epoch, ExecKey};

use crate::driver::{CommandEvent, Order, Start};
use crate::error::{LinkError, Stage};
use crate::line::random;
use crate::link::AgentLink;

/// For the sum of a command's time and the guest's own delay; an unlimited command is bounded by silence only.
pub(crate) const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// A command that runs in the guest. Its parts may go to different tasks.
///
/// When its output is dropped, the command goes on unheard.
#[derive(Debug)]
pub struct Command {
    /// What names it, for [`AgentLink::attach`] and [`AgentLink::query`].
    pub key: ExecKey,
    /// The number of its process in the guest, when it is known.
    pub pid: Option<u32>,
    /// Where its output begins, when it was attached to.
    pub attachment: Option<Attachment>,
    /// Its input.
    pub input: CommandInput,
    /// Its output and its end.
    pub output: CommandOutput,
    /// Its signals and the size of its terminal.
    pub control: CommandControl,
    // After this long it is given up, and how long its agent may be silent.
    pub(crate) limit: Duration,
    pub(crate) silence_limit: Duration,
}

/// The input of a command.
#[derive(Debug)]
pub struct CommandInput {
    id: u64,
    orders: mpsc::UnboundedSender<Order>,
}

/// The output of a command, and its end.
#[derive(Debug)]
pub struct CommandOutput {
    id: u64,
    orders: mpsc::UnboundedSender<Order>,
    events: mpsc::UnboundedReceiver<CommandEvent>,
    is_over: bool,
}

/// The signals of a command, and the size of its terminal.
#[derive(Debug, Clone)]
pub struct CommandControl {
    id: u64,
    pub(crate) orders: mpsc::UnboundedSender<Order>,
}

/// A key for a command: 128 random bits.
///
/// # Errors
/// [`LinkError::Host`] when the host has no random bytes.
pub fn new_key() -> Result<ExecKey, LinkError> {
    random("draw a key for a command", ExecKey)
}

impl AgentLink {
    /// Starts a command and returns when it runs. When this is dropped before, the command is not told to go, unless it was
    /// already.
    ///
    /// # Errors
    /// [`LinkError::Rejected`] when the guest does not run it.
    pub async fn start(&self, request: ExecRequest) -> Result<Command, LinkError> {
        self.start_as(new_key()?, None, request).await
    }

    /// As [`AgentLink::start`], for a command with a key of its own: however often it is started, it runs once. `again` is
    /// the epoch in which it was first asked for, when it may have been asked for before.
    ///
    /// # Errors
    /// [`LinkError::Known`] when the key was used: the command runs or has run, or the agent cannot say.
    pub async fn start_as(
        &self,
        key: ExecKey,
        again: Option<Epoch>,
        request: ExecRequest,
    ) -> Result<Command, LinkError> {
        let limit = match request.timeout_ms {
            0 => NEVER,
            // The guest ends it; the host waits a little longer for the news.
            limit_ms => Duration::from_millis(limit_ms)
                .saturating_add(self.silence_limit)
                .min(NEVER),
        };
        let (events, listened) = mpsc::unbounded_channel();
        let (answer, answered) = oneshot::channel();
        let start = Start {
            key,
            again,
            request,
            events,
            answer,
        };
        self.give(Stage::Start, Order::Start(Box::new(start)))?;
        let (id, pid) = self.within(Stage::Start, limit, answered).await?;
        let mut command = self.command(id, key, listened)?;
        (command.pid, command.limit) = (Some(pid), limit);
        Ok(command)
    }

    /// Listens to a command that runs already, or has ended and left output, from these bytes of standard output and standard
    /// error on; whoever listened before is told so.
    ///
    /// # Errors
    /// [`LinkError::Rejected`] when there is no such command.
    pub async fn attach(&self, key: ExecKey, from: [u64; 2]) -> Result<Command, LinkError> {
        let (events, listened) = mpsc::unbounded_channel();
        let (answer, answered) = oneshot::channel();
        let order = Order::Attach {
            key,
            from,
            events,
            answer,
        };
        self.give(Stage::Attach, order)?;
        let (id, at) = self.within(Stage::Attach, NEVER, answered).await?;
        let mut command = self.command(id, key, listened)?;
        (command.pid, command.attachment) = (at.pid, Some(at));
        Ok(command)
    }

    fn command(
        &self,
        id: u64,
        key: ExecKey,
        events: mpsc::UnboundedReceiver<CommandEvent>,
    ) -> Result<Command, LinkError> {
        let orders = self.orders(Stage::Run)?;
        Ok(Command {
            key,
            pid: None,
            attachment: None,
            input: CommandInput {
                id,
                orders: orders.clone(),
            },
            output: CommandOutput {
                id,
                orders: orders.clone(),
                events,
                is_over: false,
            },
            control: CommandControl {
                id,
                orders: orders.clone(),
            },
            limit: NEVER,
            silence_limit: self.silence_limit,
        })
    }
}

impl CommandInput {
    /// Sends input; returns when all of it is on its way, which the guest's credit decides. Says whether the command
    /// still takes any.
    ///
    /// # Errors
    /// [`LinkError`] when the session has ended.
    pub async fn write(&mut self, data: &[u8]) -> Result<bool, LinkError> {
        for chunk in data.chunks(MAX_CHUNK_BYTES) {
            if !self.send(chunk.to_vec()).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Ends the input.
    ///
    /// # Errors
    /// As [`CommandInput::write`].
    pub async fn end(&mut self) -> Result<(), LinkError> {
        self.send(Vec::new()).await.map(drop)
    }

    async fn send(&mut self, data: Vec<u8>) -> Result<bool, LinkError> {
        let ended = || Err(LinkError::Abandoned { state: "ended" });
        match self.begin_send(data) {
            Some(answered) => answered.await.unwrap_or_else(|_| ended()),
            None => ended(),
        }
    }

    /// Hands a chunk to the driver; nothing when it has ended.
    pub(crate) fn begin_send(
        &self,
        data: Vec<u8>,
    ) -> Option<oneshot::Receiver<Result<bool, LinkError>>> {
        let (answer, answered) = oneshot::channel();
        let id = self.id;
        let order = Order::Input { id, data, answer };
        self.orders.send(order).is_ok().then_some(answered)
    }
}

impl CommandOutput {
    /// What the command does next. Nothing is lost when this is dropped.
    ///
    /// # Errors
    /// [`LinkError`] when the session has ended; the command goes on unheard then.
    pub async fn next(&mut self) -> Result<CommandEvent, LinkError> {
        match self.events.recv().await {
            Some(CommandEvent::Broken(error)) => {
                self.is_over = true;
                Err(error)
            }
            Some(event @ CommandEvent::Output { .. }) => Ok(event),
            Some(event @ (CommandEvent::Exit(_) | CommandEvent::Detached { .. })) => {
                self.is_over = true;
                Ok(event)
            }
            None => Err(LinkError::Abandoned { state: "ended" }),
        }
    }

    /// Notes that so many bytes were passed on: so many more may come.
    pub fn consumed(&mut self, stream: OutputStream, bytes: usize) {
        let id = self.id;
        // A driver that has ended takes no more credit.
        drop(self.orders.send(Order::Consumed { id, stream, bytes }));
    }
}

impl Drop for CommandOutput {
    fn drop(&mut self) {
        if !self.is_over {
            drop(self.orders.send(Order::Detach { id: self.id }));
        }
    }
}

impl CommandControl {
    /// Sends a signal, 1 to 31, to the command's process group; nothing happens when it has ended.
    pub fn signal(&self, signal: i32) {
        let id = self.id;
        drop(self.orders.send(Order::Signal { id, signal }));
    }

    /// Gives the command's terminal another size.
    pub fn resize(&self, rows: u16, cols: u16) {
        let id = self.id;
        drop(self.orders.send(Order::Resize { id, rows, cols }));
    }
}
