//! Carrying a command's streams to its end.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use stead_agent_proto::flow::MAX_CHUNK_BYTES;
use stead_agent_proto::message::{ExecRequest, ExitStatus, OutputStream, Request};

use crate::command::{Command, CommandControl};
use crate::driver::{CommandEvent, Order, Reply};
use crate::error::{LinkError, Stage};
use crate::link::AgentLink;

const HANGUP: i32 = 1;
// How long the agent may take to confirm a signal to a command that is given up.
const SIGNAL_LIMIT: Duration = Duration::from_secs(2);

/// Where a command's streams lead to on the host.
#[derive(Debug)]
pub struct ExecIo<I, O, E> {
    /// Read until its end when the request asks for input.
    pub stdin: I,
    /// Where standard output goes.
    pub stdout: O,
    /// Where standard error goes.
    pub stderr: E,
}

impl AgentLink {
    /// Runs a command to its end. `signals` are sent to its process group.
    ///
    /// # Errors
    /// [`LinkError::Rejected`] when the guest does not run it, [`LinkError::Local`] when a stream fails on the host,
    /// [`LinkError::Late`] when the agent falls silent.
    pub async fn exec<I, O, E>(
        &self,
        request: ExecRequest,
        io: ExecIo<I, O, E>,
        signals: mpsc::Receiver<i32>,
    ) -> Result<ExitStatus, LinkError>
    where
        I: AsyncRead + Unpin,
        O: AsyncWrite + Unpin,
        E: AsyncWrite + Unpin,
    {
        self.start(request).await?.run(io, signals).await
    }
}

/// What one wait came to.
enum Happened {
    Event(Result<CommandEvent, LinkError>),
    Input(std::io::Result<usize>),
    InputSent(bool),
    Written(OutputStream, std::io::Result<usize>),
    Signal(Option<i32>),
    Time,
}

/// What is read on the host and sent to the command.
enum Feed {
    /// The next chunk may be read.
    Idle,
    /// A chunk is on its way to the guest.
    Sending(oneshot::Receiver<Result<bool, LinkError>>),
    /// The end was sent, or the command takes no more.
    Over,
}

impl Feed {
    async fn sent(&mut self) -> bool {
        match self {
            Self::Sending(answered) => matches!(answered.await, Ok(Ok(true))),
            Self::Idle | Self::Over => std::future::pending().await,
        }
    }
}

impl Command {
    /// Carries the command's streams until it has ended and all its output is written.
    ///
    /// # Errors
    /// As [`AgentLink::exec`].
    pub async fn run<I, O, E>(
        mut self,
        io: ExecIo<I, O, E>,
        signals: mpsc::Receiver<i32>,
    ) -> Result<ExitStatus, LinkError>
    where
        I: AsyncRead + Unpin,
        O: AsyncWrite + Unpin,
        E: AsyncWrite + Unpin,
    {
        self.carry(io, signals).await
    }

    /// As [`Command::run`], and the command can be told something afterwards.
    pub(crate) async fn carry<I, O, E>(
        &mut self,
        io: ExecIo<I, O, E>,
        mut signals: mpsc::Receiver<i32>,
    ) -> Result<ExitStatus, LinkError>
    where
        I: AsyncRead + Unpin,
        O: AsyncWrite + Unpin,
        E: AsyncWrite + Unpin,
    {
        let mut stdin = io.stdin;
        let mut stdout = Sink::new(OutputStream::Stdout, io.stdout);
        let mut stderr = Sink::new(OutputStream::Stderr, io.stderr);
        let mut input = vec![0; MAX_CHUNK_BYTES];
        let mut feed = Feed::Idle;
        let mut more_signals = true;
        let begin = Instant::now();
        let mut overdue = Overdue::new(begin + self.limit, self.silence_limit);
        loop {
            let happened = tokio::select! {
                biased;
                event = self.output.next() => Happened::Event(event),
                sent = feed.sent(), if matches!(feed, Feed::Sending(_)) => Happened::InputSent(sent),
                read = stdin.read(&mut input), if matches!(feed, Feed::Idle) => Happened::Input(read),
                written = stdout.progress(), if !stdout.is_idle() => Happened::Written(OutputStream::Stdout, written),
                written = stderr.progress(), if !stderr.is_idle() => Happened::Written(OutputStream::Stderr, written),
                signal = signals.recv(), if more_signals => Happened::Signal(signal),
                () = sleep_until(overdue.wake_at()) => Happened::Time,
            };
            match happened {
                Happened::Event(Ok(CommandEvent::Exit(status))) => {
                    stdout.finish().await?;
                    stderr.finish().await?;
                    return Ok(status);
                }
                Happened::Event(Ok(CommandEvent::Output { stream, data })) => match stream {
                    OutputStream::Stdout => stdout.put(&data),
                    OutputStream::Stderr => stderr.put(&data),
                },
                Happened::Event(Ok(CommandEvent::Detached { reason })) => {
                    return Err(LinkError::Detached { reason });
                }
                Happened::Event(Ok(CommandEvent::Broken(error)) | Err(error)) => return Err(error),
                Happened::Input(Ok(count)) => feed = self.send_input(&input[..count]),
                Happened::Input(Err(source)) => {
                    return Err(self.hang_up("read the command's input", source).await);
                }
                Happened::InputSent(true) => feed = Feed::Idle,
                Happened::InputSent(false) => feed = Feed::Over,
                Happened::Written(_, Ok(0)) => {}
                Happened::Written(stream, Ok(count)) => self.output.consumed(stream, count),
                Happened::Written(_, Err(source)) => {
                    return Err(self.hang_up("write the command's output", source).await);
                }
                Happened::Signal(Some(signal)) => self.control.signal(signal),
                Happened::Signal(None) => more_signals = false,
                Happened::Time => self.look_at(&mut overdue, begin)?,
            }
        }
    }

