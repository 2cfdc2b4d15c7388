//! Commands in guests: streams, statuses, signals, many at once, across captures, and agents that do not answer.
#![allow(
    clippy::disallowed_methods,
    reason = "tests write scratch files that nobody keeps"
)]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use stead_tests::{Stead, Worker, finish, golden_store, until};

const MIB: usize = 1 << 20;

/// For what must come to its end, however slow the machine is.
const LONG: Duration = Duration::from_secs(300);

/// Bytes that no stream can be confused with another by: every value, no repetition.
fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a command in a guest with `input`.
fn run_with(worker: &Worker, args: &[&str], input: &[u8]) -> Output {
    let mut all = vec!["exec"];
    all.extend(args);
    let mut child = worker.spawn(&all);
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_vec();
    let feeder = thread::spawn(move || {
        // A command that does not read its input is no failure.
        let fed = stdin.write_all(&input);
        drop(stdin);
        fed.is_ok()
    });
    let output = child.output();
    feeder.join().expect("feeder");
    output
}

fn status_of(worker: &Worker, args: &[&str]) -> Option<i32> {
    let mut all = vec!["exec", "-n"];
    all.extend(args);
    worker.run(&all).status.code()
}

/// Waits for the child's first line, so that what follows finds it running.
fn first_line(child: &mut Child) -> String {
    let stdout = child.stdout.as_mut().expect("piped");
    let mut line = Vec::new();
    let mut byte = [0];
    while stdout.read(&mut byte).expect("read") == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    text(&line)
}

#[test]
fn a_command_behaves_as_if_it_ran_here() {
    let worker = Worker::on(golden_store());
    worker.boot("web");
    statuses_are_passed_on(&worker);
    streams_are_passed_on_byte_for_byte(&worker);
    arguments_environment_folder_and_user_are_passed_on(&worker);
    lines_are_answered_one_by_one(&worker);
    signals_are_passed_on(&worker);
    ten_commands_run_at_once(&worker);
}

fn statuses_are_passed_on(worker: &Worker) {
    for code in [0, 1, 3, 123, 124, 125, 126, 127, 128, 255] {
        let script = format!("exit {code}");
        assert_eq!(
            status_of(worker, &["web", "--", "sh", "-c", &script]),
            Some(code)
        );
    }
    for (signal, status) in [("KILL", 137), ("TERM", 143), ("SEGV", 139)] {
        let script = format!("kill -{signal} $$");
        assert_eq!(
            status_of(worker, &["web", "--", "sh", "-c", &script]),
            Some(status)
        );
    }
    for (args, status) in [
        (vec!["web", "--", "no-such-program"], 127),
        (vec!["web", "--", "/no/such/program"], 127),
        (vec!["web", "--", "/etc/passwd"], 126),
        (vec!["web", "--", "/etc"], 126),
        (vec!["web", "-C", "/no/such/folder", "--", "true"], 126),
        (vec!["web", "-u", "no-such-user", "--", "true"], 126),
        (vec!["web", "-e", "NOVALUE", "--", "true"], 125),
        (vec!["web", "--timeout=-1", "--", "true"], 125),
        (vec!["web", "--timeout", "nan", "--", "true"], 125),
        (vec!["no-such-sandbox", "--", "true"], 125),
    ] {
        let mut all = vec!["exec", "-n"];
        all.extend(&args);
        let error = worker.fails(&all, status);
        assert_eq!(error["exit_code"], status, "{args:?}: {error}");
        assert!(
            error["found"]
                .as_str()
                .is_some_and(|found| !found.is_empty()),
            "{error}"
        );
    }
    let script = "sleep 1001 & sleep 1001";
    assert_eq!(
        status_of(worker, &["--timeout", "3", "web", "--", "sh", "-c", script]),
        Some(124)
    );
    // What is killed with the command may be seen for a moment.
    until(LONG, || {
        status_of(worker, &["web", "--", "pgrep", "-f", "sleep 1001"]) == Some(1)
    });
}

