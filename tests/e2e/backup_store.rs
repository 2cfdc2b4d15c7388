//! Backups in a store: whole or absent, only what changed is sent, and no damaged byte is restored. No guest is needed.
#![allow(
    clippy::disallowed_methods,
    reason = "tests damage and read files as they lie there"
)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use stead_sim::s3::{BUCKET, Server};
use stead_tests::{Worker, until};

const MIB: u64 = 1 << 20;

fn sh(line: &str) {
    let output = Command::new("sh").args(["-c", line]).output().expect("sh");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {text}");
}

/// A disk of 64 MiB, and a store for its backups that is not the worker's own.
struct World {
    worker: Worker,
    dir: tempfile::TempDir,
    url: String,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let url = dir.path().join("store").display().to_string();
        Self::at(dir, url, Vec::new())
    }

    fn at(dir: tempfile::TempDir, url: String, env: Vec<(String, String)>) -> Self {
        let own = dir.path().join("own").display().to_string();
        let mut worker = Worker::at(&dir.path().join("data"), &own);
        worker.env = env;
        let world = Self { worker, dir, url };
        world.keeper().ok(&["store", "init"]);
        sh(&format!("qemu-img create -q -f qcow2 {} 64M", world.disk()));
        let noise = world.dir.path().join("noise");
        let mut bytes = vec![0; 4 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        fs::write(&noise, bytes).expect("written");
        world.io(&format!("write -s {} 1M 4M", noise.display()));
        world.io("write -P 2 20M 100k");
        world
    }

    /// The same worker, for what is asked of the store itself.
    fn keeper(&self) -> Worker {
        Worker {
            data: self.worker.data.clone(),
            store: self.url.clone(),
            env: self.worker.env.clone(),
            keep: true,
        }
    }

    fn disk(&self) -> String {
        self.dir.path().join("disk.qcow2").display().to_string()
    }

    fn io(&self, command: &str) {
        sh(&format!("qemu-io -f qcow2 -c '{command}' {}", self.disk()));
    }

    fn line<'a>(&'a self, kind: &'a str, disk: &'a str) -> Vec<&'a str> {
        let to = ["--bitmap", "daily", "--to", &self.url];
        ["backup", kind, disk].into_iter().chain(to).collect()
    }

    fn make(&self, kind: &str) -> Value {
        let disk = self.disk();
        let made = self.worker.json(&self.line(kind, &disk));
        made["record"].clone()
    }

    fn list(&self) -> Vec<Value> {
        let listed = self.worker.json(&["backup", "ls", &self.url]);
        listed.as_array().expect("a list").clone()
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("restored")
    }

    /// Restores a backup in both formats: each is what QEMU's tools say that `disk` is.
    fn require(&self, id: &Value, disk: &str) {
        let (id, to) = (id.as_str().expect("an id"), self.target());
        let to = to.display().to_string();
        for format in ["raw", "qcow2"] {
            let line = [
                "backup", "restore", &self.url, id, &to, "--force", "--format",
            ];
            self.worker.ok(&[&line[..], &[format]].concat());
            sh(&format!(
                "qemu-img compare -f {format} -F qcow2 {to} {disk} >&2"
            ));
        }
    }

    fn saved(&self, name: &str) -> String {
        let copy = self.dir.path().join(name);
        fs::copy(self.disk(), &copy).expect("copied");
        copy.display().to_string()
    }

    fn is_whole(&self) {
        let verdicts = self.worker.json(&["backup", "verify", &self.url]);
        let verdicts = verdicts.as_array().expect("a list");
        assert!(verdicts.iter().all(|one| one["whole"] == true));
        assert_eq!(verdicts.len(), self.list().len());
    }
}

/// A full backup and increments, which send only what the bitmap names.
fn a_life(world: &World) {
    let full = world.make("full");
    let first = world.saved("first.qcow2");
    assert_eq!(full["kind"], "full");
    assert!(full["stored-bytes"].as_u64().expect("bytes") > 4 * MIB);
    world.io("write -P 3 30M 64k");
    world.io("write -z 2M 64k");
    let second = world.make("incremental");
    assert_eq!(second["kind"], "incremental", "{second}");
    assert_eq!(second["parent"], full["id"]);
    assert_eq!(second["changed-bytes"], 2 * 65536);
    assert!(second["stored-bytes"].as_u64().expect("bytes") < 65536);
    sh(&format!("qemu-img resize -q {} 66M", world.disk()));
    world.io("write -P 5 65M 4k");
    let third = world.make("incremental");
    assert_eq!(third["parent"], second["id"]);
    world.require(&third["id"], &world.disk());
    world.require(&full["id"], &first);
    world.is_whole();
}

