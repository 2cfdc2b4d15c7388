//! Random lives of a disk, beside a model: written to, layered, merged offline and under a QEMU, with `stead` or QEMU
//! killed at any time. The disk is always the model's, and a bitmap brings its backup up to date or is visibly gone.
//!
//! `STEAD_SOAK` is how many lives there are (1: many); without it a few. A story that fails names its seed, and
//! `STEAD_SEED` begins there.

#![allow(
    clippy::disallowed_methods,
    reason = "copies of images in tests need not be durable"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::vm::{Vm, Writer};
use common::{content, restored, sh, silent};
use serde_json::json;
use stead_merge::{Becomes, Kind, MergeRequest, plan, recover, run, run_live};
use stead_qcow2::Layer;

/// Of the disk, in bytes: what a [`Writer`] writes to.
const DISK: usize = 8 << 20;
const PIECE: usize = 64 << 10;
/// How many things happen in a life.
const EVENTS: usize = 14;
/// How many lives there are in the everyday tests.
const LIVES: u64 = 3;
/// And with `STEAD_SOAK=1`.
const LIVES_SOAKED: u64 = 200;
/// How long a merge may go on before somebody is killed, in milliseconds.
const KILLED_WITHIN_MS: usize = 150;

struct Random(u64);

impl Random {
    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % end
    }
}

/// A disk, its VM, and what it must be.
struct Life {
    random: Random,
    dir: tempfile::TempDir,
    active: PathBuf,
    vm: Option<Vm>,
    disk: Vec<u8>,
    /// What the disk was when each bitmap began.
    fulls: BTreeMap<String, Vec<u8>>,
    /// Bitmaps that somebody was told are gone, or not to be relied on.
    told: BTreeSet<String>,
    /// Bitmaps that no file has yet: they go with QEMU.
    unsaved: Vec<String>,
    layers: usize,
    written: usize,
    story: String,
}

