//! Checking an image: every reference to a cluster against its refcount, and that nothing overlaps.
//!
//! # How
//! All tables are walked and references counted per cluster, then held against the refcounts. Each L2
//! table is read once, however many internal snapshots share it. Counts are kept for a window of clusters
//! that fits 64 MiB ([`crate::counts`]); where an image needs more, the walk is made again for the next window. So
//! memory is bounded, and time grows with the file's metadata.
//!
//! # What it finds that `qemu-img check` does not
//! Overlaps that the refcounts agree with (an L2 table that is also guest data, with refcount 2), and
//! guest data that is cut off by the end of the file; bitmaps that do not fit the disk; and what
//! [`crate::consistency`] looks for.

mod references;

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::bitmap_read::TableEntry;
use crate::consistency::{self, Note};
use crate::counts::{Counts, PAGE_CLUSTERS, Page, State};
use crate::directory::{InternalSnapshot, StoredBitmap};
use crate::entry::{L1Entry, L2Entry, SUBCLUSTERS, Standard};
use crate::error::{Error, Result};
use crate::header::{Encryption, to_u64, to_usize};
use crate::layer::Layer;
use crate::refcounts::{self, Refcounts};
use crate::units::HostOffset;

pub(crate) use references::{References, for_each_reference, unusable_bitmaps};

/// How many findings are kept in full; all are counted.
pub const MAX_FINDINGS: usize = 1000;
/// The most L2 tables of one image, with those of internal snapshots.
const MAX_L2_TABLES: usize = 8 << 20;

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

const USES: [Use; 13] = [
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
    const fn bit(self) -> u16 {
        1 << self as u16
    }

    fn is_of_bitmaps(self) -> bool {
        matches!(
            self,
            Self::BitmapDirectory | Self::BitmapTable | Self::BitmapData
        )
    }
}

/// The active tables say that the refcount is one.
const SAID_ONE: u16 = 1 << 14;
/// The active tables say that the refcount is not one.
const SAID_NOT_ONE: u16 = 1 << 15;
const USE_BITS: u16 = (1 << USES.len()) - 1;
/// What a cluster may be referenced for more than once.
const SHARED_BITS: u16 = Use::L2Table.bit() | Use::Data.bit() | Use::Compressed.bit();

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

/// Checks an image; nothing is written.
///
/// # Errors
/// When the file cannot be read, or has more than 8 388 608 L2 tables. What is wrong in the image is
/// in the report; only what [`Layer::open`] refuses does not get here.
pub fn check(layer: &Layer) -> Result<CheckReport> {
    let mut report = CheckReport {
        marked_dirty: layer.header().dirty,
        marked_corrupt: layer.header().corrupt,
        file_clusters: layer.cluster_size().count_for(layer.file_length()),
        ..CheckReport::default()
    };
    let image = Image::read(layer, &mut report)?;
    look_around(&image, &mut report)?;
    each_window(&image, &mut report, |counts, report| {
        compare(&image, counts, report)
    })?;
    Ok(report)
}

/// Walks an image window by window, as many clusters at a time as fit the memory, and gives the counts of each.
fn each_window(
    image: &Image<'_>,
    report: &mut CheckReport,
    mut each: impl FnMut(&Counts, &mut CheckReport) -> Result<()>,
) -> Result<()> {
    let mut start = 0;
    loop {
        let mut walk = Walk {
            image,
            counts: Counts::new(start),
            report: &mut *report,
            first: start == 0,
            follows: None,
        };
        walk.all()?;
        let counts = walk.counts;
        each(&counts, report)?;
        start = counts.end;
        if start >= image.file_clusters() {
            return Ok(());
        }
    }
}

/// What no refcount shows.
fn look_around(image: &Image<'_>, report: &mut CheckReport) -> Result<()> {
    let layer = image.layer;
    consistency::flags(layer, &mut report.notes);
    for reason in consistency::bitmaps(layer, &image.bitmaps, &mut report.notes)? {
        unusable(report, Use::BitmapTable, reason);
    }
    for snapshot in &image.snapshots {
        // What can be said of it as a whole: its length, and that it has no table twice.
        usable(report, Use::SnapshotL1Table, layer.view_of(snapshot))?;
    }
    let tables = image.l2_tables.len();
    consistency::hollowed(layer, &image.snapshots, tables, &mut report.notes)
}

