//! The promise itself: what was captured is what comes back, as a fork, in place, or from hibernation; or a refusal that changes nothing.
#![allow(
    clippy::disallowed_methods,
    reason = "tests write scratch files that nobody keeps"
)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use stead_store::{Hash, Manifest, ManifestId};
use stead_tests::{TEMPLATE, Worker, files_below, flip, golden_store, memory_folders_of, until};

/// For what must come to its end, however slow the machine is.
const LONG: Duration = Duration::from_secs(300);

/// A repository, random files, and a process whose state is in its memory only.
const FILL: &str = r##"
set -eu
mkdir -p /srv/work && cd /srv/work
git init -q . && git config user.name test && git config user.email test@localhost
for commit in 1 2 3; do
    mkdir -p dir$commit
    for n in $(seq 60); do head -c $((n * 97 * commit)) /dev/urandom > dir$commit/file$n; done
    git add -A && git commit -qm "state $commit"
done
head -c 6000000 /dev/urandom > /srv/random
cat > /root/keeper <<'PY'
import hashlib, os, socket
memory = bytearray(os.urandom(16 << 20))
server = socket.socket(socket.AF_UNIX)
server.bind("/run/keeper")
server.listen()
while True:
    client, _ = server.accept()
    if client.recv(16) == b"change":
        memory[12345:23456] = os.urandom(11111)
    client.sendall(b"%s %d" % (hashlib.sha256(memory).hexdigest().encode(), os.getpid()))
    client.close()
PY
setsid python3 /root/keeper > /dev/null 2>&1 < /dev/null &
while ! [ -S /run/keeper ]; do sleep 0.05; done
"##;

const LIST: &str = r#"
# Who a guest is a fork changes: the tests of clones look at that.
find /srv /etc /usr/sbin /root/keeper -xdev -type f ! -path /etc/hostname ! -path /etc/hosts ! -path /etc/machine-id -print0 | sort -z | xargs -0 sha256sum > /root/sums
sync
"#;

const CHANGE: &str = r#"
set -eu
cd /srv/work
git rm -qr dir1 && echo new > new && git add -A && git commit -qm "after the checkpoint"
dd if=/dev/urandom of=/srv/random bs=1M count=6 conv=notrunc status=none
echo changed >> /etc/issue
"#;

const ASK: &str = r#"
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect("/run/keeper")
client.sendall(sys.argv[1].encode())
print("memory", client.recv(256).decode())
"#;

/// Reads every file with cold caches. Each line is a word and its value.
const LOOK: &str = r#"
set -u
sync
echo 3 > /proc/sys/vm/drop_caches
cd /srv/work
echo "files $(wc -l < /root/sums)"
echo "list $(sha256sum < /root/sums | cut -d' ' -f1)"
echo "broken $(sha256sum -c --quiet /root/sums 2>&1 | grep -c .)"
echo "fsck $(git fsck --full --strict > /dev/null 2>&1; echo $?)"
echo "status $(git status --porcelain | grep -c .)"
echo "commits $(git rev-list --count HEAD)"
echo "faults $(dmesg | grep -ciE 'ext4-fs.*(error|warning|corrupt)|i/o error|checksum (error|invalid|mismatch)|segfault|kernel panic|oops:|hung task|soft lockup|blocked for more')"
"#;

/// What a guest holds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    list: String,
    commits: String,
    memory: String,
}

fn word<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .unwrap_or_else(|| panic!("no {name} in {text}"))
}

/// Reads everything with cold caches; anything broken fails the test.
fn look_at_files(worker: &Worker, sandbox: &str) -> (String, String) {
    let text = worker.shell(sandbox, LOOK);
    for (name, good) in [
        ("broken", "0"),
        ("fsck", "0"),
        ("status", "0"),
        ("faults", "0"),
    ] {
        assert_eq!(word(&text, name), good, "{sandbox}: {name} in {text}");
    }
    let files: u32 = word(&text, "files").parse().expect("a number");
    assert!(files > 300, "{text}");
    (
        word(&text, "list").to_owned(),
        word(&text, "commits").to_owned(),
    )
}

fn look(worker: &Worker, sandbox: &str) -> Held {
    let (list, commits) = look_at_files(worker, sandbox);
    Held {
        list,
        commits,
        memory: ask(worker, sandbox, "digest"),
    }
}

