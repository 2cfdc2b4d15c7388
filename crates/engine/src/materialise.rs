//! Bringing a checkpoint's parts to this worker, and proving every byte before a vCPU runs.
//!
//! A part that lies here already (the source's own layers, a template's base, an earlier fetch) is
//! used in place; what is missing is rebuilt by content, from chunks that any layer here has and
//! else from the store. Wherever a part came from, it is then hashed whole and compared with the
//! manifest: a base that was changed behind our back, with the same size and the same times, is found.

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use stead_store::{
    ChunkSize, FileSource, LocalSource, Manifest, ManifestId, Progress, Source, TreeRef,
};
use stead_sys::durable::{Existing, Partial};
use stead_sys::space;

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::job::Job;
use crate::layers::{self, ChainSource};
use crate::records::{LayerRow, Records, from_json};
use crate::store::{CheckpointBody, body_of, store_error};
use crate::{Engine, blobs, blocking, exclusion, id, launch};

/// How many threads hash a part.
const HASH_THREADS: usize = 2;
/// The most damaged ranges that an error names.
const RANGES_SHOWN: usize = 4;

/// A checkpoint whose every part is here and proven.
pub(crate) struct Parts {
    pub id: ManifestId,
    pub manifest: Manifest,
    pub body: CheckpointBody,
    /// The frozen top layer of each disk, in order.
    pub layers: Vec<LayerRow>,
    pub ram: Option<PathBuf>,
    pub device_state: Option<Arc<Vec<u8>>>,
    pub cost: Cost,
}

/// What bringing the parts here took.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Cost {
    /// Bytes of chunks that came from the store, uncompressed.
    pub fetched_bytes: u64,
    /// Bytes taken from other layers of this worker.
    pub reused_bytes: u64,
    /// Bytes hashed and compared with the manifest.
    pub verified_bytes: u64,
    /// Time of the comparison.
    pub verify: Duration,
}

impl Engine {
    /// Makes everything of a checkpoint available here and proves it.
    ///
    /// # Errors
    /// [`Kind::Damaged`] names the part, the file and the ranges that differ; [`Kind::Incompatible`]
    /// names how this host differs. Nothing was started.
    pub(crate) async fn obtain(&self, job: &mut Job, name: &str) -> Result<Parts> {
        let (id, manifest) = self.manifest(name).await?;
        let mut body = body_of(&id, &manifest)?;
        check_body(&id, &manifest, &body)?;
        if body.state_format.is_some() {
            self.check_compatible(name, &body).await?;
        } else {
            // Without memory there is nothing that fits one machine only.
            let recorded = &body.machine.qemu;
            let host = self.host(crate::AcceleratorChoice::Auto).await?;
            body.machine.qemu =
                host.machine(recorded.cpus, recorded.memory_bytes, recorded.disks.clone());
        }
        let text = id.to_string();
        let path = self.fetch_lock(&text);
        let _lock = exclusion::lock(
            &path,
            &format!("checkpoint {name}"),
            "fetch",
            self.settings.wait,
            &self.watch,
        )
        .await?;
        let mut cost = Cost::default();
        job.step("fetch").await?;
        self.obtain_blobs(job, &manifest, &body).await?;
        let layers = self.obtain_disks(job, &text, &manifest, &mut cost).await?;
        let (ram_name, ram) = self.obtain_ram(job, &text, &manifest, &mut cost).await?;
        let device_state = match &manifest.device_state {
            Some(blob) => Some(Arc::new(self.fetch_blob("device state", blob).await?)),
            None => None,
        };
        job.step("verify").await?;
        let mut parts = Parts {
            id,
            manifest,
            body,
            layers,
            ram,
            device_state,
            cost,
        };
        self.prove(&mut parts).await?;
        self.remember(&parts, ram_name.as_deref()).await?;
        Ok(parts)
    }

    async fn remember(&self, parts: &Parts, ram: Option<&str>) -> Result<()> {
        let ids: Vec<String> = parts.layers.iter().map(|layer| layer.id.clone()).collect();
        let mut tx = self.records.begin().await?;
        Records::insert_local_checkpoint(&mut tx, &parts.id.to_string(), ram, &ids).await?;
        tx.commit().await?;
        Ok(())
    }

    async fn check_compatible(&self, name: &str, body: &CheckpointBody) -> Result<()> {
        self.check_machine(&format!("checkpoint {name}"), &body.machine.qemu)
            .await
    }

