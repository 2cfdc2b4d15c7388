//! What adding and merging bitmaps writes.

use std::path::PathBuf;

use stead_qcow2::Layer;
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::bitmap::{Action, Step, change};

use super::{Images, measured};
use crate::error::{Doing, Result};
use crate::program;
use crate::report::{Report, Row, Value};

/// How many bitmaps are merged.
const BITMAPS: u64 = 32;
/// The bytes of one.
const BITMAP_BYTES: u64 = 2 << 20;

/// Adds bitmaps to an empty image of 1 TiB and merges into each a bitmap with a bit in every one of its clusters.
///
/// # Errors
/// When a command fails.
pub async fn measure(images: &Images, report: &mut Report) -> Result<()> {
    make_source(images).await?;
    let at_once = at_once(images).await?;
    let ours = by_commands(images, true).await?;
    let peer = by_commands(images, false).await?;
    images.remove("source.qcow2")?;
    let payload = (BITMAPS * BITMAP_BYTES, "the bitmaps themselves");
    let commands = (peer, "qemu-img bitmap, the same 64 commands");
    for (how, ours, (peer, beside), target) in [
        ("in one change", at_once, payload, Some(1.1)),
        ("each by two commands", ours, payload, Some(1.1)),
        ("each by two commands", ours, commands, None),
    ] {
        report.rows.push(Row {
            figure: format!("add and merge {BITMAPS} bitmaps of 2 MiB, {how}: bytes written"),
            ours: Value::Bytes(ours),
            peer: Value::Bytes(peer),
            beside: beside.to_owned(),
            target,
        });
    }
    Ok(())
}

/// A disk of 1 TiB whose bitmap has a bit in every one of its clusters.
async fn make_source(images: &Images) -> Result<()> {
    let words = ["create", "-q", "-f", "qcow2", "@source.qcow2", "1T"];
    program::run("qemu-img", &images.arguments(&words)).await?;
    let words = ["bitmap", "--add", "-f", "qcow2", "@source.qcow2", "from"];
    program::run("qemu-img", &images.arguments(&words)).await?;
    // A cluster of 64 KiB of the bitmap stands for 32 GiB of the disk.
    let writes = (0..32).flat_map(|n| ["-c".to_owned(), format!("write {}G 64k", n * 32)]);
    let mut words = vec!["-f".to_owned(), "qcow2".to_owned()];
    words.extend(writes);
    words.push(images.path("source.qcow2"));
    program::run("qemu-io", &words).await.map(drop)
}

async fn make_target(images: &Images) -> Result<PathBuf> {
    let words = ["create", "-q", "-f", "qcow2", "@target.qcow2", "1T"];
    program::run("qemu-img", &images.arguments(&words)).await?;
    Ok(images.folder.join("target.qcow2"))
}

/// The bytes that one change of all writes, by this process: the engine, without the command line.
async fn at_once(images: &Images) -> Result<u64> {
    let doing = "add and merge bitmaps";
    let target = make_target(images).await?;
    let source = Layer::open(&images.folder.join("source.qcow2")).doing(doing)?;
    let names: Vec<String> = (0..BITMAPS).map(|n| format!("b{n}")).collect();
    let steps: Vec<Step<'_>> = names
        .iter()
        .flat_map(|name| {
            let step = |action| Step {
                bitmap: name.as_bytes(),
                action,
            };
            let add = Action::Add {
                granularity_bits: None,
                enabled: true,
            };
            let merge = Action::Merge {
                source: b"from",
                image: Some(&source),
            };
            [step(add), step(merge)]
        })
        .collect();
    let before = measured::own_written()?;
    let mut editor = Editor::open(&target, EditOptions::default()).doing(doing)?;
    change(&mut editor, &steps).doing(doing)?;
    drop(editor);
    let bytes = measured::own_written()?.saturating_sub(before);
    images.remove("target.qcow2")?;
    Ok(bytes)
}

/// The bytes that all commands together write.
async fn by_commands(images: &Images, ours: bool) -> Result<u64> {
    make_target(images).await?;
    let mut bytes = 0;
    for number in 0..BITMAPS {
        let name = format!("b{number}");
        let add = ["bitmap", "--add", "-f", "qcow2", "@target.qcow2", &name];
        let merge = [
            "bitmap",
            "--merge",
            "from",
            "-b",
            "@source.qcow2",
            "-F",
            "qcow2",
            "-f",
            "qcow2",
            "@target.qcow2",
            &name,
        ];
        for words in [&add[..], &merge] {
            let words = images.arguments(words);
            let used = match ours {
                true => {
                    let words = [&["img".to_owned()], &words[..]].concat();
                    measured::command(images.stead.as_os_str(), &words).await?
                }
                false => measured::command("qemu-img".as_ref(), &words).await?,
            };
            bytes += used.written_bytes;
        }
    }
    images.remove("target.qcow2")?;
    Ok(bytes)
}
