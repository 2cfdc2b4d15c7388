//! What is wrong with an image is made right where that takes no guess, and guest data is never touched.
#![allow(
    clippy::disallowed_methods,
    reason = "images in a temporary folder need not be durable"
)]

mod images;

use std::path::{Path, PathBuf};
use std::process::Command;

use images::{Random, layer, make_chain, run, sh};
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::repair::{RepairMode, Repaired, repair};
use stead_qcow2::ops::restore::restore_from_active;
use stead_qcow2::{Chain, Control, Error, Layer, LayerFormat, Note, check};

fn text(path: &Path) -> &str {
    path.to_str().expect("temp paths are text")
}

fn io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f".to_owned(), "qcow2".into(), "-d".into(), "unmap".into()];
    for command in commands {
        args.extend(["-c".to_owned(), (*command).to_owned()]);
    }
    args.push(path.display().to_string());
    run("qemu-io", &args);
}

/// Content of every disk state of the image alone.
fn states(path: &Path) -> Vec<blake3::Hash> {
    let layer = Layer::open(path).expect("opens");
    let content = |layer: Layer| {
        let chain = Chain::of(layer);
        let mut bytes = vec![0; usize::try_from(chain.len()).expect("small")];
        chain.read_at(0, &mut bytes).expect("read");
        blake3::hash(&bytes)
    };
    let snapshots = layer.internal_snapshots().expect("whole");
    let views: Vec<Layer> = snapshots
        .iter()
        .map(|one| layer.view_of(one).expect("a view"))
        .collect();
    std::iter::once(layer).chain(views).map(content).collect()
}

/// Without its backing file, whose format may not be known.
fn qemu_check(path: &Path) -> (bool, String) {
    let file = text(path);
    let options = format!("driver=qcow2,file.driver=file,file.filename={file},backing=");
    let output = Command::new("qemu-img")
        .args(["check", "--image-opts", &options])
        .output()
        .expect("qemu-img is installed");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), said)
}

fn require_whole(path: &Path, story: &str) {
    let report = check(&Layer::open(path).expect("whole")).expect("readable");
    assert!(
        report.is_clean() && !report.marked_corrupt,
        "{:?}\n{story}",
        report.findings
    );
    let (good, said) = qemu_check(path);
    assert!(good, "{said}\n{story}");
}

fn repaired(path: &Path, mode: RepairMode) -> Result<Repaired, Error> {
    repair(path, mode, &Control::default())
}

fn word(bytes: &[u8], at: usize) -> usize {
    let word = u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    usize::try_from(word & 0x00ff_ffff_ffff_fe00).expect("small")
}

/// The places of all refcounts of 16 bits, by the bytes of the specification.
fn refcounts(bytes: &[u8]) -> Vec<usize> {
    let cluster = 1 << u32::from_be_bytes(bytes[20..24].try_into().expect("4 bytes"));
    let table = word(bytes, 48);
    let length = cluster * bytes[59] as usize;
    let blocks = (table..(table + length).min(bytes.len() - 7)).step_by(8);
    let blocks = blocks.map(|at| word(bytes, at)).filter(|block| *block != 0);
    let clusters = bytes.len().div_ceil(cluster);
    blocks
        .flat_map(|block| (block..(block + cluster).min(bytes.len())).step_by(2))
        .take(clusters)
        .collect()
}

