//! The asynchronous edge: opening a store and everything that can be asked of it.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use object_store::ObjectStore;

use crate::backend::{Address, Backend, Created, Listed};
use crate::core::{Access, CONFIG, Core, GC_LOCK, Inner, LEASES, Tuning, random_id};
use crate::error::{Error, Result};
use crate::fetch::{FetchReport, LocalSource};
use crate::gc::{GcReport, IndexReport, Usage};
use crate::hash::Hash;
use crate::hashing::LocalIndex;
use crate::lease::{
    CONFIG_BYTES_MAX, Config, ConfigVersion, LEASE_BYTES_MAX, Lease, LeaseOwner, ListedLease,
    STORE_VERSION, from_json, to_json,
};
use crate::manifest::{BODY_BYTES_MAX, MANIFEST_HEADER_BYTES, Manifest, ManifestId, Role};
use crate::progress::Progress;
use crate::publish::Publish;
use crate::source::Source;
use crate::tree::{BlobRef, TreeRef};
use crate::verify::VerifyReport;

/// The largest blob, in bytes.
pub const BLOB_BYTES_MAX: u64 = 256 << 20;
pub(crate) const MANIFEST_BYTES_MAX: u64 = BODY_BYTES_MAX + MANIFEST_HEADER_BYTES as u64;

/// An open store. Clones share one index and cost nothing.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

/// A manifest as a listing shows it; a damaged one is shown with the reason.
#[derive(Debug, Clone, PartialEq)]
pub struct ListedManifest {
    /// The object in the store.
    pub object: String,
    /// Its id; none if the object's name is not one.
    pub id: Option<ManifestId>,
    /// What the object's place says it is for.
    pub role: Role,
    /// Length of the object in bytes.
    pub bytes: u64,
    /// Its content, or why it cannot be used.
    pub manifest: Result<Manifest, String>,
}

impl Store {
    /// Creates a store at `url`: a folder (made if missing), `file://` folder or `s3://bucket/prefix`.
    ///
    /// # Errors
    /// [`Error::AlreadyThere`] if there is one; else as [`Store::open`].
    ///
    /// # Durability
    /// When this returns, the store is durable.
    pub async fn init(url: &str) -> Result<()> {
        let address = Address::parse(url)?;
        if let Address::Folder(path) = &address {
            stead_sys::durable::create_dir(path, 0o700).map_err(|source| {
                let source = object_store::Error::Generic {
                    store: "folder",
                    source: Box::new(source),
                };
                Error::backend("create folder", url, source)
            })?;
        }
        init_at(address.connect(url)?).await
    }

    /// Opens the store at `url`. For S3 the usual variables hold (`AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`, `AWS_ALLOW_HTTP`, …); buckets are
    /// addressed by path. Index objects are kept in the folder `cache`.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Credentials`], [`Error::Unsupported`]; opened for writing also
    /// [`Error::ReadOnly`], [`Error::Full`] and [`Error::NoConditionalCreate`].
    pub async fn open(url: &str, cache: &Path, access: Access) -> Result<Self> {
        let backend = Address::parse(url)?.connect(url)?;
        open_at(backend, Some(cache), access, Tuning::default()).await
    }

    /// [`Store::open`], after creating the store if it is missing.
    ///
    /// # Errors
    /// As [`Store::init`] and [`Store::open`].
    pub async fn open_or_init(url: &str, cache: &Path) -> Result<Self> {
        match Self::init(url).await {
            Ok(()) | Err(Error::AlreadyThere { .. }) => {}
            Err(error) => return Err(error),
        }
        Self::open(url, cache, Access::ReadWrite).await
    }

    /// Creates a store in any object store; `url` is only its name in errors.
    ///
    /// # Errors
    /// As [`Store::init`].
    pub async fn init_object_store(store: Arc<dyn ObjectStore>, url: &str) -> Result<()> {
        init_at(Backend::of(store, url)).await
    }

