//! What tells a fork from the sandbox that it was made of.

use stead_agent_link::{Bytes, ForkIdentity};

use crate::error::{EngineError, Result};
use crate::launch::Identity;

/// The longest host name that a Linux kernel keeps, in bytes.
const HOSTNAME_BYTES_MAX: usize = 64;

/// Who the guest of a fork is. Its agent sees to it before any other process of it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForkPolicy {
    /// Who it was.
    Keep,
    /// Somebody else: it gets a host name, a machine id and SSH host keys of its own.
    Change {
        /// Its host name, of several `NAME-1`, `NAME-2`, …; the sandbox's name when there is none.
        hostname: Option<String>,
        /// Absolute paths of files, and of folders with all that is in them, that are removed.
        clear: Vec<String>,
    },
}

impl Default for ForkPolicy {
    fn default() -> Self {
        Self::Change {
            hostname: None,
            clear: Vec::new(),
        }
    }
}

impl ForkPolicy {
    /// Refuses what the agent would refuse, before anything is fetched.
    pub(crate) fn check(&self, count: u32) -> Result<()> {
        let Self::Change { hostname, clear } = self else {
            return Ok(());
        };
        if let Some(name) = hostname {
            let longest = if count > 1 {
                format!("{name}-{count}")
            } else {
                name.clone()
            };
            if name.is_empty() || as_hostname(&longest) != longest {
                return Err(EngineError::usage(
                    format!("name the host {name:?}"),
                    "a host name has 1 to 64 letters, digits, '.' or '-'",
                ));
            }
        }
        let is_wrong =
            |path: &&String| !path.starts_with('/') || path.contains('\0') || path.as_str() == "/";
        match clear.iter().find(is_wrong) {
            Some(path) => Err(EngineError::usage(
                format!("clear {path:?} in a fork"),
                "it is not the absolute path of a file or folder below /",
            )),
            None => Ok(()),
        }
    }

    /// Who the fork `index` of `count` is, whose sandbox is named `sandbox`.
    pub(crate) fn identity(&self, sandbox: &str, index: usize, count: usize) -> Identity {
        let Self::Change { hostname, clear } = self else {
            return Identity::Keep;
        };
        let hostname = match hostname {
            Some(name) if count > 1 => format!("{name}-{}", index.saturating_add(1)),
            Some(name) => name.clone(),
            None => as_hostname(sandbox),
        };
        Identity::Fork(Box::new(ForkIdentity {
            hostname: Some(hostname),
            machine_id: true,
            ssh_host_keys: true,
            network: Vec::new(),
            clear: clear
                .iter()
                .map(|path| Bytes::from(path.as_str()))
                .collect(),
        }))
    }
}

/// A name as a host may have it: `-` for each character that a host name cannot have.
fn as_hostname(name: &str) -> String {
    let allowed = |c: char| match c {
        c if c.is_ascii_alphanumeric() || c == '.' => c,
        _ => '-',
    };
    name.chars().take(HOSTNAME_BYTES_MAX).map(allowed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hostname(identity: &Identity) -> Option<&str> {
        match identity {
            Identity::Keep => None,
            Identity::Fork(fork) => fork.hostname.as_deref(),
        }
    }

    #[test]
    fn a_fork_is_named_as_asked_for_or_as_its_sandbox_and_several_are_numbered() {
        let own = ForkPolicy::default();
        assert_eq!(hostname(&own.identity("a_b.c", 0, 1)), Some("a-b.c"));
        let given = ForkPolicy::Change {
            hostname: Some("db".to_owned()),
            clear: Vec::new(),
        };
        assert_eq!(hostname(&given.identity("x", 0, 1)), Some("db"));
        assert_eq!(hostname(&given.identity("x", 1, 3)), Some("db-2"));
        assert_eq!(ForkPolicy::Keep.identity("x", 0, 1), Identity::Keep);
    }

    #[test]
    fn what_the_agent_would_refuse_is_refused_before() {
        let change = |hostname: Option<&str>, clear: &[&str]| ForkPolicy::Change {
            hostname: hostname.map(str::to_owned),
            clear: clear.iter().map(|path| (*path).to_owned()).collect(),
        };
        let long = "x".repeat(64);
        for (wrong, count) in [
            (change(Some("a b"), &[]), 1),
            (change(Some(""), &[]), 2),
            (change(Some(&long), &[]), 2),
            (change(None, &["etc/secret"]), 1),
            (change(None, &["/"]), 1),
        ] {
            assert!(wrong.check(count).is_err(), "{wrong:?}");
        }
        assert!(change(Some(&long), &["/root/.ssh"]).check(1).is_ok());
        assert!(ForkPolicy::default().check(1000).is_ok());
    }
}