/// Any refcounts, flags and marks of random images are made right, and the disks read as before.
#[test]
fn any_refcounts_and_flags_are_rebuilt_from_what_is_referenced() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (mut done, mut refused) = (0, 0);
    for seed in 71_000_000..71_000_024 {
        let made = make_chain(dir.path(), seed);
        let Some(file) = made
            .files
            .iter()
            .find(|one| one.format == LayerFormat::Qcow2)
        else {
            continue;
        };
        let path = file.path.clone();
        let layer = Layer::open(&path).expect("whole");
        if layer.header().refcount_order != 4 || check(&layer).expect("readable").corruptions > 0 {
            continue;
        }
        let before = states(&path);
        let mut random = Random::new(seed);
        let mut bytes = std::fs::read(&path).expect("read");
        for place in refcounts(&bytes) {
            if random.chance(3) {
                let new = random.pick(&[0, 0, 1, 2, 7, 65_535]);
                bytes[place..place + 2].copy_from_slice(&u16::to_be_bytes(new));
            }
        }
        let (l1, entries) = (word(&bytes, 40), bytes[39]);
        for entry in 0..usize::from(entries) {
            if word(&bytes, l1 + entry * 8) != 0 && random.chance(2) {
                bytes[l1 + entry * 8] ^= 0x80;
            }
        }
        if bytes[7] == 3 {
            bytes[79] |= 1 | u8::try_from(random.below(2)).expect("small") << 1;
        }
        std::fs::write(&path, &bytes).expect("write");
        match repaired(&path, RepairMode::All) {
            Ok(found) => {
                assert!(found.before.corruptions + found.before.leaks > 0);
                assert!(found.after.is_clean(), "{:?}", found.after);
                require_whole(&path, &made.story);
                done += 1;
            }
            // A refcount of 0 for a table that another was put into before: nothing here does so.
            Err(error) => {
                assert!(
                    matches!(error, Error::Refused { .. }),
                    "{error}\n{}",
                    made.story
                );
                assert!(std::fs::read(&path).expect("read") == bytes);
                refused += 1;
            }
        }
        assert!(states(&path) == before, "{}", made.story);
    }
    assert!(done > 8 && refused == 0, "{done} done, {refused} refused");
}

fn create(dir: &Path, options: &str) -> PathBuf {
    let path = dir.join("image");
    let name = text(&path);
    sh(&format!(
        "qemu-img create -q -f qcow2 -o {options} {name} 4M"
    ));
    io(&path, &["write -P 1 0 1M"]);
    sh(&format!("qemu-img snapshot -c one {name}"));
    io(&path, &["write -P 2 512k 1M"]);
    path
}

#[test]
fn lost_clusters_are_given_back_and_nothing_else_is_done_in_that_mode() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = create(dir.path(), "cluster_size=4k");
    let before = states(&path);
    let mut bytes = std::fs::read(&path).expect("read");
    let end = bytes.len();
    bytes.resize(end + 40_960, 0xcc);
    let places = refcounts(&bytes);
    for place in &places[end / 4096..end / 4096 + 10] {
        bytes[place + 1] = 1;
    }
    std::fs::write(&path, &bytes).expect("write");
    let found = repaired(&path, RepairMode::Leaks).expect("leaks");
    assert_eq!((found.before.leaks, found.after.leaks), (10, 0));
    require_whole(&path, "");
    // The new refcounts lie behind what was lost, which is free now.
    let more = std::fs::metadata(&path).expect("stat").len() - end as u64;
    assert!(more <= 40_960 + 2 * 4096, "{more}");
    // Now a cluster that is too low, beside a leak.
    let mut bytes = std::fs::read(&path).expect("read");
    let places = refcounts(&bytes);
    let (low, free) = {
        let count = |place: &&usize| u16::from_be_bytes([bytes[**place], bytes[**place + 1]]);
        let low = *places
            .iter()
            .rev()
            .find(|place| count(place) == 2)
            .expect("shared");
        let free = *places
            .iter()
            .find(|place| count(place) == 0)
            .expect("a free one");
        (low, free)
    };
    bytes[low + 1] = 0;
    bytes[free + 1] = 3;
    std::fs::write(&path, &bytes).expect("write");
    let found = repaired(&path, RepairMode::Leaks).expect("leaks");
    assert_eq!((found.before.leaks, found.after.leaks), (1, 0));
    assert_eq!(found.after.corruptions, found.before.corruptions);
    assert!(
        states(&path) == before,
        "what is referenced was written over or cut off"
    );
    let found = repaired(&path, RepairMode::All).expect("all");
    assert_eq!(found.after.corruptions, 0);
    require_whole(&path, "");
    assert!(states(&path) == before);
    let bytes = std::fs::read(&path).expect("read");
    assert!(
        repaired(&path, RepairMode::All)
            .expect("whole")
            .room
            .is_none()
    );
    assert!(
        std::fs::read(&path).expect("read") == bytes,
        "there was nothing to do"
    );
}

