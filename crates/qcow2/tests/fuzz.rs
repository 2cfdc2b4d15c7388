//! Images changed at random, from a seed: everything that reads them ends with an answer or an error, and no
//! answer comes from outside of the image. `STEAD_SOAK` is how many seconds to go on; without it a few.

mod images;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use images::{Random, run, sh};
use stead_qcow2::{
    Chain, GuestOffset, Layer, LayerFile, LayerFormat, OpenPolicy, check, info, info_chain,
};

/// Without `STEAD_SOAK`, this many changed images.
const QUICK_ROUNDS: u64 = 800;
/// No single image may take longer; they are small.
const PATIENCE: Duration = Duration::from_secs(20);

/// Images with every feature, each less than 1 MiB.
fn corpus(dir: &Path) -> Vec<Vec<u8>> {
    let kinds = [
        "cluster_size=512",
        "cluster_size=512,compat=0.10",
        "cluster_size=1k,compression_type=zstd,refcount_bits=16",
        "cluster_size=16k,extended_l2=on,refcount_bits=64",
        "cluster_size=2k,lazy_refcounts=on,refcount_bits=32",
    ];
    let images = kinds.iter().enumerate();
    images
        .map(|(number, kind)| rich_image(dir, number, kind))
        .collect()
}

fn rich_image(dir: &Path, number: usize, options: &str) -> Vec<u8> {
    let [base, path] = ["base", "image"].map(|name| dir.join(format!("{name}{number}")));
    let (base_name, name) = (base.display(), path.display());
    sh(&format!("qemu-img create -q -f raw {base_name} 300k"));
    sh(&format!(
        "qemu-img create -q -f qcow2 -o {options} -b {base_name} -F raw {name} 300k"
    ));
    sh(&format!(
        "qemu-img rebase -q -u -b base{number} -F raw {name}"
    ));
    let io = |commands: &[&str]| {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        let path = path.to_str().expect("temp paths are text");
        run(
            "qemu-io",
            &commands
                .chain([path])
                .map(str::to_owned)
                .collect::<Vec<_>>(),
        );
    };
    io(&["write -P 1 0 64k", "write -c -P 2 64k 64k"]);
    sh(&format!("qemu-img snapshot -c first {name}"));
    if !options.contains("0.10") {
        sh(&format!("qemu-img bitmap --add -g 512 {name} b0"));
        sh(&format!("qemu-img bitmap --add -g 65536 {name} b1"));
    }
    io(&["write -z 96k 16k", "write -P 3 32k 1k", "discard 8k 8k"]);
    sh(&format!("qemu-img snapshot -c second {name}"));
    io(&["write -P 4 200k 3k"]);
    std::fs::read(&path).expect("read")
}

/// A place where a change matters: mostly where something is, and often in the header.
fn place(random: &mut Random, bytes: &[u8]) -> usize {
    let bound = if random.chance(3) {
        128
    } else {
        bytes.len() as u64
    };
    let mut at = 0;
    for _ in 0..50 {
        at = usize::try_from(random.below(bound)).expect("small");
        if bytes[at] != 0 {
            break;
        }
    }
    at
}

/// One change: a bit, a byte, a number that means something, a piece from elsewhere, or the end cut off.
fn change(random: &mut Random, bytes: &mut Vec<u8>) {
    if bytes.len() < 256 {
        return;
    }
    let at = place(random, bytes);
    let word = at / 8 * 8;
    let length = bytes.len() as u64;
    match random.below(9) {
        0 | 1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes[at] = u8::try_from(random.below(256)).expect("a byte"),
        3 | 4 => {
            let number = match random.below(6) {
                0 => u64::MAX,
                1 => random.below(length) / 512 * 512,
                2 => (1 << 63) | (random.below(length) / 512 * 512),
                3 => 1 << random.below(64),
                4 => (1 << 62) | random.below(length),
                _ => length,
            };
            if word + 8 <= bytes.len() {
                bytes[word..word + 8].copy_from_slice(&number.to_be_bytes());
            }
        }
        5 => {
            let half = at / 4 * 4;
            let number = random.pick(&[0, 1, 2, 255, 65_536, 0x00ff_ffff, u32::MAX]);
            bytes[half..half + 4].copy_from_slice(&number.to_be_bytes());
        }
        6 | 7 => {
            let from = place(random, bytes) / 8 * 8;
            let count = (8 << random.below(7)).min(bytes.len() - from.max(word));
            bytes.copy_within(from..from + count, word);
        }
        _ => bytes.truncate(usize::try_from(random.below(length)).expect("small")),
    }
}

