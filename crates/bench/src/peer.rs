//! The peer: the same guest under plain QEMU, with `savevm` into its qcow2 disk and `-loadvm` in a new process.
//!
//! The machine has the same devices at the same places as ours and boots the same kernel from the same
//! template, so both guests can be told the same through the same agent.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stead_agent_link::{AgentLink, Epoch, ExecRequest, ExitStatus, Greeting, Identity, Reason};
use stead_engine::SandboxInfo;
use stead_template::BuiltTemplate;
use tokio::process::{Child, Command};

use crate::error::{BenchError, Doing, Result};
use crate::program;
use crate::qmp::Qmp;

/// How many agent ports our machines have.
const AGENT_PORTS: u8 = 8;
/// The name of a further port, at which no agent listens, and of its socket.
pub const RAW_PORT: &str = "bench.raw";
pub const RAW_SOCKET: &str = "raw.sock";
/// How long a guest's agent may take.
const AGENT_WITHIN: Duration = Duration::from_secs(180);
/// QEMU's program.
const QEMU: &str = "qemu-system-x86_64";

/// What all peers of a run have in common.
#[derive(Debug, Clone)]
pub struct PeerSpec {
    /// The template's files.
    pub template: BuiltTemplate,
    /// Our sandbox, whose machine the peer gets.
    pub like: SandboxInfo,
}

/// A running peer; dropping it ends its QEMU.
#[derive(Debug)]
pub struct Peer {
    /// Its disk.
    pub image: PathBuf,
    process: Child,
    qmp: Qmp,
    link: AgentLink,
}

impl PeerSpec {
    /// An empty qcow2 overlay over the template.
    ///
    /// # Errors
    /// When `qemu-img` fails.
    pub async fn create_image(&self, image: &Path) -> Result<()> {
        let (base, image) = (
            self.template.disk.display().to_string(),
            image.display().to_string(),
        );
        let arguments = [
            "create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &image,
        ];
        program::run("qemu-img", &arguments).await?;
        Ok(())
    }

    /// Boots a guest from `image`, with its sockets in `folder`.
    ///
    /// # Errors
    /// When QEMU does not start or the guest's agent does not answer.
    pub async fn boot(&self, folder: &Path, image: &Path) -> Result<Peer> {
        self.start(folder, image, None).await
    }

    /// Starts a new process from an internal snapshot of `image`.
    ///
    /// # Errors
    /// As [`PeerSpec::boot`].
    pub async fn load(&self, folder: &Path, image: &Path, tag: &str) -> Result<Peer> {
        self.start(folder, image, Some(tag)).await
    }

    async fn start(&self, folder: &Path, image: &Path, tag: Option<&str>) -> Result<Peer> {
        let log = prepare(folder)?;
        self.start_prepared(folder, image, tag, log).await
    }

    async fn start_prepared(
        &self,
        folder: &Path,
        image: &Path,
        tag: Option<&str>,
        log: File,
    ) -> Result<Peer> {
        let process = Command::new(QEMU)
            .args(self.arguments(image, tag))
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .kill_on_drop(true)
            .spawn()
            .doing("start a peer's QEMU")?;
        let mut qmp = Qmp::connect(folder).await?;
        // Connected before the vCPUs run, as ours is.
        let mut link = connect_agent(folder)?;
        qmp.execute("cont", json!({})).await?;
        let greeting = Greeting {
            epoch: new_epoch()?,
            reason: if tag.is_some() {
                Reason::Fork
            } else {
                Reason::Boot
            },
            identity: Identity::Keep,
        };
        link.handshake(&greeting, AGENT_WITHIN)
            .await
            .doing("reach a peer's agent")?;
        link.release().await.doing("release a peer's agent")?;
        Ok(Peer {
            image: image.to_owned(),
            process,
            qmp,
            link,
        })
    }

    fn arguments(&self, image: &Path, tag: Option<&str>) -> Vec<String> {
        let like = &self.like;
        let mut line: Vec<String> = ["-nodefaults", "-no-user-config", "-no-reboot", "-S"]
            .map(str::to_owned)
            .to_vec();
        let mut add = |option: &str, value: String| line.extend([option.to_owned(), value]);
        add("-display", "none".to_owned());
        add("-vga", "none".to_owned());
        add(
            "-machine",
            format!("{},accel={}", like.machine_type, like.accelerator),
        );
        add("-global", "ICH9-LPC.disable_s3=1".to_owned());
        add("-global", "ICH9-LPC.disable_s4=1".to_owned());
        add("-cpu", like.cpu_model.clone());
        add("-smp", like.cpus.to_string());
        add("-m", format!("size={}M", like.memory_bytes >> 20));
        add("-chardev", socket("qmp0", stead_vmm::dir::QMP_SOCKET));
        add("-mon", "chardev=qmp0,mode=control".to_owned());
        add("-chardev", "file,id=serial0,path=serial.log".to_owned());
        add("-serial", "chardev:serial0".to_owned());
        add("-object", "rng-builtin,id=rng0".to_owned());
        add(
            "-device",
            "virtio-rng-pci,rng=rng0,bus=pcie.0,addr=0x2".to_owned(),
        );
        add(
            "-device",
            "virtio-serial-pci,id=agents,bus=pcie.0,addr=0x3".to_owned(),
        );
        for port in 0..AGENT_PORTS {
            let id = format!("agent{port}");
            add("-chardev", socket(&id, &stead_vmm::dir::agent_socket(port)));
            add(
                "-device",
                format!(
                    "virtserialport,bus=agents.0,nr={},chardev={id},name=org.steadfast.agent.{port}",
                    u32::from(port) + 1
                ),
            );
        }
        add("-chardev", socket("raw", RAW_SOCKET));
        add(
            "-device",
            format!("virtserialport,bus=agents.0,nr=20,chardev=raw,name={RAW_PORT}"),
        );
        add("-blockdev", disk(image).to_string());
        add(
            "-device",
            "virtio-blk-pci,bus=pcie.0,addr=0x4,drive=disk0,bootindex=1".to_owned(),
        );
        add("-kernel", self.template.vmlinuz.display().to_string());
        add("-initrd", self.template.initrd.display().to_string());
        add("-append", self.template.cmdline.clone());
        if let Some(tag) = tag {
            add("-loadvm", tag.to_owned());
        }
        line
    }
}

