//! Checkpoint and hibernate: one instant of a running VM, proven, then published.
//!
//! ```text
//!   room? ▶ overlays ▶ [freeze] ▶ PAUSE: all disks switched, device state, RAM ▶ go on ▶
//!   records ▶ read back (layers checked, state walked) ▶ publish ▶ manifest = ready
//! ```
//! Hibernate is the same with the VM left paused until the manifest is durable, and quit then.
//! Whatever fails before the manifest, the VM runs on (or is resumed) and nothing is listed.

pub(crate) mod backup;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use stead_store::{
    Base, ChunkSize, FileSource, Lineage, Manifest, ManifestId, Producer, Publish, Role,
    SandboxName, Source, Store, TreeRef,
};
use stead_sys::durable::{self, Existing, Partial};
use stead_sys::{copy, space};
use stead_vmm::{CaptureRequest, Captured, NewOverlay, PhaseTimes, StateFormat, Vm};

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::job::{CaptureUndo, Hibernations, Job, Undo};
use crate::layers::{self, ChainSource};
use crate::machine::MachineRecord;
use crate::materialise::content_of;
use crate::records::{LayerRow, RamSharing, Records, Sandbox, SandboxDisk, SandboxState};
use crate::restore::micros;
use crate::sandbox::{vm_error, wrong_state};
use crate::standstill::Standstill;
use crate::store::{CheckpointBody, CheckpointInfo, store_error};
use crate::{Engine, blobs, blocking, id, launch, paths};

/// Room left free besides what is computed, in bytes: metadata of overlays, database, manifests.
const SPARE_BYTES: u64 = 64 << 20;
/// The most findings of a check that an error names.
const FINDINGS_SHOWN: usize = 4;
/// How long the guest's file systems may take to freeze.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(20);

/// What is wanted of a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct CheckpointRequest {
    /// Its name.
    pub name: Option<String>,
    /// Only the disks.
    pub disk_only: bool,
    /// What is asked of the guest's processes.
    pub workload: Workload,
    /// Layers are compacted afterwards when a disk lies in more than this many; `None` for
    /// [`crate::DEPTH_COMPACTED`].
    pub compact_above: Option<usize>,
}

/// What a capture asks of the guest's processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Workload {
    /// They stand still for the instant, and in what is restored from it until clock, randomness and identity are set. Without
    /// an agent that sees to it there is no capture.
    #[default]
    StandsStill,
    /// The agent is not asked, so the capture is crash-consistent: in what is restored from it they run for a moment before
    /// clock and randomness are set.
    RunsOn,
}

/// How long the guest stood still, and for what.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct PauseReport {
    /// From before the vCPUs were stopped until they ran again, in microseconds; of a hibernation,
    /// until its state was taken.
    pub paused_us: u64,
    /// Stopping the vCPUs, draining and flushing the disks, in microseconds.
    pub stop_us: u64,
    /// Switching all disks, in microseconds.
    pub snapshot_us: u64,
    /// Device state, in microseconds.
    pub state_us: u64,
    /// RAM, in microseconds.
    pub ram_us: u64,
    /// Letting the vCPUs run, in microseconds.
    pub resume_us: u64,
}

impl From<PhaseTimes> for PauseReport {
    fn from(times: PhaseTimes) -> Self {
        Self {
            paused_us: micros(times.paused),
            stop_us: micros(times.stop),
            snapshot_us: micros(times.snapshot),
            state_us: micros(times.state),
            ram_us: micros(times.ram),
            resume_us: micros(times.resume),
        }
    }
}

/// A checkpoint that is durable in the store.
#[derive(Debug, Clone, Serialize)]
pub struct CaptureReport {
    /// The checkpoint.
    pub checkpoint: CheckpointInfo,
    /// How long the guest stood still.
    pub pause: PauseReport,
    /// Bytes that the store grew by.
    pub stored_bytes: u64,
    /// Bytes of state that the store did not have, before compression.
    pub new_bytes: u64,
    /// Bytes of state that were read to be published.
    pub read_bytes: u64,
    /// Time from the end of the pause until the manifest was durable, in microseconds.
    pub publish_us: u64,
}

