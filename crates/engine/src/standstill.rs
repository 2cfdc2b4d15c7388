//! Having a guest's processes stand still while its state is taken.
//!
//! ```text
//!   prepared ▶ processes frozen ▶ PAUSE ▶ vCPUs run ▶ processes thawed
//!                  (a guest that is made of the state finds them frozen, and thaws them when it is released)
//! ```
//! A guest whose agent does not answer, or cannot freeze, is captured all the same, and whoever asked is told so: its
//! processes run a moment in each restored guest before its clock and randomness are set.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use stead_agent_link::LinkError;
use stead_vmm::Moment;
use tokio::runtime::Handle;

use crate::Engine;
use crate::exec::Session;
use crate::records::Sandbox;

/// How long an agent may take to answer before the state is taken without it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the processes may take to stand still.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(2);

/// One capture's standstill. Its moments are told on a thread that may block.
pub(crate) struct Standstill {
    session: Option<Session>,
    runtime: Handle,
    failure: Mutex<Option<String>>,
    is_left_standing: AtomicBool,
}

impl Standstill {
    /// For state that somebody else may run, who releases nobody: the processes run on.
    pub(crate) fn of_nobody() -> Self {
        Self {
            session: None,
            runtime: Handle::current(),
            failure: Mutex::new(None),
            is_left_standing: AtomicBool::new(false),
        }
    }
}

impl Engine {
    /// Reaches the agent before anything stands still.
    pub(crate) async fn prepare_standstill(&self, sandbox: &Sandbox) -> Standstill {
        let mut failure = None;
        let session = match &sandbox.epoch {
            // Nobody waited for an agent.
            None => None,
            Some(_) => match self.attach_locked(sandbox, ANSWER_TIMEOUT).await {
                Ok(mut session) => {
                    session.link().set_request_limit(ANSWER_TIMEOUT);
                    Some(session)
                }
                Err(error) => {
                    failure = Some(error.to_string());
                    None
                }
            },
        };
        Standstill {
            session,
            runtime: Handle::current(),
            failure: Mutex::new(failure),
            is_left_standing: AtomicBool::new(false),
        }
    }

    /// Has the processes of a guest go on that an interrupted capture may have left standing.
    pub(crate) async fn let_go_on(&self, sandbox: &Sandbox) {
        if sandbox.epoch.is_none() {
            return;
        }
        // Who attaches with the sandbox's lock held thaws what stands.
        if let Err(error) = self.attach_locked(sandbox, ANSWER_TIMEOUT).await {
            self.watch.notice(format!(
                "whether the processes of sandbox {} go on is not known ({error}); the next command in it sees to it",
                sandbox.name
            ));
        }
    }

    /// Says what went wrong, if anything did, and has the processes go on if they were not told to.
    pub(crate) async fn end_standstill(&self, sandbox: &Sandbox, standstill: Standstill) {
        let is_left_standing = standstill.is_left_standing.load(Ordering::Relaxed);
        let failure = standstill.failure();
        // Its port is needed below.
        drop(standstill);
        if is_left_standing {
            self.let_go_on(sandbox).await;
        }
        if let Some(why) = failure {
            self.watch.notice(format!(
                "the guest's processes did not stand still for the capture ({why}): in what is restored from it they run \
                 for a moment before clock and randomness are set"
            ));
        }
    }
}

impl Standstill {
    /// Follows the moments of the capture.
    pub(crate) fn at(&self, moment: Moment) {
        let Some(session) = &self.session else {
            return;
        };
        let link = session.link_ref();
        let done = self.runtime.block_on(async {
            match moment {
                Moment::Stopping => link.freeze_workload(FREEZE_TIMEOUT).await,
                // Whether they stand is not known when the freeze was not answered: a thaw of what runs does nothing.
                Moment::Resumed => link.thaw_workload().await,
            }
        });
        match (moment, done) {
            (_, Ok(())) => {}
            (Moment::Stopping, Err(error)) => self.note(&error),
            (Moment::Resumed, Err(_)) => self.is_left_standing.store(true, Ordering::Relaxed),
        }
    }

    fn note(&self, error: &LinkError) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert_with(|| error.to_string());
    }

    fn failure(&self) -> Option<String> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
