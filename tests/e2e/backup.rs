//! A running guest is backed up while it writes: what is restored is the disk of that instant, and its file system is whole.
#![allow(
    clippy::disallowed_methods,
    reason = "tests move and remove files as they lie there"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use stead_tests::guest;
use stead_tests::{Worker, until};

/// Files that change all the time until the guest stops.
const WRITER: &str = r#"
setsid sh -c 'n=0; while :; do n=$((n + 1)); head -c 300000 /dev/urandom > /root/busy.$((n % 7)); sync; done' > /dev/null 2>&1 < /dev/null &
"#;

struct Backups {
    worker: Worker,
    folder: PathBuf,
}

impl Backups {
    fn make(&self, line: &[&str], bitmap: &str) -> Value {
        let folder = self.folder.join(bitmap).display().to_string();
        let mut args = vec!["backup"];
        args.extend(line);
        args.extend(["web", "--bitmap", bitmap, "--to", &folder, "--quiet"]);
        self.worker.json(&args)[0].clone()
    }

    fn restored(&self, bitmap: &str, id: &Value) -> PathBuf {
        let to = self.folder.join("restored.raw");
        let folder = self.folder.join(bitmap).display().to_string();
        let (id, path) = (id.as_str().expect("an id"), to.display().to_string());
        let restore = [
            "backup", "restore", &folder, id, &path, "--format", "raw", "--force", "--quiet",
        ];
        self.worker.ok(&restore);
        to
    }

    /// What the backup restores to is what QEMU reads in the layers that it was made of, and a whole file system.
    fn require(&self, bitmap: &str, report: &Value) {
        let restored = self.restored(bitmap, &report["record"]["id"]);
        let layer = report["read"][0].as_str().expect("a layer");
        same(&restored, Path::new(layer));
        let checked = Command::new("e2fsck").arg("-fn").arg(&restored).output();
        let checked = checked.expect("e2fsck runs");
        let text = String::from_utf8_lossy(&checked.stdout);
        assert!(checked.status.success(), "{text}");
    }
}

fn same(raw: &Path, layer: &Path) {
    let compared = Command::new("qemu-img")
        .args(["compare", "-U", "-f", "raw", "-F", "qcow2"])
        .args([raw, layer])
        .output()
        .expect("qemu-img runs");
    let text = String::from_utf8_lossy(&compared.stdout);
    assert!(compared.status.success(), "{}: {text}", layer.display());
}

fn kind(report: &Value) -> &str {
    report["record"]["kind"].as_str().expect("a kind")
}

#[test]
fn a_running_guest_is_backed_up_while_it_writes_and_each_backup_restores_to_its_instant() {
    let worker = Worker::with_own_store();
    worker.boot("web");
    let folder = tempfile::tempdir().expect("folder");
    let backups = Backups {
        folder: folder.path().to_owned(),
        worker,
    };
    let worker = &backups.worker;
    guest::fill(worker, "web");
    worker.shell("web", WRITER);

    let full = backups.make(&["full"], "daily");
    assert_eq!(kind(&full), "full");
    let mut made = vec![full];
    for round in 0..3 {
        guest::add_file(worker, "web", &format!("more-{round}"), 500_000);
        let report = backups.make(&["incremental", "--no-fallback"], "daily");
        assert_eq!(report["record"]["parent"], made[round]["record"]["id"]);
        let number = |name: &str| report["record"][name].as_u64().expect("a number");
        assert!(
            number("changed-bytes") * 4 < number("disk-bytes"),
            "{report}"
        );
        made.push(report);
    }
    // Afterwards: what the guest wrote since has not reached into any.
    for report in [&made[1], &made[3]] {
        backups.require("daily", report);
    }
    guest::look(worker, "web");

    // A command that dies in the middle costs its backup only.
    let to = backups.folder.join("daily").display().to_string();
    let line = [
        "backup",
        "incremental",
        "web",
        "--bitmap",
        "daily",
        "--to",
        &to,
    ];
    for at in ["backup:capture", "backup:read-back"] {
        worker.crash(&line, at);
    }
    guest::add_file(worker, "web", "kept", 500_000);

    // The bitmaps live on when the guest is shut down; a disk that stands still is backed up, too.
    worker.ok(&["stop", "web"]);
    let report = backups.make(&["incremental", "--no-fallback"], "daily");
    assert_eq!(kind(&report), "incremental");
    backups.require("daily", &report);
    worker.ok(&["start", "web"]);
    guest::add_file(worker, "web", "after", 500_000);
    backups.make(&["incremental", "--no-fallback"], "daily");

    // A QEMU that is killed does not save them. What was not saved is not relied on: an older one is, where there is one.
    let alone = backups.make(&["full", "--no-compress"], "alone");
    let pid = worker.pid("web");
    guest::add_file(worker, "web", "late", 500_000);
    stead_tests::kill(pid);
    until(std::time::Duration::from_secs(30), || {
        worker.state("web") == "crashed"
    });
    worker.ok(&["start", "web"]);
    let last = backups.make(&["incremental", "--no-compress"], "alone");
    assert_eq!(kind(&last), "full", "{last}");
    let why = last["record"]["why-full"].as_str().expect("a reason");
    assert!(why.contains("was not saved"), "{why}");
    assert_ne!(last["record"]["id"], alone["record"]["id"]);
    backups.require("alone", &last);
    let report = backups.make(&["incremental", "--no-fallback"], "daily");
    backups.require("daily", &report);
    guest::look_at_disk(worker, "web");
    let verdicts = worker.json(&[
        "backup",
        "verify",
        &backups.folder.join("daily").display().to_string(),
    ]);
    let whole = |one: &Value| one["whole"] == true;
    assert!(verdicts.as_array().expect("a list").iter().all(whole));
}
