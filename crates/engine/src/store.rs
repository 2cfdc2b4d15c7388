//! What the store holds, as this worker shows it: checkpoints, scrubbing, garbage collection.

use serde::{Deserialize, Serialize};
use stead_store::{
    Access, Error, GcReport, Lease, LeaseOwner, ListedManifest, Manifest, ManifestId, Role, Store,
};
use stead_sys::process::ProcessId;

use crate::error::{AtFile, EngineError, Kind, MAKE_ROOM, Result};
use crate::event::Watch;
use crate::machine::MachineRecord;
use crate::records::{from_json, parse_process};
use crate::worker::Worker;
use crate::{Engine, exclusion};

/// What a manifest's `machine` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CheckpointBody {
    pub machine: MachineRecord,
    /// How the device state is to be loaded; absent for a disk-only checkpoint.
    pub state_format: Option<stead_vmm::StateFormat>,
    /// Whether it is a hibernation.
    pub hibernation: bool,
}

/// A disk or the RAM of a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct DiskInfo {
    /// vda, vdb, … or `ram`.
    pub name: String,
    /// What the guest sees, in bytes.
    pub size_bytes: u64,
    /// The name of the content: the root of its hash tree, 64 hex digits.
    pub content: String,
}

/// A checkpoint as it is shown.
#[derive(Debug, Clone, Serialize)]
pub struct CheckpointInfo {
    /// 64 hex digits: the BLAKE3 of the manifest.
    pub id: String,
    /// Its name.
    pub name: Option<String>,
    /// RFC 3339.
    pub created: String,
    /// `full`, `disk-only` or `hibernation`; with `, crash-consistent` behind it when neither the guest's
    /// processes stood still nor its file systems were frozen.
    pub kind: String,
    /// Name or id of the sandbox it was taken of.
    pub sandbox: String,
    /// Id of that sandbox.
    pub sandbox_id: String,
    /// The checkpoint before it.
    pub parent: Option<String>,
    /// The template its sandbox came from.
    pub template: String,
    /// QEMU, machine type, CPU model and accelerator.
    pub producer: String,
    /// Its disks.
    pub disks: Vec<DiskInfo>,
    /// Its RAM.
    pub ram: Option<DiskInfo>,
    /// Stored bytes that no other checkpoint or template uses; only where one checkpoint is shown.
    pub unique_bytes: Option<u64>,
    /// Whether parts of it lie on this worker.
    pub local: bool,
    /// Why it cannot be used, if its manifest cannot be read.
    pub damage: Option<String>,
}

/// What scrubbing the store found.
#[derive(Debug, Clone, Serialize)]
pub struct ScrubReport {
    /// Objects read.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is damaged, and which checkpoints that hits.
    pub damaged: Vec<String>,
}

/// What collecting garbage did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GcSummary {
    /// Stored bytes given back, or that would be.
    pub freed_bytes: u64,
    /// Objects removed, or that would be.
    pub removed_objects: u64,
    /// Publishers that must end first; with their leases' ids.
    pub waiting_for: Vec<String>,
}

/// What a rebuild of the store's index found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct IndexSummary {
    /// Packs that the new index names.
    pub packs: u64,
    /// Chunks and nodes in them.
    pub chunks: u64,
    /// Index objects replaced.
    pub replaced_objects: u64,
    /// Packs whose own tables are damaged, with the reason.
    pub damaged: Vec<String>,
}

impl Engine {
    /// The URL of the store.
    #[must_use]
    pub fn store_url(&self) -> String {
        match &self.settings.store {
            Some(url) => url.clone(),
            None => self.dir.default_store().display().to_string(),
        }
    }

    /// Makes the named folder or bucket prefix a store and returns its URL.
    ///
    /// # Errors
    /// [`Kind::Conflict`] when it is one already.
    pub async fn init_store(&self) -> Result<String> {
        let url = self.store_url();
        Store::init(&url)
            .await
            .map_err(|source| store_error(format!("make {url} a store"), source))?;
        Ok(url)
    }

    /// The store, opened at first use. The default store is made when it is not there.
    pub(crate) async fn store(&self) -> Result<&Store> {
        self.store
            .get_or_try_init(|| async {
                let url = self.store_url();
                if self.settings.store.is_none() && !self.dir.default_store().exists() {
                    self.init_store().await?;
                }
                Store::open(&url, &self.dir.cache(), Access::ReadWrite)
                    .await
                    .map_err(|source| {
                        store_error(format!("open store {url}"), source)
                            .next("see that --store (STEAD_STORE) names it and that it can be written to; sandboxes run on without it")
                    })
            })
            .await
    }

