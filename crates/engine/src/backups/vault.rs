//! A backup on its way into a store: one publish, whose manifest is written last.
//!
//! ```text
//!  lease ─▶ chunks of what changed ─▶ read back ─▶ manifest: from here on there is a backup ─▶ lease removed
//!    └─ an error or a crash: no backup; what was stored is deleted by the next gc
//! ```

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use stead_backup::{BackupError, Facts, Ground, Result, Step, Told, Vault, Watch};
use stead_qcow2::{Bitmap, Chain, LayerFile};
use stead_store::{
    Base, ChunkSize, Disk, LeaseOwner, Lineage, Manifest, ManifestId, Producer, Publish, Role,
    TreeRef,
};

use super::{Shown, StoreBackups, failed};
use crate::job::crash_point;

/// What a disk is called in the manifest of its backup.
const DISK: &str = "disk";
const JOB: &str = "backup-store";

/// A store, and the backup that is being made in it. Its calls block, and must not be made from an asynchronous task.
#[derive(Debug)]
pub struct StoreVault {
    backups: StoreBackups,
    owner: LeaseOwner,
    crash_consistent: bool,
    publish: Option<Publish>,
    copied: Option<Copied>,
    lease_stays: Option<String>,
}

/// What the manifest is going to name.
#[derive(Debug)]
struct Copied {
    tree: TreeRef,
    parent: Option<ManifestId>,
}

/// An earlier backup in the store.
#[derive(Debug)]
pub struct KnownBackup {
    manifest: ManifestId,
    tree: TreeRef,
}

impl StoreVault {
    pub(super) fn new(backups: StoreBackups, owner: LeaseOwner, crash_consistent: bool) -> Self {
        Self {
            backups,
            owner,
            crash_consistent,
            publish: None,
            copied: None,
            lease_stays: None,
        }
    }

    /// Stores the disk's content, of which only `changed` is read where there is a base, and reads that back.
    fn copy(
        &mut self,
        disk: &Arc<Chain>,
        since: Option<(&KnownBackup, Vec<Range<u64>>)>,
        watch: Watch<'_>,
    ) -> Result<()> {
        let Some(publish) = &mut self.publish else {
            unreachable!("the backup has begun");
        };
        let (runtime, backups) = (self.backups.runtime.clone(), &self.backups);
        watch.step(Step::Copy);
        let whole = std::iter::once(0..disk.len()).collect();
        let changed = since.as_ref().map_or(whole, |(_, changed)| changed.clone());
        let base = since.as_ref().map(|(known, changed)| Base {
            tree: known.tree,
            changed: changed.clone(),
        });
        let source = Arc::new(Shown(Arc::clone(disk)));
        let progress = backups.progress("copy");
        let add = publish.add_tree(source.clone(), ChunkSize::DISK, base, &progress);
        let tree = runtime.block_on(add);
        let tree = tree.map_err(|source| failed("copy the disk", source))?;
        crash_point(JOB, "copied");
        watch.step(Step::Prove);
        let progress = backups.progress("read back");
        let read = publish.read_back(&tree, source, changed, &progress);
        let differs = runtime.block_on(read);
        crash_point(JOB, "read-back");
        match differs.map_err(|source| failed("read the backup back", source))? {
            Some(at) => return Err(not_the_disk(&at)),
            None => {
                self.copied = Some(Copied {
                    tree,
                    parent: since.map(|(known, _)| known.manifest),
                });
            }
        }
        Ok(())
    }

    fn manifest(&self, facts: &Facts, copied: &Copied) -> Result<Manifest> {
        let internal = |error: String| {
            BackupError::new(stead_backup::Kind::Internal, "write the manifest", error)
        };
        Ok(Manifest {
            role: Role::Backup,
            name: None,
            created: facts
                .time
                .parse()
                .map_err(|error: jiff::Error| internal(error.to_string()))?,
            kind: stead_store::Kind::DiskOnly,
            crash_consistent: self.crash_consistent,
            lineage: Lineage {
                parent: copied.parent,
                ..Lineage::default()
            },
            producer: Producer::default(),
            disks: vec![Disk {
                id: DISK.to_owned(),
                tree: copied.tree,
                virtual_size_bytes: copied.tree.length_bytes,
            }],
            ram: None,
            device_state: None,
            kernel: None,
            initrd: None,
            machine: serde_json::to_value(facts).map_err(|error| internal(error.to_string()))?,
        })
    }
}

fn not_the_disk(at: &Range<u64>) -> BackupError {
    let (start, end) = (at.start, at.end);
    let found = format!("the bytes from {start:#x} to {end:#x} are not those of the disk");
    BackupError::new(stead_backup::Kind::Damaged, "read the backup back", found)
        .left("the disk was not changed, and there is no new backup")
        .next("see to the storage below the store and the disk")
}