/// A capture being made: what was decided before the pause.
pub(crate) struct Plan {
    pub sandbox: Sandbox,
    pub machine: MachineRecord,
    pub launch: String,
    name: Option<String>,
    /// Whether the VM is to stand still behind the instant.
    pub stays_paused: bool,
    /// For each disk: name, the layer written to so far, the overlay that takes over.
    pub disks: Vec<(String, LayerRow, LayerRow)>,
    /// The name of the RAM image, unless only the disks are taken.
    pub ram: Option<String>,
    /// Whether the RAM is read from where it is: for a VM that stays paused until everything is durable.
    pub ram_in_place: bool,
    /// What is asked of the guest's processes.
    pub workload: Workload,
    /// The bitmap that begins in each overlay, for a backup.
    bitmaps: Vec<Option<Vec<u8>>>,
}

/// One instant, taken.
pub(crate) struct Instant {
    /// The memory, unless only the disks are taken.
    pub ram: Option<CapturedRam>,
    pub device_state: Option<Vec<u8>>,
    pub state_format: Option<StateFormat>,
    pub pause: PauseReport,
    crash_consistent: bool,
}

/// A guest's memory at the instant.
pub(crate) enum CapturedRam {
    /// Where it was copied to while the guest stood still; it goes when this is dropped.
    Staged(Partial, PathBuf),
    /// The VM's own, which does not change while the VM stands still.
    InPlace(File),
}

impl CapturedRam {
    /// The memory, from its first byte.
    pub(crate) fn file(&self) -> &File {
        match self {
            Self::Staged(partial, _) => partial.file(),
            Self::InPlace(file) => file,
        }
    }
}

impl Engine {
    /// Captures a running sandbox and publishes it. The sandbox runs on.
    ///
    /// # Durability
    /// When this returns, the checkpoint is durable in the store.
    ///
    /// # Errors
    /// Whatever fails, the sandbox runs on and no checkpoint is listed.
    pub async fn checkpoint_create(
        &self,
        name: &str,
        request: &CheckpointRequest,
    ) -> Result<CaptureReport> {
        let (_lock, sandbox) = self.lock_sandbox(name, "checkpoint").await?;
        let plan = self
            .plan_capture(sandbox, request.name.clone(), request.disk_only, false)
            .await?;
        let plan = Plan {
            workload: request.workload,
            ..plan
        };
        let mut job = self.begin_capture(&plan, "checkpoint").await?;
        let made = async {
            let instant = self.take_instant(&mut job, &plan).await?;
            self.publish_instant(&mut job, &plan, instant).await
        }
        .await;
        let report = self.undone_on_error(&job, made).await?;
        let limit = request.compact_above.unwrap_or(crate::DEPTH_COMPACTED);
        self.compact_if_deep(&plan.sandbox.id, limit).await;
        Ok(report)
    }

    /// Captures a running sandbox, publishes it and ends its VM.
    ///
    /// # Durability
    /// When this returns, the whole state is durable in the store.
    ///
    /// # Errors
    /// Whatever fails, the sandbox runs on.
    pub async fn hibernate(&self, name: &str, workload: Workload) -> Result<CaptureReport> {
        let (_lock, sandbox) = self.lock_sandbox(name, "hibernate").await?;
        let plan = self.plan_capture(sandbox, None, false, true).await?;
        let plan = Plan { workload, ..plan };
        let mut job = self.begin_capture(&plan, "hibernate").await?;
        let made = async {
            let instant = self.take_instant(&mut job, &plan).await?;
            self.publish_instant(&mut job, &plan, instant).await
        }
        .await;
        self.undone_on_error(&job, made).await
    }

    async fn plan_capture(
        &self,
        sandbox: Sandbox,
        name: Option<String>,
        disk_only: bool,
        hibernation: bool,
    ) -> Result<Plan> {
        let attempt = if hibernation {
            "hibernate"
        } else {
            "checkpoint"
        };
        let (SandboxState::Running, Some(launch)) = (sandbox.state, sandbox.launch.clone()) else {
            return Err(wrong_state(attempt, &sandbox, "it does not run"));
        };
        // Before the guest stands still for a checkpoint that could not be published.
        self.store()
            .await
            .map_err(|error| error.left("nothing was changed"))?;
        self.check_name_is_free(name.as_deref()).await?;
        let plan = self
            .plan_instant(attempt, sandbox, launch, disk_only, hibernation)
            .await?;
        let plan = Plan { name, ..plan };
        let store = self.local_store();
        self.check_room(&plan, store.as_deref())?;
        Ok(plan)
    }

