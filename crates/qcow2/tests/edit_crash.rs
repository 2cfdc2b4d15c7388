//! Whenever a change is interrupted, the image is what it was or what it was to be.
//!
//! Each operation runs on a disk in memory that records its calls. Then every point at which the process can
//! die is replayed, and at each of them losses of power that keep any of the sectors not yet synced. What is
//! left must open as one of the two states, whole, or be in progress and become one of them by recovery. The
//! twins leave one sync out, and must be caught.
#![allow(
    clippy::disallowed_methods,
    reason = "a crash image that QEMU is to look at need not be durable"
)]

mod crashes;
mod images;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crashes::{LOSSES, editor, judge, judge_losses, settled, state};
use images::{layer, run, sh};
use stead_qcow2::edit::{Edit, Mapping, SnapshotName, View};
use stead_qcow2::{Error, GuestOffset, LayerFile, LayerFormat, Result};
use stead_sim::disk::Event;
use stead_sim::{DiskFault, FaultDisk, History, RecordedDisk};
use stead_sys::storage::Storage;

/// A small image with everything in it: data, compressed data, zeros, internal snapshots, a bitmap.
fn image(dir: &Path, options: &str) -> Vec<u8> {
    let path = dir.join("image");
    let name = path.display();
    sh(&format!(
        "qemu-img create -q -f qcow2 -o {options} {name} 199k"
    ));
    let io = |commands: &[&str]| {
        let mut args = vec!["-f".to_owned(), "qcow2".into(), "-d".into(), "unmap".into()];
        for command in commands {
            args.extend(["-c".to_owned(), (*command).to_owned()]);
        }
        args.push(name.to_string());
        run("qemu-io", &args);
    };
    io(&["write -P 1 0 64k", "write -c -P 2 64k 32k"]);
    sh(&format!("qemu-img snapshot -c first {name}"));
    io(&["write -P 3 30k 40k", "write -P 4 180k 19k"]);
    sh(&format!("qemu-img snapshot -c second {name}"));
    if !options.contains("0.10") {
        sh(&format!("qemu-img bitmap --add -g 1k {name} on"));
        sh(&format!("qemu-img bitmap --add -g 4k {name} off"));
        io(&["write -z 96k 16k"]);
        sh(&format!("qemu-img bitmap --disable {name} off"));
    }
    io(&["write -P 5 8k 9k", "discard 120k 16k"]);
    std::fs::read(&path).expect("read")
}

const KINDS: [&str; 4] = [
    "cluster_size=4k",
    "cluster_size=512",
    "cluster_size=1k,compat=0.10",
    "cluster_size=16k,extended_l2=on,refcount_bits=64",
];

type Change = Box<dyn FnMut(&mut Edit) -> Result<()>>;

fn called(name: &str) -> SnapshotName {
    SnapshotName {
        name: name.into(),
        date_seconds: 1,
        date_nanoseconds: 2,
    }
}

/// Every operation, with its name. `layer` is a qcow2 layer to take data from.
fn operations(layer: &LayerFile) -> Vec<(&'static str, Change)> {
    let layer = layer.clone();
    vec![
        (
            "create",
            Box::new(|edit| edit.create_snapshot(&called("third")).map(drop)),
        ),
        ("apply", Box::new(|edit| edit.apply_snapshot(0))),
        ("delete", Box::new(|edit| edit.delete_snapshot(0))),
        ("grow", Box::new(|edit| edit.resize(700 << 10, None))),
        ("shrink", Box::new(|edit| edit.resize(33 << 10, None))),
        ("many", Box::new(many)),
        (
            "name",
            Box::new(|edit| {
                // Longer than a sector where the first cluster is.
                let length = if edit.old().cluster_size().bytes() > 512 {
                    700
                } else {
                    200
                };
                edit.set_backing(Some((&[b'n'; 700][..length], Some(b"raw"))));
                Ok(())
            }),
        ),
        ("bitmaps", Box::new(bitmaps)),
        ("in place", Box::new(move |edit| overwrite(edit, &layer))),
    ]
}

/// Every change of a bitmap at once.
fn bitmaps(edit: &mut Edit) -> Result<()> {
    let (on, off) = (edit.find_bitmap(b"on"), edit.find_bitmap(b"off"));
    let (Some(on), Some(off)) = (on, off) else {
        // Version 2 has none.
        return edit.delete_snapshot(0);
    };
    let bits = edit.bitmap_bits(on)?;
    let new = edit.add_bitmap(b"new", 9, true)?;
    edit.merge_bitmap(new, &bits)?;
    edit.mark(new, 0..4096)?;
    edit.clear_bitmap(on)?;
    edit.mark_dirty(100 << 10..101 << 10)?;
    edit.enable_bitmap(off, true)?;
    let gone = edit.add_bitmap(b"gone", 16, false)?;
    edit.remove_bitmap(gone)?;
    edit.remove_bitmap(off)?;
    edit.add_bitmap(b"off", 12, false).map(drop)
}

