//! A merge that dies anywhere leaves a chain that shows what it did, with bitmaps that say enough, and recovery ends
//! it one way or the other.

#![allow(
    clippy::disallowed_methods,
    reason = "copies of images in tests need not be durable"
)]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{LAYERS, World, content, silent};
use stead_merge::{Event, Kind, MergeRequest, Outcome, Step, Watch, recover, run};
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::commit::{Chosen, CommitOptions, Incomplete, commit_into};
use stead_qcow2::{Layer, LayerFile, LayerFormat};
use stead_sim::{DiskFault, FaultDisk};
use stead_sys::storage::FileStorage;

const FOLDER: &str = "STEAD_TEST_MERGE_FOLDER";
const STEP: &str = "STEAD_TEST_MERGE_STEP";
const DISK: &str = "STEAD_TEST_MERGE_DISK";
const BASE: &str = "STEAD_TEST_MERGE_BASE";

fn request_in(folder: &Path, whole_chain: bool) -> MergeRequest {
    let path = |name: &str| folder.join(format!("{name}.qcow2"));
    MergeRequest {
        chain: path("active"),
        top: (!whole_chain).then(|| path("top")),
        base: Some(path("base")),
        records: folder.join("records"),
        ..MergeRequest::default()
    }
}

/// Not a test of its own: the process that is killed. Without the variables it does nothing.
#[test]
fn the_merge_that_is_killed() {
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
    let mut request = request_in(Path::new(&folder), std::env::var_os(DISK).is_some());
    if let Some(base) = std::env::var_os(BASE) {
        request.base = Some(base.into());
        request.drop_bitmaps = true;
    }
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    if run(&request, watch).is_err() {
        std::process::exit(7);
    }
}

fn killed(world: &World, step: Option<usize>, whole_chain: bool) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "the_merge_that_is_killed", "--test-threads=1"]);
    command
        .env(FOLDER, world.dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some(step) = step {
        command.env(STEP, step.to_string());
    }
    if whole_chain {
        command.env(DISK, "1");
    }
    command
}

/// Recovers, and gives how it ended; then, if it was undone, merges.
fn recovered(world: &World, story: &str) -> Outcome {
    let base = world.path("base");
    let records = world.dir.path().join("records");
    let done =
        recover(&base, &records, silent()).unwrap_or_else(|error| panic!("{story}: {error}"));
    assert_eq!(done.len(), 1, "{story}");
    assert!(!world.record().exists(), "{story}");
    world.require_whole(story);
    done[0].outcome
}

#[test]
fn killed_at_any_step_the_disk_is_the_same_and_recovery_finishes_or_undoes_it() {
    let world = World::new("");
    let kept = world.keep();
    let (mut finished, mut undone) = (0, 0);
    for step in 0.. {
        world.back(&kept);
        let status = killed(&world, Some(step), false).status().expect("run");
        let story = format!("step {step}");
        if status.success() {
            assert!(step > 6, "all steps were reached: {step}");
            world.require_whole(&story);
            break;
        }
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(6)
        );
        // Between two steps no image is in progress, so the chain can be used even before it is recovered.
        world.require_whole(&story);
        match recovered(&world, &story) {
            Outcome::Finished => {
                finished += 1;
                assert!(
                    !world.path("top").exists() && !world.path("mid").exists(),
                    "{story}"
                );
            }
            Outcome::Undone => {
                undone += 1;
                for (path, bytes) in &kept {
                    assert!(fs::read(path).expect("there") == *bytes, "{story}");
                }
                run(&world.request(), silent()).expect("it can be run again");
                world.require_whole(&story);
            }
            Outcome::NothingToDo => assert!(step < 2, "{story}"),
        }
    }
    assert!(finished >= 4 && undone >= 1, "{finished} {undone}");
}