    fn send_input(&self, data: &[u8]) -> Feed {
        let answered = self.input.begin_send(data.to_vec());
        match answered {
            // What ends the session is told with the events.
            None => Feed::Over,
            Some(_) if data.is_empty() => Feed::Over,
            Some(answered) => Feed::Sending(answered),
        }
    }

    /// When the command's time is over, the guest is asked once more and gets the time of a silence to say that it has ended.
    fn look_at(&self, overdue: &mut Overdue, begin: Instant) -> Result<(), LinkError> {
        if overdue.asked.is_some() {
            return Err(LinkError::Late {
                stage: Stage::Run,
                limit: begin.elapsed(),
                discarded: stead_agent_proto::host::Discarded::default(),
            });
        }
        overdue.asked = Some(Instant::now());
        Ok(())
    }

    /// Tells the command that nobody listens any more, as a terminal that goes away would.
    async fn hang_up(&self, attempted: &'static str, source: std::io::Error) -> LinkError {
        self.control.end(HANGUP).await;
        LinkError::Local { attempted, source }
    }
}

impl CommandControl {
    /// Sends a signal and says whether the agent is known to have taken it. QEMU may drop what the
    /// guest has not read when a connection ends, so the answer to a ping behind the signal is waited for.
    pub(crate) async fn end(&self, signal: i32) -> bool {
        self.signal(signal);
        let (answer, answered) = oneshot::channel();
        let ping = Order::Request {
            request: Request::Ping,
            name: "ping",
            answer,
        };
        let asked = self.orders.send(ping).is_ok();
        let proof = timeout(SIGNAL_LIMIT, answered);
        asked && matches!(proof.await, Ok(Ok(Ok(Reply::Status(_)))))
    }
}

/// The end of a command's time.
#[derive(Debug)]
struct Overdue {
    end: Instant,
    limit: Duration,
    asked: Option<Instant>,
}

impl Overdue {
    fn new(end: Instant, limit: Duration) -> Self {
        Self {
            end,
            limit,
            asked: None,
        }
    }

    fn wake_at(&self) -> Instant {
        self.asked.map_or(self.end, |asked| asked + self.limit)
    }
}

/// Output on its way to where it goes on the host; never more than a window.
struct Sink<W> {
    stream: OutputStream,
    to: W,
    bytes: Vec<u8>,
    written: usize,
    is_flushed: bool,
}

impl<W: AsyncWrite + Unpin> Sink<W> {
    fn new(stream: OutputStream, to: W) -> Self {
        Self {
            stream,
            to,
            bytes: Vec::new(),
            written: 0,
            is_flushed: true,
        }
    }

    fn put(&mut self, data: &[u8]) {
        if self.is_empty() {
            self.bytes.clear();
            self.written = 0;
        } else if self.written > MAX_CHUNK_BYTES {
            self.bytes.drain(..self.written);
            self.written = 0;
        }
        self.bytes.extend_from_slice(data);
    }

    fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    fn is_idle(&self) -> bool {
        self.is_empty() && self.is_flushed
    }

    /// Writes once, or flushes when all is written; gives how much was written. Nothing is lost when it is dropped.
    async fn progress(&mut self) -> std::io::Result<usize> {
        if self.is_empty() {
            self.to.flush().await?;
            self.is_flushed = true;
            return Ok(0);
        }
        let count = self.to.write(&self.bytes[self.written..]).await?;
        if count == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        self.written += count;
        self.is_flushed = false;
        Ok(count)
    }

    async fn finish(&mut self) -> Result<(), LinkError> {
        let attempted = match self.stream {
            OutputStream::Stdout => "write the rest of the command's standard output",
            OutputStream::Stderr => "write the rest of the command's standard error",
        };
        let local = |source| LinkError::Local { attempted, source };
        self.to
            .write_all(&self.bytes[self.written..])
            .await
            .map_err(local)?;
        self.to.flush().await.map_err(local)
    }
}
