//! What is restored is the disk as it was, whatever its layers; what cannot be relied on is said, and a full backup is made.

#![allow(
    clippy::disallowed_methods,
    reason = "files of tests need not be durable"
)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use common::{World, content, sh, silent};
use stead_backup::{
    BackupKind, DiskSource, Kind, RestoreFormat, RestoreRequest, State, Wanted, Watch, list,
    new_id, remove, restore, run, verify,
};
use stead_qcow2::{LayerFile, LayerFormat};

#[test]
fn a_full_backup_and_each_incremental_one_restores_to_the_disk_of_its_time() {
    let world = World::new();
    let mut times = Vec::new();
    let full = world.backup(Wanted::Full).expect("full");
    times.push((full.record, world.content()));
    for (write, most) in [
        ("write -P 7 1M 64k", 65_536),
        ("write -z 2M 256k", 262_144),
        ("write -P 9 7M 1M", 1 << 20),
    ] {
        world.io(&[write]);
        let report = world.backup(Wanted::IncrementalOnly).expect("incremental");
        assert_eq!(report.record.kind, BackupKind::Incremental);
        assert_eq!(report.record.changed_bytes, most);
        let earlier = times.last().map(|(record, _)| record.id.clone());
        assert_eq!(report.record.parent, earlier);
        assert_eq!(world.bitmaps(), [report.next_bitmap.as_str()]);
        // The images are a chain that QEMU's own tools read.
        sh(&format!(
            "qemu-img check -q {}",
            report.image.as_ref().expect("a file").display()
        ));
        assert!(content(report.image.as_ref().expect("a file")) == world.content());
        times.push((report.record, world.content()));
    }
    for (record, disk) in &times {
        world.require(&record.id, disk, &record.id);
    }
    world.require_all_whole("all");
    let listed = list(&world.folder).expect("listed");
    let depths: Vec<usize> = listed.iter().map(|one| one.depth).collect();
    assert_eq!(depths, [0, 1, 2, 3]);
    assert!(listed.iter().all(|one| one.state == State::Complete));
}

#[test]
fn a_restored_qcow2_disk_is_whole_and_an_earlier_file_is_kept_unless_it_may_be_replaced() {
    let world = World::new();
    world.backup(Wanted::Full).expect("full");
    let to = world.dir.path().join("new.qcow2");
    fs::write(&to, b"earlier").expect("written");
    let mut request = RestoreRequest {
        from: world.folder.clone(),
        backup: "latest".into(),
        to: to.clone(),
        format: RestoreFormat::Qcow2,
        replace: false,
    };
    let error = restore(&request, silent()).expect_err("it is there");
    assert_eq!(error.kind(), Kind::Conflict);
    assert_eq!(fs::read(&to).expect("there"), b"earlier");
    request.replace = true;
    restore(&request, silent()).expect("restored");
    sh(&format!("qemu-img check -q {}", to.display()));
    assert!(content(&to) == world.content());
}

#[test]
fn what_was_written_in_layers_made_later_is_backed_up_whether_they_have_the_bitmap_or_not() {
    for with_bitmap in [false, true] {
        let world = World::new();
        let report = world.backup(Wanted::Full).expect("full");
        world.io(&["write -P 3 1M 64k"]);
        let at = world.dir.path().display();
        sh(&format!(
            "cd {at} && qemu-img create -q -f qcow2 -b disk.qcow2 -F qcow2 top.qcow2"
        ));
        if with_bitmap {
            let name = &report.next_bitmap;
            sh(&format!(
                "cd {at} && qemu-img bitmap --add top.qcow2 {name}"
            ));
        }
        let world = World {
            disk: world.dir.path().join("top.qcow2"),
            ..world
        };
        world.io(&["write -P 4 6M 64k", "write -z 5M 64k"]);
        let report = world.backup(Wanted::IncrementalOnly).expect("incremental");
        assert_eq!(report.record.changed_bytes, 3 * 65_536);
        world.require(&report.record.id, &world.content(), "layers");
        assert_eq!(report.removed_bitmaps.len(), usize::from(with_bitmap));
        // The one below has its old bitmap still; the new one is in the active layer.
        world.io(&["write -P 5 4M 64k"]);
        let report = world.backup(Wanted::IncrementalOnly).expect("incremental");
        assert_eq!(report.record.changed_bytes, 65_536);
        world.require(&report.record.id, &world.content(), "layers");
    }
}

