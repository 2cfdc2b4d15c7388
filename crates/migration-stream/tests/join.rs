//! Pages put back into a stream: what QEMU would have sent without any capability.

use std::ops::Range;
use std::path::Path;

use stead_migration_stream::{Join, Options, split_ram, walk_bytes};

const RAM_BYTES: usize = 64 << 20;

fn golden(name: &str) -> (Vec<u8>, Options) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    let packed = std::fs::read(path).expect("golden file");
    let ignore_shared = name.contains("ignore-shared");
    let stream = zstd::decode_all(packed.as_slice()).expect("golden file");
    (stream, Options { ignore_shared })
}

/// Where the memory has pages that are not zero, a range for each.
fn pages_with_data(ram: &[u8]) -> Vec<Range<u64>> {
    let pages = ram.chunks(4096).zip((0..).step_by(4096));
    let data = pages.filter(|(page, _)| page.iter().any(|byte| *byte != 0));
    data.map(|(_, at)| at..at + 4096).collect()
}

fn joined(join: &Join, ram: &[u8]) -> Vec<u8> {
    let write = |data: &[Range<u64>]| {
        let (mut whole, mut read) = (Vec::new(), 0);
        join.write(&mut whole, data, |at, bytes| {
            let at = usize::try_from(at).expect("fits");
            bytes.copy_from_slice(&ram[at..at + bytes.len()]);
            read += bytes.len();
            Ok(())
        })
        .expect("memory takes everything");
        (whole, read)
    };
    let (whole, read) = write(std::slice::from_ref(&(0..RAM_BYTES as u64)));
    assert_eq!(read, RAM_BYTES);
    let (same, less) = write(&pages_with_data(ram));
    assert!(same == whole, "what holes are told changes nothing");
    assert!(less < read, "holes are not read");
    whole
}

fn split(stream: &[u8], block: &str) -> (Vec<u8>, Vec<u8>) {
    let mut ram = vec![0xee; RAM_BYTES];
    let split = split_ram(stream, block, |offset, page| {
        let at = usize::try_from(offset).expect("fits");
        ram[at..at + 4096].copy_from_slice(page.unwrap_or(&[0; 4096]));
        Ok(())
    });
    (split.expect("a whole stream").device_state, ram)
}

#[test]
fn what_was_split_off_and_put_back_is_the_same_ram_and_the_same_devices() {
    let (stream, options) = golden("q35-7.2.bin.zst");
    let (state, ram) = split(&stream, "ram0");
    let join = Join::new(&state, options, "ram0", "pc.ram").expect("a good stream");
    let whole = joined(&join, &ram);
    let before = walk_bytes(&stream, options).expect("a good stream");
    let after = walk_bytes(&whole, options).expect("the result is a stream");
    assert_eq!(after.sections[1..], before.sections[1..]);
    assert_eq!(after.ram_blocks[0].name, "pc.ram");
    let pages = |report: &stead_migration_stream::StreamReport| {
        report.ram_pages.data_pages + report.ram_pages.zero_pages
    };
    assert!(pages(&after) >= (RAM_BYTES / 4096) as u64);
    let (again, same) = split(&whole, "pc.ram");
    assert!(same == ram, "the RAM is another one");
    let back = Join::new(&again, options, "pc.ram", "ram0").expect("a good stream");
    let state = walk_bytes(&state, options).expect("a good stream");
    let back = walk_bytes(&back.without_pages(), options).expect("a stream");
    assert_eq!(back.ram_blocks, state.ram_blocks);
    assert_eq!(back.sections[1..], state.sections[1..]);
}

#[test]
fn a_state_taken_beside_its_ram_becomes_a_stream_that_demands_nothing() {
    for name in [
        "q35-7.2-ignore-shared.bin.zst",
        "q35-7.2-devices-ignore-shared.bin.zst",
    ] {
        let (state, options) = golden(name);
        let mut ram = vec![0; RAM_BYTES];
        ram[5000] = 7;
        ram[RAM_BYTES - 1] = 9;
        let join = Join::new(&state, options, "ram0", "pc.ram").expect("a good stream");
        let report = walk_bytes(&joined(&join, &ram), Options::default()).expect("a stream");
        assert!(report.capabilities.is_empty(), "{:?}", report.capabilities);
        assert_eq!(report.sections[1..], join.report().sections[1..]);
        let (_, found) = split(&joined(&join, &ram), "pc.ram");
        assert!(found == ram, "the RAM is another one");
    }
}

#[test]
fn a_block_that_is_missing_or_a_name_that_is_taken_is_refused() {
    let (state, options) = golden("q35-7.2-ignore-shared.bin.zst");
    let blocks = walk_bytes(&state, options).expect("a stream").ram_blocks;
    let other = blocks[1].name.clone();
    assert!(Join::new(&state, options, "pc.ram", "ram0").is_err());
    assert!(Join::new(&state, options, "ram0", &other).is_err());
    for cut in (0..state.len()).step_by(101) {
        assert!(Join::new(&state[..cut], options, "ram0", "pc.ram").is_err());
    }
}