/// The program that wrote died before it wrote the refcounts.
#[test]
fn an_image_left_dirty_is_cleaned() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = create(dir.path(), "cluster_size=4k,lazy_refcounts=on");
    let args = [
        "-f",
        "qcow2",
        "-c",
        "write -P 9 2M 1M",
        "-c",
        "flush",
        "-c",
        "abort",
        text(&path),
    ];
    let output = Command::new("qemu-io")
        .args(args)
        .output()
        .expect("qemu-io is installed");
    assert!(!output.status.success());
    let layer = Layer::open(&path).expect("opens");
    assert!(layer.header().dirty, "the image is not dirty");
    let report = check(&layer).expect("readable");
    assert!(
        report.corruptions > 100,
        "its refcounts are right: {report:?}"
    );
    let before = states(&path);
    let found = repaired(&path, RepairMode::All).expect("repair");
    assert!(!found.after.marked_dirty);
    require_whole(&path, "");
    assert!(states(&path) == before);
    io(
        &path,
        &["read -P 9 2M 1M", "read -P 2 512k 1M", "read -P 1 0 512k"],
    );
}

#[test]
fn what_would_take_a_guess_is_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = create(dir.path(), "cluster_size=4k");
    let whole = std::fs::read(&path).expect("read");
    let l1 = word(&whole, 40);
    let l2 = word(&whole, l1);
    let snapshots = word(&whole, 64);
    let attacks: [(&str, usize, usize); 3] = [
        ("a data cluster that is the L2 table", l2, l2),
        ("a data cluster out of the file", l2 + 8, 1 << 40),
        ("a snapshot's L1 table out of the file", snapshots, 1 << 40),
    ];
    for (what, place, value) in attacks {
        let mut bytes = whole.clone();
        bytes[place..place + 8].copy_from_slice(&u64::to_be_bytes(value as u64));
        std::fs::write(&path, &bytes).expect("write");
        for mode in [RepairMode::All, RepairMode::Leaks] {
            if mode == RepairMode::Leaks && what.contains("that is") {
                continue;
            }
            let error = repaired(&path, mode).expect_err(what);
            assert!(
                error.to_string().contains("without a guess"),
                "{what}: {error}"
            );
            assert!(std::fs::read(&path).expect("read") == bytes, "{what}");
        }
    }
}

fn bitmaps(path: &Path) -> Vec<String> {
    let layer = Layer::open(path).expect("opens");
    let stored = layer.stored_bitmaps().expect("whole").into_iter();
    stored
        .map(|one| String::from_utf8(one.name).expect("text"))
        .collect()
}

#[test]
fn bitmaps_that_cannot_be_used_go_and_others_stay() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = create(dir.path(), "cluster_size=4k");
    let name = text(&path);
    for bitmap in ["a", "b", "c"] {
        sh(&format!("qemu-img bitmap --add -g 512 {name} {bitmap}"));
    }
    io(&path, &["write -P 5 100k 100k"]);
    let whole = std::fs::read(&path).expect("read");
    let before = states(&path);
    let stored = Layer::open(&path)
        .expect("opens")
        .stored_bitmaps()
        .expect("whole");
    let table = usize::try_from(stored[1].table.0).expect("small");
    // An entry with a reserved bit, and one out of the file.
    for entry in [0x2_u64, 1 << 40] {
        let mut bytes = whole.clone();
        bytes[table..table + 8].copy_from_slice(&entry.to_be_bytes());
        std::fs::write(&path, &bytes).expect("write");
        let error = repaired(&path, RepairMode::Leaks).expect_err("a bitmap is broken");
        assert!(matches!(error, Error::Refused { .. }), "{error}");
        let found = repaired(&path, RepairMode::All).expect("repair");
        assert_eq!(found.dropped_bitmaps, ["b"]);
        assert_eq!(bitmaps(&path), ["a", "c"]);
        require_whole(&path, "");
        assert!(states(&path) == before);
        sh(&format!("qemu-img bitmap --merge a {name} c"));
    }
    // A program that does not know bitmaps wrote to the image: nobody kept them.
    let mut bytes = whole.clone();
    bytes[95] = 0;
    std::fs::write(&path, &bytes).expect("write");
    let found = repaired(&path, RepairMode::Leaks).expect("repair");
    assert!(found.before.leaks > 3, "{:?}", found.before);
    require_whole(&path, "");
    let layer = Layer::open(&path).expect("whole");
    assert!(
        layer.header().bitmaps.is_none(),
        "their clusters are free, and they are still named"
    );
    assert!(states(&path) == before);
    // The directory cannot be read.
    let mut bytes = whole.clone();
    std::fs::write(&path, &bytes).expect("write");
    let header = Layer::open(&path).expect("whole").header().clone();
    let directory = usize::try_from(header.bitmaps.expect("there").directory.0).expect("small");
    bytes[directory + 8..directory + 12].fill(0xff);
    std::fs::write(&path, &bytes).expect("write");
    repaired(&path, RepairMode::All).expect("repair");
    require_whole(&path, "");
    assert!(states(&path) == before && bitmaps(&path).is_empty());
}

