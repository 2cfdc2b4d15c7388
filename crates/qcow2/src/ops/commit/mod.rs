//! Commit: what the layers above a base define becomes the base's own.
//!
//! ```text
//!  top ─┐                      top      (emptied, or as it was)
//!  mid ─┼─ define ──▶  base             (shows what top showed)
//!  base ┘              below ...
//! ```
//! A cluster of the base that nothing else refers to is written over in place; everything else goes to new clusters,
//! so that the base's internal snapshots keep their content. Data in place goes through the journal: from the first
//! byte that is written over to the last the base is in progress, the layers above stay as they are, and
//! [`recover`](crate::edit::recover()) takes the data from them again. The top is emptied only after that, as a
//! change of its own.
//!
//! A raw base cannot say that it is in progress. Then the top says so: `recover` is run on the top.
//!
//! # Invariants
//! * The base changes only where the layers above define something, so the disk seen through the top is the same
//!   before, after and, once recovered, in between.
//! * Bitmaps never say less than what the commit changes in the base (see [`BitmapFate`]).
//! * What an internal snapshot of a layer above sees of the base is not changed: that is refused.

pub(in crate::ops) mod bitmaps;
mod elsewhere;
mod put;
mod raw;

use std::path::{Path, PathBuf};

use crate::chain::{Chain, LayerFile, LayerFormat, Member};
use crate::control::{Control, Moving};
use crate::edit::{Edit, EditOptions, Editor, Leaving, Plan, lock_for_reading};
use crate::error::{Error, Result};
use crate::following::{OpenPolicy, data_file_of};
use crate::layer::Layer;

pub use bitmaps::{BitmapFate, BitmapOutcome};
pub use raw::{RawBase, commit_into_raw};

const OPERATION: &str = "commit";

/// What becomes of a base that is longer than the disk that is committed into it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LongerBase {
    /// The commit is refused.
    #[default]
    Refuse,
    /// It stays as long as it is, with its own bytes behind the end of the other, as with `qemu-img`.
    Keep,
    /// What is behind the end of the other disk is cut off.
    Cut,
}

/// What becomes of a bitmap that cannot be complete: one that a layer in between does not have, that does not record
/// writes in one of them, or that was not saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Incomplete {
    /// It is removed from the base.
    #[default]
    Drop,
    /// Where the base's own is usable, everything that the commit changes is marked in it; else it is removed.
    Mark,
    /// The commit is refused.
    Refuse,
}

/// What a caller wants for a bitmap, whatever the rules say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chosen {
    /// The base does not have it afterwards.
    Remove,
    /// The base keeps it bit for bit; only for one that says nothing, or nothing of this commit.
    Leave,
    /// Everything that the commit changes is marked in it; whether it records writes stays as it is.
    Mark,
    /// It stands for itself: the base has what the lowest layer that has it says, and all that those above it define,
    /// which need not have it. Also of a bitmap that the base does not have.
    Carry,
}

/// How to commit.
#[derive(Debug, Clone)]
pub struct CommitOptions {
    /// Which file of the chain is the base, 0 being the top; at least 1.
    pub base: usize,
    /// Empty the top afterwards. Only where the base lies directly below it: layers in between would be seen.
    pub empty_top: bool,
    /// What becomes of a base that is longer.
    pub longer_base: LongerBase,
    /// What becomes of bitmaps that cannot be complete.
    pub incomplete: Incomplete,
    /// What becomes of single bitmaps, by name, before any rule is asked.
    pub chosen: Vec<(Vec<u8>, Chosen)>,
    /// Whether the external data files that the images name are opened. A name in an image could be that of any file.
    pub follow_data: bool,
    /// How images are opened.
    pub edit: EditOptions,
}

impl CommitOptions {
    fn editor(&self, file: &LayerFile) -> Result<Editor> {
        if !self.follow_data {
            return Editor::open(&file.path, self.edit);
        }
        Editor::open_following(&file.path, &OpenPolicy::NAMES, self.edit)
    }

