//! Sandboxes: create, start, stop, remove, list.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::host::AcceleratorChoice;
use crate::job::{Hibernations, Job, Undo};
use crate::launch::{Identity, LaunchPlan, RamPlan, Reason};
use crate::layers;
use crate::machine::{MachineRecord, disk_names};
use crate::records::{
    Incarnation, LayerRow, RamSharing, Records, Sandbox, SandboxDisk, SandboxState,
};
use crate::{Engine, blocking, id, now, paths};

/// The most disks a sandbox may have.
pub const DISKS_MAX: usize = 16;
/// The least memory a sandbox may have, in bytes.
pub const MEMORY_BYTES_MIN: u64 = 64 << 20;
/// Memory comes in steps of this, in bytes.
const MEMORY_STEP_BYTES: u64 = 2 << 20;
/// How long a guest may take from power-on until its agent answers.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);

/// How often a wait for a guest's end looks whether it is still wanted.
const EXIT_POLL: Duration = Duration::from_millis(50);
/// How long QEMU may take to end when it is told to.
const QUIT_TIMEOUT: Duration = Duration::from_secs(30);

/// What a new sandbox shall be.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// Name or id of the template.
    pub template: String,
    /// The sandbox's name; `None` for its id.
    pub name: Option<String>,
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub cpus: u16,
    /// Size of the first disk in bytes; `None` for the template's.
    pub disk_bytes: Option<u64>,
    /// Sizes of further, empty disks in bytes.
    pub extra_disks: Vec<u64>,
    /// The accelerator.
    pub accelerator: AcceleratorChoice,
    /// Whether to wait for the guest's agent.
    pub agent: bool,
}

/// A sandbox as it is shown.
#[derive(Debug, Clone, Serialize)]
pub struct SandboxInfo {
    /// 12 hex digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: SandboxState,
    /// Id of the template it was made from.
    pub template: String,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub cpus: u16,
    /// The versioned machine type.
    pub machine_type: String,
    /// The CPU model.
    pub cpu_model: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Its disks.
    pub disks: Vec<SandboxDiskInfo>,
    /// Process id of its QEMU while it runs.
    pub pid: Option<i32>,
    /// How its RAM is mapped while it runs.
    pub ram: Option<RamSharing>,
    /// The epoch its agent acknowledged, 32 hex digits; absent when no agent answered.
    pub epoch: Option<String>,
    /// The checkpoint it last made or came from.
    pub checkpoint: Option<String>,
    /// The checkpoint it will wake from.
    pub hibernated_as: Option<String>,
    /// RFC 3339.
    pub created: String,
}

/// A disk of a sandbox.
#[derive(Debug, Clone, Serialize)]
pub struct SandboxDiskInfo {
    /// vda, vdb, …
    pub name: String,
    /// What the guest sees, in bytes.
    pub size_bytes: u64,
    /// Layers from the one written to down to the base.
    pub layers: usize,
    /// The file the guest writes to.
    pub file: PathBuf,
}

impl Engine {
    /// Creates a sandbox from a template, boots it and waits until its agent is ready.
    ///
    /// # Errors
    /// Anything that fails is undone: no sandbox, no process, no files.
    pub async fn create(&self, request: &CreateRequest) -> Result<SandboxInfo> {
        check_request(request)?;
        let template = self.template_row(&request.template).await?;
        let sandbox = id::short()?;
        let name = request.name.clone().unwrap_or_else(|| sandbox.clone());
        id::check_name("sandbox", &name)?;
        let base = self.base_layer(&template.layer).await?;
        let overlays = plan_disks(request, &base)?;
        let host = self.host(request.accelerator).await?;
        let machine = MachineRecord {
            qemu: host.machine(
                request.cpus,
                request.memory_bytes,
                disk_names(overlays.len()),
            ),
            kernel: template.kernel.clone(),
            initrd: template.initrd.clone(),
            cmdline: template.cmdline.clone(),
            agent: request.agent,
        };
        let row = Sandbox {
            id: sandbox.clone(),
            name,
            state: SandboxState::Creating,
            template: template.id.clone(),
            machine: crate::records::to_json(&machine)?,
            vm_user: crate::launch::new_vm_user()?,
            epoch: None,
            launch: None,
            process: None,
            ram_sharing: None,
            checkpoint: None,
            hibernated_as: None,
            created: now(),
        };
        let launch = id::long()?;
        let _lock = self.lock_new(&row, "create").await?;
        let job = Job::begin(
            &self.records,
            &self.watch,
            "create",
            Some(&sandbox),
            Undo {
                launches: vec![launch.clone()],
                sandboxes: vec![sandbox.clone()],
                layers: overlays.iter().map(|layer| layer.id.clone()).collect(),
                ..Undo::default()
            },
        )
        .await?;
        let made = self
            .boot_new(&job, &row, &machine, &overlays, Some(&base), &launch)
            .await;
        self.undone_on_error(&job, made).await?;
        self.sandbox(&sandbox).await
    }

