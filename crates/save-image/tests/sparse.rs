//! Images whose pages lie at fixed places: read to their end mark, and bounded whatever they say.
#![allow(
    clippy::disallowed_methods,
    reason = "tests make files that nobody needs after them"
)]

mod common;

use std::fs::OpenOptions;
use std::time::{Duration, Instant};

use common::{Chance, Scratch, foreign, streams};
use stead_save_image::{Control, Format, Kind, SaveImage, convert, edit_xml, extract};
use stead_sys::durable::Existing;

/// An image with its pages at fixed places, and where its payload starts.
fn image() -> (Vec<u8>, usize) {
    let start = foreign(6, b"", false).len();
    (foreign(6, &streams::mapped(start as u64), false), start)
}

fn verify(scratch: &Scratch, bytes: &[u8]) -> Result<stead_save_image::Report, Kind> {
    let path = scratch.put("sparse", bytes);
    let report = SaveImage::open(&path).and_then(|image| image.verify(&Control::silent()));
    report
        .and_then(stead_save_image::Report::require_whole)
        .map_err(|error| error.kind())
}

/// Where the block's header stands in the file.
fn block_header(bytes: &[u8]) -> usize {
    let name = bytes.windows(7).position(|bytes| bytes == b"\x06pc.ram");
    name.expect("a block") + 7 + 8
}

#[test]
fn a_sparse_image_is_walked_to_its_end_and_what_is_not_proven_of_it_is_said() {
    let scratch = Scratch::new();
    let (bytes, _) = image();
    let report = verify(&scratch, &bytes).expect("whole");
    let stream = report.stream.expect("it was walked");
    assert_eq!(stream.machine_type, "pc-q35-9.0");
    assert_eq!(stream.ram_bytes, 300 * 4096);
    assert!(report.unproven.iter().any(|doubt| doubt.contains("sparse")));
    assert_eq!(report.stream_hash, None);
}

#[test]
fn it_is_told_and_not_changed_where_a_stream_is_needed() {
    let scratch = Scratch::new();
    let (bytes, _) = image();
    let path = scratch.put("sparse", &bytes);
    let silent = Control::silent();
    let to = scratch.path("to");
    let converted = convert(&path, &to, Format::Raw, Existing::Keep, &silent);
    assert_eq!(converted.expect_err("no stream").kind(), Kind::Unsupported);
    let opened = SaveImage::open(&path).expect("open");
    let extracted = extract(&opened, &to, Existing::Keep, &silent);
    assert_eq!(extracted.expect_err("no stream").kind(), Kind::Unsupported);
    let edited = edit_xml(&path, "<domain/>", &silent);
    assert_eq!(edited.expect_err("fixed places").kind(), Kind::Usage);
    assert_eq!(scratch.names(), ["sparse"]);
    assert_eq!(std::fs::read(&path).expect("read"), bytes);
}

#[test]
fn a_sparse_image_that_is_cut_off_is_refused() {
    let scratch = Scratch::new();
    let (bytes, start) = image();
    let mut chance = Chance(47);
    let ends = [start + 1, bytes.len() - 1, bytes.len() - 40];
    let random = (0..60).map(|_| start + 1 + chance.below(bytes.len() - start - 1));
    for end in ends.into_iter().chain(random.collect::<Vec<_>>()) {
        assert_eq!(
            verify(&scratch, &bytes[..end]).map(drop),
            Err(Kind::Damaged),
            "{end}"
        );
    }
}

#[test]
fn every_number_of_a_blocks_header_and_list_is_held_against_its_place() {
    let scratch = Scratch::new();
    let (bytes, _) = image();
    let header = block_header(&bytes);
    // The block's length, and the four numbers of its header.
    for at in (header - 8..header + 28).chain([header - 7 - 8 - 8 - 1]) {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            let found = verify(&scratch, &changed).map(drop);
            assert!(
                matches!(found, Err(Kind::Damaged)),
                "byte {at}, bit {bit}: {found:?}"
            );
        }
    }
    // More pages than there are.
    let mut changed = bytes.clone();
    changed[header + 28..header + 28 + 40].fill(0xff);
    assert_eq!(verify(&scratch, &changed).map(drop), Err(Kind::Damaged));
}

#[test]
fn an_image_that_says_sparse_and_is_a_plain_stream_is_refused_and_the_reverse() {
    let scratch = Scratch::new();
    let plain = foreign(6, &streams::tiny(), false);
    assert_eq!(verify(&scratch, &plain).map(drop), Err(Kind::Damaged));
    let start = foreign(0, b"", false).len();
    let mapped = foreign(0, &streams::mapped(start as u64), false);
    assert_eq!(verify(&scratch, &mapped).map(drop), Err(Kind::Unsupported));
}

#[test]
fn holes_of_terabytes_cost_neither_time_nor_memory() {
    let scratch = Scratch::new();
    let (bytes, _) = image();
    let header = block_header(&bytes);
    for length in [1_u64 << 40, 1 << 44, 1 << 45, 1 << 62, u64::MAX << 12] {
        let mut changed = bytes[..header].to_vec();
        changed[header - 8..].copy_from_slice(&length.to_be_bytes());
        let total = header - 8 - 7 - 8;
        changed[total..total + 8].copy_from_slice(&(length | 4).to_be_bytes());
        let bitmap_at = (header + 28) as u64;
        let pages_at = (bitmap_at + (length / 4096).div_ceil(64) * 8)
            .next_multiple_of(streams::MAPPED_ALIGNMENT);
        changed.extend(1_u32.to_be_bytes());
        for number in [4096, bitmap_at, pages_at] {
            changed.extend(number.to_be_bytes());
        }
        let path = scratch.put("huge", &changed);
        let file = OpenOptions::new().write(true).open(&path).expect("open");
        file.set_len(8 << 40).expect("a file with a hole");
        let begun = Instant::now();
        let report = SaveImage::open(&path).and_then(|image| image.verify(&Control::silent()));
        assert!(!report.expect("it can be read").whole, "{length}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{length}");
    }
}
