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

use common::{LIMIT, greeting, has_ended, sh, until};
use stead_agent_link::{
    AgentLink, Command as Started, CommandEvent, CommandState, Epoch, ExecRequest, ExitStatus, Pty,
};

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
        // By another process: what this one has open to write, a child of another test would hold busy.
        let copied = Command::new("cp")
            .args([env!("CARGO_BIN_EXE_stead-agent").as_ref(), &*agent])
            .status();
        assert!(copied.expect("run").success());
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

    async fn link(&self) -> AgentLink {
        AgentLink::connect(&self.path("socket"))
            .await
            .expect("connect")
    }

    /// Has another agent take the place of the one that runs, and waits until it listens.
    fn replace(&self) {
        let socket = || {
            let found = fs::metadata(self.path("socket"));
            found.map_or((0, 0), |found| (found.ctime(), found.ctime_nsec()))
        };
        let (running, listening) = (self.running(), socket());
        let (file, digest) = self.other_agent();
        let upgraded = self.upgrade(&file, &digest);
        assert!(upgraded.status.success(), "{upgraded:?}");
        until("another program runs", || self.running() != running);
        // The old one's may be there for a moment still.
        until("it listens", || {
            socket() != listening && UnixStream::connect(self.path("socket")).is_ok()
        });
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

    init.replace();
    assert_eq!(
        fs::read(init.path("agent")).expect("read"),
        fs::read(&file).expect("read")
    );
    let mut link = init.link().await;
    link.handshake(&greeting(1), LIMIT).await.expect("ready");
    init.assert_reaps();
    // And again, from the new one.
    let again = init.upgrade(&file, &digest);
    assert!(again.status.success(), "{again:?}");
}

/// What a command says from `from` on, and how it ends.
async fn heard(link: &AgentLink, key: stead_agent_link::ExecKey) -> (String, ExitStatus) {
    let mut command = link.attach(key, [0, 0]).await.expect("known");
    let mut seen = String::new();
    let status = rest(&mut command, &mut seen).await;
    (seen, status)
}

async fn rest(command: &mut Started, seen: &mut String) -> ExitStatus {
    loop {
        match tokio::time::timeout(LIMIT, command.output.next()).await {
            Ok(Ok(CommandEvent::Output { stream, data })) => {
                command.output.consumed(stream, data.len());
                seen.push_str(&String::from_utf8_lossy(&data));
            }
            Ok(Ok(CommandEvent::Exit(status))) => return status,
            other => panic!("{other:?} after {seen:?}"),
        }
    }
}

async fn shown(command: &mut Started, awaited: &str) {
    let mut seen = String::new();
    while !seen.contains(awaited) {
        match tokio::time::timeout(LIMIT, command.output.next()).await {
            Ok(Ok(CommandEvent::Output { stream, data })) => {
                command.output.consumed(stream, data.len());
                seen.push_str(&String::from_utf8_lossy(&data));
            }
            other => panic!("{other:?} after {seen:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_of_the_old_agent_are_attached_to_under_the_new_one_and_nothing_of_them_is_lost() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may make namespaces");
        return;
    }
    let init = Init::start();
    let mut link = init.link().await;
    link.handshake(&greeting(1), LIMIT).await.expect("ready");
    link.release().await.expect("released");
    let asking = ExecRequest {
        stdin: true,
        ..sh("echo one; read a; read b; echo \"$a $b\"; cat; exit 7")
    };
    let mut asking = link.start(asking).await.expect("runs");
    shown(&mut asking, "one").await;
    assert!(asking.input.write(b"early\n").await.expect("sent"));
    let pty = Some(Pty {
        rows: 24,
        cols: 80,
        term: String::new(),
    });
    let typing = ExecRequest {
        stdin: true,
        pty,
        ..sh("echo ready; read line; stty size; exit 8")
    };
    let mut typing = link.start(typing).await.expect("runs");
    shown(&mut typing, "ready").await;
    // It writes all the time, faster than anybody reads.
    let flood = sh("i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done; exit 9");
    let flood = link.start(flood).await.expect("runs");
    let timed = ExecRequest {
        timeout_ms: 3000,
        ..sh("sleep 1000")
    };
    let timed = link.start(timed).await.expect("runs");
    let leaving = sh("(sleep 0.5; until ! echo still; do sleep 0.1; done) & echo gone; exit 3");
    let mut leaving = link.start(leaving).await.expect("runs");
    let mut seen = String::new();
    let left = rest(&mut leaving, &mut seen).await;
    assert_eq!((seen.as_str(), left), ("gone\n", ExitStatus::Code(3)));

    init.replace();
    let mut link = init.link().await;
    link.reattach(Epoch([1; 16]), LIMIT)
        .await
        .expect("the same life");
    let ended = link.query(leaving.key, Epoch([1; 16])).await;
    assert_eq!(
        ended.expect("answered"),
        CommandState::Ended(ExitStatus::Code(3))
    );
    let mut asking = link.attach(asking.key, [0, 0]).await.expect("known");
    assert!(asking.input.write(b"late\nmore").await.expect("sent"));
    asking.input.end().await.expect("sent");
    let mut seen = String::new();
    let status = rest(&mut asking, &mut seen).await;
    assert_eq!(
        (seen.as_str(), status),
        ("one\nearly late\nmore", ExitStatus::Code(7))
    );
    let mut typing = link.attach(typing.key, [0, 0]).await.expect("known");
    typing.control.resize(33, 99);
    assert!(typing.input.write(b"line\n").await.expect("sent"));
    let mut seen = String::new();
    let status = rest(&mut typing, &mut seen).await;
    assert!(seen.contains("33 99"), "{seen:?}");
    assert_eq!(status, ExitStatus::Code(8));
    let (seen, status) = heard(&link, flood.key).await;
    let numbers: Vec<u32> = seen.lines().skip(1).flat_map(str::parse).collect();
    assert_eq!(numbers.last(), Some(&19999), "its end");
    assert!(
        numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "a gap"
    );
    assert_eq!(status, ExitStatus::Code(9));
    let (_, status) = heard(&link, timed.key).await;
    assert_eq!(status, ExitStatus::TimedOut);
    // The background process that has the output of a command open was neither blocked nor killed.
    for (others, pause) in [(1, 0), (1, 300)] {
        tokio::time::sleep(std::time::Duration::from_millis(pause)).await;
        let mut left = u32::MAX;
        // One that has ended is forgotten a moment later.
        for _ in 0..1000 {
            let status = link.ping().await.expect("answered");
            left = status.attached_commands + status.detached_commands;
            if left == others {
                break;
            }
        }
        assert_eq!(left, others);
    }
    init.assert_reaps();
}
