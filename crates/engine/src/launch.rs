//! One QEMU: its files, its process, and the handshake after which its sandbox is ready.
//!
//! ```text
//!   files owned by the VM's user ▶ QEMU, vCPUs stopped ▶ [device state loaded] ▶
//!   port connected ▶ vCPUs run ▶ port connected anew ▶ epoch acknowledged = ready
//! ```
//! The port is connected *before* the vCPUs run, so that a guest that was captured with its end open finds a host at
//! once and nothing that it writes first is held back. That connection is ended and another made when they run
//! ([`AgentLink::handshake`]): QEMU lets go of a port that was full at the capture only when a connection ends in a running
//! machine. The guest may see the host go and come, at any time: docs/agent-protocol.md says why no wake-up is lost by it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stead_agent_link::{AgentLink, Epoch, Greeting};
use stead_sys::process::ProcessId;
use stead_sys::{copy, durable, space};
use stead_vmm::{Boot, Disk, Launch, Layer, LayerFormat, Ram, RunAs, StateFormat, Vm};

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::machine::MachineRecord;
use crate::records::{LayerRow, RamSharing, Sandbox, SandboxDisk};
use crate::{Engine, blobs, blocking, id, layers, paths};

pub(crate) use stead_agent_link::{Identity, Reason};

/// The live RAM in a run folder or memory folder.
pub(crate) const RAM_FILE: &str = "ram";
/// The port of whoever holds the sandbox's lock: handshakes, freezing, power-off. The others are for commands.
pub(crate) const HANDSHAKE_PORT: u8 = 0;

/// Where the RAM comes from.
#[derive(Debug, Clone)]
pub(crate) enum RamPlan {
    /// Empty.
    Fresh,
    /// A frozen image: shared blocks where the file system has them, else mapped privately.
    Image(PathBuf),
}

/// State to load instead of booting.
#[derive(Debug, Clone)]
pub(crate) struct Incoming {
    pub device_state: std::sync::Arc<Vec<u8>>,
    pub format: StateFormat,
}

/// What to start.
pub(crate) struct LaunchPlan<'a> {
    pub launch: &'a str,
    pub sandbox: &'a Sandbox,
    pub machine: &'a MachineRecord,
    pub disks: &'a [SandboxDisk],
    pub ram: RamPlan,
    pub incoming: Option<Incoming>,
    pub reason: Reason,
    /// Who the guest is from then on.
    pub identity: Identity,
    /// How long the agent may take to acknowledge the epoch.
    pub timeout: Duration,
}

/// A started VM whose agent has acknowledged.
#[derive(Debug)]
pub(crate) struct Running {
    pub process: ProcessId,
    pub ram_sharing: RamSharing,
    /// The epoch, unless the guest has no agent.
    pub epoch: Option<String>,
    /// From before the process was started to the acknowledgement.
    pub ready_after: Duration,
}

/// The user that owns a VM's files, when we are root.
pub(crate) fn owner(vm_user: u32) -> Option<u32> {
    rustix::process::geteuid().is_root().then_some(vm_user)
}

/// A user id for a new VM: at random from a range that no distribution gives to people or services.
pub(crate) fn new_vm_user() -> Result<u32> {
    Ok(VM_USERS_FIRST + u32::from_le_bytes(id::random()?) % VM_USERS)
}

const VM_USERS_FIRST: u32 = 0x6000_0000;
const VM_USERS: u32 = 0x1000_0000;

/// The group whose members may map a RAM image: one for each image, so that VMs made of other
/// images cannot touch it. QEMU before 8.2 opens the file for writing even to map it privately.
fn image_group(image: &Path) -> u32 {
    let hash = blake3::hash(image.as_os_str().as_encoded_bytes());
    let mut word = [0; 4];
    word.copy_from_slice(&hash.as_bytes()[..4]);
    VM_USERS_FIRST + VM_USERS + u32::from_le_bytes(word) % VM_USERS
}

