//! Becoming a command.
//!
//! `serve` starts `stead-agent launch` with a socket as standard input and sends one message: what to run, and
//! its three standard streams as descriptors. Until then the launcher is harmless, so that it can be made
//! ready before it is known whether the command may run at all. The launcher leaves the agent's session and
//! out-of-memory protection, changes user and folder, and executes the program. The socket closes itself
//! then; when a step fails, the step and the error number come back through it.

use std::ffi::OsStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Gid, Pid, Uid};
use serde::{Deserialize, Serialize};
use stead_agent_proto::frame::MAX_PAYLOAD_BYTES;
use stead_agent_proto::message::{Bytes, ExecRequest, ResourceLimit};

use crate::account::Account;
use crate::error::{AgentError, Attempt};
use crate::reaper::{self, Owned};
use crate::{limits, pty, workload};

/// A request fits into a frame; the account adds a little.
const MAX_ORDER_BYTES: usize = MAX_PAYLOAD_BYTES + 32 * 1024;
const MAX_FAILURE_BYTES: usize = 4096;

/// What to run, and as whom.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    argv: Vec<Bytes>,
    env: Vec<(Bytes, Bytes)>,
    cwd: Option<Bytes>,
    home: String,
    identity: Option<(u32, u32, Vec<u32>)>,
    /// Whether the standard streams are a terminal that is to control the command's session.
    terminal: bool,
    limits: Vec<ResourceLimit>,
}

/// Why a command could not be started.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// The step that failed.
    pub(crate) step: String,
    /// The operating system's error number, 0 when there is none.
    pub(crate) errno: i32,
}

/// The three standard streams of a command.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// A launcher that waits for its order.
#[derive(Debug)]
pub(crate) struct Launcher {
    pub(crate) child: std::process::Child,
    pub(crate) owned: Owned,
    socket: OwnedFd,
    order: Vec<u8>,
}

impl Launcher {
    /// Starts a launcher and prepares its order; nothing of the command happens yet.
    pub(crate) fn prepare(request: &ExecRequest, account: &Account) -> Result<Self, AgentError> {
        let order = Order {
            argv: request.argv.clone(),
            env: environment(request, account),
            cwd: request.cwd.clone(),
            home: account.home.clone(),
            identity: request
                .user
                .as_ref()
                .map(|_| (account.uid, account.gid, account.groups.clone())),
            terminal: request.pty.is_some(),
            limits: request.limits.clone(),
        };
        let order = postcard::to_stdvec(&order)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
            .attempt(|| "encode what to run".to_owned())?;
        let (own, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .attempt(|| "make a socket pair".to_owned())?;
        let start = || {
            Command::new("/proc/self/exe")
                .arg("launch")
                .env_clear()
                .stdin(Stdio::from(other))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
        };
        let (child, owned) = reaper::own(start).attempt(|| "start a launcher".to_owned())?;
        let mut launcher = Self {
            child,
            owned,
            socket: own,
            order,
        };
        // Before it becomes a command: what it starts is then born there.
        if let Err(error) = workload::admit_command(launcher.number()) {
            launcher.give_up();
            return Err(error);
        }
        Ok(launcher)
    }

    fn number(&self) -> i32 {
        Pid::from_child(&self.child).as_raw_nonzero().get()
    }

    /// Ends the launcher and takes its remains.
    pub(crate) fn give_up(&mut self) {
        // One that has ended by itself takes the signal without a complaint.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            eprintln!("stead-agent: end a launcher: {error}");
        }
    }

