//! A bitmap is never a lie: whatever is done to a disk, its state when a bitmap began, with the bytes that the bitmap
//! names now, is the disk now.
//!
//! The disk is kept as an array of bytes beside the images. QEMU writes (so that QEMU itself notes what it writes in
//! the bitmaps), everything else is done here. Each bitmap of each layer has what that layer showed when the bitmap
//! began: one state, or more once bitmaps were merged into it.

mod images;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use images::{layer, run, sh};
use proptest::prelude::*;
use stead_qcow2::edit::{EditOptions, Editor, SnapshotName};
use stead_qcow2::ops::bitmap::{Action, Step};
use stead_qcow2::ops::commit::{BitmapFate, CommitOptions, Incomplete, LongerBase, commit};
use stead_qcow2::{Chain, Control, Error, Layer, LayerFile, LayerFormat, ops};

const CLUSTER: usize = 4096;
const NAMES: [&str; 3] = ["a", "b", "c"];
/// The most layers; the next one is not made.
const MAX_LAYERS: usize = 4;

#[derive(Debug, Clone)]
enum Op {
    Write {
        at: u8,
        sectors: u8,
        byte: u8,
    },
    Zero {
        at: u8,
        sectors: u8,
    },
    Discard {
        at: u8,
        clusters: u8,
    },
    Snapshot,
    Apply(u8),
    Delete(u8),
    Resize(u8),
    Overlay {
        keep: u8,
    },
    Commit {
        depth: u8,
        empty: bool,
        keep: bool,
        mark: bool,
    },
    Add {
        name: u8,
        bits: u8,
    },
    Merge {
        name: u8,
        from: u8,
    },
    Clear(u8),
    Enable {
        name: u8,
        on: bool,
    },
    Remove(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let n = any::<u8>;
    prop_oneof![
        8 => (n(), n(), 1..255_u8).prop_map(|(at, sectors, byte)| Op::Write { at, sectors, byte }),
        3 => (n(), n()).prop_map(|(at, sectors)| Op::Zero { at, sectors }),
        2 => (n(), n()).prop_map(|(at, clusters)| Op::Discard { at, clusters }),
        2 => Just(Op::Snapshot),
        2 => n().prop_map(Op::Apply),
        1 => n().prop_map(Op::Delete),
        2 => n().prop_map(Op::Resize),
        4 => n().prop_map(|keep| Op::Overlay { keep }),
        5 => (n(), any::<bool>(), any::<bool>(), any::<bool>())
            .prop_map(|(depth, empty, keep, mark)| Op::Commit { depth, empty, keep, mark }),
        5 => (n(), 9..15_u8).prop_map(|(name, bits)| Op::Add { name, bits }),
        2 => (n(), n()).prop_map(|(name, from)| Op::Merge { name, from }),
        1 => n().prop_map(Op::Clear),
        1 => (n(), any::<bool>()).prop_map(|(name, on)| Op::Enable { name, on }),
        1 => n().prop_map(Op::Remove),
    ]
}

/// A layer, what it shows, and what it showed when its bitmaps began.
#[derive(Debug, Clone)]
struct Level {
    path: PathBuf,
    shown: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    /// None of a bitmap that is there: it claims nothing.
    starts: BTreeMap<String, Vec<Vec<u8>>>,
}

impl Level {
    fn new(path: PathBuf, shown: Vec<u8>) -> Self {
        Self {
            path,
            shown,
            snapshots: Vec::new(),
            starts: BTreeMap::new(),
        }
    }
}

/// What was seen, so that a run that tests nothing is found.
#[derive(Debug, Default)]
struct Seen {
    claims: u64,
    commits: u64,
    merged: u64,
    dropped: u64,
}

struct World {
    dir: tempfile::TempDir,
    /// The lowest first.
    levels: Vec<Level>,
    pending: Vec<String>,
    made: usize,
    seen: Seen,
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temp paths are text")
}

fn editor(path: &Path) -> Editor {
    Editor::open(path, EditOptions::default()).expect("open")
}

fn named(name: u8) -> &'static str {
    NAMES[usize::from(name) % NAMES.len()]
}

