//! Whenever a flatten, a rebase, an amendment or a repair is interrupted, the image is what it was or what it was to
//! be; see `edit_crash.rs`. The twin leaves one sync out, and must be caught.

mod images;

use std::path::Path;
use std::sync::Arc;

use images::{layer, run, sh};
use stead_qcow2::edit::{EditOptions, Editor, JournalFiles, Recovery, recover_storage};
use stead_qcow2::ops::amend::{self, Amendments, FormatVersion};
use stead_qcow2::ops::rebase::{self, BackingFile, NewBacking};
use stead_qcow2::ops::repair::{RepairMode, repair_storage};
use stead_qcow2::ops::resize;
use stead_qcow2::ops::restore::restore_from_active;
use stead_qcow2::{
    Chain, Control, Error, ExtentKind, GuestOffset, Layer, LayerFile, LayerFormat, Preallocation,
    Result, check,
};
use stead_sim::disk::Event;
use stead_sim::{DiskFault, FaultDisk, History, RecordedDisk};
use stead_sys::storage::Storage;

/// Losses of power that are tried at each call, and as many where a sync is missing.
const LOSSES: u64 = 6;
const LOSSES_WITHOUT_SYNC: u64 = 60;
const OLD: &str = "old";
const NEW: &str = "new";

/// The files that can be below, by name.
struct Bases {
    old: LayerFile,
    new: LayerFile,
}

impl Bases {
    fn make(dir: &Path) -> Self {
        let make = |name: &str, commands: &[&str]| {
            let path = dir.join(name);
            sh(&format!(
                "qemu-img create -q -f raw {} 150k",
                path.display()
            ));
            let mut args = vec!["-f".to_owned(), "raw".into()];
            for command in commands {
                args.extend(["-c".to_owned(), (*command).to_owned()]);
            }
            args.push(path.display().to_string());
            run("qemu-io", &args);
            layer(path, LayerFormat::Raw)
        };
        Self {
            old: make(OLD, &["write -P 11 0 50k", "write -P 12 100k 50k"]),
            new: make(NEW, &["write -P 11 0 30k", "write -P 13 60k 60k"]),
        }
    }

    fn named(&self, name: &[u8]) -> Chain {
        let file = if name == OLD.as_bytes() {
            &self.old
        } else {
            &self.new
        };
        Chain::open(std::slice::from_ref(file)).expect("whole")
    }
}

/// An overlay over the file "old", with internal snapshots and zeros.
fn image(dir: &Path, options: &str) -> Vec<u8> {
    let path = dir.join("image");
    let name = path.display();
    let old = dir.join(OLD);
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {} -F raw -o {options} {name} 180k",
        old.display()
    ));
    let io = |commands: &[&str]| {
        let mut args = vec!["-f".to_owned(), "qcow2".into()];
        for command in commands {
            args.extend(["-c".to_owned(), (*command).to_owned()]);
        }
        args.push(name.to_string());
        run("qemu-io", &args);
    };
    io(&["write -P 1 8k 9k"]);
    sh(&format!("qemu-img snapshot -c one {name}"));
    io(&["write -P 2 110k 20k", "write -z 30k 16k"]);
    sh(&format!("qemu-img snapshot -c two {name}"));
    // The name is short, so that it can be told from the other.
    sh(&format!("qemu-img rebase -u -b {OLD} -F raw {name}"));
    std::fs::read(&path).expect("read")
}

const KINDS: [&str; 3] = [
    "cluster_size=4k",
    "cluster_size=512,refcount_bits=8",
    "cluster_size=16k,extended_l2=on",
];

/// What the guest and the tools can see.
#[derive(Debug, PartialEq, Eq)]
struct State {
    /// The internal snapshots and, last, the active disk, with what lies below.
    views: Vec<(Vec<u8>, u64, blake3::Hash)>,
    backing: Option<Vec<u8>>,
    version: u32,
    refcount_order: u32,
    marks: (bool, bool),
    wrong: (u64, u64),
}

fn view(name: &[u8], layer: Layer, below: Option<&Chain>) -> Result<(Vec<u8>, u64, blake3::Hash)> {
    let extents: Vec<_> = layer.extents(GuestOffset(0)).collect::<Result<_>>()?;
    let chain = Chain::of(layer);
    let mut bytes = vec![0; usize::try_from(chain.len()).expect("small")];
    chain.read_at(0, &mut bytes)?;
    let seen = extents
        .iter()
        .filter(|one| one.kind == ExtentKind::Unallocated);
    for (extent, below) in seen.flat_map(|extent| below.map(|below| (extent, below))) {
        let end = (extent.start.0 + extent.length).min(below.len());
        if extent.start.0 < end {
            let place = |at: u64| usize::try_from(at).expect("small");
            below.read_at(
                extent.start.0,
                &mut bytes[place(extent.start.0)..place(end)],
            )?;
        }
    }
    Ok((name.to_vec(), chain.len(), blake3::hash(&bytes)))
}

