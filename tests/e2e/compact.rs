//! Layers that nothing needs any more are merged under stopped and running sandboxes; nothing that is needed changes.
#![allow(clippy::disallowed_methods, reason = "tests look at files as they are")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use stead_tests::guest::{self, Seen};
use stead_tests::mount::Mount;
use stead_tests::{Worker, copy_tree, error_of, golden_store, kill, target_dir};

const NEVER: [&str; 2] = ["--compact-above", "1000"];

/// A running sandbox with a layer for each of `names`, whose checkpoints are there.
fn layered(worker: &Worker, sandbox: &str, names: &[&str]) {
    for name in names {
        guest::add_file(worker, sandbox, name, 400_000);
        checkpoint(worker, sandbox, name);
    }
}

fn checkpoint(worker: &Worker, sandbox: &str, name: &str) {
    let [above, never] = NEVER;
    let args = ["checkpoint", "create", sandbox, "--name", name];
    worker.ok(&[&args[..], &["--disk-only", above, never]].concat());
}

fn layers(worker: &Worker, sandbox: &str) -> u64 {
    let shown = worker.json(&["show", sandbox]);
    shown["disks"][0]["layers"].as_u64().expect("a number")
}

/// How many layers there would be.
fn planned(worker: &Worker, sandbox: &str) -> u64 {
    let planned = worker.json(&["compact", "--dry-run", sandbox]);
    planned["disks"][0]["layers"].as_u64().expect("a number")
}

fn active(worker: &Worker, sandbox: &str) -> PathBuf {
    let shown = worker.json(&["show", sandbox]);
    shown["disks"][0]["file"].as_str().expect("a file").into()
}

/// The layers below what a sandbox writes to, by the names in the images' headers.
fn chain(worker: &Worker, sandbox: &str) -> Vec<PathBuf> {
    let active = active(worker, sandbox);
    let mut command = Command::new("qemu-img");
    command.args(["info", "-U", "--backing-chain", "--output=json"]);
    let output = command.arg(&active).output().expect("qemu-img");
    assert!(output.status.success(), "{output:?}");
    let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let names = all.as_array().expect("a list").iter();
    names
        .map(|image| image["filename"].as_str().expect("a name").into())
        .collect()
}

/// What `qemu-img` reads of the whole disk, as a raw file.
fn disk(worker: &Worker, sandbox: &str) -> PathBuf {
    let raw = worker.data.join("disk.raw");
    let mut command = Command::new("qemu-img");
    command
        .args(["convert", "-O", "raw"])
        .arg(active(worker, sandbox));
    assert!(command.arg(&raw).status().expect("qemu-img").success());
    raw
}

/// `qemu-img` finds nothing wrong with any layer, and reads what it read before.
fn assert_same(worker: &Worker, sandbox: &str, before: &Path, at: &str) {
    for layer in chain(worker, sandbox) {
        if layer.extension().is_some_and(|ending| ending == "qcow2") {
            let checked = Command::new("qemu-img").arg("check").arg(&layer).output();
            let checked = checked.expect("qemu-img");
            // A leak is what a killed QEMU leaves, and costs room only.
            assert!(
                matches!(checked.status.code(), Some(0 | 3)),
                "{at}: {checked:?}"
            );
        }
    }
    let mut command = Command::new("qemu-img");
    command
        .arg("compare")
        .arg(before)
        .arg(active(worker, sandbox));
    let compared = command.output().expect("qemu-img");
    assert!(compared.status.success(), "{at}: {compared:?}");
}

/// Which file each is, how long, and when it was last changed.
fn stamps(files: &[PathBuf]) -> BTreeMap<PathBuf, (u64, u64, i64, i64)> {
    let stamp = |path: &PathBuf| {
        let found = fs::metadata(path).expect("it is there");
        (found.ino(), found.len(), found.ctime(), found.ctime_nsec())
    };
    files
        .iter()
        .map(|path| (path.clone(), stamp(path)))
        .collect()
}

fn remove(worker: &Worker, checkpoints: &[&str]) {
    worker.ok(&[&["checkpoint", "rm"], checkpoints].concat());
}

fn goes_on(worker: &Worker, sandbox: &str, before: &Seen, at: &str) -> Seen {
    let now = guest::look(worker, sandbox);
    assert_eq!(
        (&now.files, &now.memory),
        (&before.files, &before.memory),
        "{at}"
    );
    assert!(now.count > before.count, "{at}");
    now
}

