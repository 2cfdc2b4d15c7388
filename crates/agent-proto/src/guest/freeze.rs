//! File systems: frozen by a session, thawed when it asks, when it ends, and when its time is over.

use super::{Action, Agent, FreezeFailure, FrozenMounts, StreamKey, bounded_text};
use crate::Nonce;
use crate::message::{Bytes, Done};

const MOUNT_LIST_BYTES: usize = 16 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Freeze {
    Thawed {
        lost: Option<&'static str>,
    },
    Freezing {
        owner: StreamKey,
        lost: Option<&'static str>,
    },
    Frozen {
        owner: Option<StreamKey>,
    },
    Thawing {
        answer: Option<StreamKey>,
        lost: Option<&'static str>,
    },
}

impl Agent {
    /// Takes what freezing came to: where file systems are frozen now, or why none is or should be. What is frozen
    /// against the will is nobody's: no command is accepted until [`Agent::freeze_expired`] has led to its thaw.
    pub fn freeze_done(&mut self, result: Result<FrozenMounts, FreezeFailure>) -> Vec<Action> {
        let Freeze::Freezing { owner, lost } = self.freeze else {
            return Vec::new();
        };
        match (result, lost) {
            (Ok(mounts), None) => {
                self.freeze = Freeze::Frozen { owner: Some(owner) };
                self.answer(
                    owner,
                    Done::Frozen {
                        mounts: bounded_mounts(mounts.frozen),
                        unsupported: bounded_mounts(mounts.unsupported),
                    },
                )
            }
            (Ok(_), Some(_)) => {
                self.freeze = Freeze::Thawing { answer: None, lost };
                vec![Action::Thaw]
            }
            (Err(failure), _) => {
                self.freeze = if failure.still_frozen {
                    Freeze::Frozen { owner: None }
                } else {
                    Freeze::Thawed { lost }
                };
                self.answer(owner, Done::Failed(bounded_text(failure.error)))
            }
        }
    }

    /// Notes that the time of the freeze is over, or that it is time to try again to thaw.
    pub fn freeze_expired(&mut self) -> Vec<Action> {
        let why = match self.freeze {
            Freeze::Frozen { owner: Some(_) } => "its time was over",
            Freeze::Frozen { owner: None } => "an undoing that had failed was tried again",
            Freeze::Thawed { .. } | Freeze::Freezing { .. } | Freeze::Thawing { .. } => {
                return Vec::new();
            }
        };
        self.begin_thaw(None, Some(why))
    }

    /// Takes what thawing came to. After a failure it is tried again: [`Agent::freeze_expired`] is due soon.
    pub fn thaw_done(&mut self, result: Result<(), String>) -> Vec<Action> {
        let Freeze::Thawing { answer, lost } = self.freeze else {
            return Vec::new();
        };
        let outcome = match result {
            Ok(()) => {
                self.freeze = Freeze::Thawed { lost };
                Done::Ok
            }
            Err(error) => {
                self.freeze = Freeze::Frozen { owner: None };
                Done::Failed(bounded_text(error))
            }
        };
        answer.map_or_else(Vec::new, |key| self.answer(key, outcome))
    }

    /// Whether any file system is or may be frozen.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        !matches!(self.freeze, Freeze::Thawed { .. })
    }

    pub(super) fn abandon_freeze(
        &mut self,
        port: u32,
        nonce: Nonce,
        why: &'static str,
        actions: &mut Vec<Action>,
    ) {
        let is_owner = |key: &StreamKey| (key.port, key.nonce) == (port, nonce);
        match &mut self.freeze {
            Freeze::Freezing { owner, lost } if is_owner(owner) => *lost = Some(why),
            Freeze::Frozen { owner: Some(owner) } if is_owner(owner) => {
                actions.extend(self.begin_thaw(None, Some(why)));
            }
            Freeze::Thawed { .. }
            | Freeze::Freezing { .. }
            | Freeze::Frozen { .. }
            | Freeze::Thawing { .. } => {}
        }
    }

    pub(super) fn begin_thaw(
        &mut self,
        answer: Option<StreamKey>,
        lost: Option<&'static str>,
    ) -> Vec<Action> {
        self.freeze = Freeze::Thawing { answer, lost };
        vec![Action::Thaw]
    }

    pub(super) fn on_freeze(&mut self, key: StreamKey, limit_ms: u64) -> Vec<Action> {
        if !self.is_released() {
            let why = "the epoch has not been released".to_owned();
            return self.answer(key, Done::Failed(why));
        }
        match self.freeze {
            Freeze::Thawed { .. } => {
                self.freeze = Freeze::Freezing {
                    owner: key,
                    lost: None,
                };
                vec![Action::Freeze { limit_ms }]
            }
            Freeze::Freezing { .. } | Freeze::Frozen { .. } | Freeze::Thawing { .. } => self
                .answer(
                    key,
                    Done::Failed("the file systems are frozen already or being thawed".to_owned()),
                ),
        }
    }

    pub(super) fn on_thaw(&mut self, key: StreamKey) -> Vec<Action> {
        match &mut self.freeze {
            Freeze::Frozen { .. } => self.begin_thaw(Some(key), None),
            Freeze::Freezing { .. } | Freeze::Thawing { .. } => self.answer(
                key,
                Done::Failed("freezing or thawing is under way".to_owned()),
            ),
            Freeze::Thawed { lost } => {
                let why = lost.take().unwrap_or("nobody had frozen them");
                self.answer(
                    key,
                    Done::Failed(format!("the file systems were not frozen: {why}")),
                )
            }
        }
    }
}

fn bounded_mounts(mounts: Vec<Bytes>) -> Vec<Bytes> {
    let mut left = MOUNT_LIST_BYTES;
    mounts
        .into_iter()
        .take_while(|mount| {
            let needed = mount.0.len() + 4;
            let fits = needed <= left;
            left = left.saturating_sub(needed);
            fits
        })
        .collect()
}
