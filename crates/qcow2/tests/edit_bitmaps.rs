//! Bitmaps added, removed, cleared, enabled, disabled and merged as qemu-img does it, and written once.

#![allow(
    clippy::disallowed_methods,
    reason = "a copy of an image to compare with need not be durable"
)]

mod images;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use images::{Random, qemu_dirty, run, sh};
use serde_json::Value;
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::bitmap::{Action, Step, change};
use stead_qcow2::{Bitmap, Error, GuestOffset, Layer};
use stead_sim::RecordedDisk;
use stead_sim::disk::Event;

fn text(path: &Path) -> &str {
    path.to_str().expect("temp paths are text")
}

fn editor(path: &Path) -> Editor {
    Editor::open(path, EditOptions::default()).expect("open")
}

fn io(path: &Path, command: &str) {
    let args = ["-f", "qcow2", "-c", command, text(path)].map(str::to_owned);
    run("qemu-io", &args);
}

/// The bitmaps as qemu-img names them, with what QEMU finds marked in those that it reads.
fn qemu_sees(path: &Path) -> Vec<(Value, Vec<std::ops::Range<u64>>)> {
    let info = sh(&format!("qemu-img info --output=json {}", text(path)));
    let info: Value = serde_json::from_str(&info).expect("JSON");
    let bitmaps = &info["format-specific"]["data"]["bitmaps"];
    let bitmaps = bitmaps.as_array().cloned().unwrap_or_default();
    let mut seen: Vec<_> = bitmaps
        .into_iter()
        .map(|bitmap| {
            let dirty = qemu_dirty(path, bitmap["name"].as_str().expect("a name"));
            (bitmap, dirty)
        })
        .collect();
    seen.sort_by_key(|(bitmap, _)| bitmap["name"].to_string());
    seen
}

fn require_clean(path: &Path) {
    let report = stead_qcow2::check(&Layer::open(path).expect("whole")).expect("readable");
    assert!(report.is_clean(), "{:?}", report.findings);
    sh(&format!("qemu-img check -q -f qcow2 {}", text(path)));
}

/// A step as arguments of `qemu-img bitmap`.
fn arguments(step: &Step<'_>, source: &Path) -> Vec<String> {
    let words: Vec<String> = match step.action {
        Action::Add {
            granularity_bits,
            enabled,
        } => {
            let mut words = vec!["--add".to_owned()];
            words.extend(granularity_bits.map(|bits| format!("-g{}", 1_u64 << bits)));
            words.extend((!enabled).then(|| "--disable".to_owned()));
            words
        }
        Action::Remove => vec!["--remove".into()],
        Action::Clear => vec!["--clear".into()],
        Action::Enable => vec!["--enable".into()],
        Action::Disable => vec!["--disable".into()],
        Action::Merge {
            source: name,
            image,
        } => {
            let name = String::from_utf8_lossy(name).into_owned();
            let mut words = vec!["--merge".into(), name];
            if image.is_some() {
                words.extend([
                    "-b".into(),
                    text(source).into(),
                    "-F".into(),
                    "qcow2".into(),
                ]);
            }
            words
        }
    };
    words
}

fn action<'a>(random: &mut Random, other: &'a Layer) -> Action<'a> {
    let name = random.pick(&[b"a", b"b", b"c"]);
    match random.below(9) {
        0..=2 => Action::Add {
            granularity_bits: random.pick(&[None, Some(9), Some(12), Some(17)]),
            enabled: !random.chance(3),
        },
        3 => Action::Remove,
        4 => Action::Clear,
        5 => Action::Enable,
        6 => Action::Disable,
        7 => Action::Merge {
            source: name,
            image: None,
        },
        _ => Action::Merge {
            source: b"other",
            image: Some(other),
        },
    }
}