#[test]
fn a_disk_that_became_longer_or_shorter_is_restored_with_its_length() {
    let world = World::new();
    world.backup(Wanted::Full).expect("full");
    let disk = world.disk.display();
    for (size, write) in [
        ("12M", "write -P 8 11M 64k"),
        ("9437696", "write -P 8 9M 512"),
        ("5M", "write -P 9 0 512"),
        ("5243392", "write -P 6 5M 512"),
    ] {
        sh(&format!(
            "qemu-img resize -q --shrink -f qcow2 {disk} {size}"
        ));
        world.io(&[write]);
        let report = world.backup(Wanted::IncrementalOnly).expect("incremental");
        world.require(&report.record.id, &world.content(), size);
    }
    world.require_all_whole("lengths");
}

/// A full backup is made for `reason`, and nothing where it may not be.
fn falls_back(world: &World, reason: &str) {
    let files = world.files();
    let disk = fs::read(&world.disk).expect("there");
    let error = world.backup(Wanted::IncrementalOnly).expect_err("refused");
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
    assert!(error.found().contains(reason), "{error}");
    assert!(world.files() == files, "{reason}");
    assert!(fs::read(&world.disk).expect("there") == disk, "{reason}");
    let report = world.backup(Wanted::Incremental).expect("full");
    assert_eq!(report.record.kind, BackupKind::Full);
    let why = report.record.why_full.expect("a reason");
    assert!(why.contains(reason), "{why}");
    world.require(&report.record.id, &world.content(), reason);
    world.io(&["write -P 77 4M 64k"]);
    let report = world.backup(Wanted::IncrementalOnly).expect("goes on");
    world.require(&report.record.id, &world.content(), reason);
}

#[test]
fn a_disk_without_the_bitmap_or_with_that_of_another_folder_gets_a_full_backup_with_the_reason() {
    let world = World::new();
    falls_back(&world, "the disk has no bitmap daily@");
    let other = World {
        folder: world.dir.path().join("other"),
        ..World {
            dir: tempfile::tempdir().expect("temp dir"),
            disk: world.disk.clone(),
            folder: world.folder.clone(),
        }
    };
    falls_back(&other, "which belong to backups that are not in");
    // Both go on, each with its own bitmap.
    for one in [&world, &other] {
        one.io(&["write -P 12 2M 64k"]);
        let report = one.backup(Wanted::IncrementalOnly).expect("incremental");
        assert_eq!(report.foreign_bitmaps.len(), 1);
        one.require(&report.record.id, &one.content(), "two folders");
    }
}

#[test]
fn a_bitmap_that_was_not_saved_or_does_not_record_is_never_relied_on() {
    let world = World::new();
    let report = world.backup(Wanted::Full).expect("full");
    world.io(&["write -P 3 1M 64k"]);
    let (disk, name) = (world.disk.display(), &report.next_bitmap);
    sh(&format!("qemu-img bitmap --disable {disk} {name}"));
    world.io(&["write -P 4 2M 64k"]);
    falls_back(&world, "it is disabled");
    // A program that has the image open for writing and dies leaves the bitmap in use.
    let line = format!("qemu-io -f qcow2 -c 'write -P 5 3M 64k' -c 'abort' {disk}");
    let status = Command::new("sh")
        .args(["-c", &line])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(!status.expect("sh").success());
    sh(&format!("qemu-img check -q -r leaks {disk}"));
    falls_back(&world, "it was not saved");
    assert_eq!(world.bitmaps().len(), 1, "the dead one is gone");
}

