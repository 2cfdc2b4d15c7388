//! Bytes that change behind our back, in the store and on a worker: refused before a vCPU runs, and named.
#![allow(
    clippy::disallowed_methods,
    reason = "tests damage files as they lie there"
)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::Value;
use stead_tests::guest::{self, Seen};
use stead_tests::{Worker, files_below, flip};

/// A `qemu-system-x86_64` that notes down how it is called and becomes the real one.
struct Spy {
    folder: tempfile::TempDir,
}

impl Spy {
    fn new() -> Self {
        let folder = tempfile::tempdir_in("/tmp").expect("folder");
        let open = |mode| fs::Permissions::from_mode(mode);
        fs::set_permissions(folder.path(), open(0o755)).expect("mode");
        let log = folder.path().join("calls");
        fs::write(&log, b"").expect("log");
        fs::set_permissions(&log, open(0o666)).expect("mode");
        let real = fs::canonicalize("/usr/bin/qemu-system-x86_64").expect("QEMU is installed");
        let script = format!(
            "#!/bin/sh\necho \"$*\" >> {}\nexec {} \"$@\"\n",
            log.display(),
            real.display()
        );
        let program = folder.path().join("qemu-system-x86_64");
        fs::write(&program, script).expect("script");
        fs::set_permissions(&program, open(0o755)).expect("mode");
        Self { folder }
    }

    /// Makes a worker use it.
    fn watch(&self, worker: &mut Worker) {
        let path = std::env::var("PATH").expect("PATH");
        let path = format!("{}:{path}", self.folder.path().display());
        worker.env.push(("PATH".to_owned(), path));
    }

    /// How many guests were started with it: QEMU is also called to ask what it can do.
    fn guests(&self) -> usize {
        let calls = fs::read_to_string(self.folder.path().join("calls")).expect("log");
        calls
            .lines()
            .filter(|call| call.contains("-blockdev"))
            .count()
    }
}

/// What the store got by an operation: every object, by its path within the store.
fn objects(store: &Path) -> BTreeSet<PathBuf> {
    let relative = |path: PathBuf| path.strip_prefix(store).expect("below").to_owned();
    files_below(store)
        .into_iter()
        .map(|(path, _)| relative(path))
        .collect()
}

/// Whether a pack holds chunks or nodes, from its header.
fn pack_kind(path: &Path) -> u32 {
    let mut header = [0; 64];
    fs::File::open(path)
        .expect("open")
        .read_exact_at(&mut header, 0)
        .expect("header");
    assert_eq!(&header[..8], b"STEADPAK");
    u32::from_le_bytes(header[12..16].try_into().expect("four bytes"))
}

/// Ways to damage an object of the store.
#[derive(Debug, Clone, Copy)]
enum Damage {
    /// One bit at this part of its length, in thousandths.
    Flip(u64),
    Cut,
    Missing,
    /// A number in its text is another one.
    Edit,
}

impl Damage {
    /// Damages the object and gives what it was.
    fn apply(self, path: &Path) -> Vec<u8> {
        let whole = fs::read(path).expect("read");
        let length = whole.len() as u64;
        match self {
            Self::Flip(thousandths) => flip(path, length * thousandths / 1000),
            Self::Cut => fs::write(path, &whole[..whole.len() / 2]).expect("cut"),
            Self::Missing => fs::remove_file(path).expect("remove"),
            Self::Edit => fs::write(path, edited(&whole)).expect("edit"),
        }
        assert_ne!(fs::read(path).ok(), Some(whole.clone()), "it is as it was");
        whole
    }
}

/// A manifest with twice the memory.
fn edited(manifest: &[u8]) -> Vec<u8> {
    let (from, to) = (b"536870912", b"937012672");
    let mut bytes = manifest.to_vec();
    let mut found = 0;
    for at in 0..bytes.len() - from.len() {
        if &bytes[at..at + from.len()] == from {
            bytes[at..at + from.len()].copy_from_slice(to);
            found += 1;
        }
    }
    assert!(found > 0, "the manifest does not say its memory as it did");
    bytes
}

