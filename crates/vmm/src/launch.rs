//! How a machine is put on QEMU's command line and started.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::dir;
use crate::disks;
use crate::error::{Error, Result};
use crate::machine::{Accelerator, MIB, Machine};
use crate::process::{Process, open_log};
use crate::qemu::Qemu;
use crate::qmp::Qmp;
use crate::state_stream::StateFormat;
use crate::vm::Vm;

/// How long QEMU may take from its start to its first answer.
const START_WITHIN: Duration = Duration::from_secs(60);
/// The first PCI slot of a disk; the random number generator has 2 and the agent ports have 3.
const FIRST_DISK_SLOT: usize = 4;

/// The format of a disk layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerFormat {
    /// A qcow2 image. Its own backing file name is ignored: the chain says what lies below.
    Qcow2,
    /// Plain bytes. Only the lowest layer can be one.
    Raw,
}

/// One file of a disk's chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The file; absolute, since QEMU runs in its own folder.
    pub path: PathBuf,
    /// Its format.
    pub format: LayerFormat,
}

/// A disk and the whole chain of its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its name, one of [`Machine::disks`].
    pub id: String,
    /// Base first; the last one is written to, all others are opened read-only.
    pub chain: Vec<Layer>,
}

/// Whether what the guest writes to its RAM reaches the RAM file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RamSharing {
    /// Yes: the file is the RAM. For VMs that own their file.
    Shared,
    /// No: the file is only where pages come from at first. For forks; the file must never change.
    Private,
}

/// The file behind the guest's RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ram {
    /// The file; absolute, [`Machine::memory_bytes`] long, readable *and writable* for QEMU (QEMU
    /// before 8.2 opens it so even for a private mapping).
    pub path: PathBuf,
    /// Whether the guest writes to it.
    pub sharing: RamSharing,
}

/// The kernel that a guest without boot loader starts with.
///
/// A restored VM needs the same files again: they are part of the machine's firmware tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// The kernel image; absolute.
    pub kernel: PathBuf,
    /// The initial RAM disk; absolute.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
}

/// The user QEMU runs as, when we are root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunAs {
    /// User id.
    pub uid: u32,
    /// Group id. Under KVM, the group of `/dev/kvm` takes its place if the user needs it to open that.
    pub gid: u32,
}

/// Everything one QEMU process is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// What the guest sees.
    pub machine: Machine,
    /// A name for process listings: letters, digits, '.', '-' and '_'.
    pub name: String,
    /// The process's own folder; absolute. Created with mode 0700 if missing.
    pub dir: PathBuf,
    /// The RAM.
    pub ram: Ram,
    /// The disks, in the order of [`Machine::disks`].
    pub disks: Vec<Disk>,
    /// The kernel, or `None` when the first disk boots by itself.
    pub boot: Option<Boot>,
    /// The user to run as; `None` for our own.
    pub run_as: Option<RunAs>,
}

impl Launch {
    /// Starts the machine; its vCPUs stand still until [`Vm::resume`].
    ///
    /// # Errors
    /// [`Error::Description`] before anything starts; [`Error::Died`] with QEMU's last words.
    pub fn boot(&self, qemu: &Qemu) -> Result<Vm> {
        self.start(qemu, false)
    }

    /// Starts a process that waits for state; see [`Vm::load_state`].
    ///
    /// # Errors
    /// As [`Launch::boot`].
    pub fn prepare_restore(&self, qemu: &Qemu) -> Result<Vm> {
        self.start(qemu, true)
    }

    /// Starts the machine with `device_state`. Its vCPUs stand still: connect to the agent ports
    /// first ([`Vm::connect_agent`]), then [`Vm::resume`].
    ///
    /// # Errors
    /// As [`Launch::boot`] and [`Vm::load_state`]. After an error no process is left.
    pub fn restore(&self, qemu: &Qemu, device_state: &[u8], format: StateFormat) -> Result<Vm> {
        let mut vm = self.prepare_restore(qemu)?;
        match vm.load_state(device_state, format) {
            Ok(()) => Ok(vm),
            Err(error) => {
                if let Err(second) = vm.kill() {
                    tracing::warn!(%second, "a VM that could not be restored was not ended");
                }
                Err(error)
            }
        }
    }

    fn start(&self, qemu: &Qemu, incoming: bool) -> Result<Vm> {
        self.validate(qemu)?;
        self.prepare_dir()?;
        let (child, log_start) = self.spawn(qemu, incoming)?;
        let process = Process::adopt(child, &self.dir, log_start)?;
        match self.first_answer(&process) {
            Ok(qmp) => Ok(Vm::new(self.dir.clone(), process, qmp)),
            Err(error) => {
                let explained = process.explain(error, &self.dir);
                if let Err(second) = process.id().kill() {
                    tracing::warn!(%second, "a QEMU that does not answer was not ended");
                }
                Err(explained)
            }
        }
    }

