//! The header and its extensions: the first cluster of an image.
//!
//! # Source
//! QEMU's `docs/interop/qcow2`, sections *Header* and *Header extensions*. Limits beside the
//! format's own (backing name 1023 bytes, L1 table 32 MiB, refcount table 8 MiB, 65 536 internal
//! snapshots) are QEMU's, so that what is accepted here QEMU accepts too.

use std::path::Path;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};
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
        Ok(read_raw(first, path)?.1)
    }

    /// Decodes the first cluster of an image. `first` may be shorter where the file is.
    ///
    /// # Errors
    /// When it is no qcow2 image, needs something that is not known ([`Error::UnknownFeature`], an
    /// encryption method without a name), or a field is not valid. `path` is only for the text.
    pub fn decode(first: &[u8], path: &Path) -> Result<Self> {
        let (raw, cluster_size) = read_raw(first, path)?;
        let decoder = Decoder {
            first: &first[..first.len().min(cluster_size.buffer_len())],
            raw,
            cluster_size,
            path,
        };
        decoder.header()
    }
}

/// Reads the fixed fields; those that version 2 lacks are filled in as the format says.
fn read_raw(first: &[u8], path: &Path) -> Result<(RawHeader, ClusterSize)> {
    if !first.starts_with(&MAGIC) {
        return Err(Error::NotQcow2 {
            path: path.to_owned(),
            found: first.iter().take(4).copied().collect(),
        });
    }
    let mut bytes = [0; V3_HEADER_BYTES];
    let there = first.len().min(V3_HEADER_BYTES);
    bytes[..there].copy_from_slice(&first[..there]);
    let mut raw: RawHeader = zerocopy::transmute!(bytes);
    let needed = match raw.version.get() {
        2 => V2_HEADER_BYTES,
        3 => V3_HEADER_BYTES,
        found if there >= 8 => {
            return Err(Error::UnknownVersion {
                path: path.to_owned(),
                found,
            });
        }
        _ => V2_HEADER_BYTES,
    };
    if there < needed {
        return Err(Error::OutOfFile {
            path: path.to_owned(),
            what: "the header",
            at: HostOffset(0),
            length: to_u64(needed),
            file_length: to_u64(first.len()),
        });
    }
    if raw.version.get() == 2 {
        raw.incompatible = U64::ZERO;
        raw.compatible = U64::ZERO;
        raw.autoclear = U64::ZERO;
        raw.refcount_order = U32::new(4);
        raw.header_length = U32::new(72);
    }
    let bits = raw.cluster_bits.get();
    let Some(cluster_size) = ClusterSize::from_bits(bits) else {
        return Err(Error::InvalidField {
            path: path.to_owned(),
            field: "cluster_bits",
            found: u64::from(bits),
            expected: "9 to 21".into(),
        });
    };
    Ok((raw, cluster_size))
}

struct Decoder<'a> {
    first: &'a [u8],
    raw: RawHeader,
    cluster_size: ClusterSize,
    path: &'a Path,
}

#[derive(Default)]
struct Extensions {
    backing_format: Option<Vec<u8>>,
    external_data: Option<Vec<u8>>,
    feature_names: Option<Vec<FeatureName>>,
    bitmaps: Option<BitmapsExtension>,
    encryption: Option<Encryption>,
    unknown: Vec<UnknownExtension>,
}

