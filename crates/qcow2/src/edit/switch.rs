//! The end of a transaction: the new state is written out, proven, and switched to.
//!
//! ```text
//!  built ──write out, sync──▶ proven ──one sector, sync──▶ switched ──▶ cut
//!                                │
//!                                └─journal, sync──▶ marked ──data, rest of the first cluster, sync──▶ switched
//! ```
//! Up to `proven` any failure leaves the old state; from `switched` on the new one. In between the image is
//! *in progress*, and [`recover`] goes the same way again from `marked` on.

use std::io;
use std::path::Path;
use std::sync::Arc;

use stead_sys::image_lock::ImageLock;
use stead_sys::storage::{FileStorage, Storage};

use crate::chain::{Chain, MAX_LAYERS, Member};
use crate::check::{CheckReport, check_with};
use crate::control::{Control, Moving};
use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, Header, MAX_L1_BYTES, to_u64, to_usize,
};
use crate::layer::Layer;
use crate::units::HostOffset;

use super::allowed::JournalFiles;
use super::bitmaps_proof::says_enough;
use super::data::GuestFile;
use super::first::{FirstCluster, JournalPlace, SECTOR};
use super::in_place::{InPlaceRange, Journal, MAX_IN_PLACE_RANGES, Target};
use super::records;
use super::transaction::Edit;

/// The longest journal that a recovery reads, in bytes.
const MAX_JOURNAL_BYTES: u64 = 256 << 20;

/// The most files that a journal takes data from: each layer may have an external data file.
const MAX_JOURNAL_LAYERS: usize = 2 * MAX_LAYERS;

/// A new state that is written out and synced, and not yet switched to.
pub(super) struct Built<'a> {
    edit: Edit<'a>,
    first: Vec<u8>,
    header: Header,
    journal: Option<(JournalPlace, Journal)>,
    /// The file's length when everything is done, in bytes.
    pub end_bytes: u64,
    /// The longest that the file was, in bytes.
    pub peak_bytes: u64,
    /// Where the last cluster that was used at any time ends.
    pub reached_bytes: u64,
    /// Bytes that the file had no room for before; 0 but in a plan.
    pub new_bytes: u64,
    /// The same of the external data file.
    pub data_bytes: u64,
}

