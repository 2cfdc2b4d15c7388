//! Who is publishing, and which packs are about to be deleted: small JSON objects.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::hash::Hash;

/// The largest lease, in bytes.
pub(crate) const LEASE_BYTES_MAX: u64 = 64 << 10;
/// The largest list of condemned packs, in bytes (about a million packs).
pub(crate) const CONDEMNED_BYTES_MAX: u64 = 128 << 20;
/// The largest store description, in bytes.
pub(crate) const CONFIG_BYTES_MAX: u64 = 64 << 10;
/// The format version of a store.
pub const STORE_VERSION: u32 = 1;

/// Who publishes or collects garbage.
///
/// A holder can only be known to be dead by its own worker: nobody else sees its processes. What a host calls
/// itself and where its data folder lies says nothing of that: hosts are cloned.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseOwner {
    /// The worker's random id.
    pub worker: String,
    /// Since and within what `process` is a name: the host's boot id, a slash, and the number of the process
    /// namespace.
    pub boot: String,
    /// The process: its id and its start time.
    pub process: String,
    /// The host's name, for people.
    pub host: String,
    /// The worker's data folder, for people.
    pub data_dir: String,
}

impl LeaseOwner {
    /// Whether `other` is the same worker, perhaps in another process.
    #[must_use]
    pub fn same_worker(&self, other: &Self) -> bool {
        self.worker == other.worker
    }

    /// Whether this holder is known to be dead by `own`, who asks: it is of the same worker, and either of this
    /// boot and its process is not running, or of a boot that the worker knows to be over.
    ///
    /// # Errors
    /// That of `is_running`, which is asked of processes of this boot only.
    pub fn is_dead<E>(
        &self,
        own: &Self,
        earlier_boots: &[String],
        is_running: impl FnOnce(&str) -> Result<bool, E>,
    ) -> Result<bool, E> {
        if !self.same_worker(own) {
            return Ok(false);
        }
        if self.boot == own.boot {
            return Ok(!is_running(&self.process)?);
        }
        Ok(earlier_boots.contains(&self.boot))
    }
}

/// A lease as it stands in the store: while it is there, nothing is deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// Who holds it.
    pub owner: LeaseOwner,
    /// Since when.
    pub started: jiff::Timestamp,
}

/// A lease and its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedLease {
    /// The id, as [`crate::Store::break_lease`] takes it.
    pub id: String,
    /// What it says; the reason if it cannot be read (it holds all the same).
    pub lease: Result<Lease, String>,
}

/// Packs that no publish may use any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Condemned {
    pub(crate) packs: Vec<Hash>,
}

/// The object `steadfast-store`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) format: u32,
    pub(crate) id: String,
}

/// Only the version of a store, readable whatever else a newer one adds.
#[derive(Deserialize)]
pub(crate) struct ConfigVersion {
    pub(crate) format: u32,
}

/// JSON of a small object.
pub(crate) fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    match serde_json::to_vec(value) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("strings, numbers and lists are JSON: {error}"),
    }
}

pub(crate) fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn owner() -> LeaseOwner {
        LeaseOwner {
            worker: "w".repeat(32),
            boot: "now/1".to_owned(),
            process: "42@4711".to_owned(),
            host: "host".to_owned(),
            data_dir: "/data".to_owned(),
        }
    }

    fn is_dead(holder: &LeaseOwner, runs: bool) -> bool {
        let earlier = ["before/1".to_owned(), "before/2".to_owned()];
        let answer = |process: &str| {
            assert_eq!(holder.boot, "now/1", "{process} is no name in this boot");
            Ok::<_, Infallible>(runs)
        };
        let Ok(dead) = holder.is_dead(&owner(), &earlier, answer);
        dead
    }

    #[test]
    fn only_a_process_of_this_worker_that_is_gone_or_of_an_earlier_boot_is_dead() {
        assert!(is_dead(&owner(), false));
        assert!(!is_dead(&owner(), true));
        let boot = |boot: &str| LeaseOwner {
            boot: boot.to_owned(),
            ..owner()
        };
        assert!(is_dead(&boot("before/2"), true), "its number is reused");
        assert!(!is_dead(&boot("elsewhere/1"), false), "a clone's boot");
        // Host, folder and process of another worker may all be as ours.
        for boot in ["now/1", "before/1", "elsewhere/1"] {
            let other = LeaseOwner {
                worker: "v".repeat(32),
                boot: boot.to_owned(),
                ..owner()
            };
            let seen = |_: &str| -> Result<bool, Infallible> { Ok(false) };
            let Ok(dead) = other.is_dead(&owner(), &["before/1".to_owned()], seen);
            assert!(!dead, "{boot}");
        }
    }

    #[test]
    fn a_lease_is_the_json_of_the_format() {
        let lease = Lease {
            owner: owner(),
            started: jiff::Timestamp::UNIX_EPOCH,
        };
        let text = format!(
            r#"{{"owner":{{"worker":"{}","boot":"now/1","process":"42@4711","host":"host","data_dir":"/data"}},"started":"1970-01-01T00:00:00Z"}}"#,
            "w".repeat(32)
        );
        assert_eq!(String::from_utf8_lossy(&to_json(&lease)), text);
        assert_eq!(from_json(text.as_bytes()), Ok(lease));
        let older = r#"{"owner":{"host":"h","data_dir":"/d","process":"1@1"},"started":"1970-01-01T00:00:00Z"}"#;
        assert!(from_json::<Lease>(older.as_bytes()).is_err());
    }
}
