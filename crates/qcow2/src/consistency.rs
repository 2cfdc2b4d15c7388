//! What no refcount shows: bitmaps that do not fit their disk, flags that contradict each other, and
//! internal snapshots that may have been hollowed.
//!
//! # Hollowed internal snapshots
//! `qemu-img rebase -b ""` copies what an image needs from its backing file into the active state only. An
//! internal snapshot keeps its unallocated clusters, and once the backing file is gone from the header
//! they read as zeros: refcounts are right, and data is lost. What remains of it is this trace: there is no
//! backing file, and the active state has data where the internal snapshot has nothing. A guest that
//! writes to new places after the snapshot leaves the same trace, so it is reported as a *possible* loss. Where
//! nothing that both states have differs ([`Note::PossibleLoss::diverged_bytes`] is 0), the active state may
//! still be what the snapshot was.
//!
//! # Bounds
//! Pairs of tables that differ are read; at most four times as many as the image has L2 tables, and 4096.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use crate::bitmap::{Bitmap, table_entries};
use crate::bitmap_read::TableEntry;
use crate::control::Control;
use crate::directory::{InternalSnapshot, StoredBitmap};
use crate::entry::{L1Entry, L2Entry, SUBCLUSTERS, Standard};
use crate::error::Result;
use crate::header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, to_u64, to_usize};
use crate::layer::Layer;
use crate::units::HostOffset;

/// Something to know about an image whose structure is right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(
    tag = "note",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
#[non_exhaustive]
pub enum Note {
    /// The bitmap was not saved when the image was last used: it says nothing.
    BitmapInUse {
        /// The bitmap.
        name: String,
    },
    /// The bitmap is of a kind, or has flags, that are not known: it cannot be used.
    UnknownBitmap {
        /// The bitmap.
        name: String,
    },
    /// Bits behind the disk's end are set. They are dropped when the bitmap is read.
    BitmapTailBits {
        /// The bitmap.
        name: String,
    },
    /// There are bitmaps, but a program that does not know them wrote to the image: they say nothing, and
    /// their clusters are leaked.
    BitmapsNotTrusted {
        /// How many.
        count: u32,
    },
    /// The auto-clear bit of bitmaps is set, but there are none.
    NoBitmaps,
    /// The auto-clear bit of a raw data file is set, but guest data lies in the image.
    NoDataFile,
    /// What the image recorded of the disk below it is of a backing file with another name, and does not fit the one
    /// that it has now: a program that does not know the record gave the image another one.
    BackingRecordOutdated {
        /// The image.
        image: String,
    },
    /// The internal snapshot may have lost what it had from a backing file that was removed.
    PossibleLoss {
        /// The internal snapshot's identifier.
        id: String,
        /// Its name.
        name: String,
        /// Where the active state has data and the internal snapshot has nothing, in bytes.
        missing_bytes: u64,
        /// Where both have data, and not the same, in bytes.
        diverged_bytes: u64,
        /// Not all tables were compared: there may be more.
        incomplete: bool,
    },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BitmapInUse { name } => write!(
                f,
                "the bitmap {name} is in use: it was not saved, so what changed is not known; \
                 remove it and make a full backup"
            ),
            Self::UnknownBitmap { name } => {
                write!(f, "the bitmap {name} is of a kind that is not known")
            }
            Self::BitmapTailBits { name } => write!(
                f,
                "the bitmap {name} has bits set behind the end of the disk, which are ignored"
            ),
            Self::BitmapsNotTrusted { count } => write!(
                f,
                "{count} bitmaps say nothing: a program that does not know bitmaps wrote to the image"
            ),
            Self::NoBitmaps => write!(f, "bitmaps are said to be consistent, but there are none"),
            Self::NoDataFile => write!(f, "a data file is said to be raw, but there is none"),
            Self::BackingRecordOutdated { image } => write!(
                f,
                "what {image} recorded of the disk below it is of an earlier backing file with another name, and does \
                 not fit this one; if the two were to show the same, the name is wrong, else record it anew with a \
                 rebase"
            ),
            Self::PossibleLoss {
                id,
                name,
                missing_bytes,
                diverged_bytes,
                incomplete,
            } => {
                let least = if *incomplete { "at least " } else { "" };
                write!(
                    f,
                    "possible loss: internal snapshot {id} ({name}) is zeros in {least}{missing_bytes} bytes \
                     where the active disk has data; if the image had a backing file that was removed by a \
                     flatten, they are lost there and the active disk may still have them ({diverged_bytes} \
                     bytes that both have are different)"
                )
            }
        }
    }
}

