//! A commit that is interrupted anywhere leaves the base as it was, as it was to be, or in progress and recoverable.

#![allow(
    clippy::disallowed_methods,
    reason = "a crash image that is looked at again need not be durable"
)]

mod crashes;
mod images;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crashes::{editor, judge, settled, state};
use images::{layer, run, sh};
use stead_qcow2::edit::{JournalFiles, Recovery, recover_storage_over};
use stead_qcow2::ops::commit::{CommitOptions, RawBase, commit_into, commit_into_raw};
use stead_qcow2::{Chain, Control, Error, Layer, LayerFile, LayerFormat, Result};
use stead_sim::{DiskFault, FaultDisk, RecordedDisk};
use stead_sys::storage::Storage;

fn io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f".to_owned(), "qcow2".into(), "-d".into(), "unmap".into()];
    for command in commands {
        args.extend(["-c".to_owned(), (*command).to_owned()]);
    }
    args.push(path.display().to_string());
    run("qemu-io", &args);
}

/// A base with snapshots and bitmaps, and two layers over it; the base's bytes, the layers top first.
struct Setup {
    _dir: tempfile::TempDir,
    base: PathBuf,
    bytes: Vec<u8>,
    above: Vec<LayerFile>,
}

fn setup(options: &str) -> Setup {
    let dir = tempfile::tempdir().expect("temp dir");
    let [base, mid, top] = ["base", "mid", "top"].map(|name| dir.path().join(name));
    let names = [&base, &mid, &top].map(|path| path.display().to_string());
    let with_bitmaps = !options.contains("0.10");
    sh(&format!(
        "qemu-img create -q -f qcow2 -o {options} {} 150k",
        names[0]
    ));
    io(
        &base,
        &[
            "write -P 1 0 64k",
            "write -c -P 2 64k 32k",
            "write -P 1 96k 4k",
        ],
    );
    sh(&format!("qemu-img snapshot -c kept {}", names[0]));
    io(&base, &["write -P 3 0 40k", "write -z 100k 16k"]);
    let add = |name: &str, bitmap: &str| {
        if with_bitmaps {
            sh(&format!("qemu-img bitmap --add -g 4k {name} {bitmap}"));
        }
    };
    for bitmap in ["both", "base", "gap"] {
        add(&names[0], bitmap);
    }
    io(&base, &["write -P 4 8k 3k"]);
    for level in [1, 2] {
        sh(&format!(
            "qemu-img create -q -f qcow2 -o cluster_size=4k -b {} -F qcow2 {} 199k",
            names[level - 1],
            names[level]
        ));
        add(&names[level], "both");
        add(&names[level], "above");
    }
    io(
        &mid,
        &["write -P 5 4k 5k", "write -P 6 60k 10k", "write -z 20k 8k"],
    );
    io(
        &top,
        &[
            "write -P 7 6k 7k",
            "write -P 8 90k 12k",
            "write -P 9 140k 59k",
        ],
    );
    Setup {
        bytes: std::fs::read(&base).expect("read"),
        above: [top, mid]
            .map(|path| layer(path, LayerFormat::Qcow2))
            .to_vec(),
        _dir: dir,
        base,
    }
}

const KINDS: [&str; 4] = [
    "cluster_size=4k",
    "cluster_size=512",
    "cluster_size=1k,compat=0.10",
    "cluster_size=16k,extended_l2=on",
];

fn run_on(setup: &Setup, storage: Arc<dyn Storage>) -> Result<()> {
    let options = CommitOptions::default();
    let chain = (&setup.above[..], &[][..]);
    let quiet = Control::default();
    commit_into(&mut editor(storage)?, 0, chain, &options, &quiet).map(drop)
}

/// What the disk is through the top over a base with these bytes.
fn through_the_top(setup: &Setup, base: &[u8]) -> Vec<u8> {
    std::fs::write(&setup.base, base).expect("write");
    let mut files = setup.above.clone();
    files.push(layer(&setup.base, LayerFormat::Qcow2));
    let chain = Chain::open(&files).expect("whole");
    let mut bytes = vec![0; usize::try_from(chain.len()).expect("small")];
    chain.read_at(0, &mut bytes).expect("readable");
    bytes
}

