//! Forks: new VMs from one checkpoint, beside new processes with `-loadvm`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::future::join_all;

use crate::Bench;
use crate::error::{Doing, Result};
use crate::first::{First, TAG, copy};
use crate::memory::pss_of;
use crate::peer::{self, Peer};
use crate::report::{Row, Value, median, milliseconds};
use crate::worker::{Forks, pid_of};

/// How many at once.
const TOGETHER: u32 = 10;

/// Times and memory of one way.
#[derive(Debug, Default)]
struct Times {
    one: Vec<Duration>,
    ten: Vec<Duration>,
    pss: Vec<u64>,
}

/// Forks one and ten at once, in turns with the peer.
///
/// # Errors
/// When one does not start or answer.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    let first = bench.first().await?;
    let first = first.as_ref();
    let images = copies(bench, &first.image).await?;
    let (mut ours, mut theirs) = (Times::default(), Times::default());
    let mut forks = Vec::new();
    for round in 0..=bench.runs {
        bench.say(&format!("fork, round {round}"));
        let one = bench.worker.fork(&first.checkpoint, 1).await?;
        bench.worker.remove(&one).await?;
        let folder = bench.scratch.path("loadvm-0");
        let (peer, loaded) = peer::first_exec(&bench.spec, &folder, &images[0], TAG).await?;
        peer.quit().await?;
        // The first round only warms both up.
        if round > 0 {
            ours.one.push(one.answered);
            theirs.one.push(loaded);
            forks.push(one);
        }
    }
    for round in 0..bench.runs.div_ceil(2) {
        bench.say(&format!("{TOGETHER} forks at once, round {round}"));
        ten_of_ours(bench, first, &mut ours).await?;
        ten_of_theirs(bench, &images, &mut theirs).await?;
    }
    for image in &images {
        stead_sys::durable::remove_file(image).doing("remove a copy")?;
    }
    report(bench, &ours, &theirs, &forks);
    Ok(())
}

/// The peer's processes write to their disks: each needs its own copy, made before anything is timed.
async fn copies(bench: &Bench, image: &Path) -> Result<Vec<PathBuf>> {
    let mut images = Vec::new();
    for number in 0..TOGETHER {
        let own = bench.scratch.path(&format!("loadvm-{number}.qcow2"));
        copy(image, &own).await?;
        images.push(own);
    }
    Ok(images)
}

async fn ten_of_ours(bench: &Bench, first: &First, times: &mut Times) -> Result<()> {
    let forks = bench.worker.fork(&first.checkpoint, TOGETHER).await?;
    times.ten.push(forks.answered);
    let pids = forks
        .reports
        .iter()
        .map(pid_of)
        .collect::<Result<Vec<_>>>()?;
    times.pss.push(pss_of(&pids)?);
    bench.worker.remove(&forks).await
}

async fn ten_of_theirs(bench: &Bench, images: &[PathBuf], times: &mut Times) -> Result<()> {
    let begun = Instant::now();
    let starts = images.iter().enumerate().map(async |(number, image)| {
        let folder = bench.scratch.path(&format!("loadvm-{number}"));
        peer::first_exec(&bench.spec, &folder, image, TAG).await
    });
    let started = join_all(starts)
        .await
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    times.ten.push(begun.elapsed());
    let peers: Vec<Peer> = started.into_iter().map(|(peer, _)| peer).collect();
    let pids = peers.iter().map(Peer::pid).collect::<Result<Vec<_>>>()?;
    times.pss.push(pss_of(&pids)?);
    for peer in peers {
        peer.quit().await?;
    }
    Ok(())
}

fn report(bench: &mut Bench, ours: &Times, theirs: &Times, forks: &[Forks]) {
    let one = median(&theirs.one);
    let ten = median(&ours.ten);
    let command = median(&forks.iter().map(|forks| forks.command).collect::<Vec<_>>());
    let rows = [
        (
            "fork: QEMU's start to the first exec's answer",
            Value::Time(median(&ours.one)),
            Value::Time(one),
            "-loadvm in a new process",
            Some(0.4),
        ),
        (
            "ten forks at once, all answering",
            Value::Time(ten),
            Value::Time(one * TOGETHER),
            "ten times one -loadvm",
            Some(0.5),
        ),
        (
            "ten forks at once, all answering",
            Value::Time(ten),
            Value::Time(median(&theirs.ten)),
            "ten -loadvm at once",
            None,
        ),
        (
            "PSS of ten forks after their first exec",
            Value::Bytes(median(&ours.pss)),
            Value::Bytes(median(&theirs.pss)),
            "ten -loadvm guests",
            Some(0.5),
        ),
        (
            "fork: the whole command, every byte verified",
            Value::Time(command),
            Value::Time(one),
            "-loadvm, nothing verified",
            None,
        ),
    ];
    bench
        .report
        .rows
        .extend(rows.map(|(figure, ours, peer, beside, target)| Row {
            figure: figure.to_owned(),
            ours,
            peer,
            beside: beside.to_owned(),
            target,
        }));
    bench
        .report
        .parts
        .push(("one fork, the whole command".to_owned(), parts(forks)));
}

/// The medians of the command's parts.
fn parts(forks: &[Forks]) -> Vec<(String, String)> {
    let mut parts: Vec<(String, String)> = Vec::new();
    let Some(any) = forks.first() else {
        return parts;
    };
    for (index, (name, _)) in any.parts.iter().enumerate() {
        let times: Vec<Duration> = forks
            .iter()
            .filter_map(|forks| forks.parts.get(index).map(|(_, time)| *time))
            .collect();
        parts.push((name.clone(), milliseconds(median(&times))));
    }
    let ready: Vec<u64> = forks
        .iter()
        .flat_map(|forks| &forks.reports)
        .map(|report| report.ready_us)
        .collect();
    let ready = Duration::from_micros(median(&ready));
    parts.push((
        "of which QEMU's start to the agent's acknowledgement".to_owned(),
        milliseconds(ready),
    ));
    let verified = any
        .reports
        .first()
        .map_or(0, |report| report.verified_bytes);
    parts.push((
        "verified, holes included".to_owned(),
        crate::report::megabytes(verified),
    ));
    parts
}
