//! Ctrl-C: every command that may last ends soon with 130, says what stands, and leaves the VM as it is.
#![allow(
    clippy::disallowed_methods,
    reason = "tests write scratch files that nobody keeps"
)]

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::time::{Duration, Instant};

use serde_json::Value;
use stead_tests::{Stead, TEMPLATE, Worker, golden_store, interrupt, signal, until};

/// How long a command may go on after Ctrl-C.
const SOON: Duration = Duration::from_secs(20);

/// Interrupts a command that was started with `--json`, once one of its lines contains `at`; gives its error.
fn interrupted(mut command: Stead, at: Option<&str>) -> Value {
    let mut lines = BufReader::new(command.stderr.take().expect("piped")).lines();
    let mut said = Vec::new();
    if let Some(at) = at {
        loop {
            let line = lines
                .next()
                .unwrap_or_else(|| panic!("no {at} in {said:?}"));
            said.push(line.expect("read"));
            if said.iter().any(|line| line.contains(at)) {
                break;
            }
        }
    }
    interrupt(&command);
    let begun = Instant::now();
    said.extend(lines.map(|line| line.expect("read")));
    let status = command.wait().expect("wait");
    assert!(begun.elapsed() < SOON, "{:?}: {said:?}", begun.elapsed());
    assert_eq!(status.code(), Some(130), "{said:?}");
    let events: Vec<Value> = said
        .iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect();
    let error = events.into_iter().find(|event| event["event"] == "error");
    let error = error.unwrap_or_else(|| panic!("no error in {said:?}"));
    assert_eq!(error["kind"], "cancelled", "{error}");
    assert_eq!(error["exit_code"], 130, "{error}");
    error
}

#[test]
fn ctrl_c_ends_following_a_console_and_waiting_for_a_guest_and_the_vm_runs_on() {
    let worker = Worker::on(golden_store());
    for name in ["web", "other"] {
        worker.ok(&[
            "create",
            TEMPLATE,
            "--name",
            name,
            "--no-agent",
            "--memory",
            "128M",
        ]);
    }
    let pid = worker.pid("web");
    let stop = worker.spawn(&["--json", "stop", "web"]);
    let error = interrupted(stop, Some("wait for the guest"));
    let left = error["left"].as_str().unwrap_or_default();
    assert!(left.contains("runs on"), "{error}");
    assert_eq!(worker.pid("web"), pid);

    interrupted(worker.spawn(&["--json", "logs", "--follow", "web"]), None);
    assert_eq!(worker.pid("web"), pid);

    a_console_is_read_as_what_it_is(&worker);
    let removed = worker.json(&["rm", "--force", "web", "other"]);
    assert_eq!(
        removed,
        serde_json::json!([{ "removed": "web" }, { "removed": "other" }])
    );
}

/// Of a sandbox that runs: as JSON lines, and never through a link that the VM's user has put there.
fn a_console_is_read_as_what_it_is(worker: &Worker) {
    let folder = std::fs::read_link(format!("/proc/{}/cwd", worker.pid("web"))).expect("it runs");
    let console = folder.join("serial.log");
    let mut written = OpenOptions::new()
        .append(true)
        .open(&console)
        .expect("open");
    written.write_all(b"\n\xffone\r\ntwo").expect("write");
    let lines = worker.ok(&["--json", "logs", "web"]);
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    for line in ["\u{fffd}one", "two"] {
        let value = serde_json::json!({ "line": line });
        assert!(lines.contains(&value), "{line} is not in {lines:?}");
    }
    worker.ok(&["stop", "--force", "web"]);
    let secret = worker.data.join("secret");
    std::fs::write(&secret, "of root").expect("write");
    std::fs::remove_file(&console).expect("remove");
    std::os::unix::fs::symlink(&secret, &console).expect("link");
    let refused = worker.run(&["logs", "web"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.stdout.is_empty(), "it was read through a link");
}

#[test]
fn ctrl_c_before_a_command_runs_ends_exec_with_130_and_what_is_proven_is_told() {
    let worker = Worker::with_own_store();
    worker.boot("web");
    let pid = worker.pid("web");
    signal(pid, "STOP");
    let exec = worker.spawn(&["--json", "exec", "-n", "web", "--", "touch", "/root/ran"]);
    let error = interrupted(exec, None);
    signal(pid, "CONT");
    let left = error["left"].as_str().unwrap_or_default();
    assert!(left.contains("was not started"), "{error}");
    assert_eq!(
        worker.shell("web", "ls /root/ran 2>/dev/null; echo whole"),
        "whole"
    );

    let made = worker.ok(&["checkpoint", "create", "web", "--name", "base"]);
    assert!(made.contains("  full  "), "the kind is named: {made}");
    let fork = worker.run(&["--json", "fork", "base", "--name", "try"]);
    let told = String::from_utf8_lossy(&fork.stderr).into_owned();
    let verify = |line: &str| {
        serde_json::from_str::<Value>(line)
            .is_ok_and(|event| event["event"] == "progress" && event["what"] == "verify")
    };
    assert!(told.lines().any(verify), "proving is not told: {told}");

    worker.ok(&["hibernate", "try"]);
    let error = worker.fails(&["logs", "try"], 4);
    let found = error["found"].as_str().unwrap_or_default();
    assert!(found.contains("hibernated"), "{error}");
    let next = error["next"].as_str().unwrap_or_default();
    assert!(next.contains("stead wake try"), "{error}");
}

#[test]
fn a_guest_without_an_agent_that_does_not_start_leaves_its_last_words_in_the_error() {
    let worker = Worker::with_own_store();
    let small = ["--no-agent", "--memory", "128M"];
    worker.ok(&[&["create", TEMPLATE, "--name", "first"], small.as_slice()].concat());
    worker.ok(&["rm", "--force", "first"]);
    let template = worker.json(&["template", "show", TEMPLATE]);
    let blob = |field: &str| {
        let name = template[field].as_str().expect("a hash");
        worker.data.join("blobs").join(name).display().to_string()
    };
    let disk = worker.data.join("disk.raw");
    let file = std::fs::File::create(&disk).expect("disk");
    file.set_len(1 << 20).expect("size");
    worker.ok(&[
        "template",
        "import",
        "bare",
        "--disk",
        &disk.display().to_string(),
        "--kernel",
        &blob("kernel"),
        "--initrd",
        &blob("initrd"),
        "--cmdline",
        "console=ttyS0 root=/dev/vda",
    ]);
    let error = worker.fails(&["create", "bare", "--name", "web"], 10);
    let console = error["console"].as_array().expect("the console's lines");
    assert!(!console.is_empty() && console.len() < 20, "{error}");
    let clean = |line: &Value| {
        line.as_str()
            .is_some_and(|line| !line.contains(char::is_control))
    };
    assert!(console.iter().all(clean), "{error}");
    let next = error["next"].as_str().unwrap_or_default();
    assert!(
        next.contains("--no-agent") && next.contains("stead logs"),
        "{error}"
    );
    assert_eq!(worker.json(&["ls"]), Value::Array(Vec::new()));
    // What the error says to do.
    worker.ok(&["create", "bare", "--name", "web", "--no-agent"]);
    until(Duration::from_secs(60), || {
        !worker.ok(&["logs", "web"]).is_empty()
    });
}