#[test]
fn a_crash_at_any_write_leaves_the_base_before_or_after_and_the_disk_right() {
    let mut recovered = 0;
    for kind in KINDS {
        let setup = setup(kind);
        let disk = Arc::new(RecordedDisk::new(setup.bytes.clone()));
        run_on(&setup, Arc::clone(&disk) as _).expect("commit");
        let after = disk.bytes();
        let shown = through_the_top(&setup, &setup.bytes);
        assert!(through_the_top(&setup, &after) == shown, "{kind}");
        let (old, new) = (
            state(&setup.bytes).expect("whole"),
            state(&after).expect("whole"),
        );
        assert!(old != new);
        let tally = judge(&disk.history(), &old, &new);
        let tally = tally.unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert!(
            tally.old > 0 && tally.new > 0 && tally.recovered > 0,
            "{tally:?}"
        );
        recovered += tally.recovered;
    }
    assert!(recovered > 50, "{recovered}");
}

/// The twin: a commit without the sync that makes its journal safe is caught.
#[test]
fn the_crash_test_fails_when_the_journal_is_not_synced() {
    let setup = setup(KINDS[0]);
    let disk = Arc::new(RecordedDisk::new(setup.bytes.clone()));
    run_on(&setup, Arc::clone(&disk) as _).expect("commit");
    let (old, new) = (
        state(&setup.bytes).expect("whole"),
        state(&disk.bytes()).expect("whole"),
    );
    for which in 0..3 {
        let quiet = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let judged = judge(&disk.history().without_sync(which), &old, &new);
        std::panic::set_hook(quiet);
        assert!(judged.is_err(), "sync {which} is not needed");
    }
}

#[test]
fn a_fault_at_any_call_leaves_the_base_before_or_after() {
    for kind in [KINDS[0], KINDS[3]] {
        let setup = setup(kind);
        let good = Arc::new(RecordedDisk::new(setup.bytes.clone()));
        run_on(&setup, Arc::clone(&good) as _).expect("commit");
        let old = state(&setup.bytes).expect("whole");
        let new = state(&good.bytes()).expect("whole");
        for fault in [DiskFault::NoSpace, DiskFault::Io, DiskFault::Killed] {
            for call in 1.. {
                let disk = Arc::new(RecordedDisk::new(setup.bytes.clone()));
                let faulty = Arc::new(FaultDisk::new(Arc::clone(&disk) as _, call, fault));
                let text = format!("{kind}: {fault:?} at call {call}");
                match run_on(&setup, faulty) {
                    Ok(()) => break,
                    Err(Error::Switch { .. }) => {
                        let (found, _) =
                            settled(&disk.bytes()).unwrap_or_else(|e| panic!("{text}: {e}"));
                        assert!(found == old || found == new, "{text}");
                    }
                    Err(error) => {
                        assert!(matches!(error, Error::Io { .. }), "{text}: {error}");
                        assert!(state(&disk.bytes()).expect("whole") == old, "{text}");
                    }
                }
            }
        }
    }
}

/// One of two disks that die together, at the call with a number counted over both.
#[derive(Debug)]
struct Mortal {
    inner: Arc<RecordedDisk>,
    calls: Arc<AtomicU64>,
    at_call: u64,
    /// Its syncs do something.
    honest: bool,
}

impl Mortal {
    fn alive(&self) -> io::Result<()> {
        if self.calls.fetch_add(1, Ordering::SeqCst) + 1 >= self.at_call {
            return Err(io::Error::other("killed"));
        }
        Ok(())
    }
}

impl Storage for Mortal {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.inner.read_exact_at(bytes, at)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.alive()?;
        self.inner.write_all_at(bytes, at)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.alive()?;
        self.inner.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.alive()?;
        if self.honest {
            self.inner.sync()
        } else {
            Ok(())
        }
    }
}

/// A raw base of 100 KiB and a top of 150 KiB: their bytes.
fn over_raw(dir: &Path) -> (Vec<u8>, Vec<u8>) {
    let [base, top] = ["raw", "top"].map(|name| dir.join(name));
    std::fs::write(&base, vec![1; 100 << 10]).expect("write");
    sh(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size=4k -b {} -F raw {} 150k",
        base.display(),
        top.display()
    ));
    io(
        &top,
        &["write -P 2 0 9k", "write -z 40k 20k", "write -P 3 90k 30k"],
    );
    let read = |path| std::fs::read(path).expect("read");
    (read(&base), read(&top))
}