    pub(crate) async fn check_name_is_free(&self, name: Option<&str>) -> Result<()> {
        if let Some(name) = name {
            id::check_name("checkpoint", name)?;
            if self.find_manifest(Role::Checkpoint, name).await?.is_some() {
                return Err(EngineError::new(
                    Kind::Conflict,
                    format!("create checkpoint {name}"),
                    "the store has a checkpoint of this name",
                )
                .left("nothing was changed")
                .next("choose another name, or remove that one first"));
            }
        }
        Ok(())
    }

    /// Names everything that taking one instant of a running sandbox will create.
    pub(crate) async fn plan_instant(
        &self,
        attempt: &str,
        sandbox: Sandbox,
        launch: String,
        disk_only: bool,
        stays_paused: bool,
    ) -> Result<Plan> {
        let mut disks = Vec::new();
        for disk in self.records.disks(&sandbox.id).await? {
            let layer = self.base_layer(&disk.layer).await?;
            self.check_depth(attempt, &sandbox, &layer).await?;
            let overlay = layers::new_overlay(&id::long()?, &layer, layer.virtual_bytes);
            disks.push((disk.disk, layer, overlay));
        }
        Ok(Plan {
            machine: self.machine_of(&sandbox)?,
            ram: if disk_only { None } else { Some(id::long()?) },
            sandbox,
            launch,
            name: None,
            ram_in_place: false,
            workload: Workload::StandsStill,
            stays_paused,
            disks,
            bitmaps: Vec::new(),
        })
    }

    /// Refuses what would put more layers on each other than can be opened.
    async fn check_depth(&self, attempt: &str, sandbox: &Sandbox, top: &LayerRow) -> Result<()> {
        let depth = self.records.chain(&top.id).await?.len();
        if depth < layers::DEPTH_MAX {
            return Ok(());
        }
        let name = &sandbox.name;
        Err(wrong_state(
            attempt,
            sandbox,
            &format!("its disk lies in {depth} layers, the most that can be"),
        )
        .next(format!(
            "remove checkpoints that are not needed and run `stead compact {name}`; `stead restore {name} CHECKPOINT` with its newest checkpoint puts the disk into one layer"
        )))
    }

    /// Refuses before anything is written when the capture cannot fit, here or where it goes (`target`).
    pub(crate) fn check_room(&self, plan: &Plan, target: Option<&Path>) -> Result<()> {
        let ram = match (&plan.ram, plan.sandbox.ram_sharing) {
            (None, _) => 0,
            (Some(_), Some(RamSharing::Shared)) => {
                let live = self.live_ram(&plan.launch);
                space::allocated_bytes(&live).at("measure", &live)?
            }
            (Some(_), _) => plan.machine.qemu.memory_bytes,
        };
        let mut disks = 0;
        for (_, layer, _) in &plan.disks {
            let path = layers::path_of(&self.dir, &layer.id, &layer.format);
            disks += space::allocated_bytes(&path).at("measure", &path)?;
        }
        let attempt = format!("capture sandbox {}", plan.sandbox.name);
        let copied = if plan.ram_in_place { 0 } else { ram };
        let mut needs = vec![(self.dir.root().to_owned(), copied + SPARE_BYTES)];
        if copied > 0 && !self.reflinks()? {
            needs.push((PathBuf::from(paths::MEMORY), copied + SPARE_BYTES));
        }
        if let Some(target) = target {
            needs.push((target.to_owned(), ram + disks + SPARE_BYTES));
        }
        for (path, bytes) in add_up_by_file_system(needs)? {
            let available = space::available_bytes(&path).at("ask for room on", &path)?;
            if available < bytes {
                return Err(EngineError::no_space(attempt, &path, bytes, available));
            }
        }
        Ok(())
    }

