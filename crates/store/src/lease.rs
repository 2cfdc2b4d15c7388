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
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseOwner {
    /// The host's name.
    pub host: String,
    /// The data folder of the program; with the host it says who may remove a lease after a restart.
    pub data_dir: String,
    /// The process (its id, or id and start time).
    pub process: String,
}

impl LeaseOwner {
    /// Whether `other` is the same program, perhaps restarted.
    #[must_use]
    pub fn same_program(&self, other: &Self) -> bool {
        self.host == other.host && self.data_dir == other.data_dir
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