fn ask(worker: &Worker, sandbox: &str, wish: &str) -> String {
    worker.ok(&["exec", "-n", sandbox, "--", "python3", "-c", ASK, wish])
}

fn fill(worker: &Worker, sandbox: &str) -> Held {
    worker.shell(sandbox, FILL);
    worker.shell(sandbox, LIST);
    look(worker, sandbox)
}

/// Changes files, history and memory.
fn change(worker: &Worker, sandbox: &str) -> Held {
    worker.shell(sandbox, CHANGE);
    worker.shell(sandbox, LIST);
    ask(worker, sandbox, "change");
    look(worker, sandbox)
}

fn host_seconds() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970")
        .as_secs_f64()
}

/// The guest's clock is right within two seconds.
fn assert_clock_is_right(worker: &Worker, sandbox: &str) {
    let before = host_seconds();
    let told = worker.ok(&["exec", "-n", sandbox, "--", "date", "+%s.%N"]);
    let after = host_seconds();
    let told: f64 = told.parse().expect("seconds");
    assert!(
        (before - 2.0..=after + 2.0).contains(&told),
        "{sandbox}: {told} is not from {before} to {after}"
    );
}

fn random_of(worker: &Worker, sandbox: &str) -> String {
    worker.shell(
        sandbox,
        "head -c 32 /dev/urandom | sha256sum; cat /proc/sys/kernel/random/uuid",
    )
}

fn checkpoint(worker: &Worker, sandbox: &str, name: &str) -> Value {
    worker.json(&["checkpoint", "create", sandbox, "--name", name])
}

#[test]
fn a_fork_and_a_fork_of_a_fork_hold_exactly_what_was_captured_and_the_source_keeps_its_changes() {
    let worker = Worker::with_own_store();
    worker.boot("source");
    let captured = fill(&worker, "source");
    let made = checkpoint(&worker, "source", "base");
    a_checkpoint_says_what_made_it(&worker, &made);
    let changed = change(&worker, "source");
    assert!(
        changed.list != captured.list
            && changed.commits != captured.commits
            && changed.memory != captured.memory
    );

    let forks = worker.json(&["fork", "base", "-n", "2", "--name", "fork"]);
    let names: Vec<&str> = forks
        .as_array()
        .expect("two")
        .iter()
        .map(|fork| fork["sandbox"]["name"].as_str().expect("name"))
        .collect();
    assert_eq!(names, ["fork-1", "fork-2"]);
    for fork in forks.as_array().expect("two") {
        let verified = fork["verified_bytes"].as_u64().expect("bytes");
        assert_eq!(
            verified,
            (2 << 30) + (512 << 20),
            "every byte of disk and RAM is compared"
        );
        assert!(fork["ready_us"].as_u64().is_some_and(|us| us > 0));
    }
    for sandbox in ["fork-1", "fork-2", "source"] {
        assert_clock_is_right(&worker, sandbox);
    }
    let random: BTreeSet<String> = ["source", "fork-1", "fork-2"]
        .iter()
        .map(|name| random_of(&worker, name))
        .collect();
    assert_eq!(random.len(), 3, "{random:?}");
    assert_eq!(look(&worker, "fork-1"), captured);
    assert_eq!(look(&worker, "fork-2"), captured);
    assert_eq!(look(&worker, "source"), changed);

    // A fork maps the image privately; it is captured as whole as its source was.
    let second = change(&worker, "fork-1");
    assert!(second != captured && second.memory != changed.memory);
    let made = checkpoint(&worker, "fork-1", "second");
    assert_eq!(
        made["checkpoint"]["parent"], forks[0]["sandbox"]["checkpoint"],
        "lineage"
    );
    worker.ok(&["rm", "--force", "fork-1"]);
    worker.ok(&["fork", "second", "--name", "grandchild"]);
    assert_clock_is_right(&worker, "grandchild");
    assert_eq!(look(&worker, "grandchild"), second);
    assert_eq!(
        look(&worker, "fork-2"),
        captured,
        "the image that is shared has not changed"
    );
    worker.ok(&["fork", "base", "--name", "late"]);
    assert_eq!(look(&worker, "late"), captured);
    assert_eq!(look(&worker, "source"), changed);

    for name in ["base", "second"] {
        assert!(
            worker.json(&["checkpoint", "verify", name])["bytes"]
                .as_u64()
                .is_some_and(|bytes| bytes > 2 << 30)
        );
    }
    state_of_another_kind_of_host_is_refused(&worker);
}

