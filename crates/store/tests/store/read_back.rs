//! What a publish reads back before it is committed, and what backups keep from garbage collection.

use std::sync::Arc;

use object_store::ObjectStore;
use stead_store::{Manifest, Progress, Publish, Role, TreeRef};

use crate::fixture::{
    CHUNK, chunk_size, manifest, memory, noise, objects, owner, read_object, reopen, write_object,
};

async fn added(publish: &mut Publish, content: &[u8]) -> TreeRef {
    let source = Arc::new(content.to_vec());
    let progress = Progress::silent();
    let added = publish.add_tree(source, chunk_size(), None, &progress);
    added.await.unwrap()
}

async fn packs(store: &Arc<dyn ObjectStore>) -> Vec<String> {
    let all = objects(store).await.into_iter().map(|(path, _)| path);
    all.filter(|path| path.starts_with("packs/")).collect()
}

fn backup_of(tree: TreeRef) -> Manifest {
    Manifest {
        role: Role::Backup,
        ..manifest("backup", tree)
    }
}

#[tokio::test]
async fn what_is_read_back_is_what_was_stored_and_a_differing_chunk_is_named() {
    let (_, store) = memory().await;
    let mut content = noise(64 * CHUNK, 1);
    content[8 * CHUNK as usize..16 * CHUNK as usize].fill(0);
    let mut publish = store.begin_publish(owner()).await.unwrap();
    let tree = added(&mut publish, &content).await;
    for (byte, expected) in [(None, None), (Some(9), Some(9)), (Some(40), Some(40))] {
        let mut now = content.clone();
        if let Some(chunk) = byte {
            now[(chunk * CHUNK) as usize + 7] ^= 1;
        }
        let all = std::iter::once(0..content.len() as u64).collect();
        let progress = Progress::silent();
        let read = publish.read_back(&tree, Arc::new(now.clone()), all, &progress);
        let expected = expected.map(|chunk: u64| chunk * CHUNK..(chunk + 1) * CHUNK);
        assert_eq!(read.await.unwrap(), expected);
        // What is not asked for is not looked at.
        let others = vec![0..8 * CHUNK, 16 * CHUNK..17 * CHUNK];
        let read = publish.read_back(&tree, Arc::new(now), others, &progress);
        assert_eq!(read.await.unwrap(), None);
    }
    assert!(publish.stored_bytes() > 0);
    let (_, report) = publish.commit(&backup_of(tree)).await.unwrap();
    assert!(report.stored_bytes > 0);
    assert!(store.verify(&Progress::silent()).await.unwrap().is_clean());
}

#[tokio::test]
async fn damage_done_between_storing_and_reading_back_is_found_before_anything_names_it() {
    let (objects, store) = memory().await;
    let content = noise(64 * CHUNK, 2);
    let mut publish = store.begin_publish(owner()).await.unwrap();
    let tree = added(&mut publish, &content).await;
    let whole = || std::iter::once(0..content.len() as u64).collect();
    let source = Arc::new(content.clone());
    let progress = Progress::silent();
    let read = publish.read_back(&tree, source.clone(), whole(), &progress);
    assert_eq!(read.await.unwrap(), None);
    for pack in packs(&objects).await {
        let mut bytes = read_object(&objects, &pack).await;
        bytes[100] ^= 1;
        write_object(&objects, &pack, bytes).await;
    }
    let read = publish.read_back(&tree, source, whole(), &progress);
    assert!(read.await.is_err());
    assert!(publish.abort().await.is_ok());
    assert!(store.backups().await.unwrap().is_empty());
}

#[tokio::test]
async fn gc_keeps_what_a_backup_names_until_it_is_removed() {
    let (objects, store) = memory().await;
    let content = noise(64 * CHUNK, 3);
    let mut publish = store.begin_publish(owner()).await.unwrap();
    let tree = added(&mut publish, &content).await;
    let (id, _) = publish.commit(&backup_of(tree)).await.unwrap();
    drop(store);
    let store = reopen(&objects).await.unwrap();
    assert!(store.manifests().await.unwrap().is_empty());
    assert_eq!(store.backups().await.unwrap().len(), 1);
    store.gc(owner(), false).await.unwrap();
    store
        .verify_manifest(id, &Progress::silent())
        .await
        .unwrap();
    store.remove_manifest(id).await.unwrap();
    store.gc(owner(), false).await.unwrap();
    assert!(packs(&objects).await.is_empty());
}