/// How many layer files the worker has.
fn layer_files(worker: &Worker) -> usize {
    fs::read_dir(worker.data.join("layers"))
        .expect("list")
        .count()
}

/// Files of layers that a QEMU has open although they were removed.
fn open_and_removed(pid: i32) -> Vec<PathBuf> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs");
    let targets = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    targets
        .filter(|path| {
            let path = path.to_string_lossy();
            path.contains("/layers/") && path.ends_with("(deleted)")
        })
        .collect()
}

#[test]
fn layers_under_a_running_guest_are_merged_and_it_and_every_checkpoint_read_the_same() {
    let worker = Worker::with_own_store();
    worker.boot("a");
    guest::fill(&worker, "a");
    layered(&worker, "a", &["one", "two", "three"]);
    let kept = guest::look(&worker, "a");
    layered(&worker, "a", &["four", "five"]);
    assert_eq!(layers(&worker, "a"), 7);
    remove(&worker, &["one", "two", "four"]);
    let before = guest::look(&worker, "a");
    assert_eq!(planned(&worker, "a"), 4);
    assert_eq!(layers(&worker, "a"), 7, "a dry run changes nothing");
    let pid = worker.pid("a");
    let made = worker.json(&["compact", "a"]);
    assert_eq!(
        made["disks"][0]["merged"].as_array().map(Vec::len),
        Some(2),
        "{made}"
    );
    assert_eq!(layers(&worker, "a"), 4, "active, five, three, base");
    assert_eq!(chain(&worker, "a").len(), 4, "headers say the same");
    assert_eq!(layer_files(&worker), 4, "what is not needed is gone");
    assert_eq!(worker.pid("a"), pid);
    assert_eq!(
        open_and_removed(pid),
        <[PathBuf; 0]>::default(),
        "QEMU gave them up"
    );
    let now = goes_on(&worker, "a", &before, "compacted");
    // What stays, stays usable: older checkpoints, new ones, and a second time.
    worker.ok(&["fork", "three", "--name", "b"]);
    assert_eq!(guest::look_at_disk(&worker, "b"), kept.files);
    worker.ok(&["rm", "--force", "b"]);
    layered(&worker, "a", &["six"]);
    worker.ok(&["checkpoint", "create", "a", "--name", "full"]);
    let full = guest::look(&worker, "a");
    remove(&worker, &["three", "five", "six"]);
    worker.ok(&["compact", "a"]);
    assert_eq!(layers(&worker, "a"), 3, "active, full, base");
    goes_on(&worker, "a", &full, "a second time");
    worker.ok(&["fork", "full", "--name", "b"]);
    assert_eq!(guest::look(&worker, "b").memory, now.memory);
}

#[test]
fn a_stopped_sandbox_is_merged_down_to_its_template_and_qemu_img_reads_the_same_disk() {
    let worker = Worker::with_own_store();
    worker.boot("a");
    let files = guest::fill(&worker, "a").files;
    layered(&worker, "a", &["one", "two"]);
    worker.ok(&["fork", "one", "--name", "b"]);
    guest::add_file(&worker, "a", "last", 400_000);
    let files_now = guest::look_at_disk(&worker, "a");
    assert_ne!(files_now, files);
    worker.ok(&["stop", "a"]);
    let (before, depth) = (disk(&worker, "a"), layers(&worker, "a"));
    assert_eq!(depth, 4);
    worker.ok(&["compact", "a"]);
    assert_eq!(layers(&worker, "a"), depth, "all checkpoints are there");
    remove(&worker, &["one", "two"]);
    // What another sandbox stands on is not touched, whoever does not need it any more.
    let shared: Vec<PathBuf> = chain(&worker, "b").split_off(1);
    let untouched = stamps(&shared);
    worker.ok(&["compact", "a"]);
    assert_eq!(stamps(&shared), untouched);
    assert_eq!(
        layers(&worker, "a"),
        3,
        "active, what b stands on, the template's"
    );
    assert_same(&worker, "a", &before, "merged");
    guest::look_at_disk(&worker, "b");
    worker.ok(&["rm", "--force", "b"]);
    worker.ok(&["compact", "a"]);
    assert_eq!(layers(&worker, "a"), 2);
    assert_same(&worker, "a", &before, "merged");
    worker.ok(&["start", "a"]);
    assert_eq!(guest::look_at_disk(&worker, "a"), files_now);
}

