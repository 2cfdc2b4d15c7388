//! The steps of a handshake that need the operating system.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, Timespec, clock_settime};
use stead_agent_proto::guest::StepResult;
use stead_agent_proto::message::{
    self, ForkIdentity, Identity, IoctlReport, NetworkIdentity, Phase, PhaseDetail, PhaseOutcome,
};
use stead_sys::entropy;

use crate::core::Core;
use crate::error::{AgentError, Attempt};
use crate::freeze::Order;
use crate::persona::{self, Applied, Interface, Persona, Place, is_hostname};

const THAW_LIMIT: Duration = Duration::from_secs(30);
/// How long a thaw that has failed is given to succeed after all: the freezer tries again every second.
const THAW_AGAIN_LIMIT: Duration = Duration::from_secs(5);
const THAW_AGAIN_PAUSE: Duration = Duration::from_millis(100);

/// What the agent sets up in a new life of the machine.
#[derive(Debug)]
pub(crate) struct Setup {
    /// Set the clock.
    pub(crate) clock: bool,
    /// Seed the random number generator.
    pub(crate) entropy: bool,
    /// Take a new host name.
    pub(crate) hostname: bool,
    random: File,
}

impl Setup {
    pub(crate) fn new() -> Result<Self, AgentError> {
        Ok(Self {
            clock: true,
            entropy: true,
            hostname: true,
            random: File::open("/dev/urandom").attempt(|| "open /dev/urandom".to_owned())?,
        })
    }

    /// Does one step of a setup that came at `received`.
    pub(crate) fn run(
        &self,
        phase: Phase,
        with: &message::Setup,
        received: Instant,
        core: &Arc<Core>,
    ) -> StepResult {
        let begin = Instant::now();
        let done = self.perform(phase, with, received, core);
        let duration_ns = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        match done {
            Ok((outcome, detail)) => StepResult {
                outcome: Ok(outcome),
                detail,
                duration_ns,
            },
            Err(error) => StepResult {
                outcome: Err(error),
                detail: PhaseDetail::None,
                duration_ns,
            },
        }
    }

    fn perform(
        &self,
        phase: Phase,
        with: &message::Setup,
        received: Instant,
        core: &Arc<Core>,
    ) -> Step {
        match phase {
            Phase::Epoch | Phase::Sessions => Ok((PhaseOutcome::Done, PhaseDetail::None)),
            Phase::FileSystems => thaw(core),
            Phase::Clock if !self.clock => skipped("the agent was told to leave the clock alone"),
            Phase::Clock => set_clock(with.wall_clock_ns, received),
            Phase::Entropy if !self.entropy => {
                skipped("the agent was told to leave the random number generator alone")
            }
            Phase::Entropy => self.reseed(&with.seed.0),
            Phase::Identity => match &with.identity {
                Identity::Keep => skipped("the guest stays who it is"),
                Identity::Fork(fork) => self.become_fork(fork),
            },
            // Nothing is opened anew: reads and writes of the ports block in the kernel, across every restore.
            Phase::Ports => Ok((PhaseOutcome::Done, PhaseDetail::Ports(core.open_ports()))),
        }
    }

    fn reseed(&self, seed: &[u8; entropy::SEED_BYTES]) -> Step {
        let calls = [
            ("RNDADDENTROPY", entropy::credit(&self.random, seed)),
            ("RNDRESEEDCRNG", entropy::rekey(&self.random)),
        ];
        let mut reports = Vec::new();
        for (name, result) in calls {
            result.map_err(|error| format!("seed /dev/urandom: {name}: {error}"))?;
            reports.push(IoctlReport {
                name: name.to_owned(),
                errno: 0,
            });
        }
        Ok((PhaseOutcome::Done, PhaseDetail::Entropy(reports)))
    }

    /// The random bytes of the new identity are drawn here: the generator has been seeded anew by now.
    fn become_fork(&self, fork: &ForkIdentity) -> Step {
        if let Some(name) = fork.hostname.as_deref().filter(|name| !is_hostname(name)) {
            return Err(format!("{name:?} is no host name"));
        }
        if !self.hostname {
            return skipped("the agent was told to leave the host name alone");
        }
        let persona = Persona {
            hostname: fork.hostname.clone(),
            machine_id: fork.machine_id.then(|| self.random_id()).transpose()?,
            ssh_host_keys: fork.ssh_host_keys,
            network: fork.network.iter().map(interface).collect(),
            clear: fork.clear.iter().map(|path| path.0.clone()).collect(),
        };
        let applied = Place::machine().apply(&persona);
        match persona::failures(&applied) {
            Some(error) => Err(error),
            None if applied.is_empty() => skipped("nothing is to be changed"),
            None => {
                let changed = applied.iter().map(Applied::to_string).collect();
                Ok((PhaseOutcome::Done, PhaseDetail::Identity(changed)))
            }
        }
    }

