//! Chunks that lie in several packs, some of which cannot be read.

use std::collections::BTreeSet;
use std::sync::Arc;

use object_store::{ObjectStore, ObjectStoreExt};
use stead_store::{Error, Progress, TreeRef, Tuning};

use crate::fixture::*;

/// What packs of chunks and of nodes have at byte 12.
const KINDS: [u8; 2] = [1, 2];

fn content() -> Vec<u8> {
    noise(40 * CHUNK, 1)
}

fn seeded(seed: u64) -> Tuning {
    Tuning {
        id_seed: Some(seed),
        ..SMALL
    }
}

/// The objects of a folder whose path starts so.
async fn paths(objects: &Arc<dyn ObjectStore>, folder: &str) -> BTreeSet<String> {
    let all = crate::fixture::objects(objects).await.into_iter();
    let paths = all.map(|(path, _)| path);
    paths.filter(|path| path.starts_with(folder)).collect()
}

/// The packs of a kind among `packs`.
async fn of_kind(
    objects: &Arc<dyn ObjectStore>,
    packs: &BTreeSet<String>,
    kind: u8,
) -> Vec<String> {
    let mut found = Vec::new();
    for path in packs {
        if read_object(objects, path).await[12] == kind {
            found.push(path.clone());
        }
    }
    found
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Missing,
    Cut,
}

async fn lose(objects: &Arc<dyn ObjectStore>, pack: &str, loss: Loss) {
    match loss {
        Loss::Missing => objects.delete(&pack.into()).await.unwrap(),
        Loss::Cut => {
            let mut bytes = read_object(objects, pack).await;
            bytes.truncate(100);
            write_object(objects, pack, bytes).await;
        }
    }
}

/// A checkpoint that lost its only pack of a kind, and was published again.
struct Healed {
    objects: Arc<dyn ObjectStore>,
    lost: String,
    tree: TreeRef,
    /// Whether the index object that names the lost pack comes first.
    lost_is_first: bool,
}

async fn healed(round: u64, kind: u8, loss: Loss) -> Healed {
    let (objects, _) = memory().await;
    let store = reopen_with(&objects, seeded(2 * round)).await.unwrap();
    publish(&store, "base", content()).await.unwrap();
    let before = paths(&objects, "indexes/").await;
    let packs = paths(&objects, "packs/").await;
    let lost = of_kind(&objects, &packs, kind).await;
    assert_eq!((before.len(), lost.len()), (1, 1));
    lose(&objects, &lost[0], loss).await;
    let store = reopen_with(&objects, seeded(2 * round + 1)).await.unwrap();
    let (_, tree, report) = publish(&store, "again", content()).await.unwrap();
    assert_eq!(report.chunks_new > 0, kind == 1, "stored again");
    let after = paths(&objects, "indexes/").await;
    assert_eq!(after.len(), 2);
    Healed {
        lost_is_first: after.first() == before.first(),
        lost: lost[0].clone(),
        objects,
        tree,
    }
}

async fn assert_whole(objects: &Arc<dyn ObjectStore>, tree: &TreeRef, what: &str) {
    let store = reopen(objects).await.unwrap();
    assert_eq!(fetch(&store, tree).await.unwrap(), content(), "{what}");
    assert_eq!(assert_all_whole(objects).await, ["again", "base"], "{what}");
    let report = store.verify(&Progress::silent()).await.unwrap();
    assert_eq!(report.damaged_manifests, [], "{what}");
}

