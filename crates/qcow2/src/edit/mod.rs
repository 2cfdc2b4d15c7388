//! Changing an existing image in one step: the new state is built beside the old one, proven, and
//! switched to.
//!
//! ```text
//!              plan: the change on a scratch storage      refuse (nothing written)
//!  Editor ──────────────────────────────────────────┬──▶  no room, a refcount that does not fit, ...
//!    ▲                                              │
//!    │        apply: the change on the file         ▼
//!    └── switched ◀── proven ◀── built ◀── Edit (old state untouched, new state in free clusters)
//! ```
//! An [`Editor`] is an image that is locked, whole, and open for changes. A change is a function that gets an
//! [`Edit`], the new state, and works on it: takes clusters, writes data into them, sets what guest
//! clusters map to, adds and removes internal snapshots and marks bitmaps. [`Editor::plan`] runs it without
//! touching the image and says how much room it needs; [`Editor::apply`] plans, looks whether the room is there,
//! runs it on the image, reads the new state back, checks it whole, and switches.
//!
//! # Invariants
//! * No cluster that the old state refers to is written, but by [`Edit::overwrite`], which goes through the
//!   journal.
//! * Nothing refers to the new state before all of it has been synced and checked.
//! * Refcounts follow from what the tables say: an entry that is set takes a reference over, one that is
//!   replaced gives its references up. The check before the switch finds whoever does it otherwise.
//! * Memory is bounded by [`EditOptions::cache_bytes`] for tables, plus one L1 table of the active disk and
//!   of one internal snapshot (32 MiB each at most), the refcount table (8 MiB) and the directories.

mod allowed;
mod below;
mod bitmap_changes;
mod bitmaps;
mod bitmaps_proof;
pub(crate) mod copies;
mod data;
mod expand;
mod fill;
mod first;
mod groups;
mod in_place;
mod length;
mod rebuild;
mod records;
mod redo;
mod refcounts;
mod repair;
mod reserve;
mod room;
mod snapshots;
mod switch;
mod tables;
mod transaction;
mod versions;
mod views;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_sys::image_lock::{Access, Attempt, ImageLock};
use stead_sys::space;
use stead_sys::storage::{FileStorage, Storage};

use crate::check::{CheckReport, check_with};
use crate::control::{Control, Moving};
use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::following::{OpenPolicy, data_file_of};
use crate::header::to_usize;
use crate::layer::Layer;

pub(crate) use allowed::listed as listed_files;
pub use allowed::{JournalFile, JournalFiles};
pub use below::Below;
pub use fill::Filled;
pub use in_place::MAX_IN_PLACE_RANGES;
pub use records::{BitmapRecord, SnapshotName, SnapshotRecord};
pub(crate) use repair::{BitmapsToDrop, RefcountsFrom};
pub use room::Plan;
pub use switch::Recovery;
pub use transaction::Edit;
pub use views::{Mapping, View};

use data::DataFile;
pub(crate) use room::NewBlocks;
use room::Scratch;
use switch::Built;
use transaction::Start;

/// How images are opened for changes.
#[derive(Debug, Clone, Copy)]
pub struct EditOptions {
    /// How much memory tables may take, in bytes; 64 MiB if nothing is said.
    pub cache_bytes: u64,
    /// Whether an image that is marked dirty is taken if it is whole all the same.
    pub allow_dirty: bool,
}

impl Default for EditOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            allow_dirty: false,
        }
    }
}

impl EditOptions {
    /// The same, with somebody who watches while the image is opened: it is checked whole.
    #[must_use]
    pub fn watched<'a>(self, control: &Control<'a>) -> Opening<'a> {
        Opening {
            options: self,
            control: *control,
        }
    }
}

/// How an image is opened for changes, and who watches meanwhile: [`EditOptions`], or [`EditOptions::watched`].
#[derive(Debug, Clone, Copy)]
pub struct Opening<'a> {
    options: EditOptions,
    control: Control<'a>,
}

