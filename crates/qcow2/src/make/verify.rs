//! A new image is read back before it appears.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::chunk::CHUNK_BYTES;
use super::output::Output;
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
pub(crate) struct Made<'a> {
    output: &'a Output,
    layer: Option<Layer>,
    below: Option<&'a Chain>,
}

impl<'a> Made<'a> {
    pub fn raw(output: &'a Output) -> Self {
        Self {
            output,
            layer: None,
            below: None,
        }
    }

    pub fn qcow2(
        output: &'a Output,
        data: Option<&Output>,
        below: Option<&'a Chain>,
    ) -> Result<Self> {
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

/// Reads all bytes of a new image and holds them against the source.
pub(crate) fn content(
    source: &Chain,
    made: &Made<'_>,
    disk: u64,
    threads: usize,
    control: &Control<'_>,
) -> Result<()> {
    let queue = Queue::new(disk, CHUNK_BYTES, |at| Ok(Some(at)));
    let order = InTurn::new(());
    let work = || {
        let length = to_usize(CHUNK_BYTES);
        let (mut wanted, mut found) = (vec![0; length], vec![0; length]);
        while !order.is_stopped() {
            control.go_on(made.output.path())?;
            let Some(piece) = queue.take()? else { break };
            let length = to_usize(piece.range.end - piece.range.start);
            let (wanted, found) = (&mut wanted[..length], &mut found[..length]);
            source.read_padded(piece.range.start, wanted)?;
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
