//! No room, no right to write, no store: told before anything is changed, or undone; guests run on.
#![allow(
    clippy::disallowed_methods,
    reason = "tests move and remove files as they lie there"
)]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stead_tests::guest::{self, Seen};
use stead_tests::mount::Mount;
use stead_tests::{Worker, copy_tree, error_of, files_below, golden_store, target_dir};

const MIB: u64 = 1 << 20;

/// A folder of a test's own for mounts.
fn place() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir_in(target_dir()).expect("folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).expect("mode");
    folder
}

/// A worker whose data and whose store, with the template, are in these folders.
fn worker_in(data: &Path, store: &Path) -> Worker {
    copy_tree(golden_store(), store);
    Worker::at(data, &store.display().to_string())
}

/// Room for the template and for one checkpoint: all of a guest's RAM, and what it wrote.
fn store_bytes() -> u64 {
    let template: u64 = files_below(golden_store())
        .iter()
        .map(|(_, length)| length)
        .sum();
    template + (512 + 128) * MIB
}

/// What a refusal must not change.
#[derive(Debug, PartialEq, Eq)]
struct Standing {
    files: Vec<String>,
    memory: Vec<String>,
    store: Vec<(PathBuf, u64)>,
    pid: i32,
}

impl Standing {
    fn of(worker: &Worker) -> Self {
        let mut store = files_below(Path::new(&worker.store));
        store.sort();
        Self {
            files: worker.files(),
            memory: worker.memory_files(),
            store,
            pid: worker.pid("source"),
        }
    }
}

fn goes_on(worker: &Worker, before: &Seen) -> Seen {
    let now = guest::look(worker, "source");
    assert_eq!((&now.files, &now.memory), (&before.files, &before.memory));
    assert!(now.count > before.count, "{now:?} after {before:?}");
    now
}

/// The error says what is there, what stands and what to do.
fn assert_helps(error: &Value) {
    for part in ["found", "next"] {
        assert!(
            error[part].as_str().is_some_and(|text| !text.is_empty()),
            "no {part}: {error}"
        );
    }
}

#[test]
fn a_capture_that_cannot_fit_is_refused_before_anything_is_written() {
    let place = place();
    let data = Mount::tmpfs(&place.path().join("data"), 1500 * MIB);
    let store = Mount::tmpfs(&place.path().join("store"), store_bytes());
    let worker = worker_in(&data.folder().join("worker"), &store.folder().join("store"));
    worker.boot("source");
    let mut seen = guest::fill(&worker, "source");
    for full in [&data, &store] {
        let filler = full.fill(90 * MIB);
        let before = Standing::of(&worker);
        for args in [
            &["checkpoint", "create", "source", "--name", "c"][..],
            &["hibernate", "source"],
        ] {
            let error = worker.fails(args, 7);
            assert_helps(&error);
            assert!(
                error["found"]
                    .as_str()
                    .expect("text")
                    .contains(full.folder().to_str().expect("UTF-8")),
                "{error}"
            );
            assert!(
                error["left"]
                    .as_str()
                    .expect("text")
                    .contains("nothing was changed"),
                "{error}"
            );
            assert_eq!(Standing::of(&worker), before);
        }
        // There was nothing to undo either: no step had begun.
        let listed = worker.run(&["ls"]);
        assert!(listed.status.success() && listed.stderr.is_empty());
        seen = goes_on(&worker, &seen);
        fs::remove_file(filler).expect("make room");
    }
    assert!(worker.checkpoints().is_empty());
    // With room it fits, and a fork that would not fit is refused as well.
    worker.ok(&["checkpoint", "create", "source", "--name", "c"]);
    let other_data = Mount::tmpfs(&place.path().join("other"), 300 * MIB);
    let other = Worker::at(&other_data.folder().join("worker"), &worker.store);
    let error = other.fails(&["fork", "c"], 7);
    assert_helps(&error);
    assert!(other.files().is_empty() && other.qemus().is_empty());
    goes_on(&worker, &seen);
}

