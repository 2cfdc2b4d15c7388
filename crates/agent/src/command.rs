//! One command: its three streams, its signals, its time and its end, on one thread.
//!
//! ```text
//!   prepared ── may_start, under the lock ──▶ released ──▶ running ──▶ ended ──▶ all output sent: Exit
//!      │ no: the epoch, the session or a freeze came first                └──▶ pipes still held open ──▶ drain
//!      └──▶ rejected; nothing has run
//! ```
//! The thread waits level-triggered for everything at once: output (while there is credit and room), the end of
//! the process, room in its input, the inbox's bell, and its time. Nothing it waits for can be missed.
//!
//! When nobody listens any more (the host has gone, another epoch has begun) the command goes on, and the last of its
//! output is kept for who attaches; its input stays open without bytes, because an end would make it
//! take half an input for a whole one.

mod handed;

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open,
    pidfd_send_signal, waitid,
};
use stead_agent_proto::ExecKey;
use stead_agent_proto::flow::MAX_CHUNK_BYTES;
use stead_agent_proto::message::{ExecRequest, ExitStatus, OutputStream, Pty, Rejection};

use crate::account;
use crate::core::Core;
use crate::drain::Left;
use crate::error::{self, AgentError, Attempt};
use crate::inbox::Inbox;
use crate::launch::{Failure, Launcher, Streams};
use crate::pty::{Terminal, TerminalSize};
use crate::reaper::Owned;

pub(crate) use handed::revive;

const STACK_BYTES: usize = 256 * 1024;
/// How long a terminal may be silent after its command before the command's output counts as complete. The kernel passes on
/// what was written a little later; when nobody has the terminal open any more, it says so and nothing is waited for.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// Begins a command on a thread of its own.
pub(crate) fn spawn(
    core: Arc<Core>,
    key: ExecKey,
    request: ExecRequest,
    inbox: Arc<Inbox>,
) -> Result<(), String> {
    thread::Builder::new()
        .name("command".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || match start(&core, key, &request, &inbox) {
            Ok(Some(running)) => running.run(),
            Ok(None) => {}
            Err(reason) => core.refuse(key, reason),
        })
        .map(drop)
        .map_err(|error| format!("start a thread for the command: {error}"))
}

/// Why a command never ran, or why its start is unknown.
fn rejection(error: &AgentError) -> Rejection {
    Rejection::Start {
        step: error::chain(error),
        errno: 0,
    }
}

/// The command, running; nothing when it might not run any more and was refused.
fn start(
    core: &Arc<Core>,
    key: ExecKey,
    request: &ExecRequest,
    inbox: &Arc<Inbox>,
) -> Result<Option<Running>, Rejection> {
    let own = rustix::process::getuid().as_raw().to_string();
    let account =
        account::resolve(request.user.as_deref().unwrap_or(&own)).map_err(Rejection::Invalid)?;
    let (streams, ends) = match &request.pty {
        Some(wanted) => terminal(wanted, request.stdin, account.uid),
        None => pipes(request.stdin),
    }
    .map_err(|error| rejection(&error))?;
    let mut launcher = Launcher::prepare(request, &account).map_err(|error| rejection(&error))?;
    // The point of no return, under the lock: after another epoch has begun it cannot be passed.
    let released = core.release(key, || launcher.release(&streams));
    drop(streams);
    match released {
        Some(Ok(())) => {}
        Some(Err(error)) => {
            launcher.give_up();
            return Err(rejection(&error));
        }
        None => {
            launcher.give_up();
            return Ok(None);
        }
    }
    let deadline = (request.timeout_ms > 0)
        .then(|| Instant::now() + Duration::from_millis(request.timeout_ms));
    // One that was not quick enough is ended like any other command over its time: part of it may have run.
    if let Err(Failure { step, errno }) = await_answer(&mut launcher, deadline) {
        launcher.give_up();
        return Err(Rejection::Start { step, errno });
    }
    let pid = Pid::from_child(&launcher.child);
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(error) => {
            launcher.give_up();
            return Err(Rejection::Start {
                step: "watch the command, which was killed".to_owned(),
                errno: error.raw_os_error(),
            });
        }
    };
    let number = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
    core.tell(|agent| agent.started(key, number, now_ns()));
    Ok(Some(Running {
        core: Arc::clone(core),
        key,
        inbox: Arc::clone(inbox),
        pid,
        pidfd,
        owned: Some(launcher.owned),
        terminal: ends.terminal,
        stdin: ends.stdin,
        pending: VecDeque::new(),
        stdin_end: false,
        outputs: [
            Output::new(OutputStream::Stdout, Some(ends.stdout)),
            Output::new(OutputStream::Stderr, ends.stderr),
        ],
        deadline,
        timed_out: false,
        status: None,
        buffer: vec![0; MAX_CHUNK_BYTES],
    }))
}

