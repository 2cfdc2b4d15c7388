//! Backups in a store: which there are, and their way back.
//!
//! A backup is a manifest of the role [`Role::Backup`] with one disk; its `machine` are the [`Facts`]. The content is a
//! tree of its own, whole without any other backup, though most of its chunks are shared with others. So what is
//! listed can be restored, and removing one takes nothing from another. [`vault`] makes them.

mod vault;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use stead_backup::{
    BackupError, Facts, Listed, RestoreReport, RestoreRequest, State, Told, Verdict, restore_with,
};
use stead_qcow2::Chain;
use stead_store::{
    Access, ListedManifest, Manifest, ManifestId, Progress, Role, Source, Store, TreeRef,
};
use tokio::runtime::Handle;

pub use vault::StoreVault;

use crate::error::{EngineError, Kind, Result};
use crate::event::Watch;
use crate::store::{progress_to, store_error};
use crate::{Engine, paths::DataDir};

/// What is shown of a disk, as the store reads it.
struct Shown(Arc<Chain>);

impl Source for Shown {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.0.next_data(at).map_err(io::Error::other)
    }

    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(at, buffer).map_err(io::Error::other)
    }
}

/// A backup in a store.
#[derive(Debug, Clone)]
struct Kept {
    manifest: ManifestId,
    tree: TreeRef,
    facts: Facts,
}

/// The backups in a store, as they were when it was opened.
#[derive(Debug)]
pub struct StoreBackups {
    store: Store,
    url: String,
    watch: Watch,
    runtime: Handle,
    /// By the backup's id.
    kept: BTreeMap<String, Kept>,
    /// The name of each manifest that cannot be used, and why.
    damaged: Vec<(String, String)>,
}

/// Says of a failure what a backup's error says.
fn told(error: &EngineError) -> BackupError {
    let kind = match error.kind() {
        Kind::Internal | Kind::Agent => stead_backup::Kind::Internal,
        Kind::Usage => stead_backup::Kind::Usage,
        Kind::NotFound => stead_backup::Kind::NotFound,
        Kind::Conflict => stead_backup::Kind::Conflict,
        Kind::Damaged => stead_backup::Kind::Damaged,
        Kind::Incompatible => stead_backup::Kind::Incompatible,
        Kind::NoSpace => stead_backup::Kind::NoSpace,
        Kind::Store => stead_backup::Kind::Store,
        Kind::Vm => stead_backup::Kind::Vm,
        Kind::Cancelled => stead_backup::Kind::Cancelled,
    };
    BackupError::new(kind, error.attempt(), error.found()).next(error.next_step())
}

fn failed(attempt: impl Into<String>, source: stead_store::Error) -> BackupError {
    told(&store_error(attempt, source))
}

fn kept(id: ManifestId, manifest: &Manifest) -> Told<Kept> {
    let facts: Facts = serde_json::from_value(manifest.machine.clone())
        .map_err(|error| format!("it is of another version of stead: {error}"))?;
    if let Some(why) = facts.refusal(&facts.id) {
        return Err(why);
    }
    let [disk] = manifest.disks.as_slice() else {
        return Err(format!("{} disks in one backup", manifest.disks.len()));
    };
    if disk.virtual_size_bytes != facts.disk_bytes {
        return Err("the disk's length is not the one in its record".to_owned());
    }
    Ok(Kept {
        manifest: id,
        tree: disk.tree,
        facts,
    })
}

impl Engine {
    /// The backups in the store at `url`.
    ///
    /// # Errors
    /// When there is no store, or it cannot be read; for `access` to write, also when it cannot be written.
    pub async fn backups(&self, url: &str, access: Access) -> Result<StoreBackups> {
        StoreBackups::open(url, &self.dir, access, self.watch.clone()).await
    }

    /// Where a new backup goes into the store at `url`. Leases that dead commands of this worker left are removed.
    ///
    /// # Errors
    /// As [`Engine::backups`].
    pub async fn backup_vault(&self, url: &str, crash_consistent: bool) -> Result<StoreVault> {
        let backups = self.backups(url, Access::ReadWrite).await?;
        self.remove_dead_leases(&backups.store).await?;
        Ok(StoreVault::new(
            backups,
            self.lease_owner()?,
            crash_consistent,
        ))
    }
}

