//! An image that is repaired.
#![no_main]

#[path = "../../crates/qcow2/tests/untrusted/mod.rs"]
mod untrusted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| untrusted::changes::repair(bytes));