impl Decoder<'_> {
    fn header(&self) -> Result<Header> {
        self.check_header_length()?;
        self.check_features()?;
        let extensions = self.extensions()?;
        let encryption = self.encryption(extensions.encryption)?;
        self.check_sizes()?;
        self.check_tables()?;
        let raw = &self.raw;
        let bit = |mask| raw.incompatible.get() & mask != 0;
        Ok(Header {
            version: raw.version.get(),
            cluster_size: self.cluster_size,
            virtual_size: raw.virtual_size.get(),
            l1_entries: raw.l1_entries.get(),
            l1_table: HostOffset(raw.l1_offset.get()),
            refcount_table: HostOffset(raw.refcount_table_offset.get()),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            refcount_order: raw.refcount_order.get(),
            internal_snapshots: raw.internal_snapshots.get(),
            snapshot_table: HostOffset(raw.snapshot_table_offset.get()),
            dirty: bit(incompatible::DIRTY),
            corrupt: bit(incompatible::CORRUPT),
            extended_l2: bit(incompatible::EXTENDED_L2),
            compression: self.compression()?,
            compatible: raw.compatible.get(),
            autoclear: raw.autoclear.get(),
            header_length: raw.header_length.get(),
            backing: self.backing(extensions.backing_format)?,
            feature_names: extensions.feature_names.unwrap_or_default(),
            bitmaps: extensions.bitmaps,
            encryption,
            external_data: bit(incompatible::EXTERNAL_DATA).then(|| ExternalData {
                name: extensions.external_data,
                raw: raw.autoclear.get() & AUTOCLEAR_RAW_DATA != 0,
            }),
            unknown_extensions: extensions.unknown,
        })
    }

    fn invalid(&self, field: &'static str, found: u64, expected: impl Into<String>) -> Error {
        Error::InvalidField {
            path: self.path.to_owned(),
            field,
            found,
            expected: expected.into(),
        }
    }

    fn require(
        &self,
        holds: bool,
        field: &'static str,
        found: u64,
        expected: impl Into<String>,
    ) -> Result<()> {
        if holds {
            return Ok(());
        }
        Err(self.invalid(field, found, expected))
    }

    fn check_header_length(&self) -> Result<()> {
        let length = u64::from(self.raw.header_length.get());
        let least = if self.raw.version.get() == 2 { 72 } else { 104 };
        self.require(
            length >= least && length <= self.cluster_size.bytes() && length % 8 == 0,
            "header_length",
            length,
            format!(
                "a multiple of 8 from {least} to {}",
                self.cluster_size.bytes()
            ),
        )?;
        self.in_first_cluster("the header", 0, length)?;
        self.check_padding(length)
    }

    /// The bytes behind the compression type; as QEMU, we take no image that uses them.
    fn check_padding(&self, header_length: u64) -> Result<()> {
        if header_length <= 104 {
            return Ok(());
        }
        let padding = &self.first[V3_HEADER_BYTES..V3_HEADER_BYTES + 8];
        let padding = be_u64(padding) & 0x00ff_ffff_ffff_ffff;
        self.require(padding == 0, "header padding", padding, "0")
    }

    /// The bytes of the first cluster that must be there, or an error if the file ends before.
    fn in_first_cluster(&self, what: &'static str, at: u64, length: u64) -> Result<()> {
        let end = at.checked_add(length);
        if end.is_some_and(|end| end <= to_u64(self.first.len())) {
            return Ok(());
        }
        Err(Error::OutOfFile {
            path: self.path.to_owned(),
            what,
            at: HostOffset(at),
            length,
            file_length: to_u64(self.first.len()),
        })
    }

    fn check_features(&self) -> Result<()> {
        let unknown = self.raw.incompatible.get() & !incompatible::KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let bit = unknown.trailing_zeros();
        // The extensions are read for the text only: whatever the unknown feature changes, the worst
        // that can come of it is a wrong name.
        let extensions = self.extensions().unwrap_or_default();
        let journal = |extension: &UnknownExtension| extension.kind == extension::JOURNAL;
        if unknown == incompatible::IN_PROGRESS && extensions.unknown.iter().any(journal) {
            return Err(Error::InProgress {
                path: self.path.to_owned(),
            });
        }
        let names = extensions.feature_names.unwrap_or_default();
        let name = names
            .into_iter()
            .find(|name| name.kind == 0 && u32::from(name.bit) == bit)
            .map_or_else(|| "unnamed".to_owned(), |name| name.name);
        Err(Error::UnknownFeature {
            path: self.path.to_owned(),
            bit,
            name,
        })
    }

    fn encryption(&self, luks: Option<Encryption>) -> Result<Option<Encryption>> {
        let unusable = |method: String| {
            Err(Error::Encrypted {
                path: self.path.to_owned(),
                method,
            })
        };
        match self.raw.encryption.get() {
            0 => Ok(None),
            1 => Ok(Some(Encryption::Aes)),
            2 if luks.is_some() => Ok(luks),
            2 => unusable("LUKS, without the place of its header".into()),
            other => unusable(format!("unknown method {other}")),
        }
    }

    fn check_sizes(&self) -> Result<()> {
        let size = self.raw.virtual_size.get();
        self.require(
            size.is_multiple_of(SECTOR_BYTES) && size <= i64::MAX.unsigned_abs(),
            "size",
            size,
            "a multiple of 512 below 2^63",
        )?;
        let extended = self.raw.incompatible.get() & incompatible::EXTENDED_L2 != 0;
        let least_bits = if extended { 14 } else { 9 };
        let bits = self.cluster_size.bits();
        self.require(
            bits >= least_bits,
            "cluster_bits",
            u64::from(bits),
            "at least 14 with extended L2 entries",
        )?;
        let order = self.raw.refcount_order.get();
        self.require(order <= 6, "refcount_order", u64::from(order), "0 to 6")
    }

    fn check_tables(&self) -> Result<()> {
        let raw = &self.raw;
        self.check_l1()?;
        let clusters = u64::from(raw.refcount_table_clusters.get());
        self.require(
            clusters > 0 && clusters * self.cluster_size.bytes() <= MAX_REFCOUNT_TABLE_BYTES,
            "refcount_table_clusters",
            clusters,
            "at least 1 and at most 8 MiB",
        )?;
        self.require_place("refcount_table_offset", raw.refcount_table_offset.get())?;
        let count = raw.internal_snapshots.get();
        self.require(
            count <= MAX_INTERNAL_SNAPSHOTS,
            "nb_snapshots",
            u64::from(count),
            "at most 65536",
        )?;
        if count > 0 {
            self.require_place("snapshots_offset", raw.snapshot_table_offset.get())?;
        }
        Ok(())
    }

    fn check_l1(&self) -> Result<()> {
        let entries = u64::from(self.raw.l1_entries.get());
        self.require(
            entries <= MAX_L1_BYTES / 8,
            "l1_size",
            entries,
            format!("at most {}", MAX_L1_BYTES / 8),
        )?;
        let extended = self.raw.incompatible.get() & incompatible::EXTENDED_L2 != 0;
        let l2_entries = self.cluster_size.words() >> u32::from(extended);
        let coverage = l2_entries << self.cluster_size.bits();
        let needed = self.raw.virtual_size.get().div_ceil(coverage);
        self.require(
            entries >= needed,
            "l1_size",
            entries,
            format!("at least {needed} for the virtual size"),
        )?;
        if entries == 0 {
            return Ok(());
        }
        self.require_place("l1_table_offset", self.raw.l1_offset.get())
    }

    fn require_place(&self, field: &'static str, offset: u64) -> Result<()> {
        self.require(
            offset != 0 && self.cluster_size.offset_in(offset) == 0 && offset < 1 << 63,
            field,
            offset,
            format!(
                "the start of a cluster of {}, not the header",
                self.cluster_size
            ),
        )
    }

    fn compression(&self) -> Result<Compression> {
        let present = self.raw.header_length.get() > 104;
        let kind = match self.first.get(V3_HEADER_BYTES) {
            Some(kind) if present => *kind,
            _ => 0,
        };
        let flagged = self.raw.incompatible.get() & incompatible::COMPRESSION != 0;
        match (kind, flagged) {
            (0, false) => Ok(Compression::Zlib),
            (1, true) => Ok(Compression::Zstd),
            (_, false) => Err(self.invalid(
                "compression_type",
                u64::from(kind),
                "0 while the compression type bit is clear",
            )),
            (_, true) => Err(self.invalid(
                "compression_type",
                u64::from(kind),
                "1 (zstd) while the compression type bit is set",
            )),
        }
    }

    fn backing(&self, format: Option<Vec<u8>>) -> Result<Option<BackingName>> {
        let offset = self.raw.backing_offset.get();
        if offset == 0 {
            return Ok(None);
        }
        let length = self.raw.backing_length.get();
        self.require(
            length <= MAX_BACKING_NAME_BYTES,
            "backing_file_size",
            u64::from(length),
            "at most 1023",
        )?;
        let end = offset.checked_add(u64::from(length));
        self.require(
            end.is_some_and(|end| end <= self.cluster_size.bytes()),
            "backing_file_offset",
            offset,
            "a name inside the first cluster",
        )?;
        self.in_first_cluster("the backing name", offset, u64::from(length))?;
        let start = to_usize(offset);
        let name = self.first[start..start + to_usize(u64::from(length))].to_vec();
        Ok(Some(BackingName { name, format }))
    }

    fn extensions(&self) -> Result<Extensions> {
        let mut found = Extensions::default();
        let area = match self.raw.backing_offset.get() {
            0 => self.cluster_size.bytes(),
            offset => offset.min(self.cluster_size.bytes()),
        };
        let mut at = u64::from(self.raw.header_length.get());
        while area.saturating_sub(at) >= 8 {
            self.in_first_cluster("a header extension", at, 8)?;
            let start = to_usize(at);
            let kind = be_u32(&self.first[start..]);
            let length = be_u32(&self.first[start + 4..]);
            if kind == extension::END {
                break;
            }
            self.require(
                u64::from(length) <= area - at - 8,
                "header extension length",
                u64::from(length),
                format!("at most {} at offset {at}", area - at - 8),
            )?;
            self.in_first_cluster("a header extension", at + 8, u64::from(length))?;
            let data = &self.first[start + 8..start + 8 + to_usize(u64::from(length))];
            self.extension(&mut found, kind, data)?;
            at += 8 + u64::from(length).next_multiple_of(8);
        }
        Ok(found)
    }

    fn extension(&self, found: &mut Extensions, kind: u32, data: &[u8]) -> Result<()> {
        let repeated = match kind {
            extension::BACKING_FORMAT => found.backing_format.replace(data.to_vec()).is_some(),
            extension::EXTERNAL_DATA => found.external_data.replace(data.to_vec()).is_some(),
            extension::FEATURE_NAMES => found.feature_names.replace(feature_names(data)).is_some(),
            extension::BITMAPS => found.bitmaps.replace(self.bitmaps(data)?).is_some(),
            extension::ENCRYPTION => found.encryption.replace(self.luks(data)?).is_some(),
            _ => {
                let data = data.to_vec();
                found.unknown.push(UnknownExtension { kind, data });
                false
            }
        };
        self.require(
            !repeated,
            "header extension type",
            u64::from(kind),
            "each known type at most once",
        )
    }

    fn luks(&self, data: &[u8]) -> Result<Encryption> {
        self.require(
            data.len() == 16,
            "encryption extension length",
            to_u64(data.len()),
            "16",
        )?;
        Ok(Encryption::Luks {
            header: HostOffset(be_u64(data)),
            header_bytes: be_u64(&data[8..]),
        })
    }

    fn bitmaps(&self, data: &[u8]) -> Result<BitmapsExtension> {
        self.require(
            data.len() == 24,
            "bitmaps extension length",
            to_u64(data.len()),
            "24",
        )?;
        Ok(BitmapsExtension {
            count: be_u32(data),
            directory_length: be_u64(&data[8..]),
            directory: HostOffset(be_u64(&data[16..])),
        })
    }
}

fn feature_names(data: &[u8]) -> Vec<FeatureName> {
    let (rows, _cut_off) = data.as_chunks::<48>();
    rows.iter()
        .map(|row| {
            let name = &row[2..];
            let end = name.iter().position(|byte| *byte == 0);
            FeatureName {
                kind: row[0],
                bit: row[1],
                name: String::from_utf8_lossy(&name[..end.unwrap_or(name.len())]).into_owned(),
            }
        })
        .collect()
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
