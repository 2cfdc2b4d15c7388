//! Disk images: `stead img` beside `qemu-img`, on the same files.
//!
//! Figures are taken in turns, the one that begins changing each round; what a command makes or changes is made
//! anew before each, outside of the clock, and everything is written out before the clock starts. *Warm* means
//! that the files were read just before, *cold* that the page cache was emptied.

mod bitmaps;
mod content;
mod contest;
mod limits;
mod measured;
pub mod merge;
mod rows;

use std::path::{Path, PathBuf};

use stead_sys::durable;

use crate::Run;
use crate::error::{BenchError, Doing, Result};
use crate::report::megabytes;

/// The length of the disk that is flattened and converted, of which nine tenths lie in the base.
const DISK_BYTES: u64 = 1 << 30;
/// The same of a large run.
const LARGE_DISK_BYTES: u64 = 4 << 30;

/// Where images lie while they are measured, and our program.
#[derive(Debug)]
struct Images {
    folder: PathBuf,
    stead: PathBuf,
    /// How often each figure is taken warm; cold figures, which take longer, half as often.
    runs: usize,
    /// The length of the disk that is flattened and converted.
    disk_bytes: u64,
}

impl Images {
    /// An empty folder for them.
    fn open(run: &Run, name: &str) -> Result<Self> {
        let own = std::env::current_exe().doing("find the own program")?;
        let stead = own.with_file_name("stead");
        if !stead.is_file() {
            let attempt = "find stead beside the own program";
            return Err(BenchError::new(attempt, "build it first: make build"));
        }
        let here = Self {
            folder: run.scratch.path("."),
            stead,
            runs: run.runs.div_ceil(2),
            disk_bytes: match run.large {
                true => LARGE_DISK_BYTES,
                false => DISK_BYTES,
            },
        };
        here.within(&run.scratch.path(name))
    }

    /// How much of the disk lies in the base, in bytes.
    fn data_bytes(&self) -> u64 {
        self.disk_bytes / 10 * 9
    }

    /// How long the disk is and how much lies in the base, in words.
    fn disk(&self) -> String {
        let (length, data) = (self.disk_bytes >> 30, self.data_bytes());
        format!("{length} GiB with {} from the base", megabytes(data))
    }

    /// The path of a file, as an argument.
    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn remove(&self, name: &str) -> Result<()> {
        durable::remove_file(&self.folder.join(name)).doing("remove an image")
    }

    /// The same program and counts, with another folder.
    fn within(&self, folder: &Path) -> Result<Self> {
        durable::create_dir(folder, 0o700).doing("create a folder")?;
        Ok(Self {
            folder: folder.to_owned(),
            stead: self.stead.clone(),
            runs: self.runs,
            disk_bytes: self.disk_bytes,
        })
    }
}

/// Measures all of them.
///
/// # Errors
/// When a command fails.
pub async fn measure(run: &mut Run) -> Result<()> {
    let images = Images::open(run, "images")?;
    tables(run, &images).await?;
    copies(run, &images).await?;
    durable::remove_tree(&images.folder).doing("remove the images")
}

/// What moves no data: a check and bitmaps.
async fn tables(run: &mut Run, images: &Images) -> Result<()> {
    run.say("images: check of 1 TiB");
    rows::check(images, &mut run.report).await?;
    run.say("images: 32 bitmaps");
    bitmaps::measure(images, &mut run.report).await
}

/// What moves data.
async fn copies(run: &mut Run, images: &Images) -> Result<()> {
    run.say("images: make a base");
    let base = images.folder.join("base.raw");
    content::write_random(&base, images.data_bytes(), images.disk_bytes)?;
    run.say("images: flatten");
    rows::flatten(images, &mut run.report, rows::EXT4).await?;
    run.say("images: convert");
    rows::convert(images, &mut run.report).await?;
    run.say("images: flatten with shared blocks");
    let mounted = run.scratch.mount_xfs("images-xfs").await?;
    // Sharing takes as long for a small disk: what is promised is the ratio of a long one.
    let shared = Images {
        disk_bytes: LARGE_DISK_BYTES,
        ..images.within(&mounted.join("images"))?
    };
    let base = shared.folder.join("base.raw");
    content::write_random(&base, shared.data_bytes(), shared.disk_bytes)?;
    rows::flatten(&shared, &mut run.report, rows::XFS).await?;
    run.scratch.unmount_xfs("images-xfs")?;
    images.remove("base.raw")?;
    run.say("images: commit");
    rows::commit(images, &mut run.report).await?;
    run.say("images: convert with compression");
    rows::compress(images, &mut run.report).await
}