#[test]
fn bitmaps_are_changed_as_qemu_changes_them() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut random = Random::new(71);
    let (mut done, mut refused) = (0, 0);
    for (round, cluster) in [512, 4096, 65_536].into_iter().enumerate() {
        let [ours, theirs, other] =
            ["ours", "theirs", "other"].map(|name| dir.path().join(format!("{name}{round}")));
        let size = 512 * (6000 + random.below(9000));
        for path in [&ours, &other] {
            sh(&format!(
                "qemu-img create -q -f qcow2 -o cluster_size={cluster} {} {size}",
                text(path)
            ));
        }
        sh(&format!(
            "qemu-img bitmap --add -g 2k {} other",
            text(&other)
        ));
        io(&other, "write 100k 300k");
        std::fs::copy(&ours, &theirs).expect("copy");
        let layer = Layer::open(&other).expect("open");
        for _ in 0..14 {
            let bitmap: &[u8] = random.pick(&[b"a", b"b", b"c"]);
            let step = Step {
                bitmap,
                action: action(&mut random, &layer),
            };
            let mut args = vec!["bitmap".to_owned(), "-f".into(), "qcow2".into()];
            args.extend(arguments(&step, &other));
            args.extend([text(&theirs).into(), String::from_utf8_lossy(bitmap).into()]);
            let output = Command::new("qemu-img").args(&args).output().expect("run");
            let outcome = change(&mut editor(&ours), &[step]);
            assert_eq!(
                outcome.is_ok(),
                output.status.success(),
                "{args:?} {outcome:?}"
            );
            done += u32::from(outcome.is_ok());
            refused += u32::from(outcome.is_err());
            let at = random.below(size) / 512 * 512;
            let length = (512 * (1 + random.below(300))).min(size - at);
            for path in [&ours, &theirs] {
                io(path, &format!("write {at} {length}"));
            }
        }
        require_clean(&ours);
        assert_eq!(qemu_sees(&ours), qemu_sees(&theirs));
    }
    assert!(done > 15 && refused > 5, "{done} done, {refused} refused");
}

#[test]
fn several_steps_are_one_change_and_one_that_fails_undoes_all() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    sh(&format!("qemu-img create -q -f qcow2 {} 8M", text(&path)));
    let add = |name: &'static [u8]| Step {
        bitmap: name,
        action: Action::Add {
            granularity_bits: None,
            enabled: true,
        },
    };
    change(&mut editor(&path), &[add(b"first")]).expect("add");
    io(&path, "write 1M 1M");
    let merge = |into, source| Step {
        bitmap: into,
        action: Action::Merge {
            source,
            image: None,
        },
    };
    let clear = Step {
        bitmap: b"first",
        action: Action::Clear,
    };
    let steps = [add(b"second"), merge(b"second", b"first"), clear];
    let before = std::fs::read(&path).expect("read");
    let failing: Vec<_> = steps
        .iter()
        .copied()
        .chain([merge(b"second", b"none")])
        .collect();
    let error = change(&mut editor(&path), &failing).expect_err("no such bitmap");
    assert!(error.to_string().contains("none"), "{error}");
    assert!(std::fs::read(&path).expect("read") == before);
    change(&mut editor(&path), &steps).expect("change");
    assert_eq!(qemu_dirty(&path, "first"), []);
    let dirty = qemu_dirty(&path, "second");
    assert!(
        dirty.len() == 1 && dirty[0] == (1 << 20..2 << 20),
        "{dirty:?}"
    );
    require_clean(&path);
}

