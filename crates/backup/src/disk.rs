//! The disk that is backed up: its active layer locked for changes, what lies below locked against writers.

use std::path::{Path, PathBuf};

use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::bitmap::{self, Action, Step};
use stead_qcow2::{Chain, LayerFile, LayerFormat, OpenPolicy, probe_format};
use stead_sys::image_lock::{Access, Attempt, ImageLock};
use stead_sys::readable;

use crate::error::{BackupError, Kind, Result};

const ATTEMPT: &str = "open the disk";

/// A disk that nobody else writes to while this lives.
#[derive(Debug)]
pub(crate) struct Disk {
    pub path: PathBuf,
    pub chain: Chain,
    editor: Editor,
    _below: Vec<ImageLock>,
}

fn engine(error: stead_qcow2::Error) -> BackupError {
    BackupError::engine(ATTEMPT, error)
}

impl Disk {
    /// Opens and locks the disk whose active layer is at `path`, and what it names below.
    pub fn open(path: &Path) -> Result<Self> {
        if probe_format(path).map_err(engine)? != LayerFormat::Qcow2 {
            let found = format!("{} is a raw image, which has no bitmaps", path.display());
            return Err(BackupError::new(Kind::Incompatible, ATTEMPT, found)
                .next("put a qcow2 layer over it (`stead img create -f qcow2 -b RAW -F raw NEW`), or convert it"));
        }
        let editor = Editor::open(path, EditOptions::default()).map_err(engine)?;
        let top = LayerFile {
            path: path.to_owned(),
            format: LayerFormat::Qcow2,
        };
        let open = || Chain::open_following(&top, &OpenPolicy::NAMES).map_err(engine);
        // What is read counts only from when it is locked, so it is opened again.
        let files = open()?;
        let files = (1..files.depth()).filter_map(|index| Some(files.file(index)?.0.to_owned()));
        let locks = files.map(|file| lock(&file)).collect::<Result<_>>()?;
        Ok(Self {
            path: path.to_owned(),
            chain: open()?,
            editor,
            _below: locks,
        })
    }

    /// The names of the bitmaps that the active layer has.
    pub fn bitmaps(&self) -> Result<Vec<Vec<u8>>> {
        let stored = self.editor.layer().stored_bitmaps().map_err(engine)?;
        Ok(stored.into_iter().map(|stored| stored.name).collect())
    }

    /// Whether the image was changed by a program that does not know bitmaps, which made all of them void.
    pub fn bitmaps_are_void(&self) -> bool {
        let header = self.editor.layer().header();
        header.bitmaps.is_some() && !header.bitmaps_consistent()
    }

    /// Whether the bitmap `new` can be begun and `old` ones removed, before anything is written.
    pub fn plan_switch(&self, new: &[u8], old: &[Vec<u8>]) -> Result<()> {
        let planned = bitmap::plan(&self.editor, &steps(new, old));
        planned.map_err(|error| BackupError::engine("plan the next bitmap", error))?;
        Ok(())
    }

    /// Begins the bitmap `new` and removes `old` ones, in one change of the image.
    pub fn switch(&mut self, new: &[u8], old: &[Vec<u8>]) -> Result<()> {
        let changed = bitmap::change(&mut self.editor, &steps(new, old));
        changed.map_err(|error| BackupError::engine("begin the next bitmap", error))?;
        Ok(())
    }
}

fn steps<'a>(new: &'a [u8], old: &'a [Vec<u8>]) -> Vec<Step<'a>> {
    let begin = Step {
        bitmap: new,
        action: Action::Add {
            granularity_bits: None,
            enabled: true,
        },
    };
    let remove = old.iter().map(|name| Step {
        bitmap: name,
        action: Action::Remove,
    });
    std::iter::once(begin).chain(remove).collect()
}

fn lock(path: &Path) -> Result<ImageLock> {
    let io = |source| BackupError::io("lock", path, source);
    let file = readable::open(path).map_err(io)?;
    match ImageLock::attempt(&file, Access::Read).map_err(io)? {
        Attempt::Locked(lock) => Ok(lock),
        Attempt::HeldBy(holders) => {
            let holders: Vec<String> = holders.iter().map(ToString::to_string).collect();
            let found = format!("{} is in use by {}", path.display(), holders.join(", "));
            Err(BackupError::new(Kind::Conflict, ATTEMPT, found)
                .next("end the program that has it open, or stop the VM"))
        }
    }
}