#[test]
fn killed_at_any_step_of_merging_the_active_layer_the_disk_is_there_under_one_name() {
    let world = World::new("");
    let kept = world.keep();
    for step in 0.. {
        world.back(&kept);
        let status = killed(&world, Some(step), true).status().expect("run");
        let story = format!("step {step}");
        let disk = || match world.path("active").exists() {
            true => world.path("active"),
            false => world.path("base"),
        };
        assert!(content(&disk()) == world.disk, "{story}");
        if status.success() {
            break;
        }
        let done = recover(
            &world.path("base"),
            &world.dir.path().join("records"),
            silent(),
        );
        done.unwrap_or_else(|error| panic!("{story}: {error}"));
        assert!(content(&disk()) == world.disk, "{story}");
        for (name, full) in &world.fulls {
            assert!(
                common::restored(full, &disk(), name).expect("valid") == world.disk,
                "{story} {name}"
            );
        }
    }
    assert!(!world.path("active").exists());
}

/// Some layer is in progress, so that every reader refuses the chain.
fn any_in_progress(world: &World) -> bool {
    let mut paths = LAYERS.iter().map(|name| world.path(name));
    paths.any(|path| path.exists() && in_progress(&path))
}

/// The image is in progress for whoever reads its header.
fn in_progress(path: &Path) -> bool {
    matches!(
        Layer::open(path),
        Err(stead_qcow2::Error::InProgress { .. })
    )
}

fn kill_at_random(world: &World, times: u32) {
    let kept = world.keep();
    let started = Instant::now();
    assert!(killed(world, None, false).status().expect("run").success());
    let whole = started.elapsed();
    let mut seed = 0x5eed_u64;
    for turn in 0..times {
        world.back(&kept);
        let mut process = killed(world, None, false).spawn().expect("run");
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let part = (seed >> 33) % 1000;
        std::thread::sleep(Duration::from_micros(
            u64::try_from(whole.as_micros()).expect("short") * part / 1000,
        ));
        process.kill().expect("killed");
        process.wait().expect("ended");
        let story = format!("turn {turn}, {part} of 1000");
        if !any_in_progress(world) {
            world.require_whole(&story);
        }
        recovered(world, &story);
    }
}

#[test]
fn killed_at_random_times_nothing_is_lost() {
    let soak = std::env::var_os("STEAD_SOAK").is_some();
    kill_at_random(&World::new(""), if soak { 200 } else { 20 });
}

fn commit_on(world: &World, at_call: u64, fault: DiskFault) -> Result<(), stead_qcow2::Error> {
    let file = |name: &str| LayerFile {
        path: world.path(name),
        format: LayerFormat::Qcow2,
    };
    let base = world.path("base");
    let opened = File::options()
        .read(true)
        .write(true)
        .open(&base)
        .expect("there");
    let storage = Arc::new(FileStorage::new(opened).expect("a file"));
    let disk = Arc::new(FaultDisk::new(storage, at_call, fault));
    let mut editor = Editor::on_storage(disk, &base, EditOptions::default())?;
    let options = CommitOptions {
        incomplete: Incomplete::Mark,
        chosen: vec![
            (b"stale-1".to_vec(), Chosen::Remove),
            (b"stale-2".to_vec(), Chosen::Remove),
        ],
        ..CommitOptions::default()
    };
    let above = [file("top"), file("mid")];
    commit_into(
        &mut editor,
        0,
        (&above, &[]),
        &options,
        &stead_qcow2::Control::default(),
    )?;
    Ok(())
}