    async fn boot_new(
        &self,
        job: &Job,
        row: &Sandbox,
        machine: &MachineRecord,
        overlays: &[LayerRow],
        base: Option<&LayerRow>,
        launch: &str,
    ) -> Result<()> {
        job.step("verify").await?;
        if let Some(base) = base {
            self.prove_under(&base.id).await?;
        }
        job.step("disks").await?;
        let disks = self.insert_with_disks(row, machine, overlays).await?;
        for overlay in overlays {
            let parent = base.filter(|base| overlay.parent.as_deref() == Some(&base.id));
            layers::create_overlay_file(
                &self.dir,
                overlay,
                parent,
                crate::launch::owner(row.vm_user),
            )?;
        }
        self.boot(job, row, machine, &disks, launch).await
    }

    /// Boots from the disks; the end of the job is recorded with the run.
    async fn boot(
        &self,
        job: &Job,
        sandbox: &Sandbox,
        machine: &MachineRecord,
        disks: &[SandboxDisk],
        launch: &str,
    ) -> Result<()> {
        job.step("boot").await?;
        let plan = LaunchPlan {
            launch,
            sandbox,
            machine,
            disks,
            ram: RamPlan::Fresh,
            incoming: None,
            reason: Reason::Boot,
            identity: Identity::Keep,
            timeout: BOOT_TIMEOUT,
        };
        let running = self.launch(&plan).await?;
        let mut tx = self.records.begin().await?;
        Records::set_running(&mut tx, &sandbox.id, &running.incarnation(launch)).await?;
        job.finish(&mut tx).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Records a sandbox that is being made together with its new layers.
    pub(crate) async fn insert_with_disks(
        &self,
        row: &Sandbox,
        machine: &MachineRecord,
        overlays: &[LayerRow],
    ) -> Result<Vec<SandboxDisk>> {
        let disks: Vec<SandboxDisk> = machine
            .qemu
            .disks
            .iter()
            .zip(overlays)
            .map(|(disk, layer)| SandboxDisk {
                disk: disk.clone(),
                layer: layer.id.clone(),
            })
            .collect();
        let mut tx = self.records.begin().await?;
        for overlay in overlays {
            Records::insert_layer(&mut tx, overlay).await?;
        }
        Records::insert_sandbox(&mut tx, row, &disks).await?;
        tx.commit().await?;
        Ok(disks)
    }

    /// Boots a stopped or crashed sandbox from its disks.
    ///
    /// # Errors
    /// When it runs or is hibernated, or the guest's agent does not answer.
    pub async fn start(&self, name: &str) -> Result<SandboxInfo> {
        let (_lock, sandbox) = self.lock_sandbox(name, "start").await?;
        match sandbox.state {
            SandboxState::Stopped | SandboxState::Crashed => {}
            SandboxState::Running => {
                return Err(wrong_state("start", &sandbox, "it runs already"));
            }
            SandboxState::Hibernated => {
                return Err(wrong_state("start", &sandbox, "its memory is in the store"));
            }
            SandboxState::Creating => {
                return Err(wrong_state("start", &sandbox, "it is being created"));
            }
        }
        let machine = self.machine_of(&sandbox)?;
        let disks = self.records.disks(&sandbox.id).await?;
        let launch = id::long()?;
        let job = Job::begin(
            &self.records,
            &self.watch,
            "start",
            Some(&sandbox.id),
            Undo {
                launches: vec![launch.clone()],
                ..Undo::default()
            },
        )
        .await?;
        let started = async {
            job.step("verify").await?;
            for disk in &disks {
                self.prove_under(&disk.layer).await?;
            }
            self.boot(&job, &sandbox, &machine, &disks, &launch).await
        }
        .await;
        self.undone_on_error(&job, started).await?;
        if let Some(earlier) = &sandbox.launch {
            let removed = self.remove_launch(earlier).await;
            self.only_notice("the folder of its earlier run stays", removed);
        }
        self.sandbox(&sandbox.id).await
    }

    /// Shuts a running sandbox down: through its agent, else by the power button; by force after `timeout`.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn stop(&self, name: &str, timeout: Duration, force: bool) -> Result<SandboxInfo> {
        let (_lock, sandbox) = self.lock_sandbox(name, "stop").await?;
        if sandbox.state != SandboxState::Running {
            return Err(wrong_state("stop", &sandbox, "it does not run"));
        }
        if force {
            self.watch.step("stop", "cut the power");
        } else if !self.shut_down(&sandbox, timeout).await? {
            self.watch.notice(format!(
                "{} did not shut down within {} s; cutting its power",
                sandbox.name,
                timeout.as_secs()
            ));
        }
        self.cut_power(&sandbox).await?;
        self.records
            .set_not_running(&sandbox.id, SandboxState::Stopped, None)
            .await?;
        if let Some(launch) = &sandbox.launch {
            self.free_memory(launch)?;
        }
        self.sandbox(&sandbox.id).await
    }

