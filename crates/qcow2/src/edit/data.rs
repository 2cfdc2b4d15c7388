//! Guest data in an external data file, and where in it a new state may write.
//!
//! A guest cluster has one place in the data file: its own offset on the disk. So there are no two states beside each
//! other, and what is done depends on what the old state shows at a place:
//!
//! | the old state shows there | the file is read through the image only | the file is raw, the disk by itself |
//! |---|---|---|
//! | data | in place, through the journal | in place, through the journal |
//! | zeros, or what lies below | at once: nobody sees it before the switch | in place, through the journal |
//! | nothing: behind the disk's end | at once | at once |
//!
//! # Invariants
//! * Data files have no refcounts: their clusters are never taken, shared or released.
//! * Such an image has no internal snapshots, which would need them; QEMU refuses to make any, and so does this crate.
//! * The data file is longer before the switch where the disk grows, and cut only through the journal where it
//!   shrinks, so both states find all their bytes.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_sys::copy::is_zero;
use stead_sys::image_lock::ImageLock;
use stead_sys::space;
use stead_sys::storage::{FileStorage, Storage};

use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::header::{to_u64, to_usize};
use crate::layer::ExtentKind;
use crate::units::{GuestOffset, HostOffset};

use super::in_place::{InPlaceRange, Target};
use super::room::NewBlocks;
use super::transaction::Edit;
use super::views::{Mapping, View};

/// How many bytes are made zeros at a time.
const STEP_BYTES: u64 = 1 << 20;

/// The external data file of an image that is open for changes.
#[derive(Debug)]
pub(super) struct DataFile {
    storage: Arc<dyn Storage>,
    /// From the root, where it is a file: a recovery opens it by that.
    path: PathBuf,
    /// Where to look for holes and free space.
    file: Option<FileStorage>,
    _lock: Option<ImageLock>,
}

impl DataFile {
    /// Locks the file at `path` for writing.
    pub fn open(path: &Path) -> Result<Self> {
        let error = |source| Error::io("open", path, source);
        let (file, lock) = super::lock(path)?;
        let duplicate = file.try_clone().map_err(error)?;
        Ok(Self {
            storage: Arc::new(FileStorage::new(duplicate).map_err(error)?),
            path: std::fs::canonicalize(path).map_err(error)?,
            file: Some(FileStorage::new(file).map_err(error)?),
            _lock: Some(lock),
        })
    }

    /// Any storage; whether there is room is not looked at.
    pub fn on_storage(storage: Arc<dyn Storage>, path: &Path) -> Self {
        Self {
            storage,
            path: path.to_owned(),
            file: None,
            _lock: None,
        }
    }

    /// The file for a layer that reads from it.
    pub fn image(&self) -> Result<ImageFile> {
        ImageFile::on(Arc::clone(&self.storage), &self.path)
    }

    pub fn length(&self) -> Result<u64> {
        let length = self.storage.len();
        length.map_err(|source| Error::io("find the length of", &self.path, source))
    }

    /// Cuts off what a change wrote behind the end, when it came to nothing.
    pub fn give_back(&self, length: u64) {
        if let Err(_stays_longer) = self.storage.set_len(length) {
            // Bytes behind the disk's end, which nobody sees.
        }
    }

    /// The file as a transaction writes to it.
    pub fn for_edit(&self, raw: bool) -> Result<GuestFile> {
        let error = |source| Error::io("open", &self.path, source);
        let file = self.file.as_ref().map(|file| file.file().try_clone());
        let length = self.length()?;
        Ok(GuestFile {
            storage: Arc::clone(&self.storage),
            path: self.path.clone(),
            raw,
            fixed: self.file.as_ref().is_some_and(FileStorage::is_device),
            length,
            blocks: NewBlocks::new(file.transpose().map_err(error)?, length),
        })
    }

