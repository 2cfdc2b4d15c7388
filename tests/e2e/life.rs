//! The life of sandboxes and templates: made, found by name, stopped, started, removed, and what their QEMUs may do.
#![allow(
    clippy::disallowed_methods,
    reason = "tests write scratch files that nobody keeps"
)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use stead_tests::{
    TEMPLATE, Worker, files_below, finish, golden_store, kill, memory_folders_of, until,
};

const MIB: u64 = 1 << 20;

/// The folder that a sandbox's QEMU works in.
fn run_folder(pid: i32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/cwd")).expect("it runs")
}

/// The error says to do this.
fn assert_next(error: &Value, what: &str) {
    let next = error["next"].as_str().unwrap_or_default();
    assert!(next.contains(what), "{what} is not the next step: {error}");
}

fn column(table: &str, name: &str, at: usize) -> String {
    table
        .lines()
        .map(|line| {
            line.split("  ")
                .filter(|cell| !cell.is_empty())
                .collect::<Vec<_>>()
        })
        .find(|cells| cells[0].trim() == name)
        .unwrap_or_else(|| panic!("{name} is not in {table}"))[at]
        .trim()
        .to_owned()
}

#[test]
fn a_sandbox_keeps_its_disk_from_stop_to_start_and_leaves_nothing_when_removed() {
    let worker = Worker::on(golden_store());
    let made = worker.json(&["create", TEMPLATE, "--name", "web"]);
    assert_eq!(
        (&made["name"], &made["state"]),
        (&"web".into(), &"running".into())
    );
    let id = made["id"].as_str().expect("id").to_owned();
    let launch = run_folder(worker.pid("web"));
    let launch = launch
        .file_name()
        .expect("name")
        .to_string_lossy()
        .into_owned();
    assert_eq!(worker.json(&["show", &id])["epoch"], made["epoch"]);
    assert_eq!(worker.json(&["ls"]).as_array().map(Vec::len), Some(1));
    assert_eq!(column(&worker.ok(&["ls"]), "web", 2), "running");
    assert!(worker.ok(&["show", "web"]).contains(&id));

    // What does not fit its state is refused and changes nothing.
    for (args, next) in [
        (vec!["start", "web"], "stead stop web"),
        (vec!["wake", "web"], "stead stop web"),
        (vec!["rm", "web"], "stead rm --force web"),
        (
            vec!["create", TEMPLATE, "--name", "web", "--no-agent"],
            "choose another name",
        ),
        (
            vec!["fork", "no-checkpoint", "--name", "web"],
            "stead rm web",
        ),
    ] {
        let error = worker.fails(&args, 4);
        assert_eq!(error["kind"], "conflict", "{error}");
        assert_next(&error, next);
    }
    assert_eq!(worker.qemus(), [worker.pid("web")]);

    worker.shell(
        "web",
        "echo kept > /root/kept; echo gone > /run/gone; echo on-the-console > /dev/ttyS0",
    );
    let boot = worker.shell("web", "cat /proc/sys/kernel/random/boot_id");
    let followed = worker.spawn(&["logs", "--follow", "web"]);
    until(Duration::from_secs(10), || {
        worker.ok(&["logs", "web"]).contains("on-the-console")
    });
    assert_eq!(worker.ok(&["logs", "--tail", "0", "web"]), "");
    assert_eq!(
        worker.ok(&["logs", "--tail", "1", "web"]).lines().count(),
        1
    );

    let ended = worker.run(&["--json", "stop", "web"]);
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        ended.status.success() && !said.contains("cutting its power"),
        "the guest was not asked to shut down: {said}"
    );
    let stopped: Value = serde_json::from_slice(&ended.stdout).expect("JSON");
    assert_eq!(
        (&stopped["state"], &stopped["pid"]),
        (&"stopped".into(), &Value::Null)
    );
    let followed = finish(followed, b"");
    assert!(followed.status.success(), "following ends with the VM");
    assert!(String::from_utf8_lossy(&followed.stdout).contains("on-the-console"));
    assert!(worker.qemus().is_empty());
    assert!(
        memory_folders_of(&worker.data).is_empty(),
        "a stopped sandbox holds no memory"
    );
    assert!(
        worker.ok(&["logs", "web"]).contains("on-the-console"),
        "logs stay"
    );
    for args in [
        vec!["stop", "web"],
        vec!["checkpoint", "create", "web"],
        vec!["hibernate", "web"],
    ] {
        let error = worker.fails(&args, 4);
        assert_eq!(error["kind"], "conflict", "{args:?}");
        assert_next(&error, "stead start web");
    }
    let refused = worker.fails(&["exec", "web", "--", "true"], 125);
    assert_eq!(refused["kind"], "conflict", "{refused}");
    assert_next(&refused, "stead start web");

    assert_eq!(worker.ok(&["start", "web"]), "web");
    assert_eq!(
        worker.shell(
            "web",
            "cat /root/kept; ls /run/gone 2>&1 | grep -c .; dmesg | grep -ci 'ext4.*recover'; true"
        ),
        "kept\n1\n0"
    );
    assert_ne!(
        worker.shell("web", "cat /proc/sys/kernel/random/boot_id"),
        boot
    );

    assert_eq!(worker.ok(&["rm", "--force", "web"]), "web");
    worker.fails(&["show", "web"], 3);
    assert!(worker.qemus().is_empty());
    assert!(memory_folders_of(&worker.data).is_empty());
    let left: Vec<String> = worker.files();
    assert!(
        left.len() == 1 && left[0].starts_with("layers/") && left[0].ends_with(".raw"),
        "only the template's disk stays: {left:?}"
    );
    for (path, _) in files_below(&worker.data) {
        let name = path.display().to_string();
        assert!(
            !name.contains(&id) && !name.contains(&launch),
            "{name} stays"
        );
    }
}