fn to_u64(number: usize) -> u64 {
    u64::try_from(number).expect("small")
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let mut world = Self {
            dir,
            levels: Vec::new(),
            pending: Vec::new(),
            made: 0,
            seen: Seen::default(),
        };
        world.create(vec![0; 40 * CLUSTER]);
        world
    }

    fn create(&mut self, shown: Vec<u8>) {
        let path = self.dir.path().join(format!("layer{}", self.made));
        self.made += 1;
        let backing = self.levels.last().map_or_else(String::new, |below| {
            format!("-b {} -F qcow2", text(&below.path))
        });
        sh(&format!(
            "qemu-img create -q -f qcow2 -o cluster_size={CLUSTER} {backing} {} {}",
            text(&path),
            shown.len()
        ));
        self.levels.push(Level::new(path, shown));
    }

    fn top(&mut self) -> &mut Level {
        self.levels.last_mut().expect("there is a layer")
    }

    /// The files from the level with this index on, top first.
    fn files(&self, level: usize) -> Vec<LayerFile> {
        let down = self.levels[..=level].iter().rev();
        down.map(|level| layer(&level.path, LayerFormat::Qcow2))
            .collect()
    }

    fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let mut args = vec!["-f".to_owned(), "qcow2".into(), "-d".into(), "unmap".into()];
        for command in std::mem::take(&mut self.pending) {
            args.extend(["-c".to_owned(), command]);
        }
        args.push(text(&self.top().path).to_owned());
        run("qemu-io", &args);
    }

    /// A range in units of `unit` bytes, on the disk.
    fn range(&mut self, at: u8, length: u8, unit: usize) -> std::ops::Range<usize> {
        let disk = self.top().shown.len();
        let start = usize::from(at) * 7919 * 512 / unit * unit % disk / unit * unit;
        let length = (1 + usize::from(length) % 24) * unit;
        start..(start + length).min(disk)
    }

    fn fill(&mut self, range: std::ops::Range<usize>, byte: u8, command: &str) {
        let (start, length) = (range.start, range.end - range.start);
        self.pending.push(format!("{command} {start} {length}"));
        self.top().shown[range].fill(byte);
    }

    fn run(&mut self, op: &Op) {
        // What QEMU writes is done in one go, before the next thing that is done here.
        match *op {
            Op::Write { at, sectors, byte } => {
                let range = self.range(at, sectors, 512);
                return self.fill(range, byte, &format!("write -P {byte}"));
            }
            Op::Zero { at, sectors } => {
                let range = self.range(at, sectors, 512);
                return self.fill(range, 0, "write -z");
            }
            Op::Discard { at, clusters } => {
                let range = self.range(at, clusters, CLUSTER);
                return self.fill(range, 0, "discard");
            }
            Op::Snapshot => self.snapshot(),
            Op::Apply(which) => self.apply(which),
            Op::Delete(which) => self.delete(which),
            Op::Resize(to) => self.resize(to),
            Op::Overlay { keep } => self.overlay(keep),
            Op::Commit {
                depth,
                empty,
                keep,
                mark,
            } => self.commit(depth, (empty, keep, mark)),
            Op::Add { name, bits } => self.add(named(name), bits),
            Op::Merge { name, from } => self.merge(named(name), named(from)),
            Op::Clear(name) => self.clear(named(name)),
            Op::Enable { name, on } => self.enable(named(name), on),
            Op::Remove(name) => self.remove(named(name)),
        }
        self.check();
    }

    fn snapshot(&mut self) {
        self.flush();
        let name = format!("s{}", self.made);
        self.made += 1;
        let called = SnapshotName {
            name: name.clone().into_bytes(),
            date_seconds: 1,
            date_nanoseconds: 0,
        };
        let top = self.top();
        ops::snapshot::create(&mut editor(&top.path), &called).expect("create");
        let shown = top.shown.clone();
        top.snapshots.push((name, shown));
    }

    fn apply(&mut self, which: u8) {
        self.flush();
        let top = self.top();
        let Some(index) = usize::from(which).checked_rem(top.snapshots.len()) else {
            return;
        };
        let (name, shown) = top.snapshots[index].clone();
        ops::snapshot::apply(&mut editor(&top.path), name.as_bytes()).expect("apply");
        top.shown = shown;
    }

    fn delete(&mut self, which: u8) {
        self.flush();
        let top = self.top();
        let Some(index) = usize::from(which).checked_rem(top.snapshots.len()) else {
            return;
        };
        let (name, _) = top.snapshots.remove(index);
        ops::snapshot::delete(&mut editor(&top.path), name.as_bytes()).expect("delete");
    }

    fn resize(&mut self, to: u8) {
        self.flush();
        let length = (20 * 8 + usize::from(to)) * 512;
        let below = self.levels.len().checked_sub(2);
        let below = below.map(|below| Chain::open(&self.files(below)).expect("whole"));
        let top = self.top();
        let done = ops::resize::resize(&mut editor(&top.path), to_u64(length), below.as_ref());
        done.expect("resize");
        top.shown.resize(length, 0);
    }

    /// A new top, with some of the bitmaps of the one below, as backup programs do it.
    fn overlay(&mut self, keep: u8) {
        self.flush();
        if self.levels.len() >= MAX_LAYERS {
            return;
        }
        let below = self.top().clone();
        self.create(below.shown);
        for (index, name) in NAMES.iter().enumerate() {
            if below.starts.contains_key(*name) && keep >> index & 1 != 0 {
                self.add(name, 12);
            }
        }
    }

    fn change(&mut self, name: &str, action: Action<'_>) -> Result<(), Error> {
        self.flush();
        let step = Step {
            bitmap: name.as_bytes(),
            action,
        };
        ops::bitmap::change(&mut editor(&self.top().path), &[step]).map(drop)
    }

    fn add(&mut self, name: &str, bits: u8) {
        let action = Action::Add {
            granularity_bits: Some(bits),
            enabled: true,
        };
        let there = self.top().starts.contains_key(name);
        assert_eq!(self.change(name, action).is_ok(), !there);
        if !there {
            self.start(name);
        }
    }

    /// From now on a bitmap of the top names what changes.
    fn start(&mut self, name: &str) {
        let top = self.top();
        let shown = top.shown.clone();
        top.starts.insert(name.to_owned(), vec![shown]);
    }

    fn clear(&mut self, name: &str) {
        let there = self.top().starts.contains_key(name);
        assert_eq!(self.change(name, Action::Clear).is_ok(), there);
        // A disabled one claims nothing.
        if self.enabled(name) {
            self.start(name);
        }
    }

    fn enable(&mut self, name: &str, on: bool) {
        let was = self.enabled(name);
        let action = if on { Action::Enable } else { Action::Disable };
        let done = self.change(name, action).is_ok();
        if done && !(was && on) {
            self.top().starts.insert(name.to_owned(), Vec::new());
        }
    }

    fn remove(&mut self, name: &str) {
        let there = self.top().starts.remove(name).is_some();
        assert_eq!(self.change(name, Action::Remove).is_ok(), there);
    }

    fn enabled(&mut self, name: &str) -> bool {
        self.flush();
        let layer = Layer::open(&self.top().path).expect("whole");
        let stored = layer.stored_bitmaps().expect("whole");
        stored
            .iter()
            .any(|one| one.name == name.as_bytes() && one.auto)
    }

    fn merge(&mut self, into: &str, from: &str) {
        let action = Action::Merge {
            source: from.as_bytes(),
            image: None,
        };
        let starts = self.top().starts.get(from).cloned();
        let there = starts.is_some() && self.top().starts.contains_key(into);
        assert_eq!(self.change(into, action).is_ok(), there);
        if there && self.enabled(into) {
            let own = self.top().starts.entry(into.to_owned()).or_default();
            own.extend(starts.into_iter().flatten());
        }
    }

    fn commit(&mut self, depth: u8, (empty, keep, mark): (bool, bool, bool)) {
        self.flush();
        let last = self.levels.len() - 1;
        if last == 0 {
            return;
        }
        let depth = 1 + usize::from(depth) % last;
        let options = CommitOptions {
            base: depth,
            empty_top: empty && depth == 1,
            longer_base: if keep {
                LongerBase::Keep
            } else {
                LongerBase::Cut
            },
            chosen: Vec::new(),
            incomplete: if mark {
                Incomplete::Mark
            } else {
                Incomplete::Drop
            },
            follow_data: false,
            edit: EditOptions::default(),
        };
        let above = &self.levels[last + 1 - depth..];
        let report = match commit(&self.files(last), &options, &Control::default()) {
            Ok(report) => report,
            Err(error) => {
                // Snapshots above would show other bytes.
                let snapshots = above.iter().any(|level| !level.snapshots.is_empty());
                assert!(
                    snapshots && matches!(error, Error::Refused { .. }),
                    "{error}"
                );
                return;
            }
        };
        self.seen.commits += 1;
        let top = self.top().clone();
        let base = &mut self.levels[last - depth];
        let tail = base.shown.split_off(top.shown.len().min(base.shown.len()));
        base.shown = top.shown;
        if keep {
            base.shown.extend(tail);
        }
        for outcome in report.bitmaps {
            let name = String::from_utf8(outcome.name).expect("text");
            let theirs = top.starts.get(&name).cloned().unwrap_or_default();
            match outcome.fate {
                BitmapFate::Merged { .. } | BitmapFate::Carried { .. } => {
                    base.starts.entry(name).or_default().extend(theirs);
                    self.seen.merged += 1;
                }
                BitmapFate::Marked | BitmapFate::MarkedInstead { .. } | BitmapFate::Kept => {}
                BitmapFate::Dropped { .. } => {
                    base.starts.remove(&name);
                    self.seen.dropped += 1;
                }
            }
        }
        if !options.empty_top {
            self.levels.truncate(last + 1 - depth);
        }
    }

    /// Everything shows what it should, and no bitmap lies.
    fn check(&mut self) {
        for index in 0..self.levels.len() {
            let chain = Chain::open(&self.files(index)).expect("whole");
            let level = &self.levels[index];
            assert_eq!(chain.len(), to_u64(level.shown.len()), "{level:?}");
            let mut bytes = vec![0; level.shown.len()];
            chain.read_at(0, &mut bytes).expect("readable");
            assert!(bytes == level.shown, "layer {index} shows something else");
            let layer = chain.layer(0).expect("qcow2");
            let stored = layer.stored_bitmaps().expect("whole");
            assert_eq!(stored.len(), level.starts.len());
            for bitmap in stored {
                let name = String::from_utf8(bitmap.name.clone()).expect("text");
                let bits = layer.read_bitmap(&bitmap).expect("usable");
                for start in &level.starts[&name] {
                    let mut restored = start.clone();
                    restored.resize(level.shown.len(), 0);
                    for dirty in bits.dirty_ranges() {
                        let dirty =
                            [dirty.start, dirty.end].map(|n| usize::try_from(n).expect("small"));
                        let dirty = dirty[0]..dirty[1];
                        restored[dirty.clone()].copy_from_slice(&level.shown[dirty]);
                    }
                    assert!(restored == level.shown, "{name} of layer {index} lies");
                    self.seen.claims += 1;
                }
            }
        }
    }

    fn finish(&mut self) {
        self.flush();
        self.check();
        for level in &self.levels {
            sh(&format!("qemu-img check -q -f qcow2 {}", text(&level.path)));
        }
        let raw = self.dir.path().join("raw");
        let top = self.levels.len() - 1;
        assert!(images::convert(&self.files(top)[0], &raw) == self.levels[top].shown);
    }
}

