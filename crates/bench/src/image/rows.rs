//! The figures.

use super::contest::{Cache, Contest};
use super::limits::{COPIED, Limit, SHARED};
use super::{Images, content, measured};
use crate::error::Result;
use crate::program;
use crate::report::{Report, Row, Value, megabytes};

/// A kind of file system, and what is promised there.
#[derive(Debug)]
pub struct Place {
    name: &'static str,
    target: f64,
    limit: Limit,
}

/// Blocks are copied.
pub const EXT4: Place = Place {
    name: "ext4",
    target: 0.5,
    limit: COPIED,
};

/// Blocks are shared.
pub const XFS: Place = Place {
    name: "XFS with reflink",
    target: 0.05,
    limit: SHARED,
};

/// Makes `name`, an overlay over `base` in which the guest wrote a little.
async fn overlay(images: &Images, base: [&str; 2], name: &str) -> Result<()> {
    let [base, format] = base;
    let (base, image) = (images.path(base), images.path(name));
    let arguments = [
        "create", "-q", "-f", "qcow2", "-b", &base, "-F", format, &image,
    ];
    program::run("qemu-img", &arguments).await?;
    let arguments = ["-f", "qcow2", "-c", "write -P 7 100M 8M", &image];
    program::run("qemu-io", &arguments).await.map(drop)
}

/// `rebase -b ""`.
///
/// # Errors
/// When a command fails.
pub async fn flatten(images: &Images, report: &mut Report, place: Place) -> Result<()> {
    overlay(images, ["base.raw", "raw"], "over.qcow2").await?;
    let figure = format!("flatten {}, {}", images.disk(), place.name);
    let command = ["img", "rebase", "-f", "qcow2", "-b", "", "@work.qcow2"];
    let contest = Contest {
        figure: &figure,
        beside: "qemu-img rebase -b \"\", synced like ours",
        target: Some(place.target),
        fresh: &[("over.qcow2", "work.qcow2")],
        read: &["base.raw"],
        made: &[],
        ours: &command,
        peer: &[&command[1..]],
    };
    contest.run(images, Cache::Cold, report).await?;
    contest.run(images, Cache::Warm, report).await?;
    place.limit.beside_last(images, report).await?;
    images.remove("over.qcow2")
}

/// `convert` of an image with a base.
///
/// # Errors
/// When a command fails.
pub async fn convert(images: &Images, report: &mut Report) -> Result<()> {
    overlay(images, ["base.raw", "raw"], "over.qcow2").await?;
    let words = |before: &[&'static str]| {
        let files = ["-O", "qcow2", "@over.qcow2", "@new.qcow2"];
        [before, &files].concat()
    };
    let ours = words(&["img", "convert", "-t", "unsafe"]);
    let peer = words(&["convert", "-W", "-m", "8"]);
    let figure = format!("convert {} to qcow2, neither synced", images.disk());
    let neither_syncs = Contest {
        figure: &figure,
        beside: "qemu-img convert -W -m 8",
        target: Some(0.7),
        fresh: &[],
        read: &["base.raw", "over.qcow2"],
        made: &["new.qcow2"],
        ours: &ours,
        peer: &[&peer],
    };
    neither_syncs.run(images, Cache::Cold, report).await?;
    neither_syncs.run(images, Cache::Warm, report).await?;
    let ours = words(&["img", "convert"]);
    let peer = words(&["convert", "-W", "-m", "8", "-t", "writeback"]);
    let both_sync = Contest {
        figure: "convert the same, both synced",
        beside: "qemu-img convert -W -m 8 -t writeback",
        target: None,
        ours: &ours,
        peer: &[&peer],
        ..neither_syncs
    };
    both_sync.run(images, Cache::Warm, report).await?;
    COPIED.beside_last(images, report).await?;
    images.remove("over.qcow2")
}

