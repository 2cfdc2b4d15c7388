//! `stead-agent serve`: answers the host on every port.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use stead_agent_proto::guest::{Agent, Config};
use stead_agent_proto::{PORT_COUNT, PORT_NAME_PREFIX};

use crate::chores::{self, Chores};
use crate::control::Control;
use crate::core::{Core, Orders};
use crate::drain::Drain;
use crate::error::{AgentError, Attempt, chain};
use crate::freeze::{self, Freezer};
use crate::listen::{self, Listener, Peers, UnixDoor, VsockDoor};
use crate::port;
use crate::setup::Setup;
use crate::standstill::{self, Standstill, Unable};
use crate::succession::Inherited;
use crate::transport::Transport;
use crate::workload::Workload;
use crate::{init, pty, reaper};

const PORTS_FOLDER: &str = "/sys/class/virtio-ports";
const MAX_COMMANDS: u32 = 256;
const MAX_CONNECTIONS: usize = 64;
const STACK_BYTES: usize = 256 * 1024;
// Ports appear one after another while the machine boots, and rarely later.
const FIRST_SCAN_PAUSE: Duration = Duration::from_millis(10);
const LAST_SCAN_PAUSE: Duration = Duration::from_secs(2);

/// Where the host comes from.
#[derive(Debug)]
enum Source {
    Virtio,
    Vsock { port: u32, peers: Peers },
    Socket(PathBuf),
    Stdin,
}

/// What the command line says.
#[derive(Debug)]
struct Options {
    source: Source,
    clock: bool,
    entropy: bool,
    hostname: bool,
    allow_shutdown: bool,
    freeze_program: Option<PathBuf>,
    mounts: Option<PathBuf>,
}

impl Options {
    fn parse(arguments: &[OsString]) -> Result<Self, AgentError> {
        let mut options = Self {
            source: Source::Virtio,
            clock: true,
            entropy: true,
            hostname: true,
            allow_shutdown: false,
            freeze_program: None,
            mounts: None,
        };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let name = argument.to_string_lossy();
            let mut value = || {
                rest.next()
                    .map(PathBuf::from)
                    .ok_or_else(|| AgentError::Usage(format!("{name} needs a value")))
            };
            match &*name {
                "--socket" => options.source = Source::Socket(value()?),
                "--vsock" => options.source = vsock(&value()?, Peers::Host)?,
                "--vsock-local" => options.source = vsock(&value()?, Peers::Local)?,
                "--stdin-socket" => options.source = Source::Stdin,
                "--no-clock" => options.clock = false,
                "--no-entropy" => options.entropy = false,
                "--no-hostname" => options.hostname = false,
                "--allow-shutdown" => options.allow_shutdown = true,
                "--freeze-program" => options.freeze_program = Some(value()?),
                "--mounts" => options.mounts = Some(value()?),
                unknown => return Err(AgentError::Usage(format!("unknown option {unknown}"))),
            }
        }
        Ok(options)
    }

    fn is_machine(&self) -> bool {
        match &self.source {
            Source::Virtio => true,
            Source::Vsock { peers, .. } => *peers == Peers::Host,
            Source::Socket(_) | Source::Stdin => false,
        }
    }

    fn standstill(&self) -> Box<dyn Standstill> {
        if !self.is_machine() {
            return Box::new(Unable);
        }
        match Workload::discover() {
            Ok(workload) => Box::new(workload),
            Err(error) => {
                eprintln!("stead-agent: processes cannot be frozen: {}", chain(&error));
                Box::new(Unable)
            }
        }
    }

    /// Over a socket the agent serves less than a machine, and leaves the machine's own alone unless told.
    fn freezer(&self) -> Freezer {
        let program = self.freeze_program.clone();
        Freezer {
            program: program.or_else(|| self.is_machine().then(freeze::find_program)),
            mountinfo: self
                .mounts
                .clone()
                .unwrap_or_else(|| PathBuf::from("/proc/self/mountinfo")),
            emergency_thaw: self.is_machine(),
        }
    }
}

