//! Layers are merged under a running QEMU whose disk is written to all the time; whoever is killed, and whatever is
//! full, the disk is right and a bitmap is whole or named.
//!
//! QEMU runs without a guest here: the disk is written through its NBD server, as a guest would through virtio.

#![allow(
    clippy::disallowed_methods,
    reason = "copies of images in tests need not be durable"
)]

mod common;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::vm::{Vm, Writer, live, merge_under_load, usable};
use common::{Small, World, content, silent};
use serde_json::json;
use stead_merge::{
    Becomes, Event, Kind, MergeRequest, Outcome, StalePolicy, Step, Watch, plan, recover, run,
    run_live,
};
use stead_vmm::block_jobs;

fn slow(world: &World) -> MergeRequest {
    MergeRequest {
        bytes_per_second: 4 << 20,
        ..live(world)
    }
}

#[test]
fn layers_are_merged_under_a_disk_that_is_written_to_and_every_backup_goes_on() {
    for options in ["", "-o cluster_size=4k"] {
        let mut world = World::new(options);
        let vm = Vm::start(&world);
        let request = slow(&world);
        let report = merge_under_load(&mut world, &vm, &request);
        let plan = report.plan.expect("planned here");
        let becomes = |name: &str| {
            let verdict = plan.bitmaps.iter().find(|verdict| verdict.name == name);
            verdict.map(|verdict| verdict.becomes)
        };
        assert_eq!(becomes("shared"), Some(Becomes::Merged));
        assert_eq!(becomes("late"), Some(Becomes::Carried));
        assert_eq!(becomes("stale-1"), Some(Becomes::Pruned));
        assert_eq!(
            usable(&world.path("base")),
            ["late", "shared"],
            "while QEMU runs"
        );
        assert!(!world.path("top").exists() && !world.path("mid").exists());
        assert!(!world.record().exists());
        // It runs on, and so does the disk.
        let mut writer = Writer::start(&vm);
        for _ in 0..40 {
            writer.write();
        }
        world.disk = writer.finish(&world.disk);
        vm.quit();
        world.require_whole(options);
        let chain = common::open(&world.path("active"));
        assert_eq!(chain.depth(), 3, "active, child, base");
    }
}

const FOLDER: &str = "STEAD_TEST_LIVE_FOLDER";
const STEP: &str = "STEAD_TEST_LIVE_STEP";

/// Not a test of its own: the process that is killed. Without the variables it does nothing.
#[test]
fn the_live_merge_that_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        return;
    };
    let last: usize = std::env::var(STEP).expect("set").parse().expect("a number");
    let seen = AtomicUsize::new(0);
    let tell = |event: Event| {
        if let Event::Step(_) = event
            && seen.fetch_add(1, Ordering::Relaxed) == last
        {
            std::process::abort();
        }
    };
    let path = |name: &str| folder.join(format!("{name}.qcow2"));
    let request = MergeRequest {
        chain: path("active"),
        top: Some(path("top")),
        base: Some(path("base")),
        records: folder.join("records"),
        qmp: Some(folder.join("qmp")),
        ..MergeRequest::default()
    };
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    run_live(&request, watch).expect("merged");
}