    /// The files of an image: itself and, if names are followed, its external data file.
    fn files(&self, file: &LayerFile) -> Result<Vec<PathBuf>> {
        let mut all = vec![file.path.clone()];
        if self.follow_data && file.format == LayerFormat::Qcow2 {
            all.extend(data_file_of(
                &Layer::inspect(&file.path)?,
                &OpenPolicy::NAMES,
            )?);
        }
        Ok(all)
    }
}

impl Default for CommitOptions {
    fn default() -> Self {
        Self {
            base: 1,
            empty_top: false,
            longer_base: LongerBase::default(),
            incomplete: Incomplete::default(),
            chosen: Vec::new(),
            follow_data: false,
            edit: EditOptions::default(),
        }
    }
}

/// What a commit did, or would do.
#[derive(Debug, Clone)]
pub struct CommitReport {
    /// The room in the base.
    pub base: Plan,
    /// The room in the top: for emptying it, or for the journal of a raw base.
    pub top: Option<Plan>,
    /// How many bytes of the disk the layers above define.
    pub defined_bytes: u64,
    /// How many bytes of the base were written in place; all of them were read back and compared with the layers above.
    pub in_place_bytes: u64,
    /// What became of each bitmap.
    pub bitmaps: Vec<BitmapOutcome>,
}

/// The disk as the top shows it, as the base shows it, and what is below the base.
#[derive(Debug)]
struct Views<'a> {
    /// How far the commit is.
    moving: Moving<'a>,
    top: Chain,
    /// How many layers are committed.
    above: usize,
    base: Chain,
    below: Option<Chain>,
}

impl<'a> Views<'a> {
    fn new(
        above: &[LayerFile],
        base: Member,
        below: &[LayerFile],
        follow_data: bool,
        control: &Control<'a>,
    ) -> Result<Self> {
        let invalid = |reason: String| Err(Error::InvalidChain { reason });
        let hidden = above
            .iter()
            .chain(below.split_last().map_or(&[][..], |(_, all)| all));
        if let Some(raw) = hidden.clone().find(|file| file.format == LayerFormat::Raw) {
            return invalid(format!("{} is raw and not the last", raw.path.display()));
        }
        let chain = Chain::around(above, base, below, follow_data)?;
        Self::of(chain, above.len(), control)
    }

    fn of(top: Chain, above: usize, control: &Control<'a>) -> Result<Self> {
        let invalid = |reason: String| Err(Error::InvalidChain { reason });
        if let Some(last) = top.layer(top.depth() - 1)
            && last.header().backing.is_some()
        {
            let path = last.path().display();
            return invalid(format!("{path} has a backing file, which was not given"));
        }
        let (base, below) = (top.below(above), top.below(above + 1));
        let Some(base) = base else {
            unreachable!("the chain has a base");
        };
        Ok(Self {
            moving: Moving::new(control),
            top,
            above,
            base,
            below,
        })
    }

    /// An error when the caller wants the commit to end.
    fn go_on(&self) -> Result<()> {
        let base = self.base.file(0);
        self.moving
            .go_on(base.map_or(Path::new(""), |(path, _)| path))
    }

    /// How long the base is to be.
    fn target_bytes(&self, options: &CommitOptions) -> Result<u64> {
        let (top, base) = (self.top.len(), self.base.len());
        match options.longer_base {
            _ if base <= top => Ok(top),
            LongerBase::Keep => Ok(base),
            LongerBase::Cut => Ok(top),
            LongerBase::Refuse => {
                let reason = format!(
                    "it has {base} bytes, and the disk that is committed into it {top}; say whether it is cut or keeps \
                     what is behind the end"
                );
                Err(self.refused(self.above, reason))
            }
        }
    }

    fn refused(&self, layer: usize, reason: String) -> Error {
        let path = self
            .top
            .file(layer)
            .map_or_else(Default::default, |(path, _)| path.to_owned());
        Error::Refused {
            path,
            operation: OPERATION,
            reason,
        }
    }

