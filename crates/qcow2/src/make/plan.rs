//! What a copy does, decided before the first byte is read.

use std::ops::Range;

use super::chunk::{CHUNK_BYTES, Earlier, Job};
use super::convert::ConvertOptions;
use super::create::data_target;
use super::first::reserves;
use super::kept::{Kept, View};
use super::options::{
    Geometry, NewFormat, Preallocation, Qcow2Options, Target, Version, check_disk, invalid,
};
use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::header::SECTOR_BYTES;
use crate::units::GuestOffset;

/// What is decided before the first byte is read.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub source: &'a Chain,
    pub options: &'a ConvertOptions<'a>,
    /// The bytes of the source that become the disk.
    pub window: Range<u64>,
    /// The length of the disk to be made.
    pub disk: u64,
    /// `None`: the image is raw.
    pub geometry: Option<Geometry>,
    pub data_target: Option<Target>,
    pub kept: Kept,
}

impl<'a> Plan<'a> {
    pub fn new(
        source: &'a Chain,
        target: &Target,
        options: &'a ConvertOptions<'a>,
    ) -> Result<Self> {
        let window = options.window.clone().unwrap_or(0..source.len());
        if window.start > window.end || window.end > source.len() {
            return Err(Error::OutOfDisk {
                start: GuestOffset(window.start),
                length: window.end.saturating_sub(window.start),
                disk_length: source.len(),
            });
        }
        let copied = (window.end - window.start).next_multiple_of(SECTOR_BYTES);
        let disk = options.disk.unwrap_or(copied);
        let path = target.path();
        check_disk(path, disk)?;
        let mut plan = Self {
            source,
            options,
            window,
            disk,
            geometry: None,
            data_target: None,
            kept: Kept::read(source, options.keep)?,
        };
        plan.check_kept(target)?;
        match &options.format {
            NewFormat::Raw { preallocation } => {
                if options.compressed || options.below.is_some() {
                    return invalid(
                        path,
                        "a raw image has no compressed clusters and no backing file",
                    );
                }
                if *preallocation == Preallocation::Metadata {
                    return invalid(path, "a raw image has no metadata to reserve");
                }
            }
            NewFormat::Qcow2(qcow2) => {
                plan.geometry = Some(Geometry::new(path, disk, qcow2)?);
                plan.data_target = data_target(target, qcow2);
                plan.check_qcow2(target, qcow2)?;
            }
        }
        Ok(plan)
    }

    fn check_qcow2(&self, target: &Target, qcow2: &Qcow2Options) -> Result<()> {
        let path = target.path();
        if qcow2.backing.is_some() != self.options.below.is_some() {
            return invalid(
                path,
                "the backing file's name and its content are given together",
            );
        }
        if qcow2.data_file.is_some() && self.options.compressed {
            return invalid(path, "an external data file has no compressed clusters");
        }
        if qcow2.data_file.is_some() && self.data_target.is_none() {
            return invalid(path, "the data file and the image are one file");
        }
        if reserves(qcow2) && self.options.compressed {
            return invalid(path, "compressed clusters have no reserved place");
        }
        Ok(())
    }

    fn check_kept(&self, target: &Target) -> Result<()> {
        let path = target.path();
        if self.kept.views.is_empty() && self.kept.bitmaps.is_empty() {
            return Ok(());
        }
        let NewFormat::Qcow2(qcow2) = &self.options.format else {
            return invalid(path, "a raw image has no internal snapshots and no bitmaps");
        };
        if self.window != (0..self.source.len()) || self.disk != self.source.len() {
            return invalid(
                path,
                "internal snapshots and bitmaps are of the whole disk, and only a part is copied",
            );
        }
        if !self.kept.bitmaps.is_empty() && qcow2.version == Version::V2 {
            return invalid(path, "bitmaps need version 3 of the format (compat=1.1)");
        }
        if !self.kept.views.is_empty() && qcow2.data_file.is_some() {
            return invalid(
                path,
                "an image with an external data file has no internal snapshots",
            );
        }
        Ok(())
    }

    /// Whether there are internal snapshots to be copied.
    pub fn has_views(&self) -> bool {
        !self.kept.views.is_empty()
    }

    pub fn qcow2(&self) -> Option<&Qcow2Options> {
        match &self.options.format {
            NewFormat::Raw { .. } => None,
            NewFormat::Qcow2(qcow2) => Some(qcow2),
        }
    }

    /// Zeros left out in pieces of this many bytes.
    fn sparse(&self) -> Option<u64> {
        let bytes = self.options.sparse_bytes.min(CHUNK_BYTES);
        (bytes > 0).then(|| bytes.next_power_of_two().max(512))
    }

    /// The unit that is placed: a cluster, or what can be a hole.
    pub fn unit(&self) -> u64 {
        match &self.geometry {
            Some(geometry) => geometry.size.bytes(),
            None => self.sparse().unwrap_or(CHUNK_BYTES),
        }
    }

    fn reserve(&self) -> Option<Preallocation> {
        match &self.options.format {
            NewFormat::Raw { preallocation } => Some(*preallocation),
            NewFormat::Qcow2(qcow2) => reserves(qcow2).then_some(qcow2.preallocation),
        }
    }

    /// The work for the active disk.
    pub fn active_job<'b>(&'b self, shareable: &[bool], earlier: &'b [Earlier<'b>]) -> Job<'b> {
        Job {
            window: self.window.clone(),
            reserve: self.reserve(),
            ..self.job(self.source, shareable, earlier)
        }
    }

    /// The work for the disk of an internal snapshot.
    pub fn view_job<'b>(
        &'b self,
        view: &'b View,
        shareable: &[bool],
        earlier: &'b [Earlier<'b>],
    ) -> Job<'b> {
        self.job(&view.chain, shareable, earlier)
    }

    fn job<'b>(
        &'b self,
        source: &'b Chain,
        shareable: &[bool],
        earlier: &'b [Earlier<'b>],
    ) -> Job<'b> {
        let below = self.options.below;
        let geometry = self.geometry.as_ref();
        Job {
            source,
            window: 0..source.len(),
            earlier,
            below,
            layers_above: below.and_then(|below| source.layers_above(below)),
            unit: self.unit(),
            sparse: self.sparse(),
            compression: self
                .qcow2()
                .filter(|_| self.options.compressed)
                .map(|qcow2| qcow2.compression),
            subclusters: geometry.is_some_and(|geometry| geometry.extended_l2),
            zeros_are_data: geometry
                .is_some_and(|geometry| geometry.says_zeros() && !geometry.has_zero_entries()),
            reserve: None,
            shareable: shareable.to_vec(),
        }
    }
}
