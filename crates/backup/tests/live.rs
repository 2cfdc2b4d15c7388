//! The disk of a running QEMU is backed up while it is written: what is restored is the disk of one instant, and whoever is
//! killed, the VM runs on and no change is forgotten.
//!
//! QEMU runs without a guest here: the disk is written through its NBD server, as a guest would through virtio.

#![allow(
    clippy::disallowed_methods,
    reason = "files of tests need not be durable"
)]

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{World, sh, silent};
use serde_json::{Value, json};
use stead_backup::{
    BackupError, BackupKind, BackupReport, Event, FolderVault, Kind, LiveOrder, Step, Wanted,
    Watch, list, run_live,
};
use stead_vmm::{block_backup, block_jobs};

const FOLDER: &str = "STEAD_TEST_LIVE_FOLDER";
const STEP: &str = "STEAD_TEST_LIVE_STEP";
const WANTED: &str = "STEAD_TEST_LIVE_FULL";
const PIECE: usize = 64 << 10;

fn order(folder: &Path, wanted: Wanted) -> LiveOrder {
    LiveOrder {
        disk: folder.join("disk.qcow2"),
        qmp: folder.join("qmp"),
        bitmap: "daily".into(),
        wanted,
        staging: folder.to_owned(),
    }
}

fn back_up(folder: &Path, wanted: Wanted, watch: Watch<'_>) -> Result<BackupReport, BackupError> {
    let open = || FolderVault::open(&folder.join("backups"), false);
    run_live(&order(folder, wanted), open, watch)
}

/// A QEMU that has the world's disk open.
struct Vm {
    qemu: Child,
    folder: PathBuf,
}

