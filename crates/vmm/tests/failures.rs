//! Whatever fails during a capture or restore: the cause is named, and what existed before still works.

mod rig;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rig::*;
use serde_json::{Value, json};
use stead_vmm::{
    CaptureError, CapturePhase, CaptureRequest, Captured, Error, GuestAfter, LayerFormat,
    NewOverlay, RamSharing, RunState, StateFormat, Vm,
};

fn capture_fails(vm: &mut Vm, request: &CaptureRequest<'_>) -> CaptureError {
    match vm.capture(request) {
        Err(Error::Capture(error)) => *error,
        other => panic!("expected a failed capture, got {other:?}"),
    }
}

/// After every failure a capture of the same VM must still succeed.
fn capture_succeeds(rig: &Rig, vm: &mut Vm, tag: &str) -> Captured {
    let overlays = rig.next_overlays(vm, tag);
    let image = rig.path(&format!("{tag}.image"));
    let captured = vm
        .capture(&request(&overlays, &create(&image, 0)))
        .expect("capture");
    let chain = &captured.chains[0];
    assert_one_instant(&image, &chain.layers[chain.layers.len() - 2].path);
    captured
}

#[test]
fn an_overlay_that_cannot_be_opened_stops_nothing_and_leaves_nothing_open() {
    let rig = Rig::with(128 * MIB, 64, &["vda", "vdb"]);
    let (mut vm, _) = rig.boot("source");
    let before = vm.disks().expect("chains");
    let mut overlays = rig.next_overlays(&mut vm, "wrong");
    let good = overlays.clone();
    let text = rig.path("text");
    drop(create(&text, 1 << 20));
    let small = rig.path("small");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            small.to_str().expect("UTF-8"),
            "1M",
        ],
    );
    let bad: Vec<(&str, std::path::PathBuf)> = vec![
        ("No such file", rig.path("missing")),
        ("not in qcow2 format", text),
        ("1048576 bytes", small),
        // QEMU's own lock: an overlay that is in use.
        ("lock", before[1].top().path.clone()),
    ];
    for (number, (reason, path)) in bad.into_iter().enumerate() {
        overlays[1].path = path;
        let ram = create(&rig.path(&format!("never{number}")), 0);
        let error = capture_fails(&mut vm, &request(&overlays, &ram));
        assert_eq!(error.phase, CapturePhase::Prepare);
        assert_eq!(error.guest, GuestAfter::Running);
        assert!(!error.disks_switched);
        assert_eq!(error.chains.as_deref(), Some(&before[..]));
        assert!(error.to_string().contains(reason), "{reason}: {error}");
    }
    counts_on(&vm);
    // The overlay that could be opened each time is free again.
    vm.capture(&request(&good, &create(&rig.path("image"), 0)))
        .expect("capture");
    vm.kill().expect("kill");
}

#[test]
fn an_overlay_for_each_disk_is_asked_for_before_anything_happens() {
    let rig = Rig::with(128 * MIB, 64, &["vda", "vdb"]);
    let (mut vm, _) = rig.boot("source");
    let overlays = rig.next_overlays(&mut vm, "some");
    let twice = [overlays[0].clone(), overlays[0].clone()];
    let foreign = [
        overlays[0].clone(),
        NewOverlay {
            disk: "vdz".to_owned(),
            ..overlays[1].clone()
        },
    ];
    for wrong in [&overlays[..1], &twice, &foreign, &[]] {
        let ram = tempfile::tempfile().expect("temp file");
        let error = capture_fails(&mut vm, &request(wrong, &ram));
        assert!(matches!(error.source, Error::Disks { .. }), "{error}");
        assert_eq!(error.guest, GuestAfter::Running);
    }
    vm.kill().expect("kill");
}

#[test]
fn a_state_stream_that_breaks_off_lets_the_guest_go_on_over_the_new_overlays() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    for (number, state_bytes_max) in [0, 1000, 30_000].into_iter().enumerate() {
        let overlays = rig.next_overlays(&mut vm, &format!("broken{number}"));
        let ram = create(&rig.path(&format!("broken{number}.image")), 0);
        let limited = CaptureRequest {
            state_bytes_max,
            ..request(&overlays, &ram)
        };
        let error = capture_fails(&mut vm, &limited);
        assert_eq!(error.phase, CapturePhase::State);
        assert!(
            matches!(error.source, Error::StateTooLong { .. }),
            "{error}"
        );
        assert_eq!(error.guest, GuestAfter::Running);
        assert!(error.disks_switched);
        let chains = error.chains.expect("chains");
        assert_eq!(chains[0].top().path, overlays[0].path);
        counts_on(&vm);
    }
    capture_succeeds(&rig, &mut vm, "after");
    counts_on(&vm);
    vm.kill().expect("kill");
}

