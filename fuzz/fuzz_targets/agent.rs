//! The agent's machine, told anything in any order by any host.
#![no_main]

#[path = "../../crates/agent-proto/tests/untrusted/mod.rs"]
#[allow(
    dead_code,
    unused_imports,
    reason = "the other fuzzer and the tests use the rest"
)]
mod untrusted;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop(untrusted::guest(bytes)));
