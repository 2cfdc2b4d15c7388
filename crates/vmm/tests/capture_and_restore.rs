//! A capture is one instant, and whatever is restored from it goes on from that instant.

mod rig;

use std::path::Path;
use std::time::Duration;

use rig::*;
use stead_vmm::{Captured, Exit, Launch, RamMethod, RamSharing, RunState, StateFormat, Vm};

const QUIT_WITHIN: Duration = Duration::from_secs(20);

fn capture(rig: &Rig, vm: &mut Vm, tag: &str) -> (Captured, std::path::PathBuf) {
    let overlays = rig.next_overlays(vm, tag);
    let ram = rig.path(&format!("{tag}.image"));
    let captured = vm
        .capture(&request(&overlays, &create(&ram, 0)))
        .expect("capture");
    (captured, ram)
}

/// Restores and lets go on; the guest must continue right behind `from`.
fn restore(rig: &Rig, launch: &Launch, captured: &Captured, from: u32) -> Vm {
    let mut vm = launch
        .restore(&rig.qemu, &captured.device_state, captured.state_format)
        .expect("restore");
    assert_ne!(vm.status().expect("status"), RunState::Running);
    assert!(counts(vm.dir()).is_empty(), "a restored guest stands still");
    vm.resume().expect("resume");
    wait_count(&vm, from + 3);
    let first = counts(vm.dir())[0];
    assert!(
        (from..=from + 1).contains(&first),
        "captured at {from}, went on with {first}"
    );
    vm
}

fn frozen(captured: &Captured, disk: &str) -> std::path::PathBuf {
    let chain = captured
        .chains
        .iter()
        .find(|c| c.disk == disk)
        .expect("disk");
    chain.layers[chain.layers.len() - 2].path.clone()
}

#[test]
fn a_capture_is_one_instant_of_ram_and_disk_and_the_source_runs_on() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    for round in 0..5 {
        let (captured, ram) = capture(&rig, &mut vm, &format!("round{round}"));
        assert_eq!(captured.state_format, StateFormat::IgnoreShared);
        assert_ne!(captured.ram_method, RamMethod::Stream);
        let chain = &captured.chains[0];
        assert_eq!(chain.layers.len(), 3 + round);
        let (top, below) = chain.layers.split_last().expect("layers");
        assert!(!top.read_only);
        assert!(below.iter().all(|layer| layer.read_only));
        assert_one_instant(&ram, &frozen(&captured, "vda"));
        counts_on(&vm);
    }
    assert_eq!(vm.quit(QUIT_WITHIN).expect("quit"), Exit::Code(0));
}

#[test]
fn two_forks_share_one_ram_image_and_never_change_it() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    let (captured, image) = capture(&rig, &mut vm, "checkpoint");
    let at = assert_one_instant(&image, &frozen(&captured, "vda"));
    let (image_before, layer_before) = (content(&image), content(&frozen(&captured, "vda")));
    counts_on(&vm);
    let mut forks: Vec<Vm> = ["one", "two"]
        .into_iter()
        .map(|name| {
            let launch = rig.fork(name, &image, RamSharing::Private, &captured.chains);
            restore(&rig, &launch, &captured, at)
        })
        .collect();
    for fork in &mut forks {
        counts_on(fork);
        fork.quit(QUIT_WITHIN).expect("quit");
    }
    assert!(
        content(&image) == image_before,
        "a fork wrote to the RAM image"
    );
    assert!(
        content(&frozen(&captured, "vda")) == layer_before,
        "a fork wrote to the frozen layer"
    );
    check_image(&rig.path("vda.one"));
    counts_on(&vm);
    vm.kill().expect("kill");
}

#[test]
fn a_fork_can_be_captured_and_restored_again_and_again() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    let (mut captured, mut image) = capture(&rig, &mut vm, "generation0");
    vm.kill().expect("kill");
    for generation in 1..4 {
        let at = assert_one_instant(&image, &frozen(&captured, "vda"));
        let name = format!("fork{generation}");
        let launch = rig.fork(&name, &image, RamSharing::Private, &captured.chains);
        let mut fork = restore(&rig, &launch, &captured, at);
        (captured, image) = capture(&rig, &mut fork, &format!("generation{generation}"));
        assert_eq!(captured.state_format, StateFormat::RamSplit);
        assert_eq!(captured.ram_method, RamMethod::Stream);
        assert!(
            captured.device_state.len() < 4 << 20,
            "the RAM is not in the device state"
        );
        counts_on(&fork);
        fork.kill().expect("kill");
    }
    let at = assert_one_instant(&image, &frozen(&captured, "vda"));
    let launch = rig.fork("last", &image, RamSharing::Private, &captured.chains);
    restore(&rig, &launch, &captured, at).kill().expect("kill");
}