    /// Opens a store in any object store; `url` is only its name in errors.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub async fn with_object_store(
        store: Arc<dyn ObjectStore>,
        url: &str,
        cache: Option<&Path>,
        access: Access,
        tuning: Tuning,
    ) -> Result<Self> {
        open_at(Backend::of(store, url), cache, access, tuning).await
    }

    /// The store's random id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// The address it was opened at.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.inner.backend.url
    }

    /// Runs `operation` on a thread that may block. It goes on to its end even if the answer is no
    /// longer waited for; one with a `Progress` is cancelled then.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        attempted: &'static str,
        operation: impl FnOnce(&Core) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let core = Core {
            inner: Arc::clone(&self.inner),
            io: self.inner.backend.blocking(),
        };
        tokio::task::spawn_blocking(move || operation(&core))
            .await
            .map_err(|source| Error::Worker { attempted, source })?
    }

    /// Begins a publish: writes a lease, then learns which packs must not be used any more.
    ///
    /// # Errors
    /// When the store is read-only or fails.
    pub async fn begin_publish(&self, owner: LeaseOwner) -> Result<Publish> {
        Publish::begin(self, owner).await
    }

    /// All checkpoints, damaged ones included.
    ///
    /// # Errors
    /// When the store cannot be listed.
    pub async fn manifests(&self) -> Result<Vec<ListedManifest>> {
        let operation = |core: &Core| core.manifests(Role::Checkpoint);
        self.run("list checkpoints", operation).await
    }

    /// All templates, damaged ones included.
    ///
    /// # Errors
    /// When the store cannot be listed.
    pub async fn templates(&self) -> Result<Vec<ListedManifest>> {
        let operation = |core: &Core| core.manifests(Role::Template);
        self.run("list templates", operation).await
    }

    /// All backups, damaged ones included.
    ///
    /// # Errors
    /// When the store cannot be listed.
    pub async fn backups(&self) -> Result<Vec<ListedManifest>> {
        let operation = |core: &Core| core.manifests(Role::Backup);
        self.run("list backups", operation).await
    }

    /// The checkpoint, template or backup with this id, or the only one whose id starts so.
    ///
    /// # Errors
    /// [`Error::NoSuchManifest`], [`Error::Ambiguous`], or [`Error::Damaged`].
    pub async fn manifest(&self, id: &str) -> Result<(ManifestId, Manifest)> {
        let id = id.to_owned();
        let operation = move |core: &Core| {
            let (_, id, object) = core.resolve(&id)?;
            let manifest = core.read_manifest(&object, id)?;
            Ok((id, manifest))
        };
        self.run("read a manifest", operation).await
    }

    /// Removes a checkpoint, template or backup; what only it used is deleted by the next gc. A damaged one
    /// can be removed too.
    ///
    /// # Errors
    /// [`Error::NoSuchManifest`] when it is not there, or the store fails.
    ///
    /// # Durability
    /// When this returns, the removal is durable.
    pub async fn remove_manifest(&self, id: ManifestId) -> Result<()> {
        let operation = move |core: &Core| {
            core.check_writable("remove a manifest")?;
            let (_, _, object) = core.resolve(&id.to_string())?;
            core.io.delete(&object)
        };
        self.run("remove a manifest", operation).await
    }

    /// Rebuilds the content of `tree` in `dest`, which is emptied first. Chunks are taken from
    /// `local` sources where those have them. Each chunk is checked against its name before it is
    /// written; zero pages are left as holes. Nothing is synced.
    ///
    /// # Errors
    /// Any damage, with the object and the range; `dest` is then incomplete.
    pub async fn fetch_tree(
        &self,
        tree: &TreeRef,
        dest: &File,
        local: &[LocalSource],
        progress: &Progress,
    ) -> Result<FetchReport> {
        let dest = dest.try_clone().map_err(|source| Error::Destination {
            range: 0..tree.length_bytes,
            source,
        })?;
        let (tree, local, progress) = (*tree, local.to_vec(), progress.clone());
        let dropped = CancelOnDrop::new(&progress);
        let operation = move |core: &Core| core.fetch_tree(&tree, &dest, &local, &progress);
        let report = self.run("fetch a tree", operation).await;
        dropped.disarm();
        report
    }

    /// A small blob, checked against its name.
    ///
    /// # Errors
    /// Any damage, with the object; or that it is longer than 256 MiB.
    pub async fn fetch_blob(&self, blob: &BlobRef) -> Result<Vec<u8>> {
        let tree = blob.0;
        self.run("fetch a blob", move |core| core.fetch_blob(&tree))
            .await
    }

    /// Where the chunks of a local file that holds the content of `tree` are, from the nodes in the
    /// store, without reading the file.
    ///
    /// # Errors
    /// When the nodes cannot be read.
    pub async fn local_index(&self, tree: &TreeRef) -> Result<LocalIndex> {
        let tree = *tree;
        self.run("index a local file", move |core| core.local_index(&tree))
            .await
    }

    /// The ranges in which a local file differs from `tree`, in bytes, ascending, merged.
    ///
    /// # Errors
    /// When the nodes of the tree or the file cannot be read.
    pub async fn locate_damage(
        &self,
        tree: &TreeRef,
        source: Arc<dyn Source>,
        progress: &Progress,
    ) -> Result<Vec<std::ops::Range<u64>>> {
        let (tree, progress) = (*tree, progress.clone());
        let dropped = CancelOnDrop::new(&progress);
        let operation = move |core: &Core| core.locate_damage(&tree, source.as_ref(), &progress);
        let ranges = self.run("locate damage", operation).await;
        dropped.disarm();
        ranges
    }

    /// Reads everything in the store and checks it: every pack, frame, chunk, node, index object and
    /// manifest, and that each manifest is whole.
    ///
    /// # Errors
    /// Only when the store cannot be read; damage is in the report.
    pub async fn verify(&self, progress: &Progress) -> Result<VerifyReport> {
        let progress = progress.clone();
        let dropped = CancelOnDrop::new(&progress);
        let report = self.run("verify", move |core| core.verify(&progress)).await;
        dropped.disarm();
        report
    }

    /// Reads and checks everything that one checkpoint needs, and nothing else.
    ///
    /// # Errors
    /// The first damage found, with the object and the range.
    pub async fn verify_manifest(&self, id: ManifestId, progress: &Progress) -> Result<()> {
        let progress = progress.clone();
        let dropped = CancelOnDrop::new(&progress);
        let operation = move |core: &Core| core.verify_manifest(id, &progress);
        let result = self.run("verify a manifest", operation).await;
        dropped.disarm();
        result
    }

    /// Deletes what no manifest needs. See [`crate::gc`] for why it never deletes too much.
    ///
    /// # Errors
    /// [`Error::GcBlocked`] when a manifest is damaged, [`Error::Locked`] when another gc runs.
    pub async fn gc(&self, owner: LeaseOwner, dry_run: bool) -> Result<GcReport> {
        self.gc_told(owner, dry_run, &Progress::silent()).await
    }

    /// As [`Store::gc`], telling `progress` how far looking for what is in use and rewriting are.
    ///
    /// # Errors
    /// As [`Store::gc`]; [`Error::Cancelled`] when `progress` says so, which it is asked until packs are
    /// deleted. The lock is given back, nothing that was in use is gone, and a later gc goes on.
    pub async fn gc_told(
        &self,
        owner: LeaseOwner,
        dry_run: bool,
        progress: &Progress,
    ) -> Result<GcReport> {
        let progress = progress.clone();
        self.run("gc", move |core| core.gc(&owner, dry_run, &progress))
            .await
    }

    /// Writes the index anew from the packs themselves.
    ///
    /// # Errors
    /// [`Error::Locked`] when a gc runs, or the store fails.
    pub async fn rebuild_index(&self, owner: LeaseOwner) -> Result<IndexReport> {
        let operation = move |core: &Core| core.rebuild_index(&owner);
        self.run("rebuild the index", operation).await
    }

    /// What one checkpoint occupies, and how much of it nothing else needs.
    ///
    /// # Errors
    /// When nodes cannot be read or another manifest is damaged.
    pub async fn usage(&self, id: ManifestId) -> Result<Usage> {
        self.run("measure usage", move |core| core.usage(id)).await
    }

    /// The leases of all publishes that have begun and not ended.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn leases(&self) -> Result<Vec<ListedLease>> {
        self.run("list leases", Core::leases).await
    }

    /// Removes a lease. Only right when its publish is known to be dead: else gc may delete packs
    /// that it is about to name (it notices before it writes its manifest, and fails).
    ///
    /// # Errors
    /// When the store fails; a lease that is gone is no error.
    pub async fn break_lease(&self, id: &str) -> Result<()> {
        let object = format!("{LEASES}/{id}");
        let operation = move |core: &Core| {
            core.check_writable("break a lease")?;
            core.io.delete(&object)
        };
        self.run("break a lease", operation).await
    }

    /// Removes the lock of a gc that is known to be dead.
    ///
    /// # Errors
    /// When the store fails; a lock that is gone is no error.
    pub async fn break_gc_lock(&self) -> Result<()> {
        let operation = |core: &Core| {
            core.check_writable("break the gc lock")?;
            core.io.delete(GC_LOCK)
        };
        self.run("break the gc lock", operation).await
    }

    /// Removes the leases and the gc lock of the worker that `owner` belongs to; gives the number. Call it
    /// where no process of this worker can be publishing; else look at each with [`LeaseOwner::is_dead`].
    ///
    /// # Errors
    /// When the store fails.
    pub async fn remove_leases_of(&self, owner: &LeaseOwner) -> Result<usize> {
        let owner = owner.clone();
        let operation = move |core: &Core| core.remove_leases_of(&owner);
        self.run("remove old leases", operation).await
    }
}

