//! One piece of the disk on its way: read, looked at, compressed, placed, written. One a thread.

use std::ops::Range;

use stead_sys::copy::is_zero;
use stead_sys::direct::{ALIGNMENT, AlignedBuffer};
use stead_sys::share::Shared;

use super::compress::Compressor;
use super::layout::{ALL_SUBCLUSTERS, Entry, Layout, SnapshotTable, Table};
use super::options::{Geometry, Preallocation};
use super::output::Output;
use crate::chain::{Chain, StoredAs};
use crate::entry::SUBCLUSTERS;
use crate::error::Result;
use crate::header::{Compression, be_u64, to_u64, to_usize};

/// How many bytes are read, placed and written at once; no less than a cluster.
pub(crate) const CHUNK_BYTES: u64 = 2 << 20;

/// What is to be done with all pieces.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub source: &'a Chain,
    /// The bytes of the source that become the disk.
    pub window: Range<u64>,
    /// Views of the source that are in the new image already, the nearest first.
    pub earlier: &'a [Earlier<'a>],
    /// Where the target's bytes are equal to these, nothing is written.
    pub below: Option<&'a Chain>,
    /// The top layers of `source` that lie above `below`, when they are of one chain.
    pub layers_above: Option<usize>,
    /// The unit of the target, a power of two: a cluster, or in a raw image what can be a hole.
    pub unit: u64,
    /// Zeros are left out in aligned pieces of this many bytes, a power of two; `None`: nowhere.
    pub sparse: Option<u64>,
    pub compression: Option<Compression>,
    pub subclusters: bool,
    /// Zeros must be written as data, since the target cannot say them.
    pub zeros_are_data: bool,
    /// What is reserved for zeros.
    pub reserve: Option<Preallocation>,
    /// The members of `source` whose blocks the target can share.
    pub shareable: Vec<bool>,
}

impl Job<'_> {
    /// Reads bytes of the disk to be made; behind the window are zeros.
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let from = self.window.start + at;
        let there = self
            .window
            .end
            .saturating_sub(from)
            .min(to_u64(bytes.len()));
        let (data, behind) = bytes.split_at_mut(to_usize(there));
        behind.fill(0);
        self.source.read_padded(from, data)
    }
}

/// A view of the source that is in the new image already.
#[derive(Debug)]
pub(crate) struct Earlier<'a> {
    pub chain: &'a Chain,
    pub table: SnapshotTable,
}

impl Earlier<'_> {
    /// The entry of the cluster at `guest`, from the tables that were written.
    fn entry(&self, geometry: &Geometry, tables: &Output, guest: u64) -> Result<Entry> {
        let index = to_usize(guest / geometry.l2_coverage());
        let table = match self.table.l1.get(index) {
            Some(0) | None => return Ok(Entry::default()),
            Some(table) => *table,
        };
        let in_table = (guest >> geometry.size.bits()) % geometry.l2_entries();
        let mut words = [0; 16];
        let words = &mut words[..to_usize(geometry.entry_words() * 8)];
        tables.read_back(table + in_table * to_u64(words.len()), words)?;
        Ok(Entry {
            word: be_u64(words),
            subclusters: words.get(8..).filter(|w| !w.is_empty()).map_or(0, be_u64),
        })
    }
}

/// What was found of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Found {
    /// As it is below, or zeros where there is nothing below.
    Same,
    Zeros,
    /// A bit for each subcluster that is not all zeros.
    Data(u32),
    /// Compressed, in this range of the packed bytes.
    Packed(Range<usize>),
    /// Its blocks are shared, from this place of this member on.
    Shared {
        member: usize,
        at: u64,
    },
    /// An earlier view has it already.
    Earlier(Entry),
}

/// Where bytes to be written come from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum From {
    Buffer(usize),
    Packed(usize),
    Shared {
        member: usize,
        at: u64,
    },
    /// Nowhere: the place is to read as zeros, and may have room reserved.
    Room,
}

/// Bytes with a place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Write {
    at: u64,
    length: usize,
    from: From,
}

/// Bytes of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Those that take room.
    pub written: u64,
    /// Those of them that are blocks of the source.
    pub shared: u64,
    /// Those that only have a place.
    pub reserved: u64,
}

impl Taken {
    pub fn add(&mut self, more: Self) {
        self.written += more.written;
        self.shared += more.shared;
        self.reserved += more.reserved;
    }
}

/// Memory for one piece.
#[derive(Debug)]
pub(crate) struct Chunk<'a> {
    job: &'a Job<'a>,
    range: Range<u64>,
    buffer: AlignedBuffer,
    below: Vec<u8>,
    compressor: Option<Compressor>,
    /// Compressed clusters one after the other, from [`ALIGNMENT`] on.
    packed: AlignedBuffer,
    packed_end: usize,
    found: Vec<Found>,
    writes: Vec<Write>,
    tables: Vec<Table>,
}