impl StoreBackups {
    async fn open(url: &str, dir: &DataDir, access: Access, watch: Watch) -> Result<Self> {
        let attempt = || format!("open the store {url}");
        let store = Store::open(url, &dir.cache(), access)
            .await
            .map_err(|source| store_error(attempt(), source))?;
        let listed = store.backups().await;
        let listed = listed.map_err(|source| store_error(attempt(), source))?;
        let mut backups = Self {
            store,
            url: url.to_owned(),
            watch,
            runtime: Handle::current(),
            kept: BTreeMap::new(),
            damaged: Vec::new(),
        };
        listed.into_iter().for_each(|one| backups.add(one));
        Ok(backups)
    }

    fn add(&mut self, listed: ListedManifest) {
        assert!(listed.role == Role::Backup, "only backups were listed");
        let found = match (&listed.manifest, listed.id) {
            (Ok(manifest), Some(id)) => kept(id, manifest),
            (Ok(_), None) => Err("its name is not the name of a manifest".to_owned()),
            (Err(why), _) => Err(why.clone()),
        };
        match found {
            Ok(kept) => drop(self.kept.insert(kept.facts.id.clone(), kept)),
            Err(why) => {
                let name = listed.id.map_or(listed.object, |id| id.to_string());
                self.damaged.push((name, why));
            }
        }
    }

    /// All backups, oldest first; of one that is damaged, the manifest's name and the reason.
    #[must_use]
    pub fn list(&self) -> Vec<Listed> {
        let whole = self.kept.values().map(|kept| Listed {
            id: kept.facts.id.clone(),
            record: Some(kept.facts.clone()),
            state: State::Complete,
            depth: 0,
        });
        let damaged = self.damaged.iter().map(|(object, why)| Listed {
            id: object.clone(),
            record: None,
            state: State::Broken(why.clone()),
            depth: 0,
        });
        let mut all: Vec<Listed> = whole.chain(damaged).collect();
        stead_backup::sort(&mut all);
        all
    }

    fn find(&self, wanted: &str) -> stead_backup::Result<&Kept> {
        let all = self.kept.values().map(|kept| &kept.facts);
        let all: Vec<_> = all
            .map(|facts| (facts.id.clone(), Some(facts.clone())))
            .collect();
        let id = stead_backup::find(&self.url, &all, wanted)?;
        Ok(&self.kept[&id])
    }

    /// Reads backups whole: one, or all.
    ///
    /// # Errors
    /// When there is no such backup, or the store cannot be read. Damage is no error: it is in the verdicts.
    pub async fn verify(&self, wanted: Option<&str>) -> Result<Vec<Verdict>> {
        let wanted: Vec<&Kept> = match wanted {
            Some(wanted) => vec![self.find(wanted)?],
            None => self.kept.values().collect(),
        };
        let all = self
            .damaged
            .iter()
            .filter(|_| wanted.len() == self.kept.len());
        let mut verdicts: Vec<Verdict> = all
            .map(|(object, why)| Verdict {
                id: object.clone(),
                whole: false,
                damage: vec![why.clone()],
            })
            .collect();
        for kept in wanted {
            verdicts.push(self.verdict(kept).await?);
        }
        Ok(verdicts)
    }

    async fn verdict(&self, kept: &Kept) -> Result<Verdict> {
        let progress = self.progress("verify");
        let read = self.store.verify_manifest(kept.manifest, &progress).await;
        let damage = match read {
            Ok(()) => Vec::new(),
            Err(source) => {
                let error = store_error(format!("verify {}", kept.facts.id), source);
                if error.kind() != Kind::Damaged {
                    return Err(error);
                }
                vec![error.found()]
            }
        };
        Ok(Verdict {
            id: kept.facts.id.clone(),
            whole: damage.is_empty(),
            damage,
        })
    }

    /// Removes a backup, or a damaged one by the whole name that a list gives it; its id. What only it used is deleted by the
    /// next gc.
    ///
    /// # Errors
    /// When there is no such backup, or the store cannot be written.
    ///
    /// # Durability
    /// When this returns `Ok`, it is gone.
    pub async fn remove(&self, wanted: &str) -> Result<String> {
        let is_it = |(name, _): &&(String, String)| name == wanted;
        let damaged = self.damaged.iter().find(is_it);
        let damaged = damaged.and_then(|(name, _)| name.parse().ok());
        let (id, manifest) = match damaged {
            Some(manifest) => (wanted.to_owned(), manifest),
            None => {
                let kept = self.find(wanted)?;
                (kept.facts.id.clone(), kept.manifest)
            }
        };
        let removed = self.store.remove_manifest(manifest).await;
        removed.map_err(|source| store_error(format!("remove the backup {id}"), source))?;
        Ok(id)
    }

