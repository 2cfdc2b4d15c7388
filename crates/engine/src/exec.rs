//! Commands in a guest, over one of its agent ports.
//!
//! QEMU serves one connection a port, so a command takes the first port whose lock is free. The first port is that of
//! whoever holds the sandbox's lock (handshakes, freezing, power-off): commands cannot keep it busy. The
//! session is of the epoch that the sandbox's agent acknowledged: a command can never reach a guest
//! that was put back meanwhile.
//!
//! A guest says nothing while a checkpoint takes its state. Nobody gives it up for that: a command is as patient as the
//! longest such pause, and one that finds no agent tries again while an operation on its sandbox is under way.

use std::time::{Duration, Instant};

use stead_agent_link::{
    AgentLink, Command, Epoch, ExecIo, ExecKey, ExecRequest, ExitStatus, LinkError, Phase, Pty,
    Ready, Rejection, ResourceLimit, ShutdownKind, WorkloadState,
};
use stead_agent_proto::message::Bytes;
use stead_sys::lock::{Attempt, FileLock};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::Engine;
use crate::controls::{Controls, Told};
use crate::error::{AtFile, EngineError, Kind, Result};
use crate::launch::{AgentPort, HANDSHAKE_PORT, Identity, Reason};
use crate::machine::AGENT_PORTS;
use crate::records::{Sandbox, SandboxState};
use crate::sandbox::wrong_state;

/// How long an agent may take to accept a session.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(15);
/// How long an agent may leave a ping unanswered while its guest runs.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// How often taken ports are tried again.
const RETRY: Duration = Duration::from_millis(10);
/// How long what is told to a command waits for the guest's answer that it runs.
const TOLD_GRACE: Duration = Duration::from_secs(1);

/// A command for a guest.
#[derive(Debug, Clone, Default)]
pub struct ExecCommand {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment variables, besides the usual ones.
    pub env: Vec<(String, String)>,
    /// The working directory.
    pub cwd: Option<String>,
    /// The user, by name or number; root when absent.
    pub user: Option<String>,
    /// Whether standard input is passed on.
    pub stdin: bool,
    /// The command is killed with all its processes after this time.
    pub timeout: Option<Duration>,
    /// A terminal: the command's input, and all its output as standard output.
    pub terminal: Option<Pty>,
    /// Limits of resources.
    pub limits: Vec<ResourceLimit>,
    /// What names it: a command with the same key runs once, and who asks again gets the state and the output of the first. One that
    /// is drawn at random when there is none.
    pub key: Option<ExecKey>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecEnd {
    /// It exited with this status.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
    /// It was killed when its time was over.
    TimedOut,
    /// It was left, and goes on.
    Detached {
        /// What names it.
        key: ExecKey,
    },
}

/// Why a command was not started in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotStarted {
    /// There is no such program; exit status 127, as a shell has it.
    NotFound,
    /// The program is there and cannot be run, or its folder or user cannot be taken; exit status 126.
    NotRunnable,
}

impl EngineError {
    /// Whether this says that a command was not started in the guest, of which nothing has run.
    #[must_use]
    pub fn not_started(&self) -> Option<NotStarted> {
        let source = std::error::Error::source(self)?;
        let LinkError::Rejected { reason } = source.downcast_ref()? else {
            return None;
        };
        match reason {
            Rejection::Start { step, errno } => {
                let is_missing = *errno == rustix::io::Errno::NOENT.raw_os_error();
                Some(if is_missing && step.starts_with("run ") {
                    NotStarted::NotFound
                } else {
                    NotStarted::NotRunnable
                })
            }
            Rejection::Invalid(_) => Some(NotStarted::NotRunnable),
            Rejection::TooManyStreams { .. }
            | Rejection::Frozen
            | Rejection::WorkloadFrozen
            | Rejection::NotReleased
            | Rejection::TooManyCommands { .. }
            | Rejection::Unknown(_) => None,
        }
    }
}

/// What a command wrote, and how it ended.
#[derive(Debug, Clone)]
pub struct ExecOutput {
    /// How it ended.
    pub status: ExecEnd,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl ExecOutput {
    /// Whether it exited with status 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status == ExecEnd::Code(0)
    }
}

