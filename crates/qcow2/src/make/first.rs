//! The first cluster of a new image: header, extensions, backing name.
//!
//! # Source
//! QEMU's `docs/interop/qcow2`, sections *Header* and *Header extensions*.

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::options::{Geometry, Preallocation, Qcow2Options, Version};
use crate::backing_record::BackingRecord;
use crate::chain::LayerFormat;
use crate::error::Result;
use crate::header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, BitmapsExtension, Compression, MAGIC, RawHeader,
    V2_HEADER_BYTES, V3_HEADER_BYTES, extension, incompatible, to_u64,
};
use crate::units::HostOffset;

/// The header's length in version 3: with the compression type, filled up to 8 bytes.
const NEW_V3_HEADER_BYTES: usize = V3_HEADER_BYTES + 8;
/// Compatible feature bit 0: refcounts may be written late.
const LAZY_REFCOUNTS: u64 = 1 << 0;
/// The feature name table is written into clusters larger than this, as QEMU does.
const NO_NAMES_UP_TO_BYTES: u64 = 4096;

/// The features that have names: kind (0 incompatible, 1 compatible, 2 auto-clear), bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Where the tables have come to lie.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tables {
    pub l1_table: HostOffset,
    pub refcount_table: HostOffset,
    pub refcount_table_clusters: u64,
    pub internal_snapshots: u32,
    pub snapshot_table: HostOffset,
    pub bitmaps: Option<BitmapsExtension>,
}

/// The first cluster, without the zeros behind it.
///
/// # Errors
/// When extensions and backing name do not fit it.
pub(crate) fn first_cluster(
    geometry: &Geometry,
    options: &Qcow2Options,
    tables: &Tables,
) -> Result<Vec<u8>> {
    let name = options.backing.as_ref().map_or("", |backing| &backing.name);
    let mut bytes = vec![0; header_bytes(options.version)];
    bytes.extend(extensions(options, tables));
    let name_at = to_u64(bytes.len());
    bytes.extend(name.as_bytes());
    if to_u64(bytes.len()) > geometry.size.bytes() {
        return geometry.invalid(format!(
            "its header, data file name and backing name have {} bytes and do not fit the first cluster",
            bytes.len()
        ));
    }
    let mut raw = fixed_fields(geometry, options, tables);
    if !name.is_empty() {
        raw.backing_offset = U64::new(name_at);
        raw.backing_length = U32::new(narrow(to_u64(name.len())));
    }
    let fixed = match options.version {
        Version::V2 => V2_HEADER_BYTES,
        Version::V3 => V3_HEADER_BYTES,
    };
    bytes[..fixed].copy_from_slice(&raw.as_bytes()[..fixed]);
    if options.version == Version::V3 {
        bytes[V3_HEADER_BYTES] = u8::from(options.compression == Compression::Zstd);
    }
    Ok(bytes)
}

fn header_bytes(version: Version) -> usize {
    match version {
        Version::V2 => V2_HEADER_BYTES,
        Version::V3 => NEW_V3_HEADER_BYTES,
    }
}

fn fixed_fields(geometry: &Geometry, options: &Qcow2Options, tables: &Tables) -> RawHeader {
    let set = |wanted: bool, bit: u64| if wanted { bit } else { 0 };
    let external = options.data_file.as_ref();
    RawHeader {
        magic: MAGIC,
        version: U32::new(match options.version {
            Version::V2 => 2,
            Version::V3 => 3,
        }),
        backing_offset: U64::ZERO,
        backing_length: U32::ZERO,
        cluster_bits: U32::new(geometry.size.bits()),
        virtual_size: U64::new(geometry.disk),
        encryption: U32::ZERO,
        l1_entries: U32::new(narrow(geometry.l1_entries)),
        l1_offset: U64::new(tables.l1_table.0),
        refcount_table_offset: U64::new(tables.refcount_table.0),
        refcount_table_clusters: U32::new(narrow(tables.refcount_table_clusters)),
        internal_snapshots: U32::new(tables.internal_snapshots),
        snapshot_table_offset: U64::new(tables.snapshot_table.0),
        incompatible: U64::new(
            set(external.is_some(), incompatible::EXTERNAL_DATA)
                | set(
                    options.compression == Compression::Zstd,
                    incompatible::COMPRESSION,
                )
                | set(options.extended_l2, incompatible::EXTENDED_L2),
        ),
        compatible: U64::new(set(options.lazy_refcounts, LAZY_REFCOUNTS)),
        autoclear: U64::new(
            set(external.is_some_and(|data| data.raw), AUTOCLEAR_RAW_DATA)
                | set(tables.bitmaps.is_some(), AUTOCLEAR_BITMAPS),
        ),
        refcount_order: U32::new(geometry.refcount_order),
        header_length: U32::new(narrow(to_u64(header_bytes(options.version)))),
    }
}

fn extensions(options: &Qcow2Options, tables: &Tables) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(backing) = &options.backing {
        let format: &[u8] = match backing.format {
            LayerFormat::Raw => b"raw",
            LayerFormat::Qcow2 => b"qcow2",
        };
        push_extension(&mut bytes, extension::BACKING_FORMAT, format);
    }
    if let Some(data) = &options.data_file {
        push_extension(&mut bytes, extension::EXTERNAL_DATA, data.name.as_bytes());
    }
    if options.version == Version::V3 && options.cluster_size.bytes() > NO_NAMES_UP_TO_BYTES {
        push_extension(&mut bytes, extension::FEATURE_NAMES, &feature_names());
    }
    if let (Some(backing), Some(content)) = (&options.backing, options.backing_content) {
        let record = BackingRecord::new(backing.name.as_bytes(), content);
        push_extension(&mut bytes, extension::BACKING_CONTENT, &record.encode());
    }
    if let Some(bitmaps) = &tables.bitmaps {
        push_extension(&mut bytes, extension::BITMAPS, &encode_bitmaps(bitmaps));
    }
    push_extension(&mut bytes, extension::END, &[]);
    bytes
}

fn push_extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend(narrow(to_u64(data.len())).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

fn encode_bitmaps(bitmaps: &BitmapsExtension) -> Vec<u8> {
    let mut bytes = bitmaps.count.to_be_bytes().to_vec();
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(bitmaps.directory_length.to_be_bytes());
    bytes.extend(bitmaps.directory.0.to_be_bytes());
    bytes
}

fn feature_names() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, bit, name) in FEATURE_NAMES {
        let row = bytes.len();
        bytes.extend([kind, bit]);
        bytes.extend(name.as_bytes());
        bytes.resize(row + 48, 0);
    }
    bytes
}

/// A number that a table's limit has bounded, as a field of 32 bits.
pub(crate) fn narrow(number: u64) -> u32 {
    match u32::try_from(number) {
        Ok(number) => number,
        Err(_too_large) => unreachable!("{number} was bounded before"),
    }
}

/// Raw external data needs every cluster in its place from the start.
pub(crate) fn reserves(options: &Qcow2Options) -> bool {
    options.preallocation != Preallocation::Off
        || options.data_file.as_ref().is_some_and(|data| data.raw)
}
