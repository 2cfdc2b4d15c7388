//! What an image says of itself. Nothing is followed and no guest data is read, so encrypted images and
//! those whose other files are missing can be looked at too.
//!
//! As JSON the structs have the fields of `qemu-img info --output=json`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::chain::{LayerFile, LayerFormat};
use crate::directory::{InternalSnapshot, StoredBitmap};
use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::following::{self, OpenPolicy};
use crate::header::{Encryption, Header, SECTOR_BYTES};
use crate::layer::Layer;

/// What an image says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The file, as it was named.
    pub filename: String,
    /// `raw` or `qcow2`.
    pub format: &'static str,
    /// The disk's length in bytes.
    pub virtual_size: u64,
    /// What the file takes on its file system, in bytes; holes are left out.
    pub actual_size: u64,
    /// The file's length in bytes.
    #[serde(skip)]
    pub file_length: u64,
    /// The cluster size in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Guest data is encrypted.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub encrypted: bool,
    /// The image was not closed properly: refcounts may be wrong.
    pub dirty_flag: bool,
    /// The backing file, as the image names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The backing file, seen from here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The backing file's format, where the image states it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// The internal snapshots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    /// What only qcow2 images have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
}

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Its identifier.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970, UTC.
    pub date_sec: u32,
    /// When it was made: nanoseconds within the second.
    pub date_nsec: u32,
    /// How long the VM had run: whole seconds.
    pub vm_clock_sec: u64,
    /// How long the VM had run: nanoseconds within the second.
    pub vm_clock_nsec: u64,
    /// How many instructions the VM had run, where that was kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
}

/// What only one format has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum FormatSpecific {
    /// A qcow2 image.
    Qcow2(Qcow2Info),
}

/// What only qcow2 images have. Some is there only in version 3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// `0.10` (version 2) or `1.1` (version 3).
    pub compat: &'static str,
    /// How compressed clusters are compressed.
    pub compression_type: &'static str,
    /// Refcounts may be written late.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// Bits of a refcount.
    pub refcount_bits: u64,
    /// The image is marked corrupt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// Clusters have 32 subclusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
    /// The external data file, as the image names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// The external data file, read alone, is the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
    /// The persistent dirty bitmaps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapInfo>,
    /// How guest data is encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encrypt: Option<EncryptInfo>,
}

/// A persistent dirty bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// How many bytes a bit stands for.
    pub granularity: u64,
    /// `in-use`: it was not saved and says nothing. `auto`: it is enabled.
    pub flags: Vec<&'static str>,
}

/// How guest data is encrypted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct EncryptInfo {
    /// `aes` or `luks`.
    pub format: &'static str,
}

/// What the image `file` says of itself.
///
/// # Errors
/// When it cannot be opened (see [`Layer::inspect`]), or its table of internal snapshots or its bitmap
/// directory are not valid.
pub fn info(file: &LayerFile) -> Result<ImageInfo> {
    match file.format {
        LayerFormat::Raw => raw_info(&file.path),
        LayerFormat::Qcow2 => layer_info(&Layer::inspect(&file.path)?),
    }
}

/// As [`info()`], of a layer that is open already.
///
/// # Errors
/// When its directories cannot be read.
pub fn info_layer(layer: &Layer) -> Result<ImageInfo> {
    layer_info(layer)
}

/// What the image `top` and those below it say of themselves, as far as `policy` follows names.
///
/// # Errors
/// As [`info()`], and as [`Chain::open_following`](crate::Chain::open_following) for names.
pub fn info_chain(top: &LayerFile, policy: &OpenPolicy) -> Result<Vec<ImageInfo>> {
    let mut seen = following::Seen::default();
    let mut all = Vec::new();
    let mut next = Some(top.clone());
    while let Some(file) = next {
        let image = ImageFile::open(&file.path)?;
        seen.accept(&image)?;
        next = match file.format {
            LayerFormat::Raw => {
                all.push(raw_info(&file.path)?);
                None
            }
            LayerFormat::Qcow2 => {
                let layer = Layer::inspect_image(image)?;
                all.push(layer_info(&layer)?);
                following::below(&layer, policy)?
            }
        };
    }
    Ok(all)
}

fn raw_info(path: &Path) -> Result<ImageInfo> {
    let file = ImageFile::open(path)?;
    Ok(ImageInfo {
        virtual_size: file.length().next_multiple_of(SECTOR_BYTES),
        ..bare_info(&file, "raw")?
    })
}