    /// Whether this can be put on a command line and every file is what it should be.
    fn validate(&self, qemu: &Qemu) -> Result<()> {
        self.machine.validate()?;
        let unfit = |what, expected: &str, found: String| {
            Err(Error::Description {
                what,
                expected: expected.to_owned(),
                found,
            })
        };
        if self.machine.qemu_version > qemu.version() {
            let expected = format!("at most {}, the one here", qemu.version());
            return unfit(
                "QEMU version",
                &expected,
                self.machine.qemu_version.to_string(),
            );
        }
        if qemu.machine_type(&self.machine.machine_type).is_none() {
            let found = self.machine.machine_type.clone();
            return unfit("machine type", "one that this QEMU knows", found);
        }
        if !is_name(&self.name) {
            return unfit(
                "VM name",
                "1 to 64 letters, digits, '.', '-', '_'",
                format!("{:?}", self.name),
            );
        }
        let ids: Vec<&str> = self.disks.iter().map(|disk| disk.id.as_str()).collect();
        if ids != self.machine.disks {
            return unfit("disks", &self.machine.disks.join(", "), ids.join(", "));
        }
        for path in self.files() {
            if !path.is_absolute() || path.to_str().is_none() {
                return unfit(
                    "file",
                    "an absolute path in UTF-8",
                    path.display().to_string(),
                );
            }
        }
        self.validate_chains()?;
        self.validate_ram()
    }

    fn validate_chains(&self) -> Result<()> {
        for disk in &self.disks {
            let raw_above = disk
                .chain
                .iter()
                .skip(1)
                .any(|l| l.format == LayerFormat::Raw);
            if disk.chain.is_empty() || raw_above {
                return Err(Error::Description {
                    what: "disk chain",
                    expected: "at least one layer, and raw only as the lowest".to_owned(),
                    found: format!("{} layers of {}", disk.chain.len(), disk.id),
                });
            }
        }
        Ok(())
    }

    fn validate_ram(&self) -> Result<()> {
        let found = fs::metadata(&self.ram.path)
            .map_err(|source| file("look at the RAM file", &self.ram.path, source))?
            .len();
        if found == self.machine.memory_bytes {
            return Ok(());
        }
        Err(Error::Description {
            what: "RAM file",
            expected: format!("{} bytes", self.machine.memory_bytes),
            found: format!("{found} bytes in {}", self.ram.path.display()),
        })
    }

    fn files(&self) -> impl Iterator<Item = &Path> {
        let layers = self.disks.iter().flat_map(|disk| &disk.chain);
        let kernel = self.boot.iter().map(|boot| &boot.kernel);
        let initrd = self.boot.iter().filter_map(|boot| boot.initrd.as_ref());
        [&self.dir, &self.ram.path]
            .into_iter()
            .chain(layers.map(|layer| &layer.path))
            .chain(kernel)
            .chain(initrd)
            .map(PathBuf::as_path)
    }

