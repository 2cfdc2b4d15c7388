//! A commit into a raw file. The top stands for it: it is in progress while the raw file is written.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use stead_sys::image_lock::ImageLock;
use stead_sys::storage::{FileStorage, Storage};
use stead_sys::{copy, space};

use crate::chain::Member;
use crate::edit::{Edit, Editor, NewBlocks, Plan, lock};
use crate::error::{Error, Result};
use crate::file::ImageFile;

use super::{CommitOptions, CommitReport, Files, OPERATION, Views, bitmaps};

/// A commit into a raw base that was thought through, and not begun.
pub(super) struct Ready<'a> {
    files: &'a Files<'a>,
    views: Views,
    raw: ImageFile,
    storage: Arc<FileStorage>,
    path: PathBuf,
    target_bytes: u64,
    bitmaps: bitmaps::Decided,
    defined_bytes: u64,
    _lock: ImageLock,
}

impl<'a> Ready<'a> {
    pub fn new(files: &'a Files<'a>, options: &CommitOptions) -> Result<Self> {
        let path = &files.base.path;
        let error = |source| Error::io("open", path, source);
        let (file, lock) = lock(path)?;
        let raw = ImageFile::new(file.try_clone().map_err(error)?, path)?;
        let views = Views::new(files.above, Member::Raw(raw.clone()), files.below)?;
        views.require_snapshots_unseen()?;
        // A file that does not end with a sector has no more bytes for that.
        let target_bytes = views.target_bytes(options)?;
        let same = target_bytes == views.base.len();
        Ok(Self {
            path: std::fs::canonicalize(path).map_err(error)?,
            storage: Arc::new(FileStorage::new(file).map_err(error)?),
            bitmaps: bitmaps::decide(&views, options.incomplete)?,
            defined_bytes: views.defined_bytes()?,
            target_bytes: if same { raw.length() } else { target_bytes },
            raw,
            views,
            files,
            _lock: lock,
        })
    }

    /// Calls `each` with what has to be written: what the layers above define, but for zeros where the file has
    /// none of its own.
    fn ranges(&self, mut each: impl FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        for range in self.views.top.allocated(self.views.above) {
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
            unreachable!("the raw base was opened from a file");
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
        Error::io(action, &self.path, source)
    }

    fn run(&self, edit: &mut Edit) -> Result<()> {
        edit.set_sources(&self.files.above[1..])?;
        let storage: Arc<dyn Storage> = Arc::clone(&self.storage) as _;
        edit.set_target(self.path.clone(), storage, self.target_bytes);
        // The rest of the file's last sector, which it may not have, stays away.
        self.ranges(|range| edit.overwrite_there(range.start..range.end.min(self.target_bytes)))
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
            end_bytes: self.target_bytes,
            new_bytes: blocks.bytes(),
            journal: true,
        })
    }

    fn require_room(&self, plan: &Plan) -> Result<()> {
        let (needed, available) = if self.storage.is_device() {
            (plan.peak_bytes, self.raw.length())
        } else {
            let available = space::available_bytes(&self.path);
            let available = available.map_err(|source| self.error("find the room for", source))?;
            (plan.new_bytes, available)
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

    pub fn measure(self) -> Result<CommitReport> {
        let plan = self.plan()?;
        let top = self.top()?.plan(|edit| self.run(edit))?;
        Ok(self.report(plan, top))
    }

    fn top(&self) -> Result<&Editor> {
        self.files.top.as_ref().ok_or_else(|| Error::Refused {
            path: self.path.clone(),
            operation: OPERATION,
            reason: "the top is not open for changes".into(),
        })
    }

    fn report(self, base: Plan, top: Plan) -> CommitReport {
        CommitReport {
            base,
            top: Some(top),
            defined_bytes: self.defined_bytes,
            bitmaps: self.bitmaps.outcomes,
        }
    }
}

/// Commits into a raw base.
pub(super) fn commit(files: &mut Files<'_>, options: &CommitOptions) -> Result<CommitReport> {
    let Some(mut top) = files.top.take() else {
        unreachable!("the top of a raw base is open for changes");
    };
    let ready = Ready::new(files, options)?;
    let plan = ready.plan()?;
    ready.require_room(&plan)?;
    let done = top.apply_leaving(plan.new_bytes, |edit| ready.run(edit))?;
    let report = ready.report(plan, done.room);
    files.top = Some(top);
    Ok(report)
}
