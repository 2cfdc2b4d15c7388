//! The chain that is looked at, and which of its layers are merged into which.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use stead_qcow2::{Chain, LayerFile, LayerFormat, OpenPolicy, probe_format};
use stead_sys::readable;

use crate::error::{Kind, MergeError, Result};
use crate::space::{Place, place_of};

/// What a layer is in a merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Above the child; nothing changes but bitmaps that broke.
    Above,
    /// Directly above the top: it gets the base as its backing file.
    Child,
    /// The topmost layer that is merged.
    Top,
    /// Merged, between top and base.
    Between,
    /// What they are merged into.
    Base,
    /// Below the base; only read.
    Below,
}

/// A chain, the active layer first.
#[derive(Debug)]
pub(crate) struct Layers {
    pub files: Vec<LayerFile>,
    pub top: usize,
    pub base: usize,
    pub chain: Chain,
}

const ATTEMPT: &str = "read the chain";

impl Layers {
    pub fn read(active: &Path, top: Option<&Path>, base: Option<&Path>) -> Result<Self> {
        let engine = |error| MergeError::engine(ATTEMPT, error);
        let format = probe_format(active).map_err(engine)?;
        let file = LayerFile {
            path: active.to_owned(),
            format,
        };
        let chain = Chain::open_following(&file, &OpenPolicy::NAMES).map_err(engine)?;
        let files = (0..chain.depth()).filter_map(|index| chain.file(index));
        let files: Vec<LayerFile> = files
            .map(|(path, format)| {
                let path = stable(path);
                path.map(|path| LayerFile { path, format })
            })
            .collect::<std::io::Result<_>>()
            .map_err(|source| MergeError::io("find a layer of", active, source))?;
        let top = top.map_or(Ok(0), |top| find(&files, top))?;
        let base = base.map_or(Ok(top + 1), |base| find(&files, base))?;
        if base <= top || base >= files.len() {
            let what = match files.get(base) {
                Some(file) => format!(
                    "{} is not below {}",
                    file.path.display(),
                    files[top].path.display()
                ),
                None => format!("nothing lies below {}", files[top].path.display()),
            };
            return Err(usage(what, &files));
        }
        Ok(Self {
            files,
            top,
            base,
            chain,
        })
    }

    pub fn role(&self, index: usize) -> Role {
        match index {
            _ if index + 1 < self.top => Role::Above,
            _ if index + 1 == self.top => Role::Child,
            _ if index == self.top => Role::Top,
            _ if index < self.base => Role::Between,
            _ if index == self.base => Role::Base,
            _ => Role::Below,
        }
    }

    /// The layers that are merged, the base and what lies below it.
    pub fn committed(&self) -> &[LayerFile] {
        &self.files[self.top..]
    }

    pub fn merged(&self) -> &[LayerFile] {
        &self.files[self.top..self.base]
    }

    pub fn base_file(&self) -> &LayerFile {
        &self.files[self.base]
    }

    pub fn child(&self) -> Option<&LayerFile> {
        self.top.checked_sub(1).map(|index| &self.files[index])
    }

    /// The name that the child is to have for the base: as the layer above the base has it, where that means the
    /// same file.
    pub fn new_backing(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let child = self.child()?;
        let above = &self.files[self.base - 1];
        let backing = self.chain.layer(self.base - 1)?.header().backing.clone()?;
        let as_path = Path::new(OsStr::from_bytes(&backing.name));
        let same_folder = child.path.parent() == above.path.parent();
        let name = if as_path.is_absolute() || same_folder {
            backing.name
        } else {
            self.base_file().path.as_os_str().as_bytes().to_vec()
        };
        let format: &[u8] = match self.base_file().format {
            LayerFormat::Raw => b"raw",
            LayerFormat::Qcow2 => b"qcow2",
        };
        Some((name, format.to_vec()))
    }
}

/// A name that means the same file from anywhere and later: that of a device stays as it is given, because what its
/// links point to changes when the host starts anew.
pub(crate) fn stable(path: &Path) -> std::io::Result<PathBuf> {
    match place_of(path)? {
        Place::FileSystem => std::fs::canonicalize(path),
        Place::Device => std::path::absolute(path),
    }
}

/// Which layer is meant: by its file or by its number, 0 being the active one.
fn find(files: &[LayerFile], wanted: &Path) -> Result<usize> {
    if let Ok(id) = identity(wanted)
        && let Some(index) = files
            .iter()
            .position(|file| identity(&file.path).is_ok_and(|other| other == id))
    {
        return Ok(index);
    }
    let number = wanted.to_str().and_then(|text| text.parse::<usize>().ok());
    match number.filter(|number| *number < files.len()) {
        Some(number) => Ok(number),
        None => Err(usage(
            format!("{} is no layer of the chain", wanted.display()),
            files,
        )),
    }
}

fn usage(found: String, files: &[LayerFile]) -> MergeError {
    let names = (0..).zip(files);
    let names = names.map(|(index, file)| format!("{index} {}", file.path.display()));
    let names: Vec<String> = names.collect();
    MergeError::new(Kind::Usage, "choose the layers", found)
        .next(format!("the chain has: {}", names.join(", ")))
}

/// Which file it is, whatever its name.
pub(crate) fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    readable::identity(&File::open(path)?)
}

/// The folder that a file lies in.
pub(crate) fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        Some(_) | None => PathBuf::from("."),
    }
}