    fn worker(&self) -> Result<&Worker> {
        if let Some(worker) = self.worker.get() {
            return Ok(worker);
        }
        let worker = Worker::of(&self.dir)?;
        Ok(self.worker.get_or_init(|| worker))
    }

    /// Who we are to other users of the store.
    pub(crate) fn lease_owner(&self) -> Result<LeaseOwner> {
        let process = ProcessId::own().at("read the own process's entry in", "/proc")?;
        let worker = self.worker()?;
        Ok(LeaseOwner {
            worker: worker.id.clone(),
            boot: worker.boot.clone(),
            process: process.to_string(),
            host: host_name(),
            data_dir: self.dir.root().display().to_string(),
        })
    }

    /// Whether the holder of a lease or of the gc lock is of this worker and known to be dead.
    fn is_dead(&self, holder: &LeaseOwner) -> Result<bool> {
        let (own, worker) = (self.lease_owner()?, self.worker()?);
        holder.is_dead(&own, &worker.earlier_boots, |process| {
            parse_process(process)?.is_alive().map_err(|source| {
                EngineError::internal("look for a lease's process", "").because(source)
            })
        })
    }

    /// Takes away leases of this worker whose process is gone, and those of this process.
    pub(crate) async fn remove_own_leases(&self) -> Result<()> {
        let own = self.lease_owner()?;
        let store = self.store().await?;
        self.remove_leases(store, |holder| Ok(*holder == own || self.is_dead(holder)?))
            .await
    }

    /// Takes away what dead commands of this worker left in a store.
    pub(crate) async fn remove_dead_leases(&self, store: &Store) -> Result<()> {
        self.remove_leases(store, |holder| self.is_dead(holder))
            .await
    }

    /// Takes away the leases of which `left` says that nobody holds them any more.
    async fn remove_leases(
        &self,
        store: &Store,
        left: impl Fn(&LeaseOwner) -> Result<bool>,
    ) -> Result<()> {
        let leases = store
            .leases()
            .await
            .map_err(|source| store_error("list the store's leases", source))?;
        for listed in leases {
            let Ok(lease) = listed.lease else { continue };
            if left(&lease.owner)? {
                store
                    .break_lease(&listed.id)
                    .await
                    .map_err(|source| store_error(format!("remove lease {}", listed.id), source))?;
            }
        }
        Ok(())
    }

