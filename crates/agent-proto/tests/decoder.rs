//! What the decoder makes of streams that are cut, joined, flooded and damaged.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use proptest::prelude::*;
use stead_agent_proto::frame::{
    Decoder, Direction, Fault, Item, Kind, MAX_PAYLOAD_BYTES, MAX_STUFFED_BYTES,
};
use stead_agent_proto::{Epoch, Frame, Nonce, ProtocolError};

fn frame(life: u8, seq: u64, payload: Vec<u8>) -> Frame {
    Frame {
        direction: Direction::ToGuest,
        kind: Kind::Session,
        seq,
        epoch: Epoch([life; 16]),
        nonce: Nonce(u64::from(life)),
        payload,
    }
}

fn stream(life: u8) -> (Vec<Frame>, Vec<u8>) {
    let payloads = [
        vec![],
        vec![0; 300],
        b"one command".to_vec(),
        (0..=255).collect(),
        vec![7; 600],
    ];
    let frames: Vec<Frame> = (0..)
        .zip(payloads)
        .map(|(seq, payload)| frame(life, seq, payload))
        .collect();
    let wire = frames
        .iter()
        .flat_map(|frame| frame.encode().unwrap())
        .collect();
    (frames, wire)
}

fn decode(wire: &[u8], step: usize) -> Vec<Item> {
    let (mut decoder, mut items) = (Decoder::new(), Vec::new());
    for piece in wire.chunks(step) {
        let mut input = piece;
        while let Some(item) = decoder.next_item(&mut input) {
            items.push(item);
        }
        assert!(
            decoder.kept_bytes() <= MAX_STUFFED_BYTES,
            "the buffer is bounded"
        );
    }
    items
}

fn frames_of(items: &[Item]) -> Vec<&Frame> {
    items
        .iter()
        .filter_map(|item| match item {
            Item::Frame(frame) => Some(frame),
            Item::Garbage { .. } => None,
        })
        .collect()
}

#[test]
fn a_stream_comes_through_whatever_the_size_of_the_reads() {
    let (frames, wire) = stream(1);
    for step in [1, 2, 3, 7, 64, 1000, wire.len()] {
        let items = decode(&wire, step);
        assert_eq!(frames_of(&items), frames.iter().collect::<Vec<_>>());
        assert_eq!(items.len(), frames.len(), "and nothing else is found");
    }
}

/// The fault that was seen: half a request from before a capture and a new one became one command.
#[test]
fn a_stream_cut_at_any_byte_and_continued_by_another_gives_only_whole_frames_of_each() {
    let (old_frames, old) = stream(1);
    let (new_frames, new) = stream(2);
    for cut in 0..=old.len() {
        let mut wire = old[..cut].to_vec();
        wire.extend_from_slice(&new);
        let items = decode(&wire, 4096);
        let found = frames_of(&items);
        let (of_old, of_new): (Vec<&Frame>, Vec<&Frame>) = found
            .iter()
            .copied()
            .partition(|frame| frame.epoch == Epoch([1; 16]));
        assert_eq!(
            of_new,
            new_frames.iter().collect::<Vec<_>>(),
            "cut at {cut}: the new stream is untouched"
        );
        assert!(of_old.len() <= old_frames.len());
        assert_eq!(
            of_old,
            old_frames[..of_old.len()].iter().collect::<Vec<_>>(),
            "cut at {cut}"
        );
    }
}

#[test]
fn a_stream_entered_at_any_byte_gives_the_frames_that_begin_after_it() {
    let (frames, wire) = stream(1);
    for start in 0..wire.len() {
        let items = decode(&wire[start..], 4096);
        let found = frames_of(&items);
        assert_eq!(
            found,
            frames[frames.len() - found.len()..]
                .iter()
                .collect::<Vec<_>>(),
            "from {start}"
        );
        assert!(
            items.len() <= found.len() + 1,
            "at most one half frame is met"
        );
    }
}

