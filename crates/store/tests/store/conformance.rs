//! One suite for every backend.

use std::sync::Arc;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use stead_store::{
    Base, BlobRef, Error, LocalIndex, LocalSource, Progress, Role, Store, hash_source,
};

use crate::fixture::*;

/// Everything a store does, once, on an empty backend.
pub async fn suite(backend: Arc<dyn ObjectStore>) {
    let missing = reopen(&backend).await.expect_err("nothing is there");
    assert!(matches!(missing, Error::Missing { .. }), "{missing}");
    let store = new_store(&backend).await;
    let again = Store::init_object_store(Arc::clone(&backend), "test").await;
    assert!(matches!(again, Err(Error::AlreadyThere { .. })));
    publish_list_fetch(&store).await;
    increments_store_only_what_changed(&store).await;
    blobs_and_templates(&store).await;
    leases_come_and_go(&store).await;
    let clean = store.verify(&Progress::silent()).await.unwrap();
    assert!(clean.is_clean(), "{clean:?}");
    assert!(clean.packs_without_index > 0, "of the aborted publish");
    removal_frees_everything(&store, &backend).await;
}

fn one(range: std::ops::Range<u64>) -> Vec<std::ops::Range<u64>> {
    std::iter::once(range).collect()
}

async fn publish_list_fetch(store: &Store) {
    let content = noise(3_000_001, 1);
    let (id, tree, report) = publish(store, "first", content.clone()).await.unwrap();
    assert_eq!(
        tree,
        hash_source(&content, chunk_size(), 2, &Progress::silent()).unwrap()
    );
    assert_eq!(report.chunks_new, 3_000_001_u64.div_ceil(CHUNK));
    assert!(
        report.stored_bytes < 2_200_000,
        "half compresses: {report:?}"
    );
    assert_eq!(fetch(store, &tree).await.unwrap(), content);
    let listed = store.manifests().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].id, Some(id));
    let (found, manifest) = store.manifest(&id.to_string()[..8]).await.unwrap();
    assert_eq!((found, manifest.disks[0].tree), (id, tree));
    let wrong = store.manifest("zz").await;
    assert!(matches!(wrong, Err(Error::NoSuchManifest { .. })));

    let (_, _, again) = publish(store, "the same", content.clone()).await.unwrap();
    assert_eq!((again.chunks_new, again.objects), (0, 1), "only a manifest");
    let ambiguous = store.manifest("").await;
    assert!(matches!(ambiguous, Err(Error::Ambiguous { .. })));
    local_chunks_are_not_sent(store, &tree, &content).await;
}

async fn local_chunks_are_not_sent(store: &Store, tree: &stead_store::TreeRef, content: &[u8]) {
    let silent = Progress::silent();
    let mut local = content.to_vec();
    local[100_000] ^= 1;
    // The index claims more than the file holds: what does not match comes from the store.
    let index = Arc::new(store.local_index(tree).await.unwrap());
    let source = file_source(&local);
    let dest = tempfile::tempfile().unwrap();
    let sources = [LocalSource { index, source }];
    let report = store
        .fetch_tree(tree, &dest, &sources, &silent)
        .await
        .unwrap();
    assert_eq!(report.from_store_bytes, CHUNK);
    assert_eq!(report.local_mismatch_bytes, CHUNK);
    assert_eq!(report.from_local_bytes, content.len() as u64 - CHUNK);
    let (now, index) = LocalIndex::hash(&content.to_vec(), chunk_size(), 2, &silent).unwrap();
    assert_eq!(now, *tree);
    assert_eq!(index, store.local_index(tree).await.unwrap());
    let fetched = Arc::new(stead_store::FileSource::new(dest).unwrap());
    let differing = store.locate_damage(tree, fetched, &silent).await.unwrap();
    assert_eq!(differing, []);
    let differing = store
        .locate_damage(tree, file_source(&local), &silent)
        .await;
    assert_eq!(differing.unwrap(), one(98_304..102_400));
    let short = file_source(&content[..8192]);
    let differing = store.locate_damage(tree, short, &silent).await.unwrap();
    assert_eq!(differing, one(8192..content.len() as u64));
}

async fn increments_store_only_what_changed(store: &Store) {
    let before = noise(2_000_000, 2);
    let (_, base, _) = publish(store, "base", before.clone()).await.unwrap();
    let mut after = before;
    after[700_000..700_010].fill(9);
    after.extend(noise(50_000, 3));
    let mut publish = store.begin_publish(owner()).await.unwrap();
    let changed = one(700_000..700_010);
    let tree = add_on(
        &mut publish,
        after.clone(),
        Base {
            tree: base,
            changed,
        },
    )
    .await
    .unwrap();
    let full = hash_source(&after, chunk_size(), 2, &Progress::silent()).unwrap();
    assert_eq!(tree, full);
    let (_, report) = publish.commit(&manifest("increment", tree)).await.unwrap();
    assert!(report.read_bytes < 60_000, "{report:?}");
    assert_eq!(report.chunks_new, 1 + 50_000_u64.div_ceil(CHUNK));
    assert_eq!(fetch(store, &tree).await.unwrap(), after);
}