    /// Every checkpoint in the store, damaged ones with the reason.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn checkpoints(&self) -> Result<Vec<CheckpointInfo>> {
        let local = self.local_ids().await?;
        let entries = self
            .store()
            .await?
            .manifests()
            .await
            .map_err(|source| store_error("list checkpoints", source))?;
        let mut all: Vec<CheckpointInfo> = entries
            .into_iter()
            .map(|entry| {
                let id = entry.id.map_or(entry.object, |id| id.to_string());
                let here = local.contains(&id);
                match entry.manifest {
                    Ok(manifest) => info_of(id, &manifest, here),
                    Err(why) => damaged_info(id, why, here),
                }
            })
            .collect();
        all.sort_by(|a, b| (&a.created, &a.id).cmp(&(&b.created, &b.id)));
        Ok(all)
    }

    /// One checkpoint with its unique bytes.
    ///
    /// # Errors
    /// When there is none or more than one of that name, or it is damaged.
    pub async fn checkpoint(&self, name: &str) -> Result<CheckpointInfo> {
        let (id, manifest) = self.manifest(name).await?;
        let here = self.local_ids().await?.contains(&id.to_string());
        let usage = self
            .store()
            .await?
            .usage(id)
            .await
            .map_err(|source| store_error(format!("measure checkpoint {name}"), source))?;
        let mut info = info_of(id.to_string(), &manifest, here);
        info.unique_bytes = Some(usage.unique_stored_bytes);
        Ok(info)
    }

    /// Finds a checkpoint by name, by id, or by an id's unique beginning.
    pub(crate) async fn manifest(&self, name: &str) -> Result<(ManifestId, Manifest)> {
        match self.find_manifest(Role::Checkpoint, name).await? {
            Some(found) => Ok(found),
            None => Err(self.no_checkpoint(name).await?),
        }
    }

    /// Why no checkpoint has this name: a damaged manifest cannot say what it is called.
    async fn no_checkpoint(&self, name: &str) -> Result<EngineError> {
        let entries = self.store().await?.manifests().await;
        let damaged: Vec<String> = entries
            .map_err(|source| store_error("list what the store has", source))?
            .into_iter()
            .filter(|entry| entry.manifest.is_err())
            .map(|entry| entry.object)
            .collect();
        let Some(first) = damaged.first() else {
            return Ok(EngineError::not_found(
                "checkpoint",
                name,
                "`stead checkpoint ls`",
            ));
        };
        Ok(EngineError::new(
            Kind::Damaged,
            format!("find checkpoint {name}"),
            format!(
                "no readable manifest has this name or id, and {} cannot be read, the first is {first}",
                damaged.len()
            ),
        )
        .left("nothing was started")
        .next("`stead checkpoint ls` says what is wrong with each"))
    }

    pub(crate) async fn find_manifest(
        &self,
        role: Role,
        name: &str,
    ) -> Result<Option<(ManifestId, Manifest)>> {
        let store = self.store().await?;
        let listed = match role {
            Role::Checkpoint => store.manifests().await,
            Role::Template => store.templates().await,
            Role::Backup => store.backups().await,
        };
        let entries = listed.map_err(|source| store_error("list what the store has", source))?;
        let fits = |entry: &&ListedManifest| {
            let named = entry
                .manifest
                .as_ref()
                .is_ok_and(|manifest| manifest.name.as_deref() == Some(name));
            let by_id =
                name.len() >= 4 && entry.id.is_some_and(|id| id.to_string().starts_with(name));
            named || by_id
        };
        let found: Vec<_> = entries.iter().filter(fits).collect();
        match found.as_slice() {
            [] => Ok(None),
            [one] => match (&one.manifest, one.id) {
                (Ok(manifest), Some(id)) => Ok(Some((id, manifest.clone()))),
                (found, _) => Err(EngineError::new(
                    Kind::Damaged,
                    format!("read the manifest of {name}, {}", one.object),
                    found.as_ref().err().cloned().unwrap_or_default(),
                )
                .left("nothing was started")
                .next("`stead verify` says what else in the store is damaged")),
            },
            several => Err(EngineError::usage(
                format!("find {name}"),
                format!(
                    "several are called so: {}",
                    several
                        .iter()
                        .map(|entry| entry.object.clone())
                        .collect::<Vec<_>>()
                        .join(", ")
                ),
            )
            .next("give the id")),
        }
    }

    async fn local_ids(&self) -> Result<std::collections::HashSet<String>> {
        Ok(self
            .records
            .local_checkpoints()
            .await?
            .into_iter()
            .map(|(id, _)| id)
            .collect())
    }

    /// Removes a checkpoint from the store and its parts from this worker.
    ///
    /// # Errors
    /// When a sandbox, of this or another worker, is hibernated in it; `force` lifts that for other
    /// workers' sandboxes.
    pub async fn checkpoint_remove(&self, name: &str, force: bool) -> Result<()> {
        let id = match self.find_manifest(Role::Checkpoint, name).await {
            Ok(Some((id, manifest))) => {
                // Asked of the JSON itself: one that this version cannot run can be removed all the same.
                if !force && manifest.machine["hibernation"] == true {
                    return Err(is_hibernation(name, &manifest));
                }
                id
            }
            Ok(None) => {
                return Err(EngineError::not_found(
                    "checkpoint",
                    name,
                    "`stead checkpoint ls`",
                ));
            }
            // A damaged one may go too, by its full id.
            Err(error) if error.kind() == Kind::Damaged => name.parse().map_err(|_short| error)?,
            Err(error) => return Err(error),
        };
        self.watch.step("checkpoint rm", format!("remove {name}"));
        let text = id.to_string();
        for sandbox in self.records.sandboxes().await? {
            if sandbox.hibernated_as.as_deref() == Some(&text) {
                return Err(EngineError::new(
                    Kind::Conflict,
                    format!("remove checkpoint {name}"),
                    format!("sandbox {} is hibernated in it", sandbox.name),
                )
                .left("nothing was changed")
                .next(format!("wake or remove {} first", sandbox.name)));
            }
        }
        self.remove_from_store(name, &text).await?;
        self.sweep().await
    }

    /// Removes a manifest and forgets what of it lies here; the next sweep takes the files.
    pub(crate) async fn remove_from_store(&self, name: &str, id: &str) -> Result<()> {
        let attempt = format!("remove checkpoint {name}");
        let parsed = id
            .parse()
            .map_err(|source| EngineError::internal(attempt.clone(), "").because(source))?;
        self.store()
            .await?
            .remove_manifest(parsed)
            .await
            .map_err(|source| store_error(attempt, source))?;
        self.records.remove_local_checkpoint(id).await?;
        let lock = self.fetch_lock(id);
        stead_sys::durable::remove_file(&lock).at("remove", &lock)
    }

    /// Held while a checkpoint's parts are brought here.
    pub(crate) fn fetch_lock(&self, checkpoint: &str) -> std::path::PathBuf {
        self.dir.locks().join(format!("fetch-{checkpoint}"))
    }

    /// Reads every byte in the store and compares it with its name.
    ///
    /// # Errors
    /// When the store cannot be read; damage is reported, not an error.
    pub async fn scrub(&self) -> Result<ScrubReport> {
        let report = self
            .store()
            .await?
            .verify(&self.progress_of("verify"))
            .await
            .map_err(|source| store_error("verify the store", source))?;
        Ok(ScrubReport {
            objects: report.packs + report.index_objects + report.manifests,
            bytes: report.pack_bytes,
            damaged: damage_lines(&report),
        })
    }

    /// Gives back the room of what nothing refers to, in the store and on this worker.
    ///
    /// # Errors
    /// When the store cannot be read or written.
    pub async fn gc(&self, dry_run: bool, break_leases: &[String]) -> Result<GcSummary> {
        self.recover().await?;
        let store = self.store().await?;
        for lease in break_leases {
            store
                .break_lease(lease)
                .await
                .map_err(|source| store_error(format!("break lease {lease}"), source))?;
        }
        if !dry_run {
            self.watch.step("gc", "sweep this worker");
            self.remove_dead_leases(self.store().await?).await?;
            self.forget_removed_checkpoints().await?;
            self.sweep().await?;
        }
        self.watch.check("collect garbage")?;
        let report = self.collect(dry_run).await?;
        Ok(GcSummary {
            freed_bytes: if dry_run {
                report.dead_bytes
            } else {
                report.deleted_bytes
            },
            removed_objects: report.dead_packs,
            waiting_for: report.waiting_for.iter().map(lease_line).collect(),
        })
    }

    async fn collect(&self, dry_run: bool) -> Result<GcReport> {
        let store = self.store().await?;
        self.watch.step("gc", "look for what is in use");
        self.alone_in_store("gc", "collect garbage", move |own| async move {
            let progress = self.progress_of("gc");
            store.gc_told(own, dry_run, &progress).await
        })
        .await
    }

    /// Writes the store's index anew from the packs themselves. Checkpoints are not changed.
    ///
    /// # Errors
    /// When another worker collects garbage, or the store cannot be read or written.
    pub async fn rebuild_index(&self) -> Result<IndexSummary> {
        let store = self.store().await?;
        self.watch.step("rebuild-index", "read every pack's table");
        let report = self
            .alone_in_store("rebuild-index", "rebuild the store's index", |own| {
                store.rebuild_index(own)
            })
            .await?;
        Ok(IndexSummary {
            packs: report.packs,
            chunks: report.chunks,
            replaced_objects: report.replaced_objects,
            damaged: report
                .damaged_packs
                .iter()
                .map(|(object, found)| format!("{object}: {found}"))
                .collect(),
        })
    }

    /// Runs what only one program may do in a store at a time; the lock that one of this worker left when it
    /// was killed does not stand in the way.
    async fn alone_in_store<T, F>(
        &self,
        purpose: &str,
        attempt: &str,
        work: impl Fn(LeaseOwner) -> F,
    ) -> Result<T>
    where
        F: Future<Output = stead_store::Result<T>>,
    {
        let own = self.lease_owner()?;
        let failed = |source| store_error(attempt, source).left("nothing that is in use is gone");
        let path = self.dir.locks().join("gc");
        let wait = self.settings.wait;
        let _lock = exclusion::lock(&path, "the store", purpose, wait, &self.watch).await?;
        match work(own.clone()).await {
            Err(Error::Locked { holder, .. }) if self.is_dead(&holder.owner)? => {
                let store = self.store().await?;
                store.break_gc_lock().await.map_err(failed)?;
                work(own).await.map_err(failed)
            }
            other => other.map_err(failed),
        }
    }

    /// Local parts of checkpoints that another worker removed from the store.
    async fn forget_removed_checkpoints(&self) -> Result<()> {
        let in_store: std::collections::HashSet<String> = self
            .store()
            .await?
            .manifests()
            .await
            .map_err(|source| store_error("list checkpoints", source))?
            .into_iter()
            .filter_map(|entry| Some(entry.id?.to_string()))
            .collect();
        let sandboxes = self.records.sandboxes().await?;
        let woken_from = |id: &str| {
            sandboxes
                .iter()
                .any(|sandbox| sandbox.hibernated_as.as_deref() == Some(id))
        };
        for (id, _) in self.records.local_checkpoints().await? {
            let is_there = crate::save::image_is_there(&id)
                .unwrap_or_else(|| in_store.contains(&id) || woken_from(&id));
            if !is_there {
                self.records.remove_local_checkpoint(&id).await?;
            }
        }
        Ok(())
    }

    /// Passes the store's progress on to whoever watches, and their wish to stop back.
    pub(crate) fn progress_of(&self, what: &'static str) -> stead_store::Progress {
        progress_to(self.watch.clone(), what)
    }
}