/// `commit` of what a guest wrote into places that the base has.
///
/// # Errors
/// When a command fails.
pub async fn commit(images: &Images, report: &mut Report) -> Result<()> {
    content::write_random(&images.folder.join("data.raw"), 1 << 30, 1 << 30)?;
    let words = ["convert", "-O", "qcow2", "@data.raw", "@base.qcow2"];
    program::run("qemu-img", &images.arguments(&words)).await?;
    images.remove("data.raw")?;
    let (image, base) = (images.path("top.qcow2"), images.path("work-base.qcow2"));
    program::run("cp", &[images.path("base.qcow2"), base.clone()]).await?;
    let arguments = [
        "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &image,
    ];
    program::run("qemu-img", &arguments).await?;
    images.remove("work-base.qcow2")?;
    let writes = (0..400_u64).flat_map(|n| {
        let write = format!("write -P {} {}M 1M", n % 250 + 1, n * 2);
        ["-c".to_owned(), write]
    });
    let mut arguments = vec!["-f".to_owned(), "qcow2".to_owned()];
    arguments.extend(writes);
    arguments.push(image);
    program::run("cp", &[images.path("base.qcow2"), base]).await?;
    program::run("qemu-io", &arguments).await?;
    images.remove("work-base.qcow2")?;
    let command = ["img", "commit", "-q", "-f", "qcow2", "@work.qcow2"];
    let contest = Contest {
        figure: "commit 400 MiB, every other MiB, into a base of 1 GiB",
        beside: "qemu-img commit, synced like ours",
        target: Some(0.7),
        fresh: &[
            ("base.qcow2", "work-base.qcow2"),
            ("top.qcow2", "work.qcow2"),
        ],
        read: &["work-base.qcow2", "work.qcow2"],
        made: &[],
        ours: &command,
        peer: &[&command[1..]],
    };
    contest.run(images, Cache::Cold, report).await?;
    contest.run(images, Cache::Warm, report).await?;
    images.remove("base.qcow2")?;
    images.remove("top.qcow2")
}

/// `convert -c` with zstd.
///
/// # Errors
/// When a command fails.
pub async fn compress(images: &Images, report: &mut Report) -> Result<()> {
    content::write_tree(images, "tree.qcow2").await?;
    let zstd = "compression_type=zstd";
    let ours = [
        "img",
        "convert",
        "-c",
        "-O",
        "qcow2",
        "-o",
        zstd,
        "@tree.qcow2",
        "@new.qcow2",
    ];
    let peer = [
        "convert",
        "-W",
        "-m",
        "8",
        "-c",
        "-O",
        "qcow2",
        "-o",
        zstd,
        "@tree.qcow2",
        "@new.qcow2",
    ];
    let figure = format!(
        "convert {} of /usr to zstd, synced",
        megabytes(images.disk_bytes / 2)
    );
    let contest = Contest {
        figure: &figure,
        beside: "qemu-img convert -c -W -m 8, which does not sync",
        target: Some(0.6),
        fresh: &[],
        read: &["tree.qcow2"],
        made: &["new.qcow2"],
        ours: &ours,
        peer: &[&peer],
    };
    // Cold or warm, the processors are what takes the time.
    let times = contest.run(images, Cache::Warm, report).await?;
    let [ours, peer] = times.lengths;
    report.rows.push(Row {
        figure: "the length of what that made".to_owned(),
        ours: Value::Bytes(ours),
        peer: Value::Bytes(peer),
        beside: "qemu-img convert -c".to_owned(),
        target: Some(1.03),
    });
    images.remove("tree.qcow2")
}

/// `check` of an image with 1 TiB of allocated clusters: time, and memory.
///
/// # Errors
/// When a command fails.
pub async fn check(images: &Images, report: &mut Report) -> Result<()> {
    let words = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
        "@wide.qcow2",
        "1T",
    ];
    program::run("qemu-img", &images.arguments(&words)).await?;
    let command = ["img", "check", "-q", "-f", "qcow2", "@wide.qcow2"];
    let contest = Contest {
        figure: "check of 1 TiB of allocated clusters",
        beside: "qemu-img check",
        target: Some(0.7),
        fresh: &[],
        read: &[],
        made: &[],
        ours: &command,
        peer: &[&command[1..]],
    };
    contest.run(images, Cache::Cold, report).await?;
    contest.run(images, Cache::Warm, report).await?;
    let ours = contest.used_by_ours(images).await?;
    let words = images.arguments(&command[1..]);
    let peer = measured::command("qemu-img".as_ref(), &words).await?;
    report.rows.push(Row {
        figure: "its peak memory".to_owned(),
        ours: Value::Bytes(ours.peak_bytes),
        peer: Value::Bytes(peer.peak_bytes),
        beside: "qemu-img check".to_owned(),
        target: Some(0.25),
    });
    images.remove("wide.qcow2")
}