/// The parts of an image that are small enough to keep, without what cannot be walked.
struct Image<'a> {
    layer: &'a Layer,
    snapshots: Vec<InternalSnapshot>,
    bitmaps: Vec<StoredBitmap>,
    refcount_blocks: Vec<Option<HostOffset>>,
    /// Each L2 table once, in order: how often it is referenced, and whether from the active L1 table.
    l2_tables: Vec<L2Table>,
    /// Tables and directories: place, length, use.
    regions: Vec<(HostOffset, u64, Use)>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct L2Table {
    at: HostOffset,
    references: u32,
    active: Option<ActiveTable>,
}

/// Where the active L1 table has the L2 table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ActiveTable {
    index: u32,
    copied: bool,
}

impl<'a> Image<'a> {
    fn read(layer: &'a Layer, report: &mut CheckReport) -> Result<Self> {
        let header = layer.header();
        let size = header.cluster_size.bytes();
        let table_bytes = u64::from(header.refcount_table_clusters) * size;
        let mut image = Self {
            layer,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            refcount_blocks: Vec::new(),
            l2_tables: Vec::new(),
            regions: vec![
                (HostOffset(0), size, Use::Header),
                (
                    header.l1_table,
                    u64::from(header.l1_entries) * 8,
                    Use::L1Table,
                ),
                (header.refcount_table, table_bytes, Use::RefcountTable),
            ],
        };
        image.read_encryption(report);
        image.read_refcount_table(report)?;
        image.read_directories(report)?;
        image.drop_overlapping_tables(report);
        image.read_l1_tables(report)?;
        Ok(image)
    }

    fn leave_out_bitmaps(&mut self, tables: &[HostOffset]) {
        let stays = |at: &HostOffset| !tables.contains(at);
        self.bitmaps.retain(|bitmap| stays(&bitmap.table));
        self.regions
            .retain(|(at, _, usage)| *usage != Use::BitmapTable || stays(at));
    }

    fn file_clusters(&self) -> u64 {
        self.layer
            .cluster_size()
            .count_for(self.layer.file_length())
    }

    fn read_encryption(&mut self, report: &mut CheckReport) {
        let Some(Encryption::Luks {
            header,
            header_bytes,
        }) = self.layer.header().encryption
        else {
            return;
        };
        match self.place("the encryption header", header, header_bytes) {
            Ok(()) => self
                .regions
                .push((header, header_bytes, Use::EncryptionHeader)),
            Err(error) => unusable(report, Use::EncryptionHeader, error.to_string()),
        }
    }

    /// The last cluster of the table may be cut off by the end of the file; then zeros follow.
    fn read_refcount_table(&mut self, report: &mut CheckReport) -> Result<()> {
        let header = self.layer.header();
        let length = u64::from(header.refcount_table_clusters) * header.cluster_size.bytes();
        let there = self
            .layer
            .file_length()
            .saturating_sub(header.refcount_table.0);
        let words = to_usize(length.min(there) / 8);
        let file = self.layer.file();
        let table = file.read_words("the refcount table", header.refcount_table, words)?;
        self.refcount_blocks = vec![None; table.len()];
        let mut known = BTreeMap::new();
        for (index, word) in table.into_iter().enumerate() {
            match refcounts::TableEntry::decode(word) {
                refcounts::TableEntry::None => {}
                refcounts::TableEntry::Reserved => {
                    let reason = format!("entry {index} of the refcount table is {word:#x}");
                    unusable(report, Use::RefcountBlock, reason);
                }
                refcounts::TableEntry::Block(at) => {
                    let place = self.place("a refcount block", at, header.cluster_size.bytes());
                    if let Err(error) = place {
                        unusable(report, Use::RefcountBlock, error.to_string());
                    } else if let Some(other) = known.insert(at, index) {
                        let reason = format!(
                            "entries {other} and {index} of the refcount table both say {at}"
                        );
                        unusable(report, Use::RefcountBlock, reason);
                    } else {
                        self.refcount_blocks[index] = Some(at);
                    }
                }
            }
        }
        Ok(())
    }

