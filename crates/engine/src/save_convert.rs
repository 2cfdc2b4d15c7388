//! A checkpoint as a save image and a save image as a checkpoint, without running a VM.
//!
//! ```text
//!   checkpoint ▶ parts fetched and proven ▶ RAM put into the state's stream ▶ image complete, its disks overlays over the parts
//!   save image ▶ read to its end ▶ disks, RAM and state named and stored ▶ disks as recorded? ▶ manifest = checkpoint
//! ```
//! Nothing of either source is changed. The disks of an image are read where its XML says that they are, and only what the
//! store does not have of them is stored.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use stead_save_image::{DiskContent, Finished, Format, SaveImage};
use stead_store::{ChunkSize, Disk, FileSource, Lineage, Manifest, Publish, Role, Source, TreeRef};
use stead_vmm::StateFormat;

use crate::capture::{CapturedRam, producer_of};
use crate::disk_content::{content_of_tree, name_whole, tree_of_content};
use crate::domain::{Domain, LIBVIRT_RAM, uuid_of};
use crate::error::{AtFile, EngineError, Kind, Result};
use crate::job::{Job, Undo};
use crate::layers::{self, ChainSource};
use crate::machine::MachineRecord;
use crate::materialise::Parts;
use crate::save::{Memory, Target, overlay_of};
use crate::save_restore::moved;
use crate::store::{CheckpointBody, store_error};
use crate::{CheckpointInfo, Engine, blobs, blocking, id};

/// A save image made of a checkpoint, complete and durable.
#[derive(Debug, Clone, Serialize)]
pub struct SavedCheckpoint {
    /// The file.
    pub file: std::path::PathBuf,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of the migration stream in it.
    pub stream_bytes: u64,
    /// The empty overlays beside it, in the order of the disks.
    pub overlays: Vec<std::path::PathBuf>,
}

impl Engine {
    /// Makes a save image of a checkpoint with memory.
    ///
    /// # Durability
    /// When this returns, the image is complete and durable.
    ///
    /// # Errors
    /// [`Kind::Usage`] when the checkpoint has no memory, and whatever fetching and writing may meet; the image's files are
    /// removed then.
    pub async fn save_of_checkpoint(
        &self,
        checkpoint: &str,
        file: &Path,
        format: Format,
    ) -> Result<SavedCheckpoint> {
        let file = std::path::absolute(file).at("find", file)?;
        let none = Undo::default();
        let mut job = Job::begin(&self.records, &self.watch, "save-convert", None, none).await?;
        let made = self
            .write_checkpoint(&mut job, checkpoint, &file, format)
            .await;
        self.undone_on_error(&job, made).await
    }

    async fn write_checkpoint(
        &self,
        job: &mut Job,
        checkpoint: &str,
        file: &Path,
        format: Format,
    ) -> Result<SavedCheckpoint> {
        let parts = self.obtain(job, checkpoint).await?;
        let memory = memory_of(&parts, checkpoint)?;
        let domain = self.domain_of_parts(&parts, file).await?;
        job.step("write").await?;
        let target = Target::create(&domain, file, format)?;
        let held: Vec<String> = parts.layers.iter().map(|layer| layer.id.clone()).collect();
        self.keep_layers(file, &held).await?;
        let disks = self.contents_of(&parts).await?;
        let stopper = self.stops(&target.control);
        let written = blocking(move || target.write(&memory)?.finish(disks)).await;
        stopper.abort();
        let (mut target, finished): (Target, Finished) = written?;
        let mut tx = self.records.begin().await?;
        job.finish(&mut tx).await?;
        tx.commit().await?;
        target.keep();
        if domain.agent {
            self.watch.notice(stands_still(checkpoint));
        }
        Ok(SavedCheckpoint {
            file: target.file.clone(),
            file_bytes: finished.file_bytes,
            stream_bytes: finished.stream_bytes,
            overlays: target.overlays.clone(),
        })
    }