impl Vm {
    fn start(world: &World) -> Self {
        let folder = world.dir.path().to_owned();
        for name in ["qmp", "nbd"] {
            if folder.join(name).exists() {
                fs::remove_file(folder.join(name)).expect("removed");
            }
        }
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-machine", "none", "-nodefaults", "-display", "none", "-S"])
            .arg("-qmp")
            .arg(format!("unix:{}/qmp,server=on,wait=off", folder.display()))
            .arg("-blockdev")
            .arg(format!(
                "driver=file,node-name=disk.f,filename={}",
                world.disk.display()
            ))
            .args(["-blockdev", "driver=qcow2,node-name=disk,file=disk.f"])
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU");
        let vm = Self { qemu, folder };
        let begun = Instant::now();
        // The socket is there before QEMU listens at it.
        while block_jobs::connect(&vm.folder.join("qmp")).is_err() {
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

    fn ask(&self, command: &str, arguments: Value) -> Value {
        let mut qmp = block_jobs::connect(&self.folder.join("qmp")).expect("QMP");
        qmp.execute(command, arguments).expect("answered")
    }

    fn nbd(&self) -> String {
        format!("nbd+unix:///disk?socket={}/nbd", self.folder.display())
    }

    fn io(&self, command: &str) {
        sh(&format!("qemu-io -f raw -c '{command}' '{}'", self.nbd()));
    }

    /// What a guest reads.
    fn content(&self) -> Vec<u8> {
        let raw = self.folder.join("content.raw");
        sh(&format!(
            "qemu-img convert -f raw -O raw '{}' {}",
            self.nbd(),
            raw.display()
        ));
        fs::read(&raw).expect("there")
    }

    /// Names of its bitmaps, jobs, and nodes besides those that it began with.
    fn state(&self) -> (Vec<String>, Vec<String>, Vec<String>) {
        let mut qmp = block_jobs::connect(&self.folder.join("qmp")).expect("QMP");
        let nodes = block_jobs::nodes(&mut qmp).expect("nodes");
        let jobs = block_backup::jobs(&mut qmp).expect("jobs");
        let bitmaps = nodes.iter().flat_map(|node| &node.bitmaps);
        let bitmaps = bitmaps.map(|one| one.name.clone()).collect();
        let other = |name: &String| !name.starts_with("disk") && !name.starts_with('#');
        let nodes = nodes.iter().map(|node| node.name.clone()).filter(other);
        (
            bitmaps,
            jobs.into_iter().map(|job| job.id).collect(),
            nodes.collect(),
        )
    }

    fn quit(mut self) {
        let mut qmp = block_jobs::connect(&self.folder.join("qmp")).expect("QMP");
        qmp.execute::<Value>("quit", json!({})).expect("quits");
        self.qemu.wait().expect("ends");
    }

    fn kill(mut self) {
        self.qemu.kill().expect("killed");
        self.qemu.wait().expect("ends");
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        drop(self.qemu.kill());
        drop(self.qemu.wait());
    }
}

/// Writes pieces, one after the other, and gives them in order: pattern and offset.
fn write_until(vm: &Vm, done: &AtomicBool, from: usize) -> Vec<(u8, usize)> {
    let mut qemu_io = Command::new("qemu-io")
        .args(["-f", "raw", &vm.nbd()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-io");
    let mut written = Vec::new();
    let mut stdin = qemu_io.stdin.take().expect("piped");
    while !done.load(Ordering::Relaxed) {
        let number = from + written.len();
        let pattern = 100 + u8::try_from(number % 100).expect("small");
        let at = number * 37 % 128 * PIECE;
        writeln!(stdin, "write -P {pattern} {at} {PIECE}").expect("qemu-io runs");
        written.push((pattern, at));
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(stdin);
    assert!(qemu_io.wait().expect("ends").success());
    written
}

/// Whether `found` is `disk` after some number of writes; that number.
fn instant(found: &[u8], disk: &[u8], writes: &[(u8, usize)]) -> Option<usize> {
    let mut now = disk.to_vec();
    for (count, (pattern, at)) in writes.iter().enumerate() {
        if now == found {
            return Some(count);
        }
        now[*at..*at + PIECE].fill(*pattern);
    }
    (now == found).then_some(writes.len())
}

#[test]
fn the_check_of_the_instant_can_fail_when_a_later_write_is_there_and_an_earlier_is_not() {
    let disk = vec![0; 4 * PIECE];
    let writes = [(1, 0), (2, PIECE), (3, 2 * PIECE)];
    let mut found = disk.clone();
    found[..PIECE].fill(1);
    assert_eq!(instant(&found, &disk, &writes), Some(1));
    found[2 * PIECE..3 * PIECE].fill(3);
    assert_eq!(instant(&found, &disk, &writes), None);
}

#[test]
fn a_running_disk_is_backed_up_as_it_was_at_one_instant_while_it_is_written() {
    let world = World::new();
    let vm = Vm::start(&world);
    let mut writes = 0;
    let mut last = None;
    for round in 0..4 {
        let wanted = match round {
            0 => Wanted::Full,
            _ => Wanted::IncrementalOnly,
        };
        let before = vm.content();
        let done = AtomicBool::new(false);
        let (report, written) = std::thread::scope(|scope| {
            let writer = scope.spawn(|| write_until(&vm, &done, writes));
            std::thread::sleep(Duration::from_millis(20));
            let report = back_up(world.dir.path(), wanted, silent());
            done.store(true, Ordering::Relaxed);
            (report, writer.join().expect("written"))
        });
        let report = report.unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(report.record.parent, last);
        let restored = world.restored(&report.record.id).expect("restored");
        let at = instant(&restored, &before, &written);
        assert!(at.is_some(), "round {round}: the disk of no instant");
        assert!(
            written.len() > 5,
            "it was written meanwhile: {}",
            written.len()
        );
        let (bitmaps, jobs, nodes) = vm.state();
        assert_eq!(bitmaps, [report.next_bitmap.as_str()]);
        assert!(jobs.is_empty() && nodes.is_empty(), "{jobs:?} {nodes:?}");
        writes += written.len();
        last = Some(report.record.id);
    }
    // QEMU stores the bitmap when it ends in order; the disk at rest is backed up by it.
    let content = vm.content();
    vm.quit();
    let report = world.backup(Wanted::IncrementalOnly).expect("incremental");
    assert_eq!(report.record.parent, last);
    world.require(&report.record.id, &content, "at rest");
    // What a killed QEMU did not store is not relied on.
    let vm = Vm::start(&world);
    vm.io("write -P 9 1M 64k");
    vm.kill();
    let vm = Vm::start(&world);
    let report = back_up(world.dir.path(), Wanted::Incremental, silent()).expect("full");
    let why = report.record.why_full.expect("a reason");
    assert!(why.contains("not saved"), "{why}");
    world.require(&report.record.id, &vm.content(), "after a kill");
    assert_eq!(vm.state().0, [report.next_bitmap]);
    world.require_all_whole("all");
}

/// Not a test of its own: the process that is killed. Without the variables it does nothing.
#[test]
fn the_live_backup_that_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let last: usize = std::env::var(STEP)
        .expect("a step")
        .parse()
        .expect("a number");
    let seen = AtomicUsize::new(0);
    let tell = |event: Event| {
        // Also once QEMU has begun: the first progress that it tells.
        let counts = match event {
            Event::Step(_) => true,
            Event::Progress { .. } => seen.load(Ordering::Relaxed) == 2,
            Event::Notice(_) => false,
        };
        if counts && seen.fetch_add(1, Ordering::Relaxed) == last {
            std::process::abort();
        }
    };
    let wanted = match std::env::var_os(WANTED) {
        Some(_) => Wanted::Full,
        None => Wanted::Incremental,
    };
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    if back_up(Path::new(&folder), wanted, watch).is_err() {
        std::process::exit(7);
    }
}

fn killed_at(world: &World, step: usize, full: bool) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .args([
            "--exact",
            "the_live_backup_that_is_killed",
            "--test-threads=1",
        ])
        .env(FOLDER, world.dir.path())
        .env(STEP, step.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if full {
        command.env(WANTED, "1");
    }
    command.status().expect("run")
}

#[test]
fn a_live_backup_killed_at_any_step_leaves_the_vm_running_and_forgets_no_change() {
    for full in [true, false] {
        let world = World::new();
        let vm = Vm::start(&world);
        back_up(world.dir.path(), Wanted::Full, silent()).expect("full");
        let mut ended = false;
        for step in 0..20 {
            let story = format!("full: {full}, step {step}");
            vm.io(&format!("write -P {} {}k 64k", step + 30, step * 192));
            let status = killed_at(&world, step, full);
            if status.success() {
                assert!(step >= 8, "all steps were reached: {step}");
                ended = true;
                break;
            }
            assert_eq!(status.signal(), Some(6), "{story}");
            vm.io(&format!("write -P {} 7M 4k", step + 60));
            if world.folder.exists() {
                world.require_all_whole(&story);
            }
            let report = back_up(world.dir.path(), Wanted::IncrementalOnly, silent());
            let report = report.unwrap_or_else(|error| panic!("{story}: {error}"));
            world.require(&report.record.id, &vm.content(), &story);
            let (bitmaps, jobs, nodes) = vm.state();
            assert_eq!(bitmaps, [report.next_bitmap], "{story}");
            assert!(jobs.is_empty() && nodes.is_empty(), "{story}: {jobs:?}");
            let listed = list(&world.folder).expect("listed");
            assert_eq!(world.files().len(), listed.len() * 3, "{story}");
        }
        assert!(ended);
    }
}

#[test]
fn a_live_backup_that_is_cancelled_or_fails_leaves_the_vm_and_its_bitmaps_as_they_were() {
    let world = World::new();
    let vm = Vm::start(&world);
    back_up(world.dir.path(), Wanted::Full, silent()).expect("full");
    vm.io("write -P 3 1M 64k");
    let (files, state) = (world.files(), vm.state());
    for at in [Step::Stage, Step::Copy, Step::Hashes] {
        let cancel = AtomicBool::new(false);
        let tell = |event: Event| {
            if event == Event::Step(at) {
                cancel.store(true, Ordering::Relaxed);
            }
        };
        let watch = Watch {
            tell: &tell,
            cancel: Some(&cancel),
        };
        let error = back_up(world.dir.path(), Wanted::Incremental, watch).expect_err("cancelled");
        assert_eq!(error.kind(), Kind::Cancelled, "{at}: {error}");
        assert_eq!(vm.state(), state, "{at}");
        assert!(world.files() == files, "{at}");
    }
    let missing = LiveOrder {
        staging: world.dir.path().join("missing"),
        ..order(world.dir.path(), Wanted::Incremental)
    };
    let open = || FolderVault::open(&world.folder, false);
    let error = run_live(&missing, open, silent()).expect_err("no folder");
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
    assert_eq!(vm.state(), state);
    let report = back_up(world.dir.path(), Wanted::IncrementalOnly, silent()).expect("again");
    assert_eq!(report.record.changed_bytes, 65_536);
    world.require(&report.record.id, &vm.content(), "again");
}

#[test]
fn a_live_increment_is_not_made_over_a_damaged_backup() {
    let world = World::new();
    let vm = Vm::start(&world);
    let full = back_up(world.dir.path(), Wanted::Full, silent()).expect("full");
    let image = full.image.expect("a file");
    let mut bytes = fs::read(&image).expect("read");
    let ones = bytes
        .windows(PIECE)
        .position(|piece| piece.iter().all(|byte| *byte == 1));
    bytes[ones.expect("the first piece of the disk") + 10] ^= 8;
    fs::write(&image, bytes).expect("damaged");
    // The increment would take over the rest of that MiB.
    vm.io("write -P 3 512k 64k");
    let error = back_up(world.dir.path(), Wanted::IncrementalOnly, silent());
    let error = error.expect_err("refused");
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
    let report = back_up(world.dir.path(), Wanted::Incremental, silent()).expect("full");
    assert_eq!(report.record.kind, BackupKind::Full);
    let why = report.record.why_full.expect("a reason");
    assert!(why.contains("is damaged from 0x0"), "{why}");
    world.require(&report.record.id, &vm.content(), "full again");
    assert_eq!(vm.state().0, [report.next_bitmap]);
}
