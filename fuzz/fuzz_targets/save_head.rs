//! What stands before a save image's payload: header, texts and record.
#![no_main]

#[path = "../../crates/save-image/tests/untrusted/mod.rs"]
#[allow(dead_code, reason = "the other fuzzer uses the rest")]
mod untrusted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| untrusted::head(bytes));
