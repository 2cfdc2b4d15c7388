//! Contents, manifests and stores for the tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::{ObjectStore, ObjectStoreExt};
use stead_store::{
    Access, Base, ChunkSize, Disk, FetchReport, FileSource, Kind, LeaseOwner, Lineage, Manifest,
    ManifestId, Producer, Progress, Publish, PublishReport, Result, Role, Source, Store, TreeRef,
    Tuning,
};

/// Small packs, few threads and one call at a time.
pub const SMALL: Tuning = Tuning {
    threads: 2,
    parallel_reads: 1,
    parallel_writes: 1,
    pack_target_bytes: 256 << 10,
    id_seed: None,
};

pub const CHUNK: u64 = 4096;

pub fn chunk_size() -> ChunkSize {
    ChunkSize::new(CHUNK as u32).unwrap()
}

pub fn owner() -> LeaseOwner {
    LeaseOwner {
        worker: "0123456789abcdef0123456789abcdef".to_owned(),
        boot: "b3f1e0b4-7c5d-4d0e-9a59-3f6a5d0a5a0e/4026531836".to_owned(),
        process: "42@4711".to_owned(),
        host: "host-1".to_owned(),
        data_dir: "/var/lib/steadfast".to_owned(),
    }
}

/// Bytes that look like nothing else, by seed; half of each chunk compresses well.
pub fn noise(bytes: u64, seed: u64) -> Vec<u8> {
    let mut all = vec![0; bytes as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut all);
    for chunk in all.chunks_mut(CHUNK as usize) {
        let half = chunk.len() / 2;
        chunk[half..].fill(seed as u8 | 1);
    }
    all
}

/// Content with holes, in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sparse {
    pub length: u64,
    pub data: BTreeMap<u64, Vec<u8>>,
}

impl Sparse {
    pub fn bytes(&self) -> Vec<u8> {
        let mut all = vec![0; self.length as usize];
        for (at, bytes) in &self.data {
            let end = (*at as usize + bytes.len()).min(all.len());
            let start = (*at as usize).min(end);
            all[start..end].copy_from_slice(&bytes[..end - start]);
        }
        all
    }
}