fn streams_are_passed_on_byte_for_byte(worker: &Worker) {
    let input = noise(1, 5 * MIB);
    let echoed = run_with(worker, &["web", "--", "tee", "/dev/stderr"], &input);
    assert!(
        echoed.status.success(),
        "{}",
        text(&echoed.stderr[..200.min(echoed.stderr.len())])
    );
    assert!(echoed.stdout == input, "standard output differs");
    assert!(echoed.stderr == input, "standard error differs");

    let both = run_with(
        worker,
        &["web", "--", "python3", "-c", TWO_STREAMS],
        &noise(2, 2 * MIB),
    );
    assert!(both.status.success());
    let sums = [noise(2, 2 * MIB), both.stderr.clone()].map(|bytes| blake3::hash(&bytes));
    assert_eq!(
        blake3::hash(&both.stdout),
        sums[0],
        "input came back on standard output"
    );
    assert_eq!(both.stderr.len(), 3_000_000);
    assert!(
        both.stderr
            .iter()
            .enumerate()
            .all(|(at, byte)| usize::from(*byte) == at % 251)
    );

    // Nothing is passed on with -n, and an input that nobody reads hinders nobody.
    let closed = run_with(worker, &["-n", "web", "--", "cat"], &noise(3, 1000));
    assert!(closed.status.success() && closed.stdout.is_empty());
    let unread = run_with(worker, &["web", "--", "true"], &noise(4, 8 * MIB));
    assert!(unread.status.success(), "{}", text(&unread.stderr));
    // An output that nobody reads any more ends the command, as it would here.
    let mut endless = worker.spawn(&[
        "exec",
        "-n",
        "web",
        "--",
        "sh",
        "-c",
        "exec yes endless-output",
    ]);
    first_line(&mut endless);
    drop(endless.stdout.take());
    let ended = finish(endless, b"");
    assert!(!ended.status.success());
    until(LONG, || {
        status_of(worker, &["web", "--", "pgrep", "-f", "yes endless-output"]) == Some(1)
    });
    // The end of a command does not wait for what it left behind with its streams open.
    let begun = Instant::now();
    let left = run_with(
        worker,
        &["web", "--", "sh", "-c", "sleep 1002 & echo done"],
        b"",
    );
    assert_eq!(
        (text(&left.stdout).as_str(), left.status.code()),
        ("done\n", Some(0))
    );
    assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
}

const TWO_STREAMS: &str = "
import sys, threading
def copy():
    while True:
        data = sys.stdin.buffer.read(10007)
        if not data:
            break
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
thread = threading.Thread(target=copy)
thread.start()
sys.stderr.buffer.write(bytes(n % 251 for n in range(3_000_000)))
sys.stderr.buffer.flush()
thread.join()
";

fn arguments_environment_folder_and_user_are_passed_on(worker: &Worker) {
    let words = [
        "",
        " ",
        "a b",
        "*",
        "$HOME",
        "\"'",
        "-n",
        "--",
        "line\nbreak",
        "ü€",
        "\\",
    ];
    let mut args = vec!["exec", "-n", "web", "--", "printf", "%s\\001"];
    args.extend(words);
    let output = worker.command(&args).output().expect("run stead");
    assert_eq!(
        text(&output.stdout),
        words.map(|word| format!("{word}\u{1}")).concat()
    );

    let seen = worker.ok(&[
        "exec",
        "-n",
        "web",
        "-e",
        "ONE=1",
        "-e",
        "TWO=a=b c",
        "-e",
        "EMPTY=",
        "-e",
        "HOME=/other",
        "-C",
        "/usr/lib",
        "--",
        "sh",
        "-c",
        "pwd; echo \"$ONE|$TWO|${EMPTY-unset}|$HOME|$USER|${SECRET-unset}\"; id -u; umask",
    ]);
    assert_eq!(seen, "/usr/lib\n1|a=b c||/other|root|unset\n0\n0022");
    for user in ["nobody", "65534"] {
        let seen = worker.ok(&[
            "exec",
            "-n",
            "web",
            "-u",
            user,
            "--",
            "sh",
            "-c",
            "id -u; id -g; id -G; echo $USER; touch /root/x 2>&1 | grep -c denied",
        ]);
        assert_eq!(seen, "65534\n65534\n65534\nnobody\n1", "as {user}");
    }
    // What stead itself was given does not reach the guest.
    let output = worker
        .command(&["exec", "-n", "web", "--", "env"])
        .env("SECRET_OF_THE_HOST", "1")
        .output()
        .expect("run stead");
    assert!(!text(&output.stdout).contains("SECRET_OF_THE_HOST"));
    let large = format!("X={}", "y".repeat(40_000));
    let seen = worker.ok(&[
        "exec",
        "-n",
        "web",
        "-e",
        &large,
        "--",
        "sh",
        "-c",
        "echo ${#X}",
    ]);
    assert_eq!(seen, "40000");
    let too_large = format!("X={}", "y".repeat(100_000));
    let error = worker.fails(&["exec", "-n", "web", "-e", &too_large, "--", "true"], 125);
    assert!(
        error["found"]
            .as_str()
            .is_some_and(|found| found.len() < 2000),
        "{error}"
    );
}