    pub(crate) async fn begin_capture(&self, plan: &Plan, kind: &'static str) -> Result<Job> {
        Job::begin(
            &self.records,
            &self.watch,
            kind,
            Some(&plan.sandbox.id),
            Undo {
                layers: plan
                    .disks
                    .iter()
                    .map(|(_, _, new)| new.id.clone())
                    .collect(),
                ram: plan.ram.clone().into_iter().collect(),
                capture: Some(CaptureUndo {
                    sandbox: plan.sandbox.id.clone(),
                    disks: plan
                        .disks
                        .iter()
                        .map(|(disk, old, new)| (disk.clone(), old.id.clone(), new.id.clone()))
                        .collect(),
                }),
                // A save image does not go to the store.
                lease: kind != "save",
                ..Undo::default()
            },
        )
        .await
    }

    /// Everything up to the point where the guest runs on (or, for a hibernation, where its state is taken).
    pub(crate) async fn take_instant(&self, job: &mut Job, plan: &Plan) -> Result<Instant> {
        job.step("overlays").await?;
        let mut tx = self.records.begin().await?;
        for (_, _, overlay) in &plan.disks {
            Records::insert_layer(&mut tx, overlay).await?;
        }
        tx.commit().await?;
        let mut overlays = Vec::new();
        for (index, (disk, old, new)) in plan.disks.iter().enumerate() {
            let owner = launch::owner(plan.sandbox.vm_user);
            let path = layers::create_overlay_file(&self.dir, new, Some(old), owner)?;
            if let Some(bitmap) = plan.bitmaps.get(index).and_then(Option::as_deref) {
                backup::begin_bitmap(&path, bitmap)?;
            }
            overlays.push(NewOverlay {
                disk: disk.clone(),
                path,
            });
        }
        job.step("capture").await?;
        let vm = self.connect_vm(&plan.sandbox).await?;
        let instant = match &plan.ram {
            Some(ram) => self.take_all(plan, vm, overlays, ram).await?,
            None => self.take_disks(plan, vm, overlays).await?,
        };
        crate::job::crash_point("checkpoint", "captured");
        self.record_switch(plan).await?;
        job.step("read-back").await?;
        self.read_back(plan).await?;
        Ok(instant)
    }

    async fn take_all(
        &self,
        plan: &Plan,
        mut vm: Vm,
        overlays: Vec<NewOverlay>,
        ram: &str,
    ) -> Result<Instant> {
        let ram = if plan.ram_in_place {
            let live = self.live_ram(&plan.launch);
            CapturedRam::InPlace(File::open(&live).at("open", &live)?)
        } else {
            let staged = self.ram_staging(plan, ram)?;
            let partial = Partial::create(&staged, 0o600).at("create", &staged)?;
            CapturedRam::Staged(partial, staged)
        };
        let stays_paused = plan.stays_paused;
        let sandbox = plan.sandbox.clone();
        let standstill = match plan.workload {
            Workload::StandsStill => self.prepare_standstill(&plan.sandbox).await?,
            Workload::RunsOn => Standstill::of_nobody(),
        };
        let crash_consistent = plan.workload == Workload::RunsOn;
        let (captured, ram, standstill) = blocking(move || {
            let request = CaptureRequest {
                overlays: &overlays,
                ram: match &ram {
                    CapturedRam::Staged(partial, _) => Some(partial.file()),
                    CapturedRam::InPlace(_) => None,
                },
                state_bytes_max: stead_vmm::STATE_BYTES_MAX,
                at: &|moment| standstill.at(moment),
            };
            let taken = if stays_paused {
                vm.capture_paused(&request)
            } else {
                vm.capture(&request)
            };
            match taken {
                Ok(captured) => Ok((captured, ram, standstill)),
                Err(source) => {
                    Err(standstill.explain(&sandbox, vm_error("capture", &sandbox, source)))
                }
            }
        })
        .await?;
        self.end_standstill(&plan.sandbox, standstill).await;
        crate::job::crash_point("checkpoint", "staged");
        let Captured {
            device_state,
            state_format,
            times,
            ..
        } = captured;
        Ok(Instant {
            ram: Some(ram),
            device_state: Some(device_state),
            state_format: Some(state_format),
            pause: times.into(),
            crash_consistent,
        })
    }

