//! The parts of the guest agent that need no guest: they are tested in any process.
#![forbid(unsafe_code)]

pub mod files;
