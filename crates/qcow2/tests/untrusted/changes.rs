//! Changes of images of unknown origin: what is refused stays as it was, and what is done is whole.

use std::path::Path;
use std::sync::Arc;

use stead_qcow2::edit::{
    EditOptions, Editor, JournalFiles, Recovery, SnapshotName, recover_storage_over,
};
use stead_qcow2::ops::amend::{Amendments, FormatVersion, amend};
use stead_qcow2::ops::bitmap::{self, Action, Step};
use stead_qcow2::ops::rebase::{flatten, rename};
use stead_qcow2::ops::repair::{RepairMode, repair_storage};
use stead_qcow2::ops::resize::resize;
use stead_qcow2::ops::restore::restore_from_active;
use stead_qcow2::ops::snapshot;
use stead_qcow2::{Chain, Control, Error, Layer, Result, check};
use stead_sys::storage::Storage;

use super::memory::Memory;
use super::{DIRECTORY_ENTRIES, READ_BYTES};

/// The extension that says where the journal of an image in progress is: where (8 bytes), length (8), BLAKE3 (32).
const JOURNAL_EXTENSION: [u8; 8] = *b"STJL\0\0\0\x30";
const SECTOR: usize = 512;
/// How many changes there are to choose from.
pub const CHOICES: u8 = 12;

fn disk(bytes: &[u8]) -> (Arc<Memory>, Arc<dyn Storage>) {
    let disk = Arc::new(Memory::new(bytes));
    (Arc::clone(&disk), disk)
}

fn path() -> &'static Path {
    Path::new("untrusted")
}

/// What every disk state shows, the active one first; `None` for one that cannot be read.
type Views = Vec<Option<(u64, blake3::Hash)>>;

fn view(layer: Result<Layer>) -> Option<(u64, blake3::Hash)> {
    let chain = Chain::of(layer.ok()?);
    let mut bytes = vec![0; usize::try_from(chain.len().min(READ_BYTES)).expect("small")];
    chain.read_at(0, &mut bytes).ok()?;
    Some((chain.len(), blake3::hash(&bytes)))
}

fn views(storage: &Arc<dyn Storage>) -> Views {
    let Ok(layer) = Layer::from_storage(Arc::clone(storage), path()) else {
        return Vec::new();
    };
    let snapshots = layer.internal_snapshots().unwrap_or_default();
    let snapshots: Vec<_> = snapshots.iter().take(DIRECTORY_ENTRIES).collect();
    let of_snapshots: Vec<_> = snapshots
        .into_iter()
        .map(|snapshot| view(layer.view_of(snapshot)))
        .collect();
    let mut views = vec![view(Ok(layer))];
    views.extend(of_snapshots);
    views
}

/// What could be read shows the same.
fn assert_same(before: &Views, after: &Views) {
    let readable = before.iter().zip(0..).filter(|(view, _)| view.is_some());
    for (view, index) in readable {
        assert!(after.get(index) == Some(view), "disk state {index} changed");
    }
}

fn choice(bytes: &[u8]) -> u8 {
    bytes.last().copied().unwrap_or_default()
}

/// A repair of everything, or of leaks where the last byte is odd.
pub fn repair(bytes: &[u8]) {
    let (_, storage) = disk(bytes);
    let before = views(&storage);
    let mode = if choice(bytes).is_multiple_of(2) {
        RepairMode::All
    } else {
        RepairMode::Leaks
    };
    let done = repair_storage(Arc::clone(&storage), path(), mode, &Control::default());
    assert_same(&before, &views(&storage));
    if let Ok(repaired) = done {
        let layer = Layer::from_storage(storage, path());
        if let Ok(report) = layer.and_then(|layer| check(&layer)) {
            assert_eq!(report.corruptions, repaired.after.corruptions);
            assert!(report.corruptions == 0 || mode == RepairMode::Leaks);
        }
    }
}

fn open(storage: &Arc<dyn Storage>) -> Result<Editor> {
    let options = EditOptions {
        cache_bytes: 1 << 14,
        allow_dirty: true,
    };
    Editor::on_storage(Arc::clone(storage), path(), options)
}

/// What a change does to what the disk states show.
enum Shown {
    Same,
    /// One more state is there, or one less.
    OtherStates,
    /// The active state is another.
    OtherDisk,
}