impl Vault for StoreVault {
    type Known = KnownBackup;

    fn place(&self) -> String {
        self.backups.url.clone()
    }

    fn has(&self, id: &str) -> bool {
        self.backups.kept.contains_key(id)
    }

    fn time(&self, id: &str) -> Option<String> {
        let kept = self.backups.kept.get(id)?;
        Some(kept.facts.time.clone())
    }

    /// Whether the tree's nodes can be read is found out here; where its chunks are lost, they are read from the disk.
    fn ground(&self, id: &str) -> Result<Told<Ground<KnownBackup>>> {
        let Some(kept) = self.backups.kept.get(id) else {
            return Ok(Err("it is not in the store".to_owned()));
        };
        let nodes = self.backups.store.local_index(&kept.tree);
        if let Err(error) = self.backups.runtime.block_on(nodes) {
            let error = failed("read the earlier backup", error);
            return match error.kind() == stead_backup::Kind::Damaged {
                true => Ok(Err(error.found().to_owned())),
                false => Err(error),
            };
        }
        Ok(Ok(Ground {
            known: KnownBackup {
                manifest: kept.manifest,
                tree: kept.tree,
            },
            disk_bytes: kept.facts.disk_bytes,
        }))
    }

    fn files(&self, _known: &KnownBackup) -> Vec<LayerFile> {
        Vec::new()
    }

    /// Nothing is taken over from within a chunk, so all chunks must be there, and that is enough.
    fn is_sound(
        &mut self,
        known: &KnownBackup,
        _changed: &Bitmap,
        _watch: Watch<'_>,
    ) -> Result<Told<()>> {
        let Some(publish) = &mut self.publish else {
            unreachable!("the backup has begun");
        };
        let reused = publish.reuse_tree(&known.tree);
        let Err(error) = self.backups.runtime.block_on(reused) else {
            return Ok(Ok(()));
        };
        let error = failed("take over from the earlier backup", error);
        match error.kind() == stead_backup::Kind::Damaged {
            true => Ok(Err(error.found().to_owned())),
            false => Err(error),
        }
    }

    fn begin(&mut self, _id: &str) -> Result<()> {
        let begin = self.backups.store.begin_publish(self.owner.clone());
        let publish = self.backups.runtime.block_on(begin);
        let publish = publish.map_err(|source| failed("begin to publish", source))?;
        self.publish = Some(publish);
        crash_point(JOB, "begun");
        Ok(())
    }

    fn copy_all(&mut self, disk: &Arc<Chain>, watch: Watch<'_>) -> Result<()> {
        self.copy(disk, None, watch)
    }

    fn copy_changed(
        &mut self,
        disk: &Arc<Chain>,
        since: &Ground<KnownBackup>,
        changed: &Bitmap,
        watch: Watch<'_>,
    ) -> Result<Told<()>> {
        let changed = changed.dirty_ranges().collect();
        self.copy(disk, Some((&since.known, changed)), watch)
            .map(Ok)
    }

    fn record(&mut self, mut facts: Facts, watch: Watch<'_>) -> Result<Facts> {
        let (Some(publish), Some(copied)) = (self.publish.take(), &self.copied) else {
            unreachable!("what is recorded was copied and proven");
        };
        watch.step(Step::Record);
        facts.stored_bytes = publish.stored_bytes();
        let manifest = self.manifest(&facts, copied)?;
        let lease = publish.lease_id().to_owned();
        crash_point(JOB, "record");
        let committed = self.backups.runtime.block_on(publish.commit(&manifest));
        let (_, report) = committed.map_err(|source| {
            failed("write the manifest", source).left(
                "the disk was not changed; there is no new backup, unless the store went away just then (`stead backup ls` says)",
            )
        })?;
        crash_point(JOB, "recorded");
        if !report.lease_removed {
            self.lease_stays = Some(lease);
        }
        Ok(facts)
    }

    fn give_up(&mut self) -> Told<()> {
        let Some(publish) = self.publish.take() else {
            return Ok(());
        };
        let lease = publish.lease_id().to_owned();
        let ended = self.backups.runtime.block_on(publish.abort());
        ended.map_err(|error| {
            format!(
                "the lease {lease} stays in the store ({error}), and the next backup removes it"
            )
        })
    }

    fn settle(&mut self) -> Told<()> {
        match self.lease_stays.take() {
            None => Ok(()),
            Some(lease) => Err(format!(
                "the lease {lease} stays in the store; the next backup removes it"
            )),
        }
    }

    fn image(&self) -> Option<PathBuf> {
        None
    }
}
