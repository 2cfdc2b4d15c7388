//! What the agent does to a guest in which systemd runs: one guest for all of it, since it takes seconds to boot.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use stead_agent_link::files::{
    CopyOptions, Download, FileStream, Guest as Files, HashKind, Progress, Upload,
};
use stead_agent_link::{
    AgentLink, CommandEvent, Epoch, ExecRequest, ExitStatus, ForkIdentity, Greeting, Identity, Pty,
    Reason, ShutdownKind,
};
use stead_sys::durable::{Existing, publish};

const LIMIT: Duration = Duration::from_secs(120);
/// How long the workload is held; more than a busy machine holds anything up by itself.
const STILL: Duration = Duration::from_millis(400);

/// A guest, through the one port that it has.
struct Guest<'a> {
    socket: &'a Path,
    link: AgentLink,
}

impl<'a> Guest<'a> {
    async fn enter(socket: &'a Path, life: u8, reason: Reason, identity: Identity) -> Self {
        let mut link = AgentLink::connect(socket).await.expect("connect");
        let greeting = Greeting {
            epoch: Epoch([life; 16]),
            reason,
            identity,
        };
        let ready = link.handshake(&greeting, LIMIT).await.expect("ready");
        println!("life {life}: {:?}", ready.phases);
        link.release().await.expect("released");
        Self { socket, link }
    }

    async fn again(self, life: u8) -> Self {
        let socket = self.socket;
        drop(self);
        Self::enter(socket, life, Reason::Restore, Identity::Keep).await
    }

    async fn sh(&self, script: &str) -> String {
        let request = ExecRequest {
            argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
            ..ExecRequest::default()
        };
        let output = self.link.exec_capture(request, b"").await;
        let output = output.unwrap_or_else(|error| panic!("{script}: {error:?}"));
        let text = String::from_utf8(output.stdout).expect("text");
        text.trim().to_owned()
    }

    /// The agent's process number, out-of-memory score and control group.
    async fn agent(&self) -> (String, String) {
        let pid = self
            .sh("systemctl show --value -p MainPID stead-agent")
            .await;
        let script = format!("cat /proc/{pid}/oom_score_adj /proc/{pid}/cgroup");
        (pid, self.sh(&script).await)
    }
}

/// Says when it has not run for 300 ms, in hundredths of a second; without starting programs, since that takes long here.
const WATCH: &str = "last=$(cut -d. -f1 /proc/uptime)00; while read -r now rest < /proc/uptime; do \
    now=${now%.*}${now#*.}; gap=$((now - last)); last=$now; [ $gap -lt 30 ] || echo $gap; done";
const AGENT_IS: &str = "-1000\n0::/stead-agent.service/agent";

/// Boots nothing itself: `socket` is the port of a guest whose agent is there, and `agent` its program.
pub fn check(socket: &Path, agent: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        let guest = Guest::enter(socket, 1, Reason::Boot, Identity::Keep).await;
        stands_still(&guest).await;
        let guest = is_somebody_else(guest).await;
        let guest = survives(guest).await;
        is_upgraded(guest, agent).await;
    });
}

async fn stands_still(guest: &Guest<'_>) {
    let (_, found) = guest.agent().await;
    assert_eq!(found, AGENT_IS);
    let own = guest
        .sh("cat /proc/self/cgroup /proc/self/oom_score_adj")
        .await;
    assert_eq!(own, "0::/stead-agent.service/commands\n0");
    guest
        .sh(&format!(
            "setsid sh -c '{WATCH}' >/root/gaps </dev/null 2>&1 &"
        ))
        .await;
    guest
        .sh(&format!(
            "systemd-run --quiet sh -c '{} >/root/unit-gaps'",
            WATCH.replace('$', "$$")
        ))
        .await;
    guest
        .sh("systemd-run --quiet --unit stays sleep 1000; sleep 0.5")
        .await;

    let mut took_ms = Vec::new();
    for _ in 0..5 {
        let begin = Instant::now();
        guest.link.freeze_workload(LIMIT).await.expect("frozen");
        took_ms.push(begin.elapsed().as_millis());
        tokio::time::sleep(STILL).await;
        let refused = guest.link.start(ExecRequest {
            argv: vec!["true".into()],
            ..ExecRequest::default()
        });
        let text = format!("{:?}", refused.await.expect_err("frozen"));
        assert!(text.contains("WorkloadFrozen"), "{text}");
        let status = guest.link.ping().await.expect("a status");
        println!("{status:?}");
        guest.link.thaw_workload().await.expect("thawed");
        guest.sh("sleep 0.1").await;
    }
    println!("frozen within {took_ms:?} ms");
    for file in ["/root/gaps", "/root/unit-gaps"] {
        let text = guest.sh(&format!("cat {file}")).await;
        println!("{file}: {:?}", text.lines().collect::<Vec<_>>());
        let still = text.lines().filter_map(|line| line.parse::<u64>().ok());
        let long = still
            .filter(|gap| gap * 10 + 10 >= STILL.as_millis() as u64)
            .count();
        assert!(long >= 5, "{file}: it ran on: {text}");
    }
    guest.sh("pkill -f '[p]roc/uptime'").await;
}

