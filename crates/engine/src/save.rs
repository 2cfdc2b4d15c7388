//! A save image of a running sandbox: libvirt's format, restored by `stead save restore` and by libvirt.
//!
//! ```text
//!   file created, partial ▶ one instant, as for a checkpoint ▶ VM runs on ▶ stream and disks' hashes written ▶
//!   durable ▶ file complete ▶ [--stop: VM ends]
//! ```
//! The guest stands still as long as for a checkpoint, not until the file is written: RAM and device state are taken
//! aside, and the stream that a migration would have sent is made of them afterwards.
//!
//! The disks are not in the file. Their state at the instant is frozen in this worker's layers, and beside the image lies
//! an empty overlay over each, which whoever restores the image writes to: neither the sandbox, which writes to
//! overlays of its own from the instant on, nor the image is changed by the other. The layers stay, also without
//! the sandbox, until the image's file is gone and `stead gc` runs: a moved or copied image holds nothing.
//!
//! # Invariants
//! - Until everything is durable the file says that it is partial; after an error it is removed, after a death it stays.
//! - Whatever fails, the VM runs on: the next command resumes one that a death left paused.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use stead_qcow2::{ClusterSize, LayerFile, LayerFormat};
use stead_save_image::{Appears, Control, DiskContent, Finished, Format, NewImage, Writer};
use stead_save_image::{Kind as ImageKind, SaveImageError};
use stead_sys::{copy, durable};

use crate::capture::{CapturedRam, Instant, PauseReport, Plan, Workload};
use crate::domain::{Domain, LIBVIRT_RAM, uuid_of};
use crate::error::{AtFile, EngineError, Kind, Result};
use crate::job::{Job, Undo};
use crate::layers;
use crate::records::{RamSharing, Records, SandboxState};
use crate::restore::micros;
use crate::sandbox::{vm_error, wrong_state};
use crate::{Engine, blobs, blocking};

/// The permission bits of an image: it holds a guest's memory.
const MODE: u32 = 0o600;
/// What an image is called where layers are kept for it, before its path.
const HOLDER: &str = "save-image:";

/// Whether `holder` of layers is a save image; if so, whether its file is there.
pub(crate) fn image_is_there(holder: &str) -> Option<bool> {
    holder
        .strip_prefix(HOLDER)
        .map(|path| Path::new(path).exists())
}

/// What is wanted of a save image.
#[derive(Debug, Clone)]
pub struct SaveRequest {
    /// The file; there must be none of this name.
    pub file: PathBuf,
    /// How the payload is stored.
    pub format: Format,
    /// Whether the VM ends when the image is complete.
    pub stop: bool,
}

/// A save image that is complete and durable.
#[derive(Debug, Clone, Serialize)]
pub struct SaveReport {
    /// The file.
    pub file: PathBuf,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of the migration stream in it.
    pub stream_bytes: u64,
    /// The empty overlays beside it, in the order of the disks.
    pub overlays: Vec<PathBuf>,
    /// How long the guest stood still.
    pub pause: PauseReport,
    /// From the end of the pause until the image was complete and durable, in microseconds.
    pub write_us: u64,
}

impl Engine {
    /// Writes a save image of a running sandbox, which runs on unless the request says that it ends.
    ///
    /// # Durability
    /// When this returns, the image is complete and durable.
    ///
    /// # Errors
    /// Whatever fails, the sandbox runs on and the image's files are removed.
    pub async fn save_write(&self, name: &str, request: &SaveRequest) -> Result<SaveReport> {
        let (_lock, sandbox) = self.lock_sandbox(name, "save").await?;
        let (SandboxState::Running, Some(launch)) = (sandbox.state, sandbox.launch.clone()) else {
            return Err(wrong_state("save", &sandbox, "it does not run"));
        };
        let mut plan = self
            .plan_instant("save", sandbox, launch, false, request.stop)
            .await?;
        // libvirt may restore it, and releases nobody.
        plan.workload = Workload::RunsOn;
        // It ends when the image is complete, so nobody waits for it.
        plan.ram_in_place = request.stop && plan.sandbox.ram_sharing == Some(RamSharing::Shared);
        let file = std::path::absolute(&request.file).at("find", &request.file)?;
        let folder = file.parent().unwrap_or(Path::new("/"));
        self.check_room(&plan, Some(folder))?;
        let target = Target::create(&self.domain_of(&plan, &file).await?, &file, request.format)?;
        let mut job = self.begin_capture(&plan, "save").await?;
        let made = async {
            let instant = self.take_instant(&mut job, &plan).await?;
            self.write_image(&mut job, &plan, instant, target).await
        }
        .await;
        self.undone_on_error(&job, made).await
    }

