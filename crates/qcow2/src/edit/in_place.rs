//! Guest data of the old state that is overwritten, and the journal that makes it safe.
//!
//! ```text
//! bytes        field
//! 0–7          "STEADJNL"
//! 8–11, 12–15  version (1; 2: the other file is the image's external data file), number of layers
//! 16–23        number of ranges
//! 24–31        length of the first cluster
//! 32–39        the file's length afterwards
//! 40–47        the length of the other file afterwards
//! 48–51        length of the other file's path; 0: the ranges lie in the image itself
//! ..           that path
//! ..           each layer: format (0 raw, 1 qcow2, 2 external data file of the one before or, first, of the image),
//!              path length, file length (8 bytes), BLAKE3 of its first 64 KiB (32 bytes), path
//! ..           the first cluster of the new state
//! ..           each range: guest offset, host offset, length
//! ```
//! The ranges get the content of the layers. Where they lie in another file, a raw one, which cannot say that it is
//! in progress, the image stands for it: the image itself is the topmost layer, then, and its first cluster of the new
//! state is that of the old.
//!
//! Numbers are big-endian. The journal's own length and BLAKE3 hash stand in the first sector of the image
//! in progress.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_sys::readable;
use stead_sys::storage::Storage;

use crate::chain::{LayerFile, LayerFormat};
use crate::error::{Error, Result};
use crate::following::{OpenPolicy, data_file_of};
use crate::header::{be_u32, be_u64, to_u64, to_usize};
use crate::layer::Layer;
use crate::units::{GuestOffset, HostOffset};

use super::transaction::Edit;

const MAGIC: &[u8; 8] = b"STEADJNL";
const VERSION: u32 = 1;
/// The other file is the image's own external data file.
const DATA_FILE_VERSION: u32 = 2;
const FIXED: usize = 52;
const RANGE_BYTES: usize = 24;
/// How much of a layer's start is hashed, so that another file is not taken for it.
const IDENTITY_BYTES: u64 = 64 << 10;
/// The most ranges that are redone in place; neighbours count as one.
pub const MAX_IN_PLACE_RANGES: usize = 1 << 20;

/// Guest data that goes to a place of the old state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InPlaceRange {
    pub guest: GuestOffset,
    pub host: HostOffset,
    pub length: u64,
}

/// A file whose content the ranges get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceLayer {
    pub file: LayerFile,
    /// It is the external data file of the one before it or, first of all, of the image itself.
    pub is_data: bool,
    length: u64,
    hash: [u8; 32],
}

impl SourceLayer {
    /// The layer and, if names are followed, its external data file.
    fn with_data(file: &LayerFile, follow_data: bool) -> Result<Vec<Self>> {
        let mut all = vec![Self::of(file)?];
        if follow_data && file.format == LayerFormat::Qcow2 {
            let data = data_file_of(&Layer::inspect(&file.path)?, &OpenPolicy::NAMES)?;
            all.extend(data.map(Self::data).transpose()?);
        }
        Ok(all)
    }

    fn data(path: PathBuf) -> Result<Self> {
        let file = LayerFile {
            path,
            format: LayerFormat::Raw,
        };
        Ok(Self {
            is_data: true,
            ..Self::of(&file)?
        })
    }

    fn of(file: &LayerFile) -> Result<Self> {
        let error = |source| Error::io("read the layer", &file.path, source);
        let path = std::fs::canonicalize(&file.path).map_err(error)?;
        let (length, hash) = identity(&path).map_err(error)?;
        Ok(Self {
            file: LayerFile {
                path,
                format: file.format,
            },
            is_data: false,
            length,
            hash,
        })
    }

    /// Whether the file is what it was.
    pub fn is_unchanged(&self) -> std::io::Result<bool> {
        Ok(identity(&self.file.path)? == (self.length, self.hash))
    }
}

fn identity(path: &Path) -> std::io::Result<(u64, [u8; 32])> {
    let file = readable::open(path)?;
    let length = file.metadata()?.len();
    let mut start = vec![0; to_usize(length.min(IDENTITY_BYTES))];
    file.read_exact_at(&mut start, 0)?;
    Ok((length, *blake3::hash(&start).as_bytes()))
}

/// A raw file that the ranges lie in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// From the root.
    pub path: PathBuf,
    /// Its length afterwards, in bytes.
    pub length: u64,
    /// It is the external data file of the image, and not a raw file below it.
    pub data_file: bool,
}

/// What a transaction does in place.
#[derive(Debug, Default)]
pub(super) struct InPlace {
    pub layers: Vec<SourceLayer>,
    pub ranges: Vec<InPlaceRange>,
    pub target: Option<(Target, Option<Arc<dyn Storage>>)>,
}