/// Runs `test` for packs of both kinds, missing and cut, named by the first index object and the last.
async fn each_healed(test: impl AsyncFn(Healed, String)) {
    for (kind, loss) in KINDS
        .into_iter()
        .flat_map(|kind| [(kind, Loss::Missing), (kind, Loss::Cut)])
    {
        let mut orders = BTreeSet::new();
        for round in 0..8 {
            let healed = healed(round, kind, loss).await;
            orders.insert(healed.lost_is_first);
            test(healed, format!("kind {kind} {loss:?} round {round}")).await;
        }
        assert_eq!(
            orders.len(),
            2,
            "both orders of the index objects were seen"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_stored_again_because_its_pack_was_lost_is_read() {
    each_healed(async |healed, what| {
        assert_whole(&healed.objects, &healed.tree, &what).await;
        let store = reopen(&healed.objects).await.unwrap();
        let report = store.verify(&Progress::silent()).await.unwrap();
        let damaged: Vec<_> = report.damaged_objects.iter().map(|d| &d.object).collect();
        assert!(
            damaged.iter().all(|object| **object == healed.lost),
            "{what}"
        );
        assert!(!damaged.is_empty(), "{what}: the lost pack is named");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_stored_again_is_not_stored_a_third_time() {
    each_healed(async |healed, what| {
        let store = reopen(&healed.objects).await.unwrap();
        let (_, _, report) = publish(&store, "third", content()).await.unwrap();
        assert_eq!((report.chunks_new, report.objects), (0, 1), "{what}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gc_keeps_the_whole_copy_of_what_was_stored_again() {
    each_healed(async |healed, what| {
        let store = reopen(&healed.objects).await.unwrap();
        let report = store.gc(owner(), false).await.unwrap();
        assert_eq!(report.waiting_for, [], "{what}");
        assert_whole(&healed.objects, &healed.tree, &what).await;
        let store = reopen(&healed.objects).await.unwrap();
        let report = store.verify(&Progress::silent()).await.unwrap();
        assert!(report.is_clean(), "{what}: {report:?}");
        let idle = store.gc(owner(), false).await.unwrap();
        assert_eq!((idle.dead_packs, idle.rewritten_packs), (0, 0), "{what}");
    })
    .await;
}

/// The same content in two packs of each kind: two publishes that did not see each other.
async fn twice(tuning: Tuning, content: Vec<u8>) -> (Arc<dyn ObjectStore>, TreeRef) {
    let (objects, _) = memory().await;
    let mut running = Vec::new();
    for name in ["base", "again"] {
        let store = reopen_with(&objects, tuning).await.unwrap();
        running.push((name, store.begin_publish(owner()).await.unwrap()));
    }
    let mut trees = BTreeSet::new();
    for (name, mut publish) in running {
        let tree = add(&mut publish, content.clone()).await.unwrap();
        publish.commit(&manifest(name, tree)).await.unwrap();
        trees.insert(tree);
    }
    assert_eq!(trees.len(), 1);
    (objects, *trees.first().unwrap())
}

async fn flip(objects: &Arc<dyn ObjectStore>, pack: &str, at: usize) {
    let mut bytes = read_object(objects, pack).await;
    bytes[at] ^= 4;
    write_object(objects, pack, bytes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_damaged_copies_that_complete_each_other_are_enough() {
    let large = Tuning {
        pack_target_bytes: 32 << 20,
        ..SMALL
    };
    let content = noise(6 << 20, 3);
    let (sound, tree) = twice(large, content.clone()).await;
    let packs = paths(&sound, "packs/").await;
    let copies = of_kind(&sound, &packs, 1).await;
    assert_eq!(copies.len(), 2);
    for (cut, flipped) in [(0, 1), (1, 0)] {
        let objects = copy_of(&sound).await;
        // One has its first frames only, the other all but its first.
        let mut bytes = read_object(&objects, &copies[cut]).await;
        bytes.truncate(bytes.len() / 2);
        write_object(&objects, &copies[cut], bytes).await;
        flip(&objects, &copies[flipped], 70).await;
        let store = reopen(&objects).await.unwrap();
        assert_eq!(fetch(&store, &tree).await.unwrap(), content);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_copy_has_is_named_together_with_what_needs_it() {
    let (objects, tree) = twice(SMALL, content()).await;
    let packs = paths(&objects, "packs/").await;
    for kind in KINDS {
        let objects = copy_of(&objects).await;
        let copies = of_kind(&objects, &packs, kind).await;
        assert_eq!(copies.len(), 2);
        for copy in &copies {
            assert_whole(&objects, &tree, copy).await;
            flip(&objects, copy, 70).await;
        }
        let store = reopen(&objects).await.unwrap();
        let error = fetch(&store, &tree).await.expect_err("no copy is left");
        let text = error.to_string();
        assert!(text.contains("needed by bytes"), "{text}");
        assert!(copies.iter().any(|copy| text.contains(copy)), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gc_deletes_no_copy_before_the_one_it_keeps_was_read() {
    let (sound, tree) = twice(SMALL, content()).await;
    let packs = paths(&sound, "packs/").await;
    for kind in KINDS {
        let mut spared = 0;
        for copy in of_kind(&sound, &packs, kind).await {
            let objects = copy_of(&sound).await;
            flip(&objects, &copy, 70).await;
            let store = reopen(&objects).await.unwrap();
            let report = store.gc(owner(), false).await.unwrap();
            assert_eq!(report.dead_packs, 2, "one of each kind is enough");
            spared += report.spared_packs;
            assert_whole(&objects, &tree, &copy).await;
        }
        assert_eq!(spared, 1, "gc meant to keep one of the two");
    }
    let store = reopen(&sound).await.unwrap();
    let report = store.gc(owner(), false).await.unwrap();
    assert_eq!((report.dead_packs, report.spared_packs), (2, 0));
    assert_eq!(paths(&sound, "packs/").await.len(), 2);
    assert_whole(&sound, &tree, "sound copies").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gc_stops_where_only_a_cut_pack_has_what_is_needed() {
    let (objects, store) = memory().await;
    publish(&store, "base", content()).await.unwrap();
    let packs = paths(&objects, "packs/").await;
    let pack = of_kind(&objects, &packs, 1).await.remove(0);
    let mut bytes = read_object(&objects, &pack).await;
    bytes.truncate(bytes.len() - 1);
    write_object(&objects, &pack, bytes).await;
    let before = crate::fixture::objects(&objects).await;
    let refused = reopen(&objects).await.unwrap().gc(owner(), false).await;
    assert!(
        matches!(refused, Err(Error::GcBlocked { .. })),
        "{refused:?}"
    );
    assert_eq!(crate::fixture::objects(&objects).await, before);
}
