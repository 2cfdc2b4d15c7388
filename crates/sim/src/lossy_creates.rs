//! An object store on which conditional puts go wrong in the ways that leave it open whether they took
//! effect.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// What is lost of the first conditional put of each object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// It takes effect, and an error is all that comes back, as when a connection breaks.
    Answer,
    /// It takes effect, its answer is lost, and the client repeats it: "already exists".
    AnswerOfTheFirstTry,
    /// It has no effect, and the answer is "already exists": S3 says so (status 409) when another request
    /// for the same object is in the way.
    Effect,
}

/// An object store with such losses.
#[derive(Debug)]
pub struct LossyCreates {
    inner: Arc<dyn ObjectStore>,
    lost: Lost,
    seen: Mutex<BTreeSet<Path>>,
}

impl fmt::Display for LossyCreates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} that loses {:?}", self.inner, self.lost)
    }
}

impl LossyCreates {
    /// `inner`, losing `lost`.
    #[must_use]
    pub fn new(inner: Arc<dyn ObjectStore>, lost: Lost) -> Self {
        Self {
            inner,
            lost,
            seen: Mutex::default(),
        }
    }

    /// The objects of which something was lost.
    #[must_use]
    pub fn losses(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().map(ToString::to_string).collect()
    }

    fn is_first(&self, to: &Path) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.insert(to.clone())
    }
}

#[async_trait]
impl ObjectStore for LossyCreates {
    async fn put_opts(
        &self,
        to: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let put = || self.inner.put_opts(to, payload.clone(), options.clone());
        if options.mode != PutMode::Create || !self.is_first(to) {
            return put().await;
        }
        match self.lost {
            Lost::Answer => {
                put().await?;
                Err(Error::Generic {
                    store: "LossyCreates",
                    source: Box::new(io::Error::from(io::ErrorKind::TimedOut)),
                })
            }
            Lost::AnswerOfTheFirstTry => {
                put().await?;
                put().await
            }
            Lost::Effect => Err(Error::AlreadyExists {
                path: to.to_string(),
                source: Box::new(io::Error::from(io::ErrorKind::ResourceBusy)),
            }),
        }
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> Result<GetResult> {
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

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    use super::*;

    #[tokio::test]
    async fn each_loss_is_what_it_says_and_happens_once_an_object() {
        for (lost, is_there) in [
            (Lost::Answer, true),
            (Lost::AnswerOfTheFirstTry, true),
            (Lost::Effect, false),
        ] {
            let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let store = LossyCreates::new(Arc::clone(&memory), lost);
            let path = Path::from("new");
            let create = || store.put_opts(&path, "x".into(), PutMode::Create.into());
            let error = create().await.expect_err("lost");
            let exists = matches!(error, Error::AlreadyExists { .. });
            assert_eq!(exists, lost != Lost::Answer, "{lost:?}");
            assert_eq!(memory.head(&path).await.is_ok(), is_there, "{lost:?}");
            assert_eq!(create().await.is_ok(), !is_there, "{lost:?}");
            assert!(store.put(&path, "y".into()).await.is_ok(), "{lost:?}");
            assert_eq!(store.losses(), ["new"]);
        }
    }
}