#[test]
fn a_sandbox_is_found_by_its_name_its_id_and_a_beginning_that_only_one_id_has() {
    let worker = Worker::on(golden_store());
    for wrong in ["-x", "a b", "../a", "", "a/b", &"x".repeat(65)] {
        let error = worker.fails(&["create", TEMPLATE, &format!("--name={wrong}")], 2);
        assert_eq!(error["kind"], "usage", "{error}");
    }
    assert_eq!(
        worker.json(&["ls"]),
        Value::Array(Vec::new()),
        "nothing is left of them"
    );

    // Sixteen beginnings are possible: at the latest the seventeenth id begins as another one does.
    let mut ids: Vec<String> = Vec::new();
    let twins = loop {
        assert!(ids.len() < 17, "{ids:?}");
        let made = worker.json(&["create", TEMPLATE, "--no-agent", "--memory", "128M"]);
        let id = made["id"].as_str().expect("id").to_owned();
        assert_eq!(
            made["name"], made["id"],
            "without a name, the id is the name"
        );
        assert_eq!(made["epoch"], Value::Null, "nobody waited for an agent");
        let twin = ids.iter().find(|other| other[..1] == id[..1]).cloned();
        worker.ok(&["stop", "--force", &id]);
        ids.push(id.clone());
        if let Some(twin) = twin {
            break [twin, id];
        }
    };
    let error = worker.fails(&["show", &twins[0][..1]], 2);
    assert_eq!(error["kind"], "usage", "{error}");
    assert!(error["next"].is_string(), "{error}");
    let error = worker.fails(&["rm", &twins[0][..1]], 2);
    assert_eq!(error["kind"], "usage", "{error}");
    let shared = twins[0]
        .bytes()
        .zip(twins[1].bytes())
        .take_while(|(a, b)| a == b)
        .count();
    for twin in &twins {
        let shown = worker.json(&["show", &twin[..=shared]]);
        assert_eq!(shown["id"], twin.as_str());
        assert_eq!(worker.json(&["show", twin])["id"], twin.as_str());
    }
    assert_eq!(
        worker.json(&["ls"]).as_array().map(Vec::len),
        Some(ids.len())
    );

    // Several at once; one that is not there stops it, and says so.
    let [first, second] = &twins;
    worker.fails(&["rm", first, "nope", second], 3);
    worker.fails(&["show", first], 3);
    assert_eq!(worker.json(&["show", second])["state"], "stopped");
}

