//! What becomes of the bitmaps in a commit.
//!
//! A bitmap of a chain is one name in its layers: each has noted what was written while it was the top. So where all
//! the layers that are committed have a bitmap, it is theirs and the base's together. Two things can make that too
//! little, and neither can be seen in the bitmap: it was added to a layer late, or cleared there. So everything that
//! the layers above the lowest one with the bitmap define and the bitmap does not name is compared, and what differs
//! is marked.

use std::ops::Range;

use crate::bitmap::Bitmap;
use crate::chain::Chain;
use crate::control::Control;
use crate::directory::StoredBitmap;
use crate::edit::Edit;
use crate::error::{Error, Result};
use crate::header::{to_u64, to_usize};
use crate::layer::Layer;
use crate::units::GuestOffset;

use super::{Chosen, CommitOptions, Incomplete, Views};

/// How many bytes are compared at a time.
const STEP_BYTES: u64 = 1 << 20;

/// What became of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapFate {
    /// The base's has everything that the layers' of that name have.
    Merged {
        /// Bytes that the layers changed and none of their bitmaps names: they are marked too. They were written before
        /// the bitmap was added to their layer, or it was cleared there.
        unnamed_bytes: u64,
    },
    /// The base did not have it, and now has what the layers' have together.
    Carried {
        /// As for [`BitmapFate::Merged`].
        unnamed_bytes: u64,
    },
    /// Only the base has it: everything that the commit changes is marked in it.
    Marked,
    /// Only the base has it, and it does not record writes: it says what it said, and nothing of this commit. Or the
    /// caller wanted it left as it is.
    Kept,
    /// It could not be complete, and everything that the commit changes is marked in the base's instead.
    MarkedInstead {
        /// Why it could not.
        reason: String,
    },
    /// The base does not have it any more, or does not get it. Layers above keep theirs.
    Dropped {
        /// Why.
        reason: String,
    },
}

/// A bitmap and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapOutcome {
    /// Its name.
    pub name: Vec<u8>,
    /// What became of it.
    pub fate: BitmapFate,
}

/// What is to be done with a bitmap of the image that is changed.
pub(in crate::ops) enum Step {
    Merge(Bitmap),
    Add(Bitmap),
    Remove(Vec<u8>),
}

/// What was decided, before anything is written.
pub(super) struct Decided {
    steps: Vec<Step>,
    pub outcomes: Vec<BitmapOutcome>,
}

impl Decided {
    /// Changes the base's bitmaps; the disk has its new length already.
    pub fn store(&self, edit: &mut Edit) -> Result<()> {
        store(&self.steps, edit)
    }
}

impl Step {
    fn run(&self, edit: &mut Edit) -> Result<()> {
        let find = |edit: &Edit, name: &[u8]| match edit.find_bitmap(name) {
            Some(index) => index,
            None => unreachable!("the image has the bitmap"),
        };
        match self {
            Self::Merge(bits) => edit.merge_bitmap(find(edit, bits.name()), bits),
            Self::Add(bits) => {
                let index = edit.add_bitmap(bits.name(), bits.granularity_bits(), true)?;
                edit.merge_bitmap(index, bits)
            }
            Self::Remove(name) => edit.remove_bitmap(find(edit, name)),
        }
    }
}

/// What a layer has of a bitmap.
enum Has {
    Nothing(String),
    Unusable(String),
    Disabled(String),
    Usable(StoredBitmap),
}

fn has(layer: &Layer, name: &[u8]) -> Result<Has> {
    let path = layer.path().display();
    let stored = layer.stored_bitmaps()?;
    let Some(stored) = stored.into_iter().find(|stored| stored.name == name) else {
        let void = layer.header().bitmaps.is_some() && !layer.header().bitmaps_consistent();
        let why = if void {
            ": a program that does not know bitmaps changed it, so all it had are void"
        } else {
            ""
        };
        return Ok(Has::Nothing(format!("{path} does not have it{why}")));
    };
    Ok(match &stored {
        stored if stored.in_use => {
            Has::Unusable(format!("it was not saved when {path} was last used"))
        }
        stored if !stored.is_known() => {
            Has::Unusable(format!("in {path} it is of a kind that is not known"))
        }
        stored if !stored.auto => Has::Disabled(format!(
            "it is disabled in {path}, so it does not record writes"
        )),
        _ => Has::Usable(stored),
    })
}

