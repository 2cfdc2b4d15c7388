//! A VM that runs: its process and its control connection.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use stead_sys::process::ProcessId;

use crate::dir;
use crate::disks::{self, BlockGraph, DiskChain};
use crate::error::{Error, Result};
use crate::launch::Layer;
use crate::migration;
use crate::process::{Exit, Process};
use crate::qmp::{Event, Qmp};
use crate::relayer;
use crate::state_stream::{self, StateFormat};

/// How long QEMU may take to greet a new connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long loading state may take.
const LOAD_WITHIN: Duration = Duration::from_secs(120);
/// How long a killed process may take to end.
const KILL_WITHIN: Duration = Duration::from_secs(10);

/// What a VM does now (QMP `RunState`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub enum RunState {
    /// vCPUs run.
    Running,
    /// Stopped on request, or loaded and not yet resumed.
    Paused,
    /// Never ran yet.
    Prelaunch,
    /// Waits for state or is loading it.
    InMigrate,
    /// State is being saved while the vCPUs stand still.
    FinishMigrate,
    /// State was saved; the disks are given up until the VM is resumed.
    PostMigrate,
    /// Stopped because a disk failed or its host file system is full; resuming tries again.
    IoError,
    /// The guest has shut down.
    Shutdown,
    /// Any other, in QEMU's word.
    Other(String),
}

impl RunState {
    pub(crate) fn require(
        self,
        allowed: &[Self],
        operation: &'static str,
        needed: &'static str,
    ) -> Result<()> {
        if allowed.contains(&self) {
            return Ok(());
        }
        Err(Error::RunState {
            operation,
            needed,
            found: self.to_string(),
        })
    }
}

impl From<String> for RunState {
    fn from(word: String) -> Self {
        match word.as_str() {
            "running" => Self::Running,
            "paused" => Self::Paused,
            "prelaunch" => Self::Prelaunch,
            "inmigrate" => Self::InMigrate,
            "finish-migrate" => Self::FinishMigrate,
            "postmigrate" => Self::PostMigrate,
            "io-error" => Self::IoError,
            "shutdown" => Self::Shutdown,
            _ => Self::Other(word),
        }
    }
}

impl std::fmt::Display for RunState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Prelaunch => "prelaunch",
            Self::InMigrate => "inmigrate",
            Self::FinishMigrate => "finish-migrate",
            Self::PostMigrate => "postmigrate",
            Self::IoError => "io-error",
            Self::Shutdown => "shutdown",
            Self::Other(word) => word,
        })
    }
}

#[derive(Deserialize)]
struct Status {
    status: RunState,
}

/// A VM's process and our connection to it.
///
/// Dropping it leaves the VM as it is. QEMU serves one control connection at a time: a second
/// [`Vm::connect`] waits for the first value to be dropped.
#[derive(Debug)]
pub struct Vm {
    dir: PathBuf,
    process: Process,
    qmp: Qmp,
}

impl Vm {
    pub(crate) fn new(dir: PathBuf, process: Process, qmp: Qmp) -> Self {
        Self { dir, process, qmp }
    }

    /// Connects to the VM whose process is `id` and whose folder is `dir`.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when that very process is gone; [`Error::Unanswered`] when another
    /// program holds the connection; [`Error::Protocol`] when another process listens there.
    pub fn connect(dir: &Path, id: ProcessId) -> Result<Self> {
        let process = Process::find(id)?;
        let stream = dir::connect(dir, dir::QMP_SOCKET)?;
        let peer =
            rustix::net::sockopt::socket_peercred(&stream).map_err(|error| Error::System {
                what: "ask who listens on the control socket",
                source: error.into(),
            })?;
        if peer.pid.as_raw_nonzero().get() != id.pid {
            return Err(Error::Protocol {
                doing: "connecting to the VM".to_owned(),
                found: format!(
                    "process {} listens, expected {id}",
                    peer.pid.as_raw_nonzero()
                ),
            });
        }
        let qmp = Qmp::negotiate(stream, CONNECT_WITHIN)?;
        Ok(Self::new(dir.to_owned(), process, qmp))
    }

    /// The process.
    #[must_use]
    pub fn process(&self) -> ProcessId {
        self.process.id()
    }

    /// The VM's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The control connection, for commands that have no method here (block jobs, bitmaps).
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Executes a QMP command; when the process has ended meanwhile, the error says so and why.
    ///
    /// # Errors
    /// As [`Qmp::execute`], and [`Error::Died`].
    pub fn ask<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T> {
        let answer = self.qmp.execute(command, arguments);
        answer.map_err(|error| self.explain(error))
    }

    /// Turns a broken connection into [`Error::Died`] if the process has ended.
    pub(crate) fn explain(&self, error: Error) -> Error {
        if matches!(error, Error::Connection { .. }) {
            return self.process.explain(error, &self.dir);
        }
        error
    }

    /// What the VM does now.
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub fn status(&mut self) -> Result<RunState> {
        Ok(self.ask::<Status>("query-status", json!({}))?.status)
    }

    /// Lets the vCPUs run and makes sure that they do.
    ///
    /// # Errors
    /// [`Error::RunState`] when QEMU agreed and the VM still does not run; else as [`Vm::ask`].
    pub fn resume(&mut self) -> Result<()> {
        self.ask::<Value>("cont", json!({}))?;
        self.status()?
            .require(&[RunState::Running], "resume", "running afterwards")
    }

    /// Stops the vCPUs; disk requests are finished and flushed when this returns.
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub fn stop(&mut self) -> Result<()> {
        self.ask::<Value>("stop", json!({}))?;
        Ok(())
    }