    /// Asks the guest to power itself off and waits for it; whether it did.
    async fn shut_down(&self, sandbox: &Sandbox, timeout: Duration) -> Result<bool> {
        self.watch.step("stop", "ask the guest to shut down");
        let vm = self.connect_vm(sandbox).await?;
        let asked = tokio::select! {
            asked = self.ask_to_power_off(sandbox) => asked,
            () = self.watch.cancelled() => return Err(stop_interrupted(sandbox, "it runs on")),
        };
        self.watch.step("stop", "wait for the guest");
        let (watch, sandbox) = (self.watch.clone(), sandbox.clone());
        blocking(move || {
            let failed = |source| vm_error("stop", &sandbox, source);
            let mut vm = vm;
            if !asked {
                vm.powerdown().map_err(failed)?;
            }
            let begun = Instant::now();
            loop {
                if watch.is_cancelled() {
                    let left = "the guest was asked to shut down, and runs on until it does";
                    return Err(stop_interrupted(&sandbox, left));
                }
                let left = timeout.saturating_sub(begun.elapsed());
                if vm.wait_exit(left.min(EXIT_POLL)).map_err(failed)?.is_some() {
                    return Ok(true);
                }
                if left.is_zero() {
                    return Ok(false);
                }
            }
        })
        .await
    }

    /// Ends the VM without asking the guest: in order, with its disks flushed and closed; a QEMU that does
    /// not answer is killed. One that has ended is no error.
    pub(crate) async fn cut_power(&self, sandbox: &Sandbox) -> Result<()> {
        let Some(launch) = &sandbox.launch else {
            return Ok(());
        };
        if let Err(error) = self.quit_in_order(sandbox).await {
            self.watch.notice(format!(
                "the QEMU of {} does not end in order ({}); killing it",
                sandbox.name,
                error.found()
            ));
        }
        self.end_processes(launch).await
    }

    async fn quit_in_order(&self, sandbox: &Sandbox) -> Result<()> {
        let running = match sandbox.process {
            Some(process) => process.is_alive().at("look for processes in", "/proc")?,
            None => false,
        };
        if !running {
            return Ok(());
        }
        let mut vm = self.connect_vm(sandbox).await?;
        let sandbox = sandbox.clone();
        blocking(move || {
            vm.quit(QUIT_TIMEOUT)
                .map(drop)
                .map_err(|source| vm_error("stop", &sandbox, source))
        })
        .await
    }

    /// Removes a sandbox with its disks. Checkpoints made of it stay.
    ///
    /// # Errors
    /// When it runs and `force` is not set.
    pub async fn remove(&self, name: &str, force: bool) -> Result<()> {
        let (_lock, sandbox) = self.lock_sandbox(name, "rm").await?;
        if sandbox.state == SandboxState::Running && !force {
            return Err(wrong_state("rm", &sandbox, "it runs").next(format!(
                "`stead stop {0}` first, or `stead rm --force {0}`",
                sandbox.name
            )));
        }
        self.watch.step("rm", format!("remove {}", sandbox.name));
        // Undoing this job is removing the sandbox: a crash on the way does not bring half of it back.
        let undo = Undo {
            launches: sandbox.launch.clone().into_iter().collect(),
            sandboxes: vec![sandbox.id.clone()],
            hibernations: Some(Hibernations {
                sandbox: sandbox.id.clone(),
                except: None,
            }),
            ..Undo::default()
        };
        let job = Job::begin(&self.records, &self.watch, "rm", Some(&sandbox.id), undo).await?;
        self.complete(&job).await?;
        // Whoever waits for this lock will find no sandbox; ids are not used twice.
        let lock = self.lock_path(&sandbox.id);
        stead_sys::durable::remove_file(&lock).at("remove", &lock)
    }

