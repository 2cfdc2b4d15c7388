//! The files of a merge, locked from the plan to the end.

use std::path::Path;

use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::commit::{
    CommitOptions, CommitReport, RawBase, commit_into, commit_into_raw,
};
use stead_qcow2::{Control, Error, LayerFormat};
use stead_sys::image_lock::{Access, Attempt, ImageLock};
use stead_sys::readable;

use crate::error::{Kind, MergeError, Result};
use crate::layers::Layers;

/// What the commit changes.
enum Target {
    Qcow2(Editor),
    /// The top stands for the raw file, and is in progress meanwhile.
    Raw {
        top: Editor,
        base: RawBase,
        _lock: ImageLock,
    },
}

/// The files of a merge. Dropping it gives the locks back.
pub(crate) struct Opened {
    target: Target,
    pub child: Option<Editor>,
    /// Layers above the top that get rid of bitmaps, topmost first, without the child.
    pub above: Vec<Editor>,
    _locks: Vec<ImageLock>,
}

const ATTEMPT: &str = "open the layers";

pub(crate) fn engine(error: Error) -> MergeError {
    MergeError::engine(ATTEMPT, error)
}

pub(crate) fn editor(path: &Path) -> Result<Editor> {
    Editor::open(path, EditOptions::default()).map_err(engine)
}

impl Opened {
    /// Locks everything; `change_above` also the layers above the child, for changes.
    pub fn open(layers: &Layers, change_above: bool) -> Result<Self> {
        let base = layers.base_file();
        let (target, merged) = match base.format {
            LayerFormat::Qcow2 => (Target::Qcow2(editor(&base.path)?), layers.merged()),
            LayerFormat::Raw => {
                let top = editor(&layers.files[layers.top].path)?;
                let (base, lock) = RawBase::open(&base.path).map_err(engine)?;
                let target = Target::Raw {
                    top,
                    base,
                    _lock: lock,
                };
                (target, &layers.merged()[1..])
            }
        };
        let child = layers
            .child()
            .map(|child| editor(&child.path))
            .transpose()?;
        let above = &layers.files[..layers.top.saturating_sub(1)];
        let above = above.iter().filter(|_| change_above);
        let below = &layers.files[layers.base + 1..];
        let locks = merged.iter().chain(below);
        Ok(Self {
            target,
            child,
            above: above
                .map(|file| editor(&file.path))
                .collect::<Result<_>>()?,
            _locks: locks
                .map(|file| lock(&file.path, Access::Read))
                .collect::<Result<_>>()?,
        })
    }

    pub fn commit(
        &mut self,
        layers: &Layers,
        options: &CommitOptions,
        left: u64,
        control: &Control<'_>,
    ) -> stead_qcow2::Result<CommitReport> {
        match &mut self.target {
            Target::Qcow2(editor) => {
                let below = &layers.files[layers.base + 1..];
                commit_into(editor, left, (layers.merged(), below), options, control)
            }
            Target::Raw { top, base, .. } => {
                commit_into_raw(top, &layers.merged()[1..], base, options, control)
            }
        }
    }

    /// How many findings besides leaks a check of the base has, as it stands.
    pub fn base_corruptions(&self) -> u64 {
        match &self.target {
            Target::Qcow2(editor) => editor.check().corruptions,
            Target::Raw { .. } => 0,
        }
    }

    /// Gives back the locks on everything but the child and what is above it.
    pub fn into_above(self) -> (Option<Editor>, Vec<Editor>) {
        (self.child, self.above)
    }
}

/// Locks a file that is only read, or that is to be removed.
pub(crate) fn lock(path: &Path, access: Access) -> Result<ImageLock> {
    let io = |source| MergeError::io("lock", path, source);
    let file = match access {
        Access::Read => readable::open(path).map_err(io)?,
        Access::Write => std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(io)?,
    };
    match ImageLock::attempt(&file, access).map_err(io)? {
        Attempt::Locked(lock) => Ok(lock),
        Attempt::HeldBy(holders) => {
            let holders: Vec<String> = holders.iter().map(ToString::to_string).collect();
            let found = format!("{} is in use by {}", path.display(), holders.join(", "));
            Err(MergeError::new(Kind::Conflict, ATTEMPT, found)
                .next("end the program that has it open; a running VM needs a live merge"))
        }
    }
}
