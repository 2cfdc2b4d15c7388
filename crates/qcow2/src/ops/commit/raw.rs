//! A commit into a raw file. The top stands for it: it is in progress while the raw file is written.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_sys::image_lock::ImageLock;
use stead_sys::storage::{FileStorage, Storage};
use stead_sys::{copy, space};

use crate::chain::{Chain, LayerFile, Member};
use crate::control::Control;
use crate::edit::{Edit, Editor, Leaving, NewBlocks, Plan, lock};
use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::raw::RawDisk;

use super::{CommitOptions, CommitReport, Files, Views, bitmaps};

/// A raw file that a chain ends with, and that nobody else uses.
#[derive(Debug, Clone)]
pub struct RawBase {
    /// Its bytes.
    pub storage: Arc<dyn Storage>,
    /// Its path, from the root: a recovery opens it by that.
    pub path: PathBuf,
    /// Where to look for holes and free space, if it is a file.
    file: Option<Arc<FileStorage>>,
}

impl RawBase {
    /// Any storage; whether there is room is not looked at.
    #[must_use]
    pub fn on_storage(storage: Arc<dyn Storage>, path: PathBuf) -> Self {
        Self {
            storage,
            path,
            file: None,
        }
    }

    /// Opens the file at `path`, and locks it until the lock is dropped.
    ///
    /// # Errors
    /// When it cannot be opened, or is in use ([`Error::InUse`]).
    pub fn open(path: &Path) -> Result<(Self, ImageLock)> {
        let error = |source| Error::io("open", path, source);
        let (file, lock) = lock(path)?;
        let file = Arc::new(FileStorage::new(file).map_err(error)?);
        let base = Self {
            storage: Arc::clone(&file) as _,
            path: std::fs::canonicalize(path).map_err(error)?,
            file: Some(file),
        };
        Ok((base, lock))
    }

    fn image(&self) -> Result<ImageFile> {
        let Some(file) = &self.file else {
            return ImageFile::on(Arc::clone(&self.storage), &self.path);
        };
        let file = file.file().try_clone();
        let file = file.map_err(|source| Error::io("open", &self.path, source))?;
        ImageFile::new(file, &self.path)
    }
}

/// A commit into a raw base that was thought through, and not begun.
struct Ready<'a> {
    between: &'a [LayerFile],
    follow_data: bool,
    views: Views<'a>,
    raw: ImageFile,
    base: &'a RawBase,
    target_bytes: u64,
    bitmaps: bitmaps::Decided,
    defined_bytes: u64,
}

impl<'a> Ready<'a> {
    fn new(
        top: &Editor,
        between: &'a [LayerFile],
        base: &'a RawBase,
        options: &CommitOptions,
        control: &Control<'a>,
    ) -> Result<Self> {
        let raw = base.image()?;
        let top = Member::from_layer(top.reopen()?)?;
        let bottom = Member::Raw(RawDisk::whole(raw.clone()));
        let chain = Chain::over(top, between, bottom, options.follow_data)?;
        let views = Views::of(chain, between.len() + 1, control)?;
        let target_bytes = views.target_bytes(options)?;
        views.require_snapshots_unseen(target_bytes)?;
        // A file that does not end with a sector has no more bytes for that.
        let same = target_bytes == views.base.len();
        Ok(Self {
            bitmaps: bitmaps::decide(&views, options)?,
            defined_bytes: views.defined_bytes()?,
            target_bytes: if same { raw.length() } else { target_bytes },
            between,
            follow_data: options.follow_data,
            raw,
            base,
            views,
        })
    }

    /// Calls `each` with what has to be written: what the layers above define, but for zeros where the file has
    /// none of its own.
    fn ranges(&self, mut each: impl FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        for range in self.views.top.allocated(self.views.above) {
            self.views.go_on()?;
            let range = range?;
            let mut at = range.start;
            while at < range.end {
                let data = self.views.top.next_data(at)?;
                let start = data
                    .as_ref()
                    .map_or(range.end, |data| data.start.min(range.end));
                self.zeros(at..start, &mut each)?;
                at = data.map_or(range.end, |data| data.end.min(range.end));
                if start < at {
                    each(start..at)?;
                }
            }
        }
        Ok(())
    }

    fn zeros(
        &self,
        range: Range<u64>,
        each: &mut impl FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let Some(file) = self.raw.file() else {
            let end = range.end.min(self.raw.length());
            return if range.start < end {
                each(range.start..end)
            } else {
                Ok(())
            };
        };
        let mut at = range.start;
        while at < range.end {
            let data = copy::next_data(file, at);
            let data = data.map_err(|source| self.error("find the holes of", source))?;
            let Some(data) = data.filter(|data| data.start < range.end) else {
                break;
            };
            let end = data.end.min(range.end);
            each(data.start.max(at)..end)?;
            at = end;
        }
        Ok(())
    }