/// The raw file and the top after a commit that dies at a call, with how many calls it made.
fn commit_raw(
    bytes: (&[u8], &[u8]),
    at_call: u64,
    honest: bool,
) -> (Arc<RecordedDisk>, Arc<RecordedDisk>, u64) {
    let [raw, top] = [bytes.0, bytes.1].map(|bytes| Arc::new(RecordedDisk::new(bytes.to_vec())));
    let calls = Arc::new(AtomicU64::new(0));
    let mortal = |inner: &Arc<RecordedDisk>, honest| -> Arc<dyn Storage> {
        Arc::new(Mortal {
            inner: Arc::clone(inner),
            calls: Arc::clone(&calls),
            at_call,
            honest,
        })
    };
    let base = RawBase::on_storage(mortal(&raw, honest), PathBuf::from("/raw"));
    let mut editor = editor(mortal(&top, true)).expect("opening writes nothing");
    let (options, quiet) = (CommitOptions::default(), Control::default());
    let outcome = commit_into_raw(&mut editor, &[], &base, &options, &quiet);
    assert_eq!(outcome.is_ok(), at_call == u64::MAX, "{outcome:?}");
    let calls = calls.load(Ordering::SeqCst);
    (raw, top, calls)
}

#[test]
fn a_raw_base_is_before_or_after_or_its_top_is_in_progress_and_recovers_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (base, top) = over_raw(dir.path());
    let (after, _, calls) = commit_raw((&base, &top), u64::MAX, true);
    let after = after.bytes();
    let mut expected = base.clone();
    expected.resize(150 << 10, 0);
    for (at, end, byte) in [(0, 9, 2), (40, 60, 0), (90, 120, 3)] {
        expected[at << 10..end << 10].fill(byte);
    }
    assert!(after == expected);
    let (recovered, wrong) = crash_raw((&base, &top), &after, calls, true);
    assert!(recovered > 20, "{recovered}");
    assert_eq!(wrong, None);
    // The twin: a raw file whose sync does nothing is caught.
    let (_, wrong) = crash_raw((&base, &top), &after, calls, false);
    assert!(wrong.is_some());
}

/// Crashes a commit at every call: how often it was recovered, and the first crash that left a wrong state.
fn crash_raw(
    bytes: (&[u8], &[u8]),
    after: &[u8],
    calls: u64,
    honest: bool,
) -> (u32, Option<String>) {
    let old = state(bytes.1).expect("whole");
    let mut recovered = 0;
    for call in 1..=calls + 1 {
        let at_call = if call > calls { u64::MAX } else { call };
        let (raw, changed, _) = commit_raw(bytes, at_call, honest);
        for seed in 0..20 {
            let left = |disk: &RecordedDisk| {
                let history = disk.history();
                let left = history.power_loss(history.events().len(), seed * 1000 + call);
                Arc::new(RecordedDisk::new(left))
            };
            let (raw, top) = (left(&raw), left(&changed));
            let opened = Layer::from_storage(Arc::clone(&top) as _, Path::new("top"));
            if matches!(opened, Err(Error::InProgress { .. })) {
                let (top, raw) = (Arc::clone(&top), Arc::clone(&raw));
                let recovery =
                    recover_storage_over(top, Path::new("top"), raw, &JournalFiles::Nothing);
                assert_eq!(recovery.expect("recovered"), Recovery::Finished);
                recovered += 1;
            }
            let is_one = raw.bytes() == bytes.0 || raw.bytes() == after;
            if !is_one || state(&top.bytes()).expect("whole") != old {
                return (
                    recovered,
                    Some(format!("call {call} of {calls}, seed {seed}")),
                );
            }
        }
    }
    (recovered, None)
}

/// A disk that says of one write, counted from 1, that it is done, and forgets it.
#[derive(Debug)]
struct Liar {
    inner: Arc<RecordedDisk>,
    writes: AtomicU64,
    forgets: u64,
    /// The number of the first write to the first sector.
    marked: AtomicU64,
}

impl Liar {
    fn new(bytes: &[u8], forgets: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: Arc::new(RecordedDisk::new(bytes.to_vec())),
            writes: AtomicU64::new(0),
            forgets,
            marked: AtomicU64::new(u64::MAX),
        })
    }
}

impl Storage for Liar {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.inner.read_exact_at(bytes, at)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let write = self.writes.fetch_add(1, Ordering::SeqCst) + 1;
        if at == 0 {
            self.marked.fetch_min(write, Ordering::SeqCst);
        }
        if write == self.forgets {
            return Ok(());
        }
        self.inner.write_all_at(bytes, at)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.inner.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }
}

