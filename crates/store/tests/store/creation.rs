//! Conditional puts of which it is not told whether they took effect: the store knows its own again.

use std::sync::Arc;

use object_store::ObjectStore;
use object_store::memory::InMemory;
use stead_sim::{LossyCreates, Lost};
use stead_store::{Error, Store};

use crate::fixture::*;

const LOSSES: [Lost; 3] = [Lost::Answer, Lost::AnswerOfTheFirstTry, Lost::Effect];

/// `inner` with each conditional put losing something, and what was lost.
fn lossy(inner: &Arc<dyn ObjectStore>, lost: Lost) -> (Arc<dyn ObjectStore>, Arc<LossyCreates>) {
    let lossy = Arc::new(LossyCreates::new(Arc::clone(inner), lost));
    (Arc::clone(&lossy) as _, lossy)
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_lost_of_a_conditional_put_the_operation_succeeds() {
    for lost in LOSSES {
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let (way, log) = lossy(&memory, lost);
        Store::init_object_store(Arc::clone(&way), "test")
            .await
            .unwrap();
        let store = reopen(&memory).await.unwrap();
        let (removed, _, _) = publish(&store, "removed", noise(90_000, 1)).await.unwrap();
        store.remove_manifest(removed).await.unwrap();
        let store = reopen(&way).await.unwrap();
        let (id, _, report) = publish(&store, "new", noise(50_000, 2)).await.unwrap();
        assert!(report.lease_removed);
        let manifest = format!("checkpoints/{id}");
        assert_eq!(
            log.losses(),
            [manifest.as_str(), "steadfast-store"],
            "{lost:?}"
        );
        assert_eq!(assert_all_whole(&memory).await, ["new"], "{lost:?}");
        let report = store.gc(owner(), false).await.unwrap();
        assert!(report.deleted_bytes > 0, "{lost:?}");
        assert!(log.losses().contains(&"gc-lock".to_owned()), "{lost:?}");
        let (way, log) = lossy(&memory, lost);
        let store = reopen(&way).await.unwrap();
        store.rebuild_index(owner()).await.unwrap();
        assert_eq!(log.losses(), ["gc-lock", "steadfast-store"], "{lost:?}");
        let left = objects(&memory).await;
        assert!(left.iter().all(|(path, _)| path != "gc-lock"), "{left:?}");
        assert_eq!(assert_all_whole(&memory).await, ["new"], "{lost:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_have_created_is_not_taken_for_ones_own() {
    for lost in LOSSES {
        let (memory, _) = memory().await;
        let (way, _) = lossy(&memory, lost);
        let again = Store::init_object_store(Arc::clone(&way), "test").await;
        assert!(matches!(again, Err(Error::AlreadyThere { .. })), "{lost:?}");
        let store = reopen(&way).await.unwrap();
        let other = stead_store::LeaseOwner {
            process: "43@4711".to_owned(),
            ..owner()
        };
        let held = stead_store::Lease {
            owner: other.clone(),
            started: "2025-01-02T03:04:05Z".parse().unwrap(),
        };
        let lock = serde_json::to_vec(&held).unwrap();
        write_object(&memory, "gc-lock", lock.clone()).await;
        let refused = store.gc(owner(), false).await;
        let Err(Error::Locked { holder, .. }) = refused else {
            panic!("{lost:?}: {refused:?}");
        };
        assert_eq!(holder.owner, other, "{lost:?}");
        assert_eq!(read_object(&memory, "gc-lock").await, lock, "{lost:?}");
    }
}
