//! The fuzzers' inputs, tried by the ordinary tests: the seeds, what once broke something, and changes of the seeds.
//!
//! `scripts/fuzz MINUTES save_head save_image` looks for more.
#![allow(
    clippy::disallowed_methods,
    reason = "tests make files that nobody needs after them"
)]

mod common;
mod untrusted;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::Chance;

/// The longest that one input may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How many changed seeds are tried.
const ROUNDS: usize = 1500;

fn inputs(kind: &str, target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let Ok(entries) = std::fs::read_dir(root.join(kind).join(target)) else {
        return Vec::new();
    };
    let paths = entries.map(|entry| entry.expect("list").path());
    paths
        .map(|path| (path.clone(), std::fs::read(path).expect("read")))
        .collect()
}

fn survive(path: &Path, bytes: &[u8]) {
    let begun = Instant::now();
    for run in [untrusted::head, untrusted::image] {
        let survived = std::panic::catch_unwind(|| run(bytes));
        assert!(survived.is_ok(), "{}", path.display());
    }
    assert!(begun.elapsed() < PATIENCE, "{}", path.display());
}

/// Without this a seed could be refused at its first byte, and nobody would notice.
#[test]
fn every_seed_of_the_fuzzers_is_a_whole_image() {
    let seeds = inputs("seeds", "save_image");
    assert!(seeds.len() >= 8, "{} seeds", seeds.len());
    for (path, bytes) in seeds {
        let report = untrusted::verified(&bytes).expect("it opens");
        assert!(report.whole, "{}: {report:?}", path.display());
        survive(&path, &bytes);
    }
}

#[test]
fn no_input_that_once_broke_something_does_so_again() {
    for target in ["save_head", "save_image"] {
        for (path, bytes) in inputs("regressions", target) {
            survive(&path, &bytes);
        }
    }
}

#[test]
fn changed_and_shortened_seeds_are_survived() {
    let seeds = inputs("seeds", "save_image");
    let mut chance = Chance(99);
    let mut opened = 0;
    for round in 0..ROUNDS {
        let (path, seed) = &seeds[round % seeds.len()];
        let mut bytes = seed.clone();
        for _ in 0..=chance.below(4) {
            let at = chance.below(bytes.len());
            match chance.below(3) {
                0 => bytes[at] = chance.below(256) as u8,
                1 => bytes[at] ^= 1 << chance.below(8),
                _ if chance.below(4) == 0 => bytes.truncate(at + 1),
                _ => {}
            }
        }
        survive(path, &bytes);
        opened += usize::from(untrusted::verified(&bytes).is_ok());
    }
    assert!(opened * 4 > ROUNDS, "{opened} of {ROUNDS} were read");
}