    /// How many bytes the layers above define.
    fn defined_bytes(&self) -> Result<u64> {
        let ranges = self.top.allocated(self.above);
        ranges
            .map(|range| range.map(|range| range.end - range.start))
            .sum()
    }

    /// Internal snapshots of the layers above show the base where they define nothing themselves; there it must not
    /// change, nor be cut off.
    fn require_snapshots_unseen(&self, target_bytes: u64) -> Result<()> {
        for index in 0..self.above {
            let (Some(layer), Some(chain)) = (self.top.layer(index), self.top.below(index)) else {
                unreachable!("a layer above the base is qcow2");
            };
            for snapshot in layer.internal_snapshots()? {
                let view = chain.view_of(&snapshot)?;
                let seen = self.first_seen(&view, self.above - index, target_bytes)?;
                if let Some(at) = seen {
                    let name = String::from_utf8_lossy(&snapshot.name);
                    let reason = format!(
                        "its internal snapshot {name:?} shows the base at guest offset {at:#x}, which the commit \
                         changes; delete the snapshot or flatten the image first"
                    );
                    return Err(self.refused(index, reason));
                }
            }
        }
        Ok(())
    }

    /// Where `view` shows the base and the commit changes it.
    fn first_seen(&self, view: &Chain, layers: usize, target_bytes: u64) -> Result<Option<u64>> {
        let cut = target_bytes..self.base.len();
        for range in self.top.allocated(self.above).chain([Ok(cut)]) {
            self.go_on()?;
            let range = range?;
            let (mut at, end) = (range.start, range.end.min(view.len()));
            while at < end {
                match view.next_allocated(layers, at)? {
                    Some(own) if own.start == at => at = own.end,
                    Some(_) | None => return Ok(Some(at)),
                }
            }
        }
        Ok(None)
    }
}

/// The files of a commit, locked.
struct Files<'a> {
    above: &'a [LayerFile],
    base: &'a LayerFile,
    below: &'a [LayerFile],
    /// The top, where it is changed too.
    top: Option<Editor>,
    _locks: Vec<stead_sys::image_lock::ImageLock>,
}

impl<'a> Files<'a> {
    fn open(files: &'a [LayerFile], options: &CommitOptions) -> Result<Self> {
        let invalid = |reason: String| Err(Error::InvalidChain { reason });
        if options.base == 0 || options.base >= files.len() {
            let most = files.len().saturating_sub(1);
            return invalid(format!(
                "file {} as base, expected 1 to {most}",
                options.base
            ));
        }
        if options.empty_top && options.base > 1 {
            let reason = "the top cannot be emptied: layers between it and the base would be seen";
            return invalid(reason.into());
        }
        let (above, rest) = files.split_at(options.base);
        let changes_top = options.empty_top || rest[0].format == LayerFormat::Raw;
        let top = changes_top.then(|| options.editor(&above[0]));
        let top = top.transpose()?;
        let read = above
            .iter()
            .skip(usize::from(changes_top))
            .chain(&rest[1..]);
        let mut locks = Vec::new();
        for file in read {
            for path in options.files(file)? {
                locks.push(lock_for_reading(&path)?.1);
            }
        }
        Ok(Self {
            above,
            base: &rest[0],
            below: &rest[1..],
            _locks: locks,
            top,
        })
    }
}