fn a_checkpoint_says_what_made_it(worker: &Worker, made: &Value) {
    let sandbox = worker.json(&["show", "source"]);
    let shown = worker.json(&["checkpoint", "show", "base"]);
    let version = Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .expect("run QEMU");
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let producer = shown["producer"].as_str().expect("producer");
    let number = producer
        .split(|c: char| !(c.is_ascii_digit() || c == '.'))
        .find(|word| word.matches('.').count() == 2)
        .unwrap_or_else(|| panic!("no version in {producer}"));
    assert!(version.contains(number), "{producer} is not {version}");
    for field in ["machine_type", "cpu_model", "accelerator"] {
        assert!(
            producer.contains(sandbox[field].as_str().expect("text")),
            "{field} in {producer}"
        );
    }
    assert_eq!(shown["id"], made["checkpoint"]["id"]);
    assert_eq!(
        (&shown["kind"], &shown["sandbox"], &shown["parent"]),
        (&"full".into(), &"source".into(), &Value::Null)
    );
    assert_eq!(shown["template"], sandbox["template"]);
    assert_eq!(shown["ram"]["size_bytes"], 512 << 20);
    assert_eq!(shown["disks"][0]["size_bytes"], 2_u64 << 30);
    assert!(
        shown["unique_bytes"]
            .as_u64()
            .is_some_and(|bytes| bytes > 6_000_000),
        "{shown}"
    );
    assert!(
        made["pause"]["paused_us"].as_u64().is_some_and(|us| us > 0),
        "{made}"
    );
    assert!(
        worker
            .ok(&["checkpoint", "show", "base"])
            .contains(producer)
    );
    assert!(worker.ok(&["checkpoint", "ls"]).contains("base"));
    let taken = worker.fails(&["checkpoint", "create", "source", "--name", "base"], 4);
    assert_eq!(taken["kind"], "conflict", "{taken}");
}

/// Puts an edited copy of a checkpoint's manifest into the store, and gives its id.
fn edited(worker: &Worker, name: &str, edit: impl FnOnce(&mut Manifest)) -> String {
    let id = worker.json(&["checkpoint", "show", name])["id"]
        .as_str()
        .expect("id")
        .to_owned();
    let folder = Path::new(&worker.store).join("checkpoints");
    let object = fs::read(folder.join(&id)).expect("manifest");
    let mut manifest = Manifest::decode(&object).expect("a manifest");
    manifest.name = Some("edited".to_owned());
    edit(&mut manifest);
    let object = manifest.encode().expect("encode");
    let id = ManifestId(Hash::of(&object)).to_string();
    fs::write(folder.join(&id), object).expect("write");
    id
}

