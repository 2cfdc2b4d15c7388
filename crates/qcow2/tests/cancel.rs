//! What takes long says how far it is, and ends when that is wished for: the image is then as it was.

#![allow(
    clippy::disallowed_methods,
    reason = "files of a test need not be durable"
)]

mod crashes;
mod images;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crashes::state;
use images::sh;
use stead_qcow2::edit::{EditOptions, Editor, SnapshotName};
use stead_qcow2::ops::amend::{Amendments, amend};
use stead_qcow2::ops::bitmap::{self, Action, Step};
use stead_qcow2::ops::repair::{RepairMode, repair_storage};
use stead_qcow2::ops::{resize, snapshot};
use stead_qcow2::{
    Chain, Control, Error, Layer, NewFormat, Preallocation, Qcow2Options, Result, check_with,
    compare_with, measure_with,
};
use stead_sim::RecordedDisk;
use stead_sys::storage::Storage;

/// A disk that wishes for an end at one of its calls.
#[derive(Debug)]
struct WishingDisk {
    inner: Arc<RecordedDisk>,
    calls: AtomicU64,
    at_call: u64,
    wish: Arc<AtomicBool>,
}

impl WishingDisk {
    fn new(bytes: &[u8], at_call: u64) -> Self {
        Self {
            inner: Arc::new(RecordedDisk::new(bytes.to_vec())),
            calls: AtomicU64::new(0),
            at_call,
            wish: Arc::new(AtomicBool::new(at_call == 0)),
        }
    }

    fn count(&self) {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        self.wish.fetch_or(call == self.at_call, Ordering::SeqCst);
    }
}

impl Storage for WishingDisk {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.count();
        self.inner.read_exact_at(bytes, at)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.count();
        self.inner.write_all_at(bytes, at)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.count();
        self.inner.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.count();
        self.inner.sync()
    }
}

/// An image with two internal snapshots, a bitmap, and clusters of all kinds.
fn image() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    let name = path.display();
    let write = |from: u32, to: u32, byte: u8| {
        let mut line = format!("qemu-io -f qcow2 {name}");
        for at in (from..to).step_by(7) {
            line.push_str(&format!(" -c 'write -q -P {byte} {at}k 3k'"));
        }
        let done = std::process::Command::new("sh")
            .args(["-ec", &line])
            .status();
        assert!(done.expect("a shell").success(), "{line}");
    };
    sh(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size=1k {name} 400k"
    ));
    write(0, 380, 1);
    sh(&format!("qemu-img snapshot -c one {name}"));
    write(3, 300, 2);
    sh(&format!("qemu-img bitmap --add -g 512 {name} b"));
    write(1, 200, 3);
    sh(&format!("qemu-img snapshot -c two {name}"));
    write(2, 100, 4);
    std::fs::read(&path).expect("read")
}