impl InPlace {
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty() && self.target.is_none()
    }

    pub fn push(&mut self, next: InPlaceRange) {
        match self.ranges.last_mut() {
            Some(last)
                if last.guest.0 + last.length == next.guest.0
                    && last.host.0 + last.length == next.host.0 =>
            {
                last.length += next.length;
            }
            Some(_) | None => self.ranges.push(next),
        }
    }
}

impl Edit<'_> {
    /// Names the layers, top first, whose disk [`Edit::overwrite`] takes its bytes from. They must stay as they
    /// are until the change is through, and a recovery reads them again: by their absolute paths.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn set_sources(&mut self, layers: &[LayerFile]) -> Result<()> {
        self.set_sources_with_data(layers, false)
    }

    /// As [`Edit::set_sources`], with the external data files that the layers name, if `follow_data`.
    pub(crate) fn set_sources_with_data(
        &mut self,
        layers: &[LayerFile],
        follow_data: bool,
    ) -> Result<()> {
        self.in_place.layers.clear();
        for layer in layers {
            let all = SourceLayer::with_data(layer, follow_data)?;
            self.in_place.layers.extend(all);
        }
        Ok(())
    }

    /// Names this image's own external data file, if it has one, as where the bytes of [`Edit::overwrite_there`] come
    /// from, too; behind [`Edit::set_sources`].
    pub(crate) fn set_own_source(&mut self) -> Result<()> {
        if let Some(guest) = &self.guest {
            let own = SourceLayer::data(guest.path().to_owned())?;
            self.in_place.layers.insert(0, own);
        }
        Ok(())
    }

    /// Has `length` bytes of guest data at `guest`, read through the layers of [`Edit::set_sources`], written
    /// over data of the old state at `host` when the new state is switched to. The new state must still refer to
    /// that place, and nothing else may (an internal snapshot would change with it).
    ///
    /// # Errors
    /// When others refer to the cluster, or there are more than [`MAX_IN_PLACE_RANGES`] ranges.
    ///
    /// # Panics
    /// When the place is not of the old state or the range leaves its cluster.
    pub fn overwrite(&mut self, guest: GuestOffset, host: HostOffset, length: u64) -> Result<()> {
        let size = self.size();
        assert!(
            size.offset_in(host.0) + length <= size.bytes(),
            "a range inside a cluster"
        );
        let new = self.counts.is_new(host.0 >> size.bits())?;
        assert!(!new, "data in place is data of the old state");
        if self.references(HostOffset(size.start_of(host.0)))? != 1 {
            return Err(self.refused("write in place", format!("{host} is shared")));
        }
        self.in_place.push(InPlaceRange {
            guest,
            host,
            length,
        });
        self.require_few_ranges()
    }

    /// Whether there is room for at least one more range in the journal.
    #[must_use]
    pub fn can_overwrite(&self) -> bool {
        self.in_place.ranges.len() < MAX_IN_PLACE_RANGES
    }

    /// Has the disk's bytes written over a raw file when the new state is switched to, and its length set, in the
    /// place of anything in this image; [`Edit::overwrite_there`] says which bytes. They are read through this
    /// image as it stands and the layers of [`Edit::set_sources`] below it, so nothing else may change with it.
    pub(crate) fn set_target(&mut self, path: PathBuf, storage: Arc<dyn Storage>, length: u64) {
        assert!(path.is_absolute(), "a recovery may start anywhere");
        let target = Target {
            path,
            length,
            data_file: false,
        };
        self.in_place.target = Some((target, Some(storage)));
    }

    /// Has a range of the disk written over the file of [`Edit::set_target`].
    pub(crate) fn overwrite_there(&mut self, range: Range<u64>) -> Result<()> {
        self.in_place.push(InPlaceRange {
            guest: GuestOffset(range.start),
            host: HostOffset(range.start),
            length: range.end - range.start,
        });
        self.require_few_ranges()
    }

    pub(super) fn require_few_ranges(&self) -> Result<()> {
        if self.in_place.ranges.len() > MAX_IN_PLACE_RANGES {
            let reason = format!("there are more than {MAX_IN_PLACE_RANGES} ranges");
            return Err(self.refused("write in place", reason));
        }
        Ok(())
    }
}

/// What is to be done once an image is in progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Journal {
    pub layers: Vec<SourceLayer>,
    pub target: Option<Target>,
    pub first: Vec<u8>,
    pub length: u64,
    pub ranges: Vec<InPlaceRange>,
}