fn assert_names(error: &Value, what: &str) {
    let text = error.to_string();
    assert!(text.contains(what), "{what} is not named: {text}");
}

/// The object's name in errors.
fn name_of(object: &Path) -> String {
    object
        .file_name()
        .expect("name")
        .to_string_lossy()
        .into_owned()
}

/// A worker with nothing is refused by `fork`, before any guest is started, and keeps nothing.
fn refused_on_a_fresh_worker(store: &Path, spy: &Spy, checkpoint: &str, object: &str) {
    let mut worker = Worker::on(store);
    spy.watch(&mut worker);
    let before = spy.guests();
    let error = worker.fails(&["fork", checkpoint, "--name", "try"], 5);
    assert_names(&error, object);
    assert_eq!(error["kind"], "damaged");
    let says = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
    assert!(!says("found").is_empty(), "{error}");
    let next = says("next");
    assert!(
        ["stead verify", "stead checkpoint ls", "rebuild-index"]
            .iter()
            .any(|command| next.contains(command)),
        "the next step names no command: {error}"
    );
    assert_eq!(spy.guests(), before, "a guest was started");
    assert_eq!(worker.json(&["ls"]), serde_json::json!([]));
    assert!(worker.files().is_empty(), "{:?}", worker.files());
    assert!(worker.qemus().is_empty());
}

/// Checking the store names the object, and the checkpoint that it hits.
fn found_by_verify(store: &Path, checkpoint_id: &str, object: &str) {
    let worker = Worker::on(store);
    let report = worker.run(&["--json", "verify"]);
    assert_eq!(report.status.code(), Some(5), "verify finds it");
    let report: Value = serde_json::from_slice(&report.stdout).expect("JSON");
    assert_names(&report, object);
    assert_names(&report, checkpoint_id);
}

#[test]
fn a_flipped_cut_missing_or_edited_object_of_the_store_is_refused_before_a_guest_is_started() {
    let worker = Worker::with_own_store();
    let store = PathBuf::from(&worker.store);
    worker.boot("source");
    let seen = guest::fill(&worker, "source");
    let before = objects(&store);
    worker.ok(&["checkpoint", "create", "source", "--name", "base"]);
    let new: Vec<PathBuf> = objects(&store).difference(&before).cloned().collect();
    let only = |folder: &str, kind: Option<u32>| -> PathBuf {
        let fits = |object: &&PathBuf| {
            object.starts_with(folder)
                && kind.is_none_or(|kind| pack_kind(&store.join(object)) == kind)
        };
        new.iter()
            .find(fits)
            .unwrap_or_else(|| panic!("no new {folder} {kind:?} in {new:?}"))
            .clone()
    };
    let (chunks, nodes) = (only("packs", Some(1)), only("packs", Some(2)));
    let (index, manifest) = (only("indexes", None), only("checkpoints", None));
    let id = name_of(&manifest);
    let spy = Spy::new();
    for (object, damage) in [
        (&chunks, Damage::Flip(400)),
        (&chunks, Damage::Cut),
        (&chunks, Damage::Missing),
        (&nodes, Damage::Flip(100)),
        (&nodes, Damage::Missing),
        (&index, Damage::Flip(500)),
        (&index, Damage::Cut),
        (&manifest, Damage::Flip(500)),
        (&manifest, Damage::Cut),
        (&manifest, Damage::Edit),
    ] {
        eprintln!("{} {damage:?}", object.display());
        let name = name_of(object);
        let whole = damage.apply(&store.join(object));
        refused_on_a_fresh_worker(&store, &spy, "base", &name);
        refused_on_a_fresh_worker(&store, &spy, &id, &name);
        found_by_verify(&store, &id, &name);
        let fresh = Worker::on(&store);
        assert_names(&fresh.fails(&["checkpoint", "verify", "base"], 5), &name);
        fs::write(store.join(object), whole).expect("put back");
        Worker::on(&store).ok(&["checkpoint", "verify", "base"]);
    }
    // An index object that is missing whole leaves its packs without a name: what they hold is unknown.
    let whole = Damage::Missing.apply(&store.join(&index));
    let mut lost = Worker::on(&store);
    spy.watch(&mut lost);
    lost.fails(&["fork", "base"], 5);
    assert!(lost.files().is_empty());
    assert_eq!(Worker::on(&store).run(&["verify"]).status.code(), Some(5));
    fs::write(store.join(&index), whole).expect("put back");
    // A pack's own table is only for repairs: a fork without it gets the right bytes, and verify tells.
    let whole = Damage::Flip(999).apply(&store.join(&chunks));
    found_by_verify(&store, &name_of(&chunks), &name_of(&chunks));
    fs::write(store.join(&chunks), whole).expect("put back");

    // With everything put back, the same fork works, and the spy would have seen an earlier one.
    assert_eq!(spy.guests(), 0);
    Worker::on(&store).ok(&["verify"]);
    let mut fresh = Worker::on(&store);
    spy.watch(&mut fresh);
    fresh.ok(&["fork", "base", "--name", "try"]);
    assert_eq!(spy.guests(), 1);
    let fork = guest::look(&fresh, "try");
    assert_eq!((&fork.files, &fork.memory), (&seen.files, &seen.memory));
    let source = guest::look(&worker, "source");
    assert_eq!((&source.files, &source.memory), (&seen.files, &seen.memory));
    assert!(source.count > seen.count);
}