fn signals_are_passed_on(worker: &Worker) {
    let trap = "trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = worker.spawn(&["exec", "web", "--", "sh", "-c", trap]);
    assert_eq!(first_line(&mut child), "ready");
    child.send("TERM");
    let output = finish(child, b"");
    assert_eq!(
        (text(&output.stdout).as_str(), output.status.code()),
        ("caught\n", Some(7))
    );
    for (signal, status) in [
        ("INT", 130),
        ("HUP", 129),
        ("QUIT", 131),
        ("USR1", 138),
        ("USR2", 140),
    ] {
        let mut child = worker.spawn(&[
            "exec",
            "web",
            "--",
            "sh",
            "-c",
            "echo ready; exec sleep 1003",
        ]);
        assert_eq!(first_line(&mut child), "ready");
        child.send(signal);
        assert_eq!(finish(child, b"").status.code(), Some(status), "{signal}");
    }
    assert_eq!(
        status_of(worker, &["web", "--", "pgrep", "-f", "sleep 1003"]),
        Some(1)
    );
}

fn ten_commands_run_at_once(worker: &Worker) {
    let children: Vec<_> = (0..10)
        .map(|n| {
            let script = format!("cat; echo end-{n} >&2");
            let child = worker.spawn(&["--wait", "300", "exec", "web", "--", "sh", "-c", &script]);
            thread::spawn(move || finish(child, &noise(100 + n, 300_000)))
        })
        .collect();
    for (n, child) in (0..).zip(children) {
        let output = child.join().expect("thread");
        assert_eq!(text(&output.stderr), format!("end-{n}\n"));
        assert!(output.status.success());
        assert!(
            output.stdout == noise(100 + n, 300_000),
            "command {n} got another's bytes"
        );
    }
    // Seven can run for long; one more is told so, and waits if it may.
    let mut sleepers: Vec<Stead> = (0..7)
        .map(|_| {
            worker.spawn(&[
                "exec",
                "web",
                "--",
                "sh",
                "-c",
                "echo ready; exec sleep 1004",
            ])
        })
        .collect();
    for child in &mut sleepers {
        assert_eq!(first_line(child), "ready");
    }
    let error = worker.fails(&["--wait", "0", "exec", "-n", "web", "--", "true"], 125);
    assert_eq!(error["kind"], "conflict", "{error}");
    assert!(
        error["found"]
            .as_str()
            .is_some_and(|found| found.contains("ports")),
        "{error}"
    );
    let waiting = worker.spawn(&[
        "--wait", "300", "exec", "-n", "web", "--", "echo", "at last",
    ]);
    for mut child in sleepers {
        child.send("TERM");
        assert_eq!(child.wait().expect("wait").code(), Some(143));
    }
    assert_eq!(text(&finish(waiting, b"").stdout), "at last\n");
}

/// Writes numbered lines until its input ends, and says then how many.
const COUNTING: &str = "
import select, sys, time
n = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    n += 1
    print(n, 'x' * 300, flush=True)
    if n % 20 == 0:
        time.sleep(0.01)