impl<'a> Chunk<'a> {
    pub fn new(job: &'a Job<'a>, path: &std::path::Path) -> Result<Self> {
        let length = to_usize(CHUNK_BYTES);
        let compressor = job.compression.map(|method| Compressor::new(method, path));
        Ok(Self {
            job,
            range: 0..0,
            buffer: AlignedBuffer::new(length),
            below: vec![0; if job.below.is_some() { length } else { 0 }],
            compressor: compressor.transpose()?,
            packed: AlignedBuffer::new(match job.compression {
                Some(_) => to_usize(ALIGNMENT) + length,
                None => 0,
            }),
            packed_end: 0,
            found: Vec::new(),
            writes: Vec::new(),
            tables: Vec::new(),
        })
    }

    /// Reads a piece and decides what each of its units is. `tables` has those of earlier views.
    pub fn load(
        &mut self,
        range: Range<u64>,
        geometry: Option<&Geometry>,
        tables: &Output,
    ) -> Result<()> {
        assert!(
            range.end - range.start <= CHUNK_BYTES && range.start.is_multiple_of(self.job.unit),
            "a piece is of whole units and fits the buffer"
        );
        self.range = range;
        self.packed_end = to_usize(ALIGNMENT);
        let units = (self.range.end - self.range.start).div_ceil(self.job.unit);
        self.found = vec![Found::Data(ALL_SUBCLUSTERS); to_usize(units)];
        self.leave_out_equal_layers()?;
        if let Some(geometry) = geometry {
            self.find_earlier(geometry, tables)?;
        }
        self.find_shared()?;
        self.read()?;
        self.leave_out_equal_bytes();
        self.find_zeros();
        self.compress();
        Ok(())
    }

    fn unit_range(&self, index: usize) -> Range<u64> {
        let start = self.range.start + to_u64(index) * self.job.unit;
        start..(start + self.job.unit).min(self.range.end)
    }

    fn buffer_range(&self, index: usize) -> Range<usize> {
        let unit = to_usize(self.job.unit);
        index * unit..(index + 1) * unit
    }

    /// Units that only layers define which the target has below it.
    fn leave_out_equal_layers(&mut self) -> Result<()> {
        let Some(layers) = self.job.layers_above else {
            return Ok(());
        };
        for index in 0..self.found.len() {
            let unit = self.unit_range(index);
            if self.is_below(unit, layers)? {
                self.found[index] = Found::Same;
            }
        }
        Ok(())
    }

    /// Whether the top layers say nothing about a range.
    fn is_below(&self, range: Range<u64>, layers: usize) -> Result<bool> {
        let mut at = range.start;
        while at < range.end {
            let stored = self.job.source.stored(at, range.end)?;
            if stored.depth < layers {
                return Ok(false);
            }
            at = stored.end;
        }
        Ok(range.end <= self.job.source.len())
    }