/// Whether a place that a user names is a store: a URL, or a folder with a store's description in it.
#[must_use]
pub fn names_a_store(place: &Path) -> bool {
    place.to_string_lossy().contains("://") || place.join(CONFIG).is_file()
}

/// Cancels an operation whose caller has stopped waiting for it.
pub(crate) struct CancelOnDrop(Option<Progress>);

impl CancelOnDrop {
    pub(crate) fn new(progress: &Progress) -> Self {
        Self(Some(progress.clone()))
    }

    pub(crate) fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(progress) = &self.0 {
            progress.cancel();
        }
    }
}

async fn init_at(backend: Backend) -> Result<()> {
    let io = backend.blocking();
    let attempted = "create a store";
    let operation = move || {
        let (id, _) = random_id()?;
        let config = Config {
            format: STORE_VERSION,
            id,
        };
        match io.create(CONFIG, &to_json(&config).into(), CONFIG_BYTES_MAX)? {
            Created::Ours => Ok(()),
            Created::Theirs(_) => Err(Error::AlreadyThere {
                url: io.url().to_owned(),
            }),
        }
    };
    let done = tokio::task::spawn_blocking(operation).await;
    done.map_err(|source| Error::Worker { attempted, source })?
}

async fn open_at(
    backend: Backend,
    cache: Option<&Path>,
    access: Access,
    tuning: Tuning,
) -> Result<Store> {
    let io = backend.blocking();
    let attempted = "open a store";
    let read = move || {
        let (bytes, config) = read_config(&io)?;
        if access == Access::ReadWrite {
            prove_conditional_create(&io, bytes)?;
        }
        Ok::<_, Error>(config)
    };
    let config = tokio::task::spawn_blocking(read)
        .await
        .map_err(|source| Error::Worker { attempted, source })??;
    let cache = match cache {
        Some(folder) => Some(cache_folder(folder, &config.id)?),
        None => None,
    };
    let inner = Inner::new(backend, cache, access, config.id, tuning);
    let store = Store {
        inner: Arc::new(inner),
    };
    let load = |core: &Core| {
        core.refresh_index()?;
        core.trim_cache();
        Ok(())
    };
    store.run(attempted, load).await?;
    Ok(store)
}