#[test]
fn a_create_that_cannot_be_is_refused_before_anything_is_made() {
    let worker = Worker::on(golden_store());
    for args in [
        vec!["--memory", "1M"],
        vec!["--memory", "513K"],
        vec!["--memory", "65537K"],
        vec!["--disk-size", "1M"],
        vec!["--disk", "0"],
        vec!["--disk", "513"],
        vec!["--disk", "9E"],
    ] {
        let mut create = vec!["create", TEMPLATE, "--name", "never"];
        create.extend(&args);
        assert_eq!(worker.fails(&create, 2)["kind"], "usage", "{args:?}");
    }
    let mut many = vec!["create", TEMPLATE, "--name", "never"];
    many.extend(["--disk", "1M"].repeat(16));
    worker.fails(&many, 2);
    // More than the host has is refused beforehand where RAM lies in memory, else a start that fails and is undone.
    let reflinks = worker.ok(&["doctor"]).contains("system shares blocks");
    let error = worker.fails(
        &[
            "create", TEMPLATE, "--name", "never", "--memory", "8388608G",
        ],
        if reflinks { 9 } else { 7 },
    );
    assert!(
        error["found"]
            .as_str()
            .is_some_and(|found| !found.is_empty()),
        "{error}"
    );
    if worker
        .run(&["create", TEMPLATE, "--accelerator", "kvm", "--name", "kvm"])
        .status
        .success()
    {
        assert_eq!(worker.json(&["show", "kvm"])["accelerator"], "kvm");
        worker.ok(&["rm", "--force", "kvm"]);
    } else {
        let error = worker.fails(&["create", TEMPLATE, "--accelerator", "kvm"], 6);
        assert!(
            error["next"]
                .as_str()
                .is_some_and(|next| next.contains("tcg")),
            "{error}"
        );
    }
    an_interrupted_create_is_undone(&worker);
    assert_eq!(worker.json(&["ls"]), Value::Array(Vec::new()));
    assert!(worker.qemus().is_empty());
    assert!(memory_folders_of(&worker.data).is_empty());
    let left = worker.files();
    assert!(left.iter().all(|file| file.ends_with(".raw")), "{left:?}");
}

/// As with Ctrl-C while the guest boots.
fn an_interrupted_create_is_undone(worker: &Worker) {
    let mut child = worker.spawn(&["--json", "create", TEMPLATE, "--name", "never"]);
    let mut events = BufReader::new(child.stderr.take().expect("piped")).lines();
    let boots =
        |line: &std::io::Result<String>| line.as_ref().expect("read").contains("\"step\":\"boot\"");
    assert!(events.any(|line| boots(&line)), "it boots");
    until(Duration::from_secs(60), || !worker.qemus().is_empty());
    let sent = Command::new("/bin/kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(sent.expect("kill").success());
    let begun = Instant::now();
    let said: Vec<String> = events.map(|line| line.expect("read")).collect();
    assert_eq!(child.wait().expect("wait").code(), Some(130), "{said:?}");
    assert!(
        begun.elapsed() < Duration::from_secs(60),
        "{:?}",
        begun.elapsed()
    );
    assert!(
        said.iter().any(|line| line.contains("\"cancelled\"")),
        "{said:?}"
    );
}

fn status_field(pid: i32, field: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .expect("status")
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {field}"))
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// Inodes of the sockets that a process has open.
fn sockets(pid: i32) -> BTreeSet<String> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("descriptors")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|target| {
            let name = target.to_string_lossy().into_owned();
            Some(
                name.strip_prefix("socket:[")?
                    .trim_end_matches(']')
                    .to_owned(),
            )
        })
        .collect()
}

/// Inodes of the sockets in one of `/proc/PID/net`'s tables.
fn inodes_of(pid: i32, table: &str) -> BTreeSet<String> {
    let at = if table == "unix" { 6 } else { 9 };
    fs::read_to_string(format!("/proc/{pid}/net/{table}"))
        .unwrap_or_default()
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(at).map(str::to_owned))
        .collect()
}

/// Whether a process with the ids of `pid` can open a file so.
fn can_open(pid: i32, path: &Path, how: &str) -> bool {
    let id = |field| {
        let ids = status_field(pid, field);
        ids.split(' ')
            .next()
            .and_then(|id| id.parse::<u32>().ok())
            .expect("an id")
    };
    let script = match how {
        "read" => "exec 3< \"$1\"",
        "write" => "exec 3<> \"$1\"",
        "list" => "ls \"$1\" > /dev/null",
        other => panic!("{other}"),
    };
    Command::new("/bin/sh")
        .args(["-c", script, "sh"])
        .arg(path)
        .gid(id("Gid"))
        .uid(id("Uid"))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("run sh")
        .success()
}

