//! Damage and lies: one clear error each, nothing written, no panic.
#![allow(
    clippy::disallowed_methods,
    reason = "tests make files that nobody needs after them"
)]

mod common;

use std::fs;
use std::path::Path;

use common::{Chance, Scratch, XML, foreign, stream, whole, write};
use proptest::prelude::*;
use stead_save_image::{Appears, Control, Format, Kind, SaveImage, Status, Writer, probe};

/// An image with a record that is small enough to be damaged a thousand times.
fn small(scratch: &Scratch, format: Format) -> Vec<u8> {
    let path = scratch.path("small");
    write(&path, format);
    fs::read(path).expect("read")
}

fn kind(path: &Path) -> Kind {
    whole(path).expect_err("refused").kind()
}

#[test]
fn a_thousand_bits_flipped_anywhere_are_all_refused_with_the_record() {
    let scratch = Scratch::new();
    let bytes = small(&scratch, Format::Zstd);
    let path = scratch.put("flipped", &bytes);
    whole(&path).expect("whole before");
    let mut chance = Chance(0x5eed);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open");
    let head = bytes.len().min(160 << 10);
    for round in 0..1000 {
        use std::os::unix::fs::FileExt;
        // Half of them before the payload, where most of the meaning is; all bits of the header among them.
        let limit = if round % 2 == 0 { head } else { bytes.len() };
        let at = if round < 92 {
            round
        } else {
            chance.below(limit)
        };
        let bit = 1 << chance.below(8);
        file.write_all_at(&[bytes[at] ^ bit], at as u64)
            .expect("flip");
        assert!(
            whole(&path).is_err(),
            "bit {bit:#x} of byte {at} went unseen"
        );
        file.write_all_at(&[bytes[at]], at as u64)
            .expect("flip back");
    }
    whole(&path).expect("whole again");
}

#[test]
fn every_bit_of_the_header_and_of_the_record_is_guarded() {
    let scratch = Scratch::new();
    let bytes = small(&scratch, Format::Zstd);
    let path = scratch.put("flipped", &bytes);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open");
    let payload = SaveImage::open(&path).expect("open").info().payload_at as usize;
    let record = payload - 4096;
    let places = (0..92)
        .chain(record..record + 200)
        .chain(payload - 50..payload);
    for at in places {
        use std::os::unix::fs::FileExt;
        for bit in [1_u8, 0x10, 0x80] {
            file.write_all_at(&[bytes[at] ^ bit], at as u64)
                .expect("flip");
            assert!(
                whole(&path).is_err(),
                "bit {bit:#x} of byte {at} went unseen"
            );
        }
        file.write_all_at(&[bytes[at]], at as u64)
            .expect("flip back");
    }
}

#[test]
fn an_image_cut_off_at_every_4_kib_and_at_random_bytes_is_refused() {
    let scratch = Scratch::new();
    for format in [Format::Zstd, Format::Raw] {
        let path = scratch.path(format.name());
        write(&path, format);
        let length = fs::metadata(&path).expect("stat").len();
        let mut cuts: Vec<u64> = (0..length).step_by(4096).collect();
        let mut chance = Chance(7);
        cuts.extend((0..100).map(|_| chance.below(length as usize) as u64));
        cuts.extend([length - 1, 16, 91, 92, 93]);
        cuts.sort_unstable();
        // From the end on, so that the file is only ever made shorter.
        for cut in cuts.into_iter().rev() {
            let file = fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .expect("open");
            file.set_len(cut).expect("cut");
            // Most of a long payload is cut off alike; a few of the cuts are enough of it.
            if length > 8 << 20 && cut > 1 << 20 && cut % (64 << 10) == 0 && cut % (2 << 20) != 0 {
                continue;
            }
            assert!(whole(&path).is_err(), "cut at {cut} of {length}");
        }
    }
}

#[test]
fn without_a_record_every_cut_and_what_stands_behind_the_end_are_still_refused() {
    let scratch = Scratch::new();
    let packed = zstd::encode_all(stream(), 1).expect("pack");
    let whole_image = foreign(5, &packed, false);
    let path = scratch.put("theirs", &whole_image);
    whole(&path).expect("whole");
    let mut chance = Chance(99);
    for _ in 0..40 {
        let cut = chance.below(whole_image.len());
        fs::write(&path, &whole_image[..cut]).expect("cut");
        assert!(whole(&path).is_err(), "cut at {cut}");
    }
    fs::write(&path, [&whole_image, b"more".as_slice()].concat()).expect("longer");
    assert_eq!(kind(&path), Kind::Damaged);
}

#[test]
fn damage_is_named_by_its_mebibyte() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let mut chance = Chance(3);
    let noise: Vec<u8> = (0..(9 << 20) + 77)
        .map(|_| chance.below(256) as u8)
        .collect();
    let appears = Appears::AtOnce;
    let image = common::new_image(Format::Raw);
    let mut writer = Writer::create(&path, &image, appears, Control::silent()).expect("create");
    writer.copy_from(noise.as_slice()).expect("copy");
    writer.finish().expect("finish");
    let start = SaveImage::open(&path).expect("open").info().payload_at;
    let mut bytes = fs::read(&path).expect("read");
    assert!(
        bytes[start as usize..] == noise,
        "past the page cache or through it, all is there"
    );
    let mib = 1_u64 << 20;
    for leaf in [2, 3, 6, 9] {
        bytes[(start + leaf * mib) as usize + 70] ^= 4;
    }
    fs::write(&path, bytes).expect("write");
    let report = SaveImage::open(&path)
        .expect("open")
        .verify(&Control::silent())
        .expect("verify");
    assert!(!report.whole);
    let ranges: Vec<_> = report
        .damage
        .iter()
        .map(|d| (d.part, d.from, d.to))
        .collect();
    let part = |from, to| ("payload", start + from, start + to);
    let expected = [
        part(2 * mib, 4 * mib),
        part(6 * mib, 7 * mib),
        part(9 * mib, 9 * mib + 77),
    ];
    assert_eq!(ranges, expected);
}

