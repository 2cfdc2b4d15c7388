//! Damage to every kind of object: an error that names it, never wrong bytes.

use std::sync::Arc;

use object_store::{ObjectStore, ObjectStoreExt};
use stead_store::{DamagedObject, Error, Hash, Progress, Store, TreeRef};

use crate::fixture::*;

/// A store with two checkpoints that share chunks, and what is in them.
async fn sound() -> (Arc<dyn ObjectStore>, Vec<(TreeRef, Vec<u8>)>) {
    let (objects, store) = memory().await;
    let first = noise(400_000, 1);
    let mut second = first.clone();
    second[..50_000].copy_from_slice(&noise(50_000, 2));
    let mut trees = Vec::new();
    for (name, content) in [("first", first), ("second", second)] {
        let (_, tree, _) = publish(&store, name, content.clone()).await.unwrap();
        trees.push((tree, content));
    }
    (objects, trees)
}

/// Deterministic positions all over an object, its ends included.
fn positions(length: usize) -> Vec<usize> {
    let step = (length / 37).max(1);
    let mut positions: Vec<_> = (0..length).step_by(step).collect();
    positions.extend((0..length.min(72)).chain(length.saturating_sub(50)..length));
    positions
}

/// Opens the store afresh and fetches everything: right bytes or an error. Gives the errors.
async fn fetch_all(objects: &Arc<dyn ObjectStore>, trees: &[(TreeRef, Vec<u8>)]) -> Vec<Error> {
    let store = reopen(objects).await.unwrap();
    let mut errors = Vec::new();
    for (tree, content) in trees {
        match fetch(&store, tree).await {
            Ok(bytes) => assert_eq!(&bytes, content, "never wrong bytes"),
            Err(error) => errors.push(error),
        }
    }
    errors
}

/// What a damaged object leads to: exact data or named errors, and a verification that tells.
async fn assert_told(objects: &Arc<dyn ObjectStore>, path: &str, trees: &[(TreeRef, Vec<u8>)]) {
    for error in fetch_all(objects, trees).await {
        let text = error.to_string();
        assert!(text.contains("needed by bytes"), "{path}: {text}");
        let hash = path.rsplit('/').next().unwrap();
        assert!(text.contains(hash), "{path}: {text}");
    }
    let store = reopen(objects).await.unwrap();
    let report = store.verify(&Progress::silent()).await.unwrap();
    let told = report
        .damaged_objects
        .iter()
        .any(|damaged| damaged.object == path);
    assert!(told, "{path}: {report:?}");
    if path.starts_with("checkpoints/") {
        let listed = store.manifests().await.unwrap();
        assert_eq!(listed.len(), 2, "a damaged manifest is not hidden");
        assert_eq!(listed.iter().filter(|m| m.manifest.is_err()).count(), 1);
        let gc = store.gc(owner(), false).await;
        assert!(matches!(gc, Err(Error::GcBlocked { .. })), "{gc:?}");
    }
}

