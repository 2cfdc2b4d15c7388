//! The folder or bucket behind a store, as the synchronous core uses it.
//!
//! Every call here blocks its thread until the object store has answered, so an operation cannot be
//! dropped with a write in flight. The asynchronous edge ([`crate::Store`]) runs operations on
//! threads that may block.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::prefix::PrefixStore;
use object_store::{ClientConfigKey, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use tokio::runtime::Handle;

use crate::error::{Error, Result};

/// How often a creation is repeated that was refused although nothing is there.
const CREATE_TRIES: u32 = 5;
/// The pause before the first repetition; each later one is twice as long.
const CREATE_PAUSE: Duration = Duration::from_millis(20);

/// Where a store is.
#[derive(Debug, Clone)]
pub(crate) enum Address {
    Folder(PathBuf),
    Bucket { bucket: String, prefix: String },
}

impl Address {
    pub(crate) fn parse(url: &str) -> Result<Self> {
        let bad = |reason: &str| Error::BadUrl {
            url: url.to_owned(),
            reason: reason.to_owned(),
        };
        if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                return Err(bad("it names no bucket"));
            }
            return Ok(Self::Bucket {
                bucket: bucket.to_owned(),
                prefix: prefix.trim_matches('/').to_owned(),
            });
        }
        let folder = url.strip_prefix("file://").unwrap_or(url);
        if folder.contains("://") {
            return Err(bad("the kind of store is unknown"));
        }
        if folder.is_empty() {
            return Err(bad("it is empty"));
        }
        Ok(Self::Folder(folder.into()))
    }

    /// The folder or bucket; a folder must be there.
    pub(crate) fn connect(&self, url: &str) -> Result<Backend> {
        match self {
            Self::Folder(path) => {
                let store = LocalFileSystem::new_with_prefix(path).map_err(|source| {
                    if path.exists() {
                        return Error::backend("open", url, source);
                    }
                    Error::Missing {
                        url: url.to_owned(),
                        source: Some(Box::new(source)),
                    }
                })?;
                // Without this a checkpoint could be listed after a power failure, and its chunks gone.
                let store = store.with_fsync(true);
                Ok(Backend {
                    store: Arc::new(store),
                    folder: Some(Arc::from(path.as_path())),
                    url: Arc::from(url),
                })
            }
            Self::Bucket { bucket, prefix } => {
                let store = bucket_builder(bucket)
                    .build()
                    .map_err(|error| Error::BadUrl {
                        url: url.to_owned(),
                        reason: error.to_string(),
                    })?;
                let store: Arc<dyn ObjectStore> = if prefix.is_empty() {
                    Arc::new(store)
                } else {
                    Arc::new(PrefixStore::new(store, prefix.as_str()))
                };
                Ok(Backend::of(store, url))
            }
        }
    }
}

/// The bucket with what the environment says of it. A call may take as long as a pack needs on a slow
/// line, unless `AWS_TIMEOUT` says otherwise.
fn bucket_builder(bucket: &str) -> AmazonS3Builder {
    let builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
    if std::env::var_os("AWS_TIMEOUT").is_some() {
        return builder;
    }
    let timeout = AmazonS3ConfigKey::Client(ClientConfigKey::Timeout);
    builder.with_config(timeout, "300 seconds")
}

/// An object store and its address.
#[derive(Debug, Clone)]
pub(crate) struct Backend {
    pub(crate) store: Arc<dyn ObjectStore>,
    /// The folder, if it is one: deletions are synced there.
    pub(crate) folder: Option<Arc<Path>>,
    pub(crate) url: Arc<str>,
}

impl Backend {
    pub(crate) fn of(store: Arc<dyn ObjectStore>, url: &str) -> Self {
        Self {
            store,
            folder: None,
            url: Arc::from(url),
        }
    }

    /// Ties the backend to the runtime that this is called on.
    pub(crate) fn blocking(&self) -> Io {
        Io {
            backend: self.clone(),
            handle: Handle::current(),
        }
    }
}

/// Blocking access to the objects of a store.
#[derive(Debug, Clone)]
pub(crate) struct Io {
    backend: Backend,
    pub(crate) handle: Handle,
}

/// Whose object is there after an attempt to create it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Created {
    /// The one that was to be created.
    Ours,
    /// Another; its bytes.
    Theirs(Bytes),
}