/// The guest's wall clock in nanoseconds since 1970.
fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

/// Waits until the program runs or its time is over: a file system that hangs may hold it up.
fn await_answer(launcher: &mut Launcher, deadline: Option<Instant>) -> Result<(), Failure> {
    loop {
        let limit = time_left(deadline);
        let ready = poll(
            &mut [PollFd::from_borrowed_fd(
                launcher.answer_fd(),
                PollFlags::IN,
            )],
            limit.as_ref(),
        );
        match ready {
            Ok(0) => return Ok(()),
            Ok(_) => return launcher.answer(),
            Err(Errno::INTR) => {}
            Err(error) => {
                return Err(Failure {
                    step: "wait for the launcher".to_owned(),
                    errno: error.raw_os_error(),
                });
            }
        }
    }
}

fn time_left(deadline: Option<Instant>) -> Option<Timespec> {
    deadline.map(|end| {
        let left = end.saturating_duration_since(Instant::now());
        Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        }
    })
}

/// The agent's ends of a command's streams; they do not block.
struct Ends {
    // Instead of pipes: one for input and output, which is hung up when the last of the ends is closed.
    terminal: Option<Terminal>,
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
}

fn terminal(wanted: &Pty, with_stdin: bool, owner: u32) -> Result<(Streams, Ends), AgentError> {
    let (terminal, streams) = Terminal::open(size(wanted.rows, wanted.cols), owner)?;
    let ends = Ends {
        stdin: with_stdin.then(|| terminal.side()).transpose()?,
        stdout: terminal.side()?,
        stderr: None,
        terminal: Some(terminal),
    };
    Ok((streams, ends))
}

fn size(rows: u16, columns: u16) -> TerminalSize {
    TerminalSize { rows, columns }
}

fn pipes(with_stdin: bool) -> Result<(Streams, Ends), AgentError> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).attempt(|| "make a pipe".to_owned());
    let (stdin, own_stdin) = if with_stdin {
        let (read, write) = pipe()?;
        (read, Some(unblocked(write)?))
    } else {
        (null()?, None)
    };
    let (own_stdout, stdout) = pipe()?;
    let (own_stderr, stderr) = pipe()?;
    let ends = Ends {
        terminal: None,
        stdin: own_stdin,
        stdout: unblocked(own_stdout)?,
        stderr: Some(unblocked(own_stderr)?),
    };
    Ok((
        Streams {
            stdin,
            stdout,
            stderr,
        },
        ends,
    ))
}

fn null() -> Result<OwnedFd, AgentError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty())
        .attempt(|| "open /dev/null".to_owned())
}

fn unblocked(fd: OwnedFd) -> Result<OwnedFd, AgentError> {
    fcntl_getfl(&fd)
        .and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
        .attempt(|| "make a pipe that does not block".to_owned())?;
    Ok(fd)
}

/// One output stream.
#[derive(Debug)]
struct Output {
    stream: OutputStream,
    pipe: Option<OwnedFd>,
    // After the end of the command: what it had written and is still to be read.
    left_bytes: Option<u64>,
}

impl Output {
    fn new(stream: OutputStream, pipe: Option<OwnedFd>) -> Self {
        Self {
            stream,
            pipe,
            left_bytes: None,
        }
    }

    fn is_delivered(&self) -> bool {
        self.pipe.is_none() || self.left_bytes == Some(0)
    }
}

/// A command that runs.
#[derive(Debug)]
struct Running {
    core: Arc<Core>,
    key: ExecKey,
    inbox: Arc<Inbox>,
    pid: Pid,
    pidfd: OwnedFd,
    // Held until the command has been reaped.
    owned: Option<Owned>,
    terminal: Option<Terminal>,
    stdin: Option<OwnedFd>,
    pending: VecDeque<Vec<u8>>,
    stdin_end: bool,
    outputs: [Output; 2],
    deadline: Option<Instant>,
    timed_out: bool,
    status: Option<ExitStatus>,
    buffer: Vec<u8>,
}

/// What was ready when the command's thread woke up.
#[derive(Debug, Default)]
struct Ready {
    bell: bool,
    ended: bool,
    stdin: bool,
    stdin_closed: bool,
    outputs: [bool; 2],
}

