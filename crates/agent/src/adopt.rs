//! Children of an agent that another has taken the place of: they go on, are listened to, and are reaped.
//!
//! Nobody hears them any more, as with commands of a host that has gone: their output is read and thrown away, so that they
//! do not block, and their input stays open.

use std::os::fd::OwnedFd;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};

use crate::error::{AgentError, Attempt, chain};
use crate::handover::Heir;
use crate::reaper::{self, Owned};

const STACK_BYTES: usize = 256 * 1024;
const BUFFER_BYTES: usize = 64 * 1024;

/// A child, and what is left of it.
#[derive(Debug)]
struct Adopted {
    pid: Pid,
    // Until it has been reaped.
    alive: Option<(OwnedFd, Owned)>,
    _stdin: Option<OwnedFd>,
    outputs: Vec<OwnedFd>,
}

impl Adopted {
    /// What it is waited for with.
    fn descriptors(&self) -> impl Iterator<Item = &OwnedFd> {
        let pidfd = self.alive.iter().map(|(pidfd, _)| pidfd);
        pidfd.chain(&self.outputs)
    }
}

/// Looks after the children until nothing is left of them, on a thread of its own.
///
/// # Errors
/// When the thread cannot be started; what the children write then meets a closed pipe.
pub(crate) fn adopt(heirs: Vec<Heir>) -> Result<(), AgentError> {
    let mut adopted: Vec<Adopted> = heirs.into_iter().filter_map(take).collect();
    if adopted.is_empty() {
        return Ok(());
    }
    thread::Builder::new()
        .name("inherited".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let mut buffer = vec![0; BUFFER_BYTES];
            while !adopted.is_empty() {
                if let Err(error) = tend(&mut adopted, &mut buffer) {
                    // Without it, they would block for ever.
                    eprintln!("stead-agent: {}", chain(&error));
                    return;
                }
            }
        })
        .attempt(|| "start a thread for inherited commands".to_owned())
        .map(drop)
}

/// One that is no child of this process, or is gone already, has nothing to wait for but its output.
fn take(heir: Heir) -> Option<Adopted> {
    let pid = Pid::from_raw(heir.pid)?;
    let owned = reaper::adopt(heir.pid);
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let is_child = waitid(WaitId::Pid(pid), options).is_ok();
    let alive = is_child.then(|| pidfd_open(pid, PidfdFlags::empty()).ok());
    Some(Adopted {
        pid,
        alive: alive.flatten().map(|pidfd| (pidfd, owned)),
        _stdin: heir.stdin,
        outputs: heir.outputs,
    })
}

fn tend(adopted: &mut Vec<Adopted>, buffer: &mut [u8]) -> Result<(), AgentError> {
    wait(adopted)?;
    for child in &mut *adopted {
        child.outputs.retain(|output| is_open(output, buffer));
        if child.alive.is_some() && has_been_reaped(child.pid)? {
            child.alive = None;
        }
    }
    adopted.retain(|child| child.alive.is_some() || !child.outputs.is_empty());
    Ok(())
}

fn wait(adopted: &[Adopted]) -> Result<(), AgentError> {
    let mut fds: Vec<PollFd<'_>> = adopted
        .iter()
        .flat_map(Adopted::descriptors)
        .map(|fd| PollFd::new(fd, PollFlags::IN))
        .collect();
    if fds.is_empty() {
        return Ok(());
    }
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error).attempt(|| "wait for inherited commands".to_owned()),
    }
}

fn has_been_reaped(pid: Pid) -> Result<bool, AgentError> {
    match waitid(
        WaitId::Pid(pid),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    ) {
        Ok(status) => Ok(status.is_some()),
        Err(Errno::CHILD) => Ok(true),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error).attempt(|| format!("reap {pid:?}")),
    }
}

/// Reads once and throws away; says whether somebody can still write. A terminal that everybody has closed gives an error.
fn is_open(output: &OwnedFd, buffer: &mut [u8]) -> bool {
    match rustix::io::read(output, buffer) {
        Ok(0) => false,
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => true,
        Err(_) => false,
    }
}
