//! Manifests: what makes a checkpoint or a template.
//!
//! A manifest is the last object a publish writes. Before it is there, nothing it names is a
//! checkpoint (or template, or backup); once it is there, everything it names is durable.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `STEADMAN` |
//! | 8 | 4 | format version, little-endian: 1 |
//! | 12 | 4 | flags: zero; unknown flags are refused |
//! | 16 | 8 | length of the body in bytes, at most 4 MiB |
//! | 24 | 32 | BLAKE3 of the body |
//! | 56 | 8 | zero |
//! | 64 | | body: canonical JSON of [`Manifest`] |
//!
//! Canonical means: no white space, fields in the order of the structures below, keys of `machine`
//! sorted, numbers as this version writes them. A body that differs from what it encodes to again
//! is refused, so a checkpoint has one encoding and one id, the BLAKE3 of the whole object.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};
use crate::hash::{Hash, ParseHashError};
use crate::tree::{BlobRef, TreeRef};

/// The first bytes of a manifest.
pub const MANIFEST_MAGIC: [u8; 8] = *b"STEADMAN";
/// The format version of manifests.
pub const MANIFEST_VERSION: u32 = 1;
/// The largest body, in bytes.
pub const BODY_BYTES_MAX: u64 = 4 << 20;
/// The most disks a manifest names.
pub const DISKS_MAX: usize = 64;

/// The first 64 bytes of a manifest.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ManifestHeader {
    /// [`MANIFEST_MAGIC`].
    pub magic: [u8; 8],
    /// [`MANIFEST_VERSION`].
    pub version: U32,
    /// Zero.
    pub flags: U32,
    /// Length of the body in bytes.
    pub body_bytes: U64,
    /// BLAKE3 of the body.
    pub body_hash: [u8; 32],
    /// Zero.
    pub reserved: [u8; 8],
}

/// Length of [`ManifestHeader`] in bytes.
pub const MANIFEST_HEADER_BYTES: usize = 64;

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<ManifestHeader>() == MANIFEST_HEADER_BYTES);
    assert!(offset_of!(ManifestHeader, body_bytes) == 16);
    assert!(offset_of!(ManifestHeader, body_hash) == 24);
};

/// The name of a manifest: the BLAKE3 of all its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ManifestId(pub Hash);

impl fmt::Display for ManifestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ManifestId {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

/// What a manifest is for; each has a folder of its own in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The state of a sandbox at one instant.
    Checkpoint,
    /// An immutable base that sandboxes start from.
    Template,
    /// A disk as it was at one instant, of no machine that is known.
    Backup,
}

impl Role {
    pub(crate) const ALL: [Self; 3] = [Self::Checkpoint, Self::Template, Self::Backup];

    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoints",
            Self::Template => "templates",
            Self::Backup => "backups",
        }
    }
}

/// How much of a VM's state a manifest holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Disks, RAM and devices: the VM goes on where it stood.
    Full,
    /// Disks only: the guest boots.
    DiskOnly,
}

/// A sandbox, as lineage names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxName {
    /// Its id.
    pub id: String,
    /// What its user calls it.
    pub name: Option<String>,
}

/// Where the state comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lineage {
    /// The checkpoint before this one.
    pub parent: Option<ManifestId>,
    /// The sandbox it was taken of.
    pub sandbox: Option<SandboxName>,
    /// The template the sandbox started from.
    pub template: Option<ManifestId>,
}

/// The virtual machine that the state belongs to; a restore must offer the same. All is empty where there is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Producer {
    /// Version of the QEMU that wrote the device state, for instance `10.0.2`.
    pub qemu_version: Option<String>,
    /// Versioned machine type, for instance `pc-q35-10.0`.
    pub machine_type: String,
    /// CPU model.
    pub cpu_model: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Size of the RAM in bytes.
    pub memory_bytes: u64,
    /// Kernel command line, if the kernel is given from outside.
    pub kernel_command_line: Option<String>,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its id within the VM.
    pub id: String,
    /// Its guest-visible content; as long as the disk.
    pub tree: TreeRef,
    /// The size that the guest sees, in bytes.
    pub virtual_size_bytes: u64,
}