/// What the header's flags say that is not so.
pub(crate) fn flags(layer: &Layer, notes: &mut Vec<Note>) {
    let header = layer.header();
    let set = |bit| header.autoclear & bit != 0;
    match header.bitmaps {
        Some(bitmaps) if !set(AUTOCLEAR_BITMAPS) => notes.push(Note::BitmapsNotTrusted {
            count: bitmaps.count,
        }),
        None if set(AUTOCLEAR_BITMAPS) => notes.push(Note::NoBitmaps),
        Some(_) | None => {}
    }
    if set(AUTOCLEAR_RAW_DATA) && header.external_data.is_none() {
        notes.push(Note::NoDataFile);
    }
}

/// What is wrong with the bitmaps so that no program can use them, by text.
pub(crate) fn bitmaps(
    layer: &Layer,
    bitmaps: &[StoredBitmap],
    notes: &mut Vec<Note>,
) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let mut names = BTreeSet::new();
    for stored in bitmaps {
        let name = String::from_utf8_lossy(&stored.name).into_owned();
        if !names.insert(&stored.name) {
            wrong.push(format!("two bitmaps are called {name}"));
        }
        if stored.in_use {
            notes.push(Note::BitmapInUse { name: name.clone() });
        }
        if !stored.is_known() {
            notes.push(Note::UnknownBitmap { name });
        } else if let Some(reason) = unusable(layer, stored) {
            wrong.push(format!("bitmap {name}: {reason}"));
        } else if !stored.in_use && has_tail_bits(layer, stored)? {
            notes.push(Note::BitmapTailBits { name });
        }
    }
    Ok(wrong)
}

/// Whether a bitmap can be of this disk; one of an unknown kind may be.
pub(crate) fn is_usable(layer: &Layer, stored: &StoredBitmap) -> bool {
    !stored.is_known() || unusable(layer, stored).is_none()
}

/// Why the bitmap cannot be of this disk.
fn unusable(layer: &Layer, stored: &StoredBitmap) -> Option<String> {
    let disk = layer.header().virtual_size;
    if let Err(error) = Bitmap::new(&stored.name, stored.granularity_bits, disk) {
        return Some(error.to_string());
    }
    let needed = table_entries(disk, stored.granularity_bits, layer.cluster_size());
    let found = stored.table_entries;
    (u64::from(found) != needed)
        .then(|| format!("its table has {found} entries, and the disk needs {needed}"))
}

/// Whether the last cluster of bits, as it lies in the file, has bits behind the disk's end.
fn has_tail_bits(layer: &Layer, stored: &StoredBitmap) -> Result<bool> {
    let Some(last) = u64::from(stored.table_entries).checked_sub(1) else {
        return Ok(false);
    };
    let at = HostOffset(stored.table.0 + last * 8);
    let word = layer.file().read_words("the table of a bitmap", at, 1)?[0];
    let size = layer.cluster_size();
    let at = match TableEntry::decode(word) {
        Some(TableEntry::Stored(at)) => at,
        Some(TableEntry::Clear | TableEntry::Full) | None => return Ok(false),
    };
    if require(layer, at).is_err() {
        return Ok(false);
    }
    let mut bytes = vec![0; size.buffer_len()];
    layer.file().read("the bits of a bitmap", at, &mut bytes)?;
    let disk = layer.header().virtual_size;
    let mut bitmap = Bitmap::new(&stored.name, stored.granularity_bits, disk)?;
    Ok(bitmap.load_cluster(size, last, &bytes))
}

fn require(layer: &Layer, at: HostOffset) -> Result<()> {
    let size = layer.cluster_size();
    let start = HostOffset(size.start_of(at.0));
    layer.file().require("a cluster", start, size.bytes())
}

/// Looks for internal snapshots that may have been hollowed; `l2_tables` is how many L2 tables the image has.
pub(crate) fn hollowed(
    layer: &Layer,
    snapshots: &[InternalSnapshot],
    l2_tables: usize,
    control: &Control<'_>,
    notes: &mut Vec<Note>,
) -> Result<()> {
    if layer.header().backing.is_some() {
        return Ok(());
    }
    let mut left = l2_tables.saturating_mul(4) + 4096;
    for snapshot in snapshots {
        let found = compare_states(layer, snapshot, control, &mut left)?;
        if found.missing > 0 {
            notes.push(Note::PossibleLoss {
                id: String::from_utf8_lossy(&snapshot.id).into_owned(),
                name: String::from_utf8_lossy(&snapshot.name).into_owned(),
                missing_bytes: found.missing,
                diverged_bytes: found.diverged,
                incomplete: found.incomplete,
            });
        }
    }
    Ok(())
}