/// One change of an image that is accepted for it; the last byte says which.
pub fn change(bytes: &[u8]) {
    let (_, storage) = disk(bytes);
    let before = views(&storage);
    let Ok(mut editor) = open(&storage) else {
        return;
    };
    let leaks = editor.check().leaks;
    let (done, shown) = run(&mut editor, choice(bytes));
    drop(editor);
    match (&done, shown) {
        (Err(Error::Switch { .. }), _) => return,
        (Err(_), _) | (Ok(()), Shown::Same) => assert_same(&before, &views(&storage)),
        (Ok(()), Shown::OtherStates) => assert_same(&before[..1].to_vec(), &views(&storage)),
        (Ok(()), Shown::OtherDisk) => {}
    }
    let layer = Layer::from_storage(Arc::clone(&storage), path()).expect("it opened before");
    let report = check(&layer).expect("it was checked before");
    assert_eq!(report.corruptions, 0, "{:?}", report.findings);
    assert!(done.is_err() || report.leaks <= leaks, "leaks");
}

fn run(editor: &mut Editor, choice: u8) -> (Result<()>, Shown) {
    let control = Control::default();
    match choice % CHOICES {
        0 => (create_snapshot(editor), Shown::OtherStates),
        1 => (snapshot::apply(editor, b"1").map(drop), Shown::OtherDisk),
        2 => (snapshot::delete(editor, b"1").map(drop), Shown::OtherStates),
        3 => (resize(editor, 9 << 10, None).map(drop), Shown::OtherDisk),
        4 => (resize(editor, 90 << 10, None).map(drop), Shown::OtherDisk),
        5 => (flatten(editor, None, &control).map(drop), Shown::Same),
        6 => (rename(editor, None).map(drop), Shown::Same),
        7 => (
            restore_from_active(editor, b"1").map(drop),
            Shown::OtherDisk,
        ),
        8 => (bitmaps(editor), Shown::Same),
        9 => (
            amended(editor, |all| all.refcount_bits = Some(64)),
            Shown::Same,
        ),
        10 => (
            amended(editor, |all| all.version = Some(FormatVersion::V2)),
            Shown::Same,
        ),
        _ => (
            amended(editor, |all| all.version = Some(FormatVersion::V3)),
            Shown::Same,
        ),
    }
}

fn create_snapshot(editor: &mut Editor) -> Result<()> {
    let called = SnapshotName {
        name: b"new".to_vec(),
        date_seconds: 1,
        date_nanoseconds: 2,
    };
    snapshot::create(editor, &called).map(drop)
}

fn bitmaps(editor: &mut Editor) -> Result<()> {
    let add = Action::Add {
        granularity_bits: Some(9),
        enabled: true,
    };
    let merge = Action::Merge {
        source: b"b0",
        image: None,
    };
    let steps = [
        (&b"new"[..], add),
        (b"new", merge),
        (b"b0", Action::Clear),
        (b"b1", Action::Remove),
    ];
    let steps = steps.map(|(bitmap, action)| Step { bitmap, action });
    bitmap::change(editor, &steps).map(drop)
}

fn amended(editor: &mut Editor, set: impl FnOnce(&mut Amendments<'_>)) -> Result<()> {
    let mut amendments = Amendments::default();
    set(&mut amendments);
    amend(editor, &amendments, None, &Control::default()).map(drop)
}

/// The journal of an image in progress, with its hash made right, is finished, and then there is nothing left to do.
pub fn recover(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    make_hash_right(&mut bytes);
    let (_, storage) = disk(&bytes);
    let (_, raw) = disk(&[7; 20_000]);
    let done = recover_storage_over(
        Arc::clone(&storage),
        path(),
        Arc::clone(&raw),
        &JournalFiles::Nothing,
    );
    if let Ok(Recovery::Finished) = done {
        let again = recover_storage_over(Arc::clone(&storage), path(), raw, &JournalFiles::Nothing);
        assert!(matches!(again, Ok(Recovery::NothingToDo)), "{again:?}");
        views(&storage);
    }
}

fn make_hash_right(bytes: &mut [u8]) {
    let head = &bytes[..bytes.len().min(SECTOR)];
    let found = head
        .windows(8)
        .position(|window| window == JOURNAL_EXTENSION);
    let Some(start) = found
        .map(|at| at + 8)
        .filter(|start| start + 48 <= head.len())
    else {
        return;
    };
    let number = |at: usize| {
        let word = bytes[at..at + 8].try_into().expect("8 bytes");
        usize::try_from(u64::from_be_bytes(word)).ok()
    };
    let range = number(start).zip(number(start + 8));
    let range = range.and_then(|(at, length)| Some(at..at.checked_add(length)?));
    if let Some(journal) = range.and_then(|range| bytes.get(range)) {
        let hash = *blake3::hash(journal).as_bytes();
        bytes[start + 16..start + 48].copy_from_slice(&hash);
    }
}
