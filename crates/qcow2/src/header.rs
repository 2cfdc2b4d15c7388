//! The header and its extensions: the first cluster of an image.
//!
//! # Source
//! QEMU's `docs/interop/qcow2`, sections *Header* and *Header extensions*. Limits beside the
//! format's own (backing name 1023 bytes, L1 table 32 MiB, refcount table 8 MiB, 65 536 internal
//! snapshots) are QEMU's, so that what is accepted here QEMU accepts too.

mod decode;
mod extensions;

use std::path::Path;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Result;
use crate::units::{ClusterSize, HostOffset};

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The header's length in version 2, in bytes.
pub const V2_HEADER_BYTES: usize = 72;
/// The header's least length in version 3, in bytes.
pub const V3_HEADER_BYTES: usize = 104;
/// The longest backing name, in bytes.
pub const MAX_BACKING_NAME_BYTES: u32 = 1023;
/// The largest L1 table, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The largest refcount table, in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The most internal snapshots in an image.
pub const MAX_INTERNAL_SNAPSHOTS: u32 = 65_536;
/// Virtual disks are counted in sectors of this many bytes.
pub const SECTOR_BYTES: u64 = 512;

/// Header extension types that are known here.
pub(crate) mod extension {
    /// End of the header extension area.
    pub const END: u32 = 0;
    /// Backing file format name string.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Feature name table.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Bitmaps extension.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Full disk encryption header pointer.
    pub const ENCRYPTION: u32 = 0x0537_be77;
    /// External data file name string.
    pub const EXTERNAL_DATA: u32 = 0x4441_5441;
    /// Where the journal of a change in progress is; ours ("STJL").
    pub const JOURNAL: u32 = 0x5354_4a4c;
    /// What the disk below showed when it was recorded; ours ("STBC").
    pub const BACKING_CONTENT: u32 = 0x5354_4243;
}

/// Incompatible feature bits: a reader that does not know a set bit must not open the image.
pub(crate) mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1 << 0;
    /// Anything may be wrong.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data lies in another file.
    pub const EXTERNAL_DATA: u64 = 1 << 2;
    /// Compressed clusters are not zlib's.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have 16 bytes, and clusters 32 subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// A change is in progress; ours, and only with the extension that says where its journal is.
    pub const IN_PROGRESS: u64 = 1 << 63;
    /// All that are known here.
    pub const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2;
}

/// Auto-clear feature bit 0: the bitmaps extension is consistent.
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// Auto-clear feature bit 1: the external data file, read alone, is the guest's disk.
pub(crate) const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;
/// Compatible feature bit 0: refcounts may be written late.
pub(crate) const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;

/// The header as it lies in the file, version 3 without additional fields.
///
/// | bytes | field |
/// |---|---|
/// | 0–3 | magic |
/// | 4–7 | version |
/// | 8–15, 16–19 | backing name: offset, length |
/// | 20–23 | cluster bits |
/// | 24–31 | virtual size in bytes |
/// | 32–35 | encryption method |
/// | 36–39, 40–47 | L1 table: entries, offset |
/// | 48–55, 56–59 | refcount table: offset, clusters |
/// | 60–63, 64–71 | internal snapshots: count, table offset |
/// | 72–79, 80–87, 88–95 | features: incompatible, compatible, auto-clear |
/// | 96–99 | refcount order |
/// | 100–103 | header length in bytes |
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub magic: [u8; 4],
    pub version: U32,
    pub backing_offset: U64,
    pub backing_length: U32,
    pub cluster_bits: U32,
    pub virtual_size: U64,
    pub encryption: U32,
    pub l1_entries: U32,
    pub l1_offset: U64,
    pub refcount_table_offset: U64,
    pub refcount_table_clusters: U32,
    pub internal_snapshots: U32,
    pub snapshot_table_offset: U64,
    pub incompatible: U64,
    pub compatible: U64,
    pub autoclear: U64,
    pub refcount_order: U32,
    pub header_length: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() == V3_HEADER_BYTES);
    assert!(std::mem::offset_of!(RawHeader, incompatible) == V2_HEADER_BYTES);
    assert!(std::mem::offset_of!(RawHeader, snapshot_table_offset) == 64);
};

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A raw deflate stream.
    Zlib,
    /// A zstd frame.
    Zstd,
}

impl Compression {
    /// The method's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// What the header says about the backing file. It is reported, never followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// The name, as written by whoever made the image.
    pub name: Vec<u8>,
    /// The format, where the image states one.
    pub format: Option<Vec<u8>>,
}

/// One line of the feature name table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// 0: incompatible, 1: compatible, 2: auto-clear.
    pub kind: u8,
    /// The bit's number.
    pub bit: u8,
    /// The name.
    pub name: String,
}

/// Where the persistent dirty bitmaps are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// How many bitmaps there are, 1 to 65 535.
    pub count: u32,
    /// The directory's length in bytes.
    pub directory_length: u64,
    /// Where the directory starts.
    pub directory: HostOffset,
}

/// A header extension that is not known here, and may be ignored; whoever writes the header again
/// writes it as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownExtension {
    /// Its type.
    pub kind: u32,
    /// Its data, without the filling to a multiple of 8.
    pub data: Vec<u8>,
}