    fn read_directories(&mut self, report: &mut CheckReport) -> Result<()> {
        let header = self.layer.header();
        if let Some(found) = usable(report, Use::SnapshotTable, self.layer.snapshot_directory())? {
            if header.internal_snapshots > 0 {
                let region = (header.snapshot_table, found.length, Use::SnapshotTable);
                self.regions.push(region);
            }
            self.snapshots = found.entries;
        }
        let bitmaps = self.layer.bitmap_directory();
        if let Some(found) = usable(report, Use::BitmapDirectory, bitmaps)? {
            if let Some(place) = header.bitmaps.filter(|_| header.bitmaps_consistent()) {
                let region = (place.directory, found.length, Use::BitmapDirectory);
                self.regions.push(region);
            }
            self.bitmaps = found.entries;
        }
        Ok(())
    }

    /// Tables that cannot be read, or lie over another table, are reported here and not walked. So the
    /// tables that are walked are together no longer than the file.
    fn drop_overlapping_tables(&mut self, report: &mut CheckReport) {
        let mut taken = Regions::default();
        for (at, length, _) in &self.regions {
            taken.take(*at, *length);
        }
        let layer = self.layer;
        let mut good = |at: HostOffset, length: u64, usage: Use| {
            let placed = require_place(layer, "a table", at, length);
            if let Err(error) = placed {
                unusable(report, usage, error.to_string());
                return false;
            }
            if !taken.take(at, length) {
                let reason = format!("the table at {at} with {length} bytes lies over another");
                unusable(report, usage, reason);
                return false;
            }
            true
        };
        self.snapshots
            .retain(|entry| good(entry.l1_table, entry.l1_bytes(), Use::SnapshotL1Table));
        self.bitmaps
            .retain(|entry| good(entry.table, entry.table_bytes(), Use::BitmapTable));
        let l1 = |s: &InternalSnapshot| (s.l1_table, s.l1_bytes(), Use::SnapshotL1Table);
        self.regions.extend(self.snapshots.iter().map(l1));
        let table = |b: &StoredBitmap| (b.table, b.table_bytes(), Use::BitmapTable);
        self.regions.extend(self.bitmaps.iter().map(table));
    }

    fn place(&self, what: &'static str, at: HostOffset, length: u64) -> Result<()> {
        require_place(self.layer, what, at, length)
    }

    fn read_l1_tables(&mut self, report: &mut CheckReport) -> Result<()> {
        let mut tables: Vec<L2Table> = Vec::new();
        let active = self.layer.active_l1().iter().enumerate();
        for (index, word) in active {
            // The layer was opened, so its own entries are valid.
            if let Ok(Some(entry)) = L1Entry::decode(*word) {
                let index = u32::try_from(index).unwrap_or(u32::MAX);
                let copied = entry.copied;
                tables.push(L2Table {
                    at: entry.table,
                    references: 1,
                    active: Some(ActiveTable { index, copied }),
                });
            }
        }
        for snapshot in &self.snapshots {
            let count = to_usize(u64::from(snapshot.l1_entries));
            let what = "the L1 table of an internal snapshot";
            let words = self
                .layer
                .file()
                .read_words(what, snapshot.l1_table, count)?;
            for word in words {
                tables.extend(self.snapshot_l2_table(word, report));
            }
            tables = merged(tables);
            if tables.len() > MAX_L2_TABLES {
                return Err(Error::InvalidField {
                    path: self.layer.path().to_owned(),
                    field: "number of L2 tables",
                    found: to_u64(tables.len()),
                    expected: format!("at most {MAX_L2_TABLES}"),
                });
            }
        }
        self.l2_tables = merged(tables);
        Ok(())
    }