#[test]
fn a_bitmap_that_was_not_saved_can_only_be_removed_and_is_named() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    sh(&format!("qemu-img create -q -f qcow2 {} 8M", text(&path)));
    for name in ["lost", "good"] {
        sh(&format!("qemu-img bitmap --add {} {name}", text(&path)));
    }
    let layer = Layer::open(&path).expect("open");
    let directory = layer.header().bitmaps.expect("there").directory.0;
    let file = std::fs::OpenOptions::new().write(true).open(&path);
    let stored = layer.stored_bitmaps().expect("whole");
    let before = stored.iter().take_while(|one| one.name != b"lost").count() as u64;
    let flags = directory + before * 32 + 15;
    file.expect("open")
        .write_all_at(&[3], flags)
        .expect("write");
    let step = |action| Step {
        bitmap: b"lost",
        action,
    };
    let merge = |source| Action::Merge {
        source,
        image: None,
    };
    let from_lost = Step {
        bitmap: b"good",
        action: merge(b"lost"),
    };
    for step in [
        step(Action::Clear),
        step(Action::Enable),
        step(Action::Disable),
        step(merge(b"good")),
        from_lost,
    ] {
        let error = change(&mut editor(&path), &[step]).expect_err("it says nothing");
        assert!(
            matches!(&error, Error::BitmapInUse { name, .. } if name == "lost"),
            "{error}"
        );
    }
    change(&mut editor(&path), &[step(Action::Remove)]).expect("remove");
    require_clean(&path);
    assert_eq!(qemu_sees(&path).len(), 1);
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("temp dir");
    let [path, old, long] = ["image", "old", "long"].map(|name| dir.path().join(name));
    sh(&format!("qemu-img create -q -f qcow2 {} 8M", text(&path)));
    sh(&format!(
        "qemu-img create -q -f qcow2 -o compat=0.10 {} 8M",
        text(&old)
    ));
    sh(&format!("qemu-img create -q -f qcow2 {} 9M", text(&long)));
    sh(&format!("qemu-img bitmap --add {} b", text(&path)));
    sh(&format!("qemu-img bitmap --add {} b", text(&long)));
    let layer = Layer::open(&long).expect("open");
    let add = |bits| Action::Add {
        granularity_bits: Some(bits),
        enabled: true,
    };
    let merge = Action::Merge {
        source: b"b",
        image: Some(&layer),
    };
    let name = [b'n'; 1024];
    for (path, bitmap, action, said) in [
        (&path, &b"x"[..], add(8), "granularity"),
        (&path, b"", add(16), "name"),
        (&path, &name, add(16), "name"),
        (&path, b"b", add(16), "exists"),
        (
            &path,
            b"b",
            merge,
            "9437184 bytes, and this one has 8388608",
        ),
        (&old, b"b", add(16), "version 2"),
    ] {
        let before = std::fs::read(path).expect("read");
        let error = change(&mut editor(path), &[Step { bitmap, action }]).expect_err(said);
        assert!(error.to_string().contains(said), "{said}: {error}");
        assert!(std::fs::read(path).expect("read") == before);
    }
}

/// A bitmap of 2 MiB whose every cluster has to be stored.
fn large(name: &[u8], random: &mut Random) -> Bitmap {
    let mut bits = Bitmap::new(name, 16, 1 << 40).expect("valid");
    for place in 0..(2_u64 << 20) / 512 {
        bits.set(
            GuestOffset((place * 4096 + random.below(4000)) << 16),
            1 << 16,
        );
    }
    bits
}

#[test]
fn adding_and_merging_32_bitmaps_of_2_mib_writes_little_more_than_their_bits() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    sh(&format!("qemu-img create -q -f qcow2 {} 1T", text(&path)));
    let mut random = Random::new(72);
    let names: Vec<String> = (0..32).map(|n| format!("bitmap{n}")).collect();
    let disk = Arc::new(RecordedDisk::new(std::fs::read(&path).expect("read")));
    let storage: Arc<dyn stead_sys::storage::Storage> = Arc::clone(&disk) as _;
    let mut editor = Editor::on_storage(storage, Path::new("image"), EditOptions::default());
    let all: Vec<Bitmap> = names
        .iter()
        .map(|name| large(name.as_bytes(), &mut random))
        .collect();
    let made = editor.as_mut().expect("open").apply(|edit| {
        for bits in &all {
            let index = edit.add_bitmap(bits.name(), 16, true)?;
            edit.merge_bitmap(index, bits)?;
        }
        Ok(())
    });
    made.expect("add and merge");
    let history = disk.history();
    let written = history.events().iter().map(|event| match event {
        Event::Write { bytes, .. } => bytes.len(),
        Event::SetLen(_) | Event::Sync => 0,
    });
    let (written, payload) = (written.sum::<usize>(), 32 << 21);
    println!("{written} bytes written for {payload}");
    assert!(
        written >= payload && written * 10 <= payload * 11,
        "{written}"
    );
    std::fs::write(&path, disk.bytes()).expect("write");
    require_clean(&path);
}
