//! `stead merge` as people and programs see it: tables, JSON, exit statuses and errors with a next step.

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

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(bytes)))
}

fn chain() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temp dir");
    let at = dir.path().display();
    sh(&format!(
        "cd {at} && qemu-img create -q -f qcow2 base 8M && qemu-img bitmap --add base old \
         && qemu-img create -q -f qcow2 -b base -F qcow2 top && qemu-img bitmap --add top good \
         && qemu-io -f qcow2 -c 'write -P 7 1M 1M' top && qemu-img create -q -f qcow2 -b top -F qcow2 active"
    ));
    dir
}

#[test]
fn a_plan_is_a_table_or_one_json_document_and_the_run_does_what_it_says() {
    let dir = chain();
    let output = stead(dir.path(), "merge plan active --top top --base base");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for part in [
        "LAYER",
        "child",
        "old",
        "stale",
        "pruned",
        "good",
        "carried",
        "room:",
        "other children:",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let output = stead(dir.path(), "merge plan --json active --top 1 --base 2");
    let plan = json(&output.stdout);
    assert_eq!(plan["layers"][0]["role"], "child");
    assert_eq!(plan["bitmaps"][0]["becomes"], "pruned");
    assert_eq!(plan["refused"], serde_json::json!([]));
    assert!(
        plan["space"][0]["needed-bytes"]
            .as_u64()
            .is_some_and(|bytes| bytes > 1 << 20)
    );
    let output = stead(dir.path(), "merge run --json active --top top --base base");
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report = json(&output.stdout);
    for part in ["layers", "bitmaps", "refused", "data-bytes"] {
        assert_eq!(report["plan"][part], plan[part], "{part}");
    }
    assert!(!dir.path().join("top").exists());
    let errors = String::from_utf8_lossy(&output.stderr);
    let steps = errors.lines().map(|line| json(line.as_bytes()));
    let steps: Vec<_> = steps
        .filter(|event| event["event"] == "step")
        .map(|event| event["step"].clone())
        .collect();
    assert_eq!(steps[..4], ["plan", "record", "commit", "prove"]);
    sh(&format!(
        "cd {} && qemu-io -f qcow2 -c 'read -P 7 1M 1M' active | grep -vq failed && qemu-img check -q base",
        dir.path().display()
    ));
}

#[test]
fn a_refusal_has_its_exit_status_says_that_nothing_was_changed_and_what_to_do() {
    let dir = chain();
    let at = dir.path().display();
    sh(&format!(
        "cd {at} && qemu-img create -q -f qcow2 -b base -F qcow2 other"
    ));
    let output = stead(dir.path(), "merge run --json active --top top --base base");
    assert_eq!(output.status.code(), Some(4));
    let errors = String::from_utf8_lossy(&output.stderr);
    let error = json(errors.lines().last().unwrap_or_default().as_bytes());
    assert_eq!(
        (&error["kind"], &error["left"]),
        (&"conflict".into(), &"nothing was changed".into())
    );
    assert!(
        error["next"]
            .as_str()
            .is_some_and(|next| next.contains("rebase or remove")),
        "{error}"
    );
    let plan = stead(dir.path(), "merge plan --json active --top top --base base");
    assert_eq!(plan.status.code(), Some(4));
    assert_eq!(
        json(&plan.stdout)["refused"].as_array().map(Vec::len),
        Some(1)
    );
    for (line, status) in [
        ("merge plan active --top base --base top", 2),
        ("merge plan nowhere", 3),
        ("merge run active --stale maybe", 2),
    ] {
        assert_eq!(
            stead(dir.path(), line).status.code(),
            Some(status),
            "{line}"
        );
    }
    sh(&format!("cd {at} && rm other"));
    let output = stead(dir.path(), "merge recover base");
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("no merge is going on"));
}

#[test]
fn every_command_has_help_with_an_example() {
    let dir = tempfile::tempdir().expect("temp dir");
    for command in ["merge", "merge plan", "merge run", "merge recover"] {
        let output = stead(dir.path(), &format!("{command} --help"));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("Example:\n  stead merge"),
            "{text}"
        );
    }
}
