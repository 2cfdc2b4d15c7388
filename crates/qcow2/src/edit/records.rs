//! The table of internal snapshots and the bitmap directory as records that keep, byte for byte, what is
//! not changed in them.
//!
//! # Source
//! QEMU's `docs/interop/qcow2`, sections *Snapshots* and *Bitmaps*.

use crate::error::Result;
use crate::header::{be_u32, be_u64, to_u64, to_usize};
use crate::layer::Layer;
use crate::units::HostOffset;

/// Fixed bytes of a snapshot table entry.
const SNAPSHOT_FIXED: usize = 40;
/// Bytes of extra data that we write: VM state size, disk size, instruction count.
const SNAPSHOT_EXTRA: usize = 24;
/// Fixed bytes of a bitmap directory entry.
const BITMAP_FIXED: usize = 24;
/// The bitmap was not saved when the image was last used.
const IN_USE: u32 = 1 << 0;
/// The bitmap is enabled.
const AUTO: u32 = 1 << 1;
/// Extra data that is not known may be ignored.
const EXTRA_COMPATIBLE: u32 = 1 << 2;
/// The only type of bitmap there is.
const DIRTY_BITMAP: u8 = 1;

fn half(bytes: &[u8]) -> usize {
    usize::from(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// What a new internal snapshot is called and when it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotName {
    /// Its name, at most 65 535 bytes.
    pub name: Vec<u8>,
    /// Seconds since 1970.
    pub date_seconds: u32,
    /// The rest of the time, in nanoseconds.
    pub date_nanoseconds: u32,
}

/// An entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRecord {
    bytes: Vec<u8>,
}

impl SnapshotRecord {
    /// An entry without VM state for a disk of `virtual_size` bytes; its L1 table is still to be placed.
    pub(super) fn new(id: &[u8], called: &SnapshotName, virtual_size: u64) -> Self {
        let mut bytes = vec![0; SNAPSHOT_FIXED + SNAPSHOT_EXTRA];
        let length = |part: &[u8]| u16::try_from(part.len()).unwrap_or(u16::MAX).to_be_bytes();
        bytes[12..14].copy_from_slice(&length(id));
        bytes[14..16].copy_from_slice(&length(&called.name));
        bytes[16..20].copy_from_slice(&called.date_seconds.to_be_bytes());
        bytes[20..24].copy_from_slice(&called.date_nanoseconds.to_be_bytes());
        bytes[39] = SNAPSHOT_EXTRA.to_le_bytes()[0];
        bytes[48..56].copy_from_slice(&virtual_size.to_be_bytes());
        // No instructions were counted.
        bytes[56..64].fill(0xff);
        bytes.extend(id);
        bytes.extend(&called.name);
        Self { bytes }
    }

    /// Where its L1 table starts.
    #[must_use]
    pub fn l1_table(&self) -> HostOffset {
        HostOffset(be_u64(&self.bytes))
    }

    /// Entries of its L1 table.
    #[must_use]
    pub fn l1_entries(&self) -> u32 {
        be_u32(&self.bytes[8..])
    }

    pub(super) fn set_l1(&mut self, at: HostOffset, entries: u32) {
        self.bytes[..8].copy_from_slice(&at.0.to_be_bytes());
        self.bytes[8..12].copy_from_slice(&entries.to_be_bytes());
    }

    fn extra(&self) -> usize {
        to_usize(u64::from(be_u32(&self.bytes[36..])))
    }

    fn extra_word(&self, index: usize) -> Option<u64> {
        let end = (index + 1) * 8;
        let there = self.extra() >= end;
        there.then(|| be_u64(&self.bytes[SNAPSHOT_FIXED + end - 8..]))
    }

    /// Its identifier.
    #[must_use]
    pub fn id(&self) -> &[u8] {
        let start = SNAPSHOT_FIXED + self.extra();
        &self.bytes[start..start + half(&self.bytes[12..])]
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        let start = SNAPSHOT_FIXED + self.extra() + half(&self.bytes[12..]);
        &self.bytes[start..start + half(&self.bytes[14..])]
    }

    /// The virtual disk's length then, in bytes; `None` in old images, where it is the image's own.
    #[must_use]
    pub fn virtual_size(&self) -> Option<u64> {
        self.extra_word(1)
    }

    /// Bytes of VM state.
    #[must_use]
    pub fn vm_state_bytes(&self) -> u64 {
        let legacy = u64::from(be_u32(&self.bytes[32..]));
        self.extra_word(0).unwrap_or(legacy)
    }

    /// Says how long the disk is in this snapshot, where it did not say so; `false` when it has no room
    /// for that.
    pub(super) fn set_virtual_size(&mut self, bytes: u64) {
        let start = SNAPSHOT_FIXED;
        if self.extra() < 16 {
            let legacy = be_u32(&self.bytes[32..]);
            let state = self.extra_word(0).unwrap_or(u64::from(legacy));
            let mut extra = [0; 16];
            extra[..8].copy_from_slice(&state.to_be_bytes());
            self.bytes.splice(start..start + self.extra(), extra);
            self.bytes[36..40].copy_from_slice(&16_u32.to_be_bytes());
        }
        self.bytes[start + 8..start + 16].copy_from_slice(&bytes.to_be_bytes());
    }
}

/// An entry of the bitmap directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapRecord {
    bytes: Vec<u8>,
}

