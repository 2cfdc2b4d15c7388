//! How long the agent may say nothing.

use std::time::Duration;

use tokio::time::Instant;

/// After this much silence the agent is asked whether it is there.
const PING_AFTER: Duration = Duration::from_secs(5);

/// For how long the agent has said nothing, and since when it has been asked whether it is there.
#[derive(Debug)]
pub(crate) struct Silence {
    limit: Duration,
    heard: Instant,
    asked: Option<Instant>,
}

/// What a silence comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quiet {
    /// Nothing yet.
    Short,
    /// The agent is to be asked now.
    Long,
    /// It was asked, and has not answered.
    TooLong,
}

impl Silence {
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit,
            heard: Instant::now(),
            asked: None,
        }
    }

    /// Notes that the agent has said something.
    pub(crate) fn end(&mut self) {
        (self.heard, self.asked) = (Instant::now(), None);
    }

    /// When to look again.
    pub(crate) fn wake_at(&self) -> Instant {
        match self.asked {
            Some(asked) => asked + self.limit,
            None => self.heard + PING_AFTER.min(self.limit / 3),
        }
    }

    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    pub(crate) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    pub(crate) fn at(&mut self, now: Instant) -> Quiet {
        if now < self.wake_at() {
            return Quiet::Short;
        }
        match self.asked {
            Some(_) => Quiet::TooLong,
            None => {
                self.asked = Some(now);
                Quiet::Long
            }
        }
    }
}
