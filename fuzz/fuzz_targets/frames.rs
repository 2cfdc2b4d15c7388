//! What the other side of the port sends: frames with anything between them are found whole, in order, and nothing
//! that was not sent is; however the bytes are cut into pieces.
#![no_main]

use stead_agent_proto::frame::{Decoder, Direction, Frame, Item, Kind};
use stead_agent_proto::{Epoch, Nonce};

/// Between two parts of an input; every other part is the payload of a frame, the rest goes as it is.
const BETWEEN: u8 = 0xfe;

fn frame(seq: u64, payload: &[u8]) -> Frame {
    Frame {
        direction: Direction::ToHost,
        kind: Kind::Session,
        seq,
        epoch: Epoch([7; 16]),
        nonce: Nonce(9),
        payload: payload.to_vec(),
    }
}

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
    let (mut sent, mut wire) = (Vec::new(), Vec::new());
    for (number, part) in (0..).zip(bytes.split(|byte| *byte == BETWEEN)) {
        let next = frame(number, part);
        match next.encode() {
            Ok(encoded) if number % 2 == 1 => {
                wire.extend(encoded);
                sent.push(next);
            }
            Ok(_) | Err(_) => wire.extend(part),
        }
    }
    let found = items(&wire, wire.len().max(1));
    assert_eq!(found, items(&wire, 7));
    let frames = found.into_iter().filter_map(|item| match item {
        Item::Frame(frame) => Some(frame),
        Item::Garbage { .. } => None,
    });
    assert_eq!(frames.collect::<Vec<_>>(), sent);
});
