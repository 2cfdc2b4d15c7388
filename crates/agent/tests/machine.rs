//! The agent in a real machine: from the initramfs to a command, over ports that a capture cuts.
//!
//! These tests boot QEMU and need a guest, so they are ignored unless asked for. `make test` does not: its end-to-end tests
//! boot the same agent inside the Debian template, and these, without one, are for work on the agent alone.
//! ```text
//! STEAD_TEST_KERNEL=…/vmlinuz  STEAD_TEST_MODULES=…/lib/modules/…/kernel  STEAD_TEST_BUSYBOX=…/busybox (static)
//! STEAD_TEST_AGENT=…/x86_64-unknown-linux-gnu/agent/stead-agent (static)
//! cargo test -p stead-agent --test machine -- --ignored --test-threads 1
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may stop at the first surprise, and its files need not be durable"
)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use common::sh;
use stead_agent_link::{
    AgentLink, Epoch, ExecIo, ExecRequest, ExitStatus, ForkIdentity, Greeting, Identity, LinkError,
    PhaseOutcome, Ready, Reason, ShutdownKind,
};
use tokio::sync::mpsc;

const BOOT_LIMIT: Duration = Duration::from_secs(60);
const MODULES: [&str; 8] = [
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
    "char/virtio_console",
    "char/hw_random/virtio-rng",
];

fn given(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")))
}

/// Kernel, initramfs and root disk in one folder.
struct Guest {
    folder: tempfile::TempDir,
}

impl Guest {
    fn make() -> Self {
        let folder = tempfile::tempdir().unwrap();
        make_initramfs(&folder.path().join("initramfs"));
        make_root(&folder.path().join("tree"), &folder.path().join("root"));
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn boot(&self, line: &str) -> Machine {
        self.start(
            &format!("console=ttyS0 quiet panic=-1 {line}"),
            &["-rtc", "base=2020-01-01T00:00:00"],
        )
    }

    fn start(&self, line: &str, more: &[&str]) -> Machine {
        let folder = self.folder.path().display();
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-machine",
                "q35,accel=tcg",
                "-cpu",
                "qemu64,+rdrand",
                "-m",
                "256",
                "-nographic",
                "-nodefaults",
                "-no-reboot",
            ])
            .args(["-serial", &format!("file:{folder}/console")])
            .args(["-qmp", &format!("unix:{folder}/qmp,server=on,wait=off")])
            .arg("-kernel")
            .arg(given("STEAD_TEST_KERNEL"))
            .args(["-initrd", &format!("{folder}/initramfs"), "-append", line])
            .args([
                "-drive",
                &format!("file={folder}/root,format=raw,if=none,id=root"),
                "-device",
                "virtio-blk-pci,drive=root",
            ])
            .args([
                "-device",
                "virtio-rng-pci",
                "-device",
                "virtio-serial-pci,max_ports=16",
            ]);
        for port in 0..8 {
            let socket = format!("{folder}/port.{port}");
            drop(fs::remove_file(&socket));
            command
                .args([
                    "-chardev",
                    &format!("socket,id=c{port},path={socket},server=on,wait=off"),
                ])
                .args([
                    "-device",
                    &format!("virtserialport,chardev=c{port},name=org.steadfast.agent.{port}"),
                ]);
        }
        let child = command.args(more).stdin(Stdio::null()).spawn().unwrap();
        let mut machine = Machine {
            child,
            folder: self.folder.path().to_owned(),
            qmp: None,
        };
        machine.connect_qmp();
        machine
    }
}

fn make_initramfs(target: &Path) {
    let agent = fs::read(given("STEAD_TEST_AGENT")).unwrap();
    let mut files = vec![
        ("init".to_owned(), 0o100_755, agent),
        ("modules".to_owned(), 0o040_755, Vec::new()),
    ];
    let names: Vec<&str> = MODULES
        .iter()
        .map(|path| path.rsplit('/').next().unwrap())
        .collect();
    files.push((
        "modules/order".to_owned(),
        0o100_644,
        names.join("\n").into_bytes(),
    ));
    for (path, name) in MODULES.iter().zip(names) {
        let file = given("STEAD_TEST_MODULES")
            .join("drivers")
            .join(format!("{path}.ko"));
        files.push((
            format!("modules/{name}.ko"),
            0o100_644,
            fs::read(file).unwrap(),
        ));
    }
    let inputs = files.into_iter().map(|(name, mode, bytes)| {
        (
            cpio::NewcBuilder::new(&name).mode(mode),
            std::io::Cursor::new(bytes),
        )
    });
    cpio::write_cpio(inputs, fs::File::create(target).unwrap()).unwrap();
}