/// All names, the base's first.
fn names(views: &Views<'_>) -> Result<Vec<Vec<u8>>> {
    let mut names: Vec<Vec<u8>> = Vec::new();
    let layers = std::iter::once(views.above).chain(0..views.above);
    for layer in layers.filter_map(|index| views.top.layer(index)) {
        for stored in layer.stored_bitmaps()? {
            if !names.contains(&stored.name) {
                names.push(stored.name);
            }
        }
    }
    Ok(names)
}

/// The bitmaps of the image `top`, once the `leaving` layers below it are not there any more: one of a name that
/// they have, too, is theirs and its own together, or cannot be kept. Only reads.
pub(in crate::ops) fn decide_without_layers(
    top: &Chain,
    leaving: usize,
    control: &Control<'_>,
) -> Result<(Vec<BitmapOutcome>, Vec<Step>)> {
    let (mut outcomes, mut steps) = (Vec::new(), Vec::new());
    let Some(image) = top.layer(0) else {
        return Ok((outcomes, steps));
    };
    for own in image.stored_bitmaps()? {
        let lowest = lowest_with(top, leaving, &own.name)?;
        // One that was not saved, or is of a kind that is not known, says nothing before and after.
        let Some(lowest) = lowest.filter(|_| own.is_known() && !own.in_use) else {
            continue;
        };
        let views = Views::of(top.clone(), lowest, control)?;
        let (fate, step) = match joined(&views, &own.name)? {
            Ok((bits, unnamed_bytes)) => (BitmapFate::Merged { unnamed_bytes }, Step::Merge(bits)),
            Err(reason) => (
                BitmapFate::Dropped { reason },
                Step::Remove(own.name.clone()),
            ),
        };
        steps.push(step);
        outcomes.push(BitmapOutcome {
            name: own.name,
            fate,
        });
    }
    Ok((outcomes, steps))
}

