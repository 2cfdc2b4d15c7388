//! The formats of image files that there are here, by name.

use std::fmt;

use stead_qcow2::LayerFormat;

/// A format that is read and written here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// The file's bytes are the disk's.
    Raw,
    /// A qcow2 image.
    Qcow2,
}

impl From<LayerFormat> for Format {
    fn from(format: LayerFormat) -> Self {
        match format {
            LayerFormat::Raw => Self::Raw,
            LayerFormat::Qcow2 => Self::Qcow2,
        }
    }
}

impl From<Format> for LayerFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
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
