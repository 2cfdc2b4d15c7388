//! The room that is said is the room that is needed, to the cluster, and the report that this began with.

#![allow(
    clippy::disallowed_methods,
    reason = "copies of images in tests need not be durable"
)]

mod common;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::{Loop, content, qemu_flags, sh, shared_memory, silent};
use stead_merge::{Becomes, Kind, MergeRequest, Place, StalePolicy, plan, run};
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::bitmap::{self, Action};
use stead_qcow2::ops::commit::{Chosen, CommitOptions, Incomplete, commit_into};
use stead_qcow2::{Control, Layer, LayerFile, LayerFormat};
use stead_sys::storage::{FileStorage, Storage};

const MIB: u64 = 1 << 20;

/// A disk that ends: what is written behind its end finds no room.
#[derive(Debug)]
struct Limited {
    file: FileStorage,
    bytes: u64,
}

impl Limited {
    fn inside(&self, end: u64) -> io::Result<()> {
        match end <= self.bytes {
            true => Ok(()),
            false => Err(io::Error::from(io::ErrorKind::StorageFull)),
        }
    }
}

impl Storage for Limited {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.inside(at + bytes.len() as u64)?;
        self.file.write_all_at(bytes, at)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.inside(length)?;
        self.file.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bitmaps {
    Shared,
    Stale,
    Pruned,
}

struct Case {
    dir: tempfile::TempDir,
    cluster: u64,
    bitmaps: Bitmaps,
}

impl Case {
    /// A base with data in some places, a top that writes over some and to others, and bitmaps.
    fn new(cluster: u64, bitmaps: Bitmaps) -> Self {
        let dir = tempfile::tempdir_in(shared_memory()).expect("temp dir");
        let at = dir.path().display();
        let create = format!("qemu-img create -q -f qcow2 -o cluster_size={cluster}");
        sh(&format!(
            "cd {at} && {create} base 32M && qemu-io -f qcow2 -c 'write -P 1 0 5M' base"
        ));
        for index in 0..3 {
            sh(&format!(
                "cd {at} && qemu-img bitmap --add -g 64k base b{index}"
            ));
        }
        // The bits are not all clear, so they take clusters.
        sh(&format!(
            "cd {at} && qemu-io -f qcow2 -c 'write -P 2 1M 100k' base && {create} -b base -F qcow2 top"
        ));
        if bitmaps == Bitmaps::Shared {
            for index in 0..3 {
                sh(&format!(
                    "cd {at} && qemu-img bitmap --add -g 64k top b{index}"
                ));
            }
        }
        sh(&format!(
            "cd {at} && qemu-img bitmap --add top good && qemu-io -f qcow2 -c 'write -P 3 3M 4M' -c 'write -P 4 20M 333k' -c 'write -z 512k 512k' top"
        ));
        Self {
            dir,
            cluster,
            bitmaps,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn request(&self) -> MergeRequest {
        MergeRequest {
            chain: self.path("top"),
            stale: match self.bitmaps {
                Bitmaps::Stale | Bitmaps::Shared => StalePolicy::Keep,
                Bitmaps::Pruned => StalePolicy::Prune,
            },
            records: self.path("records"),
            ..MergeRequest::default()
        }
    }

    /// Whether the commit can be done on a disk of so many bytes, which nobody looked at beforehand.
    fn fits(&self, bytes: u64) -> bool {
        let copy = self.path("copy");
        fs::copy(self.path("base"), &copy).expect("copied");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&copy)
            .expect("there");
        let disk = Limited {
            file: FileStorage::new(file).expect("a file"),
            bytes,
        };
        let mut editor =
            Editor::on_storage(Arc::new(disk), &copy, EditOptions::default()).expect("whole");
        let gone = (0..3).filter(|_| self.bitmaps == Bitmaps::Pruned);
        let options = CommitOptions {
            incomplete: Incomplete::Mark,
            chosen: gone
                .map(|index| (format!("b{index}").into_bytes(), Chosen::Remove))
                .collect(),
            ..CommitOptions::default()
        };
        let top = [LayerFile {
            path: self.path("top"),
            format: LayerFormat::Qcow2,
        }];
        commit_into(&mut editor, 0, (&top, &[]), &options, &Control::default()).is_ok()
    }

    /// The smallest disk, in clusters, on which it can be done.
    fn smallest(&self) -> u64 {
        let (mut too_small, mut enough) = (0, 64 * MIB / self.cluster);
        assert!(self.fits(enough * self.cluster));
        while enough - too_small > 1 {
            let middle = (enough + too_small) / 2;
            match self.fits(middle * self.cluster) {
                true => enough = middle,
                false => too_small = middle,
            }
        }
        enough * self.cluster
    }
}

#[test]
fn the_peak_that_is_said_is_the_smallest_disk_on_which_it_can_be_done_to_the_cluster() {
    for bits in [12, 14, 16, 18, 21] {
        for bitmaps in [Bitmaps::Shared, Bitmaps::Stale, Bitmaps::Pruned] {
            let case = Case::new(1 << bits, bitmaps);
            let plan = plan(&case.request()).expect("planned");
            assert!(plan.refused.is_empty(), "{:?}", plan.refused);
            let expected = match bitmaps {
                Bitmaps::Shared => Becomes::Merged,
                Bitmaps::Stale => Becomes::Marked,
                Bitmaps::Pruned => Becomes::Pruned,
            };
            assert_eq!(plan.bitmaps[0].becomes, expected);
            let said = plan.space[0].peak_bytes;
            assert_eq!(said, case.smallest(), "{bits} bits, {bitmaps:?}");
            run(&case.request(), silent()).expect("merged");
            let length = fs::metadata(case.path("base")).expect("there").len();
            assert_eq!(length, plan.space[0].end_bytes, "{bits} bits, {bitmaps:?}");
        }
    }
}

#[test]
fn a_device_needs_what_is_said_and_one_block_less_is_refused_or_extended() {
    let Some(device) = Loop::new(64 * MIB) else {
        eprintln!("no loop devices here");
        return;
    };
    let case = Case::new(1 << 16, Bitmaps::Pruned);
    let base = fs::read(case.path("base")).expect("there");
    let put = || {
        fs::write(device.backing(), {
            let mut bytes = base.clone();
            bytes.resize(usize::try_from(64 * MIB).expect("small"), 0xdd);
            bytes
        })
    };
    put().expect("written");
    sh(&format!(
        "losetup -c {0} && qemu-img rebase -u -f qcow2 -b {0} -F qcow2 {1}",
        device.device.display(),
        case.path("top").display()
    ));
    let request = MergeRequest {
        keep_layers: true,
        ..case.request()
    };
    let disk = content(&case.path("top"));
    let needed = {
        let plan = plan(&request).expect("planned");
        assert_eq!(plan.space[0].place, Place::Device);
        assert_eq!(plan.space[0].available_bytes, 64 * MIB);
        plan.space[0].needed_bytes
    };
    // One block less: refused, with the device as it was.
    device.resize(needed - 512);
    let before = fs::read(device.backing()).expect("there");
    let error = run(&request, silent()).expect_err("too short");
    assert_eq!(error.kind(), Kind::NoSpace);
    assert!(
        error.found().contains(&format!("needs {needed} bytes"))
            && error.found().contains("extend it by 512"),
        "{error}"
    );
    assert!(fs::read(device.backing()).expect("there") == before);
    // The hook gets the device and the length, and what it leaves is looked at again.
    let lazy = MergeRequest {
        extend_cmd: Some("true".into()),
        ..request.clone()
    };
    assert_eq!(
        run(&lazy, silent()).expect_err("still too short").kind(),
        Kind::NoSpace
    );
    let failing = MergeRequest {
        extend_cmd: Some("exit 3;".into()),
        ..request.clone()
    };
    assert!(
        run(&failing, silent())
            .expect_err("failed")
            .found()
            .contains("3")
    );
    assert!(fs::read(device.backing()).expect("there") == before);
    let extending = MergeRequest {
        extend_cmd: Some(format!(
            "f() {{ truncate -s \"$2\" {} && losetup -c \"$1\"; }}; f",
            device.backing().display()
        )),
        ..request
    };
    run(&extending, silent()).expect("merged");
    assert_eq!(fs::metadata(device.backing()).expect("there").len(), needed);
    assert!(content(&device.device) == disk);
    assert_eq!(
        qemu_flags(&device.device, "good"),
        Some(vec!["auto".to_owned()])
    );
    // The record of a merge into a device was in its folder, and is gone.
    assert_eq!(fs::read_dir(case.path("records")).expect("made").count(), 0);
}

/// The report's chain: a base on a device of 128 MiB with stale bitmaps, 126 MiB in the top.
struct Reported {
    device: Loop,
    dir: tempfile::TempDir,
}

impl Reported {
    fn new() -> Option<Self> {
        let device = Loop::new(128 * MIB)?;
        let dir = tempfile::tempdir_in(shared_memory()).expect("temp dir");
        let (base, top) = (device.device.display(), dir.path().join("top"));
        let top = top.display();
        sh(&format!(
            "qemu-img create -q -f qcow2 {base} 1G && qemu-img create -q -f qcow2 -b {base} -F qcow2 {top} && qemu-img bitmap --add {top} good && qemu-io -f qcow2 -c 'write -P 66 0 126M' {top}"
        ));
        Some(Self { device, dir })
    }