fn state_of_another_kind_of_host_is_refused(worker: &Worker) {
    let before = (
        worker.json(&["ls"]),
        worker.qemus().into_iter().collect::<BTreeSet<_>>(),
        worker.files(),
    );
    let qemu = |manifest: &mut Manifest, field: &str, value: Value| {
        let machine = &mut manifest.machine["machine"]["qemu"];
        assert!(
            !machine[field].is_null(),
            "{field} is not recorded: {machine}"
        );
        machine[field] = value;
    };
    let newer = serde_json::json!({"major": 99, "minor": 1, "micro": 2});
    for (field, value, named) in [
        (
            "machine_type",
            "pc-q35-99.0".into(),
            vec!["machine type", "pc-q35-99.0"],
        ),
        (
            "cpu_model",
            "Westmere-v1,+avx512f".into(),
            vec!["CPU model", "avx512f"],
        ),
        (
            "qemu_version",
            newer,
            vec!["QEMU version", "99.1.2", "here"],
        ),
    ] {
        let id = edited(worker, "base", |manifest| qemu(manifest, field, value));
        for args in [vec!["fork", &id], vec!["restore", "source", &id]] {
            let error = worker.fails(&args, 6);
            assert_eq!(error["kind"], "incompatible", "{error}");
            let found = error["found"].as_str().expect("found");
            for word in &named {
                assert!(found.contains(word), "{word} is not named: {error}");
            }
            assert!(
                error["next"].is_string() && error["left"].is_string(),
                "{error}"
            );
        }
        worker.ok(&["checkpoint", "rm", &id]);
    }
    // What is no machine at all, or contradicts itself.
    let hostile: [(&str, Value); 5] = [
        ("machine_type", "pc-q35-7.2,firmware=/etc/passwd".into()),
        ("cpu_model", "max".into()),
        ("cpu_model", "qemu64,host-phys-bits=on,enforce=off".into()),
        ("memory_bytes", (256_u64 << 20).into()),
        ("disks", serde_json::json!(["vda", "vdb"])),
    ];
    for (field, value) in hostile {
        let shown = value.to_string();
        let id = edited(worker, "base", |manifest| qemu(manifest, field, value));
        let output = worker.run(&["--json", "fork", &id]);
        assert!(
            matches!(output.status.code(), Some(5 | 6)),
            "{field} {shown}: {:?}",
            output.status
        );
        worker.ok(&["checkpoint", "rm", &id]);
    }
    let id = edited(worker, "base", |manifest| {
        manifest.machine = serde_json::json!({"other": 1})
    });
    worker.fails(&["fork", &id], 6);
    worker.ok(&["checkpoint", "rm", &id]);
    let after = (
        worker.json(&["ls"]),
        worker.qemus().into_iter().collect::<BTreeSet<_>>(),
        worker.files(),
    );
    assert_eq!(after, before, "nothing was started, ended or left behind");
}

#[test]
fn restore_drops_what_came_later_and_a_refused_one_changes_nothing_and_wake_goes_on_where_it_slept()
{
    let worker = Worker::with_own_store();
    worker.boot("web");
    let first = fill(&worker, "web");
    checkpoint(&worker, "web", "first");
    let later = change(&worker, "web");
    let pid = worker.pid("web");

    // The local RAM image is changed behind our back, with its size and times kept.
    let image = files_below(&worker.data.join("ram"))
        .pop()
        .expect("a RAM image")
        .0;
    let times = fs::metadata(&image).expect("stat");
    flip(&image, 100 << 20);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .expect("open");
    file.set_modified(times.modified().expect("time"))
        .expect("set the time");
    drop(file);
    let error = worker.fails(&["restore", "web", "first"], 5);
    assert_eq!(error["kind"], "damaged", "{error}");
    let text = error.to_string();
    assert!(
        text.contains(&image.display().to_string()) && text.contains("104857600"),
        "{error}"
    );
    worker.fails(&["restore", "web", "nope"], 3);
    worker.fails(&["wake", "web"], 4);
    assert_eq!((worker.pid("web"), worker.qemus()), (pid, vec![pid]));
    assert_eq!(look(&worker, "web"), later, "the VM has gone on as it was");

    // Moved away, it is rebuilt from the store.
    fs::rename(&image, worker.data.join("damaged")).expect("move away");
    let restored = worker.json(&["restore", "web", "first"]);
    assert!(
        restored["fetched_bytes"]
            .as_u64()
            .is_some_and(|bytes| bytes > 1 << 20),
        "{restored}"
    );
    assert_ne!(worker.pid("web"), pid);
    assert_eq!(
        worker.qemus(),
        [worker.pid("web")],
        "the earlier VM has ended"
    );
    assert_clock_is_right(&worker, "web");
    assert_eq!(look(&worker, "web"), first);
    assert_eq!(worker.json(&["ls"]).as_array().map(Vec::len), Some(1));

    let asleep = change(&worker, "web");
    let boot = worker.shell("web", "cat /proc/sys/kernel/random/boot_id");
    let slept = worker.json(&["hibernate", "web"]);
    assert_eq!(slept["checkpoint"]["kind"], "hibernation", "{slept}");
    let id = slept["checkpoint"]["id"].as_str().expect("id").to_owned();
    a_sleeping_sandbox_holds_nothing_and_is_kept(&worker, &id);
    thread::sleep(Duration::from_secs(4));
    let woken = worker.json(&["wake", "web"]);
    assert_eq!(
        (
            &woken["sandbox"]["state"],
            &woken["sandbox"]["hibernated_as"]
        ),
        (&"running".into(), &Value::Null)
    );
    assert_clock_is_right(&worker, "web");
    assert_eq!(
        worker.shell("web", "cat /proc/sys/kernel/random/boot_id"),
        boot
    );
    assert_eq!(look(&worker, "web"), asleep);
    worker.fails(&["wake", "web"], 4);

    // The second hibernation takes the place of the first; another worker may fork it.
    ask(&worker, "web", "change");
    let asleep = look(&worker, "web");
    let again = worker.json(&["hibernate", "web"]);
    let again = again["checkpoint"]["id"].as_str().expect("id").to_owned();
    let listed: Vec<Value> = worker.checkpoints();
    assert_eq!(
        listed
            .iter()
            .filter(|entry| entry["kind"] == "hibernation")
            .count(),
        1,
        "{listed:?}"
    );
    assert!(!listed.iter().any(|entry| entry["id"] == id.as_str()));
    let other = Worker::on(Path::new(&worker.store));
    // Another worker that tidies up does not take away what this one will wake from.
    let error = other.fails(&["checkpoint", "rm", &again], 4);
    assert!(
        error["next"]
            .as_str()
            .is_some_and(|next| next.contains("--force")),
        "{error}"
    );
    worker.fails(&["checkpoint", "rm", "--force", &again], 4);
    other.ok(&["fork", &again, "--name", "elsewhere"]);
    assert_eq!(look(&other, "elsewhere"), asleep);
    assert_clock_is_right(&other, "elsewhere");
    // A hibernated sandbox may be put back to a checkpoint instead of being woken.
    worker.ok(&["restore", "web", "first"]);
    assert_eq!(look(&worker, "web"), first);
    worker.fails(&["wake", "web"], 4);
    worker.ok(&["rm", "--force", "web"]);
    assert!(
        !worker
            .checkpoints()
            .iter()
            .any(|entry| entry["kind"] == "hibernation")
    );
}