async fn damage_each(change: impl Fn(&[u8]) -> Vec<Vec<u8>>) {
    let (sound, trees) = sound().await;
    for (path, _) in objects(&sound).await {
        if path == "steadfast-store" {
            continue;
        }
        let whole = read_object(&sound, &path).await;
        for changed in change(&whole) {
            write_object(&sound, &path, changed).await;
            assert_told(&sound, &path, &trees).await;
        }
        write_object(&sound, &path, whole).await;
        assert!(fetch_all(&sound, &trees).await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_anywhere_is_an_error_or_the_right_bytes() {
    damage_each(|whole| {
        let flip = |at: usize| {
            let mut changed = whole.to_vec();
            changed[at] ^= 1 << (at % 8);
            changed
        };
        positions(whole.len()).into_iter().map(flip).collect()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_or_grown_object_is_an_error_or_the_right_bytes() {
    damage_each(|whole| {
        let cut = |at: usize| whole[..at].to_vec();
        let mut changed: Vec<_> = positions(whole.len())
            .into_iter()
            .step_by(4)
            .map(cut)
            .collect();
        changed.push([whole, b"x"].concat());
        changed
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_object_is_named_together_with_what_needs_it() {
    let (sound, trees) = sound().await;
    for (path, _) in objects(&sound).await {
        let lost = copy_of(&sound).await;
        lost.delete(&path.as_str().into()).await.unwrap();
        if path == "steadfast-store" {
            let error = reopen(&lost).await.expect_err("no store");
            assert!(matches!(error, Error::Missing { .. }));
            continue;
        }
        let errors = fetch_all(&lost, &trees).await;
        for error in &errors {
            assert!(error.to_string().contains("needed by bytes"), "{error}");
        }
        let store = reopen(&lost).await.unwrap();
        let report = store.verify(&Progress::silent()).await.unwrap();
        if path.starts_with("checkpoints/") {
            assert!(errors.is_empty() && report.is_clean());
            assert_eq!(store.manifests().await.unwrap().len(), 1);
            continue;
        }
        assert!(!errors.is_empty(), "{path} is needed by something");
        assert!(!report.damaged_manifests.is_empty(), "{path}: {report:?}");
        let reason = &report.damaged_manifests[0].reasons[0];
        assert!(reason.starts_with("disk root: bytes "), "{reason}");
        let gc = store.gc(owner(), false).await;
        assert!(matches!(gc, Err(Error::GcBlocked { .. })), "{path}: {gc:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_was_moved_is_missing_where_readers_look() {
    let (sound, trees) = sound().await;
    let all = objects(&sound).await;
    let packs = all.iter().filter(|(path, _)| path.starts_with("packs/"));
    for (path, _) in packs {
        let moved = copy_of(&sound).await;
        let bytes = read_object(&moved, path).await;
        moved.delete(&path.as_str().into()).await.unwrap();
        let name = path.rsplit('/').next().unwrap();
        let aside = format!("packs/aside/{name}");
        write_object(&moved, &aside, bytes.clone()).await;
        let store = reopen(&moved).await.unwrap();
        let report = store.verify(&Progress::silent()).await.unwrap();
        for object in [path, &aside] {
            let named = |damaged: &DamagedObject| damaged.object == *object;
            assert!(report.damaged_objects.iter().any(named), "{report:?}");
        }
        assert!(!report.damaged_manifests.is_empty(), "{path}: {report:?}");
        let gc = store.gc(owner(), false).await;
        assert!(matches!(gc, Err(Error::GcBlocked { .. })), "{path}: {gc:?}");
        publish(&store, "again", trees[0].1.clone()).await.unwrap();
        publish(&store, "again", trees[1].1.clone()).await.unwrap();
        assert!(fetch_all(&moved, &trees).await.is_empty(), "stored again");
        assert_eq!(read_object(&moved, &aside).await, bytes, "left alone");
    }
}

/// Replaces the only bytes at `path` by others under the name that is right for these.
async fn rename_to_content(objects: &Arc<dyn ObjectStore>, path: &str, bytes: Vec<u8>) {
    objects.delete(&path.into()).await.unwrap();
    let (folder, _) = path.rsplit_once('/').unwrap();
    write_object(objects, &format!("{folder}/{}", Hash::of(&bytes)), bytes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_lies_under_a_right_name_is_an_error_or_the_right_bytes() {
    let (sound, trees) = sound().await;
    for (path, _) in objects(&sound).await {
        if !path.starts_with("indexes/") {
            continue;
        }
        let whole = read_object(&sound, &path).await;
        for at in (64..whole.len()).step_by(whole.len() / 150) {
            let lying = copy_of(&sound).await;
            let mut changed = whole.clone();
            changed[at] ^= 1 << (at % 8);
            rename_to_content(&lying, &path, changed).await;
            fetch_all(&lying, &trees).await;
            let store = reopen(&lying).await.unwrap();
            let report = store.verify(&Progress::silent()).await.unwrap();
            assert!(!report.is_clean(), "byte {at}");
            // Whatever gc makes of it, what the packs hold is still there.
            drop(store.gc(owner(), false).await);
            rebuilt(&lying).await;
            assert!(fetch_all(&lying, &trees).await.is_empty(), "byte {at}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_with_another_tree_than_the_store_has_is_an_error() {
    let (sound, trees) = sound().await;
    let tree = trees[0].0;
    let store = reopen(&sound).await.unwrap();
    let other = |root: Hash, length_bytes: u64| TreeRef {
        root,
        length_bytes,
        ..tree
    };
    for wrong in [
        other(Hash::of(b"nothing"), tree.length_bytes),
        other(tree.root, tree.length_bytes - 1),
        other(tree.root, tree.length_bytes + 1),
        other(tree.root, 1),
        other(tree.root, 1 << 56),
        TreeRef {
            chunk_size: stead_store::ChunkSize::DISK,
            ..tree
        },
    ] {
        let object = manifest("wrong", wrong).encode().unwrap();
        let id = stead_store::ManifestId(Hash::of(&object));
        write_object(&sound, &format!("checkpoints/{id}"), object).await;
        let error = store
            .verify_manifest(id, &Progress::silent())
            .await
            .expect_err("wrong");
        assert!(error.to_string().contains("needed by"), "{error}");
        let report = store.verify(&Progress::silent()).await.unwrap();
        assert_eq!(report.damaged_manifests.len(), 1, "{wrong}");
        store.remove_manifest(id).await.unwrap();
    }
    let chunks = trees[0].1[..4096].to_vec();
    let chunk_as_node = other(Hash::of(&chunks), tree.length_bytes);
    let error = fetch(&store, &chunk_as_node)
        .await
        .expect_err("a chunk is no node");
    assert!(
        error
            .to_string()
            .contains("a pack of chunks where a node should be"),
        "{error}"
    );
}

async fn rebuilt(objects: &Arc<dyn ObjectStore>) -> Store {
    let store = reopen(objects).await.unwrap();
    let report = store.rebuild_index(owner()).await.unwrap();
    assert_eq!(report.damaged_packs, []);
    store
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_or_damaged_index_is_rebuilt_from_the_packs() {
    let (sound, trees) = sound().await;
    for (path, _) in objects(&sound).await {
        if !path.starts_with("indexes/") {
            continue;
        }
        for damage in [None, Some(vec![0; 100])] {
            let lost = copy_of(&sound).await;
            match damage {
                None => lost.delete(&path.as_str().into()).await.unwrap(),
                Some(bytes) => write_object(&lost, &path, bytes).await,
            }
            let store = rebuilt(&lost).await;
            assert!(fetch_all(&lost, &trees).await.is_empty());
            assert!(store.verify(&Progress::silent()).await.unwrap().is_clean());
            assert_eq!(store.gc(owner(), false).await.unwrap().dead_packs, 0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_with_a_damaged_footer_keeps_what_the_index_knew_of_it() {
    let (sound, trees) = sound().await;
    let all = objects(&sound).await;
    let (path, _) = all
        .iter()
        .find(|(path, _)| path.starts_with("packs/"))
        .unwrap();
    let mut bytes = read_object(&sound, path).await;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    write_object(&sound, path, bytes).await;
    let store = reopen(&sound).await.unwrap();
    let report = store.rebuild_index(owner()).await.unwrap();
    assert_eq!(report.damaged_packs.len(), 1);
    assert!(fetch_all(&sound, &trees).await.is_empty());
}

#[tokio::test]
async fn a_damaged_cache_is_read_from_the_store_again() {
    let dir = tempfile::tempdir().unwrap();
    let url = dir.path().join("store").to_str().unwrap().to_owned();
    let cache = dir.path().join("cache");
    let store = Store::open_or_init(&url, &cache).await.unwrap();
    let (_, tree, _) = publish(&store, "x", noise(100_000, 1)).await.unwrap();
    let reader = || Store::open(&url, &cache, stead_store::Access::ReadOnly);
    reader().await.unwrap();
    let folder = cache.join(store.id()).join("indexes");
    let cached: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert_eq!(cached.len(), 1, "the index object is cached");
    use stead_sys::durable::{Existing, publish as put};
    put(&cached[0], 0o600, b"damaged", Existing::Replace).unwrap();
    let again = reader().await.unwrap();
    assert_eq!(fetch(&again, &tree).await.unwrap(), noise(100_000, 1));
    let repaired = std::fs::read(&cached[0]).unwrap();
    assert_ne!(repaired, b"damaged");
}