    /// The domain that whoever restores the image runs.
    async fn domain_of_parts(&self, parts: &Parts, file: &Path) -> Result<Domain> {
        let machine = &parts.body.machine;
        let id = parts.id.to_string();
        let mut disks = Vec::new();
        for (disk, layer) in machine.qemu.disks.iter().zip(&parts.layers) {
            let own = stead_qcow2::LayerFile {
                path: overlay_of(file, disk),
                format: stead_qcow2::LayerFormat::Qcow2,
            };
            let rows = self.records.chain(&layer.id).await?;
            disks.push([vec![own], layers::files(&self.dir, &rows)].concat());
        }
        let sandbox = parts.manifest.lineage.sandbox.as_ref();
        let name = sandbox.and_then(|sandbox| sandbox.name.clone());
        Ok(Domain {
            name: name.unwrap_or_else(|| id[..12].to_owned()),
            uuid: uuid_of(&id),
            machine: machine.qemu.clone(),
            agent: machine.agent,
            kernel: blobs::path_of(&self.dir, &machine.kernel),
            initrd: blobs::path_of(&self.dir, &machine.initrd),
            cmdline: machine.cmdline.clone(),
            disks,
        })
    }

    /// What the manifest says of the disks; one that is cut into chunks of another size is read.
    async fn contents_of(&self, parts: &Parts) -> Result<Vec<DiskContent>> {
        let mut contents = Vec::new();
        for (disk, layer) in parts.manifest.disks.iter().zip(&parts.layers) {
            if disk.tree.chunk_size == ChunkSize::DISK {
                contents.push(content_of_tree(&disk.id, &disk.tree));
                continue;
            }
            let source = ChainSource::open(&self.records, &self.dir, &layer.id).await?;
            let progress = self.progress_of("read disks");
            let attempt = format!("read disk {}", disk.id);
            let tree = blocking(move || name_whole(&source, &progress, &attempt)).await?;
            contents.push(content_of_tree(&disk.id, &tree));
        }
        Ok(contents)
    }

    /// Makes a checkpoint of a save image.
    ///
    /// # Durability
    /// When this returns, the checkpoint is durable in the store.
    ///
    /// # Errors
    /// As [`Engine::save_restore`] for the image and its disks, and as [`Engine::checkpoint_create`] for the store; no
    /// checkpoint is listed then.
    pub async fn checkpoint_of_save(
        &self,
        file: &Path,
        name: Option<&str>,
    ) -> Result<CheckpointInfo> {
        self.store()
            .await
            .map_err(|error| error.left("nothing was changed"))?;
        self.check_name_is_free(name).await?;
        let image = Arc::new(self.proven_image(file).await?);
        let domain = Domain::of_xml(image.xml(), self.qemu().await?.version())?;
        let ram = id::long()?;
        let undo = Undo {
            ram: vec![ram.clone()],
            lease: true,
            ..Undo::default()
        };
        let job = Job::begin(&self.records, &self.watch, "save-convert", None, undo).await?;
        let made = async {
            job.step("publish").await?;
            let machine = self.machine_record(&domain)?;
            let memory_bytes = machine.qemu.memory_bytes;
            let state = self.take_memory(&ram, memory_bytes, image.clone()).await?;
            let parts = ImageParts {
                domain: &domain,
                image: &image,
                machine,
                state,
                ram: &ram,
            };
            let info = self.publish_image(&parts, name).await?;
            // What was taken out of the image lies in the store now.
            self.complete(&job).await?;
            Ok(info)
        }
        .await;
        self.undone_on_error(&job, made).await
    }

    async fn publish_image(
        &self,
        parts: &ImageParts<'_>,
        name: Option<&str>,
    ) -> Result<CheckpointInfo> {
        let store = self.store().await?;
        let mut publish = store
            .begin_publish(self.lease_owner()?)
            .await
            .map_err(|source| store_error("begin to publish", source))?;
        let manifest = self.manifest_of_image(&mut publish, parts, name).await?;
        let (id, _) = publish
            .commit(&manifest)
            .await
            .map_err(|source| store_error("write the manifest", source))?;
        Ok(crate::store::info_of(id.to_string(), &manifest, false))
    }