fn state(bytes: &[u8], bases: &Bases) -> Result<State> {
    let disk = Arc::new(RecordedDisk::new(bytes.to_vec()));
    let layer = Layer::from_storage(disk, Path::new("crashed"))?;
    let report = check(&layer)?;
    let header = layer.header().clone();
    let backing = header.backing.map(|backing| backing.name);
    let below = backing.as_deref().map(|name| bases.named(name));
    let mut views = Vec::new();
    for snapshot in layer.internal_snapshots()? {
        let own = layer.view_of(&snapshot)?;
        views.push(view(&snapshot.name, own, below.as_ref())?);
    }
    views.push(view(b"", layer, below.as_ref())?);
    Ok(State {
        views,
        backing,
        version: header.version,
        refcount_order: header.refcount_order,
        marks: (header.dirty, header.corrupt),
        wrong: (report.corruptions, report.leaks),
    })
}

/// As [`state`], recovering first if the image is in progress.
fn settled(bytes: &[u8], bases: &Bases) -> Result<State> {
    match state(bytes, bases) {
        Err(Error::InProgress { .. }) => {
            let disk = Arc::new(RecordedDisk::new(bytes.to_vec()));
            let storage: Arc<dyn Storage> = Arc::clone(&disk) as Arc<dyn Storage>;
            let recovery = recover_storage(storage, Path::new("crashed"), &JournalFiles::Any)?;
            assert_eq!(recovery, Recovery::Finished);
            state(&disk.bytes(), bases)
        }
        found => found,
    }
}

type Operation = fn(Arc<dyn Storage>, &Bases) -> Result<()>;

fn editor(storage: Arc<dyn Storage>) -> Result<Editor> {
    let options = EditOptions {
        cache_bytes: 4096,
        allow_dirty: false,
    };
    Editor::on_storage(storage, Path::new("image"), options)
}

fn flatten(storage: Arc<dyn Storage>, bases: &Bases) -> Result<()> {
    let below = bases.named(OLD.as_bytes());
    rebase::flatten(&mut editor(storage)?, Some(&below), &Control::default()).map(drop)
}

fn other_base(storage: Arc<dyn Storage>, bases: &Bases) -> Result<()> {
    let (below, disk) = (bases.named(OLD.as_bytes()), bases.named(NEW.as_bytes()));
    let new = NewBacking {
        file: BackingFile {
            name: NEW.as_bytes(),
            format: Some(b"raw"),
        },
        disk: &disk,
        content: None,
    };
    let mut editor = editor(storage)?;
    rebase::rebase(&mut editor, Some(&below), Some(&new), &Control::default()).map(drop)
}

fn amended(storage: Arc<dyn Storage>, wanted: &Amendments<'_>, bases: &Bases) -> Result<()> {
    let below = bases.named(OLD.as_bytes());
    let mut editor = editor(storage)?;
    amend::amend(&mut editor, wanted, Some(&below), &Control::default()).map(drop)
}

fn width(storage: Arc<dyn Storage>, bases: &Bases) -> Result<()> {
    let wanted = Amendments {
        refcount_bits: Some(64),
        size: Some(300 << 10),
        ..Amendments::default()
    };
    amended(storage, &wanted, bases)
}

fn reserving(storage: Arc<dyn Storage>, bases: &Bases) -> Result<()> {
    let below = bases.named(OLD.as_bytes());
    let mut editor = editor(storage)?;
    let mode = Preallocation::Falloc;
    resize::resize_reserving(
        &mut editor,
        300 << 10,
        Some(&below),
        mode,
        &Control::default(),
    )
    .map(drop)
}

fn down(storage: Arc<dyn Storage>, bases: &Bases) -> Result<()> {
    let wanted = Amendments {
        version: Some(FormatVersion::V2),
        refcount_bits: Some(16),
        ..Amendments::default()
    };
    amended(storage, &wanted, bases)
}

fn repaired(storage: Arc<dyn Storage>, _bases: &Bases) -> Result<()> {
    repair_storage(
        storage,
        Path::new("image"),
        RepairMode::All,
        &Control::default(),
    )
    .map(drop)
}

fn restored(storage: Arc<dyn Storage>, _bases: &Bases) -> Result<()> {
    restore_from_active(&mut editor(storage)?, b"one").map(drop)
}

/// Every third refcount is another, and the image is marked corrupt.
fn damaged(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let word = |bytes: &[u8], at: usize| {
        let word = u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        usize::try_from(word).expect("small")
    };
    let block = word(&bytes, word(&bytes, 48));
    // Refcounts of clusters that the file has.
    let clusters = bytes.len() >> bytes[23];
    for at in (block..block + clusters.min(40)).step_by(3) {
        bytes[at] ^= 3;
    }
    bytes[79] |= 2;
    bytes
}

/// As qemu-img leaves it: the snapshots have lost what they had below.
fn hollowed(dir: &Path) -> Vec<u8> {
    let path = dir.join("hollow");
    let name = path.display();
    let old = dir.join(OLD);
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {} -F raw -o cluster_size=4k {name} 180k",
        old.display()
    ));
    sh(&format!("qemu-img snapshot -c one {name}"));
    run(
        "qemu-img",
        &[
            "rebase".into(),
            "-b".into(),
            String::new(),
            name.to_string(),
        ],
    );
    std::fs::read(&path).expect("read")
}