/// Makes a RAM image usable for VMs and for nobody else.
pub(crate) fn seal_image(image: &Path) -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, chown};
    let root = rustix::process::geteuid().is_root();
    if root {
        chown(image, Some(0), Some(image_group(image))).at("hand to VMs", image)?;
    }
    let mode = if root { 0o460 } else { 0o600 };
    std::fs::set_permissions(image, std::fs::Permissions::from_mode(mode)).at("seal", image)
}

impl Engine {
    /// Starts a VM and brings it to the point where commands are accepted.
    ///
    /// # Errors
    /// Whatever fails, the caller's job names the launch: undoing it ends the process.
    pub(crate) async fn launch(&self, plan: &LaunchPlan<'_>) -> Result<Running> {
        let (ram, sharing) = self.make_ram(plan)?;
        let launch = self.vmm_launch(plan, ram, sharing).await?;
        let qemu = self.qemu().await?.clone();
        let incoming = plan.incoming.clone();
        let name = plan.sandbox.name.clone();
        let begun = Instant::now();
        let vm = blocking(move || {
            let failed = |source| {
                EngineError::new(Kind::Vm, format!("start the VM of sandbox {name}"), "")
                    .because(source)
            };
            match incoming {
                Some(state) => launch
                    .restore(&qemu, &state.device_state, state.format)
                    .map_err(failed),
                None => launch.boot(&qemu).map_err(failed),
            }
        })
        .await?;
        let process = vm.process();
        let epoch = match self.make_ready(vm, plan).await {
            Err(error) if error.kind() == Kind::Agent => {
                return Err(self.without_agent(error, plan));
            }
            other => other?,
        };
        Ok(Running {
            process,
            ram_sharing: sharing,
            epoch,
            ready_after: begun.elapsed(),
        })
    }

    /// Says what the guest wrote before its agent was missed: undoing removes its console.
    fn without_agent(&self, error: EngineError, plan: &LaunchPlan<'_>) -> EngineError {
        let error = error.with_console(self.last_words(plan.launch));
        match plan.reason {
            Reason::Boot => error.next(
                "see the console's last lines; a sandbox made with `--no-agent` starts all the same, and then `stead logs` shows its whole console",
            ),
            Reason::Fork | Reason::Restore | Reason::Wake | Reason::Reattach => error.next(
                "see the console's last lines and try again; what it was started from is as it was",
            ),
        }
    }

    /// Connects, lets the vCPUs run, and waits until the agent acknowledges a fresh epoch.
    async fn make_ready(&self, vm: Vm, plan: &LaunchPlan<'_>) -> Result<Option<String>> {
        let folder = self.dir.run(plan.launch);
        let name = &plan.sandbox.name;
        let port = match plan.machine.agent {
            true => Some(AgentPort::connect(&folder, HANDSHAKE_PORT, name).await?),
            false => None,
        };
        let resumed = name.clone();
        blocking(move || {
            let mut vm = vm;
            vm.resume().map_err(|source| {
                EngineError::new(Kind::Vm, format!("let the VM of sandbox {resumed} run"), "")
                    .because(source)
            })
        })
        .await?;
        match port {
            Some(mut port) => tokio::select! {
                greeted = port.greet(plan.reason, plan.identity.clone(), plan.timeout) => greeted.map(Some),
                () = self.watch.cancelled() => Err(EngineError::new(
                    Kind::Cancelled,
                    format!("make sandbox {name} ready"),
                    "interrupted",
                )),
            },
            None => Ok(None),
        }
    }