print('end', n, flush=True)
";

#[test]
fn commands_go_on_over_a_checkpoint_and_no_request_is_run_again_in_a_fork() {
    let worker = Worker::with_own_store();
    worker.boot("web");
    // Each is of the kind that must happen once: it appends a word of its own.
    worker.shell("web", "mkdir /root/once");
    let logging = "n=0; while :; do n=$((n + 1)); echo $n >> /root/log; sleep 0.05; done";
    let mut logger = worker.spawn(&[
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        &format!("echo ready; {logging}"),
    ]);
    assert_eq!(first_line(&mut logger), "ready");
    let mut counter = worker.spawn(&["exec", "web", "--", "python3", "-c", COUNTING]);
    let counting = counter.stdin.take().expect("piped");
    let counter = thread::spawn(move || counter.output());
    let hasher = worker.spawn(&["exec", "web", "--", "sha256sum"]);
    let input = noise(7, 6 * MIB);

    let stop = AtomicBool::new(false);
    let asked = AtomicUsize::new(0);
    let (failed, hashed) = thread::scope(|scope| {
        let hasher = scope.spawn(|| feed_slowly(hasher, &input, &stop));
        let requests = scope.spawn(|| ask_again_and_again(&worker, &stop, &asked));
        until(LONG, || asked.load(Ordering::SeqCst) > 0);
        for name in ["one", "two", "disks"] {
            let mut create = vec!["checkpoint", "create", "web", "--name", name];
            if name == "disks" {
                create.push("--disk-only");
            }
            let made = worker.json(&create);
            let kind = if name == "disks" { "disk-only" } else { "full" };
            assert_eq!(made["checkpoint"]["kind"], kind, "{made}");
            // One request was under way at the capture; the next one begins behind it.
            let before = asked.load(Ordering::SeqCst);
            until(LONG, || asked.load(Ordering::SeqCst) >= before + 2);
        }
        stop.store(true, Ordering::SeqCst);
        drop(counting);
        (
            requests.join().expect("requests"),
            hasher.join().expect("hasher"),
        )
    });
    assert_eq!(
        failed,
        Vec::<String>::new(),
        "no command failed because of a checkpoint"
    );

    let counted = counter.join().expect("counter");
    assert!(counted.status.success(), "{}", text(&counted.stderr));
    let lines = text(&counted.stdout);
    let lines: Vec<&str> = lines.lines().collect();
    for (n, line) in (1..).zip(&lines[..lines.len() - 1]) {
        assert_eq!(
            line.split(' ').next(),
            Some(n.to_string().as_str()),
            "a line is lost or doubled"
        );
        assert_eq!(line.len(), n.to_string().len() + 301);
    }
    assert_eq!(lines[lines.len() - 1], format!("end {}", lines.len() - 1));
    std::fs::write(worker.data.join("input"), &input).expect("write");
    let expected = Command::new("sha256sum")
        .stdin(std::fs::File::open(worker.data.join("input")).expect("open"))
        .output()
        .expect("sha256sum");
    assert_eq!(
        text(&hashed.stdout),
        text(&expected.stdout),
        "input was lost or doubled"
    );

    worker.json(&["fork", "one", "--name", "first"]);
    worker.json(&["fork", "two", "--name", "second"]);
    for sandbox in ["web", "first", "second"] {
        assert_eq!(worker.shell(sandbox, "echo own answer"), "own answer");
        nothing_ran_twice(&worker, sandbox);
    }
    logger.send("TERM");
    finish(logger, b"");
    // The forks' loggers are lives of their own, which nobody ends but their guests.
    let tail = || -> u64 {
        let last = worker.shell("first", "tail -n 1 /root/log");
        last.parse().expect("number")
    };
    // The command that was captured goes on in the fork.
    let before = tail();
    until(LONG, || tail() > before);
    until(LONG, || worker.shell("web", LOGGERS) == "0");
    nothing_ran_twice(&worker, "first");
}

