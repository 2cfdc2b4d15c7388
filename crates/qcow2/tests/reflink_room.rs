//! Where the file system shares blocks, a plan asks for no room for them, and the room is enough.
//!
//! On XFS in a file, mounted for the test; that needs root and mkfs.xfs. Without them only the other half is tested: where
//! nothing is shared, all of it is asked for.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a test need not be durable"
)]

mod images;

use std::path::Path;
use std::process::Command;

use images::{layer, sh};
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::rebase;
use stead_qcow2::{
    Chain, Control, ConvertOptions, DiskContent, Error, LayerFormat, Target, check, convert,
    predict,
};
use stead_sys::durable::Existing;
use stead_sys::space;

const MIB: u64 = 1 << 20;
/// What lies below, in MiB; XFS of this size has less than twice as much free.
const DATA_MIB: u64 = 160;

/// A mounted file system, until it is dropped.
struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a folder");
        let line =
            "truncate -s 320M fs && mkfs.xfs -q -m reflink=1 fs && mkdir on && mount -o loop fs on";
        let done = Command::new("sh")
            .args(["-c", line])
            .current_dir(dir.path())
            .output();
        done.expect("a shell")
            .status
            .success()
            .then_some(Self { dir })
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("on")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let ended = Command::new("umount").arg("-l").arg(self.path()).status();
        drop(ended);
    }
}

/// A raw base full of data and an overlay of it with little.
fn make(dir: &Path, mib: u64) {
    let path = dir.display();
    sh(&format!("qemu-img create -q -f raw {path}/base {mib}M"));
    let io = |format: &str, command: String, name: &str| {
        let args = ["-f", format, "-c", &command, &format!("{path}/{name}")];
        images::run("qemu-io", &args.map(str::to_owned));
    };
    io("raw", format!("write -P 7 0 {mib}M"), "base");
    sh(&format!(
        "qemu-img create -q -f qcow2 -b base -F raw {path}/top"
    ));
    io("qcow2", "write -P 9 1M 1M".into(), "top");
    sh("sync");
}

fn base(dir: &Path) -> Chain {
    Chain::open(&[layer(dir.join("base"), LayerFormat::Raw)]).expect("opens")
}

fn top(dir: &Path) -> Chain {
    let files = [
        layer(dir.join("top"), LayerFormat::Qcow2),
        layer(dir.join("base"), LayerFormat::Raw),
    ];
    Chain::open(&files).expect("opens")
}

fn new(path: std::path::PathBuf) -> Target {
    Target::New {
        path,
        mode: 0o600,
        existing: Existing::Keep,
    }
}

#[test]
fn a_flatten_and_a_copy_need_no_room_for_what_they_share() {
    let Some(mounted) = Mounted::new() else {
        eprintln!("no XFS could be mounted: not tested");
        return;
    };
    let dir = mounted.path();
    make(&dir, DATA_MIB);
    let quiet = Control::default();
    let available = || space::available_bytes(&dir).expect("asked");
    assert!(
        available() < DATA_MIB * MIB,
        "the data does not fit once more"
    );
    let content = DiskContent::of(&top(&dir), &quiet).expect("read");

    let options = ConvertOptions::default();
    let target = new(dir.join("copy"));
    let predicted = predict(&top(&dir), &target, &options, &quiet).expect("predicted");
    assert_eq!(predicted.shared_bytes, DATA_MIB * MIB);
    let before = available();
    let made = convert(&top(&dir), &target, &options, &quiet).expect("copied");
    assert_eq!(made, predicted);
    let took = before - available();
    // The file system keeps room for its own tables beside that.
    assert!(
        took < made.allocated_bytes - made.shared_bytes + 2 * MIB,
        "{took}"
    );
    let copy = Chain::open(&[layer(dir.join("copy"), LayerFormat::Qcow2)]).expect("opens");
    assert_eq!(DiskContent::of(&copy, &quiet).expect("read"), content);
    drop(copy);

    let mut editor = Editor::open(&dir.join("top"), EditOptions::default()).expect("opens");
    let below = base(&dir);
    let before = available();
    let done = rebase::flatten(&mut editor, Some(&below), &quiet).expect("flattened");
    assert_eq!(done.value.bytes, (DATA_MIB - 1) * MIB);
    assert!(done.room.new_bytes < MIB, "{:?}", done.room);
    let took = before.saturating_sub(available());
    assert!(
        took <= done.room.new_bytes + 2 * MIB,
        "{took} {:?}",
        done.room
    );
    assert!(check(editor.layer()).expect("checked").is_clean());
    let flat = Chain::open(&[layer(dir.join("top"), LayerFormat::Qcow2)]).expect("opens");
    assert_eq!(DiskContent::of(&flat, &quiet).expect("read"), content);
}

#[test]
fn where_nothing_is_shared_all_of_it_is_asked_for() {
    // On a file system of its own, the base cannot be shared; memory has one everywhere.
    let Ok(memory) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("no /dev/shm: not tested");
        return;
    };
    let dir = memory.path();
    make(dir, 8);
    let quiet = Control::default();
    let editor = Editor::open(&dir.join("top"), EditOptions::default()).expect("opens");
    let below = base(dir);
    let plan = rebase::plan(&editor, Some(&below), None, &quiet).expect("planned");
    assert!(plan.new_bytes >= 7 * MIB, "{plan:?}");
    let target = new(dir.join("copy"));
    let predicted = predict(&top(dir), &target, &ConvertOptions::default(), &quiet);
    assert_eq!(predicted.expect("predicted").shared_bytes, 0);
}

#[test]
fn a_copy_that_shares_and_still_does_not_fit_is_refused_before_it_is_written() {
    let Some(mounted) = Mounted::new() else {
        eprintln!("no XFS could be mounted: not tested");
        return;
    };
    let dir = mounted.path();
    make(&dir, DATA_MIB);
    // Half of the data is on another file system, and cannot be shared.
    let beside = tempfile::tempdir().expect("a folder");
    let path = beside.path().display();
    sh(&format!(
        "qemu-img create -q -f qcow2 -u -b {}/base -F raw {path}/over {DATA_MIB}M",
        dir.display()
    ));
    let over = beside.path().join("over");
    let args = ["-f", "qcow2", "-c", "write -P 3 0 155M"].map(str::to_owned);
    let mut args = args.to_vec();
    args.push(over.display().to_string());
    images::run("qemu-io", &args);
    let files = [
        layer(&over, LayerFormat::Qcow2),
        layer(dir.join("base"), LayerFormat::Raw),
    ];
    let chain = Chain::open(&files).expect("opens");
    let target = new(dir.join("copy"));
    let quiet = Control::default();
    let error = convert(&chain, &target, &ConvertOptions::default(), &quiet);
    let error = error.expect_err("no room");
    let Error::NoRoom {
        needed, available, ..
    } = error
    else {
        panic!("{error}");
    };
    assert!(
        (155 * MIB..158 * MIB).contains(&needed) && available < needed,
        "{needed} {available}"
    );
    assert_eq!(
        std::fs::read_dir(&dir).expect("a folder").count(),
        2,
        "nothing new is there"
    );
}