    fn error(&self, action: &'static str, source: std::io::Error) -> Error {
        Error::io(action, &self.base.path, source)
    }

    fn run(&self, edit: &mut Edit) -> Result<()> {
        edit.set_sources_with_data(self.between, self.follow_data)?;
        edit.set_own_source()?;
        let storage = Arc::clone(&self.base.storage);
        edit.set_target(self.base.path.clone(), storage, self.target_bytes);
        self.ranges(|range| {
            // The rest of the file's last sector, which it may not have, stays away.
            let range = range.start..range.end.min(self.target_bytes);
            if edit.is_plan() {
                // Written and read back.
                self.views.moving.plan((range.end - range.start) * 2);
            }
            edit.overwrite_there(range)
        })
    }

    /// The room in the raw file.
    fn plan(&self) -> Result<Plan> {
        let length = self.raw.length();
        let file = self.raw.file().map(std::fs::File::try_clone).transpose();
        let file = file.map_err(|source| self.error("open", source))?;
        let mut blocks = NewBlocks::new(file, length);
        self.ranges(|range| {
            let added = blocks.add(range.start, range.end - range.start);
            added.map_err(|source| self.error("find the holes of", source))
        })?;
        Ok(Plan {
            peak_bytes: length.max(self.target_bytes),
            reached_bytes: self.target_bytes,
            end_bytes: self.target_bytes,
            new_bytes: blocks.bytes(),
            data_bytes: 0,
            journal: true,
        })
    }

    fn require_room(&self, plan: &Plan) -> Result<()> {
        let Some(file) = &self.base.file else {
            return Ok(());
        };
        let (needed, available) = if file.is_device() {
            (plan.peak_bytes, self.raw.length())
        } else {
            let available = space::available_bytes(&self.base.path);
            let available = available.map_err(|source| self.error("find the room for", source))?;
            (plan.new_bytes, available)
        };
        if needed <= available {
            return Ok(());
        }
        Err(Error::NoRoom {
            path: self.base.path.clone(),
            needed,
            available,
        })
    }

    fn report(self, base: Plan, top: Plan, in_place_bytes: u64) -> CommitReport {
        CommitReport {
            base,
            top: Some(top),
            defined_bytes: self.defined_bytes,
            in_place_bytes,
            bitmaps: self.bitmaps.outcomes,
        }
    }
}

fn require_lowest(files: &Files<'_>) -> Result<()> {
    if files.below.is_empty() {
        return Ok(());
    }
    let reason = format!("{} is raw and not the last", files.base.path.display());
    Err(Error::InvalidChain { reason })
}

/// Says what a commit into a raw base would do.
pub(super) fn measure(
    files: &Files<'_>,
    top: &Editor,
    options: &CommitOptions,
    control: &Control<'_>,
) -> Result<CommitReport> {
    require_lowest(files)?;
    let (base, _lock) = RawBase::open(&files.base.path)?;
    let ready = Ready::new(top, &files.above[1..], &base, options, control)?;
    let plan = ready.plan()?;
    let top = top.plan(|edit| ready.run(edit))?;
    Ok(ready.report(plan, top, 0))
}

/// Commits into a raw base.
pub(super) fn commit(
    files: &Files<'_>,
    top: &mut Editor,
    options: &CommitOptions,
    control: &Control<'_>,
) -> Result<CommitReport> {
    require_lowest(files)?;
    let (base, _lock) = RawBase::open(&files.base.path)?;
    commit_into_raw(top, &files.above[1..], &base, options, control)
}

/// Commits the open image and the layers `between` it and the raw file, top first, into that. `options.base` and
/// `options.empty_top` mean nothing here.
///
/// # Durability
/// When this returns `Ok`, the raw file is changed and synced.
///
/// # Errors
/// As [`commit`](super::commit()); [`Error::Switch`] names the top, which is in progress then.
pub fn commit_into_raw(
    top: &mut Editor,
    between: &[LayerFile],
    base: &RawBase,
    options: &CommitOptions,
    control: &Control<'_>,
) -> Result<CommitReport> {
    let ready = Ready::new(top, between, base, options, control)?;
    let plan = ready.plan()?;
    ready.require_room(&plan)?;
    let leaving = Leaving {
        free_bytes: plan.new_bytes,
        moving: Some(&ready.views.moving),
        control: control.quiet(),
        ..Leaving::default()
    };
    let done = top.apply_leaving(leaving, |edit| ready.run(edit))?;
    control.tell(1, 1);
    Ok(ready.report(plan, done.room, done.in_place_bytes))
}