/// Feeds a part every 100 ms, and what is left when told to stop.
fn feed_slowly(mut child: Stead, input: &[u8], stop: &AtomicBool) -> Output {
    let mut stdin = child.stdin.take().expect("piped");
    let mut parts = input.chunks(input.len().div_ceil(1000));
    while !stop.load(Ordering::SeqCst) {
        if let Some(part) = parts.next() {
            stdin.write_all(part).expect("feed");
        }
        thread::sleep(Duration::from_millis(100));
    }
    for part in parts {
        stdin.write_all(part).expect("feed");
    }
    drop(stdin);
    child.output()
}

/// Short commands one after the other, counted when they have ended; what went wrong.
fn ask_again_and_again(worker: &Worker, stop: &AtomicBool, asked: &AtomicUsize) -> Vec<String> {
    let mut failed = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let word = format!("word-{}", asked.load(Ordering::SeqCst));
        let script = format!("echo {word} >> /root/words; echo {word}");
        let output = worker
            .command(&["exec", "-n", "web", "--", "sh", "-c", &script])
            .output()
            .expect("run stead");
        if text(&output.stdout) != format!("{word}\n") || !output.status.success() {
            failed.push(format!(
                "{word}: {:?} {}",
                output.status,
                text(&output.stderr)
            ));
        }
        asked.fetch_add(1, Ordering::SeqCst);
    }
    failed
}

/// How many loggers there are: between fork and exec of `sleep`, a child shows the logger's arguments too.
const LOGGERS: &str = "ps -eo pid=,sid=,args= | awk '$1 == $2 && /[e]cho ready; n=0/' | wc -l";

fn nothing_ran_twice(worker: &Worker, sandbox: &str) {
    let log = worker.shell(sandbox, "cat /root/log");
    for (n, line) in (1..).zip(log.lines()) {
        assert_eq!(line, n.to_string(), "{sandbox}: two loggers write");
    }
    assert_eq!(
        worker.shell(sandbox, "sort /root/words | uniq -d"),
        "",
        "{sandbox}"
    );
    let words = worker.shell(sandbox, "cat /root/words");
    let numbers: Vec<u32> = words
        .lines()
        .map(|word| word.trim_start_matches("word-").parse().expect("number"))
        .collect();
    assert!(numbers.is_sorted(), "{sandbox}: {numbers:?}");
    let own = worker.shell(sandbox, LOGGERS);
    assert_eq!(own, "1", "{sandbox}");
}

/// Runs a script that the agent does not survive. The command that carries it is seen to run first, and has no end to
/// deliver.
fn strike(worker: &Worker, script: &str) -> Stead {
    let armed = format!("echo armed; read go; {script}");
    let mut child = worker.spawn(&["exec", "web", "--", "sh", "-c", &armed]);
    assert_eq!(first_line(&mut child), "armed");
    child
        .stdin
        .as_mut()
        .expect("piped")
        .write_all(b"go\n")
        .expect("feed");
    child
}

fn answers(worker: &Worker) -> bool {
    let asked = worker.run(&["exec", "-n", "web", "--", "true"]);
    asked.status.success()
}