    /// The domain that whoever restores the image runs.
    async fn domain_of(&self, plan: &Plan, file: &Path) -> Result<Domain> {
        let mut machine = plan.machine.qemu.clone();
        // The one whose state it will be, which may be another one than this worker would start.
        machine.qemu_version = self.connect_vm(&plan.sandbox).await?.qmp().version();
        let mut disks = Vec::new();
        for (disk, frozen, _) in &plan.disks {
            let rows = self.records.chain(&frozen.id).await?;
            let own = LayerFile {
                path: overlay_of(file, disk),
                format: LayerFormat::Qcow2,
            };
            disks.push([vec![own], layers::files(&self.dir, &rows)].concat());
        }
        Ok(Domain {
            name: plan.sandbox.name.clone(),
            uuid: uuid_of(&plan.sandbox.id),
            machine,
            agent: plan.machine.agent,
            kernel: blobs::path_of(&self.dir, &plan.machine.kernel),
            initrd: blobs::path_of(&self.dir, &plan.machine.initrd),
            cmdline: plan.machine.cmdline.clone(),
            disks,
        })
    }

    async fn write_image(
        &self,
        job: &mut Job,
        plan: &Plan,
        mut instant: Instant,
        target: Target,
    ) -> Result<SaveReport> {
        let begun = std::time::Instant::now();
        job.step("write").await?;
        let frozen = plan.disks.iter().map(|(_, frozen, _)| frozen.id.clone());
        self.keep_layers(&target.file, &frozen.collect::<Vec<_>>())
            .await?;
        let memory = memory_of(plan, &mut instant)?;
        let stopper = self.stops(&target.control);
        let finished = self.fill(plan, target, memory).await;
        stopper.abort();
        let (mut target, finished) = finished?;
        crate::job::crash_point("save", "complete");
        if plan.stays_paused {
            self.end_saved(plan).await?;
        }
        // From here on nothing of the capture is to be taken back but what was staged for it.
        let mut tx = self.records.begin().await?;
        job.turn(&mut tx, &Undo::default()).await?;
        tx.commit().await?;
        target.keep();
        self.complete(job).await?;
        Ok(SaveReport {
            file: target.file.clone(),
            file_bytes: finished.file_bytes,
            stream_bytes: finished.stream_bytes,
            overlays: target.overlays.clone(),
            pause: instant.pause,
            write_us: micros(begun.elapsed()),
        })
    }