fn disk_files(worker: &Worker, sandbox: &str) -> Vec<PathBuf> {
    let shown = worker.json(&["show", sandbox]);
    let disks = shown["disks"].as_array().expect("disks");
    disks
        .iter()
        .map(|disk| PathBuf::from(disk["file"].as_str().expect("file")))
        .collect()
}

fn ram_file(pid: i32) -> PathBuf {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    maps.lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .find(|path| path.ends_with("/ram") || path.ends_with(".ram"))
        .map(PathBuf::from)
        .unwrap_or_else(|| panic!("no RAM in {maps}"))
}

#[test]
fn the_guest_has_the_machine_that_was_asked_for_and_its_qemu_only_the_rights_it_needs() {
    let worker = Worker::with_own_store();
    let made = worker.json(&[
        "create",
        TEMPLATE,
        "--name",
        "big",
        "--memory",
        "384M",
        "--cpus",
        "2",
        "--disk-size",
        "3G",
        "--disk",
        "100M",
        "--disk",
        "1.5G",
    ]);
    assert_eq!(
        (&made["memory_bytes"], &made["cpus"]),
        (&(384 * MIB).into(), &2.into())
    );
    let sizes: Vec<u64> = made["disks"]
        .as_array()
        .expect("disks")
        .iter()
        .map(|disk| disk["size_bytes"].as_u64().expect("size"))
        .collect();
    assert_eq!(sizes, [3 << 30, 100 * MIB, 3 << 29]);

    let seen = worker.shell(
        "big",
        "for d in vda vdb vdc; do cat /sys/block/$d/size; done; nproc; awk '/MemTotal/ {print $2}' /proc/meminfo; hostname; ls /sys/class/net",
    );
    let seen: Vec<&str> = seen.lines().collect();
    let sectors: Vec<u64> = seen[..3]
        .iter()
        .map(|line| line.parse().expect("sectors"))
        .collect();
    assert_eq!(
        sectors,
        sizes.iter().map(|size| size / 512).collect::<Vec<_>>()
    );
    assert_eq!(seen[3], "2");
    let memory_kib: u64 = seen[4].parse().expect("KiB");
    assert!(
        (300 << 10..=384 << 10).contains(&memory_kib),
        "{memory_kib} KiB"
    );
    assert_eq!(seen[6..], ["lo"], "a guest has no network");
    let written = worker.shell(
        "big",
        "head -c 3000000 /dev/urandom > /dev/vdc; sync; sha256sum < /dev/vdc",
    );
    worker.ok(&["checkpoint", "create", "big", "--name", "big-state"]);
    worker.ok(&["fork", "big-state", "--name", "fork"]);
    worker.ok(&[
        "create",
        TEMPLATE,
        "--name",
        "other",
        "--no-agent",
        "--memory",
        "64M",
    ]);

    let pids: Vec<i32> = ["big", "fork", "other"]
        .map(|name| worker.pid(name))
        .to_vec();
    let users: BTreeSet<String> = pids.iter().map(|pid| status_field(*pid, "Uid")).collect();
    assert_eq!(users.len(), 3, "each VM has a user of its own");
    for pid in &pids {
        has_few_rights(*pid);
        reaches_only_its_own(&worker, *pid, &pids);
    }
    cannot_touch_what_is_frozen(&worker, pids[0]);
    let read = "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /dev/vdc";
    assert_eq!(worker.shell("fork", read), written);
}

fn has_few_rights(pid: i32) {
    let ids: Vec<String> = ["Uid", "Gid"]
        .map(|field| status_field(pid, field))
        .to_vec();
    for id in ids.iter().flat_map(|ids| ids.split(' ')) {
        assert!(id.parse::<u32>().expect("id") >= 0x6000_0000, "{ids:?}");
    }
    assert_eq!(status_field(pid, "Groups"), "", "no supplementary group");
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert_eq!(status_field(pid, set).trim_start_matches('0'), "", "{set}");
    }
    assert_eq!(
        status_field(pid, "Seccomp"),
        "2",
        "QEMU filters its own system calls"
    );
    assert_eq!(status_field(pid, "PPid"), "1", "it belongs to no command");
    let folder = run_folder(pid);
    let metadata = fs::metadata(&folder).expect("run folder");
    assert_eq!(
        metadata.permissions().mode() & 0o7777,
        0o700,
        "{}",
        folder.display()
    );
    assert_eq!(
        metadata.uid().to_string(),
        status_field(pid, "Uid").split(' ').next().expect("id")
    );

    let own = sockets(pid);
    assert!(!own.is_empty());
    for table in [
        "tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet", "netlink",
    ] {
        let at = match table {
            "packet" => 8,
            _ => 9,
        };
        let listed: BTreeSet<String> = fs::read_to_string(format!("/proc/{pid}/net/{table}"))
            .unwrap_or_default()
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().nth(at).map(str::to_owned))
            .collect();
        assert!(own.is_disjoint(&listed), "QEMU has a {table} socket");
    }
    assert!(
        own.is_subset(&inodes_of(pid, "unix")),
        "every socket is a local one"
    );
}

