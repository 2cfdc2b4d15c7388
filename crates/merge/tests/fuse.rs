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
use stead_merge::{Event, FuseLayers, Kind, Step, Watch, fuse, fuse_needs_bytes};
use stead_qcow2::{Chain, LayerFile, LayerFormat};

fn files(world: &World, names: &[&str]) -> Vec<LayerFile> {
    let file = |name: &&str| LayerFile {
        path: world.path(name),
        format: LayerFormat::Qcow2,
    };
    names.iter().map(file).collect()
}

/// The first `count` are fused, and nothing lies above.
fn first(files: &[LayerFile], count: usize) -> FuseLayers<'_> {
    FuseLayers {
        above: &[],
        merged: &files[..count],
        below: &files[count..],
    }
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
        let fused = fuse(first(&chain, 2), (&made, 0o600), silent()).expect("fused");
        assert!(fused.defined_bytes > 0 && fused.file_bytes > 0, "{fused:?}");
        let needed = fuse_needs_bytes(first(&chain, 2)).expect("measured");
        // ext4 counts the block with the places of a scattered file's pieces among those of the file.
        assert!(
            fused.file_bytes <= needed + 4096,
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
    let error = fuse(first(&all, 3), (&made, 0o600), silent()).expect_err("a hole");
    assert!(error.found().contains("shared"), "{error}");
    let mut raw = files(&world, &["top", "mid"]);
    raw[1].format = LayerFormat::Raw;
    let error = fuse(first(&raw, 2), (&made, 0o600), silent()).expect_err("raw");
    assert_eq!(error.kind(), Kind::Usage, "{error}");
    for at in [Step::Copy, Step::Commit, Step::Prove] {
        let cancel = AtomicBool::new(false);
        let tell = |event: Event| cancel.store(event == Event::Step(at.clone()), Ordering::Relaxed);
        let watch = Watch {
            tell: &tell,
            cancel: Some(&cancel),
        };
        let files = files(&world, &["top", "mid", "base"]);
        let done = fuse(first(&files, 2), (&made, 0o600), watch);
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
    let error = fuse(first(&chain, 2), (&made, 0o600), watch).expect_err("spoiled");
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
    assert_eq!(leftovers(&world), <[PathBuf; 0]>::default());
    fuse(first(&chain, 2), (&made, 0o600), silent()).expect("fused when nothing spoils it");
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

/// A bitmap that one backup began, and one that a crash took.
fn with_backups(world: &World) -> (String, Vec<u8>) {
    let name = format!("daily@{}", "0a".repeat(16));
    let at = world.dir.path().display().to_string();
    sh(&format!(
        "cd {at} && qemu-img bitmap --add mid.qcow2 {name}"
    ));
    let full = content(&world.path("mid"));
    sh(&format!(
        "cd {at} && qemu-io -f qcow2 -c 'write -P 9 1M 64k' mid.qcow2"
    ));
    (name, full)
}

/// What the bitmap names in the layer, and all that is defined above it, brings a backup up to date.
fn goes_on(active: &Path, layer: &str, name: &str, full: &[u8]) -> bool {
    let chain = common::open(active);
    let is_it = |index: &usize| {
        let (path, _) = chain.file(*index).expect("a layer");
        path.file_stem().is_some_and(|stem| stem == layer)
    };
    let index = (0..chain.depth()).find(is_it).expect("in the chain");
    let own = chain.layer(index).expect("qcow2");
    let stored = own.stored_bitmaps().expect("whole");
    let Some(stored) = stored.iter().find(|one| one.name == name.as_bytes()) else {
        return false;
    };
    let mut changed: Vec<std::ops::Range<u64>> = own
        .read_bitmap(stored)
        .expect("usable")
        .dirty_ranges()
        .collect();
    let above = chain.allocated(index).collect::<Result<Vec<_>, _>>();
    changed.extend(above.expect("readable"));
    let disk = content(active);
    let mut restored = full.to_vec();
    for range in changed {
        let [from, to] = [range.start, range.end].map(|at| usize::try_from(at).expect("small"));
        restored[from..to].copy_from_slice(&disk[from..to]);
    }
    restored == disk
}

#[test]
fn the_bitmap_of_a_backup_is_carried_although_layers_above_lack_it() {
    let world = World::new("");
    let (name, full) = with_backups(&world);
    let active = world.path("active");
    assert!(goes_on(&active, "mid", &name, &full));
    let made = world.path("made");
    let chain = files(&world, &["top", "mid", "base"]);
    fuse(first(&chain, 2), (&made, 0o600), silent()).expect("fused");
    fs::rename(&made, world.path("top")).expect("renamed");
    assert!(goes_on(&active, "top", &name, &full), "fused");
    // And a merge takes it further down.
    let request = stead_merge::MergeRequest {
        records: world.dir.path().join("records"),
        top: Some(world.path("top")),
        base: Some(world.path("base")),
        chain: active.clone(),
        look_in: Vec::new(),
        ..stead_merge::MergeRequest::default()
    };
    fs::remove_file(world.path("mid")).expect("removed");
    stead_merge::run(&request, silent()).expect("merged");
    assert!(goes_on(&active, "base", &name, &full), "merged");
    // In the base it is nobody's stale one, either.
    let last = stead_merge::MergeRequest {
        top: Some(world.path("child")),
        ..request
    };
    stead_merge::run(&last, silent()).expect("merged again");
    assert!(goes_on(&active, "base", &name, &full), "merged again");
}

#[test]
fn a_bitmap_that_was_not_saved_is_left_out_and_named_unless_a_layer_above_would_look_whole_then() {
    let world = World::new("");
    let at = world.dir.path().display().to_string();
    let made = world.path("made");
    let chain = files(&world, &["child", "top", "mid", "base"]);
    for (layer, name) in [("mid", "crashed"), ("top", "other")] {
        sh(&format!(
            "cd {at} && qemu-img bitmap --add {layer}.qcow2 {name}"
        ));
        kill_with_it_open(&world, layer);
    }
    // What was there already is named by several layers.
    for layer in ["top", "mid"] {
        for name in ["shared", "late"] {
            let there = common::qemu_flags(&world.path(layer), name).is_some();
            if there {
                sh(&format!(
                    "cd {at} && qemu-img bitmap --remove {layer}.qcow2 {name}"
                ));
            }
        }
    }
    let told = std::sync::Mutex::new(Vec::new());
    let tell = |event: Event| {
        if let Event::Notice(text) = event {
            told.lock().expect("lock").push(text);
        }
    };
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    let layers = FuseLayers {
        above: &chain[..1],
        merged: &chain[1..3],
        below: &chain[3..],
    };
    fuse(layers, (&made, 0o600), watch).expect("fused");
    let told = told.into_inner().expect("lock").concat();
    assert!(told.contains("crashed") && told.contains("other"), "{told}");
    for name in ["crashed", "other"] {
        assert_eq!(common::qemu_flags(&made, name), None);
    }
    fs::remove_file(&made).expect("removed");
    // Above, one of that name is whole.
    sh(&format!(
        "cd {at} && qemu-img bitmap --add child.qcow2 crashed"
    ));
    let error = fuse(layers, (&made, 0o600), silent()).expect_err("it would look whole");
    assert!(error.found().contains("crashed"), "{error}");
    assert!(!made.exists());
}

/// A QEMU that had a layer open for writing was killed.
fn kill_with_it_open(world: &World, layer: &str) {
    let path = world.path(layer).display().to_string();
    let mut qemu_io = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", &path])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("qemu-io");
    let begun = std::time::Instant::now();
    let is_open = || {
        let layer = stead_qcow2::Layer::inspect(&world.path(layer)).expect("whole");
        let stored = layer.stored_bitmaps().expect("readable");
        stored.iter().any(|one| one.in_use)
    };
    while !is_open() {
        assert!(begun.elapsed() < std::time::Duration::from_secs(30));
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    qemu_io.kill().expect("killed");
    qemu_io.wait().expect("ends");
}
