//! An image that is opened, checked, mapped and read.
#![no_main]

#[path = "../../crates/qcow2/tests/untrusted/mod.rs"]
mod untrusted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| untrusted::image(bytes));
