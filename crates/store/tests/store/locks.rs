//! The gc lock, broken while a gc or an index rebuild runs.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use stead_store::{Error, Lease, LeaseOwner, Store};

use crate::fixture::*;

const LOCK: &str = "gc-lock";

/// Who has the lock after it was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Nobody,
    Another,
}

/// Breaks the lock just before a chosen call, if it is there.
#[derive(Debug)]
struct Breaker {
    inner: Arc<dyn ObjectStore>,
    calls: AtomicU64,
    at_call: u64,
    then: Then,
}

impl fmt::Display for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} whose lock is broken at call {}",
            self.inner, self.at_call
        )
    }
}

fn another() -> Vec<u8> {
    let lease = Lease {
        owner: LeaseOwner {
            process: "7@7".to_owned(),
            ..owner()
        },
        started: "2025-01-02T03:04:05Z".parse().unwrap(),
    };
    serde_json::to_vec(&lease).unwrap()
}

impl Breaker {
    async fn count(&self) {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let lock = Path::from(LOCK);
        if call != self.at_call || self.inner.head(&lock).await.is_err() {
            return;
        }
        match self.then {
            Then::Nobody => self.inner.delete(&lock).await.unwrap(),
            Then::Another => drop(self.inner.put(&lock, another().into()).await.unwrap()),
        }
    }
}

#[async_trait]
impl ObjectStore for Breaker {
    async fn put_opts(
        &self,
        to: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.count().await;
        self.inner.put_opts(to, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> Result<GetResult> {
        self.count().await;
        self.inner.get_opts(from, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

async fn with_garbage() -> Arc<dyn ObjectStore> {
    let (objects, store) = memory().await;
    let (removed, _, _) = publish(&store, "removed", noise(400_000, 1)).await.unwrap();
    publish(&store, "kept", noise(50_000, 1)).await.unwrap();
    store.remove_manifest(removed).await.unwrap();
    objects
}

async fn paths(objects: &Arc<dyn ObjectStore>) -> BTreeSet<String> {
    let all = crate::fixture::objects(objects).await.into_iter();
    all.map(|(path, _)| path)
        .filter(|path| path != LOCK)
        .collect()
}

/// Runs `work` with the lock broken before each of its calls in turn.
async fn broken_at_each_call<T>(then: Then, work: impl AsyncFn(Store) -> Result<T, Error>) {
    let start = with_garbage().await;
    let mut refused = 0;
    for at_call in 1.. {
        let objects = copy_of(&start).await;
        let before = paths(&objects).await;
        let breaker = Arc::new(Breaker {
            inner: Arc::clone(&objects),
            calls: AtomicU64::new(0),
            at_call,
            then,
        });
        let way: Arc<dyn ObjectStore> = Arc::clone(&breaker) as _;
        let result = work(reopen(&way).await.unwrap()).await;
        let lock = objects.get(&LOCK.into()).await.ok();
        match &result {
            Err(Error::LockLost { .. }) => {
                refused += 1;
                assert!(paths(&objects).await.is_superset(&before), "call {at_call}");
            }
            Err(other) => panic!("call {at_call}: {other}"),
            Ok(_) => {}
        }
        if let Some(lock) = lock {
            assert_eq!(then, Then::Another, "call {at_call}");
            assert_eq!(lock.bytes().await.unwrap(), another(), "not ours to delete");
        }
        assert_eq!(assert_all_whole(&objects).await, ["kept"], "call {at_call}");
        if breaker.calls.load(Ordering::SeqCst) < at_call {
            assert!(refused > 3, "{refused} of {at_call}");
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gc_whose_lock_was_broken_deletes_nothing_and_leaves_the_lock_of_another() {
    for then in [Then::Nobody, Then::Another] {
        broken_at_each_call(then, async |store| store.gc(owner(), false).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_rebuild_whose_lock_was_broken_deletes_nothing() {
    for then in [Then::Nobody, Then::Another] {
        broken_at_each_call(then, async |store| store.rebuild_index(owner()).await).await;
    }
}
