//! QEMU as a process of its own: apart from us, found again, and not mistaken.

mod rig;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::time::Duration;

use rig::*;
use stead_vmm::{
    Accelerator, Error, Exit, KvmProbe, ProcessId, Qemu, RunAs, RunState, Version, Vm,
};

#[test]
fn a_vm_is_found_again_by_its_process_and_by_no_other() {
    let rig = Rig::new();
    let (vm, launch) = rig.boot("vm");
    let process = vm.process();
    // While one connection is held, a second one gets no greeting.
    let second = Vm::connect(&launch.dir, process);
    assert!(
        matches!(second, Err(Error::Unanswered { .. })),
        "{second:?}"
    );
    drop(vm);
    let mut vm = Vm::connect(&launch.dir, process).expect("connect");
    assert_eq!(vm.status().expect("status"), RunState::Running);
    let earlier = ProcessId {
        start_ticks: process.start_ticks - 1,
        ..process
    };
    assert!(matches!(
        Vm::connect(&launch.dir, earlier),
        Err(Error::NotRunning { .. })
    ));
    let ourselves = ProcessId::own().expect("own");
    assert!(matches!(
        Vm::connect(&launch.dir, ourselves),
        Err(Error::Protocol { .. })
    ));
    assert_eq!(
        vm.kill().expect("kill"),
        Exit::Unknown,
        "not this value's child"
    );
    assert!(matches!(
        Vm::connect(&launch.dir, process),
        Err(Error::NotRunning { .. })
    ));
}

#[test]
fn an_end_that_nobody_asked_for_is_named_in_the_next_answer() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("vm");
    assert_eq!(vm.wait_exit(Duration::from_millis(50)).expect("wait"), None);
    vm.process().kill().expect("kill");
    match vm.status() {
        Err(Error::Died { status, .. }) => assert_eq!(status, "by signal 9"),
        other => panic!("expected the end, got {other:?}"),
    }
    assert_eq!(
        vm.wait_exit(Duration::ZERO).expect("wait"),
        Some(Exit::Signal(9))
    );
}

#[test]
fn qemu_is_apart_from_us_sandboxed_and_its_folder_private() {
    let rig = Rig::new();
    let (mut vm, launch) = rig.boot("vm");
    let pid = vm.process().pid;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let after_name = stat.rsplit_once(')').expect("name").1;
    let group: i32 = after_name
        .split_whitespace()
        .nth(2)
        .expect("group")
        .parse()
        .expect("number");
    assert_eq!(group, pid, "a process group of its own");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    assert!(status.contains("Seccomp:\t2"), "filtered system calls");
    assert_eq!(
        fs::metadata(&launch.dir).expect("stat").mode() & 0o777,
        0o700
    );
    let links = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
    let names: Vec<String> = links
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| target.to_string_lossy().into_owned())
        .collect();
    let terminal = names
        .iter()
        .find(|name| name.contains("/dev/pts") || name.contains("tty"));
    assert_eq!(terminal, None, "no terminal is kept");
    vm.quit(Duration::from_secs(20)).expect("quit");
}

#[test]
fn qemu_runs_as_the_user_it_is_given_when_we_are_root() {
    if fs::metadata("/proc/self").expect("/proc").uid() != 0 {
        eprintln!("skipped: only root can give QEMU another user");
        return;
    }
    let user = RunAs {
        uid: 54321,
        gid: 54322,
    };
    let rig = Rig::new();
    let mut launch = rig.launch("vm");
    launch.run_as = Some(user);
    let give = |path: &Path| chown(path, Some(user.uid), Some(user.gid)).expect("chown");
    give(rig.folder.path());
    give(&launch.ram.path);
    for layer in &launch.disks[0].chain {
        give(&layer.path);
    }
    let mut vm = launch.boot(&rig.qemu).expect("boot");
    vm.resume().expect("resume");
    wait_count(&vm, 3);
    let status = fs::read_to_string(format!("/proc/{}/status", vm.process().pid)).expect("status");
    assert!(
        status.contains("Uid:\t54321\t54321\t54321\t54321"),
        "{status}"
    );
    assert!(
        status.contains("Gid:\t54322\t54322\t54322\t54322"),
        "{status}"
    );
    let groups = status
        .lines()
        .find_map(|line| line.strip_prefix("Groups:"))
        .expect("groups");
    assert_eq!(groups.trim(), "", "no group of root's is kept");
    assert_eq!(fs::metadata(&launch.dir).expect("stat").uid(), user.uid);
    // What it must be able to do as that user: be captured.
    let overlays = rig.next_overlays(&mut vm, "next");
    give(&overlays[0].path);
    let image = rig.path("image");
    vm.capture(&request(&overlays, &create(&image, 0)))
        .expect("capture");
    counts_on(&vm);
    vm.quit(Duration::from_secs(20)).expect("quit");
}

