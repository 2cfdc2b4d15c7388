//! What a layer says about each byte of the disk, read from its tables.

use crate::cache::{SLICE_BYTES, Slice};
use crate::entry::{CompressedCluster, L1Entry, L2Entry, SUBCLUSTERS, Standard};
use crate::error::{Error, Result};
use crate::header::{to_u64, to_usize};
use crate::units::{GuestOffset, HostOffset};

use super::Layer;

/// What one layer says about a range of the virtual disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// The bytes lie in the file, one after the other from here.
    Data(HostOffset),
    /// The bytes are part of one compressed cluster.
    Compressed {
        /// Where the compressed bytes are.
        cluster: CompressedCluster,
        /// How far into the decompressed cluster the extent starts, in bytes.
        skip: u64,
    },
    /// The bytes are zeros, whatever lies below.
    Zero,
    /// The layer says nothing; the layer below is seen, or zeros.
    Unallocated,
}

/// A range of the virtual disk that is of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts.
    pub start: GuestOffset,
    /// How many bytes it has; never 0.
    pub length: u64,
    /// What it is.
    pub kind: ExtentKind,
}

impl Extent {
    pub(super) fn end(&self) -> u64 {
        self.start.0 + self.length
    }

    /// Whether `next`, which starts at the end of this extent, goes on with it.
    fn continues_with(&self, next: &ExtentKind) -> bool {
        match (self.kind, next) {
            (ExtentKind::Data(here), ExtentKind::Data(there)) => {
                here.0.checked_add(self.length) == Some(there.0)
            }
            (ExtentKind::Zero, ExtentKind::Zero) => true,
            (ExtentKind::Unallocated, ExtentKind::Unallocated) => true,
            _ => false,
        }
    }
}

impl Layer {
    /// What the layer says about `at` and the bytes that follow in the same way.
    ///
    /// The extent starts at `at` and may be shorter than it could be (it ends where a table ends);
    /// [`Layer::extents`] joins such pieces.
    ///
    /// # Errors
    /// When `at` is not on the disk, a table cannot be read, or an entry is not valid or points out
    /// of the file.
    pub fn extent_at(&self, at: GuestOffset) -> Result<Extent> {
        if at.0 >= self.virtual_size() {
            return Err(Error::OutOfDisk {
                start: at,
                length: 1,
                disk_length: self.virtual_size(),
            });
        }
        Ok(self.status_within(at.0, self.virtual_size, false)?.extent)
    }

    /// As [`Layer::extent_at`], up to `limit`, which the L1 table covers; with the room that the file keeps
    /// for bytes that are not data. When `exact`, pieces are joined only if that room is joined, too.
    pub(crate) fn status_within(&self, at: u64, limit: u64, exact: bool) -> Result<Status> {
        let index = at / self.header().l2_coverage();
        match self.l1_entry(index)? {
            None => Ok(self.unallocated_run(at, index, limit)),
            Some(entry) => self.status_in_table(at, entry, limit, exact),
        }
    }