#[test]
fn an_agent_that_falls_silent_is_an_error_in_time_and_the_state_can_still_be_kept() {
    let worker = Worker::with_own_store();
    worker.boot("web");
    worker.shell("web", "echo kept > /root/kept; sync; echo ram > /run/ram");
    // One command runs while its agent falls silent.
    let mut running = worker.spawn(&[
        "exec",
        "-n",
        "web",
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ]);
    assert_eq!(first_line(&mut running), "ready");
    let running = thread::spawn(move || {
        let begun = Instant::now();
        (finish(running, b""), begun.elapsed())
    });
    let strike = strike(&worker, "kill -STOP $(pidof stead-agent)");
    until(LONG, || !answers(&worker));
    let error = worker.fails(&["exec", "-n", "web", "--", "true"], 125);
    assert_eq!(error["kind"], "agent", "{error}");
    assert!(
        error["found"]
            .as_str()
            .is_some_and(|found| found.contains("no answer within")),
        "{error}"
    );
    assert!(
        error["next"]
            .as_str()
            .is_some_and(|next| next.contains("stead logs web")),
        "{error}"
    );
    assert!(
        error["left"]
            .as_str()
            .is_some_and(|left| left.contains("the VM runs on")),
        "{error}"
    );
    assert_eq!(health(&worker, "web"), "lost");
    let error = worker.fails(&["wait", "--ready", "--timeout", "1", "web"], 10);
    assert!(
        error["found"].to_string().contains("it is lost after 1 s"),
        "{error}"
    );
    // What would need it is refused with the reason, in time; what was told to do without it works and says what it is worth.
    refused_without_agent(
        &worker,
        &["checkpoint", "create", "web", "--name", "refused"],
    );
    refused_without_agent(&worker, &["hibernate", "web"]);
    let listed = worker.json(&["checkpoint", "ls"]);
    assert_eq!(listed.as_array().map(Vec::len), Some(0), "{listed}");
    let create = [
        "checkpoint",
        "create",
        "--crash-consistent",
        "web",
        "--name",
        "whole",
    ];
    let made = worker.json(&create);
    assert_eq!(
        made["checkpoint"]["kind"], "full, crash-consistent",
        "{made}"
    );
    // In a fork of it the agent stands still too: the fork is never called ready, and is taken back.
    let fork = worker.spawn(&["--json", "fork", "whole", "--name", "never-ready"]);
    let fork = thread::spawn(move || finish(fork, b""));
    // However quiet: it says what the checkpoint is worth.
    let output = worker.run(&[
        "--json",
        "--quiet",
        "checkpoint",
        "create",
        "web",
        "--name",
        "disks",
        "--disk-only",
    ]);
    assert!(output.status.success());
    let made: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        made["checkpoint"]["kind"], "disk-only, crash-consistent",
        "{made}"
    );
    let notice = text(&output.stderr);
    assert!(
        notice.contains("\"notice\"") && notice.contains("crash-consistent"),
        "{notice}"
    );
    assert_eq!(worker.state("web"), "running");

    let (output, after) = running.join().expect("thread");
    assert_eq!(output.status.code(), Some(125), "{}", text(&output.stderr));
    assert!(after < LONG, "{after:?}");
    // The session of the command that struck was silent from then on.
    assert_eq!(strike.output().status.code(), Some(125));

    let stopped = worker.json(&["stop", "--timeout", "2", "web"]);
    assert_eq!(stopped["state"], "stopped");
    let forked = fork.join().expect("thread");
    let said = text(&forked.stderr);
    assert_eq!(forked.status.code(), Some(10), "{said}");
    assert!(said.contains("has not acknowledged the epoch"), "{said}");
    worker.fails(&["show", "never-ready"], 3);
    assert!(worker.qemus().is_empty());
    worker.ok(&["fork", "disks", "--name", "booted"]);
    assert_eq!(
        worker.shell("booted", "cat /root/kept; ls /run/ram 2>/dev/null; true"),
        "kept"
    );
    assert_eq!(
        worker.shell(
            "booted",
            "dmesg | grep -ciE 'ext4-fs.*(error|corrupt)'; true"
        ),
        "0"
    );
    without_its_agent_a_sandbox_is_hibernated_crash_consistent_and_removed(&worker, "booted");
}

fn health(worker: &Worker, sandbox: &str) -> String {
    let shown = worker.json(&["show", "--health", sandbox]);
    shown["health"]["state"]
        .as_str()
        .expect("a state")
        .to_owned()
}

