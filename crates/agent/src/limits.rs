//! Resource limits: those of a command, and the agent's own.
//!
//! # Source
//! getrlimit(2).

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use stead_agent_proto::message::{self, ResourceLimit};

use crate::error::{AgentError, Attempt};

/// How many descriptors a command may have open unless told otherwise: what select(2) can hold, and what programs expect.
const USUAL_DESCRIPTORS: u64 = 1024;

/// Sets a limit for this process and those that it starts or becomes.
///
/// # Errors
/// What was tried, and why not: a soft limit above the hard one, or the kernel's refusal.
pub(crate) fn apply(limit: &ResourceLimit) -> Result<(), (String, Errno)> {
    let (name, resource) = known(limit.resource);
    let wanted = Rlimit {
        current: limit.soft,
        maximum: limit.hard,
    };
    setrlimit(resource, wanted).map_err(|error| {
        let word = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |at| at.to_string());
        let (soft, hard) = (word(limit.soft), word(limit.hard));
        (format!("limit {name} to {soft} (at most {hard})"), error)
    })
}

fn known(resource: message::Resource) -> (&'static str, Resource) {
    use message::Resource as Told;
    match resource {
        Told::AddressSpace => ("address space", Resource::As),
        Told::Core => ("core files", Resource::Core),
        Told::Cpu => ("processor time", Resource::Cpu),
        Told::Data => ("the data segment", Resource::Data),
        Told::FileSize => ("files", Resource::Fsize),
        Told::LockedMemory => ("locked memory", Resource::Memlock),
        Told::OpenFiles => ("open files", Resource::Nofile),
        Told::Processes => ("processes", Resource::Nproc),
        Told::Stack => ("the stack", Resource::Stack),
    }
}

/// Lets the agent have as many descriptors as it may: each command takes several.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn raise_own() -> Result<(), AgentError> {
    let own = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: own.maximum,
        maximum: own.maximum,
    };
    setrlimit(Resource::Nofile, most).attempt(|| "raise the limit of descriptors".to_owned())
}

/// Gives a command the usual limits back, before its own are applied.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn restore_usual() -> rustix::io::Result<()> {
    let own = getrlimit(Resource::Nofile);
    let usual = own
        .maximum
        .map_or(USUAL_DESCRIPTORS, |most| most.min(USUAL_DESCRIPTORS));
    let limit = Rlimit {
        current: Some(usual),
        maximum: own.maximum,
    };
    setrlimit(Resource::Nofile, limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_soft_limit_above_the_hard_one_is_named() {
        let limit = ResourceLimit {
            resource: message::Resource::Core,
            soft: Some(2),
            hard: Some(1),
        };
        let (step, error) = apply(&limit).expect_err("above");
        assert_eq!(step, "limit core files to 2 (at most 1)");
        assert_eq!(error, Errno::INVAL);
    }
}