/// The record is there, and the base fails at its nth call: every one of them.
fn fails_at_every_call(fault: DiskFault) {
    let world = World::new("-o cluster_size=4k");
    let kept = world.keep();
    let record = {
        let steps = [Step::Plan, Step::Record, Step::Commit];
        let status = killed(&world, Some(steps.len() - 1), false)
            .status()
            .expect("run");
        assert!(!status.success() && world.record().exists());
        fs::read(world.record()).expect("there")
    };
    let mut outcomes = [0; 3];
    let mut call = 1;
    loop {
        for (path, bytes) in &kept {
            // The layers that a recovery removes come back as other files; the record has to know them.
            if path.exists() {
                fs::write(path, bytes).expect("written");
            }
        }
        fs::write(world.record(), &record).expect("written");
        let outcome = commit_on(&world, call, fault);
        let story = format!("{fault:?} at call {call}");
        let progress = in_progress(&world.path("base"));
        if !progress {
            world.require_whole(&story);
        }
        // Layers are kept under other names, so that a recovery that finishes does not end the loop.
        let spare: Vec<_> = ["top", "mid"]
            .iter()
            .map(|name| {
                (
                    world.path(name),
                    world.dir.path().join(format!("{name}.spare")),
                )
            })
            .collect();
        for (path, spare) in &spare {
            fs::hard_link(path, spare).expect("linked");
        }
        match recovered(&world, &story) {
            Outcome::Finished => outcomes[0] += 1,
            Outcome::Undone => {
                outcomes[1] += 1;
                assert!(!progress, "{story}");
            }
            Outcome::NothingToDo => outcomes[2] += 1,
        }
        for (path, spare) in &spare {
            if path.exists() {
                fs::remove_file(spare).expect("removed");
            } else {
                fs::rename(spare, path).expect("back");
            }
        }
        if outcome.is_ok() {
            break;
        }
        call += 1;
    }
    assert!(
        outcomes[0] > 1 && outcomes[1] > 10 && outcomes[2] == 0,
        "{outcomes:?} of {call}"
    );
}

#[test]
fn a_full_disk_at_any_write_of_the_commit_is_recovered_from() {
    fails_at_every_call(DiskFault::NoSpace);
}

#[test]
fn a_process_killed_at_any_write_of_the_commit_is_recovered_from() {
    fails_at_every_call(DiskFault::Killed);
}

#[test]
fn without_its_record_a_merge_that_was_cut_off_still_shows_the_same_disk_and_can_be_run_again() {
    let world = World::new("");
    // Before the child names the base; behind that, layers are left over and nothing else.
    for step in [2, 3, 4] {
        let kept = world.keep();
        killed(&world, Some(step), false).status().expect("run");
        fs::remove_file(world.record()).expect("there");
        world.require_whole("without its record");
        run(&world.request(), silent()).expect("merged again");
        world.require_whole("merged again");
        world.back(&kept);
    }
}

#[test]
fn a_record_that_is_damaged_is_refused_and_nothing_is_touched() {
    let world = World::new("");
    killed(&world, Some(4), false).status().expect("run");
    let record = fs::read(world.record()).expect("there");
    for cut in [0, 1, record.len() / 2, record.len() - 1] {
        fs::write(world.record(), &record[..cut]).expect("written");
        let error =
            recover(&world.path("base"), Path::new("/nowhere"), silent()).expect_err("damaged");
        assert!(
            error.kind() == Kind::Damaged && error.next_step().contains("Remove the record"),
            "{error}"
        );
        world.require_whole("a damaged record");
    }
    fs::write(world.record(), &record).expect("written");
    assert_eq!(recovered(&world, "the whole record"), Outcome::Finished);
}

#[test]
fn without_a_record_no_file_that_a_journal_names_is_touched() {
    let dir = tempfile::tempdir().expect("temp dir");
    let image = dir.path().join("image");
    let seed = "../../fuzz/seeds/recover/commit-into-raw";
    let seed = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(seed)).expect("a seed");
    fs::write(&image, &seed).expect("written");
    let error = recover(&image, Path::new("/nowhere"), silent()).expect_err("not allowed");
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.found().contains("writes to \"/raw\""), "{error}");
    assert!(error.next_step().contains("--with"), "{error}");
    assert!(fs::read(&image).expect("read") == seed);
    assert!(!Path::new("/raw").exists());
}

#[test]
fn a_guest_that_wrote_between_a_crash_and_its_recovery_loses_nothing() {
    let world = World::new("");
    // The base has all, the child does not name it yet.
    killed(&world, Some(4), true).status().expect("run");
    assert!(world.record().exists() && world.path("active").exists());
    let active = world.path("active");
    common::sh(&format!(
        "qemu-io -f qcow2 -c 'write -P 9 1M 64k' {}",
        active.display()
    ));
    let disk = content(&active);
    assert!(disk != world.disk);
    let done = recover(&world.path("base"), Path::new("/nowhere"), silent()).expect("recovered");
    assert_eq!(done[0].outcome, Outcome::Undone);
    assert!(content(&active) == disk);
    let request = request_in(world.dir.path(), true);
    run(&request, silent()).expect("merged");
    let base = world.path("base");
    assert!(content(&base) == disk);
    for (name, full) in &world.fulls {
        assert!(
            common::restored(full, &base, name).expect("valid") == disk,
            "{name}"
        );
    }
}

