//! Images that the caller writes from front to back: an empty overlay, a merge of layers.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use stead_sys::copy::is_zero;
use stead_sys::durable::Existing;

use super::create::{create, finish_qcow2, write_complete};
use super::layout::{ALL_SUBCLUSTERS, Extras, Layout};
use super::options::{Backing, Geometry, NewFormat, Qcow2Options, Target, invalid};
use super::output::Output;
use super::verify;
use crate::chain::{Chain, LayerFormat};
use crate::control::Control;
use crate::error::{Error, Result};
use crate::header::{to_u64, to_usize};
use crate::units::{ClusterSize, GuestOffset};

/// How many bytes one step of [`write_image`] reads and writes.
const STEP_BYTES: u64 = 2 << 20;

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct ImageOptions {
    /// Permission bits of the file.
    pub mode: u32,
    /// The virtual disk's length in bytes, a multiple of 512.
    pub virtual_size: u64,
    /// Whether an earlier file under the name may be replaced.
    pub existing: Existing,
    /// What the image is to be apart from that. It has no external data file, and
    /// nothing is reserved.
    pub qcow2: Qcow2Options,
}

/// Makes an empty overlay of version 3 at `path`, which must not exist.
///
/// # Durability
/// When this returns `Ok`, the image and its name have been synced.
///
/// # Errors
/// When the file exists or cannot be written, or the format cannot express what was asked for:
/// then there is no new file.
pub fn create_overlay(
    path: &Path,
    mode: u32,
    virtual_size: u64,
    backing: Option<(&str, LayerFormat)>,
    cluster_size: ClusterSize,
) -> Result<File> {
    let target = Target::New {
        path: path.to_owned(),
        mode,
        existing: Existing::Keep,
    };
    let options = Qcow2Options {
        cluster_size,
        backing: backing.map(|(name, format)| Backing {
            name: name.to_owned(),
            format,
        }),
        ..Qcow2Options::default()
    };
    create(
        &target,
        &NewFormat::Qcow2(options),
        virtual_size,
        &Control::default(),
    )
}

/// Writes `ranges` of `from` as a new image at `path`: [`Chain::data`] without a backing file makes
/// a full copy, [`Chain::allocated`] over a backing file merges the top layers into one.
///
/// Ranges must be in order. They are widened to whole clusters, read through the chain, so what the
/// image says is right for every byte it defines. Clusters of zeros take no room.
///
/// # Durability
/// When this returns `Ok`, the image and its name have been synced.
///
/// # Errors
/// When reading fails, or as [`ImageBuilder`]; then there is no new file.
pub fn write_image(
    path: &Path,
    options: ImageOptions,
    from: &Chain,
    ranges: impl Iterator<Item = Result<Range<u64>>>,
) -> Result<File> {
    let size = options.qcow2.cluster_size;
    let disk = options.virtual_size;
    let mut builder = ImageBuilder::create(path, options)?;
    let mut written = 0;
    for range in ranges {
        let range = range?;
        let start = size.start_of(range.start).max(written);
        let end = range.end.min(disk).next_multiple_of(size.bytes()).min(disk);
        if start < end {
            copy_range(&mut builder, from, start..end)?;
            written = end.next_multiple_of(size.bytes());
        }
    }
    builder.finish()
}

fn copy_range(builder: &mut ImageBuilder, from: &Chain, range: Range<u64>) -> Result<()> {
    let mut buffer = vec![0; to_usize(STEP_BYTES.min(range.end - range.start))];
    let mut at = range.start;
    while at < range.end {
        let length = STEP_BYTES.min(range.end - at);
        let bytes = &mut buffer[..to_usize(length)];
        from.read_padded(at, bytes)?;
        builder.write(GuestOffset(at), bytes)?;
        at += length;
    }
    Ok(())
}

/// Writes a new image from front to back; dropped before [`ImageBuilder::finish`], it leaves nothing.
#[derive(Debug)]
pub struct ImageBuilder {
    output: Output,
    options: Qcow2Options,
    layout: Layout,
    /// The guest offset that may be written next.
    at: u64,
}

