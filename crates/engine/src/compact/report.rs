//! What a compaction did, or would do.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Serialize;
use stead_sys::space;

use super::groups::Group;
use crate::Engine;
use crate::error::{AtFile, Result};
use crate::layers;
use crate::records::Sandbox;

/// What was compacted, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CompactReport {
    /// The sandbox.
    pub sandbox: String,
    /// Its disks.
    pub disks: Vec<CompactedDisk>,
}

/// A disk of a sandbox that was compacted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CompactedDisk {
    /// vda, vdb, …
    pub name: String,
    /// Layers before, the base included.
    pub layers_before: usize,
    /// Layers now.
    pub layers: usize,
    /// Each layer that took others in.
    pub merged: Vec<MergedLayer>,
}

/// A layer that took in those below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MergedLayer {
    /// Its file.
    pub file: PathBuf,
    /// The files that it took in, topmost first.
    pub took_in: Vec<PathBuf>,
    /// What all of them took in the file system, in bytes.
    pub bytes_before: u64,
    /// What it takes now, in bytes; 0 when it was only looked at.
    pub bytes: u64,
}

impl Engine {
    pub(super) async fn report_of(
        &self,
        sandbox: &Sandbox,
        groups: &HashMap<String, Vec<Group>>,
    ) -> Result<CompactReport> {
        let mut disks = Vec::new();
        for disk in self.records.disks(&sandbox.id).await? {
            let before = self.records.chain(&disk.layer).await?.len();
            let own = groups.get(&disk.disk).map_or(&[][..], Vec::as_slice);
            let gone: usize = own.iter().map(|group| group.merged.len() - 1).sum();
            let merged = own.iter().map(|group| self.merged_layer(group));
            disks.push(CompactedDisk {
                name: disk.disk,
                layers_before: before,
                layers: before - gone,
                merged: merged.collect::<Result<_>>()?,
            });
        }
        Ok(CompactReport {
            sandbox: sandbox.name.clone(),
            disks,
        })
    }

    fn merged_layer(&self, group: &Group) -> Result<MergedLayer> {
        let files = layers::files(&self.dir, &group.merged);
        let sizes = files
            .iter()
            .map(|file| space::allocated_bytes(&file.path).at("measure", &file.path));
        let bytes_before = sizes.sum::<Result<u64>>()?;
        let mut files = files.into_iter().map(|file| file.path);
        Ok(MergedLayer {
            file: files.next().unwrap_or_default(),
            took_in: files.collect(),
            bytes_before,
            bytes: 0,
        })
    }

    pub(super) fn measure_made(&self, report: &mut CompactReport) -> Result<()> {
        for merged in report.disks.iter_mut().flat_map(|disk| &mut disk.merged) {
            merged.bytes = space::allocated_bytes(&merged.file).at("measure", &merged.file)?;
        }
        Ok(())
    }
}