#[test]
fn what_a_bitmap_names_is_enough_to_bring_a_backup_up_to_date() {
    let soak = std::env::var_os("STEAD_SOAK").is_some();
    let config = ProptestConfig {
        cases: if soak { 1000 } else { 40 },
        max_shrink_iters: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let seen = std::cell::RefCell::new(Seen::default());
    let ops = proptest::collection::vec(op(), 10..40);
    let result = runner.run(&ops, |ops| {
        let mut world = World::new();
        for op in &ops {
            world.run(op);
        }
        world.finish();
        let mut seen = seen.borrow_mut();
        seen.claims += world.seen.claims;
        seen.commits += world.seen.commits;
        seen.merged += world.seen.merged;
        seen.dropped += world.seen.dropped;
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let seen = seen.into_inner();
    println!("{seen:?}");
    assert!(seen.claims > 50 && seen.commits > 3, "{seen:?}");
}

/// The twin: a bitmap that is cleared without its beginning being moved is found.
#[test]
fn the_property_does_not_hold_for_a_bitmap_that_forgets() {
    let mut world = World::new();
    world.run(&Op::Add { name: 0, bits: 9 });
    world.run(&Op::Write {
        at: 3,
        sectors: 5,
        byte: 7,
    });
    world.flush();
    world.check();
    world.change("a", Action::Clear).expect("clear");
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.check()));
    std::panic::set_hook(quiet);
    assert!(found.is_err());
}