/// A checkpoint, template or backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// What it is for.
    pub role: Role,
    /// What its user calls it.
    pub name: Option<String>,
    /// The instant it was taken at (RFC 3339).
    pub created: jiff::Timestamp,
    /// What it holds.
    pub kind: Kind,
    /// Whether the disks are as a power failure would have left them (nothing was frozen).
    pub crash_consistent: bool,
    /// Where it comes from.
    pub lineage: Lineage,
    /// The machine it belongs to.
    pub producer: Producer,
    /// The disks.
    pub disks: Vec<Disk>,
    /// The RAM.
    pub ram: Option<TreeRef>,
    /// The device state, as QEMU wrote it.
    pub device_state: Option<BlobRef>,
    /// The kernel, if it is given from outside.
    pub kernel: Option<BlobRef>,
    /// The initial RAM disk, if it is given from outside.
    pub initrd: Option<BlobRef>,
    /// What the engine needs to build the VM again, or a backup's record; the store does not look into it.
    pub machine: Value,
}

impl Manifest {
    /// Everything the manifest names, with what it is.
    #[must_use]
    pub fn trees(&self) -> Vec<(String, TreeRef)> {
        let disks = self
            .disks
            .iter()
            .map(|disk| (format!("disk {}", disk.id), disk.tree));
        let ram = self.ram.map(|tree| ("ram".to_owned(), tree));
        let blobs = [
            ("device state", self.device_state),
            ("kernel", self.kernel),
            ("initrd", self.initrd),
        ];
        let blobs = blobs
            .into_iter()
            .filter_map(|(name, blob)| Some((name.to_owned(), blob?.0)));
        disks.chain(ram).chain(blobs).collect()
    }

    fn check(&self) -> Result<(), String> {
        if self.disks.len() > DISKS_MAX {
            return Err(format!("{} disks; at most {DISKS_MAX}", self.disks.len()));
        }
        let ids: BTreeSet<_> = self.disks.iter().map(|disk| &disk.id).collect();
        if ids.len() != self.disks.len() {
            return Err("two disks of one id".to_owned());
        }
        for disk in &self.disks {
            if disk.tree.length_bytes != disk.virtual_size_bytes {
                return Err(format!(
                    "disk {} has a virtual size of {} bytes and content of {} bytes",
                    disk.id, disk.virtual_size_bytes, disk.tree.length_bytes
                ));
            }
        }
        if self.role == Role::Backup && self.kind == Kind::Full {
            return Err("a backup has disks only".to_owned());
        }
        if self.kind == Kind::Full && (self.ram.is_none() || self.device_state.is_none()) {
            return Err("kind full without RAM or device state".to_owned());
        }
        self.trees()
            .iter()
            .try_for_each(|(_, tree)| tree.check())
            .map_err(|error| error.to_string())
    }

    /// The object for this manifest.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it contradicts itself, is too long, or cannot be read back exactly.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let invalid = |reason: String| Error::Invalid {
            attempted: "write the manifest".to_owned(),
            reason,
        };
        let object = self
            .encode_any()
            .map_err(|error| invalid(error.to_string()))?;
        match Self::decode(&object) {
            Ok(read) if read == *self => Ok(object),
            Ok(_) => Err(invalid(
                "it does not read back as it was written".to_owned(),
            )),
            Err(reason) => Err(invalid(reason)),
        }
    }

    fn encode_any(&self) -> serde_json::Result<Vec<u8>> {
        let mut canonical = self.clone();
        canonical.machine = sorted(canonical.machine);
        let body = serde_json::to_vec(&canonical)?;
        let header = ManifestHeader {
            magic: MANIFEST_MAGIC,
            version: U32::new(MANIFEST_VERSION),
            flags: U32::ZERO,
            body_bytes: U64::new(body.len() as u64),
            body_hash: *Hash::of(&body).as_bytes(),
            reserved: [0; 8],
        };
        let mut object = header.as_bytes().to_vec();
        object.extend_from_slice(&body);
        Ok(object)
    }

    /// Reads a manifest object; whether it is the one that was asked for is [`Manifest::decode_named`].
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn decode(object: &[u8]) -> Result<Self, String> {
        let body = decode_header(object)?;
        let manifest: Self =
            serde_json::from_slice(body).map_err(|error| format!("its body: {error}"))?;
        manifest.check()?;
        let again = manifest
            .encode_any()
            .map_err(|error| format!("its body: {error}"))?;
        if again != object {
            return Err("its body is not in the canonical form".to_owned());
        }
        Ok(manifest)
    }

    /// Reads a manifest object that must have the name `id`.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn decode_named(object: &[u8], id: ManifestId) -> Result<Self, String> {
        let name = Hash::of(object);
        if name != id.0 {
            return Err(format!("its content has the name {name}"));
        }
        Self::decode(object)
    }
}

