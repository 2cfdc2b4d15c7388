//! The instant of a backup: a running sandbox's disks go on in new layers, all at once, and what they had is not written
//! any more.
//!
//! A bitmap begins in each new layer before QEMU opens it, so it names everything that is written from that instant on.
//! A sandbox that does not run has its instant already.

use std::path::Path;

use stead_qcow2::LayerFile;
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::bitmap::{self, Action, Step};
use stead_sys::lock::FileLock;

use crate::Engine;
use crate::error::{EngineError, Result};
use crate::layers;
use crate::records::{Sandbox, SandboxState};
use crate::sandbox::wrong_state;

/// A disk at the instant of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupDisk {
    /// Its name in the sandbox, for instance `vda`.
    pub disk: String,
    /// Its layers, the topmost first. Nobody writes to them while the [`BackupInstant`] lives.
    pub layers: Vec<LayerFile>,
}

/// All disks of a sandbox at one instant; nobody else works on the sandbox while this lives.
#[derive(Debug)]
pub struct BackupInstant {
    /// The sandbox's name.
    pub sandbox: String,
    /// Whether the sandbox runs on in new layers. If not, the topmost layers are the ones that it will write to.
    pub frozen: bool,
    /// Whether the disks are as a power failure would have left them: nothing was frozen in the guest.
    pub crash_consistent: bool,
    /// The disks.
    pub disks: Vec<BackupDisk>,
    _lock: FileLock,
}

/// Begins a bitmap in a new overlay.
pub(super) fn begin_bitmap(overlay: &Path, name: &[u8]) -> Result<()> {
    let begin = Step {
        bitmap: name,
        action: Action::Add {
            granularity_bits: None,
            enabled: true,
        },
    };
    let begun = Editor::open(overlay, EditOptions::default())
        .and_then(|mut editor| bitmap::change(&mut editor, &[begin]));
    begun.map(drop).map_err(|source| {
        let attempt = format!("begin a bitmap in {}", overlay.display());
        EngineError::new(layers::kind_of(&source), attempt, "").because(source)
    })
}

impl Engine {
    /// Takes the instant of a backup of all disks of a sandbox. `begin` says for a disk's name which bitmap begins with it.
    ///
    /// # Durability
    /// When this returns, the new layers are recorded; a crash later changes nothing of the sandbox.
    ///
    /// # Errors
    /// When the sandbox is hibernated or not there, there is no room, or QEMU fails. A running sandbox runs on.
    pub async fn backup_instant(
        &self,
        name: &str,
        begin: &(dyn Fn(&str) -> Option<Vec<u8>> + Sync),
    ) -> Result<BackupInstant> {
        let (lock, sandbox) = self.lock_sandbox(name, "backup").await?;
        let frozen = match sandbox.state {
            SandboxState::Running => true,
            SandboxState::Stopped | SandboxState::Crashed => false,
            SandboxState::Creating | SandboxState::Hibernated => {
                return Err(wrong_state("back up", &sandbox, "its disks are not here")
                    .next("wake it, or take its state from the store"));
            }
        };
        let (disks, crash_consistent) = match frozen {
            true => self.freeze_for_backup(sandbox.clone(), begin).await?,
            false => {
                let crashed = sandbox.state == SandboxState::Crashed;
                (self.layers_of(&sandbox).await?, crashed)
            }
        };
        Ok(BackupInstant {
            sandbox: sandbox.name,
            frozen,
            crash_consistent,
            disks,
            _lock: lock,
        })
    }

    async fn freeze_for_backup(
        &self,
        sandbox: Sandbox,
        begin: &(dyn Fn(&str) -> Option<Vec<u8>> + Sync),
    ) -> Result<(Vec<BackupDisk>, bool)> {
        let mut plan = self.plan_capture(sandbox, None, true, false).await?;
        let bitmaps = plan.disks.iter().map(|(disk, _, _)| begin(disk));
        plan.bitmaps = bitmaps.collect();
        let mut job = self.begin_capture(&plan, "backup").await?;
        let made = async {
            let instant = self.take_instant(&mut job, &plan).await?;
            let mut tx = self.records.begin().await?;
            job.finish(&mut tx).await?;
            tx.commit().await?;
            Ok(instant.crash_consistent)
        }
        .await;
        let crash_consistent = self.undone_on_error(&job, made).await?;
        let mut disks = Vec::new();
        for (disk, old, _) in &plan.disks {
            disks.push(self.backup_disk(disk, &old.id).await?);
        }
        Ok((disks, crash_consistent))
    }

    async fn layers_of(&self, sandbox: &Sandbox) -> Result<Vec<BackupDisk>> {
        let mut disks = Vec::new();
        for disk in self.records.disks(&sandbox.id).await? {
            disks.push(self.backup_disk(&disk.disk, &disk.layer).await?);
        }
        Ok(disks)
    }

    async fn backup_disk(&self, disk: &str, top: &str) -> Result<BackupDisk> {
        let chain = self.records.chain(top).await?;
        Ok(BackupDisk {
            disk: disk.to_owned(),
            layers: layers::files(&self.dir, &chain),
        })
    }
}