impl Life {
    fn begin(seed: u64) -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let (format, end) = if seed.is_multiple_of(4) {
            ("raw", "raw")
        } else {
            ("qcow2", "qcow2")
        };
        let active = dir.path().join(format!("base.{end}"));
        let path = active.display();
        sh(&format!("qemu-img create -q -f {format} {path} {DISK}"));
        let mut life = Self {
            random: Random(seed),
            active,
            vm: None,
            disk: vec![0; DISK],
            fulls: BTreeMap::new(),
            told: BTreeSet::new(),
            unsaved: Vec::new(),
            layers: 0,
            written: 0,
            story: format!("seed {seed}:"),
            dir,
        };
        for _ in 0..3 {
            life.write();
            life.layer();
        }
        life
    }

    fn note(&mut self, what: &str) {
        self.story.push(' ');
        self.story.push_str(what);
        self.story.push(';');
    }

    fn is_raw(&self) -> bool {
        self.active.extension().is_some_and(|end| end == "raw")
    }

    fn happen(&mut self) {
        match self.random.below(9) {
            0 => self.write(),
            1 | 2 => self.layer(),
            3 => self.add_bitmap(),
            4 => self.switch_vm(),
            5 => self.kill_vm(),
            _ => self.merge(),
        }
        if self.vm.is_none() {
            self.check();
        }
    }

    fn writer(&mut self) -> Option<Writer> {
        let mut writer = Writer::start(self.vm.as_ref()?);
        writer.first = self.written;
        self.written += 50;
        Some(writer)
    }

    fn write(&mut self) {
        self.note("write");
        if let Some(mut writer) = self.writer() {
            writer.write();
            writer.write();
            self.disk = writer.finish(&self.disk);
            return;
        }
        let (at, pattern) = (
            self.random.below(DISK / PIECE) * PIECE,
            u8::try_from(1 + self.random.below(99)).expect("small"),
        );
        let format = if self.is_raw() { "raw" } else { "qcow2" };
        let path = self.active.display();
        sh(&format!(
            "qemu-io -f {format} -c 'write -P {pattern} {at} {PIECE}' {path}"
        ));
        self.disk[at..at + PIECE].fill(pattern);
    }

    /// A new active layer, which mostly goes on with the bitmaps.
    fn layer(&mut self) {
        if self.vm.is_some() {
            return;
        }
        self.note("layer");
        self.layers += 1;
        let new = self.dir.path().join(format!("{}.qcow2", self.layers));
        let format = if self.is_raw() { "raw" } else { "qcow2" };
        let (path, below) = (new.display(), self.active.display());
        sh(&format!(
            "qemu-img create -q -f qcow2 -b {below} -F {format} {path}"
        ));
        let names: Vec<String> = self.usable(&self.active.clone());
        for name in names {
            if self.random.below(8) == 0 {
                self.told.insert(name);
            } else {
                sh(&format!("qemu-img bitmap --add {path} {name}"));
            }
        }
        self.active = new;
    }

    /// Bitmaps of a layer that record, and were saved.
    fn usable(&self, layer: &Path) -> Vec<String> {
        if layer.extension().is_some_and(|end| end == "raw") {
            return Vec::new();
        }
        common::vm::usable(layer)
    }

    fn add_bitmap(&mut self) {
        let name = format!("b{}", self.fulls.len());
        if self.is_raw() || self.fulls.len() > 3 {
            return;
        }
        self.note("bitmap");
        let path = self.active.display();
        match &self.vm {
            Some(vm) => drop(vm.ask(
                "block-dirty-bitmap-add",
                json!({ "node": vm.active_node(), "name": name, "persistent": true }),
            )),
            None => drop(sh(&format!("qemu-img bitmap --add {path} {name}"))),
        }
        if self.vm.is_some() {
            self.unsaved.push(name.clone());
        }
        self.fulls.insert(name, self.disk.clone());
    }

    fn switch_vm(&mut self) {
        match self.vm.take() {
            Some(vm) => {
                self.note("quit");
                vm.quit();
                self.unsaved.clear();
            }
            None => {
                self.note("start");
                self.vm = Some(Vm::start_on(self.dir.path(), &self.active));
            }
        }
    }

    fn kill_vm(&mut self) {
        if let Some(mut vm) = self.vm.take() {
            self.note("kill QEMU");
            vm.kill();
            self.told.extend(self.unsaved.drain(..));
            self.recover();
        }
    }

    fn files(&self) -> Vec<PathBuf> {
        if self.is_raw() {
            return vec![self.active.clone()];
        }
        let chain = common::open(&self.active);
        let files = (0..chain.depth()).filter_map(|index| chain.file(index));
        files.map(|(path, _)| path.to_owned()).collect()
    }

    fn merge(&mut self) {
        let files = self.files();
        if files.len() < 2 {
            return;
        }
        let top = self.random.below(files.len() - 1);
        let base = top + 1 + self.random.below(files.len() - 1 - top);
        let request = MergeRequest {
            chain: self.active.clone(),
            top: Some(files[top].clone()),
            base: Some(files[base].clone()),
            records: self.dir.path().join("records"),
            qmp: self.vm.is_some().then(|| self.dir.path().join("qmp")),
            drop_bitmaps: self.random.below(2) == 0,
            bytes_per_second: [0, 16 << 20][self.random.below(2)],
            ..MergeRequest::default()
        };
        self.note(&format!("merge {top} of {} into {base}", files.len()));
        let planned = plan(&request).unwrap_or_else(|error| panic!("{}: {error}", self.story));
        for verdict in &planned.bitmaps {
            match verdict.becomes {
                Becomes::Pruned | Becomes::Dropped | Becomes::Left => {
                    self.told.insert(verdict.name.clone());
                }
                Becomes::Merged | Becomes::Carried | Becomes::Marked => {}
            }
        }
        let carried = planned.bitmaps.into_iter();
        let carried = carried.filter(|verdict| verdict.becomes == Becomes::Carried);
        let carried: Vec<String> = carried.map(|verdict| verdict.name).collect();
        match self.random.below(4) {
            0 | 1 => self.merge_whole(&request),
            2 => self.merge_and_kill(&request),
            _ => self.merge_and_kill_vm(&request, carried.clone()),
        }
        self.find_active(&files[base]);
        if self.vm.is_some() && top == 0 {
            // QEMU has them in its memory, as the report says.
            self.unsaved.extend(carried);
        }
    }

    /// It goes to its end, while the disk is written to.
    fn merge_whole(&mut self, request: &MergeRequest) {
        let mut writer = self.writer();
        let done = match &mut writer {
            None => run(request, silent()).map(drop),
            Some(writer) => {
                writer.write();
                run_live(request, silent()).map(drop)
            }
        };
        self.finish(writer);
        match done {
            Ok(()) => self.note("done"),
            Err(error) => {
                assert_eq!(error.kind(), Kind::Conflict, "{}: {error}", self.story);
                self.note("refused");
            }
        }
    }

    fn finish(&mut self, writer: Option<Writer>) {
        if let Some(mut writer) = writer {
            writer.write();
            self.disk = writer.finish(&self.disk);
        }
    }

    /// `stead` is killed at any time, and then run again, or what it began recovered.
    fn merge_and_kill(&mut self, request: &MergeRequest) {
        let mut writer = self.writer();
        if let Some(writer) = &mut writer {
            writer.write();
        }
        self.kill_a_process(request);
        self.note("stead killed");
        if writer.is_none() {
            return self.recover();
        }
        match run_live(request, silent()) {
            Ok(_) => self.note("gone on with"),
            // It was done already, or is refused.
            Err(error) => assert!(
                [Kind::Conflict, Kind::Usage, Kind::NotFound].contains(&error.kind()),
                "{}: {error}",
                self.story
            ),
        }
        self.finish(writer);
    }

    fn kill_a_process(&mut self, request: &MergeRequest) {
        let path = |path: &Option<PathBuf>| path.clone().unwrap_or_default();
        let mut process = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "the_merge_that_is_killed", "--test-threads=1"])
            .env(CHAIN, &request.chain)
            .env(TOP, path(&request.top))
            .env(BASE, path(&request.base))
            .env(QMP, path(&request.qmp))
            .env(SPEED, request.bytes_per_second.to_string())
            .env(RECORDS, &request.records)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("run");
        let after = self.random.below(KILLED_WITHIN_MS);
        std::thread::sleep(Duration::from_millis(u64::try_from(after).expect("small")));
        process.kill().expect("killed");
        process.wait().expect("ended");
    }

    /// QEMU is killed at any time, and `stead` sometimes, too.
    fn merge_and_kill_vm(&mut self, request: &MergeRequest, carried: Vec<String>) {
        let Some(mut vm) = self.vm.take() else {
            return self.merge_and_kill(request);
        };
        if self.random.below(2) == 0 {
            self.kill_a_process(request);
            self.note("stead and QEMU killed");
            let is_over = !request.chain.exists() && !self.has_record();
            vm.kill();
            if is_over {
                self.note("it was over");
                self.told.extend(carried);
            }
            self.told.extend(self.unsaved.drain(..));
            return self.recover();
        }
        let after = self.random.below(KILLED_WITHIN_MS);
        let after = Duration::from_millis(u64::try_from(after).expect("small"));
        let done = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(after);
                vm.kill();
            });
            run_live(request, silent())
        });
        match done {
            Ok(report) => {
                self.note("done, QEMU killed");
                self.told.extend(report.held);
            }
            Err(error) => self.note(&format!("QEMU killed: {error}")),
        }
        self.told.extend(self.unsaved.drain(..));
        self.recover();
    }

    fn recover(&mut self) {
        let records = self.dir.path().join("records");
        let done = recover(self.dir.path(), &records, silent());
        let done = done.unwrap_or_else(|error| panic!("{}: {error}", self.story));
        for one in done {
            self.note(&format!("{:?}", one.outcome));
            self.told.extend(one.lost_bitmaps);
        }
        assert!(!self.has_record(), "{}", self.story);
    }

    /// What was not published is none; the next merge into that base removes it.
    fn has_record(&self) -> bool {
        let entries = fs::read_dir(self.dir.path()).expect("list");
        let names = entries.map(|entry| entry.expect("entry").file_name());
        let mut records = names.filter(|name| {
            let name = name.to_string_lossy();
            name.ends_with("stead-merge") && !name.starts_with(".partial-")
        });
        records.next().is_some()
    }

    /// The disk is the base where the active layer went into it.
    fn find_active(&mut self, base: &Path) {
        if !self.active.exists() {
            self.active = base.to_owned();
        }
    }

    fn check(&self) {
        let story = &self.story;
        let shown = match self.is_raw() {
            true => fs::read(&self.active).expect("read"),
            false => content(&self.active),
        };
        assert!(shown == self.disk, "{story} another disk");
        for (name, full) in &self.fulls {
            let restored = match self.is_raw() {
                true => None,
                false => restored(full, &self.active, name),
            };
            match restored {
                Some(restored) => assert!(restored == self.disk, "{story} {name} says too little"),
                None => assert!(
                    self.is_visibly_gone(name),
                    "{story} {name} is gone silently"
                ),
            }
        }
    }

    /// Somebody was told, or the files say that it was not saved.
    fn is_visibly_gone(&self, name: &str) -> bool {
        self.told.contains(name)
            || self.files().iter().any(|path| {
                let is_qcow2 = path.extension().is_some_and(|end| end == "qcow2");
                let stored = is_qcow2.then(|| Layer::inspect(path).expect("whole"));
                let stored = stored.map(|layer| layer.stored_bitmaps().expect("readable"));
                let mut unsaved = stored.iter().flatten().filter(|one| one.in_use);
                unsaved.any(|one| one.name == name.as_bytes())
            })
    }

    fn end(mut self) {
        if self.vm.is_some() {
            self.switch_vm();
        }
        self.check();
        for path in self.files() {
            if path.extension().is_some_and(|end| end == "qcow2") {
                sh(&format!(
                    "qemu-img check -q -f qcow2 {} || [ $? = 3 ]",
                    path.display()
                ));
            }
        }
    }
}