    /// Makes the disk of a backup again. Blocks, and must not be called from an asynchronous task.
    ///
    /// # Durability
    /// When this returns `Ok`, every chunk had the hash that it is named by, the disk was read back whole and has the same
    /// ones, and it was synced with its name.
    ///
    /// # Errors
    /// When there is no such backup, anything of it is missing or damaged, there is no room, or the target is there and
    /// may not be replaced. There is no new file then, and an earlier one is as it was.
    pub fn restore(
        &self,
        request: &RestoreRequest,
        watch: stead_backup::Watch<'_>,
    ) -> stead_backup::Result<RestoreReport> {
        watch.step(stead_backup::Step::Plan);
        let kept = self.find(&request.backup)?;
        let attempt = format!("restore {}", kept.facts.id);
        let fetched = |file: &std::fs::File| {
            let progress = self.progress("copy");
            let fetch = self.store.fetch_tree(&kept.tree, file, &[], &progress);
            let fetched = self.runtime.block_on(fetch);
            fetched
                .map(drop)
                .map_err(|source| failed(&*attempt, source))
        };
        let damage = |disk: Arc<Chain>| {
            let progress = self.progress("read back");
            let located = self
                .store
                .locate_damage(&kept.tree, Arc::new(Shown(disk)), &progress);
            let wrong = self.runtime.block_on(located);
            let wrong = wrong.map_err(|source| failed(&*attempt, source))?;
            Ok(wrong.first().map(|at| {
                let (start, end) = (at.start, at.end);
                format!("the bytes from {start:#x} to {end:#x} are not those that were backed up")
            }))
        };
        restore_with(request, kept.facts.clone(), fetched, damage, watch)
    }

    fn progress(&self, what: &'static str) -> Progress {
        progress_to(self.watch.clone(), what)
    }
}

/// Whether a place that a user names is a store and not a folder of backups.
#[must_use]
pub fn names_a_store(place: &Path) -> bool {
    stead_store::names_a_store(place)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use stead_store::{ChunkSize, Disk, Hash, Lineage, Producer};

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef";

    fn manifest(machine: Value) -> Manifest {
        let tree = TreeRef {
            root: Hash::of(b"root"),
            length_bytes: 1 << 20,
            chunk_size: ChunkSize::DISK,
        };
        Manifest {
            role: Role::Backup,
            name: None,
            created: jiff::Timestamp::UNIX_EPOCH,
            kind: stead_store::Kind::DiskOnly,
            crash_consistent: false,
            lineage: Lineage::default(),
            producer: Producer::default(),
            disks: vec![Disk {
                id: "disk".to_owned(),
                tree,
                virtual_size_bytes: tree.length_bytes,
            }],
            ram: None,
            device_state: None,
            kernel: None,
            initrd: None,
            machine,
        }
    }

    /// As docs/store-format.md has it.
    fn record() -> Value {
        json!({
            "bitmap": "daily", "changed-bytes": 65536, "disk": "/disk.qcow2", "disk-bytes": 1 << 20, "id": ID,
            "kind": "full", "parent": null, "stored-bytes": 700, "time": "1970-01-01T00:00:00.000000000Z",
            "why-full": null,
        })
    }

    fn found(manifest: &Manifest) -> Told<Kept> {
        kept(ManifestId(Hash::of(b"manifest")), manifest)
    }

    #[test]
    fn a_backup_s_record_is_the_json_of_the_format_and_comes_back_as_it_was() {
        let manifest = manifest(record());
        let object = manifest.encode().expect("encoded");
        let read = Manifest::decode(&object).expect("decoded");
        let kept = found(&read).expect("a backup");
        assert_eq!(serde_json::to_value(&kept.facts).expect("JSON"), record());
        assert_eq!(kept.tree, manifest.disks[0].tree);
    }

    #[test]
    fn a_record_that_contradicts_itself_or_its_manifest_is_refused() {
        for (key, value) in [
            ("disk-bytes", json!(512)),
            ("id", json!("../../etc/passwd")),
            ("kind", json!("incremental")),
            ("parent", json!(ID)),
            ("changed-bytes", json!(-1)),
            ("new-key", json!(1)),
        ] {
            let mut record = record();
            record[key] = value;
            assert!(found(&manifest(record)).is_err(), "{key}");
        }
        assert!(found(&manifest(Value::Null)).is_err());
        let mut two = manifest(record());
        let mut second = two.disks[0].clone();
        second.id = "other".to_owned();
        two.disks.push(second);
        assert!(found(&two).is_err());
    }
}
