//! The same command line given to qemu-img and to ours, on copies of the same files.

#![allow(dead_code, reason = "each test file uses a part of this")]

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A folder with images, the two programs, and what they said.
pub struct Bench {
    dir: tempfile::TempDir,
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

    /// Both say the same to each line, from the same files, and leave files of the same names.
    pub fn same_writing(&self, lines: &[&str]) {
        for line in lines {
            let (theirs, ours) = self.both(line);
            assert_eq!(theirs, ours, "qemu-img (left) and ours: {line}");
        }
    }

    /// As [`Bench::same_writing`], and the image `name` is described alike, has the same bytes, and is whole.
    pub fn same_image(&self, line: &str, name: &str) {
        let (theirs, ours) = self.both(line);
        assert_eq!(theirs, ours, "qemu-img (left) and ours: {line}");
        assert_eq!(ours.status, Some(0), "{line}");
        let describe = |folder: &str| {
            let command = format!("cd ../{folder}; qemu-img info --output=json '{name}'");
            let json: Value = serde_json::from_str(&self.sh(&command)).expect("JSON");
            without_disk_size(json)
        };
        assert_eq!(
            describe("theirs"),
            describe("work"),
            "qemu-img (left) and ours: {line}"
        );
        let qcow2 = describe("work")["format"] == "qcow2";
        let named = format!("../theirs/{name}");
        let below = self
            .sh(&format!("qemu-img info '{name}'"))
            .contains("backing file: nope");
        if !below && !line.contains("a b,c") {
            self.sh(&format!("qemu-img compare '{named}' '{name}'"));
            if qcow2 {
                self.sh(&format!("qemu-img check -q '{name}'"));
            }
        }
    }

    /// Both end with the same status; what they print may differ.
    pub fn same_status(&self, lines: &[&str]) {
        for line in lines {
            let (theirs, ours) = self.both(line);
            assert_eq!(
                theirs.status, ours.status,
                "qemu-img (left) and ours: {line}: {ours:?}"
            );
        }
    }

    /// Both programs start from the same files; those that ours leaves stay.
    fn both(&self, line: &str) -> (Said, Said) {
        let before = self.dir.path().join("before");
        // Both get a copy, so that holes are alike.
        self.copy(&self.path("."), &before);
        self.copy(&before, &self.path("."));
        let theirs = said(&self.theirs(line));
        let left = self.names();
        self.copy(&self.path("."), &self.dir.path().join("theirs"));
        self.copy(&before, &self.path("."));
        let ours = said(&self.ours(line));
        assert_eq!(
            left,
            self.names(),
            "files left by qemu-img (left) and ours: {line}"
        );
        (theirs, ours)
    }

    fn copy(&self, from: &Path, to: &Path) {
        let (from, to) = (from.display(), to.display());
        // Times stay, so that what is printed of them is the same.
        let command = format!(
            "rm -rf {to}.new; cp -a --sparse=auto {from} {to}.new; rm -rf {to}; mv {to}.new {to}"
        );
        let command = command.replace("work/.", "work");
        let copied = Command::new("sh").args(["-ec", &command]).status();
        assert!(copied.expect("a shell").success(), "{command}");
    }

    fn names(&self) -> BTreeMap<String, ()> {
        let entries = fs::read_dir(self.path(".")).expect("the folder");
        let name = |entry: std::io::Result<fs::DirEntry>| {
            let name = entry.expect("an entry").file_name();
            (name.to_string_lossy().into_owned(), ())
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

/// Overwrites bytes of a file.
pub fn put(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("the file");
    file.write_all_at(bytes, at).expect("written");
}