    fn snapshot_l2_table(&self, word: u64, report: &mut CheckReport) -> Option<L2Table> {
        let reason = match L1Entry::decode(word) {
            Ok(None) => return None,
            Err(reason) => format!("an L1 entry of an internal snapshot is {word:#x}: {reason}"),
            Ok(Some(entry)) => {
                let length = self.layer.cluster_size().bytes();
                match self.place("an L2 table", entry.table, length) {
                    Err(error) => error.to_string(),
                    Ok(()) => {
                        return Some(L2Table {
                            at: entry.table,
                            references: 1,
                            active: None,
                        });
                    }
                }
            }
        };
        unusable(report, Use::L2Table, reason);
        None
    }
}

/// Each table once, with the sum of its references.
fn merged(mut tables: Vec<L2Table>) -> Vec<L2Table> {
    tables.sort_unstable();
    tables.dedup_by(|next, kept| {
        let same = next.at == kept.at;
        if same {
            kept.references = kept.references.saturating_add(next.references);
            kept.active = kept.active.or(next.active);
        }
        same
    });
    tables
}

fn unusable(report: &mut CheckReport, usage: Use, reason: String) {
    report.add(Finding::Unusable { usage, reason });
}

/// A wrong content becomes a finding; a file that cannot be read stays an error.
fn usable<T>(report: &mut CheckReport, usage: Use, found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error @ Error::Io { .. }) => Err(error),
        Err(error) => {
            unusable(report, usage, error.to_string());
            Ok(None)
        }
    }
}

fn require_place(layer: &Layer, what: &'static str, at: HostOffset, length: u64) -> Result<()> {
    if layer.cluster_size().offset_in(at.0) != 0 {
        return Err(Error::Unaligned {
            path: layer.path().to_owned(),
            what,
            at,
        });
    }
    layer.file().require(what, at, length)
}

/// Ranges of the file that do not overlap.
#[derive(Default)]
struct Regions {
    ends: BTreeMap<u64, u64>,
}

impl Regions {
    /// Takes a range; `false` when a part of it is taken already.
    fn take(&mut self, at: HostOffset, length: u64) -> bool {
        let end = at.0.saturating_add(length);
        let before = self.ends.range(..end).next_back();
        if length > 0 && before.is_some_and(|(_, taken)| *taken > at.0) {
            return false;
        }
        self.ends.insert(at.0, end);
        true
    }
}

/// One walk over all tables.
struct Walk<'a> {
    image: &'a Image<'a>,
    counts: Counts,
    report: &'a mut CheckReport,
    /// Only the first walk reports and counts what it sees on its way.
    first: bool,
    /// Where the next cluster of the L2 table lies if it follows on the one before.
    follows: Option<HostOffset>,
}

