//! The record of a merge that is going on: what `recover` needs to know, written before the first change.

use std::collections::hash_map::DefaultHasher;
use std::ffi::OsStr;
use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stead_qcow2::{LayerFile, LayerFormat};
use stead_sys::durable::{self, Existing};

use crate::bitmaps::Becomes;
use crate::error::{Kind, MergeError, Result};
use crate::layers::{Layers, folder, identity, stable};
use crate::plan::MergePlan;
use crate::space::{Place, place_of};

const VERSION: u32 = 1;
const SUFFIX: &str = ".stead-merge";
/// The longest record that is read, in bytes.
const MAX_BYTES: u64 = 64 << 20;

/// A layer as it was when the merge began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RecordedLayer {
    path: Vec<u8>,
    qcow2: bool,
    /// Device and inode; not of a block device, whose inode is another one when the host starts anew.
    identity: Option<(u64, u64)>,
}

impl RecordedLayer {
    fn of(file: &LayerFile) -> Result<Self> {
        let io = |source| MergeError::io("look at", &file.path, source);
        let identity = match place_of(&file.path).map_err(io)? {
            Place::FileSystem => Some(identity(&file.path).map_err(io)?),
            Place::Device => None,
        };
        Ok(Self {
            path: file.path.as_os_str().as_bytes().to_vec(),
            qcow2: file.format == LayerFormat::Qcow2,
            identity,
        })
    }

    pub fn file(&self) -> LayerFile {
        LayerFile {
            path: PathBuf::from(OsStr::from_bytes(&self.path)),
            format: match self.qcow2 {
                true => LayerFormat::Qcow2,
                false => LayerFormat::Raw,
            },
        }
    }

    /// The file is there, and is the one that it was.
    pub fn is_there(&self) -> Result<bool> {
        let path = self.file().path;
        match identity(&path) {
            Ok(found) => Ok(self.identity.is_none_or(|own| own == found)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(MergeError::io("look at", &path, source)),
        }
    }

    /// Nothing is there under its name.
    pub fn is_gone(&self) -> bool {
        matches!(identity(&self.file().path), Err(error) if error.kind() == io::ErrorKind::NotFound)
    }
}

/// A bitmap and what is to become of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RecordedBitmap {
    pub name: Vec<u8>,
    pub becomes: Becomes,
    pub void_above: bool,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    Begun,
    /// The base has all that the active layer had when this was written, and is the disk from here on: a VM may write
    /// to it.
    Switched,
    /// The base was found whole, or is the disk. Layers may be gone already.
    Proven,
}

/// What is being done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// All layers, the active one first.
    pub layers: Vec<RecordedLayer>,
    pub top: usize,
    pub base: usize,
    /// Name and format that the child gets.
    pub backing: Option<(Vec<u8>, Vec<u8>)>,
    pub bitmaps: Vec<RecordedBitmap>,
    pub keep_layers: bool,
    pub phase: Phase,
    /// A running QEMU does it.
    #[serde(default)]
    pub live: bool,
}

impl Record {
    pub fn of(layers: &Layers, plan: &MergePlan, keep_layers: bool) -> Result<Self> {
        let bitmaps = plan.bitmaps.iter().map(|verdict| RecordedBitmap {
            name: verdict.name_bytes.clone(),
            becomes: verdict.becomes,
            void_above: verdict.void_above,
        });
        Ok(Self {
            version: VERSION,
            layers: layers
                .files
                .iter()
                .map(RecordedLayer::of)
                .collect::<Result<_>>()?,
            top: layers.top,
            base: layers.base,
            backing: layers.new_backing(),
            bitmaps: bitmaps.collect(),
            keep_layers,
            phase: Phase::Begun,
            live: false,
        })
    }

    pub fn read(path: &Path) -> Result<Self> {
        let damaged = |found: String| {
            MergeError::new(Kind::Damaged, format!("read the record {}", path.display()), found)
                .next("look at the chain with `stead img info --backing-chain`; it is usable as it stands. Remove the record to go on")
        };
        let length = std::fs::metadata(path)
            .map_err(|source| MergeError::io("read", path, source))?
            .len();
        if length > MAX_BYTES {
            return Err(damaged(format!(
                "it has {length} bytes, more than any record has"
            )));
        }
        let bytes = std::fs::read(path).map_err(|source| MergeError::io("read", path, source))?;
        let record: Self =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if record.version != VERSION {
            let found = format!(
                "it is of version {}, and {VERSION} is known",
                record.version
            );
            return Err(damaged(found));
        }
        if record.top >= record.base || record.base >= record.layers.len() {
            return Err(damaged("its layers do not make a merge".into()));
        }
        Ok(record)
    }

