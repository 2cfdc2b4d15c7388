//! What can go wrong with a merge: tried, found, what stands now, what to do next.

pub use stead_qcow2::{Failure as MergeError, FailureKind as Kind};

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, MergeError>;

/// An error of QEMU.
pub(crate) fn vm(attempt: &str, source: stead_vmm::Error) -> MergeError {
    MergeError::new(Kind::Vm, attempt, source.to_string()).because(source)
}
