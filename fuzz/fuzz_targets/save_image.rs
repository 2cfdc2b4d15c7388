//! A save image that is verified to its end: compression, and the walk through its stream.
#![no_main]

#[path = "../../crates/save-image/tests/untrusted/mod.rs"]
#[allow(dead_code, reason = "the other fuzzer uses the rest")]
mod untrusted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| untrusted::image(bytes));
