//! What the other side of the port sends: frames are found whatever they are between, and in any pieces.
#![no_main]

use stead_agent_proto::frame::{Decoder, Item};

fn items(bytes: &[u8], step: usize) -> Vec<Item> {
    let mut decoder = Decoder::new();
    let mut found = Vec::new();
    for mut part in bytes.chunks(step) {
        while let Some(item) = decoder.next_item(&mut part) {
            found.push(item);
        }
    }
    found
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let all = items(bytes, bytes.len().max(1));
    assert_eq!(all, items(bytes, 7));
    for item in &all {
        if let Item::Frame(frame) = item {
            let wire = frame.encode().expect("a frame that came fits");
            assert_eq!(items(&wire, wire.len()), std::slice::from_ref(item));
        }
    }
});
