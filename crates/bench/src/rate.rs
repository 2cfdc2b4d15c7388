//! How fast content goes into the store and comes back, beside copying, compressing and hashing it.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stead_store::{ChunkSize, FileSource, LeaseOwner, Progress, Source, Store};
use stead_sys::durable;

use crate::content::{self, Content};
use crate::error::{BenchError, Doing, Result};
use crate::report::{Row, Value, median};
use crate::{Bench, program};

/// What each way of moving the content took.
#[derive(Debug, Default)]
struct Times {
    publish: Vec<Duration>,
    fetch: Vec<Duration>,
    copy: Vec<Duration>,
    compress: Vec<Duration>,
    decompress: Vec<Duration>,
    hash: Vec<Duration>,
}

/// Publishes the first checkpoint into an empty store and fetches it, in turns with the others.
///
/// # Errors
/// When anything of it fails.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    let first = bench.first().await?;
    let first = first.as_ref();
    let folder = bench.scratch.path("rate");
    durable::create_dir(&folder, 0o700).doing("create a folder")?;
    let dense = folder.join("dense");
    let bytes = first.content.write_dense(&dense)?;
    let mut times = Times::default();
    for round in 0..=bench.runs.div_ceil(2) {
        bench.say(&format!("rates, round {round}"));
        let mut now = Times::default();
        publish_and_fetch(&first.content, &folder, &mut now).await?;
        others(&dense, &folder, &mut now).await?;
        // The first round only warms everything up.
        if round > 0 {
            times.add(now);
        }
    }
    report(bench, bytes, &times);
    Ok(())
}

impl Times {
    fn add(&mut self, other: Self) {
        self.publish.extend(other.publish);
        self.fetch.extend(other.fetch);
        self.copy.extend(other.copy);
        self.compress.extend(other.compress);
        self.decompress.extend(other.decompress);
        self.hash.extend(other.hash);
    }
}

async fn publish_and_fetch(content: &Content, folder: &Path, times: &mut Times) -> Result<()> {
    let (root, cache) = (folder.join("store"), folder.join("cache"));
    let store = Store::open_or_init(&root.display().to_string(), &cache)
        .await
        .doing("make a store")?;
    let begun = Instant::now();
    publish(content, &store).await?;
    times.publish.push(begun.elapsed());
    // Opened afresh: nothing is known but what the store says.
    drop(store);
    let store = content::open_store(&root, &cache).await?;
    let begun = Instant::now();
    let fetched = Content::fetch(&store, &content.id.to_string(), &folder.join("fetched")).await?;
    for path in [&fetched.disk, &fetched.ram] {
        sync(path)?;
    }
    times.fetch.push(begun.elapsed());
    for (ours, original) in [(&fetched.disk, &content.disk), (&fetched.ram, &content.ram)] {
        let differing = content::differing_bytes(ours, original)?;
        if differing > 0 {
            return Err(BenchError::new(
                "compare what was fetched",
                format!("{differing} bytes differ"),
            ));
        }
    }
    for part in ["store", "cache", "fetched"] {
        durable::remove_tree(&folder.join(part)).doing("remove a store")?;
    }
    Ok(())
}

async fn publish(content: &Content, store: &Store) -> Result<()> {
    let doing = "publish a checkpoint";
    let owner = LeaseOwner {
        worker: "bench".to_owned(),
        boot: "bench".to_owned(),
        process: std::process::id().to_string(),
        host: "bench".to_owned(),
        data_dir: "bench".to_owned(),
    };
    let mut publish = store.begin_publish(owner).await.doing(doing)?;
    for (path, size) in [
        (&content.disk, ChunkSize::DISK),
        (&content.ram, ChunkSize::RAM),
    ] {
        let source = FileSource::new(File::open(path).doing(doing)?).doing(doing)?;
        let source: Arc<dyn Source> = Arc::new(source);
        publish
            .add_tree(source, size, None, &Progress::silent())
            .await
            .doing(doing)?;
    }
    for blob in content
        .kernel_and_initrd
        .iter()
        .chain([&content.device_state])
    {
        publish.add_blob(blob).await.doing(doing)?;
    }
    let (id, _) = publish.commit(&content.manifest).await.doing(doing)?;
    if id == content.id {
        return Ok(());
    }
    Err(BenchError::new(
        doing,
        format!("it is named {id}, not {}", content.id),
    ))
}

async fn others(dense: &Path, folder: &Path, times: &mut Times) -> Result<()> {
    let (copied, compressed, again) = (
        folder.join("copied"),
        folder.join("dense.zst"),
        folder.join("again"),
    );
    let path = |path: &Path| path.display().to_string();
    times
        .copy
        .push(timed(&copied, "cp", &[&path(dense), &path(&copied)]).await?);
    let arguments = [
        "-3",
        "-T0",
        "-q",
        "-f",
        &path(dense),
        "-o",
        &path(&compressed),
    ];
    times
        .compress
        .push(timed(&compressed, "zstd", &arguments).await?);
    let arguments = ["-d", "-q", "-f", &path(&compressed), "-o", &path(&again)];
    times
        .decompress
        .push(timed(&again, "zstd", &arguments).await?);
    times.hash.push(hash(dense)?);
    for path in [copied, compressed, again] {
        durable::remove_file(&path).doing("remove a copy")?;
    }
    Ok(())
}

/// Runs a program until what it writes is on the disk.
async fn timed(written: &Path, program: &str, arguments: &[&str]) -> Result<Duration> {
    let begun = Instant::now();
    program::run(program, arguments).await?;
    sync(written)?;
    Ok(begun.elapsed())
}

fn sync(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .doing("write a file out")
}

fn hash(path: &Path) -> Result<Duration> {
    let begun = Instant::now();
    let doing = "hash the content";
    let mut file = File::open(path).doing(doing)?;
    let (mut hasher, mut buffer) = (blake3::Hasher::new(), vec![0; 1 << 20]);
    loop {
        let length = file.read(&mut buffer).doing(doing)?;
        if length == 0 {
            break;
        }
        hasher.update(&buffer[..length]);
    }
    std::hint::black_box(hasher.finalize());
    Ok(begun.elapsed())
}

fn report(bench: &mut Bench, bytes: u64, times: &Times) {
    let rate = |times: &[Duration]| Value::Rate(bytes as f64 / median(times).as_secs_f64());
    let (publish, fetch) = (rate(&times.publish), rate(&times.fetch));
    let rows = [
        (
            "publish into an empty store",
            publish,
            rate(&times.copy),
            "cp",
        ),
        (
            "publish into an empty store",
            publish,
            rate(&times.compress),
            "zstd -3 -T0",
        ),
        (
            "publish into an empty store",
            publish,
            rate(&times.hash),
            "BLAKE3 alone, one thread",
        ),
        ("fetch and check everything", fetch, rate(&times.copy), "cp"),
        (
            "fetch and check everything",
            fetch,
            rate(&times.decompress),
            "zstd -d",
        ),
    ];
    bench
        .report
        .rows
        .extend(rows.map(|(figure, ours, peer, beside)| Row {
            figure: figure.to_owned(),
            ours,
            peer,
            beside: beside.to_owned(),
            target: None,
        }));
}