impl Journal {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        let version = match &self.target {
            Some(target) if target.data_file => DATA_FILE_VERSION,
            Some(_) | None => VERSION,
        };
        bytes.extend(version.to_be_bytes());
        bytes.extend(count(self.layers.len()));
        for number in [self.ranges.len(), self.first.len()] {
            bytes.extend(to_u64(number).to_be_bytes());
        }
        bytes.extend(self.length.to_be_bytes());
        let target = self.target.as_ref();
        bytes.extend(target.map_or(0, |target| target.length).to_be_bytes());
        let path = target.map_or(&b""[..], |target| target.path.as_os_str().as_bytes());
        bytes.extend(count(path.len()));
        bytes.extend(path);
        for layer in &self.layers {
            let path = layer.file.path.as_os_str().as_bytes();
            bytes.extend(match layer.file.format {
                LayerFormat::Raw if layer.is_data => [0, 0, 0, 2],
                LayerFormat::Raw => [0, 0, 0, 0],
                LayerFormat::Qcow2 => [0, 0, 0, 1],
            });
            bytes.extend(count(path.len()));
            bytes.extend(layer.length.to_be_bytes());
            bytes.extend(layer.hash);
            bytes.extend(path);
        }
        bytes.extend(&self.first);
        for range in &self.ranges {
            for number in [range.guest.0, range.host.0, range.length] {
                bytes.extend(number.to_be_bytes());
            }
        }
        bytes
    }

    /// Decodes a journal whose hash was found right; `None` when it is none of ours.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        let fixed = take(&mut rest, FIXED)?;
        let version = be_u32(&fixed[8..]);
        if &fixed[..8] != MAGIC || ![VERSION, DATA_FILE_VERSION].contains(&version) {
            return None;
        }
        let path = take(&mut rest, usize::try_from(be_u32(&fixed[48..])).ok()?)?;
        let target = (!path.is_empty()).then(|| Target {
            path: PathBuf::from(OsStr::from_bytes(path)),
            length: be_u64(&fixed[40..]),
            data_file: version == DATA_FILE_VERSION,
        });
        let layers = (0..be_u32(&fixed[12..])).map(|_| layer(&mut rest));
        let layers = layers.collect::<Option<_>>()?;
        let first = take(&mut rest, usize::try_from(be_u64(&fixed[24..])).ok()?)?.to_vec();
        let (rows, left) = rest.as_chunks::<RANGE_BYTES>();
        if !left.is_empty() || to_u64(rows.len()) != be_u64(&fixed[16..]) {
            return None;
        }
        let ranges = rows.iter().map(|row| InPlaceRange {
            guest: GuestOffset(be_u64(row)),
            host: HostOffset(be_u64(&row[8..])),
            length: be_u64(&row[16..]),
        });
        Some(Self {
            layers,
            target,
            first,
            length: be_u64(&fixed[32..]),
            ranges: ranges.collect(),
        })
    }
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (taken, behind) = rest.split_at_checked(length)?;
    *rest = behind;
    Some(taken)
}

fn layer(rest: &mut &[u8]) -> Option<SourceLayer> {
    let fixed = take(rest, 48)?;
    let (format, is_data) = match be_u32(fixed) {
        0 => (LayerFormat::Raw, false),
        1 => (LayerFormat::Qcow2, false),
        2 => (LayerFormat::Raw, true),
        _ => return None,
    };
    let path = take(rest, usize::try_from(be_u32(&fixed[4..])).ok()?)?;
    Some(SourceLayer {
        file: LayerFile {
            path: PathBuf::from(OsStr::from_bytes(path)),
            format,
        },
        is_data,
        length: be_u64(&fixed[8..]),
        hash: fixed[16..48].try_into().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_is_read_as_it_was_written_and_not_when_it_is_cut_off() {
        let journal = Journal {
            layers: vec![SourceLayer {
                file: LayerFile {
                    path: PathBuf::from("/a/layer"),
                    format: LayerFormat::Qcow2,
                },
                is_data: false,
                length: 77,
                hash: [3; 32],
            }],
            target: Some(Target {
                path: PathBuf::from("/raw"),
                length: 99,
                data_file: true,
            }),
            first: vec![9; 512],
            length: 1 << 20,
            ranges: vec![InPlaceRange {
                guest: GuestOffset(1),
                host: HostOffset(2),
                length: 3,
            }],
        };
        let bytes = journal.encode();
        assert_eq!(Journal::decode(&bytes), Some(journal));
        for length in 0..bytes.len() {
            assert_eq!(Journal::decode(&bytes[..length]), None, "{length}");
        }
    }
}
