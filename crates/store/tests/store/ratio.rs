//! What a store of realistic content occupies, measured against one zstd stream of the same bytes.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use stead_store::{Access, ChunkSize, Progress, Store, Tuning};

use crate::fixture::*;

const INPUT_BYTES: usize = 96 << 20;

/// The programs of this system, each at a page boundary as on a disk.
fn programs() -> Vec<u8> {
    let mut all = Vec::new();
    let mut paths: Vec<_> = std::fs::read_dir("/usr/bin")
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    paths.sort();
    for path in paths {
        let is_file = |path: &Path| path.symlink_metadata().is_ok_and(|meta| meta.is_file());
        if is_file(&path) && all.len() < INPUT_BYTES {
            let file = std::fs::File::open(path).unwrap();
            file.take(8 << 20).read_to_end(&mut all).unwrap();
            all.resize(all.len().next_multiple_of(4096), 0);
        }
    }
    all
}

/// Bytes in the store, every object counted, after publishing `content`.
async fn stored(content: &[u8], size: ChunkSize) -> u64 {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    Store::init_object_store(Arc::clone(&objects), "test")
        .await
        .unwrap();
    let tuning = Tuning::default();
    let store = Store::with_object_store(
        Arc::clone(&objects),
        "test",
        None,
        Access::ReadWrite,
        tuning,
    )
    .await
    .unwrap();
    let mut publish = store.begin_publish(owner()).await.unwrap();
    let source = Arc::new(content.to_vec());
    let tree = publish
        .add_tree(source, size, None, &Progress::silent())
        .await
        .unwrap();
    let (_, report) = publish.commit(&manifest("programs", tree)).await.unwrap();
    assert!(report.objects < 30, "some tens of objects: {report:?}");
    crate::fixture::objects(&objects)
        .await
        .iter()
        .map(|(_, bytes)| bytes)
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_occupies_at_most_a_tenth_more_than_one_zstd_stream_of_its_content() {
    let content = programs();
    assert!(content.len() > 16 << 20, "a system with programs");
    let stream = zstd::encode_all(content.as_slice(), 3).unwrap().len() as u64;
    for size in [ChunkSize::DISK, ChunkSize::RAM] {
        let stored = stored(&content, size).await;
        let ratio = stored as f64 / stream as f64;
        println!(
            "{} chunks: {stored} bytes, {ratio:.3} of zstd -3 ({stream})",
            size.bytes()
        );
        assert!(ratio <= 1.1, "{ratio:.3}");
    }
}
