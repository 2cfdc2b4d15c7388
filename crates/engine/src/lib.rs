//! Sandboxes, templates, checkpoints and forks as durable jobs.
//!
//! The engine puts the crates below it together: it asks [`stead_vmm`] to run and capture machines,
//! [`stead_qcow2`] for layers, [`stead_store`] to publish and fetch, [`stead_agent_link`] to talk to
//! guests, and keeps in one SQLite database what lies on this worker. It never prints.
//!
//! | module | idea |
//! |---|---|
//! | `sandbox` | create, start, stop, remove, list |
//! | `template` | build, import, list, remove |
//! | `capture` | checkpoint and hibernate: one instant, then publish |
//! | `materialise` | bring a checkpoint's parts here and prove them |
//! | `restore` | fork, restore, wake: run proven parts |
//! | `save`, `save_restore` | libvirt's save images: written from a sandbox, and run |
//! | `domain` | a machine as libvirt's XML |
//! | `launch` | one QEMU: files, process, handshake |
//! | `fork_policy` | who the guest of a fork is |
//! | `standstill` | the guest's processes stand still around a capture |
//! | `exec`, `controls`, `sessions` | commands in a guest: run, told, listed, attached to |
//! | `health` | how a guest is |
//! | `compact` | merge layers that nothing needs any more |
//! | `console` | what a guest wrote to its console |
//! | `layers` | layer files and what a guest sees through them |
//! | `job`, `undo` | what survives a crash, and how it is taken back |
//! | `set_aside` | what a hibernation that died with its VM leaves |
//! | `exclusion` | which operations wait for which |
//! | `records` | the database, every statement |
//! | `worker` | who we are to other users of the store |
#![forbid(unsafe_code)]

mod backups;
mod blobs;
mod capture;
mod compact;
mod console;
mod controls;
mod disk_content;
mod doctor;
mod domain;
mod error;
mod event;
mod exclusion;
mod exec;
mod files;
mod fork_policy;
mod health;
mod host;
mod id;
mod job;
mod launch;
mod layers;
mod machine;
mod materialise;
mod paths;
mod records;
mod restore;
mod sandbox;
mod save;
mod save_convert;
mod save_restore;
mod sessions;
mod set_aside;
mod standstill;
mod store;
mod template;
mod undo;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use stead_store::Store;
use stead_sys::lock::FileLock;
use stead_vmm::Qemu;
use tokio::sync::OnceCell;

pub use backups::{StoreBackups, StoreVault, names_a_store};
pub use capture::backup::{BackupDisk, BackupInstant};
pub use capture::{CaptureReport, CheckpointRequest, PauseReport, Workload};
pub use compact::{CompactReport, CompactedDisk, DEPTH_COMPACTED, MergedLayer};
pub use console::Console;
pub use controls::Told;
pub use disk_content::disk_content;
pub use doctor::{Advice, DoctorReport, Finding, doctor};
pub use error::{EngineError, Kind, Result};
pub use event::{Event, MergeEvents, Watch};
pub use exec::{ExecCommand, ExecEnd, ExecOutput, NotStarted};
pub use files::GuestFiles;
pub use fork_policy::ForkPolicy;
pub use health::{Health, HealthState};
pub use host::AcceleratorChoice;
pub use paths::DataDir;
pub use records::{RamSharing, SandboxState};
pub use restore::{RestoreReport, VerifyReport};
pub use sandbox::{CreateRequest, SandboxInfo};
pub use save::{SaveReport, SaveRequest};
pub use save_convert::SavedCheckpoint;
pub use sessions::{SessionInfo, command_key};
pub use stead_agent_link::{ExecIo, ExecKey, Pty, Resource, ResourceLimit};
pub use stead_store::Access;
pub use store::{CheckpointInfo, DiskInfo, GcSummary, IndexSummary, ScrubReport};
pub use template::{BuildRequest, ImportRequest, TemplateInfo, find_agent};

use records::{Records, Sandbox};
use worker::Worker;

