//! A backup that dies or fails anywhere: what is recorded can be restored, and no change is forgotten.

#![allow(
    clippy::disallowed_methods,
    reason = "files of tests need not be durable"
)]

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{World, silent};
use stead_backup::{
    BackupKind, BackupRequest, DiskSource, Event, Wanted, Watch, list, run, verify,
};
use stead_qcow2::edit::{JournalFiles, recover};

const FOLDER: &str = "STEAD_TEST_BACKUP_FOLDER";
const STEP: &str = "STEAD_TEST_BACKUP_STEP";
const WANTED: &str = "STEAD_TEST_BACKUP_FULL";

/// Not a test of its own: the process that is killed. Without the variables it does nothing.
#[test]
fn the_backup_that_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let last = std::env::var(STEP)
        .ok()
        .and_then(|step| step.parse::<usize>().ok());
    let seen = AtomicUsize::new(0);
    let tell = |event: Event| {
        if let Event::Step(_) = event
            && Some(seen.fetch_add(1, Ordering::Relaxed)) == last
        {
            std::process::abort();
        }
    };
    let folder = Path::new(&folder);
    let request = BackupRequest {
        disk: DiskSource::Image(folder.join("disk.qcow2")),
        bitmap: "daily".into(),
        to: folder.join("backups"),
        wanted: match std::env::var_os(WANTED) {
            Some(_) => Wanted::Full,
            None => Wanted::Incremental,
        },
        compress: true,
    };
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    if run(&request, watch).is_err() {
        std::process::exit(7);
    }
}

/// A process that makes a backup, started by a shell that does `before` first.
fn process(world: &World, before: &str, full: bool) -> Command {
    let mut command = Command::new("sh");
    let program = std::env::current_exe().expect("this program");
    command.args(["-c", &format!("{before} exec \"$@\""), "sh"]);
    command
        .arg(program)
        .args(["--exact", "the_backup_that_is_killed", "--test-threads=1"])
        .env(FOLDER, world.dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if full {
        command.env(WANTED, "1");
    }
    command
}

fn killed_at(world: &World, step: usize, full: bool) -> ExitStatus {
    let mut command = process(world, "", full);
    command.env(STEP, step.to_string());
    command.status().expect("run")
}

/// All that is recorded is whole, and the next backup shows the disk.
fn goes_on(world: &World, write: &str, story: &str) -> BackupKind {
    if world.folder.exists() {
        world.require_all_whole(story);
    }
    // The kill may have hit the change of the bitmaps, which QEMU then refuses to look at.
    recover(&world.disk, &JournalFiles::Nothing).unwrap_or_else(|error| panic!("{story}: {error}"));
    world.io(&[write]);
    let report = world.backup(Wanted::Incremental);
    let report = report.unwrap_or_else(|error| panic!("{story}: {error}"));
    world.require(&report.record.id, &world.content(), story);
    let leftovers = world.files().into_iter().filter(|(path, _)| {
        let name = path.file_name().expect("a name").to_string_lossy();
        name.starts_with(".partial") || name.ends_with(".begun")
    });
    assert_eq!(leftovers.count(), 0, "{story}");
    let listed = list(&world.folder).expect("listed");
    assert_eq!(world.files().len(), listed.len() * 3, "{story}");
    assert_eq!(world.bitmaps(), [report.next_bitmap], "{story}");
    report.record.kind
}

#[test]
fn killed_at_any_step_no_change_is_forgotten_and_what_is_recorded_is_whole() {
    for full in [true, false] {
        let world = World::new();
        if !full {
            world.backup(Wanted::Full).expect("full");
        }
        let mut ended = false;
        for step in 0..20 {
            let story = format!("full: {full}, step {step}");
            world.io(&[&format!("write -P {} {}k 64k", step + 30, step * 192)]);
            let recorded = list(&world.folder).map_or(0, |all| all.len());
            let status = killed_at(&world, step, full);
            if status.success() {
                assert!(step >= 6, "all steps were reached: {step}");
                ended = true;
                break;
            }
            assert_eq!(status.signal(), Some(6), "{story}");
            let now = list(&world.folder).map_or(0, |all| all.len());
            assert_eq!(
                now - recorded,
                usize::from(step == 5),
                "the record is there from step 5 on"
            );
            let kind = goes_on(&world, &format!("write -P {} 7M 4k", step + 60), &story);
            // Only where there was no backup yet is a full one needed again.
            let first = full && step == 0;
            assert_eq!(kind == BackupKind::Full, first, "{story}");
        }
        assert!(ended);
    }
}

#[test]
fn killed_at_random_times_no_change_is_forgotten() {
    let world = World::new();
    world.backup(Wanted::Full).expect("full");
    let mut delay = 1_u64;
    for round in 0..8 {
        world.io(&[&format!("write -P {} {}k 256k", round + 30, round * 256)]);
        let mut child = process(&world, "", round % 2 == 0).spawn().expect("run");
        std::thread::sleep(std::time::Duration::from_millis(delay * 3 % 97));
        child.kill().expect("killed");
        child.wait().expect("ended");
        delay = delay * 31 % 1009;
        let kind = goes_on(&world, "write -P 99 7M 4k", &format!("round {round}"));
        assert_eq!(kind, BackupKind::Incremental);
    }
}

#[test]
fn a_file_system_that_takes_no_more_costs_the_backup_only() {
    for full in [true, false] {
        let world = World::new();
        world.backup(Wanted::Full).expect("full");
        world.io(&["write -P 3 1M 700k", "write -P 4 6M 300k"]);
        let disk = fs::read(&world.disk).expect("there");
        let (files, content, bitmaps) = (world.files(), world.content(), world.bitmaps());
        let mut failed = 0;
        // Files may be so many blocks of 512 bytes long; what is longer already stays.
        for blocks in [0, 1, 2, 64, 300, 600, 1000, 1400, 1800] {
            let before = format!("trap '' XFSZ; ulimit -f {blocks};");
            let status = process(&world, &before, full).status().expect("run");
            if status.success() {
                break;
            }
            let story = format!("full: {full}, {blocks} blocks");
            assert_eq!(status.code(), Some(7), "{story}");
            failed += 1;
            if list(&world.folder).expect("listed").len() > 1 {
                // Only the bitmap could not be changed any more.
                assert!(world.content() == content, "{story}");
                assert_eq!(world.bitmaps(), bitmaps, "{story}");
                world.require_all_whole(&story);
                break;
            }
            assert!(fs::read(&world.disk).expect("there") == disk, "{story}");
            assert!(world.files() == files, "{story}");
        }
        assert!(failed >= 3, "{failed}");
        goes_on(&world, "write -P 5 3M 64k", "room again");
    }
}

#[test]
fn the_crash_test_can_fail_when_the_bitmap_changes_before_the_record() {
    let world = World::new();
    world.backup(Wanted::Full).expect("full");
    world.io(&["write -P 3 1M 64k"]);
    // What a program does that clears the bitmap first, and dies before the backup is recorded.
    let (disk, name) = (world.disk.display().to_string(), world.bitmaps().remove(0));
    common::sh(&format!("qemu-img bitmap --clear {disk} {name}"));
    assert_eq!(killed_at(&world, 3, false).signal(), Some(6));
    world.io(&["write -P 4 6M 64k"]);
    let report = world.backup(Wanted::Incremental).expect("incremental");
    let restored = world.restored(&report.record.id).expect("restored");
    assert!(
        restored != world.content(),
        "the change is forgotten, and it is seen"
    );
    assert!(
        verify(&world.folder, None, silent())
            .expect("read")
            .iter()
            .all(|one| one.whole)
    );
}
