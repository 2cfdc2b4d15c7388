//! A new image is read back before it appears.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::chunk::CHUNK_BYTES;
use super::convert::threads;
use super::kept::View;
use super::output::Output;
use super::plan::Plan;
use super::queue::{InTurn, Queue};
use crate::chain::Chain;
use crate::check::check;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::header::{to_u64, to_usize};
use crate::layer::{ExtentKind, Layer};
use crate::units::GuestOffset;

/// Reads a new qcow2 image through our own reader and checks all of its tables and refcounts; leaks are
/// errors too.
pub(crate) fn structure(output: &Output) -> Result<()> {
    let layer = Layer::inspect_file(again(output)?, output.path())?;
    let report = check(&layer)?;
    let whole = !output.starts_empty() || report.used_clusters == report.file_clusters;
    if report.is_clean() && whole {
        return Ok(());
    }
    let found = match report.findings.first() {
        Some(finding) => finding.to_string(),
        None => format!(
            "{} of its {} clusters are used",
            report.used_clusters, report.file_clusters
        ),
    };
    not_verified(output, found)
}

fn not_verified(output: &Output, found: String) -> Result<()> {
    Err(Error::NotVerified {
        path: output.path().to_owned(),
        found,
    })
}

/// The new file, while it is partial.
fn again(output: &Output) -> Result<File> {
    let file = output.file().try_clone();
    file.map_err(|source| Error::io("open again", output.path(), source))
}

/// A new image as its reader will see it.
struct Made<'a> {
    output: &'a Output,
    layer: Option<Layer>,
    below: Option<&'a Chain>,
}

impl<'a> Made<'a> {
    fn raw(output: &'a Output) -> Self {
        Self {
            output,
            layer: None,
            below: None,
        }
    }

    fn qcow2(output: &'a Output, data: Option<&Output>, below: Option<&'a Chain>) -> Result<Self> {
        let mut layer = Layer::inspect_file(again(output)?, output.path())?;
        if let Some(data) = data {
            layer = layer.with_data(ImageFile::new(again(data)?, data.path())?)?;
        }
        layer.require_readable()?;
        Ok(Self {
            output,
            layer: Some(layer),
            below,
        })
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let Some(layer) = &self.layer else {
            let path = self.output.path();
            return self
                .output
                .file()
                .read_exact_at(bytes, at)
                .map_err(|source| Error::io("read back", path, source));
        };
        let (mut at, mut rest) = (at, bytes);
        while !rest.is_empty() {
            let extent = layer.extent_at(GuestOffset(at))?;
            let length = extent.length.min(to_u64(rest.len()));
            let (here, behind) = rest.split_at_mut(to_usize(length));
            match extent.kind {
                ExtentKind::Data(place) => layer.read_data(place, here)?,
                ExtentKind::Compressed { cluster, skip } => {
                    layer.read_compressed(cluster, skip, here)?;
                }
                ExtentKind::Zero => here.fill(0),
                ExtentKind::Unallocated => match self.below {
                    Some(below) => below.read_padded(at, here)?,
                    None => here.fill(0),
                },
            }
            (at, rest) = (at + length, behind);
        }
        Ok(())
    }
}

/// Holds all views of a new image against those of the source, and its bitmaps against what was to be kept.
pub(crate) fn contents(
    plan: &Plan<'_>,
    image: &Output,
    data: Option<&Output>,
    control: &Control<'_>,
) -> Result<()> {
    let mut made = match plan.geometry {
        Some(_) => Made::qcow2(image, data, plan.options.below)?,
        None => Made::raw(image),
    };
    let threads = threads(plan.options.threads);
    let active = Wanted {
        source: plan.source,
        window: plan.window.clone(),
        disk: plan.disk,
    };
    content(&active, &made, threads, control)?;
    let Some(active) = made.layer.take() else {
        return Ok(());
    };
    bitmaps(plan, image, &active)?;
    let snapshots = active.internal_snapshots()?;
    if snapshots.len() != plan.kept.views.len() {
        return not_verified(
            image,
            format!("it has {} internal snapshots", snapshots.len()),
        );
    }
    for (view, snapshot) in plan.kept.views.iter().zip(&snapshots) {
        let layer = active.view_of(snapshot)?;
        vm_state(image, view, &layer)?;
        made.layer = Some(layer);
        let wanted = Wanted {
            source: &view.chain,
            window: 0..view.chain.len(),
            disk: view.chain.len(),
        };
        content(&wanted, &made, threads, control)?;
    }
    Ok(())
}

fn bitmaps(plan: &Plan<'_>, image: &Output, layer: &Layer) -> Result<()> {
    let stored = layer.stored_bitmaps()?;
    if stored.len() != plan.kept.bitmaps.len() {
        return not_verified(image, format!("it has {} bitmaps", stored.len()));
    }
    for (stored, kept) in stored.iter().zip(&plan.kept.bitmaps) {
        if layer.read_bitmap(stored)? != *kept {
            let name = String::from_utf8_lossy(kept.name());
            return not_verified(image, format!("the bitmap {name} has other bits"));
        }
    }
    Ok(())
}

fn vm_state(image: &Output, view: &View, layer: &Layer) -> Result<()> {
    let Some(top) = view.chain.layer(0) else {
        unreachable!("a view has a qcow2 layer");
    };
    let length = top.vm_state_bytes();
    let mut at = 0;
    while at < length {
        let there = to_usize(CHUNK_BYTES.min(length - at));
        let (mut wanted, mut found) = (vec![0; there], vec![0; there]);
        top.read_vm_state(at, &mut wanted)?;
        layer.read_vm_state(at, &mut found)?;
        if wanted != found {
            return not_verified(image, format!("the VM state differs behind byte {at}"));
        }
        at += to_u64(there);
    }
    Ok(())
}

/// What a disk is to be.
struct Wanted<'a> {
    source: &'a Chain,
    window: Range<u64>,
    disk: u64,
}

impl Wanted<'_> {
    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let from = self.window.start + at;
        let there = self
            .window
            .end
            .saturating_sub(from)
            .min(to_u64(bytes.len()));
        let (data, behind) = bytes.split_at_mut(to_usize(there));
        behind.fill(0);
        self.source.read_padded(from, data)
    }
}

/// Reads all bytes of a new disk and holds them against the source.
fn content(
    source: &Wanted<'_>,
    made: &Made<'_>,
    threads: usize,
    control: &Control<'_>,
) -> Result<()> {
    let queue = Queue::new(source.disk, CHUNK_BYTES, |at| Ok(Some(at)));
    let order = InTurn::new(());
    let work = || {
        let length = to_usize(CHUNK_BYTES);
        let (mut wanted, mut found) = (vec![0; length], vec![0; length]);
        while !order.is_stopped() {
            control.go_on(made.output.path())?;
            let Some(piece) = queue.take()? else { break };
            let length = to_usize(piece.range.end - piece.range.start);
            let (wanted, found) = (&mut wanted[..length], &mut found[..length]);
            source.read(piece.range.start, wanted)?;
            made.read(piece.range.start, found)?;
            if let Some(at) = wanted.iter().zip(&*found).position(|(a, b)| a != b) {
                let at = GuestOffset(piece.range.start + to_u64(at));
                return not_verified(made.output, format!("{at} differs from the source"));
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                if let Err(error) = work() {
                    order.stop(error);
                }
            });
        }
    });
    order.finish()
}