/// A session with a guest's agent and the lock of its port.
pub(crate) struct Session {
    port: AgentPort,
    // Of a command's port; the first one belongs to the holder of the sandbox's lock.
    _lock: Option<FileLock>,
}

impl Session {
    pub(crate) fn link(&mut self) -> &mut AgentLink {
        &mut self.port.link
    }

    pub(crate) fn link_ref(&self) -> &AgentLink {
        &self.port.link
    }
}

impl Engine {
    /// Runs a command in a sandbox, passing its streams and what it is told on.
    ///
    /// # Errors
    /// When the sandbox does not run, its agent does not answer, the command cannot be started, or (with a key) whether it has
    /// run is not known any more.
    pub async fn exec<I, O, E>(
        &self,
        name: &str,
        command: ExecCommand,
        io: ExecIo<I, O, E>,
        told: mpsc::Receiver<Told>,
    ) -> Result<ExecEnd>
    where
        I: AsyncRead + Send + Unpin + 'static,
        O: AsyncWrite + Send + Unpin + 'static,
        E: AsyncWrite + Send + Unpin + 'static,
    {
        let mut controls = Controls::new(told);
        let begun = self.begin(name, command, &mut controls).await?;
        begun.carry(io, controls).await
    }

    /// Starts a command in a sandbox and leaves it: what it writes is kept for who attaches. Gives what names it.
    ///
    /// # Errors
    /// As [`Engine::exec`].
    pub async fn exec_detached(&self, name: &str, command: ExecCommand) -> Result<ExecKey> {
        // Nothing is told to it meanwhile.
        let (_silent, told) = mpsc::channel(1);
        let begun = self.begin(name, command, &mut Controls::new(told)).await?;
        Ok(begun.running.key)
    }

