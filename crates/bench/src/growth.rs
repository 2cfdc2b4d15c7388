//! What checkpoints cost in the store, beside compressors and flattened archives.

use std::path::Path;

use crate::content::{self, Content};
use crate::error::{Doing, Result};
use crate::first::{First, SANDBOX, TAG, copy};
use crate::peer::Peer;
use crate::report::{Row, Value, megabytes};
use crate::{Bench, program, workload};

/// How many checkpoints are made in a row.
const CHECKPOINTS: u32 = 6;
/// What a second checkpoint may add besides the RAM that changed: 10 MB were written.
const SECOND_BYTES: u64 = 12_000_000;

/// Bytes of the peer's archives.
#[derive(Debug, Default)]
struct Archives {
    /// With every internal snapshot that the disk has.
    all: u64,
    /// With the newest one only.
    newest: u64,
}

/// Goes on from the first checkpoint to six of them, here and there.
///
/// # Errors
/// When anything of it fails.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    let first = bench.first().await?;
    let first = first.as_ref();
    compare_first(bench, first).await?;
    // The first one's disk is needed as it is.
    let image = first.folder.join("growing.qcow2");
    copy(&first.image, &image).await?;
    let mut archives = Archives::default();
    pack(&image, 1, &mut archives).await?;
    let folder = first.folder.join("peer");
    let mut peer = bench.spec.load(&folder, &image, TAG).await?;
    for number in 2..=CHECKPOINTS {
        bench.say(&format!("checkpoint {number} of {CHECKPOINTS}"));
        work(bench, &mut peer, number).await?;
        let report = bench.worker.checkpoint(SANDBOX).await?;
        if number == 2 {
            compare_second(bench, first, &report.checkpoint.id, report.stored_bytes).await?;
        }
        let tag = format!("c{number}");
        peer.savevm(&tag).await?;
        peer.quit().await?;
        pack(&image, number, &mut archives).await?;
        peer = bench.spec.load(&folder, &image, &tag).await?;
    }
    peer.quit().await?;
    stead_sys::durable::remove_file(&image).doing("remove a disk")?;
    compare_all(bench, &archives)
}

/// The same in both guests.
async fn work(bench: &Bench, peer: &mut Peer, number: u32) -> Result<()> {
    let script = match number {
        2 => workload::TEN_MEGABYTES.to_owned(),
        _ => workload::work(number),
    };
    bench.worker.shell(SANDBOX, &script).await?;
    peer.shell(&script).await
}

/// The first checkpoint, beside what a compressor makes of the same bytes.
async fn compare_first(bench: &mut Bench, first: &First) -> Result<()> {
    let own = first.folder.join("own");
    let raw = first.content.write_own(&bench.spec.template.disk, &own)?;
    let compressed = compressed_bytes(&own).await?;
    stead_sys::durable::remove_file(&own).doing("remove a file")?;
    bench.report.rows.push(Row {
        figure: "first checkpoint, what the store grows by".to_owned(),
        ours: Value::Bytes(first.grown_bytes),
        peer: Value::Bytes(compressed),
        beside: format!(
            "zstd -3 of its {} that are not zero and not the template's, each chunk once",
            megabytes(raw)
        ),
        target: Some(1.1),
    });
    compare_whole(bench, first).await
}

/// The whole store, beside a compressor that is given each page once wherever it lies.
async fn compare_whole(bench: &mut Bench, first: &First) -> Result<()> {
    let unique = first.folder.join("unique");
    let raw = first.content.write_unique(&unique)?;
    let compressed = compressed_bytes(&unique).await?;
    stead_sys::durable::remove_file(&unique).doing("remove a file")?;
    let blobs: u64 = first
        .content
        .kernel_and_initrd
        .iter()
        .map(|blob| blob.len() as u64)
        .sum();
    bench.report.notes.push(format!(
        "The first checkpoint's disk, RAM and device state have {} of different 4 KiB blocks. Many of them lie both on \
         the disk and, in another order, in the guest's page cache; chunks of 64 and 16 KiB do not find them again. The store also \
         holds the kernel and the initial RAM disk ({}), which the compressor is not given.",
        megabytes(raw),
        megabytes(blobs)
    ));
    bench.report.rows.push(Row {
        figure: "first checkpoint, stored (the whole store, template included)".to_owned(),
        ours: Value::Bytes(first.stored_bytes),
        peer: Value::Bytes(compressed),
        beside: "zstd -3 of each different 4 KiB block once".to_owned(),
        target: None,
    });
    Ok(())
}

