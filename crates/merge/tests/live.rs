//! Layers are merged under a running QEMU whose disk is written to all the time; whoever is killed, and whatever is
//! full, the disk is right and a bitmap is whole or named.
//!
//! QEMU runs without a guest here: the disk is written through its NBD server, as a guest would through virtio.

#![allow(
    clippy::disallowed_methods,
    reason = "copies of images in tests need not be durable"
)]

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{World, content, silent};
use serde_json::{Value, json};
use stead_merge::{
    Becomes, Event, Kind, MergeRequest, Outcome, StalePolicy, Step, Watch, plan, recover, run,
    run_live,
};
use stead_qcow2::Layer;
use stead_vmm::block_jobs;

/// A QEMU that has the chain open, its active layer for writing.
struct Vm {
    qemu: Child,
    folder: PathBuf,
}

impl Vm {
    fn start(world: &World) -> Self {
        let folder = world.dir.path().to_owned();
        let active = world.path("active").display().to_string();
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-machine", "none", "-nodefaults", "-display", "none", "-S"])
            .arg("-qmp")
            .arg(format!("unix:{}/qmp,server=on,wait=off", folder.display()))
            .arg("-blockdev")
            .arg(format!("driver=file,node-name=disk.f,filename={active}"))
            .args(["-blockdev", "driver=qcow2,node-name=disk,file=disk.f"])
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU");
        let vm = Self { qemu, folder };
        let begun = Instant::now();
        while !vm.socket().exists() {
            assert!(begun.elapsed() < Duration::from_secs(30), "QEMU listens");
            std::thread::sleep(Duration::from_millis(10));
        }
        let nbd = vm.folder.join("nbd").display().to_string();
        let address = json!({ "addr": { "type": "unix", "data": { "path": nbd } } });
        vm.ask("nbd-server-start", address);
        let export = json!({ "type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": true });
        vm.ask("block-export-add", export);
        vm
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("qmp")
    }

    fn ask(&self, command: &str, arguments: Value) -> Value {
        let mut qmp = block_jobs::connect(&self.socket()).expect("QMP");
        qmp.execute(command, arguments).expect("answered")
    }

    /// Ends it in order: bitmaps are stored.
    fn quit(mut self) {
        let mut qmp = block_jobs::connect(&self.socket()).expect("QMP");
        qmp.execute::<Value>("quit", json!({})).expect("quits");
        self.qemu.wait().expect("ends");
        self.clean();
    }

    fn kill(&mut self) {
        self.qemu.kill().expect("killed");
        self.qemu.wait().expect("ends");
        self.clean();
    }

