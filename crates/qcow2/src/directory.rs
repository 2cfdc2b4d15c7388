//! The table of internal snapshots and the directory of persistent dirty bitmaps.
//!
//! # Source
//! QEMU's `docs/interop/qcow2`, sections *Snapshots* and *Bitmaps*. Limits are QEMU's.

use crate::error::{Error, Result};
use crate::header::{MAX_L1_BYTES, be_u32, be_u64, to_u64, to_usize};
use crate::layer::Layer;
use crate::units::HostOffset;

/// The largest table of internal snapshots, in bytes.
const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// The most extra data of an internal snapshot, in bytes.
const MAX_SNAPSHOT_EXTRA_BYTES: u32 = 1024;
/// The largest bitmap directory, in bytes.
const MAX_BITMAP_DIRECTORY_BYTES: u64 = 64 << 20;
/// The most bitmaps.
const MAX_BITMAPS: u32 = 65_535;
/// The only type of bitmap there is.
const DIRTY_BITMAP: u8 = 1;
/// Bitmap flag: extra data that is not known may be ignored.
const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
/// Bitmap flags that are known: in use, auto, extra data compatible.
const BITMAP_FLAGS: u32 = 0b111;
/// The most entries of a bitmap table.
const MAX_BITMAP_TABLE_ENTRIES: u32 = 0x0800_0000;

/// An internal snapshot: a disk state kept inside the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InternalSnapshot {
    /// Where its L1 table starts.
    pub l1_table: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Its identifier.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// Bytes of VM state stored with it; 0: none.
    pub vm_state_bytes: u64,
    /// The virtual disk's length then, in bytes; `None` in old images, where it is the image's own.
    pub virtual_size: Option<u64>,
    /// When it was made: seconds since 1970, UTC.
    pub date_seconds: u32,
    /// When it was made: nanoseconds within the second.
    pub date_nanoseconds: u32,
    /// How long the VM had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// How many instructions the VM had run, where that was kept.
    pub icount: Option<u64>,
    /// All extra data as it lies in the table, with what is not known here.
    pub extra: Vec<u8>,
}

/// A persistent dirty bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBitmap {
    /// Its name.
    pub name: Vec<u8>,
    /// Where its table starts.
    pub table: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
    /// It was not saved when the image was last used, so it says nothing.
    pub in_use: bool,
    /// It is to be tracked when the image is next used.
    pub auto: bool,
    /// One bit stands for `1 << granularity_bits` bytes.
    pub granularity_bits: u8,
    /// All flags as they lie in the directory.
    pub flags: u32,
    /// The type: 1 is a dirty bitmap.
    pub kind: u8,
    /// Extra data as it lies in the directory; none is known today.
    pub extra: Vec<u8>,
}

impl StoredBitmap {
    /// Whether a program that does not know everything in the entry may still use the bitmap.
    #[must_use]
    pub fn is_known(&self) -> bool {
        let known = self.flags & !BITMAP_FLAGS == 0;
        let extra = self.extra.is_empty() || self.flags & EXTRA_DATA_COMPATIBLE != 0;
        self.kind == DIRTY_BITMAP && known && extra
    }
}

/// Entries of variable length, read one after the other.
struct Entries<'a> {
    layer: &'a Layer,
    what: &'static str,
    start: HostOffset,
    at: u64,
    limit: u64,
}

impl Entries<'_> {
    /// The next `length` bytes.
    fn take(&mut self, length: u64) -> Result<Vec<u8>> {
        let end = self.at.checked_add(length);
        let end = end.filter(|end| *end <= self.limit).ok_or_else(|| {
            self.invalid("entry length", length, "an entry inside its table".into())
        })?;
        let place = HostOffset(self.start.0.saturating_add(self.at));
        // The bound comes before the memory.
        self.layer.file().require(self.what, place, length)?;
        let mut bytes = vec![0; to_usize(length)];
        self.layer.file().read(self.what, place, &mut bytes)?;
        self.at = end;
        Ok(bytes)
    }

    /// Passes over the filling to a multiple of 8.
    fn align(&mut self) {
        self.at = self.at.next_multiple_of(8);
    }

    fn invalid(&self, field: &'static str, found: u64, expected: String) -> Error {
        Error::InvalidField {
            path: self.layer.path().to_owned(),
            field,
            found,
            expected,
        }
    }
}

/// A directory with the bytes it takes in the file.
pub(crate) struct Directory<T> {
    pub entries: Vec<T>,
    pub length: u64,
}

impl Layer {
    /// The internal snapshots.
    ///
    /// # Errors
    /// When their table cannot be read or is not valid.
    pub fn internal_snapshots(&self) -> Result<Vec<InternalSnapshot>> {
        Ok(self.snapshot_directory()?.entries)
    }