    fn top(&self) -> PathBuf {
        self.dir.path().join("top")
    }

    fn with_stale(&self, count: usize) {
        self.empty_base();
        let names: Vec<String> = (0..count).map(stale).collect();
        let steps = names.iter().map(|name| bitmap::Step {
            bitmap: name.as_bytes(),
            action: Action::Add {
                granularity_bits: None,
                enabled: true,
            },
        });
        let steps: Vec<_> = steps.collect();
        let mut editor = Editor::open(&self.device.device, EditOptions::default()).expect("whole");
        bitmap::change(&mut editor, &steps).expect("added");
    }

    /// As the report made them, which takes long and leaves other clusters free.
    fn with_stale_by_qemu(&self, count: usize) {
        self.empty_base();
        let base = self.device.device.display();
        for name in (0..count).map(stale) {
            sh(&format!("qemu-img bitmap --add {base} {name}"));
        }
    }

    fn empty_base(&self) {
        let base = self.device.device.display();
        sh(&format!(
            "blkdiscard -f {base} && qemu-img create -q -f qcow2 {base} 1G"
        ));
    }

    /// `qemu-img commit`, then the bitmap added and merged, as the report did it: whether "good" is usable and the data
    /// whole, whatever the commands said.
    fn by_qemu(&self) -> (bool, bool) {
        let (base, top) = (self.device.device.display(), self.top());
        let top = top.display();
        for line in [
            format!("qemu-img commit -f qcow2 -t none -b {base} -d {top}"),
            format!("qemu-img bitmap --add {base} good"),
            format!("qemu-img bitmap --merge good -F qcow2 -b {top} {base} good"),
        ] {
            // What it says is what the report is about.
            let ended = Command::new("sh").args(["-c", &line]).output();
            ended.expect("qemu-img runs");
        }
        let good = qemu_flags(&self.device.device, "good") == Some(vec!["auto".to_owned()]);
        (good, self.data_is_whole())
    }

