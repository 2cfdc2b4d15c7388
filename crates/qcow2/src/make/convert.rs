//! A chain becomes one new image: read, looked at and compressed by several threads, placed in order.
//!
//! The result is the same whatever the number of threads, so a dry run ([`predict`]) knows it exactly.
//! Memory is bounded: each thread has one piece of 2 MiB (see [`CHUNK_BYTES`]), and the one table being
//! filled is kept.

use std::num::NonZero;
use std::ops::Range;
use std::path::PathBuf;

use stead_sys::direct::ALIGNMENT;
use stead_sys::durable::Existing;
use stead_sys::share::Shared;

use super::kept::{DroppedBitmap, Keep};
use super::options::{NewFormat, Qcow2Options, Target};
use super::output::Output;
use super::plan::Plan;
use super::{copy, room, verify};
use crate::chain::Chain;
use crate::control::Control;
use crate::error::Result;

/// Zeros of this many bytes become holes when nothing else is said.
pub const DEFAULT_SPARSE_BYTES: u64 = 4096;
/// The most threads.
const MAX_THREADS: usize = 16;

/// How far a new image is verified before it appears. Its tables and refcounts always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Tables and refcounts are read back.
    Structure,
    /// All bytes are read back too and compared with the source.
    Content,
}

/// What has reached the disk when a copy is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Everything: lost power leaves the whole image or none.
    Synced,
    /// Perhaps nothing yet, as with `qemu-img convert`, whose default cache mode is `unsafe`. The image still
    /// appears only when it is whole, and the death of a process loses nothing; lost power may leave a
    /// damaged image under the name.
    Cached,
}

/// How a chain is copied.
#[derive(Debug, Clone)]
pub struct ConvertOptions<'a> {
    /// The format of the new image.
    pub format: NewFormat,
    /// The length of the new disk in bytes; `None`: that of what is copied. Behind the source's end are zeros.
    pub disk: Option<u64>,
    /// The bytes of the source that become the disk; `None`: all.
    pub window: Option<Range<u64>>,
    /// What is kept beside the active disk.
    pub keep: Keep,
    /// The content of the backing file that `format` names; what is equal there is left out. It must be there
    /// exactly when `format` names one.
    pub below: Option<&'a Chain>,
    /// Zeros are left out in aligned pieces of this many bytes, rounded up to a power of two from 512 B to
    /// 2 MiB, and never less than a cluster (with extended L2 entries, a subcluster); 0: nowhere.
    pub sparse_bytes: u64,
    /// Whether clusters are compressed.
    pub compressed: bool,
    /// How many threads work; `None`: as many as the machine suggests.
    pub threads: Option<NonZero<usize>>,
    /// How far the image is verified before it appears.
    pub verify: Verify,
    /// What has reached the disk at the end.
    pub durability: Durability,
}

impl Default for ConvertOptions<'_> {
    fn default() -> Self {
        Self {
            format: NewFormat::Qcow2(Qcow2Options::default()),
            disk: None,
            window: None,
            keep: Keep::default(),
            below: None,
            sparse_bytes: DEFAULT_SPARSE_BYTES,
            compressed: false,
            threads: None,
            verify: Verify::Structure,
            durability: Durability::Synced,
        }
    }
}

/// The files of a new image, with exact lengths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewFiles {
    /// The length of the image, in bytes. It never was longer, so this is peak and end.
    pub file_bytes: u64,
    /// The bytes of both files that take room; the rest are holes.
    pub allocated_bytes: u64,
    /// Those of the allocated bytes that are blocks of the source, and need no room of their own.
    pub shared_bytes: u64,
    /// The length of the external data file, in bytes.
    pub data_file_bytes: Option<u64>,
    /// How many internal snapshots it has.
    pub kept_snapshots: usize,
    /// The names of its bitmaps.
    pub kept_bitmaps: Vec<Vec<u8>>,
    /// The bitmaps of the source that it does not have, and why.
    pub dropped_bitmaps: Vec<DroppedBitmap>,
}