#[derive(Default)]
struct Compared {
    missing: u64,
    diverged: u64,
    incomplete: bool,
}

/// The disk of an internal snapshot against the active one, table by table.
fn compare_states(
    layer: &Layer,
    snapshot: &InternalSnapshot,
    control: &Control<'_>,
    left: &mut usize,
) -> Result<Compared> {
    let header = layer.header();
    let disk = snapshot.virtual_size.unwrap_or(header.virtual_size);
    let disk = disk.min(header.virtual_size);
    let tables = disk.div_ceil(header.l2_coverage());
    let count = u64::from(snapshot.l1_entries).min(tables);
    let what = "the L1 table of an internal snapshot";
    let theirs = layer
        .file()
        .read_words(what, snapshot.l1_table, to_usize(count))?;
    let mut found = Compared::default();
    for (index, (theirs, active)) in theirs.iter().zip(layer.active_l1()).enumerate() {
        let (theirs, active) = (table_at(layer, *theirs), table_at(layer, *active));
        if active.is_none() || theirs == active {
            continue;
        }
        if *left == 0 {
            found.incomplete = true;
            return Ok(found);
        }
        *left -= 1;
        control.go_on(layer.path())?;
        let start = to_u64(index) * header.l2_coverage();
        compare_tables(layer, [theirs, active], disk - start, &mut found)?;
    }
    Ok(found)
}

/// The L2 table of an entry that can be followed.
fn table_at(layer: &Layer, word: u64) -> Option<HostOffset> {
    let entry = L1Entry::decode(word).ok()??;
    let aligned = layer.cluster_size().offset_in(entry.table.0) == 0;
    (aligned && require(layer, entry.table).is_ok()).then_some(entry.table)
}

/// Adds what two tables say about the first `length` bytes that they describe.
fn compare_tables(
    layer: &Layer,
    tables: [Option<HostOffset>; 2],
    length: u64,
    found: &mut Compared,
) -> Result<()> {
    let header = layer.header();
    let words = to_usize(header.cluster_size.words());
    let read = |table: Option<HostOffset>| match table {
        Some(at) => layer.file().read_words("an L2 table", at, words),
        None => Ok(vec![0; words]),
    };
    let [theirs, active] = [read(tables[0])?, read(tables[1])?];
    let step = to_usize(header.l2_entry_bytes() / 8);
    let size = header.cluster_size.bytes();
    let entries = theirs.chunks_exact(step).zip(active.chunks_exact(step));
    for ((theirs, active), start) in entries.zip((0..length).step_by(to_usize(size))) {
        let end = size.min(length - start);
        if theirs != active {
            compare_entries(layer, [theirs, active], end, found);
        }
    }
    Ok(())
}

/// Adds what two entries say about the first `end` bytes of a cluster, subcluster by subcluster.
fn compare_entries(layer: &Layer, words: [&[u64]; 2], end: u64, found: &mut Compared) {
    let header = layer.header();
    let decode = |words: &[u64]| {
        let bitmap = words.get(1).copied().unwrap_or(0);
        L2Entry::decode(header, words[0], bitmap)
    };
    let (Ok(theirs), Ok(active)) = (decode(words[0]), decode(words[1])) else {
        return;
    };
    let parts = if header.extended_l2 { SUBCLUSTERS } else { 1 };
    let part = header.cluster_size.bytes() / parts;
    for index in 0..end.div_ceil(part) {
        let bytes = part.min(end - index * part);
        let (theirs, active) = (state(theirs, index), state(active, index));
        match (theirs, active) {
            ((Standard::Unallocated, _), (Standard::Data, _)) => found.missing += bytes,
            ((Standard::Data, here), (Standard::Data, there)) if here == there => {}
            ((Standard::Data, _), _) => found.diverged += bytes,
            ((Standard::Zero, _), (Standard::Data, _)) => found.diverged += bytes,
            ((Standard::Zero | Standard::Unallocated, _), _) => {}
        }
    }
}

/// What a part of a cluster is, and where the cluster lies.
fn state(entry: L2Entry, index: u64) -> (Standard, Option<HostOffset>) {
    match entry {
        L2Entry::Compressed(cluster) => (Standard::Data, Some(cluster.host)),
        L2Entry::Whole { state, host, .. } => (state, host),
        L2Entry::Sub { bitmap, host, .. } => (bitmap.state(index), host),
    }
}