impl From<EditOptions> for Opening<'_> {
    fn from(options: EditOptions) -> Self {
        Self {
            options,
            control: Control::default(),
        }
    }
}

/// What a change leaves behind, and who looks on.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Leaving<'a> {
    /// Free space that must be left for something else, in bytes.
    pub free_bytes: u64,
    /// Corruptions that the new state may still have: a repair takes away what it can.
    pub corruptions: u64,
    /// Is told of data that is written in place, and can end the change as long as the image is as it was.
    pub moving: Option<&'a Moving<'a>>,
    /// Can end the change as long as the image is as it was, and is told of its stages.
    pub control: Control<'a>,
}

/// How far a change is when it is planned, and when it is built, of what ends with its proof. Where little changes, all three
/// look at the same tables.
const PLANNED: f64 = 0.3;
const BUILT: f64 = 0.7;

/// What a change did.
#[derive(Debug, Clone)]
pub struct Done<T> {
    /// What the change itself gave.
    pub value: T,
    /// The room that it took.
    pub room: Plan,
    /// What a check of the new state found, before it was switched to.
    pub check: CheckReport,
    /// How many bytes were written in place, and were read back and found to be what they had to be.
    pub in_place_bytes: u64,
}

/// An image that is locked, whole and open for changes. Dropping it gives the lock back.
#[derive(Debug)]
pub struct Editor {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    /// Where to look for holes and free space.
    file: Option<FileStorage>,
    _lock: Option<ImageLock>,
    options: EditOptions,
    old: Arc<Layer>,
    old_first: Vec<u8>,
    before: CheckReport,
    /// The image may be damaged, and its repair is what it is open for.
    damaged: bool,
    /// Guest data may lie in another file that is not open; then only the header and refcounts can be changed.
    data_elsewhere: bool,
    /// Where guest data lies, if that is another file.
    data: Option<DataFile>,
}

/// Locks the file at `path`, open for reading and writing.
pub(crate) fn lock(path: &Path) -> Result<(File, ImageLock)> {
    let opened = File::options().read(true).write(true).open(path);
    let file = opened.map_err(|source| Error::io("open", path, source))?;
    lock_file(file, path, Access::Write)
}

/// Locks the file at `path` so that nobody writes to it.
pub(crate) fn lock_for_reading(path: &Path) -> Result<(File, ImageLock)> {
    let opened = stead_sys::readable::open(path);
    let file = opened.map_err(|source| Error::io("open", path, source))?;
    lock_file(file, path, Access::Read)
}

fn lock_file(file: File, path: &Path, access: Access) -> Result<(File, ImageLock)> {
    let attempt = ImageLock::attempt(&file, access);
    match attempt.map_err(|source| Error::io("lock", path, source))? {
        Attempt::Locked(lock) => Ok((file, lock)),
        Attempt::HeldBy(holders) => {
            let holders: Vec<String> = holders.iter().map(ToString::to_string).collect();
            Err(Error::InUse {
                path: path.to_owned(),
                holders: holders.join(", "),
            })
        }
    }
}

fn file_storage(file: File, path: &Path) -> Result<FileStorage> {
    FileStorage::new(file).map_err(|source| Error::io("open", path, source))
}

/// Finishes the change that the image at `path` is in, if it is in one.
///
/// The image says which files the change takes data from and, where it is one into a raw base or an external data
/// file, which it writes to. Anybody can make an image that says so: `files` are those that the caller allows.
///
/// # Durability
/// When this returns `Ok`, the image is whole and synced.
///
/// # Errors
/// When the change needs a file that is not allowed ([`Error::JournalFiles`] names all of them; nothing was written),
/// the image is in use ([`Error::InUse`]), a layer that the change takes data from is gone or is not what it
/// was ([`Error::Unrecoverable`]), or reading or writing fails ([`Error::Switch`]). The image then stays in
/// progress, and this can be called again.
pub fn recover(path: &Path, files: &JournalFiles) -> Result<Recovery> {
    let (file, _lock) = lock(path)?;
    recover_storage(Arc::new(file_storage(file, path)?), path, files)
}

