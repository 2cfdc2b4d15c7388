//! Disks of another length: what is cut off is gone, what is added is zeros, and bitmaps name it all.
#![allow(
    clippy::disallowed_methods,
    reason = "a copy of an image to compare with need not be durable"
)]

mod images;

use std::path::Path;
use std::process::Command;

use images::{Random, editor, make_chain, require_whole, run, sh, text};
use serde_json::Value;
use stead_qcow2::edit::SnapshotName;
use stead_qcow2::{Chain, Control, Error, LayerFile, LayerFormat, Preallocation, ops};

fn io(path: &Path, command: &str) {
    let args = ["-f", "qcow2", "-c", command, text(path)].map(str::to_owned);
    run("qemu-io", &args);
}

/// What QEMU reads through the whole chain.
fn qemu_reads(path: &Path) -> Vec<u8> {
    let to = path.with_extension("raw");
    let words = ["convert", "-f", "qcow2", "-O", "raw", text(path), text(&to)];
    run("qemu-img", &words.map(str::to_owned));
    std::fs::read(&to).expect("read")
}

/// Any sequence of lengths and writes gives what the same sequence gives on an array of bytes.
#[test]
fn a_disk_that_shrinks_and_grows_reads_as_an_array_that_does() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (mut steps, mut with_backing) = (0, 0);
    for seed in 41_000_000..41_000_009 {
        let made = make_chain(dir.path(), seed);
        let LayerFile { path, format } = made.top().clone();
        if format == LayerFormat::Raw {
            continue;
        }
        let mut random = Random::new(seed);
        let below = (made.files.len() > 1).then(|| Chain::open(&made.files[1..]).expect("whole"));
        let mut model = qemu_reads(&path);
        let most = model.len() as u64 * 2;
        for _ in 0..4 {
            let sectors = 1 + random.below(most / 512);
            let length = usize::try_from(sectors * 512).expect("small");
            let mut one = match editor(&path) {
                // QEMU 7.2 now and then damages an image itself; see the tests of check.
                Err(Error::Damaged { .. }) => break,
                opened => opened.expect("whole"),
            };
            let grown = length as u64;
            let mode = match random.below(4) {
                0 => Preallocation::Metadata,
                1 => Preallocation::Falloc,
                2 => Preallocation::Full,
                _ => Preallocation::Off,
            };
            let done = ops::resize::resize_reserving(
                &mut one,
                grown,
                below.as_ref(),
                mode,
                &Control::default(),
            );
            let done = done.unwrap_or_else(|error| panic!("{error}\n{}", made.story));
            drop(one);
            assert_eq!(
                std::fs::metadata(&path).expect("stat").len(),
                done.room.end_bytes
            );
            model.resize(length, 0);
            require_whole(&path, &made.story);
            assert!(qemu_reads(&path) == model, "{length} bytes\n{}", made.story);
            steps += 1;
            with_backing += u64::from(below.is_some());
            let at = usize::try_from(random.below(sectors)).expect("small") * 512;
            let end = (at + 9000).next_multiple_of(512).min(length);
            model[at..end].fill(7);
            io(&path, &format!("write -P 7 {at} {}", end - at));
        }
    }
    assert!(steps > 12 && with_backing > 4, "{steps}, {with_backing}");
}

/// The dirty ranges of a bitmap as QEMU exports them over NBD.
fn dirty(path: &Path, name: &str) -> Vec<(u64, u64)> {
    let socket = path.with_extension("nbd");
    let pid = path.with_extension("pid");
    let mut server = Command::new("qemu-nbd")
        .args(["-f", "qcow2", "-r", "-t", "-B", name, "-k"])
        .arg(&socket)
        .arg(format!("--pid-file={}", text(&pid)))
        .arg(text(path))
        .spawn()
        .expect("qemu-nbd is installed");
    while !pid.exists() {
        assert!(
            server.try_wait().expect("wait").is_none(),
            "qemu-nbd refused {name}"
        );
        std::thread::yield_now();
    }
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        text(&socket)
    );
    let words = ["map", "--output=json", "--image-opts", &options];
    let map = run("qemu-img", &words.map(str::to_owned));
    server.kill().expect("kill");
    server.wait().expect("wait");
    std::fs::remove_file(&pid).expect("remove");
    std::fs::remove_file(&socket).expect("remove");
    let map: Vec<Value> = serde_json::from_str(&map).expect("JSON");
    // The map of a bitmap says "no data" of what is dirty.
    let dirty = map.iter().filter(|entry| entry["data"] == false);
    let range = |entry: &Value| {
        let start = entry["start"].as_u64().expect("a number");
        (start, start + entry["length"].as_u64().expect("a number"))
    };
    dirty.map(range).collect()
}

fn covers(ranges: &[(u64, u64)], start: u64, end: u64) -> bool {
    let mut at = start;
    for range in ranges {
        if range.0 <= at && at < range.1 {
            at = range.1;
        }
    }
    at >= end
}

fn with_bitmaps(dir: &Path, cluster: &str) -> std::path::PathBuf {
    let path = dir.join(format!("bitmaps-{cluster}"));
    let name = path.display();
    sh(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size={cluster} {name} 8M"
    ));
    io(&path, "write -P 1 0 8M");
    for (bitmap, granularity) in [("fine", "512"), ("coarse", "64k"), ("off", "4k")] {
        sh(&format!(
            "qemu-img bitmap --add -g {granularity} {name} {bitmap}"
        ));
    }
    sh(&format!("qemu-img bitmap --disable {name} off"));
    path
}