pub(crate) fn progress_to(watch: Watch, what: &'static str) -> stead_store::Progress {
    stead_store::Progress::new(move |step| {
        watch.progress(what, step.done_bytes, step.total_bytes);
        if watch.is_cancelled() {
            std::ops::ControlFlow::Break(())
        } else {
            std::ops::ControlFlow::Continue(())
        }
    })
}

fn is_hibernation(name: &str, manifest: &Manifest) -> EngineError {
    let sandbox = manifest.lineage.sandbox.as_ref();
    let owner = sandbox.map_or("a sandbox".to_owned(), |sandbox| {
        format!("sandbox {}", sandbox.name.as_deref().unwrap_or(&sandbox.id))
    });
    EngineError::new(
        Kind::Conflict,
        format!("remove checkpoint {name}"),
        format!("{owner} is hibernated in it, on this worker or on another"),
    )
    .left("nothing was changed")
    .next("wake or remove that sandbox first; `--force` when its worker is gone for good")
}

pub(crate) fn body_of(id: &ManifestId, manifest: &Manifest) -> Result<CheckpointBody> {
    from_json("machine of the manifest", &manifest.machine.to_string()).map_err(|error| {
        EngineError::new(
            Kind::Incompatible,
            format!("read checkpoint {id}"),
            "it was made by another version of stead",
        )
        .because(error)
    })
}

