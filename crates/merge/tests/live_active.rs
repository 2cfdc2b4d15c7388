//! The layer that is written to all the time is merged, too, or the base is raw: no write and no bit is missing, and
//! whoever is killed, there is one disk, and it is said which.

#![allow(
    clippy::disallowed_methods,
    reason = "copies of images in tests need not be durable"
)]

mod common;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::vm::{Vm, Writer, live, merge_under, merge_under_load, usable};
use common::{Small, World, content, restored, sh, silent};
use serde_json::json;
use stead_merge::{
    Becomes, Event, Kind, MergeRequest, Outcome, Recovered, StalePolicy, Step, Watch, plan,
    recover, run_live,
};
use stead_vmm::block_jobs::{self, JobState, Order};

/// All layers above the base go into it.
fn whole(world: &World) -> MergeRequest {
    MergeRequest {
        top: None,
        ..live(world)
    }
}

/// The base alone is the disk, and every bitmap brings its full backup up to date.
fn require_base_is_the_disk(world: &World, story: &str) {
    let base = world.path("base");
    assert!(content(&base) == world.disk, "another disk: {story}");
    for (name, full) in &world.fulls {
        let restored = restored(full, &base, name);
        let restored = restored.unwrap_or_else(|| panic!("{name} is gone: {story}"));
        assert!(restored == world.disk, "{name} says too little: {story}");
    }
    for name in ["active", "child", "top", "mid"] {
        assert!(!world.path(name).exists(), "{name}: {story}");
    }
    assert!(!world.record().exists(), "{story}");
    sh(&format!("qemu-img check -q -f qcow2 {}", base.display()));
}

fn recovered(world: &World) -> Recovered {
    let records = world.dir.path().join("records");
    let done = recover(&world.path("base"), &records, silent()).expect("recovered");
    done.into_iter().next().expect("one merge")
}

#[test]
fn the_active_layer_is_merged_under_a_disk_that_is_written_to_and_no_write_and_no_bit_is_missing() {
    for options in ["", "-o cluster_size=4k"] {
        let mut world = World::new(options);
        // A backup's own is not stale because no layer above has it.
        let backups = "daily@0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a";
        let base = world.path("base");
        sh(&format!(
            "qemu-img bitmap --add {} {backups}",
            base.display()
        ));
        world.fulls.push((backups, content(&base)));
        let vm = Vm::start(&world);
        // One that began while the VM ran is in no file.
        vm.ask(
            "block-dirty-bitmap-add",
            json!({ "node": "disk", "name": "new", "persistent": true }),
        );
        world.fulls.push(("new", world.disk.clone()));
        let request = MergeRequest {
            bytes_per_second: 16 << 20,
            ..whole(&world)
        };
        let planned = plan(&request).expect("planned");
        assert_eq!(planned.refused, []);
        let report = merge_under_load(&mut world, &vm, &request);
        let becomes = |name: &str| {
            let verdict = planned.bitmaps.iter().find(|verdict| verdict.name == name);
            verdict.map(|verdict| verdict.becomes)
        };
        assert_eq!(becomes("shared"), Some(Becomes::Merged));
        assert_eq!(becomes("late"), Some(Becomes::Carried));
        assert_eq!(becomes("new"), Some(Becomes::Carried));
        assert_eq!(becomes("stale-1"), Some(Becomes::Pruned));
        let mut held = report.held.clone();
        held.sort();
        assert_eq!(held, [backups, "late", "new", "shared"]);
        assert_eq!(report.kept, <[std::path::PathBuf; 0]>::default());
        let mut writer = Writer::start(&vm);
        for _ in 0..40 {
            writer.write();
        }
        world.disk = writer.finish(&world.disk);
        vm.quit();
        require_base_is_the_disk(&world, options);
    }
}

/// Why the bitmaps are made while the disk is held, and from the layers' own.
#[test]
fn the_check_can_fail_when_the_new_bitmap_is_made_only_after_the_switch() {
    let mut world = World::new("");
    let vm = Vm::start(&world);
    let mut writer = Writer::start(&vm);
    writer.write();
    world.disk = writer.finish(&world.disk);
    commit_by_hand(&vm, JobState::Pending);
    tell(&vm, Order::Finalize);
    let node = base_node(&vm, &world);
    vm.ask(
        "block-dirty-bitmap-add",
        json!({ "node": node, "name": "late", "persistent": true }),
    );
    vm.quit();
    let base = world.path("base");
    assert!(content(&base) == world.disk);
    let (_, full) = &world.fulls[1];
    assert!(restored(full, &base, "late").expect("it is there") != world.disk);
}

const JOB: &str = "by-hand";

fn tell(vm: &Vm, order: Order) {
    let mut qmp = block_jobs::connect(&vm.socket()).expect("QMP");
    let job: Vec<block_jobs::Job> = qmp.execute("query-jobs", json!({})).expect("jobs");
    block_jobs::tell_job(&mut qmp, &job[0].id, order).expect("told");
}

