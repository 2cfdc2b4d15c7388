//! Running a command.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use stead_agent_proto::ProtocolError;
use stead_agent_proto::flow::MAX_CHUNK_BYTES;
use stead_agent_proto::host::{Event, Session};
use stead_agent_proto::message::{ExecRequest, ExitStatus, OutputStream};

use crate::error::{LinkError, Stage};
use crate::link::{AgentLink, Silence};

const HANGUP: i32 = 1;
// How long the agent may take to confirm a signal to a command that is given up.
const SIGNAL_LIMIT: Duration = Duration::from_secs(2);
// Beyond this much unsent input, no more is read on the host.
const OUTGOING_FULL_BYTES: usize = 256 * 1024;
// For the sum of a command's time and the guest's own delay; an unlimited command is bounded by silence only.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

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

/// A command that the guest has started.
#[derive(Debug)]
pub struct Running<'a> {
    link: &'a mut AgentLink,
    end: Instant,
    begin: Instant,
}

impl AgentLink {
    /// Starts a command and returns when it runs. A capture of the VM between the request and this return may hold a request
    /// that has not been read: hold captures off for that long.
    ///
    /// # Errors
    /// [`LinkError::Rejected`] when the guest does not run it.
    pub async fn start(&mut self, request: ExecRequest) -> Result<Running<'_>, LinkError> {
        let limit = match request.timeout_ms {
            0 => NEVER,
            // The guest ends it; the host waits a little longer for the news.
            limit_ms => Duration::from_millis(limit_ms)
                .saturating_add(self.silence_limit)
                .min(NEVER),
        };
        let begin = Instant::now();
        let end = begin + limit;
        if let Err(error) = self.start_once(request.clone(), end).await {
            self.replace_lost_session(error).await?;
            self.start_once(request, end).await?;
        }
        Ok(Running {
            link: self,
            end,
            begin,
        })
    }

    async fn start_once(&mut self, request: ExecRequest, end: Instant) -> Result<(), LinkError> {
        let stage = Stage::Start;
        let session = self.begin(stage)?;
        let frame = match session.exec(request) {
            Ok(frame) => frame,
            Err(source) => {
                self.abandoned = false;
                return Err(LinkError::Unsendable { stage, source });
            }
        };
        self.wire.outgoing.put(frame);
        loop {
            match self.next_event(stage, end).await? {
                Event::Accepted => return Ok(()),
                Event::Rejected(reason) => {
                    self.abandoned = false;
                    return Err(LinkError::Rejected { reason });
                }
                Event::Hail(_)
                | Event::Ready(_)
                | Event::Failed(_)
                | Event::Output { .. }
                | Event::StdinCredit
                | Event::StdinClosed
                | Event::Exit(_)
                | Event::Done(_)
                | Event::Pong(_) => {}
            }
        }
    }

    /// Runs a command to its end. `signals` are sent to its process group.
    ///
    /// # Errors
    /// [`LinkError::Rejected`] when the guest does not run it, [`LinkError::Local`] when a stream fails on the host,
    /// [`LinkError::Late`] when the agent falls silent.
    pub async fn exec<I, O, E>(
        &mut self,
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

impl Running<'_> {
    /// Carries the command's streams until it has ended and all its output is written.
    ///
    /// # Errors
    /// As [`AgentLink::exec`].
    pub async fn run<I, O, E>(
        self,
        io: ExecIo<I, O, E>,
        mut signals: mpsc::Receiver<i32>,
    ) -> Result<ExitStatus, LinkError>
    where
        I: AsyncRead + Unpin,
        O: AsyncWrite + Unpin,
        E: AsyncWrite + Unpin,
    {
        let ExecIo {
            mut stdin,
            stdout,
            stderr,
        } = io;
        let mut stdout = Sink::new(OutputStream::Stdout, stdout);
        let mut stderr = Sink::new(OutputStream::Stderr, stderr);
        let mut input = vec![0; MAX_CHUNK_BYTES];
        let mut more_signals = true;
        let Self { link, end, begin } = self;
        let mut silence = Silence::new(link.silence_limit);
        let mut overdue = Overdue::new(end, link.silence_limit);
        loop {
            while let Some(item) = link.wire.incoming.take() {
                match link.take(Ok(Some(item)), Stage::Run)? {
                    Some(Event::Exit(status)) => {
                        stdout.finish().await?;
                        stderr.finish().await?;
                        link.abandoned = false;
                        return Ok(status);
                    }
                    Some(Event::Output {
                        stream: OutputStream::Stdout,
                        data,
                    }) => stdout.put(&data),
                    Some(Event::Output {
                        stream: OutputStream::Stderr,
                        data,
                    }) => stderr.put(&data),
                    Some(
                        Event::StdinCredit
                        | Event::StdinClosed
                        | Event::Pong(_)
                        | Event::Hail(_)
                        | Event::Ready(_)
                        | Event::Failed(_)
                        | Event::Accepted
                        | Event::Rejected(_)
                        | Event::Done(_),
                    ) => {}
                    None => {
                        tokio::task::consume_budget().await;
                        continue;
                    }
                }
                silence.end();
            }
            // What has come was taken first: this process may have been the one that stood still.
            link.look_at(&mut silence, Stage::Run)?;
            if link.is_overdue(&mut overdue)? {
                return Err(link.late(Stage::Run, begin.elapsed()));
            }
            let room = match &link.session {
                Some(session) if link.wire.outgoing.waiting_bytes() < OUTGOING_FULL_BYTES => {
                    session.stdin_room().unwrap_or(0)
                }
                Some(_) | None => 0,
            };
            let wake_at = silence.wake_at().min(overdue.wake_at());
            let (mut reader, mut writer) = link.wire.stream.split();
            let happened = tokio::select! {
                biased;
                open = link.wire.incoming.fill(&mut reader) => Happened::Filled(open),
                written = link.wire.outgoing.write(&mut writer), if !link.wire.outgoing.is_empty() => Happened::Sent(written),
                read = stdin.read(&mut input[..room]), if room > 0 => Happened::Input(read),
                written = stdout.progress(), if !stdout.is_idle() => Happened::Written(OutputStream::Stdout, written),
                written = stderr.progress(), if !stderr.is_idle() => Happened::Written(OutputStream::Stderr, written),
                signal = signals.recv(), if more_signals => Happened::Signal(signal),
                () = sleep_until(wake_at) => Happened::Time,
            };
            match happened {
                Happened::Filled(Ok(true)) | Happened::Sent(Ok(())) | Happened::Time => {}
                Happened::Filled(Ok(false)) => {
                    return Err(LinkError::Disconnected {
                        stage: Stage::Run,
                        source: None,
                    });
                }
                Happened::Filled(Err(source)) | Happened::Sent(Err(source)) => {
                    let source = Some(source);
                    return Err(LinkError::Disconnected {
                        stage: Stage::Run,
                        source,
                    });
                }
                Happened::Input(Ok(count)) => link.put_input(&input[..count])?,
                Happened::Input(Err(source)) => {
                    return Err(link.hang_up("read the command's input", source).await);
                }
                Happened::Written(_, Ok(0)) => {}
                Happened::Written(stream, Ok(count)) => link.put_credit(stream, count)?,
                Happened::Written(_, Err(source)) => {
                    return Err(link.hang_up("write the command's output", source).await);
                }
                Happened::Signal(Some(signal)) => link.put_signal(signal)?,
                Happened::Signal(None) => more_signals = false,
            }
        }
    }
}

