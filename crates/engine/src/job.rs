//! Durable jobs: what an operation has begun is on disk before it is done, so that a crash at any
//! point can be undone by the next command.
//!
//! ```text
//!   begin ──▶ step ──▶ step ──▶ … ──▶ finish      the row goes in the same transaction that makes
//!     │         │                                 the result valid
//!     └── error, or the process dies ──▶ undo     by the same code, now or at the next start
//! ```
//!
//! The row names every resource *before* it is created ([`Undo`]). Undoing needs no memory of how
//! far the operation came: what is named and not referred to by a valid record is taken away.

use serde::{Deserialize, Serialize};
use sqlx::SqliteConnection;
use stead_sys::process::ProcessId;

use crate::compact::CompactUndo;
use crate::error::{AtFile, Result};
use crate::event::{Event, Watch};
use crate::id;
use crate::records::{JobRow, Records, to_json};

/// What an operation may have created or changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Undo {
    /// QEMU processes started, by their run folders.
    pub launches: Vec<String>,
    /// Sandboxes that are not valid before the job is finished.
    pub sandboxes: Vec<String>,
    /// Layer files created.
    pub layers: Vec<String>,
    /// Files created under `ram/`.
    pub ram: Vec<String>,
    /// Files created under `blobs/`.
    pub blobs: Vec<String>,
    /// Folders created under `build/`.
    pub builds: Vec<String>,
    /// A running sandbox whose disks are being put under new layers, or which may stand paused.
    pub capture: Option<CaptureUndo>,
    /// Whether a lease in the store may be left.
    pub lease: bool,
    /// Layers whose files are being replaced by ones that took others in.
    #[serde(default)]
    pub compact: Option<CompactUndo>,
    /// A sandbox whose QEMU may read other files than the records name, which show the same.
    #[serde(default)]
    pub follow: Option<String>,
    /// States in the store that nothing will wake from any more.
    pub hibernations: Option<Hibernations>,
}

/// What a sandbox hibernated into, except the state it is to wake from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hibernations {
    pub sandbox: String,
    pub except: Option<String>,
}

/// A capture under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CaptureUndo {
    pub sandbox: String,
    /// For each disk in order: its name, the layer written to before, the layer meant to take over.
    pub disks: Vec<(String, String, String)>,
}

/// A job under way in this process.
#[derive(Debug)]
pub(crate) struct Job {
    id: String,
    kind: &'static str,
    records: Records,
    watch: Watch,
    /// What the row names, to add to; undoing reads the row.
    undo: Undo,
}

impl Job {
    /// Records the job and what it is about to create.
    pub(crate) async fn begin(
        records: &Records,
        watch: &Watch,
        kind: &'static str,
        sandbox: Option<&str>,
        undo: Undo,
    ) -> Result<Self> {
        let id = id::long()?;
        let owner = ProcessId::own().at("read the own process's entry in", "/proc")?;
        records
            .insert_job(&JobRow {
                id: id.clone(),
                kind: kind.to_owned(),
                sandbox: sandbox.map(str::to_owned),
                step: "begin".to_owned(),
                detail: to_json(&undo)?,
                owner: owner.to_string(),
            })
            .await?;
        let job = Self {
            id,
            kind,
            records: records.clone(),
            watch: watch.clone(),
            undo,
        };
        crash_point(kind, "begin");
        Ok(job)
    }

    /// Records that `step` begins. Fails if the caller wants to stop.
    pub(crate) async fn step(&self, step: &'static str) -> Result<()> {
        self.watch.check(self.kind)?;
        self.records.set_job_step(&self.id, step).await?;
        self.watch.tell(Event::Step {
            job: self.kind.to_owned(),
            step: step.to_owned(),
        });
        crash_point(self.kind, step);
        Ok(())
    }

    /// Names more that the job is about to create.
    pub(crate) async fn also(&mut self, add: impl FnOnce(&mut Undo)) -> Result<()> {
        let mut undo = self.undo.clone();
        add(&mut undo);
        let mut tx = self.records.begin().await?;
        self.turn(&mut tx, &undo).await?;
        tx.commit().await?;
        self.undo = undo;
        Ok(())
    }

    /// Replaces what undoing would take away, in a transaction that the caller commits.
    pub(crate) async fn turn(&self, tx: &mut SqliteConnection, undo: &Undo) -> Result<()> {
        Records::set_job_detail(tx, &self.id, &to_json(undo)?).await
    }

    /// The job's id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Ends the job in the transaction that makes its result valid. The caller commits.
    pub(crate) async fn finish(&self, tx: &mut SqliteConnection) -> Result<()> {
        crash_point(self.kind, "finish");
        Records::remove_job(tx, &self.id).await
    }
}

/// For tests: `STEAD_CRASH_AT=checkpoint:publish` makes the process kill itself as that step begins, as `kill -9`
/// would, and `STEAD_STOP_AT` makes it stop there until it is continued. Only in builds with the feature
/// `crash-points`.
#[cfg(feature = "crash-points")]
pub(crate) fn crash_point(kind: &str, step: &str) {
    let is_here =
        |name: &str| std::env::var(name).is_ok_and(|wanted| wanted == format!("{kind}:{step}"));
    if is_here("STEAD_CRASH_AT")
        && let Ok(own) = ProcessId::own()
    {
        drop(own.kill());
        loop {
            std::thread::park();
        }
    }
    if is_here("STEAD_STOP_AT") {
        let stopped =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
        assert!(
            stopped.is_ok(),
            "an own process can be stopped: {stopped:?}"
        );
    }
}

/// Nothing, in builds for users.
#[cfg(not(feature = "crash-points"))]
pub(crate) fn crash_point(_kind: &str, _step: &str) {}
