//! Save images of a guest of 1 GiB with 300 MB used, beside `virsh save` of the same guest.
//!
//! The peer begins each round from an image of ours, so both save the same memory; `virsh save` ends its domain, and so
//! does `--stop` here, by which the whole time is measured. The pause is that of a save that the guest outlives.

use std::path::Path;
use std::time::{Duration, Instant};

use stead_engine::{AcceleratorChoice, CreateRequest, SaveReport, SaveRequest};
use stead_save_image::Format;

use crate::error::{BenchError, Doing, Result};
use crate::libvirt::Libvirt;
use crate::report::{Row, Value, median};
use crate::{Bench, TEMPLATE, first};

/// The sandbox, and with it the peer's domain.
const SANDBOX: &str = "saved";
const MEMORY_BYTES: u64 = 1 << 30;
/// With what a booted guest uses itself, about 300 MB.
const FILL: &str = "head -c 230000000 /dev/urandom > /dev/shm/filler";
/// The most that each figure may be, as a part of the peer's.
const TARGET: f64 = 0.7;
/// Our compression, and the peer's: libvirt 9.0 has no zstd, and lzop is the fastest that it has.
const PAIRS: [(Format, &str); 2] = [(Format::Raw, "raw"), (Format::Zstd, "lzop")];

/// What was measured of one way.
#[derive(Debug, Default)]
struct Figures {
    time: Vec<Duration>,
    stopped: Vec<Duration>,
    dirty: Vec<u64>,
}

/// Saves in turns.
///
/// # Errors
/// When libvirt is not installed, or anything fails.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    first::end(bench).await?;
    let folder = bench.scratch.path("save");
    stead_sys::durable::create_dir(&folder, 0o711).doing("create a folder")?;
    create(bench).await?;
    for (format, theirs) in PAIRS {
        let libvirt = Libvirt::start(&folder.join("libvirt"), theirs).await?;
        let (mut ours, mut peer) = (Figures::default(), Figures::default());
        for round in 0..=bench.runs {
            bench.say(&format!("save as {}, round {round}", format.name()));
            let (mut one, mut other) = (Figures::default(), Figures::default());
            round_of(bench, &folder, format, &libvirt, (&mut one, &mut other)).await?;
            // The first round only warms both up.
            if round > 0 {
                ours.add(one);
                peer.add(other);
            }
        }
        libvirt.end().await?;
        report(bench, format, theirs, &ours, &peer);
    }
    let removed = bench.worker.engine.remove(SANDBOX, true).await;
    removed.doing("remove a sandbox")
}

async fn create(bench: &Bench) -> Result<()> {
    let request = CreateRequest {
        template: TEMPLATE.to_owned(),
        name: Some(SANDBOX.to_owned()),
        memory_bytes: MEMORY_BYTES,
        cpus: 1,
        disk_bytes: None,
        extra_disks: Vec::new(),
        accelerator: AcceleratorChoice::Auto,
        agent: true,
    };
    let created = bench.worker.engine.create(&request).await;
    created.map(drop).doing("boot a sandbox")?;
    bench.worker.shell(SANDBOX, FILL).await
}

/// One save that the guest outlives, one that the peer makes of it, and one that ends it.
async fn round_of(
    bench: &Bench,
    folder: &Path,
    format: Format,
    libvirt: &Libvirt,
    (ours, peer): (&mut Figures, &mut Figures),
) -> Result<()> {
    let (image, theirs) = (folder.join("ours.save"), folder.join("theirs.save"));
    let outlived = save(bench, &image, format, false).await?;
    ours.stopped
        .push(Duration::from_micros(outlived.pause.paused_us));
    libvirt.run(&["restore", text(&image)?]).await?;
    write_out().await?;
    let begun = Instant::now();
    libvirt.run(&["save", SANDBOX, text(&theirs)?]).await?;
    peer.time.push(begun.elapsed());
    peer.stopped.push(begun.elapsed());
    peer.dirty.push(dirty_bytes()?);
    remove(&outlived)?;
    write_out().await?;
    let begun = Instant::now();
    let ended = save(bench, &image, format, true).await?;
    ours.time.push(begun.elapsed());
    ours.dirty.push(dirty_bytes()?);
    remove(&ended)?;
    stead_sys::durable::remove_file(&theirs).doing("remove the peer's image")?;
    let started = bench.worker.engine.start(SANDBOX).await;
    started.map(drop).doing("start a sandbox")?;
    bench.worker.shell(SANDBOX, FILL).await
}

async fn save(bench: &Bench, file: &Path, format: Format, stop: bool) -> Result<SaveReport> {
    let request = SaveRequest {
        file: file.to_owned(),
        format,
        stop,
    };
    let saved = bench.worker.engine.save_write(SANDBOX, &request).await;
    saved.doing("save a sandbox")
}

fn remove(saved: &SaveReport) -> Result<()> {
    for file in saved.overlays.iter().chain([&saved.file]) {
        stead_sys::durable::remove_file(file).doing("remove an image")?;
    }
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    let found = || BenchError::new("name a file", format!("{} is no text", path.display()));
    path.to_str().ok_or_else(found)
}

/// Everything that others have written reaches the disk.
async fn write_out() -> Result<()> {
    crate::program::run::<&str>("sync", &[]).await.map(drop)
}

/// What the host's page cache still has to write.
fn dirty_bytes() -> Result<u64> {
    let doing = "read how much of the page cache is dirty";
    let text = std::fs::read_to_string("/proc/meminfo").doing(doing)?;
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    match (of("Dirty:"), of("Writeback:")) {
        (Some(dirty), Some(writing)) => Ok((dirty + writing) * 1024),
        (_, _) => Err(BenchError::new(doing, "there is no such line")),
    }
}

impl Figures {
    fn add(&mut self, one: Self) {
        self.time.extend(one.time);
        self.stopped.extend(one.stopped);
        self.dirty.extend(one.dirty);
    }
}

fn report(bench: &mut Bench, format: Format, theirs: &str, ours: &Figures, peer: &Figures) {
    let times = |times: &[Duration]| Value::Time(median(times));
    let bytes = |bytes: &[u64]| Value::Bytes(median(bytes));
    let rows = [
        ("whole time of a save", times(&ours.time), times(&peer.time)),
        (
            "guest stopped by a save",
            times(&ours.stopped),
            times(&peer.stopped),
        ),
        (
            "page cache left dirty by a save",
            bytes(&ours.dirty),
            bytes(&peer.dirty),
        ),
    ];
    for (what, ours, peer) in rows {
        bench.report.rows.push(Row {
            figure: format!("{what}, {}", format.name()),
            ours,
            peer,
            beside: format!("virsh save, {theirs}"),
            target: Some(TARGET),
        });
    }
}
