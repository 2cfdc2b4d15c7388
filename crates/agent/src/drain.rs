//! Output that nobody listens to, read and thrown away so that whoever writes it is neither blocked nor killed.
//!
//! A command may end and leave a background process that holds its output open. That pipe is kept and emptied
//! here until the last writer has closed it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use stead_agent_proto::ExecKey;

use crate::core::Core;
use crate::error::{AgentError, Attempt};
use crate::handover::Heir;

/// Takes pipes over.
#[derive(Debug, Clone)]
pub(crate) struct Drain {
    kept: Arc<Mutex<Vec<Left>>>,
    bell: Arc<OwnedFd>,
}

/// What a command left behind.
#[derive(Debug)]
pub(crate) struct Left {
    key: ExecKey,
    pid: i32,
    pipes: Vec<Arc<OwnedFd>>,
}

impl Left {
    /// What is left of the command, which was process `pid`. The pipes do not block.
    pub(crate) fn new(key: ExecKey, pid: i32, pipes: impl IntoIterator<Item = OwnedFd>) -> Self {
        let pipes = pipes.into_iter().map(Arc::new).collect();
        Self { key, pid, pipes }
    }

    /// The command.
    pub(crate) fn key(&self) -> ExecKey {
        self.key
    }

    fn heir(&self) -> io::Result<Heir> {
        let pipes = self.pipes.iter().map(|pipe| pipe.try_clone());
        Ok(Heir {
            pid: self.pid,
            key: Some(self.key.0),
            stdin: None,
            outputs: pipes.collect::<io::Result<_>>()?,
        })
    }
}

impl Drain {
    pub(crate) fn new() -> Result<Self, AgentError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            kept: Arc::default(),
            bell: Arc::new(eventfd(0, flags).attempt(|| "make an event counter".to_owned())?),
        })
    }

    /// Takes over what the command left; it is forgotten once all pipes are closed.
    pub(crate) fn take_over(&self, left: Left) {
        self.lock().push(left);
        match rustix::io::write(&self.bell, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => unreachable!("an own event counter cannot be written: {error}"),
        }
    }

    /// What another agent needs to go on with it.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn heirs(&self) -> Result<Vec<Heir>, AgentError> {
        let heirs = self
            .lock()
            .iter()
            .map(Left::heir)
            .collect::<io::Result<_>>();
        heirs.attempt(|| "hand over what is left of commands".to_owned())
    }

    /// Empties pipes for ever.
    pub(crate) fn run(&self, core: &Arc<Core>) -> Result<(), AgentError> {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            self.wait()?;
            let mut count = [0; 8];
            match rustix::io::read(&self.bell, &mut count) {
                Ok(_) | Err(Errno::AGAIN) => {}
                Err(error) => return Err(error).attempt(|| "read an event counter".to_owned()),
            }
            let gone = self.empty(&mut buffer);
            core.with(|state| gone.iter().for_each(|&key| state.forget(key)));
        }
    }

    /// Reads each pipe once; gives the commands of which nothing is left.
    fn empty(&self, buffer: &mut [u8]) -> Vec<ExecKey> {
        let mut kept = self.lock();
        for left in kept.iter_mut() {
            left.pipes.retain(|pipe| is_open(pipe, buffer));
        }
        let gone = kept.extract_if(.., |left| left.pipes.is_empty());
        gone.map(|left| left.key).collect()
    }

    fn wait(&self) -> Result<(), AgentError> {
        let pipes: Vec<Arc<OwnedFd>> = {
            let kept = self.lock();
            kept.iter().flat_map(|left| &left.pipes).cloned().collect()
        };
        let mut fds: Vec<PollFd<'_>> = pipes
            .iter()
            .map(|pipe| PollFd::new(&**pipe, PollFlags::IN))
            .collect();
        fds.push(PollFd::new(&*self.bell, PollFlags::IN));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error).attempt(|| "wait for left-over output".to_owned()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Left>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
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
