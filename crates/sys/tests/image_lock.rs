//! QEMU's programs and we respect each other's locks on an image.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use stead_sys::image_lock::{Access, Attempt, Holder, ImageLock};

fn image(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("disk.qcow2");
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg("1M")
        .status();
    assert!(status.expect("qemu-img is installed").success());
    path
}

fn open(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).open(path).expect("open")
}

/// A program that keeps the image open until it is dropped.
struct User(Child);

impl User {
    /// qemu-io answers a command only when it has the image open.
    fn qemu_io(path: &Path, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]);
        if read_only {
            command.arg("-r");
        }
        let child = command
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut user = Self(child.expect("qemu-io is installed"));
        let mut input = user.0.stdin.take().expect("piped");
        input.write_all(b"length\n").expect("write");
        user.0.stdin = Some(input);
        let output = user.0.stdout.take().expect("piped");
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).expect("read");
        assert!(line.contains("1 MiB"), "{line}");
        user
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.0.kill().expect("kill");
        self.0.wait().expect("wait");
    }
}

fn attempt(path: &Path, access: Access) -> Result<ImageLock, Vec<Holder>> {
    // The lock keeps the open file alive.
    match ImageLock::attempt(&open(path), access).expect("attempt") {
        Attempt::Locked(lock) => Ok(lock),
        Attempt::HeldBy(holders) => Err(holders),
    }
}

fn qemu_can(path: &Path, read_only: bool) -> bool {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2"]);
    if read_only {
        command.arg("-r");
    }
    let output = command.args(["-c", "length"]).arg(path).output();
    let output = output.expect("qemu-io is installed");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || text.contains("lock"), "{text}");
    output.status.success()
}

#[test]
fn what_qemu_writes_to_is_not_opened_and_the_program_is_named() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = image(dir.path());
    let user = User::qemu_io(&path, false);
    for access in [Access::Read, Access::Write] {
        let holders = attempt(&path, access).expect_err("in use");
        let [holder] = &holders[..] else {
            panic!("{holders:?}")
        };
        assert_eq!((holder.pid, holder.name.as_str()), (user.0.id(), "qemu-io"));
    }
    drop(user);
    attempt(&path, Access::Write).expect("free again");
}

#[test]
fn what_qemu_reads_is_read_and_not_written() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = image(dir.path());
    let user = User::qemu_io(&path, true);
    attempt(&path, Access::Read).expect("readers share");
    attempt(&path, Access::Write).expect_err("read by qemu-io");
    drop(user);
}

#[test]
fn qemu_does_not_open_what_we_write_and_does_not_write_what_we_read() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = image(dir.path());
    let reader = attempt(&path, Access::Read).expect("free");
    assert!(qemu_can(&path, true));
    assert!(!qemu_can(&path, false));
    drop(reader);
    let writer = attempt(&path, Access::Write).expect("free");
    assert!(!qemu_can(&path, true));
    assert!(!qemu_can(&path, false));
    drop(writer);
    assert!(qemu_can(&path, false));
}

/// An image exported by qemu-nbd is in use like any other.
#[test]
fn an_exported_image_is_in_use() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = image(dir.path());
    let socket = dir.path().join("nbd");
    let child = Command::new("qemu-nbd")
        .args(["-f", "qcow2", "-t", "-k"])
        .arg(&socket)
        .arg(&path)
        .spawn();
    let user = User(child.expect("qemu-nbd is installed"));
    // It listens before it opens the image, and greets when it has.
    let begun = std::time::Instant::now();
    let mut stream = loop {
        match std::os::unix::net::UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(begun.elapsed().as_secs() < 60, "qemu-nbd: {error}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    let mut greeting = [0; 8];
    stream.read_exact(&mut greeting).expect("it greets");
    let holders = attempt(&path, Access::Write).expect_err("in use");
    assert_eq!(holders[0].pid, user.0.id());
}
