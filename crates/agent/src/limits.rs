//! Resource limits: those of a command, and the agent's own.
//!
//! # Source
//! getrlimit(2).

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use crate::error::{AgentError, Attempt};

/// How many descriptors a command may have open unless told otherwise: what select(2) can hold, and what programs expect.
const USUAL_DESCRIPTORS: u64 = 1024;

/// Each resource by its name in limits.conf(5).
const RESOURCES: [(&str, Resource); 16] = [
    ("as", Resource::As),
    ("core", Resource::Core),
    ("cpu", Resource::Cpu),
    ("data", Resource::Data),
    ("fsize", Resource::Fsize),
    ("locks", Resource::Locks),
    ("memlock", Resource::Memlock),
    ("msgqueue", Resource::Msgqueue),
    ("nice", Resource::Nice),
    ("nofile", Resource::Nofile),
    ("nproc", Resource::Nproc),
    ("rss", Resource::Rss),
    ("rtprio", Resource::Rtprio),
    ("rttime", Resource::Rttime),
    ("sigpending", Resource::Sigpending),
    ("stack", Resource::Stack),
];

/// A limit of a command, in the resource's own unit (bytes, seconds, or a count); `None` is no limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Limit {
    /// The name of the resource, as in limits.conf(5): `nofile`, `as`, `cpu` …
    pub(crate) resource: String,
    /// What is enforced; the command may raise it up to `hard`.
    pub(crate) soft: Option<u64>,
    /// What cannot be passed without privileges.
    pub(crate) hard: Option<u64>,
}

impl Limit {
    /// Sets the limit for this process and those that it starts or becomes.
    ///
    /// # Errors
    /// The text and error number: no such resource, a soft limit above the hard one, or the kernel's refusal.
    pub(crate) fn apply(&self) -> Result<(), (String, i32)> {
        let found = RESOURCES.iter().find(|(name, _)| *name == self.resource);
        let Some((name, resource)) = found else {
            return Err((format!("there is no resource {:?}", self.resource), 0));
        };
        let limit = Rlimit {
            current: self.soft,
            maximum: self.hard,
        };
        setrlimit(*resource, limit)
            .map_err(|error| (format!("limit {name} to {self}"), error.raw_os_error()))
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |at| at.to_string());
        write!(
            formatter,
            "{} (at most {})",
            word(self.soft),
            word(self.hard)
        )
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
    fn an_unknown_resource_and_a_soft_limit_above_the_hard_one_are_named() {
        let limit = |resource: &str, soft, hard| Limit {
            resource: resource.to_owned(),
            soft,
            hard,
        };
        let (step, errno) = limit("files", None, None).apply().expect_err("unknown");
        assert_eq!(
            (step.as_str(), errno),
            ("there is no resource \"files\"", 0)
        );
        let (step, errno) = limit("core", Some(2), Some(1)).apply().expect_err("above");
        assert_eq!((step.as_str(), errno), ("limit core to 2 (at most 1)", 22));
    }
}