    async fn manifest_of_image(
        &self,
        publish: &mut Publish,
        parts: &ImageParts<'_>,
        name: Option<&str>,
    ) -> Result<Manifest> {
        let disks = self.publish_image_disks(publish, parts).await?;
        let path = self.ram_image(parts.ram);
        let file = File::open(&path).at("open", &path)?;
        let memory = Arc::new(FileSource::new(file).at("open", &path)?);
        let ram = self
            .publish_part(publish, "RAM", memory, ChunkSize::RAM)
            .await?;
        let (kernel, initrd) = (&parts.machine.kernel, &parts.machine.initrd);
        let qemu = &parts.machine.qemu;
        Ok(Manifest {
            role: Role::Checkpoint,
            name: name.map(str::to_owned),
            created: jiff::Timestamp::now(),
            kind: stead_store::Kind::Full,
            crash_consistent: false,
            lineage: Lineage::default(),
            producer: producer_of(qemu, &qemu.qemu_version.to_string(), &parts.machine.cmdline),
            disks,
            ram: Some(ram),
            device_state: Some(
                self.publish_blob(publish, "device state", &parts.state)
                    .await?,
            ),
            kernel: Some(
                self.publish_blob(publish, "the kernel", &self.blob_bytes(kernel)?)
                    .await?,
            ),
            initrd: Some(
                self.publish_blob(publish, "the initramfs", &self.blob_bytes(initrd)?)
                    .await?,
            ),
            machine: serde_json::to_value(CheckpointBody {
                machine: parts.machine.clone(),
                state_format: Some(StateFormat::RamSplit),
                hibernation: false,
            })
            .map_err(|source| EngineError::internal("write a manifest", "").because(source))?,
        })
    }

    /// Stores what the guest sees of each disk, which must be what the image recorded.
    async fn publish_image_disks(
        &self,
        publish: &mut Publish,
        parts: &ImageParts<'_>,
    ) -> Result<Vec<Disk>> {
        let mut disks = Vec::new();
        for (name, files) in parts.machine.qemu.disks.iter().zip(&parts.domain.disks) {
            let source =
                ChainSource::open_files(files).map_err(|error| moved(name, "").because(error))?;
            let tree = self
                .publish_part(publish, "a disk", Arc::new(source), ChunkSize::DISK)
                .await?;
            let recorded = parts.image.disks().iter().find(|disk| disk.name == *name);
            match recorded {
                Some(recorded) if tree_of_content(recorded) != tree => {
                    return Err(moved(
                        name,
                        "it has other content than when the VM was saved",
                    ));
                }
                Some(_) | None => {}
            }
            disks.push(Disk {
                id: name.clone(),
                tree,
                virtual_size_bytes: tree.length_bytes,
            });
        }
        Ok(disks)
    }

    async fn publish_part(
        &self,
        publish: &mut Publish,
        what: &str,
        source: Arc<dyn Source>,
        size: ChunkSize,
    ) -> Result<TreeRef> {
        let progress = self.progress_of("publish");
        let stored = publish.add_tree(source, size, None, &progress).await;
        stored.map_err(|source| store_error(format!("publish {what}"), source))
    }

    async fn publish_blob(
        &self,
        publish: &mut Publish,
        what: &str,
        bytes: &[u8],
    ) -> Result<stead_store::BlobRef> {
        let stored = publish.add_blob(bytes).await;
        stored.map_err(|source| store_error(format!("publish {what}"), source))
    }
}

/// What whoever runs such an image must know: nothing but its greeting lets a guest's agent set processes free, and never
/// by itself, since to it a host that is silent may be one that captures it again.
fn stands_still(checkpoint: &str) -> String {
    format!(
        "the guest's processes stand still in it, as in its checkpoint, until its agent is greeted: `stead save restore` \
         does that, libvirt does not, and under it they would stand still for ever. For an image that goes on under libvirt, \
         run the checkpoint (`stead fork {checkpoint} --name NAME`) and save it (`stead save write NAME FILE`)"
    )
}

/// What a checkpoint is made of.
struct ImageParts<'a> {
    domain: &'a Domain,
    image: &'a SaveImage,
    machine: MachineRecord,
    state: Vec<u8>,
    /// The name of the RAM image.
    ram: &'a str,
}

/// The stream that the checkpoint's VM would have sent.
fn memory_of(parts: &Parts, checkpoint: &str) -> Result<Memory> {
    let attempt = || format!("make a save image of checkpoint {checkpoint}");
    let (Some(state), Some(format), Some(ram)) =
        (&parts.device_state, parts.body.state_format, &parts.ram)
    else {
        return Err(EngineError::new(
            Kind::Usage,
            attempt(),
            "it holds only disks, and a save image is a VM's memory",
        )
        .left("nothing was changed")
        .next("name a checkpoint that was made without --disk-only"));
    };
    let join = stead_vmm::whole_stream(state, format, LIBVIRT_RAM)
        .map_err(|source| EngineError::new(Kind::Damaged, attempt(), "").because(source))?;
    let ram = File::open(ram).at("open RAM image", ram)?;
    Ok(Memory {
        join,
        ram: CapturedRam::InPlace(ram),
    })
}