/// A file changed so that only its content tells.
struct Changed {
    path: PathBuf,
    at: u64,
    aside: PathBuf,
}

impl Changed {
    fn at(path: &Path, at: u64) -> Self {
        let before = path.metadata().expect("stat");
        flip(path, at);
        let file = fs::OpenOptions::new().write(true).open(path).expect("open");
        let times = fs::FileTimes::new()
            .set_accessed(before.accessed().expect("time"))
            .set_modified(before.modified().expect("time"));
        file.set_times(times).expect("set the times back");
        let now = path.metadata().expect("stat");
        let key = |meta: &fs::Metadata| {
            (
                meta.len(),
                meta.ino(),
                meta.mtime(),
                meta.mtime_nsec(),
                meta.mode(),
            )
        };
        assert_eq!(key(&now), key(&before));
        Self {
            path: path.to_owned(),
            at,
            aside: path.with_extension("aside"),
        }
    }

    /// Moves it out of the worker's folders.
    fn move_away(&mut self) {
        let folder = self.path.ancestors().nth(2).expect("the worker's folder");
        self.aside = folder.join(self.path.file_name().expect("name"));
        fs::rename(&self.path, &self.aside).expect("move away");
    }

    fn put_back(self) {
        if self.aside.exists() {
            fs::rename(&self.aside, &self.path).expect("move back");
        }
        flip(&self.path, self.at);
    }
}

/// The position of `needle` in a file.
fn find(path: &Path, needle: &[u8]) -> Option<u64> {
    let bytes = fs::read(path).expect("read");
    bytes
        .windows(needle.len())
        .position(|window| window == needle)
        .map(|at| at as u64)
}

/// A byte of a file that is not zero, from this part of the file on, in thousandths.
fn used_byte(path: &Path, thousandths: u64) -> u64 {
    let file = fs::File::open(path).expect("open");
    let length = file.metadata().expect("stat").len();
    let mut buffer = vec![0; 1 << 16];
    let mut at = (length * thousandths / 1000) & !0xffff;
    while at + (1 << 16) <= length {
        file.read_exact_at(&mut buffer, at).expect("read");
        if let Some(used) = buffer.iter().position(|byte| *byte != 0) {
            return at + used as u64;
        }
        at += 1 << 16;
    }
    panic!("{} has no data there", path.display());
}

