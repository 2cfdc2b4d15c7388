//! Streams that QEMU wrote: read whole, and refused when anything that can be seen is wrong.

use std::ops::Range;
use std::path::Path;

use stead_migration_stream::{Error, Options, StreamReport, split_ram, walk_bytes};

const PRIVATE: &str = "q35-7.2.bin.zst";
const SHARED: &str = "q35-7.2-ignore-shared.bin.zst";
const DEVICES: &str = "q35-7.2-devices-ignore-shared.bin.zst";
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

fn names(report: &StreamReport) -> Vec<&str> {
    report.sections.iter().map(|s| s.idstr.as_str()).collect()
}

#[test]
fn a_stream_is_read_to_its_end_and_all_its_parts_are_reported() {
    for (name, devices) in [(PRIVATE, 34), (SHARED, 34), (DEVICES, 46)] {
        let (stream, options) = golden(name);
        let report = walk_bytes(&stream, options).expect("a good stream");
        assert_eq!(report.machine_type, "pc-q35-7.2");
        assert_eq!(report.total_length, stream.len() as u64);
        assert_eq!(report.page_size, 4096);
        assert_eq!(names(&report)[..2], ["ram", "timer"]);
        for device in ["cpu", "apic", "0000:00:03.0/virtio-blk", "globalstate"] {
            assert!(names(&report).contains(&device), "{device} in {name}");
        }
        let ram = &report.ram_blocks[0];
        assert_eq!((ram.name.as_str(), ram.length), ("ram0", RAM_BYTES as u64));
        assert_eq!(ram.address, options.ignore_shared.then_some(0));
        let expected: &[&str] = if options.ignore_shared {
            &["x-ignore-shared"]
        } else {
            &[]
        };
        assert_eq!(report.capabilities, expected);
        assert_eq!(
            report.sections.len(),
            devices,
            "{name}: {:?}",
            names(&report)
        );
        let sum: u64 = report.sections.iter().map(|section| section.length).sum();
        assert!(sum < report.total_length);
    }
}

#[test]
fn a_stream_cut_off_at_any_byte_is_refused() {
    let (stream, options) = golden(SHARED);
    for length in 0..stream.len() {
        assert!(
            walk_bytes(&stream[..length], options).is_err(),
            "cut off at {length}"
        );
    }
}

#[test]
fn a_stream_cut_off_in_ram_says_where() {
    let (stream, options) = golden(PRIVATE);
    let error = walk_bytes(&stream[..300_001], options).expect_err("cut off");
    let Error::CutOff { at, section, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!((*at, section.as_str()), (300_001, "section ram"));
}

#[test]
fn something_behind_the_end_is_refused() {
    for name in [PRIVATE, SHARED, DEVICES] {
        let (mut stream, options) = golden(name);
        for garbage in [&[0][..], b"x", b"}", &[0; 4096]] {
            let length = stream.len();
            stream.extend_from_slice(garbage);
            assert!(
                walk_bytes(&stream, options).is_err(),
                "{name} {garbage:02x?}"
            );
            stream.truncate(length);
        }
        assert!(walk_bytes(&stream, options).is_ok());
    }
}

#[test]
fn a_stream_of_the_other_kind_is_refused() {
    for name in [PRIVATE, SHARED] {
        let (stream, options) = golden(name);
        let other = Options {
            ignore_shared: !options.ignore_shared,
        };
        let error = walk_bytes(&stream, other).expect_err("the other kind");
        assert!(matches!(error, Error::IgnoreShared { .. }), "{error}");
    }
}

/// The bytes of marks, ids, names, instances, versions, footers, and of the description's frame.
fn structure(stream: &[u8], report: &StreamReport) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut at = 9;
    for section in &report.sections {
        let mut name = vec![u8::try_from(section.idstr.len()).expect("short")];
        name.extend_from_slice(section.idstr.as_bytes());
        name.extend(section.instance.to_be_bytes());
        name.extend(section.version.to_be_bytes());
        let found = stream[at..]
            .windows(name.len())
            .position(|window| window == name);
        let start = at + found.expect("the section is there");
        let data = start + name.len();
        ranges.push(start - 5..data);
        at = data;
        if section.idstr != "ram" {
            let footer = data + usize::try_from(section.length).expect("short");
            assert_eq!(stream[footer], 0x7e, "{}", section.idstr);
            ranges.push(footer..footer + 5);
            at = footer + 5;
        }
    }
    // The end mark, the description's mark and its length.
    ranges.push(at..at + 6);
    ranges
}

#[test]
fn a_flipped_bit_in_the_structure_is_found() {
    for name in [SHARED, DEVICES] {
        let (mut stream, options) = golden(name);
        let report = walk_bytes(&stream, options).expect("a good stream");
        let mut flips = 0;
        let mut ranges = structure(&stream, &report);
        ranges.push(0..13);
        for at in ranges.into_iter().flatten() {
            for bit in 0..8 {
                stream[at] ^= 1 << bit;
                let result = walk_bytes(&stream, options);
                stream[at] ^= 1 << bit;
                assert!(result.is_err(), "{name}: bit {bit} of byte {at:#x}");
                flips += 1;
            }
        }
        assert!(flips > 7000, "{flips} bits are too few for the structure");
    }
}