fn reaches_only_its_own(worker: &Worker, pid: i32, all: &[i32]) {
    for sandbox in ["big", "fork", "other"] {
        let target = worker.pid(sandbox);
        let own = target == pid;
        let mut files = disk_files(worker, sandbox);
        files.push(run_folder(target).join("serial.log"));
        let ram = ram_file(target);
        let is_image = ram.starts_with(worker.data.join("ram"));
        if !is_image {
            files.push(ram);
        }
        for file in files {
            assert_eq!(
                can_open(pid, &file, "read"),
                own,
                "{} of {sandbox} by {pid}",
                file.display()
            );
            assert_eq!(
                can_open(pid, &file, "write"),
                own,
                "{} of {sandbox} by {pid}",
                file.display()
            );
        }
        assert_eq!(
            can_open(pid, &run_folder(target), "list"),
            own,
            "folder of {sandbox} by {pid}"
        );
    }
    assert!(all.contains(&pid));
}

/// `pid` is a VM that was made of none of the images.
fn cannot_touch_what_is_frozen(worker: &Worker, pid: i32) {
    let mut looked_at = 0;
    for folder in ["layers", "blobs"] {
        for (file, _) in files_below(&worker.data.join(folder)) {
            let mine = disk_files(worker, "big").contains(&file);
            assert!(mine || !can_open(pid, &file, "write"), "{}", file.display());
            looked_at += 1;
        }
    }
    for (file, _) in files_below(&worker.data.join("ram")) {
        assert!(!can_open(pid, &file, "read"), "{}", file.display());
        looked_at += 1;
    }
    assert!(looked_at > 5);
    for file in [
        "stead.db", "locks", "cache", "build", "layers", "ram", "run", ".",
    ] {
        let path = worker.data.join(file);
        let how = if path.is_dir() { "list" } else { "read" };
        assert!(!can_open(pid, &path, how), "{}", path.display());
    }
}

#[test]
fn a_vm_outlives_every_command_and_a_dead_vm_is_noticed_and_can_be_started() {
    let worker = Worker::on(golden_store());
    // As a terminal that is closed would: everything in the command's session is killed.
    let mut create = worker.command(&["create", TEMPLATE, "--name", "web"]);
    create
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = create.spawn().expect("start stead");
    let group = child.id();
    assert!(child.wait_with_output().expect("wait").status.success());
    Command::new("/bin/kill")
        .args(["-KILL", "--", &format!("-{group}")])
        .stderr(Stdio::null())
        .status()
        .expect("kill the group");
    let pid = worker.pid("web");

    let mut running = worker.spawn(&[
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        "echo begun; exec sleep 1000",
    ]);
    let mut begun = [0; 6];
    running
        .stdout
        .as_mut()
        .expect("piped")
        .read_exact(&mut begun)
        .expect("it begins");
    let mut followed = worker.spawn(&["logs", "--follow", "web"]);
    for child in [&mut running, &mut followed] {
        child.kill().expect("kill -9");
        child.wait().expect("wait");
    }
    assert_eq!(worker.shell("web", "echo alive"), "alive");
    assert_eq!(
        (worker.pid("web"), worker.state("web").as_str()),
        (pid, "running")
    );
    worker.shell("web", "echo synced > /root/synced; sync");

    kill(pid);
    assert_eq!(worker.state("web"), "crashed");
    assert_eq!(column(&worker.ok(&["ls"]), "web", 2), "crashed");
    let error = worker.fails(&["exec", "web", "--", "true"], 125);
    assert_eq!(error["kind"], "conflict", "{error}");
    worker.fails(&["checkpoint", "create", "web"], 4);
    worker.ok(&["logs", "web"]);
    worker.ok(&["start", "web"]);
    assert_eq!(worker.shell("web", "cat /root/synced"), "synced");
    assert_eq!(worker.qemus().len(), 1);

    // The guest may also switch itself off.
    worker.run(&[
        "exec",
        "-n",
        "web",
        "--",
        "systemctl",
        "poweroff",
        "--force",
        "--force",
    ]);
    until(Duration::from_secs(30), || worker.state("web") != "running");
    let state = worker.state("web");
    assert!(state == "crashed" || state == "stopped", "{state}");
    assert!(worker.qemus().is_empty());
    worker.ok(&["rm", "web"]);
    assert!(memory_folders_of(&worker.data).is_empty());
}

