//! Output that nobody listens to, read and thrown away so that whoever writes it is neither blocked nor killed.
//!
//! A command may end and leave a background process that holds its output open. That pipe is kept and emptied
//! here until the last writer has closed it.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use stead_agent_proto::ExecKey;

use crate::core::Core;
use crate::error::{AgentError, Attempt};

/// Takes pipes over.
#[derive(Debug)]
pub(crate) struct Drain {
    handed: Mutex<Sender<Left>>,
    bell: Arc<OwnedFd>,
}

/// The other end of [`Drain`].
#[derive(Debug)]
pub(crate) struct Drainer {
    handed: Receiver<Left>,
    bell: Arc<OwnedFd>,
}

/// What a command left behind.
#[derive(Debug)]
struct Left {
    key: ExecKey,
    pipes: Vec<OwnedFd>,
}

impl Drain {
    pub(crate) fn new() -> Result<(Self, Drainer), AgentError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell = Arc::new(eventfd(0, flags).attempt(|| "make an event counter".to_owned())?);
        let (handed, taken) = channel();
        let drainer = Drainer {
            handed: taken,
            bell: Arc::clone(&bell),
        };
        let handed = Mutex::new(handed);
        Ok((Self { handed, bell }, drainer))
    }

    /// Takes over what the command left; it is forgotten once all pipes are closed.
    pub(crate) fn take_over(&self, key: ExecKey, pipes: Vec<OwnedFd>) {
        let handed = self.handed.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(
            handed.send(Left { key, pipes }).is_ok(),
            "the drain's thread never ends"
        );
        match rustix::io::write(&self.bell, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => unreachable!("an own event counter cannot be written: {error}"),
        }
    }
}

impl Drainer {
    /// Empties pipes for ever.
    pub(crate) fn run(self, core: &Arc<Core>) -> Result<(), AgentError> {
        let mut kept: Vec<Left> = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            self.wait(&kept)?;
            let mut count = [0; 8];
            match rustix::io::read(&self.bell, &mut count) {
                Ok(_) | Err(Errno::AGAIN) => {}
                Err(error) => return Err(error).attempt(|| "read an event counter".to_owned()),
            }
            kept.extend(self.handed.try_iter());
            for left in &mut kept {
                left.pipes.retain(|pipe| is_open(pipe, &mut buffer));
            }
            let (open, gone) = kept.into_iter().partition(|left| !left.pipes.is_empty());
            kept = open;
            let gone: Vec<Left> = gone;
            core.with(|state| gone.iter().for_each(|left| state.forget(left.key)));
        }
    }

    fn wait(&self, kept: &[Left]) -> Result<(), AgentError> {
        let pipes = kept.iter().flat_map(|left| &left.pipes);
        let mut fds: Vec<PollFd<'_>> = pipes.map(|pipe| PollFd::new(pipe, PollFlags::IN)).collect();
        fds.push(PollFd::new(&*self.bell, PollFlags::IN));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error).attempt(|| "wait for left-over output".to_owned()),
        }
    }
}

/// Reads once and throws away; says whether somebody can still write. The pipe does not block.
fn is_open(pipe: &OwnedFd, buffer: &mut [u8]) -> bool {
    match rustix::io::read(pipe, buffer) {
        Ok(0) => false,
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => true,
        Err(_) => false,
    }
}