impl Running {
    fn run(mut self) {
        while !self.is_complete() {
            self.core.pause_for_handover(self.key, || self.heir());
            let wanted = self.wanted_outputs();
            let ready = self.wait(wanted);
            if ready.bell {
                self.read_inbox();
            }
            if ready.stdin_closed {
                self.on_stdin_closed();
            } else if ready.stdin {
                self.write_stdin();
            }
            for at in 0..self.outputs.len() {
                if ready.outputs[at] {
                    self.read_output(at);
                }
            }
            if ready.ended {
                self.on_end();
            }
            if self.deadline.is_some_and(|end| end <= Instant::now()) {
                self.on_deadline();
            }
        }
        self.finish();
    }

    fn is_complete(&self) -> bool {
        self.status.is_some() && self.outputs.iter().all(Output::is_delivered)
    }

    /// How much of each output may be read now; nothing for one that must wait.
    fn wanted_outputs(&mut self) -> [bool; 2] {
        let key = self.key;
        let outputs = &self.outputs;
        self.core.with(|state| {
            [0, 1].map(|at| {
                let open = outputs[at].pipe.is_some() && outputs[at].left_bytes != Some(0);
                open && state.agent.output_room(key, outputs[at].stream) > 0
            })
        })
    }

    fn wait(&self, wanted: [bool; 2]) -> Ready {
        let mut fds = vec![PollFd::from_borrowed_fd(self.inbox.bell(), PollFlags::IN)];
        let mut ended_at = None;
        if self.status.is_none() {
            ended_at = Some(fds.len());
            fds.push(PollFd::new(&self.pidfd, PollFlags::IN));
        }
        let mut stdin_at = None;
        // A terminal that is hung up would wake it for ever.
        let is_watched = self.terminal.is_none() || self.has_input();
        if let Some(stdin) = self.stdin.as_ref().filter(|_| is_watched) {
            stdin_at = Some(fds.len());
            // Without input to write, only the end of the reader is of interest.
            let events = if self.has_input() {
                PollFlags::OUT
            } else {
                PollFlags::empty()
            };
            fds.push(PollFd::new(stdin, events));
        }
        let mut output_at = [None; 2];
        for (at, output) in self.outputs.iter().enumerate() {
            if let Some(pipe) = output.pipe.as_ref().filter(|_| wanted[at]) {
                output_at[at] = Some(fds.len());
                fds.push(PollFd::new(pipe, PollFlags::IN));
            }
        }
        let limit = time_left(self.deadline);
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => unreachable!("own descriptors cannot be waited for: {error}"),
        }
        let events = |at: Option<usize>| at.map_or(PollFlags::empty(), |at| fds[at].revents());
        Ready {
            bell: events(Some(0)).contains(PollFlags::IN),
            ended: !events(ended_at).is_empty(),
            stdin: events(stdin_at).intersects(PollFlags::OUT | PollFlags::HUP),
            stdin_closed: events(stdin_at).contains(PollFlags::ERR),
            outputs: output_at.map(|at| !events(at).is_empty()),
        }
    }

    fn read_inbox(&mut self) {
        let letters = self.inbox.take();
        if self.stdin.is_some() {
            self.pending.extend(letters.stdin);
            self.stdin_end |= letters.stdin_end;
            self.close_finished_stdin();
        }
        if let Some((rows, columns)) = letters.size
            && let Some(terminal) = &self.terminal
            && let Err(error) = terminal.resize(size(rows, columns))
        {
            eprintln!("stead-agent: {}", error::chain(&error));
        }
        for number in letters.signals {
            if let Some(signal) = Signal::from_named_raw(number).filter(|_| self.status.is_none()) {
                self.signal_group(signal);
            }
        }
    }

    /// The group's number stays taken until the command has been reaped, so no other group is ever hit.
    fn signal_group(&self, signal: Signal) {
        match kill_process_group(self.pid, signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => eprintln!("stead-agent: signal group {:?}: {error}", self.pid),
        }
    }

    /// Whether there is something to write: input, or a terminal's end of input.
    fn has_input(&self) -> bool {
        !self.pending.is_empty() || (self.stdin_end && self.terminal.is_some())
    }

    fn write_stdin(&mut self) {
        let (Some(stdin), Some(front)) = (&self.stdin, self.pending.front_mut()) else {
            self.end_terminal_input();
            return;
        };
        match rustix::io::write(stdin, front) {
            Ok(written) => {
                front.drain(..written);
                if front.is_empty() {
                    self.pending.pop_front();
                }
                let key = self.key;
                self.core.tell(|agent| agent.stdin_consumed(key, written));
                self.close_finished_stdin();
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.on_stdin_closed(),
        }
    }

    /// A terminal's input is not closed: its end is typed. A terminal that reads byte by byte has none.
    fn end_terminal_input(&mut self) {
        let (Some(terminal), Some(stdin)) = (&self.terminal, &self.stdin) else {
            return;
        };
        let typed = match terminal.end_of_input() {
            Ok(Some(code)) => rustix::io::write(stdin, &[code]).map(drop),
            Ok(None) => Ok(()),
            Err(_) => Err(Errno::IO),
        };
        if !matches!(typed, Err(Errno::AGAIN | Errno::INTR)) {
            self.on_stdin_closed();
        }
    }

    fn close_finished_stdin(&mut self) {
        if self.stdin_end && self.pending.is_empty() && self.terminal.is_none() {
            self.stdin = None;
        }
    }

    fn on_stdin_closed(&mut self) {
        self.stdin = None;
        self.pending.clear();
        let key = self.key;
        self.core.tell(|agent| agent.stdin_closed(key));
    }

    fn read_output(&mut self, at: usize) {
        let output = &mut self.outputs[at];
        let (key, stream) = (self.key, output.stream);
        let Some(pipe) = &output.pipe else {
            return;
        };
        let room = self.core.with(|state| state.agent.output_room(key, stream));
        let left = output.left_bytes.map_or(usize::MAX, |left| {
            usize::try_from(left).unwrap_or(usize::MAX)
        });
        let length = room.min(left).min(self.buffer.len());
        if length == 0 {
            return;
        }
        match rustix::io::read(pipe, &mut self.buffer[..length]) {
            Ok(0) => output.pipe = None,
            Ok(count) => {
                if let Some(left) = &mut output.left_bytes {
                    *left -= count as u64;
                }
                let data = &self.buffer[..count];
                self.core.tell(|agent| agent.output(key, stream, data));
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => output.pipe = None,
        }
    }

    /// The command has ended: everything that it wrote is in the pipes now. What comes later is not its own.
    fn on_end(&mut self) {
        let status = match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => ExitStatus::Code(code),
                (None, Some(signal)) => ExitStatus::Signal(signal),
                (None, None) => return,
            },
            Ok(None) | Err(Errno::INTR) => return,
            Err(error) => unreachable!("an own child cannot be reaped: {error}"),
        };
        self.owned = None;
        self.status = Some(if self.timed_out {
            ExitStatus::TimedOut
        } else {
            status
        });
        self.stdin = None;
        self.pending.clear();
        self.deadline = None;
        if self.terminal.is_some() {
            self.deadline = Some(Instant::now() + LAST_WORDS);
            return;
        }
        for output in &mut self.outputs {
            let waiting = output.pipe.as_ref().map(rustix::io::ioctl_fionread);
            match waiting {
                Some(Ok(bytes)) => output.left_bytes = Some(bytes),
                Some(Err(_)) => output.pipe = None,
                None => {}
            }
        }
    }

    /// A command that has ended may have left others at its terminal: nothing came from it for a while, then that is all.
    fn on_last_words(&mut self) {
        for output in &mut self.outputs {
            let waiting = output.pipe.as_ref().map(rustix::io::ioctl_fionread);
            match waiting {
                Some(Ok(0)) => output.left_bytes = Some(0),
                // The host is slow, or it goes on writing.
                Some(Ok(_)) => self.deadline = Some(Instant::now() + LAST_WORDS),
                Some(Err(_)) => output.pipe = None,
                None => {}
            }
        }
    }

    fn on_deadline(&mut self) {
        self.deadline = None;
        if self.status.is_some() {
            self.on_last_words();
        } else {
            self.timed_out = true;
            self.signal_group(Signal::KILL);
            // A launcher that has not become the command yet leads no group.
            if let Err(error) = pidfd_send_signal(&self.pidfd, Signal::KILL)
                && error != Errno::SRCH
            {
                eprintln!("stead-agent: kill {:?}: {error}", self.pid);
            }
        }
    }

    fn finish(self) {
        let Some(status) = self.status else {
            unreachable!("a command is finished when it has ended");
        };
        let pipes = self.outputs.into_iter().filter_map(|output| output.pipe);
        let left = Left::new(self.key, Pid::as_raw(Some(self.pid)), pipes);
        self.core.finish(status, left);
    }
}
