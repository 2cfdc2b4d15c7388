//! The guest's processes other than the agent: frozen for a capture, thawed by a request and by nothing else.
//!
//! Whoever froze them may be gone, and time says nothing: the same frozen processes stand in the source, which goes on at
//! once, and in each clone, which must not before its clock, randomness and identity are its own. Only a host can tell
//! the two apart: it thaws in the life that it knows, or releases a new one.

use super::life::Life;
use super::{Action, Agent, StreamKey, bounded_text};
use crate::Epoch;
use crate::message::{Done, ShutdownKind, WorkloadState};

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
        then: Then,
    },
}

/// What a thaw is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Then {
    /// For itself.
    GoOn,
    /// The epoch is released by it.
    Release(Epoch),
    /// The machine's init can be asked to shut it down only while it runs.
    ShutDown(ShutdownKind),
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
            Workload::Frozen => self.thaw_workload(key, Then::GoOn),
            Workload::Thawing {
                then: Then::ShutDown(_),
                ..
            } => self.answer(key, failed("the machine is about to be shut down")),
            Workload::Thawing {
                then: then @ (Then::GoOn | Then::Release(_)),
                ..
            } => self.join_thaw(key, then),
            Workload::Freezing { .. } => self.await_freeze(Awaiting::Thaw(key)),
        }
    }

    /// In a life that was not released nothing may run, not even to end: the machine is shut down without its init.
    pub(super) fn on_shutdown(&mut self, key: StreamKey, kind: ShutdownKind) -> Vec<Action> {
        if !self.config.may_shut_down {
            return self.answer(key, failed("this agent may not shut the machine down"));
        }
        match self.workload {
            Workload::Running => self.shut_down(key, kind, true),
            Workload::Frozen if self.is_released() => self.thaw_workload(key, Then::ShutDown(kind)),
            Workload::Frozen => self.shut_down(key, kind, false),
            Workload::Freezing { .. } | Workload::Thawing { .. } => {
                self.answer(key, failed("the workload is being frozen or thawed"))
            }
        }
    }

    fn shut_down(&mut self, key: StreamKey, kind: ShutdownKind, by_init: bool) -> Vec<Action> {
        let mut told = self.answer(key, Done::Ok);
        let port = key.port;
        told.push(Action::Shutdown {
            port,
            kind,
            by_init,
        });
        told
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
            Workload::Frozen => self.thaw_workload(key, Then::Release(epoch)),
            // Whoever began the thaw may be gone; and a capture may have fallen into it.
            Workload::Thawing { .. } => self.join_thaw(key, Then::Release(epoch)),
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
    fn join_thaw(&mut self, key: StreamKey, then: Then) -> Vec<Action> {
        let joined = Workload::Thawing { asked: key, then };
        let before = std::mem::replace(&mut self.workload, joined);
        match before {
            Workload::Thawing { asked, .. } => self.answer(asked, failed(OVERTAKEN)),
            Workload::Running | Workload::Freezing { .. } | Workload::Frozen => {
                unreachable!("only a thaw that is under way is joined")
            }
        }
    }

    fn thaw_workload(&mut self, asked: StreamKey, then: Then) -> Vec<Action> {
        self.workload = Workload::Thawing { asked, then };
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
        let Workload::Thawing { asked, then } = self.workload else {
            return Vec::new();
        };
        let duration_ns = match result {
            Ok(duration_ns) => duration_ns,
            Err(error) => {
                self.workload = Workload::Frozen;
                return self.answer(asked, Done::Failed(bounded_text(error)));
            }
        };
        self.workload = Workload::Running;
        match then {
            Then::GoOn => self.answer(asked, Done::Ok),
            Then::Release(epoch) => {
                self.release(epoch);
                self.answer(asked, Done::Released { duration_ns })
            }
            Then::ShutDown(kind) => self.shut_down(asked, kind, true),
        }
    }
}

const OVERTAKEN: &str = "another has asked to let the workload go on meanwhile";

fn failed(why: &str) -> Done {
    Done::Failed(why.to_owned())
}
