//! Several layers made into one new file, beside them: for layers that somebody has open, or that others name.
//!
//! ```text
//!  top ─┐
//!  mid ─┼─▶ target (shows what top shows, stands on what is below)
//!  low ─┘
//!  below ...
//! ```
//! The target begins as a copy of the lowest layer (free where the file system shares blocks), gets the rest by a
//! commit of the qcow2 engine, is read back and compared, and only then appears under its name. Nothing that exists
//! is written, so whoever reads the layers meanwhile reads on, and a crash leaves a temporary file.
//!
//! # Invariants
//! * The layers are not changed by anybody meanwhile: frozen, or locked against writers here.
//! * What the target shows over `below` is what the top shows over all the others, byte for byte, and it defines
//!   everything that they define (but for zeros where nothing lies below).

use std::fs::File;
use std::path::Path;

use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::commit::{Chosen, CommitOptions, Incomplete, commit_into, measure_in_use};
use stead_qcow2::{Chain, Control, Error, Layer, LayerFile, LayerFormat, StoredBitmap};
use stead_sys::durable::{Existing, Partial};
use stead_sys::image_lock::Access;
use stead_sys::{copy, space};

use crate::bitmaps::{is_a_backups, text};
use crate::error::{Kind, MergeError, Result};
use crate::event::{Step, Watch};
use crate::open::lock;
use crate::prove::Comparison;

/// What a fused layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fused {
    /// How many bytes of the disk it defines.
    pub defined_bytes: u64,
    /// What its file takes, in bytes.
    pub file_bytes: u64,
}

/// The layers of a chain, each part the topmost first.
#[derive(Debug, Clone, Copy)]
pub struct FuseLayers<'a> {
    /// Those above the ones that are fused, which stay.
    pub above: &'a [LayerFile],
    /// Those that are fused: at least two.
    pub merged: &'a [LayerFile],
    /// All that lies below.
    pub below: &'a [LayerFile],
}

impl FuseLayers<'_> {
    /// The fused ones, and what lies below.
    fn committed(&self) -> Vec<LayerFile> {
        [self.merged, self.below].concat()
    }
}

/// Makes `target` of layers.
///
/// A layer with a bitmap that could not be kept whole is refused. One that was not saved says nothing: it is left out,
/// and named, unless a layer above has one of that name, which would look whole then. The new file has the permission
/// bits `mode`.
///
/// # Durability
/// When this returns `Ok`, the target is whole, compared with the layers, and synced under its name.
///
/// # Errors
/// When a layer is raw, damaged, or open for writing; when there is too little room ([`Kind::NoSpace`]); when what
/// was written is not what should have been ([`Kind::Damaged`]). No target is there then, and nothing was changed.
///
/// # Panics
/// When less than two are fused.
pub fn fuse(
    layers: FuseLayers<'_>,
    (target, mode): (&Path, u32),
    watch: Watch<'_>,
) -> Result<Fused> {
    let partial = build(layers, (target, mode), watch)?;
    let file_bytes = space::allocated_bytes(partial.temp_path())
        .map_err(|source| MergeError::io("measure", partial.temp_path(), source))?;
    let defined_bytes = prove(layers, partial.temp_path(), watch)?;
    watch.go_on("merge")?;
    partial
        .publish(Existing::Keep)
        .map_err(|source| MergeError::io("publish", target, source))?;
    Ok(Fused {
        defined_bytes,
        file_bytes,
    })
}

/// How many free bytes fusing needs where the target is to lie: the copy of the lowest layer, were no block of it
/// shared, and what the commit adds to it. Nothing is written. A file system adds a block of its own for some hundred
/// pieces that it scatters the file in.
///
/// # Errors
/// As [`fuse()`], of what can be known beforehand.
///
/// # Panics
/// As [`fuse()`].
pub fn fuse_needs_bytes(layers: FuseLayers<'_>) -> Result<u64> {
    let lowest = &require_qcow2(layers)?.path;
    let copied = space::allocated_bytes(lowest)
        .map_err(|source| MergeError::io("measure", lowest, source))?;
    let (options, _) = options(layers)?;
    let report = measure_in_use(&layers.committed(), &options, &Control::default())
        .map_err(|error| MergeError::engine("measure the layers", error))?;
    Ok(copied.saturating_add(report.base.new_bytes))
}

/// How to commit, and the bitmaps that are left out because they say nothing.
fn options(layers: FuseLayers<'_>) -> Result<(CommitOptions, Vec<String>)> {
    let all = layers.above.iter().chain(layers.merged);
    let all = all.map(stored).collect::<Result<Vec<_>>>()?;
    let (mut chosen, mut left_out) = (Vec::new(), Vec::new());
    for bitmap in all[layers.above.len()..].iter().flatten() {
        let name = &bitmap.name;
        let of_that_name = all.iter().flatten().filter(|other| other.name == *name);
        let is_alone = of_that_name.count() == 1;
        if chosen.iter().any(|(other, _)| other == name) {
            continue;
        }
        if (bitmap.in_use || !bitmap.is_known()) && is_alone {
            left_out.push(text(name));
            chosen.push((name.clone(), Chosen::Remove));
        } else if is_a_backups(name) {
            chosen.push((name.clone(), Chosen::Carry));
        }
    }
    let options = CommitOptions {
        base: layers.merged.len() - 1,
        incomplete: Incomplete::Refuse,
        chosen,
        ..CommitOptions::default()
    };
    Ok((options, left_out))
}

