//! What a new image is to be, and whether the format can express it.

use std::path::{Path, PathBuf};

use stead_sys::durable::Existing;

use crate::chain::LayerFormat;
use crate::content::DiskContent;
use crate::error::{Error, Result};
use crate::header::{Compression, MAX_BACKING_NAME_BYTES, MAX_L1_BYTES, SECTOR_BYTES, to_u64};
use crate::units::ClusterSize;

/// The largest virtual disk that is made here: 64 TiB.
pub const MAX_VIRTUAL_BYTES: u64 = 64 << 40;

/// The version of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Version 2, which QEMU calls `compat=0.10`: no zero clusters, refcounts of 16 bits.
    V2,
    /// Version 3, which QEMU calls `compat=1.1`.
    V3,
}

/// What is reserved when an image is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: the file grows as the guest writes.
    Off,
    /// Every cluster has its place in the file, which is sparse there.
    Metadata,
    /// The same, and the file system has reserved the room.
    Falloc,
    /// The same, and zeros were written, so that the room is certain on every file system.
    Full,
}

/// What a new image says about the file below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The name, at most 1023 bytes. QEMU takes it relative to the image's folder; a caller that
    /// gives QEMU the whole chain explicitly does not need it to be right.
    pub name: String,
    /// The format of the file below.
    pub format: LayerFormat,
}

/// A second file that holds the guest data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// The name that the header gives; QEMU takes it relative to the image's folder.
    pub name: String,
    /// Where the file is to be made.
    pub path: PathBuf,
    /// Whether the data file alone, read as a raw image, is to be the disk at all times.
    pub raw: bool,
}

/// What a qcow2 image is to be, apart from its place and its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Options {
    /// The version of the format.
    pub version: Version,
    /// The cluster size.
    pub cluster_size: ClusterSize,
    /// The width of a refcount: a power of two from 1 to 64 bits.
    pub refcount_bits: u32,
    /// Whether QEMU may write refcounts late, and mark the image dirty meanwhile.
    pub lazy_refcounts: bool,
    /// Whether clusters have 32 subclusters.
    pub extended_l2: bool,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// The file below, if there is one.
    pub backing: Option<Backing>,
    /// The file that holds the guest data, if it is not the image itself.
    pub data_file: Option<DataFile>,
    /// What is reserved.
    pub preallocation: Preallocation,
    /// What the file below shows, if that is to be recorded ([`DiskContent::of`] that disk), so that a check finds
    /// when it shows something else ([`crate::check_backing`]).
    pub backing_content: Option<DiskContent>,
}

impl Default for Qcow2Options {
    /// What QEMU makes when nothing is said.
    fn default() -> Self {
        Self {
            version: Version::V3,
            cluster_size: ClusterSize::DEFAULT,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            preallocation: Preallocation::Off,
            backing_content: None,
        }
    }
}

/// The format of a new image, with its options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewFormat {
    /// The file's bytes are the disk's.
    Raw {
        /// What is reserved; [`Preallocation::Metadata`] is not for raw images.
        preallocation: Preallocation,
    },
    /// A qcow2 image.
    Qcow2(Qcow2Options),
}

/// Where a new image is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A new file. It has a hidden temporary name until it is whole, verified and synced; an error or a
    /// crash leaves nothing under `path`, and an earlier file as it was.
    New {
        /// Its name.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Whether an earlier file under the name may be replaced.
        existing: Existing,
    },
    /// A block device or file that is there and is written in place: what it holds is lost from the first
    /// write on, also when the operation fails. A qcow2 header is written last, so what is unfinished is
    /// no qcow2 image.
    InPlace {
        /// Its name.
        path: PathBuf,
    },
}

impl Target {
    /// The name of the image.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::New { path, .. } | Self::InPlace { path } => path,
        }
    }
}

/// The numbers of an image that the format can express: everything here is bounded.
#[derive(Debug, Clone)]
pub(crate) struct Geometry {
    pub path: PathBuf,
    /// The virtual disk's length in bytes, a multiple of 512.
    pub disk: u64,
    pub size: ClusterSize,
    pub version: Version,
    pub refcount_order: u32,
    pub extended_l2: bool,
    /// What is not defined here is seen in a file below.
    pub backing: bool,
    /// Guest data lies in another file, at its guest offset.
    pub external: bool,
    pub l1_entries: u64,
}