    /// Sends the order: from here on the command runs. Does not block: the order fits into the socket.
    pub(crate) fn release(&self, streams: &Streams) -> Result<(), AgentError> {
        let fds = [
            streams.stdin.as_fd(),
            streams.stdout.as_fd(),
            streams.stderr.as_fd(),
        ];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(
            control.push(SendAncillaryMessage::ScmRights(&fds)),
            "the buffer has room for three"
        );
        let parts = [IoSlice::new(&self.order)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(&self.socket, &parts, &mut control, flags)
            .attempt(|| "send the launcher its order".to_owned())?;
        Ok(())
    }

    /// Readable once the command runs or could not be started.
    pub(crate) fn answer_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What came of it, once [`Launcher::answer_fd`] is readable: the socket closes when the program runs.
    pub(crate) fn answer(&self) -> Result<(), Failure> {
        let mut buffer = [0; MAX_FAILURE_BYTES];
        match rustix::io::read(&self.socket, &mut buffer) {
            Ok(0) => Ok(()),
            Ok(length) => Err(
                postcard::from_bytes(&buffer[..length]).unwrap_or_else(|error| Failure {
                    step: format!(
                        "start the program (the launcher's answer is not readable: {error})"
                    ),
                    errno: 0,
                }),
            ),
            Err(error) => Err(Failure {
                step: "hear from the launcher".to_owned(),
                errno: error.raw_os_error(),
            }),
        }
    }
}

fn environment(request: &ExecRequest, account: &Account) -> Vec<(Bytes, Bytes)> {
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let mut all: Vec<(Bytes, Bytes)> = [
        ("PATH", path),
        ("HOME", &account.home),
        ("USER", &account.name),
        ("LOGNAME", &account.name),
        ("SHELL", &account.shell),
    ]
    .into_iter()
    .map(|(name, value)| (Bytes::from(name), Bytes::from(value)))
    .collect();
    if let Some(terminal) = &request.pty {
        all.push((Bytes::from("TERM"), Bytes::from(pty::kind(&terminal.term))));
    }
    all.retain(|(name, _)| request.env.iter().all(|(other, _)| other != name));
    all.extend(request.env.iter().cloned());
    all
}

/// The launcher itself. Gives back only an error; else the process is the command.
pub(crate) fn run() -> Result<(), AgentError> {
    // Past the standard streams, and closed by itself when the program runs.
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .attempt(|| "keep the launch socket".to_owned())?;
    let Some((order, streams)) = receive(&socket)? else {
        // The agent thought better of it.
        return Ok(());
    };
    let failure = become_command(&order, streams);
    let bytes = postcard::to_stdvec(&failure)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
        .attempt(|| "encode why the command did not start".to_owned())?;
    rustix::io::write(&socket, &bytes)
        .attempt(|| "say why the command did not start".to_owned())?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> Result<Option<(Order, Streams)>, AgentError> {
    let mut bytes = vec![0; MAX_ORDER_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)
        .attempt(|| "receive what to run".to_owned())?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let order = postcard::from_bytes(&bytes[..received.bytes])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        .attempt(|| "read what to run".to_owned())?;
    let [stdin, stdout, stderr] = <[OwnedFd; 3]>::try_from(fds)
        .map_err(|fds| io::Error::other(format!("{} descriptors came, not 3", fds.len())))
        .attempt(|| "receive the standard streams".to_owned())?;
    Ok(Some((
        order,
        Streams {
            stdin,
            stdout,
            stderr,
        },
    )))
}

fn become_command(order: &Order, streams: Streams) -> Failure {
    match prepare(order, streams) {
        Err(failure) => failure,
        Ok(mut command) => {
            let program = order.argv.first().cloned().unwrap_or_default();
            let error = command.exec();
            Failure {
                step: format!("run {program:?}"),
                errno: error.raw_os_error().unwrap_or(0),
            }
        }
    }
}

fn prepare(order: &Order, streams: Streams) -> Result<Command, Failure> {
    use rustix::{process, stdio, thread};
    let Some((program, arguments)) = order.argv.split_first() else {
        return Err(Failure {
            step: "there is no program to run".to_owned(),
            errno: 0,
        });
    };
    failing(process::setsid().map(drop), || {
        "leave the agent's session".to_owned()
    })?;
    failing(leave_protection(), || {
        "leave the agent's out-of-memory protection".to_owned()
    })?;
    if order.terminal {
        failing(process::ioctl_tiocsctty(&streams.stdin), || {
            "take the terminal".to_owned()
        })?;
    }
    set_limits(&order.limits)?;
    process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    if let Some((uid, gid, groups)) = &order.identity {
        let groups: Vec<Gid> = groups.iter().copied().map(Gid::from_raw).collect();
        failing(thread::set_thread_groups(&groups), || {
            "take the user's groups".to_owned()
        })?;
        failing(thread::set_thread_gid(Gid::from_raw(*gid)), || {
            format!("become group {gid}")
        })?;
        failing(thread::set_thread_uid(Uid::from_raw(*uid)), || {
            format!("become user {uid}")
        })?;
    }
    match &order.cwd {
        Some(cwd) => failing(process::chdir(OsStr::from_bytes(&cwd.0)), || {
            format!("go to {cwd:?}")
        })?,
        // A user without a home starts at the root.
        None => failing(
            process::chdir(order.home.as_str()).or_else(|_| process::chdir("/")),
            || "go to /".to_owned(),
        )?,
    }
    failing(stdio::dup2_stdin(streams.stdin), || {
        "take standard input".to_owned()
    })?;
    failing(stdio::dup2_stdout(streams.stdout), || {
        "take standard output".to_owned()
    })?;
    failing(stdio::dup2_stderr(streams.stderr), || {
        "take standard error".to_owned()
    })?;
    let mut command = Command::new(OsStr::from_bytes(&program.0));
    command
        .args(
            arguments
                .iter()
                .map(|argument| OsStr::from_bytes(&argument.0)),
        )
        .env_clear()
        .envs(
            order
                .env
                .iter()
                .map(|(name, value)| (OsStr::from_bytes(&name.0), OsStr::from_bytes(&value.0))),
        );
    Ok(command)
}

fn set_limits(limits: &[ResourceLimit]) -> Result<(), Failure> {
    failing(limits::restore_usual(), || {
        "give the command the usual limit of descriptors".to_owned()
    })?;
    for limit in limits {
        limits::apply(limit).map_err(|(step, error)| Failure {
            step,
            errno: error.raw_os_error(),
        })?;
    }
    Ok(())
}

fn leave_protection() -> rustix::io::Result<()> {
    let file = rustix::fs::open(
        "/proc/self/oom_score_adj",
        rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    rustix::io::write(&file, b"0").map(drop)
}

fn failing<T>(result: rustix::io::Result<T>, step: impl FnOnce() -> String) -> Result<T, Failure> {
    result.map_err(|error| Failure {
        step: step(),
        errno: error.raw_os_error(),
    })
}