fn for_each(mut each: impl FnMut(&str, &[u8], Operation, &Bases)) {
    for kind in KINDS {
        let dir = tempfile::tempdir().expect("temp dir");
        let bases = Bases::make(dir.path());
        let bytes = image(dir.path(), kind);
        let broken = damaged(&bytes);
        each(&format!("flatten, {kind}"), &bytes, flatten, &bases);
        each(&format!("other base, {kind}"), &bytes, other_base, &bases);
        each(&format!("width, {kind}"), &bytes, width, &bases);
        each(&format!("repair, {kind}"), &broken, repaired, &bases);
        if !kind.contains("extended") {
            each(&format!("down, {kind}"), &bytes, down, &bases);
        }
        if kind == KINDS[0] {
            each(&format!("reserve, {kind}"), &bytes, reserving, &bases);
            each("restore", &hollowed(dir.path()), restored, &bases);
        }
    }
}

fn recorded(bytes: &[u8], operation: Operation, bases: &Bases) -> Result<(History, Vec<u8>)> {
    let disk = Arc::new(RecordedDisk::new(bytes.to_vec()));
    operation(Arc::clone(&disk) as Arc<dyn Storage>, bases)?;
    Ok((disk.history(), disk.bytes()))
}

/// How often each state was found; or what else was.
fn judge(
    history: &History,
    bases: &Bases,
    states: [&State; 2],
    losses: u64,
) -> std::result::Result<(u64, u64), String> {
    let (mut olds, mut news) = (0, 0);
    for count in 0..=history.events().len() {
        let losses =
            (0..losses).map(|seed| history.power_loss(count, seed + count as u64 * losses));
        for bytes in std::iter::once(history.prefix(count)).chain(losses) {
            match settled(&bytes, bases) {
                Ok(found) if found == *states[0] => olds += 1,
                Ok(found) if found == *states[1] => news += 1,
                Ok(found) => return Err(format!("another state after call {count}: {found:?}")),
                Err(error) => return Err(format!("{error} after call {count}")),
            }
        }
    }
    Ok((olds, news))
}

#[test]
fn a_crash_leaves_the_old_state_or_the_new_one() {
    for_each(|name, bytes, operation, bases| {
        let (history, after) =
            recorded(bytes, operation, bases).unwrap_or_else(|error| panic!("{name}: {error}"));
        let old = state(bytes, bases).expect("whole");
        let new = state(&after, bases).expect("whole");
        assert!(old != new, "{name} changed nothing");
        assert_eq!(new.wrong, (0, 0), "{name}");
        if name != "restore" {
            assert_eq!(old.views[..2], new.views[..2], "{name}");
        }
        let found = judge(&history, bases, [&old, &new], LOSSES);
        let (olds, news) = found.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(olds > 0 && news > 0, "{name}: {olds}, {news}");
    });
}

/// The twin: without the first sync, the crash test fails.
#[test]
fn the_crash_test_fails_when_the_sync_is_missing() {
    for_each(|name, bytes, operation, bases| {
        let (history, after) = recorded(bytes, operation, bases).expect("works");
        let (old, new) = (
            state(bytes, bases).expect("whole"),
            state(&after, bases).expect("whole"),
        );
        let first = history
            .events()
            .iter()
            .find(|event| !matches!(event, Event::SetLen(_)));
        assert!(first != Some(&Event::Sync), "{name} wrote nothing");
        let judged = judge(
            &history.without_sync(0),
            bases,
            [&old, &new],
            LOSSES_WITHOUT_SYNC,
        );
        assert!(judged.is_err(), "{name}: the first sync is not needed");
    });
}

#[test]
fn a_fault_at_any_call_leaves_the_old_state_or_the_new_one() {
    for_each(|name, bytes, operation, bases| {
        let old = state(bytes, bases).expect("whole");
        let after = recorded(bytes, operation, bases).expect("works").1;
        let new = state(&after, bases).expect("whole");
        for fault in [DiskFault::NoSpace, DiskFault::Io, DiskFault::Killed] {
            for call in 1.. {
                let disk = Arc::new(RecordedDisk::new(bytes.to_vec()));
                let inner = Arc::clone(&disk) as Arc<dyn Storage>;
                let faulty = Arc::new(FaultDisk::new(inner, call, fault));
                let outcome = operation(Arc::clone(&faulty) as Arc<dyn Storage>, bases);
                let text = format!("{name}: {fault:?} at call {call}");
                let left = disk.bytes();
                match outcome {
                    Ok(()) => {
                        assert!(state(&left, bases).expect("whole") == new, "{text}");
                        assert!(faulty.calls() < call, "{text}: the error was lost");
                        break;
                    }
                    Err(Error::Switch { .. }) => {
                        let found = settled(&left, bases).unwrap_or_else(|e| panic!("{text}: {e}"));
                        assert!(found == old || found == new, "{text}");
                    }
                    Err(error) => {
                        assert!(matches!(error, Error::Io { .. }), "{text}: {error}");
                        assert!(state(&left, bases).expect("whole") == old, "{text}");
                    }
                }
            }
        }
    });
}
