//! From a restore to the first answers, many times over: what is usual, and what the worst are.

use std::time::{Duration, Instant};

use futures::future::join_all;
use stead_agent_link::{AgentLink, ExecRequest, ExitStatus};
use stead_engine::RestoreReport;

use crate::Bench;
use crate::error::{BenchError, Doing, Result};
use crate::first::{TAG, copy};
use crate::peer;
use crate::report::{Row, Value, milliseconds};
use crate::worker::pid_of;

/// Restores of ours for each run: 200 with the usual five.
const RESTORES_A_RUN: usize = 40;
/// One of the peer for so many of ours.
const PEER_EVERY: usize = 8;
/// Commands at once.
const TOGETHER: usize = 10;
/// The most that so many at once may take.
const TOGETHER_WITHIN: Duration = Duration::from_millis(30);
/// How long an agent may take to let somebody in again.
const WITHIN: Duration = Duration::from_secs(60);
/// A port that nothing else is using then.
const PORT: u8 = 6;

/// What the restores took.
#[derive(Debug, Default)]
struct Times {
    ours: Vec<Duration>,
    peers: Vec<Duration>,
    ten: Vec<Duration>,
}

/// Forks and answers, one after the other, in turns with the peer.
///
/// # Errors
/// When one does not start or answer.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    let first = bench.first().await?;
    let image = bench.scratch.path("ready.qcow2");
    copy(&first.image, &image).await?;
    let folder = bench.scratch.path("ready-loadvm");
    let mut times = Times::default();
    let count = bench.runs * RESTORES_A_RUN;
    // The first only warms both up.
    for number in 0..=count {
        if number % RESTORES_A_RUN == 0 {
            bench.say(&format!("{number} of {count} restores"));
        }
        let fork = bench.worker.fork(&first.checkpoint, 1).await?;
        let report = fork.reports.first();
        let report = report.ok_or_else(|| BenchError::new("fork", "no fork is there"))?;
        let ten = together(&attach(report).await?).await?;
        bench.worker.remove(&fork).await?;
        if number > 0 {
            times.ours.push(fork.answered);
            times.ten.push(ten);
        }
        if number % PEER_EVERY == 0 {
            let (peer, loaded) = peer::first_exec(&bench.spec, &folder, &image, TAG).await?;
            peer.quit().await?;
            times.peers.push(loaded);
        }
    }
    times.peers.remove(0);
    stead_sys::durable::remove_file(&image).doing("remove a copy")?;
    report(bench, &times);
    Ok(())
}

/// A link of our own to a fork's agent, in the life that the engine has begun.
///
/// # Errors
/// When the agent does not let us in.
pub async fn attach(report: &RestoreReport) -> Result<AgentLink> {
    let doing = "reach a fork's agent";
    let epoch = report.sandbox.epoch.as_deref();
    let epoch = epoch.ok_or_else(|| BenchError::new(doing, "it has no epoch"))?;
    let socket = format!(
        "/proc/{}/cwd/{}",
        pid_of(report)?,
        stead_vmm::dir::agent_socket(PORT)
    );
    let mut link = AgentLink::connect(socket.as_ref()).await.doing(doing)?;
    link.reattach(epoch.parse().doing(doing)?, WITHIN)
        .await
        .doing(doing)?;
    Ok(link)
}

/// Runs a command that must succeed.
///
/// # Errors
/// When it does not.
pub async fn run(link: &AgentLink, argv: &[&str]) -> Result<()> {
    let doing = "run a command over a link";
    let request = ExecRequest {
        argv: argv.iter().map(|word| (*word).into()).collect(),
        ..ExecRequest::default()
    };
    let output = link.exec_capture(request, b"").await.doing(doing)?;
    if output.status == ExitStatus::Code(0) {
        return Ok(());
    }
    Err(BenchError::new(doing, format!("{:?}", output.status)))
}

async fn together(link: &AgentLink) -> Result<Duration> {
    let begun = Instant::now();
    let commands = (0..TOGETHER).map(|_| run(link, &["true"]));
    join_all(commands)
        .await
        .into_iter()
        .collect::<Result<Vec<()>>>()?;
    Ok(begun.elapsed())
}

/// The value below which so many of a hundred lie.
///
/// # Panics
/// When there is none.
pub fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    assert!(!sorted.is_empty(), "something was measured");
    let at = (sorted.len() * percent / 100).min(sorted.len() - 1);
    sorted[at]
}

fn report(bench: &mut Bench, times: &Times) {
    let ours = |percent| Value::Time(percentile(&times.ours, percent));
    let peers = |percent| Value::Time(percentile(&times.peers, percent));
    let figure = "restore to the first exec's answer";
    let ten = Value::Time(percentile(&times.ten, 50));
    let rows = [
        ("p50", ours(50), peers(50), "p50 of -loadvm", Some(0.4)),
        ("p95", ours(95), peers(95), "p95 of -loadvm", None),
        ("p99", ours(99), ours(50), "its own p50", Some(2.0)),
    ];
    let rows = rows.map(|(which, ours, peer, beside, target)| Row {
        figure: format!("{figure}, {which} of {}", times.ours.len()),
        ours,
        peer,
        beside: beside.to_owned(),
        target,
    });
    bench.report.rows.extend(rows);
    bench.report.rows.push(Row {
        figure: format!("{TOGETHER} commands at once after a restore, all answered, p50"),
        ours: ten,
        peer: Value::Time(TOGETHER_WITHIN),
        beside: "what was promised".to_owned(),
        target: Some(1.0),
    });
    let spread = |times: &[Duration]| {
        [50, 95, 99, 100].map(|percent| {
            let time = milliseconds(percentile(times, percent));
            (format!("p{percent}"), time)
        })
    };
    for (what, times) in [
        ("restore to the first exec's answer", &times.ours),
        ("ten commands at once", &times.ten),
        ("the first exec after -loadvm", &times.peers),
    ] {
        bench
            .report
            .parts
            .push((what.to_owned(), spread(times).to_vec()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_value_below_which_so_many_lie() {
        let times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Duration::from_millis(51));
        assert_eq!(percentile(&times, 99), Duration::from_millis(100));
        assert_eq!(percentile(&times, 100), Duration::from_millis(100));
        assert_eq!(percentile(&times[..1], 95), Duration::from_millis(100));
    }
}