impl Walk<'_> {
    fn all(&mut self) -> Result<()> {
        let image = self.image;
        for (at, length, usage) in &image.regions {
            self.count(*at, *length, 1, usage.bit());
        }
        let size = image.layer.cluster_size().bytes();
        for block in image.refcount_blocks.iter().flatten() {
            self.count(*block, size, 1, Use::RefcountBlock.bit());
        }
        for table in &image.l2_tables {
            self.l2_table(table)?;
        }
        for bitmap in &image.bitmaps {
            self.bitmap(bitmap)?;
        }
        Ok(())
    }

    fn count(&mut self, at: HostOffset, length: u64, references: u32, marks: u16) {
        let bits = self.image.layer.cluster_size().bits();
        if length == 0 {
            return;
        }
        let (first, last) = (at.0 >> bits, (at.0 + length - 1) >> bits);
        self.counts.add(first, last - first + 1, references, marks);
    }

    fn report(&mut self, usage: Use, reason: impl FnOnce() -> String) {
        if self.first {
            unusable(self.report, usage, reason());
        }
    }

    fn l2_table(&mut self, table: &L2Table) -> Result<()> {
        let header = self.image.layer.header();
        let marks = table.active.map_or(0, |active| said(active.copied));
        self.follows = None;
        let size = header.cluster_size.bytes();
        self.count(table.at, size, table.references, Use::L2Table.bit() | marks);
        let words = to_usize(header.cluster_size.words());
        let file = self.image.layer.file();
        let words = file.read_words("an L2 table", table.at, words)?;
        let step = if header.extended_l2 { 2 } else { 1 };
        let mut index = 0;
        while index < words.len() / step {
            let entry = &words[index * step..];
            let run = if step == 1 {
                self.data_run(table, entry)
            } else {
                0
            };
            let bitmap = if step == 2 { entry[1] } else { 0 };
            if run == 0 && (entry[0] != 0 || bitmap != 0) {
                self.l2_entry(table, to_u64(index), entry[0], bitmap);
            }
            index += run.max(1);
        }
        Ok(())
    }

    /// Counts entries of plain data that lie one after the other in the file, all at once, and says how
    /// many there are; 0 where the first is something else, or anything is wrong with it.
    fn data_run(&mut self, table: &L2Table, words: &[u64]) -> usize {
        let header = self.image.layer.header();
        let size = header.cluster_size.bytes();
        let Ok(L2Entry::Whole {
            state: Standard::Data,
            host: Some(host),
            copied,
        }) = L2Entry::decode(header, words[0], 0)
        else {
            return 0;
        };
        if header.external_data.is_some() || header.cluster_size.offset_in(host.0) != 0 {
            return 0;
        }
        // An entry is an offset and a flag, so the next cluster's entry is larger by its size.
        let file_end = self.image.layer.file_length();
        let most = file_end.saturating_sub(host.0) / size;
        let follows = |(count, word): &(u64, &u64)| {
            *count < most && Some(**word) == words[0].checked_add(count * size)
        };
        let run = (0..).zip(words).take_while(follows).count();
        if run > 0 {
            let marks = table.active.map_or(0, |_| said(copied)) | Use::Data.bit();
            self.count(host, to_u64(run) * size, table.references, marks);
            self.note_guest_clusters(table, host, to_u64(run));
        }
        run
    }

    fn l2_entry(&mut self, table: &L2Table, index: u64, word: u64, bitmap: u64) {
        let header = self.image.layer.header();
        let place = || format!("entry {index} of the L2 table at {} is {word:#x}", table.at);
        match L2Entry::decode(header, word, bitmap) {
            Err(reason) => self.report(Use::Data, || format!("{}: {reason}", place())),
            Ok(L2Entry::Compressed(cluster)) => {
                let start = cluster.host.0 & !511;
                let length = cluster.host.0 + cluster.max_length - start;
                if start >= self.image.layer.file_length() {
                    self.report(Use::Compressed, || format!("{}, out of the file", place()));
                    return;
                }
                self.note_compressed_cluster(table);
                let marks = Use::Compressed.bit();
                self.count_in_file(HostOffset(start), length, table.references, marks);
            }
            Ok(L2Entry::Whole {
                state,
                host: Some(host),
                copied,
            }) => {
                let whole = header.cluster_size.bytes();
                let needed = if state == Standard::Data { whole } else { 0 };
                self.data(table, index, word, (host, copied, needed));
            }
            Ok(L2Entry::Sub {
                bitmap,
                host: Some(host),
                copied,
            }) => {
                let sub = header.cluster_size.bytes() / SUBCLUSTERS;
                let needed = bitmap.data_end() * sub;
                self.data(table, index, word, (host, copied, needed));
            }
            Ok(L2Entry::Whole { host: None, .. } | L2Entry::Sub { host: None, .. }) => {}
        }
    }

    fn data(&mut self, table: &L2Table, index: u64, word: u64, data: (HostOffset, bool, u64)) {
        let (host, copied, needed) = data;
        if self.image.layer.header().external_data.is_some() {
            return self.external_data(table, index, word, (host, needed));
        }
        let needed = needed.min(self.guest_bytes(table, index)).max(1);
        let placed = require_place(self.image.layer, "guest data", host, needed);
        if let Err(error) = placed {
            self.report(Use::Data, || {
                let at = table.at;
                format!("entry {index} of the L2 table at {at} is {word:#x}: {error}")
            });
            return;
        }
        self.note_guest_clusters(table, host, 1);
        let marks = table.active.map_or(0, |_| said(copied)) | Use::Data.bit();
        let size = self.image.layer.cluster_size().bytes();
        self.count(host, size, table.references, marks);
    }

    /// A cluster in the data file has no refcount; it lies where the guest sees it.
    fn external_data(&mut self, table: &L2Table, index: u64, word: u64, data: (HostOffset, u64)) {
        let (host, needed) = data;
        self.note_guest_clusters(table, host, 1);
        let guest = table
            .active
            .map(|active| guest_start(self.image.layer, active, index));
        let problem = if guest.is_some_and(|guest| guest != host.0) {
            Some("it does not lie where the guest sees it".to_owned())
        } else {
            let needed = needed.min(self.guest_bytes(table, index));
            let file = self.image.layer.external_data();
            file.and_then(|file| file.require("guest data", host, needed).err())
                .map(|error| error.to_string())
        };
        if let Some(problem) = problem {
            self.report(Use::Data, || {
                let at = table.at;
                format!("entry {index} of the L2 table at {at} is {word:#x}: {problem}")
            });
        }
    }

    /// How many bytes of the cluster the guest can see; 0 where that is not known.
    fn guest_bytes(&self, table: &L2Table, index: u64) -> u64 {
        let header = self.image.layer.header();
        let Some(active) = table.active else { return 0 };
        let start = guest_start(self.image.layer, active, index);
        header.virtual_size.saturating_sub(start)
    }

    /// The sectors of compressed data may go on behind the end of the file, but no cluster is there.
    fn count_in_file(&mut self, at: HostOffset, length: u64, references: u32, marks: u16) {
        let size = self.image.layer.cluster_size().bytes();
        let file_end = self.image.file_clusters() * size;
        let end = (at.0 + length).min(file_end);
        self.count(at, end - at.0, references, marks);
    }

    /// `count` clusters lie in the file from `host` on.
    fn note_guest_clusters(&mut self, table: &L2Table, host: HostOffset, count: u64) {
        if !self.first || table.active.is_none() {
            return;
        }
        self.report.guest_clusters += count;
        let apart = self.follows.is_some_and(|next| next != host);
        self.report.fragmented_clusters += u64::from(apart);
        let length = count.saturating_mul(self.image.layer.cluster_size().bytes());
        self.follows = Some(HostOffset(host.0.saturating_add(length)));
    }

    fn note_compressed_cluster(&mut self, table: &L2Table) {
        if self.first && table.active.is_some() {
            self.report.guest_clusters += 1;
            self.report.compressed_clusters += 1;
            self.report.fragmented_clusters += 1;
        }
    }

    fn bitmap(&mut self, bitmap: &StoredBitmap) -> Result<()> {
        let layer = self.image.layer;
        layer.for_each_entry(bitmap, |_, word| {
            self.bitmap_entry(word);
            Ok(())
        })
    }

    fn bitmap_entry(&mut self, word: u64) {
        let size = self.image.layer.cluster_size().bytes();
        match TableEntry::decode(word) {
            Some(TableEntry::Clear | TableEntry::Full) => {}
            Some(TableEntry::Stored(at)) => {
                match require_place(self.image.layer, "the bits of a bitmap", at, 1) {
                    Ok(()) => self.count(at, size, 1, Use::BitmapData.bit()),
                    Err(error) => self.report(Use::BitmapData, || error.to_string()),
                }
            }
            None => self.report(Use::BitmapData, || {
                format!("a bitmap table entry is {word:#x}")
            }),
        }
    }
}