    /// Makes the folder, gives it to QEMU's user, and removes sockets that an earlier process left.
    fn prepare_dir(&self) -> Result<()> {
        stead_sys::durable::create_dir(&self.dir, 0o700)
            .map_err(|source| file("create the VM folder", &self.dir, source))?;
        if let Some(user) = self.run_as {
            chown(&self.dir, Some(user.uid), Some(user.gid))
                .map_err(|source| file("give the VM folder to QEMU's user", &self.dir, source))?;
        }
        let agents = (0..self.machine.agent_ports).map(dir::agent_socket);
        for name in agents.chain([dir::QMP_SOCKET.to_owned()]) {
            let path = self.dir.join(name);
            match fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(file("remove the old socket", &path, source)),
            }
        }
        Ok(())
    }

    /// Starts the process in a group of its own, so that what ends us does not end it.
    fn spawn(&self, qemu: &Qemu, incoming: bool) -> Result<(Child, u64)> {
        let log_path = self.dir.join(dir::QEMU_LOG);
        let log_error = |source| file("open the log", &log_path, source);
        let (log, log_start) = open_log(&self.dir).map_err(log_error)?;
        let both = log.try_clone().map_err(log_error)?;
        let mut command = Command::new(qemu.binary());
        command
            .args(self.arguments(incoming))
            .current_dir(&self.dir)
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .stdin(Stdio::null())
            .stdout(Stdio::from(log))
            .stderr(Stdio::from(both))
            .process_group(0);
        if let Some(user) = self.run_as {
            // Setting a user id as root also drops every supplementary group.
            command.gid(self.group(user)?).uid(user.uid);
        }
        let child = command.spawn().map_err(|source| Error::Unusable {
            binary: qemu.binary().to_owned(),
            found: source.to_string(),
        })?;
        Ok((child, log_start))
    }

    fn group(&self, user: RunAs) -> Result<u32> {
        match self.machine.accelerator {
            Accelerator::Tcg => Ok(user.gid),
            Accelerator::Kvm => kvm_group(user),
        }
    }

    /// Connects to the control socket as soon as it is there.
    fn first_answer(&self, process: &Process) -> Result<Qmp> {
        let until = Instant::now() + START_WITHIN;
        loop {
            match dir::dial(&self.dir, dir::QMP_SOCKET) {
                Ok(stream) => {
                    let left = until.saturating_duration_since(Instant::now());
                    return Qmp::negotiate(stream, left);
                }
                Err(error) if Instant::now() >= until => {
                    return Err(file("connect to QEMU's new socket in", &self.dir, error));
                }
                Err(_not_yet) => {}
            }
            if process.wait(Duration::from_millis(2))?.is_some() {
                return Err(Error::NotRunning {
                    process: process.id().to_string(),
                });
            }
        }
    }

    /// The command line after the program's name.
    #[must_use]
    pub fn arguments(&self, incoming: bool) -> Vec<OsString> {
        let machine = &self.machine;
        let mut line = Line::default();
        line.flag("-nodefaults").flag("-no-user-config").flag("-S");
        line.option("-name", format!("guest={},debug-threads=off", self.name));
        line.option("-msg", "timestamp=on");
        line.option("-display", "none").option("-vga", "none");
        line.option(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
        line.option(
            "-machine",
            format!(
                "{},accel={},memory-backend=ram0",
                machine.machine_type, machine.accelerator
            ),
        );
        // Sleep states of the whole machine would make a guest that no checkpoint can be taken of.
        line.option("-global", "ICH9-LPC.disable_s3=1");
        line.option("-global", "ICH9-LPC.disable_s4=1");
        line.option("-cpu", format!("{},enforce=on", machine.cpu_model));
        line.option("-smp", format!("cpus={0},maxcpus={0}", machine.cpus));
        line.option("-m", format!("size={}M", machine.memory_bytes / MIB));
        line.json("-object", &self.ram_object());
        self.add_sockets(&mut line);
        self.add_disks(&mut line);
        if let Some(boot) = &self.boot {
            line.option("-kernel", &boot.kernel);
            line.option("-append", &boot.command_line);
            if let Some(initrd) = &boot.initrd {
                line.option("-initrd", initrd);
            }
        }
        if incoming {
            line.option("-incoming", "defer");
        }
        line.0
    }

    fn ram_object(&self) -> Value {
        json!({
            "qom-type": "memory-backend-file",
            "id": "ram0",
            "mem-path": self.ram.path.to_string_lossy(),
            "size": self.machine.memory_bytes,
            "share": self.ram.sharing == RamSharing::Shared,
            "prealloc": false,
        })
    }

    fn add_sockets(&self, line: &mut Line) {
        line.option(
            "-chardev",
            format!("socket,id=qmp0,path={},server=on,wait=off", dir::QMP_SOCKET),
        );
        line.option("-mon", "chardev=qmp0,mode=control");
        line.option(
            "-chardev",
            format!("file,id=serial0,path={},append=on", dir::SERIAL_LOG),
        );
        line.option("-serial", "chardev:serial0");
        line.json("-object", &json!({"qom-type": "rng-builtin", "id": "rng0"}));
        line.json(
            "-device",
            &json!({"driver": "virtio-rng-pci", "id": "random0", "rng": "rng0", "bus": "pcie.0", "addr": "0x2"}),
        );
        line.json(
            "-device",
            &json!({"driver": "virtio-serial-pci", "id": "agents", "bus": "pcie.0", "addr": "0x3"}),
        );
        for port in 0..self.machine.agent_ports {
            let socket = dir::agent_socket(port);
            line.option(
                "-chardev",
                format!("socket,id=agent{port},path={socket},server=on,wait=off"),
            );
            line.json(
                "-device",
                &json!({
                    "driver": "virtserialport", "id": format!("port{port}"), "bus": "agents.0",
                    "nr": u32::from(port) + 1, "chardev": format!("agent{port}"),
                    "name": format!("org.steadfast.agent.{port}"),
                }),
            );
        }
    }

    fn add_disks(&self, line: &mut Line) {
        for (slot, disk) in self.disks.iter().enumerate() {
            for node in disks::chain_options(disk) {
                line.json("-blockdev", &node);
            }
            line.json(
                "-device",
                &json!({
                    "driver": "virtio-blk-pci", "id": disk.id, "bus": "pcie.0",
                    "addr": format!("{:#x}", FIRST_DISK_SLOT + slot),
                    "drive": disks::top_node(disk), "bootindex": slot + 1,
                }),
            );
        }
    }
}

/// A command line under construction.
#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn option(&mut self, option: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.push(option.into());
        self.0.push(value.into());
        self
    }

    fn json(&mut self, option: &str, value: &Value) {
        self.option(option, value.to_string());
    }
}

/// The group that lets `user` open `/dev/kvm`.
pub(crate) fn kvm_group(user: RunAs) -> Result<u32> {
    let path = Path::new("/dev/kvm");
    let device = fs::metadata(path).map_err(|source| file("look at", path, source))?;
    let (mode, owner, group) = (device.mode(), device.uid(), device.gid());
    let others = mode & 0o006 == 0o006;
    let own = owner == user.uid && mode & 0o600 == 0o600;
    let by_group = mode & 0o060 == 0o060;
    Ok(if !others && !own && by_group {
        group
    } else {
        user.gid
    })
}

fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

fn file(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::File {
        what,
        path: path.to_owned(),
        source,
    }
}
