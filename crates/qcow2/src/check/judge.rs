//! References held against refcounts, cluster by cluster.

use crate::counts::{Counts, PAGE_CLUSTERS, Page, State};
use crate::error::Result;
use crate::header::to_usize;
use crate::refcounts::Refcounts;
use crate::units::HostOffset;

use super::image::Image;
use super::report::{CheckReport, Finding, USES, Use};

/// The active tables say that the refcount is one.
pub(super) const SAID_ONE: u16 = 1 << 14;
/// The active tables say that the refcount is not one.
pub(super) const SAID_NOT_ONE: u16 = 1 << 15;
const USE_BITS: u16 = (1 << USES.len()) - 1;
/// What a cluster may be referenced for more than once.
const SHARED_BITS: u16 = Use::L2Table.bit() | Use::Data.bit() | Use::Compressed.bit();

/// Holds the references of a window against the refcounts, page by page.
pub(super) fn compare(image: &Image<'_>, counts: &Counts, report: &mut CheckReport) -> Result<()> {
    let mut refcounts = Refcounts::new(image.layer, image.refcount_blocks.clone());
    let mut at = counts.start;
    loop {
        let next = [counts.next_page(at), refcounts.next_block(at)];
        let Some(next) = next.into_iter().flatten().min() else {
            return Ok(());
        };
        let first = next / PAGE_CLUSTERS * PAGE_CLUSTERS;
        if first >= counts.end {
            return Ok(());
        }
        compare_page(image, first, counts.page(first), &mut refcounts, report)?;
        at = first.saturating_add(PAGE_CLUSTERS);
    }
}

/// One page; most are alike throughout, in references and refcounts.
fn compare_page(
    image: &Image<'_>,
    first: u64,
    page: Option<&Page>,
    refcounts: &mut Refcounts<'_>,
    report: &mut CheckReport,
) -> Result<()> {
    let bits = image.layer.cluster_size().bits();
    let none = Page::Alike(State::default());
    let page = page.unwrap_or(&none);
    if let Page::Alike(state) = page
        && refcounts.alike(first, PAGE_CLUSTERS)? == Some(u64::from(state.references))
        && !is_wrong(*state, u64::from(state.references))
    {
        if state.references > 0 {
            report.used_clusters += PAGE_CLUSTERS;
            report.image_end = HostOffset((first + PAGE_CLUSTERS) << bits);
        }
        return Ok(());
    }
    for index in 0..PAGE_CLUSTERS {
        let cluster = first + index;
        let state = page.get(to_usize(index));
        let refcount = refcounts.get(cluster)?;
        let place = HostOffset(cluster << bits);
        if state.references > 0 {
            report.used_clusters += 1;
            report.image_end = HostOffset((cluster + 1) << bits);
            compare_one(report, place, refcount, u64::from(state.references));
            compare_marks(report, place, refcount, state);
        } else if cluster < image.file_clusters() {
            compare_one(report, place, refcount, 0);
        }
    }
    Ok(())
}

fn compare_one(report: &mut CheckReport, cluster: HostOffset, refcount: u64, references: u64) {
    match refcount.cmp(&references) {
        std::cmp::Ordering::Equal => {}
        std::cmp::Ordering::Greater => report.add(Finding::Leak {
            cluster,
            refcount,
            references,
        }),
        std::cmp::Ordering::Less => report.add(Finding::RefcountTooLow {
            cluster,
            refcount,
            references,
        }),
    }
}

/// Uses that exclude each other.
fn overlaps(state: State) -> bool {
    let uses = state.marks & USE_BITS;
    uses.count_ones() > 1 || (state.references > 1 && uses & !SHARED_BITS != 0)
}

/// The active tables say something else of the refcount.
fn wrongly_said(state: State, refcount: u64) -> bool {
    let wrong = if refcount == 1 {
        SAID_NOT_ONE
    } else {
        SAID_ONE
    };
    state.marks & wrong != 0
}

fn is_wrong(state: State, refcount: u64) -> bool {
    overlaps(state) || wrongly_said(state, refcount)
}

fn compare_marks(report: &mut CheckReport, cluster: HostOffset, refcount: u64, state: State) {
    if overlaps(state) {
        let used = |usage: &Use| state.marks & usage.bit() != 0;
        let uses = USES.into_iter().filter(used).collect();
        report.add(Finding::Overlap { cluster, uses });
    }
    if wrongly_said(state, refcount) {
        report.add(Finding::WrongCopiedFlag { cluster, refcount });
    }
}
