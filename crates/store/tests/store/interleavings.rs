//! Garbage collection beside a publish, in every order of their store calls.
//!
//! Each run starts from a store with dead packs, a pack that is mostly dead, and one live checkpoint.
//! The publish wants exactly the content that gc is about to delete.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use stead_sim::interleave::{Explorer, Finish, GatedStore};
use stead_store::{Base, GcReport, Progress, Result, TreeRef, Tuning};
use tokio::runtime::Runtime;

use crate::fixture::*;

/// A store whose listings leave out one folder: what the protocol relies on is taken away.
#[derive(Debug)]
struct Blind {
    inner: Arc<dyn ObjectStore>,
    hidden: &'static str,
}

impl fmt::Display for Blind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} without {}", self.inner, self.hidden)
    }
}

#[async_trait]
impl ObjectStore for Blind {
    async fn put_opts(
        &self,
        to: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.inner.put_opts(to, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.inner.get_opts(from, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        if prefix.is_some_and(|prefix| prefix.as_ref() == self.hidden) {
            return stream::empty().boxed();
        }
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &Path,
        to: &Path,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// What each actor cannot see; empty for nothing.
#[derive(Clone, Copy)]
struct Blindness {
    publish: &'static str,
    gc: &'static str,
}

const SEEING: Blindness = Blindness {
    publish: "",
    gc: "",
};

fn blind(inner: Arc<GatedStore>, hidden: &'static str) -> Arc<dyn ObjectStore> {
    if hidden.is_empty() {
        inner
    } else {
        Arc::new(Blind { inner, hidden })
    }
}

/// The content that gc is about to delete.
fn doomed() -> Vec<u8> {
    noise(24 * CHUNK, 7)
}

/// One live checkpoint of a few of the doomed chunks, and the removed one that had them all.
async fn starting_point() -> (Arc<dyn ObjectStore>, TreeRef) {
    let (objects, store) = memory().await;
    let (removed, tree, _) = publish(&store, "removed", doomed()).await.unwrap();
    let some = doomed()[..(3 * CHUNK) as usize].to_vec();
    publish(&store, "kept", some).await.unwrap();
    store.remove_manifest(removed).await.unwrap();
    (objects, tree)
}

/// Every run of an actor draws the same ids.
fn seeded(seed: u64) -> Tuning {
    Tuning {
        id_seed: Some(seed),
        ..SMALL
    }
}

async fn publisher(
    objects: Arc<dyn ObjectStore>,
    gate: Arc<GatedStore>,
    base: Option<TreeRef>,
    finish: Finish,
) -> Result<()> {
    let store = reopen_with(&objects, seeded(1)).await.unwrap();
    gate.close();
    let mut publish = store.begin_publish(owner()).await?;
    let added = match base {
        None => add(&mut publish, doomed()).await,
        Some(tree) => {
            let changed = Vec::new();
            add_on(&mut publish, doomed(), Base { tree, changed }).await
        }
    };
    let result = match added {
        Ok(tree) => publish.commit(&manifest("new", tree)).await.map(drop),
        Err(error) => {
            publish.abort().await.unwrap();
            Err(error)
        }
    };
    drop(finish);
    result
}

async fn collector(
    objects: Arc<dyn ObjectStore>,
    gate: Arc<GatedStore>,
    finish: Finish,
) -> Result<GcReport> {
    let store = reopen_with(&objects, seeded(2)).await.unwrap();
    gate.close();
    let report = store.gc(owner(), false).await;
    drop(finish);
    report
}

/// What all orders together showed.
#[derive(Debug, Default)]
struct Seen {
    orders: u64,
    committed: u64,
    collected: u64,
    waited: u64,
    losses: u64,
}

/// A runtime that a failing test does not wait for: its actors may stand at the gate.
struct Background(Option<Runtime>);

impl Background {
    fn get(&self) -> &Runtime {
        self.0.as_ref().unwrap()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.0.take().unwrap().shutdown_background();
    }
}

fn every_order(blindness: Blindness, with_base: bool) -> Seen {
    let background = Background(Some(Runtime::new().unwrap()));
    let runtime = background.get();
    let (start, tree) = runtime.block_on(starting_point());
    let mut explorer = Explorer::new();
    let mut seen = Seen::default();
    while let Some(run) = explorer.next_run() {
        let objects = runtime.block_on(copy_of(&start));
        let (gate, finish) = run.actor(0, &objects);
        let way = blind(Arc::clone(&gate), blindness.publish);
        let publish = runtime.spawn(publisher(way, gate, with_base.then_some(tree), finish));
        let (gate, finish) = run.actor(1, &objects);
        let way = blind(Arc::clone(&gate), blindness.gc);
        let gc = runtime.spawn(collector(way, gate, finish));
        let order = explorer.drive(&run);
        let published = runtime.block_on(publish).unwrap();
        let report = runtime
            .block_on(gc)
            .unwrap()
            .expect("gc is not disturbed by a publish");
        seen.committed += u64::from(published.is_ok());
        seen.collected += u64::from(report.deleted_bytes > 0);
        seen.waited += u64::from(!report.waiting_for.is_empty());
        match runtime.block_on(all_whole(&objects)) {
            Ok(names) => {
                let expected = if published.is_ok() {
                    &["kept", "new"][..]
                } else {
                    &["kept"]
                };
                assert_eq!(names, expected, "after {order:?}");
            }
            Err(loss) => {
                assert!(
                    loss.contains("packs/") || loss.contains("no index"),
                    "{loss}"
                );
                seen.losses += 1;
            }
        }
        if published.is_err() {
            assert!(
                with_base,
                "only the nodes of a removed base can be missing: {published:?}"
            );
        }
    }
    seen.orders = explorer.runs();
    println!("base {with_base}: {seen:?}");
    seen
}

#[test]
fn no_order_of_a_publish_and_a_gc_loses_a_committed_chunk() {
    let seen = every_order(SEEING, false);
    assert_eq!(seen.losses, 0, "{seen:?}");
    assert!(
        seen.orders > 20 && seen.collected > 0 && seen.waited > 0,
        "{seen:?}"
    );
}

#[test]
fn no_order_of_an_incremental_publish_and_a_gc_loses_a_committed_chunk() {
    let seen = every_order(SEEING, true);
    assert_eq!(seen.losses, 0, "{seen:?}");
    assert!(
        seen.committed > 0 && seen.collected > 0 && seen.waited > 0,
        "{seen:?}"
    );
}

#[test]
fn without_the_lease_some_order_loses_a_chunk() {
    let seen = every_order(
        Blindness {
            gc: "leases",
            ..SEEING
        },
        false,
    );
    assert!(seen.losses > 0, "{seen:?}");
}

#[test]
fn without_the_condemned_list_some_order_loses_a_chunk() {
    let seen = every_order(
        Blindness {
            publish: "condemned",
            ..SEEING
        },
        false,
    );
    assert!(seen.losses > 0, "{seen:?}");
}

#[tokio::test]
async fn packs_that_are_mostly_garbage_are_rewritten_and_what_is_in_use_stays_readable() {
    let (objects, store) = memory().await;
    let all = noise(100 * CHUNK, 3);
    let (removed, _, _) = publish(&store, "removed", all.clone()).await.unwrap();
    let some = all[..(20 * CHUNK) as usize].to_vec();
    let (id, tree, _) = publish(&store, "kept", some.clone()).await.unwrap();
    store.remove_manifest(removed).await.unwrap();
    // Another worker that has the old index in memory.
    let reader = reopen(&objects).await.unwrap();
    let report = store.gc(owner(), false).await.unwrap();
    assert!(
        report.rewritten_packs > 0 && report.deleted_bytes > 0,
        "{report:?}"
    );
    assert_eq!(fetch(&reader, &tree).await.unwrap(), some);
    assert!(store.verify(&Progress::silent()).await.unwrap().is_clean());
    let usage = store.usage(id).await.unwrap();
    assert_eq!(usage.raw_bytes, usage.unique_raw_bytes);
    let idle = store.gc(owner(), false).await.unwrap();
    assert_eq!((idle.dead_packs, idle.rewritten_packs), (0, 0));
    let bytes: u64 = crate::fixture::objects(&objects)
        .await
        .iter()
        .map(|(_, b)| b)
        .sum();
    assert!(bytes < usage.stored_bytes + 10_000, "{bytes} of {usage:?}");
}

#[tokio::test]
async fn a_gc_that_has_to_wait_again_and_again_condemns_a_pack_once() {
    let (objects, store) = memory().await;
    for number in 1..4 {
        let publish = store.begin_publish(owner()).await.unwrap();
        let (removed, _, _) = crate::fixture::publish(&store, "x", noise(50_000, number))
            .await
            .unwrap();
        store.remove_manifest(removed).await.unwrap();
        for _ in 0..3 {
            let report = store.gc(owner(), false).await.unwrap();
            assert_eq!(report.waiting_for.len(), 1);
            assert_eq!(report.dead_packs, 2 * number);
        }
        let all = crate::fixture::objects(&objects).await;
        let lists = all
            .iter()
            .filter(|(path, _)| path.starts_with("condemned/"));
        assert_eq!(lists.count() as u64, number, "only for what is new");
        publish.abort().await.unwrap();
    }
    let report = store.gc(owner(), false).await.unwrap();
    assert!(report.deleted_bytes > 0 && report.waiting_for.is_empty());
    let all = crate::fixture::objects(&objects).await;
    assert_eq!(all.len(), 1, "only the description is left: {all:?}");
}
