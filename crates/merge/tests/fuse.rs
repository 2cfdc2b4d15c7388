//! Several layers made into one new file: the same disk, whoever reads it in whichever way, and nothing else changed.

#![allow(
    clippy::disallowed_methods,
    reason = "copies of images in tests need not be durable"
)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use common::{World, content, sh, silent};
use stead_merge::{Event, Kind, Step, Watch, fuse, fuse_needs_bytes};
use stead_qcow2::{Chain, LayerFile, LayerFormat};

fn files(world: &World, names: &[&str]) -> Vec<LayerFile> {
    let file = |name: &&str| LayerFile {
        path: world.path(name),
        format: LayerFormat::Qcow2,
    };
    names.iter().map(file).collect()
}

fn shown(files: &[LayerFile]) -> Vec<u8> {
    let chain = Chain::open(files).expect("whole");
    let mut bytes = vec![0; usize::try_from(chain.len()).expect("small")];
    chain.read_at(0, &mut bytes).expect("readable");
    bytes
}

fn stamps(world: &World) -> Vec<(u64, u64, i64, i64)> {
    let stamp = |name: &&str| {
        let found = fs::metadata(world.path(name)).expect("there");
        (found.ino(), found.len(), found.mtime(), found.mtime_nsec())
    };
    common::LAYERS.iter().map(stamp).collect()
}

fn leftovers(world: &World) -> Vec<PathBuf> {
    let entries = fs::read_dir(world.dir.path()).expect("list");
    let paths = entries.map(|entry| entry.expect("entry").path());
    let is_new = |path: &PathBuf| !common::LAYERS.iter().any(|name| *path == world.path(name));
    paths.filter(is_new).collect()
}

#[test]
fn the_new_layer_shows_what_all_of_them_show_also_over_those_that_it_took_in() {
    for options in ["", "-o cluster_size=4k", "-o extended_l2=on"] {
        let world = World::new(options);
        let before = stamps(&world);
        let made = world.path("made");
        let chain = files(&world, &["top", "mid", "base"]);
        let fused = fuse(&chain, 2, (&made, 0o600), silent()).expect("fused");
        assert!(fused.defined_bytes > 0 && fused.file_bytes > 0, "{fused:?}");
        let needed = fuse_needs_bytes(&chain, 2).expect("measured");
        assert!(
            fused.file_bytes <= needed,
            "{options}: {fused:?}, {needed} bytes"
        );
        assert_eq!(
            stamps(&world),
            before,
            "{options}: nothing else was written"
        );
        let expected = shown(&chain);
        let one = files(&world, &["made", "base"]);
        assert!(shown(&one) == expected, "{options}: in its place");
        let between = files(&world, &["made", "mid", "base"]);
        assert!(
            shown(&between) == expected,
            "{options}: while the records name both"
        );
        sh(&format!("qemu-img check -q {}", made.display()));
        // Its header names the base, and the name that the layer above has is taken over by a rename.
        fs::rename(&made, world.path("top")).expect("renamed");
        fs::remove_file(world.path("mid")).expect("removed");
        assert!(content(&world.path("active")) == world.disk, "{options}");
        world.require_whole(options);
    }
}

#[test]
fn a_layer_that_cannot_be_kept_whole_is_refused_and_no_file_is_left() {
    let world = World::new("");
    let made = world.path("made");
    // The bitmap that one between has not would say too little.
    let mid = world.path("mid").display().to_string();
    sh(&format!("qemu-img bitmap --remove {mid} shared"));
    let all = files(&world, &["top", "mid", "base"]);
    let error = fuse(&all, 3, (&made, 0o600), silent()).expect_err("a hole");
    assert!(error.found().contains("shared"), "{error}");
    let mut raw = files(&world, &["top", "mid"]);
    raw[1].format = LayerFormat::Raw;
    let error = fuse(&raw, 2, (&made, 0o600), silent()).expect_err("raw");
    assert_eq!(error.kind(), Kind::Usage, "{error}");
    for at in [Step::Copy, Step::Commit, Step::Prove] {
        let cancel = AtomicBool::new(false);
        let tell = |event: Event| cancel.store(event == Event::Step(at.clone()), Ordering::Relaxed);
        let watch = Watch {
            tell: &tell,
            cancel: Some(&cancel),
        };
        let files = files(&world, &["top", "mid", "base"]);
        let done = fuse(&files, 2, (&made, 0o600), watch);
        // Behind the last look nobody is asked any more.
        if done.is_ok() {
            fs::remove_file(&made).expect("removed");
        }
    }
    assert_eq!(leftovers(&world), <[PathBuf; 0]>::default());
    assert!(content(&world.path("active")) == world.disk);
}

#[test]
fn what_was_written_wrongly_is_found_before_it_has_a_name() {
    let world = World::new("");
    let made = world.path("made");
    let chain = files(&world, &["top", "mid", "base"]);
    let folder = world.dir.path().to_owned();
    let tell = |event: Event| {
        if event == Event::Step(Step::Prove) {
            spoil(&folder);
        }
    };
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    let error = fuse(&chain, 2, (&made, 0o600), watch).expect_err("spoiled");
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
    assert_eq!(leftovers(&world), <[PathBuf; 0]>::default());
    fuse(&chain, 2, (&made, 0o600), silent()).expect("fused when nothing spoils it");
}

/// Flips a bit of guest data in the file that is being made.
fn spoil(folder: &Path) {
    let entries = fs::read_dir(folder).expect("list");
    let paths = entries.map(|entry| entry.expect("entry").path());
    let is_partial = |path: &PathBuf| {
        let name = path.file_name().expect("name").to_string_lossy();
        name.starts_with(".partial-")
    };
    let partial = paths
        .into_iter()
        .find(is_partial)
        .expect("it is being made");
    let mut bytes = fs::read(&partial).expect("read");
    // The layer `mid` has a run of threes.
    let run = bytes
        .windows(4096)
        .position(|bytes| bytes.iter().all(|byte| *byte == 3));
    bytes[run.expect("data of mid")] ^= 1;
    fs::write(&partial, bytes).expect("written");
}
