//! How a sandbox's guest is, by what its agent answers within a bound.
//!
//! ```text
//!   ready ◀────────▶ degraded ◀────────▶ lost
//!   answers in       answers late, of another epoch, frozen,    no answer within 5 s, no agent,
//!   time, released   or stands still for an operation           or nothing runs
//! ```
//! The heartbeat is a session of the recorded epoch and a ping in it: an answer of any other epoch is none.

use std::time::{Duration, Instant};

use serde::Serialize;
use stead_agent_link::{Status, WorkloadState};

use crate::Engine;
use crate::error::{EngineError, Kind, Result};
use crate::exec::{is_late, lives_another_life};
use crate::records::{Sandbox, SandboxState};

/// An agent that has not answered by then is lost.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// One that has not answered by then is late.
const LATE_AFTER: Duration = Duration::from_secs(2);
/// The most memory an agent takes that is as it should be, in KiB.
const AGENT_KIB_MAX: u64 = 64 << 10;
/// How often a wait looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How a guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HealthState {
    /// Its agent answers in time, and its processes run.
    Ready,
    /// It is there, and not as it should be.
    Degraded,
    /// Nothing answers.
    Lost,
}

impl HealthState {
    /// The word in output.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Degraded => "degraded",
            Self::Lost => "lost",
        }
    }
}

/// How a guest is, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Health {
    /// How it is.
    pub state: HealthState,
    /// Why it is not ready.
    pub reason: Option<String>,
    /// How long its agent took to answer, in microseconds.
    pub answered_us: Option<u64>,
    /// The agent's version.
    pub agent_version: Option<String>,
    /// The agent's resident memory in KiB.
    pub agent_resident_kib: Option<u64>,
}

impl Health {
    fn not_ready(state: HealthState, reason: impl Into<String>) -> Self {
        Self {
            state,
            reason: Some(reason.into()),
            answered_us: None,
            agent_version: None,
            agent_resident_kib: None,
        }
    }

    fn of(status: &Status, answered: Duration) -> Self {
        let reason = complaint(status, answered);
        Self {
            state: match reason {
                None => HealthState::Ready,
                Some(_) => HealthState::Degraded,
            },
            reason,
            answered_us: Some(crate::restore::micros(answered)),
            agent_version: Some(status.agent_version.clone()),
            agent_resident_kib: Some(status.resident_kib).filter(|kib| *kib > 0),
        }
    }
}

/// What is wrong with a guest whose agent answers.
fn complaint(status: &Status, answered: Duration) -> Option<String> {
    if !status.released {
        return Some(
            "its epoch was acknowledged and not released: the next command does it".to_owned(),
        );
    }
    match status.workload {
        WorkloadState::Frozen => return Some("its processes stand still".to_owned()),
        WorkloadState::Running => {}
    }
    if status.frozen {
        return Some("its file systems are frozen".to_owned());
    }
    if status.resident_kib > AGENT_KIB_MAX {
        return Some(format!(
            "its agent takes {} KiB of memory, more than {AGENT_KIB_MAX}",
            status.resident_kib
        ));
    }
    (answered > LATE_AFTER).then(|| {
        format!(
            "its agent answered after {} ms, later than {} ms",
            answered.as_millis(),
            LATE_AFTER.as_millis()
        )
    })
}

impl Engine {
    /// How a sandbox's guest is. It is asked, and nothing is changed.
    ///
    /// # Errors
    /// When there is no such sandbox, or the worker's own files cannot be used; a guest that is lost is none.
    pub async fn health(&self, name: &str) -> Result<Health> {
        let sandbox = self.records.sandbox(name).await?;
        let sandbox = self.notice_crash(sandbox).await?;
        let (SandboxState::Running, Some(launch)) = (sandbox.state, &sandbox.launch) else {
            let reason = format!("it does not run: it is {}", sandbox.state.word());
            return Ok(Health::not_ready(HealthState::Lost, reason));
        };
        if sandbox.epoch.is_none() {
            let reason = "it was started without waiting for an agent";
            return Ok(Health::not_ready(HealthState::Lost, reason));
        }
        match self.heartbeat(&sandbox, launch).await {
            Ok(health) => Ok(health),
            Err(error) => self.why_not(&sandbox, error).await,
        }
    }