#[test]
fn a_storage_that_forgets_what_was_written_in_place_is_found_out_and_recovery_puts_it_right() {
    let setup = setup(KINDS[0]);
    let honest = Liar::new(&setup.bytes, 0);
    run_on(&setup, Arc::clone(&honest) as _).expect("commit");
    let old = state(&setup.bytes).expect("whole");
    let new = state(&honest.inner.bytes()).expect("whole");
    let marked = honest.marked.load(Ordering::SeqCst);
    let all = honest.writes.load(Ordering::SeqCst);
    let mut recovered = 0;
    for forgets in marked..=all {
        let liar = Liar::new(&setup.bytes, forgets);
        let text = format!("write {forgets} of {all}, in progress from {marked}");
        match run_on(&setup, Arc::clone(&liar) as _) {
            // The rest of the first cluster is as it was.
            Ok(()) => assert!(state(&liar.inner.bytes()).expect("whole") == new, "{text}"),
            Err(error @ Error::Switch { .. }) => {
                assert!(error.to_string().contains("faulty"), "{text}: {error}");
                let (found, again) = settled(&liar.inner.bytes()).expect("whole");
                let expected = if again { &new } else { &old };
                assert!(found == *expected, "{text}");
                recovered += u64::from(again);
            }
            Err(error) => panic!("{text}: {error}"),
        }
    }
    // All but the mark itself, and perhaps the rest of the first cluster.
    assert!(
        recovered + 2 >= all - marked && recovered > 1,
        "{recovered}"
    );
}

/// A base of 24 MiB of data, and a top that has other data in 20 of them.
fn setup_of_much_data() -> Setup {
    let dir = tempfile::tempdir().expect("temp dir");
    let [base, top] = ["base", "top"].map(|name| dir.path().join(name));
    let names = [&base, &top].map(|path| path.display().to_string());
    sh(&format!("qemu-img create -q -f qcow2 {} 24M", names[0]));
    io(&base, &["write -P 1 0 24M"]);
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {} -F qcow2 {}",
        names[0], names[1]
    ));
    io(&top, &["write -P 2 1M 13M", "write -P 3 16M 7M"]);
    Setup {
        bytes: std::fs::read(&base).expect("read"),
        above: vec![layer(top, LayerFormat::Qcow2)],
        _dir: dir,
        base,
    }
}

#[test]
fn of_much_data_written_by_several_threads_a_forgotten_or_failed_write_is_found_out_too() {
    let setup = setup_of_much_data();
    let honest = Liar::new(&setup.bytes, 0);
    run_on(&setup, Arc::clone(&honest) as _).expect("commit");
    let shown = through_the_top(&setup, &setup.bytes);
    assert!(through_the_top(&setup, &honest.inner.bytes()) == shown);
    let new = state(&honest.inner.bytes()).expect("whole");
    let marked = honest.marked.load(Ordering::SeqCst);
    let all = honest.writes.load(Ordering::SeqCst);
    assert!(all - marked > 20, "{all} writes, in progress from {marked}");
    for forgets in [marked + 1, marked + 11] {
        let liar = Liar::new(&setup.bytes, forgets);
        let error = run_on(&setup, Arc::clone(&liar) as _).expect_err("found out");
        assert!(error.to_string().contains("faulty"), "{error}");
        let recovered = settled(&liar.inner.bytes()).expect("whole");
        assert!(recovered == (new.clone(), true), "write {forgets}");
    }
    let counted = FaultDisk::new(
        Arc::new(RecordedDisk::new(setup.bytes.clone())),
        0,
        DiskFault::Io,
    );
    let counted = Arc::new(counted);
    run_on(&setup, Arc::clone(&counted) as _).expect("commit");
    // Behind the data come the rest of the first cluster, the first sector and the cut, each synced.
    for call in [counted.calls() - 10, counted.calls() - 20] {
        let disk = Arc::new(RecordedDisk::new(setup.bytes.clone()));
        let faulty = FaultDisk::new(Arc::clone(&disk) as _, call, DiskFault::Io);
        let error = run_on(&setup, Arc::new(faulty)).expect_err("found out");
        assert!(
            matches!(
                error,
                Error::Switch {
                    action: "a write",
                    ..
                }
            ),
            "{error}"
        );
        let recovered = settled(&disk.bytes()).expect("whole");
        assert!(recovered == (new.clone(), true), "call {call}");
    }
}