#[test]
fn a_parent_that_is_missing_cut_or_damaged_is_not_built_upon() {
    for (damage, reason) in [
        ("json", "it is missing"),
        ("hashes", "cannot be read"),
        ("qcow2", "No such file"),
        ("cut", "its record says"),
    ] {
        let world = World::new();
        let full = world.backup(Wanted::Full).expect("full").record.id;
        world.io(&["write -P 3 1M 64k"]);
        let last = world.backup(Wanted::Incremental).expect("one").record.id;
        world.io(&["write -P 4 2M 64k"]);
        // The hashes are those of the last one; the images and records of all are needed.
        let of = if damage == "hashes" { &last } else { &full };
        let file = world.folder.join(format!("{of}.{damage}"));
        if damage == "cut" {
            let image = world.folder.join(format!("{full}.qcow2"));
            let length = fs::metadata(&image).expect("there").len();
            let open = fs::File::options().write(true).open(&image);
            open.and_then(|file| file.set_len(length - 4096))
                .expect("cut");
        } else {
            fs::remove_file(file).expect("removed");
        }
        falls_back(&world, reason);
    }
}

#[test]
fn a_bitmap_that_names_too_little_is_found_where_what_changed_is_read_back() {
    let world = World::new();
    let report = world.backup(Wanted::Full).expect("full");
    world.io(&["write -P 3 1M 64k"]);
    let (disk, name) = (world.disk.display(), &report.next_bitmap);
    sh(&format!("qemu-img bitmap --clear {disk} {name}"));
    world.io(&["write -P 4 1152k 64k"]);
    falls_back(&world, "or the bitmap does not name all that changed");
}

#[test]
fn the_comparison_can_fail_when_a_bitmap_forgets_what_was_written() {
    let world = World::new();
    let report = world.backup(Wanted::Full).expect("full");
    world.io(&["write -P 3 1M 64k"]);
    let (disk, name) = (world.disk.display(), &report.next_bitmap);
    sh(&format!("qemu-img bitmap --clear {disk} {name}"));
    world.io(&["write -P 4 6M 64k"]);
    let report = world.backup(Wanted::IncrementalOnly).expect("incremental");
    let restored = world.restored(&report.record.id).expect("restored");
    assert!(
        restored != world.content(),
        "the change is forgotten, and it is seen"
    );
}

#[test]
fn a_disk_in_use_is_not_backed_up_and_its_user_is_named() {
    let world = World::new();
    let mut user = Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(&world.disk)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-io");
    let mut input = user.stdin.take().expect("piped");
    input.write_all(b"write -P 9 0 64k\n").expect("told");
    let mut line = String::new();
    let output = user.stdout.take().expect("piped");
    let mut output = BufReader::new(output);
    output.read_line(&mut line).expect("it has the disk open");
    let error = world.backup(Wanted::Full).expect_err("in use");
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.found().contains("qemu-io"), "{error}");
    drop(input);
    user.wait().expect("ended");
    world.backup(Wanted::Full).expect("free again");
}

#[test]
fn a_raw_disk_and_a_backup_that_is_interrupted_change_nothing() {
    let world = World::new();
    let raw = world.dir.path().join("disk.raw");
    fs::write(&raw, vec![1; 1 << 20]).expect("written");
    let mut request = world.request(Wanted::Full);
    request.disk = DiskSource::Image(raw);
    let error = run(&request, silent()).expect_err("raw");
    assert_eq!(error.kind(), Kind::Incompatible);
    let (disk, cancel) = (fs::read(&world.disk).expect("there"), AtomicBool::new(true));
    let watch = Watch {
        tell: &|_| {},
        cancel: Some(&cancel),
    };
    let error = run(&world.request(Wanted::Full), watch).expect_err("interrupted");
    assert_eq!(error.kind(), Kind::Cancelled);
    assert!(world.files().is_empty());
    assert!(fs::read(&world.disk).expect("there") == disk);
}

