//! Clones of one checkpoint: no two are alike where they must not be, and none shows anything from between.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use stead_tests::{TEMPLATE, Worker, golden_store};

/// How long the checkpoint seems to have been parked, in seconds: 75 h. The guest's clock is put back by that before.
const PARKED_S: u64 = 75 * 3600;
/// By how much a clock may differ at ready, in nanoseconds.
const CLOCK_NS: u64 = 100_000_000;

/// Writes clock, monotonic clock, randomness and clock to the disk, all the time.
const WITNESS: &str = r#"
set -eu
cat > /root/witness <<'PY'
import os, time
with open("/root/log", "a", buffering=1) as log:
    while True:
        log.write("%d %d %s %d\n" % (time.time_ns(), time.monotonic_ns(), os.urandom(8).hex(), time.time_ns()))
        time.sleep(0.002)
PY
mkdir -p /etc/ssh /root/secret
echo old > /etc/ssh/ssh_host_ed25519_key
echo old > /root/secret/token
date -s "@$(($(date +%s) - PARKED))" > /dev/null
setsid python3 /root/witness > /dev/null 2>&1 < /dev/null &
while ! [ -s /root/log ]; do sleep 0.1; done
"#;

/// What must differ, a word a line.
const ASKED: &str = r#"
date +%s%N
head -c 16 /dev/urandom | od -An -tx8 | tr -d ' \n'; echo
cat /proc/sys/kernel/random/uuid
cat /etc/machine-id
hostname
cat /etc/ssh/ssh_host_ed25519_key 2>/dev/null | sha256sum
ls /root/secret 2>/dev/null; true
"#;

fn now_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970");
    u64::try_from(since.as_nanos()).expect("before 2554")
}

struct Line {
    clock_ns: u64,
    monotonic_ns: u64,
    random: String,
    end_ns: u64,
}

/// What the witness wrote in a clone; the last line may be cut off by our reading.
fn log_of(worker: &Worker, sandbox: &str) -> Vec<Line> {
    let text = worker.shell(sandbox, "kill -STOP $(pidof python3); cat /root/log");
    let mut lines: Vec<&str> = text.lines().collect();
    lines.pop();
    let line = |line: &str| {
        let mut words = line.split(' ');
        let mut next = || {
            words
                .next()
                .unwrap_or_else(|| panic!("{line:?}"))
                .to_owned()
        };
        let number = |word: String| word.parse().unwrap_or_else(|_| panic!("{line:?}"));
        Line {
            clock_ns: number(next()),
            monotonic_ns: number(next()),
            random: next(),
            end_ns: number(next()),
        }
    };
    lines.into_iter().map(line).collect()
}

#[test]
fn ten_clones_of_a_parked_checkpoint_differ_and_show_no_time_and_no_randomness_from_between() {
    let worker = Worker::with_own_store();
    worker.ok(&["create", TEMPLATE, "--name", "source", "--memory", "256M"]);
    worker.shell("source", &WITNESS.replace("PARKED", &PARKED_S.to_string()));
    let [old_machine, old_host] =
        ["cat /etc/machine-id", "hostname"].map(|ask| worker.shell("source", ask));
    worker.ok(&["checkpoint", "create", "source", "--name", "parked"]);
    // The source was thawed at once.
    let before = worker.shell("source", "wc -l < /root/log");
    assert_ne!(
        before,
        worker.shell("source", "sleep 0.5; wc -l < /root/log")
    );
    worker.ok(&["rm", "--force", "source"]);

    let forked_ns = now_ns();
    worker.ok(&[
        "fork",
        "parked",
        "-n",
        "10",
        "--name",
        "clone_a",
        "--clear",
        "/root/secret",
    ]);
    let names: Vec<String> = (1..=10).map(|number| format!("clone_a-{number}")).collect();
    let mut seen: [BTreeSet<String>; 4] = Default::default();
    for name in &names {
        let begun_ns = now_ns();
        let said = worker.shell(name, ASKED);
        let ended_ns = now_ns();
        let words: Vec<&str> = said.lines().collect();
        let [clock, random, uuid, machine, host, key] = words[..] else {
            panic!("{said:?}: the secret was not cleared, or something is missing");
        };
        let clock: u64 = clock.parse().expect("a time");
        assert!(
            clock + CLOCK_NS >= begun_ns && clock <= ended_ns + CLOCK_NS,
            "{clock}: not from {begun_ns} to {ended_ns}"
        );
        assert_ne!(machine, old_machine);
        assert_eq!(host, name.replace('_', "-"), "not {old_host}");
        let old_key = "old\n";
        assert_ne!(
            key.split(' ').next(),
            Some(sha256(&worker, name, old_key).as_str())
        );
        for (all, one) in seen.iter_mut().zip([random, uuid, machine, host]) {
            assert!(
                all.insert(one.to_owned()),
                "{one} was seen in another clone"
            );
        }
    }
    nothing_is_from_between(&worker, &names, forked_ns);
    one_that_keeps_its_identity_is_who_it_was(&worker, &old_machine, &old_host);
}