#[test]
fn backups_in_a_store_restore_to_the_disk_of_their_time_and_an_increment_sends_what_changed() {
    a_life(&World::new());
}

#[test]
fn backups_in_a_bucket_restore_to_the_disk_of_their_time() {
    let dir = tempfile::tempdir().expect("folder");
    let server = Server::start(&dir.path().join("s3")).expect("server");
    let url = format!("s3://{BUCKET}/backups");
    a_life(&World::at(dir, url, server.variables()));
}

/// A QEMU without a machine that has the disk open, and an NBD server to write to it.
struct Daemon(std::process::Child);

impl Daemon {
    fn start(world: &World) -> Self {
        let at = world.dir.path().display();
        let started = Command::new("qemu-system-x86_64")
            .args(["-machine", "none", "-nodefaults", "-display", "none", "-S"])
            .arg("-blockdev")
            .arg(format!("driver=file,node-name=f,filename={}", world.disk()))
            .args(["-blockdev", "driver=qcow2,node-name=disk,file=f"])
            .arg("-qmp")
            .arg(format!("unix:{at}/qmp,server=on,wait=off"))
            .stdin(Stdio::null())
            .spawn();
        let daemon = Self(started.expect("QEMU"));
        let qmp = world.dir.path().join("qmp");
        let mut stream = None;
        until(Duration::from_secs(30), || {
            stream = UnixStream::connect(&qmp).ok();
            stream.is_some()
        });
        let mut stream = stream.expect("it listens");
        let address = json!({ "type": "unix", "data": { "path": format!("{at}/nbd") } });
        let export = json!({ "type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": true });
        let mut answers = BufReader::new(stream.try_clone().expect("cloned")).lines();
        for (command, arguments) in [
            ("qmp_capabilities", json!({})),
            ("nbd-server-start", json!({ "addr": address })),
            ("block-export-add", export),
        ] {
            let line = json!({ "execute": command, "arguments": arguments });
            writeln!(stream, "{line}").expect("sent");
            let is_answer = |line: &String| line.contains("\"return\"");
            let mut texts = answers.by_ref().map(|line| line.expect("an answer"));
            assert!(texts.any(|line| is_answer(&line)), "{command}");
        }
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn the_disk_of_a_vm_that_is_not_ours_is_backed_up_into_a_folder_and_a_store_while_it_runs() {
    let world = World::new();
    let daemon = Daemon::start(&world);
    let (at, disk) = (world.dir.path().display().to_string(), world.disk());
    let (qmp, folder) = (format!("{at}/qmp"), format!("{at}/folder"));
    let nbd = format!("nbd+unix:///disk?socket={at}/nbd");
    for (to, round) in [(&world.url, 0), (&folder, 1), (&world.url, 2), (&folder, 3)] {
        let (kind, bitmap) = match round {
            0 | 1 => ("full", if round == 0 { "stored" } else { "daily" }),
            _ => ("incremental", if round == 2 { "stored" } else { "daily" }),
        };
        let write = format!("write -P {} {}M 64k", round + 3, round + 40);
        sh(&format!("qemu-io -f raw -c '{write}' '{nbd}'"));
        let line = [
            "backup", kind, &disk, "--qmp", &qmp, "--bitmap", bitmap, "--to", to,
        ];
        let made = world.worker.json(&line);
        assert_eq!(made["record"]["kind"], kind, "{made}");
        let id = made["record"]["id"].as_str().expect("an id");
        let target = world.target().display().to_string();
        let restore = [
            "backup", "restore", to, id, &target, "--force", "--format", "raw",
        ];
        world.worker.ok(&restore);
        sh(&format!(
            "qemu-img compare -f raw -F raw {target} '{nbd}' >&2"
        ));
        if round > 1 {
            // The other place's backup and its bitmap are of no account.
            assert_eq!(made["record"]["changed-bytes"], 2 * 65536);
        }
    }
    // What the earlier backup has lost cannot be read again in the copy of what changed: all is copied.
    fs::remove_file(largest_pack(&world)).expect("lost");
    let line = ["backup", "incremental", &disk, "--qmp", &qmp];
    let line = [&line[..], &["--bitmap", "stored", "--to", &world.url]].concat();
    let made = world.worker.json(&line);
    assert_eq!(made["record"]["kind"], "full", "{made}");
    let id = made["record"]["id"].as_str().expect("an id");
    let target = world.target().display().to_string();
    let restore = [
        "backup", "restore", &world.url, id, &target, "--force", "--format", "raw",
    ];
    world.worker.ok(&restore);
    sh(&format!(
        "qemu-img compare -f raw -F raw {target} '{nbd}' >&2"
    ));
    // Whoever names another disk is told so, and the VM has no part in it.
    let other = world.saved("other.qcow2");
    let line = [
        "backup", "full", &other, "--qmp", &qmp, "--bitmap", "daily", "--to", &folder,
    ];
    world.worker.fails(&line, 2);
    drop(daemon);
}

fn packs(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("listed") {
        let path = entry.expect("listed").path();
        match path.is_dir() {
            true => packs(&path, found),
            false => found.push(path),
        }
    }
}

/// The file that has most of the chunks.
fn largest_pack(world: &World) -> PathBuf {
    let mut all = Vec::new();
    packs(Path::new(&format!("{}/packs", world.url)), &mut all);
    all.sort_by_key(|pack| fs::metadata(pack).expect("there").len());
    all.pop().expect("a pack")
}

#[test]
fn gc_keeps_what_backups_need_and_a_flipped_bit_is_found_before_a_disk_is_restored() {
    let world = World::new();
    let full = world.make("full");
    let first = world.saved("first.qcow2");
    world.io("write -P 3 30M 64k");
    let last = world.make("incremental");
    world.keeper().ok(&["gc"]);
    world.require(&full["id"], &first);
    world.require(&last["id"], &world.disk());

    let pack = &largest_pack(&world);
    let mut bytes = fs::read(pack).expect("read");
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(pack, bytes).expect("damaged");
    fs::write(world.target(), b"earlier").expect("written");
    let target = world.target().display().to_string();
    for id in [&full["id"], &last["id"]] {
        let id = id.as_str().expect("an id");
        let line = ["backup", "restore", &world.url, id, &target, "--force"];
        world.worker.fails(&line, 5);
        assert_eq!(fs::read(&target).expect("there"), b"earlier");
        assert!(
            world
                .worker
                .run(&["backup", "verify", &world.url])
                .status
                .code()
                == Some(5)
        );
    }
    // The first one is removed; what the last one needs stays.
    let id = full["id"].as_str().expect("an id");
    world.worker.ok(&["backup", "rm", &world.url, id]);
    assert_eq!(world.list().len(), 1);
    // What is lost is not built upon: where the bitmap does not say that it changed, the next backup reads it again.
    world.keeper().ok(&["gc"]);
    fs::remove_file(pack).expect("lost");
    world.io("write -P 4 31M 64k");
    let next = world.make("incremental");
    assert_eq!(next["kind"], "incremental", "{next}");
    world.require(&next["id"], &world.disk());
}

#[test]
fn a_backup_into_a_store_that_is_killed_at_any_step_is_whole_or_absent_and_forgets_no_change() {
    for kind in ["full", "incremental"] {
        let world = World::new();
        let first = world.make("full");
        let disk = world.disk();
        for (round, step) in ["begun", "copied", "read-back", "record", "recorded"]
            .into_iter()
            .enumerate()
        {
            let story = format!("{kind}, {step}");
            world.io(&format!("write -P {} {}M 64k", round + 30, round + 32));
            let before = world.list().len();
            let at = format!("backup-store:{step}");
            world.worker.crash(&world.line(kind, &disk), &at);
            let recorded = usize::from(step == "recorded");
            assert_eq!(world.list().len(), before + recorded, "{story}");
            world.is_whole();
            // What was changed before and after the kill is in the next one.
            world.io(&format!("write -P {} {}M 64k", round + 60, round + 44));
            let next = world.make("incremental");
            assert_eq!(next["kind"], "incremental", "{story}: {next}");
            world.require(&next["id"], &disk);
        }
        // The leases of the dead hold nothing back.
        let gc = world.keeper().json(&["gc"]);
        assert_eq!(gc["waiting_for"].as_array().map(Vec::len), Some(0), "{gc}");
        world.is_whole();
        let id = first["id"].as_str().expect("an id");
        let target = world.target().display().to_string();
        let line = ["backup", "restore", &world.url, id, &target, "--force"];
        world.worker.ok(&line);
    }
}

#[test]
fn a_store_that_takes_no_more_costs_the_backup_only() {
    let world = World::new();
    let disk = world.disk();
    let line = world.line("full", &disk);
    let before = fs::read(world.disk()).expect("read");
    // Files may be so many blocks of 512 bytes long; the chunks need more.
    for blocks in [400, 2000, 6000] {
        let stead = world.worker.command(&line);
        let limited = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &limited, "sh"]);
        command.arg(stead.get_program()).args(stead.get_args());
        let output = command.output().expect("run");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{blocks}: {text}");
        assert!(world.list().is_empty(), "{blocks}");
        assert!(fs::read(world.disk()).expect("read") == before, "{blocks}");
    }
    let made = world.make("full");
    world.require(&made["id"], &world.disk());
    world.is_whole();
}