    /// Refuses state of a machine that this host cannot run.
    pub(crate) async fn check_machine(
        &self,
        of: &str,
        recorded: &stead_vmm::Machine,
    ) -> Result<()> {
        let recorded = recorded.clone();
        let accelerator = match recorded.accelerator {
            stead_vmm::Accelerator::Tcg => stead_vmm::Accelerator::Tcg,
            stead_vmm::Accelerator::Kvm => self.accelerator(crate::AcceleratorChoice::Auto).await?,
        };
        let qemu = self.qemu().await?.clone();
        let differences = blocking(move || {
            recorded.differences(&qemu, accelerator).map_err(|source| {
                EngineError::new(
                    Kind::Incompatible,
                    "compare the recorded machine with this host",
                    "",
                )
                .because(source)
            })
        })
        .await?;
        if differences.is_empty() {
            return Ok(());
        }
        let list: Vec<String> = differences.iter().map(ToString::to_string).collect();
        Err(EngineError::new(
            Kind::Incompatible,
            format!("run {of} here"),
            list.join("; "),
        )
        .left("nothing was started")
        .next("use a worker like the one that made it; a disk-only checkpoint boots anywhere"))
    }

    /// Kernel and initramfs.
    async fn obtain_blobs(
        &self,
        job: &mut Job,
        manifest: &Manifest,
        body: &CheckpointBody,
    ) -> Result<()> {
        let wanted = [
            ("kernel", &manifest.kernel, &body.machine.kernel),
            ("initramfs", &manifest.initrd, &body.machine.initrd),
        ];
        for (what, blob, name) in wanted {
            job.also(|undo| undo.blobs.push(name.clone())).await?;
            if blobs::verify(&self.dir, name).is_ok() {
                continue;
            }
            let blob = blob.as_ref().ok_or_else(|| {
                EngineError::new(
                    Kind::Damaged,
                    "read a checkpoint",
                    format!("its manifest names no {what}"),
                )
            })?;
            let bytes = self.fetch_blob(what, blob).await?;
            if blobs::name_of(&bytes) != *name {
                return Err(EngineError::new(
                    Kind::Damaged,
                    format!("fetch the {what} of a checkpoint"),
                    format!("its content is not {name}, as the manifest says"),
                ));
            }
            blobs::put(&self.dir, &bytes)?;
        }
        Ok(())
    }

    async fn fetch_blob(&self, what: &str, blob: &stead_store::BlobRef) -> Result<Vec<u8>> {
        self.store()
            .await?
            .fetch_blob(blob)
            .await
            .map_err(|source| {
                store_error(format!("fetch the {what}"), source).left("nothing was started")
            })
    }

    /// A frozen layer for each disk: the source's own, one of the same content, or a new base.
    async fn obtain_disks(
        &self,
        job: &mut Job,
        manifest_id: &str,
        manifest: &Manifest,
        cost: &mut Cost,
    ) -> Result<Vec<LayerRow>> {
        let known = self.records.local_checkpoint_layers(manifest_id).await?;
        let mut found = Vec::new();
        for (slot, disk) in manifest.disks.iter().enumerate() {
            let own = known.as_ref().and_then(|layers| layers.get(slot));
            let layer = match own {
                Some(layer) if self.is_fit(layer).await? => self.base_layer(layer).await?,
                _ => {
                    self.layer_of_content(job, &disk.id, &disk.tree, cost)
                        .await?
                }
            };
            found.push(layer);
        }
        Ok(found)
    }

    /// Whether a layer can go under a new sandbox: its files are here, and there are not too many.
    async fn is_fit(&self, layer: &str) -> Result<bool> {
        let depth = self.records.chain(layer).await?.len();
        Ok(depth <= layers::DEPTH_REUSED_MAX && self.files_are_here(layer).await?)
    }

    async fn files_are_here(&self, layer: &str) -> Result<bool> {
        let chain = self.records.chain(layer).await?;
        Ok(chain
            .iter()
            .all(|layer| layers::path_of(&self.dir, &layer.id, &layer.format).is_file()))
    }

