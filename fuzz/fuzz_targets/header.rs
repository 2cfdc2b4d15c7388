//! The first bytes of an image.
#![no_main]

#[path = "../../crates/qcow2/tests/untrusted/mod.rs"]
mod untrusted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| untrusted::header(bytes));