impl Source for Sparse {
    fn len(&self) -> u64 {
        self.length
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let extents = self
            .data
            .iter()
            .map(|(start, bytes)| *start..(*start + bytes.len() as u64).min(self.length));
        Ok(extents
            .filter(|range| range.end > at && range.start < range.end)
            .map(|range| range.start.max(at)..range.end)
            .min_by_key(|range| range.start))
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let all = self.bytes();
        let end = at as usize + buf.len();
        let bytes = all
            .get(at as usize..end)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

pub async fn new_store(objects: &Arc<dyn ObjectStore>) -> Store {
    Store::init_object_store(Arc::clone(objects), "test")
        .await
        .unwrap();
    reopen(objects).await.unwrap()
}

pub async fn reopen(objects: &Arc<dyn ObjectStore>) -> Result<Store> {
    reopen_with(objects, SMALL).await
}

pub async fn reopen_with(objects: &Arc<dyn ObjectStore>, tuning: Tuning) -> Result<Store> {
    let objects = Arc::clone(objects);
    Store::with_object_store(objects, "test", None, Access::ReadWrite, tuning).await
}

pub async fn memory() -> (Arc<dyn ObjectStore>, Store) {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let store = new_store(&objects).await;
    (objects, store)
}

pub fn folder(path: &Path) -> Arc<dyn ObjectStore> {
    Arc::new(
        LocalFileSystem::new_with_prefix(path)
            .unwrap()
            .with_fsync(true),
    )
}

pub fn manifest(name: &str, tree: TreeRef) -> Manifest {
    Manifest {
        role: Role::Checkpoint,
        name: Some(name.to_owned()),
        created: "2025-01-02T03:04:05Z".parse().unwrap(),
        kind: Kind::DiskOnly,
        crash_consistent: false,
        lineage: Lineage::default(),
        producer: Producer {
            qemu_version: None,
            machine_type: "pc-q35-10.0".to_owned(),
            cpu_model: "max".to_owned(),
            accelerator: "tcg".to_owned(),
            cpus: 1,
            memory_bytes: 256 << 20,
            kernel_command_line: None,
        },
        disks: vec![Disk {
            id: "root".to_owned(),
            tree,
            virtual_size_bytes: tree.length_bytes,
        }],
        ram: None,
        device_state: None,
        kernel: None,
        initrd: None,
        machine: serde_json::json!({}),
    }
}

pub async fn add(publish: &mut Publish, source: impl Source + 'static) -> Result<TreeRef> {
    publish
        .add_tree(Arc::new(source), chunk_size(), None, &Progress::silent())
        .await
}

pub async fn add_on(
    publish: &mut Publish,
    source: impl Source + 'static,
    base: Base,
) -> Result<TreeRef> {
    publish
        .add_tree(
            Arc::new(source),
            chunk_size(),
            Some(base),
            &Progress::silent(),
        )
        .await
}

/// Publishes a checkpoint with one disk.
pub async fn publish(
    store: &Store,
    name: &str,
    source: impl Source + 'static,
) -> Result<(ManifestId, TreeRef, PublishReport)> {
    let mut publish = store.begin_publish(owner()).await?;
    let tree = add(&mut publish, source).await?;
    let (id, report) = publish.commit(&manifest(name, tree)).await?;
    Ok((id, tree, report))
}

/// What a tree holds, fetched into a file and read back.
pub async fn fetch(store: &Store, tree: &TreeRef) -> Result<Vec<u8>> {
    Ok(fetch_file(store, tree).await?.0)
}

pub async fn fetch_file(store: &Store, tree: &TreeRef) -> Result<(Vec<u8>, FetchReport, File)> {
    let file = tempfile::tempfile().unwrap();
    // Whatever was there before must not shine through.
    file.write_all_at(&[0xee; 10_000], 0).unwrap();
    let report = store
        .fetch_tree(tree, &file, &[], &Progress::silent())
        .await?;
    let mut bytes = vec![0; tree.length_bytes as usize];
    assert_eq!(file.metadata().unwrap().len(), tree.length_bytes);
    file.read_exact_at(&mut bytes, 0).unwrap();
    Ok((bytes, report, file))
}

pub fn file_of(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

pub fn file_source(bytes: &[u8]) -> Arc<FileSource> {
    Arc::new(FileSource::new(file_of(bytes)).unwrap())
}

/// Every object: path and size.
pub async fn objects(store: &Arc<dyn ObjectStore>) -> Vec<(String, u64)> {
    let listed = store.list(None).try_collect::<Vec<_>>().await.unwrap();
    let mut objects: Vec<_> = listed
        .into_iter()
        .map(|meta| (meta.location.to_string(), meta.size))
        .collect();
    objects.sort();
    objects
}

pub async fn read_object(store: &Arc<dyn ObjectStore>, path: &str) -> Vec<u8> {
    let path = object_store::path::Path::from(path);
    store
        .get(&path)
        .await
        .unwrap()
        .bytes()
        .await
        .unwrap()
        .to_vec()
}

pub async fn write_object(store: &Arc<dyn ObjectStore>, path: &str, bytes: Vec<u8>) {
    let path = object_store::path::Path::from(path);
    store.put(&path, bytes.into()).await.unwrap();
}

/// A copy of all objects in memory, to damage or kill.
pub async fn copy_of(store: &Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore> {
    let copy: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    for (path, _) in objects(store).await {
        write_object(&copy, &path, read_object(store, &path).await).await;
    }
    copy
}

/// The names of all listed checkpoints if all are whole, else what is wrong with one.
pub async fn all_whole(objects: &Arc<dyn ObjectStore>) -> Result<Vec<String>, String> {
    let store = reopen(objects).await.unwrap();
    let mut names = Vec::new();
    for listed in store.manifests().await.unwrap() {
        let manifest = listed.manifest.expect("a listed manifest is readable");
        let name = manifest.name.unwrap();
        let whole = store
            .verify_manifest(listed.id.unwrap(), &Progress::silent())
            .await;
        whole.map_err(|error| format!("{name} is not whole: {error}"))?;
        names.push(name);
    }
    names.sort();
    Ok(names)
}

/// Every listed checkpoint is whole; gives their names.
pub async fn assert_all_whole(objects: &Arc<dyn ObjectStore>) -> Vec<String> {
    match all_whole(objects).await {
        Ok(names) => names,
        Err(loss) => panic!("{loss}"),
    }
}
