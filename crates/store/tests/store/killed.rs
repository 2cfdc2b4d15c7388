//! A publish or a gc that fails or is killed at each of its store calls.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use object_store::ObjectStore;
use stead_sim::{Fault, FaultStore};
use stead_store::{Error, Progress, Result, Store};

use crate::fixture::*;

const FAULTS: [Fault; 4] = [
    Fault::Before,
    Fault::After,
    Fault::KilledBefore,
    Fault::KilledAfter,
];

async fn before() -> Arc<dyn ObjectStore> {
    let (objects, store) = memory().await;
    publish(&store, "before", noise(700_000, 1)).await.unwrap();
    objects
}

/// Shares half with what is there and fills several packs.
fn content() -> Vec<u8> {
    let mut content = noise(350_000 / CHUNK * CHUNK, 1);
    content.extend(noise(900_000, 2));
    content
}

async fn publish_after(objects: &Arc<dyn ObjectStore>) -> Result<()> {
    let store = reopen(objects).await?;
    publish(&store, "after", content()).await?;
    Ok(())
}

/// Folders of what is in the store, so that leftovers show.
async fn folders(objects: &Arc<dyn ObjectStore>) -> BTreeSet<String> {
    let first = |path: &str| path.split('/').next().unwrap_or_default().to_owned();
    let all = crate::fixture::objects(objects).await;
    all.iter().map(|(path, _)| first(path)).collect()
}

/// The next start of the program: old leases go, the publish is repeated, gc cleans up.
async fn restart(objects: &Arc<dyn ObjectStore>) -> Store {
    let store = reopen(objects).await.unwrap();
    store.remove_leases_of(&owner()).await.unwrap();
    store
}

async fn assert_nothing_left_behind(objects: &Arc<dyn ObjectStore>, store: &Store) {
    let report = store.gc(owner(), false).await.unwrap();
    assert_eq!(report.waiting_for, []);
    let expected = ["checkpoints", "indexes", "packs", "steadfast-store"];
    assert_eq!(folders(objects).await, expected.map(str::to_owned).into());
    let verified = store.verify(&Progress::silent()).await.unwrap();
    assert!(verified.is_clean(), "{verified:?}");
    assert_eq!(verified.packs_without_index, 0);
    let idle = store.gc(owner(), true).await.unwrap();
    assert_eq!(idle.dead_packs, 0, "{idle:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_killed_at_any_call_leaves_earlier_checkpoints_whole_and_no_new_one() {
    let start = before().await;
    for fault in FAULTS {
        let mut listed_though_failed = 0;
        for call in 1.. {
            let objects = copy_of(&start).await;
            let faulty = Arc::new(FaultStore::new(Arc::clone(&objects), call, fault));
            let way: Arc<dyn ObjectStore> = Arc::clone(&faulty) as _;
            let result = publish_after(&way).await;
            let names = assert_all_whole(&objects).await;
            assert!(names.contains(&"before".to_owned()));
            let listed = names.contains(&"after".to_owned());
            assert!(
                listed || result.is_err(),
                "call {call}: committed and not listed"
            );
            if listed && result.is_err() {
                // Only where the manifest's own put took effect and nothing could be asked after it.
                assert_eq!(fault, Fault::KilledAfter, "call {call}");
                listed_though_failed += 1;
            }
            let store = restart(&objects).await;
            publish(&store, "after", content()).await.unwrap();
            assert_nothing_left_behind(&objects, &store).await;
            assert_eq!(assert_all_whole(&objects).await, ["after", "before"]);
            if faulty.calls() < call {
                assert!(result.is_ok() && call > 12, "{call} calls, {result:?}");
                break;
            }
        }
        assert!(
            listed_though_failed <= 1,
            "{fault:?}: {listed_though_failed}"
        );
    }
}

async fn with_garbage() -> Arc<dyn ObjectStore> {
    let objects = before().await;
    let store = reopen(&objects).await.unwrap();
    let (removed, _, _) = publish(&store, "removed", content()).await.unwrap();
    store.remove_manifest(removed).await.unwrap();
    let half = noise(100_000, 2);
    publish(&store, "some of it", half).await.unwrap();
    objects
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gc_killed_at_any_call_loses_nothing_and_the_next_one_finishes() {
    let start = with_garbage().await;
    for fault in FAULTS {
        for call in 1.. {
            let objects = copy_of(&start).await;
            let faulty = Arc::new(FaultStore::new(Arc::clone(&objects), call, fault));
            let way: Arc<dyn ObjectStore> = Arc::clone(&faulty) as _;
            let result = match reopen(&way).await {
                Ok(store) => store.gc(owner(), false).await.map(drop),
                Err(error) => Err(error),
            };
            assert_eq!(
                assert_all_whole(&objects).await,
                ["before", "some of it"],
                "call {call}"
            );
            let store = restart(&objects).await;
            assert_nothing_left_behind(&objects, &store).await;
            assert_eq!(
                assert_all_whole(&objects).await,
                ["before", "some of it"],
                "call {call}"
            );
            if faulty.calls() < call {
                assert!(result.is_ok() && call > 20, "{call} calls, {result:?}");
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gc_that_is_stopped_wherever_it_asks_gives_its_lock_back_and_loses_nothing() {
    let start = with_garbage().await;
    for stop_at in 1.. {
        let objects = copy_of(&start).await;
        let store = reopen(&objects).await.unwrap();
        let asked = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&asked);
        let progress = Progress::new(move |_step| {
            if count.fetch_add(1, Ordering::Relaxed) + 1 == stop_at {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let result = store.gc_told(owner(), false, &progress).await;
        assert_eq!(assert_all_whole(&objects).await, ["before", "some of it"]);
        if asked.load(Ordering::Relaxed) < stop_at {
            assert!(result.unwrap().deleted_bytes > 0);
            assert!(stop_at > 8, "it asked only {stop_at} times");
            break;
        }
        assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
        assert_nothing_left_behind(&objects, &store).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_dropped_half_way_gives_its_lease_back() {
    let (_, store) = memory().await;
    let mut publish = store.begin_publish(owner()).await.unwrap();
    add(&mut publish, noise(100_000, 1)).await.unwrap();
    assert_eq!(store.leases().await.unwrap().len(), 1);
    drop(publish);
    while !store.leases().await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn temporary_files_of_a_killed_publish_are_removed_from_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let url = dir.path().join("store").to_str().unwrap().to_owned();
    let store = Store::open_or_init(&url, &dir.path().join("cache"))
        .await
        .unwrap();
    let (_, tree, _) = publish(&store, "x", noise(10_000, 1)).await.unwrap();
    let leftover = std::path::Path::new(&url).join("packs/ab/0123#1");
    let foreign = std::path::Path::new(&url).join("packs/notes.txt");
    for file in [&leftover, &foreign] {
        stead_sys::durable::create_dir(file.parent().unwrap(), 0o700).unwrap();
        stead_sys::durable::create_scratch(file, 0o600).unwrap();
    }
    let report = store.gc(owner(), false).await.unwrap();
    assert_eq!(report.temporary_files, 1);
    assert!(!leftover.exists() && foreign.exists());
    assert_eq!(fetch(&store, &tree).await.unwrap(), noise(10_000, 1));
}
