//! What the disk below an image showed when somebody recorded it, in a header extension of ours; and whether it
//! still does.
//!
//! An image says nothing of a cluster that it takes from below, so a backing file with other bytes under the same
//! name is a damaged disk that no refcount shows. The record lets [`check_backing`] find it. QEMU does not know
//! the extension, ignores it, and keeps it whenever it writes the header.
//!
//! | bytes | field |
//! |---|---|
//! | 0–3 | version of the record: 1 |
//! | 4–7 | zero |
//! | 8–15 | the length of the disk below, in bytes |
//! | 16–47 | BLAKE3 of the backing file's name, as it stood in the header |
//! | 48–79 | the hash of what the disk below showed ([`DiskContent`]) |
//!
//! Numbers are big-endian; the extension's type is 0x53544243 (`STBC`).
//!
//! # Invariants
//! * A record is about the name that it holds. A program that does not know it and gives the image another backing
//!   file leaves a record of the earlier one, which is then no proof of anything: that is a note, not damage.
//! * Every operation of ours that changes what lies below writes a new record or takes the old one away.
//! * Only the hash of the whole is kept: the first cluster can have 512 bytes, so there is no room to say where
//!   the difference is.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::chain::Chain;
use crate::check::{CheckReport, Finding};
use crate::consistency::Note;
use crate::content::DiskContent;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::header::{Header, extension};
use crate::layer::Layer;

/// The only version of the record.
const VERSION: u32 = 1;

/// The record as it lies in the file; see the module.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    version: U32,
    reserved: U32,
    length: U64,
    name: [u8; 32],
    content: [u8; 32],
}

const _: () = {
    assert!(size_of::<RawRecord>() == 80);
    assert!(std::mem::offset_of!(RawRecord, name) == 16);
    assert!(std::mem::offset_of!(RawRecord, content) == 48);
};

/// What the disk below an image showed when it was recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackingRecord {
    /// Length and hash of what it showed.
    pub content: DiskContent,
    /// BLAKE3 of the name that the backing file had in the header.
    pub name_hash: [u8; 32],
}

impl BackingRecord {
    /// That the backing file called `name` shows `content`.
    #[must_use]
    pub fn new(name: &[u8], content: DiskContent) -> Self {
        Self {
            content,
            name_hash: *blake3::hash(name).as_bytes(),
        }
    }

    /// Whether it is about the backing file called `name`.
    #[must_use]
    pub fn is_of(&self, name: &[u8]) -> bool {
        self.name_hash == *blake3::hash(name).as_bytes()
    }

    /// The data of the extension.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let raw = RawRecord {
            version: U32::new(VERSION),
            reserved: U32::ZERO,
            length: U64::new(self.content.length),
            name: self.name_hash,
            content: self.content.hash,
        };
        raw.as_bytes().to_vec()
    }

    /// `None` where it is of a version that is not known, or has another length.
    fn decode(data: &[u8]) -> Option<Self> {
        let raw = RawRecord::read_from_bytes(data).ok()?;
        let known = raw.version.get() == VERSION && raw.reserved.get() == 0;
        known.then_some(Self {
            content: DiskContent {
                length: raw.length.get(),
                hash: raw.content,
            },
            name_hash: raw.name,
        })
    }
}

impl Header {
    /// What was recorded of the disk below; `None` also where the record is of a kind that is not known.
    #[must_use]
    pub fn backing_record(&self) -> Option<BackingRecord> {
        let all = self.unknown_extensions.iter();
        let mut records = all.filter(|extension| extension.kind == extension::BACKING_CONTENT);
        BackingRecord::decode(&records.next()?.data)
    }

    /// Whether anything was recorded of the disk below, of whatever kind.
    pub(crate) fn has_backing_record(&self) -> bool {
        let mut all = self.unknown_extensions.iter();
        all.any(|extension| extension.kind == extension::BACKING_CONTENT)
    }
}

/// Holds what lies below each image of `chain` against what the image recorded of it, and adds what it finds to
/// `report`: [`Finding::BackingContent`] where it is not what it was. Reads all data below an image that has a
/// record; nothing is written.
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::InvalidChain`] when what is below the last image was not opened; or when an
/// image below cannot be read.
pub fn check_backing(chain: &Chain, report: &mut CheckReport, control: &Control<'_>) -> Result<()> {
    for index in 0..chain.depth() {
        let Some(layer) = chain.layer(index) else {
            continue;
        };
        let Some(backing) = &layer.header().backing else {
            continue;
        };
        let Some(record) = layer.header().backing_record() else {
            continue;
        };
        let Some(below) = chain.below(index + 1) else {
            let path = layer.path().display();
            let reason = format!("{path} has a backing file, which was not given");
            return Err(Error::InvalidChain { reason });
        };
        let found = content_for(&record, &below, control)?;
        report.backing_compared += 1;
        if found == Some(record.content) {
            continue;
        }
        if record.is_of(&backing.name) {
            report.add(differs(layer, &backing.name, &record, below.len()));
        } else {
            report.notes.push(Note::BackingRecordOutdated {
                image: layer.path().display().to_string(),
            });
        }
    }
    Ok(())
}

/// What the disk below shows now; `None` where its length alone says that it is something else.
fn content_for(
    record: &BackingRecord,
    below: &Chain,
    control: &Control<'_>,
) -> Result<Option<DiskContent>> {
    if below.len() != record.content.length {
        return Ok(None);
    }
    DiskContent::of(below, control).map(Some)
}

fn differs(layer: &Layer, name: &[u8], record: &BackingRecord, length: u64) -> Finding {
    Finding::BackingContent {
        image: layer.path().display().to_string(),
        backing: String::from_utf8_lossy(name).into_owned(),
        recorded_length: record.content.length,
        length,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_decoded_as_it_was_encoded_and_another_version_or_length_is_not_known() {
        let content = DiskContent {
            length: 0x0102_0304_0506,
            hash: [7; 32],
        };
        let record = BackingRecord::new(b"base", content);
        let bytes = record.encode();
        assert_eq!(bytes.len(), 80);
        assert_eq!(&bytes[8..16], &[0, 0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(BackingRecord::decode(&bytes), Some(record));
        assert!(record.is_of(b"base") && !record.is_of(b"other"));
        for length in [0, 16, 79, 81] {
            let mut other = bytes.clone();
            other.resize(length, 0);
            assert_eq!(BackingRecord::decode(&other), None, "{length}");
        }
        for at in [3, 7] {
            let mut other = bytes.clone();
            other[at] = 9;
            assert_eq!(BackingRecord::decode(&other), None, "byte {at}");
        }
    }
}