/// Makes `ram` unwritable as soon as QEMU has opened `overlay`, which is after the RAM was copied for
/// the first time and before the guest is stopped.
fn seal_when_open(vm: &Vm, overlay: &Path, ram: &File) -> std::thread::JoinHandle<()> {
    let descriptors = format!("/proc/{}/fd", vm.process().pid);
    let (overlay, ram) = (overlay.to_owned(), ram.try_clone().expect("clone"));
    std::thread::spawn(move || {
        let is_open = || {
            let links = fs::read_dir(&descriptors).expect("descriptors");
            links
                .flatten()
                .any(|link| fs::read_link(link.path()).is_ok_and(|target| target == overlay))
        };
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while !is_open() && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_micros(200));
        }
        rustix::fs::fcntl_add_seals(&ram, rustix::fs::SealFlags::WRITE).expect("seal");
    })
}

#[test]
fn ram_that_cannot_be_written_during_the_pause_lets_the_guest_go_on() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    let mut failed = 0;
    for round in 0..20 {
        let overlays = rig.next_overlays(&mut vm, &format!("sealed{round}"));
        let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
        let ram = File::from(rustix::fs::memfd_create("ram", flags).expect("memory file"));
        let sealer = seal_when_open(&vm, &overlays[0].path, &ram);
        let result = vm.capture(&request(&overlays, &ram));
        sealer.join().expect("sealer");
        // Where the seal came too late, the capture must be whole.
        let Err(Error::Capture(error)) = result else {
            result.expect("a capture that did not fail");
            continue;
        };
        assert_eq!(error.phase, CapturePhase::Ram, "{error}");
        assert_eq!(error.guest, GuestAfter::Running);
        assert!(error.disks_switched);
        let chains = error.chains.expect("chains");
        assert_eq!(chains[0].top().path, overlays[0].path);
        counts_on(&vm);
        failed += 1;
        if failed == 3 {
            break;
        }
    }
    assert!(failed > 0, "no capture met the seal during its pause");
    capture_succeeds(&rig, &mut vm, "after");
    counts_on(&vm);
    vm.kill().expect("kill");
}

#[test]
fn ram_that_cannot_be_written_at_all_is_noticed_in_time() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    // Looks empty, and cannot be given a length.
    let (_reader, writer) = std::io::pipe().expect("pipe");
    let ram = File::from(std::os::fd::OwnedFd::from(writer));
    let overlays = rig.next_overlays(&mut vm, "unwritable");
    let error = capture_fails(&mut vm, &request(&overlays, &ram));
    assert_eq!(error.phase, CapturePhase::Prepare, "{error}");
    assert_eq!(error.guest, GuestAfter::Running);
    assert!(!error.disks_switched);
    counts_on(&vm);
    let captured = capture_succeeds(&rig, &mut vm, "after");
    // A fork's pages come with the stream: there the reader fails.
    let image = rig.path("after.image");
    let launch = rig.fork("fork", &image, RamSharing::Private, &captured.chains);
    let mut fork = launch
        .restore(&rig.qemu, &captured.device_state, captured.state_format)
        .expect("restore");
    fork.resume().expect("resume");
    wait_count(&fork, 1);
    let overlays = rig.next_overlays(&mut fork, "fork-unwritable");
    let error = capture_fails(&mut fork, &request(&overlays, &ram));
    assert_eq!(error.phase, CapturePhase::State, "{error}");
    assert!(matches!(error.source, Error::System { .. }), "{error}");
    assert_eq!(error.guest, GuestAfter::Running);
    counts_on(&fork);
    capture_succeeds(&rig, &mut fork, "fork-after");
    counts_on(&fork);
    fork.kill().expect("kill");
    vm.kill().expect("kill");
}

#[test]
fn a_vm_that_does_not_run_is_not_captured() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    let overlays = rig.next_overlays(&mut vm, "stopped");
    vm.stop().expect("stop");
    let result = vm.capture(&request(
        &overlays,
        &tempfile::tempfile().expect("temp file"),
    ));
    let Err(error) = result else {
        panic!("a stopped VM was captured")
    };
    assert!(
        error.to_string().contains("needs a VM that is running"),
        "{error}"
    );
    vm.kill().expect("kill");
}