#[test]
fn whoever_started_it_may_be_killed_at_any_step_and_the_same_command_goes_on() {
    let mut world = World::new("");
    let kept = world.keep();
    let disk = world.disk.clone();
    let mut killed = 0;
    for step in 0.. {
        world.back(&kept);
        world.disk = disk.clone();
        let vm = Vm::start(&world);
        let status = Command::new(std::env::current_exe().expect("this program"))
            .args([
                "--exact",
                "the_live_merge_that_is_killed",
                "--test-threads=1",
            ])
            .env(FOLDER, world.dir.path())
            .env(STEP, step.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("run");
        let mut writer = Writer::start(&vm);
        writer.write();
        world.disk = writer.finish(&world.disk);
        if status.success() {
            break;
        }
        killed += 1;
        let request = live(&world);
        let is_over = !world.record().exists() && !world.path("top").exists();
        if !is_over {
            let report = merge_under_load(&mut world, &vm, &request);
            assert!(report.kept.is_empty(), "step {step}: {report:?}");
        }
        assert_eq!(
            usable(&world.path("base")),
            ["late", "shared"],
            "step {step}"
        );
        vm.quit();
        assert!(!world.path("top").exists() && !world.path("mid").exists());
        world.require_whole(&format!("step {step}"));
    }
    assert!(
        killed >= 7,
        "plan, record, commit, bitmaps, finalize, prove, remove: {killed}"
    );
}

#[test]
fn when_qemu_is_killed_the_disk_is_right_and_bitmaps_that_were_not_saved_are_named() {
    let world = World::new("");
    let kept = world.keep();
    let (mut finished, mut undone) = (0, 0);
    for at in [Step::Commit, Step::Bitmaps, Step::Finalize, Step::Prove] {
        for delay_ms in [0, 30] {
            world.back(&kept);
            let story = format!("{at:?}, {delay_ms} ms later");
            let vm = Mutex::new(Some(Vm::start(&world)));
            let socket = world.dir.path().join("qmp");
            let killer = |event: Event| {
                if event == Event::Step(at.clone())
                    && let Some(mut vm) = vm.lock().expect("lock").take()
                {
                    if delay_ms == 0 {
                        return vm.kill();
                    }
                    std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_millis(delay_ms));
                        vm.kill();
                    });
                }
            };
            let watch = Watch {
                tell: &killer,
                cancel: None,
            };
            let done = run_live(&slow(&world), watch);
            // The one that kills it has it in its hands until it has ended.
            let begun = Instant::now();
            while delay_ms > 0 && socket.exists() && begun.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(10));
            }
            drop(vm.lock().expect("lock").take());
            assert!(content(&world.path("active")) == world.disk, "{story}");
            if world.record().exists() {
                let records = world.dir.path().join("records");
                let ended = recover(&world.path("base"), &records, silent());
                let ended = ended.unwrap_or_else(|error| panic!("{story}: {error}"));
                let base = usable(&world.path("base"));
                for name in ["late", "shared"] {
                    let is_there = base.contains(&name.to_owned());
                    let was_there = name == "shared" || ended[0].outcome == Outcome::Finished;
                    let is_named = ended[0].lost_bitmaps.contains(&name.to_owned());
                    assert!(
                        is_there || is_named || !was_there,
                        "{story}: {name}: {ended:?}"
                    );
                    assert!(!(is_there && is_named), "{story}: {name}: {ended:?}");
                }
                match ended[0].outcome {
                    Outcome::Finished => finished += 1,
                    Outcome::Undone => undone += 1,
                    Outcome::NothingToDo => panic!("{story}: {ended:?}"),
                }
            } else {
                assert!(
                    done.is_ok() || world.path("top").exists(),
                    "{story}: {done:?}"
                );
            }
            assert!(!world.record().exists(), "{story}");
            assert!(content(&world.path("active")) == world.disk, "{story}");
            if world.path("top").exists() && common::open(&world.path("active")).depth() == 5 {
                run(&world.request(), silent()).unwrap_or_else(|error| panic!("{story}: {error}"));
                assert!(content(&world.path("active")) == world.disk, "{story}");
            }
        }
    }
    assert!(undone > 0 && finished + undone > 2, "{finished} {undone}");
}

#[test]
fn a_merge_that_is_cancelled_or_refused_leaves_the_chain_as_it_was() {
    let mut world = World::new("");
    let vm = Vm::start(&world);
    let error = run_live(&world.request(), silent()).expect_err("no socket");
    assert_eq!(error.kind(), Kind::Usage, "{error}");
    let other = World::new("");
    let elsewhere = MergeRequest {
        qmp: Some(vm.socket()),
        ..other.request()
    };
    let error = run_live(&elsewhere, silent()).expect_err("another disk");
    assert_eq!(error.kind(), Kind::Usage, "{error}");
    assert!(!other.record().exists() && !world.record().exists());
    let cancel = AtomicBool::new(false);
    let tell = |event: Event| {
        if let Event::Progress { done, total } = event
            && done > 0
            && done < total
        {
            cancel.store(true, Ordering::Relaxed);
        }
    };
    let watch = Watch {
        tell: &tell,
        cancel: Some(&cancel),
    };
    let slow = MergeRequest {
        bytes_per_second: 1 << 20,
        ..live(&world)
    };
    let error = run_live(&slow, watch).expect_err("cancelled");
    assert_eq!(error.kind(), Kind::Cancelled, "{error}");
    assert!(!world.record().exists());
    assert_eq!(vm.ask("query-jobs", json!({})), json!([]));
    assert_eq!(
        usable(&world.path("base")),
        ["shared", "stale-1", "stale-2"]
    );
    let planned = plan(&live(&world));
    assert!(planned.expect("planned").refused.is_empty());
    let request = live(&world);
    merge_under_load(&mut world, &vm, &request);
    vm.quit();
    world.require_whole("merged after it was cancelled");
}