/// A byte of the base that no file of the guest uses: the last page of a long run of zeros near the end.
fn unused_byte(base: &Path) -> u64 {
    let file = fs::File::open(base).expect("open");
    let length = file.metadata().expect("stat").len();
    let mut run = vec![0; 8 << 20];
    let mut at = length * 3 / 4;
    while at + (8 << 20) < length {
        file.read_exact_at(&mut run, at).expect("read");
        if run.iter().all(|byte| *byte == 0) {
            return at + (4 << 20) + 5;
        }
        at += 8 << 20;
    }
    panic!("{} is full", base.display());
}

fn layer_of(worker: &Worker, ending: &str) -> Vec<PathBuf> {
    let files = files_below(&worker.data.join("layers"));
    files
        .into_iter()
        .map(|(path, _)| path)
        .filter(|path| path.extension().is_some_and(|e| e == ending))
        .collect()
}

fn only_file(folder: &Path) -> PathBuf {
    let mut files = files_below(folder);
    assert_eq!(files.len(), 1, "{files:?}");
    files.swap_remove(0).0
}

/// The fork is refused, the file and the range are named, nothing was started and nothing is left.
fn refused_for(worker: &Worker, spy: &Spy, changed: &Changed, guest_byte: Option<u64>) {
    let (files, sandboxes, guests) = (worker.files(), worker.json(&["ls"]), spy.guests());
    let error = worker.fails(&["fork", "base", "--name", "try"], 5);
    assert_names(&error, &changed.path.display().to_string());
    if let Some(byte) = guest_byte {
        let found = error["found"].as_str().expect("text");
        let range = found
            .split("bytes ")
            .nth(1)
            .unwrap_or_else(|| panic!("no range: {found}"));
        let (start, end) = range.split_once('-').expect("a range");
        let start: u64 = start.parse().expect("start");
        let end: u64 = end
            .split(|c: char| !c.is_ascii_digit())
            .next()
            .expect("end")
            .parse()
            .expect("end");
        assert!((start..end).contains(&byte), "{byte} is not in {found}");
        assert!(end - start <= 1 << 20, "{found}");
    }
    assert_eq!(spy.guests(), guests, "a guest was started");
    assert_eq!(worker.json(&["ls"]), sandboxes);
    assert_eq!(worker.files(), files);
}

fn forks_equal(worker: &Worker, spy: &Spy, checkpoint: &str, seen: &Seen) {
    let guests = spy.guests();
    worker.ok(&["fork", checkpoint, "--name", "try"]);
    assert_eq!(spy.guests(), guests + 1);
    let fork = guest::look(worker, "try");
    assert_eq!((&fork.files, &fork.memory), (&seen.files, &seen.memory));
    worker.ok(&["rm", "--force", "try"]);
}