impl<'a> Edit<'a> {
    /// Writes out everything that was changed.
    ///
    /// # Durability
    /// The new state has been synced, and nothing refers to it.
    pub(super) fn build(mut self) -> Result<Built<'a>> {
        self.settle_copied()?;
        self.store_loaded()?;
        self.store_active()?;
        self.store_bitmaps()?;
        self.store_snapshots()?;
        self.store_refcounts()?;
        self.settle_guest_file()?;
        // Who changes an image clears the bits that say what it does not know.
        // A data file that is raw stays so, since nothing here changes what it shows.
        let raw_data = match self.old.header().external_data {
            Some(_) => AUTOCLEAR_RAW_DATA,
            None => 0,
        };
        let autoclear = self.first.raw.autoclear.get() & (AUTOCLEAR_BITMAPS | raw_data);
        self.first.raw.autoclear.set(autoclear);
        let first = self.first.encode(&self.path)?;
        let header = Header::decode(&first, &self.path)?;
        let used = self.counts.used_end(&mut self.tables)?;
        let end_bytes = used << self.size().bits();
        let journal = self.place_journal(&first, end_bytes)?;
        self.note_taken()?;
        let before = self.storage.len().map_err(self.io("find the length of"))?;
        let taken = self.counts.taken_end() << self.size().bits();
        let reached_bytes = taken.max(end_bytes);
        let peak_bytes = before.max(reached_bytes);
        if peak_bytes > before {
            let grown = self.storage.set_len(peak_bytes);
            grown.map_err(self.io("set the length of"))?;
        }
        self.tables.flush()?;
        self.go_on()?;
        let synced = self.storage.sync();
        synced.map_err(self.io("sync"))?;
        Ok(Built {
            new_bytes: self.blocks.bytes(),
            data_bytes: self.guest.as_ref().map_or(0, GuestFile::new_bytes),
            first,
            header,
            journal,
            end_bytes,
            peak_bytes,
            reached_bytes,
            edit: self,
        })
    }

    fn store_active(&mut self) -> Result<()> {
        if !self.active_changed {
            return Ok(());
        }
        let length = to_u64(self.active.len()) * 8;
        if length > MAX_L1_BYTES {
            let reason = format!("the L1 table would have {length} bytes, more than 32 MiB");
            return Err(self.refused("write the L1 table", reason));
        }
        let old = (self.old.header().l1_table, self.old.header().l1_entries);
        self.release_bytes(old.0, u64::from(old.1) * 8)?;
        let words = std::mem::take(&mut self.active);
        let at = self.place_words(&words)?;
        self.first.raw.l1_offset.set(at.0);
        let entries = u32::try_from(words.len()).unwrap_or(u32::MAX);
        self.first.raw.l1_entries.set(entries);
        self.active = words;
        Ok(())
    }

    fn store_snapshots(&mut self) -> Result<()> {
        if !self.snapshots_changed {
            return Ok(());
        }
        let old = self.old.snapshot_directory()?.length;
        if self.old.header().internal_snapshots > 0 {
            self.release_bytes(self.old.header().snapshot_table, old)?;
        }
        let at = self.place_bytes(records::encode_snapshots(&self.snapshots))?;
        let count = u32::try_from(self.snapshots.len()).unwrap_or(u32::MAX);
        self.first.raw.snapshot_table_offset.set(at.0);
        self.first.raw.internal_snapshots.set(count);
        Ok(())
    }

    fn store_refcounts(&mut self) -> Result<()> {
        if !self.counts.changed() {
            return Ok(());
        }
        let old = Arc::clone(&self.old);
        let (at, clusters) = self.counts.place_table(old.header(), &mut self.tables)?;
        let mut bytes = records::encode_words(self.counts.table());
        let whole = u64::from(clusters) * self.size().bytes();
        bytes.resize(to_usize(whole), 0);
        self.write_tables(at, bytes)?;
        self.first.raw.refcount_table_offset.set(at.0);
        self.first.raw.refcount_table_clusters.set(clusters);
        Ok(())
    }

    /// Writes the journal if more than the first sector changes in place.
    fn place_journal(
        &mut self,
        first: &[u8],
        length: u64,
    ) -> Result<Option<(JournalPlace, Journal)>> {
        let in_place = std::mem::take(&mut self.in_place);
        let target = in_place.target.as_ref().map(|(target, _)| target.clone());
        self.target = in_place.target.clone().and_then(|(_, storage)| storage);
        if in_place.is_empty() && first[SECTOR..] == self.old_first[SECTOR..] {
            return Ok(None);
        }
        let journal = Journal {
            layers: in_place.layers,
            target,
            first: first.to_vec(),
            length,
            ranges: in_place.ranges,
        };
        let bytes = journal.encode();
        let length = to_u64(bytes.len());
        let hash = *blake3::hash(&bytes).as_bytes();
        // No state refers to the journal, so its clusters have no references.
        let cluster = self.counts.take_run(self.size().count_for(length))?;
        let at = HostOffset(cluster << self.size().bits());
        self.write_tables(at, bytes)?;
        Ok(Some((JournalPlace { at, length, hash }, journal)))
    }
}

impl Built<'_> {
    /// Whether the change goes through the journal.
    pub fn has_journal(&self) -> bool {
        self.journal.is_some()
    }

    /// Reads the new state back and checks it whole; `before` is what a check of the old state found, and so many
    /// corruptions may be left.
    pub fn prove(
        &self,
        before: &CheckReport,
        corruptions: u64,
        control: &Control<'_>,
    ) -> Result<CheckReport> {
        let failed = |reason: String| Error::NotProven {
            path: self.edit.path.clone(),
            reason,
        };
        let file = ImageFile::on(Arc::clone(&self.edit.storage), &self.edit.path)?;
        let layer = match Layer::with_header(file, self.header.clone()) {
            Ok(layer) => match &self.edit.guest {
                Some(guest) => layer.with_data(guest.image()?)?,
                None => layer,
            },
            Err(error) => return Err(failed(error.to_string())),
        };
        let report = check_with(&layer, control)?;
        let first = report.findings.first().map(ToString::to_string);
        if report.corruptions > corruptions {
            return Err(failed(first.unwrap_or_default()));
        }
        if report.leaks > before.leaks {
            let reason = format!(
                "{} clusters are leaked, {} were",
                report.leaks, before.leaks
            );
            return Err(failed(reason));
        }
        match self.has_directories(&layer) {
            Ok(true) => {}
            Ok(false) => {
                let reason = "the directories of snapshots and bitmaps are not what was written";
                return Err(failed(reason.into()));
            }
            Err(error) => return Err(failed(error.to_string())),
        }
        for bitmap in &self.edit.bitmaps {
            control.go_on(&self.edit.path)?;
            match says_enough(bitmap, &self.edit.old, &layer) {
                Ok(true) => {}
                Ok(false) => {
                    let name = String::from_utf8_lossy(bitmap.record.name());
                    return Err(failed(format!(
                        "the bitmap {name:?} says less than it must"
                    )));
                }
                Err(error) => return Err(failed(error.to_string())),
            }
        }
        Ok(report)
    }

    /// Whether the directories that are read back are those that were written.
    fn has_directories(&self, layer: &Layer) -> Result<bool> {
        let bitmaps = self.edit.bitmaps.iter().map(|bitmap| &bitmap.record);
        Ok(records::snapshots(layer)? == self.edit.snapshots
            && records::bitmaps(layer)?.iter().eq(bitmaps))
    }

    /// Makes the new state the image.
    ///
    /// # Durability
    /// When this returns `Ok`, the new state is the image, and synced; it says how many bytes were written in place
    /// and found again.
    ///
    /// # Errors
    /// [`Error::Switch`], with the image as it was, or as it was to be, or in progress.
    pub fn switch(self, moving: Option<&Moving<'_>>) -> Result<u64> {
        let switch = Switch {
            storage: &self.edit.storage,
            target: self.edit.target.as_ref(),
            path: &self.edit.path,
            moving,
        };
        let in_place = match &self.journal {
            None if self.first == self.edit.old_first => 0,
            None => {
                switch.write_sector(&self.first)?;
                0
            }
            Some((place, journal)) => {
                let old = FirstCluster::decode(&self.edit.old_first, self.edit.old.header());
                switch.write_sector(&old.in_progress(place))?;
                switch.finish(journal)?
            }
        };
        switch.cut(self.end_bytes)?;
        Ok(in_place)
    }
}

