//! A running guest is backed up while it writes: what is restored is the disk of that instant, and its file system is whole.
#![allow(
    clippy::disallowed_methods,
    reason = "tests move and remove files as they lie there"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use stead_tests::guest;
use stead_tests::{TEMPLATE, Worker, until};

/// Files that change all the time until the guest stops.
const WRITER: &str = r#"
setsid sh -c 'n=0; while :; do n=$((n + 1)); head -c 300000 /dev/urandom > /root/busy.$((n % 7)); sync; done' > /dev/null 2>&1 < /dev/null &
"#;

/// Writes the same number to two disks, one after the other, and then the next one, past all caches.
const PAIR: &str = r#"
setsid sh -c 'n=0; while [ ! -e /run/enough ]; do n=$((n + 1)); for d in vdb vdc; do printf "%015d\n" $n | dd of=/dev/$d bs=512 count=1 conv=sync,notrunc oflag=direct 2>/dev/null; done; done' > /dev/null 2>&1 < /dev/null &
"#;

struct Backups {
    worker: Worker,
    folder: PathBuf,
}

impl Backups {
    /// Backs up the sandbox's first disk.
    fn make(&self, line: &[&str], bitmap: &str) -> Value {
        self.make_all(line, bitmap, "web:vda").remove(0)
    }

    fn make_all(&self, line: &[&str], bitmap: &str, disks: &str) -> Vec<Value> {
        let place = self.place(bitmap);
        let mut args = vec!["backup"];
        args.extend(line);
        args.extend([disks, "--bitmap", bitmap, "--to", &place, "--quiet"]);
        let made = self.worker.json(&args);
        made.as_array().expect("a list").clone()
    }

    /// The folder of a bitmap's backups, or the worker's store.
    fn place(&self, bitmap: &str) -> String {
        match bitmap {
            "stored" => self.worker.store.clone(),
            _ => self.folder.join(bitmap).display().to_string(),
        }
    }

    /// The numbers on the second and the third disk are the same, or the second was just written: all were taken at one
    /// instant. The first of the two numbers.
    fn pair(&self, bitmap: &str, reports: &[Value]) -> u64 {
        let number = |report: &Value| {
            let restored = self.restored(bitmap, &report["record"]["id"]);
            let bytes = std::fs::read(restored).expect("read");
            let text = String::from_utf8_lossy(&bytes[..15]).into_owned();
            text.parse::<u64>().expect("a number")
        };
        let (second, third) = (number(&reports[1]), number(&reports[2]));
        assert!(second == third || second == third + 1, "{second}, {third}");
        second
    }

    /// The layer that has a bitmap.
    fn layer_with(&self, bitmap: &Value) -> PathBuf {
        let bitmap = bitmap.as_str().expect("a name");
        let layers = std::fs::read_dir(self.worker.data.join("layers")).expect("layers");
        let mut paths = layers.map(|entry| entry.expect("listed").path());
        let has_it = |path: &PathBuf| {
            let info = Command::new("qemu-img").arg("info").arg(path).output();
            String::from_utf8_lossy(&info.expect("qemu-img runs").stdout).contains(bitmap)
        };
        paths.find(has_it).expect("a layer has it")
    }

    fn restored(&self, bitmap: &str, id: &Value) -> PathBuf {
        let to = self.folder.join("restored.raw");
        let folder = self.place(bitmap);
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
    let two = ["--disk", "2M", "--disk", "2M"];
    worker.ok(&[&["create", TEMPLATE, "--name", "web"], &two[..]].concat());
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

    // All disks at one instant, into the folder and into the store, whatever is written to them.
    worker.shell("web", PAIR);
    let mut seen = 0;
    for (bitmap, kind) in [
        ("all", "full"),
        ("all", "incremental"),
        ("stored", "full"),
        ("stored", "incremental"),
    ] {
        guest::add_file(worker, "web", &format!("{bitmap}-{kind}"), 100_000);
        let reports = backups.make_all(&[kind], bitmap, "web");
        let kinds: Vec<&str> = reports.iter().map(self::kind).collect();
        assert_eq!(kinds, [kind; 3]);
        let number = backups.pair(bitmap, &reports);
        assert!(number > seen, "the guest went on: {seen}, {number}");
        seen = number;
        backups.require(bitmap, &reports[0]);
    }

    worker.shell("web", "touch /run/enough");

    // A command that dies in the middle costs its backup only.
    let to = backups.folder.join("daily").display().to_string();
    let line = [
        "backup",
        "incremental",
        "web:vda",
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
    // One disk's bitmap that cannot be relied on costs a full backup of that disk.
    let reports = backups.make_all(&["full"], "broken", "web");
    let broken = reports[1]["next-bitmap"].as_str().expect("a name");
    let layer = backups.layer_with(&reports[1]["next-bitmap"]);
    let disabled = Command::new("qemu-img")
        .args(["bitmap", "--disable"])
        .arg(&layer)
        .arg(broken)
        .status();
    assert!(disabled.expect("qemu-img runs").success());
    let reports = backups.make_all(&["incremental"], "broken", "web");
    let kinds: Vec<&str> = reports.iter().map(kind).collect();
    assert_eq!(kinds, ["incremental", "full", "incremental"]);
    let why = reports[1]["record"]["why-full"].as_str().expect("a reason");
    assert!(why.contains("it is disabled"), "{why}");
    backups.pair("broken", &reports);
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