/// An object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    /// The path within the store.
    pub(crate) path: String,
    /// The last part of the path.
    pub(crate) name: String,
    pub(crate) bytes: u64,
}

impl Io {
    pub(crate) fn url(&self) -> &str {
        &self.backend.url
    }

    pub(crate) fn folder(&self) -> Option<&Path> {
        self.backend.folder.as_deref()
    }

    /// The whole object, refused unread if it is longer than `bytes_max`.
    pub(crate) fn get(&self, object: &str, bytes_max: u64) -> Result<Bytes> {
        let failed = |error| Error::backend("read", object, error);
        self.handle.block_on(async {
            let answer = self
                .backend
                .store
                .get(&path(object))
                .await
                .map_err(failed)?;
            let bytes = answer.meta.size;
            if bytes > bytes_max {
                let found = format!("{bytes} bytes, where at most {bytes_max} are expected");
                return Err(Error::damaged(object, found));
            }
            answer.bytes().await.map_err(failed)
        })
    }

    /// Several whole objects, up to `parallel` at a time, in the order asked for.
    pub(crate) fn get_many(
        &self,
        objects: &[Listed],
        bytes_max: u64,
        parallel: usize,
    ) -> Vec<Result<Bytes>> {
        let reads = objects.iter().map(|object| async move {
            let failed = |error| Error::backend("read", &object.path, error);
            if object.bytes > bytes_max {
                let found = format!("{} bytes, at most {bytes_max} are expected", object.bytes);
                return Err(Error::damaged(&object.path, found));
            }
            let answer = self.backend.store.get(&path(&object.path)).await;
            let answer = answer.map_err(failed)?;
            // It may have been replaced since it was listed.
            let bytes = answer.meta.size;
            if bytes > bytes_max {
                let found = format!("{bytes} bytes, at most {bytes_max} are expected");
                return Err(Error::damaged(&object.path, found));
            }
            answer.bytes().await.map_err(failed)
        });
        let reads = futures::stream::iter(reads).buffered(parallel.max(1));
        self.handle.block_on(reads.collect())
    }

    /// The bytes in `range`; an object too short for it is damaged.
    pub(crate) fn get_range(&self, object: &str, range: Range<u64>) -> Result<Bytes> {
        let wanted = range.end - range.start;
        let read = self.handle.block_on(async {
            let path = path(object);
            match self.backend.store.get_range(&path, range.clone()).await {
                Ok(bytes) => Ok(bytes),
                // Backends report a range behind the end in ways of their own: ask for the size.
                Err(error) => match self.backend.store.head(&path).await {
                    Ok(meta) if meta.size < range.end => Ok(Bytes::new()),
                    Ok(_) => Err(Error::backend("read", object, error)),
                    Err(head) => Err(Error::backend("read", object, head)),
                },
            }
        })?;
        if read.len() as u64 == wanted {
            return Ok(read);
        }
        let found = format!("it ends before byte {}", range.end);
        Err(Error::damaged(object, found))
    }

    /// Writes an object, in the place of one of that name.
    ///
    /// # Durability
    /// When this returns, the object is durable.
    pub(crate) fn put(&self, object: &str, payload: PutPayload) -> Result<()> {
        self.handle
            .block_on(self.backend.store.put(&path(object), payload))
            .map_err(|error| Error::backend("write", object, error))?;
        Ok(())
    }

    /// A put that goes on while the caller works.
    pub(crate) fn put_behind(
        &self,
        object: String,
        payload: PutPayload,
    ) -> tokio::task::JoinHandle<Result<()>> {
        let store = Arc::clone(&self.backend.store);
        self.handle.spawn(async move {
            store
                .put(&path(&object), payload)
                .await
                .map_err(|error| Error::backend("write", &object, error))?;
            Ok(())
        })
    }