fn cache_folder(folder: &Path, id: &str) -> Result<std::path::PathBuf> {
    let folder = folder.join(id).join("indexes");
    stead_sys::durable::create_dir(&folder, 0o700).map_err(|source| Error::Cache {
        attempted: format!("create the cache folder {}", folder.display()),
        source,
    })?;
    Ok(folder)
}

fn read_config(io: &crate::backend::Io) -> Result<(bytes::Bytes, Config)> {
    let bytes = match io.get(CONFIG, CONFIG_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(Error::ObjectMissing { .. }) => {
            return Err(Error::Missing {
                url: io.url().to_owned(),
                source: None,
            });
        }
        Err(error) => return Err(error),
    };
    if let Ok(version) = lenient_version(&bytes)
        && version != STORE_VERSION
    {
        return Err(Error::Unsupported {
            object: format!("{CONFIG} of {}", io.url()),
            found: version,
            supported: STORE_VERSION,
        });
    }
    let config: Config = from_json(&bytes).map_err(|found| Error::damaged(CONFIG, found))?;
    let proper = config.id.len() == 32 && config.id.bytes().all(|b| b.is_ascii_hexdigit());
    if !proper {
        return Err(Error::damaged(
            CONFIG,
            "an id that is not 32 hexadecimal digits",
        ));
    }
    Ok((bytes, config))
}

fn lenient_version(bytes: &[u8]) -> Result<u32, String> {
    from_json::<ConfigVersion>(bytes).map(|config| config.format)
}

/// Creates the description that is already there: that must be refused, and shows that the store
/// can be written to. A store that does not honour the condition writes the same bytes again.
fn prove_conditional_create(io: &crate::backend::Io, config: bytes::Bytes) -> Result<()> {
    if io.refuses_to_overwrite(CONFIG, config)? {
        return Ok(());
    }
    Err(Error::NoConditionalCreate {
        url: io.url().to_owned(),
    })
}

impl Core {
    /// The objects in the folder of `role`.
    pub(crate) fn list_manifests(&self, role: Role) -> Result<Vec<Listed>> {
        self.io.list(role.folder())
    }

