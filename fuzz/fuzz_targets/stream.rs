//! A migration stream that is walked, and whose RAM is taken out.
#![no_main]

use stead_migration_stream::{Options, split_ram, walk_bytes};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for ignore_shared in [false, true] {
        let _either = walk_bytes(bytes, Options { ignore_shared });
    }
    let _either = split_ram(bytes, "pc.ram", |_, _| Ok(()));
});
