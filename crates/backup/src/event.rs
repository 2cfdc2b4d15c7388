//! What a caller sees and decides while a backup runs.

use std::fmt;

/// A step of a backup or a restore, told when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The disk and its bitmaps are read and everything decided.
    Plan,
    /// QEMU copies a running disk.
    Stage,
    /// The content is written.
    Copy,
    /// What was written is read back.
    Prove,
    /// The hashes of the content are written.
    Hashes,
    /// The record is written: from here on there is a backup.
    Record,
    /// The new bitmap takes the place of the old one.
    Bitmap,
    /// The restored disk gets its name.
    Publish,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plan => "plan",
            Self::Stage => "let QEMU copy",
            Self::Copy => "copy",
            Self::Prove => "read back",
            Self::Hashes => "write the hashes",
            Self::Record => "record",
            Self::Bitmap => "begin the next bitmap",
            Self::Publish => "publish",
        })
    }
}

/// Something that is told.
pub type Event = stead_qcow2::Event<Step>;

/// Where events go, and where a wish to stop comes from.
pub type Watch<'a> = stead_qcow2::Watch<'a, Step>;