#[test]
fn qemu_killed_at_any_moment_of_a_capture_is_reported_and_leaves_whole_layers() {
    let rig = Rig::new();
    let mut gone = 0;
    for round in 0..12_u64 {
        let (mut vm, launch) = rig.boot(&format!("victim{round}"));
        let overlays = rig.next_overlays(&mut vm, &format!("o{round}"));
        let ram = create(&rig.path(&format!("i{round}")), 0);
        let process = vm.process();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(round * 3));
            process.kill().expect("kill");
        });
        let result = vm.capture(&request(&overlays, &ram));
        killer.join().expect("killer");
        match result {
            Ok(_) => {}
            Err(Error::Capture(error)) => {
                assert_eq!(error.guest, GuestAfter::Gone, "{error}");
                assert!(matches!(error.source, Error::Died { .. }), "{error}");
                gone += 1;
            }
            Err(other) => panic!("not a failed capture: {other}"),
        }
        check_image(&launch.disks[0].chain[1].path);
        check_image(&overlays[0].path);
        assert!(matches!(
            Vm::connect(&launch.dir, process),
            Err(Error::NotRunning { .. })
        ));
    }
    assert!(gone >= 3, "only {gone} of 12 kills met a capture");
}

/// Does by hand what a capture does up to `step`, and is then gone, as after SIGKILL.
fn interrupted(rig: &Rig, tag: &str, step: Step) -> (Vm, NewOverlay, Option<UnixStream>) {
    let (mut vm, _) = rig.boot(tag);
    let overlay = rig.next_overlays(&mut vm, &format!("{tag}-next")).remove(0);
    let qmp = vm.qmp();
    let mut ask = |command: &str, arguments: Value| {
        qmp.execute::<Value>(command, arguments).expect("command");
    };
    ask(
        "migrate-set-capabilities",
        json!({"capabilities": [{"capability": "x-ignore-shared", "state": step != Step::Saving}]}),
    );
    ask(
        "blockdev-add",
        json!({"driver": "file", "node-name": "vda.2.f", "filename": overlay.path, "locking": "on"}),
    );
    ask(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "vda.2", "file": "vda.2.f", "backing": null}),
    );
    let mut stream = None;
    if step >= Step::Stopped {
        ask("stop", json!({}));
    }
    if step >= Step::Switched {
        ask(
            "transaction",
            json!({"actions": [{"type": "blockdev-snapshot", "data": {"node": "vda.1", "overlay": "vda.2"}}]}),
        );
    }
    if step >= Step::Saving {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        qmp.give_descriptor("x", theirs.as_fd()).expect("getfd");
        qmp.execute::<Value>("migrate", json!({"uri": "fd:x"}))
            .expect("migrate");
        stream = Some(ours);
    }
    if step >= Step::Saved {
        let mut bytes = Vec::new();
        stream
            .take()
            .expect("a stream")
            .read_to_end(&mut bytes)
            .expect("read");
    }
    let (folder, process) = (vm.dir().to_owned(), vm.process());
    drop(vm);
    (
        Vm::connect(&folder, process).expect("connect"),
        overlay,
        stream,
    )
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Opened,
    Stopped,
    Switched,
    /// Nobody reads the stream, so saving stays in flight.
    Saving,
    Saved,
}

#[test]
fn a_vm_whose_capture_was_interrupted_anywhere_runs_again_and_says_where_its_disks_write() {
    let rig = Rig::new();
    let steps = [
        Step::Opened,
        Step::Stopped,
        Step::Switched,
        Step::Saving,
        Step::Saved,
    ];
    for step in steps {
        let tag = format!("{step:?}").to_lowercase();
        let (mut vm, overlay, stream) = interrupted(&rig, &tag, step);
        let recovered = vm.recover_running().expect("recover");
        assert_eq!(recovered.cancelled_saving, step == Step::Saving, "{step:?}");
        let expected = match step {
            Step::Opened => RunState::Running,
            Step::Stopped | Step::Switched | Step::Saving => RunState::Paused,
            Step::Saved => RunState::PostMigrate,
        };
        if step == Step::Saving {
            let in_flight = [RunState::Paused, RunState::FinishMigrate];
            assert!(
                in_flight.contains(&recovered.found),
                "{:?}",
                recovered.found
            );
        } else {
            assert_eq!(recovered.found, expected, "{step:?}");
        }
        let chain = &recovered.chains[0];
        if step >= Step::Switched {
            assert_eq!(chain.top().path, overlay.path, "{step:?}");
            assert!(chain.layers[1].read_only);
            assert!(recovered.unused_overlays.is_empty());
            check_image(&chain.layers[1].path);
        } else {
            assert_ne!(chain.top().path, overlay.path, "{step:?}");
            assert_eq!(recovered.unused_overlays, [overlay.path], "{step:?}");
        }
        counts_on(&vm);
        let again = vm.recover_running().expect("recover");
        assert_eq!(again.found, RunState::Running);
        drop(stream);
        capture_succeeds(&rig, &mut vm, &format!("{tag}-after"));
        counts_on(&vm);
        vm.kill().expect("kill");
    }
}

