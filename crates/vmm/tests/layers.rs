//! A running guest's frozen layers are replaced by one file that shows the same, also where that was interrupted.

mod rig;

use std::path::{Path, PathBuf};

use rig::*;
use serde_json::{Value, json};
use stead_vmm::{Error, Layer, LayerFormat, Vm};

/// Makes the active layer a frozen one, and says which file that is.
fn freeze(rig: &Rig, vm: &mut Vm, tag: &str) -> PathBuf {
    let overlays = rig.next_overlays(vm, tag);
    let captured = vm.capture_disks(&overlays).expect("capture");
    counts_on(vm);
    let layers = &captured.chains[0].layers;
    layers[layers.len() - 2].path.clone()
}

/// One file of all that lies above the base, made by qemu-img.
fn flattened(rig: &Rig, top: &Path, name: &str) -> PathBuf {
    let (made, base) = (rig.path(name), rig.base("vda"));
    let [made_name, base, top] =
        [&made, &base, &top.to_owned()].map(|path| path.to_str().expect("UTF-8").to_owned());
    run(
        "qemu-img",
        &[
            "convert", "-f", "qcow2", "-O", "qcow2", "-B", &base, "-F", "raw", &top, &made_name,
        ],
    );
    made
}

/// The base, `frozen`, and what the guest writes to.
fn wanted(rig: &Rig, vm: &mut Vm, frozen: &Path) -> Vec<Layer> {
    let chain = vm.disks().expect("chains").swap_remove(0);
    vec![
        layer(&rig.base("vda"), LayerFormat::Raw),
        layer(frozen, LayerFormat::Qcow2),
        layer(&chain.top().path, LayerFormat::Qcow2),
    ]
}

fn nodes(vm: &mut Vm) -> Vec<String> {
    let all: Vec<Value> = vm
        .ask("query-named-block-nodes", json!({ "flat": true }))
        .expect("nodes");
    let names = all.iter().filter_map(|node| node["node-name"].as_str());
    let mut names: Vec<String> = names
        .filter(|name| name.starts_with("vda."))
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}

/// Gives the flattened file the name of the layer that it takes the place of.
fn replace(rig: &Rig, top: &Path, name: &str) {
    let made = flattened(rig, top, name);
    stead_sys::durable::move_to(&made, top, stead_sys::durable::Existing::Replace).expect("rename");
}

#[test]
fn a_guest_reads_on_through_the_new_file_and_the_old_ones_are_closed() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    freeze(&rig, &mut vm, "one");
    let top = freeze(&rig, &mut vm, "two");
    let before = vm.disks().expect("chains");
    assert_eq!(before[0].layers.len(), 4);
    // Nothing to do is nothing done.
    let same: Vec<Layer> = before[0]
        .layers
        .iter()
        .map(|node| layer(&node.path, node.format))
        .collect();
    let chain = vm.follow_layers("vda", &same).expect("followed");
    assert_eq!(vec![chain], before);
    // What is no part of the chain is refused, and so is a file of another size.
    let wrong = wanted(&rig, &mut vm, &rig.path("other"));
    assert!(matches!(
        vm.follow_layers("vda", &wrong),
        Err(Error::Disks { .. })
    ));
    assert_eq!(vm.disks().expect("chains"), before);
    replace(&rig, &top, "fused");
    let files = wanted(&rig, &mut vm, &top);
    let chain = vm.follow_layers("vda", &files).expect("followed");
    let paths: Vec<&Path> = chain
        .layers
        .iter()
        .map(|node| node.path.as_path())
        .collect();
    let expected: Vec<&Path> = files.iter().map(|file| file.path.as_path()).collect();
    assert_eq!(paths, expected);
    assert_eq!(
        nodes(&mut vm),
        [
            "vda.0",
            "vda.0.f",
            "vda.2-1",
            "vda.2-1.f",
            "vda.3",
            "vda.3.f"
        ]
    );
    counts_on(&vm);
    assert_eq!(vm.follow_layers("vda", &files).expect("again"), chain);
    // Captures go on as ever, and so does a second time.
    let next = freeze(&rig, &mut vm, "three");
    replace(&rig, &next, "fused-again");
    let files = wanted(&rig, &mut vm, &next);
    vm.follow_layers("vda", &files).expect("followed");
    assert_eq!(vm.disks().expect("chains")[0].layers.len(), 3);
    let overlays = rig.next_overlays(&mut vm, "last");
    let image = rig.path("image");
    let captured = vm
        .capture(&request(&overlays, &create(&image, 0)))
        .expect("capture");
    let layers = &captured.chains[0].layers;
    assert_one_instant(&image, &layers[layers.len() - 2].path);
    counts_on(&vm);
    vm.kill().expect("kill");
}

#[test]
fn what_was_interrupted_between_any_two_commands_is_gone_on_with() {
    let rig = Rig::new();
    let (mut vm, _) = rig.boot("source");
    for interrupted in ["file", "format", "switched", "half closed"] {
        freeze(&rig, &mut vm, &format!("{interrupted}-one"));
        let top = freeze(&rig, &mut vm, &format!("{interrupted}-two"));
        replace(&rig, &top, interrupted);
        let files = wanted(&rig, &mut vm, &top);
        interrupt(&mut vm, &top, interrupted);
        counts_on(&vm);
        let chain = vm.follow_layers("vda", &files).expect("followed");
        assert_eq!(chain.layers.len(), 3, "{interrupted}");
        assert_eq!(
            nodes(&mut vm).len(),
            6,
            "{interrupted}: nothing else is open"
        );
        counts_on(&vm);
    }
    vm.kill().expect("kill");
}

/// Does the beginning of it by hand.
fn interrupt(vm: &mut Vm, path: &Path, until: &str) {
    let chain = vm.disks().expect("chains").swap_remove(0);
    let [base, lowest, .., topmost, active] = &chain.layers[..] else {
        panic!("too short: {chain:?}");
    };
    // `vda.5-3` stands for 3 to 5, `vda.4` for itself.
    let numbers = |node: &str| {
        let numbers = node.trim_start_matches("vda.");
        let (last, first) = numbers.split_once('-').unwrap_or((numbers, numbers));
        (last.to_owned(), first.to_owned())
    };
    let node = format!(
        "vda.{}-{}",
        numbers(&topmost.node).0,
        numbers(&lowest.node).1
    );
    let file = format!("{node}.f");
    let path = path.to_str().expect("UTF-8");
    let mut ask = |command: &str, arguments: Value| {
        vm.ask::<Value>(command, arguments).expect("answered");
    };
    ask(
        "blockdev-add",
        json!({ "driver": "file", "node-name": file, "filename": path, "read-only": true }),
    );
    if until == "file" {
        return;
    }
    ask(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": node, "file": file, "backing": base.node, "read-only": true }),
    );
    if until == "format" {
        return;
    }
    let above = json!({
        "driver": "qcow2", "node-name": active.node, "file": format!("{}.f", active.node), "backing": node,
        "read-only": false, "discard": "unmap",
    });
    ask("blockdev-reopen", json!({ "options": [above] }));
    if until == "half closed" {
        ask("blockdev-del", json!({ "node-name": topmost.node }));
    }
}
