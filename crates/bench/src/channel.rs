//! What the way to the agent costs: a command's round trip, and files in both directions beside a port without an agent.

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use stead_agent_link::AgentLink;
use stead_agent_link::files::{CopyError, CopyOptions, Download, Guest, Progress, Upload};
use stead_sys::durable;

use crate::Bench;
use crate::error::{BenchError, Doing, Result};
use crate::first::{TAG, copy};
use crate::peer::{Peer, RAW_PORT, RAW_SOCKET};
use crate::ready::{attach, percentile, run};
use crate::report::{Row, Value, median};

/// Commands one after the other.
const ROUND_TRIPS: usize = 50;
/// What a round trip may take.
const ROUND_TRIP_WITHIN: Duration = Duration::from_millis(3);
/// The length of the file that is copied.
const FILE_BYTES: usize = 64 << 20;
/// Where it lies in the guest: in its memory, so that no disk is measured.
const IN_GUEST: &str = "/dev/shm/bench-file";

#[derive(Debug, Default)]
struct Times {
    trips: Vec<Duration>,
    up: Vec<Duration>,
    down: Vec<Duration>,
    raw_up: Vec<Duration>,
    raw_down: Vec<Duration>,
}

/// Measures in one fork and one peer, in turns.
///
/// # Errors
/// When anything of it fails.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    let first = bench.first().await?;
    let folder = bench.scratch.path("channel");
    durable::create_dir(&folder, 0o711).doing("create a folder")?;
    let (file, image) = (folder.join("file"), folder.join("peer.qcow2"));
    write_noise(&file)?;
    copy(&first.image, &image).await?;
    let sockets = folder.join("peer");
    let mut peer = bench.spec.load(&sockets, &image, TAG).await?;
    let fork = bench.worker.fork(&first.checkpoint, 1).await?;
    let report = fork.reports.first();
    let report = report.ok_or_else(|| BenchError::new("fork", "no fork is there"))?;
    let link = attach(report).await?;
    let mut times = Times::default();
    for round in 0..=bench.runs {
        bench.say(&format!("round trips and files, round {round}"));
        let mut now = Times::default();
        ours(&link, &file, &mut now).await?;
        raw(&mut peer, &sockets, &file, &mut now).await?;
        // The first round only warms both up.
        if round > 0 {
            times.add(now);
        }
    }
    drop(link);
    peer.quit().await?;
    bench.worker.remove(&fork).await?;
    durable::remove_tree(&folder).doing("remove a folder")?;
    give(bench, &times);
    Ok(())
}

impl Times {
    fn add(&mut self, other: Self) {
        self.trips.extend(other.trips);
        self.up.extend(other.up);
        self.down.extend(other.down);
        self.raw_up.extend(other.raw_up);
        self.raw_down.extend(other.raw_down);
    }
}

fn write_noise(path: &Path) -> Result<()> {
    let mut noise = vec![0; FILE_BYTES];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let mut file = durable::create_scratch(path, 0o600).doing("create a file")?;
    file.write_all(&noise).doing("write a file")
}

async fn ours(link: &AgentLink, file: &Path, times: &mut Times) -> Result<()> {
    for _ in 0..ROUND_TRIPS {
        let begun = Instant::now();
        run(link, &["true"]).await?;
        times.trips.push(begun.elapsed());
    }
    let back = file.with_extension("back");
    let mut upload = Upload::new(file.to_owned(), IN_GUEST.into(), CopyOptions::default());
    let copied = aside(link, move |guest| upload.run(guest, &mut quiet).map(drop));
    times.up.push(copied.await?);
    let mut download = Download::new(IN_GUEST.into(), back.clone(), CopyOptions::default());
    let copied = aside(link, move |guest| download.run(guest, &mut quiet).map(drop));
    times.down.push(copied.await?);
    durable::remove_file(&back).doing("remove a copy")?;
    run(link, &["rm", IN_GUEST]).await
}

fn quiet(_: &Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Copies on a thread of its own; gives how long it took.
async fn aside(
    link: &AgentLink,
    work: impl FnOnce(&mut Guest<'_>) -> std::result::Result<(), CopyError> + Send + 'static,
) -> Result<Duration> {
    let doing = "copy a file over a link";
    let mut stream = link.files().doing(doing)?;
    let begun = Instant::now();
    let copied = tokio::task::spawn_blocking(move || work(&mut Guest::new(&mut stream)));
    copied.await.doing(doing)?.doing(doing)?;
    Ok(begun.elapsed())
}

/// The same bytes through a port at which no agent listens, but `head` and `cat`.
async fn raw(peer: &mut Peer, sockets: &Path, file: &Path, times: &mut Times) -> Result<()> {
    let device = format!("/dev/virtio-ports/{RAW_PORT}");
    let into = format!("head -c {FILE_BYTES} {device} > {IN_GUEST}");
    let out_of = format!("cat {IN_GUEST} > {device}");
    let noise = std::fs::read(file).doing("read a file")?;
    // Open until all is done: what is under way when a connection ends is lost.
    let port = UnixStream::connect(sockets.join(RAW_SOCKET)).doing("connect to a port")?;
    let begun = Instant::now();
    let writer = with_port(&port, move |mut port| port.write_all(&noise));
    let (written, read) = tokio::join!(writer, peer.shell(&into));
    written?;
    read?;
    times.raw_up.push(begun.elapsed());
    let begun = Instant::now();
    let reader = with_port(&port, |mut port| port.read_exact(&mut vec![0; FILE_BYTES]));
    let (read, written) = tokio::join!(reader, peer.shell(&out_of));
    read?;
    written?;
    times.raw_down.push(begun.elapsed());
    peer.exec(&["rm", IN_GUEST]).await
}

async fn with_port(
    port: &UnixStream,
    work: impl FnOnce(UnixStream) -> std::io::Result<()> + Send + 'static,
) -> Result<()> {
    let doing = "use a port without an agent";
    let port = port.try_clone().doing(doing)?;
    let done = tokio::task::spawn_blocking(move || work(port));
    done.await.doing(doing)?.doing(doing)
}

fn give(bench: &mut Bench, times: &Times) {
    let rate = |times: &[Duration]| Value::Rate(FILE_BYTES as f64 / median(times).as_secs_f64());
    let rows = [
        (
            "a command's round trip over an open link, p50",
            Value::Time(percentile(&times.trips, 50)),
            Value::Time(ROUND_TRIP_WITHIN),
            "what was promised",
            Some(1.0),
        ),
        (
            "a file into the guest, checked",
            rate(&times.up),
            rate(&times.raw_up),
            "a port without an agent, head in the guest",
            None,
        ),
        (
            "a file out of the guest, checked",
            rate(&times.down),
            rate(&times.raw_down),
            "a port without an agent, cat in the guest",
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
}