/// Several things in one change.
fn many(edit: &mut Edit) -> Result<()> {
    edit.delete_snapshot(1)?;
    edit.create_snapshot(&called("other"))?;
    edit.resize(300 << 10, None)?;
    edit.apply_snapshot(0)?;
    edit.create_snapshot(&called("again")).map(drop)
}

/// Clusters that only the active disk has get the layer's data in place.
fn overwrite(edit: &mut Edit, layer: &LayerFile) -> Result<()> {
    edit.set_sources(std::slice::from_ref(layer))?;
    let size = edit.old().cluster_size();
    let mut done = 0;
    for cluster in 0..size.count_for(edit.virtual_size()) {
        let mapping = edit.mapping(View::Active, cluster)?;
        if let Mapping::Data { host }
        | Mapping::Subclusters {
            host: Some(host), ..
        } = mapping
            && edit.references(host)? == 1
        {
            let guest = GuestOffset(cluster << size.bits());
            edit.overwrite(guest, host, size.bytes())?;
            edit.mark_dirty(guest.0..guest.0 + size.bytes())?;
            done += 1;
        }
    }
    assert!(done > 1, "nothing is done in place");
    Ok(())
}

fn source(dir: &Path) -> LayerFile {
    let path = dir.join("layer");
    let name = path.display();
    sh(&format!("qemu-img create -q -f qcow2 {name} 256k"));
    run(
        "qemu-io",
        &["-c".into(), "write -P 77 0 256k".into(), name.to_string()],
    );
    layer(path, LayerFormat::Qcow2)
}

/// Runs a change on a disk that records.
fn recorded(bytes: &[u8], change: &mut Change) -> Result<(History, Vec<u8>)> {
    let disk = Arc::new(RecordedDisk::new(bytes.to_vec()));
    editor(Arc::clone(&disk) as Arc<dyn Storage>)?.apply(change)?;
    Ok((disk.history(), disk.bytes()))
}

/// Runs `each` for every operation on every kind of image.
fn for_each(mut each: impl FnMut(&str, &[u8], &mut Change)) {
    let dir = tempfile::tempdir().expect("temp dir");
    let layer = source(dir.path());
    for kind in KINDS {
        let bytes = image(tempfile::tempdir().expect("temp dir").path(), kind);
        for (name, mut change) in operations(&layer) {
            each(&format!("{name} on {kind}"), &bytes, &mut change);
        }
    }
}

#[test]
fn a_crash_leaves_the_old_state_or_the_new_one() {
    let mut recovered = 0;
    for_each(|name, bytes, change| {
        let (history, after) =
            recorded(bytes, change).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (old, new) = (state(bytes).expect("whole"), state(&after).expect("whole"));
        assert!(old != new, "{name} changed nothing");
        let tally = judge(&history, &old, &new).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(tally.old > 0 && tally.new > 0, "{name}: {tally:?}");
        recovered += tally.recovered;
    });
    assert!(recovered > 50, "{recovered}");
}

/// The twin: without the sync before the switch, or one inside the journal's steps, the crash test fails.
#[test]
fn the_crash_test_fails_when_a_sync_is_missing() {
    let mut found = [0; 3];
    for_each(|name, bytes, change| {
        let (history, after) =
            recorded(bytes, change).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (old, new) = (state(bytes).expect("whole"), state(&after).expect("whole"));
        let syncs = history
            .events()
            .iter()
            .filter(|event| **event == Event::Sync)
            .count();
        for (which, found) in found.iter_mut().enumerate().take(syncs) {
            let quiet = std::panic::take_hook();
            std::panic::set_hook(Box::new(|_| {}));
            let without = history.without_sync(which);
            // Small changes need more losses before one takes the wrong sectors.
            let judged = judge(&without, &old, &new).and_then(|tally| match which {
                0 => judge_losses(&without, (&old, &new), LOSSES..LOSSES * 16),
                _ => Ok(tally),
            });
            std::panic::set_hook(quiet);
            *found += u32::from(judged.is_err());
            let first = history
                .events()
                .iter()
                .find(|event| !matches!(event, Event::SetLen(_)));
            if which == 0 && first != Some(&Event::Sync) {
                assert!(
                    judged.is_err(),
                    "{name}: the first sync is not needed: {:?}",
                    history.events()
                );
            }
        }
    });
    assert!(found[1] > 0 && found[2] > 0, "{found:?}");
}

