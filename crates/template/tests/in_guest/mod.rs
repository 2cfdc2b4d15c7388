//! What the agent does to a guest in which systemd runs: one guest for all of it, since it takes seconds to boot.

use std::path::Path;
use std::time::{Duration, Instant};

use stead_agent_link::{AgentLink, Epoch, ExecRequest, ForkIdentity, Greeting, Identity, Reason};

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
    // Each writes down when it has not run for 300 ms, in hundredths of a second; without starting programs, since that takes
    // long here.
    let watch = "last=$(cut -d. -f1 /proc/uptime)00; while read -r now rest < /proc/uptime; do \
        now=${now%.*}${now#*.}; gap=$((now - last)); last=$now; [ $gap -lt 30 ] || echo $gap; done";
    guest
        .sh(&format!(
            "setsid sh -c '{watch}' >/root/gaps </dev/null 2>&1 &"
        ))
        .await;
    guest
        .sh(&format!(
            "systemd-run --quiet sh -c '{} >/root/unit-gaps'",
            watch.replace('$', "$$")
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
