//! Persistent dirty bitmaps: add, remove, clear, enable, disable, merge.
//!
//! Several steps are one change: all of them are done, or none.

use crate::bitmap::Bitmap;
use crate::control::Control;
use crate::edit::{Done, Edit, Editor, Plan};
use crate::error::{Error, Result};
use crate::layer::Layer;

/// The granularities that are chosen when nothing is said, as powers of two: 4 KiB to 64 KiB.
const DEFAULT_GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 12..=16;

/// What is done to a bitmap.
#[derive(Debug, Clone, Copy)]
pub enum Action<'a> {
    /// It is added, with all bits clear.
    Add {
        /// One bit stands for `1 << granularity_bits` bytes; that of a cluster, within 4 KiB to 64 KiB, if nothing
        /// is said.
        granularity_bits: Option<u8>,
        /// Whether it records writes.
        enabled: bool,
    },
    /// It is removed.
    Remove,
    /// All its bits are cleared.
    Clear,
    /// It records writes from now on.
    Enable,
    /// It does not record writes from now on.
    Disable,
    /// What another one has marked is marked in it, too.
    Merge {
        /// The other one's name.
        source: &'a [u8],
        /// The image that has it; this one if nothing is said.
        image: Option<&'a Layer>,
    },
}

/// One step of a change.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// The bitmap's name.
    pub bitmap: &'a [u8],
    /// What is done to it.
    pub action: Action<'a>,
}

/// Does all `steps`, in order, in one change. A merge sees what the steps before it did.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// [`Error::Refused`] when there is no such bitmap, or one of that name already, or the disk that a merged bitmap
/// describes has another length; [`Error::BitmapInUse`] for one that was not saved, which can only be removed;
/// [`Error::InvalidBitmap`] for names and granularities that QEMU does not open; else as [`Editor::apply`].
pub fn change(editor: &mut Editor, steps: &[Step<'_>]) -> Result<Done<()>> {
    change_with(editor, steps, &Control::default())
}

/// As [`change`], watched.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// As [`change`]; [`Error::Cancelled`].
pub fn change_with(
    editor: &mut Editor,
    steps: &[Step<'_>],
    control: &Control<'_>,
) -> Result<Done<()>> {
    editor.apply_with(control, |edit| {
        steps.iter().try_for_each(|step| run(edit, step))
    })
}

/// How much room [`change`] needs; nothing is written.
///
/// # Errors
/// As [`change`].
pub fn plan(editor: &Editor, steps: &[Step<'_>]) -> Result<Plan> {
    plan_with(editor, steps, &Control::default())
}

/// As [`plan`], watched.
///
/// # Errors
/// As [`change_with`].
pub fn plan_with(editor: &Editor, steps: &[Step<'_>], control: &Control<'_>) -> Result<Plan> {
    editor.plan_with(control, |edit| {
        steps.iter().try_for_each(|step| run(edit, step))
    })
}

fn run(edit: &mut Edit, step: &Step<'_>) -> Result<()> {
    edit.go_on()?;
    let find = |edit: &Edit, operation| {
        let found = edit.find_bitmap(step.bitmap);
        found.ok_or_else(|| missing(edit.old(), operation, step.bitmap))
    };
    match step.action {
        Action::Add {
            granularity_bits,
            enabled,
        } => {
            let bits = granularity_bits.unwrap_or_else(|| default_granularity_bits(edit));
            edit.add_bitmap(step.bitmap, bits, enabled).map(drop)
        }
        Action::Remove => {
            let index = find(edit, "remove a bitmap")?;
            edit.remove_bitmap(index)
        }
        Action::Clear => {
            let index = find(edit, "clear a bitmap")?;
            edit.clear_bitmap(index)
        }
        Action::Enable => {
            let index = find(edit, "enable a bitmap")?;
            edit.enable_bitmap(index, true)
        }
        Action::Disable => {
            let index = find(edit, "disable a bitmap")?;
            edit.enable_bitmap(index, false)
        }
        Action::Merge { source, image } => {
            let index = find(edit, "merge into a bitmap")?;
            let other = source_bits(edit, source, image)?;
            edit.merge_bitmap(index, &other)
        }
    }
}

fn default_granularity_bits(edit: &Edit) -> u8 {
    let bits = edit.old().cluster_size().bits();
    let range = DEFAULT_GRANULARITY_BITS;
    let bits = bits.clamp(*range.start(), *range.end());
    u8::try_from(bits).unwrap_or(u8::MAX)
}

fn source_bits(edit: &mut Edit, name: &[u8], image: Option<&Layer>) -> Result<Bitmap> {
    let operation = "merge a bitmap";
    let Some(image) = image else {
        let index = edit.find_bitmap(name);
        let index = index.ok_or_else(|| missing(edit.old(), operation, name))?;
        return edit.bitmap_bits(index);
    };
    let stored = image.stored_bitmaps()?;
    let stored = stored.iter().find(|stored| stored.name == name);
    let stored = stored.ok_or_else(|| missing(image, operation, name))?;
    let bits = image.read_bitmap(stored)?;
    let own = edit.virtual_size();
    if bits.disk_length() != own {
        let reason = format!(
            "{:?} of {} is for a disk of {} bytes, and this one has {own}",
            String::from_utf8_lossy(name),
            image.path().display(),
            bits.disk_length()
        );
        return Err(refused(edit.old(), operation, reason));
    }
    Ok(bits)
}

fn refused(layer: &Layer, operation: &'static str, reason: String) -> Error {
    Error::Refused {
        path: layer.path().to_owned(),
        operation,
        reason,
    }
}

fn missing(layer: &Layer, operation: &'static str, name: &[u8]) -> Error {
    let header = layer.header();
    let hint = if header.bitmaps.is_some() && !header.bitmaps_consistent() {
        " (the image was changed by a program that does not know bitmaps, so all it had are void)"
    } else {
        ""
    };
    let name = String::from_utf8_lossy(name);
    refused(
        layer,
        operation,
        format!("there is none called {name:?}{hint}"),
    )
}