    /// A frozen layer through which a guest sees exactly `tree`.
    pub(crate) async fn layer_of_content(
        &self,
        job: &mut Job,
        disk: &str,
        tree: &TreeRef,
        cost: &mut Cost,
    ) -> Result<LayerRow> {
        for layer in self.records.layers_with_content().await? {
            if content_of(&layer)? == Some(*tree) && self.is_fit(&layer.id).await? {
                return Ok(layer);
            }
        }
        let layer = LayerRow {
            id: id::long()?,
            format: layers::RAW.to_owned(),
            parent: None,
            virtual_bytes: i64::try_from(tree.length_bytes).map_err(|source| {
                EngineError::new(Kind::Damaged, format!("rebuild disk {disk}"), "").because(source)
            })?,
            frozen: true,
            content: Some(crate::records::to_json(tree)?),
            stamp: None,
        };
        job.also(|undo| undo.layers.push(layer.id.clone())).await?;
        let path = layers::path_of(&self.dir, &layer.id, layers::RAW);
        self.rebuild(&format!("disk {disk}"), tree, &path, cost)
            .await?;
        layers::seal(&path)?;
        let mut tx = self.records.begin().await?;
        Records::insert_layer(&mut tx, &layer).await?;
        tx.commit().await?;
        Ok(layer)
    }

    async fn obtain_ram(
        &self,
        job: &mut Job,
        manifest_id: &str,
        manifest: &Manifest,
        cost: &mut Cost,
    ) -> Result<(Option<String>, Option<PathBuf>)> {
        let Some(tree) = &manifest.ram else {
            return Ok((None, None));
        };
        let known = self
            .records
            .local_checkpoints()
            .await?
            .into_iter()
            .find(|(known, _)| known == manifest_id)
            .and_then(|(_, ram)| ram);
        if let Some(name) = known {
            let path = self.ram_image(&name);
            if path.is_file() {
                return Ok((Some(name), Some(path)));
            }
            self.records.remove_local_checkpoint(manifest_id).await?;
        }
        let name = id::long()?;
        job.also(|undo| undo.ram.push(name.clone())).await?;
        let path = self.ram_image(&name);
        self.rebuild("RAM", tree, &path, cost).await?;
        launch::seal_image(&path)?;
        Ok((Some(name), Some(path)))
    }

    pub(crate) fn ram_image(&self, name: &str) -> PathBuf {
        self.dir.ram().join(format!("{name}.ram"))
    }

    /// Rebuilds content as a new file, from chunks of this worker's layers and from the store.
    async fn rebuild(
        &self,
        what: &str,
        tree: &TreeRef,
        path: &std::path::Path,
        cost: &mut Cost,
    ) -> Result<()> {
        let available =
            space::available_bytes(self.dir.root()).at("ask for room on", self.dir.root())?;
        let required = self.data_bytes(tree).await?;
        if required > available {
            return Err(EngineError::no_space(
                format!("rebuild {what}"),
                self.dir.root(),
                required,
                available,
            ));
        }
        let local = self.local_sources(tree).await?;
        let partial = Partial::create(path, 0o600).at("create", path)?;
        let report = self
            .store()
            .await?
            .fetch_tree(tree, partial.file(), &local, &self.progress_of("fetch"))
            .await
            .map_err(|source| {
                store_error(format!("fetch {what}"), source).left("nothing was started")
            })?;
        partial.publish(Existing::Replace).at("publish", path)?;
        cost.fetched_bytes += report.from_store_bytes;
        cost.reused_bytes += report.from_local_bytes;
        Ok(())
    }

    /// The bytes of a tree's chunks that are not zero.
    async fn data_bytes(&self, tree: &TreeRef) -> Result<u64> {
        let index = self
            .store()
            .await?
            .local_index(tree)
            .await
            .map_err(|source| {
                store_error("measure what is to be fetched", source).left("nothing was started")
            })?;
        Ok(index.chunks().saturating_mul(tree.chunk_size.bytes()))
    }

    /// Layers of this worker whose content is known, as sources of chunks.
    async fn local_sources(&self, tree: &TreeRef) -> Result<Vec<LocalSource>> {
        let mut sources = Vec::new();
        for layer in self.records.layers_with_content().await? {
            let Some(content) = content_of(&layer)? else {
                continue;
            };
            if content.chunk_size != tree.chunk_size || !self.files_are_here(&layer.id).await? {
                continue;
            }
            // A layer whose nodes the store no longer has cannot be searched for chunks: it only costs a fetch.
            let Ok(index) = self.store().await?.local_index(&content).await else {
                continue;
            };
            // So does a damaged one; whoever uses the layer itself is told.
            let Ok(source) = ChainSource::open(&self.records, &self.dir, &layer.id).await else {
                continue;
            };
            sources.push(LocalSource {
                index: Arc::new(index),
                source: Arc::new(source),
            });
        }
        Ok(sources)
    }

