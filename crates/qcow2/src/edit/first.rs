//! The first cluster as a value: header, extensions and backing name, decoded and encoded whole.
//!
//! What is not known here is kept byte for byte: additional header fields, extensions of any type, the
//! feature name table. While neither lengths nor names change, everything stays at its place, so that most
//! changes touch the first sector only.

use std::path::Path;

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use crate::error::Result;
use crate::header::{
    BitmapsExtension, Header, MAGIC, RawHeader, V2_HEADER_BYTES, V3_HEADER_BYTES, be_u32,
    extension, incompatible, to_u64, to_usize,
};
use crate::units::{ClusterSize, HostOffset};

use super::refcounts::refused;

/// The length of the sector that is switched, in bytes.
pub(super) const SECTOR: usize = 512;
/// Bytes of a row of the feature name table.
const FEATURE_ROW: usize = 48;
/// What bit 63 is called in the feature name table; at most 46 bytes.
const IN_PROGRESS_NAME: &[u8] = b"change in progress (run stead img recover)";

/// The first cluster of an image.
#[derive(Debug, Clone)]
pub(super) struct FirstCluster {
    pub raw: RawHeader,
    /// Header bytes behind the fixed fields.
    tail: Vec<u8>,
    extensions: Vec<(u32, Vec<u8>)>,
    backing: Option<Vec<u8>>,
    /// The bytes that this was decoded from.
    original: Vec<u8>,
    /// Something has got another length or another place.
    moved: bool,
    size: ClusterSize,
}

impl FirstCluster {
    /// Decodes a first cluster that [`Header::decode`] has accepted as `header`.
    pub fn decode(first: &[u8], header: &Header) -> Self {
        let size = header.cluster_size;
        let mut original = first.to_vec();
        original.resize(size.buffer_len(), 0);
        let mut fixed = [0; V3_HEADER_BYTES];
        let fields = fields_of(header.version);
        fixed[..fields].copy_from_slice(&original[..fields]);
        let raw: RawHeader = zerocopy::transmute!(fixed);
        let length = to_usize(u64::from(header.header_length));
        let backing = header.backing.as_ref().map(|backing| backing.name.clone());
        let area = match raw.backing_offset.get() {
            0 => original.len(),
            offset => to_usize(offset.min(size.bytes())),
        };
        Self {
            tail: original[fields..length].to_vec(),
            extensions: extensions(&original[..area.max(length)], length),
            backing,
            moved: false,
            raw,
            size,
            original,
        }
    }

    /// The bytes of the whole cluster.
    pub fn encode(&self, path: &Path) -> Result<Vec<u8>> {
        let mut raw = self.raw;
        let mut bytes = if self.moved {
            vec![0; self.size.buffer_len()]
        } else {
            self.original.clone()
        };
        let mut behind = Vec::new();
        for (kind, data) in &self.extensions {
            behind.extend(kind.to_be_bytes());
            behind.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
            behind.extend(data);
            behind.resize(behind.len().next_multiple_of(8), 0);
        }
        let fields = fields_of(raw.version.get());
        let start = fields + self.tail.len();
        if self.moved {
            behind.extend([0; 8]);
            let name = self.backing.as_deref().unwrap_or_default();
            let at = if name.is_empty() {
                0
            } else {
                start + behind.len()
            };
            raw.backing_offset = U64::new(to_u64(at));
            raw.backing_length = U32::new(u32::try_from(name.len()).unwrap_or(u32::MAX));
            behind.extend(name);
        }
        let length = bytes.len();
        let Some(place) = bytes.get_mut(start..start + behind.len()) else {
            let reason = format!(
                "header, extensions and names need {} bytes, and the cluster has {length}",
                start + behind.len()
            );
            return Err(refused(path, "write the header", reason));
        };
        place.copy_from_slice(&behind);
        bytes[..fields].copy_from_slice(&raw.as_bytes()[..fields]);
        bytes[fields..start].copy_from_slice(&self.tail);
        Ok(bytes)
    }

    /// Sets the data of an extension, or takes it away.
    pub fn set_extension(&mut self, kind: u32, data: Option<Vec<u8>>) {
        let known = self.extensions.iter().position(|(known, _)| *known == kind);
        match (known, data) {
            (Some(index), Some(data)) => {
                self.moved |= self.extensions[index].1.len() != data.len();
                self.extensions[index].1 = data;
            }
            (Some(index), None) => {
                self.moved = true;
                self.extensions.remove(index);
            }
            (None, Some(data)) => {
                self.moved = true;
                self.extensions.push((kind, data));
            }
            (None, None) => {}
        }
    }

    /// Says where the bitmaps are, before the feature name table: that is long, and what changes so often should lie in
    /// the first sector.
    pub fn set_bitmaps(&mut self, bitmaps: Option<BitmapsExtension>) {
        let data = bitmaps.map(|bitmaps| {
            let mut data = bitmaps.count.to_be_bytes().to_vec();
            data.extend([0; 4]);
            data.extend(bitmaps.directory_length.to_be_bytes());
            data.extend(bitmaps.directory.0.to_be_bytes());
            data
        });
        let is_there = data.is_some();
        self.set_extension(extension::BITMAPS, data);
        let place = |kind| self.extensions.iter().position(|(known, _)| *known == kind);
        let places = (place(extension::FEATURE_NAMES), place(extension::BITMAPS));
        if let (Some(names), Some(bitmaps)) = places
            && is_there
            && names < bitmaps
        {
            self.moved = true;
            self.extensions[names..=bitmaps].rotate_right(1);
        }
    }