    /// All extents from `from` to the end of the disk, in order, neighbours of one kind joined.
    ///
    /// After an error the iterator ends.
    #[must_use]
    pub fn extents(&self, from: GuestOffset) -> Extents<'_> {
        Extents {
            layer: self,
            at: from.0,
            pending: None,
            failed: None,
        }
    }

    /// Every L1 entry is valid, and no L2 table is used twice: so walking all tables takes time in
    /// proportion to the file, not to what a hostile file claims.
    pub(super) fn check_l1(&self) -> Result<()> {
        let mut tables = Vec::new();
        for index in 0..to_u64(self.l1.len()) {
            tables.extend(self.l1_entry(index)?.map(|entry| entry.table));
        }
        tables.sort_unstable();
        match tables.windows(2).find(|pair| pair[0] == pair[1]) {
            None => Ok(()),
            Some(pair) => Err(Error::SharedL2Table {
                path: self.path().to_owned(),
                at: pair[0],
            }),
        }
    }

    fn l1_entry(&self, index: u64) -> Result<Option<L1Entry>> {
        let word = self.l1[to_usize(index)];
        let guest = GuestOffset(index.saturating_mul(self.header().l2_coverage()));
        let entry = L1Entry::decode(word)
            .map_err(|reason| self.invalid_entry("L1 entry", guest, word, reason))?;
        if let Some(entry) = entry {
            self.require_cluster("an L2 table", entry.table, self.cluster_size().bytes())?;
        }
        Ok(entry)
    }

    fn invalid_entry(
        &self,
        what: &'static str,
        guest: GuestOffset,
        entry: u64,
        reason: &'static str,
    ) -> Error {
        Error::InvalidEntry {
            path: self.path().to_owned(),
            what,
            guest,
            entry,
            reason,
        }
    }

    /// `at` is the start of a cluster whose first `length` bytes lie in the file.
    pub(super) fn require_cluster(
        &self,
        what: &'static str,
        at: HostOffset,
        length: u64,
    ) -> Result<()> {
        if self.cluster_size().offset_in(at.0) != 0 {
            return Err(Error::Unaligned {
                path: self.path().to_owned(),
                what,
                at,
            });
        }
        self.shared.file.require(what, at, length)
    }

    /// From `at` to where the next L2 table begins, or `limit`.
    fn unallocated_run(&self, at: u64, index: u64, limit: u64) -> Status {
        let coverage = self.header().l2_coverage();
        let rest = &self.l1[to_usize(index)..];
        let empty = rest.iter().take_while(|word| **word == 0).count();
        // An entry may be only a flag without an offset: then it is one empty table.
        let empty = to_u64(empty.max(1));
        let end = (index + empty).saturating_mul(coverage);
        Status {
            extent: Extent {
                start: GuestOffset(at),
                length: end.min(limit) - at,
                kind: ExtentKind::Unallocated,
            },
            kept: None,
        }
    }

    fn status_in_table(&self, at: u64, entry: L1Entry, limit: u64, exact: bool) -> Result<Status> {
        let view = self.slice_for(at, entry)?;
        let mut status = self.piece(&view, at, limit)?;
        let end = view.end.min(limit);
        while status.extent.end() < end {
            // An invalid entry behind this extent is reported when it is asked for.
            let Ok(next) = self.piece(&view, status.extent.end(), limit) else {
                break;
            };
            let goes_on = status.extent.continues_with(&next.extent.kind);
            if !goes_on || (exact && !status.room_continues_with(&next)) {
                break;
            }
            status.extent.length += next.extent.length;
        }
        Ok(status)
    }

    fn slice_for(&self, at: u64, entry: L1Entry) -> Result<SliceView> {
        let slice_bytes = SLICE_BYTES.min(self.cluster_size().bytes());
        let per_slice = slice_bytes / self.header().l2_entry_bytes();
        let cluster = at >> self.cluster_size().bits();
        let in_table = cluster % self.header().l2_entries();
        let slice_index = in_table / per_slice;
        let place = HostOffset(entry.table.0 + slice_index * slice_bytes);
        let words = self.shared.slices.get(place, || {
            self.shared
                .file
                .read_words("an L2 table", place, to_usize(slice_bytes / 8))
        })?;
        let first_cluster = cluster - in_table % per_slice;
        let start = first_cluster << self.cluster_size().bits();
        Ok(SliceView {
            words,
            start,
            end: start.saturating_add(per_slice << self.cluster_size().bits()),
        })
    }

    /// What one entry, or one run of like subclusters in it, says from `at` on, up to `limit`.
    fn piece(&self, view: &SliceView, at: u64, limit: u64) -> Result<Status> {
        let size = self.cluster_size();
        let (word, bitmap) = self.words(view, at);
        let entry = L2Entry::decode(self.header(), word, bitmap)
            .map_err(|reason| self.invalid_entry("L2 entry", GuestOffset(at), word, reason))?;
        let within = size.offset_in(at);
        let (state, host, end) = match entry {
            L2Entry::Compressed(cluster) => return self.compressed_piece(cluster, at, limit),
            L2Entry::Whole { state, host, .. } => (state, host, size.bytes()),
            L2Entry::Sub { bitmap, host, .. } => {
                let sub = size.bytes() / SUBCLUSTERS;
                let first = within / sub;
                let state = bitmap.state(first);
                let like = (first..SUBCLUSTERS).take_while(|index| bitmap.state(*index) == state);
                (state, host, (first + to_u64(like.count())) * sub)
            }
        };
        let length = (end - within).min(limit - at);
        let kind = kind_of(state, host, within);
        if let ExtentKind::Data(place) = kind {
            self.require_data(HostOffset(place.0 - within), within + length)?;
        }
        let room = host.map(|host| HostOffset(host.0 + within));
        Ok(Status {
            extent: Extent {
                start: GuestOffset(at),
                length,
                kind,
            },
            kept: room.filter(|_| state != Standard::Data),
        })
    }

    fn compressed_piece(&self, cluster: CompressedCluster, at: u64, limit: u64) -> Result<Status> {
        let file = &self.shared.file;
        file.require("a compressed cluster", cluster.host, 1)?;
        let skip = self.cluster_size().offset_in(at);
        Ok(Status {
            extent: Extent {
                start: GuestOffset(at),
                length: (self.cluster_size().bytes() - skip).min(limit - at),
                kind: ExtentKind::Compressed { cluster, skip },
            },
            kept: None,
        })
    }

    /// The first `length` bytes of the data cluster at `at` lie in the file that holds guest data. Where that
    /// file was not opened, only the place is checked.
    fn require_data(&self, at: HostOffset, length: u64) -> Result<()> {
        if self.header().external_data.is_some() && self.shared.data.is_none() {
            return self.require_cluster(
                "guest data",
                HostOffset(self.cluster_size().offset_in(at.0)),
                0,
            );
        }
        if self.cluster_size().offset_in(at.0) != 0 {
            return self.require_cluster("guest data", at, length);
        }
        self.data().require("guest data", at, length)
    }

    fn words(&self, view: &SliceView, at: u64) -> (u64, u64) {
        let index = to_usize((at - view.start) >> self.cluster_size().bits());
        if self.header().extended_l2 {
            (view.words[index * 2], view.words[index * 2 + 1])
        } else {
            (view.words[index], 0)
        }
    }
}