/// How a worker is set up.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The worker's folder.
    pub data_dir: PathBuf,
    /// The store's URL; `None` for the folder `store` in the data directory.
    pub store: Option<String>,
    /// How long to wait for another command that works on the same sandbox.
    pub wait: Duration,
    /// Where template builds keep what the next one can use; `None` for the worker's own folder.
    pub template_cache: Option<PathBuf>,
}

impl Settings {
    /// The usual folder: `/var/lib/steadfast` for root, else below the home directory.
    ///
    /// # Errors
    /// When not root and `HOME` is not set.
    pub fn default_data_dir() -> Result<PathBuf> {
        if rustix::process::geteuid().is_root() {
            return Ok(PathBuf::from("/var/lib/steadfast"));
        }
        let home = std::env::var_os("HOME").ok_or_else(|| {
            EngineError::usage("find the data directory", "HOME is not set")
                .next("give --data-dir DIR or set STEAD_DATA_DIR")
        })?;
        Ok(Path::new(&home).join(".local/share/steadfast"))
    }
}

/// One worker.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    dir: DataDir,
    records: Records,
    watch: Watch,
    store: OnceCell<Store>,
    qemu: OnceCell<Qemu>,
    reflinks: OnceLock<bool>,
    worker: OnceLock<Worker>,
}

impl Engine {
    /// Opens the worker and undoes what operations whose process died have left.
    ///
    /// # Errors
    /// When the data directory or its database cannot be used.
    pub async fn open(settings: Settings, watch: Watch) -> Result<Self> {
        let dir = DataDir::open(&settings.data_dir)?;
        let records = Records::open(&dir.database()).await?;
        let engine = Self {
            settings,
            dir,
            records,
            watch,
            store: OnceCell::new(),
            qemu: OnceCell::new(),
            reflinks: OnceLock::new(),
            worker: OnceLock::new(),
        };
        engine.recover().await?;
        engine.shorten_consoles().await?;
        Ok(engine)
    }

    /// Where this worker keeps what.
    #[must_use]
    pub fn data_dir(&self) -> &DataDir {
        &self.dir
    }

    /// Takes a sandbox's lock, undoes what a dead command left of it, and reads it afresh.
    async fn lock_sandbox(&self, name: &str, purpose: &str) -> Result<(FileLock, Sandbox)> {
        let found = self.records.sandbox(name).await?;
        let path = self.lock_path(&found.id);
        let lock = exclusion::lock(
            &path,
            &format!("sandbox {}", found.name),
            purpose,
            self.settings.wait,
            &self.watch,
        )
        .await?;
        self.recover_locked(&found.id).await?;
        let now = self.records.sandbox(&found.id).await?;
        let now = self.notice_crash(now).await?;
        Ok((lock, now))
    }

    /// Takes the lock of a sandbox that is about to be recorded: nobody else knows its id yet, and who
    /// finds it half made waits.
    async fn lock_new(&self, sandbox: &Sandbox, purpose: &str) -> Result<FileLock> {
        exclusion::lock(
            &self.lock_path(&sandbox.id),
            &format!("sandbox {}", sandbox.name),
            purpose,
            self.settings.wait,
            &self.watch,
        )
        .await
    }

    fn lock_path(&self, sandbox: &str) -> PathBuf {
        self.dir.locks().join(format!("sandbox-{sandbox}"))
    }

    /// Records that a sandbox's QEMU is gone, if it is.
    async fn notice_crash(&self, sandbox: Sandbox) -> Result<Sandbox> {
        let Some(process) = sandbox.process else {
            return Ok(sandbox);
        };
        if process.is_alive().map_err(|source| {
            EngineError::internal(format!("look for process {process}"), "").because(source)
        })? {
            return Ok(sandbox);
        }
        // A command may have ended it on purpose meanwhile: only what was seen is recorded.
        self.records.set_crashed(&sandbox.id, process).await?;
        self.records.sandbox(&sandbox.id).await
    }
}

/// Now, as RFC 3339 in UTC.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().to_string()
}

/// Runs work that blocks, so that other tasks go on meanwhile.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(EngineError::internal("run blocking work", "").because(error)),
        },
    }
}
