//! The same command line given to qemu-img and to ours, on copies of the same files.

#![allow(dead_code, reason = "each test file uses a part of this")]
#![allow(
    clippy::disallowed_methods,
    reason = "files of a test need not be durable"
)]

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long qemu-nbd may take to open an image.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with images, the two programs, and what they said.
pub struct Bench {
    dir: tempfile::TempDir,
}

/// A qemu-nbd that has an image open for writing, until it is dropped.
pub struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What a program printed, in the form in which it is compared.
#[derive(Debug, PartialEq)]
struct Said {
    status: Option<i32>,
    out: Printed,
    /// The first line of standard error without the program's name, where the program failed.
    error: Option<String>,
}

/// Standard output.
#[derive(Debug, PartialEq)]
enum Printed {
    Json(Value),
    Text(String),
}

impl Bench {
    /// An empty folder.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        fs::create_dir(dir.path().join("work")).expect("a folder");
        // Under this name it speaks as qemu-img does.
        let own = env!("CARGO_BIN_EXE_stead-img");
        fs::create_dir(dir.path().join("bin")).expect("a folder");
        symlink(own, dir.path().join("bin/qemu-img")).expect("a link");
        Self { dir }
    }

    /// A file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("work").join(name)
    }

    /// Runs a shell command with the real tools; it must succeed.
    pub fn sh(&self, command: &str) -> String {
        let output = Command::new("sh")
            .args(["-ec", command])
            .current_dir(self.path("."))
            .output();
        let output = output.expect("a shell");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{command}: {output:?}");
        text
    }

    /// Has qemu-nbd open an image. It listens before it opens, and greets when it has.
    pub fn serve(&self, name: &str) -> Served {
        let socket = self.dir.path().join("socket");
        let mut command = Command::new("qemu-nbd");
        command.args(["-f", "qcow2", "--persistent", "-k"]);
        command.args([&socket, &self.path(name)]);
        let server = Served(command.spawn().expect("qemu-nbd is installed"));
        let begun = Instant::now();
        let mut stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(begun.elapsed() < PATIENCE, "qemu-nbd: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
        let mut greeting = [0; 8];
        stream.read_exact(&mut greeting).expect("qemu-nbd greets");
        assert_eq!(&greeting, b"NBDMAGIC");
        server
    }

    /// Runs `line` by ours.
    pub fn ours(&self, line: &str) -> Output {
        self.run("../bin/qemu-img", line)
    }

    /// Runs `line` by qemu-img.
    pub fn theirs(&self, line: &str) -> Output {
        self.run("qemu-img", line)
    }

    fn run(&self, program: &str, line: &str) -> Output {
        Command::new("sh")
            .args(["-c", &format!("exec {program} {line}")])
            .current_dir(self.path("."))
            .env("TZ", "Asia/Kathmandu")
            .output()
            .expect("a shell")
    }

    /// Both say the same to each line, which writes nothing.
    pub fn same(&self, lines: &[&str]) {
        for line in lines {
            let (theirs, ours) = (said(&self.theirs(line)), said(&self.ours(line)));
            assert_eq!(theirs, ours, "qemu-img (left) and ours: {line}");
        }
    }

    /// Both refuse each line in the same words; ours leaves no new file, what qemu-img leaves is removed.
    pub fn same_refusal(&self, lines: &[&str]) {
        for line in lines {
            let before = self.names();
            let ours = said(&self.ours(line));
            assert_eq!(before, self.names(), "files before and after ours: {line}");
            let theirs = said(&self.theirs(line));
            assert_eq!(theirs, ours, "qemu-img (left) and ours: {line}");
            assert_ne!(ours.status, Some(0), "{line}");
            for new in self.names().difference(&before) {
                fs::remove_file(self.path(new)).expect("removed");
            }
        }
    }

    /// Both make, or change, the image `name` by `line`: they say the same, the image is described alike, has
    /// the same bytes and is whole. It goes back to what it was.
    pub fn same_image(&self, line: &str, name: &str) {
        let image = self.path(name);
        let [kept, theirs] = ["kept", "theirs"].map(|name| self.dir.path().join(name));
        let there = image.exists();
        if there {
            copy(&image, &kept);
        }
        let they_said = said(&self.theirs(line));
        let described = self.describe(name);
        fs::rename(&image, &theirs).expect("moved");
        if there {
            copy(&kept, &image);
        }
        let we_said = said(&self.ours(line));
        assert_eq!(they_said, we_said, "qemu-img (left) and ours: {line}");
        assert_eq!(we_said.status, Some(0), "{line}");
        assert_eq!(
            described,
            self.describe(name),
            "qemu-img (left) and ours: {line}"
        );
        self.same_bytes(&described, name);
        if there {
            copy(&kept, &image);
        } else {
            fs::remove_file(&image).expect("removed");
        }
    }

    fn describe(&self, name: &str) -> Value {
        let json = self.sh(&format!("qemu-img info -U --output=json '{name}'"));
        let mut described = without_disk_size(serde_json::from_str(&json).expect("JSON"));
        // The two did not make their snapshots at one time; and where no instructions were counted, qemu-img
        // says 0 and we, as QEMU's savevm, nothing.
        for snapshot in described["snapshots"].as_array_mut().into_iter().flatten() {
            snapshot["date-sec"] = Value::Null;
            snapshot["date-nsec"] = Value::Null;
            snapshot["icount"] = Value::Null;
        }
        described
    }

    /// The image that qemu-img made and ours read the same, where the image below is there, and ours is whole.
    fn same_bytes(&self, described: &Value, name: &str) {
        let below = described["full-backing-filename"].as_str();
        if below.is_some_and(|below| !self.path(below).exists()) {
            return;
        }
        // Beside ours, so that the image below is found.
        let beside = format!("{name}.theirs");
        fs::rename(self.dir.path().join("theirs"), self.path(&beside)).expect("moved");
        let check = match described["format"] == "qcow2" {
            true => format!("; qemu-img check -q '{name}'"),
            false => String::new(),
        };
        self.sh(&format!("qemu-img compare -q '{beside}' '{name}'{check}"));
        fs::remove_file(self.path(&beside)).expect("removed");
    }

    /// Both end with the same status; what they print may differ.
    pub fn same_status(&self, lines: &[&str]) {
        for line in lines {
            let (theirs, ours) = (said(&self.theirs(line)), said(&self.ours(line)));
            assert_eq!(
                theirs.status, ours.status,
                "qemu-img (left) and ours: {line}: {ours:?}"
            );
        }
    }

    fn names(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.path(".")).expect("the folder");
        let name = |entry: std::io::Result<fs::DirEntry>| {
            let name = entry.expect("an entry").file_name();
            name.to_string_lossy().into_owned()
        };
        entries.map(name).collect()
    }
}