fn a_sleeping_sandbox_holds_nothing_and_is_kept(worker: &Worker, checkpoint: &str) {
    let shown = worker.json(&["show", "web"]);
    assert_eq!(
        (&shown["state"], &shown["pid"]),
        (&"hibernated".into(), &Value::Null)
    );
    assert_eq!(shown["hibernated_as"], checkpoint);
    assert!(worker.qemus().is_empty());
    assert!(memory_folders_of(&worker.data).is_empty());
    assert!(
        !worker.files().iter().any(|file| file.starts_with("run/")),
        "{:?}",
        worker.files()
    );
    for args in [
        vec!["start", "web"],
        vec!["stop", "web"],
        vec!["checkpoint", "create", "web"],
        vec!["hibernate", "web"],
    ] {
        assert_eq!(worker.fails(&args, 4)["kind"], "conflict", "{args:?}");
    }
    let error = worker.fails(&["start", "web"], 4);
    assert!(
        error["next"]
            .as_str()
            .is_some_and(|next| next.contains("stead wake web")),
        "{error}"
    );
    worker.fails(&["exec", "-n", "web", "--", "true"], 125);
    let error = worker.fails(&["checkpoint", "rm", checkpoint], 4);
    assert!(
        error["found"]
            .as_str()
            .is_some_and(|found| found.contains("web")),
        "{error}"
    );
    worker.ok(&["gc"]);
    worker.ok(&["checkpoint", "verify", checkpoint]);
}

/// The disk files that a sandbox writes to, in order.
fn disk_files(worker: &Worker, sandbox: &str) -> Vec<PathBuf> {
    worker.json(&["show", sandbox])["disks"]
        .as_array()
        .expect("disks")
        .iter()
        .map(|disk| PathBuf::from(disk["file"].as_str().expect("file")))
        .collect()
}

/// The first number on a disk as QEMU's own tool reads it through the layers.
fn number_on(worker: &Worker, layer: &Path) -> u64 {
    let out = worker.data.join("sector");
    let status = Command::new("qemu-img")
        .args(["dd", "-f", "qcow2", "-O", "raw", "bs=512", "count=1"])
        .arg(format!("if={}", layer.display()))
        .arg(format!("of={}", out.display()))
        .status()
        .expect("run qemu-img");
    assert!(status.success());
    let bytes = fs::read(&out).expect("read");
    u64::from_le_bytes(bytes[..8].try_into().expect("eight"))
}

