//! `stead merge run` beside `qemu-img commit` and a `qemu-img bitmap --merge` for each bitmap.

use stead_sys::durable;

use super::contest::{Cache, Contest};
use super::{Images, content};
use crate::error::{Doing, Result};
use crate::report::{Report, Row, Value};
use crate::{Run, program};

/// The base's length.
const DISK: &str = "4G";
/// The bytes of data in the base, from its start on.
const BASE_BYTES: u64 = 1 << 30;
/// The bytes that the layer above has: half of them over data of the base, half where it has none.
const CHANGED_BYTES: u64 = 1 << 30;
/// How many bitmaps both have.
const BITMAPS: u64 = 16;
/// What one takes in an image: a cluster for its bits, one bit for 64 KiB of the disk.
const BITMAP_BYTES: u64 = 64 << 10;

/// Merges a layer and its bitmaps into the base, in turns with QEMU's tools.
///
/// # Errors
/// When a command fails.
pub async fn measure(run: &mut Run) -> Result<()> {
    let images = Images::open(run, "merge")?;
    run.say("merge: make a base and a layer");
    make_layers(&images).await?;
    run.say("merge: a layer with 16 bitmaps");
    contest(&images, &mut run.report).await?;
    durable::remove_tree(&images.folder).doing("remove the images")
}

async fn make_layers(images: &Images) -> Result<()> {
    content::write_random(&images.folder.join("data.raw"), BASE_BYTES, BASE_BYTES)?;
    let convert = ["convert", "-O", "qcow2", "@data.raw", "@work-base.qcow2"];
    let resize = ["resize", "-q", "-f", "qcow2", "@work-base.qcow2", DISK];
    for words in [&convert[..], &resize] {
        program::run("qemu-img", &images.arguments(words)).await?;
    }
    add_bitmaps(images, "@work-base.qcow2").await?;
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "@work-base.qcow2",
        "-F",
        "qcow2",
        "@top-work.qcow2",
    ];
    let mut create = images.arguments(&create);
    create.push(DISK.to_owned());
    program::run("qemu-img", &create).await?;
    add_bitmaps(images, "@top-work.qcow2").await?;
    // Pieces of 2 MiB with as much between them, from the middle of the base's data on.
    let writes = (0..CHANGED_BYTES >> 21).flat_map(|n| {
        let at = (BASE_BYTES >> 21) + n * 4;
        let at = at % ((BASE_BYTES >> 20) * 2);
        [
            "-c".to_owned(),
            format!("write -P {} {at}M 2M", n % 250 + 1),
        ]
    });
    let mut words = vec!["-f".to_owned(), "qcow2".to_owned()];
    words.extend(writes);
    words.push(images.path("top-work.qcow2"));
    program::run("qemu-io", &words).await?;
    // Elsewhere: a merge looks for other layers over the base in the base's folder.
    let kept = images.folder.join("kept");
    durable::create_dir(&kept, 0o700).doing("create a folder")?;
    let all = ["work-base.qcow2", "top-work.qcow2"].map(|name| images.path(name));
    program::run("mv", &[&all[..], &[kept.display().to_string()]].concat()).await?;
    images.remove("data.raw")
}

async fn add_bitmaps(images: &Images, image: &str) -> Result<()> {
    for name in names() {
        let words = ["bitmap", "--add", "-f", "qcow2", image, &name];
        program::run("qemu-img", &images.arguments(&words)).await?;
    }
    Ok(())
}

fn names() -> impl Iterator<Item = String> {
    (0..BITMAPS).map(|n| format!("b{n}"))
}

async fn contest(images: &Images, report: &mut Report) -> Result<()> {
    // The layer stays as it is in both cases.
    let commit = ["commit", "-q", "-d", "-f", "qcow2", "@top-work.qcow2"];
    let names: Vec<String> = names().collect();
    let merges: Vec<[&str; 11]> = names.iter().map(|name| merge_bitmap(name)).collect();
    let peer: Vec<&[&str]> = std::iter::once(&commit[..])
        .chain(merges.iter().map(|words| &words[..]))
        .collect();
    let contest = Contest {
        figure: "merge a layer of 1 GiB with 16 bitmaps into a base of 4 GiB, half of it over data",
        beside: "qemu-img commit -d, and bitmap --merge for each",
        target: Some(0.6),
        fresh: &[
            ("kept/work-base.qcow2", "work-base.qcow2"),
            ("kept/top-work.qcow2", "top-work.qcow2"),
        ],
        read: &["work-base.qcow2", "top-work.qcow2"],
        made: &[],
        ours: &["merge", "run", "--keep-layers", "@top-work.qcow2"],
        peer: &peer,
    };
    contest.run(images, Cache::Cold, report).await?;
    contest.run(images, Cache::Warm, report).await?;
    let used = contest.used_by_ours(images).await?;
    report.rows.push(Row {
        figure: "the same: bytes written".to_owned(),
        ours: Value::Bytes(used.written_bytes),
        peer: Value::Bytes(CHANGED_BYTES + BITMAPS * BITMAP_BYTES),
        beside: "the data and the bitmaps themselves".to_owned(),
        target: Some(1.1),
    });
    Ok(())
}

/// Of the layer above into the base.
fn merge_bitmap(name: &str) -> [&str; 11] {
    [
        "bitmap",
        "--merge",
        name,
        "-b",
        "@top-work.qcow2",
        "-F",
        "qcow2",
        "-f",
        "qcow2",
        "@work-base.qcow2",
        name,
    ]
}
