//! What can go wrong with a backup: tried, found, what stands now, what to do next.

pub use stead_qcow2::{Failure as BackupError, FailureKind as Kind};

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, BackupError>;