    /// Asks the guest to power itself off (ACPI button). Whether it does is its own decision; see
    /// [`Vm::wait_exit`].
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub fn powerdown(&mut self) -> Result<()> {
        self.ask::<Value>("system_powerdown", json!({}))?;
        Ok(())
    }

    /// Ends the process in order: disks are flushed and closed. The guest is not asked.
    ///
    /// # Errors
    /// [`Error::Unanswered`] when it still runs after `within`; else as [`Vm::ask`].
    pub fn quit(&mut self, within: Duration) -> Result<Exit> {
        match self.qmp.execute_within::<Value>("quit", json!({}), within) {
            // A connection that breaks is how a quit may look.
            Ok(_) | Err(Error::Connection { .. }) => {}
            Err(error) => return Err(error),
        }
        self.wait_exit(within)?.ok_or(Error::Unanswered {
            command: "quit".to_owned(),
            within,
        })
    }

    /// Kills the process and waits for its end.
    ///
    /// # Errors
    /// When the signal may not be sent, or the process does not end within 10 s.
    pub fn kill(&mut self) -> Result<Exit> {
        self.process().kill().map_err(|source| Error::System {
            what: "kill QEMU",
            source,
        })?;
        self.wait_exit(KILL_WITHIN)?.ok_or(Error::Unanswered {
            command: "SIGKILL".to_owned(),
            within: KILL_WITHIN,
        })
    }

    /// Waits for the process to end; `None` when it still runs after `within`.
    ///
    /// # Errors
    /// When the process cannot be watched.
    pub fn wait_exit(&self, within: Duration) -> Result<Option<Exit>> {
        self.process.wait(within)
    }

    /// The chain of every disk as QEMU has it open.
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub fn disks(&mut self) -> Result<Vec<DiskChain>> {
        let graph = BlockGraph::query(&mut self.qmp).map_err(|error| self.explain(error))?;
        graph.chains()
    }

    /// Reopens every layer below the tops read-only, proves it, and gives the chains.
    ///
    /// Layers that already are read-only are left alone, so this can be repeated.
    ///
    /// # Errors
    /// [`Error::NotFrozen`] when a layer stays open for writing; else as [`Vm::ask`].
    pub fn freeze_layers(&mut self) -> Result<Vec<DiskChain>> {
        disks::freeze(&mut self.qmp).map_err(|error| self.explain(error))
    }

    /// Makes QEMU read `disk` through the files of `wanted` (base first), whose topmost one it has open and writes
    /// to already; the guest runs on.
    ///
    /// A layer that is missing in `wanted` must be part of the one above it there: that file is opened anew over
    /// what stands below it, takes the place of both, and what it replaces is closed. Can be repeated.
    ///
    /// # Errors
    /// [`Error::Disks`] when `wanted` is not the chain with some frozen layers left out, or a new file has another
    /// size. Whatever fails, each layer is read through the old files or the new ones, which show the same.
    pub fn follow_layers(&mut self, disk: &str, wanted: &[Layer]) -> Result<DiskChain> {
        relayer::follow(&mut self.qmp, disk, wanted).map_err(|error| self.explain(error))
    }

    /// Connects to agent port `port`. QEMU serves one connection a port.
    ///
    /// # Errors
    /// When the VM has no such port or its process is gone.
    pub fn connect_agent(&self, port: u8) -> Result<UnixStream> {
        dir::connect(&self.dir, &dir::agent_socket(port))
    }

    /// Events since the last call, oldest first.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.qmp.take_events()
    }

    /// Loads `device_state` into a VM that waits for it ([`crate::Launch::prepare_restore`]); the vCPUs
    /// then stand still at the captured instant.
    ///
    /// The stream is walked to its end first: QEMU itself loads one whose end was cut off.
    ///
    /// # Errors
    /// [`Error::Stream`] before anything is loaded; [`Error::Migration`] with QEMU's reason, after
    /// which the VM is of no use: QEMU ends itself.
    pub fn load_state(&mut self, device_state: &[u8], format: StateFormat) -> Result<()> {
        state_stream::verify(device_state, format)?;
        self.status()?.require(
            &[RunState::InMigrate],
            "load state",
            "waiting for state (inmigrate)",
        )?;
        let loaded = self.feed(device_state, format);
        match loaded.map_err(|error| self.explain(error)) {
            Ok(()) => self.check_loaded(),
            Err(Error::Died {
                log_tail, status, ..
            }) => Err(Error::Migration {
                direction: "loading",
                status: format!("failed (QEMU ended {status})"),
                reason: log_tail,
            }),
            Err(error) => Err(error),
        }
    }

    fn feed(&mut self, device_state: &[u8], format: StateFormat) -> Result<()> {
        let system = |what| move |source| Error::System { what, source };
        let (mut ours, theirs) =
            UnixStream::pair().map_err(system("make a socket pair for the device state"))?;
        migration::set_format(&mut self.qmp, format)?;
        self.qmp
            .give_descriptor(migration::DESCRIPTOR, theirs.as_fd())?;
        drop(theirs);
        migration::start_loading(&mut self.qmp)?;
        ours.set_write_timeout(Some(LOAD_WITHIN))
            .map_err(system("bound the time of sending the device state"))?;
        let sent = ours
            .write_all(device_state)
            .and_then(|()| ours.shutdown(Shutdown::Write));
        let ended = migration::wait_completed(&mut self.qmp, "loading", LOAD_WITHIN);
        // QEMU's reason says more than a broken pipe.
        ended.and(sent.map_err(system("send the device state")))
    }

    fn check_loaded(&mut self) -> Result<()> {
        self.status()?.require(
            &[RunState::Paused, RunState::Prelaunch],
            "load state",
            "paused afterwards",
        )
    }
}
