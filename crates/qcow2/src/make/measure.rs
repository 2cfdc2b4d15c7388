//! How large a new image will be: what `qemu-img measure` says, from tables only.
//!
//! QEMU's figure is a bound: it counts the tables of a fully allocated image, and clusters that are allocated
//! and hold zeros. What the file will really have is said by [`predict`](super::predict), which reads.
//!
//! # Source
//! Layout of the tables: QEMU's `docs/interop/qcow2`. That the tables of a full image are counted, and the
//! whole disk where there is a backing file: `docs/tools/qemu-img`, command *measure*, and its answers.

use std::path::Path;

use super::counts::RefcountPlan;
use super::options::{Geometry, NewFormat, Preallocation, Qcow2Options, Version, check_disk};
use crate::chain::Chain;
use crate::control::Control;
use crate::directory::StoredBitmap;
use crate::error::Result;
use crate::header::{SECTOR_BYTES, to_u64};
use crate::units::ClusterSize;

/// Bytes of a bitmap directory entry before its name.
const BITMAP_ENTRY_BYTES: u64 = 24;

/// What `qemu-img measure` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// A bound of the file's length after the copy, in bytes.
    pub required: u64,
    /// A bound of the file's length once the guest has written everything, in bytes.
    pub fully_allocated: u64,
    /// The bytes that the source's persistent bitmaps need beside that; `None` where source or target can
    /// have none.
    pub bitmaps: Option<u64>,
}

/// Measures an empty image of `disk` bytes, which are rounded up to sectors.
///
/// # Errors
/// When the format cannot express it.
pub fn measure_empty(disk: u64, format: &NewFormat) -> Result<Measured> {
    let disk = disk.div_ceil(SECTOR_BYTES).saturating_mul(SECTOR_BYTES);
    let path = Path::new("to be measured");
    check_disk(path, disk)?;
    match format {
        NewFormat::Raw { .. } => Ok(raw(disk)),
        NewFormat::Qcow2(options) => {
            let whole = whole(&Geometry::new(path, disk, options)?);
            let data = if takes_room(options) { whole.disk } else { 0 };
            Ok(whole.with_data(data))
        }
    }
}

/// Measures a copy of `source`. With a backing file the whole disk is counted: how much of it is below is not
/// known without reading.
///
/// # Errors
/// When the format cannot express it, or a table of the source cannot be read.
pub fn measure(source: &Chain, format: &NewFormat) -> Result<Measured> {
    measure_with(source, format, &Control::default())
}

/// As [`measure`], watched.
///
/// # Errors
/// As [`measure`]; [`Error::Cancelled`](crate::Error::Cancelled).
pub fn measure_with(source: &Chain, format: &NewFormat, control: &Control<'_>) -> Result<Measured> {
    let path = Path::new("to be measured");
    let options = match format {
        NewFormat::Raw { .. } => return Ok(raw(source.len())),
        NewFormat::Qcow2(options) => options,
    };
    let whole = whole(&Geometry::new(path, source.len(), options)?);
    let data = if takes_room(options) || options.backing.is_some() {
        whole.disk
    } else {
        allocated(source, options.cluster_size, control)?
    };
    let mut measured = whole.with_data(data);
    if options.version == Version::V3
        && let Some(layer) = source.layer(0)
        && layer.header().version >= 3
    {
        let bitmaps = layer.stored_bitmaps()?;
        measured.bitmaps = Some(bitmap_bytes(&bitmaps, source.len(), options.cluster_size));
    }
    control.tell(1, 1);
    Ok(measured)
}

/// A bound of the bytes that a copy of `source` takes on its file system, from tables only.
pub(crate) fn bound(source: &Chain, format: &NewFormat, disk: u64) -> Result<u64> {
    match format {
        NewFormat::Raw {
            preallocation: Preallocation::Falloc | Preallocation::Full,
        } => Ok(disk),
        NewFormat::Raw { .. } => allocated(source, ClusterSize::DEFAULT, &Control::default()),
        NewFormat::Qcow2(options) => {
            let whole = whole(&Geometry::new(Path::new("to be measured"), disk, options)?);
            let data = match takes_room(options) {
                true => whole.disk,
                false => allocated(source, options.cluster_size, &Control::default())?,
            };
            Ok(whole.with_data(data).required)
        }
    }
}

fn raw(disk: u64) -> Measured {
    Measured {
        required: disk,
        fully_allocated: disk,
        bitmaps: None,
    }
}

fn takes_room(options: &Qcow2Options) -> bool {
    match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => false,
        Preallocation::Falloc | Preallocation::Full => true,
    }
}

/// A fully allocated image.
struct Whole {
    /// The disk in whole clusters, in bytes.
    disk: u64,
    tables: u64,
}

impl Whole {
    fn with_data(&self, data: u64) -> Measured {
        Measured {
            required: self.tables + data,
            fully_allocated: self.tables + self.disk,
            bitmaps: None,
        }
    }
}

fn whole(geometry: &Geometry) -> Whole {
    let size = geometry.size;
    let clusters = size.count_for(geometry.disk);
    let l2_tables = clusters.div_ceil(geometry.l2_entries());
    let l1_clusters = size.count_for(l2_tables * 8);
    let used = 1 + l1_clusters + l2_tables + clusters;
    let plan = RefcountPlan::new(used, size, geometry.refcount_order);
    Whole {
        disk: clusters << size.bits(),
        tables: (plan.total - clusters) << size.bits(),
    }
}

/// The bytes of clusters that hold something other than zeros as far as the tables say.
fn allocated(source: &Chain, size: ClusterSize, control: &Control<'_>) -> Result<u64> {
    let (mut clusters, mut counted) = (0, 0);
    let mut at = 0;
    while let Some(range) = source.next_data(at)? {
        at = range.end;
        control.go_on(Path::new("the disk to be measured"))?;
        control.tell(at, source.len());
        let first = (range.start >> size.bits()).max(counted);
        let end = size.count_for(range.end);
        clusters += end.saturating_sub(first);
        counted = counted.max(end);
    }
    Ok(clusters << size.bits())
}

fn bitmap_bytes(bitmaps: &[StoredBitmap], disk: u64, size: ClusterSize) -> u64 {
    let used = bitmaps.iter().filter(|bitmap| !bitmap.in_use);
    let (mut payload, mut directory) = (0, 0);
    for bitmap in used {
        let bits = disk.div_ceil(1 << bitmap.granularity_bits.min(63));
        let clusters = size.count_for(bits.div_ceil(8));
        payload += (clusters + size.count_for(clusters * 8)) << size.bits();
        let entry = BITMAP_ENTRY_BYTES + to_u64(bitmap.name.len());
        directory += entry.next_multiple_of(8);
    }
    payload + (size.count_for(directory) << size.bits())
}
