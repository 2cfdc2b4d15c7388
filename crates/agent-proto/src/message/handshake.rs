//! What is said before a session, and what a new life is set up with.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Bytes, Seed};
use crate::Epoch;

/// Why the host says hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// The machine has booted.
    Boot,
    /// It was restored from a checkpoint.
    Restore,
    /// It is a fork of another.
    Fork,
    /// It was hibernated and goes on.
    Wake,
    /// The same life, another session: nothing is set up again.
    Reattach,
}

/// The first message of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hello {
    /// Why the host says hello.
    pub reason: Reason,
}

/// The answer to a hello that begins a life: the agent is there, and nothing has been changed yet.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hail {
    /// The version of the agent.
    pub agent_version: String,
}

/// What the new life is set up with. Sent only when the guest has hailed: a hello may lie in a port for as long as a
/// machine boots or stands still, and the time in it would be as old.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Setup {
    /// The host's wall clock in nanoseconds since 1970-01-01 UTC.
    pub wall_clock_ns: u64,
    /// For the guest's random number generator.
    pub seed: Seed,
    /// Who the guest is from now on.
    pub identity: Identity,
}

/// Who the guest is in its new life.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Identity {
    /// Who it was: restore, wake, boot.
    #[default]
    Keep,
    /// Somebody else.
    Fork(Box<ForkIdentity>),
}

/// What tells a fork from the machine that it was made of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct ForkIdentity {
    /// A new host name.
    pub hostname: Option<String>,
    /// Whether the machine id is drawn anew.
    pub machine_id: bool,
    /// Whether the keys of the SSH server are made anew.
    pub ssh_host_keys: bool,
    /// New addresses of network interfaces.
    pub network: Vec<NetworkIdentity>,
    /// Files, and folders with all that is in them, that are removed.
    pub clear: Vec<Bytes>,
}

/// The addresses of one network interface.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NetworkIdentity {
    /// The interface's name in the guest.
    pub interface: String,
    /// Its new hardware address.
    pub mac: Option<[u8; 6]>,
    /// Its new addresses, each with the length of its network's prefix in bits; the old ones go when any is given.
    pub addresses: Vec<(std::net::IpAddr, u8)>,
    /// The new default gateways.
    pub gateways: Vec<std::net::IpAddr>,
}

/// A step of the handshake, in the order in which they are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// Whether the epoch may become (or is) the current one.
    Epoch,
    /// Sessions of other epochs are dropped; their commands go on unheard.
    Sessions,
    /// File systems that an earlier session left frozen are thawed.
    FileSystems,
    /// The clock is set.
    Clock,
    /// The random number generator is seeded, credited and rekeyed.
    Entropy,
    /// The guest becomes who it is to be.
    Identity,
    /// What hosts connect to is made ready for them, once.
    Ports,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Epoch => "epoch",
            Self::Sessions => "sessions",
            Self::FileSystems => "file systems",
            Self::Clock => "clock",
            Self::Entropy => "entropy",
            Self::Identity => "identity",
            Self::Ports => "ports",
        })
    }
}

/// What a step of the handshake came to, when it did not fail.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PhaseOutcome {
    /// It was done.
    Done,
    /// It was not done, and why that is right.
    Skipped(String),
}

/// What a step of the handshake has found and changed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum PhaseDetail {
    /// Nothing to tell.
    #[default]
    None,
    /// How far the guest's clock was ahead of the host's, in nanoseconds; negative when it was behind.
    Clock {
        /// Before it was set.
        old_offset_ns: i64,
        /// After it was set.
        new_offset_ns: i64,
    },
    /// What the kernel said to each request to its random number generator.
    Entropy(Vec<IoctlReport>),
    /// What was changed of the guest's identity, in words.
    Identity(Vec<String>),
    /// How many ports serve hosts.
    Ports(u32),
}

/// What the kernel said to one request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IoctlReport {
    /// The request's name.
    pub name: String,
    /// The error number; 0 when it was done.
    pub errno: i32,
}

/// What a step of the handshake came to, and how long it took.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PhaseReport {
    /// Which step.
    pub phase: Phase,
    /// What it came to.
    pub outcome: PhaseOutcome,
    /// What it has found and changed.
    pub detail: PhaseDetail,
    /// How long it took, in nanoseconds.
    pub duration_ns: u64,
}

/// Whether the guest's processes, other than the agent, run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WorkloadState {
    /// They run.
    Running,
    /// They stand still, or are about to.
    Frozen,
}

impl fmt::Display for WorkloadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Frozen => "frozen",
        })
    }
}

/// The answer to a setup whose steps were all done, and to a reattach. No command is accepted before the release of the
/// epoch that it acknowledges.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ready {
    /// The epoch that is acknowledged: that of the frame.
    pub epoch: Epoch,
    /// The version of the agent.
    pub agent_version: String,
    /// The kernel's boot id.
    pub boot_id: String,
    /// The steps.
    pub phases: Vec<PhaseReport>,
    /// Whether the guest's processes run.
    pub workload: WorkloadState,
    /// Whether the epoch has been released: always false after a setup.
    pub released: bool,
}

impl Ready {
    /// How far the guest's clock was behind the host's before it was set, in nanoseconds.
    #[must_use]
    pub fn clock_behind_ns(&self) -> Option<i64> {
        self.phases.iter().find_map(|report| match report.detail {
            PhaseDetail::Clock { old_offset_ns, .. } => Some(old_offset_ns.saturating_neg()),
            PhaseDetail::None
            | PhaseDetail::Entropy(_)
            | PhaseDetail::Identity(_)
            | PhaseDetail::Ports(_) => None,
        })
    }
}

/// The answer to a hello or setup of which a step failed. There is no session, and none of an earlier epoch either.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Failed {
    /// The step that failed.
    pub phase: Phase,
    /// Why.
    pub error: String,
}