async fn is_somebody_else(guest: Guest<'_>) -> Guest<'_> {
    let before = guest
        .sh("cat /etc/machine-id; hostname; touch /root/secret")
        .await;
    let fork = ForkIdentity {
        hostname: Some("fork-9".to_owned()),
        machine_id: true,
        ssh_host_keys: true,
        clear: vec!["/root/secret".into()],
        ..ForkIdentity::default()
    };
    let socket = guest.socket;
    drop(guest);
    let guest = Guest::enter(socket, 2, Reason::Fork, Identity::Fork(Box::new(fork))).await;
    let after = guest
        .sh("cat /etc/machine-id; hostname; ls /root/secret 2>&1")
        .await;
    let (before, after): (Vec<&str>, Vec<&str>) =
        (before.lines().collect(), after.lines().collect());
    assert!(
        before[0].len() == 32 && after[0].len() == 32 && before[0] != after[0],
        "{after:?}"
    );
    assert_eq!((before[1], after[1]), ("sandbox", "fork-9"));
    assert!(after[2].contains("No such file"), "{after:?}");
    assert_eq!(
        guest.sh("getent hosts fork-9 | cut -d' ' -f1").await,
        "127.0.0.1"
    );
    guest
}

/// An agent that is killed is started again, and everything is as it was.
async fn survives(guest: Guest<'_>) -> Guest<'_> {
    let (pid, _) = guest.agent().await;
    let kill = ExecRequest {
        argv: vec!["kill".into(), "-9".into(), pid.as_str().into()],
        ..ExecRequest::default()
    };
    guest
        .link
        .exec_capture(kill, b"")
        .await
        .expect_err("its agent has gone");
    let guest = guest.again(3).await;
    let (next, found) = guest.agent().await;
    assert_ne!(pid, next);
    assert_eq!(found, AGENT_IS);
    assert_eq!(guest.sh("systemctl is-active stays").await, "active");
    guest.link.freeze_workload(LIMIT).await.expect("frozen");
    guest.link.thaw_workload().await.expect("thawed");
    guest
}

async fn is_upgraded(guest: Guest<'_>, agent: &Path) {
    let mut bytes = std::fs::read(agent).expect("read");
    bytes.push(0);
    let digest = blake3::hash(&bytes);
    let (pid, _) = guest.agent().await;
    guest
        .sh("cp /usr/local/sbin/stead-agent /root/next; head -c 1 /dev/zero >> /root/next")
        .await;
    let upgrade = ExecRequest {
        argv: vec![
            "stead-agent".into(),
            "upgrade".into(),
            "/root/next".into(),
            digest.to_string().as_str().into(),
        ],
        ..ExecRequest::default()
    };
    guest
        .link
        .exec_capture(upgrade, b"")
        .await
        .expect_err("its agent has become another");
    let guest = guest.again(4).await;
    let (same, found) = guest.agent().await;
    assert_eq!(pid, same, "a service manager would notice");
    assert_eq!(found, AGENT_IS);
    let running = guest
        .sh(&format!("cmp /proc/{pid}/exe /root/next && echo the next"))
        .await;
    assert_eq!(running, "the next");
    assert_eq!(
        guest
            .sh("systemctl show --value -p NRestarts stead-agent")
            .await,
        "1"
    );
    let zombies = guest
        .sh(&format!("ps --ppid {pid} -o stat= | grep -c Z || true"))
        .await;
    assert_eq!(zombies, "0");
    println!("{:?}", guest.link.ping().await.expect("a status"));
}

/// The same for a guest in which the agent is process 1 and busybox is all there is; the last that it is told is to power off.
pub fn check_minimal(socket: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        let guest = Guest::enter(socket, 1, Reason::Boot, Identity::Keep).await;
        is_process_1(&guest).await;
        is_frozen_and_goes_on(&guest).await;
        let guest = is_another_fork(guest).await;
        let guest = goes_on_under_another_agent(guest).await;
        guest.link.freeze_workload(LIMIT).await.expect("frozen");
        let off = guest.link.shutdown(ShutdownKind::Poweroff).await;
        off.expect("it powers off, and thaws before");
    });
}