/// The end of a command's time, after which the guest is asked once more: if it answers and has not said before that the
/// command has ended, or does not answer, it is given up.
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

/// What one wait came to.
enum Happened {
    Filled(std::io::Result<bool>),
    Sent(std::io::Result<()>),
    Input(std::io::Result<usize>),
    Written(OutputStream, std::io::Result<usize>),
    Signal(Option<i32>),
    Time,
}

impl AgentLink {
    fn put_input(&mut self, data: &[u8]) -> Result<(), LinkError> {
        self.put_frame(|session| {
            if data.is_empty() {
                session.stdin_end()
            } else {
                session.stdin(data)
            }
        })
    }

    fn put_signal(&mut self, signal: i32) -> Result<(), LinkError> {
        self.put_frame(|session| session.signal(signal))
    }

    fn put_credit(&mut self, stream: OutputStream, bytes: usize) -> Result<(), LinkError> {
        self.put_frame(|session| {
            session
                .output_consumed(stream, bytes)
                .map(Option::unwrap_or_default)
        })
    }

    fn put_frame(
        &mut self,
        make: impl FnOnce(&mut Session) -> Result<Vec<u8>, ProtocolError>,
    ) -> Result<(), LinkError> {
        let stage = Stage::Run;
        if let Some(session) = &mut self.session {
            let frame = make(session).map_err(|source| LinkError::Unsendable { stage, source })?;
            if !frame.is_empty() {
                self.wire.outgoing.put(frame);
            }
        }
        Ok(())
    }

    /// Tells the command that nobody listens any more, as a terminal that goes away would.
    async fn hang_up(&mut self, attempted: &'static str, source: std::io::Error) -> LinkError {
        self.end_command(HANGUP).await;
        LinkError::Local { attempted, source }
    }

    /// Whether the command's time is over and the guest, which was asked since, has nothing more to say of it.
    fn is_overdue(&mut self, overdue: &mut Overdue) -> Result<bool, LinkError> {
        let now = Instant::now();
        if now < overdue.end {
            return Ok(false);
        }
        if overdue.asked.is_none() {
            self.put_frame(Session::ping)?;
            overdue.asked = Some(now);
        }
        Ok(now >= overdue.wake_at() || self.has_answered_pings())
    }

    pub(crate) fn has_answered_pings(&self) -> bool {
        self.session
            .as_ref()
            .is_none_or(|session| session.unanswered_pings() == 0)
    }

    /// Sends a signal and says whether the agent is known to have taken it; the link is of no further use. QEMU may drop what the
    /// guest has not read when a connection ends, so the answer to a ping behind the signal is waited for.
    pub(crate) async fn end_command(&mut self, signal: i32) -> bool {
        if self.put_signal(signal).is_err() || self.put_frame(Session::ping).is_err() {
            return false;
        }
        let proof = async {
            while !self.has_answered_pings() {
                let item = self.wire.next_item().await;
                if self.take(item, Stage::Run).is_err() {
                    return false;
                }
            }
            true
        };
        timeout(SIGNAL_LIMIT, proof).await.unwrap_or(false)
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