    /// Where the RAM is copied to while the guest stands still: where that is fastest.
    fn ram_staging(&self, plan: &Plan, ram: &str) -> Result<PathBuf> {
        if self.reflinks()? {
            return Ok(self.ram_image(ram));
        }
        let folder = paths::memory_folder(&plan.launch);
        if !folder.is_dir() {
            durable::create_dir(&folder, 0o700).at("create folder", &folder)?;
            let mark = folder.join(crate::undo::MEMORY_OWNER);
            std::os::unix::fs::symlink(self.dir.root(), &mark).at("mark", &mark)?;
        }
        Ok(folder.join(format!("{ram}.ram")))
    }

    /// Makes the RAM image durable in its place.
    async fn keep_ram(&self, captured: CapturedRam, ram: &str) -> Result<()> {
        let image = self.ram_image(ram);
        blocking(move || {
            match captured {
                CapturedRam::Staged(partial, staged) if staged == image => {
                    partial.publish(Existing::Keep).at("publish", &image)?;
                }
                elsewhere @ (CapturedRam::Staged(..) | CapturedRam::InPlace(_)) => {
                    let kept = Partial::create(&image, 0o600).at("create", &image)?;
                    copy::sparse(elsewhere.file(), kept.file()).at("copy RAM to", &image)?;
                    kept.publish(Existing::Keep).at("publish", &image)?;
                }
            }
            launch::seal_image(&image)
        })
        .await
    }

    async fn take_disks(
        &self,
        plan: &Plan,
        mut vm: Vm,
        overlays: Vec<NewOverlay>,
    ) -> Result<Instant> {
        let frozen = match plan.workload {
            Workload::StandsStill => self.freeze_guest(plan).await.map(Some),
            Workload::RunsOn => Ok(None),
        };
        crate::job::crash_point("checkpoint", "frozen");
        let sandbox = plan.sandbox.clone();
        let switched = blocking(move || {
            vm.capture_disks(&overlays)
                .map_err(|source| vm_error("capture the disks of", &sandbox, source))
        })
        .await;
        let crash_consistent = match frozen {
            Ok(None) => true,
            Ok(Some(link)) => {
                let thawed = self.thaw_guest(plan, link).await;
                let switched = switched.as_ref().map_err(ToString::to_string);
                if let (Err(error), Ok(_)) = (thawed, switched) {
                    return Err(error);
                }
                false
            }
            Err(error) => {
                self.watch.notice(format!(
                    "the guest's file systems could not be frozen ({error}); the {} is crash-consistent",
                    if plan.bitmaps.is_empty() { "checkpoint" } else { "backup" }
                ));
                true
            }
        };
        let switched = switched?;
        Ok(Instant {
            ram: None,
            device_state: None,
            state_format: None,
            pause: PauseReport {
                paused_us: micros(switched.switched_in),
                snapshot_us: micros(switched.switched_in),
                ..PauseReport::default()
            },
            crash_consistent,
        })
    }

    async fn freeze_guest(&self, plan: &Plan) -> Result<crate::exec::Session> {
        let mut session = self.attach_locked(&plan.sandbox, FREEZE_TIMEOUT).await?;
        session
            .link()
            .freeze(FREEZE_TIMEOUT)
            .await
            .map_err(|source| {
                crate::exec::agent_error("freeze the file systems of", &plan.sandbox, source)
            })?;
        Ok(session)
    }

    async fn thaw_guest(&self, plan: &Plan, mut session: crate::exec::Session) -> Result<()> {
        session.link().thaw().await.map_err(|source| {
            crate::exec::agent_error("thaw the file systems of", &plan.sandbox, source)
        })
    }