/// QEMU loads every bitmap, and it names what an incremental backup would need.
#[test]
fn bitmaps_of_a_disk_that_shrinks_and_grows_again_name_what_came_back_as_zeros() {
    let dir = tempfile::tempdir().expect("temp dir");
    for cluster in ["512", "4k", "64k"] {
        let path = with_bitmaps(dir.path(), cluster);
        io(&path, "write -P 2 1M 4k");
        let (short, long) = ((3 << 20) + 512, 9 << 20);
        let mut one = editor(&path).expect("open");
        ops::resize::resize(&mut one, short, None).expect("shrink");
        drop(one);
        require_whole(&path, cluster);
        assert!(
            !covers(&dirty(&path, "fine"), short - 512, short),
            "{cluster}"
        );
        let mut one = editor(&path).expect("open");
        ops::resize::resize(&mut one, long, None).expect("grow");
        drop(one);
        require_whole(&path, cluster);
        for name in ["fine", "coarse", "off"] {
            let found = dirty(&path, name);
            assert!(covers(&found, short, long), "{cluster} {name}: {found:?}");
            let kept = name == "off" || covers(&found, 1 << 20, (1 << 20) + 4096);
            assert!(kept, "{cluster} {name}: {found:?}");
            assert!(
                !covers(&found, 2 << 20, (2 << 20) + 65_536),
                "{cluster} {name}: {found:?}"
            );
        }
    }
}

/// A snapshot applied with bitmaps present: every byte that differs afterwards is dirty.
#[test]
fn an_applied_snapshot_marks_every_byte_that_differs_and_keeps_the_bitmaps() {
    let dir = tempfile::tempdir().expect("temp dir");
    for cluster in ["512", "4k", "64k"] {
        let path = with_bitmaps(dir.path(), cluster);
        let called = SnapshotName {
            name: b"point".to_vec(),
            date_seconds: 1,
            date_nanoseconds: 0,
        };
        ops::snapshot::create(&mut editor(&path).expect("open"), &called).expect("create");
        io(&path, "write -P 3 100k 300k");
        sh(&format!("qemu-img bitmap --clear {} fine", path.display()));
        sh(&format!(
            "qemu-img bitmap --clear {} coarse",
            path.display()
        ));
        let before = qemu_reads(&path);
        ops::snapshot::apply(&mut editor(&path).expect("open"), b"point").expect("apply");
        require_whole(&path, cluster);
        let after = qemu_reads(&path);
        assert!(before != after);
        for name in ["fine", "coarse"] {
            let found = dirty(&path, name);
            for sector in 0..before.len() / 512 {
                let range = sector * 512..(sector + 1) * 512;
                let (start, end) = (range.start as u64, range.end as u64);
                let same = before[range.clone()] == after[range];
                assert!(
                    same || covers(&found, start, end),
                    "{cluster} {name} {sector}"
                );
            }
            assert!(
                !covers(&found, 1 << 20, 2 << 20),
                "{cluster} {name}: {found:?}"
            );
        }
        assert!(
            dirty(&path, "off").is_empty(),
            "a disabled bitmap records nothing"
        );
    }
}

#[test]
fn what_cannot_be_done_is_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = with_bitmaps(dir.path(), "4k");
    let overlay = dir.path().join("overlay");
    let [base, name] = [path.display(), overlay.display()];
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {base} -F qcow2 {name} 1M"
    ));
    for (path, length) in [
        (&path, 1000),
        (&path, 0),
        (&path, 1 << 62),
        (&overlay, 2 << 20),
    ] {
        let before = std::fs::read(path).expect("read");
        let mut one = editor(path).expect("open");
        let error = ops::resize::resize(&mut one, length, None).expect_err("refused");
        drop(one);
        assert!(matches!(error, Error::Refused { .. }), "{error}");
        assert!(std::fs::read(path).expect("read") == before);
    }
}

/// A plan says what the change then takes, and writes nothing.
#[test]
fn a_plan_is_exact() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = with_bitmaps(dir.path(), "4k");
    let before = std::fs::read(&path).expect("read");
    let mut one = editor(&path).expect("open");
    let allocated_before = stead_sys::space::allocated_bytes(&path).expect("stat");
    let plan = one.plan(|edit| edit.resize(100 << 20, None)).expect("plan");
    assert!(std::fs::read(&path).expect("read") == before);
    let done = ops::resize::resize(&mut one, 100 << 20, None).expect("resize");
    assert_eq!(done.room, plan);
    let length = std::fs::metadata(&path).expect("stat").len();
    assert_eq!(length, plan.end_bytes);
    // Blocks that the change freed behind the end are not there any more.
    let allocated = stead_sys::space::allocated_bytes(&path).expect("stat");
    let grown = allocated.saturating_sub(allocated_before);
    assert!(grown <= plan.new_bytes, "{grown} of {plan:?}");
    assert!(
        grown + (plan.peak_bytes - plan.end_bytes) >= plan.new_bytes,
        "{grown} of {plan:?}"
    );
}