    /// Every sandbox of this worker.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub async fn sandboxes(&self) -> Result<Vec<SandboxInfo>> {
        let mut all = Vec::new();
        for sandbox in self.records.sandboxes().await? {
            let now = self.notice_crash(sandbox).await?;
            all.push(self.info(now).await?);
        }
        Ok(all)
    }

    /// One sandbox, by name, id, or the beginning of an id.
    ///
    /// # Errors
    /// When there is none or more than one.
    pub async fn sandbox(&self, name: &str) -> Result<SandboxInfo> {
        let sandbox = self.records.sandbox(name).await?;
        let now = self.notice_crash(sandbox).await?;
        self.info(now).await
    }

    async fn info(&self, sandbox: Sandbox) -> Result<SandboxInfo> {
        let machine = self.machine_of(&sandbox)?;
        let mut disks = Vec::new();
        for disk in self.records.disks(&sandbox.id).await? {
            let chain = self.records.chain(&disk.layer).await?;
            let top = &chain[0];
            disks.push(SandboxDiskInfo {
                name: disk.disk,
                size_bytes: layers::bytes(top)?,
                layers: chain.len(),
                file: layers::path_of(&self.dir, &top.id, &top.format),
            });
        }
        Ok(SandboxInfo {
            id: sandbox.id,
            name: sandbox.name,
            state: sandbox.state,
            template: sandbox.template,
            memory_bytes: machine.qemu.memory_bytes,
            cpus: machine.qemu.cpus,
            machine_type: machine.qemu.machine_type,
            cpu_model: machine.qemu.cpu_model,
            accelerator: machine.qemu.accelerator.to_string(),
            disks,
            pid: sandbox.process.map(|process| process.pid),
            ram: sandbox.ram_sharing,
            epoch: sandbox.epoch,
            checkpoint: sandbox.checkpoint,
            hibernated_as: sandbox.hibernated_as,
            created: sandbox.created,
        })
    }

    pub(crate) async fn base_layer(&self, layer: &str) -> Result<LayerRow> {
        let mut chain = self.records.chain(layer).await?;
        Ok(chain.swap_remove(0))
    }

    /// Gives back the memory of a VM that has ended; its logs stay.
    pub(crate) fn free_memory(&self, launch: &str) -> Result<()> {
        let memory = paths::memory_folder(launch);
        stead_sys::durable::remove_tree(&memory).at("remove", &memory)?;
        let ram = self.dir.run(launch).join(crate::launch::RAM_FILE);
        stead_sys::durable::remove_file(&ram).at("remove", &ram)
    }
}

pub(crate) fn wrong_state(attempt: &str, sandbox: &Sandbox, found: &str) -> EngineError {
    let name = &sandbox.name;
    let next = match sandbox.state {
        SandboxState::Creating => format!("wait for the command that creates {name}"),
        SandboxState::Running => {
            format!("`stead show {name}` says how it is, `stead stop {name}` stops it")
        }
        SandboxState::Stopped => format!("`stead start {name}` boots it from its disks"),
        SandboxState::Hibernated => format!("`stead wake {name}` starts it where it was"),
        SandboxState::Crashed => format!(
            "`stead logs {name}` shows its last words, `stead start {name}` boots it from its disks"
        ),
    };
    EngineError::new(
        Kind::Conflict,
        format!("{attempt} sandbox {name}"),
        format!("{found} (state {})", sandbox.state.word()),
    )
    .left("nothing was changed")
    .next(next)
}

fn stop_interrupted(sandbox: &Sandbox, left: &str) -> EngineError {
    EngineError::new(
        Kind::Cancelled,
        format!("stop sandbox {}", sandbox.name),
        "interrupted",
    )
    .left(left)
    .next(format!(
        "`stead stop --force {}` cuts its power",
        sandbox.name
    ))
}

pub(crate) fn vm_error(attempt: &str, sandbox: &Sandbox, source: stead_vmm::Error) -> EngineError {
    use stead_vmm::Error;
    let name = &sandbox.name;
    let gone = matches!(source, Error::Died { .. } | Error::NotRunning { .. });
    let next = if gone {
        format!(
            "`stead logs {name}` shows its last words, `stead start {name}` boots it from its disks"
        )
    } else if matches!(source, Error::Unanswered { .. }) {
        format!("try again; `stead stop --force {name}` ends a QEMU that hangs")
    } else {
        format!("`stead show {name}` says how it is; try again")
    };
    EngineError::new(Kind::Vm, format!("{attempt} sandbox {name}"), "")
        .because(source)
        .next(next)
}