    fn random_id(&self) -> Result<[u8; 16], String> {
        let mut id = [0; 16];
        (&self.random)
            .read_exact(&mut id)
            .map_err(|error| format!("read /dev/urandom: {error}"))?;
        Ok(id)
    }
}

fn interface(network: &NetworkIdentity) -> Interface {
    Interface {
        name: network.interface.clone(),
        mac: network.mac,
        addresses: network.addresses.clone(),
        gateways: network.gateways.clone(),
    }
}

/// What a step came to, and what it has found and changed.
type Step = Result<(PhaseOutcome, PhaseDetail), String>;

fn skipped(why: &str) -> Step {
    Ok((PhaseOutcome::Skipped(why.to_owned()), PhaseDetail::None))
}

/// Waits until nothing is frozen any more; the thaw itself was ordered when its owner's session ended.
fn thaw(core: &Arc<Core>) -> Step {
    let is_frozen = || core.with(|state| state.agent.is_frozen());
    if !is_frozen() {
        return skipped("nothing was frozen");
    }
    let end = Instant::now() + THAW_LIMIT;
    // A freeze that was under way is followed by its thaw: two orders, at most two barriers.
    for _ in 0..3 {
        await_freezer(core, end)?;
        if !is_frozen() {
            return Ok((PhaseOutcome::Done, PhaseDetail::None));
        }
    }
    let end = end.min(Instant::now() + THAW_AGAIN_LIMIT);
    while Instant::now() < end {
        std::thread::sleep(THAW_AGAIN_PAUSE);
        if !is_frozen() {
            return Ok((PhaseOutcome::Done, PhaseDetail::None));
        }
    }
    Err("file systems that an earlier session froze could not be thawed".to_owned())
}

/// Waits until the freezer has done all that it was told.
fn await_freezer(core: &Arc<Core>, end: Instant) -> Result<(), String> {
    let (passed, barrier) = channel();
    core.order(Order::Barrier(passed));
    barrier
        .recv_timeout(end.saturating_duration_since(Instant::now()))
        .map_err(|error| {
            format!(
                "file systems were not thawed within {} s: {error}",
                THAW_LIMIT.as_secs()
            )
        })
}

/// What the host's clock shows now, when it showed `wall_clock_ns` so long ago.
fn host_clock_ns(wall_clock_ns: u64, ago: Duration) -> Result<i64, String> {
    let ago_ns = u64::try_from(ago.as_nanos()).unwrap_or(u64::MAX);
    i64::try_from(wall_clock_ns.saturating_add(ago_ns))
        .map_err(|error| format!("{wall_clock_ns} ns is no time: {error}"))
}

/// Sets the clock to the host's, whose time was received when the setup came and has gone on since: another handshake
/// or a thaw may have been waited for.
fn set_clock(wall_clock_ns: u64, received: Instant) -> Step {
    let host = host_clock_ns(wall_clock_ns, received.elapsed())?;
    let old_offset_ns = guest_clock_ns().saturating_sub(host);
    let time = Timespec {
        tv_sec: host / 1_000_000_000,
        tv_nsec: host % 1_000_000_000,
    };
    clock_settime(ClockId::Realtime, time)
        .map_err(|error| format!("set the clock to {host} ns: {error}"))?;
    let host = host_clock_ns(wall_clock_ns, received.elapsed())?;
    let detail = PhaseDetail::Clock {
        old_offset_ns,
        new_offset_ns: guest_clock_ns().saturating_sub(host),
    };
    Ok((PhaseOutcome::Done, detail))
}

/// The guest's wall clock in nanoseconds since 1970; negative before.
fn guest_clock_ns() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => {
            i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |before| -before)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_that_a_setup_waited_is_added_to_the_clock_and_no_time_is_refused() {
        let second = 1_000_000_000;
        let waited = Duration::from_millis(1500);
        assert_eq!(host_clock_ns(second, waited), Ok(2_500_000_000));
        assert!(host_clock_ns(u64::MAX, waited).is_err());
        assert!(host_clock_ns(i64::MAX as u64, waited).is_err());
    }
}