fn decode_header(object: &[u8]) -> Result<&[u8], String> {
    let (header, body) = ManifestHeader::ref_from_prefix(object)
        .map_err(|_size| format!("{} bytes are no manifest", object.len()))?;
    if header.magic != MANIFEST_MAGIC {
        return Err("no manifest (wrong first bytes)".to_owned());
    }
    if header.version.get() != MANIFEST_VERSION {
        return Err(format!("a manifest of version {}", header.version));
    }
    if header.flags.get() != 0 || header.reserved != [0; 8] {
        return Err("a manifest with unknown flags".to_owned());
    }
    if header.body_bytes.get() != body.len() as u64 || body.len() as u64 > BODY_BYTES_MAX {
        return Err(format!(
            "a body of {} bytes where {} were announced, at most {BODY_BYTES_MAX}",
            body.len(),
            header.body_bytes
        ));
    }
    if Hash::of(body).as_bytes() != &header.body_hash {
        return Err("a body with a wrong checksum".to_owned());
    }
    Ok(body)
}

/// The value with all object keys in order, whatever order the map type keeps.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().collect();
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            Value::Object(entries.into_iter().map(|(k, v)| (k, sorted(v))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tree::ChunkSize;

    pub(crate) fn manifest() -> Manifest {
        let tree = TreeRef {
            root: Hash::of(b"root"),
            length_bytes: 1 << 20,
            chunk_size: ChunkSize::DISK,
        };
        Manifest {
            role: Role::Checkpoint,
            name: Some("before the upgrade".to_owned()),
            created: "2025-01-02T03:04:05Z".parse().expect("time"),
            kind: Kind::Full,
            crash_consistent: false,
            lineage: Lineage::default(),
            producer: Producer {
                qemu_version: Some("10.0.2".to_owned()),
                machine_type: "pc-q35-10.0".to_owned(),
                cpu_model: "max".to_owned(),
                accelerator: "tcg".to_owned(),
                cpus: 2,
                memory_bytes: 1 << 30,
                kernel_command_line: None,
            },
            disks: vec![Disk {
                id: "root".to_owned(),
                tree,
                virtual_size_bytes: 1 << 20,
            }],
            ram: Some(tree),
            device_state: Some(BlobRef(tree)),
            kernel: None,
            initrd: None,
            machine: serde_json::json!({"z": 1, "a": {"y": [1, 2], "b": "text"}}),
        }
    }

    #[test]
    fn a_manifest_reads_back_as_it_was_written() {
        let object = manifest().encode().expect("encode");
        let id = ManifestId(Hash::of(&object));
        assert_eq!(Manifest::decode_named(&object, id), Ok(manifest()));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let object = manifest().encode().expect("encode");
        let id = ManifestId(Hash::of(&object));
        for at in 0..object.len() {
            let mut changed = object.clone();
            changed[at] ^= 0x10;
            assert!(Manifest::decode_named(&changed, id).is_err());
            assert!(Manifest::decode(&changed).is_err(), "byte {at}");
            assert!(Manifest::decode(&object[..at]).is_err(), "{at} bytes");
        }
    }

    fn reseal(body: &[u8]) -> Vec<u8> {
        let header = ManifestHeader {
            magic: MANIFEST_MAGIC,
            version: U32::new(MANIFEST_VERSION),
            flags: U32::ZERO,
            body_bytes: U64::new(body.len() as u64),
            body_hash: *Hash::of(body).as_bytes(),
            reserved: [0; 8],
        };
        [header.as_bytes(), body].concat()
    }

    #[test]
    fn an_edited_body_with_a_right_checksum_is_refused_where_it_is_not_canonical_or_contradicts() {
        let object = manifest().encode().expect("encode");
        let body = String::from_utf8(object[64..].to_vec()).expect("text");
        assert!(Manifest::decode(&reseal(body.as_bytes())).is_ok());
        for (from, to) in [
            ("\"cpus\":2", "\"cpus\": 2"),
            ("{\"role\"", "{\"unknown\":1,\"role\""),
            (
                "\"virtual_size_bytes\":1048576",
                "\"virtual_size_bytes\":1048577",
            ),
            ("\"chunk_size\":65536", "\"chunk_size\":65537"),
            ("\"kind\":\"full\"", "\"kind\":\"half\""),
            ("\"device_state\":{", "\"device_state\":null,\"x\":{"),
            (
                "\"length_bytes\":1048576",
                "\"length_bytes\":18446744073709551615",
            ),
        ] {
            let edited = body.replacen(from, to, 1);
            assert_ne!(edited, body, "{from} is there");
            assert!(
                Manifest::decode(&reseal(edited.as_bytes())).is_err(),
                "{to}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_body_is_a_manifest_or_an_error(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            assert!(Manifest::decode(&body).is_err());
            assert!(Manifest::decode(&reseal(&body)).is_err());
        }
    }
}
