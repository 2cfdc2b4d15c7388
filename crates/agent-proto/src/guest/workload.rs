//! The guest's processes other than the agent: frozen for a capture, thawed by a request and by nothing else.
//!
//! Whoever froze them may be gone, and time says nothing: the same frozen processes stand in the source, which goes on at
//! once, and in each clone, which must not before its clock, randomness and identity are its own. Only a host can tell
//! the two apart: it thaws in the life that it knows, or releases a new one.

use super::life::Life;
use super::{Action, Agent, StreamKey, bounded_text};
use crate::Epoch;
use crate::message::{Done, WorkloadState};

/// Why the workload is not as it was asked to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WorkloadFailure {
    /// What went wrong.
    pub error: String,
    /// Whether processes stand or may stand still all the same.
    pub still_frozen: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Workload {
    Running,
    Freezing {
        owner: StreamKey,
        // What waits for it: its owner is gone, or a capture fell into the freezing.
        then: Option<Awaiting>,
    },
    Frozen,
    Thawing {
        asked: StreamKey,
        // The epoch that is released by it.
        releases: Option<Epoch>,
    },
}

/// A request that lets the processes go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Awaiting {
    Thaw(StreamKey),
    Release(StreamKey),
}

impl Workload {
    pub(super) fn state(&self) -> WorkloadState {
        match self {
            Self::Running => WorkloadState::Running,
            Self::Freezing { .. } | Self::Frozen | Self::Thawing { .. } => WorkloadState::Frozen,
        }
    }
}

impl Agent {
    pub(super) fn on_freeze_workload(&mut self, key: StreamKey, limit_ms: u64) -> Vec<Action> {
        if !self.is_released() {
            return self.answer(key, failed("the epoch has not been released"));
        }
        match self.workload {
            Workload::Running => {
                self.workload = Workload::Freezing {
                    owner: key,
                    then: None,
                };
                vec![Action::FreezeWorkload { limit_ms }]
            }
            Workload::Frozen => self.answer(key, Done::Ok),
            Workload::Freezing { .. } | Workload::Thawing { .. } => {
                self.answer(key, failed("the workload is being frozen or thawed"))
            }
        }
    }

    pub(super) fn on_thaw_workload(&mut self, key: StreamKey) -> Vec<Action> {
        if !self.is_released() {
            let why = "the epoch has not been released: its release thaws the workload";
            return self.answer(key, failed(why));
        }
        match self.workload {
            Workload::Running => self.answer(key, Done::Ok),
            Workload::Frozen => self.thaw_workload(key, None),
            Workload::Thawing { releases, .. } => self.join_thaw(key, releases),
            Workload::Freezing { .. } => self.await_freeze(Awaiting::Thaw(key)),
        }
    }

    pub(super) fn on_release(&mut self, key: StreamKey) -> Vec<Action> {
        let Some(epoch) = self.epoch() else {
            return Vec::new();
        };
        match self.workload {
            Workload::Running => {
                self.release(epoch);
                self.answer(key, Done::Released { duration_ns: 0 })
            }
            Workload::Frozen => self.thaw_workload(key, Some(epoch)),
            // Whoever began the thaw may be gone; and a capture may have fallen into it.
            Workload::Thawing { .. } => self.join_thaw(key, Some(epoch)),
            Workload::Freezing { .. } => self.await_freeze(Awaiting::Release(key)),
        }
    }

    /// Waits for the end of the freezing, instead of who has waited so far.
    fn await_freeze(&mut self, next: Awaiting) -> Vec<Action> {
        let Workload::Freezing { then, .. } = &mut self.workload else {
            unreachable!("only a freezing that is under way is awaited")
        };
        match then.replace(next) {
            Some(Awaiting::Thaw(before) | Awaiting::Release(before)) => {
                self.answer(before, failed(OVERTAKEN))
            }
            None => Vec::new(),
        }
    }

    /// Waits for the thaw that is under way, instead of who has waited so far: whoever asks last is the one who listens.
    fn join_thaw(&mut self, key: StreamKey, releases: Option<Epoch>) -> Vec<Action> {
        let joined = Workload::Thawing {
            asked: key,
            releases,
        };
        let before = std::mem::replace(&mut self.workload, joined);
        match before {
            Workload::Thawing { asked, .. } => self.answer(asked, failed(OVERTAKEN)),
            Workload::Running | Workload::Freezing { .. } | Workload::Frozen => {
                unreachable!("only a thaw that is under way is joined")
            }
        }
    }

    fn thaw_workload(&mut self, asked: StreamKey, releases: Option<Epoch>) -> Vec<Action> {
        self.workload = Workload::Thawing { asked, releases };
        vec![Action::ThawWorkload]
    }

    fn release(&mut self, which: Epoch) {
        if let Life::Current { epoch, released } = &mut self.life
            && *epoch == which
        {
            *released = true;
        }
    }

    /// Takes what freezing the workload came to. After a failure the processes run, unless it says otherwise.
    pub fn workload_frozen(&mut self, result: Result<(), WorkloadFailure>) -> Vec<Action> {
        let Workload::Freezing { owner, then } = self.workload else {
            return Vec::new();
        };
        let (outcome, frozen) = match result {
            // Who has asked must not take for standing what goes on at once.
            Ok(()) if then.is_some() => (failed(OVERTAKEN), true),
            Ok(()) => (Done::Ok, true),
            Err(failure) => (
                Done::Failed(bounded_text(failure.error)),
                failure.still_frozen,
            ),
        };
        self.workload = if frozen {
            Workload::Frozen
        } else {
            Workload::Running
        };
        let mut actions = self.answer(owner, outcome);
        actions.extend(self.follow_freeze(then));
        actions
    }

    fn follow_freeze(&mut self, then: Option<Awaiting>) -> Vec<Action> {
        match then {
            Some(Awaiting::Thaw(key)) if self.session(key.port, key.nonce).is_some() => {
                self.on_thaw_workload(key)
            }
            Some(Awaiting::Release(key)) if self.session(key.port, key.nonce).is_some() => {
                self.on_release(key)
            }
            Some(Awaiting::Thaw(_) | Awaiting::Release(_)) | None => Vec::new(),
        }
    }

    /// Takes what thawing the workload came to, and how long it took in nanoseconds. After a failure it counts as frozen.
    pub fn workload_thawed(&mut self, result: Result<u64, String>) -> Vec<Action> {
        let Workload::Thawing { asked, releases } = self.workload else {
            return Vec::new();
        };
        let outcome = match (result, releases) {
            (Ok(_), None) => Done::Ok,
            (Ok(duration_ns), Some(_)) => Done::Released { duration_ns },
            (Err(error), _) => {
                self.workload = Workload::Frozen;
                return self.answer(asked, Done::Failed(bounded_text(error)));
            }
        };
        self.workload = Workload::Running;
        if let Some(epoch) = releases {
            self.release(epoch);
        }
        self.answer(asked, outcome)
    }
}

const OVERTAKEN: &str = "another has asked to let the workload go on meanwhile";

fn failed(why: &str) -> Done {
    Done::Failed(why.to_owned())
}