/// Writes n to vdb and only then to vdc, past all caches, for ever.
const IN_ORDER: &str = r#"
import mmap, os
page = mmap.mmap(-1, 4096)
disks = [os.open(name, os.O_RDWR | os.O_DIRECT | os.O_DSYNC) for name in ("/dev/vdb", "/dev/vdc")]
n = 0
while True:
    n += 1
    page[:8] = n.to_bytes(8, "little")
    for disk in disks:
        os.pwrite(disk, page, 0)
    if n == 10:
        open("/run/writing", "w").close()
"#;

const READ_BOTH: &str = r#"
import os
print(*[int.from_bytes(open(name, "rb").read(8), "little") for name in ("/dev/vdb", "/dev/vdc")])
"#;

#[test]
fn all_disks_are_captured_at_one_instant() {
    let worker = Worker::with_own_store();
    worker.ok(&[
        "create", TEMPLATE, "--name", "web", "--disk", "8M", "--disk", "8M",
    ]);
    worker.shell(
        "web",
        &format!("cat > /root/writer <<'PY'{IN_ORDER}PY\nsetsid python3 /root/writer > /dev/null 2>&1 < /dev/null & while ! [ -e /run/writing ]; do sleep 0.05; done"),
    );
    let mut earlier = 0;
    let mut between = 0;
    for round in 0..5 {
        let frozen = disk_files(&worker, "web");
        let name = format!("instant-{round}");
        let mut create = vec!["checkpoint", "create", "web", "--name", &name];
        if round % 2 == 1 {
            create.push("--disk-only");
        }
        worker.ok(&create);
        let [first, second] = [1, 2].map(|at| number_on(&worker, &frozen[at]));
        eprintln!("{name}: {first} and {second}");
        assert!(
            first == second || first == second + 1,
            "{name}: {first} was written before {second}"
        );
        between += u32::from(first != second);
        assert!(first > earlier, "nothing was written since the last one");
        earlier = first;
    }
    eprintln!("{between} of 5 fell between the two writes");
    // What a guest reads that is booted from such disks alone, and that goes on from the whole state.
    worker.ok(&["fork", "instant-1", "--name", "booted"]);
    let both = read_both(&worker, "booted");
    assert!(both[0] == both[1] || both[0] == both[1] + 1, "{both:?}");
    worker.ok(&["fork", "instant-4", "--name", "going-on"]);
    // The writer goes on in the fork.
    until(LONG, || read_both(&worker, "going-on")[0] > earlier);
    worker.shell(
        "going-on",
        "pkill -f 'python3 [/]root/writer'; while pgrep -f 'python3 [/]root/writer'; do sleep 0.1; done",
    );
    let both = read_both(&worker, "going-on");
    assert!(both[0] == both[1] || both[0] == both[1] + 1, "{both:?}");
}

/// What a guest reads from its two disks.
fn read_both(worker: &Worker, sandbox: &str) -> Vec<u64> {
    let read = worker.ok(&["exec", "-n", sandbox, "--", "python3", "-c", READ_BOTH]);
    read.split(' ')
        .map(|word| word.parse().expect("number"))
        .collect()
}

/// How soon a guest must be thawed; by itself it thaws 20 s after the freeze.
const THAWED_WITHIN: Duration = Duration::from_secs(15);

/// Whether the guest accepts a command now; a frozen one does not.
fn accepts(worker: &Worker, sandbox: &str) -> bool {
    let asked = worker.run(&["--wait", "0", "exec", "-n", sandbox, "--", "true"]);
    asked.status.success()
}

/// The guest's file systems take writes. What has to be undone first is not part of the time.
fn takes_writes(worker: &Worker, sandbox: &str) {
    worker.ok(&["ls"]);
    until(THAWED_WITHIN, || accepts(worker, sandbox));
    worker.shell(sandbox, "echo x >> /root/written; sync");
}

