//! A snapshot table and a bitmap directory.
#![no_main]

#[path = "../../crates/qcow2/tests/untrusted/mod.rs"]
mod untrusted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| untrusted::directories(bytes));
