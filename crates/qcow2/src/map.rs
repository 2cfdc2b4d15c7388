//! Where each byte of a disk lies: a chain's layers, holes and zeros as `qemu-img map` tells them.
//!
//! The answer for a range is that of the first layer that defines it; where none does, that of the lowest
//! layer that reaches so far. As in QEMU, the holes of a raw file are zeros that are there, and the holes
//! *of the image file* below allocated clusters are looked for only in an image whose metadata was
//! preallocated: one with clearly more clusters in use than the file has blocks.

use std::cell::OnceCell;
use std::path::Path;

use serde::Serialize;
use stead_sys::copy;

use crate::chain::{Chain, Member};
use crate::control::Control;
use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::layer::{ExtentKind, Layer};
use crate::raw::RawDisk;
use crate::refcounts::Refcounts;

/// A range of the disk that is of one kind. As JSON it has the fields of `qemu-img map --output=json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MapEntry<'a> {
    /// Where it starts on the disk, in bytes.
    pub start: u64,
    /// How many bytes it has; never 0.
    pub length: u64,
    /// The layer that answers, 0 being the top.
    pub depth: usize,
    /// Whether that layer defines the bytes.
    pub present: bool,
    /// Whether the bytes are known to be zeros.
    pub zero: bool,
    /// Whether the bytes are, or would be, read from a file.
    pub data: bool,
    /// Whether they are compressed there.
    pub compressed: bool,
    /// Where in the file the bytes lie, or the room that is kept for them, one after the other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The file that `offset` is in.
    #[serde(skip)]
    pub file: Option<&'a Path>,
}

impl MapEntry<'_> {
    fn continues_with(&self, next: &Self) -> bool {
        let kind = |e: &Self| (e.depth, e.present, e.zero, e.data, e.compressed);
        let expected = self.offset.map(|offset| offset.saturating_add(self.length));
        kind(self) == kind(next) && expected == next.offset && self.file == next.file
    }
}

/// The entries of a chain in order, neighbours joined; see [`Chain::map`].
#[derive(Debug)]
pub struct MapEntries<'a> {
    chain: &'a Chain,
    preallocated: Vec<OnceCell<bool>>,
    at: u64,
    pending: Option<MapEntry<'a>>,
    control: Control<'a>,
    failed: Option<Error>,
}

impl Chain {
    /// Where each byte of the disk from `from` on lies. After an error the iterator ends.
    #[must_use]
    pub fn map(&self, from: u64) -> MapEntries<'_> {
        MapEntries {
            chain: self,
            preallocated: vec![OnceCell::new(); self.depth()],
            at: from,
            pending: None,
            control: Control::default(),
            failed: None,
        }
    }
}

impl<'a> MapEntries<'a> {
    /// The same entries, watched: [`Error::Cancelled`] is the last one when the caller wants an end.
    #[must_use]
    pub fn watched(mut self, control: &Control<'a>) -> Self {
        self.control = *control;
        self
    }