fn sha256(worker: &Worker, sandbox: &str, text: &str) -> String {
    let script = format!("printf '{}' | sha256sum", text.escape_default());
    let said = worker.shell(sandbox, &script);
    said.split(' ').next().expect("a digest").to_owned()
}

/// Every line is from before the capture, the same ones in all clones, or from after the release; monotonic time never goes back.
fn nothing_is_from_between(worker: &Worker, names: &[String], forked_ns: u64) {
    let mut before: Option<Vec<String>> = None;
    let mut after = BTreeSet::new();
    for name in names {
        let log = log_of(worker, name);
        let old = log
            .iter()
            .take_while(|line| line.clock_ns < forked_ns)
            .count();
        let (old, new) = log.split_at(old);
        assert!(
            !old.is_empty() && !new.is_empty(),
            "{name}: {} and {}",
            old.len(),
            new.len()
        );
        for pair in log.windows(2) {
            assert!(
                pair[0].monotonic_ns <= pair[1].monotonic_ns,
                "{name}: {}",
                pair[1].monotonic_ns
            );
        }
        // The capture may have fallen into the middle of one: its times are from both sides.
        let whole = |line: &&Line| line.end_ns < forked_ns || line.clock_ns >= forked_ns;
        assert!(
            log.iter().filter(|line| !whole(line)).count() <= 1,
            "{name}"
        );
        let old = old.iter().filter(whole);
        let late = new.iter().find(|line| line.clock_ns < forked_ns);
        assert!(
            late.is_none(),
            "{name}: {:?}",
            late.map(|line| line.clock_ns)
        );
        let old: Vec<String> = old.map(|line| line.random.clone()).collect();
        assert_eq!(
            before.get_or_insert_with(|| old.clone()),
            &old,
            "{name} wrote with its old clock"
        );
        for line in new {
            assert!(
                after.insert(line.random.clone()),
                "{name}: {} was drawn twice",
                line.random
            );
        }
    }
}

fn one_that_keeps_its_identity_is_who_it_was(worker: &Worker, machine: &str, host: &str) {
    worker.ok(&["fork", "parked", "--name", "same", "--keep-identity"]);
    assert_eq!(
        worker.shell("same", "cat /etc/machine-id; hostname"),
        format!("{machine}\n{host}")
    );
    assert_eq!(worker.shell("same", "cat /root/secret/token"), "old");
    worker.ok(&[
        "fork",
        "parked",
        "--name",
        "other",
        "--hostname",
        "db.example",
    ]);
    assert_eq!(
        worker.shell("other", "hostname; grep -c db.example /etc/hosts"),
        "db.example\n1"
    );
}

#[test]
fn fork_policies_that_cannot_be_are_refused_before_anything_is_fetched() {
    let worker = Worker::on(golden_store());
    for wrong in [
        ["--hostname", "a b"],
        ["--clear", "relative"],
        ["--clear", "/"],
    ] {
        let error = worker.fails(&["fork", "no-such-checkpoint", wrong[0], wrong[1]], 2);
        assert_eq!(error["kind"], "usage", "{error}");
    }
}