#[test]
fn a_changed_size_in_the_description_is_found() {
    let (mut stream, options) = golden(SHARED);
    let json = stream.iter().rposition(|byte| *byte == 0).expect("a zero") + 4;
    let key = b"\"size\": ";
    let inner = inside_a_field_of_its_own_kind(&stream, json);
    let sizes: Vec<usize> = (json..stream.len() - key.len())
        .filter(|at| stream[*at..].starts_with(key) && !inner.contains(at))
        .map(|at| at + key.len())
        .collect();
    assert!(sizes.len() > 500, "{} sizes", sizes.len());
    for at in sizes {
        let digit = stream[at];
        stream[at] = if digit == b'9' { b'1' } else { digit + 1 };
        assert!(walk_bytes(&stream, options).is_err(), "size at {at:#x}");
        stream[at] = digit;
    }
}

/// What a field of type `tmp` says of its inside: only the size of the whole field is looked at.
fn inside_a_field_of_its_own_kind(stream: &[u8], json: usize) -> Range<usize> {
    let kind = b"\"type\": \"tmp\"";
    let starts = (json..stream.len()).filter(|at| stream[*at..].starts_with(kind));
    let starts: Vec<usize> = starts.collect();
    assert_eq!(starts.len(), 1, "one field of this kind is known of");
    let mut depth = 0;
    let mut end = starts[0];
    for (at, byte) in stream.iter().enumerate().skip(starts[0]) {
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        if depth < 0 {
            break;
        }
        if depth > 0 {
            end = at;
        }
    }
    starts[0]..end
}

/// The documentation says that payload has no checksum; this is what that means.
#[test]
fn a_flipped_bit_in_a_register_is_not_found() {
    let (mut stream, options) = golden(SHARED);
    let name = b"\x05timer\0\0\0\0\0\0\0\x02";
    let found = stream.windows(name.len()).position(|window| window == name);
    let ticks = found.expect("the section is there") + name.len();
    stream[ticks] ^= 1;
    walk_bytes(&stream, options).expect("no checksum, no error");
}

#[test]
fn the_pages_of_a_block_are_given_away_and_nothing_else_is_lost() {
    let (stream, options) = golden(PRIVATE);
    let mut ram = vec![0xee; RAM_BYTES];
    let split = split_ram(stream.as_slice(), "ram0", |offset, page| {
        let at = usize::try_from(offset).expect("fits");
        ram[at..at + 4096].copy_from_slice(page.unwrap_or(&[0; 4096]));
        Ok(())
    })
    .expect("a good stream");
    let whole = walk_bytes(&stream, options).expect("a good stream");
    let left = walk_bytes(&split.device_state, options).expect("the rest is a stream");
    assert_eq!(left.ram_blocks, whole.ram_blocks);
    assert_eq!(names(&left), names(&whole));
    assert_eq!(left.sections[1..], whole.sections[1..]);
    let of = |a: u64, b: u64| a.checked_sub(b).expect("no more than there were");
    let data = of(whole.ram_pages.data_pages, split.taken.data_pages);
    let zero = of(whole.ram_pages.zero_pages, split.taken.zero_pages);
    assert_eq!(
        (left.ram_pages.data_pages, left.ram_pages.zero_pages),
        (data, zero)
    );
    assert!(split.taken.data_pages >= 129, "{:?}", split.taken);
    assert_eq!(
        split.taken.data_pages + split.taken.zero_pages,
        64 << 8,
        "every page once"
    );
    check_guest(&ram);
}

/// The guest counts at 0x500 and in each of 128 pages; in the middle of a pass some are one ahead.
fn check_guest(ram: &[u8]) {
    let word = |at: usize| u16::from_le_bytes([ram[at], ram[at + 1]]);
    let count = word(0x500);
    assert!(count > 10, "{count} passes");
    let ahead = (0..128)
        .map(|page| word(0x10_000 + page * 4096 + 0x10) - count)
        .collect::<Vec<_>>();
    assert!(
        ahead.iter().all(|n| *n <= 1) && ahead.is_sorted_by(|a, b| a >= b),
        "{ahead:?}"
    );
}

#[test]
fn a_stream_cut_off_is_not_split() {
    let (stream, _) = golden(PRIVATE);
    for length in (0..stream.len()).step_by(997).chain([stream.len() - 1]) {
        let result = split_ram(&stream[..length], "ram0", |_, _| Ok(()));
        assert!(result.is_err(), "cut off at {length}");
    }
}

#[test]
fn a_block_that_is_not_there_is_named() {
    let (stream, _) = golden(PRIVATE);
    let error = split_ram(stream.as_slice(), "pc.ram", |_, _| Ok(())).expect_err("no block");
    let text = error.to_string();
    assert!(text.contains("pc.ram") && text.contains("ram0"), "{text}");
}

#[test]
fn a_failing_receiver_stops_the_split_and_is_named() {
    let (stream, _) = golden(PRIVATE);
    for fail_at in [0, 1, 2, 3, 100, 5000] {
        let mut calls = 0;
        let error = split_ram(stream.as_slice(), "ram0", |_, _| {
            calls += 1;
            if calls > fail_at {
                return Err(std::io::ErrorKind::StorageFull.into());
            }
            Ok(())
        })
        .expect_err("the receiver failed");
        assert!(matches!(error, Error::Sink { .. }), "{error}");
        assert_eq!(calls, fail_at + 1);
    }
}
