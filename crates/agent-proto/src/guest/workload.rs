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
        // A release that waits for it.
        then: Option<StreamKey>,
    },
    Frozen,
    Thawing {
        asked: StreamKey,
        // The epoch that is released by it.
        releases: Option<Epoch>,
    },
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
            Workload::Freezing { .. } | Workload::Thawing { .. } => {
                self.answer(key, failed("the workload is being frozen or thawed"))
            }
        }
    }

    pub(super) fn on_release(&mut self, key: StreamKey) -> Vec<Action> {
        let Some(epoch) = self.epoch() else {
            return Vec::new();
        };
        if let Workload::Thawing { asked, .. } = self.workload
            && self.session(asked.port, asked.nonce).is_none()
        {
            // A capture fell into the thawing: who had asked for it is of another life.
            let (asked, releases) = (key, Some(epoch));
            self.workload = Workload::Thawing { asked, releases };
            return Vec::new();
        }
        match &mut self.workload {
            Workload::Running => {
                self.release(epoch);
                self.answer(key, Done::Released { duration_ns: 0 })
            }
            Workload::Frozen => self.thaw_workload(key, Some(epoch)),
            Workload::Freezing { then, .. } if then.is_none() => {
                // A capture fell into the freezing.
                *then = Some(key);
                Vec::new()
            }
            Workload::Freezing { .. } | Workload::Thawing { .. } => {
                self.answer(key, failed("the workload is being frozen or thawed"))
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
        if let Some(release) = then
            && self.session(release.port, release.nonce).is_some()
        {
            actions.extend(self.on_release(release));
        }
        actions
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

fn failed(why: &str) -> Done {
    Done::Failed(why.to_owned())
}
