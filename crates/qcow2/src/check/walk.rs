//! The walk over everything that refers to clusters: each reference is counted, and what cannot be followed is told.

use crate::bitmap_read::TableEntry;
use crate::control::Control;
use crate::counts::Counts;
use crate::directory::StoredBitmap;
use crate::entry::{L2Entry, SUBCLUSTERS, Standard};
use crate::error::Result;
use crate::header::{to_u64, to_usize};
use crate::layer::Layer;
use crate::units::HostOffset;

use super::image::{ActiveTable, Image, L2Table};
use super::judge::{SAID_NOT_ONE, SAID_ONE};
use super::report::{CheckReport, Use};
use super::{require_place, unusable};

/// Progress is told after so many L2 tables.
const TOLD_TABLES: u64 = 64;

/// One walk over all tables.
pub(super) struct Walk<'a> {
    pub image: &'a Image<'a>,
    pub counts: Counts,
    pub report: &'a mut CheckReport,
    /// Only the first walk reports and counts what it sees on its way.
    pub first: bool,
    /// Where the next cluster of the L2 table lies if it follows on the one before.
    pub follows: Option<HostOffset>,
    pub control: &'a Control<'a>,
    /// How many clusters the last one who was told of was.
    pub told: u64,
}

impl Walk<'_> {
    pub fn all(&mut self) -> Result<()> {
        let image = self.image;
        for (at, length, usage) in &image.regions {
            self.count(*at, *length, 1, usage.bit());
        }
        let size = image.layer.cluster_size().bytes();
        for block in image.refcount_blocks.iter().flatten() {
            self.count(*block, size, 1, Use::RefcountBlock.bit());
        }
        for (done, table) in (0..).zip(&image.l2_tables) {
            self.control.go_on(image.layer.path())?;
            self.l2_table(table)?;
            if done % TOLD_TABLES == 0 {
                self.tell(done);
            }
        }
        for bitmap in &image.bitmaps {
            self.control.go_on(image.layer.path())?;
            self.bitmap(bitmap)?;
        }
        Ok(())
    }

    /// Tells of `done` L2 tables, as so many clusters of the window. It may turn out smaller, so what was told stands.
    fn tell(&mut self, done: u64) {
        let (before, all) = (self.counts.start, self.image.file_clusters());
        let window = self.counts.end.min(all).saturating_sub(before);
        let tables = to_u64(self.image.l2_tables.len().max(1));
        let part = u128::from(window) * u128::from(done) / u128::from(tables);
        let now = before.saturating_add(u64::try_from(part).unwrap_or(window));
        self.told = self.told.max(now);
        self.control.tell(self.told, all);
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