pub(crate) fn info_of(id: String, manifest: &Manifest, local: bool) -> CheckpointInfo {
    let hibernation = manifest.machine["hibernation"].as_bool() == Some(true);
    let kind = match (manifest.kind, manifest.crash_consistent, hibernation) {
        (stead_store::Kind::Full, false, true) => "hibernation",
        (stead_store::Kind::Full, true, true) => "hibernation, crash-consistent",
        (stead_store::Kind::Full, false, false) => "full",
        (stead_store::Kind::Full, true, false) => "full, crash-consistent",
        (stead_store::Kind::DiskOnly, false, _) => "disk-only",
        (stead_store::Kind::DiskOnly, true, _) => "disk-only, crash-consistent",
    };
    let producer = &manifest.producer;
    let sandbox = manifest.lineage.sandbox.as_ref();
    CheckpointInfo {
        id,
        name: manifest.name.clone(),
        created: manifest.created.to_string(),
        kind: kind.to_owned(),
        sandbox: sandbox
            .map(|sandbox| sandbox.name.clone().unwrap_or_else(|| sandbox.id.clone()))
            .unwrap_or_default(),
        sandbox_id: sandbox
            .map(|sandbox| sandbox.id.clone())
            .unwrap_or_default(),
        parent: manifest.lineage.parent.map(|id| id.to_string()),
        template: manifest
            .lineage
            .template
            .map(|id| id.to_string())
            .unwrap_or_default(),
        producer: format!(
            "QEMU {} {} {} {}",
            producer.qemu_version.as_deref().unwrap_or("?"),
            producer.machine_type,
            producer.cpu_model,
            producer.accelerator
        ),
        disks: manifest
            .disks
            .iter()
            .map(|disk| DiskInfo {
                name: disk.id.clone(),
                size_bytes: disk.virtual_size_bytes,
                content: disk.tree.root.to_string(),
            })
            .collect(),
        ram: manifest.ram.map(|tree| DiskInfo {
            name: "ram".to_owned(),
            size_bytes: tree.length_bytes,
            content: tree.root.to_string(),
        }),
        unique_bytes: None,
        local,
        damage: None,
    }
}