#[test]
fn every_agent_port_can_be_connected_and_connected_again() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("vm");
    for port in 0..8 {
        for _ in 0..2 {
            let mut stream = vm.connect_agent(port).expect("connect");
            stream.write_all(b"nobody reads this").expect("write");
            stream
                .set_read_timeout(Some(Duration::from_millis(5)))
                .expect("bound");
            let answer = stream.read(&mut [0; 16]);
            assert!(answer.is_err(), "nobody answers: {answer:?}");
        }
    }
    assert!(vm.connect_agent(8).is_err());
    vm.kill().expect("kill");
}

#[test]
fn the_default_machine_is_versioned_and_the_cpu_explicit() {
    let qemu = Qemu::detect(None).expect("QEMU");
    let machine = qemu.default_machine_type().expect("machine");
    assert!(machine.starts_with("pc-q35-"), "{machine}");
    let version = machine.trim_start_matches("pc-q35-");
    let expected = format!("{}.{}", qemu.version().major, qemu.version().minor);
    assert_eq!(version, expected, "the newest one");
    let model = qemu.default_cpu_model(Accelerator::Tcg).expect("model");
    assert!(
        !["max", "host", "base"]
            .iter()
            .any(|name| model.starts_with(name)),
        "{model}"
    );
    let models = qemu.cpu_models(Accelerator::Tcg).expect("models");
    let name = model.split(',').next().expect("name");
    let known = models
        .iter()
        .find(|known| known.name == name)
        .expect("known");
    assert_eq!(known.unavailable_features.as_deref(), Some(&[][..]));
    let lacking = qemu
        .try_cpu_model("Icelake-Server-v1", Accelerator::Tcg)
        .expect("try");
    assert!(lacking.is_err(), "TCG lacks much of it");
}

#[test]
fn what_keeps_a_recorded_machine_from_running_here_is_named() {
    let rig = Rig::new();
    let machine = rig.machine();
    let differences = machine
        .differences(&rig.qemu, Accelerator::Tcg)
        .expect("compare");
    assert_eq!(differences, []);
    let mut older = machine.clone();
    older.qemu_version = Version {
        major: 5,
        minor: 2,
        micro: 0,
    };
    older.machine_type = "pc-q35-5.2".to_owned();
    assert_eq!(
        older
            .differences(&rig.qemu, Accelerator::Tcg)
            .expect("compare"),
        []
    );
    let mut other = machine.clone();
    other.qemu_version = Version {
        major: 99,
        minor: 0,
        micro: 0,
    };
    other.machine_type = "pc-q35-99.0".to_owned();
    other.accelerator = Accelerator::Kvm;
    let found = other
        .differences(&rig.qemu, Accelerator::Tcg)
        .expect("compare");
    let what: Vec<&str> = found.iter().map(|difference| difference.what).collect();
    assert_eq!(
        what,
        [
            "QEMU version (must not be older here)",
            "accelerator",
            "machine type"
        ]
    );
    let mut lacking = machine;
    lacking.cpu_model = "Icelake-Server-v1".to_owned();
    lacking.cpus = 255;
    let found = lacking
        .differences(&rig.qemu, Accelerator::Tcg)
        .expect("compare");
    assert_eq!(found[0].what, "CPU model");
    assert!(found[0].here.starts_with("lacks "), "{}", found[0].here);
}

#[test]
fn a_program_that_is_not_qemu_is_told_apart() {
    for program in ["/bin/true", "/bin/cat", "/nonexistent/qemu"] {
        let result = Qemu::detect(Some(Path::new(program)));
        assert!(
            matches!(result, Err(Error::Unusable { .. })),
            "{program}: {result:?}"
        );
    }
}

/// Whatever the answer on this host, it must come, and it must be the one a VM then gets.
#[test]
fn the_kvm_probe_answers_and_what_it_says_is_true() {
    let rig = Rig::new();
    let answer = KvmProbe::run(&rig.qemu, None).expect("probe");
    eprintln!("KVM: {answer:?}");
    assert_eq!(answer.accelerator() == Accelerator::Kvm, answer.works);
    if answer.works {
        let mut launch = rig.launch("kvm");
        launch.machine.accelerator = Accelerator::Kvm;
        launch.machine.cpu_model = answer.detail;
        let mut vm = launch.boot(&rig.qemu).expect("boot");
        vm.resume().expect("resume");
        wait_count(&vm, 3);
        vm.kill().expect("kill");
    } else {
        assert!(!answer.detail.is_empty());
    }
}
