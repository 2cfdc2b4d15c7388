//! What a check finds, in words and in numbers.

use std::fmt;

use serde::Serialize;

use crate::consistency::Note;
use crate::units::HostOffset;

/// How many findings are kept in full; all are counted.
pub const MAX_FINDINGS: usize = 1000;

/// What a cluster is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Use {
    /// The header.
    Header,
    /// The active L1 table.
    L1Table,
    /// The L1 table of an internal snapshot.
    SnapshotL1Table,
    /// An L2 table.
    L2Table,
    /// Guest data (or room kept for it).
    Data,
    /// Compressed guest data.
    Compressed,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The table of internal snapshots.
    SnapshotTable,
    /// The bitmap directory.
    BitmapDirectory,
    /// The table of a bitmap.
    BitmapTable,
    /// The bits of a bitmap.
    BitmapData,
    /// The header of an encryption, with its keys.
    EncryptionHeader,
}

pub(super) const USES: [Use; 13] = [
    Use::Header,
    Use::L1Table,
    Use::SnapshotL1Table,
    Use::L2Table,
    Use::Data,
    Use::Compressed,
    Use::RefcountTable,
    Use::RefcountBlock,
    Use::SnapshotTable,
    Use::BitmapDirectory,
    Use::BitmapTable,
    Use::BitmapData,
    Use::EncryptionHeader,
];

impl Use {
    pub(super) const fn bit(self) -> u16 {
        1 << self as u16
    }

    fn is_of_bitmaps(self) -> bool {
        matches!(
            self,
            Self::BitmapDirectory | Self::BitmapTable | Self::BitmapData
        )
    }
}

/// Something wrong in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(
    tag = "finding",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
#[non_exhaustive]
pub enum Finding {
    /// The refcount is higher than the references: the room is lost, no data is.
    Leak {
        /// The cluster.
        cluster: HostOffset,
        /// Its refcount.
        refcount: u64,
        /// How often it is referenced.
        references: u64,
    },
    /// The refcount is lower than the references: a write could take the cluster for something else.
    RefcountTooLow {
        /// The cluster.
        cluster: HostOffset,
        /// Its refcount.
        refcount: u64,
        /// How often it is referenced.
        references: u64,
    },
    /// The cluster is used for things that exclude each other.
    Overlap {
        /// The cluster.
        cluster: HostOffset,
        /// What it is used for; once, if it is used twice for the same.
        uses: Vec<Use>,
    },
    /// An active table says that the refcount is one and it is not, or the other way round.
    WrongCopiedFlag {
        /// The cluster.
        cluster: HostOffset,
        /// Its refcount.
        refcount: u64,
    },
    /// Something is not where it can be read, or is not valid.
    Unusable {
        /// What it is used for.
        usage: Use,
        /// The reason, with the place.
        reason: String,
    },
    /// The disk below an image is not what the image recorded of it ([`crate::check_backing`]).
    BackingContent {
        /// The image.
        image: String,
        /// Its backing file, as the image names it.
        backing: String,
        /// The recorded length of the disk below, in bytes.
        recorded_length: u64,
        /// Its length now, in bytes; where it is the recorded one, bytes differ.
        length: u64,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leak {
                cluster,
                refcount,
                references,
            } => write!(
                f,
                "leak: the cluster at {cluster} has refcount {refcount} and {references} references"
            ),
            Self::RefcountTooLow {
                cluster,
                refcount,
                references,
            } => write!(
                f,
                "the cluster at {cluster} has refcount {refcount} but {references} references"
            ),
            Self::Overlap { cluster, uses } => {
                write!(f, "the cluster at {cluster} is used twice, for {uses:?}")
            }
            Self::WrongCopiedFlag { cluster, refcount } => write!(
                f,
                "the active tables' copied flag for {cluster} does not fit refcount {refcount}"
            ),
            Self::Unusable { usage, reason } => write!(f, "{usage:?}: {reason}"),
            Self::BackingContent {
                image,
                backing,
                recorded_length,
                length,
            } => {
                let what = if recorded_length == length {
                    "shows other bytes than".to_owned()
                } else {
                    format!("has {length} bytes and not {recorded_length} as")
                };
                write!(
                    f,
                    "backing file {backing:?} of {image} {what} when its content was recorded: what {image} takes \
                     from it is not what was written; bring the earlier file back, or, if it was changed on \
                     purpose, record it anew with a rebase"
                )
            }
        }
    }
}

/// What a check found; as JSON, too.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// How many findings besides leaks there are.
    pub corruptions: u64,
    /// How many clusters are leaked.
    pub leaks: u64,
    /// How many of the corruptions are [`Finding::Overlap`].
    #[serde(skip)]
    pub overlaps: u64,
    /// How many of the corruptions are [`Finding::Unusable`], those of bitmaps not counted.
    #[serde(skip)]
    pub unusable: u64,
    /// How many of the corruptions are [`Finding::Unusable`] and of bitmaps.
    #[serde(skip)]
    pub unusable_bitmaps: u64,
    /// The first [`MAX_FINDINGS`] findings.
    pub findings: Vec<Finding>,
    /// What no refcount shows and no reader stumbles over; see [`Note`].
    pub notes: Vec<Note>,
    /// Whether the image is marked dirty: its refcounts were not written when it was last used.
    pub marked_dirty: bool,
    /// Whether the image is marked corrupt.
    pub marked_corrupt: bool,
    /// Clusters of the file.
    pub file_clusters: u64,
    /// Clusters that something refers to.
    pub used_clusters: u64,
    /// Guest clusters of the active disk with data or room for data in the file.
    pub guest_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Those of the guest clusters that are compressed, or do not follow in the file on the cluster before
    /// them in their L2 table: what `qemu-img check` calls fragmented.
    pub fragmented_clusters: u64,
    /// Where the last used cluster ends.
    pub image_end: HostOffset,
    /// How many images had what lies below them compared with what they recorded of it
    /// ([`crate::check_backing`]).
    pub backing_compared: u64,
}

impl CheckReport {
    /// Nothing is wrong, not even a leak or a mark.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.is_safe() && self.leaks == 0 && !self.marked_dirty
    }

    /// The image can be read and written; at most room is lost (leaks, or refcounts to be rebuilt in a
    /// dirty image that are none the less high enough).
    #[must_use]
    pub fn is_safe(&self) -> bool {
        self.corruptions == 0 && !self.marked_corrupt
    }

    pub(crate) fn add(&mut self, finding: Finding) {
        match &finding {
            Finding::Leak { .. } => self.leaks += 1,
            Finding::RefcountTooLow { .. }
            | Finding::Overlap { .. }
            | Finding::WrongCopiedFlag { .. }
            | Finding::Unusable { .. }
            | Finding::BackingContent { .. } => self.corruptions += 1,
        }
        match &finding {
            Finding::Overlap { .. } => self.overlaps += 1,
            Finding::Unusable { usage, .. } if usage.is_of_bitmaps() => self.unusable_bitmaps += 1,
            Finding::Unusable { .. } => self.unusable += 1,
            Finding::Leak { .. }
            | Finding::RefcountTooLow { .. }
            | Finding::WrongCopiedFlag { .. }
            | Finding::BackingContent { .. } => {}
        }
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }
}