    /// Names another backing file, or none.
    pub fn set_backing(&mut self, name: Option<(&[u8], Option<&[u8]>)>) {
        let (name, format) = match name {
            Some((name, format)) => (Some(name.to_vec()), format.map(<[u8]>::to_vec)),
            None => (None, None),
        };
        self.moved |= self.backing != name;
        if name.is_none() {
            self.set_extension(extension::BACKING_CONTENT, None);
        }
        self.backing = name;
        self.set_extension(extension::BACKING_FORMAT, format);
    }

    /// The backing file's name.
    pub fn backing_name(&self) -> Option<&[u8]> {
        self.backing.as_deref()
    }

    /// Whether a backing file is named.
    pub fn has_backing(&self) -> bool {
        self.backing.is_some()
    }

    /// Writes the header in another version of the format; what version 2 has no fields for goes.
    pub fn set_version(&mut self, version: u32) {
        if self.raw.version.get() == version {
            return;
        }
        self.moved = true;
        self.tail.clear();
        self.raw.version = U32::new(version);
        self.raw.incompatible = U64::ZERO;
        self.raw.compatible = U64::ZERO;
        self.raw.autoclear = U64::ZERO;
        self.raw.refcount_order = U32::new(4);
        self.raw.header_length = U32::new(104);
        if version < 3 {
            self.set_extension(extension::FEATURE_NAMES, None);
        }
    }

    /// The first sector while the change is in progress: a header that nobody reads who does not know bit
    /// 63, what that bit is called, and where the journal is. `self` is the old state's.
    pub fn in_progress(&self, journal: &JournalPlace) -> [u8; SECTOR] {
        let mut raw = self.raw;
        raw.magic = MAGIC;
        raw.version = U32::new(3);
        raw.backing_offset = U64::ZERO;
        raw.backing_length = U32::ZERO;
        raw.incompatible = U64::new(incompatible::IN_PROGRESS);
        raw.compatible = U64::ZERO;
        raw.autoclear = U64::ZERO;
        if self.raw.version.get() == 2 {
            raw.refcount_order = U32::new(4);
        }
        raw.header_length = U32::new(104);
        let mut bytes = raw.as_bytes().to_vec();
        let mut put = |kind: u32, data: &[u8]| {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
            bytes.extend(data);
        };
        let mut row = [0; FEATURE_ROW];
        row[1] = 63;
        row[2..2 + IN_PROGRESS_NAME.len()].copy_from_slice(IN_PROGRESS_NAME);
        put(extension::FEATURE_NAMES, &row);
        put(extension::JOURNAL, &journal.encode());
        let mut sector = [0; SECTOR];
        sector[..bytes.len()].copy_from_slice(&bytes);
        sector
    }
}

/// Where the journal of a change in progress is, and its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct JournalPlace {
    pub at: HostOffset,
    pub length: u64,
    pub hash: [u8; 32],
}

impl JournalPlace {
    fn encode(&self) -> Vec<u8> {
        let mut data = self.at.0.to_be_bytes().to_vec();
        data.extend(self.length.to_be_bytes());
        data.extend(self.hash);
        data
    }

    /// What the first sector of an image in progress says; `None` when it is no such sector.
    pub fn find(sector: &[u8; SECTOR]) -> Option<Self> {
        let mut fixed = [0; V3_HEADER_BYTES];
        fixed.copy_from_slice(&sector[..V3_HEADER_BYTES]);
        let raw: RawHeader = zerocopy::transmute!(fixed);
        let marked = raw.magic == MAGIC
            && raw.version.get() == 3
            && raw.incompatible.get() == incompatible::IN_PROGRESS
            && raw.header_length.get() == 104;
        let all = extensions(sector, V3_HEADER_BYTES);
        let (_, data) = all.iter().find(|(kind, _)| *kind == extension::JOURNAL)?;
        let data: [u8; 48] = data.as_slice().try_into().ok()?;
        let (words, hash) = data.split_at(16);
        let word = |at: usize| crate::header::be_u64(&words[at..]);
        marked.then_some(Self {
            at: HostOffset(word(0)),
            length: word(8),
            hash: hash.try_into().ok()?,
        })
    }
}

fn fields_of(version: u32) -> usize {
    if version == 2 {
        V2_HEADER_BYTES
    } else {
        V3_HEADER_BYTES
    }
}

/// The extensions from `start` on, up to the one that ends them or to what is not whole.
fn extensions(area: &[u8], start: usize) -> Vec<(u32, Vec<u8>)> {
    let mut found = Vec::new();
    let mut at = start;
    while let Some(head) = area.get(at..at + 8) {
        let (kind, length) = (be_u32(head), be_u32(&head[4..]));
        let end = usize::try_from(length)
            .ok()
            .and_then(|length| length.checked_add(at + 8));
        let data = end.and_then(|end| area.get(at + 8..end));
        let Some(data) = data.filter(|_| kind != extension::END) else {
            break;
        };
        found.push((kind, data.to_vec()));
        at += 8 + data.len().next_multiple_of(8);
    }
    found
}