/// Copies `source` into a new image.
///
/// # Durability
/// When this returns `Ok`, the image (and its data file) has been verified as asked, and content and names
/// have been synced, if [`Durability::Synced`] was asked for.
///
/// # Errors
/// When the format cannot express the image, there is no room for it, the source cannot be read, the caller
/// cancels, writing fails, or the image does not read back right. There is no new file then, and an earlier
/// one is as it was (see [`Target::InPlace`] for what is written in place).
pub fn convert(
    source: &Chain,
    target: &Target,
    options: &ConvertOptions<'_>,
    control: &Control<'_>,
) -> Result<NewFiles> {
    let plan = Plan::new(source, target, options)?;
    let start = match options.durability {
        Durability::Synced => Output::create,
        Durability::Cached => Output::create_cached,
    };
    let image = start(target)?;
    let data = plan.data_target.as_ref().map(start).transpose()?;
    let shareable = shareable(source, data.as_ref().unwrap_or(&image), &plan)?;
    room::require(source, (target, &shareable), options, &plan, control)?;
    let files = copy::Files {
        image: &image,
        data: data.as_ref(),
        tables: &image,
    };
    let made = copy::all(&plan, &shareable, files, control)?;
    verify_all(&plan, &image, data.as_ref(), control)?;
    if let Some(data) = data {
        data.publish()?;
    }
    image.publish()?;
    Ok(made)
}

/// How large the files will be that [`convert`] makes of the same arguments: the same work, without writing.
///
/// # Errors
/// As [`convert`].
pub fn predict(
    source: &Chain,
    target: &Target,
    options: &ConvertOptions<'_>,
    control: &Control<'_>,
) -> Result<NewFiles> {
    let plan = Plan::new(source, target, options)?;
    let shareable = match target {
        Target::New { path, .. } => {
            shareable(source, &Output::create(&scratch(path.clone()))?, &plan)?
        }
        Target::InPlace { .. } => vec![false; source.depth()],
    };
    dry_run(&plan, target, &shareable, control)
}

/// Copies to nowhere. Tables that later views look into go to a file that is thrown away.
pub(crate) fn dry_run(
    plan: &Plan<'_>,
    target: &Target,
    shareable: &[bool],
    control: &Control<'_>,
) -> Result<NewFiles> {
    let nowhere = Output::dropped(target.path())?;
    let scratch = plan.has_views().then(|| {
        let name = format!("stead-tables-{}", std::process::id());
        Output::create_cached(&scratch(std::env::temp_dir().join(name)))
    });
    let scratch = scratch.transpose()?;
    let files = copy::Files {
        image: &nowhere,
        data: plan.data_target.as_ref().map(|_| &nowhere),
        tables: scratch.as_ref().unwrap_or(&nowhere),
    };
    copy::all(plan, shareable, files, control)
}

/// A file beside the target that never gets its name.
fn scratch(path: PathBuf) -> Target {
    Target::New {
        path,
        mode: 0o600,
        existing: Existing::Replace,
    }
}

/// Twice as many threads as processors, so that while some write others read.
pub(crate) fn threads(wanted: Option<NonZero<usize>>) -> usize {
    let usual = || match std::thread::available_parallelism() {
        Ok(processors) => processors.get() * 2,
        Err(_unknown) => 4,
    };
    wanted
        .map_or_else(usual, NonZero::get)
        .clamp(1, MAX_THREADS)
}

/// The members of the chain whose blocks the new file can share, found by trying; what was tried is undone.
fn shareable(source: &Chain, output: &Output, plan: &Plan<'_>) -> Result<Vec<bool>> {
    let possible = output.starts_empty()
        && !plan.options.compressed
        && plan.options.below.is_none()
        && plan.unit().is_multiple_of(ALIGNMENT);
    let mut found = Vec::new();
    for member in 0..source.depth() {
        let (file, length) = source.member_file(member);
        let range = Shared {
            from: 0,
            to: 0,
            length: ALIGNMENT,
        };
        found.push(match file {
            Some(file) if possible && length >= ALIGNMENT => output.share(file, range)?,
            Some(_) | None => false,
        });
    }
    // Not where nothing was tried: ext4 writes out a file that was once cut to nothing before it is closed.
    if found.contains(&true) {
        output.set_length(0)?;
    }
    Ok(found)
}

fn verify_all(
    plan: &Plan<'_>,
    image: &Output,
    data: Option<&Output>,
    control: &Control<'_>,
) -> Result<()> {
    if plan.geometry.is_some() {
        verify::structure(image)?;
    }
    match plan.options.verify {
        Verify::Structure => Ok(()),
        Verify::Content => verify::contents(plan, image, data, control),
    }
}