/// Where the guest sees entry `index` of an active L2 table.
fn guest_start(layer: &Layer, table: ActiveTable, index: u64) -> u64 {
    let header = layer.header();
    u64::from(table.index)
        .saturating_mul(header.l2_coverage())
        .saturating_add(index << header.cluster_size.bits())
}

fn said(copied: bool) -> u16 {
    if copied { SAID_ONE } else { SAID_NOT_ONE }
}

/// Holds the references of a window against the refcounts, page by page.
fn compare(image: &Image<'_>, counts: &Counts, report: &mut CheckReport) -> Result<()> {
    let mut refcounts = Refcounts::new(image.layer, image.refcount_blocks.clone());
    let mut at = counts.start;
    loop {
        let next = [counts.next_page(at), refcounts.next_block(at)];
        let Some(next) = next.into_iter().flatten().min() else {
            return Ok(());
        };
        let first = next / PAGE_CLUSTERS * PAGE_CLUSTERS;
        if first >= counts.end {
            return Ok(());
        }
        compare_page(image, first, counts.page(first), &mut refcounts, report)?;
        at = first.saturating_add(PAGE_CLUSTERS);
    }
}

/// One page; most are alike throughout, in references and refcounts.
fn compare_page(
    image: &Image<'_>,
    first: u64,
    page: Option<&Page>,
    refcounts: &mut Refcounts<'_>,
    report: &mut CheckReport,
) -> Result<()> {
    let bits = image.layer.cluster_size().bits();
    let none = Page::Alike(State::default());
    let page = page.unwrap_or(&none);
    if let Page::Alike(state) = page
        && refcounts.alike(first, PAGE_CLUSTERS)? == Some(u64::from(state.references))
        && !is_wrong(*state, u64::from(state.references))
    {
        if state.references > 0 {
            report.used_clusters += PAGE_CLUSTERS;
            report.image_end = HostOffset((first + PAGE_CLUSTERS) << bits);
        }
        return Ok(());
    }
    for index in 0..PAGE_CLUSTERS {
        let cluster = first + index;
        let state = page.get(to_usize(index));
        let refcount = refcounts.get(cluster)?;
        let place = HostOffset(cluster << bits);
        if state.references > 0 {
            report.used_clusters += 1;
            report.image_end = HostOffset((cluster + 1) << bits);
            compare_one(report, place, refcount, u64::from(state.references));
            compare_marks(report, place, refcount, state);
        } else if cluster < image.file_clusters() {
            compare_one(report, place, refcount, 0);
        }
    }
    Ok(())
}