#[test]
fn a_file_system_that_fills_up_during_a_checkpoint_costs_the_checkpoint_only() {
    let place = place();
    let data = Mount::tmpfs(&place.path().join("data"), 1500 * MIB);
    let store = Mount::tmpfs(&place.path().join("store"), store_bytes());
    let worker = worker_in(&data.folder().join("worker"), &store.folder().join("store"));
    worker.boot("source");
    let mut seen = guest::fill(&worker, "source");
    for (full, step, leave) in [(&store, "capture", 0), (&data, "overlays", 16 * MIB)] {
        let before = Standing::of(&worker);
        let create = ["--json", "checkpoint", "create", "source", "--name", "c"];
        let checkpoint = worker.stopped_at(&create, &format!("checkpoint:{step}"));
        let filler = full.fill(leave);
        checkpoint.send("CONT");
        let ended = checkpoint.output();
        let error = error_of(&ended).unwrap_or_else(|| panic!("{}: it fitted", ended.status));
        assert_eq!(ended.status.code(), Some(7), "{error}");
        assert_helps(&error);
        assert!(
            error["left"].is_string() || full.folder() == data.folder(),
            "{error}"
        );
        assert!(worker.checkpoints().is_empty());
        let now = Standing::of(&worker);
        assert_eq!((now.pid, &now.memory), (before.pid, &before.memory));
        // The disks may have been switched: one more layer, and nothing else.
        let new: Vec<_> = now
            .files
            .iter()
            .filter(|file| !before.files.contains(file))
            .collect();
        assert!(
            new.len() <= 1 && new.iter().all(|file| file.starts_with("layers/")),
            "{new:?}"
        );
        seen = goes_on(&worker, &seen);
        fs::remove_file(filler).expect("make room");
        let collected = worker.json(&["gc"]);
        assert_eq!(collected["waiting_for"], serde_json::json!([]));
        let left: Vec<_> = Standing::of(&worker).store;
        let names = |files: &[(PathBuf, u64)]| -> Vec<PathBuf> {
            let names = files.iter().map(|(path, _)| path.clone());
            names
                .filter(|path| {
                    !path
                        .parent()
                        .is_some_and(|folder| folder.ends_with("indexes"))
                })
                .collect()
        };
        assert_eq!(
            names(&left),
            names(&before.store),
            "gc leaves what was there"
        );
    }
    worker.ok(&["checkpoint", "create", "source", "--name", "c"]);
    worker.ok(&["verify"]);
    goes_on(&worker, &seen);
}

#[test]
fn a_store_that_is_read_only_or_gone_is_told_with_what_to_do_and_the_sandboxes_run_on() {
    let place = place();
    let store = Mount::image(&place.path().join("store"), "mkfs.ext4", 1024 * MIB);
    let worker = worker_in(&place.path().join("worker"), &store.folder().join("store"));
    worker.boot("source");
    let mut seen = guest::fill(&worker, "source");
    let before = Standing::of(&worker);
    let refused = |says: &str| {
        for args in [
            &["checkpoint", "create", "source"][..],
            &["hibernate", "source"],
        ] {
            let error = worker.fails(args, 8);
            assert_helps(&error);
            assert!(error.to_string().contains(says), "{error}");
            assert!(
                error["left"]
                    .as_str()
                    .expect("text")
                    .contains("nothing was changed"),
                "{error}"
            );
        }
        assert_eq!(worker.state("source"), "running");
    };
    store.set_read_only(true);
    refused("read-only");
    seen = goes_on(&worker, &seen);
    store.set_read_only(false);
    assert_eq!(Standing::of(&worker), before);

    let (here, away) = (PathBuf::from(&worker.store), store.folder().join("away"));
    fs::rename(&here, &away).expect("move the store away");
    refused("missing");
    worker.fails(&["checkpoint", "ls"], 8);
    seen = goes_on(&worker, &seen);
    fs::rename(&away, &here).expect("move it back");
    assert_eq!(Standing::of(&worker), before);

    // A checkpoint that is killed, and its store gone when the next command cleans up.
    worker.crash(
        &["checkpoint", "create", "source", "--name", "c"],
        "checkpoint:commit",
    );
    assert_eq!(
        fs::read_dir(here.join("leases")).expect("leases").count(),
        1
    );
    fs::rename(&here, &away).expect("move the store away");
    let listed = worker.run(&["ls"]);
    let said = String::from_utf8_lossy(&listed.stderr).into_owned();
    assert!(listed.status.success() && said.contains("lease"), "{said}");
    seen = goes_on(&worker, &seen);
    assert!(
        worker.run(&["ls"]).stderr.is_empty(),
        "it is cleaned up once"
    );
    fs::rename(&away, &here).expect("move it back");
    assert_eq!(worker.json(&["gc"])["waiting_for"], serde_json::json!([]));
    assert_eq!(
        fs::read_dir(here.join("leases")).expect("leases").count(),
        0
    );
    assert!(worker.checkpoints().is_empty());
    worker.ok(&["checkpoint", "create", "source", "--name", "c"]);
    worker.ok(&["fork", "c", "--name", "fork"]);
    let fork = guest::look(&worker, "fork");
    assert_eq!((&fork.files, &fork.memory), (&seen.files, &seen.memory));
}