#[test]
fn a_wish_to_stop_before_the_base_is_changed_ends_the_merge_with_everything_as_it_was() {
    let world = World::new("");
    let kept = world.keep();
    for wanted in [Step::Plan, Step::Record] {
        let cancel = AtomicBool::new(false);
        let tell = |event: Event| {
            if event == Event::Step(wanted.clone()) {
                cancel.store(true, Ordering::Relaxed);
            }
        };
        let watch = Watch {
            tell: &tell,
            cancel: Some(&cancel),
        };
        let error = run(&world.request(), watch).expect_err("cancelled");
        assert_eq!(error.kind(), Kind::Cancelled);
        assert!(!world.record().exists());
        for (path, bytes) in &kept {
            assert!(fs::read(path).expect("there") == *bytes);
        }
    }
}

/// The layers over another base, at every step and at random times: the disk stays, and recovery ends it.
fn killed_over(world: &World, base: &Path, image: &Path) {
    let kept = world.keep();
    let bytes = fs::read(image).expect("there");
    let records = world.dir.path().join("records");
    let (active, mut outcomes) = (world.path("active"), [0; 3]);
    for turn in 0..16 {
        world.back(&kept);
        fs::write(image, &bytes).expect("written");
        let step = (turn < 8).then_some(turn);
        let mut command = killed(world, step, false);
        let mut process = command.env(BASE, base).spawn().expect("run");
        if step.is_none() {
            std::thread::sleep(Duration::from_millis(
                u64::try_from(turn).expect("small") * 15 - 100,
            ));
            process.kill().expect("killed");
        }
        process.wait().expect("ended");
        let story = format!("turn {turn}");
        if !any_in_progress(world) && !in_progress(image) {
            assert!(content(&active) == world.disk, "{story}");
        }
        let done =
            recover(base, &records, silent()).unwrap_or_else(|error| panic!("{story}: {error}"));
        let outcome = done[0].outcome;
        outcomes[match outcome {
            Outcome::NothingToDo => 0,
            Outcome::Undone => 1,
            Outcome::Finished => 2,
        }] += 1;
        assert!(content(&active) == world.disk, "{story}");
        assert!(
            fs::read_dir(&records).map_or(0, Iterator::count) == 0,
            "{story}"
        );
        for (name, full) in &world.fulls {
            // Over a raw base they cannot be relied on from the start: the base's part is missing.
            let restored = common::restored(full, &active, name);
            if let (Outcome::Finished, Some(restored)) = (outcome, restored) {
                assert!(restored == world.disk, "{name}: {story}");
            }
        }
    }
    assert!(outcomes[1] > 0 && outcomes[2] > 3, "{outcomes:?}");
}

#[test]
fn killed_over_a_raw_base_the_disk_is_the_same_and_no_bitmap_looks_whole() {
    let world = World::new("");
    let at = world.dir.path().display();
    common::sh(&format!(
        "cd {at} && qemu-img convert -f qcow2 -O raw base.qcow2 base.raw && qemu-img rebase -u -f qcow2 -b base.raw -F raw mid.qcow2"
    ));
    let base = world.dir.path().join("base.raw");
    killed_over(&world, &base, &base);
}

#[test]
fn killed_over_a_block_device_the_record_is_found_in_its_folder() {
    let Some(device) = common::Loop::new(32 << 20) else {
        eprintln!("no loop devices here");
        return;
    };
    let world = World::new("");
    let mut bytes = fs::read(world.path("base")).expect("there");
    bytes.resize(32 << 20, 0);
    fs::write(device.backing(), bytes).expect("written");
    common::sh(&format!(
        "losetup -c {0} && qemu-img rebase -u -f qcow2 -b {0} -F qcow2 {1}",
        device.device.display(),
        world.path("mid").display()
    ));
    killed_over(&world, &device.device, device.backing());
}