/// Everything that reads an image. What is counted is what opened.
fn use_image(path: &Path) -> u64 {
    let file = LayerFile {
        path: path.to_owned(),
        format: LayerFormat::Qcow2,
    };
    let _either = info(&file);
    let _either = info_chain(&file, &OpenPolicy::NAMES);
    let Ok(layer) = Layer::inspect(path) else {
        return 0;
    };
    if let Ok(report) = check(&layer) {
        let found = report.corruptions + report.leaks;
        assert_eq!(found > 0, !report.findings.is_empty());
    }
    for stored in layer.stored_bitmaps().unwrap_or_default().iter().take(8) {
        if let Ok(bitmap) = layer.read_bitmap(stored) {
            let ranges = bitmap.dirty_ranges().take(1000);
            let ends: Vec<u64> = ranges.map(|range| range.end).collect();
            assert!(ends.is_sorted() && ends.iter().all(|end| *end <= bitmap.disk_length()));
        }
    }
    use_layer(&layer);
    let Ok(chain) = Chain::open_following(&file, &OpenPolicy::NAMES) else {
        return 1;
    };
    use_chain(&chain);
    for snapshot in layer
        .internal_snapshots()
        .unwrap_or_default()
        .iter()
        .take(4)
    {
        if let Ok(view) = chain.view_of(snapshot) {
            use_chain(&view);
        }
        if let Ok(view) = layer.view_of(snapshot) {
            use_layer(&view);
        }
    }
    1
}

fn use_layer(layer: &Layer) {
    let disk = layer.virtual_size();
    for extent in layer.extents(GuestOffset(0)).take(5000) {
        let Ok(extent) = extent else { break };
        assert!(extent.length > 0 && extent.start.0 + extent.length <= disk);
    }
    let mut state = vec![0; usize::try_from(layer.vm_state_bytes().min(65_536)).expect("small")];
    let _either = layer.read_vm_state(0, &mut state);
}

fn use_chain(chain: &Chain) {
    let mut end = 0;
    for entry in chain.map(0).take(5000) {
        let Ok(entry) = entry else { break };
        assert!(entry.start == end && entry.length > 0);
        end += entry.length;
        assert!(end <= chain.len());
    }
    let mut bytes = vec![0; usize::try_from(chain.len().min(300 << 10)).expect("small")];
    let _either = chain.read_at(0, &mut bytes);
    let middle = chain.len() / 2;
    let rest = usize::try_from((chain.len() - middle).min(65_536)).expect("small");
    bytes.truncate(rest);
    let _either = chain.read_at(middle, &mut bytes);
}

#[test]
fn no_changed_image_makes_any_reader_panic_or_hang() {
    let soak = std::env::var("STEAD_SOAK")
        .ok()
        .and_then(|text| text.parse().ok());
    let soak = soak.map(Duration::from_secs);
    let dir = tempfile::tempdir().expect("temp dir");
    let images = corpus(dir.path());
    let path = dir.path().join("changed");
    let file = stead_sys::durable::create_scratch(&path, 0o600).expect("create");
    let start = Instant::now();
    let mut opened = 0;
    let mut round = 0;
    while soak.map_or(round < QUICK_ROUNDS, |soak| start.elapsed() < soak) {
        let mut random = Random::new(51_000_000 + round);
        let mut bytes = images[usize::try_from(round).expect("fits") % images.len()].clone();
        for _ in 0..random.below(5) {
            change(&mut random, &mut bytes);
        }
        file.set_len(0).expect("empty");
        file.write_all_at(&bytes, 0).expect("write");
        let begun = Instant::now();
        opened += use_image(&path);
        assert!(
            begun.elapsed() < PATIENCE,
            "round {round}: {:?}",
            begun.elapsed()
        );
        round += 1;
    }
    assert!(opened * 4 > round, "{opened} of {round} opened");
}