/// How guest data is encrypted. It is recognised and never decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    /// QEMU's old AES-CBC method.
    Aes,
    /// LUKS version 1, with the header inside the image.
    Luks {
        /// Where the LUKS header starts.
        header: HostOffset,
        /// The header's length with its key material, in bytes.
        header_bytes: u64,
    },
}

impl Encryption {
    /// The method's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes => "AES",
            Self::Luks { .. } => "LUKS",
        }
    }
}

/// The file that holds guest data in the place of the image. It is reported, never followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalData {
    /// The name, as written by whoever made the image; some images have none.
    pub name: Option<Vec<u8>>,
    /// The data file, read alone, is the guest's disk.
    pub raw: bool,
}

/// A header that was decoded and found valid in itself; offsets are not yet held against the file.
#[derive(Debug, Clone)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size.
    pub cluster_size: ClusterSize,
    /// The virtual disk's length in bytes, a multiple of 512.
    pub virtual_size: u64,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table starts.
    pub l1_table: HostOffset,
    /// Where the refcount table starts.
    pub refcount_table: HostOffset,
    /// The refcount table's length in clusters.
    pub refcount_table_clusters: u32,
    /// A refcount has `1 << refcount_order` bits; 0 to 6.
    pub refcount_order: u32,
    /// How many internal snapshots there are.
    pub internal_snapshots: u32,
    /// Where the table of internal snapshots starts.
    pub snapshot_table: HostOffset,
    /// Refcounts may be wrong (they were to be written when the image was closed).
    pub dirty: bool,
    /// Somebody found the image damaged and marked it.
    pub corrupt: bool,
    /// L2 entries have 16 bytes, and clusters 32 subclusters.
    pub extended_l2: bool,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// All compatible feature bits.
    pub compatible: u64,
    /// All auto-clear feature bits.
    pub autoclear: u64,
    /// The header's length in bytes: 72 in version 2, at least 104 in version 3.
    pub header_length: u32,
    /// The backing file's name.
    pub backing: Option<BackingName>,
    /// The feature name table.
    pub feature_names: Vec<FeatureName>,
    /// Where bitmaps are, when the extension is there; trust it only if
    /// [`Header::bitmaps_consistent`].
    pub bitmaps: Option<BitmapsExtension>,
    /// How guest data is encrypted, if it is.
    pub encryption: Option<Encryption>,
    /// The file with the guest data, where that is not the image itself.
    pub external_data: Option<ExternalData>,
    /// Extensions that are not known here, in the order in which they lie in the file.
    pub unknown_extensions: Vec<UnknownExtension>,
}

impl Header {
    /// Whether the bitmaps extension is there and its auto-clear bit says that it can be trusted.
    #[must_use]
    pub fn bitmaps_consistent(&self) -> bool {
        self.bitmaps.is_some() && self.autoclear & AUTOCLEAR_BITMAPS != 0
    }

    /// Whether refcounts may be written late, with the image marked dirty meanwhile.
    #[must_use]
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0
    }

    /// Bytes of one L2 entry: 8, or 16 with extended L2 entries.
    #[must_use]
    pub fn l2_entry_bytes(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// How many clusters one L2 table describes.
    #[must_use]
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size.bytes() / self.l2_entry_bytes()
    }

    /// How many guest bytes one L2 table describes.
    #[must_use]
    pub fn l2_coverage(&self) -> u64 {
        self.l2_entries() << self.cluster_size.bits()
    }

    /// How many refcounts a refcount block holds.
    #[must_use]
    pub fn refcounts_per_block(&self) -> u64 {
        (self.cluster_size.bytes() * 8) >> self.refcount_order
    }

    /// The cluster size that the first bytes of an image state, so that the first cluster can be read.
    pub(crate) fn cluster_size_of(first: &[u8], path: &Path) -> Result<ClusterSize> {
        Ok(decode::read_raw(first, path)?.1)
    }

    /// Decodes the first cluster of an image. `first` may be shorter where the file is.
    ///
    /// # Errors
    /// When it is no qcow2 image, needs something that is not known ([`crate::Error::UnknownFeature`], an
    /// encryption method without a name), or a field is not valid. `path` is only for the text.
    pub fn decode(first: &[u8], path: &Path) -> Result<Self> {
        let (raw, cluster_size) = decode::read_raw(first, path)?;
        let decoder = decode::Decoder {
            first: &first[..first.len().min(cluster_size.buffer_len())],
            raw,
            cluster_size,
            path,
        };
        decoder.header()
    }
}

/// The big-endian number at the start of `bytes`, which has at least four.
pub(crate) fn be_u32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// The big-endian number at the start of `bytes`, which has at least eight.
pub(crate) fn be_u64(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    u64::from_be_bytes(word)
}

/// A length in memory as a length in a file. Memory is never larger than 2^64 bytes.
pub(crate) fn to_u64(length: usize) -> u64 {
    length as u64
}

/// A length that was bounded before, for memory.
///
/// # Panics
/// When it was not bounded: on a machine whose memory cannot be addressed with it.
pub(crate) fn to_usize(length: u64) -> usize {
    match usize::try_from(length) {
        Ok(length) => length,
        Err(_too_large) => unreachable!("{length} was to be bounded before"),
    }
}
