//! Images changed at random, from a seed: everything that reads them ends with an answer or an error, and no
//! answer comes from outside of the image. `STEAD_SOAK` is how many seconds to go on; without it a few.
//!
//! The inputs in `fuzz/seeds`, which `make fuzz` begins with, and those in `fuzz/regressions`, which once broke
//! something, are tried as well.

mod images;
mod untrusted;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use images::{Random, run, sh};
use stead_qcow2::edit::{JournalFiles, Recovery, recover_storage_over};
use stead_qcow2::{Layer, check};
use untrusted::changes::CHOICES;
use untrusted::memory::Memory;
use untrusted::{TARGETS, Target, read_image, with_directories};

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
        opened += u64::from(read_image(&path));
        assert!(
            begun.elapsed() < PATIENCE,
            "round {round}: {:?}",
            begun.elapsed()
        );
        round += 1;
    }
    assert!(opened * 4 > round, "{opened} of {round} opened");
}

/// Every file in a folder of inputs; a target that never broke has no folder of regressions.
fn inputs(kind: &str, folder: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let Ok(entries) = std::fs::read_dir(root.join(kind).join(folder)) else {
        return Vec::new();
    };
    let paths = entries.map(|entry| entry.expect("list").path());
    paths
        .map(|path| (path.clone(), std::fs::read(path).expect("read")))
        .collect()
}

fn require_survived(target: &Target, path: &Path, bytes: &[u8]) {
    let begun = Instant::now();
    let survived = std::panic::catch_unwind(|| (target.run)(bytes));
    let (name, path) = (target.name, path.display());
    assert!(survived.is_ok(), "{name} {path}");
    assert!(begun.elapsed() < PATIENCE, "{name} {path}");
}

#[test]
fn every_seed_of_the_fuzzers_is_survived() {
    for target in &TARGETS {
        let seeds = inputs("seeds", target.seeds);
        assert!(!seeds.is_empty(), "no seeds of {}", target.name);
        for (path, mut bytes) in seeds {
            require_survived(target, &path, &bytes);
            // The last byte says which change is made.
            for choice in 0..CHOICES {
                bytes.push(choice);
                require_survived(target, &path, &bytes);
                bytes.pop();
            }
        }
    }
}

#[test]
fn no_input_that_once_broke_something_does_so_again() {
    for target in &TARGETS {
        for (path, bytes) in inputs("regressions", target.name) {
            require_survived(target, &path, &bytes);
        }
    }
}

/// Without this a seed could be refused at its first byte, and nobody would notice.
#[test]
fn every_seed_is_what_it_is_to_be() {
    for (path, _) in inputs("seeds", "image") {
        let layer = Layer::inspect(&path).expect("a seed opens");
        let report = check(&layer).expect("a seed is checked");
        assert_eq!(report.corruptions, 0, "{}", path.display());
    }
    for (path, bytes) in inputs("seeds", "directories") {
        let disk = Arc::new(Memory::new(&with_directories(&bytes)));
        let layer = Layer::from_storage(disk, &path).expect("directories lie in an image");
        let snapshots = layer.internal_snapshots().map(|found| found.len());
        let bitmaps = layer.stored_bitmaps().map(|found| found.len());
        let found = snapshots.unwrap_or_default() + bitmaps.unwrap_or_default();
        assert_eq!(found, 2, "{}", path.display());
    }
    for (path, bytes) in inputs("seeds", "recover") {
        let disk = Arc::new(Memory::new(&bytes));
        let raw = Arc::new(Memory::new(&[7; 20_000]));
        let done = recover_storage_over(disk, Path::new("seed"), raw, &JournalFiles::Nothing)
            .expect("a seed is finished");
        assert_eq!(done, Recovery::Finished, "{}", path.display());
    }
}