    /// Units that come from the same places in an earlier view.
    fn find_earlier(&mut self, geometry: &Geometry, tables: &Output) -> Result<()> {
        for index in 0..self.found.len() {
            let unit = self.unit_range(index);
            if self.found[index] == Found::Same {
                continue;
            }
            for earlier in self.job.earlier {
                if unit.end > earlier.chain.len().min(self.job.source.len())
                    || !self
                        .job
                        .source
                        .is_stored_as_in(earlier.chain, unit.clone())?
                {
                    continue;
                }
                let entry = earlier.entry(geometry, tables, unit.start)?;
                if entry.has_bytes() {
                    self.found[index] = Found::Earlier(entry);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Units that lie whole in a file whose blocks can be shared.
    fn find_shared(&mut self) -> Result<()> {
        if !self.job.shareable.contains(&true) || self.job.compression.is_some() {
            return Ok(());
        }
        for index in 0..self.found.len() {
            let unit = self.unit_range(index);
            let read = matches!(self.found[index], Found::Data(_));
            if !read || unit.end - unit.start < self.job.unit {
                continue;
            }
            let (start, end) = (
                self.job.window.start + unit.start,
                self.job.window.start + unit.end,
            );
            let stored = self.job.source.stored(start, end)?;
            if let StoredAs::Plain { member, at } = stored.how
                && stored.end == end
                && end <= self.job.window.end
                && self.job.shareable[member]
                && at.0.is_multiple_of(stead_sys::direct::ALIGNMENT)
                && at.0 + self.job.unit <= self.job.source.member_file(member).1
            {
                self.found[index] = Found::Shared { member, at: at.0 };
            }
        }
        Ok(())
    }

    /// Reads what is still to be looked at, in runs as long as possible.
    fn read(&mut self) -> Result<()> {
        let mut index = 0;
        while index < self.found.len() {
            let wanted = |found: &Found| matches!(found, Found::Data(_));
            let run = self.found[index..].iter().take_while(|found| wanted(found));
            let end = index + run.count();
            if end == index {
                index += 1;
                continue;
            }
            let bytes = self.buffer_range(index).start..self.buffer_range(end - 1).end;
            let start = self.unit_range(index).start;
            // Behind the end of the disk, the last unit is zeros.
            let inside = to_usize(self.range.end - start).min(bytes.len());
            let (seen, behind) = self.buffer.bytes_mut()[bytes.clone()].split_at_mut(inside);
            self.job.read(start, seen)?;
            behind.fill(0);
            if let Some(below) = self.job.below {
                let (seen, behind) = self.below[bytes].split_at_mut(inside);
                below.read_padded(start, seen)?;
                behind.fill(0);
            }
            index = end;
        }
        Ok(())
    }

    fn leave_out_equal_bytes(&mut self) {
        if self.job.below.is_none() {
            return;
        }
        for index in 0..self.found.len() {
            let bytes = self.buffer_range(index);
            let read = matches!(self.found[index], Found::Data(_));
            if read && self.buffer.bytes()[bytes.clone()] == self.below[bytes] {
                self.found[index] = Found::Same;
            }
        }
    }

    /// Leaves out zeros: pieces of the sparse length when that is larger than a unit, else units, and
    /// in clusters with subclusters these.
    fn find_zeros(&mut self) {
        let Some(sparse) = self.job.sparse else {
            return;
        };
        let together = to_usize((sparse / self.job.unit).max(1));
        for first in (0..self.found.len()).step_by(together) {
            let group = first..(first + together).min(self.found.len());
            let masks: Vec<Option<u32>> = group.clone().map(|index| self.mask(index)).collect();
            let all_zero = masks.iter().all(|mask| mask.unwrap_or(0) == 0);
            for (index, mask) in group.zip(masks) {
                let Some(mask) = mask else { continue };
                if mask == 0 && all_zero {
                    self.found[index] = self.zeros();
                } else if mask != 0 && self.job.subclusters && sparse <= self.job.unit / SUBCLUSTERS
                {
                    self.found[index] = Found::Data(mask);
                }
            }
        }
    }

    fn zeros(&self) -> Found {
        if self.job.zeros_are_data {
            Found::Data(ALL_SUBCLUSTERS)
        } else {
            Found::Zeros
        }
    }

    /// A bit for each 32nd of a unit that has data; `None` where its bytes were not read.
    fn mask(&self, index: usize) -> Option<u32> {
        if !matches!(self.found[index], Found::Data(_)) {
            return None;
        }
        let bytes = &self.buffer.bytes()[self.buffer_range(index)];
        if !self.job.subclusters {
            return Some(if is_zero(bytes) { 0 } else { ALL_SUBCLUSTERS });
        }
        let length = bytes.len() / to_usize(SUBCLUSTERS);
        let bit = |(place, part): (usize, &[u8])| u32::from(!is_zero(part)) << place;
        Some(bytes.chunks(length).enumerate().map(bit).sum())
    }

    fn compress(&mut self) {
        let Some(compressor) = &mut self.compressor else {
            return;
        };
        let unit = to_usize(self.job.unit);
        for (index, found) in self.found.iter_mut().enumerate() {
            if !matches!(found, Found::Data(_)) {
                continue;
            }
            let cluster = &self.buffer.bytes()[index * unit..(index + 1) * unit];
            let start = self.packed_end;
            let out = &mut self.packed.bytes_mut()[start..start + unit - 1];
            if let Some(length) = compressor.compress(cluster, out) {
                self.packed_end = start + length;
                *found = Found::Packed(start..start + length);
            }
        }
    }

    /// Gives every unit its place in a qcow2 image.
    pub fn place(&mut self, layout: &mut Layout) -> Result<()> {
        self.writes.clear();
        let unit = to_usize(self.job.unit);
        for index in 0..self.found.len() {
            let Range { start: guest, end } = self.unit_range(index);
            // A data file ends where the disk ends, an image with a whole cluster.
            let length = match layout.geometry().external {
                true => to_usize(end - guest),
                false => unit,
            };
            match self.found[index].clone() {
                Found::Same => {}
                Found::Zeros if self.job.reserve.is_some() => {
                    let at = layout.reserve(guest)?;
                    self.push(at, length, From::Room);
                }
                Found::Zeros => layout.zero(guest)?,
                Found::Data(mask) => {
                    let at = layout.data(guest, mask)?;
                    self.push(at, length, From::Buffer(index * unit));
                }
                Found::Packed(range) => {
                    let at = layout.packed(guest, to_u64(range.len()))?;
                    self.push(at, range.len(), From::Packed(range.start));
                }
                Found::Shared { member, at } => {
                    let to = layout.data(guest, ALL_SUBCLUSTERS)?;
                    self.push(to, length, From::Shared { member, at });
                }
                Found::Earlier(entry) => {
                    if !layout.share(guest, entry)? {
                        self.read_late(guest, end, index)?;
                        let at = layout.data(guest, ALL_SUBCLUSTERS)?;
                        self.push(at, length, From::Buffer(index * unit));
                    }
                }
            }
        }
        self.tables = layout.take_complete();
        Ok(())
    }

    /// Reads a unit that was to be shared and cannot be.
    fn read_late(&mut self, start: u64, end: u64, index: usize) -> Result<()> {
        let bytes = self.buffer_range(index);
        let inside = to_usize(end - start);
        let (seen, behind) = self.buffer.bytes_mut()[bytes].split_at_mut(inside);
        self.job.read(start, seen)?;
        behind.fill(0);
        Ok(())
    }

    /// Gives every unit its place in a raw image: its own.
    pub fn place_raw(&mut self) {
        self.writes.clear();
        for index in 0..self.found.len() {
            let unit = self.unit_range(index);
            let length = to_usize(unit.end - unit.start);
            match self.found[index].clone() {
                Found::Same | Found::Packed(_) | Found::Earlier(_) => {
                    unreachable!("a raw image has one view, no file below, no compressed clusters")
                }
                Found::Zeros => self.push(unit.start, length, From::Room),
                Found::Data(_) => {
                    let from = From::Buffer(index * to_usize(self.job.unit));
                    self.push(unit.start, length, from);
                }
                Found::Shared { member, at } => {
                    self.push(unit.start, length, From::Shared { member, at });
                }
            }
        }
    }

    /// Adds bytes to what is written, joined with what was added last where they follow it.
    fn push(&mut self, at: u64, length: usize, from: From) {
        if let Some(last) = self.writes.last_mut()
            && last.at + to_u64(last.length) == at
            && last.from.goes_on(last.length, &from)
        {
            last.length += length;
            return;
        }
        self.writes.push(Write { at, length, from });
    }

    /// Where the piece ends on the disk.
    pub fn end(&self) -> u64 {
        self.range.end
    }

    /// What the writes of this piece take.
    pub fn taken(&self) -> Taken {
        let mut taken = Taken::default();
        let keeps_room = match self.job.reserve {
            Some(Preallocation::Falloc | Preallocation::Full) => true,
            Some(Preallocation::Off | Preallocation::Metadata) | None => false,
        };
        for write in &self.writes {
            let length = to_u64(write.length);
            match write.from {
                From::Room if !keeps_room => taken.reserved += length,
                From::Shared { .. } => {
                    taken.shared += length;
                    taken.written += length;
                }
                From::Room | From::Buffer(_) | From::Packed(_) => taken.written += length,
            }
        }
        taken
    }

    /// Writes what was placed; guest data to `data`, tables to `image`.
    pub fn write(&mut self, data: &Output, image: &Output) -> Result<()> {
        for write in std::mem::take(&mut self.writes) {
            let length = write.length;
            match write.from {
                From::Buffer(start) => {
                    data.write(write.at, &self.buffer.bytes()[start..start + length])?;
                }
                From::Packed(start) => {
                    data.write_packed(write.at, &mut self.packed, start..start + length)?;
                }
                From::Room => {
                    let preallocation = self.job.reserve.unwrap_or(Preallocation::Off);
                    data.take_room(preallocation, write.at, to_u64(length))?;
                }
                From::Shared { member, at } => self.share(data, &write, member, at)?,
            }
        }
        for (at, bytes) in std::mem::take(&mut self.tables) {
            image.write(at, &bytes)?;
        }
        Ok(())
    }

    /// Shares blocks, or copies them where that fails.
    fn share(&mut self, data: &Output, write: &Write, member: usize, at: u64) -> Result<()> {
        let (file, _) = self.job.source.member_file(member);
        let range = Shared {
            from: at,
            to: write.at,
            length: to_u64(write.length),
        };
        if let Some(file) = file
            && data.share(file, range)?
        {
            return Ok(());
        }
        let bytes = &mut self.buffer.bytes_mut()[..write.length];
        self.job.source.read_member(member, at, bytes)?;
        data.write(write.at, bytes)
    }
}

impl From {
    /// Whether `next` lies behind `length` bytes of this.
    fn goes_on(&self, length: usize, next: &Self) -> bool {
        match (self, next) {
            (Self::Buffer(here), Self::Buffer(there))
            | (Self::Packed(here), Self::Packed(there)) => here + length == *there,
            (
                Self::Shared { member, at },
                Self::Shared {
                    member: other,
                    at: there,
                },
            ) => member == other && at + to_u64(length) == *there,
            (Self::Room, Self::Room) => true,
            (Self::Buffer(_) | Self::Packed(_) | Self::Shared { .. } | Self::Room, _) => false,
        }
    }
}