/// The steps of the switch, the same for the change itself and for its recovery.
pub(super) struct Switch<'a> {
    pub storage: &'a Arc<dyn Storage>,
    /// The raw file that the ranges of the journal lie in, if they do.
    pub target: Option<&'a Arc<dyn Storage>>,
    pub path: &'a Path,
    /// Is told of data that is written in place.
    pub moving: Option<&'a Moving<'a>>,
}

impl Switch<'_> {
    pub fn failed(&self, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        let path = self.path.to_owned();
        move |source| Error::Switch {
            path,
            action,
            source,
        }
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        let written = self.storage.write_all_at(bytes, at);
        written.map_err(self.failed("a write"))
    }

    pub fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(self.failed("a sync"))
    }

    fn write_sector(&self, first: &[u8]) -> Result<()> {
        self.write(&first[..SECTOR], 0)?;
        self.sync()?;
        let mut found = [0; SECTOR];
        let read = self.storage.read_exact_at(&mut found, 0);
        read.map_err(self.failed("reading the first sector back"))?;
        if found == first[..SECTOR] {
            return Ok(());
        }
        let lost = io::Error::new(
            io::ErrorKind::InvalidData,
            "it is not what was written; the storage is faulty",
        );
        Err(self.failed("reading the first sector back")(lost))
    }

    /// Does what the journal says; each part can be done again. How many bytes were written in place, and found
    /// again.
    fn finish(&self, journal: &Journal) -> Result<u64> {
        let sources = match !journal.ranges.is_empty() || journal.target.is_some() {
            true => self.redo(journal)?,
            false => None,
        };
        if journal.first.len() > SECTOR {
            self.write(&journal.first[SECTOR..], to_u64(SECTOR))?;
        }
        let verified = self.settle(journal, sources.as_ref())?;
        self.write_sector(&journal.first)?;
        Ok(verified)
    }

    /// The disk that the ranges get their bytes from.
    pub fn sources(&self, journal: &Journal) -> Result<Option<Chain>> {
        let mut members = Vec::new();
        if journal.target.as_ref().is_some_and(|to| !to.data_file) {
            let header = Header::decode(&journal.first, self.path)?;
            let file = ImageFile::on(Arc::clone(self.storage), self.path)?;
            let layer = Layer::with_header(file, header)?;
            let own = journal.layers.first().filter(|first| first.is_data);
            let layer = match own {
                Some(own) => layer.with_data(ImageFile::open(&own.file.path)?)?,
                None => layer,
            };
            members.push(Member::from_layer(layer)?);
        }
        for (at, layer) in journal.layers.iter().enumerate() {
            let data = journal.layers.get(at + 1).filter(|next| next.is_data);
            let data = data.map(|data| data.file.path.as_path());
            if !layer.is_data {
                members.push(Member::open_with_data(&layer.file, data)?);
            }
        }
        if members.is_empty() && journal.ranges.is_empty() {
            // Nothing is read, only the other file gets another length.
            return Ok(None);
        }
        Chain::of_members(members).map(Some)
    }

    pub fn unrecoverable(&self, reason: String) -> Error {
        Error::Unrecoverable {
            path: self.path.to_owned(),
            reason,
        }
    }

    /// Gives back what lies behind the last cluster of the new state.
    fn cut(&self, length: u64) -> Result<()> {
        let before = self
            .storage
            .len()
            .map_err(self.failed("asking for the length"))?;
        if before == length {
            return Ok(());
        }
        self.storage
            .set_len(length)
            .map_err(self.failed("cutting the end off"))?;
        self.sync()
    }
}

