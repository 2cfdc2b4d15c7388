//! A store written by version 1 of the format, committed, never written again.
//!
//! It was made by `golden::make_a_store_for_the_golden_folder` (an ignored test) with
//! `STEAD_GOLDEN=FOLDER`. A new format version gets a new folder beside it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_store::{
    Access, BlobRef, ChunkSize, Kind, Manifest, Progress, Source, Store, TreeRef, hash_source,
};

use crate::fixture::*;

const ID: &str = "36916b043aa5277320dba6be3eb0628f48bd8f610e9e19eac64dd20f844d11e2";
const DISK_ROOT: &str = "b7945ca95b71ab0c9bff035891a6943c72a196cd107fbffc9923481b5fbf7b7c";
const RAM_ROOT: &str = "7fcf069e5425a8fee01e0d93a8a4c490b76cb490e35780da5f6e3bb45d06ac92";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/store-1")
}

/// Text that compresses, counted so that every chunk is another; a hole; zeros at the end.
fn disk() -> Sparse {
    let text = |from: u32| -> Vec<u8> {
        (from..from + 3000)
            .flat_map(|n| format!("line {n}\n").into_bytes())
            .collect()
    };
    Sparse {
        length: 200 << 20,
        data: [
            (0, text(0)),
            (65536 * 300 + 17, text(5000)),
            ((200 << 20) - 100, text(9)),
        ]
        .into(),
    }
}

fn ram() -> Vec<u8> {
    let squares = (0..12_000_u64).flat_map(|n| (n * n).to_le_bytes());
    squares.collect()
}

fn state() -> Vec<u8> {
    (0..=255).cycle().take(1000).collect()
}

fn golden_manifest(disk: TreeRef, ram: TreeRef, state: BlobRef) -> Manifest {
    let mut manifest = manifest("golden", disk);
    manifest.kind = Kind::Full;
    manifest.ram = Some(ram);
    manifest.device_state = Some(state);
    manifest.machine =
        serde_json::json!({"nics": 1, "order": ["b", "a"], "nested": {"z": null, "a": true}});
    manifest
}

fn name_of(source: &dyn Source, size: ChunkSize) -> TreeRef {
    hash_source(source, size, 2, &Progress::silent()).unwrap()
}

#[tokio::test]
async fn a_store_of_version_1_is_read_exactly() {
    let cache = tempfile::tempdir().unwrap();
    let url = folder().to_str().unwrap().to_owned();
    let store = Store::open(&url, cache.path(), Access::ReadOnly)
        .await
        .unwrap();
    let report = store.verify(&Progress::silent()).await.unwrap();
    assert!(report.is_clean() && report.manifests == 1, "{report:?}");
    let (id, read) = store.manifest(ID).await.unwrap();
    let (disk_tree, ram_tree) = (read.disks[0].tree, read.ram.unwrap());
    assert_eq!(disk_tree.root.to_string(), DISK_ROOT);
    assert_eq!(ram_tree.root.to_string(), RAM_ROOT);
    assert_eq!(disk_tree, name_of(&disk(), ChunkSize::DISK));
    assert_eq!(ram_tree, name_of(&ram(), ChunkSize::RAM));
    assert_eq!(fetch(&store, &disk_tree).await.unwrap(), disk().bytes());
    assert_eq!(fetch(&store, &ram_tree).await.unwrap(), ram());
    let blob = read.device_state.unwrap();
    assert_eq!(store.fetch_blob(&blob).await.unwrap(), state());
    let expected = golden_manifest(disk_tree, ram_tree, blob);
    assert_eq!(read, expected);
    let object = std::fs::read(folder().join(format!("checkpoints/{id}"))).unwrap();
    assert_eq!(
        expected.encode().unwrap(),
        object,
        "this version writes the same manifest"
    );
}

#[tokio::test]
#[ignore = "makes the committed files, once a format version"]
async fn make_a_store_for_the_golden_folder() {
    let url = std::env::var("STEAD_GOLDEN").expect("STEAD_GOLDEN names a new folder");
    let cache = tempfile::tempdir().unwrap();
    let store = Store::open_or_init(&url, cache.path()).await.unwrap();
    let mut publish = store.begin_publish(owner()).await.unwrap();
    let silent = Progress::silent();
    let disk = publish
        .add_tree(Arc::new(disk()), ChunkSize::DISK, None, &silent)
        .await
        .unwrap();
    let ram = publish
        .add_tree(Arc::new(ram()), ChunkSize::RAM, None, &silent)
        .await
        .unwrap();
    let state = publish.add_blob(&state()).await.unwrap();
    let (id, _) = publish
        .commit(&golden_manifest(disk, ram, state))
        .await
        .unwrap();
    println!("{id}\n{}\n{}", disk.root, ram.root);
}
