//! The ways a payload can be stored.

/// How the payload is stored; the number stands in the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 0: the migration stream as it is.
    Raw,
    /// 1: gzip members.
    Gzip,
    /// 2: bzip2 streams.
    Bzip2,
    /// 3: xz streams.
    Xz,
    /// 4: an lzop file.
    Lzop,
    /// 5: zstd frames.
    Zstd,
    /// 6: QEMU's mapped-ram layout, pages at fixed places; not a stream.
    Sparse,
}

/// A format with its number, its name and what a payload of it starts with.
struct Known {
    format: Format,
    name: &'static str,
    magic: &'static [u8],
}

const fn known(format: Format, name: &'static str, magic: &'static [u8]) -> Known {
    Known {
        format,
        name,
        magic,
    }
}

/// In the order of their numbers.
const KNOWN: [Known; 7] = [
    known(Format::Raw, "raw", b"QEVM"),
    known(Format::Gzip, "gzip", b"\x1f\x8b"),
    known(Format::Bzip2, "bzip2", b"BZh"),
    known(Format::Xz, "xz", b"\xfd7zXZ\0"),
    known(Format::Lzop, "lzop", b"\x89LZO\0\r\n\x1a\n"),
    known(Format::Zstd, "zstd", b"\x28\xb5\x2f\xfd"),
    // The same beginning as a stream: only the header tells them apart.
    known(Format::Sparse, "sparse", b"QEVM"),
];

impl Format {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::Raw,
        Self::Gzip,
        Self::Bzip2,
        Self::Xz,
        Self::Lzop,
        Self::Zstd,
        Self::Sparse,
    ];

    /// The number in the header.
    #[must_use]
    pub fn number(self) -> u32 {
        self as u32
    }

    /// The format of a number in the header.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// The name, as in libvirt's configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        KNOWN[self as usize].name
    }

    /// The format of a name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let found = KNOWN.iter().find(|known| known.name == name);
        found.map(|known| known.format)
    }

    /// Whether the payload is a migration stream from its first byte to its last.
    #[must_use]
    pub fn is_stream(self) -> bool {
        self != Self::Sparse
    }

    /// How many bytes [`Format::of_payload`] wants to see.
    pub(crate) const MAGIC_BYTES: usize = 9;

    /// The format that a payload's first bytes are of. Sparse and raw begin alike and both are taken for raw.
    pub(crate) fn of_payload(start: &[u8]) -> Option<Self> {
        let found = KNOWN.iter().find(|known| start.starts_with(known.magic));
        found.map(|known| known.format)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_its_own_place_number_and_name() {
        for (number, format) in Format::ALL.into_iter().enumerate() {
            assert_eq!(format.number() as usize, number);
            assert_eq!(Format::from_number(number as u32), Some(format));
            assert_eq!(KNOWN[number].format, format);
            assert_eq!(Format::from_name(format.name()), Some(format));
            assert!(KNOWN[number].magic.len() <= Format::MAGIC_BYTES);
        }
        assert_eq!(Format::from_number(7), None);
        assert_eq!(Format::from_name("lzma"), None);
    }
}