async fn is_process_1(guest: &Guest<'_>) {
    let found = guest
        .sh("cat /proc/1/comm /proc/1/cgroup /proc/1/oom_score_adj /proc/self/cgroup; id -u; tty < /dev/null")
        .await;
    assert_eq!(
        found,
        "stead-agent\n0::/agent\n-1000\n0::/commands\n0\nnot a tty"
    );
    guest.sh("(sleep 0.2 &) ; sleep 0.5").await;
    let zombies = guest.sh("grep -l '^State:.Z' /proc/[0-9]*/status | wc -l");
    assert_eq!(zombies.await, "0", "orphans are reaped");
    let typed = ExecRequest {
        argv: ["sh", "-c", "tty"].map(Into::into).to_vec(),
        pty: Some(Pty {
            rows: 24,
            cols: 80,
            term: String::new(),
        }),
        ..ExecRequest::default()
    };
    let output = guest.link.exec_capture(typed, b"").await.expect("runs");
    assert!(output.stdout.starts_with(b"/dev/pts/"), "{output:?}");
    println!("{:?}", guest.link.ping().await.expect("a status"));
}

async fn is_frozen_and_goes_on(guest: &Guest<'_>) {
    guest
        .sh(&format!(
            "setsid sh -c '{WATCH}' >/tmp/gaps </dev/null 2>&1 & sleep 0.5"
        ))
        .await;
    guest.link.freeze_workload(LIMIT).await.expect("frozen");
    let frozen = guest.link.freeze(LIMIT).await.expect("frozen, too");
    assert_eq!(frozen.mounts, [b"/".to_vec()]);
    tokio::time::sleep(STILL).await;
    guest.link.thaw().await.expect("thawed");
    guest.link.thaw_workload().await.expect("thawed");
    guest.sh("sleep 0.3; pkill -f '[p]roc/uptime'").await;
    let text = guest.sh("cat /tmp/gaps").await;
    let still = text.lines().filter_map(|line| line.parse::<u64>().ok());
    let is_long = |gap: u64| gap * 10 + 10 >= STILL.as_millis() as u64;
    assert!(still.into_iter().any(is_long), "it ran on: {text}");
}