    /// All manifests of a role; one that is removed while this runs is left out.
    pub(crate) fn manifests(&self, role: Role) -> Result<Vec<ListedManifest>> {
        let listed = self.list_manifests(role)?;
        let parallel = self.tuning().parallel_reads;
        let read = self.io.get_many(&listed, MANIFEST_BYTES_MAX, parallel);
        let mut manifests = Vec::new();
        for (object, bytes) in listed.into_iter().zip(read) {
            let id = object.name.parse().ok();
            let manifest = match (bytes, id) {
                (Ok(bytes), Some(id)) => decode_as(&bytes, id, role),
                (Ok(_), None) => Err("its name is not the name of a manifest".to_owned()),
                (Err(Error::ObjectMissing { .. }), _) => continue,
                (Err(Error::Damaged { found, .. }), _) => Err(found),
                (Err(error), _) => return Err(error),
            };
            manifests.push(ListedManifest {
                object: object.path,
                id,
                role,
                bytes: object.bytes,
                manifest,
            });
        }
        Ok(manifests)
    }

    /// The only manifest whose id starts with `prefix`: role, id and object.
    pub(crate) fn resolve(&self, prefix: &str) -> Result<(Role, ManifestId, String)> {
        let mut found = Vec::new();
        for role in Role::ALL {
            for object in self.list_manifests(role)? {
                if let Ok(id) = object.name.parse::<ManifestId>()
                    && object.name.starts_with(prefix)
                {
                    found.push((role, id, object.path));
                }
            }
        }
        let prefix = prefix.to_owned();
        match (found.pop(), found.is_empty()) {
            (None, _) => Err(Error::NoSuchManifest { prefix }),
            (Some(only), true) => Ok(only),
            (Some(last), false) => {
                found.push(last);
                let candidates = found.iter().map(|(_, id, _)| id.to_string()).collect();
                Err(Error::Ambiguous { prefix, candidates })
            }
        }
    }

    pub(crate) fn read_manifest(&self, object: &str, id: ManifestId) -> Result<Manifest> {
        let bytes = self.io.get(object, MANIFEST_BYTES_MAX)?;
        let role = Role::ALL
            .into_iter()
            .find(|role| object.starts_with(role.folder()))
            .unwrap_or(Role::Checkpoint);
        decode_as(&bytes, id, role).map_err(|found| Error::damaged(object, found))
    }

    pub(crate) fn leases(&self) -> Result<Vec<ListedLease>> {
        let listed = self.io.list(LEASES)?;
        let mut leases = Vec::new();
        for object in listed {
            let lease = match self.io.get(&object.path, LEASE_BYTES_MAX) {
                Ok(bytes) => from_json(&bytes),
                Err(Error::ObjectMissing { .. }) => continue,
                Err(Error::Damaged { found, .. }) => Err(found),
                Err(error) => return Err(error),
            };
            leases.push(ListedLease {
                id: object.name,
                lease,
            });
        }
        Ok(leases)
    }

    fn remove_leases_of(&self, owner: &LeaseOwner) -> Result<usize> {
        self.check_writable("remove old leases")?;
        let mut removed = 0;
        for ListedLease { id, lease } in self.leases()? {
            if lease.is_ok_and(|lease| lease.owner.same_worker(owner)) {
                self.io.delete(&format!("{LEASES}/{id}"))?;
                removed += 1;
            }
        }
        if self
            .gc_lock_holder()?
            .is_some_and(|lease| lease.owner.same_worker(owner))
        {
            self.io.delete(GC_LOCK)?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Who holds the gc lock.
    pub(crate) fn gc_lock_holder(&self) -> Result<Option<Lease>> {
        match self.io.get(GC_LOCK, LEASE_BYTES_MAX) {
            Ok(bytes) => lease_of(&bytes).map(Some),
            Err(Error::ObjectMissing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What the gc lock says.
pub(crate) fn lease_of(bytes: &[u8]) -> Result<Lease> {
    from_json(bytes).map_err(|found| Error::damaged(GC_LOCK, found))
}

fn decode_as(bytes: &[u8], id: ManifestId, role: Role) -> Result<Manifest, String> {
    let manifest = Manifest::decode_named(bytes, id)?;
    if manifest.role == role {
        return Ok(manifest);
    }
    Err(format!(
        "it is in {} and says that it is none",
        role.folder()
    ))
}

/// The path of a manifest.
pub(crate) fn manifest_path(role: Role, id: ManifestId) -> String {
    format!("{}/{id}", role.folder())
}

/// The id of a manifest object.
pub(crate) fn manifest_id(object: &[u8]) -> ManifestId {
    ManifestId(Hash::of(object))
}