    /// From here on these layers stay, whatever else becomes of them, until the image's file is gone.
    pub(crate) async fn keep_layers(&self, file: &Path, layers: &[String]) -> Result<()> {
        let mut tx = self.records.begin().await?;
        let holder = format!("{HOLDER}{}", file.display());
        Records::insert_local_checkpoint(&mut tx, &holder, None, layers).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Cancels the writing when the command is; to be aborted when it has ended.
    pub(crate) fn stops(&self, control: &Control) -> tokio::task::JoinHandle<()> {
        let (watch, control) = (self.watch.clone(), control.clone());
        tokio::spawn(async move {
            watch.cancelled().await;
            control.cancel();
        })
    }

    /// Writes the memory while the disks are read, then completes the file.
    async fn fill(
        &self,
        plan: &Plan,
        target: Target,
        memory: Memory,
    ) -> Result<(Target, Finished)> {
        let progress = self.progress_of("read disks");
        let control = target.control.clone();
        let writing = async {
            let written = blocking(move || target.write(&memory)).await;
            if written.is_err() {
                progress.cancel();
            }
            written
        };
        let naming = async {
            let named = self.name_disks(plan, &progress).await;
            if named.is_err() {
                control.cancel();
            }
            named
        };
        match tokio::join!(writing, naming) {
            (Ok(target), Ok(disks)) => blocking(move || target.finish(disks)).await,
            // Whichever failed first has cancelled the other.
            (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
            (Err(write), Err(name)) if name.kind() == Kind::Cancelled => Err(write),
            (Err(_cancelled), Err(name)) => Err(name),
        }
    }

    async fn name_disks(
        &self,
        plan: &Plan,
        progress: &stead_store::Progress,
    ) -> Result<Vec<DiskContent>> {
        let mut disks = Vec::new();
        for (disk, frozen, _) in &plan.disks {
            let chain = self.records.chain(&frozen.id).await?;
            disks.push(self.name_disk(disk, &chain, progress).await?);
        }
        Ok(disks)
    }

    /// Ends the VM whose image is complete. Its disks stay as they were at the instant.
    async fn end_saved(&self, plan: &Plan) -> Result<()> {
        self.cut_power(&plan.sandbox).await?;
        self.records
            .set_not_running(&plan.sandbox.id, SandboxState::Stopped, None)
            .await?;
        self.free_memory(&plan.launch)
    }
}

/// Where the empty overlay over a disk lies.
pub(crate) fn overlay_of(file: &Path, disk: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{disk}.qcow2"));
    PathBuf::from(name)
}

/// What becomes the migration stream: the state of the devices, and where the RAM is.
pub(crate) struct Memory {
    pub join: stead_migration_stream::Join,
    pub ram: CapturedRam,
}

fn memory_of(plan: &Plan, instant: &mut Instant) -> Result<Memory> {
    let (Some(state), Some(format), Some(ram)) = (
        &instant.device_state,
        instant.state_format,
        instant.ram.take(),
    ) else {
        unreachable!("a save takes the memory too")
    };
    let join = stead_vmm::whole_stream(state, format, LIBVIRT_RAM)
        .map_err(|source| vm_error("read the state of", &plan.sandbox, source))?;
    Ok(Memory { join, ram })
}

/// An image's files while they are made: dropped before [`Target::keep`], they are removed.
pub(crate) struct Target {
    pub file: PathBuf,
    writer: Option<Writer>,
    pub control: Control,
    pub overlays: Vec<PathBuf>,
    kept: bool,
}

impl Target {
    /// Starts the image, which says that it is partial, and makes its overlays.
    pub(crate) fn create(domain: &Domain, file: &Path, format: Format) -> Result<Self> {
        let control = Control::silent();
        let image = NewImage {
            xml: domain.to_xml(),
            cookie: None,
            was_running: true,
            format,
            payload_bytes: domain.machine.memory_bytes,
            mode: MODE,
        };
        let mut target = Self {
            file: file.to_owned(),
            writer: Some(Writer::create(
                file,
                &image,
                Appears::AtOnce,
                control.clone(),
            )?),
            control,
            overlays: Vec::new(),
            kept: false,
        };
        for layers in &domain.disks {
            if let [own, below, ..] = layers.as_slice() {
                create_overlay(own, below)?;
                target.overlays.push(own.path.clone());
            }
        }
        Ok(target)
    }

    /// Writes the migration stream.
    pub(crate) fn write(mut self, memory: &Memory) -> Result<Self> {
        let Some(writer) = &mut self.writer else {
            unreachable!("a target is written once")
        };
        let ram = memory.ram.file();
        let data = copy::data_ranges(ram).at("read the memory for", &self.file)?;
        let read = |at: u64, bytes: &mut [u8]| ram.read_exact_at(bytes, at);
        (memory.join.write(writer, &data, read)).at("write", &self.file)?;
        Ok(self)
    }

    /// Completes the file.
    pub(crate) fn finish(mut self, disks: Vec<DiskContent>) -> Result<(Self, Finished)> {
        let Some(mut writer) = self.writer.take() else {
            unreachable!("a target is finished once")
        };
        writer.set_disks(disks)?;
        crate::job::crash_point("save", "finish");
        let finished = writer.finish()?;
        Ok((self, finished))
    }

    /// From here on its files stay.
    pub(crate) fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // The writer removes a file that it did not complete; one that it did is of no use without its overlays.
        if self.writer.take().is_none() {
            tidy(&self.file);
        }
        for overlay in &self.overlays {
            tidy(overlay);
        }
    }
}

fn tidy(path: &Path) {
    if let Err(error) = durable::remove_file(path) {
        tracing::warn!(%error, path = %path.display(), "a file of a failed save stays");
    }
}

fn create_overlay(own: &LayerFile, below: &LayerFile) -> Result<()> {
    let size = match below.format {
        LayerFormat::Raw => std::fs::metadata(&below.path)
            .at("look at", &below.path)?
            .len(),
        LayerFormat::Qcow2 => stead_qcow2::Layer::open(&below.path)
            .map_err(|source| failed_overlay(&own.path, source))?
            .virtual_size(),
    };
    let backing = below.path.to_string_lossy();
    let backing = Some((backing.as_ref(), below.format));
    stead_qcow2::create_overlay(&own.path, MODE, size, backing, ClusterSize::DEFAULT)
        .map(drop)
        .map_err(|source| failed_overlay(&own.path, source))
}

fn failed_overlay(path: &Path, source: stead_qcow2::Error) -> EngineError {
    EngineError::new(Kind::Conflict, format!("create {}", path.display()), "")
        .because(source)
        .left("nothing was changed")
        .next("name an image whose files are not there yet")
}

impl From<SaveImageError> for EngineError {
    /// The engine's words for a failure, so that exit statuses and JSON are those of every other command.
    fn from(error: SaveImageError) -> Self {
        let kind = match error.kind() {
            ImageKind::NotSaveImage | ImageKind::Usage => Kind::Usage,
            ImageKind::Incomplete
            | ImageKind::CutOff
            | ImageKind::Damaged
            | ImageKind::WrongCompression => Kind::Damaged,
            ImageKind::NewerVersion | ImageKind::Unsupported => Kind::Incompatible,
            ImageKind::NotFound => Kind::NotFound,
            ImageKind::Exists => Kind::Conflict,
            ImageKind::NoSpace => Kind::NoSpace,
            ImageKind::Cancelled => Kind::Cancelled,
            ImageKind::Io => Kind::Internal,
        };
        EngineError::new(kind, error.attempt(), error.found())
            .left(error.what_is_left())
            .next(error.next_step())
    }
}