async fn is_another_fork(guest: Guest<'_>) -> Guest<'_> {
    let fork = ForkIdentity {
        hostname: Some("fork-9".to_owned()),
        machine_id: true,
        ssh_host_keys: true,
        clear: vec!["/tmp/gaps".into()],
        ..ForkIdentity::default()
    };
    guest.link.freeze_workload(LIMIT).await.expect("frozen");
    let socket = guest.socket;
    drop(guest);
    let guest = Guest::enter(socket, 2, Reason::Fork, Identity::Fork(Box::new(fork))).await;
    let found = guest
        .sh("hostname; cat /etc/hostname; wc -c < /etc/machine-id")
        .await;
    assert_eq!(found, "fork-9\nfork-9\n33");
    guest
}

/// A command that was started before is attached to afterwards, in the same life.
async fn goes_on_under_another_agent(guest: Guest<'_>) -> Guest<'_> {
    guest
        .sh("cp /usr/local/sbin/stead-agent /root/next; head -c 1 /dev/zero >> /root/next")
        .await;
    let mut bytes = std::fs::read(super::agent()).expect("read");
    bytes.push(0);
    let digest = blake3::hash(&bytes).to_string();
    let asking = ExecRequest {
        argv: ["sh", "-c", "echo one; read word; echo $word; exit 7"]
            .map(Into::into)
            .to_vec(),
        stdin: true,
        ..ExecRequest::default()
    };
    let key = guest.link.start(asking).await.expect("runs").key;
    let upgrade = ExecRequest {
        argv: ["stead-agent", "upgrade", "/root/next", &digest]
            .map(Into::into)
            .to_vec(),
        ..ExecRequest::default()
    };
    let cut = guest.link.exec_capture(upgrade, b"").await;
    cut.expect_err("its agent has become another");
    let socket = guest.socket;
    drop(guest);
    let mut link = AgentLink::connect(socket).await.expect("connect");
    link.reattach(Epoch([2; 16]), LIMIT)
        .await
        .expect("the same life");
    let mut command = link.attach(key, [0, 0]).await.expect("known");
    assert!(command.input.write(b"two\n").await.expect("sent"));
    let (mut seen, mut status) = (Vec::new(), None);
    while status.is_none() {
        match command.output.next().await.expect("goes on") {
            CommandEvent::Output { stream, data } => {
                command.output.consumed(stream, data.len());
                seen.extend(data);
            }
            CommandEvent::Exit(found) => status = Some(found),
            other @ (CommandEvent::Detached { .. } | CommandEvent::Broken(_)) => {
                panic!("{other:?}")
            }
        }
    }
    assert_eq!(seen, b"one\ntwo\n");
    assert_eq!(status, Some(ExitStatus::Code(7)));
    let guest = Guest { socket, link };
    let running = guest.sh("cmp /proc/1/exe /root/next && echo the next");
    assert_eq!(running.await, "the next");
    guest
}

const SPEED_BYTES: usize = 64 << 20;

/// How fast files are copied, beside the bare port: `raw` is another port of the guest, of which no frame knows.
pub fn how_fast(socket: &Path, raw: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        let guest = Guest::enter(socket, 7, Reason::Boot, Identity::Keep).await;
        let folder = tempfile::tempdir().expect("folder");
        let mut bytes = vec![0; SPEED_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        let there = folder.path().join("there");
        publish(&there, 0o600, &bytes, Existing::Replace).expect("written");
        guest.sh("mount -t tmpfs none /srv").await;
        for hash in [HashKind::Blake3, HashKind::Crc32c, HashKind::Blake3, HashKind::Crc32c] {
            let stream = guest.link.files().expect("a session");
            let place = folder.path().to_owned();
            let copied = tokio::task::spawn_blocking(move || copy_both_ways(stream, &place, hash));
            let [to, from] = copied.await.expect("no panic");
            println!("{hash:?}: {to:.0} MB/s in, {from:.0} MB/s out");
        }
        let device = guest
            .sh("cd /sys/class/virtio-ports; for p in *; do read n < $p/name; [ $n = raw ] && echo /dev/$p; done; true")
            .await;
        let script = format!(
            "head -c {SPEED_BYTES} /srv/there > {device}; head -c {SPEED_BYTES} {device} > /srv/raw; echo k > {device}"
        );
        let command = guest.sh(&script);
        let raw = raw.to_owned();
        let host = tokio::task::spawn_blocking(move || bare_both_ways(&raw, &bytes));
        let (_, speed) = tokio::join!(command, host);
        let [to, from] = speed.expect("no panic");
        println!("the bare port: {to:.0} MB/s in, {from:.0} MB/s out");
        guest.sh("cmp /srv/there /srv/raw").await;
        println!("in the guest: {}", guest.sh("dd if=/srv/there of=/dev/null bs=28672 2>&1 | tail -n 1").await);
    });
}

fn mb_per_s(begin: Instant) -> f64 {
    SPEED_BYTES as f64 / 1e6 / begin.elapsed().as_secs_f64()
}

fn copy_both_ways(mut stream: FileStream, folder: &Path, hash: HashKind) -> [f64; 2] {
    let options = CopyOptions {
        hash,
        ..CopyOptions::default()
    };
    let (there, back) = (folder.join("there"), folder.join("back"));
    let mut listener = |_: &Progress<'_>| std::ops::ControlFlow::Continue(());
    let begin = Instant::now();
    let mut upload = Upload::new(there.clone(), "/srv/there".into(), options);
    let sent = upload.run(&mut Files::new(&mut stream), &mut listener);
    assert_eq!(sent.expect("sent").data_bytes, SPEED_BYTES as u64);
    let to = mb_per_s(begin);
    let begin = Instant::now();
    let mut download = Download::new("/srv/there".into(), back.clone(), options);
    let fetched = download.run(&mut Files::new(&mut stream), &mut listener);
    fetched.expect("fetched");
    let from = mb_per_s(begin);
    let same = |path: &Path| blake3::hash(&std::fs::read(path).expect("read"));
    assert_eq!(same(&there), same(&back));
    [to, from]
}

fn bare_both_ways(raw: &Path, bytes: &[u8]) -> [f64; 2] {
    let mut port = UnixStream::connect(raw).expect("connect");
    let mut found = vec![0; bytes.len()];
    port.read_exact(&mut found[..1]).expect("it has begun");
    let begin = Instant::now();
    port.read_exact(&mut found[1..]).expect("read");
    let from = mb_per_s(begin);
    assert!(found == bytes);
    let begin = Instant::now();
    port.write_all(bytes).expect("written");
    port.read_exact(&mut found[..1]).expect("it came");
    [mb_per_s(begin), from]
}