fn said(output: &Output) -> Said {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let out = match serde_json::from_str(&text) {
        Ok(json) => Printed::Json(without_disk_size(json)),
        Err(_no_json) => Printed::Text(text.lines().map(without_disk_line).collect()),
    };
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let first = errors
        .lines()
        .next()
        .map(|line| line.replace("qemu-img: ", ""));
    Said {
        status: output.status.code(),
        out,
        error: first.filter(|_| !output.status.success()),
    }
}

/// What a file takes on the disk depends on how it was written.
fn without_disk_line(line: &str) -> String {
    if line.starts_with("disk size: ") {
        return "disk size\n".to_owned();
    }
    format!("{line}\n")
}

/// What a file takes on its file system, what we add, and what newer versions of qemu-img add.
const LEFT_OUT: [&str; 3] = ["actual-size", "stead", "compressed"];

fn without_disk_size(json: Value) -> Value {
    match json {
        Value::Object(map) => map
            .into_iter()
            .filter(|(key, _)| !LEFT_OUT.contains(&key.as_str()))
            .map(|(key, value)| (key, without_disk_size(value)))
            .collect(),
        Value::Array(all) => all.into_iter().map(without_disk_size).collect(),
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_)) => other,
    }
}

/// Holes stay holes.
fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("--").args([from, to]).status();
    assert!(copied.expect("cp").success(), "{from:?}");
}

/// Overwrites bytes of a file.
pub fn put(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("the file");
    file.write_all_at(bytes, at).expect("written");
}
