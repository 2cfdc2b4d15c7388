//! Measures publish, fetch and hash on a real file.
//!
//! `cargo run --release -p stead-store --example measure -- FILE STORE [CHUNK_BYTES]`
#![allow(
    clippy::unwrap_used,
    reason = "a measurement ends at the first failure"
)]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use stead_store::{
    ChunkSize, Disk, FileSource, Kind, LeaseOwner, Lineage, LocalSource, Manifest, Producer,
    Progress, Role, Source, Store, hash_source,
};

fn told(what: &str, bytes: u64, since: Instant) {
    let seconds = since.elapsed().as_secs_f64();
    let rate = bytes as f64 / seconds / 1e6;
    println!("{what:<28} {seconds:>7.3} s {rate:>8.0} MB/s");
}

/// Length of one zstd stream of level 3 of the file.
fn zstd_bytes(path: &str) -> u64 {
    let file = File::open(path).unwrap();
    let mut sink = tempfile::tempfile().unwrap();
    zstd::stream::copy_encode(file, &mut sink, 3).unwrap();
    sink.metadata().unwrap().len()
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, path, url, rest @ ..] = arguments.as_slice() else {
        panic!("measure FILE STORE [CHUNK_BYTES]");
    };
    let size = rest.first().map_or(65536, |bytes| bytes.parse().unwrap());
    let size = ChunkSize::new(size).unwrap();
    let source = Arc::new(FileSource::new(File::open(path).unwrap()).unwrap());
    for threads in [1, 2] {
        let start = Instant::now();
        hash_source(source.as_ref(), size, threads, &Progress::silent()).unwrap();
        told(&format!("hash, {threads} threads"), source.len(), start);
    }
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open_or_init(url, cache.path()).await.unwrap();
    for what in ["publish", "publish again"] {
        publish(&store, what, &source, size).await;
    }
    fetch(&store, url, &source, size).await;
    let start = Instant::now();
    let report = store.verify(&Progress::silent()).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    told("verify (stored bytes)", report.pack_bytes, start);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM"));
    println!("{}", peak.unwrap_or("no peak"));
    let (stored, stream) = (folder_bytes(Path::new(url)), zstd_bytes(path));
    let ratio = stored as f64 / stream as f64;
    println!("stored {stored} bytes, {ratio:.3} of zstd -3 ({stream})");
}

async fn publish(store: &Store, what: &str, source: &Arc<FileSource>, size: ChunkSize) {
    let owner = LeaseOwner {
        worker: "measure".to_owned(),
        boot: "measure".to_owned(),
        process: std::process::id().to_string(),
        host: "measure".to_owned(),
        data_dir: "measure".to_owned(),
    };
    let start = Instant::now();
    let mut publish = store.begin_publish(owner).await.unwrap();
    let source = Arc::clone(source);
    let bytes = source.len();
    let tree = publish
        .add_tree(source, size, None, &Progress::silent())
        .await;
    let manifest = manifest(what, tree.unwrap());
    let (_, report) = publish.commit(&manifest).await.unwrap();
    told(what, bytes, start);
    println!("  {report:?}");
}

async fn fetch(store: &Store, folder: &str, source: &Arc<FileSource>, size: ChunkSize) {
    let silent = Progress::silent();
    let tree = hash_source(source.as_ref(), size, 0, &silent).unwrap();
    let index = Arc::new(store.local_index(&tree).await.unwrap());
    let local = LocalSource {
        index,
        source: source.clone(),
    };
    for (what, local) in [
        ("fetch from the store", vec![]),
        ("fetch from a local file", vec![local]),
    ] {
        let dest = tempfile::tempfile_in(folder).unwrap();
        let start = Instant::now();
        let report = store
            .fetch_tree(&tree, &dest, &local, &silent)
            .await
            .unwrap();
        told(what, source.len(), start);
        println!("  {report:?}");
    }
}

fn manifest(name: &str, tree: stead_store::TreeRef) -> Manifest {
    Manifest {
        role: Role::Checkpoint,
        name: Some(name.to_owned()),
        created: jiff::Timestamp::now(),
        kind: Kind::DiskOnly,
        crash_consistent: false,
        lineage: Lineage::default(),
        producer: Producer {
            qemu_version: None,
            machine_type: "none".to_owned(),
            cpu_model: "none".to_owned(),
            accelerator: "none".to_owned(),
            cpus: 1,
            memory_bytes: 0,
            kernel_command_line: None,
        },
        disks: vec![Disk {
            id: "file".to_owned(),
            tree,
            virtual_size_bytes: tree.length_bytes,
        }],
        ram: None,
        device_state: None,
        kernel: None,
        initrd: None,
        machine: serde_json::Value::Null,
    }
}

fn folder_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().path())
        .map(|path| match path.is_dir() {
            true => folder_bytes(&path),
            false => path.metadata().unwrap().len(),
        })
        .sum()
}
