//! Stores that are missing, full, read-only or not what they should be, each told apart.

use std::io::ErrorKind;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use stead_sim::{Fault, FaultStore};
use stead_store::{Access, Error, Store};

use crate::fixture::*;

#[tokio::test]
async fn a_folder_store_is_missing_until_it_is_created() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let url = dir.path().join("deep/store").to_str().unwrap().to_owned();
    let open = || Store::open(&url, &cache, Access::ReadWrite);
    let missing = open().await.expect_err("no folder");
    assert!(matches!(missing, Error::Missing { .. }), "{missing}");
    stead_sys::durable::create_dir(std::path::Path::new(&url), 0o700).unwrap();
    let missing = open().await.expect_err("a folder without a store");
    assert!(
        missing.to_string().contains("the store is missing"),
        "{missing}"
    );
    Store::init(&url).await.unwrap();
    let store = open().await.unwrap();
    let (_, tree, _) = publish(&store, "one", noise(50_000, 1)).await.unwrap();
    let same = Store::open(&format!("file://{url}"), &cache, Access::ReadOnly)
        .await
        .unwrap();
    assert_eq!(same.id(), store.id());
    assert_eq!(fetch(&same, &tree).await.unwrap(), noise(50_000, 1));
    let refused = same.begin_publish(owner()).await;
    assert!(matches!(refused, Err(Error::ReadOnly { .. })));
    let again = Store::init(&url).await;
    assert!(matches!(again, Err(Error::AlreadyThere { .. })));
    Store::open_or_init(&url, &cache).await.unwrap();
}

async fn open_failing(kind: ErrorKind) -> Error {
    let (objects, _) = memory().await;
    let objects: Arc<dyn ObjectStore> =
        Arc::new(FaultStore::new(objects, 2, Fault::KilledBefore).with_error(kind));
    reopen(&objects).await.expect_err("the second call creates")
}

#[tokio::test]
async fn full_and_read_only_stores_are_told_apart_when_opened_for_writing() {
    let full = open_failing(ErrorKind::StorageFull).await;
    assert!(matches!(full, Error::Full { .. }), "{full}");
    for kind in [ErrorKind::ReadOnlyFilesystem, ErrorKind::PermissionDenied] {
        let read_only = open_failing(kind).await;
        assert!(matches!(read_only, Error::ReadOnly { .. }), "{read_only}");
    }
    let other = open_failing(ErrorKind::ConnectionReset).await;
    assert!(matches!(other, Error::Backend { .. }), "{other}");
}

#[tokio::test]
async fn a_store_that_fills_up_during_a_publish_says_so_and_keeps_what_it_had() {
    let (objects, store) = memory().await;
    publish(&store, "before", noise(300_000, 1)).await.unwrap();
    let calls = Arc::new(
        FaultStore::new(Arc::clone(&objects), 12, Fault::KilledBefore)
            .with_error(ErrorKind::StorageFull),
    );
    let full: Arc<dyn ObjectStore> = calls;
    let store = reopen(&full).await.unwrap();
    let error = publish(&store, "after", noise(3_000_000, 2))
        .await
        .expect_err("full");
    assert!(matches!(error, Error::Full { .. }), "{error}");
    assert_eq!(assert_all_whole(&objects).await, ["before"]);
}

#[tokio::test]
async fn a_newer_or_damaged_store_is_refused() {
    for (config, expected) in [
        (
            &br#"{"format":2,"id":"x","more":1}"#[..],
            "format version 2",
        ),
        (br#"{"format":1,"id":"../escape"}"#, "damaged"),
        (b"\xff", "damaged"),
    ] {
        let (objects, _) = memory().await;
        write_object(&objects, "steadfast-store", config.to_vec()).await;
        let error = reopen(&objects).await.expect_err("refused");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// Overwrites whatever it is told to create.
#[derive(Debug)]
struct Careless(InMemory);

impl std::fmt::Display for Careless {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "careless {}", self.0)
    }
}

#[async_trait]
impl ObjectStore for Careless {
    async fn put_opts(
        &self,
        to: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> object_store::Result<PutResult> {
        options.mode = PutMode::Overwrite;
        self.0.put_opts(to, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.0.get_opts(from, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.0.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.0.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &Path,
        to: &Path,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

#[tokio::test]
async fn a_store_that_ignores_conditional_creation_is_not_opened_for_writing() {
    let careless: Arc<dyn ObjectStore> = Arc::new(Careless(InMemory::new()));
    Store::init_object_store(Arc::clone(&careless), "test")
        .await
        .unwrap();
    let refused = reopen(&careless).await;
    assert!(matches!(refused, Err(Error::NoConditionalCreate { .. })));
    let reading = Store::with_object_store(careless, "test", None, Access::ReadOnly, SMALL).await;
    reading.expect("reading needs no such promise");
}
