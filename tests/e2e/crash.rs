//! `stead` or QEMU is killed, at every step and at random times; the next command finds everything usable.
#![allow(clippy::disallowed_methods, reason = "tests look at files as they are")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use stead_tests::guest::{self, Seen};
use stead_tests::steps::Stepping;
use stead_tests::{Worker, kill, until};

/// What a worker has, to be compared before and after.
struct Holdings {
    files: BTreeSet<String>,
    memory: Vec<String>,
    checkpoints: BTreeSet<String>,
    qemus: BTreeSet<i32>,
}

impl Holdings {
    fn of(worker: &Worker) -> Self {
        Self {
            files: worker.files().into_iter().collect(),
            memory: worker.memory_files(),
            checkpoints: names(worker),
            qemus: worker.qemus().into_iter().collect(),
        }
    }

    /// Nothing is gone, and nothing is new but the layers that `sandboxes` write to now.
    fn assert_kept(&self, worker: &Worker, sandboxes: &[&str], at: &str) {
        let now = Self::of(worker);
        let written: BTreeSet<String> = sandboxes
            .iter()
            .flat_map(|name| written_to(worker, name))
            .collect();
        let new: Vec<_> = now.files.difference(&self.files).collect();
        let lost: Vec<_> = self.files.difference(&now.files).collect();
        assert!(
            new.iter().all(|file| written.contains(*file)),
            "{at}: left behind {new:?}"
        );
        assert!(lost.is_empty(), "{at}: lost {lost:?}");
        assert_eq!(now.memory, self.memory, "{at}");
        assert_eq!(now.qemus, self.qemus, "{at}");
        assert_no_lease(worker, at);
    }
}

fn names(worker: &Worker) -> BTreeSet<String> {
    let name = |entry: &serde_json::Value| {
        assert_eq!(entry["damage"], serde_json::Value::Null, "{entry}");
        entry["name"].as_str().unwrap_or("").to_owned()
    };
    worker.checkpoints().iter().map(name).collect()
}

/// The files that a sandbox's disks write to, as [`Worker::files`] names them.
fn written_to(worker: &Worker, sandbox: &str) -> Vec<String> {
    let shown = worker.json(&["show", sandbox]);
    let disks = shown["disks"].as_array().expect("disks");
    let name = |disk: &serde_json::Value| {
        let file = Path::new(disk["file"].as_str().expect("file"));
        format!(
            "layers/{}",
            file.file_name().expect("name").to_string_lossy()
        )
    };
    disks.iter().map(name).collect()
}

fn leases(worker: &Worker) -> usize {
    fs::read_dir(Path::new(&worker.store).join("leases")).map_or(0, Iterator::count)
}

fn assert_no_lease(worker: &Worker, at: &str) {
    assert_eq!(leases(worker), 0, "{at}");
    assert!(!Path::new(&worker.store).join("gc-lock").exists(), "{at}");
    let collected = worker.json(&["gc"]);
    assert_eq!(
        collected["waiting_for"].as_array().map(Vec::len),
        Some(0),
        "{at}: {collected}"
    );
}