fn make_root(tree: &Path, image: &Path) {
    for folder in [
        "bin", "sbin", "usr/bin", "usr/sbin", "proc", "sys", "dev", "tmp", "root", "run", "etc",
        "data",
    ] {
        fs::create_dir_all(tree.join(folder)).unwrap();
    }
    fs::copy(given("STEAD_TEST_BUSYBOX"), tree.join("bin/busybox")).unwrap();
    fs::copy(given("STEAD_TEST_AGENT"), tree.join("usr/bin/stead-agent")).unwrap();
    for applet in [
        "sh", "cat", "head", "date", "hostname", "uname", "sleep", "ps", "dd", "md5sum", "sync",
        "grep", "echo", "kill", "od", "wc", "touch",
    ] {
        symlink("busybox", tree.join("bin").join(applet)).unwrap();
    }
    symlink("../../bin/busybox", tree.join("usr/sbin/fsfreeze")).unwrap();
    fs::write(tree.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    fs::write(tree.join("etc/group"), "root:x:0:\n").unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(tree)
        .arg(image)
        .arg("96M")
        .status()
        .unwrap();
    assert!(made.success());
}

struct Machine {
    child: Child,
    folder: PathBuf,
    qmp: Option<BufReader<UnixStream>>,
}

impl Machine {
    fn connect_qmp(&mut self) {
        let end = Instant::now() + BOOT_LIMIT;
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(self.folder.join("qmp")) {
                break stream;
            }
            assert!(Instant::now() < end, "QEMU does not listen");
            std::thread::sleep(Duration::from_millis(5));
        };
        stream.set_read_timeout(Some(BOOT_LIMIT)).unwrap();
        self.qmp = Some(BufReader::new(stream));
        self.qmp("{\"execute\":\"qmp_capabilities\"}");
    }

    fn qmp(&mut self, command: &str) -> String {
        let qmp = self.qmp.as_mut().unwrap();
        qmp.get_mut().write_all(command.as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            assert!(qmp.read_line(&mut line).unwrap() > 0, "QMP ended");
            assert!(!line.contains("\"error\""), "{command}: {line}");
            if line.contains("\"return\"") {
                return line;
            }
        }
    }

    fn await_status(&mut self, command: &str, wanted: &str) {
        let end = Instant::now() + BOOT_LIMIT;
        while !self.qmp(command).contains(wanted) {
            assert!(Instant::now() < end, "{command} never gives {wanted}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    async fn link(&self, port: u32) -> AgentLink {
        AgentLink::connect(&self.folder.join(format!("port.{port}")))
            .await
            .unwrap()
    }

    /// Stops the machine and writes its whole state.
    fn capture(&mut self, file: &Path) {
        self.qmp("{\"execute\":\"stop\"}");
        self.qmp(
            "{\"execute\":\"migrate-set-parameters\",\"arguments\":{\"max-bandwidth\":4000000000}}",
        );
        self.qmp(&format!(
            "{{\"execute\":\"migrate\",\"arguments\":{{\"uri\":\"exec:cat > {}\"}}}}",
            file.display()
        ));
        self.await_status("{\"execute\":\"query-migrate\"}", "\"completed\"");
    }

    /// What can be seen from outside of a machine that does not answer.
    async fn report(&mut self) {
        for port in [1, 7] {
            let found = self
                .link(port)
                .await
                .reattach(Epoch([0; 16]), Duration::from_secs(5))
                .await;
            eprintln!("port {port}: {found:?}");
        }
        for _ in 0..3 {
            let registers = self.qmp(r#"{"execute":"human-monitor-command","arguments":{"command-line":"info registers"}}"#);
            eprintln!(
                "{}",
                registers
                    .split("\\r\\n")
                    .filter(|line| line.contains("RIP") || line.contains("HLT"))
                    .collect::<String>()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        let devices = self.qmp(r#"{"execute":"x-query-virtio"}"#);
        let path = devices
            .split("\"virtio-serial\", \"path\": \"")
            .nth(1)
            .and_then(|rest| rest.split('"').next());
        eprintln!("{devices}");
        if let Some(path) = path {
            for queue in 0..8 {
                let command = format!(
                    r#"{{"execute":"x-query-virtio-queue-status","arguments":{{"path":"{path}","queue":{queue}}}}}"#
                );
                eprintln!("{}", self.qmp(&command).trim());
            }
        }
        eprintln!("{}", self.console());
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.join("console")).unwrap_or_default())
            .into_owned()
    }

    fn await_end(&mut self) {
        let end = Instant::now() + BOOT_LIMIT;
        while self.child.try_wait().unwrap().is_none() {
            assert!(
                Instant::now() < end,
                "the machine does not power off:\n{}",
                self.console()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

const LINE: &str = "root=/dev/vda rw init=/usr/bin/stead-agent -- serve";

fn greeting(life: u8, reason: Reason) -> Greeting {
    Greeting {
        epoch: Epoch([life; 16]),
        reason,
        identity: Identity::Fork(Box::new(ForkIdentity {
            hostname: Some(format!("life-{life}")),
            ..ForkIdentity::default()
        })),
    }
}

/// A whole handshake and its release.
async fn live(link: &mut AgentLink, greeting: &Greeting) -> Ready {
    let ready = link.handshake(greeting, BOOT_LIMIT).await.unwrap();
    link.release().await.unwrap();
    ready
}

async fn text(link: &AgentLink, script: &str) -> String {
    let output = link.exec_capture(sh(script), b"").await.unwrap();
    assert_eq!(
        output.status,
        ExitStatus::Code(0),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn now_s() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "boots a machine: see the head of the file"]
async fn a_machine_boots_from_the_initramfs_and_is_set_up_before_its_first_command() {
    let guest = Guest::make();
    let mut machine = guest.boot(LINE);
    // Connected and greeted long before the guest has a kernel: the answer comes when the agent is there.
    let begin = Instant::now();
    let mut link = machine.link(0).await;
    let ready = live(&mut link, &greeting(1, Reason::Boot)).await;
    eprintln!("boot to ready: {:?}; {:?}", begin.elapsed(), ready.phases);
    assert!(
        ready.clock_behind_ns().unwrap() > 3 * 365 * 86_400 * 1_000_000_000,
        "{:?}",
        ready.clock_behind_ns()
    );
    let done = ready
        .phases
        .iter()
        .filter(|report| report.outcome == PhaseOutcome::Done)
        .count();
    assert_eq!(done, 5, "all but the thaw were done: {:?}", ready.phases);
    let guest_s: u64 = text(&link, "date +%s").await.parse().unwrap();
    assert!(
        guest_s.abs_diff(now_s()) <= 2,
        "the guest's clock is the host's"
    );
    assert_eq!(text(&link, "hostname").await, "life-1");
    assert_eq!(
        text(&link, "cat /proc/1/oom_score_adj /proc/self/oom_score_adj").await,
        "-1000\n0"
    );
    assert_eq!(
        text(
            &link,
            "ls_ok=1; test ! -e /modules && test -e /dev/vda && grep -c ' / ext4 rw' /proc/mounts"
        )
        .await,
        "1"
    );
    for port in 1..8 {
        let mut other = machine.link(port).await;
        other.reattach(Epoch([1; 16]), BOOT_LIMIT).await.unwrap();
        assert_eq!(
            text(&other, &format!("echo {port}")).await,
            port.to_string()
        );
    }
    // Orphans of process 1 are reaped.
    text(
        &link,
        "for i in 1 2 3 4 5; do (sh -c 'sleep 0.05 & exit' &) ; done; sleep 0.5",
    )
    .await;
    assert_eq!(text(&link, "ps | grep -c '[Z]  *\\[' || true").await, "0");
    let input: Vec<u8> = (0..3_000_000u32).map(|number| (number * 7) as u8).collect();
    let begin = Instant::now();
    let output = link.exec_capture(sh("cat"), &input).await.unwrap();
    eprintln!("3 MB in and out: {:?}", begin.elapsed());
    assert!(output.stdout == input);
    link.sync().await.unwrap();
    link.drop_caches().await.unwrap();
    link.shutdown(ShutdownKind::Poweroff).await.unwrap();
    machine.await_end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "boots a machine: see the head of the file"]
async fn hosts_come_and_go_without_a_lost_wake_up_and_an_idle_agent_does_not_spin() {
    let guest = Guest::make();
    let machine = guest.boot(LINE);
    let mut link = machine.link(0).await;
    live(&mut link, &greeting(1, Reason::Boot)).await;
    drop(link);
    let begin = Instant::now();
    for round in 0..100 {
        let mut link = machine.link(round % 3).await;
        link.reattach(Epoch([1; 16]), BOOT_LIMIT).await.unwrap();
        assert_eq!(
            text(&link, &format!("echo {round}")).await,
            round.to_string()
        );
    }
    eprintln!("100 connections with a command each: {:?}", begin.elapsed());
    // The worst: connections that end in the middle of frames, at once.
    for round in 0..50usize {
        let mut stream = UnixStream::connect(machine.folder.join("port.0")).unwrap();
        stream.write_all(&vec![0x41; round * 37]).unwrap();
    }
    // Measured in the guest while no host is connected to any port.
    let look = "for t in /proc/1/task/*; do cat $t/comm; cat $t/stat; grep ctxt $t/status; done";
    let script = format!(
        "(sleep 1; {look} > /data/before; sleep 10; {look} > /data/after) > /dev/null 2>&1 &"
    );
    let mut link = machine.link(0).await;
    link.reattach(Epoch([1; 16]), BOOT_LIMIT).await.unwrap();
    text(&link, &script).await;
    drop(link);
    tokio::time::sleep(Duration::from_secs(13)).await;
    let mut link = machine.link(0).await;
    link.reattach(Epoch([1; 16]), BOOT_LIMIT).await.unwrap();
    text(
        &link,
        "while ! test -s /data/after; do sleep 0.2; done; sleep 1",
    )
    .await;
    let before = idle_cost(&text(&link, "cat /data/before").await);
    let after = idle_cost(&text(&link, "cat /data/after").await);
    let (ticks, switches) = (after.0 - before.0, after.1 - before.1);
    eprintln!(
        "agent in 10 s without a host, 8 ports: {ticks} ticks of 10 ms, {switches} context switches"
    );
    assert!(
        switches < 10 && ticks < 5,
        "an idle agent costs {ticks} ticks and {switches} switches in 10 s"
    );
}

/// CPU ticks and context switches over all threads.
fn idle_cost(text: &str) -> (u64, u64) {
    let ticks = text
        .lines()
        .filter(|line| line.contains(')'))
        .map(cpu_ticks)
        .sum();
    let switches = text.lines().filter(|line| line.contains("_ctxt_switches:"));
    (
        ticks,
        switches
            .map(|line| line.rsplit('\t').next().unwrap().parse::<u64>().unwrap())
            .sum(),
    )
}

fn cpu_ticks(stat: &str) -> u64 {
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_ascii_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "boots a machine: see the head of the file"]
async fn a_freeze_stops_writes_and_ends_with_its_host() {
    let guest = Guest::make();
    let machine = guest.boot(LINE);
    let mut link = machine.link(0).await;
    live(&mut link, &greeting(1, Reason::Boot)).await;
    let mut writer = machine.link(1).await;
    writer.reattach(Epoch([1; 16]), BOOT_LIMIT).await.unwrap();
    let script =
        "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); echo $i > /data/counter; echo $i; done";
    let (mut reader, stdout) = tokio::io::duplex(1 << 20);
    let (_sender, signals) = mpsc::channel(1);
    let io = ExecIo {
        stdin: tokio::io::empty(),
        stdout,
        stderr: tokio::io::sink(),
    };
    let running = tokio::spawn(async move {
        writer
            .start(sh(script))
            .await
            .unwrap()
            .run(io, signals)
            .await
    });
    let mut buffer = vec![0; 1 << 16];
    let mut flows = async |limit: u64| {
        let mut any = false;
        let end = tokio::time::Instant::now() + Duration::from_millis(limit);
        while let Ok(Ok(count)) =
            tokio::time::timeout_at(end, tokio::io::AsyncReadExt::read(&mut reader, &mut buffer))
                .await
        {
            any = count > 0;
        }
        any
    };
    assert!(flows(500).await, "the writer writes");
    let frozen = link.freeze(Duration::from_secs(60)).await.unwrap();
    assert_eq!(frozen.mounts, [b"/".to_vec()]);
    flows(300).await;
    assert!(!flows(700).await, "a frozen file system takes no write");
    link.thaw().await.unwrap();
    assert!(flows(500).await, "and goes on when it is thawed");
    link.freeze(Duration::from_secs(60)).await.unwrap();
    flows(300).await;
    assert!(!flows(500).await);
    drop(link);
    assert!(
        flows(3000).await,
        "a host that goes away leaves nothing frozen"
    );
    running.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "boots a machine: see the head of the file"]
async fn a_capture_in_the_middle_of_a_transfer_never_mixes_two_lives() {
    let guest = Guest::make();
    let mut machine = guest.boot(LINE);
    let mut link = machine.link(0).await;
    live(&mut link, &greeting(1, Reason::Boot)).await;
    text(&link, "echo 0 > /data/runs").await;
    for life in 2..=13u8 {
        // In the middle of megabytes both ways, cut at another place each time.
        let request = ExecRequest {
            stdin: true,
            ..sh("echo started >> /data/started; cat; echo ended >> /data/ended")
        };
        let (_sender, signals) = mpsc::channel(1);
        let io = ExecIo {
            stdin: tokio::io::repeat(life),
            stdout: tokio::io::sink(),
            stderr: tokio::io::sink(),
        };
        let running = link.start(request).await.unwrap();
        let cut = Duration::from_millis(17 * u64::from(life));
        let unfinished = tokio::time::timeout(cut, running.run(io, signals)).await;
        assert!(unfinished.is_err(), "{unfinished:?}");
        // Half a request, never to be completed, in the stream at the moment of the capture.
        let state = guest.path("state");
        machine.capture(&state);
        drop(link);
        machine.qmp("{\"execute\":\"quit\"}");
        machine.await_end();
        machine = guest.start(
            "none",
            &["-S", "-incoming", &format!("exec:cat {}", state.display())],
        );
        machine.await_status("{\"execute\":\"query-status\"}", "\"paused\"");
        let begin = Instant::now();
        let greeting = greeting(life, Reason::Restore);
        link = machine.link(0).await;
        // Both orders: the vCPUs go on before the greeting, or some time after it.
        let resume_first = life % 3 != 0;
        if resume_first {
            machine.qmp("{\"execute\":\"cont\"}");
        }
        let handshake = link.handshake(&greeting, BOOT_LIMIT);
        let resume = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if !resume_first {
                machine.qmp("{\"execute\":\"cont\"}");
            }
        };
        let (ready, ()) = tokio::join!(handshake, resume);
        let ready = match ready {
            Ok(ready) => ready,
            Err(error) => {
                machine.report().await;
                panic!("life {life}: {error}");
            }
        };
        link.release().await.unwrap();
        let discarded = link.discarded();
        eprintln!(
            "life {life}: ready after {:?}, clock {} ms behind, {} stale frames and {} bytes of half frames discarded",
            begin.elapsed(),
            ready.clock_behind_ns().unwrap() / 1_000_000,
            discarded.stale_frames,
            discarded.garbage_bytes
        );
        assert_eq!(text(&link, "hostname").await, format!("life-{life}"));
        let stale = machine
            .link(1)
            .await
            .reattach(Epoch([life - 1; 16]), BOOT_LIMIT)
            .await;
        assert!(
            matches!(stale, Err(LinkError::StepFailed { .. })),
            "{stale:?}"
        );
        let runs = text(
            &link,
            "n=$(cat /data/runs); echo $((n+1)) > /data/runs; cat /data/runs",
        )
        .await;
        assert_eq!(runs, (life - 1).to_string(), "every command once");
        let guest_s: u64 = text(&link, "date +%s").await.parse().unwrap();
        assert!(guest_s.abs_diff(now_s()) <= 2);
    }
    assert_eq!(text(&link, "wc -l < /data/started").await, "12");
    assert_eq!(
        text(&link, "test -e /data/ended; echo $?").await,
        "1",
        "no half input was taken for a whole one"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "boots a machine: see the head of the file"]
async fn forks_of_one_capture_draw_different_random_bytes() {
    let guest = Guest::make();
    let mut machine = guest.boot(LINE);
    let mut link = machine.link(0).await;
    live(&mut link, &greeting(1, Reason::Boot)).await;
    let state = guest.path("state");
    machine.capture(&state);
    drop(link);
    drop(machine);
    let mut draws = Vec::new();
    for life in [2, 3] {
        let mut fork = guest.start(
            "none",
            &[
                "-S",
                "-snapshot",
                "-incoming",
                &format!("exec:cat {}", state.display()),
            ],
        );
        fork.await_status("{\"execute\":\"query-status\"}", "\"paused\"");
        let mut link = fork.link(0).await;
        fork.qmp("{\"execute\":\"cont\"}");
        live(&mut link, &greeting(life, Reason::Fork)).await;
        draws.push(
            text(
                &link,
                "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid",
            )
            .await,
        );
    }
    assert_ne!(draws[0], draws[1]);
}

#[test]
#[ignore = "boots a machine: see the head of the file"]
fn a_machine_that_cannot_start_says_why_and_powers_off() {
    let guest = Guest::make();
    for (line, why) in [
        (
            "root=/dev/vda rw init=/no/such/init",
            "run /no/such/init of /dev/vda: No such file",
        ),
        ("rw", "has no root="),
        ("root=/dev/vda rootfstype=vfat", "mount /dev/vda as vfat"),
    ] {
        let mut machine = guest.boot(line);
        machine.await_end();
        let console = machine.console();
        assert!(
            console.contains("cannot start the machine") && console.contains(why),
            "{line}: {console}"
        );
    }
}