#[test]
fn a_full_disk_makes_it_stand_still_and_one_that_takes_the_bitmaps_is_told_with_their_names() {
    let mut world = World::new("");
    let (kept, disk) = (world.keep(), world.disk.clone());
    let folder = world.dir.path().to_owned();
    let Some(small) = Small::over(&folder, 80 << 20) else {
        return;
    };
    // Full while the data goes in: it stands still until there is room.
    world.back(&kept);
    let vm = Vm::start(&world);
    let (filled, still) = (AtomicBool::new(false), AtomicUsize::new(0));
    let tell = |event: Event| match event {
        Event::Progress { done, .. } if done > 0 && !filled.swap(true, Ordering::Relaxed) => {
            small.fill(0);
        }
        Event::Notice(_) => {
            still.fetch_add(1, Ordering::Relaxed);
            small.make_room();
        }
        Event::Step(_) | Event::Progress { .. } => {}
    };
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    let slow = MergeRequest {
        bytes_per_second: 2 << 20,
        ..live(&world)
    };
    run_live(&slow, watch).expect("merged when there was room");
    assert_eq!(still.load(Ordering::Relaxed), 1, "it stood still once");
    vm.quit();
    world.require_whole("full for a while");
    // Full when QEMU stores the bitmaps, of which it says nothing.
    world.back(&kept);
    world.disk = disk;
    let vm = Vm::start(&world);
    let tell = |event: Event| {
        if event == Event::Step(Step::Finalize) {
            small.fill(0);
        }
    };
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    // What is pruned would leave room in the file for the others.
    let keeping = MergeRequest {
        stale: StalePolicy::Keep,
        ..live(&world)
    };
    let done = run_live(&keeping, watch);
    let all = ["late", "shared", "stale-1", "stale-2"];
    let unusable: Vec<&str> = all
        .into_iter()
        .filter(|name| !usable(&world.path("base")).contains(&(*name).to_owned()))
        .collect();
    let error = done.expect_err("bitmaps were lost silently");
    assert_eq!(error.kind(), Kind::Damaged, "{error}");
    assert_eq!(unusable, all, "{error}");
    for name in unusable {
        assert!(error.found().contains(name), "{name}: {error}");
    }
    assert!(world.path("top").exists() && world.path("mid").exists());
    small.make_room();
    vm.quit();
    assert!(content(&world.path("active")) == world.disk);
}

/// What the one above would be without reading the file: QEMU's own word.
#[test]
fn qemu_itself_calls_a_job_complete_without_error_when_every_bitmap_was_lost() {
    let world = World::new("");
    let kept = world.keep();
    let folder = world.dir.path().to_owned();
    let Some(small) = Small::over(&folder, 80 << 20) else {
        return;
    };
    world.back(&kept);
    let vm = Vm::start(&world);
    let mut qmp = block_jobs::connect(&vm.socket()).expect("QMP");
    let nodes = block_jobs::nodes(&mut qmp).expect("nodes");
    let node = |layer: &str| {
        let is_it = |node: &&block_jobs::Node| {
            node.driver == "qcow2" && node.file.as_deref() == Some(&world.path(layer))
        };
        nodes.iter().find(is_it).expect("open").name.clone()
    };
    let commit = block_jobs::Commit {
        id: "plain",
        active: "disk",
        top: Some(&node("top")),
        base: &node("base"),
        backing_file: None,
        bytes_per_second: 0,
    };
    block_jobs::start_commit(&mut qmp, &commit).expect("started");
    let mut reach = |wanted: block_jobs::JobState| {
        let begun = Instant::now();
        loop {
            let job = block_jobs::job(&mut qmp, "plain").expect("asked");
            let job = job.expect("it is kept until it is dismissed");
            if job.state == wanted {
                return job;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{job:?}");
            if job.state == block_jobs::JobState::Pending {
                small.fill(0);
                block_jobs::tell_job(&mut qmp, "plain", block_jobs::Order::Finalize)
                    .expect("finalized");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let job = reach(block_jobs::JobState::Concluded);
    assert_eq!(job.error, None);
    assert_eq!(usable(&world.path("base")), <[String; 0]>::default());
    small.make_room();
}