#[test]
fn a_fault_at_any_call_leaves_the_old_state_or_the_new_one() {
    for_each(|name, bytes, change| {
        let old = state(bytes).expect("whole");
        let new = state(&recorded(bytes, change).expect("works").1).expect("whole");
        for fault in [DiskFault::NoSpace, DiskFault::Io, DiskFault::Killed] {
            for call in 1.. {
                let disk = Arc::new(RecordedDisk::new(bytes.to_vec()));
                let inner = Arc::clone(&disk) as Arc<dyn Storage>;
                let faulty = Arc::new(FaultDisk::new(inner, call, fault));
                let outcome = editor(Arc::clone(&faulty) as Arc<dyn Storage>)
                    .expect("opening writes nothing")
                    .apply(&mut *change);
                let text = format!("{name}: {fault:?} at call {call}");
                let left = disk.bytes();
                match outcome {
                    Ok(_) => {
                        assert!(state(&left).expect("whole") == new, "{text}");
                        assert!(faulty.calls() < call, "{text}: the error was lost");
                        break;
                    }
                    Err(Error::Switch { .. }) => {
                        let (found, _) = settled(&left).unwrap_or_else(|e| panic!("{text}: {e}"));
                        assert!(found == old || found == new, "{text}");
                    }
                    Err(error) => {
                        assert!(matches!(error, Error::Io { .. }), "{text}: {error}");
                        assert!(state(&left).expect("whole") == old, "{text}");
                        if fault != DiskFault::Killed {
                            assert_eq!(left.len(), bytes.len(), "{text}: room was not given back");
                        }
                    }
                }
            }
        }
    });
}

fn qemu_check(path: &Path) -> std::process::Output {
    let path = path.to_str().expect("text");
    let options = format!("driver=qcow2,file.driver=file,file.filename={path},backing=");
    Command::new("qemu-img")
        .args(["check", "--image-opts", &options])
        .output()
        .expect("qemu-img is installed")
}

/// QEMU finds nothing wrong with any crash image, and refuses those in progress for the bit and its name.
#[test]
fn qemu_agrees_about_what_a_crash_leaves() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("crashed");
    let (mut whole, mut refused) = (0, 0);
    for_each(|name, bytes, change| {
        let (history, _) = recorded(bytes, change).expect("works");
        let last = history.events().len();
        for count in [last.saturating_sub(4), last.saturating_sub(3), last] {
            let left = history.power_loss(count, 7);
            std::fs::write(&path, &left).expect("write");
            let output = qemu_check(&path);
            let text = String::from_utf8_lossy(&output.stderr);
            if matches!(state(&left), Err(Error::InProgress { .. })) {
                assert!(text.contains("change in progress"), "{name}: {text}");
                refused += 1;
            } else {
                assert!(output.status.success(), "{name}: {text}");
                whole += 1;
            }
        }
    });
    assert!(
        whole > 50 && refused > 3,
        "{whole} whole, {refused} refused"
    );
}

/// A layer that the data comes from must be what it was.
#[test]
fn a_recovery_that_cannot_know_its_data_leaves_the_image_in_progress() {
    let dir = tempfile::tempdir().expect("temp dir");
    let layer = source(dir.path());
    let bytes = image(tempfile::tempdir().expect("temp dir").path(), KINDS[0]);
    let mut change: Change = {
        let layer = layer.clone();
        Box::new(move |edit| overwrite(edit, &layer))
    };
    let (history, _) = recorded(&bytes, &mut change).expect("works");
    let marked = (0..=history.events().len())
        .map(|count| history.prefix(count))
        .find(|bytes| matches!(state(bytes), Err(Error::InProgress { .. })))
        .expect("a journal is needed");
    let kept = std::fs::read(&layer.path).expect("read");
    for other in [None, Some(&kept[..kept.len() - 512])] {
        match other {
            None => std::fs::remove_file(&layer.path).expect("remove"),
            Some(bytes) => std::fs::write(&layer.path, bytes).expect("write"),
        }
        let error = settled(&marked).expect_err("the layer is another");
        assert!(matches!(error, Error::Unrecoverable { .. }), "{error}");
        assert!(error.to_string().contains("layer"), "{error}");
    }
    std::fs::write(&layer.path, &kept).expect("write");
    assert!(settled(&marked).expect("recovered").1);
}