#[test]
fn damaged_or_foreign_state_is_refused_with_a_reason_and_no_process_stays() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    let captured = capture_succeeds(&rig, &mut vm, "image");
    vm.kill().expect("kill");
    let image = rig.path("image.image");
    let state = &captured.device_state;
    let refuse =
        |name: &str, state: &[u8], format: StateFormat, change: fn(&mut stead_vmm::Launch)| {
            let mut launch = rig.fork(name, &image, RamSharing::Private, &captured.chains);
            change(&mut launch);
            let error = launch
                .restore(&rig.qemu, state, format)
                .expect_err("refused");
            assert!(
                !has_process_in(&launch.dir),
                "a process was left in {}",
                launch.dir.display()
            );
            error
        };
    // Cut off anywhere: QEMU itself would load some of these.
    for (number, kept) in [
        0,
        1,
        100,
        state.len() / 2,
        state.len() - 4096,
        state.len() - 1,
    ]
    .into_iter()
    .enumerate()
    {
        let error = refuse(
            &format!("cut{number}"),
            &state[..kept],
            captured.state_format,
            |_| {},
        );
        assert!(matches!(error, Error::Stream(_)), "cut to {kept}: {error}");
    }
    // The other format: the RAM would be left as it is, or waited for.
    let error = refuse("format", state, StateFormat::RamSplit, |_| {});
    assert!(matches!(error, Error::Stream(_)), "{error}");
    // One port fewer: QEMU refuses, and its reason must arrive.
    let error = refuse("ports", state, captured.state_format, |launch| {
        launch.machine.agent_ports = 7
    });
    let Error::Migration {
        direction: "loading",
        reason,
        ..
    } = &error
    else {
        panic!("expected QEMU's reason, got {error}");
    };
    assert!(
        reason.contains("virtio-console") || reason.contains("port"),
        "{reason}"
    );
    // And the same state, undamaged, still runs.
    let launch = rig.fork("whole", &image, RamSharing::Private, &captured.chains);
    let mut fork = launch
        .restore(&rig.qemu, state, captured.state_format)
        .expect("restore");
    fork.resume().expect("resume");
    wait_count(&fork, 1);
    counts_on(&fork);
    fork.kill().expect("kill");
}

fn has_process_in(folder: &Path) -> bool {
    let entries = fs::read_dir("/proc").expect("/proc");
    entries
        .flatten()
        .any(|entry| fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == folder))
}

#[test]
fn a_qemu_that_dies_at_its_start_says_why() {
    let rig = Rig::new();
    let mut launch = rig.launch("broken");
    launch.disks[0].chain[1] = layer(&rig.path("missing"), LayerFormat::Qcow2);
    match launch.boot(&rig.qemu) {
        Err(Error::Died {
            status, log_tail, ..
        }) => {
            assert!(log_tail.contains("No such file"), "{log_tail}");
            assert_eq!(status, "with exit code 1");
        }
        other => panic!("expected QEMU's last words, got {other:?}"),
    }
    // Only the words of this process, not of the one before.
    launch.disks[0].chain[1] = layer(&rig.base("vda"), LayerFormat::Qcow2);
    match launch.boot(&rig.qemu) {
        Err(Error::Died { log_tail, .. }) => {
            assert!(log_tail.contains("not in qcow2 format"), "{log_tail}");
            assert!(!log_tail.contains("No such file"), "{log_tail}");
        }
        other => panic!("expected QEMU's last words, got {other:?}"),
    }
}

#[test]
fn what_cannot_be_is_refused_before_anything_starts() {
    let rig = Rig::new();
    let good = rig.launch("good");
    type Change = fn(&mut stead_vmm::Launch);
    let changes: [Change; 9] = [
        |l| l.machine.machine_type = "pc-q35-99.0".to_owned(),
        |l| l.machine.qemu_version.major += 1,
        |l| l.machine.memory_bytes += MIB,
        |l| l.machine.disks.push("vdb".to_owned()),
        |l| l.name = "a,b".to_owned(),
        |l| l.dir = "relative".into(),
        |l| l.disks[0].chain.clear(),
        |l| l.disks[0].chain[1].format = LayerFormat::Raw,
        |l| l.disks[0].chain[0].path = "relative".into(),
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut launch = good.clone();
        change(&mut launch);
        let error = launch.boot(&rig.qemu).expect_err("refused");
        assert!(
            matches!(error, Error::Description { .. }),
            "change {number}: {error}"
        );
    }
    assert!(!good.dir.exists());
}