#[test]
fn a_layer_a_ram_image_or_a_base_changed_with_size_and_times_kept_is_refused_named_and_rebuilt() {
    let spy = Spy::new();
    let mut worker = Worker::with_own_store();
    spy.watch(&mut worker);
    worker.boot("source");
    guest::fill(&worker, "source");
    let pattern = "behind our back, ".repeat(4000);
    worker.shell(
        "source",
        "for n in $(seq 4000); do printf 'behind our back, '; done > /root/other; sync",
    );
    worker.ok(&["checkpoint", "create", "source", "--name", "base"]);
    let seen = guest::look(&worker, "source");
    let frozen: Vec<PathBuf> = layer_of(&worker, "qcow2");
    let (overlay, at) = frozen
        .iter()
        .find_map(|path| Some((path.clone(), find(path, &pattern.as_bytes()[..4096])?)))
        .expect("the frozen overlay has what the guest wrote");
    let base = layer_of(&worker, "raw").swap_remove(0);
    let ram = only_file(&worker.data.join("ram"));
    let free = unused_byte(&base);
    let page = used_byte(&ram, 300);
    for (path, at, guest_byte) in [
        (&overlay, at + 1000, None),
        (&overlay, 2, None),
        (&base, free, Some(free)),
        (&ram, page, Some(page)),
    ] {
        eprintln!("{} at {at}", path.display());
        let mut changed = Changed::at(path, at);
        refused_for(&worker, &spy, &changed, guest_byte);
        // The store has it whole: without the damaged file the fork is what it should be.
        changed.move_away();
        forks_equal(&worker, &spy, "base", &seen);
        changed.put_back();
    }
    let now = guest::look(&worker, "source");
    assert_eq!((&now.files, &now.memory), (&seen.files, &seen.memory));
    assert!(now.count > seen.count);
    // A kernel is small: it is fetched anew by whoever has a checkpoint to fetch it from.
    for blob in files_below(&worker.data.join("blobs")) {
        let changed = Changed::at(&blob.0, blob.1 / 2);
        let guests = spy.guests();
        let error = worker.fails(&["create", stead_tests::TEMPLATE, "--name", "try"], 5);
        assert_names(&error, &changed.path.display().to_string());
        assert_eq!(spy.guests(), guests, "a guest was started");
        assert_eq!(worker.json(&["ls"]).as_array().map(Vec::len), Some(1));
        // Which of two damaged ones is named first is not promised.
        changed.put_back();
    }
    for blob in files_below(&worker.data.join("blobs")) {
        flip(&blob.0, blob.1 / 2);
    }
    forks_equal(&worker, &spy, "base", &seen);
    for blob in files_below(&worker.data.join("blobs")) {
        let bytes = fs::read(&blob.0).expect("read");
        assert_eq!(
            blake3::hash(&bytes).to_hex().to_string(),
            name_of(&blob.0),
            "it is whole again"
        );
    }

    // A worker that has fetched a base takes no chunk of it that has changed meanwhile.
    let mut other = Worker::on(Path::new(&worker.store));
    spy.watch(&mut other);
    forks_equal(&other, &spy, "base", &seen);
    guest::add_file(&worker, "source", "later", 300_000);
    let later = guest::look(&worker, "source");
    worker.ok(&["checkpoint", "create", "source", "--name", "later"]);
    let fetched = layer_of(&other, "raw").swap_remove(0);
    let byte = used_byte(&fetched, 200);
    let changed = Changed::at(&fetched, byte);
    refused_for(&other, &spy, &changed, Some(byte));
    forks_equal(&other, &spy, "later", &later);
    changed.put_back();
    forks_equal(&other, &spy, "base", &seen);
}

/// The base that a sandbox's disk starts from.
fn base_of(worker: &Worker) -> PathBuf {
    let mut bases = layer_of(worker, "raw");
    assert_eq!(bases.len(), 1, "{bases:?}");
    bases.swap_remove(0)
}

#[test]
fn a_base_changed_behind_our_back_is_refused_by_create_start_and_checkpoint() {
    let spy = Spy::new();
    let mut worker = Worker::with_own_store();
    spy.watch(&mut worker);
    worker.boot("running");
    let seen = guest::fill(&worker, "running");
    worker.boot("stopped");
    worker.ok(&["stop", "stopped"]);
    let base = base_of(&worker);
    let changed = Changed::at(&base, unused_byte(&base));
    let guests = spy.guests();
    for args in [
        &["create", stead_tests::TEMPLATE, "--name", "another"][..],
        &["start", "stopped"],
        &["checkpoint", "create", "running", "--name", "built-on-it"],
        &["checkpoint", "create", "running", "--disk-only"],
        &["hibernate", "running"],
    ] {
        let error = worker.fails(args, 5);
        assert_names(&error, &base.display().to_string());
    }
    assert_eq!(spy.guests(), guests, "a guest was started");
    assert_eq!(worker.state("running"), "running");
    assert_eq!(worker.state("stopped"), "stopped");
    assert_eq!(worker.json(&["ls"]).as_array().map(Vec::len), Some(2));
    assert!(worker.checkpoints().is_empty());
    changed.put_back();
    let now = guest::look(&worker, "running");
    assert_eq!((&now.files, &now.memory), (&seen.files, &seen.memory));
    worker.ok(&["checkpoint", "create", "running", "--name", "good"]);
    worker.ok(&["start", "stopped"]);
    forks_equal(&worker, &spy, "good", &seen);
}
