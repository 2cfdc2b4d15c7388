//! The disk that is backed up: its active layer locked for changes, what lies below locked against writers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::bitmap::{self, Action, Step};
use stead_qcow2::{Chain, LayerFile, LayerFormat, OpenPolicy, probe_format};
use stead_sys::image_lock::{Access, Attempt, ImageLock};
use stead_sys::readable;

use crate::error::{BackupError, Kind, Result};

const ATTEMPT: &str = "open the disk";

/// A disk that is to be backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// The active layer of a disk that nobody has open; those below are found by the names in the images.
    Image(PathBuf),
    /// All layers of a disk that nobody has open, the active one first.
    Layers {
        /// What the disk is called.
        name: String,
        /// Its layers.
        layers: Vec<LayerFile>,
    },
    /// Layers of a running disk that are not written any more, the topmost first: at that instant a new, empty layer took
    /// over, and had the bitmap of [`next_bitmap`](crate::next_bitmap) from the beginning.
    Frozen {
        /// What the disk is called.
        name: String,
        /// The layers.
        layers: Vec<LayerFile>,
        /// The id, of [`new_id`](crate::new_id), that the bitmap has in its name.
        id: String,
    },
}

/// A disk that nobody else writes to while this lives.
#[derive(Debug)]
pub(crate) struct Disk {
    pub name: String,
    pub chain: Arc<Chain>,
    /// The active layer; none where the next bitmap has begun already.
    editor: Option<Editor>,
    _locks: Vec<ImageLock>,
}

fn engine(error: stead_qcow2::Error) -> BackupError {
    BackupError::engine(ATTEMPT, error)
}

/// The files of a disk, the topmost first, by the names in them.
fn follow(path: &Path) -> Result<Vec<LayerFile>> {
    if probe_format(path).map_err(engine)? != LayerFormat::Qcow2 {
        let found = format!("{} is a raw image, which has no bitmaps", path.display());
        return Err(BackupError::new(Kind::Incompatible, ATTEMPT, found)
            .next("put a qcow2 layer over it (`stead img create -f qcow2 -b RAW -F raw NEW`), or convert it"));
    }
    let top = LayerFile {
        path: path.to_owned(),
        format: LayerFormat::Qcow2,
    };
    let chain = Chain::open_following(&top, &OpenPolicy::NAMES).map_err(engine)?;
    let files = (0..chain.depth()).filter_map(|index| chain.file(index));
    let file = |(path, format): (&Path, _)| LayerFile {
        path: path.to_owned(),
        format,
    };
    Ok(files.map(file).collect())
}

fn edit(layer: &LayerFile) -> Result<Editor> {
    if layer.format == LayerFormat::Raw {
        let found = format!(
            "{} is a raw image, which has no bitmaps",
            layer.path.display()
        );
        return Err(BackupError::new(Kind::Incompatible, ATTEMPT, found)
            .next("back it up while it runs: a layer is put over it then"));
    }
    Editor::open(&layer.path, EditOptions::default()).map_err(engine)
}

impl Disk {
    /// Opens and locks a disk.
    pub fn open(source: &DiskSource) -> Result<Self> {
        match source {
            DiskSource::Image(path) => {
                let absolute = std::path::absolute(path);
                let absolute = absolute.map_err(|source| BackupError::io("find", path, source))?;
                let editor = match probe_format(path).map_err(engine)? {
                    LayerFormat::Qcow2 => {
                        Some(Editor::open(path, EditOptions::default()).map_err(engine)?)
                    }
                    LayerFormat::Raw => None,
                };
                Self::new(absolute.display().to_string(), &follow(path)?, editor)
            }
            DiskSource::Layers { name, layers } => {
                let active = layers.first().map(edit).transpose()?;
                Self::new(name.clone(), layers, active)
            }
            DiskSource::Frozen { name, layers, .. } => Self::new(name.clone(), layers, None),
        }
    }

    /// What is not opened for changes is locked against writers, and read only from then on.
    fn new(name: String, layers: &[LayerFile], editor: Option<Editor>) -> Result<Self> {
        let others = layers.iter().skip(usize::from(editor.is_some()));
        let locks = others
            .map(|layer| lock(&layer.path))
            .collect::<Result<_>>()?;
        Ok(Self {
            name,
            chain: Arc::new(Chain::open(layers).map_err(engine)?),
            editor,
            _locks: locks,
        })
    }

    /// The files that it is read from, the topmost first.
    pub fn files(&self) -> Vec<PathBuf> {
        let files = (0..self.chain.depth()).filter_map(|index| self.chain.file(index));
        files.map(|(path, _)| path.to_owned()).collect()
    }

    /// The names of the bitmaps that the active layer has.
    pub fn bitmaps(&self) -> Result<Vec<Vec<u8>>> {
        let Some(editor) = &self.editor else {
            return Ok(Vec::new());
        };
        let stored = editor.layer().stored_bitmaps().map_err(engine)?;
        Ok(stored.into_iter().map(|stored| stored.name).collect())
    }

    /// Whether the image was changed by a program that does not know bitmaps, which made all of them void.
    pub fn bitmaps_are_void(&self) -> bool {
        let top = self.chain.layer(0).map(stead_qcow2::Layer::header);
        top.is_some_and(|header| header.bitmaps.is_some() && !header.bitmaps_consistent())
    }

    /// Whether the bitmap `new` can be begun and `old` ones removed, before anything is written.
    pub fn plan_switch(&self, new: &[u8], old: &[Vec<u8>]) -> Result<()> {
        let Some(editor) = &self.editor else {
            return Ok(());
        };
        let planned = bitmap::plan(editor, &steps(new, old));
        planned.map_err(|error| BackupError::engine("plan the next bitmap", error))?;
        Ok(())
    }

    /// Begins the bitmap `new` and removes `old` ones, in one change of the image.
    pub fn switch(&mut self, new: &[u8], old: &[Vec<u8>]) -> Result<()> {
        let Some(editor) = &mut self.editor else {
            return Ok(());
        };
        let changed = bitmap::change(editor, &steps(new, old));
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