    async fn vmm_launch(
        &self,
        plan: &LaunchPlan<'_>,
        ram: PathBuf,
        sharing: RamSharing,
    ) -> Result<Launch> {
        blobs::verify(&self.dir, &plan.machine.kernel)?;
        blobs::verify(&self.dir, &plan.machine.initrd)?;
        let mut disks = Vec::new();
        for disk in plan.disks {
            let mut chain = self.records.chain(&disk.layer).await?;
            chain.reverse();
            disks.push(Disk {
                id: disk.disk.clone(),
                chain: chain.iter().map(|layer| self.vmm_layer(layer)).collect(),
            });
        }
        let gid = match (&plan.ram, sharing) {
            (RamPlan::Image(image), RamSharing::Private) => image_group(image),
            _ => plan.sandbox.vm_user,
        };
        Ok(Launch {
            machine: plan.machine.qemu.clone(),
            name: plan.sandbox.name.clone(),
            dir: self.dir.run(plan.launch),
            ram: Ram {
                path: ram,
                sharing: match sharing {
                    RamSharing::Shared => stead_vmm::RamSharing::Shared,
                    RamSharing::Private => stead_vmm::RamSharing::Private,
                },
            },
            disks,
            boot: Some(Boot {
                kernel: blobs::path_of(&self.dir, &plan.machine.kernel),
                initrd: Some(blobs::path_of(&self.dir, &plan.machine.initrd)),
                command_line: plan.machine.cmdline.clone(),
            }),
            run_as: owner(plan.sandbox.vm_user).map(|uid| RunAs { uid, gid }),
        })
    }

    pub(crate) fn vmm_layer(&self, layer: &LayerRow) -> Layer {
        Layer {
            path: layers::path_of(&self.dir, &layer.id, &layer.format),
            format: if layer.format == layers::RAW {
                LayerFormat::Raw
            } else {
                LayerFormat::Qcow2
            },
        }
    }

    /// The file behind the guest's RAM, and how it is to be mapped.
    fn make_ram(&self, plan: &LaunchPlan<'_>) -> Result<(PathBuf, RamSharing)> {
        let run = self.dir.run(plan.launch);
        durable::create_dir(&run, 0o700).at("create folder", &run)?;
        let own = run.join(RAM_FILE);
        let user = owner(plan.sandbox.vm_user);
        match &plan.ram {
            RamPlan::Fresh => {
                let path = if self.reflinks()? {
                    own
                } else {
                    check_memory_room(&plan.sandbox.name, plan.machine.qemu.memory_bytes)?;
                    self.memory_file(plan.launch, user)?
                };
                let file = durable::create_scratch(&path, 0o600).at("create RAM", &path)?;
                file.set_len(plan.machine.qemu.memory_bytes)
                    .at("size RAM", &path)?;
                layers::give_to(&path, user)?;
                Ok((path, RamSharing::Shared))
            }
            RamPlan::Image(image) => {
                let from = File::open(image).at("open RAM image", image)?;
                let to = durable::create_scratch(&own, 0o600).at("create RAM", &own)?;
                if copy::reflink(&from, &to).at("share the blocks of", image)? {
                    layers::give_to(&own, user)?;
                    return Ok((own, RamSharing::Shared));
                }
                durable::remove_file(&own).at("remove", &own)?;
                Ok((image.clone(), RamSharing::Private))
            }
        }
    }

    /// A folder on a memory file system, with a mark that says whose it is.
    fn memory_file(&self, launch: &str, user: Option<u32>) -> Result<PathBuf> {
        let folder = paths::memory_folder(launch);
        durable::create_dir(&folder, 0o700).at("create folder", &folder)?;
        let mark = folder.join(crate::undo::MEMORY_OWNER);
        std::os::unix::fs::symlink(self.dir.root(), &mark).at("mark", &mark)?;
        layers::give_to(&folder, user)?;
        Ok(folder.join(RAM_FILE))
    }

    /// Whether the data directory's file system shares blocks.
    pub(crate) fn reflinks(&self) -> Result<bool> {
        if let Some(known) = self.reflinks.get() {
            return Ok(*known);
        }
        let found =
            crate::doctor::can_reflink(&self.dir.ram()).at("try a reflink in", self.dir.ram())?;
        Ok(*self.reflinks.get_or_init(|| found))
    }

    /// The live RAM of a running VM that maps it shared.
    pub(crate) fn live_ram(&self, launch: &str) -> PathBuf {
        let own = self.dir.run(launch).join(RAM_FILE);
        if own.exists() {
            own
        } else {
            paths::memory_folder(launch).join(RAM_FILE)
        }
    }

