//! Checking an image: every reference to a cluster against its refcount, and that nothing overlaps.
//!
//! # How
//! All tables are walked and references counted per cluster, then held against the refcounts. Each L2
//! table is read once, however many internal snapshots share it. Counts are kept for a window of clusters
//! that fits 64 MiB ([`crate::counts`]); where an image needs more, the walk is made again for the next window. So
//! memory is bounded, and time grows with the file's metadata.
//!
//! # What it finds that `qemu-img check` does not
//! Overlaps that the refcounts agree with (an L2 table that is also guest data, with refcount 2), and
//! guest data that is cut off by the end of the file; bitmaps that do not fit the disk; and what
//! [`crate::consistency`] looks for.

mod image;
mod judge;
mod references;
mod report;
mod walk;

use crate::consistency;
use crate::control::Control;
use crate::counts::Counts;
use crate::error::{Error, Result};
use crate::layer::Layer;
use crate::units::HostOffset;

use image::Image;
use judge::compare;
use walk::Walk;

pub use report::{CheckReport, Finding, MAX_FINDINGS, Use};

pub(crate) use references::{References, for_each_reference, unusable_bitmaps};

/// Checks an image; nothing is written.
///
/// # Errors
/// When the file cannot be read, or has more than 8 388 608 L2 tables. What is wrong in the image is
/// in the report; only what [`Layer::open`] refuses does not get here.
pub fn check(layer: &Layer) -> Result<CheckReport> {
    check_with(layer, &Control::default())
}

/// As [`check`], watched.
///
/// # Errors
/// As [`check`]; [`Error::Cancelled`].
pub fn check_with(layer: &Layer, control: &Control<'_>) -> Result<CheckReport> {
    let mut report = CheckReport {
        marked_dirty: layer.header().dirty,
        marked_corrupt: layer.header().corrupt,
        file_clusters: layer.cluster_size().count_for(layer.file_length()),
        ..CheckReport::default()
    };
    let image = Image::read(layer, &mut report)?;
    look_around(&image, &mut report, control)?;
    each_window(&image, &mut report, control, |counts, report| {
        compare(&image, counts, report)
    })?;
    control.tell(1, 1);
    Ok(report)
}

/// Walks an image window by window, as many clusters at a time as fit the memory, and gives the counts of each.
fn each_window(
    image: &Image<'_>,
    report: &mut CheckReport,
    control: &Control<'_>,
    mut each: impl FnMut(&Counts, &mut CheckReport) -> Result<()>,
) -> Result<()> {
    let (mut start, mut told) = (0, 0);
    loop {
        let mut walk = Walk {
            image,
            counts: Counts::new(start),
            report: &mut *report,
            first: start == 0,
            follows: None,
            control,
            told,
        };
        walk.all()?;
        told = walk.told;
        let counts = walk.counts;
        each(&counts, report)?;
        control.go_on(image.layer.path())?;
        start = counts.end;
        if start >= image.file_clusters() {
            return Ok(());
        }
    }
}

/// What no refcount shows.
fn look_around(image: &Image<'_>, report: &mut CheckReport, control: &Control<'_>) -> Result<()> {
    let layer = image.layer;
    consistency::flags(layer, &mut report.notes);
    for reason in consistency::bitmaps(layer, &image.bitmaps, &mut report.notes)? {
        unusable(report, Use::BitmapTable, reason);
    }
    for snapshot in &image.snapshots {
        // What can be said of it as a whole: its length, and that it has no table twice.
        control.go_on(layer.path())?;
        usable(report, Use::SnapshotL1Table, layer.view_of(snapshot))?;
    }
    let tables = image.l2_tables.len();
    consistency::hollowed(layer, &image.snapshots, tables, control, &mut report.notes)
}

fn unusable(report: &mut CheckReport, usage: Use, reason: String) {
    report.add(Finding::Unusable { usage, reason });
}

/// A wrong content becomes a finding; a file that cannot be read stays an error.
fn usable<T>(report: &mut CheckReport, usage: Use, found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error @ Error::Io { .. }) => Err(error),
        Err(error) => {
            unusable(report, usage, error.to_string());
            Ok(None)
        }
    }
}

fn require_place(layer: &Layer, what: &'static str, at: HostOffset, length: u64) -> Result<()> {
    if layer.cluster_size().offset_in(at.0) != 0 {
        return Err(Error::Unaligned {
            path: layer.path().to_owned(),
            what,
            at,
        });
    }
    layer.file().require(what, at, length)
}