fn damaged_info(id: String, why: String, local: bool) -> CheckpointInfo {
    CheckpointInfo {
        id,
        name: None,
        created: String::new(),
        kind: String::new(),
        sandbox: String::new(),
        sandbox_id: String::new(),
        parent: None,
        template: String::new(),
        producer: String::new(),
        disks: Vec::new(),
        ram: None,
        unique_bytes: None,
        local,
        damage: Some(why),
    }
}

/// An error of the store, with the class that its cause deserves.
pub(crate) fn store_error(attempt: impl Into<String>, source: stead_store::Error) -> EngineError {
    let kind = match &source {
        Error::Damaged { .. } | Error::ObjectMissing { .. } | Error::Unknown { .. } => {
            Kind::Damaged
        }
        Error::Full { .. } => Kind::NoSpace,
        Error::NoSuchManifest { .. } => Kind::NotFound,
        Error::Ambiguous { .. } | Error::Invalid { .. } | Error::BadUrl { .. } => Kind::Usage,
        Error::AlreadyThere { .. } | Error::Locked { .. } => Kind::Conflict,
        Error::Cancelled => Kind::Cancelled,
        Error::Source { .. }
        | Error::Destination { .. }
        | Error::Cache { .. }
        | Error::Worker { .. } => Kind::Internal,
        Error::Missing { .. }
        | Error::Unsupported { .. }
        | Error::ReadOnly { .. }
        | Error::Credentials { .. }
        | Error::NoConditionalCreate { .. }
        | Error::Backend { .. }
        | Error::LeaseLost { .. }
        | Error::LockLost { .. }
        | Error::PublishBroken
        | Error::GcBlocked { .. } => Kind::Store,
    };
    let next = what_helps(&source);
    EngineError::new(kind, attempt, "")
        .because(source)
        .next(next)
}

/// What to do about an error of the store.
fn what_helps(error: &stead_store::Error) -> &'static str {
    match error {
        Error::Damaged { .. } | Error::ObjectMissing { .. } => {
            "`stead verify` says what else is damaged and which checkpoints that hits; bring the object back from a copy of the store, or remove those checkpoints"
        }
        Error::Unknown { .. } => {
            "`stead store rebuild-index` finds it if a pack still has it; `stead verify` says which checkpoints need it"
        }
        Error::GcBlocked { .. } => {
            "`stead store rebuild-index` repairs a damaged index; damaged checkpoints must be brought back or removed (`stead checkpoint rm ID`) first"
        }
        Error::Full { .. } => MAKE_ROOM,
        Error::NoSuchManifest { .. } => "`stead checkpoint ls` lists what there is",
        Error::Ambiguous { .. } => "give the id",
        Error::Invalid { .. } | Error::BadUrl { .. } => {
            "`stead COMMAND --help` says what is possible"
        }
        Error::AlreadyThere { .. } => "use it as it is, or name another with --store",
        Error::Locked { .. } => {
            "wait until it has ended; if its host is gone for good, remove the store's object `gc-lock`"
        }
        Error::Cancelled => "run it again when you want it",
        Error::Source { .. } | Error::Destination { .. } | Error::Cache { .. } => {
            "see that the file's disk is sound, and try again"
        }
        Error::Worker { .. } => "try again with -v; if it stays, report it",
        Error::Missing { .. } => {
            "see that --store (STEAD_STORE) names it; `stead store init` makes a new one there"
        }
        Error::Unsupported { .. } => "use a newer version of stead",
        Error::ReadOnly { .. } => "make it writable for this user, or name another with --store",
        Error::Credentials { .. } => "see the AWS_* variables",
        Error::NoConditionalCreate { .. } => {
            "use a server that honours conditional puts, or a folder"
        }
        Error::Backend { .. } => "see that the store can be reached, and try again",
        Error::LeaseLost { .. } | Error::LockLost { .. } | Error::PublishBroken => "try again",
    }
}