    /// From here on the records say that the overlays are written to.
    async fn record_switch(&self, plan: &Plan) -> Result<()> {
        let disks: Vec<SandboxDisk> = plan
            .disks
            .iter()
            .map(|(disk, _, new)| SandboxDisk {
                disk: disk.clone(),
                layer: new.id.clone(),
            })
            .collect();
        let mut tx = self.records.begin().await?;
        for (_, old, _) in &plan.disks {
            Records::freeze_layer(&mut tx, &old.id).await?;
        }
        Records::set_disks(&mut tx, &plan.sandbox.id, &disks).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Checks each frozen layer: closed for writing, and a whole image in which nothing is referred to
    /// more often than is counted. From here on a change of its file is noticed.
    async fn read_back(&self, plan: &Plan) -> Result<()> {
        for (disk, old, _) in &plan.disks {
            if old.format == layers::RAW {
                continue;
            }
            let path = layers::path_of(&self.dir, &old.id, &old.format);
            let attempt = format!("check the frozen layer of {disk}, {}", path.display());
            let checked = path.clone();
            let failed = attempt.clone();
            let report = blocking(move || {
                stead_qcow2::Layer::open(&checked)
                    .and_then(|layer| stead_qcow2::check(&layer))
                    .map_err(|source| EngineError::new(Kind::Damaged, failed, "").because(source))
            })
            .await?;
            // A leak costs room and nothing else: a guest whose QEMU was killed once has some.
            if !report.is_safe() || report.marked_dirty {
                let found: Vec<String> = report
                    .findings
                    .iter()
                    .take(FINDINGS_SHOWN)
                    .map(ToString::to_string)
                    .collect();
                return Err(EngineError::new(
                    Kind::Damaged,
                    attempt,
                    format!("{} errors: {}", report.corruptions, found.join("; ")),
                )
                .left("the sandbox runs on")
                .next("copy what the guest still reads out of it; an earlier checkpoint is not touched by this"));
            }
            layers::seal(&path)?;
            let mut tx = self.records.begin().await?;
            Records::set_layer_stamp(&mut tx, &old.id, &layers::stamp(&path)?).await?;
            tx.commit().await?;
        }
        Ok(())
    }

    async fn publish_instant(
        &self,
        job: &mut Job,
        plan: &Plan,
        mut instant: Instant,
    ) -> Result<CaptureReport> {
        let begun = std::time::Instant::now();
        if let (Some(staged), Some(ram)) = (instant.ram.take(), &plan.ram) {
            self.keep_ram(staged, ram).await?;
        }
        job.step("publish").await?;
        let (publish, manifest, trees) = self
            .publish_parts(plan, &instant)
            .await
            .map_err(|error| error.left("no checkpoint was made, and the sandbox runs on"))?;
        job.step("commit").await?;
        let (id, report) = publish.commit(&manifest).await.map_err(|source| {
            store_error("write the manifest", source).left("the sandbox runs on")
        })?;
        crate::job::crash_point("checkpoint", "committed");
        self.record_checkpoint(job, plan, &id, &trees)
            .await
            .map_err(|error| {
                error.left(format!(
                    "checkpoint {id} is whole in the store all the same"
                ))
            })?;
        let info = crate::store::info_of(id.to_string(), &manifest, true);
        Ok(CaptureReport {
            checkpoint: info,
            pause: instant.pause,
            stored_bytes: report.stored_bytes,
            new_bytes: report.new_raw_bytes,
            read_bytes: report.read_bytes,
            publish_us: micros(begun.elapsed()),
        })
    }

    /// Everything but the manifest itself.
    async fn publish_parts(
        &self,
        plan: &Plan,
        instant: &Instant,
    ) -> Result<(Publish, Manifest, Vec<TreeRef>)> {
        let store = self.store().await?;
        let mut publish = store
            .begin_publish(self.lease_owner()?)
            .await
            .map_err(|source| store_error("begin to publish", source))?;
        let trees = self.publish_disks(store, &mut publish, plan).await?;
        let manifest = self
            .manifest_of(&mut publish, plan, instant, &trees)
            .await?;
        Ok((publish, manifest, trees))
    }

    async fn publish_disks(
        &self,
        store: &Store,
        publish: &mut Publish,
        plan: &Plan,
    ) -> Result<Vec<TreeRef>> {
        let mut trees = Vec::new();
        for (disk, frozen, _) in &plan.disks {
            let chain = self.records.chain(&frozen.id).await?;
            let source = Arc::new(ChainSource::open_rows(&self.dir, &chain)?);
            let base = self.known_base(store, &chain, &source).await?;
            let tree = publish
                .add_tree(
                    source,
                    ChunkSize::DISK,
                    base,
                    &self.progress_of("publish disk"),
                )
                .await
                .map_err(|source| store_error(format!("publish disk {disk}"), source))?;
            trees.push(tree);
        }
        Ok(trees)
    }

    /// The highest layer of `chain` below its top of which the store knows what it holds, and what differs from that:
    /// what is known need not be read again.
    pub(crate) async fn known_base(
        &self,
        store: &Store,
        chain: &[LayerRow],
        source: &ChainSource,
    ) -> Result<Option<Base>> {
        for (depth, layer) in chain.iter().enumerate().skip(1) {
            let Some(tree) = content_of(layer)? else {
                continue;
            };
            // Its nodes may be gone: another store, or the template was removed.
            if store.local_index(&tree).await.is_ok() {
                self.prove_if_touched(&chain[depth..], &tree).await?;
                let changed = source.changed(depth)?;
                return Ok(Some(Base { tree, changed }));
            }
        }
        Ok(None)
    }

    async fn manifest_of(
        &self,
        publish: &mut Publish,
        plan: &Plan,
        instant: &Instant,
        trees: &[TreeRef],
    ) -> Result<Manifest> {
        let failed =
            |what: &'static str| move |source| store_error(format!("publish {what}"), source);
        let ram = match &plan.ram {
            Some(name) => {
                let path = self.ram_image(name);
                let file = File::open(&path).at("open", &path)?;
                let source: Arc<dyn Source> = Arc::new(FileSource::new(file).at("open", &path)?);
                let progress = self.progress_of("publish RAM");
                Some(
                    publish
                        .add_tree(source, ChunkSize::RAM, None, &progress)
                        .await
                        .map_err(failed("RAM"))?,
                )
            }
            None => None,
        };
        let device_state = match &instant.device_state {
            Some(bytes) => Some(
                publish
                    .add_blob(bytes)
                    .await
                    .map_err(failed("device state"))?,
            ),
            None => None,
        };
        let kernel = self.blob_bytes(&plan.machine.kernel)?;
        let initrd = self.blob_bytes(&plan.machine.initrd)?;
        let qemu = &plan.machine.qemu;
        Ok(Manifest {
            role: Role::Checkpoint,
            name: plan.name.clone(),
            created: jiff::Timestamp::now(),
            kind: if plan.ram.is_some() {
                stead_store::Kind::Full
            } else {
                stead_store::Kind::DiskOnly
            },
            crash_consistent: instant.crash_consistent,
            lineage: Lineage {
                parent: parse_id(plan.sandbox.checkpoint.as_deref()),
                sandbox: Some(SandboxName {
                    id: plan.sandbox.id.clone(),
                    name: Some(plan.sandbox.name.clone()),
                }),
                template: parse_id(Some(&plan.sandbox.template)),
            },
            producer: producer_of(
                qemu,
                &self.qemu().await?.version().to_string(),
                &plan.machine.cmdline,
            ),
            disks: plan
                .disks
                .iter()
                .zip(trees)
                .map(|((disk, _, _), tree)| stead_store::Disk {
                    id: disk.clone(),
                    tree: *tree,
                    virtual_size_bytes: tree.length_bytes,
                })
                .collect(),
            ram,
            device_state,
            kernel: Some(
                publish
                    .add_blob(&kernel)
                    .await
                    .map_err(failed("the kernel"))?,
            ),
            initrd: Some(
                publish
                    .add_blob(&initrd)
                    .await
                    .map_err(failed("the initramfs"))?,
            ),
            machine: self.body_json(plan, instant).await?,
        })
    }

    async fn body_json(&self, plan: &Plan, instant: &Instant) -> Result<serde_json::Value> {
        let mut machine = plan.machine.clone();
        // Device state is in the form of the QEMU that wrote it, which may be newer than the machine.
        machine.qemu.qemu_version = self.qemu().await?.version();
        serde_json::to_value(CheckpointBody {
            machine,
            state_format: instant.state_format,
            hibernation: plan.stays_paused,
        })
        .map_err(|source| EngineError::internal("write a manifest", "").because(source))
    }

    pub(crate) fn blob_bytes(&self, name: &str) -> Result<Vec<u8>> {
        blobs::verify(&self.dir, name)?;
        let path = blobs::path_of(&self.dir, name);
        Ok(blobs::read_file(&path)?.1)
    }

    /// The transaction that ends the job: the checkpoint's parts lie here and its content is known.
    async fn record_checkpoint(
        &self,
        job: &mut Job,
        plan: &Plan,
        id: &ManifestId,
        trees: &[TreeRef],
    ) -> Result<()> {
        let text = id.to_string();
        let frozen: Vec<String> = plan
            .disks
            .iter()
            .map(|(_, old, _)| old.id.clone())
            .collect();
        let mut tx = self.records.begin().await?;
        for (layer, tree) in frozen.iter().zip(trees) {
            Records::set_layer_content(&mut tx, layer, tree).await?;
        }
        Records::insert_local_checkpoint(&mut tx, &text, plan.ram.as_deref(), &frozen).await?;
        Records::set_checkpoint(&mut tx, &plan.sandbox.id, &text).await?;
        if plan.stays_paused {
            // From here on, undoing the job means ending the VM: its state is safe.
            Records::set_hibernated(&mut tx, &plan.sandbox.id, &text).await?;
            let ended = Undo {
                launches: vec![plan.launch.clone()],
                hibernations: Some(Hibernations {
                    sandbox: plan.sandbox.id.clone(),
                    except: Some(text),
                }),
                ..Undo::default()
            };
            job.turn(&mut tx, &ended).await?;
            tx.commit().await?;
            crate::job::crash_point("hibernate", "recorded");
            return self.complete(job).await;
        }
        job.finish(&mut tx).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Removes what a sandbox hibernated into earlier, except `now`: nothing will wake from it any more.
    pub(crate) async fn forget_hibernations(&self, sandbox: &str, now: Option<&str>) -> Result<()> {
        let earlier: Vec<CheckpointInfo> = self
            .checkpoints()
            .await?
            .into_iter()
            .filter(|info| {
                info.kind.starts_with("hibernation")
                    && info.sandbox_id == sandbox
                    && Some(info.id.as_str()) != now
            })
            .collect();
        for info in earlier {
            self.remove_from_store(&info.id, &info.id).await?;
        }
        Ok(())
    }

    /// Lets the VM of an interrupted capture run on and says which files its disks write to.
    pub(crate) async fn resume_interrupted(&self, sandbox: &Sandbox) -> Result<Vec<PathBuf>> {
        let mut vm = self.connect_vm(sandbox).await?;
        let resumed = sandbox.clone();
        let in_use = blocking(move || {
            let failed = |source| vm_error("resume", &resumed, source);
            let recovered = vm.recover_running().map_err(failed)?;
            Ok(recovered
                .chains
                .iter()
                .map(|chain| chain.top().path.clone())
                .collect())
        })
        .await?;
        self.let_go_on(sandbox).await;
        Ok(in_use)
    }

    /// The store's folder, if it is one.
    fn local_store(&self) -> Option<PathBuf> {
        let url = self.store_url();
        let path = url.strip_prefix("file://").unwrap_or(&url).to_owned();
        (!path.contains("://"))
            .then(|| PathBuf::from(path))
            .filter(|path| path.is_dir())
    }
}

fn parse_id(text: Option<&str>) -> Option<ManifestId> {
    text.and_then(|text| text.parse().ok())
}

/// Who made the state, as a manifest says it.
pub(crate) fn producer_of(
    machine: &stead_vmm::Machine,
    qemu_version: &str,
    cmdline: &str,
) -> Producer {
    Producer {
        qemu_version: Some(qemu_version.to_owned()),
        machine_type: machine.machine_type.clone(),
        cpu_model: machine.cpu_model.clone(),
        accelerator: machine.accelerator.to_string(),
        cpus: u32::from(machine.cpus),
        memory_bytes: machine.memory_bytes,
        kernel_command_line: Some(cmdline.to_owned()),
    }
}

/// Needs on one file system are one need.
fn add_up_by_file_system(needs: Vec<(PathBuf, u64)>) -> Result<Vec<(PathBuf, u64)>> {
    use std::os::unix::fs::MetadataExt;
    let mut sums: Vec<(u64, PathBuf, u64)> = Vec::new();
    for (path, bytes) in needs {
        let device = std::fs::metadata(&path).at("look at", &path)?.dev();
        match sums.iter_mut().find(|(known, _, _)| *known == device) {
            Some((_, _, sum)) => *sum = sum.saturating_add(bytes),
            None => sums.push((device, path, bytes)),
        }
    }
    Ok(sums
        .into_iter()
        .map(|(_, path, bytes)| (path, bytes))
        .collect())
}