    fn piece(&self, at: u64) -> Result<MapEntry<'a>> {
        let members = self.chain.members();
        let mut end = self.chain.len();
        for (depth, member) in members.iter().enumerate() {
            let mut entry = match &**member {
                Member::Raw(raw) => raw_entry(raw, at, end)?,
                Member::Qcow2(layer) => self.layer_entry(layer, depth, at, end)?,
            };
            entry.depth = depth;
            let below = members.get(depth + 1).map(|below| below.length());
            match below {
                Some(length) if !entry.present && at < length => {
                    end = (at + entry.length).min(length);
                }
                Some(_) | None => return Ok(entry),
            }
        }
        unreachable!("the lowest member answers for what none defines")
    }

    fn layer_entry(
        &self,
        layer: &'a Layer,
        depth: usize,
        at: u64,
        end: u64,
    ) -> Result<MapEntry<'a>> {
        let status = layer.status_within(at, end, true)?;
        let (present, data) = match status.extent.kind {
            ExtentKind::Data(_) | ExtentKind::Compressed { .. } => (true, true),
            ExtentKind::Zero => (true, false),
            ExtentKind::Unallocated => (false, false),
        };
        let place = match status.extent.kind {
            ExtentKind::Data(place) => Some(place),
            ExtentKind::Zero | ExtentKind::Unallocated => status.kept,
            ExtentKind::Compressed { .. } => None,
        };
        let mut entry = MapEntry {
            start: at,
            length: status.extent.length,
            depth,
            present,
            zero: !data,
            data,
            compressed: matches!(status.extent.kind, ExtentKind::Compressed { .. }),
            offset: place.map(|place| place.0),
            file: place.map(|_| layer.data_path()),
        };
        if let ExtentKind::Data(place) = status.extent.kind
            && self.is_preallocated(layer, depth)?
        {
            let hole = hole_at(layer.data(), place.0, entry.length)?;
            (entry.zero, entry.length) = hole;
        }
        Ok(entry)
    }

    fn is_preallocated(&self, layer: &Layer, depth: usize) -> Result<bool> {
        let known = &self.preallocated[depth];
        if let Some(known) = known.get() {
            return Ok(*known);
        }
        let found = is_preallocated(layer)?;
        Ok(*known.get_or_init(|| found))
    }

    fn next_piece(&mut self) -> Option<MapEntry<'a>> {
        if let Some(entry) = self.pending.take() {
            return Some(entry);
        }
        if self.failed.is_some() || self.at >= self.chain.len() {
            return None;
        }
        let top = self.chain.file(0).map_or(Path::new(""), |(path, _)| path);
        let wanted = self.control.go_on(top);
        match wanted.and_then(|()| self.piece(self.at)) {
            Ok(entry) => {
                self.at = entry.start + entry.length;
                self.control.tell(self.at, self.chain.len());
                Some(entry)
            }
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }
}

impl<'a> Iterator for MapEntries<'a> {
    type Item = Result<MapEntry<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let Some(mut entry) = self.next_piece() else {
            let error = self.failed.take()?;
            self.at = u64::MAX;
            return Some(Err(error));
        };
        while let Some(next) = self.next_piece() {
            if !entry.continues_with(&next) {
                self.pending = Some(next);
                break;
            }
            entry.length += next.length;
        }
        Some(Ok(entry))
    }
}

/// Raw: all of it is there, as data or as zeros.
fn raw_entry(raw: &RawDisk, at: u64, end: u64) -> Result<MapEntry<'_>> {
    let (zero, length) = raw.hole_at(at, end - at)?;
    Ok(MapEntry {
        start: at,
        length,
        depth: 0,
        present: true,
        zero,
        data: !zero,
        compressed: false,
        offset: Some(raw.host(at).0),
        file: Some(raw.file().path()),
    })
}

/// Whether there is a hole at `at`, and how many of `length` bytes are alike. Behind the end is a hole; a
/// storage that is no file has none.
fn hole_at(file: &ImageFile, at: u64, length: u64) -> Result<(bool, u64)> {
    let Some(system_file) = file.file() else {
        return Ok((false, length));
    };
    let data = copy::next_data(system_file, at)
        .map_err(|source| Error::io("find the holes of", file.path(), source))?;
    Ok(match data {
        None => (true, length),
        Some(data) if data.start > at => (true, length.min(data.start - at)),
        Some(data) => (false, length.min(data.end - at)),
    })
}

/// Whether clearly more clusters are in use than the file has blocks for, by QEMU's measure.
fn is_preallocated(layer: &Layer) -> Result<bool> {
    let size = layer.cluster_size();
    let real = layer.file().allocated_bytes()? / size.bytes();
    let threshold = (real.saturating_mul(10) / 9).max(real + 2);
    let mut used = 0;
    let clusters = size.count_for(layer.file_length());
    if clusters < threshold {
        return Ok(false);
    }
    Refcounts::of(layer)?.for_each_used(0, clusters, |_, _| used += 1)?;
    Ok(used >= threshold)
}