fn refused_without_agent(worker: &Worker, args: &[&str]) {
    let begun = Instant::now();
    let error = worker.fails(args, 10);
    assert!(
        begun.elapsed() < Duration::from_secs(60),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(error["kind"], "agent", "{error}");
    for (part, holds) in [
        ("found", "do not stand still"),
        ("left", "the VM runs on"),
        ("next", "--crash-consistent"),
    ] {
        assert!(error[part].to_string().contains(holds), "{error}");
    }
    assert_eq!(worker.state("web"), "running");
}

fn without_its_agent_a_sandbox_is_hibernated_crash_consistent_and_removed(
    worker: &Worker,
    sandbox: &str,
) {
    let script =
        "setsid sh -c 'sleep 1; kill -STOP $(pidof stead-agent)' > /dev/null 2>&1 < /dev/null &";
    worker.shell(sandbox, script);
    until(LONG, || health(worker, sandbox) == "lost");
    let slept = worker.json(&["hibernate", "--crash-consistent", sandbox]);
    assert_eq!(
        slept["checkpoint"]["kind"], "hibernation, crash-consistent",
        "{slept}"
    );
    assert_eq!(worker.state(sandbox), "hibernated");
    worker.ok(&["rm", sandbox]);
    worker.fails(&["show", sandbox], 3);
    assert!(worker.qemus().is_empty());
}

#[test]
fn an_agent_that_was_restarted_and_a_guest_that_was_rebooted_take_commands_again() {
    let worker = Worker::with_own_store();
    worker.boot("web");
    let agent = "systemctl show -P MainPID stead-agent";
    let first = worker.shell("web", agent);
    let boot = worker.shell("web", "cat /proc/sys/kernel/random/boot_id");
    let epoch = worker.json(&["show", "web"])["epoch"].clone();
    // The unit leaves the commands alone when its agent ends.
    let back = format!(
        "kill -KILL {first}; while p=$({agent}); [ \"$p\" = 0 ] || [ \"$p\" = {first} ]; do sleep .1; done; echo agent-back >/dev/ttyS0"
    );
    let killing = strike(&worker, &back);
    until(LONG, || worker.ok(&["logs", "web"]).contains("agent-back"));
    drop(killing);
    // Several at once find it so; one greets it, the others wait for that.
    let several: Vec<Stead> = (0..3)
        .map(|_| worker.spawn(&["exec", "-n", "web", "--", "sh", "-c", agent]))
        .collect();
    let pids: BTreeSet<String> = several
        .into_iter()
        .map(|child| {
            let output = finish(child, b"");
            assert!(output.status.success(), "{}", text(&output.stderr));
            text(&output.stdout)
        })
        .collect();
    assert!(
        pids.len() == 1 && !pids.contains(&format!("{first}\n")),
        "{pids:?}"
    );
    assert_ne!(worker.json(&["show", "web"])["epoch"], epoch);

    let rebooting = strike(&worker, "sync; systemctl reboot --force --force");
    let begun = Instant::now();
    until(LONG, || {
        let now = worker.run(&[
            "exec",
            "-n",
            "web",
            "--",
            "cat",
            "/proc/sys/kernel/random/boot_id",
        ]);
        now.status.success() && text(&now.stdout).trim() != boot
    });
    eprintln!("answers {:?} after its reboot", begun.elapsed());
    drop(rebooting);
    let made = worker.json(&["checkpoint", "create", "web", "--disk-only"]);
    assert_eq!(made["checkpoint"]["kind"], "disk-only", "{made}");

    // An agent that is gone for good.
    let killing = strike(&worker, "systemctl stop --no-block stead-agent");
    // The guest has just booted, so it may be a while until its systemd gets to it.
    until(LONG, || !answers(&worker));
    let error = worker.fails(&["exec", "-n", "web", "--", "true"], 125);
    assert_eq!(error["kind"], "agent", "{error}");
    drop(killing);
    assert_eq!(worker.state("web"), "running");
    worker.ok(&["stop", "--timeout", "1", "web"]);
    worker.ok(&["start", "web"]);
    assert_eq!(worker.shell("web", "echo back"), "back");
}

fn lines_are_answered_one_by_one(worker: &Worker) {
    let mut child = worker.spawn(&[
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        "while read line; do echo \"got $line\"; done; echo bye",
    ]);
    let mut stdin = child.stdin.take().expect("piped");
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    for n in 0..10 {
        writeln!(stdin, "{n}").expect("write");
        stdin.flush().expect("flush");
        let mut line = String::new();
        stdout.read_line(&mut line).expect("read");
        assert_eq!(line, format!("got {n}\n"));
    }
    drop(stdin);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).expect("read");
    assert_eq!(rest, "bye\n");
    assert!(child.wait().expect("wait").success());
}
