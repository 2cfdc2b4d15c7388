//! What a caller sees and decides while a merge runs.

use std::fmt;
use std::path::PathBuf;

/// A step of a merge, told when it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The chain is read and everything decided.
    Plan,
    /// A device is extended.
    Extend,
    /// What is going to be done is written down.
    Record,
    /// The lowest layer is copied, to be the new one.
    Copy,
    /// Data and bitmaps go into the base.
    Commit,
    /// The bitmaps are made in the base, in QEMU.
    Bitmaps,
    /// QEMU lets the layer above name the base.
    Finalize,
    /// The base is read back.
    Prove,
    /// A bitmap that broke is removed from a layer above.
    Void(PathBuf),
    /// The layer above names the base.
    Rewire(PathBuf),
    /// A merged layer is removed.
    Remove(PathBuf),
    /// The record is removed.
    Finish,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plan => write!(f, "plan"),
            Self::Extend => write!(f, "extend the device"),
            Self::Record => write!(f, "record"),
            Self::Copy => write!(f, "copy"),
            Self::Commit => write!(f, "commit"),
            Self::Bitmaps => write!(f, "bitmaps"),
            Self::Finalize => write!(f, "finalize"),
            Self::Prove => write!(f, "prove"),
            Self::Void(path) => write!(f, "remove broken bitmaps from {}", path.display()),
            Self::Rewire(path) => write!(f, "rewire {}", path.display()),
            Self::Remove(path) => write!(f, "remove {}", path.display()),
            Self::Finish => write!(f, "finish"),
        }
    }
}

/// Something that is told.
pub type Event = stead_qcow2::Event<Step>;

/// Where events go, and where a wish to stop comes from.
pub type Watch<'a> = stead_qcow2::Watch<'a, Step>;