type Operation = fn(Arc<dyn Storage>, &Control<'_>) -> Result<()>;

fn editor(storage: Arc<dyn Storage>, control: &Control<'_>) -> Result<Editor> {
    let options = EditOptions {
        cache_bytes: 1 << 14,
        allow_dirty: false,
    };
    let quiet = Control {
        progress: None,
        ..*control
    };
    Editor::on_storage(storage, Path::new("image"), options.watched(&quiet))
}

fn create(storage: Arc<dyn Storage>, control: &Control<'_>) -> Result<()> {
    let called = SnapshotName {
        name: b"new".to_vec(),
        date_seconds: 1,
        date_nanoseconds: 2,
    };
    snapshot::create_with(&mut editor(storage, control)?, &called, control).map(drop)
}

fn apply(storage: Arc<dyn Storage>, control: &Control<'_>) -> Result<()> {
    snapshot::apply_with(&mut editor(storage, control)?, b"one", control).map(drop)
}

fn delete(storage: Arc<dyn Storage>, control: &Control<'_>) -> Result<()> {
    snapshot::delete_with(&mut editor(storage, control)?, b"one", control).map(drop)
}

fn grow(storage: Arc<dyn Storage>, control: &Control<'_>) -> Result<()> {
    let mut editor = editor(storage, control)?;
    let mode = Preallocation::Full;
    resize::resize_reserving(&mut editor, 500 << 10, None, mode, control).map(drop)
}

fn bitmaps(storage: Arc<dyn Storage>, control: &Control<'_>) -> Result<()> {
    let add = Action::Add {
        granularity_bits: Some(9),
        enabled: true,
    };
    let merge = Action::Merge {
        source: b"b",
        image: None,
    };
    let steps = [(&b"new"[..], add), (b"new", merge), (b"b", Action::Clear)];
    let steps = steps.map(|(bitmap, action)| Step { bitmap, action });
    bitmap::change_with(&mut editor(storage, control)?, &steps, control).map(drop)
}

fn widen(storage: Arc<dyn Storage>, control: &Control<'_>) -> Result<()> {
    let wanted = Amendments {
        refcount_bits: Some(64),
        ..Amendments::default()
    };
    amend(&mut editor(storage, control)?, &wanted, None, control).map(drop)
}

const CHANGES: [(&str, Operation); 6] = [
    ("snapshot -c", create),
    ("snapshot -a", apply),
    ("snapshot -d", delete),
    ("resize", grow),
    ("bitmap", bitmaps),
    ("amend", widen),
];

/// The control of a run that wishes for an end at call `at_call`, and what it was told.
fn run(
    bytes: &[u8],
    at_call: u64,
    operation: impl FnOnce(Arc<dyn Storage>, &Control<'_>) -> Result<()>,
) -> (Result<()>, Vec<u8>, Vec<f64>, u64) {
    let disk = Arc::new(WishingDisk::new(bytes, at_call));
    let told = Mutex::new(Vec::new());
    let tell = |fraction: f64| told.lock().expect("no panic").push(fraction);
    let control = Control {
        cancel: Some(&disk.wish),
        progress: Some(&tell),
    };
    let done = operation(Arc::clone(&disk) as _, &control);
    let calls = disk.calls.load(Ordering::SeqCst);
    let told = told.into_inner().expect("no panic");
    (done, disk.inner.bytes(), told, calls)
}

#[test]
fn a_change_that_is_cancelled_at_any_call_leaves_the_image_as_it_was_or_is_done() {
    let bytes = image();
    let old = state(&bytes).expect("whole");
    for (name, operation) in CHANGES {
        let (done, after, told, calls) = run(&bytes, u64::MAX, operation);
        done.expect(name);
        let new = state(&after).expect("whole");
        assert!(told.is_sorted(), "{name}: {told:?}");
        assert!(
            told.len() > 3 && told.last() == Some(&1.0),
            "{name}: {told:?}"
        );
        let mut cancelled = 0;
        for at_call in (0..=calls).step_by(usize::try_from(calls / 60 + 1).expect("small")) {
            let (done, after, _, _) = run(&bytes, at_call, operation);
            let found = state(&after).expect("whole");
            match done {
                Ok(()) => assert!(found == new, "{name} at call {at_call}"),
                Err(Error::Cancelled { .. }) => {
                    assert!(found == old, "{name} at call {at_call}");
                    assert_eq!(after.len(), bytes.len(), "{name} at call {at_call}");
                    cancelled += 1;
                }
                Err(error) => panic!("{name} at call {at_call}: {error}"),
            }
        }
        assert!(cancelled > 20, "{name}: {cancelled} of {calls} calls");
    }
}

/// A repair of refcounts that are all lost.
#[test]
fn a_repair_that_is_cancelled_at_any_call_leaves_the_damaged_image_as_it_was() {
    let mut bytes = image();
    // The first refcount block: everything it counts has no references now.
    let word = |bytes: &[u8], at: usize| {
        let word = bytes[at..at + 8].try_into().expect("8 bytes");
        usize::try_from(u64::from_be_bytes(word)).expect("small")
    };
    let table = word(&bytes, 48);
    let block = word(&bytes, table);
    bytes[block..block + 512].fill(0);
    let repair: Operation = |storage, control| {
        repair_storage(storage, Path::new("image"), RepairMode::All, control).map(drop)
    };
    let (done, after, told, calls) = run(&bytes, u64::MAX, repair);
    done.expect("repaired");
    state(&after).expect("whole");
    assert!(told.is_sorted() && told.last() == Some(&1.0), "{told:?}");
    let old = Layer::from_storage(Arc::new(RecordedDisk::new(bytes.clone())), Path::new("old"));
    let old = check_with(&old.expect("opens"), &Control::default()).expect("checked");
    let mut cancelled = 0;
    for at_call in (0..=calls).step_by(usize::try_from(calls / 60 + 1).expect("small")) {
        let (done, after, _, _) = run(&bytes, at_call, repair);
        if let Err(error) = done {
            assert!(matches!(error, Error::Cancelled { .. }), "{error}");
            let disk = Arc::new(RecordedDisk::new(after));
            let layer = Layer::from_storage(disk, Path::new("after")).expect("opens");
            let found = check_with(&layer, &Control::default()).expect("checked");
            assert!(found == old, "call {at_call}");
            cancelled += 1;
        } else {
            state(&after).expect("whole");
        }
    }
    assert!(cancelled > 20, "{cancelled} of {calls} calls");
}

#[test]
fn whoever_only_looks_says_how_far_it_is_and_ends_when_that_is_wished_for() {
    let bytes = image();
    let looks: [(&str, Operation); 4] = [
        ("check", |storage, control| {
            let layer = Layer::from_storage(storage, Path::new("image"))?;
            check_with(&layer, control).map(drop)
        }),
        ("map", |storage, control| {
            let chain = Chain::of(Layer::from_storage(storage, Path::new("image"))?);
            chain
                .map(0)
                .watched(control)
                .try_for_each(|entry| entry.map(drop))
        }),
        ("measure", |storage, control| {
            let chain = Chain::of(Layer::from_storage(storage, Path::new("image"))?);
            let format = NewFormat::Qcow2(Qcow2Options::default());
            measure_with(&chain, &format, control).map(drop)
        }),
        ("compare", |storage, control| {
            let [a, b] = [Arc::clone(&storage), storage]
                .map(|storage| Layer::from_storage(storage, Path::new("image")));
            compare_with(&Chain::of(a?), &Chain::of(b?), true, control).map(drop)
        }),
    ];
    for (name, look) in looks {
        let (done, after, told, calls) = run(&bytes, u64::MAX, look);
        done.expect(name);
        assert!(after == bytes, "{name}");
        assert!(told.is_sorted(), "{name}: {told:?}");
        assert_eq!(told.last(), Some(&1.0), "{name}: {told:?}");
        let mut cancelled = 0;
        for at_call in 0..=calls {
            let (done, _, _, _) = run(&bytes, at_call, look);
            match done {
                Ok(()) => {}
                Err(Error::Cancelled { .. }) => cancelled += 1,
                Err(error) => panic!("{name} at call {at_call}: {error}"),
            }
        }
        assert!(cancelled > 1, "{name}: {cancelled} of {calls} calls");
    }
}
