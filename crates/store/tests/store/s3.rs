//! The store over HTTP: an S3 server in this process, on 127.0.0.1.

use std::process::Command;
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use stead_sim::s3::{BUCKET, KEY, SECRET, Server};
use stead_store::{Access, Error, Store};

use crate::conformance::suite;
use crate::fixture::*;

/// A server, and the folder it works in.
fn serve() -> (Server, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (Server::start(dir.path()).unwrap(), dir)
}

fn client(server: &Server, secret: &str) -> Arc<dyn ObjectStore> {
    let builder = AmazonS3Builder::new()
        .with_endpoint(format!("http://{}", server.address()))
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_bucket_name(BUCKET)
        .with_access_key_id(KEY)
        .with_secret_access_key(secret);
    Arc::new(builder.build().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_in_a_bucket_does_what_a_store_does() {
    let (server, _dir) = serve();
    suite(client(&server, SECRET)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_repeats_a_creation_knows_its_own_object_again() {
    let (server, _dir) = serve();
    server.lose_answers().await;
    let objects = client(&server, SECRET);
    let store = new_store(&objects).await;
    let (_, tree, _) = publish(&store, "x", noise(50_000, 1)).await.unwrap();
    store.gc(owner(), false).await.unwrap();
    let lost = server.lose_answers().await;
    assert_eq!(lost, 3, "of the description, the manifest and the gc lock");
    assert_eq!(fetch(&store, &tree).await.unwrap(), noise(50_000, 1));
    assert!(all_whole(&objects).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_are_told_as_such() {
    let (server, _dir) = serve();
    Store::init_object_store(client(&server, SECRET), "test")
        .await
        .unwrap();
    let refused = reopen(&client(&server, "wrong")).await;
    assert!(
        matches!(refused, Err(Error::Credentials { .. })),
        "{refused:?}"
    );
}

/// Runs in a process of its own, whose environment the test below sets.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the environment that a_bucket_is_reached_by_its_address_and_the_usual_variables sets"]
async fn child_that_opens_a_bucket_by_its_address() {
    let url = std::env::var("STEAD_TEST_STORE").expect("set by the parent");
    let cache = tempfile::tempdir().unwrap();
    let missing = Store::open(&url, cache.path(), Access::ReadOnly).await;
    assert!(matches!(missing, Err(Error::Missing { .. })), "{missing:?}");
    let store = Store::open_or_init(&url, cache.path()).await.unwrap();
    let content = noise(100_000, 1);
    let (_, tree, _) = publish(&store, "over http", content.clone()).await.unwrap();
    let store = Store::open(&url, cache.path(), Access::ReadOnly)
        .await
        .unwrap();
    assert_eq!(fetch(&store, &tree).await.unwrap(), content);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_is_reached_by_its_address_and_the_usual_variables() {
    let (server, _dir) = serve();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child
        .args([
            "--exact",
            "s3::child_that_opens_a_bucket_by_its_address",
            "--ignored",
        ])
        .env("STEAD_TEST_STORE", format!("s3://{BUCKET}/some/prefix"))
        .envs(server.variables());
    let output = tokio::task::spawn_blocking(move || child.output())
        .await
        .unwrap()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
    assert!(
        server
            .objects()
            .join("some/prefix/steadfast-store")
            .exists()
    );
}
