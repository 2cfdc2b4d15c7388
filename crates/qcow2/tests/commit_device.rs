//! A base on a block device: a commit is done where it fits to the byte, and refused beforehand where it does not.
//! The tests need loop devices, so they say so and do nothing where there are none.

#![allow(
    clippy::disallowed_methods,
    reason = "a copy of an image to compare with need not be durable"
)]

mod images;

use std::path::{Path, PathBuf};
use std::process::Command;

use images::{layer, sh};
use stead_qcow2::ops::commit::{CommitOptions, CommitReport, commit, measure};
use stead_qcow2::{Control, Error, LayerFile, LayerFormat, Result};

/// The size of a cluster of the images here, in bytes.
const CLUSTER: u64 = 64 << 10;

/// A block device over a file; given back when dropped.
struct Loop(PathBuf);

impl Loop {
    /// `None`, with the reason printed, where there are no such devices.
    fn over(file: &Path, length: u64) -> Option<Self> {
        let made = std::fs::File::options().write(true).open(file);
        made.expect("there").set_len(length).expect("sized");
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output();
        let output = match output {
            Ok(output) if output.status.success() => output,
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr).into_owned();
                println!("SKIPPED: no loop device: {why}");
                return None;
            }
            Err(error) => {
                println!("SKIPPED: losetup: {error}");
                return None;
            }
        };
        let name = String::from_utf8(output.stdout).expect("text");
        Some(Self(PathBuf::from(name.trim())))
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.0).expect("readable")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let given_back = Command::new("losetup").arg("-d").arg(&self.0).status();
        assert!(
            given_back.is_ok_and(|status| status.success()),
            "given back"
        );
    }
}

/// A base of 2 MiB of ones and a qcow2 top that changes 1 MiB of it and goes on to `size`: what the base is to show.
fn make(dir: &Path, base: LayerFormat, size: u64) -> (PathBuf, PathBuf, Vec<u8>) {
    let [below, top] = ["base", "top"].map(|name| dir.join(name));
    let name = images::format_name(base);
    let (b, t) = (below.display(), top.display());
    sh(&format!("qemu-img create -q -f {name} {b} 2M"));
    qemu_io(&below, name, "write -P 1 0 2M");
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {b} -F {name} {t} {size}"
    ));
    qemu_io(&top, "qcow2", "write -P 2 512k 1M");
    if size > 3 << 20 {
        qemu_io(&top, "qcow2", "write -P 3 2M 1M");
    }
    let shown = images::convert(&layer(&top, LayerFormat::Qcow2), &dir.join("shown"));
    (below, top, shown)
}

fn qemu_io(path: &Path, format: &str, command: &str) {
    let path = path.display().to_string();
    let args = ["-f", format, "-c", command, &path].map(str::to_owned);
    images::run("qemu-io", &args);
}

fn files(top: &Path, device: &Loop, format: LayerFormat) -> [LayerFile; 2] {
    [layer(top, LayerFormat::Qcow2), layer(&device.0, format)]
}

fn run(files: &[LayerFile]) -> Result<CommitReport> {
    commit(files, &CommitOptions::default(), &Control::default())
}

/// The commit is refused for want of room, and neither file has another byte afterwards.
fn require_refused(top: &Path, device: &Loop, format: LayerFormat) {
    let before = (std::fs::read(top).expect("read"), device.bytes());
    let outcome = run(&files(top, device, format));
    assert!(matches!(outcome, Err(Error::NoRoom { .. })), "{outcome:?}");
    let after = (std::fs::read(top).expect("read"), device.bytes());
    assert!(before == after, "nothing was changed");
}

#[test]
fn a_commit_into_a_raw_device_needs_the_disks_length_and_not_a_byte_more() {
    let size = 4 << 20;
    for length in [size - CLUSTER, size] {
        let dir = tempfile::tempdir().expect("temp dir");
        let (base, top, shown) = make(dir.path(), LayerFormat::Raw, size);
        let Some(device) = Loop::over(&base, length) else {
            return;
        };
        if length < size {
            require_refused(&top, &device, LayerFormat::Raw);
            continue;
        }
        let report = run(&files(&top, &device, LayerFormat::Raw)).expect("it fits");
        assert!(report.in_place_bytes >= 2 << 20, "{report:?}");
        assert!(device.bytes() == shown);
    }
}

#[test]
fn a_commit_into_a_qcow2_image_on_a_device_needs_its_peak_and_not_a_byte_more() {
    let size = 4 << 20;
    let dir = tempfile::tempdir().expect("temp dir");
    let (base, top, _) = make(dir.path(), LayerFormat::Qcow2, size);
    let all = [
        layer(&top, LayerFormat::Qcow2),
        layer(&base, LayerFormat::Qcow2),
    ];
    let (options, quiet) = (CommitOptions::default(), Control::default());
    let peak = measure(&all, &options, &quiet)
        .expect("measured")
        .base
        .peak_bytes;
    for length in [peak - CLUSTER, peak] {
        let dir = tempfile::tempdir().expect("temp dir");
        let (base, top, shown) = make(dir.path(), LayerFormat::Qcow2, size);
        let Some(device) = Loop::over(&base, length) else {
            return;
        };
        if length < peak {
            require_refused(&top, &device, LayerFormat::Qcow2);
            continue;
        }
        run(&files(&top, &device, LayerFormat::Qcow2)).expect("it fits");
        let seen = layer(&device.0, LayerFormat::Qcow2);
        assert!(images::convert(&seen, &dir.path().join("seen")) == shown);
        sh(&format!(
            "qemu-img check -q -f qcow2 {}",
            device.0.display()
        ));
    }
}
