//! What holds for every content.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use stead_store::{Base, Error, Progress, hash_source};

use crate::fixture::*;

/// Chunks from a small alphabet, so that contents share some, at random places with holes between.
fn sparse() -> impl Strategy<Value = Sparse> {
    let extent = (0_u64..1 << 20, 1_u64..40_000, 0_u64..6);
    (0_u64..1 << 20, proptest::collection::vec(extent, 0..6)).prop_map(|(length, extents)| {
        let mut data: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let mut end = 0;
        let mut sorted = extents;
        sorted.sort_unstable();
        for (at, bytes, seed) in sorted {
            let at = if at % 2 == 0 { at / CHUNK * CHUNK } else { at };
            if at >= end && at < length {
                data.insert(at, noise(bytes, seed));
                end = at + bytes;
            }
        }
        Sparse { length, data }
    })
}

fn on_runtime<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(test)
}

/// Where two contents differ, byte by byte, at least.
fn differences(a: &[u8], b: &[u8]) -> Vec<Range<u64>> {
    let common = a.len().min(b.len());
    let piece = |at: usize| at as u64..(at + 512).min(common) as u64;
    (0..common)
        .step_by(512)
        .map(piece)
        .filter(|r| a[r.start as usize..r.end as usize] != b[r.start as usize..r.end as usize])
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_fetched_is_what_was_published(content in sparse()) {
        on_runtime(async {
            let (_, store) = memory().await;
            let (_, tree, _) = publish(&store, "x", content.clone()).await.unwrap();
            assert_eq!(fetch(&store, &tree).await.unwrap(), content.bytes());
            let dense = hash_source(&content.bytes(), chunk_size(), 3, &Progress::silent()).unwrap();
            assert_eq!(tree, dense, "holes make no difference");
        });
    }

    #[test]
    fn an_increment_has_the_root_of_a_full_publish(before in sparse(), after in sparse()) {
        on_runtime(async {
            let (_, store) = memory().await;
            let (_, tree, _) = publish(&store, "before", before.clone()).await.unwrap();
            let changed = differences(&before.bytes(), &after.bytes());
            let mut publish = store.begin_publish(owner()).await.unwrap();
            let base = Base { tree, changed: changed.clone() };
            let increment = add_on(&mut publish, after.clone(), base).await.unwrap();
            let full = hash_source(&after, chunk_size(), 2, &Progress::silent()).unwrap();
            assert_eq!(increment, full);
            let base = Base { tree, changed: changed.clone() };
            let silent = Progress::silent();
            let named = store.name_changed(Arc::new(after.clone()), base, &silent).await.unwrap();
            assert_eq!(named, full, "naming reads and stores less, and says the same");
            publish.commit(&manifest("after", increment)).await.unwrap();
            assert_eq!(fetch(&store, &increment).await.unwrap(), after.bytes());
            let found = store.locate_damage(&tree, Arc::new(after.clone()), &silent).await.unwrap();
            let covers = |at: u64| found.iter().any(|range| range.contains(&at));
            assert!(changed.iter().all(|range| covers(range.start)));
            assert_eq!(found.is_empty(), before.bytes() == after.bytes());
        });
    }
}

#[tokio::test]
async fn an_increment_does_not_rely_on_chunks_that_are_lost() {
    let (objects, store) = memory().await;
    let content = noise(2_000_000, 1);
    let (_, tree, _) = publish(&store, "base", content.clone()).await.unwrap();
    let packs = crate::fixture::objects(&objects).await;
    let largest = packs.iter().max_by_key(|(_, bytes)| *bytes).unwrap();
    use object_store::ObjectStoreExt;
    objects.delete(&largest.0.as_str().into()).await.unwrap();
    let mut publish = store.begin_publish(owner()).await.unwrap();
    let base = Base {
        tree,
        changed: Vec::new(),
    };
    let again = add_on(&mut publish, content.clone(), base).await.unwrap();
    assert_eq!(again, tree);
    publish.commit(&manifest("healed", again)).await.unwrap();
    let store = reopen(&objects).await.unwrap();
    assert_eq!(fetch(&store, &tree).await.unwrap(), content);
}

#[tokio::test]
async fn progress_reaches_the_end_and_stops_where_it_is_told() {
    let (_, store) = memory().await;
    let seen = Arc::new(AtomicU64::new(0));
    let last = Arc::clone(&seen);
    let progress = Progress::new(move |step| {
        last.store(step.done_bytes, Ordering::SeqCst);
        assert!(step.done_bytes <= step.total_bytes);
        ControlFlow::Continue(())
    });
    let content = noise(5_000_000, 1);
    let mut publish = store.begin_publish(owner()).await.unwrap();
    let source = Arc::new(content.clone());
    publish
        .add_tree(source.clone(), chunk_size(), None, &progress)
        .await
        .unwrap();
    assert_eq!(seen.load(Ordering::SeqCst), 5_000_000);
    let stop = Progress::new(|step| {
        if step.done_bytes > 2_000_000 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    let stopped = publish.add_tree(source, chunk_size(), None, &stop).await;
    assert!(matches!(stopped, Err(Error::Cancelled)));
    let broken = add(&mut publish, vec![1]).await;
    assert!(matches!(broken, Err(Error::PublishBroken)));
    publish.abort().await.unwrap();
}

#[tokio::test]
async fn holes_stay_holes() {
    let (_, store) = memory().await;
    let content = Sparse {
        length: 64 << 20,
        data: [(1 << 20, noise(8192, 1)), (40 << 20, noise(4096, 2))].into(),
    };
    let (_, tree, report) = publish(&store, "x", content.clone()).await.unwrap();
    assert_eq!(report.read_bytes, 3 * CHUNK);
    let (bytes, _, file) = fetch_file(&store, &tree).await.unwrap();
    assert_eq!(bytes, content.bytes());
    let ranges = stead_sys::copy::data_ranges(&file).unwrap();
    let data: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    assert!(data <= 3 * CHUNK, "{ranges:?}");
}