#[test]
fn a_hibernated_vm_wakes_with_its_ram_file_and_can_be_captured_as_before() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    let overlays = rig.next_overlays(&mut vm, "hibernated");
    let image = rig.path("hibernated.image");
    let captured = vm
        .capture_paused(&request(&overlays, &create(&image, 0)))
        .expect("capture");
    assert_eq!(vm.status().expect("status"), RunState::PostMigrate);
    let stands = counts(vm.dir());
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(counts(vm.dir()), stands, "the guest stands still");
    assert_eq!(vm.quit(QUIT_WITHIN).expect("quit"), Exit::Code(0));
    let at = assert_one_instant(&image, &frozen(&captured, "vda"));
    let launch = rig.fork("awake", &image, RamSharing::Shared, &captured.chains);
    let mut awake = restore(&rig, &launch, &captured, at);
    let (again, second) = capture(&rig, &mut awake, "again");
    assert_eq!(again.state_format, StateFormat::IgnoreShared);
    assert_one_instant(&second, &frozen(&again, "vda"));
    counts_on(&awake);
    awake.kill().expect("kill");
}

#[test]
fn a_paused_capture_can_be_resumed_instead_and_its_layers_frozen() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    let overlays = rig.next_overlays(&mut vm, "paused");
    let image = rig.path("paused.image");
    vm.capture_paused(&request(&overlays, &create(&image, 0)))
        .expect("capture");
    vm.resume().expect("resume");
    let chains = vm.freeze_layers().expect("freeze");
    assert!(chains[0].layers[1].read_only);
    assert_one_instant(&image, &chains[0].layers[1].path);
    counts_on(&vm);
    vm.kill().expect("kill");
}

#[test]
fn disks_alone_are_frozen_while_the_guest_runs() {
    let rig = Rig::with(128 * MIB, 64, &["vda", "vdb", "vdc"]);
    let (mut vm, _) = rig.boot("source");
    for round in 0..3 {
        let overlays = rig.next_overlays(&mut vm, &format!("disks{round}"));
        let captured = vm.capture_disks(&overlays).expect("capture");
        assert_eq!(captured.chains.len(), 3);
        for chain in &captured.chains {
            let below = &chain.layers[..chain.layers.len() - 1];
            assert!(below.iter().all(|layer| layer.read_only));
            check_image(&below[below.len() - 1].path);
        }
        counts_on(&vm);
    }
    vm.kill().expect("kill");
}

#[test]
fn several_disks_are_captured_at_the_same_instant() {
    let rig = Rig::with(128 * MIB, 64, &["vda", "vdb", "vdc"]);
    let (mut vm, _) = rig.boot("source");
    let (captured, image) = capture(&rig, &mut vm, "three");
    let at = assert_one_instant(&image, &frozen(&captured, "vda"));
    vm.kill().expect("kill");
    let launch = rig.fork("fork", &image, RamSharing::Private, &captured.chains);
    restore(&rig, &launch, &captured, at).kill().expect("kill");
}

#[test]
fn a_folder_with_a_long_path_works_like_any_other() {
    let rig = Rig::new();
    let deep: std::path::PathBuf =
        std::iter::repeat_n("a-folder-with-a-rather-long-name, and more", 6).collect();
    let folder = rig.path("x").with_file_name(deep);
    std::fs::create_dir_all(&folder).expect("create");
    assert!(folder.as_os_str().len() > 240);
    let mut launch = rig.launch("deep");
    launch.dir = folder.join("vm");
    launch.ram.path = folder.join("ram, with a comma");
    drop(create(&launch.ram.path, rig.memory_bytes));
    let mut vm = launch.boot(&rig.qemu).expect("boot");
    drop(vm.connect_agent(7).expect("agent port"));
    vm.resume().expect("resume");
    wait_count(&vm, 3);
    let process = vm.process();
    drop(vm);
    let mut vm = Vm::connect(Path::new(&launch.dir), process).expect("connect again");
    let (captured, image) = capture(&rig, &mut vm, "deeper");
    assert_one_instant(&image, &frozen(&captured, "vda"));
    vm.kill().expect("kill");
}

/// Prints the phases of a pause: `cargo test -p stead-vmm --release -- --ignored --nocapture pause`.
#[test]
#[ignore = "a measurement, not a promise"]
fn measure_the_pause_of_a_guest_of_512_mib() {
    let rig = Rig::with(512 * MIB, 150 * 256, &["vda"]);
    let (mut vm, _) = rig.boot("source");
    for round in 0..5 {
        let (captured, _) = capture(&rig, &mut vm, &format!("m{round}"));
        println!(
            "{:?} paused {:?} {:?} state {} bytes",
            captured.ram_method,
            captured.times.paused,
            captured.times,
            captured.device_state.len()
        );
    }
    let (captured, image) = capture(&rig, &mut vm, "image");
    let at = counter_in_ram(&image);
    let launch = rig.fork("fork", &image, RamSharing::Private, &captured.chains);
    let mut fork = restore(&rig, &launch, &captured, at);
    for round in 0..3 {
        let (captured, _) = capture(&rig, &mut fork, &format!("f{round}"));
        println!(
            "{:?} paused {:?} {:?} state {} bytes",
            captured.ram_method,
            captured.times.paused,
            captured.times,
            captured.device_state.len()
        );
    }
    fork.kill().expect("kill");
    vm.kill().expect("kill");
}