/// How much of a file lies in blocks that another file has too, as the file system says.
fn shared_bytes(path: &Path) -> u64 {
    let listed = std::process::Command::new("filefrag")
        .args(["-v", "-b1"])
        .arg(path)
        .output()
        .expect("filefrag");
    assert!(listed.status.success(), "{listed:?}");
    let text = String::from_utf8_lossy(&listed.stdout);
    let length = |line: &str| -> u64 {
        let field = line.split(':').nth(3).expect("a length").trim();
        field.parse().expect("a number")
    };
    let lines = text.lines();
    lines
        .filter(|line| line.contains("shared"))
        .map(length)
        .sum()
}

#[test]
fn where_blocks_can_be_shared_a_checkpoint_and_its_fork_do_not_copy_their_ram() {
    let place = place();
    let data = Mount::image(&place.path().join("data"), "mkfs.xfs", 4096 * MIB);
    let worker = worker_in(&data.folder().join("worker"), &place.path().join("store"));
    worker.boot("source");
    let seen = guest::fill(&worker, "source");
    worker.ok(&["checkpoint", "create", "source", "--name", "base"]);
    worker.ok(&["fork", "base", "--name", "fork"]);
    let ram = fs::read_dir(worker.data.join("ram"))
        .expect("ram")
        .next()
        .expect("an image")
        .expect("entry");
    let in_use = stead_sys::space::allocated_bytes(&ram.path()).expect("measure");
    let shared = shared_bytes(&ram.path());
    eprintln!("{shared} of {in_use} bytes of RAM are shared");
    // What the guests have written since then is no longer shared, and XFS takes 128 KiB for each first write.
    assert!(in_use > 64 * MIB && shared >= in_use / 2);
    assert!(
        worker.memory_files().is_empty(),
        "live RAM lies where its blocks can be shared"
    );
    let fork = guest::look(&worker, "fork");
    assert_eq!((&fork.files, &fork.memory), (&seen.files, &seen.memory));
    // Killed with its RAM half taken, then once more in full; and a fork is as good a source.
    worker.crash(&["checkpoint", "create", "fork"], "checkpoint:staged");
    let files = worker.files();
    worker.ok(&["ls"]);
    assert!(worker.files().len() < files.len());
    worker.ok(&["checkpoint", "create", "fork", "--name", "second"]);
    worker.ok(&["rm", "--force", "fork"]);
    worker.ok(&["fork", "second", "--name", "fork"]);
    let fork = guest::look(&worker, "fork");
    assert_eq!((&fork.files, &fork.memory), (&seen.files, &seen.memory));
    worker.ok(&["rm", "--force", "fork", "source"]);
}