    /// Hashes every part and compares it with the manifest.
    pub(crate) async fn prove(&self, parts: &mut Parts) -> Result<()> {
        let begun = Instant::now();
        for (disk, layer) in parts.manifest.disks.iter().zip(&parts.layers) {
            let rows = self.records.chain(&layer.id).await?;
            self.prove_layers(&format!("disk {}", disk.id), &rows, &disk.tree)
                .await?;
            parts.cost.verified_bytes += disk.tree.length_bytes;
        }
        if let (Some(tree), Some(path)) = (&parts.manifest.ram, &parts.ram) {
            let file = File::open(path).at("open RAM image", path)?;
            let part = Part {
                what: "RAM".to_owned(),
                file: path.clone(),
                source: Arc::new(FileSource::new(file).at("open RAM image", path)?),
                chain: None,
            };
            self.prove_part(part, tree).await?;
            parts.cost.verified_bytes += tree.length_bytes;
        }
        parts.cost.verify = begun.elapsed();
        Ok(())
    }

    /// Proves what a guest will read below the layer that it writes to, before it is started.
    ///
    /// The highest layer whose content is known stands for all below it. Layers above that were
    /// written by a guest of this worker and not captured yet: nothing is known of them.
    pub(crate) async fn prove_under(&self, layer: &str) -> Result<()> {
        let rows = self.records.chain(layer).await?;
        for (depth, row) in rows.iter().enumerate() {
            if let Some(tree) = content_of(row)? {
                return self
                    .prove_layers("the disk's base", &rows[depth..], &tree)
                    .await;
            }
        }
        Ok(())
    }

    /// Proves layers of known content again if one of their files was touched since that was done last.
    pub(crate) async fn prove_if_touched(&self, rows: &[LayerRow], tree: &TreeRef) -> Result<()> {
        if self
            .stamps(rows)?
            .iter()
            .zip(rows)
            .all(|(now, row)| row.stamp.as_ref() == Some(now))
        {
            return Ok(());
        }
        self.prove_layers("the disk's base", rows, tree).await
    }

    /// Hashes what a guest sees through `rows`, top first, and compares it with `tree`.
    async fn prove_layers(&self, what: &str, rows: &[LayerRow], tree: &TreeRef) -> Result<()> {
        // Taken before the reading, so that a change meanwhile is a change since.
        let stamps = self.stamps(rows)?;
        let chain = Arc::new(ChainSource::open_rows(&self.dir, rows)?);
        let top = &rows[0];
        let part = Part {
            what: what.to_owned(),
            file: layers::path_of(&self.dir, &top.id, &top.format),
            source: chain.clone(),
            chain: Some(chain),
        };
        self.prove_part(part, tree).await?;
        let mut tx = self.records.begin().await?;
        for (row, stamp) in rows.iter().zip(&stamps) {
            Records::set_layer_stamp(&mut tx, &row.id, stamp).await?;
        }
        tx.commit().await?;
        Ok(())
    }

    fn stamps(&self, rows: &[LayerRow]) -> Result<Vec<String>> {
        let stamp =
            |row: &LayerRow| layers::stamp(&layers::path_of(&self.dir, &row.id, &row.format));
        let stamps: Result<_> = rows.iter().map(stamp).collect();
        stamps.map_err(|error| error.of_kind(Kind::Damaged).left("nothing was started"))
    }

    async fn prove_part(&self, part: Part, tree: &TreeRef) -> Result<()> {
        let chunk_size = tree.chunk_size;
        let hashed = part.source.clone();
        let attempt = format!("verify {}, {}", part.what, part.file.display());
        let failed = attempt.clone();
        let progress = self.progress_of("verify");
        let found =
            blocking(move || hash_part(hashed.as_ref(), chunk_size, &progress, failed)).await?;
        if found == *tree {
            return Ok(());
        }
        Err(EngineError::new(
            Kind::Damaged,
            attempt,
            self.describe_damage(tree, &part).await,
        )
        .left("nothing was started; the store was not changed")
        .next("move the damaged file away: the next use rebuilds it from the store"))
    }