/// The lowest of the `leaving` layers below the top that has a bitmap of this name.
fn lowest_with(top: &Chain, leaving: usize, name: &[u8]) -> Result<Option<usize>> {
    for index in (1..=leaving).rev() {
        let Some(layer) = top.layer(index) else {
            continue;
        };
        if layer.stored_bitmaps()?.iter().any(|one| one.name == name) {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// The pieces of a bitmap down to the base's own, as one, and how many bytes none of them named; or why that cannot
/// be.
fn joined(views: &Views, name: &[u8]) -> Result<std::result::Result<(Bitmap, u64), String>> {
    let Some(base) = views.base.layer(0) else {
        unreachable!("it has the bitmap");
    };
    let own = match has(base, name)? {
        Has::Nothing(reason) | Has::Unusable(reason) | Has::Disabled(reason) => {
            return Ok(Err(reason));
        }
        Has::Usable(own) => own,
    };
    let all = match above(views, name)? {
        Ok(all) => all,
        Err(reason) => return Ok(Err(reason)),
    };
    let (mut bits, unnamed_bytes) = match together(views, Some(&own), &all) {
        Err(error @ Error::Io { .. }) => return Err(error),
        Err(error) => return Ok(Err(error.to_string())),
        Ok(together) => together,
    };
    match base.read_bitmap(&own) {
        Err(error @ Error::Io { .. }) => return Err(error),
        Err(error) => return Ok(Err(error.to_string())),
        Ok(own) => bits.merge(&own),
    }
    Ok(Ok((bits, unnamed_bytes)))
}

/// Makes in the image what was decided.
pub(in crate::ops) fn store(steps: &[Step], edit: &mut Edit) -> Result<()> {
    for step in steps {
        step.run(edit)?;
    }
    Ok(())
}

/// Decides on all bitmaps of the base and the layers above it. Only reads.
pub(super) fn decide(views: &Views<'_>, options: &CommitOptions) -> Result<Decided> {
    let mut decided = Decided {
        steps: Vec::new(),
        outcomes: Vec::new(),
    };
    for name in names(views)? {
        let chosen = options.chosen.iter().find(|(other, _)| *other == name);
        let (fate, step) = match chosen {
            Some((_, Chosen::Carry)) => carry(views, &name, options.incomplete)?,
            Some((_, chosen)) => choose(views, &name, *chosen)?,
            None => decide_one(views, &name, options.incomplete)?,
        };
        decided.steps.extend(step);
        decided.outcomes.push(BitmapOutcome { name, fate });
    }
    Ok(decided)
}

/// What the caller wants of a bitmap.
fn choose(views: &Views, name: &[u8], chosen: Chosen) -> Result<(BitmapFate, Option<Step>)> {
    let stored = match views.base.layer(0) {
        Some(layer) => layer.stored_bitmaps()?,
        None => Vec::new(),
    };
    let removed = || BitmapFate::Dropped {
        reason: "it was to be removed".to_owned(),
    };
    let Some(stored) = stored.iter().find(|stored| stored.name == name) else {
        if chosen == Chosen::Remove {
            return Ok((removed(), None));
        }
        let name = String::from_utf8_lossy(name);
        let reason = format!("the base has no bitmap {name:?} of which something was chosen");
        return Err(views.refused(views.above, reason));
    };
    match chosen {
        Chosen::Remove => {
            let gone = Some(Step::Remove(name.to_vec()));
            Ok((removed(), gone))
        }
        Chosen::Mark => {
            let bits = Some(Step::Merge(changed(views, stored)?));
            Ok((BitmapFate::Marked, bits))
        }
        Chosen::Leave if stored.in_use || !stored.is_known() || !stored.auto => {
            Ok((BitmapFate::Kept, None))
        }
        Chosen::Carry => unreachable!("it is decided elsewhere"),
        Chosen::Leave => {
            let name = String::from_utf8_lossy(name);
            let reason = format!(
                "the bitmap {name:?} records writes, so it cannot stay as it is: it would say too little"
            );
            Err(views.refused(views.above, reason))
        }
    }
}

/// A bitmap that stands for itself, wherever it began.
fn carry(
    views: &Views<'_>,
    name: &[u8],
    incomplete: Incomplete,
) -> Result<(BitmapFate, Option<Step>)> {
    let Some(base) = views.base.layer(0) else {
        return decide_one(views, name, incomplete);
    };
    match has(base, name)? {
        Has::Usable(own) => Ok((BitmapFate::Marked, Some(Step::Merge(changed(views, &own)?)))),
        Has::Unusable(_) | Has::Disabled(_) => Ok((BitmapFate::Kept, None)),
        Has::Nothing(_) if base.header().version < 3 => decide_one(views, name, incomplete),
        Has::Nothing(reason) => {
            for index in (0..views.above).rev() {
                let Some(layer) = views.top.layer(index) else {
                    unreachable!("a layer above the base is qcow2");
                };
                match has(layer, name)? {
                    Has::Nothing(_) => {}
                    Has::Usable(own) => return carry_from(views, (layer, index), &own),
                    Has::Unusable(reason) | Has::Disabled(reason) => {
                        return dropped(views, name, incomplete, reason, None);
                    }
                }
            }
            dropped(views, name, incomplete, reason, None)
        }
    }
}

/// What a layer's bitmap says, and all that the `above` layers over it define.
fn carry_from(
    views: &Views<'_>,
    (layer, above): (&Layer, usize),
    own: &StoredBitmap,
) -> Result<(BitmapFate, Option<Step>)> {
    let length = views.top.len().max(views.base.len());
    let mut bits = Bitmap::new(&own.name, own.granularity_bits, length)?;
    bits.merge(&layer.read_bitmap(own)?);
    set(&mut bits, &(views.top.len()..length));
    let before = bits.dirty_bytes();
    if above > 0 {
        for range in views.top.allocated(above) {
            set(&mut bits, &range?);
        }
    }
    let unnamed_bytes = bits.dirty_bytes() - before;
    Ok((BitmapFate::Carried { unnamed_bytes }, Some(Step::Add(bits))))
}

/// Why a bitmap is not complete in the layers above, or theirs: those of the top and of the layers that follow it
/// without a gap. Where they end above the base, the bitmap began there.
fn above(
    views: &Views<'_>,
    name: &[u8],
) -> Result<std::result::Result<Vec<(usize, StoredBitmap)>, String>> {
    let mut all = Vec::new();
    let mut missing = None;
    for index in 0..views.above {
        let Some(layer) = views.top.layer(index) else {
            unreachable!("a layer above the base is qcow2");
        };
        match has(layer, name)? {
            Has::Usable(stored) => match missing {
                None => all.push((index, stored)),
                Some(reason) => return Ok(Err(reason)),
            },
            Has::Nothing(reason) => missing = missing.or(Some(reason)),
            Has::Unusable(reason) | Has::Disabled(reason) => return Ok(Err(reason)),
        }
    }
    Ok(Ok(all))
}

/// Why a bitmap that the base has is not in all layers above, if some have it.
fn gap(views: &Views, all: &[(usize, StoredBitmap)]) -> Option<String> {
    let lacking = views
        .top
        .layer(all.len())
        .filter(|_| all.len() < views.above);
    lacking.map(|layer| format!("{} does not have it", layer.path().display()))
}

fn decide_one(
    views: &Views<'_>,
    name: &[u8],
    incomplete: Incomplete,
) -> Result<(BitmapFate, Option<Step>)> {
    let above = above(views, name)?;
    let base = match views.base.layer(0) {
        Some(layer) => has(layer, name)?,
        None => {
            let reason = "the base is raw and has no bitmaps".to_owned();
            return dropped(views, name, incomplete, reason, None);
        }
    };
    let gone = || Some(Step::Remove(name.to_vec()));
    match (base, above) {
        (Has::Unusable(reason), _) => dropped(views, name, incomplete, reason, gone()),
        (Has::Disabled(_), Ok(all)) if all.is_empty() => Ok((BitmapFate::Kept, None)),
        (Has::Disabled(reason), _) => dropped(views, name, incomplete, reason, gone()),
        (Has::Usable(own), Ok(all)) if all.is_empty() => {
            let bits = Some(Step::Merge(changed(views, &own)?));
            Ok((BitmapFate::Marked, bits))
        }
        (Has::Usable(own), Ok(all)) => match gap(views, &all) {
            None => {
                let (bits, unnamed_bytes) = together(views, Some(&own), &all)?;
                let fate = BitmapFate::Merged { unnamed_bytes };
                Ok((fate, Some(Step::Merge(bits))))
            }
            Some(reason) => incomplete_own(views, &own, incomplete, reason),
        },
        (Has::Usable(own), Err(reason)) => incomplete_own(views, &own, incomplete, reason),
        (Has::Nothing(_), Ok(all)) => carried(views, name, &all, incomplete),
        (Has::Nothing(_), Err(reason)) => dropped(views, name, incomplete, reason, None),
    }
}

/// The base's own is usable, and the layers' are not all there.
fn incomplete_own(
    views: &Views,
    own: &StoredBitmap,
    incomplete: Incomplete,
    reason: String,
) -> Result<(BitmapFate, Option<Step>)> {
    if incomplete == Incomplete::Mark {
        let bits = Some(Step::Merge(changed(views, own)?));
        return Ok((BitmapFate::MarkedInstead { reason }, bits));
    }
    let gone = Some(Step::Remove(own.name.clone()));
    dropped(views, &own.name, incomplete, reason, gone)
}

fn carried(
    views: &Views<'_>,
    name: &[u8],
    all: &[(usize, StoredBitmap)],
    incomplete: Incomplete,
) -> Result<(BitmapFate, Option<Step>)> {
    let old = views
        .base
        .layer(0)
        .is_some_and(|base| base.header().version < 3);
    if old {
        let reason = "the base is of version 2 and has no bitmaps".to_owned();
        return dropped(views, name, incomplete, reason, None);
    }
    let (bits, unnamed_bytes) = together(views, None, all)?;
    Ok((BitmapFate::Carried { unnamed_bytes }, Some(Step::Add(bits))))
}

fn dropped(
    views: &Views<'_>,
    name: &[u8],
    incomplete: Incomplete,
    reason: String,
    step: Option<Step>,
) -> Result<(BitmapFate, Option<Step>)> {
    if incomplete == Incomplete::Refuse {
        let name = String::from_utf8_lossy(name);
        return Err(views.refused(
            views.above,
            format!("the bitmap {name:?} would be lost: {reason}"),
        ));
    }
    Ok((BitmapFate::Dropped { reason }, step))
}

/// Everything that the commit changes, as fine as the base's bitmap.
fn changed(views: &Views<'_>, own: &StoredBitmap) -> Result<Bitmap> {
    let length = views.top.len().max(views.base.len());
    let mut bits = Bitmap::new(&own.name, own.granularity_bits, length)?;
    for range in views.top.allocated(views.above) {
        set(&mut bits, &range?);
    }
    Ok(bits)
}

fn set(bits: &mut Bitmap, range: &Range<u64>) {
    bits.set(
        GuestOffset(range.start),
        range.end.saturating_sub(range.start),
    );
}

/// What the layers' bitmaps have together, and what they should have named: how many bytes that was.
fn together(
    views: &Views<'_>,
    own: Option<&StoredBitmap>,
    all: &[(usize, StoredBitmap)],
) -> Result<(Bitmap, u64)> {
    let finest = all.iter().map(|(_, stored)| stored).chain(own);
    let granularity = finest.clone().map(|stored| stored.granularity_bits).min();
    let (Some(granularity), Some(any)) = (granularity, all.first()) else {
        unreachable!("at least one layer has the bitmap");
    };
    let length = views.top.len().max(views.base.len());
    let mut bits = Bitmap::new(&any.1.name, granularity, length)?;
    for (index, stored) in all {
        let Some(layer) = views.top.layer(*index) else {
            unreachable!("a layer above the base is qcow2");
        };
        bits.merge(&layer.read_bitmap(stored)?);
    }
    // Of what a longer base keeps behind the end of the top, the layers' bitmaps say nothing.
    set(&mut bits, &(views.top.len()..length));
    // The lowest layer with the bitmap noted itself what was written to it.
    let lowest = all.len() - usize::from(own.is_none());
    let unnamed = unnamed(views, lowest, &bits)?;
    let before = bits.dirty_bytes();
    for range in &unnamed {
        set(&mut bits, range);
    }
    let added = bits.dirty_bytes() - before;
    Ok((bits, added))
}

/// What the top `layers` define, `bits` does not name, and is other than what lies below them.
fn unnamed(views: &Views<'_>, layers: usize, bits: &Bitmap) -> Result<Vec<Range<u64>>> {
    let Some(lower) = views.top.below(layers).filter(|_| layers > 0) else {
        return Ok(Vec::new());
    };
    let mut rest = Bitmap::new(bits.name(), bits.granularity_bits(), bits.disk_length())?;
    for range in views.top.allocated(layers) {
        set(&mut rest, &range?);
    }
    for range in bits.dirty_ranges() {
        rest.clear(GuestOffset(range.start), range.end - range.start);
    }
    let mut found = Vec::new();
    for range in rest.dirty_ranges() {
        let mut at = range.start;
        while at < range.end.min(views.top.len()) {
            views.go_on()?;
            let end = range.end.min(views.top.len()).min(at + STEP_BYTES);
            compare(
                &views.top,
                &lower,
                at..end,
                (bits.granularity(), &mut found),
            )?;
            at = end;
        }
    }
    Ok(found)
}

/// Adds the granules of `range` in which two disks differ.
fn compare(
    one: &Chain,
    other: &Chain,
    range: Range<u64>,
    (granularity, found): (u64, &mut Vec<Range<u64>>),
) -> Result<()> {
    let (here, there) = (read(one, &range)?, read(other, &range)?);
    let step = to_usize(granularity.min(STEP_BYTES));
    for (index, (here, there)) in here.chunks(step).zip(there.chunks(step)).enumerate() {
        if here != there {
            let start = range.start + to_u64(index * step);
            found.push(start..start + to_u64(here.len()));
        }
    }
    Ok(())
}

/// Behind the end of a disk are zeros.
fn read(chain: &Chain, range: &Range<u64>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; to_usize(range.end - range.start)];
    let there = chain.len().min(range.end).saturating_sub(range.start);
    let data = &mut bytes[..to_usize(there)];
    if !data.is_empty() {
        chain.read_at(range.start, data)?;
    }
    Ok(bytes)
}