/// Runs `act` on each new overlay as soon as it is there.
fn on_new_layer<T>(
    worker: &Worker,
    act: impl Fn(&Path) + Sync,
    work: impl FnOnce() -> T,
) -> (T, u32) {
    let folder = worker.data.join("layers");
    let known: BTreeSet<PathBuf> = files_below(&folder)
        .into_iter()
        .map(|(path, _)| path)
        .collect();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut seen = known.clone();
            let mut met = 0;
            while !done.load(Ordering::SeqCst) {
                for entry in fs::read_dir(&folder).expect("list").flatten() {
                    let path = entry.path();
                    let is_temporary = entry.file_name().to_string_lossy().starts_with('.');
                    if !is_temporary && seen.insert(path.clone()) {
                        act(&path);
                        met += 1;
                    }
                }
                thread::sleep(Duration::from_millis(1));
            }
            met
        });
        let result = work();
        done.store(true, Ordering::SeqCst);
        (result, watching.join().expect("watcher"))
    })
}

#[test]
fn a_disk_only_checkpoint_boots_whole_and_file_systems_thaw_on_every_path() {
    let worker = Worker::with_own_store();
    worker.boot("web");
    worker.shell("web", FILL);
    // Written, and not synced: the freeze must bring it to the disk.
    worker.shell(
        "web",
        LIST.replace(
            "sync",
            "head -c 3000000 /dev/urandom > /root/unsynced; sha256sum /root/unsynced >> /root/sums",
        )
        .as_str(),
    );
    let made = worker.json(&[
        "checkpoint",
        "create",
        "web",
        "--name",
        "disks",
        "--disk-only",
    ]);
    assert_eq!(
        (&made["checkpoint"]["kind"], &made["checkpoint"]["ram"]),
        (&"disk-only".into(), &Value::Null)
    );
    takes_writes(&worker, "web");
    let (list, commits) = look_at_files(&worker, "web");

    // The new overlay is broken before QEMU opens it: by then the guest's file systems are frozen.
    let (error, met) = on_new_layer(
        &worker,
        |path| fs::write(path, b"no image").expect("break"),
        || {
            worker.fails(
                &[
                    "checkpoint",
                    "create",
                    "web",
                    "--name",
                    "never",
                    "--disk-only",
                ],
                9,
            )
        },
    );
    assert_eq!((met, &error["kind"]), (1, &"vm".into()), "{error}");
    takes_writes(&worker, "web");
    let (error, met) = on_new_layer(
        &worker,
        |path| fs::write(path, b"no image").expect("break"),
        || worker.fails(&["checkpoint", "create", "web", "--name", "never"], 9),
    );
    assert_eq!((met, &error["kind"]), (1, &"vm".into()), "{error}");
    takes_writes(&worker, "web");
    // stead is killed before, in and after the freeze.
    for (at, frozen) in [("capture", false), ("frozen", true), ("captured", false)] {
        let at = format!("checkpoint:{at}");
        let create = [
            "checkpoint",
            "create",
            "web",
            "--name",
            "killed",
            "--disk-only",
        ];
        let mut stopped = worker.stopped_at(&create, &at);
        assert_eq!(!accepts(&worker, "web"), frozen, "{at}");
        stopped.kill().expect("kill");
        stopped.wait().expect("wait");
        takes_writes(&worker, "web");
    }
    an_interrupted_checkpoint_is_undone(&worker);
    assert_eq!(
        look_at_files(&worker, "web"),
        (list.clone(), commits.clone())
    );
    let names: Vec<Value> = worker
        .checkpoints()
        .iter()
        .map(|entry| entry["name"].clone())
        .collect();
    assert_eq!(names, ["disks"], "what failed is not listed");
    let layers = worker
        .files()
        .into_iter()
        .filter(|file| file.starts_with("layers/"))
        .count();
    let in_use = worker.json(&["show", "web"])["disks"][0]["layers"]
        .as_u64()
        .expect("layers");
    assert_eq!(layers as u64, in_use, "no overlay is left behind");

    two_commands_on_one_vm_wait_or_are_refused(&worker);

    let forked = worker.json(&["fork", "disks", "--name", "booted"]);
    assert_eq!(forked[0]["verified_bytes"], 2_u64 << 30, "{forked}");
    assert_eq!(look_at_files(&worker, "booted"), (list, commits));
    assert_eq!(
        worker.shell(
            "booted",
            "dmesg | grep -ciE 'ext4.*(recover|orphan)'; ls /run/keeper 2>&1 | grep -c 'No such'"
        ),
        "0\n1",
        "nothing had to be repaired, and nothing of RAM is there"
    );
    takes_writes(&worker, "booted");
}