    /// # Durability
    /// When this returns `Ok`, the record is synced.
    pub fn write(&self, path: &Path, existing: Existing) -> Result<()> {
        let attempt = format!("write the record {}", path.display());
        let bytes = serde_json::to_vec(self)
            .map_err(|error| MergeError::new(Kind::Internal, &attempt, error.to_string()))?;
        let io = |source| MergeError::io("write the record", path, source);
        durable::create_dir(&folder(path), 0o700).map_err(io)?;
        durable::publish(path, 0o600, &bytes, existing).map_err(io)
    }

    pub fn merged(&self) -> &[RecordedLayer] {
        &self.layers[self.top..self.base]
    }

    pub fn child(&self) -> Option<&RecordedLayer> {
        self.top.checked_sub(1).map(|index| &self.layers[index])
    }

    pub fn base_path(&self) -> PathBuf {
        self.layers[self.base].file().path
    }

    fn mentions(&self, path: &Path) -> bool {
        let wanted = identity(path).ok();
        self.layers.iter().any(|layer| {
            let own = layer.file().path;
            // A device may be given by another of its names.
            own == path || (wanted.is_some() && identity(&own).ok() == wanted)
        })
    }
}

/// Where the record of a merge into `base` lies: beside it, or in `folder` for a block device.
///
/// # Errors
/// When there is no such file.
pub fn record_path(base: &Path, folder: &Path) -> Result<PathBuf> {
    let io = |source| MergeError::io("find", base, source);
    let base = stable(base).map_err(io)?;
    let name = base.file_name().unwrap_or_default().to_os_string();
    Ok(match place_of(&base).map_err(io)? {
        Place::FileSystem => base.with_file_name(hidden(name)),
        Place::Device => {
            // Devices of the same name may lie in several folders.
            let mut hasher = DefaultHasher::new();
            base.hash(&mut hasher);
            let mut unique = name.into_vec();
            unique.extend(format!("-{:016x}", hasher.finish()).into_bytes());
            folder.join(hidden(std::ffi::OsString::from_vec(unique)))
        }
    })
}

fn hidden(name: std::ffi::OsString) -> std::ffi::OsString {
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(SUFFIX);
    hidden
}

/// Removes what processes left that died while they wrote this record. Called where nobody else can be writing it.
pub(crate) fn remove_unfinished(record: &Path) -> Result<()> {
    let place = folder(record);
    let io = |source| MergeError::io("remove unfinished records in", &place, source);
    let entries = match std::fs::read_dir(&place) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(io(source)),
    };
    let mut end = b"-".to_vec();
    end.extend(record.file_name().unwrap_or_default().as_bytes());
    for entry in entries {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().unwrap_or_default().as_bytes();
        if name.starts_with(durable::TEMP_PREFIX.as_bytes()) && name.ends_with(&end) {
            durable::remove_file(&path).map_err(io)?;
        }
    }
    Ok(())
}

/// The records of merges that `path` takes part in, in its folder, in that of every file it names, and in `folder`.
pub(crate) fn find(path: &Path, records: &Path) -> Result<Vec<(PathBuf, Record)>> {
    let real = match stable(path) {
        Ok(real) => real,
        Err(_gone) => {
            std::path::absolute(path).map_err(|source| MergeError::io("find", path, source))?
        }
    };
    let mut found = Vec::new();
    let own = if real.is_dir() {
        real.clone()
    } else {
        folder(&real)
    };
    for place in [own, records.to_owned()] {
        let entries = match std::fs::read_dir(&place) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(MergeError::io("list", &place, source)),
        };
        for entry in entries {
            let entry = entry
                .map_err(|source| MergeError::io("list", &place, source))?
                .path();
            let name = entry.file_name().unwrap_or_default().as_bytes();
            if !name.starts_with(b".")
                || !name.ends_with(SUFFIX.as_bytes())
                || name.starts_with(durable::TEMP_PREFIX.as_bytes())
            {
                continue;
            }
            match Record::read(&entry) {
                Ok(record) if record.mentions(&real) || place == real => {
                    found.push((entry, record))
                }
                Ok(_) => {}
                // Another merge's record is no hindrance.
                Err(error) if record_path(&real, records).is_ok_and(|own| own == entry) => {
                    return Err(error);
                }
                Err(_) => {}
            }
        }
    }
    found.dedup_by(|a, b| a.0 == b.0);
    Ok(found)
}