fn check_request(request: &CreateRequest) -> Result<()> {
    let wrong = |found: String| Err(EngineError::usage("create a sandbox", found));
    if request.memory_bytes < MEMORY_BYTES_MIN
        || !request.memory_bytes.is_multiple_of(MEMORY_STEP_BYTES)
    {
        return wrong(format!(
            "memory of {} bytes is not a multiple of {MEMORY_STEP_BYTES} from {MEMORY_BYTES_MIN} on",
            request.memory_bytes
        ));
    }
    if request.extra_disks.len() >= DISKS_MAX {
        return wrong(format!("more than {DISKS_MAX} disks"));
    }
    if let Some(odd) = request
        .extra_disks
        .iter()
        .chain(&request.disk_bytes)
        .find(|size| **size == 0 || *size % 512 != 0 || i64::try_from(**size).is_err())
    {
        return wrong(format!(
            "a disk of {odd} bytes is not a positive multiple of 512"
        ));
    }
    Ok(())
}

fn plan_disks(request: &CreateRequest, base: &LayerRow) -> Result<Vec<LayerRow>> {
    let base_bytes = layers::bytes(base)?;
    let first = request.disk_bytes.unwrap_or(base_bytes);
    if first < base_bytes {
        return Err(EngineError::usage(
            "create a sandbox",
            format!("a first disk of {first} bytes is smaller than the template's {base_bytes}"),
        ));
    }
    let size = |bytes: u64| {
        i64::try_from(bytes).map_err(|source| {
            EngineError::usage("create a sandbox", format!("a disk of {bytes} bytes"))
                .because(source)
        })
    };
    let mut overlays = vec![layers::new_overlay(&id::long()?, base, size(first)?)];
    for extra in &request.extra_disks {
        overlays.push(LayerRow {
            id: id::long()?,
            format: layers::QCOW2.to_owned(),
            parent: None,
            virtual_bytes: size(*extra)?,
            frozen: false,
            content: None,
            stamp: None,
        });
    }
    Ok(overlays)
}

impl crate::launch::Running {
    pub(crate) fn incarnation<'a>(&'a self, launch: &'a str) -> Incarnation<'a> {
        Incarnation {
            launch,
            process: self.process,
            ram_sharing: self.ram_sharing,
            epoch: self.epoch.as_deref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> CreateRequest {
        CreateRequest {
            template: "debian".to_owned(),
            name: None,
            memory_bytes: 512 << 20,
            cpus: 1,
            disk_bytes: None,
            extra_disks: Vec::new(),
            accelerator: AcceleratorChoice::Auto,
            agent: true,
        }
    }

    #[test]
    fn sizes_that_qemu_would_round_are_refused() {
        assert!(check_request(&request()).is_ok());
        for memory_bytes in [0, 1 << 20, (512 << 20) + 1, u64::MAX] {
            assert!(
                check_request(&CreateRequest {
                    memory_bytes,
                    ..request()
                })
                .is_err(),
                "{memory_bytes}"
            );
        }
        for disk in [0, 511, u64::MAX] {
            assert!(
                check_request(&CreateRequest {
                    disk_bytes: Some(disk),
                    ..request()
                })
                .is_err(),
                "{disk}"
            );
        }
    }

    #[test]
    fn a_sandbox_in_the_wrong_state_or_without_its_qemu_says_which_command_helps() {
        let sandbox = |state| Sandbox {
            id: "0123456789ab".to_owned(),
            name: "web".to_owned(),
            state,
            template: String::new(),
            machine: String::new(),
            vm_user: 0,
            epoch: None,
            launch: None,
            process: None,
            ram_sharing: None,
            checkpoint: None,
            hibernated_as: None,
            created: String::new(),
        };
        for (state, command) in [
            (SandboxState::Creating, "wait for"),
            (SandboxState::Running, "stead stop web"),
            (SandboxState::Stopped, "stead start web"),
            (SandboxState::Hibernated, "stead wake web"),
            (SandboxState::Crashed, "stead logs web"),
        ] {
            let error = wrong_state("exec in", &sandbox(state), "it is not so");
            assert!(error.next_step().contains(command), "{error}");
        }
        let running = sandbox(SandboxState::Running);
        let hangs = stead_vmm::Error::Unanswered {
            command: "quit".to_owned(),
            within: Duration::from_secs(1),
        };
        let error = vm_error("stop", &running, hangs);
        assert!(error.next_step().contains("stop --force web"), "{error}");
        let gone = stead_vmm::Error::NotRunning {
            process: "1".to_owned(),
        };
        let error = vm_error("stop", &running, gone);
        assert!(error.next_step().contains("stead start web"), "{error}");
    }
}