/// Reads a child's JSON events until one holds.
fn until_event(
    lines: &mut impl Iterator<Item = std::io::Result<String>>,
    holds: impl Fn(&Value) -> bool,
) {
    for line in lines {
        let event: Value = serde_json::from_str(&line.expect("read")).expect("JSON");
        if holds(&event) {
            return;
        }
    }
    panic!("the command ended before");
}

/// As with Ctrl-C while it is published.
fn an_interrupted_checkpoint_is_undone(worker: &Worker) {
    let create = ["--json", "checkpoint", "create", "web", "--name", "never"];
    let child = worker.stopped_at(&create, "checkpoint:read-back");
    child.send("INT");
    child.send("CONT");
    let ended = child.output();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{said}");
    takes_writes(worker, "web");
    let leases = Path::new(&worker.store).join("leases");
    assert_eq!(
        fs::read_dir(leases).expect("list").count(),
        0,
        "no lease is left"
    );
}

fn two_commands_on_one_vm_wait_or_are_refused(worker: &Worker) {
    let create = ["--json", "checkpoint", "create", "web", "--name", "held"];
    let holder = worker.stopped_at(&create, "checkpoint:publish");
    let pid = holder.id().to_string();
    for args in [
        vec![
            "--wait",
            "0",
            "checkpoint",
            "create",
            "web",
            "--name",
            "refused",
        ],
        vec!["--wait", "0", "stop", "web"],
        vec!["--wait", "0", "rm", "--force", "web"],
        vec!["--wait", "0", "hibernate", "web"],
        vec!["--wait", "0", "restore", "web", "disks"],
        vec!["--wait", "1", "start", "web"],
    ] {
        let error = worker.fails(&args, 4);
        assert_eq!(error["kind"], "conflict", "{error}");
        let found = error["found"].as_str().expect("found");
        assert!(
            found.contains("checkpoint") && found.contains(&pid),
            "who holds it is not named: {error}"
        );
        assert!(
            error["left"].is_string() && error["next"].is_string(),
            "{error}"
        );
    }
    // What only looks, or only talks to the guest, is not held up.
    assert_eq!(worker.state("web"), "running");
    takes_writes(worker, "web");
    let mut waiting = worker.spawn(&[
        "--json",
        "--wait",
        "300",
        "checkpoint",
        "create",
        "web",
        "--name",
        "waited",
        "--disk-only",
    ]);
    // It says whom it waits for.
    let mut events = BufReader::new(waiting.stderr.take().expect("piped")).lines();
    until_event(&mut events, |event| {
        event["event"] == "notice" && event.to_string().contains(&pid)
    });
    holder.send("CONT");
    let held = holder.output();
    let said = String::from_utf8_lossy(&held.stderr);
    assert!(held.status.success(), "{said}");
    let said: Vec<String> = events.map(|line| line.expect("read")).collect();
    assert!(waiting.wait().expect("wait").success(), "{said:?}");
    let names: BTreeSet<String> = worker
        .checkpoints()
        .iter()
        .map(|entry| entry["name"].to_string())
        .collect();
    assert_eq!(
        names,
        BTreeSet::from(["disks", "held", "waited"].map(|name| format!("{name:?}")))
    );
    for name in ["held", "waited"] {
        worker.ok(&["checkpoint", "rm", name]);
    }
}

#[test]
fn a_host_without_a_working_qemu_is_told_so_before_anything_is_started() {
    let worker = Worker::on(golden_store());
    let programs = worker.data.join("programs");
    fs::create_dir_all(&programs).expect("folder");
    let wrapper = programs.join("qemu-system-x86_64");
    fs::write(&wrapper, "#!/bin/sh\necho 'this is no QEMU' >&2\nexit 3\n").expect("write");
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).expect("mode");
    let path = format!(
        "{}:{}",
        programs.display(),
        std::env::var("PATH").expect("PATH")
    );
    for (path, status) in [
        (path, 9),
        (worker.data.join("empty").display().to_string(), 9),
    ] {
        let output = worker
            .command(&["--json", "create", TEMPLATE, "--name", "never"])
            .env("PATH", &path)
            .output()
            .expect("run stead");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert!(said.contains("qemu-system-x86_64"), "{said}");
        assert_eq!(worker.json(&["ls"]), Value::Array(Vec::new()));
    }
    until(Duration::from_secs(5), || worker.qemus().is_empty());
}