fn vsock(port: &Path, peers: Peers) -> Result<Source, AgentError> {
    let text = port.to_string_lossy();
    match text.parse() {
        Ok(port) => Ok(Source::Vsock { port, peers }),
        Err(_) => Err(AgentError::Usage(format!("{text} is no vsock port"))),
    }
}

/// Serves for ever, or until the one connection it was given ends.
pub(crate) fn run(
    arguments: &[OsString],
    control: Control,
    inherited: Inherited,
) -> Result<(), AgentError> {
    let options = Options::parse(arguments)?;
    if std::process::id() == 1 {
        init::mount_kernel_file_systems()?;
        pty::mount_terminals()?;
        spawn("reaper", reaper::run)?;
    }
    if options.is_machine() {
        protect();
    }
    let core = build(&options, inherited)?;
    control.start(&core)?;
    match &options.source {
        Source::Virtio => serve_virtio(&core),
        Source::Vsock { port, peers } => {
            serve_connections(&core, &format!("vsock port {port}"), || {
                VsockDoor::open(*port, *peers)
            })
        }
        Source::Socket(path) => {
            serve_connections(&core, &path.display().to_string(), || UnixDoor::open(path))
        }
        Source::Stdin => serve_stdin(&core),
    }
}

/// Asks the kernel to spare the agent when memory runs out. Only root may.
fn protect() {
    let written = OpenOptions::new()
        .write(true)
        .open("/proc/self/oom_score_adj")
        .and_then(|mut file| file.write_all(b"-1000"));
    if let Err(error) = written {
        eprintln!("stead-agent: not protected when memory runs out: {error}");
    }
}

fn build(options: &Options, inherited: Inherited) -> Result<Arc<Core>, AgentError> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .attempt(|| "read the boot id".to_owned())?;
    let config = Config {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: boot_id.trim().chars().take(64).collect(),
        max_commands: MAX_COMMANDS,
        may_shut_down: options.is_machine() || options.allow_shutdown,
    };
    let mut setup = Setup::new()?;
    setup.clock = options.clock;
    setup.entropy = options.entropy;
    setup.hostname = options.hostname;
    let (freezer, ordered) = channel();
    let (standing, told) = channel();
    let (chores, due) = Chores::new();
    let drain = Drain::new()?;
    let standstill = options.standstill();
    let (mut agent, led, drained) = inherited.enter(Agent::new(config))?;
    if standstill.is_frozen() {
        agent = agent.with_frozen_workload();
    }
    let orders = Orders {
        freezer,
        standstill: standing,
    };
    let core = Arc::new(Core::new(agent, setup, orders, chores, drain.clone()));
    core.inherit(led, drained);
    let freezer = options.freezer();
    let shared = Arc::clone(&core);
    spawn("freezer", move || freezer.run(&shared, &ordered))?;
    let shared = Arc::clone(&core);
    spawn("standstill", move || {
        standstill::run(&shared, standstill, &told)
    })?;
    let shared = Arc::clone(&core);
    spawn("chores", move || chores::run(&shared, &due))?;
    let shared = Arc::clone(&core);
    spawn("drain", move || {
        if let Err(error) = drain.run(&shared) {
            // Without it, left-over writers would block for ever: a new agent is better.
            eprintln!("stead-agent: {}", chain(&error));
            std::process::exit(1);
        }
    })?;
    Ok(core)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), AgentError> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(work)
        .attempt(|| format!("start the thread {name}"))?;
    Ok(())
}

