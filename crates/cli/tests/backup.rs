//! `stead backup` as people and programs see it: tables, JSON, exit statuses and errors with a next step.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn sh(line: &str) {
    let output = Command::new("sh").args(["-c", line]).output().expect("sh");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}\n{text}");
}

fn stead(folder: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stead"));
    command.args(line.split(' ')).current_dir(folder);
    command.env("STEAD_DATA_DIR", folder.join("data"));
    command.output().expect("stead runs")
}

fn json(folder: &Path, line: &str, code: i32) -> Value {
    let output = stead(folder, line);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{line}: {err}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{line}: {error}"))
}

fn error(folder: &Path, line: &str, code: i32) -> Value {
    let output = stead(folder, line);
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{line}: {err}");
    let last = err.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{line}: {error}: {err}"))
}

fn disk() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temp dir");
    let at = dir.path().display();
    sh(&format!(
        "cd {at} && qemu-img create -q -f qcow2 disk 8M && qemu-io -f qcow2 -c 'write -P 7 1M 1M' disk"
    ));
    dir
}

#[test]
fn a_backup_an_increment_and_a_restore_are_told_as_json_and_to_people() {
    let dir = disk();
    let at = dir.path();
    let full = json(at, "backup full disk --bitmap daily --to b --json -q", 0);
    assert_eq!(full["record"]["kind"], "full");
    sh(&format!(
        "cd {} && qemu-io -f qcow2 -c 'write -P 8 3M 64k' disk",
        at.display()
    ));
    let line = "backup incremental disk --bitmap daily --to b --no-fallback";
    let output = stead(at, line);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.starts_with("incremental "), "{text}");
    let all = json(at, "backup ls b --json", 0);
    assert_eq!(all[1]["record"]["parent"], full["record"]["id"]);
    assert_eq!(all[1]["state"], "complete");
    let table = stead(at, "backup ls b");
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(
        table.contains("incremental") && table.contains("PARENT"),
        "{table}"
    );
    let report = json(
        at,
        "backup restore b latest new.raw --format raw --json -q",
        0,
    );
    assert_eq!(report["made-of"].as_array().map(Vec::len), Some(2));
    sh(&format!(
        "cd {} && qemu-img compare -q -f qcow2 -F raw disk new.raw",
        at.display()
    ));
    let verdicts = json(at, "backup verify b --json -q", 0);
    assert_eq!(verdicts[0]["whole"], true);
    let removed = json(at, "backup rm b latest --json -q", 0);
    assert_eq!(removed, all[1]["id"]);
    let left = json(at, "backup ls b --json", 0);
    assert_eq!(left.as_array().map(Vec::len), Some(1));
}

#[test]
fn what_cannot_be_is_refused_with_its_status_and_a_next_step() {
    let dir = disk();
    let at = dir.path();
    let refused = error(
        at,
        "backup incremental disk --bitmap daily --to b --no-fallback --json -q",
        4,
    );
    assert_eq!(refused["kind"], "conflict");
    assert!(
        refused["next"]
            .as_str()
            .is_some_and(|next| next.contains("stead backup full"))
    );
    let made = json(
        at,
        "backup incremental disk --bitmap daily --to b --no-compress --json -q",
        0,
    );
    assert!(made["record"]["why-full"].is_string());
    let store = error(
        at,
        "backup full disk --bitmap daily --to file:///nowhere/store --json -q",
        8,
    );
    assert!(
        store["next"]
            .as_str()
            .is_some_and(|next| next.contains("stead store init"))
    );
    assert_eq!(
        error(at, "backup restore b ffff new --json -q", 3)["kind"],
        "not-found"
    );
    assert_eq!(
        error(at, "backup restore b latest disk --json -q", 4)["kind"],
        "conflict"
    );
    let id = made["record"]["id"].as_str().expect("an id");
    sh(&format!(
        "cd {}/b && printf x | dd of={id}.qcow2 bs=1 seek=600000 conv=notrunc status=none",
        at.display()
    ));
    let output = stead(at, "backup verify b");
    assert_eq!(output.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&output.stdout).contains("damaged"));
    error(at, "backup restore b latest new --json -q", 5);
    assert!(!at.join("new").exists());
}