fn base_node(vm: &Vm, world: &World) -> String {
    let mut qmp = block_jobs::connect(&vm.socket()).expect("QMP");
    let nodes = block_jobs::nodes(&mut qmp).expect("nodes");
    let base = world.path("base");
    let is_base = |node: &&block_jobs::Node| {
        node.driver == "qcow2" && node.file.as_deref() == Some(base.as_path())
    };
    nodes.iter().find(is_base).expect("open").name.clone()
}

fn reach(vm: &Vm, wanted: &JobState) {
    let mut qmp = block_jobs::connect(&vm.socket()).expect("QMP");
    let begun = Instant::now();
    loop {
        let jobs: Vec<block_jobs::Job> = qmp.execute("query-jobs", json!({})).expect("jobs");
        if jobs[0].state == *wanted {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{jobs:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Commits all layers without us, as far as that state.
fn commit_by_hand(vm: &Vm, until: JobState) {
    let mut qmp = block_jobs::connect(&vm.socket()).expect("QMP");
    let nodes = block_jobs::nodes(&mut qmp).expect("nodes");
    let is_base =
        |node: &&block_jobs::Node| node.driver == "qcow2" && ends(node.file.as_deref(), "base");
    let base = nodes.iter().find(is_base).expect("open").name.clone();
    let commit = block_jobs::Commit {
        id: JOB,
        active: "disk",
        top: None,
        base: &base,
        backing_file: None,
        bytes_per_second: 0,
    };
    block_jobs::start_commit(&mut qmp, &commit).expect("started");
    drop(qmp);
    reach(vm, &JobState::Ready);
    if until == JobState::Pending {
        tell(vm, Order::Complete);
        reach(vm, &JobState::Pending);
    }
}

fn ends(path: Option<&Path>, name: &str) -> bool {
    path.and_then(Path::file_stem)
        .is_some_and(|stem| stem == name)
}

/// Runs a merge that ends at a step, as if it had been killed there: what it had begun goes on without it.
fn merge_until(world: &World, last: Step) {
    let request = whole(world);
    let tell = |event: Event| {
        if event == Event::Step(last.clone()) {
            std::panic::resume_unwind(Box::new("killed"));
        }
    };
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        run_live(&request, watch).map(drop)
    }));
    assert!(killed.is_err(), "{last:?} was reached: {killed:?}");
}

/// What the record says where the merge was killed between it and the switch.
fn say_switched(world: &World) {
    let record = fs::read_to_string(world.record()).expect("there");
    let switched = record.replace(r#""phase":"Begun""#, r#""phase":"Switched""#);
    assert_ne!(record, switched);
    fs::write(world.record(), switched).expect("written");
}

#[test]
fn whoever_started_it_may_be_killed_anywhere_and_the_same_command_goes_on() {
    let mut world = World::new("");
    let (kept, disk) = (world.keep(), world.disk.clone());
    for at in [
        "record", "commit", "ready", "pending", "finalize", "remove", "finish",
    ] {
        world.back(&kept);
        world.disk = disk.clone();
        let vm = Vm::start(&world);
        let step = match at {
            "record" => Step::Record,
            "commit" => Step::Commit,
            "finalize" => Step::Finalize,
            "remove" => Step::Remove(world.path("top")),
            "finish" => Step::Finish,
            _ => Step::Bitmaps,
        };
        merge_until(&world, step);
        let mut writer = Writer::start(&vm);
        writer.write();
        if at == "pending" {
            tell(&vm, Order::Complete);
            reach(&vm, &JobState::Pending);
        }
        let request = whole(&world);
        merge_under(&mut world, writer, &request);
        vm.quit();
        require_base_is_the_disk(&world, at);
    }
}

#[test]
fn when_qemu_is_killed_there_is_one_disk_and_bitmaps_that_were_not_saved_are_named() {
    let mut world = World::new("");
    let (kept, disk) = (world.keep(), world.disk.clone());
    for at in ["ready", "pending", "switched", "finalize", "remove"] {
        world.back(&kept);
        world.disk = disk.clone();
        let mut vm = Vm::start(&world);
        let mut writer = Writer::start(&vm);
        writer.write();
        world.disk = writer.finish(&world.disk);
        let step = match at {
            "finalize" => Step::Finalize,
            "remove" => Step::Remove(world.path("active")),
            _ => Step::Bitmaps,
        };
        merge_until(&world, step);
        if at == "pending" || at == "switched" {
            tell(&vm, Order::Complete);
            reach(&vm, &JobState::Pending);
        }
        if at == "switched" {
            say_switched(&world);
        }
        let is_base = at != "ready" && at != "pending";
        if is_base && at != "switched" {
            let mut writer = Writer::start(&vm);
            for _ in 0..20 {
                writer.write();
            }
            world.disk = writer.finish(&world.disk);
        }
        vm.kill();
        let done = recovered(&world);
        if is_base {
            assert_eq!(done.outcome, Outcome::Finished, "{at}");
            assert_eq!(done.lost_bitmaps, ["shared", "late"], "{at}");
            assert!(content(&world.path("base")) == world.disk, "{at}");
            assert!(!world.path("active").exists(), "{at}");
        } else {
            assert_eq!(done.outcome, Outcome::Undone, "{at}");
            assert_eq!(done.lost_bitmaps, ["shared", "stale-1", "stale-2"], "{at}");
            assert!(content(&world.path("active")) == world.disk, "{at}");
        }
        assert!(!world.record().exists(), "{at}");
        assert!(usable(&world.path("base")).is_empty(), "{at}");
    }
}

#[test]
fn qemu_that_ends_in_order_after_the_switch_loses_no_bitmap() {
    let mut world = World::new("");
    let vm = Vm::start(&world);
    merge_until(&world, Step::Finalize);
    let mut writer = Writer::start(&vm);
    for _ in 0..20 {
        writer.write();
    }
    world.disk = writer.finish(&world.disk);
    vm.quit();
    let done = recovered(&world);
    assert_eq!(done.outcome, Outcome::Finished);
    assert_eq!(done.lost_bitmaps, <[String; 0]>::default());
    require_base_is_the_disk(&world, "ended in order");
}

#[test]
fn cancelled_before_the_switch_the_disk_goes_on_in_its_layers_and_can_be_merged_again() {
    let mut world = World::new("");
    let vm = Vm::start(&world);
    let cancel = AtomicBool::new(false);
    let tell = |event: Event| {
        if let Event::Progress { done, .. } = event
            && done > 0
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
        ..whole(&world)
    };
    let error = run_live(&slow, watch).expect_err("cancelled");
    assert_eq!(error.kind(), Kind::Cancelled, "{error}");
    assert!(error.what_is_left().contains("shared"), "{error}");
    assert!(!world.record().exists());
    assert_eq!(vm.ask("query-jobs", json!({})), json!([]));
    let mut writer = Writer::start(&vm);
    writer.write();
    world.disk = writer.finish(&world.disk);
    vm.quit();
    world.require_whole("cancelled");
    let vm = Vm::start(&world);
    let request = whole(&world);
    merge_under_load(&mut world, &vm, &request);
    vm.quit();
    require_base_is_the_disk(&world, "merged after it was cancelled");
}

#[test]
fn a_record_that_cannot_be_written_lets_the_guest_go_on_in_the_active_layer() {
    let mut world = World::new("");
    let kept = world.keep();
    let folder = world.dir.path().to_owned();
    let Some(small) = Small::over(&folder, 80 << 20) else {
        return;
    };
    world.back(&kept);
    let vm = Vm::start(&world);
    let tell = |event: Event| {
        if event == Event::Step(Step::Bitmaps) {
            small.fill(0);
        }
    };
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    // What is pruned would be another write, and leave room.
    let keeping = MergeRequest {
        stale: StalePolicy::Keep,
        ..whole(&world)
    };
    let error = run_live(&keeping, watch).expect_err("the record cannot be written");
    assert_eq!(error.kind(), Kind::NoSpace, "{error}");
    assert!(error.what_is_left().contains("as before"), "{error}");
    assert_eq!(vm.ask("query-jobs", json!({})), json!([]));
    small.make_room();
    let mut writer = Writer::start(&vm);
    writer.write();
    world.disk = writer.finish(&world.disk);
    vm.quit();
    world.require_whole("the guest went on in its layers");
    assert_eq!(
        usable(&world.path("base")),
        ["shared", "stale-1", "stale-2"],
        "what was added is gone"
    );
}

#[test]
fn a_raw_base_keeps_no_bitmap_and_the_merge_says_so_before_it_begins() {
    for top in ["active", "top"] {
        let dir = tempfile::tempdir().expect("temp dir");
        let at = dir.path().display();
        sh(&format!(
            "cd {at} && qemu-img create -q -f raw base.raw 8M && qemu-io -f raw -c 'write -P 1 0 1M' base.raw && \
             qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2 && \
             qemu-io -f qcow2 -c 'write -P 2 512k 2M' top.qcow2 && \
             qemu-img create -q -f qcow2 -b top.qcow2 -F qcow2 active.qcow2 && \
             qemu-img bitmap --add active.qcow2 late && \
             qemu-io -f qcow2 -c 'write -P 3 4M 1M' active.qcow2"
        ));
        let active = dir.path().join("active.qcow2");
        let mut world = World {
            disk: content(&active),
            fulls: Vec::new(),
            dir,
        };
        let vm = Vm::start(&world);
        let base = world.dir.path().join("base.raw");
        let request = MergeRequest {
            top: Some(world.path(top)),
            base: Some(base.clone()),
            ..live(&world)
        };
        let is_active = top == "active";
        if is_active {
            let error = run_live(&request, silent()).expect_err("a bitmap would be lost");
            assert_eq!(error.kind(), Kind::Conflict, "{error}");
            assert!(error.found().contains("late"), "{error}");
        }
        let request = MergeRequest {
            drop_bitmaps: is_active,
            ..request
        };
        merge_under_load(&mut world, &vm, &request);
        vm.quit();
        assert!(!world.path("top").exists());
        if is_active {
            assert!(fs::read(&base).expect("read") == world.disk);
            assert!(!active.exists());
        } else {
            assert!(content(&active) == world.disk);
            assert_eq!(usable(&active), ["late"]);
        }
    }
}