    async fn describe_damage(&self, tree: &TreeRef, part: &Part) -> String {
        let changed = "its content is not what the manifest names";
        let Ok(store) = self.store().await else {
            return changed.to_owned();
        };
        match store
            .locate_damage(tree, part.source.clone(), &self.progress_of("verify"))
            .await
        {
            Ok(ranges) => {
                let shown: Vec<String> = ranges
                    .iter()
                    .take(RANGES_SHOWN)
                    .map(|range| format!("{}-{}{}", range.start, range.end, part.read_from(range)))
                    .collect();
                let more = ranges.len().saturating_sub(RANGES_SHOWN);
                let more = if more > 0 {
                    format!(" and {more} more")
                } else {
                    String::new()
                };
                format!("{changed}; it differs in bytes {}{more}", shown.join(", "))
            }
            Err(error) => format!("{changed}; where cannot be said: {error}"),
        }
    }
}

/// The name of a part's content, as it lies here.
fn hash_part(
    source: &dyn Source,
    chunk_size: ChunkSize,
    progress: &Progress,
    attempt: String,
) -> Result<TreeRef> {
    stead_store::hash_source(source, chunk_size, HASH_THREADS, progress).map_err(|source| {
        if matches!(source, stead_store::Error::Cancelled) {
            return store_error(attempt, source).left("nothing was started");
        }
        EngineError::new(Kind::Damaged, attempt, "it cannot be read")
            .because(source)
            .left("nothing was started; the store was not changed")
            .next("move the damaged file away: the next use rebuilds it from the store")
    })
}

/// A part of a checkpoint as it lies here.
struct Part {
    /// For people: `disk vda`, `RAM`.
    what: String,
    /// Its file; of a disk, the top layer's.
    file: PathBuf,
    source: Arc<dyn Source>,
    /// The layers, of a disk.
    chain: Option<Arc<ChainSource>>,
}

impl Part {
    /// Which layers a damaged range is read from, if that is not the part's own file.
    fn read_from(&self, range: &Range<u64>) -> String {
        let Some(Ok(files)) = self.chain.as_ref().map(|chain| chain.read_from(range)) else {
            return String::new();
        };
        if files == [self.file.clone()] {
            return String::new();
        }
        let files: Vec<String> = files
            .iter()
            .map(|file| file.display().to_string())
            .collect();
        format!(" (read from {})", files.join(" and "))
    }
}

/// The content a guest sees through a layer, if it is known.
pub(crate) fn content_of(layer: &LayerRow) -> Result<Option<TreeRef>> {
    layer
        .content
        .as_deref()
        .map(|text| from_json("content of a layer", text))
        .transpose()
}

/// Whether what the manifest says twice it says alike, and within our bounds.
fn check_body(id: &ManifestId, manifest: &Manifest, body: &CheckpointBody) -> Result<()> {
    let damaged = |found: &str| {
        Err(
            EngineError::new(Kind::Damaged, format!("read checkpoint {id}"), found)
                .left("nothing was started"),
        )
    };
    let disks: Vec<&str> = manifest.disks.iter().map(|disk| disk.id.as_str()).collect();
    if disks != body.machine.qemu.disks {
        return damaged("its manifest names other disks than its machine has");
    }
    if let Some(ram) = &manifest.ram
        && ram.length_bytes != body.machine.qemu.memory_bytes
    {
        return damaged("its RAM has another size than its machine");
    }
    if manifest.ram.is_some() != body.state_format.is_some()
        || manifest.ram.is_some() != manifest.device_state.is_some()
    {
        return damaged("it has RAM without device state, or the other way round");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Watch;

    #[test]
    fn a_comparison_that_nobody_wants_any_more_ends_and_is_no_damage() {
        let file = tempfile::NamedTempFile::new().expect("temp file");
        file.as_file().set_len(8 << 20).expect("size");
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[7; 1 << 20], 0).expect("write");
        let source = FileSource::new(file.reopen().expect("open")).expect("source");
        let watch = Watch::silent();
        let hash = |watch: &Watch| {
            let progress = crate::store::progress_to(watch.clone(), "verify");
            hash_part(&source, ChunkSize::DISK, &progress, "verify it".to_owned())
        };
        assert!(hash(&watch).is_ok());
        watch.cancel();
        let error = hash(&watch).expect_err("cancelled");
        assert_eq!(error.kind(), Kind::Cancelled, "{error}");
    }
}