impl BitmapRecord {
    /// An entry whose table is still to be placed.
    pub(super) fn new(name: &[u8], granularity_bits: u8, enabled: bool) -> Self {
        let mut bytes = vec![0; BITMAP_FIXED];
        bytes[16] = DIRTY_BITMAP;
        bytes[17] = granularity_bits;
        let length = u16::try_from(name.len()).unwrap_or(u16::MAX);
        bytes[18..20].copy_from_slice(&length.to_be_bytes());
        bytes.extend(name);
        let mut record = Self { bytes };
        record.set_enabled(enabled);
        record
    }

    fn flags(&self) -> u32 {
        be_u32(&self.bytes[12..])
    }

    pub(super) fn set_enabled(&mut self, enabled: bool) {
        let bit = if enabled { AUTO } else { 0 };
        let flags = self.flags() & !AUTO | bit;
        self.bytes[12..16].copy_from_slice(&flags.to_be_bytes());
    }

    /// Whether all that is said about it is known here, so that its bits may be used.
    #[must_use]
    pub fn is_known(&self) -> bool {
        let extra = be_u32(&self.bytes[20..]) == 0 || self.flags() & EXTRA_COMPATIBLE != 0;
        let flags = self.flags() & !(IN_USE | AUTO | EXTRA_COMPATIBLE) == 0;
        self.bytes[16] == DIRTY_BITMAP && extra && flags
    }

    /// Where its table starts.
    #[must_use]
    pub fn table(&self) -> HostOffset {
        HostOffset(be_u64(&self.bytes))
    }

    /// Entries of its table.
    #[must_use]
    pub fn table_entries(&self) -> u32 {
        be_u32(&self.bytes[8..])
    }

    pub(super) fn set_table(&mut self, at: HostOffset, entries: u32) {
        self.bytes[..8].copy_from_slice(&at.0.to_be_bytes());
        self.bytes[8..12].copy_from_slice(&entries.to_be_bytes());
    }

    /// It was not saved when the image was last used, so it says nothing.
    #[must_use]
    pub fn in_use(&self) -> bool {
        self.flags() & IN_USE != 0
    }

    /// It records writes.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.flags() & AUTO != 0
    }

    /// One bit stands for `1 << granularity_bits` bytes.
    #[must_use]
    pub fn granularity_bits(&self) -> u8 {
        self.bytes[17]
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        let start = BITMAP_FIXED + to_usize(u64::from(be_u32(&self.bytes[20..])));
        &self.bytes[start..start + half(&self.bytes[18..])]
    }
}

/// The snapshot table of an image that was checked.
pub(super) fn snapshots(layer: &Layer) -> Result<Vec<SnapshotRecord>> {
    let directory = layer.snapshot_directory()?;
    if directory.entries.is_empty() {
        return Ok(Vec::new());
    }
    let place = layer.header().snapshot_table;
    let bytes = directory_bytes(layer, place, directory.length)?;
    let records = split(&bytes, directory.entries.len(), |entry| {
        let extra = to_usize(u64::from(be_u32(&entry[36..])));
        SNAPSHOT_FIXED + extra + half(&entry[12..]) + half(&entry[14..])
    });
    Ok(records.map(|bytes| SnapshotRecord { bytes }).collect())
}

/// The bitmap directory of an image that was checked; empty where it cannot be trusted.
pub(super) fn bitmaps(layer: &Layer) -> Result<Vec<BitmapRecord>> {
    let directory = layer.bitmap_directory()?;
    let Some(place) = layer.header().bitmaps.filter(|_| directory.length > 0) else {
        return Ok(Vec::new());
    };
    let bytes = directory_bytes(layer, place.directory, directory.length)?;
    let records = split(&bytes, directory.entries.len(), |entry| {
        let extra = to_usize(u64::from(be_u32(&entry[20..])));
        BITMAP_FIXED + extra + half(&entry[18..])
    });
    Ok(records.map(|bytes| BitmapRecord { bytes }).collect())
}

/// The file may end before the filling of the last entry.
fn directory_bytes(layer: &Layer, at: HostOffset, length: u64) -> Result<Vec<u8>> {
    let there = layer.file_length().saturating_sub(at.0).min(length);
    let mut bytes = vec![0; to_usize(there)];
    layer.file().read("a directory", at, &mut bytes)?;
    Ok(bytes)
}

/// Entries one behind the other, each filled up to a multiple of 8. The directory was decoded before, so
/// all lie inside.
fn split(
    bytes: &[u8],
    count: usize,
    length: impl Fn(&[u8]) -> usize,
) -> impl Iterator<Item = Vec<u8>> {
    let mut at = 0;
    (0..count).map(move |_| {
        let start = at;
        let end = start + length(&bytes[start..]);
        at = end.next_multiple_of(8);
        bytes[start..end].to_vec()
    })
}

fn joined<'a>(records: impl Iterator<Item = &'a Vec<u8>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        bytes.extend(record);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

/// The bytes of a snapshot table.
pub(super) fn encode_snapshots(records: &[SnapshotRecord]) -> Vec<u8> {
    joined(records.iter().map(|record| &record.bytes))
}

/// The bytes of a bitmap directory.
pub(super) fn encode_bitmaps<'a>(records: impl Iterator<Item = &'a BitmapRecord>) -> Vec<u8> {
    joined(records.map(|record| &record.bytes))
}

/// The bytes of a table of words.
pub(super) fn encode_words(words: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(to_usize(to_u64(words.len()) * 8));
    for word in words {
        bytes.extend(word.to_be_bytes());
    }
    bytes
}
