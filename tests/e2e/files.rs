//! Files of guests: copied in and out, looked at, written, removed; the guest's own programs are the oracle.
#![allow(
    clippy::disallowed_methods,
    reason = "tests write scratch files that nobody keeps"
)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use stead_tests::{Worker, finish, golden_store, until};

const MIB: usize = 1 << 20;

fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// One guest serves all: it takes longest to boot.
#[test]
fn files_go_into_a_guest_and_out_of_it_whole_and_a_killed_copy_goes_on() {
    let worker = Worker::on(golden_store());
    worker.boot("web");
    let folder = tempfile::tempdir().expect("temp dir");
    a_tree_is_what_the_guest_sees(&worker, folder.path());
    single_files_are_written_printed_and_removed(&worker);
    a_killed_copy_goes_on(&worker, folder.path());
    how_fast(&worker, folder.path());
}

fn a_tree_is_what_the_guest_sees(worker: &Worker, folder: &Path) {
    let source = folder.join("source");
    fs::create_dir_all(source.join("deep/er")).expect("folders");
    fs::write(source.join("deep/er/f"), noise(1, 3 * MIB + 5)).expect("write");
    fs::write(source.join("run"), b"#!/bin/sh\necho ran\n").expect("write");
    fs::set_permissions(source.join("run"), fs::Permissions::from_mode(0o755)).expect("mode");
    symlink("deep/er/f", source.join("link")).expect("link");
    let sparse = fs::File::create(source.join("sparse")).expect("create");
    sparse.set_len(256 << 20).expect("grow");
    worker.ok(&["cp", text(&source), "web:/root/there"]);
    assert_eq!(worker.shell("web", "/root/there/run").trim(), "ran");
    assert_eq!(
        worker.shell("web", "readlink /root/there/link").trim(),
        "deep/er/f"
    );
    let blocks = worker.shell("web", "stat -c '%s %b' /root/there/sparse");
    assert_eq!(blocks.trim(), format!("{} 0", 256 << 20));
    let sum = worker.shell(
        "web",
        "sync; echo 3 > /proc/sys/vm/drop_caches; md5sum < /root/there/deep/er/f",
    );
    let own = std::process::Command::new("md5sum")
        .arg(source.join("deep/er/f"))
        .output();
    let own = String::from_utf8(own.expect("md5sum").stdout).expect("text");
    assert_eq!(sum.split_whitespace().next(), own.split_whitespace().next());
    let back = folder.join("back");
    let report = worker.json(&["cp", "web:/root/there", text(&back)]);
    assert_eq!(
        (report["files"].as_u64(), report["links"].as_u64()),
        (Some(3), Some(1))
    );
    let same = std::process::Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([&source, &back])
        .output()
        .expect("diff");
    assert!(same.status.success(), "{same:?}");
}

fn single_files_are_written_printed_and_removed(worker: &Worker) {
    worker.ok(&[
        "file",
        "mkdir",
        "--parents",
        "--mode",
        "750",
        "web:/srv/a/b",
    ]);
    let put = worker.spawn(&[
        "file",
        "put",
        "--mode",
        "600",
        "web:/srv/a/b/it's a \"file\" $x",
    ]);
    assert!(finish(put, b"hello\n").status.success());
    let seen = worker.shell("web", "cat /srv/a/b/*; stat -c %a /srv/a/b /srv/a/b/*");
    assert_eq!(seen.trim(), "hello\n750\n600");
    assert_eq!(
        worker
            .ok(&["file", "cat", "web:/srv/a/b/it's a \"file\" $x"])
            .trim(),
        "hello"
    );
    let release = worker.ok(&["file", "cat", "web:/proc/sys/kernel/osrelease"]);
    assert_eq!(release.trim(), worker.shell("web", "uname -r").trim());
    let list = worker.json(&["file", "ls", "web:/srv/a/b"]);
    assert_eq!(list[0]["length_bytes"].as_u64(), Some(6));
    let stat = worker.json(&["file", "stat", "web:/srv/a"]);
    assert_eq!(stat["mode"].as_str(), Some("0750"));
    worker.fails(&["file", "rm", "web:/srv/a"], 4);
    worker.ok(&["file", "rm", "--recursive", "web:/srv/a"]);
    worker.fails(&["file", "stat", "web:/srv/a"], 3);
    assert_eq!(worker.shell("web", "ls -A /srv").trim(), "");
}

fn a_killed_copy_goes_on(worker: &Worker, folder: &Path) {
    let source = folder.join("large");
    fs::write(&source, noise(2, 96 * MIB)).expect("write");
    let copy = ["cp", text(&source), "web:/root/large"];
    let child = worker.spawn(&copy);
    let partial = "cat /root/.stead-partial-* 2>/dev/null | head -c 16777216 | wc -c";
    until(Duration::from_secs(120), || {
        worker.shell("web", partial).trim() == "16777216"
    });
    child.send("KILL");
    drop(child.output());
    worker.fails(&["file", "stat", "web:/root/large"], 3);
    let mut report = serde_json::Value::Null;
    until(Duration::from_secs(60), || {
        // The agent may not have seen the end of the first one yet.
        let output = worker.run(&[&copy[..], &["--json"]].concat());
        report = serde_json::from_slice(&output.stdout).unwrap_or_default();
        output.status.success()
    });
    assert!(
        report["resumed_bytes"].as_u64() >= Some(15 << 20),
        "{report}"
    );
    worker.ok(&["cp", "web:/root/large", text(&folder.join("large-back"))]);
    assert!(fs::read(folder.join("large-back")).expect("read") == noise(2, 96 * MIB));
    assert_eq!(
        worker
            .shell("web", "ls -A /root | grep -c partial || true")
            .trim(),
        "0"
    );
}

/// Printed: it is the machine's.
fn how_fast(worker: &Worker, folder: &Path) {
    for (way, args) in [
        (
            "in",
            [
                text(&folder.join("large")).to_owned(),
                "web:/root/again".to_owned(),
            ],
        ),
        (
            "out",
            [
                "web:/root/again".to_owned(),
                text(&folder.join("again")).to_owned(),
            ],
        ),
    ] {
        let begin = Instant::now();
        worker.ok(&["cp", &args[0], &args[1]]);
        println!("{way}: {:.0} MiB/s", 96.0 / begin.elapsed().as_secs_f64());
    }
}