fn damage_lines(report: &stead_store::VerifyReport) -> Vec<String> {
    let objects = report
        .damaged_objects
        .iter()
        .map(|damaged| format!("{}: {}", damaged.object, damaged.found));
    let manifests = report.damaged_manifests.iter().map(|damaged| {
        let more = match damaged.more_reasons {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        format!("{}: {}{more}", damaged.object, damaged.reasons.join("; "))
    });
    objects.chain(manifests).collect()
}

fn lease_line(listed: &stead_store::ListedLease) -> String {
    match &listed.lease {
        Ok(Lease { owner, started }) => format!(
            "lease {} of {} {} process {} since {started}, worker {}",
            listed.id, owner.host, owner.data_dir, owner.process, owner.worker
        ),
        Err(why) => format!("lease {}: {why}", listed.id),
    }
}

fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use stead_sys::durable::{self, Existing};

    use super::*;
    use crate::Settings;

    /// A process that is not there: nothing starts at the first tick.
    const GONE: &str = "1@0";
    const EARLIER: &str = "0b0c5a52-0000-4000-8000-000000000000/4026531836";

    async fn engine(folder: &tempfile::TempDir) -> Engine {
        let boots = folder.path().join("boots");
        let text = format!("{EARLIER}\n");
        durable::publish(&boots, 0o600, text.as_bytes(), Existing::Replace).expect("boots");
        let settings = Settings {
            data_dir: folder.path().to_owned(),
            store: None,
            wait: Duration::ZERO,
            template_cache: None,
        };
        Engine::open(settings, Watch::silent()).await.expect("open")
    }

    /// Holders by what they are, and whether they are dead. All have our host's and folder's names.
    fn holders(own: &LeaseOwner) -> Vec<(&'static str, LeaseOwner, bool)> {
        let holder = |worker: &str, boot: &str, process: &str| LeaseOwner {
            worker: worker.to_owned(),
            boot: boot.to_owned(),
            process: process.to_owned(),
            ..own.clone()
        };
        let other = "f".repeat(32);
        let elsewhere = "ffffffff-0000-4000-8000-000000000000/4026531836";
        vec![
            ("ours, running", own.clone(), false),
            ("ours, gone", holder(&own.worker, &own.boot, GONE), true),
            (
                "ours, rebooted",
                holder(&own.worker, EARLIER, &own.process),
                true,
            ),
            ("a clone", holder(&other, elsewhere, GONE), false),
            ("a clone, earlier", holder(&other, EARLIER, GONE), false),
            (
                "in another container",
                holder(&other, &own.boot, GONE),
                false,
            ),
            (
                "cloned with its folder",
                holder(&own.worker, elsewhere, GONE),
                false,
            ),
        ]
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn gc_breaks_the_leases_of_this_workers_dead_processes_and_no_others() {
        let folder = tempfile::tempdir().expect("folder");
        let engine = engine(&folder).await;
        let store = engine.store().await.expect("store");
        let own = engine.lease_owner().expect("owner");
        for (what, holder, dead) in holders(&own) {
            let publish = store.begin_publish(holder).await.expect(what);
            std::mem::forget(publish);
            engine.gc(false, &[]).await.expect(what);
            let left = store.leases().await.expect(what);
            assert_eq!(left.is_empty(), dead, "{what}");
            let ids: Vec<String> = left.into_iter().map(|lease| lease.id).collect();
            engine.gc(false, &ids).await.expect(what);
            let left = store.leases().await.expect(what);
            assert!(left.is_empty(), "{what}: broken by the operator");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn gc_breaks_the_lock_of_this_workers_dead_processes_and_no_others() {
        let folder = tempfile::tempdir().expect("folder");
        let engine = engine(&folder).await;
        let store = engine.store().await.expect("store");
        let lock = folder.path().join("store/gc-lock");
        for (what, owner, dead) in holders(&engine.lease_owner().expect("owner")) {
            let started = jiff::Timestamp::UNIX_EPOCH;
            let lease = Lease { owner, started };
            let text = serde_json::to_vec(&lease).expect("JSON");
            durable::publish(&lock, 0o600, &text, Existing::Replace).expect("lock");
            match engine.gc(false, &[]).await {
                Ok(_) => assert!(dead && !lock.exists(), "{what}"),
                Err(error) => {
                    assert_eq!((error.kind(), dead), (Kind::Conflict, false), "{what}");
                    assert_eq!(std::fs::read(&lock).expect("lock"), text, "{what}");
                }
            }
            store.break_gc_lock().await.expect(what);
        }
    }
}