    /// Listens to a command that runs, or has ended and left output: what is kept of its output, and what follows.
    /// Whoever listened to it is told so.
    ///
    /// # Errors
    /// When the sandbox does not run, its agent does not answer, or there is no such command.
    pub async fn attach<I, O, E>(
        &self,
        name: &str,
        key: ExecKey,
        io: ExecIo<I, O, E>,
        told: mpsc::Receiver<Told>,
    ) -> Result<ExecEnd>
    where
        I: AsyncRead + Send + Unpin + 'static,
        O: AsyncWrite + Send + Unpin + 'static,
        E: AsyncWrite + Send + Unpin + 'static,
    {
        let (sandbox, mut session) = self.command_session(name).await?;
        let begun = Instant::now();
        let running = loop {
            match session.link().attach(key, [0, 0]).await {
                Ok(running) => break running,
                Err(error) if self.thaws_soon(&error, begun) => {
                    self.mend_if_abandoned(&sandbox).await?;
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(agent_error("attach to a command in", &sandbox, error)),
            }
        };
        let gone = running
            .attachment
            .map_or(0, |at| at.first.iter().sum::<u64>());
        if gone > 0 {
            self.watch.notice(format!(
                "the first {gone} bytes of the command's output are not kept any more"
            ));
        }
        let begun = Begun {
            sandbox,
            _session: session,
            running,
            early: None,
        };
        begun.carry(io, Controls::new(told)).await
    }

    /// Has the guest start a command, or take it up when its key was used before.
    async fn begin(
        &self,
        name: &str,
        command: ExecCommand,
        controls: &mut Controls,
    ) -> Result<Begun> {
        let opened = tokio::select! {
            opened = self.command_session(name) => opened,
            _told = controls.next_urgent() => Err(not_begun(name)),
        };
        let (mut sandbox, mut session) = opened?;
        let (key, recorded) = self.key_of(&sandbox, &command).await?;
        let request = request(command);
        let (mut first, begun) = (recorded, Instant::now());
        let mut again = false;
        loop {
            let asked = session.link().epoch();
            let start = session.link().start_or_attach(key, first, request.clone());
            let error = match until_started(start, controls).await {
                (Some(Ok(running)), early) => {
                    return Ok(Begun {
                        sandbox,
                        _session: session,
                        running,
                        early,
                    });
                }
                (Some(Err(error)), None) => error,
                (Some(Err(_rejected)), Some(_told)) => return Err(not_begun(name)),
                (None, _told) => return Err(unanswered(name)),
            };
            first = first.or(asked);
            if self.thaws_soon(&error, begun) {
                self.mend_if_abandoned(&sandbox).await?;
                tokio::time::sleep(RETRY).await;
            } else if is_of_another_life(&error) && !again {
                // Its agent was restarted before it had read the request, and says so: to the new one it is a new command,
                // unless it was asked for earlier as well.
                (again, first) = (true, recorded);
                drop(session);
                (sandbox, session) = self.command_session(name).await?;
            } else {
                return Err(agent_error("exec in", &sandbox, error));
            }
        }
    }

    /// What names a command, and the epoch in which it was asked for before, if it was.
    async fn key_of(
        &self,
        sandbox: &Sandbox,
        command: &ExecCommand,
    ) -> Result<(ExecKey, Option<Epoch>)> {
        let Some(key) = command.key else {
            let key = stead_agent_link::new_key()
                .map_err(|source| agent_error("exec in", sandbox, source))?;
            return Ok((key, None));
        };
        let epoch = sandbox.epoch.as_deref().unwrap_or_default();
        let recorded = self
            .records
            .first_asked(&sandbox.id, &key.to_string(), epoch)
            .await?;
        Ok((key, recorded.as_deref().map(parse_epoch).transpose()?))
    }

    /// Runs a command in a sandbox and collects what it writes, up to the link's bound.
    ///
    /// # Errors
    /// As [`Engine::exec`], and when it writes too much.
    pub async fn exec_capture(
        &self,
        name: &str,
        command: ExecCommand,
        stdin: &[u8],
    ) -> Result<ExecOutput> {
        let (sandbox, mut session) = self.command_session(name).await?;
        let request = request(command);
        let begun = Instant::now();
        loop {
            match session.link().exec_capture(request.clone(), stdin).await {
                Ok(output) => {
                    return Ok(ExecOutput {
                        status: end_of(output.status),
                        stdout: output.stdout,
                        stderr: output.stderr,
                    });
                }
                Err(error) if self.thaws_soon(&error, begun) => {
                    self.mend_if_abandoned(&sandbox).await?;
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(agent_error("exec in", &sandbox, error)),
            }
        }
    }

    /// Whether the command was only refused because a checkpoint is being taken: it did not
    /// run, and may be sent again.
    fn thaws_soon(&self, error: &LinkError, begun: Instant) -> bool {
        let frozen = matches!(
            error,
            LinkError::Rejected {
                reason: Rejection::Frozen | Rejection::WorkloadFrozen | Rejection::NotReleased
            }
        );
        frozen && begun.elapsed() < self.settings.wait
    }

    /// Has a guest go on that no operation holds up any more.
    async fn mend_if_abandoned(&self, sandbox: &Sandbox) -> Result<()> {
        let jobs = self.records.jobs().await?;
        if jobs
            .iter()
            .any(|job| job.sandbox.as_ref() == Some(&sandbox.id))
        {
            return Ok(());
        }
        let (_lock, now) = self.lock_sandbox(&sandbox.id, "let go on").await?;
        drop(self.attach_locked(&now, ATTACH_TIMEOUT).await?);
        Ok(())
    }

    pub(crate) async fn running(&self, name: &str, attempt: &str) -> Result<Sandbox> {
        let sandbox = self.records.sandbox(name).await?;
        let sandbox = self.notice_crash(sandbox).await?;
        if sandbox.state != SandboxState::Running {
            return Err(wrong_state(attempt, &sandbox, "it does not run"));
        }
        Ok(sandbox)
    }

    /// Opens a session of the sandbox's epoch on the first free command port.
    async fn open_session(&self, sandbox: &Sandbox) -> Result<Session> {
        let Some(launch) = &sandbox.launch else {
            return Err(no_agent(sandbox));
        };
        let (number, lock) = self.free_port(launch, sandbox).await?;
        let (mut port, _ready) = self.attach_to(sandbox, number, ATTACH_TIMEOUT).await?;
        let memory_bytes = self.machine_of(sandbox)?.qemu.memory_bytes;
        let limit = SILENCE_LIMIT + stead_vmm::longest_pause(memory_bytes);
        port.link.set_silence_limit(limit);
        let lock = Some(lock);
        Ok(Session { port, _lock: lock })
    }

    pub(crate) async fn attach_to(
        &self,
        sandbox: &Sandbox,
        number: u8,
        timeout: Duration,
    ) -> Result<(AgentPort, Ready)> {
        let (Some(launch), Some(epoch)) = (&sandbox.launch, &sandbox.epoch) else {
            return Err(no_agent(sandbox));
        };
        let epoch = parse_epoch(epoch)?;
        let mut port = AgentPort::connect(&self.dir.run(launch), number, &sandbox.name).await?;
        let ready = port
            .link
            .reattach(epoch, timeout)
            .await
            .map_err(|source| agent_error("reach the agent of", sandbox, source))?;
        Ok((port, ready))
    }

    /// A session for a command. An agent that has forgotten its epoch is given a new one; one that does not answer while an
    /// operation on its sandbox is under way may stand still for it, and is tried again.
    pub(crate) async fn command_session(&self, name: &str) -> Result<(Sandbox, Session)> {
        let begun = Instant::now();
        let mut greeted = false;
        let mut sandbox = self.running(name, "exec in").await?;
        loop {
            let error = match self.open_session(&sandbox).await {
                Ok(session) => return Ok((sandbox, session)),
                Err(error) => error,
            };
            if lives_another_life(&error) && !greeted {
                greeted = true;
                let (_lock, now) = self.lock_sandbox(&sandbox.id, "greet").await?;
                drop(self.attach_locked(&now, ATTACH_TIMEOUT).await?);
            } else if !self.may_stand_still(&sandbox, &error, begun).await? {
                return Err(error);
            }
            sandbox = self.running(&sandbox.id, "exec in").await?;
        }
    }

    async fn may_stand_still(
        &self,
        sandbox: &Sandbox,
        error: &EngineError,
        begun: Instant,
    ) -> Result<bool> {
        let memory_bytes = self.machine_of(sandbox)?.qemu.memory_bytes;
        if !is_late(error) || begun.elapsed() > stead_vmm::longest_pause(memory_bytes) {
            return Ok(false);
        }
        let jobs = self.records.jobs().await?;
        Ok(jobs
            .iter()
            .any(|job| job.sandbox.as_ref() == Some(&sandbox.id)))
    }

    /// A session on the first port, for one who holds the sandbox's lock: a guest that was rebooted, or whose
    /// agent was restarted, lives a life that nobody has greeted yet. Nobody else can be greeting it. Processes that a capture
    /// has left standing, whose command has died, go on: no other capture can be under way.
    pub(crate) async fn attach_locked(
        &self,
        sandbox: &Sandbox,
        timeout: Duration,
    ) -> Result<Session> {
        let attached = self.attach_to(sandbox, HANDSHAKE_PORT, timeout).await;
        let port = match (attached, &sandbox.launch) {
            (Err(error), Some(launch)) if lives_another_life(&error) => {
                let folder = self.dir.run(launch);
                let mut port = AgentPort::connect(&folder, HANDSHAKE_PORT, &sandbox.name).await?;
                let epoch = port.greet(Reason::Boot, Identity::Keep, timeout).await?;
                self.records.set_epoch(&sandbox.id, &epoch).await?;
                port
            }
            (attached, _) => {
                let (port, ready) = attached?;
                mend(&port, &ready)
                    .await
                    .map_err(|source| agent_error("let the processes go on of", sandbox, source))?;
                port
            }
        };
        Ok(Session { port, _lock: None })
    }

    pub(crate) async fn free_port(
        &self,
        launch: &str,
        sandbox: &Sandbox,
    ) -> Result<(u8, FileLock)> {
        let begun = Instant::now();
        let own = format!("a command, process {}", std::process::id());
        loop {
            for port in HANDSHAKE_PORT + 1..AGENT_PORTS {
                let path = self.port_lock(launch, port);
                if let Attempt::Locked(lock) = FileLock::attempt(&path, &own).at("lock", &path)? {
                    return Ok((port, lock));
                }
            }
            if begun.elapsed() >= self.settings.wait {
                return Err(EngineError::new(
                    Kind::Conflict,
                    format!("exec in sandbox {}", sandbox.name),
                    format!(
                        "all {} command ports are in use (waited {} s)",
                        AGENT_PORTS - 1,
                        self.settings.wait.as_secs()
                    ),
                )
                .next("wait for a command to end, or give --wait a longer time"));
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// A launch has a name of its own, so no lock file of it is ever looked for again.
    pub(crate) fn remove_port_locks(&self, launch: &str) -> Result<()> {
        for port in HANDSHAKE_PORT + 1..AGENT_PORTS {
            let path = self.port_lock(launch, port);
            if path.exists() {
                stead_sys::durable::remove_file(&path).at("remove", &path)?;
            }
        }
        Ok(())
    }

    /// Locks lie with ours, not in the VM's folder: what its user can write we do not open.
    fn port_lock(&self, launch: &str, port: u8) -> std::path::PathBuf {
        self.dir.locks().join(format!("port-{launch}-{port}"))
    }

    /// Asks the guest to power itself off; whether it does is seen by who waits.
    pub(crate) async fn ask_to_power_off(&self, sandbox: &Sandbox) -> bool {
        let Ok(mut session) = self.attach_locked(sandbox, ATTACH_TIMEOUT).await else {
            return false;
        };
        session
            .link()
            .shutdown(ShutdownKind::Poweroff)
            .await
            .is_ok()
    }
}

/// Thaws what stands still, and releases an epoch that was acknowledged and not released.
async fn mend(port: &AgentPort, ready: &Ready) -> std::result::Result<(), LinkError> {
    match (ready.released, ready.workload) {
        (true, WorkloadState::Running) => Ok(()),
        (true, WorkloadState::Frozen) => port.link.thaw_workload().await,
        (false, _) => port.link.release().await.map(drop),
    }
}

/// Waits until the guest has answered whether the command runs. What is told to it before the answer is for the
/// command, if the answer is not far; else it ends the wait.
async fn until_started<T>(
    start: impl Future<Output = T>,
    controls: &mut Controls,
) -> (Option<T>, Option<Told>) {
    tokio::pin!(start);
    let early = tokio::select! {
        started = &mut start => return (Some(started), None),
        told = controls.next_urgent() => told,
    };
    let started = tokio::time::timeout(TOLD_GRACE, start).await;
    (started.ok(), Some(early))
}

/// A command that runs, and the session over which it is listened to.
struct Begun {
    sandbox: Sandbox,
    _session: Session,
    running: Command,
    // What it was told before it ran.
    early: Option<Told>,
}

impl Begun {
    /// Carries its streams until it has ended or is left.
    async fn carry<I, O, E>(self, io: ExecIo<I, O, E>, mut controls: Controls) -> Result<ExecEnd>
    where
        I: AsyncRead + Unpin,
        O: AsyncWrite + Unpin,
        E: AsyncWrite + Unpin,
    {
        let (key, control) = (self.running.key, self.running.control.clone());
        // Signals go by its control.
        let (_silent, signals) = mpsc::channel(1);
        let run = self.running.run(io, signals);
        tokio::pin!(run);
        let mut early = self.early;
        if let Some((rows, cols)) = controls.take_size() {
            control.resize(rows, cols);
        }
        loop {
            let told = match early.take() {
                Some(told) => told,
                None => tokio::select! {
                    ended = &mut run => return ended
                        .map(end_of)
                        .map_err(|source| agent_error("exec in", &self.sandbox, source)),
                    told = controls.next() => told,
                },
            };
            match told {
                Told::Signal(signal) => control.signal(signal),
                Told::Resize { rows, cols } => control.resize(rows, cols),
                Told::Detach => return Ok(ExecEnd::Detached { key }),
            }
        }
    }
}

fn parse_epoch(text: &str) -> Result<Epoch> {
    text.parse()
        .map_err(|source| EngineError::internal("read the sandbox's epoch", "").because(source))
}

fn not_begun(name: &str) -> EngineError {
    EngineError::new(
        Kind::Cancelled,
        format!("exec in sandbox {name}"),
        "interrupted",
    )
    .left("the command was not started; the VM runs on")
}

fn unanswered(name: &str) -> EngineError {
    EngineError::new(
        Kind::Cancelled,
        format!("exec in sandbox {name}"),
        "interrupted while the guest was asked to start the command",
    )
    .left(stead_agent_link::Stage::Start.standing())
}

fn no_agent(sandbox: &Sandbox) -> EngineError {
    EngineError::new(
        Kind::Agent,
        format!("reach the agent of sandbox {}", sandbox.name),
        "it was started without waiting for an agent",
    )
    .next("make a template with stead-agent inside, or use the console")
}

/// Whether the agent said nothing.
pub(crate) fn is_late(error: &EngineError) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref());
    matches!(source, Some(LinkError::Late { .. }))
}

/// Whether the agent answered, and knows another epoch than the recorded one, or none.
pub(crate) fn lives_another_life(error: &EngineError) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref());
    source.is_some_and(is_of_another_life)
}

fn is_of_another_life(error: &LinkError) -> bool {
    matches!(
        error,
        LinkError::StepFailed {
            phase: Phase::Epoch,
            ..
        }
    )
}

pub(crate) fn agent_error(attempt: &str, sandbox: &Sandbox, source: LinkError) -> EngineError {
    let name = &sandbox.name;
    let error = EngineError::new(Kind::Agent, format!("{attempt} sandbox {name}"), "")
        .because(source)
        .left("the VM runs on");
    match error.not_started() {
        // The agent did as it must.
        Some(_) => error
            .of_kind(Kind::Usage)
            .next("see that the guest has this program, folder and user"),
        None => error.next(format!(
            "try again; `stead logs {name}` shows its console, `stead stop {name}` and `stead start {name}` boot it anew"
        )),
    }
}

fn request(command: ExecCommand) -> ExecRequest {
    ExecRequest {
        argv: command
            .argv
            .iter()
            .map(|word| Bytes::from(word.as_str()))
            .collect(),
        env: command
            .env
            .iter()
            .map(|(name, value)| (Bytes::from(name.as_str()), Bytes::from(value.as_str())))
            .collect(),
        cwd: command.cwd.as_deref().map(Bytes::from),
        user: command.user,
        stdin: command.stdin,
        timeout_ms: command.timeout.map_or(0, |timeout| {
            u64::try_from(timeout.as_millis())
                .unwrap_or(u64::MAX)
                .max(1)
        }),
        pty: command.terminal,
        limits: command.limits,
    }
}

fn end_of(status: ExitStatus) -> ExecEnd {
    let byte = |value: i32| u8::try_from(value & 0xff).unwrap_or(u8::MAX);
    match status {
        ExitStatus::Code(code) => ExecEnd::Code(byte(code)),
        ExitStatus::Signal(signal) => ExecEnd::Signal(byte(signal)),
        ExitStatus::TimedOut => ExecEnd::TimedOut,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_signal_that_comes_before_the_answer_waits_for_it_and_not_for_ever() {
        let (send, told) = mpsc::channel(2);
        let mut controls = Controls::new(told);
        let resize = Told::Resize { rows: 24, cols: 80 };
        send.send(resize).await.expect("send");
        send.send(Told::Signal(2)).await.expect("send");
        let soon = async {
            tokio::task::yield_now().await;
            "runs"
        };
        assert_eq!(
            until_started(soon, &mut controls).await,
            (Some("runs"), Some(Told::Signal(2)))
        );
        assert_eq!(
            controls.take_size(),
            Some((24, 80)),
            "a size does not end the wait"
        );
        send.send(Told::Signal(2)).await.expect("send");
        let never = std::future::pending::<()>();
        assert_eq!(
            until_started(never, &mut controls).await,
            (None, Some(Told::Signal(2)))
        );
        drop(send);
        let answer = tokio::task::yield_now();
        assert_eq!(
            until_started(answer, &mut controls).await,
            (Some(()), None),
            "nobody tells it anything"
        );
    }
}