    fn clean(&self) {
        for name in ["qmp", "nbd"] {
            let path = self.folder.join(name);
            if path.exists() {
                fs::remove_file(path).expect("removed");
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        drop(self.qemu.kill());
        drop(self.qemu.wait());
    }
}

/// Writes to the disk until it is stopped, and knows what it wrote.
struct Writer {
    qemu_io: Child,
    /// Pattern, and where: 64 KiB each.
    written: Vec<(u8, usize)>,
}

const PIECE: usize = 64 << 10;

impl Writer {
    fn start(vm: &Vm) -> Self {
        let nbd = format!("nbd+unix:///disk?socket={}/nbd", vm.folder.display());
        let qemu_io = Command::new("qemu-io")
            .args(["-f", "raw", &nbd])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-io");
        Self {
            qemu_io,
            written: Vec::new(),
        }
    }

    /// Writes one piece somewhere.
    fn write(&mut self) {
        let number = self.written.len();
        let pattern = 100 + u8::try_from(number % 100).expect("small");
        let at = (number * 37 % 128) * PIECE;
        let stdin = self.qemu_io.stdin.as_mut().expect("piped");
        writeln!(stdin, "write -P {pattern} {at} {PIECE}").expect("qemu-io runs");
        self.written.push((pattern, at));
    }

    /// Waits until everything is written, and says what the disk has now.
    fn finish(mut self, disk: &[u8]) -> Vec<u8> {
        let mut stdin = self.qemu_io.stdin.take().expect("piped");
        stdin.write_all(b"flush\nquit\n").expect("qemu-io runs");
        drop(stdin);
        assert!(self.qemu_io.wait().expect("ends").success());
        let mut disk = disk.to_vec();
        for (pattern, at) in &self.written {
            disk[*at..at + PIECE].fill(*pattern);
        }
        disk
    }
}

/// Merges while the disk is written to.
fn merge_under_load(world: &mut World, vm: &Vm, request: &MergeRequest) -> stead_merge::LiveReport {
    let writer = Mutex::new(Writer::start(vm));
    let tell = |_: Event| writer.lock().expect("lock").write();
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    let report = run_live(request, &vm.socket(), watch).expect("merged");
    world.disk = writer.into_inner().expect("lock").finish(&world.disk);
    report
}

fn slow(world: &World) -> MergeRequest {
    MergeRequest {
        bytes_per_second: 4 << 20,
        ..world.request()
    }
}

/// Bitmaps of a layer, by what its file says, that a backup could use.
fn usable(path: &Path) -> Vec<String> {
    let stored = Layer::inspect(path).expect("whole").stored_bitmaps();
    let stored = stored.expect("readable");
    let usable = stored.iter().filter(|one| !one.in_use && one.auto);
    let mut names: Vec<String> = usable
        .map(|one| String::from_utf8_lossy(&one.name).into_owned())
        .collect();
    names.sort();
    names
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
        ..MergeRequest::default()
    };
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    run_live(&request, &folder.join("qmp"), watch).expect("merged");
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
        let request = world.request();
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
            let done = run_live(&slow(&world), &socket, watch);
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
    let whole = MergeRequest {
        top: None,
        ..world.request()
    };
    let error = run_live(&whole, &vm.socket(), silent()).expect_err("the active layer");
    assert_eq!(error.kind(), Kind::Usage, "{error}");
    let other = World::new("");
    let error = run_live(&other.request(), &vm.socket(), silent()).expect_err("another disk");
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
        ..world.request()
    };
    let error = run_live(&slow, &vm.socket(), watch).expect_err("cancelled");
    assert_eq!(error.kind(), Kind::Cancelled, "{error}");
    assert!(!world.record().exists());
    assert_eq!(vm.ask("query-jobs", json!({})), json!([]));
    assert_eq!(
        usable(&world.path("base")),
        ["shared", "stale-1", "stale-2"]
    );
    let planned = plan(&MergeRequest {
        live: true,
        ..world.request()
    });
    assert!(planned.expect("planned").refused.is_empty());
    let request = world.request();
    merge_under_load(&mut world, &vm, &request);
    vm.quit();
    world.require_whole("merged after it was cancelled");
}

/// A small file system in the place of a world's folder.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    /// `None` where one cannot be had.
    fn over(folder: &'a Path, bytes: u64) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o"])
            .arg(format!("size={bytes}"));
        let mounted = mount.arg("tmpfs").arg(folder).status().ok()?;
        mounted.success().then_some(Self(folder))
    }

    /// Leaves so many bytes free.
    fn fill(&self, leave: u64) {
        let free = stead_sys::space::available_bytes(self.0).expect("free");
        let length = usize::try_from(free.saturating_sub(leave)).expect("small");
        fs::write(self.0.join("filler"), vec![1; length]).expect("filled");
    }

    fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).expect("removed");
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        // A test that failed may still have files open there.
        drop(Command::new("umount").arg("-l").arg(self.0).status());
    }
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
        ..world.request()
    };
    run_live(&slow, &vm.socket(), watch).expect("merged when there was room");
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
        ..world.request()
    };
    let done = run_live(&keeping, &vm.socket(), watch);
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
        top: &node("top"),
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
