//! A command that goes from one agent to the next: its descriptors in a fixed order, and the rest in words.
//!
//! The order is: what watches the process, the outputs that are open, the terminal.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use stead_agent_proto::flow::MAX_CHUNK_BYTES;
use stead_agent_proto::message::OutputStream;

use super::{Output, Running, STACK_BYTES};
use crate::core::Core;
use crate::error::{AgentError, Attempt};
use crate::handover::Heir;
use crate::inbox::Inbox;
use crate::pty::Terminal;
use crate::succession::{Led, Unfinished};

/// Leads a command of the agent before, on a thread of its own.
///
/// # Errors
/// When it is not what [`Running::heir`] gave, or the thread cannot be started; the command then meets closed pipes.
pub(crate) fn revive(core: &Arc<Core>, led: Led, inbox: Arc<Inbox>) -> Result<(), AgentError> {
    let attempted = || format!("go on with command {}", led.key);
    let text = attempted();
    let running = running(core, led, inbox)?;
    thread::Builder::new()
        .name("command".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || running.run())
        .attempt(|| text)
        .map(drop)
}

fn running(core: &Arc<Core>, led: Led, inbox: Arc<Inbox>) -> Result<Running, AgentError> {
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "a descriptor is missing");
    let Led {
        key,
        heir,
        left,
        owned,
    } = led;
    let take = || {
        let pid = Pid::from_raw(heir.pid).ok_or_else(missing)?;
        let mut fds = heir.outputs.into_iter();
        let mut next = || fds.next().ok_or_else(missing);
        let pidfd = next()?;
        let stdout = left.outputs[0].then(&mut next).transpose()?;
        let stderr = left.outputs[1].then(&mut next).transpose()?;
        let terminal = left.terminal.then(&mut next).transpose()?;
        Ok::<_, io::Error>((pid, pidfd, [stdout, stderr], terminal))
    };
    let (pid, pidfd, [stdout, stderr], terminal) =
        take().attempt(|| format!("go on with command {key}"))?;
    put_letters(&inbox, &left);
    let output = |stream, pipe, at: usize| Output {
        stream,
        pipe,
        left_bytes: left.left_bytes[at],
    };
    Ok(Running {
        core: Arc::clone(core),
        key,
        inbox,
        pid,
        pidfd,
        owned: left.status.is_none().then_some(owned),
        terminal: terminal.map(Terminal::of),
        stdin: heir.stdin,
        pending: VecDeque::new(),
        stdin_end: false,
        outputs: [
            output(OutputStream::Stdout, stdout, 0),
            output(OutputStream::Stderr, stderr, 1),
        ],
        deadline: left
            .left_ms
            .and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms))),
        timed_out: left.timed_out,
        status: left.status,
        buffer: vec![0; MAX_CHUNK_BYTES],
    })
}

fn put_letters(inbox: &Inbox, left: &Unfinished) {
    if !left.pending.is_empty() {
        inbox.put_stdin(left.pending.clone());
    }
    if left.stdin_end {
        inbox.end_stdin();
    }
    if let Some((rows, columns)) = left.size {
        inbox.put_size(rows, columns);
    }
    left.signals
        .iter()
        .for_each(|&signal| inbox.put_signal(signal));
}

impl Running {
    /// What another agent needs to go on with it, while this one keeps its own.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(super) fn heir(&self) -> Result<(Heir, Unfinished), AgentError> {
        let again = |fd: &OwnedFd| fd.try_clone();
        let copy = || {
            let mut fds = vec![again(&self.pidfd)?];
            for output in &self.outputs {
                fds.extend(output.pipe.as_ref().map(again).transpose()?);
            }
            fds.extend(self.terminal.as_ref().map(Terminal::again).transpose()?);
            let stdin = self.stdin.as_ref().map(again).transpose()?;
            Ok::<_, io::Error>((stdin, fds))
        };
        let (stdin, outputs) = copy().attempt(|| format!("hand command {} over", self.key))?;
        let heir = Heir {
            pid: Pid::as_raw(Some(self.pid)),
            key: Some(self.key.0),
            stdin,
            outputs,
        };
        Ok((heir, self.unfinished()))
    }

    fn unfinished(&self) -> Unfinished {
        let left_ms = |end: Instant| {
            let left = end.saturating_duration_since(Instant::now());
            u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
        };
        Unfinished {
            outputs: self.outputs.each_ref().map(|output| output.pipe.is_some()),
            terminal: self.terminal.is_some(),
            left_bytes: self.outputs.each_ref().map(|output| output.left_bytes),
            pending: self.pending.iter().flatten().copied().collect(),
            stdin_end: self.stdin_end,
            size: None,
            signals: Vec::new(),
            left_ms: self.deadline.map(left_ms),
            timed_out: self.timed_out,
            status: self.status,
        }
    }
}