/// As [`recover`], for a storage that nobody else uses; `path` is for texts and for [`JournalFiles::InFolder`].
///
/// # Errors
/// As [`recover`].
pub fn recover_storage(
    storage: Arc<dyn Storage>,
    path: &Path,
    files: &JournalFiles,
) -> Result<Recovery> {
    switch::recover_on(&storage, path, None, files)
}

/// As [`recover_storage`], with the file that the change may write to, whatever the journal calls it.
///
/// # Errors
/// As [`recover`].
pub fn recover_storage_over(
    storage: Arc<dyn Storage>,
    path: &Path,
    raw: Arc<dyn Storage>,
    files: &JournalFiles,
) -> Result<Recovery> {
    switch::recover_on(&storage, path, Some(&raw), files)
}

impl Editor {
    /// Opens the image at `path` for changes: locks it, reads it and checks it whole. Nothing is written.
    ///
    /// # Errors
    /// When it cannot be opened, is in use ([`Error::InUse`]), in progress ([`Error::InProgress`]), marked
    /// corrupt or dirty, or damaged ([`Error::Damaged`]; leaks are no damage).
    pub fn open<'c>(path: &Path, options: impl Into<Opening<'c>>) -> Result<Self> {
        Self::open_with(path, |storage| Self::on_storage(storage, path, options))
    }

    /// As [`Editor::open`], with the guest data in the file at `data`, which is locked, too.
    ///
    /// # Errors
    /// As [`Editor::open`]; [`Error::NoExternalData`] when the image keeps guest data itself.
    pub fn open_with_data<'c>(
        path: &Path,
        data: &Path,
        options: impl Into<Opening<'c>>,
    ) -> Result<Self> {
        Self::open_with(path, |storage| {
            let data = DataFile::open(data)?;
            Self::read(storage, path, options, Elsewhere::File(data))?.whole()
        })
    }

    /// As [`Editor::open`], with the external data file that the image may name, as far as `policy` follows names.
    ///
    /// # Errors
    /// As [`Editor::open`]; [`Error::NotFollowed`].
    pub fn open_following<'c>(
        path: &Path,
        policy: &OpenPolicy,
        options: impl Into<Opening<'c>>,
    ) -> Result<Self> {
        match data_file_of(&Layer::inspect(path)?, policy)? {
            Some(data) => Self::open_with_data(path, &data, options),
            None => Self::open(path, options),
        }
    }

    /// As [`Editor::on_storage`], with the guest data in another storage that nobody else uses. `data_path` is from
    /// the root; a recovery opens the file by it, unless it is given the storage
    /// ([`recover_storage_over`]).
    ///
    /// # Errors
    /// As [`Editor::open_with_data`].
    pub fn on_storage_with_data<'c>(
        storage: Arc<dyn Storage>,
        path: &Path,
        (data, data_path): (Arc<dyn Storage>, &Path),
        options: impl Into<Opening<'c>>,
    ) -> Result<Self> {
        let data = DataFile::on_storage(data, data_path);
        Self::read(storage, path, options, Elsewhere::File(data))?.whole()
    }

    fn whole(mut self) -> Result<Self> {
        self.require_whole()?;
        self.damaged = false;
        Ok(self)
    }

    /// As [`Editor::open`], also for an image whose guest data lies in an external data file, which is not opened. Of
    /// such an image the header and refcounts can be changed ([`crate::ops::amend`]); what touches its tables is refused.
    ///
    /// # Errors
    /// As [`Editor::open`].
    pub fn open_for_amendments<'c>(path: &Path, options: impl Into<Opening<'c>>) -> Result<Self> {
        Self::open_with(path, |storage| {
            Self::for_amendments_on(storage, path, options)
        })
    }

    /// As [`Editor::open_for_amendments`], on a storage that nobody else uses; `path` is only for texts.
    ///
    /// # Errors
    /// As [`Editor::open`].
    pub fn for_amendments_on<'c>(
        storage: Arc<dyn Storage>,
        path: &Path,
        options: impl Into<Opening<'c>>,
    ) -> Result<Self> {
        Self::read(storage, path, options, Elsewhere::Closed)?.whole()
    }

    /// As [`Editor::open`], for the repair of an image that may be damaged.
    pub(crate) fn open_damaged<'c>(path: &Path, options: impl Into<Opening<'c>>) -> Result<Self> {
        Self::open_with(path, |storage| Self::damaged_on(storage, path, options))
    }

    fn open_with(path: &Path, read: impl FnOnce(Arc<dyn Storage>) -> Result<Self>) -> Result<Self> {
        let (file, lock) = lock(path)?;
        let duplicate = file.try_clone();
        let duplicate = duplicate.map_err(|source| Error::io("open", path, source))?;
        let mut editor = read(Arc::new(file_storage(duplicate, path)?))?;
        editor.file = Some(file_storage(file, path)?);
        editor._lock = Some(lock);
        Ok(editor)
    }

    /// As [`Editor::open`], on a storage that nobody else uses; `path` is only for texts. Whether the room for
    /// a change is there is looked at only where the storage says how long it can be ([`Storage::room`]).
    ///
    /// # Errors
    /// As [`Editor::open`].
    pub fn on_storage<'c>(
        storage: Arc<dyn Storage>,
        path: &Path,
        options: impl Into<Opening<'c>>,
    ) -> Result<Self> {
        Self::read(storage, path, options, Elsewhere::Nothing)?.whole()
    }

    pub(crate) fn damaged_on<'c>(
        storage: Arc<dyn Storage>,
        path: &Path,
        options: impl Into<Opening<'c>>,
    ) -> Result<Self> {
        // Refcounts say nothing of data elsewhere, so it is not needed.
        Self::read(storage, path, options, Elsewhere::Closed)
    }

    fn read<'c>(
        storage: Arc<dyn Storage>,
        path: &Path,
        options: impl Into<Opening<'c>>,
        elsewhere: Elsewhere,
    ) -> Result<Self> {
        let (data_elsewhere, data) = match elsewhere {
            Elsewhere::Nothing => (false, None),
            Elsewhere::Closed => (true, None),
            Elsewhere::File(data) => (false, Some(data)),
        };
        let (old, old_first) = load(&storage, path, data_elsewhere, data.as_ref())?;
        let Opening { options, control } = options.into();
        let before = check_with(&old, &control)?;
        Ok(Self {
            path: path.to_owned(),
            storage,
            file: None,
            _lock: None,
            options,
            old: Arc::new(old),
            old_first,
            before,
            damaged: true,
            data_elsewhere,
            data,
        })
    }

    fn require_whole(&self) -> Result<()> {
        let path = self.path.clone();
        if self.old.header().corrupt {
            return Err(Error::MarkedCorrupt { path });
        }
        if self.old.header().dirty && !self.options.allow_dirty {
            return Err(Error::MarkedDirty { path });
        }
        if self.before.corruptions > 0 {
            let first = self.before.findings.iter().map(ToString::to_string).next();
            return Err(Error::Damaged {
                path,
                corruptions: self.before.corruptions,
                first: first.unwrap_or_default(),
            });
        }
        Ok(())
    }

    /// The image as it stands.
    #[must_use]
    pub fn layer(&self) -> &Layer {
        &self.old
    }

    /// What a check of the image as it stands found.
    #[must_use]
    pub fn check(&self) -> &CheckReport {
        &self.before
    }

    /// Runs a change without touching the image, and says how much room it needs.
    ///
    /// # Errors
    /// Those of the change; or when there is no room for the scratch file.
    pub fn plan<T>(&self, change: impl FnMut(&mut Edit<'_>) -> Result<T>) -> Result<Plan> {
        self.plan_with(&Control::default(), change)
    }

    /// As [`Editor::plan`], watched.
    ///
    /// # Errors
    /// As [`Editor::plan`]; [`Error::Cancelled`].
    pub fn plan_with<T>(
        &self,
        control: &Control<'_>,
        mut change: impl FnMut(&mut Edit<'_>) -> Result<T>,
    ) -> Result<Plan> {
        let scratch = Scratch::new(Arc::clone(&self.storage), self.old.cluster_size());
        let scratch =
            scratch.map_err(|source| Error::io("make a scratch file for", &self.path, source))?;
        let mut edit = self.edit(Arc::new(scratch), true, control)?;
        change(&mut edit)?;
        let plan = plan_of(&edit.build()?);
        control.tell(1, 1);
        Ok(plan)
    }

    /// Makes a change: plans it, refuses it if the room is not there, builds the new state, proves it and
    /// switches to it. The editor then stands on the new state.
    ///
    /// `change` runs twice, the first time as a plan ([`Edit::is_plan`]), and must do the same both times.
    ///
    /// # Durability
    /// When this returns `Ok`, the new state is the image, and synced.
    ///
    /// # Errors
    /// Those of the change and of writing: then the image is as it was. [`Error::Switch`]: then it is as it was,
    /// or as it was to be, or in progress.
    pub fn apply<T>(&mut self, change: impl FnMut(&mut Edit<'_>) -> Result<T>) -> Result<Done<T>> {
        self.apply_with(&Control::default(), change)
    }

    /// As [`Editor::apply`], watched: it can be ended as long as the image is as it was.
    ///
    /// # Durability
    /// As [`Editor::apply`].
    ///
    /// # Errors
    /// As [`Editor::apply`]; [`Error::Cancelled`], with the image as it was.
    pub fn apply_with<T>(
        &mut self,
        control: &Control<'_>,
        change: impl FnMut(&mut Edit<'_>) -> Result<T>,
    ) -> Result<Done<T>> {
        let leaving = Leaving {
            control: *control,
            ..Leaving::default()
        };
        let done = self.apply_leaving(leaving, change)?;
        control.tell(1, 1);
        Ok(done)
    }

    /// As [`Editor::apply`], with what it may or must leave.
    pub(crate) fn apply_leaving<T>(
        &mut self,
        leaving: Leaving<'_>,
        mut change: impl FnMut(&mut Edit<'_>) -> Result<T>,
    ) -> Result<Done<T>> {
        let control = leaving.control;
        let room = control.within((0.0, PLANNED), |part| self.plan_with(part, &mut change))?;
        self.require_room(&room, leaving.free_bytes)?;
        let length = self.storage.len();
        let length =
            length.map_err(|source| Error::io("find the length of", &self.path, source))?;
        let data_length = self.data.as_ref().map(DataFile::length).transpose()?;
        let built = self.build(&leaving, &mut change);
        let (built, value, check) = match built {
            Ok(built) => built,
            Err(error) => {
                self.give_back(length);
                if let (Some(data), Some(length)) = (&self.data, data_length) {
                    data.give_back(length);
                }
                return Err(error);
            }
        };
        let in_place_bytes = built.switch(leaving.moving)?;
        let data = self.data.as_ref();
        let (old, old_first) = load(&self.storage, &self.path, self.data_elsewhere, data)?;
        (self.old, self.old_first) = (Arc::new(old), old_first);
        self.before = check.clone();
        Ok(Done {
            value,
            room,
            check,
            in_place_bytes,
        })
    }

    fn build<'a, T>(
        &'a self,
        leaving: &Leaving<'a>,
        change: &mut impl FnMut(&mut Edit<'_>) -> Result<T>,
    ) -> Result<(Built<'a>, T, CheckReport)> {
        let control = leaving.control;
        let mut edit = self.edit(Arc::clone(&self.storage), false, &control)?;
        let value = change(&mut edit)?;
        control.go_on(&self.path)?;
        let built = edit.build()?;
        let check = control.within((BUILT, 1.0), |part| {
            built.prove(&self.before, leaving.corruptions, part)
        })?;
        control.go_on(&self.path)?;
        Ok((built, value, check))
    }

    fn edit<'a>(
        &'a self,
        storage: Arc<dyn Storage>,
        plan: bool,
        control: &Control<'a>,
    ) -> Result<Edit<'a>> {
        let external = self.old.header().external_data.as_ref();
        let raw = external.is_some_and(|external| external.raw);
        let guest = self.data.as_ref().map(|data| data.for_edit(raw));
        let file = self.file.as_ref().map(|file| file.file().try_clone());
        let file = file.transpose();
        let file = file.map_err(|source| Error::io("open", &self.path, source))?;
        Edit::new(Start {
            path: &self.path,
            old: &self.old,
            old_first: &self.old_first,
            storage,
            plan,
            cache_bytes: self.options.cache_bytes,
            blocks: NewBlocks::new(file, self.old.file_length()),
            damaged: self.damaged,
            guest: guest.transpose()?,
            control: *control,
        })
    }

    /// As the image is now, once more, for a chain.
    pub(crate) fn reopen(&self) -> Result<Layer> {
        let layer = Layer::inspect_image(ImageFile::on(Arc::clone(&self.storage), &self.path)?)?;
        let layer = with_data(layer, self.data.as_ref())?;
        layer.require_readable()?;
        Ok(layer)
    }

    fn require_room(&self, room: &Plan, left: u64) -> Result<()> {
        if let Some(data) = &self.data {
            let others = room.new_bytes.saturating_add(left);
            data.require_room(room.data_bytes, &self.path, others)?;
        }
        let error = |source| Error::io("find the room for", &self.path, source);
        let limit = self.storage.room().map_err(error)?;
        let (needed, available) = if let Some(limit) = limit {
            (room.peak_bytes, limit)
        } else if let Some(file) = &self.file {
            self.room_of(file, room, left).map_err(error)?
        } else {
            return Ok(());
        };
        if needed <= available {
            return Ok(());
        }
        Err(Error::NoRoom {
            path: self.path.clone(),
            needed,
            available,
        })
    }

    /// The bytes that are needed and those that are there, on a device or in a file system.
    fn room_of(&self, file: &FileStorage, room: &Plan, left: u64) -> io::Result<(u64, u64)> {
        if file.is_device() {
            return Ok((room.peak_bytes, file.len()?));
        }
        let available = space::available_bytes(&self.path)?;
        Ok((room.new_bytes.saturating_add(left), available))
    }

    /// Cuts off what a change wrote behind the end, when it came to nothing.
    fn give_back(&self, length: u64) {
        if let Err(_stays_longer) = self.storage.set_len(length) {
            // Bytes behind the end that nothing refers to: the error that led here is what counts.
        }
    }
}

fn plan_of(built: &Built) -> Plan {
    Plan {
        peak_bytes: built.peak_bytes,
        reached_bytes: built.reached_bytes,
        end_bytes: built.end_bytes,
        new_bytes: built.new_bytes,
        data_bytes: built.data_bytes,
        journal: built.has_journal(),
    }
}

/// Where guest data that is not in the image lies.
enum Elsewhere {
    /// It is in the image, or this is an error.
    Nothing,
    /// It may lie in another file, which is not needed.
    Closed,
    /// In this file.
    File(DataFile),
}

fn with_data(layer: Layer, data: Option<&DataFile>) -> Result<Layer> {
    match data {
        Some(data) => layer.with_data(data.image()?),
        None => Ok(layer),
    }
}

/// Reads an image and its first cluster.
fn load(
    storage: &Arc<dyn Storage>,
    path: &Path,
    data_elsewhere: bool,
    data: Option<&DataFile>,
) -> Result<(Layer, Vec<u8>)> {
    let layer = Layer::inspect_image(ImageFile::on(Arc::clone(storage), path)?)?;
    let layer = with_data(layer, data)?;
    if !data_elsewhere || layer.header().encryption.is_some() {
        layer.require_readable()?;
    }
    let size = layer.cluster_size();
    let mut first = vec![0; size.buffer_len()];
    let there = to_usize(size.bytes().min(layer.file_length()));
    let read = storage.read_exact_at(&mut first[..there], 0);
    read.map_err(|source| Error::io("read", path, source))?;
    Ok((layer, first))
}
