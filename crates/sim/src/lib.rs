//! Test doubles that fail on purpose: object stores, disks and recorded writes.
#![forbid(unsafe_code)]

pub mod disk;
pub mod fault_store;
pub mod interleave;
pub mod lossy_creates;
#[cfg(feature = "s3")]
pub mod s3;

pub use disk::{DiskFault, FaultDisk, History, RecordedDisk};
pub use fault_store::{Fault, FaultStore};
pub use lossy_creates::{LossyCreates, Lost};
