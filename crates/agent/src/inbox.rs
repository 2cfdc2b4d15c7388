//! What is waiting for a command: input, signals, news of credit.
//!
//! The bell is an event counter, so that a ring before the wait is not lost: whoever waits sees it readable
//! until the inbox has been looked at.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::error::{AgentError, Attempt};

/// How many signals wait at most; the host that sends more loses the oldest.
const MAX_SIGNALS: usize = 64;

/// What is waiting for a command.
#[derive(Debug)]
pub(crate) struct Inbox {
    letters: Mutex<Letters>,
    bell: OwnedFd,
}

/// What was waiting when it was looked at.
#[derive(Debug, Clone, Default)]
pub(crate) struct Letters {
    /// Input, bounded by the credit of the stream.
    pub(crate) stdin: VecDeque<Vec<u8>>,
    /// No input comes after it.
    pub(crate) stdin_end: bool,
    /// The size that the command's terminal is to have.
    pub(crate) size: Option<(u16, u16)>,
    /// Signals in order.
    pub(crate) signals: VecDeque<i32>,
}

impl Inbox {
    pub(crate) fn new() -> Result<Self, AgentError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            letters: Mutex::default(),
            bell: eventfd(0, flags).attempt(|| "make an event counter".to_owned())?,
        })
    }

    /// Readable while there is something to look at.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    pub(crate) fn ring(&self) {
        match rustix::io::write(&self.bell, &1u64.to_ne_bytes()) {
            // A full counter is as readable as can be.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => unreachable!("an own event counter cannot be written: {error}"),
        }
    }

    pub(crate) fn put_stdin(&self, data: Vec<u8>) {
        self.with(|letters| letters.stdin.push_back(data));
    }

    pub(crate) fn end_stdin(&self) {
        self.with(|letters| letters.stdin_end = true);
    }

    pub(crate) fn put_size(&self, rows: u16, cols: u16) {
        self.with(|letters| letters.size = Some((rows, cols)));
    }

    pub(crate) fn put_signal(&self, signal: i32) {
        self.with(|letters| {
            if letters.signals.len() == MAX_SIGNALS {
                letters.signals.pop_front();
            }
            letters.signals.push_back(signal);
        });
    }

    /// Silences the bell, then takes everything: what comes in between rings again.
    pub(crate) fn take(&self) -> Letters {
        let mut count = [0; 8];
        match rustix::io::read(&self.bell, &mut count) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => unreachable!("an own event counter cannot be read: {error}"),
        }
        let mut letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *letters)
    }

    /// What is waiting; it stays there.
    pub(crate) fn look(&self) -> Letters {
        let letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
        letters.clone()
    }

    fn with(&self, change: impl FnOnce(&mut Letters)) {
        change(&mut self.letters.lock().unwrap_or_else(PoisonError::into_inner));
        self.ring();
    }
}