    async fn heartbeat(&self, sandbox: &Sandbox, launch: &str) -> Result<Health> {
        let (number, _lock) = self.free_port(launch, sandbox).await?;
        let begun = Instant::now();
        let (mut port, _ready) = self.attach_to(sandbox, number, LOST_AFTER).await?;
        port.link.set_request_limit(LOST_AFTER);
        let status = port
            .link
            .ping()
            .await
            .map_err(|source| crate::exec::agent_error("ping the agent of", sandbox, source))?;
        Ok(Health::of(&status, begun.elapsed()))
    }

    /// What a heartbeat that failed says of the guest.
    async fn why_not(&self, sandbox: &Sandbox, error: EngineError) -> Result<Health> {
        if lives_another_life(&error) {
            let reason = "its agent lives another epoch than the one that was acknowledged: the next command greets it";
            return Ok(Health::not_ready(HealthState::Degraded, reason));
        }
        let jobs = self.records.jobs().await?;
        let job = jobs
            .iter()
            .find(|job| job.sandbox.as_ref() == Some(&sandbox.id));
        match (error.kind(), job) {
            (Kind::Agent, Some(job)) if is_late(&error) => {
                let reason = format!("it does not answer while its {} is under way", job.kind);
                Ok(Health::not_ready(HealthState::Degraded, reason))
            }
            (Kind::Agent, _) => Ok(Health::not_ready(HealthState::Lost, error.to_string())),
            (Kind::Conflict, _) => Ok(Health::not_ready(HealthState::Degraded, error.to_string())),
            (
                Kind::Internal
                | Kind::Usage
                | Kind::NotFound
                | Kind::Damaged
                | Kind::Incompatible
                | Kind::NoSpace
                | Kind::Store
                | Kind::Vm
                | Kind::Cancelled,
                _,
            ) => Err(error),
        }
    }

    /// Waits until a sandbox's guest is ready.
    ///
    /// # Errors
    /// [`Kind::Agent`] when it is not within `timeout`, and why not; [`Kind::Cancelled`] when it is not wanted any more.
    pub async fn wait_ready(&self, name: &str, timeout: Duration) -> Result<Health> {
        let end = Instant::now() + timeout;
        loop {
            let health = self.health(name).await?;
            if health.state == HealthState::Ready {
                return Ok(health);
            }
            let attempt = format!("wait for sandbox {name}");
            if self.watch.is_cancelled() {
                return Err(EngineError::new(Kind::Cancelled, attempt, "interrupted")
                    .left("the sandbox is as it was"));
            }
            if Instant::now() >= end {
                let why = health.reason.unwrap_or_default();
                let found = format!(
                    "it is {} after {} s: {why}",
                    health.state.word(),
                    timeout.as_secs()
                );
                return Err(EngineError::new(Kind::Agent, attempt, found)
                    .left("the sandbox is as it was")
                    .next(format!(
                        "`stead logs {name}` shows its console; `stead stop {name}` and `stead start {name}` boot it anew"
                    )));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stead_agent_link::Epoch;

    fn well() -> Status {
        Status {
            epoch: Epoch([1; 16]),
            agent_version: "1".to_owned(),
            released: true,
            workload: WorkloadState::Running,
            attached_commands: 0,
            detached_commands: 0,
            frozen: false,
            stale_frames: 0,
            garbage_bytes: 0,
            resident_kib: 2048,
        }
    }

    #[test]
    fn an_agent_that_answers_is_ready_or_degraded_with_the_reason() {
        let state = |status: &Status, answered| Health::of(status, answered).state;
        let soon = Duration::from_millis(3);
        assert_eq!(state(&well(), soon), HealthState::Ready);
        assert_eq!(state(&well(), LATE_AFTER * 2), HealthState::Degraded);
        for wrong in [
            Status {
                released: false,
                ..well()
            },
            Status {
                workload: WorkloadState::Frozen,
                ..well()
            },
            Status {
                frozen: true,
                ..well()
            },
            Status {
                resident_kib: AGENT_KIB_MAX + 1,
                ..well()
            },
        ] {
            let health = Health::of(&wrong, soon);
            assert_eq!(health.state, HealthState::Degraded, "{wrong:?}");
            assert!(health.reason.is_some(), "{wrong:?}");
        }
    }
}