/// The second checkpoint, beside what was written and changed.
async fn compare_second(bench: &mut Bench, first: &First, id: &str, stored: u64) -> Result<()> {
    let store = content::open_store(&bench.worker.store, &first.folder.join("cache")).await?;
    let folder = first.folder.join("second");
    let content = Content::fetch(&store, id, &folder).await?;
    let changed = content::differing_bytes(&first.content.ram, &content.ram)?;
    stead_sys::durable::remove_tree(&folder).doing("remove scratch files")?;
    bench.report.rows.push(Row {
        figure: "second checkpoint after 10 MB of random data, stored".to_owned(),
        ours: Value::Bytes(stored),
        peer: Value::Bytes(SECOND_BYTES + changed),
        beside: format!("12 MB + {} of changed RAM pages", megabytes(changed)),
        target: Some(1.0),
    });
    Ok(())
}

fn compare_all(bench: &mut Bench, archives: &Archives) -> Result<()> {
    let stored = program::bytes_below(&bench.worker.store)?;
    let mut add = |figure: String, bytes, beside: &str, target| {
        bench.report.rows.push(Row {
            figure,
            ours: Value::Bytes(stored),
            peer: Value::Bytes(bytes),
            beside: beside.to_owned(),
            target,
        });
    };
    add(
        format!("{CHECKPOINTS} checkpoints with work between them, stored (template included)"),
        archives.all,
        "as many archives: savevm, rebase, tar, zstd -3",
        Some(0.2),
    );
    add(
        "the same, when each archive loses the older internal snapshots first".to_owned(),
        archives.newest,
        "archives of one internal snapshot each",
        None,
    );
    Ok(())
}

/// The archives of a VM that has saved itself into `image` and ended: a copy, flattened and packed.
async fn pack(image: &Path, number: u32, archives: &mut Archives) -> Result<()> {
    let flat = image.with_extension("flat");
    copy(image, &flat).await?;
    archives.all += packed_bytes(&flat).await?;
    if number > 1 {
        copy(image, &flat).await?;
        for older in 1..number {
            let arguments = [
                "snapshot",
                "-d",
                &format!("c{older}"),
                &flat.display().to_string(),
            ];
            program::run("qemu-img", &arguments).await?;
        }
        archives.newest += packed_bytes(&flat).await?;
    } else {
        archives.newest = archives.all;
    }
    stead_sys::durable::remove_file(&flat).doing("remove a copy")
}

async fn packed_bytes(image: &Path) -> Result<u64> {
    let path = image.display().to_string();
    program::run("qemu-img", &["rebase", "-f", "qcow2", "-b", "", &path]).await?;
    let out = image.with_extension("tar.zst");
    let (folder, name) = (
        image.parent().unwrap_or(image),
        image.file_name().unwrap_or_default(),
    );
    let arguments = [
        "-C".as_ref(),
        folder.as_os_str(),
        "--sparse".as_ref(),
        "-I".as_ref(),
        "zstd -3 -T0 -q".as_ref(),
        "-cf".as_ref(),
        out.as_os_str(),
        name,
    ];
    program::run("tar", &arguments).await?;
    taken(&out)
}

async fn compressed_bytes(path: &Path) -> Result<u64> {
    let out = path.with_extension("zst");
    let (from, to) = (path.display().to_string(), out.display().to_string());
    program::run("zstd", &["-3", "-T0", "-q", "-f", &from, "-o", &to]).await?;
    taken(&out)
}

/// The length of a file that is not needed any more.
fn taken(path: &Path) -> Result<u64> {
    let bytes = program::length(path)?;
    stead_sys::durable::remove_file(path).doing("remove a file")?;
    Ok(bytes)
}
