//! Another agent takes the place of a running one.
#![allow(
    clippy::disallowed_methods,
    reason = "a test's files need not be durable"
)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use common::{LIMIT, greeting, has_ended, until};
use stead_agent_link::AgentLink;

/// Process 1 of namespaces of its own, which end with it.
struct Init {
    outer: Child,
    pid: i32,
    folder: tempfile::TempDir,
}

impl Init {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let agent = folder.path().join("agent");
        fs::copy(env!("CARGO_BIN_EXE_stead-agent"), &agent).expect("copied");
        let mut command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child"])
            .arg(&agent)
            .args(["serve", "--no-clock", "--no-entropy", "--no-hostname"])
            .arg("--socket")
            .arg(folder.path().join("socket"))
            .args(["--control", &control_name(folder.path())]);
        let outer = command.stdin(Stdio::null()).spawn().expect("start");
        let mut init = Self {
            outer,
            pid: 0,
            folder,
        };
        until("it listens", || {
            UnixStream::connect(init.path("socket")).is_ok()
        });
        let outer = init.outer.id();
        let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"));
        init.pid = children.expect("read").trim().parse().expect("one child");
        init
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An agent with other bytes, which means the same to the kernel.
    fn other_agent(&self) -> (PathBuf, String) {
        let mut bytes = fs::read(self.path("agent")).expect("read");
        bytes.push(0);
        let path = self.path("other");
        fs::write(&path, &bytes).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
        (path, blake3::hash(&bytes).to_string())
    }

    fn upgrade(&self, file: &Path, digest: &str) -> Output {
        self.inside(env!("CARGO_BIN_EXE_stead-agent"))
            .args(["upgrade", "--control", &control_name(self.folder.path())])
            .arg(file)
            .arg(digest)
            .output()
            .expect("run")
    }

    fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.pid.to_string(), "--pid", "--mount"])
            .arg(program);
        command
    }

    /// The file that the process runs.
    fn running(&self) -> u64 {
        let exe = fs::metadata(format!("/proc/{}/exe", self.pid));
        exe.expect("it runs").ino()
    }

    /// Leaves an orphan to process 1; gives its number, as seen from outside, once it is one.
    fn leave_orphan(&self) -> i32 {
        let file = self.path("orphan");
        drop(fs::remove_file(&file));
        let script = format!(
            "sleep 0.3 & cat /proc/sys/kernel/random/uuid > {}",
            file.display()
        );
        let status = self.inside("sh").args(["-c", &script]).status();
        assert!(status.expect("run").success());
        let children = format!("/proc/{0}/task/{0}/children", self.pid);
        let text = fs::read_to_string(children).expect("read");
        text.split_whitespace()
            .last()
            .expect("an orphan")
            .parse()
            .expect("a number")
    }

    fn assert_reaps(&self) {
        let orphan = self.leave_orphan();
        until("the orphan is reaped", || {
            !Path::new(&format!("/proc/{orphan}")).exists()
        });
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        // What the kernel kills with a parent is forgotten when another thread than the first execs.
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid) {
            let killed = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            killed.expect("it is there");
        }
        drop(self.outer.kill());
        drop(self.outer.wait());
        if self.pid > 0 {
            until("process 1 ends", || has_ended(self.pid));
        }
    }
}

fn control_name(folder: &Path) -> String {
    format!(
        "stead-test-{}",
        folder.file_name().expect("a name").display()
    )
}

#[tokio::test]
async fn process_1_becomes_another_agent_and_the_machine_goes_on() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may make namespaces");
        return;
    }
    let init = Init::start();
    init.assert_reaps();
    let before = init.running();
    let (file, digest) = init.other_agent();

    // What is not as announced changes nothing.
    let wrong = digest.replace(|digit: char| digit.is_ascii_digit(), "0");
    for (file, digest) in [(&file, &wrong), (&init.path("absent"), &digest)] {
        let refused = init.upgrade(file, digest);
        assert!(!refused.status.success(), "{refused:?}");
        assert_eq!(init.running(), before);
    }

    let upgraded = init.upgrade(&file, &digest);
    assert!(upgraded.status.success(), "{upgraded:?}");
    until("another program runs", || init.running() != before);
    assert_eq!(
        fs::read(init.path("agent")).expect("read"),
        fs::read(&file).expect("read")
    );
    until("it listens", || {
        UnixStream::connect(init.path("socket")).is_ok()
    });
    let mut link = AgentLink::connect(&init.path("socket"))
        .await
        .expect("connect");
    link.handshake(&greeting(1), LIMIT).await.expect("ready");
    init.assert_reaps();
    // And again, from the new one.
    let again = init.upgrade(&file, &digest);
    assert!(again.status.success(), "{again:?}");
}