#[test]
fn a_flipped_bit_or_a_cut_file_is_found_wherever_it_is_and_is_never_restored() {
    let world = World::new();
    let full = world.backup(Wanted::Full).expect("full").record.id;
    let disks = [world.content(), {
        world.io(&["write -P 3 1M 300k", "write -P 4 5M 1M"]);
        world.content()
    }];
    let last = world.backup(Wanted::IncrementalOnly).expect("incremental");
    let ids = [full, last.record.id];
    let mut refused = 0;
    for (path, bytes) in world.files() {
        for nth in 0..12 {
            let mut changed = bytes.clone();
            let at = (bytes.len() - 1) * nth / 11;
            match nth % 4 {
                3 => changed.truncate(at),
                bit => changed[at] ^= 1 << (bit * 3),
            }
            if changed == bytes {
                continue;
            }
            fs::write(&path, &changed).expect("written");
            let story = format!("{} {nth}", path.display());
            let found = verify(&world.folder, None, silent()).expect("readable");
            assert!(found.iter().any(|one| !one.whole), "{story}");
            for (id, disk) in ids.iter().zip(&disks) {
                match world.restored(id) {
                    Ok(restored) => assert!(restored == *disk, "{story}"),
                    Err(error) => {
                        let known = [Kind::Damaged, Kind::NotFound, Kind::Incompatible];
                        assert!(known.contains(&error.kind()), "{story}: {error}");
                        refused += 1;
                    }
                }
            }
        }
        fs::write(&path, &bytes).expect("written");
    }
    assert!(refused > 40, "{refused}");
    world.require_all_whole("as they were");
    let leftovers = fs::read_dir(world.dir.path()).expect("listed");
    let partial = |entry: std::io::Result<fs::DirEntry>| {
        entry
            .expect("listed")
            .file_name()
            .to_string_lossy()
            .starts_with(".partial")
    };
    assert_eq!(leftovers.map(partial).filter(|partial| *partial).count(), 0);
}

#[test]
fn a_disk_that_goes_on_in_a_new_layer_is_backed_up_from_the_frozen_ones() {
    let world = World::new();
    let mut layers = vec![world.disk.clone()];
    let mut times = Vec::new();
    for round in 0..4_u64 {
        let id = new_id().expect("an id");
        let new = world.dir.path().join(format!("layer-{round}.qcow2"));
        let (below, name) = (layers[0].display(), format!("daily@{id}"));
        sh(&format!(
            "qemu-img create -q -f qcow2 -b {below} -F qcow2 {0} && qemu-img bitmap --add {0} {name}",
            new.display()
        ));
        let file = |path: &std::path::PathBuf| LayerFile {
            path: path.clone(),
            format: LayerFormat::Qcow2,
        };
        let mut request = world.request(Wanted::Incremental);
        request.disk = DiskSource::Frozen {
            name: "web:vda".into(),
            layers: layers.iter().map(file).collect(),
            id: id.clone(),
        };
        let frozen = content(&layers[0]);
        // What the guest writes meanwhile goes into the new layer.
        layers.insert(0, new);
        common::io(
            &layers[0],
            &[&format!("write -P {} {}k 100k", round + 9, round * 999)],
        );
        if round == 2 {
            // This one fails; the next stands on the one before.
            let cancel = AtomicBool::new(true);
            let watch = Watch {
                tell: &|_| {},
                cancel: Some(&cancel),
            };
            assert!(run(&request, watch).is_err());
            continue;
        }
        let report = run(&request, silent()).expect("made");
        assert_eq!(report.record.id, id);
        let kind = if round == 0 {
            BackupKind::Full
        } else {
            BackupKind::Incremental
        };
        assert_eq!(report.record.kind, kind);
        times.push((id, frozen));
    }
    for (id, disk) in &times {
        world.require(id, disk, "frozen");
    }
}

#[test]
fn a_backup_is_removed_only_when_none_stands_on_it_and_the_others_stay_whole() {
    let world = World::new();
    let full = world.backup(Wanted::Full).expect("full").record.id;
    world.io(&["write -P 3 1M 64k"]);
    let last = world.backup(Wanted::Incremental).expect("one").record.id;
    let files = world.files();
    let error = remove(&world.folder, &full).expect_err("refused");
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
    assert!(error.found().contains(&last), "{error}");
    assert!(world.files() == files);
    assert_eq!(remove(&world.folder, &last).expect("removed"), last);
    assert_eq!(list(&world.folder).expect("listed").len(), 1);
    assert_eq!(world.files().len(), 3);
    world.require_all_whole("the other");
    // The disk's bitmap began with the one that is gone, so it says nothing here any more.
    let next = world.backup(Wanted::Incremental).expect("one").record;
    assert_eq!(next.kind, BackupKind::Full);
    let missing = world.dir.path().join("missing");
    assert!(remove(&missing, "latest").is_err());
    assert!(!missing.exists());
}
