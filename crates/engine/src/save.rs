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

use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use stead_qcow2::{ClusterSize, LayerFile, LayerFormat};
use stead_save_image::{Appears, Control, DiskContent, Finished, Format, NewImage, Writer};
use stead_save_image::{Kind as ImageKind, SaveImageError};
use stead_store::Source;
use stead_sys::durable;

use crate::capture::{Instant, PauseReport, Plan};
use crate::domain::{Domain, LIBVIRT_RAM, uuid_of};
use crate::error::{AtFile, EngineError, Kind, Result};
use crate::job::{Job, Undo};
use crate::layers::{self, ChainSource};
use crate::records::{Records, SandboxState};
use crate::restore::micros;
use crate::sandbox::{vm_error, wrong_state};
use crate::{Engine, blobs, blocking};

/// The permission bits of an image: it holds a guest's memory.
const MODE: u32 = 0o600;
/// How much of a disk is read at a time.
const STEP_BYTES: usize = 1 << 20;
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
        let plan = self
            .plan_instant("save", sandbox, launch, false, request.stop)
            .await?;
        let file = std::path::absolute(&request.file).at("find", &request.file)?;
        let folder = file.parent().unwrap_or(Path::new("/"));
        self.check_room(&plan, Some(folder))?;
        let target = Target::create(self.domain_of(&plan, &file).await?, &file, request.format)?;
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
        machine.qemu_version = self.qemu().await?.version();
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
        instant: Instant,
        target: Target,
    ) -> Result<SaveReport> {
        let begun = std::time::Instant::now();
        job.step("write").await?;
        self.keep_layers(plan, &target.file).await?;
        let content = self.content_of_image(plan, &instant).await?;
        let stopper = tokio::spawn({
            let (watch, control) = (self.watch.clone(), target.control.clone());
            async move {
                watch.cancelled().await;
                control.cancel();
            }
        });
        let written = blocking(move || target.fill(content)).await;
        stopper.abort();
        let (mut target, finished) = written?;
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

    /// From here on the frozen layers stay, whatever becomes of the sandbox, until the image's file is gone.
    async fn keep_layers(&self, plan: &Plan, file: &Path) -> Result<()> {
        let frozen: Vec<String> = (plan.disks.iter())
            .map(|(_, frozen, _)| frozen.id.clone())
            .collect();
        let mut tx = self.records.begin().await?;
        let holder = format!("{HOLDER}{}", file.display());
        Records::insert_local_checkpoint(&mut tx, &holder, None, &frozen).await?;
        tx.commit().await?;
        Ok(())
    }

    async fn content_of_image(&self, plan: &Plan, instant: &Instant) -> Result<Content> {
        let (Some(state), Some(format), Some(ram)) =
            (&instant.device_state, instant.state_format, &plan.ram)
        else {
            unreachable!("a save takes the memory too")
        };
        let join = stead_vmm::whole_stream(state, format, LIBVIRT_RAM)
            .map_err(|source| vm_error("read the state of", &plan.sandbox, source))?;
        let path = self.ram_image(ram);
        let ram = File::open(&path).at("open", &path)?;
        let mut disks = Vec::new();
        for (disk, frozen, _) in &plan.disks {
            let chain = self.records.chain(&frozen.id).await?;
            let source = ChainSource::open_rows(&self.dir, &chain)?;
            disks.push((disk.clone(), Arc::new(source)));
        }
        Ok(Content { join, ram, disks })
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
fn overlay_of(file: &Path, disk: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{disk}.qcow2"));
    PathBuf::from(name)
}

/// What goes into an image.
struct Content {
    join: stead_migration_stream::Join,
    ram: File,
    disks: Vec<(String, Arc<ChainSource>)>,
}

/// An image's files while they are made: dropped before [`Target::keep`], they are removed.
struct Target {
    file: PathBuf,
    writer: Option<Writer>,
    control: Control,
    overlays: Vec<PathBuf>,
    kept: bool,
}

impl Target {
    fn create(domain: Domain, file: &Path, format: Format) -> Result<Self> {
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

    /// Writes everything and completes the file.
    fn fill(mut self, content: Content) -> Result<(Self, Finished)> {
        let Some(mut writer) = self.writer.take() else {
            unreachable!("a target is filled once")
        };
        let hashing = std::thread::spawn({
            let (disks, control) = (content.disks, self.control.clone());
            move || hash_disks(&disks, &control)
        });
        let ram = &content.ram;
        let written = content
            .join
            .write(&mut writer, |at, bytes| ram.read_exact_at(bytes, at));
        if written.is_err() {
            self.control.cancel();
        }
        let hashed = hashing.join();
        written.at("write", &self.file)?;
        let disks = match hashed {
            Ok(disks) => disks.at("read the disks for", &self.file)?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        writer.set_disks(disks)?;
        crate::job::crash_point("save", "finish");
        let finished = writer.finish()?;
        Ok((self, finished))
    }

    fn keep(&mut self) {
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

fn hash_disks(
    disks: &[(String, Arc<ChainSource>)],
    control: &Control,
) -> io::Result<Vec<DiskContent>> {
    let hash = |(name, source): &(String, Arc<ChainSource>)| {
        let content = Reading::new(source.as_ref(), control);
        DiskContent::of(name.clone(), BufReader::with_capacity(STEP_BYTES, content))
    };
    disks.iter().map(hash).collect()
}

/// A disk's content from its first byte to its last.
struct Reading<'a, S: ?Sized> {
    source: &'a S,
    control: &'a Control,
    at: u64,
}

impl<'a, S: Source + ?Sized> Reading<'a, S> {
    fn new(source: &'a S, control: &'a Control) -> Self {
        let at = 0;
        Self {
            source,
            control,
            at,
        }
    }
}

impl<S: Source + ?Sized> io::Read for Reading<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.control.is_cancelled() {
            return Err(io::Error::other("interrupted"));
        }
        let left = self.source.len() - self.at;
        let length = (buffer.len().min(STEP_BYTES) as u64).min(left);
        let length = usize::try_from(length).map_err(io::Error::other)?;
        self.source.read_at(self.at, &mut buffer[..length])?;
        self.at += length as u64;
        Ok(length)
    }
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