#[test]
fn a_compaction_killed_at_any_step_leaves_a_guest_that_runs_on_and_is_finished_or_undone() {
    let worker = Worker::with_own_store();
    worker.boot("a");
    guest::fill(&worker, "a");
    for (point, is_finished) in [
        ("begin", false),
        ("made", false),
        ("switch", false),
        ("replaced", true),
        ("switched", true),
    ] {
        let name = format!("keep-{point}");
        layered(&worker, "a", &[point, &name]);
        remove(&worker, &[point]);
        let (seen, depth) = (guest::look(&worker, "a"), layers(&worker, "a"));
        let planned = planned(&worker, "a");
        assert!(planned < depth, "{point}: nothing to merge");
        worker.crash(&["compact", "a"], &format!("compact:{point}"));
        let listed = worker.run(&["ls"]);
        let told = String::from_utf8_lossy(&listed.stderr).into_owned();
        assert!(
            listed.status.success() && told.contains("undoing compact"),
            "{point}: {told}"
        );
        let now = layers(&worker, "a");
        assert_eq!(now, if is_finished { planned } else { depth }, "{point}");
        assert_eq!(
            layer_files(&worker) as u64,
            now,
            "{point}: nothing is left behind"
        );
        assert_eq!(
            open_and_removed(worker.pid("a")),
            <[PathBuf; 0]>::default(),
            "{point}"
        );
        let seen = goes_on(&worker, "a", &seen, point);
        worker.ok(&["compact", "a"]);
        assert_eq!(layers(&worker, "a"), planned, "{point}");
        goes_on(&worker, "a", &seen, point);
        worker.ok(&["checkpoint", "verify", &name]);
        remove(&worker, &[&name]);
        worker.ok(&["compact", "a"]);
    }
    // QEMU is killed together with it, before and after the switch.
    for point in ["replaced", "switched"] {
        let [name, kept] = ["dead", "kept"].map(|word| format!("{word}-{point}"));
        layered(&worker, "a", &[&name, &kept]);
        remove(&worker, &[&name]);
        let files = guest::look_at_disk(&worker, "a");
        let pid = worker.pid("a");
        worker.crash(&["compact", "a"], &format!("compact:{point}"));
        kill(pid);
        assert_eq!(worker.state("a"), "crashed", "{point}");
        let before = disk(&worker, "a");
        worker.ok(&["compact", "a"]);
        assert_same(&worker, "a", &before, point);
        worker.ok(&["start", "a"]);
        assert_eq!(guest::look_at_disk(&worker, "a"), files, "{point}");
        remove(&worker, &[&kept]);
    }
}

/// How often the guest is under load while its layers are merged: more with STEAD_SOAK=1.
fn rounds() -> usize {
    if std::env::var("STEAD_SOAK").is_ok_and(|soak| soak == "1") {
        20
    } else {
        2
    }
}

/// Writes over the same files for ever, each with the hash of what it has now beside it.
const LOAD: &str = r#"
mkdir -p /root/load
cat > /root/load.sh <<'SH'
n=0
while ! [ -e /run/stop-load ]; do
    n=$(( (n + 1) % 8 ))
    head -c $(( 1000000 + n * 333333 )) /dev/urandom > /root/load/$n.new
    sha256sum < /root/load/$n.new > /root/load/$n.sum
    sync
    mv /root/load/$n.new /root/load/$n
    sync
done
echo ended > /run/load-ended
SH
rm -f /run/stop-load /run/load-ended
setsid sh /root/load.sh > /dev/null 2>&1 < /dev/null &
"#;

const LOAD_WHOLE: &str = r#"
touch /run/stop-load
while ! [ -e /run/load-ended ]; do sleep 0.05; done
sync
echo 3 > /proc/sys/vm/drop_caches
n=0
for file in /root/load/?; do
    [ "$(sha256sum < $file)" = "$(cat $file.sum)" ] || { echo "broken $file"; exit 1; }
    n=$((n + 1))
done
[ $n -ge 1 ] && echo whole
"#;

