//! Reading gives what QEMU's tools give, over random chains.

mod images;

use std::ops::Range;

use images::{Random, RandomChain, convert, format_name, layer, make_chain, run, sh};
use serde_json::Value;
use stead_qcow2::{Chain, LayerFile, LayerFormat};

/// Each theme has its own chains; `STEAD_SEEDS` asks for more than a quick run has.
fn seeds(theme: u64) -> Range<u64> {
    let count = std::env::var("STEAD_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok());
    let first = theme * 1_000_000;
    first..first + count.unwrap_or(10)
}

fn whole(chain: &Chain, made: &RandomChain) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(chain.len()).expect("fits")];
    if let Err(error) = chain.read_at(0, &mut bytes) {
        panic!("{error}\n{}", made.story);
    }
    bytes
}

/// Neighbours joined, empty ones left out.
fn joined(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges.filter(|range| !range.is_empty()) {
        match all.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => all.push(range),
        }
    }
    all
}

fn map(made: &RandomChain) -> Vec<Value> {
    let top = made.top();
    let text = sh(&format!(
        "qemu-img map --output=json -f {} {}",
        format_name(top.format),
        top.path.display()
    ));
    serde_json::from_str(&text).expect("JSON")
}

fn ranges_where(map: &[Value], holds: impl Fn(&Value) -> bool) -> Vec<Range<u64>> {
    let range = |entry: &Value| {
        let start = entry["start"].as_u64().expect("a number");
        start..start + entry["length"].as_u64().expect("a number")
    };
    joined(map.iter().filter(|entry| holds(entry)).map(range))
}

fn found(ranges: impl Iterator<Item = stead_qcow2::Result<Range<u64>>>) -> Vec<Range<u64>> {
    joined(ranges.map(|range| range.expect("a good chain")))
}

#[test]
fn every_byte_is_what_qemu_reads() {
    let dir = tempfile::tempdir().expect("temp dir");
    for seed in seeds(1) {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        let expected = convert(made.top(), &dir.path().join(format!("{seed}.raw")));
        let bytes = whole(&chain, &made);
        assert_eq!(bytes.len(), expected.len(), "{}", made.story);
        let wrong = bytes.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{}", made.story);
        read_in_pieces(&chain, &expected, seed);
    }
}

/// From two threads at once, at odd places.
fn read_in_pieces(chain: &Chain, expected: &[u8], seed: u64) {
    let pieces = |seed| {
        let mut random = Random::new(seed);
        for _ in 0..50 {
            let at = random.below(chain.len());
            let length = random.below((chain.len() - at).min(100_000)) + 1;
            let place = usize::try_from(at).expect("fits");
            let mut bytes = vec![0xee; usize::try_from(length).expect("fits")];
            chain.read_at(at, &mut bytes).expect("read");
            assert!(
                bytes == expected[place..place + bytes.len()],
                "{at} {length}"
            );
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| pieces(seed + 1000));
        pieces(seed + 2000);
    });
}

#[test]
fn data_ranges_are_those_of_qemu() {
    let dir = tempfile::tempdir().expect("temp dir");
    for seed in seeds(2) {
        let made = make_chain(dir.path(), seed);
        let expected = ranges_where(&map(&made), |entry| entry["data"] == true);
        assert_eq!(found(made.open().data()), expected, "{}", made.story);
    }
}

fn sectors(ranges: &[Range<u64>], length: u64) -> Vec<bool> {
    let mut all = vec![false; usize::try_from(length / 512).expect("fits")];
    for range in ranges {
        let [start, end] =
            [range.start, range.end].map(|at| usize::try_from(at / 512).expect("fits"));
        all[start..end].fill(true);
    }
    all
}

/// There is one difference: behind the end of a short layer QEMU's map says that nothing is present,
/// while reads there give zeros whatever lies below. We count these zeros as defined by the short layer,
/// because something below it may be hidden by them.
#[test]
fn allocated_ranges_are_those_of_qemu_at_every_depth_but_behind_a_short_layer() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut behind_short = 0;
    for seed in seeds(3) {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        let map = map(&made);
        for layers in 0..=chain.depth() {
            let expected = ranges_where(&map, |entry| {
                let depth = entry["depth"].as_u64().expect("a number");
                entry["present"] == true && depth < layers as u64
            });
            let ours = sectors(&found(chain.allocated(layers)), chain.len());
            let theirs = sectors(&expected, chain.len());
            let shortest = made.files[..layers].iter().map(length).min();
            for (sector, (ours, theirs)) in ours.into_iter().zip(theirs).enumerate() {
                let at = sector as u64 * 512;
                if ours && !theirs && shortest.is_some_and(|shortest| at >= shortest) {
                    behind_short += 1;
                } else {
                    assert_eq!(ours, theirs, "{at} in the top {layers}\n{}", made.story);
                }
            }
        }
    }
    assert!(
        behind_short > 0,
        "the difference was not seen, so it is described wrongly"
    );
}

fn length(file: &LayerFile) -> u64 {
    Chain::open(std::slice::from_ref(file))
        .expect("a good layer")
        .len()
}

#[test]
fn a_short_layer_hides_what_lies_behind_its_end_and_says_so() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = |name: &str| dir.path().join(name);
    let [base, short, top] = ["base", "short", "top"].map(|name| path(name).display().to_string());
    sh(&format!("qemu-img create -q -f qcow2 {base} 4M"));
    run(
        "qemu-io",
        &["-c".into(), "write -P 9 0 4M".into(), base.clone()],
    );
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {base} -F qcow2 {short} 1M"
    ));
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {short} -F qcow2 {top} 5M"
    ));
    let files: Vec<LayerFile> = [top, short, base]
        .into_iter()
        .map(|path| layer(path, LayerFormat::Qcow2))
        .collect();
    let chain = Chain::open(&files).expect("a good chain");
    let mut bytes = vec![1; 5 << 20];
    chain.read_at(0, &mut bytes).expect("read");
    assert!(bytes == convert(&files[0], &path("raw")));
    assert!(bytes[..1 << 20].iter().all(|byte| *byte == 9));
    assert!(bytes[1 << 20..].iter().all(|byte| *byte == 0));
    assert_eq!(found(chain.allocated(1)), []);
    let (visible, hidden) = (0..1 << 20, 1 << 20..5 << 20);
    assert_eq!(found(chain.allocated(2)), std::slice::from_ref(&hidden));
    assert_eq!(found(chain.data()), std::slice::from_ref(&visible));
}