    /// The persistent dirty bitmaps; none where the image says that they are not consistent.
    ///
    /// # Errors
    /// When their directory cannot be read or is not valid.
    pub fn stored_bitmaps(&self) -> Result<Vec<StoredBitmap>> {
        Ok(self.bitmap_directory()?.entries)
    }

    pub(crate) fn snapshot_directory(&self) -> Result<Directory<InternalSnapshot>> {
        let mut entries = Entries {
            layer: self,
            what: "the table of internal snapshots",
            start: self.header().snapshot_table,
            at: 0,
            limit: MAX_SNAPSHOT_TABLE_BYTES,
        };
        let count = self.header().internal_snapshots;
        let all = (0..count).map(|_| snapshot(&mut entries));
        Ok(Directory {
            entries: all.collect::<Result<_>>()?,
            length: entries.at,
        })
    }

    pub(crate) fn bitmap_directory(&self) -> Result<Directory<StoredBitmap>> {
        let Some(place) = self
            .header()
            .bitmaps
            .filter(|_| self.header().bitmaps_consistent())
        else {
            return Ok(Directory {
                entries: Vec::new(),
                length: 0,
            });
        };
        let mut entries = Entries {
            layer: self,
            what: "the bitmap directory",
            start: place.directory,
            at: 0,
            limit: place.directory_length.min(MAX_BITMAP_DIRECTORY_BYTES),
        };
        let count = place.count;
        if count == 0 || count > MAX_BITMAPS {
            return Err(entries.invalid("nb_bitmaps", u64::from(count), "1 to 65535".into()));
        }
        let all = (0..count).map(|_| bitmap(&mut entries));
        let all = all.collect::<Result<_>>()?;
        let (said, found) = (place.directory_length, entries.at);
        if said != found {
            let expected = format!("{found}, the length of its entries");
            return Err(entries.invalid("bitmap_directory_size", said, expected));
        }
        Ok(Directory {
            entries: all,
            length: found,
        })
    }
}

fn snapshot(entries: &mut Entries<'_>) -> Result<InternalSnapshot> {
    let fixed = entries.take(40)?;
    let half = |at: usize| u64::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
    let l1_entries = be_u32(&fixed[8..]);
    if u64::from(l1_entries) * 8 > MAX_L1_BYTES {
        let expected = format!("at most {}", MAX_L1_BYTES / 8);
        return Err(entries.invalid("snapshot l1_size", u64::from(l1_entries), expected));
    }
    let extra_length = be_u32(&fixed[36..]);
    let least = if entries.layer.header().version < 3 {
        0
    } else {
        16
    };
    if !(least..=MAX_SNAPSHOT_EXTRA_BYTES).contains(&extra_length) {
        let expected = format!("{least} to {MAX_SNAPSHOT_EXTRA_BYTES}");
        let found = u64::from(extra_length);
        return Err(entries.invalid("snapshot extra_data_size", found, expected));
    }
    let extra = entries.take(u64::from(extra_length))?;
    let id = entries.take(half(12))?;
    let name = entries.take(half(14))?;
    entries.align();
    let field = |at: usize| (extra.len() >= at + 8).then(|| be_u64(&extra[at..]));
    Ok(InternalSnapshot {
        l1_table: HostOffset(be_u64(&fixed)),
        l1_entries,
        id,
        name,
        vm_state_bytes: field(0).unwrap_or(u64::from(be_u32(&fixed[32..]))),
        virtual_size: field(8),
        date_seconds: be_u32(&fixed[16..]),
        date_nanoseconds: be_u32(&fixed[20..]),
        vm_clock_nanoseconds: be_u64(&fixed[24..]),
        icount: field(16).filter(|count| *count != u64::MAX),
        extra,
    })
}

fn bitmap(entries: &mut Entries<'_>) -> Result<StoredBitmap> {
    let fixed = entries.take(24)?;
    let table_entries = be_u32(&fixed[8..]);
    if table_entries > MAX_BITMAP_TABLE_ENTRIES {
        let found = u64::from(table_entries);
        return Err(entries.invalid("bitmap_table_size", found, "at most 2^27".into()));
    }
    let flags = be_u32(&fixed[12..]);
    let name_length = u16::from_be_bytes([fixed[18], fixed[19]]);
    let extra_length = be_u32(&fixed[20..]);
    let extra = entries.take(u64::from(extra_length))?;
    let name = entries.take(u64::from(name_length))?;
    entries.align();
    Ok(StoredBitmap {
        name,
        table: HostOffset(be_u64(&fixed)),
        table_entries,
        in_use: flags & 1 != 0,
        auto: flags & 2 != 0,
        granularity_bits: fixed[17],
        flags,
        kind: fixed[16],
        extra,
    })
}

impl InternalSnapshot {
    /// The L1 table's length in bytes.
    pub(crate) fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_entries) * 8
    }
}

impl StoredBitmap {
    /// The table's length in bytes.
    pub(crate) fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries) * to_u64(size_of::<u64>())
    }
}