impl Geometry {
    /// # Errors
    /// [`Error::InvalidImage`] when the format, or QEMU's limits of it, cannot express the image.
    pub fn new(path: &Path, disk: u64, options: &Qcow2Options) -> Result<Self> {
        check_disk(path, disk)?;
        check_features(path, options)?;
        check_backing(path, options)?;
        let mut geometry = Self {
            path: path.to_owned(),
            disk,
            size: options.cluster_size,
            version: options.version,
            refcount_order: options.refcount_bits.trailing_zeros(),
            extended_l2: options.extended_l2,
            backing: options.backing.is_some(),
            external: options.data_file.is_some(),
            l1_entries: 0,
        };
        geometry.l1_entries = geometry.l1_entries_for(disk)?;
        Ok(geometry)
    }

    /// Words of 8 bytes in an L2 entry.
    pub fn entry_words(&self) -> u64 {
        if self.extended_l2 { 2 } else { 1 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.size.words() / self.entry_words()
    }

    /// How many guest bytes an L2 table describes.
    pub fn l2_coverage(&self) -> u64 {
        self.l2_entries() << self.size.bits()
    }

    /// The most references that a refcount can count, and that are counted here.
    pub fn most_references(&self) -> u16 {
        match 1_u32 << self.refcount_order {
            bits @ 0..16 => (1 << bits) - 1,
            _ => u16::MAX,
        }
    }

    /// Whether zeros must be said because something else is seen otherwise.
    pub fn says_zeros(&self) -> bool {
        self.backing
    }

    /// Whether an entry can say that a cluster reads as zeros.
    pub fn has_zero_entries(&self) -> bool {
        self.version == Version::V3
    }

    /// L1 entries of a view of `disk` bytes.
    pub fn l1_entries_for(&self, disk: u64) -> Result<u64> {
        let entries = disk.div_ceil(self.l2_coverage());
        if entries * 8 > MAX_L1_BYTES {
            let size = self.size;
            return self.invalid(format!(
                "{disk} bytes in clusters of {size} need an L1 table above 32 MiB; take larger clusters"
            ));
        }
        Ok(entries)
    }

    pub fn invalid<T>(&self, reason: String) -> Result<T> {
        invalid(&self.path, reason)
    }
}

pub(crate) fn invalid<T>(path: &Path, reason: impl Into<String>) -> Result<T> {
    Err(Error::InvalidImage {
        path: path.to_owned(),
        reason: reason.into(),
    })
}

/// The length of a disk that can be made.
pub(crate) fn check_disk(path: &Path, disk: u64) -> Result<()> {
    if !disk.is_multiple_of(SECTOR_BYTES) {
        return invalid(
            path,
            format!("its virtual size of {disk} bytes is not a multiple of 512"),
        );
    }
    if disk > MAX_VIRTUAL_BYTES {
        return invalid(
            path,
            format!("its virtual size of {disk} bytes is above 64 TiB"),
        );
    }
    Ok(())
}

fn check_features(path: &Path, options: &Qcow2Options) -> Result<()> {
    let bits = options.refcount_bits;
    if !bits.is_power_of_two() || bits > 64 {
        return invalid(
            path,
            format!("refcounts of {bits} bits are not of 1, 2, 4, 8, 16, 32 or 64 bits"),
        );
    }
    let needs_version_3 = [
        (bits != 16, "refcounts of other than 16 bits"),
        (options.lazy_refcounts, "lazy refcounts"),
        (options.extended_l2, "extended L2 entries"),
        (options.compression == Compression::Zstd, "zstd compression"),
        (options.data_file.is_some(), "an external data file"),
    ];
    if options.version == Version::V2
        && let Some((_, what)) = needs_version_3.iter().find(|(wanted, _)| *wanted)
    {
        return invalid(
            path,
            format!("{what} need version 3 of the format (compat=1.1)"),
        );
    }
    if options.extended_l2 && options.cluster_size.bits() < 14 {
        return invalid(
            path,
            format!(
                "extended L2 entries need clusters of at least 16 KiB, not {}",
                options.cluster_size
            ),
        );
    }
    Ok(())
}

fn check_backing(path: &Path, options: &Qcow2Options) -> Result<()> {
    if let Some(data) = &options.data_file
        && data.raw
        && options.backing.is_some()
    {
        return invalid(
            path,
            "a raw external data file is the whole disk, so there can be no backing file",
        );
    }
    let Some(backing) = &options.backing else {
        if options.backing_content.is_some() {
            return invalid(
                path,
                "there is no backing file whose content could be recorded",
            );
        }
        return Ok(());
    };
    let length = backing.name.len();
    if length == 0 || to_u64(length) > u64::from(MAX_BACKING_NAME_BYTES) {
        return invalid(
            path,
            format!("a backing name of {length} bytes is empty or longer than 1023 bytes"),
        );
    }
    if options.preallocation != Preallocation::Off && !options.extended_l2 {
        return invalid(
            path,
            "reserved clusters would hide the backing file; with extended L2 entries they do not",
        );
    }
    Ok(())
}
