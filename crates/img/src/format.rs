//! The formats of image files: which ones there are here, and which ones are refused by name.

use std::fmt;

/// A format that is read and written here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// The file's bytes are the disk's.
    Raw,
    /// A qcow2 image.
    Qcow2,
}

impl Format {
    /// The format of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a format that is not known here is told: where its mark stands, and the mark.
const FOREIGN: [(&str, usize, &[u8]); 11] = [
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
];

/// What the first bytes of a file say that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Probed {
    /// A format that is read here.
    Known(Format),
    /// One that is not.
    Foreign(&'static str),
}

/// How many bytes of a file are looked at to tell its format.
pub(crate) const PROBE_BYTES: usize = 512;

/// Tells the format from a file's first bytes; what bears no known mark is raw.
pub(crate) fn probe(first: &[u8]) -> Probed {
    let marked = |at: usize, mark: &[u8]| first.get(at..).is_some_and(|b| b.starts_with(mark));
    if let Some((name, _, _)) = FOREIGN.iter().find(|(_, at, mark)| marked(*at, mark)) {
        return Probed::Foreign(name);
    }
    if marked(0, b"QFI\xfb") {
        return Probed::Known(Format::Qcow2);
    }
    Probed::Known(Format::Raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_that_is_not_here_is_never_taken_for_a_raw_disk() {
        for (name, at, mark) in FOREIGN {
            let mut first = vec![0; PROBE_BYTES];
            first[at..at + mark.len()].copy_from_slice(mark);
            assert_eq!(probe(&first), Probed::Foreign(name));
        }
        assert_eq!(probe(b"QFI\xfb\0\0\0\x03"), Probed::Known(Format::Qcow2));
        assert_eq!(probe(b"QFI"), Probed::Known(Format::Raw));
        assert_eq!(probe(b""), Probed::Known(Format::Raw));
    }
}