async fn blobs_and_templates(store: &Store) {
    let mut publish = store.begin_publish(owner()).await.unwrap();
    let state = noise(90_000, 4);
    let blob = publish.add_blob(&state).await.unwrap();
    let empty = publish.add_blob(&[]).await.unwrap();
    let foreign = BlobRef(stead_store::TreeRef {
        length_bytes: 5,
        ..blob.0
    });
    let mut template = manifest("template", blob.0);
    template.role = Role::Template;
    template.kernel = Some(foreign);
    let refused = publish.commit(&template).await.expect_err("not added");
    assert!(
        refused.to_string().contains("kernel names tree"),
        "{refused}"
    );

    let mut publish = store.begin_publish(owner()).await.unwrap();
    publish
        .reuse_tree(&blob.0)
        .await
        .expect_err("it was never committed");
    // The same publish goes on: nothing was lost.
    assert_eq!(publish.add_blob(&state).await.unwrap(), blob);
    publish.add_blob(&[]).await.unwrap();
    template.kernel = Some(empty);
    let (id, _) = publish.commit(&template).await.unwrap();
    assert_eq!(store.fetch_blob(&blob).await.unwrap(), state);
    assert_eq!(store.fetch_blob(&empty).await.unwrap(), Vec::<u8>::new());
    assert_eq!(store.templates().await.unwrap()[0].id, Some(id));
    assert!(
        store
            .manifests()
            .await
            .unwrap()
            .iter()
            .all(|m| m.id != Some(id))
    );

    let mut publish = store.begin_publish(owner()).await.unwrap();
    publish.reuse_tree(&blob.0).await.unwrap();
    let (_, report) = publish.commit(&manifest("reused", blob.0)).await.unwrap();
    assert_eq!(report.objects, 1);
}

async fn leases_come_and_go(store: &Store) {
    // The leases of publishes that were dropped are removed in the background.
    while !store.leases().await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    let mut publish = store.begin_publish(owner()).await.unwrap();
    let leases = store.leases().await.unwrap();
    assert_eq!(leases[0].id, publish.lease_id());
    assert_eq!(leases[0].lease.as_ref().unwrap().owner, owner());
    add(&mut publish, noise(3_500_000, 5)).await.unwrap();
    let waiting = store.gc(owner(), false).await.unwrap();
    assert_eq!(waiting.waiting_for.len(), 1);
    assert_eq!(waiting.deleted_bytes, 0);
    publish.abort().await.unwrap();
    assert_eq!(store.leases().await.unwrap(), []);
    // A clone: its host, folder and process have the same names.
    let other = stead_store::LeaseOwner {
        worker: "f".repeat(32),
        ..owner()
    };
    let publish = store.begin_publish(other.clone()).await.unwrap();
    std::mem::forget(publish);
    assert_eq!(store.remove_leases_of(&owner()).await.unwrap(), 0);
    assert_eq!(store.remove_leases_of(&other).await.unwrap(), 1);
    let publish = store.begin_publish(owner()).await.unwrap();
    store.break_lease(publish.lease_id()).await.unwrap();
    let mut publish = publish;
    let tree = add(&mut publish, noise(10, 6)).await.unwrap();
    let lost = publish.commit(&manifest("lost", tree)).await;
    assert!(matches!(lost, Err(Error::LeaseLost { .. })));
}

async fn removal_frees_everything(store: &Store, backend: &Arc<dyn ObjectStore>) {
    let plan = store.gc(owner(), true).await.unwrap();
    assert!(plan.dry_run && plan.dead_packs > 0);
    let mut ids: Vec<_> = store.manifests().await.unwrap();
    ids.extend(store.templates().await.unwrap());
    let usage = store.usage(ids[0].id.unwrap()).await.unwrap();
    assert!(usage.unique_raw_bytes <= usage.raw_bytes && usage.stored_bytes > 0);
    for listed in ids {
        store.remove_manifest(listed.id.unwrap()).await.unwrap();
    }
    let report = store.gc(owner(), false).await.unwrap();
    assert_eq!(report.waiting_for, []);
    assert_eq!(report.packs, report.dead_packs);
    let left: Vec<_> = objects(backend).await;
    assert_eq!(left.len(), 1, "only the description is left: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_in_memory_does_what_a_store_does() {
    suite(Arc::new(InMemory::new())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_in_a_folder_does_what_a_store_does() {
    let dir = tempfile::tempdir().unwrap();
    suite(folder(dir.path())).await;
}

#[tokio::test]
async fn a_store_works_on_a_runtime_with_one_thread() {
    suite(Arc::new(InMemory::new())).await;
}
