//! The room that a file of a merge needs, and whether it is there.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use stead_qcow2::edit::Plan;
use stead_sys::space;
use stead_sys::storage::{FileStorage, Storage};

/// Where a file lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// In a file system, where it grows as long as there is free space.
    FileSystem,
    /// It is a block device, as long as it is.
    Device,
}

/// The room that a file needs. All in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Space {
    /// The file.
    pub file: PathBuf,
    /// Where it lies.
    pub place: Place,
    /// How long it is at its longest.
    pub peak_bytes: u64,
    /// How long it is afterwards; of a device, how much of it is used.
    pub end_bytes: u64,
    /// What must be there: free in the file system, or the device's length.
    pub needed_bytes: u64,
    /// What is there of that.
    pub available_bytes: u64,
}

impl Space {
    pub(crate) fn of(path: &Path, plan: &Plan) -> io::Result<Self> {
        let place = place_of(path)?;
        let (peak_bytes, needed_bytes, available_bytes) = match place {
            Place::FileSystem => (
                plan.peak_bytes,
                plan.new_bytes,
                space::available_bytes(path)?,
            ),
            Place::Device => (plan.reached_bytes, plan.reached_bytes, device_bytes(path)?),
        };
        Ok(Self {
            file: path.to_owned(),
            place,
            peak_bytes,
            end_bytes: plan.end_bytes,
            needed_bytes,
            available_bytes,
        })
    }

    /// Whether the room is there.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.needed_bytes <= self.available_bytes
    }

    /// How much is missing.
    #[must_use]
    pub fn short_bytes(&self) -> u64 {
        self.needed_bytes.saturating_sub(self.available_bytes)
    }

    /// What is missing, in words.
    pub(crate) fn words(&self) -> String {
        let (file, needed, there) = (self.file.display(), self.needed_bytes, self.available_bytes);
        match self.place {
            Place::FileSystem => {
                format!("{file} needs {needed} free bytes in its file system, {there} are free")
            }
            Place::Device => format!(
                "{file} needs {needed} bytes and the device has {there}: extend it by {}",
                self.short_bytes()
            ),
        }
    }
}

pub(crate) fn place_of(path: &Path) -> io::Result<Place> {
    let device = std::fs::metadata(path)?.file_type().is_block_device();
    Ok(if device {
        Place::Device
    } else {
        Place::FileSystem
    })
}

pub(crate) fn device_bytes(path: &Path) -> io::Result<u64> {
    FileStorage::new(std::fs::File::open(path)?)?.len()
}

/// Whether both grow in the same file system.
pub(crate) fn share_file_system(one: &Path, other: &Path) -> io::Result<bool> {
    let files = place_of(one)? == Place::FileSystem && place_of(other)? == Place::FileSystem;
    Ok(files && std::fs::metadata(one)?.dev() == std::fs::metadata(other)?.dev())
}