#[test]
fn removing_a_template_keeps_sandboxes_and_checkpoints_made_of_it() {
    let worker = Worker::with_own_store();
    worker.boot("web");
    worker.shell(
        "web",
        "sha256sum /usr/bin/* > /root/sums 2>/dev/null; echo ram > /run/ram; sync",
    );
    worker.ok(&["checkpoint", "create", "web", "--name", "state"]);
    assert_eq!(
        worker.json(&["template", "rm", TEMPLATE])["removed"],
        TEMPLATE
    );
    worker.fails(&["template", "show", TEMPLATE], 3);
    worker.fails(&["create", TEMPLATE], 3);
    assert_eq!(worker.json(&["template", "ls"]), Value::Array(Vec::new()));
    worker.json(&["gc"]);
    let check =
        "echo 3 > /proc/sys/vm/drop_caches; sha256sum -c --quiet /root/sums && cat /run/ram";
    assert_eq!(worker.shell("web", check), "ram");
    worker.ok(&["fork", "state", "--name", "here"]);
    assert_eq!(worker.shell("here", check), "ram");
    worker.ok(&["stop", "web", "--force"]);
    // Another worker has never had the template.
    let other = Worker::on(Path::new(&worker.store));
    let forked = other.json(&["fork", "state", "--name", "there"]);
    assert!(
        forked[0]["fetched_bytes"]
            .as_u64()
            .is_some_and(|bytes| bytes > MIB),
        "{forked}"
    );
    assert_eq!(other.shell("there", check), "ram");
    assert_eq!(
        worker.json(&["verify"])["damaged"],
        Value::Array(Vec::new())
    );
    worker.ok(&["rm", "--force", "web", "here"]);
    let left = worker.files();
    assert!(
        left.iter().any(|file| file.starts_with("ram/")),
        "the checkpoint is still here: {left:?}"
    );
    worker.ok(&["checkpoint", "rm", "state"]);
    assert_eq!(
        worker.files(),
        Vec::<String>::new(),
        "with the last user the disk goes too"
    );
}

/// The three files that a template was built of.
fn parts_of_template(worker: &Worker) -> (PathBuf, PathBuf, PathBuf) {
    let template = worker.json(&["template", "show", TEMPLATE]);
    let blob = |name: &str| {
        let wanted = template[name].as_str().expect("a hash").to_owned();
        files_below(&worker.data.join("blobs"))
            .into_iter()
            .map(|(path, _)| path)
            .find(|path| path.display().to_string().contains(&wanted))
            .unwrap_or_else(|| panic!("no blob {wanted}"))
    };
    let disk = files_below(&worker.data.join("layers"))
        .into_iter()
        .map(|(path, _)| path)
        .find(|path| path.extension().is_some_and(|end| end == "raw"))
        .expect("the template's disk");
    (disk, blob("kernel"), blob("initrd"))
}

fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img")
        .args(args)
        .output()
        .expect("run qemu-img");
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn an_own_disk_kernel_and_initramfs_become_a_template_unless_they_are_not_what_they_should_be() {
    let worker = Worker::with_own_store();
    worker.ok(&[
        "create",
        TEMPLATE,
        "--name",
        "first",
        "--no-agent",
        "--memory",
        "64M",
    ]);
    worker.ok(&["rm", "--force", "first"]);
    let (disk, kernel, initrd) = parts_of_template(&worker);
    let own = worker.data.join("own");
    fs::create_dir_all(&own).expect("folder");
    let path = |name: &str| own.join(name).display().to_string();
    let (raw, qcow2, backed) = (path("disk.raw"), path("disk.qcow2"), path("backed.qcow2"));
    let disk = disk.display().to_string();
    qemu_img(&["convert", "-O", "raw", "-f", "raw", &disk, &raw]);
    qemu_img(&["convert", "-c", "-O", "qcow2", "-f", "raw", &disk, &qcow2]);
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &raw, "-F", "raw", &backed,
    ]);
    let secret = path("secret");
    fs::write(&secret, b"HOST-SECRET".repeat(1000)).expect("write");
    let leaking = path("leaking.qcow2");
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", &secret, "-F", "raw", &leaking,
    ]);
    let data_file = path("data-file.qcow2");
    let outside = format!("data_file={},data_file_raw=on", path("outside.raw"));
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-o", &outside, &data_file, "64M",
    ]);
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());

    let import = |name: &'static str, disk: &str, kernel: &str, initrd: &str| {
        [
            "template", "import", name, "--disk", disk, "--kernel", kernel, "--initrd", initrd,
        ]
        .map(str::to_owned)
    };
    for (disk, kernel, initrd) in [
        (&backed, &kernel, &initrd),
        (&leaking, &kernel, &initrd),
        (&data_file, &kernel, &initrd),
        (&raw, &secret, &initrd),
        (&raw, &kernel, &secret),
        (&own.display().to_string(), &kernel, &initrd),
        (&path("not-there"), &kernel, &initrd),
    ] {
        let args = import("bad", disk, kernel, initrd);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let error = worker.fails(&args, 2);
        assert_eq!(error["kind"], "usage", "{error}");
        let found = error["found"].as_str().expect("found");
        assert!(
            found.contains(&own.display().to_string()),
            "the file is not named: {error}"
        );
        assert!(!found.contains("HOST-SECRET"), "{error}");
    }
    assert_eq!(
        worker.json(&["template", "ls"]).as_array().map(Vec::len),
        Some(1)
    );

    let content = worker.json(&["template", "show", TEMPLATE])["disk_content"].clone();
    for (name, disk) in [("mine-raw", &raw), ("mine", &qcow2)] {
        let args = import(name, disk, &kernel, &initrd);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let made = worker.json(&args);
        assert_eq!(made["disk_content"], content, "not a byte differs: {made}");
        assert_eq!(worker.fails(&args, 4)["kind"], "conflict");
    }
    let names = worker.ok(&["template", "ls"]);
    assert!(
        names.contains("mine-raw") && names.contains(TEMPLATE),
        "{names}"
    );
    fs::remove_dir_all(&own).expect("the files are not needed any more");
    worker.ok(&["template", "rm", "mine-raw"]);

    worker.ok(&["create", "mine", "--name", "web"]);
    assert_eq!(worker.shell("web", "findmnt -no FSTYPE /"), "ext4");
    worker.ok(&["rm", "--force", "web"]);

    // A template whose agent nobody waits for: no commands, yet the rest works.
    worker.ok(&["create", "mine", "--name", "mute", "--no-agent"]);
    let error = worker.fails(&["exec", "mute", "--", "true"], 125);
    assert_eq!(error["kind"], "agent", "{error}");
    assert!(error["next"].is_string(), "{error}");
    worker.ok(&["checkpoint", "create", "mute", "--name", "of-mute"]);
    worker.ok(&["fork", "of-mute", "--name", "mute-too"]);
    assert_eq!(worker.state("mute-too"), "running");
    let stopped = worker.json(&["stop", "--timeout", "1", "mute"]);
    assert_eq!(stopped["state"], "stopped");
}

#[test]
fn a_qemu_that_hangs_is_ended_by_stop_force_and_its_logs_stay() {
    let worker = Worker::on(golden_store());
    worker.boot("web");
    worker.shell(
        "web",
        "echo kept > /root/kept; sync; echo on-the-console > /dev/ttyS0",
    );
    let pid = worker.pid("web");
    stead_tests::signal(pid, "STOP");
    let error = worker.fails(&["stop", "web"], 9);
    assert_eq!(error["kind"], "vm", "{error}");
    assert_next(&error, "stead stop --force web");
    assert_eq!(worker.pid("web"), pid, "only force ends it");

    let begun = Instant::now();
    let stopped = worker.json(&["stop", "--force", "web"]);
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(stopped["state"], "stopped");
    assert!(worker.qemus().is_empty());
    assert!(
        memory_folders_of(&worker.data).is_empty(),
        "its memory is given back"
    );
    assert!(
        worker.ok(&["logs", "web"]).contains("on-the-console"),
        "logs stay"
    );
    worker.ok(&["start", "web"]);
    assert_eq!(worker.shell("web", "cat /root/kept"), "kept");
}