#[test]
fn other_files_newer_versions_and_absurd_numbers_have_an_error_of_their_own() {
    let scratch = Scratch::new();
    let good = foreign(0, stream(), false);
    let case = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good[..200_000].to_vec();
        change(&mut bytes);
        scratch.put(name, &bytes)
    };
    let put = |bytes: &mut Vec<u8>, at: usize, number: u32| {
        bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
    };
    let other = case("other", &|bytes| bytes[0] = b'l');
    assert_eq!(probe(&other).expect("probe"), Status::NotSaveImage);
    let newer = case("newer", &|bytes| put(bytes, 16, 3));
    assert_eq!(probe(&newer).expect("probe"), Status::NewerVersion(3));
    let cases = [
        (other, Kind::NotSaveImage),
        (case("empty", &|bytes| bytes.clear()), Kind::NotSaveImage),
        (newer, Kind::NewerVersion),
        (
            case("partial", &|bytes| bytes[12..16].copy_from_slice(b"Part")),
            Kind::Incomplete,
        ),
        (case("short", &|bytes| bytes.truncate(91)), Kind::CutOff),
        (case("no data", &|bytes| put(bytes, 20, 0)), Kind::Damaged),
        (
            case("longest", &|bytes| put(bytes, 20, u32::MAX)),
            Kind::Damaged,
        ),
        (
            case("longer", &|bytes| put(bytes, 20, 300_000)),
            Kind::CutOff,
        ),
        (
            case("cookie", &|bytes| put(bytes, 32, 100_000)),
            Kind::Damaged,
        ),
        (
            case("format", &|bytes| put(bytes, 28, 7)),
            Kind::NewerVersion,
        ),
        (
            case("endless", &|bytes| bytes[92..].fill(b'x')),
            Kind::Damaged,
        ),
        (case("no text", &|bytes| bytes[92] = 0xff), Kind::Damaged),
        (case("no XML", &|bytes| bytes[92] = 0), Kind::Damaged),
        (
            case("gzip", &|bytes| put(bytes, 28, 1)),
            Kind::WrongCompression,
        ),
        (
            case("no magic", &|bytes| bytes[92 + XML.len() + 65556] = 9),
            Kind::Damaged,
        ),
    ];
    for (path, expected) in cases {
        let before = fs::read(&path).expect("read");
        assert_eq!(kind(&path), expected, "{}", path.display());
        assert_eq!(fs::read(&path).expect("read"), before);
    }
}

#[test]
fn what_each_compression_really_is_is_told_when_the_header_lies() {
    let scratch = Scratch::new();
    for real in [
        Format::Gzip,
        Format::Bzip2,
        Format::Xz,
        Format::Lzop,
        Format::Zstd,
    ] {
        let path = scratch.path("real");
        let mut bytes = small_file(&path, real);
        bytes[28] = 0;
        // Without a record, so that only the payload itself gives the lie away.
        let start = SaveImage::open(&path).expect("open").info().payload_at as usize;
        bytes[start - 4096..start].fill(0);
        fs::write(&path, bytes).expect("write");
        let error = whole(&path).expect_err("refused");
        assert_eq!(error.kind(), Kind::WrongCompression);
        assert!(error.to_string().contains(real.name()), "{error}");
        fs::remove_file(path).expect("remove");
    }
}

fn small_file(path: &Path, format: Format) -> Vec<u8> {
    write(path, format);
    fs::read(path).expect("read")
}

#[test]
fn a_bomb_costs_time_at_most_and_no_memory() {
    let scratch = Scratch::new();
    let zeros = std::io::Read::take(std::io::repeat(0), 1 << 30);
    let packed = zstd::encode_all(zeros, 1).expect("pack");
    assert!(packed.len() < 200_000);
    let path = scratch.put("bomb", &foreign(5, &packed, false));
    let before = peak_bytes();
    assert_eq!(kind(&path), Kind::Damaged);
    let grown = peak_bytes() - before;
    assert!(
        grown < 200 << 20,
        "{grown} bytes of memory for a bomb of 1 GiB"
    );
}

/// The most memory this process ever had, in bytes.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("proc");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .expect("VmHWM");
    let number: String = line.chars().filter(char::is_ascii_digit).collect();
    number.parse::<u64>().expect("a number") << 10
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Header, texts and record of any shape: an error or an image, never a panic, and the file stays as it is.
    #[test]
    fn any_bytes_before_the_payload_are_survived(
        changes in prop::collection::vec((0_usize..140_000, any::<u8>()), 1..30),
        header in prop::collection::vec((16_usize..40, any::<u8>()), 0..6),
        cut in 0_usize..145_000,
    ) {
        let mut bytes = foreign(0, &stream()[..80_000], false);
        for (at, byte) in changes.into_iter().chain(header) {
            bytes[at] = byte;
        }
        bytes.truncate(cut.max(1));
        let scratch = Scratch::new();
        let path = scratch.put("any", &bytes);
        probe(&path).expect("readable");
        prop_assert!(whole(&path).is_err(), "a stream that is cut off");
        prop_assert!(fs::read(&path).expect("read") == bytes);
    }
}
