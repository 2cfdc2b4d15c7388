//! The host's session, told anything in any order by a guest.
#![no_main]

#[path = "../../crates/agent-proto/tests/untrusted/mod.rs"]
#[allow(
    dead_code,
    unused_imports,
    reason = "the other fuzzer and the tests use the rest"
)]
mod untrusted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop(untrusted::host(bytes)));
