//! Another backing file, or none.
//!
//! [`rebase`] keeps what every disk state shows: the active one and each internal snapshot. Where the new disk
//! below shows something else than the old one, the image gets the old content itself; without a new one
//! that is everything ([`flatten`]). Clusters that several states show are copied once. VM state stays with its
//! snapshots.
//!
//! A bitmap of a chain is one name in its layers: each has noted what was written while it was the top. Where layers
//! leave the chain, what they noted goes into the image's bitmap of that name; one that they cannot complete is
//! removed, and the report says why. Other bitmaps stay as they are, as contents do.
//!
//! What was recorded of the old disk below goes; what the new one shows is
//! recorded if the caller wants it. [`rename`] changes the name alone.

use std::path::Path;

use crate::chain::{Chain, Member};
use crate::content::DiskContent;
use crate::control::Control;
use crate::edit::{Below, Done, Edit, Editor, Plan};
use crate::error::{Error, Result};
use crate::header::MAX_BACKING_NAME_BYTES;
use crate::layer::Layer;

use super::commit::{BitmapOutcome, bitmaps};

const OPERATION: &str = "change the backing file";

/// A backing file by name, as the header is to say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackingFile<'a> {
    /// Its name, 1 to 1023 bytes. A name that is not absolute starts in the image's folder.
    pub name: &'a [u8],
    /// Its format, which should be said: else readers have to guess it from its content.
    pub format: Option<&'a [u8]>,
}

/// What is to be below an image.
#[derive(Debug, Clone, Copy)]
pub struct NewBacking<'a> {
    /// How the header names it.
    pub file: BackingFile<'a>,
    /// The disk that it is.
    pub disk: &'a Chain,
    /// What it shows, if that is to be recorded in the image ([`DiskContent::of`] that disk).
    pub content: Option<DiskContent>,
}

/// What a rebase did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebased {
    /// Bytes of data that the image has itself now, shared clusters once.
    pub bytes: u64,
    /// What became of each bitmap that layers which are not below the image any more have, too; others are as they
    /// were.
    pub bitmaps: Vec<BitmapOutcome>,
}

/// Makes the image independent of what lies below it; `below` is that disk, `None` where there is none.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// [`Error::Refused`] when the image has a backing file and `below` is missing, or the other way round;
/// [`Error::Cancelled`]; else as [`Editor::apply`].
pub fn flatten(
    editor: &mut Editor,
    below: Option<&Chain>,
    control: &Control<'_>,
) -> Result<Done<Rebased>> {
    rebase(editor, below, None, control)
}

/// Gives the image another backing file, or none, without changing what any disk state shows. `below` is the disk
/// that lies below it now.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// [`Error::Refused`] as for [`flatten`], when the name cannot be said, or when the image would be below itself;
/// [`Error::Cancelled`]; else as [`Editor::apply`].
pub fn rebase(
    editor: &mut Editor,
    below: Option<&Chain>,
    new: Option<&NewBacking<'_>>,
    control: &Control<'_>,
) -> Result<Done<Rebased>> {
    require_fitting(editor, below, new)?;
    let change = Change::new(editor, below, new, control)?;
    let mut expected = 0;
    // How far it is, the bytes that are copied say.
    let done = editor.apply_with(&control.quiet(), |edit| {
        let done = change.run(edit, expected)?;
        expected = done.bytes;
        Ok(done)
    })?;
    control.tell(1, 1);
    Ok(done)
}

/// How much room [`rebase`] needs; nothing is written.
///
/// # Errors
/// As [`rebase`].
pub fn plan(
    editor: &Editor,
    below: Option<&Chain>,
    new: Option<&NewBacking<'_>>,
    control: &Control<'_>,
) -> Result<Plan> {
    require_fitting(editor, below, new)?;
    let change = Change::new(editor, below, new, control)?;
    editor.plan_with(&control.quiet(), |edit| change.run(edit, 0))
}

/// Says another name and format of the backing file, or none, and changes nothing else. What the image shows is
/// what the file of that name makes of it. What was recorded of the disk below stays while there is one, so that a
/// check tells whether the file of the new name shows the same.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// [`Error::Refused`] when the name cannot be said; else as [`Editor::apply`].
pub fn rename(editor: &mut Editor, new: Option<BackingFile<'_>>) -> Result<Done<()>> {
    require_name(editor.layer(), new)?;
    editor.apply(|edit| {
        edit.set_backing(new.map(|file| (file.name, file.format)));
        Ok(())
    })
}