fn bare_info(file: &ImageFile, format: &'static str) -> Result<ImageInfo> {
    Ok(ImageInfo {
        filename: file.path().to_string_lossy().into_owned(),
        format,
        virtual_size: 0,
        actual_size: file.allocated_bytes()?,
        file_length: file.length(),
        cluster_size: None,
        encrypted: false,
        dirty_flag: false,
        backing_filename: None,
        full_backing_filename: None,
        backing_filename_format: None,
        snapshots: Vec::new(),
        format_specific: None,
    })
}

fn layer_info(layer: &Layer) -> Result<ImageInfo> {
    let header = layer.header();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let backing = header.backing.as_ref();
    let snapshots = layer.internal_snapshots()?;
    Ok(ImageInfo {
        virtual_size: header.virtual_size,
        cluster_size: Some(header.cluster_size.bytes()),
        encrypted: header.encryption.is_some(),
        dirty_flag: header.dirty,
        backing_filename: backing.map(|backing| text(&backing.name)),
        full_backing_filename: backing.map(|backing| full_name(layer.path(), &text(&backing.name))),
        backing_filename_format: backing.and_then(|b| b.format.as_deref().map(text)),
        snapshots: snapshots.iter().map(snapshot_info).collect(),
        format_specific: Some(FormatSpecific::Qcow2(qcow2_info(layer, header)?)),
        ..bare_info(layer.file(), "qcow2")?
    })
}

/// A name in `image` as it is seen from here; one with a protocol says so by itself.
fn full_name(image: &Path, name: &str) -> String {
    let protocol = name.split_once(':');
    if protocol.is_some_and(|(before, _)| !before.contains('/')) {
        return name.to_owned();
    }
    let folder: PathBuf = image.parent().unwrap_or(Path::new("")).into();
    folder.join(name).to_string_lossy().into_owned()
}

fn snapshot_info(snapshot: &InternalSnapshot) -> SnapshotInfo {
    const SECOND: u64 = 1_000_000_000;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    SnapshotInfo {
        id: text(&snapshot.id),
        name: text(&snapshot.name),
        vm_state_size: snapshot.vm_state_bytes,
        date_sec: snapshot.date_seconds,
        date_nsec: snapshot.date_nanoseconds,
        vm_clock_sec: snapshot.vm_clock_nanoseconds / SECOND,
        vm_clock_nsec: snapshot.vm_clock_nanoseconds % SECOND,
        icount: snapshot.icount,
    }
}

fn qcow2_info(layer: &Layer, header: &Header) -> Result<Qcow2Info> {
    let third = header.version >= 3;
    let data = header.external_data.as_ref();
    let bitmaps = layer.stored_bitmaps()?;
    let bitmaps: Result<Vec<_>> = bitmaps.iter().map(|b| bitmap_info(layer, b)).collect();
    Ok(Qcow2Info {
        compat: if third { "1.1" } else { "0.10" },
        compression_type: header.compression.name(),
        lazy_refcounts: third.then(|| header.lazy_refcounts()),
        refcount_bits: 1 << header.refcount_order,
        corrupt: third.then_some(header.corrupt),
        extended_l2: third.then_some(header.extended_l2),
        data_file: data
            .and_then(|data| data.name.as_deref())
            .map(|name| String::from_utf8_lossy(name).into_owned()),
        data_file_raw: data.map(|data| data.raw),
        bitmaps: bitmaps?,
        encrypt: header.encryption.map(|encryption| EncryptInfo {
            format: match encryption {
                Encryption::Aes => "aes",
                Encryption::Luks { .. } => "luks",
            },
        }),
    })
}

fn bitmap_info(layer: &Layer, bitmap: &StoredBitmap) -> Result<BitmapInfo> {
    let granularity = 1_u64.checked_shl(u32::from(bitmap.granularity_bits));
    let Some(granularity) = granularity else {
        return Err(Error::InvalidField {
            path: layer.path().to_owned(),
            field: "granularity_bits",
            found: u64::from(bitmap.granularity_bits),
            expected: "9 to 31".into(),
        });
    };
    let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
    Ok(BitmapInfo {
        name: String::from_utf8_lossy(&bitmap.name).into_owned(),
        granularity,
        flags: flags
            .into_iter()
            .filter_map(|(set, name)| set.then_some(name))
            .collect(),
    })
}