    /// The control connection of a running sandbox's QEMU.
    pub(crate) async fn connect_vm(&self, sandbox: &Sandbox) -> Result<Vm> {
        let (Some(launch), Some(process)) = (&sandbox.launch, sandbox.process) else {
            return Err(crate::sandbox::wrong_state(
                "reach",
                sandbox,
                "it does not run",
            ));
        };
        let folder = self.dir.run(launch);
        let sandbox = sandbox.clone();
        blocking(move || {
            Vm::connect(&folder, process)
                .map_err(|source| crate::sandbox::vm_error("reach the QEMU of", &sandbox, source))
        })
        .await
    }
}

/// Refuses a VM whose RAM would not fit the memory file system together with what running VMs may still use.
///
/// A guest that touches a page for which there is no room is killed by the kernel, and so are all others there.
fn check_memory_room(sandbox: &str, memory_bytes: u64) -> Result<()> {
    let folder = Path::new(paths::MEMORY);
    let available = space::available_bytes(folder).at("ask for room on", folder)?;
    let promised = promised_bytes(folder).at("measure the RAM of running VMs in", folder)?;
    let required = memory_bytes.saturating_add(promised);
    if required <= available {
        return Ok(());
    }
    Err(EngineError::new(
        Kind::NoSpace,
        format!("give sandbox {sandbox} its RAM"),
        format!(
            "{} has {available} bytes left, of which running VMs may still use {promised}; \
             {memory_bytes} are needed",
            folder.display()
        ),
    )
    .left("nothing was started")
    .next(
        "stop another sandbox, give this one less --memory, make the file system larger, \
         or put the data directory on a file system with reflinks",
    ))
}

/// What the RAM files of VMs, whoever runs them, may still grow by.
fn promised_bytes(folder: &Path) -> std::io::Result<u64> {
    let mut promised = 0_u64;
    for entry in std::fs::read_dir(folder)? {
        let ram = entry?.path().join(RAM_FILE);
        // A VM may end meanwhile, and other programs' files are not ours to count.
        let Ok(meta) = std::fs::symlink_metadata(&ram) else {
            continue;
        };
        let allocated = space::allocated_bytes(&ram).unwrap_or(meta.len());
        promised = promised.saturating_add(meta.len().saturating_sub(allocated));
    }
    Ok(promised)
}

/// A connection to one agent port of a running VM.
pub(crate) struct AgentPort {
    pub link: AgentLink,
    sandbox: String,
    /// The link makes its connection anew through this folder's descriptor: a socket's path may be
    /// longer than an address holds.
    _folder: File,
}

impl AgentPort {
    pub(crate) async fn connect(folder: &Path, port: u8, sandbox: &str) -> Result<Self> {
        let opened = File::open(folder).at("open", folder)?;
        let name = stead_vmm::dir::agent_socket(port);
        let socket = format!("/proc/self/fd/{}/{name}", opened.as_raw_fd());
        let link = AgentLink::connect(Path::new(&socket))
            .await
            .map_err(|source| {
                EngineError::new(
                    Kind::Agent,
                    format!("reach the agent of sandbox {sandbox}"),
                    format!("port {port} cannot be connected"),
                )
                .because(source)
            })?;
        Ok(Self {
            link,
            sandbox: sandbox.to_owned(),
            _folder: opened,
        })
    }

    /// Has the agent begin a fresh epoch, releases it and returns it: from here on the guest's processes run and commands
    /// are accepted.
    pub(crate) async fn greet(
        &mut self,
        reason: Reason,
        identity: Identity,
        timeout: Duration,
    ) -> Result<String> {
        let epoch = Epoch(id::random()?);
        let greeting = Greeting {
            epoch,
            reason,
            identity,
        };
        let failed = |what: &'static str| {
            let attempt = format!("make sandbox {} ready", self.sandbox);
            move |source| EngineError::new(Kind::Agent, attempt, what).because(source)
        };
        let unacknowledged = failed("the guest's agent has not acknowledged the epoch");
        let unreleased = failed("the guest's agent has not let its processes go on");
        let acknowledged = self.link.handshake(&greeting, timeout).await;
        acknowledged.map_err(unacknowledged)?;
        self.link.set_request_limit(timeout);
        self.link.release().await.map_err(unreleased)?;
        Ok(epoch.to_string())
    }
}