fn compare_one(report: &mut CheckReport, cluster: HostOffset, refcount: u64, references: u64) {
    match refcount.cmp(&references) {
        std::cmp::Ordering::Equal => {}
        std::cmp::Ordering::Greater => report.add(Finding::Leak {
            cluster,
            refcount,
            references,
        }),
        std::cmp::Ordering::Less => report.add(Finding::RefcountTooLow {
            cluster,
            refcount,
            references,
        }),
    }
}

/// Uses that exclude each other.
fn overlaps(state: State) -> bool {
    let uses = state.marks & USE_BITS;
    uses.count_ones() > 1 || (state.references > 1 && uses & !SHARED_BITS != 0)
}

/// The active tables say something else of the refcount.
fn wrongly_said(state: State, refcount: u64) -> bool {
    let wrong = if refcount == 1 {
        SAID_NOT_ONE
    } else {
        SAID_ONE
    };
    state.marks & wrong != 0
}

fn is_wrong(state: State, refcount: u64) -> bool {
    overlaps(state) || wrongly_said(state, refcount)
}

fn compare_marks(report: &mut CheckReport, cluster: HostOffset, refcount: u64, state: State) {
    if overlaps(state) {
        let used = |usage: &Use| state.marks & usage.bit() != 0;
        let uses = USES.into_iter().filter(used).collect();
        report.add(Finding::Overlap { cluster, uses });
    }
    if wrongly_said(state, refcount) {
        report.add(Finding::WrongCopiedFlag { cluster, refcount });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_that_overlap_in_any_way_are_not_taken() {
        let mut regions = Regions::default();
        assert!(regions.take(HostOffset(100), 10));
        for (at, length) in [(100, 10), (95, 6), (109, 1), (90, 100), (105, 2)] {
            assert!(!regions.take(HostOffset(at), length), "{at} {length}");
        }
        assert!(regions.take(HostOffset(110), 5));
        assert!(regions.take(HostOffset(90), 10));
    }
}
