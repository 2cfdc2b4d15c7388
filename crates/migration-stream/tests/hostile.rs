//! Streams made by hand and by chance: each record kind is read or refused by name, and no bytes make
//! the reader fail in another way than with an error.

use proptest::prelude::*;
use stead_migration_stream::{Error, Options, split_ram, walk_bytes};

const PAGE: [u8; 4096] = [7; 4096];

/// A stream under construction.
#[derive(Clone)]
struct Stream(Vec<u8>);

impl Stream {
    fn new() -> Self {
        Self(b"QEVM\0\0\0\x03\x07\0\0\0\x01m".to_vec())
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn word(self, word: u64) -> Self {
        self.bytes(&word.to_be_bytes())
    }

    fn name(self, name: &str) -> Self {
        let length = u8::try_from(name.len()).expect("short");
        self.bytes(&[length]).bytes(name.as_bytes())
    }

    fn ram_start(self, blocks: &[(&str, u64)]) -> Self {
        let total: u64 = blocks.iter().map(|(_, length)| length).sum();
        let start = self
            .bytes(&[1, 0, 0, 0, 2])
            .name("ram")
            .bytes(&[0, 0, 0, 0, 0, 0, 0, 4]);
        let list = start.word(total | 4);
        let list = blocks
            .iter()
            .fold(list, |list, (name, length)| list.name(name).word(*length));
        list.word(0x10).footer()
    }

    fn part(self, mark: u8) -> Self {
        self.bytes(&[mark, 0, 0, 0, 2])
    }

    fn footer(self) -> Self {
        self.bytes(&[0x7e, 0, 0, 0, 2])
    }

    fn end_part(self) -> Self {
        self.word(0x10).footer()
    }

    fn page(self, offset: u64, name: &str) -> Self {
        self.word(offset | 8).name(name).bytes(&PAGE)
    }

    fn page_of_same(self, offset: u64) -> Self {
        self.word(offset | 0x28).bytes(&PAGE)
    }

    fn end(self, json: &str) -> Vec<u8> {
        let length = u32::try_from(json.len()).expect("short");
        self.bytes(&[0, 6])
            .bytes(&length.to_be_bytes())
            .bytes(json.as_bytes())
            .0
    }

    fn end_without_devices(self) -> Vec<u8> {
        self.end(r#"{"page_size":4096,"devices":[]}"#)
    }
}

const BLOCKS: [(&str, u64); 2] = [("a", 16_384), ("b", 8192)];

fn refusal(stream: &[u8]) -> String {
    let error = walk_bytes(stream, Options::default()).expect_err("refused");
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    error.to_string()
}

#[test]
fn records_of_other_blocks_stay_as_they_were() {
    let both = Stream::new()
        .ram_start(&BLOCKS)
        .part(2)
        .page(0, "a")
        .page_of_same(4096)
        .page(0, "b")
        .page_of_same(4096)
        .end_part()
        .part(3)
        .word(0x22)
        .bytes(&[0])
        .page(8192, "a")
        .page_of_same(0)
        .page(0, "b")
        .end_part()
        .end_without_devices();
    let only_b = Stream::new()
        .ram_start(&BLOCKS)
        .part(2)
        .page(0, "b")
        .page_of_same(4096)
        .end_part()
        .part(3)
        .word(0x22)
        .bytes(&[0])
        .page(0, "b")
        .end_part()
        .end_without_devices();
    let mut taken = Vec::new();
    let split = split_ram(both.as_slice(), "a", |offset, page| {
        taken.push((offset, page.is_some()));
        Ok(())
    })
    .expect("a good stream");
    assert_eq!(taken, [(0, true), (4096, true), (8192, true), (0, true)]);
    assert!(split.device_state == only_b);
    assert_eq!(split.block.length, 16_384);
}

#[test]
fn kinds_of_ram_records_that_are_not_known_are_refused_by_name() {
    let kinds = [
        (0x40, "xbzrle"),
        (0x80, "RDMA"),
        (0x100, "compress"),
        (0x200, "multifd"),
        (1, "obsolete"),
    ];
    for (flag, name) in kinds {
        let stream = Stream::new()
            .ram_start(&BLOCKS)
            .part(3)
            .word(flag)
            .end_without_devices();
        assert!(refusal(&stream).contains(name));
        let start = Stream::new()
            .bytes(&[1, 0, 0, 0, 2])
            .name("ram")
            .bytes(&[0, 0, 0, 0, 0, 0, 0, 4]);
        let stream = start
            .word(4096 | 4)
            .name("a")
            .word(4096)
            .word(flag)
            .end_without_devices();
        assert!(refusal(&stream).contains(name));
    }
}

#[test]
fn capabilities_and_commands_that_change_the_stream_are_refused_by_name() {
    for capability in ["mapped-ram", "multifd"] {
        let list = Stream::new().bytes(&[5]).name("configuration/capabilities");
        let stream = list
            .bytes(&[0, 0, 0, 1, 0, 0, 0, 1])
            .name(capability)
            .end_without_devices();
        assert!(refusal(&stream).contains(capability));
    }
    let stream = Stream::new()
        .bytes(&[8, 0, 7, 0, 4, 0, 0, 0, 0])
        .end_without_devices();
    assert!(refusal(&stream).contains("postcopy"));
    let stream = Stream::new()
        .bytes(&[1, 0, 0, 0, 9])
        .name("dirty-bitmap")
        .bytes(&[0; 8]);
    assert!(refusal(&stream.end_without_devices()).contains("dirty-bitmap"));
    let stream = Stream::new()
        .bytes(&[5])
        .name("configuration/new")
        .bytes(&[0, 0, 0, 1]);
    assert!(refusal(&stream.end_without_devices()).contains("configuration/new"));
}

#[test]
fn commands_without_state_are_passed_over() {
    let begin = Stream::new().bytes(&[8, 0, 1, 0, 0, 8, 0, 2, 0, 4, 1, 2, 3, 4, 8, 0, 0x0b, 0, 0]);
    let stream = begin
        .ram_start(&BLOCKS)
        .part(3)
        .end_part()
        .end_without_devices();
    walk_bytes(&stream, Options::default()).expect("a good stream");
    split_ram(stream.as_slice(), "a", |_, _| Ok(())).expect("a good stream");
}

#[test]
fn ram_that_contradicts_itself_is_refused() {
    let good = || Stream::new().ram_start(&BLOCKS);
    let end = |stream: Stream| stream.part(3).end_part().end_without_devices();
    let bad = [
        ("outside", good().part(2).page(16_384, "a").end_part()),
        ("not listed", good().part(2).page(0, "c").end_part()),
        ("none before", good().part(2).page_of_same(0).end_part()),
        ("not open", good().part(3).end_part()),
        ("there twice", good().ram_start(&BLOCKS)),
        (
            "listed twice",
            Stream::new().ram_start(&[("a", 4096), ("a", 4096)]),
        ),
        (
            "4097 bytes",
            Stream::new().ram_start(&[("a", 4097), ("b", 4095)]),
        ),
        (
            "filled with",
            good().part(2).word(2).name("a").bytes(&[9]).end_part(),
        ),
        (
            "flags 0xa",
            good().part(2).word(0xa).name("a").bytes(&PAGE).end_part(),
        ),
        (
            "footer",
            good().part(2).word(0x10).bytes(&[0x7e, 0, 0, 0, 3]),
        ),
    ];
    assert!(walk_bytes(&end(good()), Options::default()).is_ok());
    for (reason, stream) in bad {
        let error = walk_bytes(&end(stream), Options::default()).expect_err(reason);
        assert!(error.to_string().contains(reason), "{reason}: {error}");
    }
    let open = Stream::new()
        .ram_start(&BLOCKS)
        .part(2)
        .end_part()
        .end_without_devices();
    let error = walk_bytes(&open, Options::default()).expect_err("RAM does not end");
    assert!(error.to_string().contains("does not end"), "{error}");
}

#[test]
fn ram_without_blocks_is_no_ram_to_split() {
    let stream = Stream::new()
        .ram_start(&[])
        .part(3)
        .end_part()
        .end_without_devices();
    let error = split_ram(stream.as_slice(), "a", |_, _| Ok(())).expect_err("no block");
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
}

#[test]
fn a_description_that_asks_for_endless_work_is_refused() {
    let fields = [
        r#"{"name":"n","size":0,"array_len":18446744073709551615,"struct":{}}"#,
        r#"{"name":"n","size":18446744073709551615,"array_len":2}"#,
        r#"{"name":"n","size":18446744073709551615}"#,
    ];
    for field in fields {
        let json = format!(
            r#"{{"page_size":4096,"devices":[{{"name":"d","instance_id":0,"fields":[{field}]}}]}}"#
        );
        let ram = Stream::new().ram_start(&BLOCKS).part(3).end_part();
        let stream = ram
            .bytes(&[4, 0, 0, 0, 3])
            .name("d")
            .bytes(&[0; 8])
            .end(&json);
        walk_bytes(&stream, Options::default()).expect_err("refused");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let stream = Stream::new().bytes(&bytes).end_without_devices();
        let _either = walk_bytes(&stream, Options::default());
        let _either = split_ram(stream.as_slice(), "a", |_, _| Ok(()));
        let _either = walk_bytes(&bytes, Options::default());
    }

    #[test]
    fn no_changed_bytes_make_the_reader_panic(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let ram = Stream::new().ram_start(&BLOCKS).part(3).page(0, "a").page_of_same(4096).end_part();
        let device = ram.bytes(&[4, 0, 0, 0, 3]).name("d").bytes(&[0; 12]).bytes(&[0x7e, 0, 0, 0, 3]);
        let mut stream = device.end(r#"{"page_size":4096,"devices":[{"name":"d","instance_id":0,"version":0,"fields":[{"name":"n","size":4}]}]}"#);
        prop_assert!(walk_bytes(&stream, Options::default()).is_ok());
        for (at, byte) in changes {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        let _either = walk_bytes(&stream, Options::default());
        let _either = split_ram(stream.as_slice(), "a", |_, _| Ok(()));
    }
}