    fn data_is_whole(&self) -> bool {
        let base = self.device.device.display();
        let mut read = Command::new("qemu-io");
        read.args(["-f", "qcow2", "-c", "read -P 66 0 126M"]);
        read.args(["-c", "read -P 0 126M 8M", &base.to_string()]);
        let out = read.output().expect("qemu-io runs");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        out.status.success() && !text.contains("Pattern verification failed")
    }

    fn request(&self, stale: StalePolicy) -> MergeRequest {
        MergeRequest {
            chain: self.top(),
            stale,
            keep_layers: true,
            records: self.dir.path().join("records"),
            ..MergeRequest::default()
        }
    }

    fn require_good(&self, story: &str) {
        assert!(self.data_is_whole(), "{story}");
        let base = &self.device.device;
        assert_eq!(
            qemu_flags(base, "good"),
            Some(vec!["auto".to_owned()]),
            "{story}"
        );
        let layer = Layer::open(base).expect("whole");
        let stored = layer.stored_bitmaps().expect("whole");
        let good = stored
            .iter()
            .find(|one| one.name == b"good")
            .expect("there");
        let bits = layer.read_bitmap(good).expect("usable");
        let ranges: Vec<_> = bits.dirty_ranges().collect();
        let whole = 0..126 * MIB;
        assert!(
            ranges.len() == 1 && ranges[0] == whole,
            "{ranges:?} {story}"
        );
        sh(&format!("qemu-img check -q -f qcow2 {}", base.display()));
    }
}

#[test]
fn the_reported_merge_keeps_data_and_bitmap_whatever_is_stale_or_refuses_and_changes_nothing() {
    let Some(world) = Reported::new() else {
        eprintln!("no loop devices here");
        return;
    };
    // What it is measured against: the same merge by qemu-img loses the bitmap, and then the data.
    for (stale, whole) in [(0, true), (6, false), (14, false)] {
        world.with_stale_by_qemu(stale);
        let (good, data) = world.by_qemu();
        assert_eq!(
            good && data,
            whole,
            "qemu-img, {stale} stale: good {good}, data {data}"
        );
    }
    let (mut merged, mut refused) = (Vec::new(), Vec::new());
    let prune = [0, 1, 5, 6, 7, 11, 13, 14, 16, 32].map(|stale| (stale, StalePolicy::Prune));
    let keep = [5, 16].map(|stale| (stale, StalePolicy::Keep));
    for (stale, policy) in prune.into_iter().chain(keep) {
        let story = format!("{stale} stale, {policy:?}");
        world.with_stale(stale);
        // Reading it all takes its time, and fewer are never refused.
        let before = (stale >= 14).then(|| hash(world.device.backing()));
        match run(&world.request(policy), silent()) {
            Ok(report) => {
                let pruned = report.plan.bitmaps.iter();
                let pruned = pruned.filter(|one| one.becomes == Becomes::Pruned);
                let expected = if policy == StalePolicy::Prune {
                    stale
                } else {
                    0
                };
                assert_eq!(pruned.count(), expected);
                world.require_good(&story);
                merged.push((stale, policy));
            }
            Err(error) => {
                assert_eq!(error.kind(), Kind::NoSpace, "{error}");
                assert_eq!(Some(hash(world.device.backing())), before, "{story}");
                refused.push((stale, policy));
            }
        }
    }
    // All that qemu-img loses is kept; what stale bitmaps take is free only behind the merge, so 32 leave too little.
    assert_eq!(merged[..9], prune[..9], "{refused:?}");
    assert!(refused.contains(&(32, StalePolicy::Prune)), "{merged:?}");
}

fn stale(index: usize) -> String {
    format!("stale-{index:03}")
}

fn hash(path: &Path) -> String {
    sh(&format!("sha256sum < {}", path.display()))
}