impl ImageBuilder {
    /// Starts an image that will be at `path`.
    ///
    /// # Errors
    /// When the format cannot express `options` ([`Error::InvalidImage`]), the file exists and may not be
    /// replaced, or the temporary file cannot be created.
    pub fn create(path: &Path, options: ImageOptions) -> Result<Self> {
        let geometry = Geometry::new(path, options.virtual_size, &options.qcow2)?;
        if super::first::reserves(&options.qcow2) || geometry.external {
            return invalid(
                path,
                "what is written by ranges is not reserved and has one file",
            );
        }
        // The first cluster can only be too small for what is known now.
        super::first::first_cluster(&geometry, &options.qcow2, &super::first::Tables::default())?;
        let target = Target::New {
            path: path.to_owned(),
            mode: options.mode,
            existing: options.existing,
        };
        Ok(Self {
            output: Output::create(&target)?,
            options: options.qcow2,
            layout: Layout::new(geometry),
            at: 0,
        })
    }

    /// Writes guest data. Clusters that are all zeros are noted as such and take no room.
    ///
    /// # Errors
    /// When `at` lies before what was written, `at` or the length is not whole clusters (the end of
    /// the disk may cut the last one), the disk ends before the data, or writing fails.
    pub fn write(&mut self, at: GuestOffset, bytes: &[u8]) -> Result<()> {
        self.accept(at, to_u64(bytes.len()))?;
        let size = self.layout.geometry().size;
        let mut guest = at.0;
        for run in bytes.chunks(size.buffer_len()) {
            if is_zero(run) {
                self.write_zero_cluster(guest)?;
            } else {
                self.write_cluster(guest, run)?;
            }
            guest += to_u64(run.len());
        }
        write_complete(&mut self.layout, &self.output)
    }

    /// Says that a range is zeros, whatever the backing file holds there.
    ///
    /// # Errors
    /// As [`ImageBuilder::write`].
    pub fn write_zeros(&mut self, at: GuestOffset, length: u64) -> Result<()> {
        self.accept(at, length)?;
        if !self.layout.geometry().says_zeros() {
            return Ok(());
        }
        let step = self.layout.geometry().size.bytes();
        let mut guest = at.0;
        while guest < at.0 + length {
            self.write_zero_cluster(guest)?;
            guest += step;
        }
        write_complete(&mut self.layout, &self.output)
    }

    /// Makes the image whole, reads it back, and lets it appear under its name.
    ///
    /// # Durability
    /// When this returns `Ok`, content, name and folder entry have been synced.
    ///
    /// # Errors
    /// When writing, checking, syncing or renaming fails, or the file exists and may not be replaced; then
    /// there is no new file and an earlier one is as it was.
    pub fn finish(self) -> Result<File> {
        finish_qcow2(self.layout, &self.options, &Extras::default(), &self.output)?;
        verify::structure(&self.output)?;
        self.output.publish()
    }

    fn accept(&mut self, at: GuestOffset, length: u64) -> Result<()> {
        let size = self.layout.geometry().size;
        let disk = self.layout.geometry().disk;
        let Some(end) = at.0.checked_add(length).filter(|end| *end <= disk) else {
            return Err(Error::OutOfDisk {
                start: at,
                length,
                disk_length: disk,
            });
        };
        let whole = |offset| size.offset_in(offset) == 0;
        if at.0 < self.at || !whole(at.0) || !(whole(end) || end == disk) {
            let next = self.at;
            return self.layout.geometry().invalid(format!(
                "a write of {length} bytes at {at} is not of whole clusters behind {next:#x}"
            ));
        }
        self.at = end;
        Ok(())
    }

    fn write_zero_cluster(&mut self, guest: u64) -> Result<()> {
        let geometry = self.layout.geometry();
        if geometry.says_zeros() && !geometry.has_zero_entries() {
            let zeros = vec![0; geometry.size.buffer_len()];
            return self.write_cluster(guest, &zeros);
        }
        self.layout.zero(guest)
    }

    fn write_cluster(&mut self, guest: u64, bytes: &[u8]) -> Result<()> {
        let host = self.layout.data(guest, ALL_SUBCLUSTERS)?;
        self.output.write(host, bytes)
    }
}