#[test]
fn a_guest_that_writes_all_the_time_reads_back_what_it_wrote_after_its_layers_were_merged() {
    let worker = Worker::with_own_store();
    worker.boot("a");
    let seen = guest::fill(&worker, "a").files;
    for round in 0..rounds() {
        worker.shell("a", LOAD);
        checkpoint(&worker, "a", "old");
        checkpoint(&worker, "a", "older");
        // The limit makes the checkpoint itself compact what was left before it.
        remove(&worker, &["old", "older"]);
        worker.ok(&[
            "checkpoint",
            "create",
            "a",
            "--name",
            "new",
            "--disk-only",
            "--compact-above",
            "3",
        ]);
        assert_eq!(layers(&worker, "a"), 3, "round {round}: active, new, base");
        assert_eq!(worker.shell("a", LOAD_WHOLE), "whole", "round {round}");
        assert_eq!(guest::look_at_disk(&worker, "a"), seen, "round {round}");
        worker.ok(&["fork", "new", "--name", "b"]);
        assert_eq!(guest::look_at_disk(&worker, "b"), seen, "round {round}");
        worker.ok(&["rm", "--force", "b"]);
        remove(&worker, &["new"]);
        worker.ok(&["compact", "a"]);
    }
}

#[test]
fn a_layer_that_was_changed_behind_our_back_is_not_merged_and_a_reader_is_waited_for() {
    let worker = Worker::with_own_store();
    worker.boot("a");
    guest::fill(&worker, "a");
    layered(&worker, "a", &["one", "two"]);
    remove(&worker, &["one"]);
    // A fork that stands still has the layers in its hands.
    let fork = worker.stopped_at(&["fork", "two", "--name", "b"], "fork:start");
    let error = worker.fails(&["compact", "a", "--wait", "1"], 4);
    assert!(
        error["found"]
            .as_str()
            .is_some_and(|found| found.contains("fork")),
        "{error}"
    );
    assert_eq!(layers(&worker, "a"), 4);
    fork.send("CONT");
    let forked = fork.output();
    assert!(forked.status.success(), "{forked:?}");
    worker.ok(&["rm", "--force", "b"]);
    let damaged = chain(&worker, "a").swap_remove(1);
    let length = fs::metadata(&damaged).expect("stat").len();
    let at = data_in(&damaged).unwrap_or(length / 2);
    stead_tests::flip(&damaged, at);
    let error = worker.fails(&["compact", "a"], 5);
    assert!(
        error["left"]
            .as_str()
            .is_some_and(|left| left.contains("no layer")),
        "{error}"
    );
    assert_eq!(layers(&worker, "a"), 4);
    stead_tests::flip(&damaged, at);
    worker.ok(&["compact", "a"]);
    assert_eq!(layers(&worker, "a"), 3);
}

/// Where the guest's bytes begin that a layer has of its own.
fn data_in(layer: &Path) -> Option<u64> {
    let mut command = Command::new("qemu-img");
    command.args(["map", "-U", "--output=json"]).arg(layer);
    let output = command.output().expect("qemu-img");
    let map: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let own = map
        .iter()
        .filter(|part| part["depth"] == 0 && part["data"] == true);
    own.filter_map(|part| part["offset"].as_u64()).next_back()
}

#[test]
fn layers_that_may_not_fit_are_not_merged_and_a_disk_that_fills_up_meanwhile_costs_the_merge_only()
{
    const MIB: u64 = 1 << 20;
    let place = tempfile::tempdir_in(target_dir()).expect("folder");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    fs::set_permissions(place.path(), mode).expect("mode");
    let data = Mount::tmpfs(&place.path().join("data"), 1500 * MIB);
    let store = place.path().join("store");
    copy_tree(golden_store(), &store);
    let data_dir = data.folder().join("worker");
    let worker = Worker::at(&data_dir, &store.display().to_string());
    worker.boot("a");
    guest::fill(&worker, "a");
    layered(&worker, "a", &["one", "two"]);
    remove(&worker, &["one"]);
    let seen = guest::look(&worker, "a");
    let files = worker.files();
    let filler = data.fill(MIB);
    let error = worker.fails(&["compact", "a"], 7);
    assert!(
        error["found"]
            .as_str()
            .is_some_and(|found| found.contains("bytes")),
        "{error}"
    );
    fs::remove_file(filler).expect("remove");
    assert_eq!(worker.files(), files);
    let compact = worker.stopped_at(&["--json", "compact", "a"], "compact:merge");
    let filler = data.fill(0);
    compact.send("CONT");
    let ended = compact.output();
    assert_eq!(ended.status.code(), Some(7), "{:?}", error_of(&ended));
    fs::remove_file(filler).expect("remove");
    worker.ok(&["ls"]);
    assert_eq!(worker.files(), files, "nothing is left behind");
    let seen = goes_on(&worker, "a", &seen, "full");
    worker.ok(&["compact", "a"]);
    assert_eq!(layers(&worker, "a"), 3);
    goes_on(&worker, "a", &seen, "merged");
}