fn hollowed(dir: &Path, options: &str) -> (PathBuf, Vec<blake3::Hash>) {
    let base = dir.join("base");
    let path = dir.join("image");
    let (below, name) = (text(&base), text(&path));
    sh(&format!("qemu-img create -q -f raw {below} 4M"));
    let args = ["-f", "raw", "-c", "write -P 7 0 3M", below].map(str::to_owned);
    run("qemu-io", &args);
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {below} -F raw -o {options} {name}"
    ));
    io(&path, &["write -P 1 1M 1M"]);
    sh(&format!("qemu-img snapshot -c one {name}"));
    let files = [
        layer(&path, LayerFormat::Qcow2),
        layer(&base, LayerFormat::Raw),
    ];
    let chain = Chain::open(&files).expect("whole");
    let mut bytes = vec![0; 4 << 20];
    chain.read_at(0, &mut bytes).expect("read");
    let wanted = blake3::hash(&bytes);
    drop(chain);
    run("qemu-img", &["rebase", "-b", "", name].map(str::to_owned));
    (path, vec![wanted; 2])
}

#[test]
fn a_hollowed_snapshot_is_what_it_was_again_while_the_active_disk_is() {
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=16k,extended_l2=on",
    ] {
        let dir = tempfile::tempdir().expect("temp dir");
        let (path, wanted) = hollowed(dir.path(), options);
        let lost = states(&path);
        assert!(
            lost[0] == wanted[0] && lost[1] != wanted[1],
            "{options}: qemu-img lost nothing"
        );
        let loss = |path: &Path| {
            let report = check(&Layer::open(path).expect("whole")).expect("readable");
            let is = |note: &Note| matches!(note, Note::PossibleLoss { .. });
            report.notes.iter().any(is)
        };
        assert!(loss(&path), "{options}");
        let mut editor = Editor::open(&path, EditOptions::default()).expect("whole");
        let done = restore_from_active(&mut editor, b"one").expect("restore");
        assert_eq!(done.value, 2 << 20, "{options}");
        let error = restore_from_active(&mut editor, b"one").expect_err("nothing is lost now");
        assert!(matches!(error, Error::Refused { .. }), "{error}");
        drop(editor);
        assert!(!loss(&path), "{options}");
        require_whole(&path, options);
        assert!(states(&path) == wanted, "{options}");
        // The guest writes, and the snapshot stays.
        io(&path, &["write -P 99 0 2M"]);
        require_whole(&path, options);
        assert!(states(&path)[1] == wanted[1], "{options}");
    }
}

#[test]
fn a_snapshot_that_differs_from_the_active_disk_is_not_restored_from_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (path, _) = hollowed(dir.path(), "cluster_size=64k");
    io(&path, &["write -P 3 1M 64k"]);
    let bytes = std::fs::read(&path).expect("read");
    let mut editor = Editor::open(&path, EditOptions::default()).expect("whole");
    let error = restore_from_active(&mut editor, b"one").expect_err("differs");
    assert!(
        error
            .to_string()
            .contains("65536 bytes that both have are different"),
        "{error}"
    );
    drop(editor);
    assert!(std::fs::read(&path).expect("read") == bytes);
}