    /// Writes an object only if there is none of that name. What is there decides, not the answer: that may
    /// be lost after the write took effect, and when the client repeats it, it finds its own object. So the
    /// bytes must be such that nobody else writes the same, or that it makes no difference who did.
    ///
    /// # Errors
    /// When the store fails and the object is not there.
    ///
    /// # Durability
    /// When this returns [`Created::Ours`], the object is durable.
    pub(crate) fn create(&self, object: &str, bytes: &Bytes, bytes_max: u64) -> Result<Created> {
        let mut tries = 0..CREATE_TRIES;
        loop {
            let Err(failure) = self.put_new(object, bytes.clone()) else {
                return Ok(Created::Ours);
            };
            let refused = matches!(failure, object_store::Error::AlreadyExists { .. });
            match (self.get(object, bytes_max), tries.next()) {
                (Ok(there), _) if there == *bytes => return Ok(Created::Ours),
                (Ok(there), _) if refused => return Ok(Created::Theirs(there)),
                // Another request was in the way (S3: status 409), and has left nothing.
                (Err(Error::ObjectMissing { .. }), Some(number)) if refused => {
                    std::thread::sleep(CREATE_PAUSE * 2_u32.pow(number));
                }
                (Err(error @ Error::Damaged { .. }), _) if refused => return Err(error),
                (Ok(_) | Err(_), _) => return Err(Error::backend("create", object, failure)),
            }
        }
    }

    /// Whether the store refuses to create an object that is there.
    pub(crate) fn refuses_to_overwrite(&self, object: &str, bytes: Bytes) -> Result<bool> {
        match self.put_new(object, bytes) {
            Ok(()) => Ok(false),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(true),
            Err(error) => Err(Error::backend("create", object, error)),
        }
    }

    fn put_new(&self, object: &str, bytes: Bytes) -> Result<(), object_store::Error> {
        let options = PutOptions {
            mode: PutMode::Create,
            ..PutOptions::default()
        };
        let path = path(object);
        let put = self.backend.store.put_opts(&path, bytes.into(), options);
        self.handle.block_on(put).map(|_result| ())
    }

    /// Removes an object; one that is gone is no error.
    ///
    /// # Durability
    /// When this returns, the removal is durable.
    pub(crate) fn delete(&self, object: &str) -> Result<()> {
        let deleted = self
            .handle
            .block_on(self.backend.store.delete(&path(object)));
        match deleted {
            Ok(()) => {}
            Err(object_store::Error::NotFound { .. }) => return Ok(()),
            Err(error) => return Err(Error::backend("delete", object, error)),
        }
        if let Some(folder) = self.folder() {
            stead_sys::durable::sync_parent(&folder.join(object)).map_err(|source| {
                let source = object_store::Error::Generic {
                    store: "folder",
                    source: Box::new(source),
                };
                Error::backend("make durable the deletion of", object, source)
            })?;
        }
        Ok(())
    }

    pub(crate) fn exists(&self, object: &str) -> Result<bool> {
        let head = self.handle.block_on(self.backend.store.head(&path(object)));
        match head {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(Error::backend("look for", object, error)),
        }
    }

    /// All objects below `folder`, by name.
    pub(crate) fn list(&self, folder: &str) -> Result<Vec<Listed>> {
        let listing = self.backend.store.list(Some(&path(folder)));
        let found: Vec<_> = self
            .handle
            .block_on(listing.try_collect())
            .map_err(|error| Error::backend("list", folder, error))?;
        let mut objects: Vec<Listed> = found
            .into_iter()
            .map(|meta| Listed {
                path: meta.location.to_string(),
                name: meta.location.filename().unwrap_or_default().to_owned(),
                bytes: meta.size,
            })
            .collect();
        objects.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(objects)
    }
}

fn path(object: &str) -> ObjectPath {
    ObjectPath::from(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_folder_or_a_bucket_or_refused() {
        for (url, expected) in [
            ("/srv/store", "/srv/store"),
            ("relative", "relative"),
            ("file:///srv/store", "/srv/store"),
        ] {
            let Ok(Address::Folder(folder)) = Address::parse(url) else {
                panic!("{url} is a folder");
            };
            assert_eq!(folder, Path::new(expected));
        }
        let Ok(Address::Bucket { bucket, prefix }) = Address::parse("s3://bucket/a/b/") else {
            panic!("a bucket");
        };
        assert_eq!((bucket.as_str(), prefix.as_str()), ("bucket", "a/b"));
        for url in ["", "file://", "s3://", "s3:///prefix", "http://host/x"] {
            assert!(Address::parse(url).is_err(), "{url}");
        }
    }
}