fn stored(file: &LayerFile) -> Result<Vec<StoredBitmap>> {
    if file.format == LayerFormat::Raw {
        return Ok(Vec::new());
    }
    let stored = Layer::inspect(&file.path).and_then(|layer| layer.stored_bitmaps());
    stored.map_err(|error| MergeError::engine("read bitmaps", error))
}

/// The lowest of those that are fused.
fn require_qcow2(layers: FuseLayers<'_>) -> Result<&LayerFile> {
    let (Some(lowest), 2..) = (layers.merged.last(), layers.merged.len()) else {
        panic!("one layer is one already");
    };
    let mut merged = layers.merged.iter();
    let Some(raw) = merged.find(|file| file.format == LayerFormat::Raw) else {
        return Ok(lowest);
    };
    let found = format!("{} is raw, and stays as it is", raw.path.display());
    Err(MergeError::new(Kind::Usage, ATTEMPT, found))
}

fn build(
    layers: FuseLayers<'_>,
    (target, mode): (&Path, u32),
    watch: Watch<'_>,
) -> Result<Partial> {
    let lowest = require_qcow2(layers)?;
    let above = &layers.merged[..layers.merged.len() - 1];
    let files = layers.committed();
    let _locks = files
        .iter()
        .map(|file| lock(&file.path, Access::Read))
        .collect::<Result<Vec<_>>>()?;
    let (options, left_out) = options(layers)?;
    if !left_out.is_empty() {
        watch.notice(format!(
            "bitmaps that were not saved and say nothing are left out: {}",
            left_out.join(", ")
        ));
    }
    watch.go_on("merge")?;
    watch.step(Step::Copy);
    let partial = copy_of(&lowest.path, target, mode)?;
    watch.go_on("merge")?;
    watch.step(Step::Commit);
    let engine = |error| MergeError::engine(ATTEMPT, error);
    let mut editor = Editor::open(partial.temp_path(), EditOptions::default()).map_err(engine)?;
    let control = Control {
        cancel: watch.cancel,
        progress: None,
    };
    commit_into(&mut editor, 0, (above, layers.below), &options, &control).map_err(engine)?;
    if let corruptions @ 1.. = editor.check().corruptions {
        let found = format!("a check of the new layer has {corruptions} findings");
        return Err(MergeError::new(Kind::Damaged, ATTEMPT, found));
    }
    Ok(partial)
}

const ATTEMPT: &str = "make one layer of several";

fn copy_of(lowest: &Path, target: &Path, mode: u32) -> Result<Partial> {
    let from = File::open(lowest).map_err(|source| MergeError::io("open", lowest, source))?;
    let io = |source| MergeError::io("copy a layer to", target, source);
    let partial = Partial::create(target, mode).map_err(io)?;
    copy::clone_or_copy(&from, partial.file()).map_err(io)?;
    Ok(partial)
}

/// Compares wherever either side defines something: elsewhere both show what is below.
fn prove(layers: FuseLayers<'_>, made: &Path, watch: Watch<'_>) -> Result<u64> {
    watch.step(Step::Prove);
    let engine = |error| MergeError::engine("read the new layer back", error);
    let old = Chain::open(&layers.committed()).map_err(engine)?;
    let mut new_files = vec![LayerFile {
        path: made.to_owned(),
        format: LayerFormat::Qcow2,
    }];
    new_files.extend_from_slice(layers.below);
    let new = Chain::open(&new_files).map_err(engine)?;
    let damaged = |found: String| {
        MergeError::new(Kind::Damaged, "read the new layer back", found)
            .left("the layers are as they were")
            .next("see to the storage, then run it again")
    };
    if old.len() != new.len() {
        let found = format!("it has {} bytes, and the layers {}", new.len(), old.len());
        return Err(damaged(found));
    }
    let mut defined_bytes = 0;
    for (chain, fused) in [(&old, layers.merged.len()), (&new, 1)] {
        let ranges = chain.allocated(fused).map(|range| {
            if watch.go_on("merge").is_err() {
                let path = made.to_owned();
                return Err(Error::Cancelled { path });
            }
            let range = range?;
            if fused == 1 {
                defined_bytes += range.end - range.start;
            }
            Ok(range)
        });
        let comparison = Comparison::new(&old, &new, watch);
        if let Some(fault) = comparison.fault_in(ranges).map_err(engine)? {
            return Err(damaged(fault));
        }
    }
    Ok(defined_bytes)
}