/// A rebase that was thought through, and not begun.
struct Change<'a> {
    below: Option<&'a Chain>,
    new: Option<&'a NewBacking<'a>>,
    control: &'a Control<'a>,
    outcomes: Vec<BitmapOutcome>,
    steps: Vec<bitmaps::Step>,
}

impl<'a> Change<'a> {
    fn new(
        editor: &Editor,
        below: Option<&'a Chain>,
        new: Option<&'a NewBacking<'a>>,
        control: &'a Control<'a>,
    ) -> Result<Self> {
        let (outcomes, steps) = match below {
            None => Default::default(),
            Some(old) => {
                let top = Chain::on_top(Member::from_layer(editor.reopen()?)?, old);
                bitmaps::decide_without_layers(
                    &top,
                    leaving(old, new.map(|new| new.disk)),
                    control,
                )?
            }
        };
        Ok(Self {
            below,
            new,
            control,
            outcomes,
            steps,
        })
    }

    fn run(&self, edit: &mut Edit, expected_bytes: u64) -> Result<Rebased> {
        let disks = Below {
            old: self.below,
            new: self.new.map(|new| new.disk),
        };
        let filled = edit.fill(&disks, self.control, expected_bytes)?;
        bitmaps::store(&self.steps, edit)?;
        let new = self.new;
        edit.set_backing(new.map(|new| (new.file.name, new.file.format)));
        edit.record_backing(new.and_then(|new| new.content));
        Ok(Rebased {
            bytes: filled.bytes,
            bitmaps: self.outcomes.clone(),
        })
    }
}

/// How many of the layers of `old`, from its top on, are not below the image any more.
fn leaving(old: &Chain, new: Option<&Chain>) -> usize {
    let Some(new) = new else {
        return old.depth();
    };
    if new.layers_above(old).is_some() {
        return 0;
    }
    old.layers_above(new).unwrap_or(old.depth())
}

fn refused(path: &Path, reason: impl Into<String>) -> Error {
    Error::Refused {
        path: path.to_owned(),
        operation: OPERATION,
        reason: reason.into(),
    }
}

fn require_fitting(
    editor: &Editor,
    below: Option<&Chain>,
    new: Option<&NewBacking<'_>>,
) -> Result<()> {
    let image = editor.layer();
    let path = image.path();
    match (&image.header().backing, below) {
        (Some(_), None) => {
            let reason = "it has a backing file, whose content is needed; give the files below";
            return Err(refused(path, reason));
        }
        (None, Some(_)) => return Err(refused(path, "it has no backing file")),
        (Some(_), Some(_)) | (None, None) => {}
    }
    let Some(new) = new else { return Ok(()) };
    require_name(image, Some(new.file))?;
    let Ok(own) = path.canonicalize() else {
        // A storage that is no file: only its user knows what it is.
        return Ok(());
    };
    for index in 0..new.disk.depth() {
        let file = new.disk.file(index).map(|(file, _)| file.canonicalize());
        if matches!(file, Some(Ok(file)) if file == own) {
            return Err(refused(path, "the image would be below itself"));
        }
    }
    Ok(())
}

/// The image can say that this file is below it: the name is not too long, and its data file is not raw, which is the
/// whole disk by itself.
pub(super) fn require_name(image: &Layer, new: Option<BackingFile<'_>>) -> Result<()> {
    let Some(new) = new else { return Ok(()) };
    let length = u32::try_from(new.name.len()).unwrap_or(u32::MAX);
    if !(1..=MAX_BACKING_NAME_BYTES).contains(&length) {
        let reason = format!("a name of {length} bytes cannot be said, only of 1 to 1023");
        return Err(refused(image.path(), reason));
    }
    let external = image.header().external_data.as_ref();
    if external.is_some_and(|external| external.raw) {
        let reason = "its data file is raw, the whole disk by itself, so nothing can be below it";
        return Err(refused(image.path(), reason));
    }
    Ok(())
}