fn kind_of(state: Standard, host: Option<HostOffset>, within: u64) -> ExtentKind {
    match (state, host) {
        (Standard::Data, Some(host)) => ExtentKind::Data(HostOffset(host.0 + within)),
        (Standard::Data, None) => unreachable!("the entry was decoded, so data has an offset"),
        (Standard::Zero, _) => ExtentKind::Zero,
        (Standard::Unallocated, _) => ExtentKind::Unallocated,
    }
}

/// An extent, and the room that the file keeps for it when it is not data.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Status {
    pub extent: Extent,
    pub kept: Option<HostOffset>,
}

impl Status {
    fn room_continues_with(&self, next: &Self) -> bool {
        let expected = self
            .kept
            .map(|here| here.0.saturating_add(self.extent.length));
        expected == next.kept.map(|there| there.0)
    }
}

/// A slice and the guest range that it describes.
struct SliceView {
    words: Slice,
    start: u64,
    end: u64,
}

/// The extents of a layer in guest order; see [`Layer::extents`].
#[derive(Debug)]
pub struct Extents<'a> {
    layer: &'a Layer,
    at: u64,
    pending: Option<Extent>,
    failed: Option<Error>,
}

impl Extents<'_> {
    /// The next piece, or `None` at the end of the disk or at an error, which is kept.
    fn next_piece(&mut self) -> Option<Extent> {
        if let Some(extent) = self.pending.take() {
            return Some(extent);
        }
        if self.failed.is_some() || self.at >= self.layer.virtual_size() {
            return None;
        }
        match self.layer.extent_at(GuestOffset(self.at)) {
            Ok(extent) => {
                self.at = extent.end();
                Some(extent)
            }
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let Some(mut extent) = self.next_piece() else {
            let error = self.failed.take()?;
            self.at = u64::MAX;
            return Some(Err(error));
        };
        while let Some(next) = self.next_piece() {
            if !extent.continues_with(&next.kind) {
                self.pending = Some(next);
                break;
            }
            extent.length += next.length;
        }
        Some(Ok(extent))
    }
}