/// The twin: framing by length alone, as many agents do it, joins two lives.
#[test]
fn the_cut_test_can_fail_when_frames_are_found_by_length_alone() {
    let by_length = |payload: &[u8]| [&(payload.len() as u32).to_le_bytes()[..], payload].concat();
    let old = by_length(b"rm -rf /tmp/scratch");
    let new = by_length(b"echo");
    let wire = [&old[..12], &new[..], &by_length(b"uptime")[..]].concat();
    let length = u32::from_le_bytes(wire[..4].try_into().unwrap()) as usize;
    let joined = &wire[4..4 + length];
    assert!(joined.starts_with(b"rm -rf /") && joined[8..].windows(4).any(|part| part == b"echo"));
}

#[test]
fn no_single_flipped_bit_is_accepted() {
    for payload in [
        vec![],
        b"half a request".to_vec(),
        vec![0; 40],
        vec![9; 520],
    ] {
        let original = frame(1, 77, payload);
        let wire = original.encode().unwrap();
        for bit in 0..wire.len() * 8 {
            let mut damaged = wire.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // A damaged zero before the frame leaves the frame whole when the stream was just before it.
            let items = decode(&[&[0][..], &damaged, &[0]].concat(), 4096);
            let found = frames_of(&items);
            assert!(
                found.is_empty(),
                "bit {bit} of {} passed: {found:?}",
                wire.len() * 8
            );
        }
    }
}

#[test]
fn the_largest_frame_passes_and_a_larger_one_is_not_encoded() {
    for fill in [0, 1, 255] {
        let largest = frame(1, 0, vec![fill; MAX_PAYLOAD_BYTES]);
        let items = decode(&largest.encode().unwrap(), 777);
        assert_eq!(items, vec![Item::Frame(largest)]);
    }
    let found = frame(1, 0, vec![0; MAX_PAYLOAD_BYTES + 1]).encode();
    assert!(
        matches!(found, Err(ProtocolError::TooLarge { .. })),
        "{found:?}"
    );
}

#[test]
fn a_run_without_end_costs_no_memory_and_ends_at_the_next_zero() {
    let mut decoder = Decoder::new();
    let flood = vec![0x55; 1 << 20];
    for _ in 0..64 {
        let mut input = &flood[..];
        assert_eq!(decoder.next_item(&mut input), None);
        assert!(decoder.kept_bytes() <= MAX_STUFFED_BYTES);
    }
    let next = frame(1, 0, b"still here".to_vec());
    let wire = next.encode().unwrap();
    let mut input = &wire[..];
    let garbage = decoder.next_item(&mut input);
    assert_eq!(
        garbage,
        Some(Item::Garbage {
            bytes: 64 << 20,
            fault: Fault::TooLong
        })
    );
    assert_eq!(decoder.next_item(&mut input), Some(Item::Frame(next)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_bytes_are_survived_and_a_frame_after_them_is_found(
        noise in prop::collection::vec(prop_oneof![3 => any::<u8>(), 1 => Just(0u8)], 0..3000),
        step in 1usize..500,
    ) {
        let next = frame(3, 5, b"after the noise".to_vec());
        let wire = [&noise[..], &next.encode().unwrap()].concat();
        let items = decode(&wire, step);
        prop_assert_eq!(items.last(), Some(&Item::Frame(next)));
        prop_assert_eq!(frames_of(&items).len(), 1);
    }

    #[test]
    fn any_frame_comes_back(seq: u64, life: u8, payload in prop::collection::vec(any::<u8>(), 0..2000), step in 1usize..3000) {
        let original = frame(life, seq, payload);
        prop_assert_eq!(decode(&original.encode().unwrap(), step), vec![Item::Frame(original)]);
    }

    #[test]
    fn damage_of_any_kind_never_makes_a_new_frame(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..=255), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let (frames, mut wire) = stream(1);
        for (at, mask) in &flips {
            let at = at.index(wire.len());
            wire[at] ^= mask;
        }
        wire.truncate(cut.index(wire.len()) + 1);
        for found in frames_of(&decode(&wire, 4096)) {
            prop_assert!(frames.contains(found), "{:?}", found);
        }
    }
}