impl Peer {
    /// Runs a shell script in the guest; it must succeed.
    ///
    /// # Errors
    /// When it fails.
    pub async fn shell(&mut self, script: &str) -> Result<()> {
        self.exec(&["sh", "-c", script]).await
    }

    /// Runs a command in the guest; it must succeed.
    ///
    /// # Errors
    /// When it fails.
    pub async fn exec(&mut self, argv: &[&str]) -> Result<()> {
        let request = ExecRequest {
            argv: argv.iter().map(|word| (*word).into()).collect(),
            ..ExecRequest::default()
        };
        let output = self
            .link
            .exec_capture(request, b"")
            .await
            .doing("run a command in a peer's guest")?;
        if output.status == ExitStatus::Code(0) {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(BenchError::new("run a command in a peer's guest", said))
    }

    /// Saves the VM into its disk; gives how long it stood still, by QEMU's own events.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub async fn savevm(&mut self, tag: &str) -> Result<Duration> {
        self.qmp.forget_events();
        self.qmp.monitor(&format!("savevm {tag}")).await?;
        let (stopped, resumed) = (
            self.qmp.event("STOP").await?,
            self.qmp.event("RESUME").await?,
        );
        resumed
            .checked_sub(stopped)
            .ok_or_else(|| BenchError::new("measure savevm", "RESUME is older than STOP"))
    }

    /// Its process id.
    ///
    /// # Errors
    /// When it has ended.
    pub fn pid(&self) -> Result<i32> {
        self.process
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .ok_or_else(|| BenchError::new("look at a peer's QEMU", "it has ended"))
    }

    /// Ends QEMU, which writes its disk out first.
    ///
    /// # Errors
    /// When it cannot be told or waited for.
    pub async fn quit(mut self) -> Result<PathBuf> {
        self.qmp.execute("quit", json!({})).await?;
        self.process.wait().await.doing("wait for a peer's QEMU")?;
        Ok(self.image)
    }
}

/// Measures how long a new process takes from its start until it has answered one command.
///
/// # Errors
/// When it does not start or answer.
pub async fn first_exec(
    spec: &PeerSpec,
    folder: &Path,
    image: &Path,
    tag: &str,
) -> Result<(Peer, Duration)> {
    let log = prepare(folder)?;
    let begun = Instant::now();
    let mut peer = spec.start_prepared(folder, image, Some(tag), log).await?;
    peer.exec(&["true"]).await?;
    Ok((peer, begun.elapsed()))
}

/// Makes a folder ready for a process and gives the file for its messages.
fn prepare(folder: &Path) -> Result<File> {
    stead_sys::durable::create_dir(folder, 0o700).doing("create a peer's folder")?;
    for name in leftovers() {
        stead_sys::durable::remove_file(&folder.join(name)).doing("remove an old file")?;
    }
    stead_sys::durable::create_scratch(&folder.join(stead_vmm::dir::QEMU_LOG), 0o600)
        .doing("create a peer's log")
}

/// What an earlier process in the same folder has left.
fn leftovers() -> impl Iterator<Item = String> {
    let single = [
        stead_vmm::dir::QMP_SOCKET,
        stead_vmm::dir::QEMU_LOG,
        RAW_SOCKET,
    ];
    (0..AGENT_PORTS)
        .map(stead_vmm::dir::agent_socket)
        .chain(single.map(str::to_owned))
}

fn socket(id: &str, path: &str) -> String {
    format!("socket,id={id},path={path},server=on,wait=off")
}

fn disk(image: &Path) -> Value {
    json!({
        "driver": "qcow2", "node-name": "disk0", "discard": "unmap",
        "file": { "driver": "file", "filename": image, "discard": "unmap" },
    })
}

fn connect_agent(folder: &Path) -> Result<AgentLink> {
    let doing = "connect to a peer's agent port";
    let stream = stead_vmm::dir::connect(folder, &stead_vmm::dir::agent_socket(0)).doing(doing)?;
    stream.set_nonblocking(true).doing(doing)?;
    let stream = tokio::net::UnixStream::from_std(stream).doing(doing)?;
    Ok(AgentLink::from_stream(stream))
}

fn new_epoch() -> Result<Epoch> {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .doing("draw an epoch")?;
    Ok(Epoch(bytes))
}
