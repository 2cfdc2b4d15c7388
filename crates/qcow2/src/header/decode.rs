//! The header decoded: fixed fields, and every number held against its bound.

use std::path::Path;

use zerocopy::byteorder::big_endian::{U32, U64};

use crate::error::{Error, Result};
use crate::units::{ClusterSize, HostOffset};

use super::{
    AUTOCLEAR_RAW_DATA, BackingName, Compression, Encryption, ExternalData, Header, MAGIC,
    MAX_BACKING_NAME_BYTES, MAX_INTERNAL_SNAPSHOTS, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES,
    RawHeader, SECTOR_BYTES, UnknownExtension, V2_HEADER_BYTES, V3_HEADER_BYTES, be_u64, extension,
    incompatible, to_u64, to_usize,
};

/// Reads the fixed fields; those that version 2 lacks are filled in as the format says.
pub(super) fn read_raw(first: &[u8], path: &Path) -> Result<(RawHeader, ClusterSize)> {
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

pub(super) struct Decoder<'a> {
    pub first: &'a [u8],
    pub raw: RawHeader,
    pub cluster_size: ClusterSize,
    pub path: &'a Path,
}

impl Decoder<'_> {
    pub fn header(&self) -> Result<Header> {
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

    pub fn require(
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
    pub fn in_first_cluster(&self, what: &'static str, at: u64, length: u64) -> Result<()> {
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
}