/// What [`recover`](super::recover) found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// No change was in progress.
    NothingToDo,
    /// The change that was in progress is finished.
    Finished,
}

/// Finishes the change that an image is in, if it is in one; see [`super::recover`].
pub(super) fn recover_on(
    storage: &Arc<dyn Storage>,
    path: &Path,
    raw: Option<&Arc<dyn Storage>>,
    files: &JournalFiles,
) -> Result<Recovery> {
    let mut switch = Switch {
        storage,
        target: raw,
        path,
        moving: None,
    };
    let mut sector = [0; SECTOR];
    let read = storage.read_exact_at(&mut sector, 0);
    read.map_err(|source| Error::io("read", path, source))?;
    let Some(place) = JournalPlace::find(&sector) else {
        return Ok(Recovery::NothingToDo);
    };
    let mut journal = read_journal(&switch, &place)?;
    files.admit(&mut journal, path, raw.is_some())?;
    for layer in &journal.layers {
        let name = layer.file.path.display();
        let unchanged = layer.is_unchanged();
        match unchanged {
            Ok(true) => {}
            Ok(false) => {
                return Err(switch.unrecoverable(format!("the layer {name} is not what it was")));
            }
            Err(error) => return Err(switch.unrecoverable(format!("the layer {name}: {error}"))),
        }
    }
    let other = match &journal.target {
        Some(target) if raw.is_none() => Some(open_target(&switch, target)?),
        Some(_) | None => None,
    };
    let other = other.as_ref().map(|(storage, _lock)| storage);
    switch.target = raw.or(other).filter(|_| journal.target.is_some());
    switch.finish(&journal)?;
    switch.cut(journal.length)?;
    Ok(Recovery::Finished)
}

/// Opens and locks the raw file of a change in progress.
fn open_target(switch: &Switch<'_>, target: &Target) -> Result<(Arc<dyn Storage>, ImageLock)> {
    let name = target.path.display();
    let failed = |error: String| switch.unrecoverable(format!("the raw file {name}: {error}"));
    // Allowed is the name, and not what lies there now: what is no file and no device is refused before it is opened for writing.
    stead_sys::readable::open(&target.path).map_err(|error| failed(error.to_string()))?;
    let (file, lock) = super::lock(&target.path).map_err(|error| failed(error.to_string()))?;
    let storage = FileStorage::new(file).map_err(|error| failed(error.to_string()))?;
    Ok((Arc::new(storage), lock))
}

fn read_journal(switch: &Switch<'_>, place: &JournalPlace) -> Result<Journal> {
    let path = switch.path;
    let length = switch.storage.len();
    let length = length.map_err(|source| Error::io("find the length of", path, source))?;
    let end = place.at.0.checked_add(place.length);
    if place.length > MAX_JOURNAL_BYTES || end.is_none_or(|end| end > length) {
        return Err(switch.unrecoverable("its journal does not lie in the file".into()));
    }
    let mut bytes = vec![0; to_usize(place.length)];
    let read = switch.storage.read_exact_at(&mut bytes, place.at.0);
    read.map_err(|source| Error::io("read", path, source))?;
    if *blake3::hash(&bytes).as_bytes() != place.hash {
        return Err(switch.unrecoverable("its journal has another hash".into()));
    }
    let journal = Journal::decode(&bytes);
    let journal =
        journal.ok_or_else(|| switch.unrecoverable("its journal is of another kind".into()))?;
    require_valid(switch, &journal, length)?;
    Ok(journal)
}

/// A journal is ours, so what it says holds; but it was read from a file, and anybody can make one with a right hash.
fn require_valid(switch: &Switch<'_>, journal: &Journal, length: u64) -> Result<()> {
    Header::decode(&journal.first, switch.path)?;
    let invalid = |what: &str| Err(switch.unrecoverable(format!("its journal {what}")));
    if journal.length > length || journal.length < to_u64(journal.first.len()) {
        return invalid("gives the file a length that it cannot have");
    }
    if journal.layers.len() > MAX_JOURNAL_LAYERS {
        return invalid("names more files than a chain can have");
    }
    let length = journal.target.as_ref().map_or(length, |other| other.length);
    let inside = |range: &InPlaceRange| {
        let end = range.host.0.checked_add(range.length);
        end.is_some_and(|end| end <= length) && range.guest.0.checked_add(range.length).is_some()
    };
    if !journal.ranges.iter().all(inside) {
        return invalid("writes out of the file");
    }
    // Nothing is written twice, so this is how long a recovery can take.
    let lengths = journal.ranges.iter().map(|range| range.length);
    let all = lengths.fold(0, u64::saturating_add);
    if all > length || journal.ranges.len() > MAX_IN_PLACE_RANGES {
        return invalid("writes more than the file has");
    }
    Ok(())
}
