//! An image over another one.
#![no_main]

#[path = "../../crates/qcow2/tests/untrusted/mod.rs"]
mod untrusted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| untrusted::chain(bytes));