fn serve_virtio(core: &Arc<Core>) -> Result<(), AgentError> {
    let (ended, ends) = channel();
    let mut served = HashSet::new();
    let mut pause = FIRST_SCAN_PAUSE;
    let mut reported = BTreeMap::new();
    loop {
        for (port, device) in find_ports() {
            if served.contains(&port) {
                continue;
            }
            match open_port(core, port, &device, ended.clone()) {
                Ok(()) => {
                    served.insert(port);
                    pause = FIRST_SCAN_PAUSE;
                }
                Err(error) => {
                    // Said once for each reason, not at every scan.
                    let text = chain(&error);
                    if reported.insert(port, text.clone()).as_ref() != Some(&text) {
                        eprintln!("stead-agent: {text}");
                    }
                }
            }
        }
        // With all ports in service there is nothing to look for until one of them fails.
        let all = served.len() == PORT_COUNT as usize;
        let failed = if all {
            ends.recv().ok()
        } else {
            ends.recv_timeout(pause).ok()
        };
        if let Some(port) = failed {
            served.remove(&port);
            thread::sleep(LAST_SCAN_PAUSE);
        }
        pause = (pause * 2).min(LAST_SCAN_PAUSE);
    }
}

fn open_port(
    core: &Arc<Core>,
    port: u32,
    device: &Path,
    ended: Sender<u32>,
) -> Result<(), AgentError> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .attempt(|| format!("open {} for port {port}", device.display()))?;
    let core = Arc::clone(core);
    spawn(&format!("port {port} in"), move || {
        if let Err(error) = port::serve(&core, port, &mut file) {
            eprintln!("stead-agent: {}", chain(&error));
        }
        assert!(ended.send(port).is_ok(), "the scan for ports never ends");
    })
}

/// The agent's ports that the kernel knows now, by the names that the host gave them.
fn find_ports() -> Vec<(u32, PathBuf)> {
    let Ok(entries) = fs::read_dir(PORTS_FOLDER) else {
        // The driver is not there yet.
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = fs::read_to_string(entry.path().join("name")).ok()?;
            let number: u32 = name.trim().strip_prefix(PORT_NAME_PREFIX)?.parse().ok()?;
            let device = Path::new("/dev").join(entry.file_name());
            let is_device =
                fs::metadata(&device).is_ok_and(|found| found.file_type().is_char_device());
            (number < PORT_COUNT && is_device).then_some((number, device))
        })
        .collect()
}

/// Serves every connection that is let in at `place`.
fn serve_connections<L: Listener>(
    core: &Arc<Core>,
    place: &str,
    open: impl FnMut() -> io::Result<L>,
) -> Result<(), AgentError> {
    let connected = Arc::new(Mutex::new(0usize));
    let mut next_port = 0;
    let ended = listen::serve(open, |transport| {
        if !count_in(&connected) {
            // Dropped: the host sees the end of the connection.
            return;
        }
        let left = Arc::clone(&connected);
        if let Err(error) = serve_connection(core, next_port, transport, left) {
            eprintln!("stead-agent: {}", chain(&error));
            count_out(&connected);
        }
        next_port += 1;
    });
    Err(ended).attempt(|| format!("accept at {place}"))
}

fn serve_connection(
    core: &Arc<Core>,
    port: u32,
    mut transport: Box<dyn Transport>,
    connected: Arc<Mutex<usize>>,
) -> Result<(), AgentError> {
    let core = Arc::clone(core);
    spawn(&format!("port {port} in"), move || {
        if let Err(error) = port::serve(&core, port, &mut *transport) {
            eprintln!("stead-agent: {}", chain(&error));
        }
        count_out(&connected);
    })
}

/// Whether one more may come in.
fn count_in(connected: &Mutex<usize>) -> bool {
    let mut count = connected.lock().unwrap_or_else(PoisonError::into_inner);
    let may = *count < MAX_CONNECTIONS;
    *count += usize::from(may);
    may
}

fn count_out(connected: &Mutex<usize>) {
    *connected.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
}

fn serve_stdin(core: &Arc<Core>) -> Result<(), AgentError> {
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .attempt(|| "keep standard input".to_owned())?;
    port::serve(core, 0, &mut UnixStream::from(socket))
}