/// Kills the command at `point` and lets the next command clean up.
fn killed_at(worker: &Worker, args: &[&str], point: &str) {
    worker.crash(args, point);
    let listed = worker.run(&["ls"]);
    assert!(listed.status.success(), "{point}");
    assert!(
        text(&listed).contains("undoing"),
        "{point}: there was nothing to undo"
    );
    let again = worker.run(&["ls"]);
    assert!(
        again.status.success() && !text(&again).contains("undoing"),
        "{point}: not undone"
    );
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The guest goes on: same files, same memory, and its counter is further than it was.
fn goes_on(worker: &Worker, sandbox: &str, before: &Seen, at: &str) -> Seen {
    let now = guest::look(worker, sandbox);
    assert_eq!(
        (&now.files, &now.memory),
        (&before.files, &before.memory),
        "{at}"
    );
    assert!(now.count > before.count, "{at}: {now:?} after {before:?}");
    now
}

/// The guest stands where the checkpoint was taken: it has its files and memory.
fn equals(worker: &Worker, sandbox: &str, checkpoint: &Seen, at: &str) {
    let now = guest::look(worker, sandbox);
    assert_eq!(
        (&now.files, &now.memory),
        (&checkpoint.files, &checkpoint.memory),
        "{at}"
    );
    assert!(now.count >= checkpoint.count, "{at}");
}

#[test]
fn a_checkpoint_killed_at_any_step_leaves_the_vm_running_and_only_whole_checkpoints() {
    let worker = Worker::with_own_store();
    worker.boot("source");
    guest::fill(&worker, "source");
    let mut taken = Vec::new();
    for point in [
        "begin",
        "overlays",
        "capture",
        "staged",
        "captured",
        "read-back",
        "publish",
        "commit",
        "committed",
        "finish",
    ] {
        guest::add_file(&worker, "source", point, 300_000);
        let seen = guest::look(&worker, "source");
        let before = Holdings::of(&worker);
        let at = format!("checkpoint:{point}");
        worker.crash(&["checkpoint", "create", "source", "--name", point], &at);
        // What would be left behind without recovery.
        if !["begin", "overlays"].contains(&point) {
            assert_ne!(
                worker.files().into_iter().collect::<BTreeSet<_>>(),
                before.files,
                "{at}"
            );
        }
        if point == "staged" {
            assert_ne!(worker.memory_files(), before.memory, "{at}");
        }
        assert_eq!(leases(&worker), usize::from(point == "commit"), "{at}");
        let listed = worker.run(&["ls"]);
        assert!(
            listed.status.success() && text(&listed).contains("undoing checkpoint"),
            "{at}"
        );
        before.assert_kept(&worker, &["source"], &at);
        goes_on(&worker, "source", &seen, &at);
        let mut expected = before.checkpoints.clone();
        if ["committed", "finish"].contains(&point) {
            expected.insert(point.to_owned());
            worker.ok(&["checkpoint", "verify", point]);
            taken.push((point, seen));
        }
        assert_eq!(names(&worker), expected, "{at}");
    }
    let seen = guest::look(&worker, "source");
    worker.ok(&["checkpoint", "create", "source", "--name", "whole"]);
    taken.push(("whole", seen));
    assert_eq!(taken.len(), 3);
    for (name, seen) in taken {
        worker.ok(&["fork", name, "--name", "try"]);
        equals(&worker, "try", &seen, name);
        worker.ok(&["rm", "--force", "try"]);
    }
    worker.ok(&["verify"]);
}

#[test]
fn a_hibernation_a_wake_or_a_restore_killed_at_any_step_keeps_one_usable_state() {
    let worker = Worker::with_own_store();
    worker.boot("source");
    let mut seen = guest::fill(&worker, "source");
    for at in [
        "hibernate:begin",
        "hibernate:overlays",
        "hibernate:capture",
        "checkpoint:staged",
        "checkpoint:captured",
        "hibernate:read-back",
        "hibernate:commit",
        "checkpoint:committed",
    ] {
        let before = Holdings::of(&worker);
        killed_at(&worker, &["hibernate", "source"], at);
        before.assert_kept(&worker, &["source"], at);
        assert_eq!(worker.state("source"), "running", "{at}");
        seen = goes_on(&worker, "source", &seen, at);
    }
    // The manifest is there and recorded: from here on the state is in the store.
    killed_at(&worker, &["hibernate", "source"], "hibernate:recorded");
    assert_eq!(worker.state("source"), "hibernated");
    assert!(worker.qemus().is_empty());
    for at in ["wake:begin", "wake:fetch", "wake:verify", "wake:start"] {
        let before = Holdings::of(&worker);
        killed_at(&worker, &["wake", "source"], at);
        before.assert_kept(&worker, &[], at);
        assert_eq!(worker.state("source"), "hibernated", "{at}");
    }
    killed_at(&worker, &["wake", "source"], "restore:swapped");
    assert_eq!(worker.state("source"), "running");
    assert_eq!(worker.qemus(), [worker.pid("source")]);
    seen = goes_on(&worker, "source", &seen, "wake, swapped");

    worker.ok(&["checkpoint", "create", "source", "--name", "earlier"]);
    guest::add_file(&worker, "source", "later", 300_000);
    let mut later = guest::look(&worker, "source");
    assert_ne!(later.files, seen.files);
    for at in [
        "restore:begin",
        "restore:fetch",
        "restore:verify",
        "restore:start",
    ] {
        let before = Holdings::of(&worker);
        killed_at(&worker, &["restore", "source", "earlier"], at);
        before.assert_kept(&worker, &["source"], at);
        later = goes_on(&worker, "source", &later, at);
    }
    killed_at(
        &worker,
        &["restore", "source", "earlier"],
        "restore:swapped",
    );
    assert_eq!(worker.qemus(), [worker.pid("source")]);
    equals(&worker, "source", &seen, "restore, swapped");
    worker.ok(&["checkpoint", "create", "source", "--name", "after"]);
    worker.ok(&["fork", "after", "--name", "try"]);
    equals(&worker, "try", &seen, "fork at the end");
    assert_no_lease(&worker, "at the end");
}

#[test]
fn a_creation_a_start_or_a_fork_killed_at_any_step_leaves_nothing_and_works_again() {
    let worker = Worker::with_own_store();
    for at in [
        "template-fetch:begin",
        "template-fetch:fetch",
        "template-fetch:finish",
    ] {
        killed_at(
            &worker,
            &["create", stead_tests::TEMPLATE, "--name", "a"],
            at,
        );
        assert_eq!(worker.files(), <[String; 0]>::default(), "{at}");
        let blobs = fs::read_dir(worker.data.join("blobs"))
            .expect("blobs")
            .count();
        assert_eq!(blobs, 0, "{at}");
    }
    worker.crash(
        &["create", stead_tests::TEMPLATE, "--name", "a"],
        "create:begin",
    );
    worker.ok(&["ls"]);
    for at in ["create:disks", "create:boot", "create:finish"] {
        let before = Holdings::of(&worker);
        killed_at(
            &worker,
            &["create", stead_tests::TEMPLATE, "--name", "a"],
            at,
        );
        before.assert_kept(&worker, &[], at);
        assert_eq!(worker.json(&["ls"]), serde_json::json!([]), "{at}");
    }
    worker.boot("a");
    let seen = guest::fill(&worker, "a");
    worker.ok(&["checkpoint", "create", "a", "--name", "base"]);
    for at in [
        "fork:begin",
        "fork:fetch",
        "fork:verify",
        "fork:start",
        "fork:finish",
    ] {
        let before = Holdings::of(&worker);
        killed_at(&worker, &["fork", "base", "--name", "b"], at);
        before.assert_kept(&worker, &["a"], at);
        assert_eq!(
            worker.json(&["ls"]).as_array().map(Vec::len),
            Some(1),
            "{at}"
        );
    }
    worker.ok(&["fork", "base", "--name", "b"]);
    equals(&worker, "b", &seen, "fork");
    goes_on(&worker, "a", &seen, "source");
    worker.ok(&["rm", "--force", "b"]);
    worker.ok(&["stop", "a"]);
    for at in ["start:begin", "start:boot", "start:finish"] {
        let before = Holdings::of(&worker);
        killed_at(&worker, &["start", "a"], at);
        before.assert_kept(&worker, &["a"], at);
        assert_eq!(worker.state("a"), "stopped", "{at}");
    }
    worker.ok(&["start", "a"]);
    assert_eq!(guest::look_at_disk(&worker, "a"), seen.files);
}

#[test]
fn a_vm_whose_qemu_is_killed_is_shown_as_crashed_and_starts_again_with_its_disk() {
    let worker = Worker::with_own_store();
    worker.boot("a");
    let files = guest::fill(&worker, "a").files;
    // While nothing else happens.
    kill(worker.pid("a"));
    crashed_and_started(&worker, &files, "while running");
    // By somebody, in the moment of a capture: as the step begins, and a while into it.
    for delay_ms in [0, 200] {
        let before = worker.checkpoints().len();
        let pid = worker.pid("a");
        let name = format!("at-{delay_ms}");
        let args = ["checkpoint", "create", "a", "--name", &name];
        let capture = Stepping::start(&worker, &args);
        capture.reach("capture");
        std::thread::sleep(Duration::from_millis(delay_ms));
        kill(pid);
        let made = capture.end().0.success();
        // Killed late, the instant may have been taken and read already: then it is published whole.
        assert_eq!(
            worker.checkpoints().len(),
            before + usize::from(made),
            "{delay_ms} ms"
        );
        crashed_and_started(&worker, &files, &format!("{delay_ms} ms into a capture"));
    }
    // And together with stead, when the disks have been switched: recorded, and not yet recorded.
    for at in ["checkpoint:captured", "checkpoint:capture"] {
        let pid = worker.pid("a");
        worker.crash(&["checkpoint", "create", "a"], at);
        kill(pid);
        crashed_and_started(&worker, &files, at);
    }
    assert!(worker.run(&["verify"]).status.success());
    assert_no_lease(&worker, "at the end");
}

fn crashed_and_started(worker: &Worker, files: &str, at: &str) {
    assert_eq!(worker.state("a"), "crashed", "{at}");
    let refused = worker.run(&["exec", "-n", "a", "--", "true"]);
    assert_eq!(refused.status.code(), Some(125), "{at}");
    worker.fails(&["checkpoint", "create", "a"], 4);
    worker.ok(&["start", "a"]);
    assert_eq!(guest::look_at_disk(worker, "a"), files, "{at}");
    assert_eq!(worker.qemus(), [worker.pid("a")], "{at}");
}

/// Random numbers from a seed that is printed, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn seeded() -> Self {
        let seed = match std::env::var("STEAD_SEED") {
            Ok(seed) => seed.parse().expect("a number"),
            Err(_) => u64::from(std::process::id()) << 20 | 0x5eed,
        };
        eprintln!("STEAD_SEED={seed}");
        Self(seed | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// How often each command is killed: more with STEAD_SOAK=1.
fn rounds(usual: u64) -> u64 {
    if std::env::var("STEAD_SOAK").is_ok_and(|soak| soak == "1") {
        usual * 30
    } else {
        usual
    }
}

/// Starts a command and kills it after a random part of the time that it usually takes.
fn killed_at_random(worker: &Worker, args: &[&str], usual: Duration, random: &mut Random) -> bool {
    let mut child = worker.spawn(args);
    let micros = u64::try_from(usual.as_micros()).expect("short");
    std::thread::sleep(Duration::from_micros(random.below(micros)));
    child.kill().expect("kill");
    child.wait().expect("wait").success()
}

#[test]
fn stead_killed_at_random_times_leaves_whole_checkpoints_running_vms_and_no_leftovers() {
    let mut random = Random::seeded();
    let worker = Worker::with_own_store();
    worker.boot("source");
    // Looked at before the checkpoint: the source counts on while and after it is taken, a fork from its instant.
    let expected = guest::fill(&worker, "source");
    let begun = Instant::now();
    worker.ok(&["checkpoint", "create", "source", "--name", "first"]);
    let usual = begun.elapsed();
    let mut first = guest::look(&worker, "source");
    let mut finished = 0;
    for round in 0..rounds(6) {
        let at = format!("checkpoint, round {round}");
        let before = Holdings::of(&worker);
        let name = format!("round-{round}");
        let args = ["checkpoint", "create", "source", "--name", &name];
        let whole = killed_at_random(&worker, &args, usual, &mut random);
        finished += u64::from(whole);
        worker.ok(&["ls"]);
        let listed = names(&worker).contains(&name);
        assert!(
            listed || !whole,
            "{at}: success was told and it is not listed"
        );
        if listed {
            worker.ok(&["checkpoint", "verify", &name]);
            worker.ok(&["checkpoint", "rm", &name]);
        }
        before.assert_kept(&worker, &["source"], &at);
        first = goes_on(&worker, "source", &first, &at);
    }
    let begun = Instant::now();
    worker.ok(&["fork", "first", "--name", "fork"]);
    let usual = begun.elapsed();
    equals(&worker, "fork", &expected, "fork");
    worker.ok(&["rm", "--force", "fork"]);
    for round in 0..rounds(6) {
        let at = format!("fork, round {round}");
        let before = Holdings::of(&worker);
        let whole = killed_at_random(
            &worker,
            &["fork", "first", "--name", "fork"],
            usual,
            &mut random,
        );
        finished += u64::from(whole);
        worker.ok(&["ls"]);
        let sandboxes = worker.json(&["ls"]).as_array().expect("list").len();
        assert!(sandboxes == 2 || !whole, "{at}");
        if sandboxes == 2 {
            assert_eq!(worker.state("fork"), "running", "{at}");
            worker.ok(&["rm", "--force", "fork"]);
        }
        before.assert_kept(&worker, &["source"], &at);
    }
    for round in 0..rounds(4) {
        // A killed gc neither locks the others out nor loses anything.
        let name = format!("garbage-{round}");
        worker.ok(&["checkpoint", "create", "source", "--name", &name]);
        worker.ok(&["checkpoint", "rm", &name]);
        killed_at_random(&worker, &["gc"], Duration::from_millis(300), &mut random);
        // Its lock stays, by design, until the next one takes it over.
        worker.ok(&["gc"]);
        assert_no_lease(&worker, &format!("gc, round {round}"));
    }
    goes_on(&worker, "source", &first, "at the end");
    worker.ok(&["verify"]);
    worker.ok(&["fork", "first", "--name", "fork"]);
    equals(&worker, "fork", &expected, "fork at the end");
    eprintln!("{finished} commands were quicker than their kill");
    until(Duration::from_secs(5), || worker.qemus().len() == 2);
}