const CHAIN: &str = "STEAD_TEST_CHAIN";
const TOP: &str = "STEAD_TEST_TOP";
const BASE: &str = "STEAD_TEST_BASE";
const QMP: &str = "STEAD_TEST_QMP";
const SPEED: &str = "STEAD_TEST_SPEED";
const RECORDS: &str = "STEAD_TEST_RECORDS";

/// Not a test of its own: the process that is killed. Without the variables it does nothing.
#[test]
fn the_merge_that_is_killed() {
    let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let Some(chain) = path(CHAIN) else {
        return;
    };
    let request = MergeRequest {
        chain,
        top: path(TOP),
        base: path(BASE),
        records: path(RECORDS).expect("set"),
        qmp: path(QMP).filter(|socket| !socket.as_os_str().is_empty()),
        bytes_per_second: std::env::var(SPEED)
            .expect("set")
            .parse()
            .expect("a number"),
        ..MergeRequest::default()
    };
    let done = match request.qmp {
        Some(_) => run_live(&request, silent()).map(drop),
        None => run(&request, silent()).map(drop),
    };
    if let Err(error) = done {
        assert_eq!(error.kind(), Kind::Conflict, "{error}");
    }
}

#[test]
fn whatever_happens_to_a_disk_it_is_the_models_and_no_bitmap_lies_or_goes_silently() {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let soaked = std::env::var_os("STEAD_SOAK").is_some();
    let lives = match number("STEAD_SOAK") {
        Some(lives @ 2..) => lives,
        Some(_) | None => {
            if soaked {
                LIVES_SOAKED
            } else {
                LIVES
            }
        }
    };
    // Another round of a soak has other lives.
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970");
    let first = if soaked { now.as_secs() } else { 1 };
    let first = number("STEAD_SEED").unwrap_or(first);
    for seed in first..first + lives {
        let mut life = Life::begin(seed);
        for _ in 0..EVENTS {
            life.happen();
        }
        life.end();
    }
}

#[test]
fn the_check_can_fail_when_a_bitmap_forgets_what_was_written() {
    let mut life = Life::begin(1);
    life.add_bitmap();
    life.write();
    life.check();
    let path = life.active.display();
    sh(&format!("qemu-img bitmap --clear {path} b0"));
    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| life.check()));
    assert!(checked.is_err(), "it says nothing of the write");
    sh(&format!("qemu-img bitmap --remove {path} b0"));
    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| life.check()));
    assert!(checked.is_err(), "nobody was told that it is gone");
}