    /// The bytes are there that a change needs in this file, and `others` that it needs on the image's file system.
    pub fn require_room(&self, needed: u64, image: &Path, others: u64) -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let Some(file) = self.file.as_ref().filter(|file| !file.is_device()) else {
            return Ok(());
        };
        let error = |source| Error::io("find the room for", &self.path, source);
        let own = file.file().metadata().map_err(error)?.dev();
        let together = std::fs::metadata(image).map_err(error)?.dev() == own;
        let needed = needed.saturating_add(if together { others } else { 0 });
        let available = space::available_bytes(&self.path).map_err(error)?;
        if needed <= available {
            return Ok(());
        }
        Err(Error::NoRoom {
            path: self.path.clone(),
            needed,
            available,
        })
    }
}

/// The external data file while a new state is built.
#[derive(Debug)]
pub(super) struct GuestFile {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    /// Read alone, it is the disk.
    raw: bool,
    /// Its length cannot change.
    fixed: bool,
    /// Its length before, in bytes.
    length: u64,
    blocks: NewBlocks,
}

impl GuestFile {
    /// Bytes that the file had no room for before; 0 but in a plan.
    pub fn new_bytes(&self) -> u64 {
        self.blocks.bytes()
    }

    pub fn image(&self) -> Result<ImageFile> {
        ImageFile::on(Arc::clone(&self.storage), &self.path)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Edit<'_> {
    /// Whether guest data lies in an external data file.
    #[must_use]
    pub fn is_elsewhere(&self) -> bool {
        self.shape().external_data.is_some()
    }

    /// Whether an external data file, read alone, is the disk.
    #[must_use]
    pub fn is_raw_elsewhere(&self) -> bool {
        self.guest.as_ref().is_some_and(|guest| guest.raw)
    }

    /// The tables of an image with an external data file can be changed only where that file can.
    pub(super) fn require_guest_file(&self) -> Result<()> {
        let operation = "change what the image shows";
        if self.is_elsewhere() && self.guest.is_none() {
            let reason =
                "guest data lies in an external data file, and only the header can be changed";
            return Err(self.refused(operation, reason));
        }
        if self.is_elsewhere() && !self.snapshots.is_empty() {
            let reason = "it has an external data file, which counts no references, and internal snapshots, which need \
                          them; convert it first";
            return Err(self.refused(operation, reason));
        }
        Ok(())
    }

    /// Where data of guest clusters from `cluster` on goes that the old state shows nothing of: in the image, new
    /// clusters with refcount one; in an external data file, their own place. Where, and how many, at most `most`.
    ///
    /// # Errors
    /// As [`Edit::allocate`].
    pub fn place(&mut self, cluster: u64, most: u64) -> Result<(HostOffset, u64)> {
        let bits = self.size().bits();
        if self.guest.is_none() {
            return self.allocate_up_to(most);
        }
        self.note_guest_blocks(cluster << bits..(cluster + most) << bits)?;
        Ok((HostOffset(cluster << bits), most))
    }

    pub(crate) fn note_guest_blocks(&mut self, range: Range<u64>) -> Result<()> {
        let plan = self.plan;
        let Some(guest) = self.guest.as_mut().filter(|_| plan) else {
            return Ok(());
        };
        let added = guest.blocks.add(range.start, range.end - range.start);
        added.map_err(|source| Error::io("find the holes of", &guest.path, source))
    }

    /// Asserts that the old state shows nothing of what lies at a place of guest data.
    pub(super) fn require_unseen(&mut self, at: HostOffset, length: u64) -> Result<()> {
        let Some(guest) = &self.guest else {
            return self.require_new(at, length);
        };
        let end = (at.0 + length).min(self.old.virtual_size());
        assert!(
            !guest.raw || at.0 >= end,
            "a raw data file shows the disk, at {at}"
        );
        let mut next = at.0;
        while next < end {
            let extent = self.old.extent_at(GuestOffset(next))?;
            let data = matches!(extent.kind, ExtentKind::Data(_));
            assert!(!data, "a write to data of the old state, at {next:#x}");
            next = extent.start.0 + extent.length;
        }
        Ok(())
    }

    /// Writes guest data where [`Edit::place`] said.
    ///
    /// # Errors
    /// When writing fails.
    ///
    /// # Panics
    /// When the old state shows what lies there.
    pub fn write_guest(&mut self, at: HostOffset, bytes: &[u8]) -> Result<()> {
        self.require_unseen(at, to_u64(bytes.len()))?;
        if self.plan {
            return Ok(());
        }
        self.put_guest(at, bytes)
    }

    /// As [`Edit::write_guest`], from a file: shared where the file system can.
    ///
    /// # Errors
    /// When reading or writing fails, or `source` ends first.
    ///
    /// # Panics
    /// When the old state shows what lies there.
    pub fn copy_guest(
        &mut self,
        at: HostOffset,
        source: &File,
        from: u64,
        length: u64,
    ) -> Result<()> {
        self.require_unseen(at, length)?;
        if self.plan {
            return self.note_shared(at, source, from, length);
        }
        self.clone_guest(at, source, from, length)
    }

    /// Behind the disk's end nobody looks, and a data file should be as long as the disk.
    fn shown_bytes(&self, at: HostOffset, length: u64) -> u64 {
        match self.guest {
            Some(_) => length.min(self.virtual_size().saturating_sub(at.0)),
            None => length,
        }
    }

    fn guest_storage(&self) -> (&Arc<dyn Storage>, &Path) {
        match &self.guest {
            Some(guest) => (&guest.storage, &guest.path),
            None => (&self.storage, &self.path),
        }
    }

    pub(super) fn put_guest(&self, at: HostOffset, bytes: &[u8]) -> Result<()> {
        let there = to_usize(self.shown_bytes(at, to_u64(bytes.len())));
        let (storage, path) = self.guest_storage();
        let written = storage.write_all_at(&bytes[..there], at.0);
        written.map_err(|source| Error::io("write data of", path, source))
    }

    pub(super) fn clone_guest(
        &self,
        at: HostOffset,
        source: &File,
        from: u64,
        length: u64,
    ) -> Result<()> {
        let there = self.shown_bytes(at, length);
        let (storage, path) = self.guest_storage();
        let copied = storage.copy_from(source, from, at.0, there);
        copied.map_err(|source| Error::io("copy data to", path, source))
    }

    /// As [`Edit::clone_guest`], of what is read back soon.
    pub(super) fn clone_guest_to_read(
        &self,
        at: HostOffset,
        source: &File,
        from: u64,
        length: u64,
    ) -> Result<()> {
        let there = self.shown_bytes(at, length);
        let (storage, path) = self.guest_storage();
        let copied = storage.copy_to_read(source, from, at.0, there);
        copied.map_err(|source| Error::io("copy data to", path, source))
    }

    /// Puts what was written so far of the file that guest data lies in on the disk.
    pub(super) fn sync_guest(&self) -> Result<()> {
        let (storage, path) = self.guest_storage();
        let synced = storage.sync();
        synced.map_err(|source| Error::io("sync", path, source))
    }

    /// Reads guest data of the file that it lies in; zeros behind that file's end.
    pub(super) fn read_guest(&self, at: HostOffset, bytes: &mut [u8]) -> Result<()> {
        let (storage, path) = self.guest_storage();
        let error = |source| Error::io("read", path, source);
        let length = storage.len().map_err(error)?;
        let there = length.saturating_sub(at.0).min(to_u64(bytes.len()));
        let (data, behind) = bytes.split_at_mut(to_usize(there));
        behind.fill(0);
        storage.read_exact_at(data, at.0).map_err(error)
    }

    /// Makes a guest cluster `bytes`, which are what the old state shows wherever it has data of its own there: only
    /// the rest is written.
    pub(super) fn write_rest(&mut self, cluster: u64, bytes: &[u8]) -> Result<()> {
        let start = cluster << self.size().bits();
        let (mut at, end) = (start, start + to_u64(bytes.len()));
        self.note_guest_blocks(at..end)?;
        let disk_end = self.old.virtual_size();
        while at < end {
            let (stop, own) = if at < disk_end {
                let extent = self.old.extent_at(GuestOffset(at))?;
                let stop = (extent.start.0 + extent.length).min(end);
                (stop, matches!(extent.kind, ExtentKind::Data(_)))
            } else {
                (end, false)
            };
            if !own {
                let part = &bytes[to_usize(at - start)..to_usize(stop - start)];
                self.write_guest(HostOffset(at), part)?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Has a range of the disk written over the data file when the new state is switched to, from the layers of
    /// [`Edit::set_sources`].
    ///
    /// # Errors
    /// When there are too many ranges.
    ///
    /// # Panics
    /// When the image has no external data file.
    pub fn overwrite_guest(&mut self, range: Range<u64>) -> Result<()> {
        assert!(self.guest.is_some(), "a data file to write to");
        self.note_guest_blocks(range.clone())?;
        self.in_place.push(InPlaceRange {
            guest: GuestOffset(range.start),
            host: HostOffset(range.start),
            length: range.end - range.start,
        });
        self.require_few_ranges()
    }

    /// Makes what follows `end`, where the disk ends now, zeros in the data file, before the disk grows to `after`.
    /// The old state does not show it.
    pub(super) fn clear_behind(&mut self, end: u64, after: u64) -> Result<()> {
        let Some(guest) = &self.guest else {
            return Ok(());
        };
        // Whoever reads a raw one alone sees all of it; else the rest of the last cluster could be seen.
        let last = if guest.raw {
            after
        } else {
            end.next_multiple_of(self.size().bytes())
        };
        let last = last.min(guest.length);
        let mut at = end;
        while at < last && !self.plan {
            let length = STEP_BYTES.min(last - at);
            let mut bytes = vec![0; to_usize(length)];
            self.read_guest(HostOffset(at), &mut bytes)?;
            if !is_zero(&bytes) {
                bytes.fill(0);
                let (storage, path) = self.guest_storage();
                let written = storage.write_all_at(&bytes, at);
                written.map_err(|source| Error::io("write data of", path, source))?;
            }
            at += length;
        }
        Ok(())
    }

    /// As [`Edit::clear_behind`], where the last cluster shows what lies below and the disk below goes on.
    pub(super) fn own_last_cluster(&mut self, cluster: u64, bytes: &[u8]) -> Result<()> {
        self.write_rest(cluster, bytes)?;
        let host = HostOffset(cluster << self.size().bits());
        self.set_mapping(View::Active, cluster, Mapping::Data { host })
    }

    /// Gives the data file the length that both states need, has the journal do the rest, and syncs it.
    pub(super) fn settle_guest_file(&mut self) -> Result<()> {
        let (before, after) = (self.old.virtual_size(), self.virtual_size());
        let Some(guest) = &self.guest else {
            return Ok(());
        };
        let error = |action| move |source| Error::io(action, &guest.path, source);
        if guest.fixed && after > before && after > guest.length {
            return Err(Error::NoRoom {
                path: guest.path.clone(),
                needed: after,
                available: guest.length,
            });
        }
        let mut length = guest.storage.len().map_err(error("find the length of"))?;
        // With another target, the ranges lie in a raw file below.
        let in_place = self.in_place.target.is_none() && !self.in_place.ranges.is_empty();
        if !self.plan {
            if (after > before || in_place) && after > length && !guest.fixed {
                let grown = guest.storage.set_len(after);
                grown.map_err(error("set the length of"))?;
                length = after;
            }
            guest.storage.sync().map_err(error("sync"))?;
        }
        let length = match after < before {
            _ if guest.fixed => length,
            true => after,
            false => length.max(after),
        };
        if after < before || in_place {
            let target = Target {
                path: guest.path.clone(),
                length,
                data_file: true,
            };
            self.in_place.target = Some((target, Some(Arc::clone(&guest.storage))));
        }
        Ok(())
    }
}
