//! Having a guest's processes stand still while its state is taken.
//!
//! ```text
//!   prepared ▶ processes frozen ▶ PAUSE ▶ vCPUs run ▶ processes thawed
//!                  (a guest that is made of the state finds them frozen, and thaws them when it is released)
//! ```
//! A guest whose agent does not answer within [`ANSWER_TIMEOUT`], or cannot freeze, is not captured, and runs on:
//! its processes would run a moment in each restored guest before its clock and randomness are set. Who wants that says so
//! ([`crate::Workload::RunsOn`]). A guest that was started without an agent is asked nothing, when it is captured and when
//! it is restored.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use stead_vmm::Moment;
use tokio::runtime::Handle;

use crate::Engine;
use crate::error::{EngineError, Kind, Result};
use crate::exec::Session;
use crate::records::Sandbox;

/// How long an agent may take to answer before the capture is given up.
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
    ///
    /// # Errors
    /// [`Kind::Agent`] when it does not answer: nothing has been asked of it.
    pub(crate) async fn prepare_standstill(&self, sandbox: &Sandbox) -> Result<Standstill> {
        let session = match &sandbox.epoch {
            // Nobody waited for an agent.
            None => None,
            Some(_) => match self.attach_locked(sandbox, ANSWER_TIMEOUT).await {
                Ok(mut session) => {
                    session.link().set_request_limit(ANSWER_TIMEOUT);
                    Some(session)
                }
                Err(error) => return Err(unfrozen(sandbox, &error.to_string())),
            },
        };
        Ok(Standstill {
            session,
            ..Standstill::of_nobody()
        })
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

    /// Has the processes go on if they were not told to.
    pub(crate) async fn end_standstill(&self, sandbox: &Sandbox, standstill: Standstill) {
        let is_left_standing = standstill.is_left_standing.load(Ordering::Relaxed);
        // Its port is needed below.
        drop(standstill);
        if is_left_standing {
            self.let_go_on(sandbox).await;
        }
    }
}

impl Standstill {
    /// Follows the moments of the capture; breaks it off when the processes do not stand still.
    pub(crate) fn at(&self, moment: Moment) -> ControlFlow<String> {
        let Some(session) = &self.session else {
            return ControlFlow::Continue(());
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
            (_, Ok(())) => ControlFlow::Continue(()),
            (Moment::Stopping, Err(error)) => {
                let why = error.to_string();
                self.note(&why);
                ControlFlow::Break(why)
            }
            (Moment::Resumed, Err(_)) => {
                self.is_left_standing.store(true, Ordering::Relaxed);
                ControlFlow::Continue(())
            }
        }
    }

    /// Why a capture failed: for its own reason, unless the processes did not stand still.
    pub(crate) fn explain(&self, sandbox: &Sandbox, error: EngineError) -> EngineError {
        match self.failure() {
            Some(why) => unfrozen(sandbox, &why),
            None => error,
        }
    }

    fn note(&self, why: &str) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert_with(|| why.to_owned());
    }

    fn failure(&self) -> Option<String> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn unfrozen(sandbox: &Sandbox, why: &str) -> EngineError {
    EngineError::new(
        Kind::Agent,
        format!("capture sandbox {}", sandbox.name),
        format!("its processes do not stand still: {why}"),
    )
    .left("the VM runs on, and no state of it was kept")
    .next(
        "try again; with --crash-consistent the agent is not asked, and the processes run for a moment in what is restored \
         before its clock and randomness are set",
    )
}