/// Says what [`commit`] would do and how much room it needs, without changing anything.
///
/// # Errors
/// As [`commit`].
pub fn measure(
    files: &[LayerFile],
    options: &CommitOptions,
    control: &Control<'_>,
) -> Result<CommitReport> {
    let files = Files::open(files, options)?;
    let mut report = match files.base.format {
        LayerFormat::Qcow2 => {
            let editor = options.editor(files.base)?;
            let ready = Ready::new(&editor, (files.above, files.below), options, control)?;
            let plan = editor.plan(|edit| ready.run(edit))?;
            ready.report(plan, 0)
        }
        LayerFormat::Raw => {
            let Some(top) = &files.top else {
                unreachable!("the top of a raw base is open for changes");
            };
            raw::measure(&files, top, options, control)?
        }
    };
    if let Some(top) = files.top.as_ref().filter(|_| options.empty_top) {
        report.top = Some(larger(report.top, top.plan(|edit| edit.empty())?));
    }
    Ok(report)
}

/// As [`measure`] of a qcow2 base that another program has open, like all other files, and that nobody writes to
/// meanwhile: nothing is locked, and the top is not to be emptied.
///
/// # Errors
/// As [`measure`].
pub fn measure_in_use(
    files: &[LayerFile],
    options: &CommitOptions,
    control: &Control<'_>,
) -> Result<CommitReport> {
    let invalid = |reason: &str| {
        Err(Error::InvalidChain {
            reason: reason.into(),
        })
    };
    if options.base == 0 || options.base >= files.len() {
        return invalid("the base is not below the top");
    }
    let (above, rest) = files.split_at(options.base);
    let path = &rest[0].path;
    if rest[0].format == LayerFormat::Raw {
        return invalid("a raw base says nothing of its room");
    }
    let io = |source| Error::io("open", path, source);
    let file = stead_sys::readable::open(path).map_err(io)?;
    let storage = stead_sys::storage::FileStorage::new(file).map_err(io)?;
    let editor = Editor::on_storage(std::sync::Arc::new(storage), path, options.edit)?;
    let ready = Ready::new(&editor, (above, &rest[1..]), options, control)?;
    let plan = editor.plan(|edit| ready.run(edit))?;
    Ok(ready.report(plan, 0))
}

/// Of two changes of one file, one after the other.
fn larger(one: Option<Plan>, other: Plan) -> Plan {
    let Some(one) = one else {
        return other;
    };
    Plan {
        peak_bytes: one.peak_bytes.max(other.peak_bytes),
        reached_bytes: one.reached_bytes.max(other.reached_bytes),
        end_bytes: other.end_bytes,
        new_bytes: one.new_bytes.max(other.new_bytes),
        data_bytes: one.data_bytes.max(other.data_bytes),
        journal: one.journal || other.journal,
    }
}

/// Commits the layers above `options.base` of the chain `files`, top first, into it.
///
/// Which files make the chain the caller says: all of them, down to the lowest. Overlays of the base other than
/// those given show other bytes afterwards, as do layers between the top and the base. What a committed layer
/// recorded of the disk below it goes first, in a change of its own.
///
/// # Durability
/// When this returns `Ok`, the base is changed and synced, and so is the top, if it was to be emptied.
///
/// # Errors
/// [`Error::InvalidChain`] when the files are no chain; [`Error::Refused`] when the base is longer, an internal
/// snapshot of a layer above shows what would change, or bitmaps would be dropped, where that is refused; else as
/// [`Editor::open`] and [`Editor::apply`], of the base or of the top. An error that names the top after the base was
/// changed leaves the top as it was: the disk seen through it is right. [`Error::Cancelled`] as long as the base is as
/// it was; once it is in progress, the commit goes on to its end.
pub fn commit(
    files: &[LayerFile],
    options: &CommitOptions,
    control: &Control<'_>,
) -> Result<CommitReport> {
    forget_records(files, options, control)?;
    let mut files = Files::open(files, options)?;
    let emptying = files.top.as_ref().filter(|_| options.empty_top);
    let emptying = emptying
        .map(|top| top.plan(|edit| edit.empty()))
        .transpose()?;
    let left = emptying.map_or(0, |plan| plan.new_bytes);
    let mut report = match files.base.format {
        LayerFormat::Qcow2 => {
            let mut editor = options.editor(files.base)?;
            let chain = (files.above, files.below);
            commit_into(&mut editor, left, chain, options, control)?
        }
        LayerFormat::Raw => {
            let mut top = files.top.take();
            let Some(editor) = &mut top else {
                unreachable!("the top of a raw base is open for changes");
            };
            let report = raw::commit(&files, editor, options, control)?;
            files.top = top;
            report
        }
    };
    if let Some(top) = files.top.as_mut().filter(|_| options.empty_top) {
        let done = top.apply(|edit| edit.empty())?;
        report.top = Some(larger(report.top, done.room));
    }
    Ok(report)
}