#[test]
fn a_raw_base_that_forgets_a_write_is_found_out_and_recovery_puts_it_right() {
    let dir = tempfile::tempdir().expect("temp dir");
    let bytes = over_raw(dir.path());
    let commit = |forgets| {
        let raw = Liar::new(&bytes.0, forgets);
        let top = Arc::new(RecordedDisk::new(bytes.1.clone()));
        let base = RawBase::on_storage(Arc::clone(&raw) as _, PathBuf::from("/raw"));
        let mut editor = editor(Arc::clone(&top) as _).expect("opened");
        let (options, quiet) = (CommitOptions::default(), Control::default());
        let outcome = commit_into_raw(&mut editor, &[], &base, &options, &quiet);
        (raw, top, outcome)
    };
    let (honest, _, outcome) = commit(0);
    outcome.expect("commit");
    let all = honest.writes.load(Ordering::SeqCst);
    assert!(all >= 3);
    for forgets in 1..=all {
        let (raw, top, outcome) = commit(forgets);
        let error = outcome.expect_err("found out").to_string();
        assert!(error.contains("of /raw are not those"), "{error}");
        let (top, to) = (Arc::clone(&top), Arc::clone(&raw.inner));
        let recovery = recover_storage_over(top, Path::new("top"), to, &JournalFiles::Nothing);
        assert_eq!(recovery.expect("recovered"), Recovery::Finished);
        assert!(raw.inner.bytes() == honest.inner.bytes(), "write {forgets}");
    }
}

#[test]
fn no_room_or_an_error_at_any_call_leaves_a_raw_base_before_or_after_or_recoverable() {
    let dir = tempfile::tempdir().expect("temp dir");
    let bytes = over_raw(dir.path());
    let old = state(&bytes.1).expect("whole");
    let (after, _, _) = commit_raw((&bytes.0, &bytes.1), u64::MAX, true);
    let after = after.bytes();
    let mut kinds = (0, 0);
    for in_raw in [true, false] {
        for fault in [DiskFault::NoSpace, DiskFault::Io] {
            for call in 1.. {
                let text = format!("{fault:?} at call {call}, of the raw file: {in_raw}");
                let [raw, top] =
                    [&bytes.0, &bytes.1].map(|bytes| Arc::new(RecordedDisk::new(bytes.clone())));
                let faulty = |disk: &Arc<RecordedDisk>, here: bool| -> Arc<dyn Storage> {
                    let call = if here { call } else { 0 };
                    Arc::new(FaultDisk::new(Arc::clone(disk) as _, call, fault))
                };
                let base = RawBase::on_storage(faulty(&raw, in_raw), PathBuf::from("/raw"));
                let mut editor = editor(faulty(&top, !in_raw)).expect("opening writes nothing");
                let (options, quiet) = (CommitOptions::default(), Control::default());
                let outcome = commit_into_raw(&mut editor, &[], &base, &options, &quiet);
                let done = outcome.is_ok();
                let in_progress = matches!(
                    Layer::from_storage(Arc::clone(&top) as _, Path::new("top")),
                    Err(Error::InProgress { .. })
                );
                if in_progress {
                    let (top, raw) = (Arc::clone(&top), Arc::clone(&raw));
                    let recovery =
                        recover_storage_over(top, Path::new("top"), raw, &JournalFiles::Nothing);
                    let recovery = recovery.unwrap_or_else(|error| panic!("{text}: {error}"));
                    assert_eq!(recovery, Recovery::Finished);
                    assert!(!done, "{text}");
                    kinds.0 += 1;
                }
                let found = raw_bytes(&base);
                assert!(found == bytes.0 || found == after, "{text}");
                assert!(!in_progress || found == after, "{text}");
                assert!(state(&top.bytes()).expect("whole") == old, "{text}");
                if done {
                    assert!(found == after, "{text}");
                    break;
                }
                kinds.1 += 1;
            }
        }
    }
    assert!(kinds.0 > 8 && kinds.1 > kinds.0 + 4, "{kinds:?}");
}

fn raw_bytes(base: &RawBase) -> Vec<u8> {
    let length = base.storage.len().expect("known");
    let mut bytes = vec![0; usize::try_from(length).expect("small")];
    base.storage.read_exact_at(&mut bytes, 0).expect("read");
    bytes
}