/// What the layers that are committed have recorded of the disk below them is not so afterwards: it goes before the
/// first byte changes, once it is clear that the commit is not refused.
fn forget_records(
    files: &[LayerFile],
    options: &CommitOptions,
    control: &Control<'_>,
) -> Result<()> {
    let mut with_record = Vec::new();
    for file in files.iter().take(options.base) {
        let qcow2 = file.format == LayerFormat::Qcow2;
        if qcow2 && Layer::inspect(&file.path)?.header().has_backing_record() {
            with_record.push(&file.path);
        }
    }
    if with_record.is_empty() {
        return Ok(());
    }
    measure(files, options, control)?;
    for path in with_record {
        let mut editor = Editor::open(path, options.edit)?;
        editor.apply(|edit| {
            edit.record_backing(None);
            Ok(())
        })?;
    }
    Ok(())
}

/// Commits the layers of `chain.0`, top first, into the open image; `chain.1` is what lies below it. `left` bytes of
/// free space are left alone. `options.base` and `options.empty_top` mean nothing here. What the layers recorded of
/// the disk below them stays, and is the caller's care.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// As [`commit`].
pub fn commit_into(
    editor: &mut Editor,
    left: u64,
    chain: (&[LayerFile], &[LayerFile]),
    options: &CommitOptions,
    control: &Control<'_>,
) -> Result<CommitReport> {
    let ready = Ready::new(editor, chain, options, control)?;
    let leaving = Leaving {
        free_bytes: left,
        moving: Some(&ready.views.moving),
        control: control.quiet(),
        ..Leaving::default()
    };
    let done = editor.apply_leaving(leaving, |edit| ready.run(edit))?;
    control.tell(1, 1);
    Ok(ready.report(done.room, done.in_place_bytes))
}

/// A commit into a qcow2 base that was thought through, and not begun.
struct Ready<'a> {
    views: Views<'a>,
    sources: &'a [LayerFile],
    follow_data: bool,
    target_bytes: u64,
    bitmaps: bitmaps::Decided,
    defined_bytes: u64,
}

impl<'a> Ready<'a> {
    fn new(
        editor: &Editor,
        (above, below): (&'a [LayerFile], &[LayerFile]),
        options: &CommitOptions,
        control: &Control<'a>,
    ) -> Result<Self> {
        let base = Member::from_layer(editor.reopen()?)?;
        let views = Views::new(above, base, below, options.follow_data, control)?;
        let target_bytes = views.target_bytes(options)?;
        views.require_snapshots_unseen(target_bytes)?;
        Ok(Self {
            bitmaps: bitmaps::decide(&views, options)?,
            defined_bytes: views.defined_bytes()?,
            sources: above,
            follow_data: options.follow_data,
            target_bytes,
            views,
        })
    }

    fn run(&self, edit: &mut Edit) -> Result<()> {
        if edit.virtual_size() != self.target_bytes {
            edit.resize(self.target_bytes, self.views.below.as_ref())?;
        }
        edit.set_sources_with_data(self.sources, self.follow_data)?;
        put::put(edit, &self.views)?;
        self.bitmaps.store(edit)
    }

    fn report(self, base: Plan, in_place_bytes: u64) -> CommitReport {
        CommitReport {
            base,
            top: None,
            defined_bytes: self.defined_bytes,
            in_place_bytes,
            bitmaps: self.bitmaps.outcomes,
        }
    }
}
