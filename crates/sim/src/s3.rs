//! An S3 server in this process, on 127.0.0.1, whose objects are files of a folder.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hyper_util::rt::{TokioExecutor, TokioIo};
use s3s::auth::SimpleAuth;
use s3s::dto::{
    DeleteObjectInput, DeleteObjectOutput, DeleteObjectsInput, DeleteObjectsOutput, GetObjectInput,
    GetObjectOutput, HeadObjectInput, HeadObjectOutput, ListObjectsV2Input, ListObjectsV2Output,
    PutObjectInput, PutObjectOutput,
};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3, S3Request, S3Response, S3Result};
use s3s_fs::FileSystem;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::Mutex;

/// The access key that the server accepts.
pub const KEY: &str = "key";
/// Its secret.
pub const SECRET: &str = "secret";
/// The only bucket.
pub const BUCKET: &str = "bucket";

/// The file system server, whose put-if-absent looks first and writes later: one put a key at a time.
struct Files {
    files: FileSystem,
    keys: Mutex<HashMap<String, Arc<Mutex<()>>>>,
    lossy: Arc<Lossy>,
}

/// The conditional puts whose answers are lost.
#[derive(Debug, Default)]
struct Lossy {
    on: AtomicBool,
    keys: Mutex<BTreeSet<String>>,
}

impl Lossy {
    /// Whether the answer of this request is to be lost: that of the first conditional put of each key.
    async fn loses(&self, request: &PutObjectInput) -> bool {
        self.on.load(Ordering::SeqCst)
            && request.if_none_match.is_some()
            && self.keys.lock().await.insert(request.key.clone())
    }
}

#[async_trait::async_trait]
impl S3 for Files {
    async fn put_object(
        &self,
        request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let key = self
            .keys
            .lock()
            .await
            .entry(request.input.key.clone())
            .or_default()
            .clone();
        let _alone = key.lock().await;
        let lost = self.lossy.loses(&request.input).await;
        let answer = self.files.put_object(request).await;
        if lost {
            return Err(s3s::s3_error!(InternalError, "the answer is lost"));
        }
        answer
    }

    async fn get_object(
        &self,
        request: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        self.files.get_object(request).await
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        self.files.head_object(request).await
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.files.delete_object(request).await
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        self.files.delete_objects(request).await
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        self.files.list_objects_v2(request).await
    }
}

/// A running server; it ends with the value.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    folder: PathBuf,
    lossy: Arc<Lossy>,
    /// The server's own threads: whoever uses it may block.
    runtime: Option<Runtime>,
}

impl Server {
    /// Starts a server with one bucket, [`BUCKET`], in `folder`.
    ///
    /// # Errors
    /// When the folder cannot be used or no port can be had.
    pub fn start(folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder.join(BUCKET))?;
        let files =
            FileSystem::new(folder).map_err(|error| io::Error::other(format!("{error:?}")))?;
        let lossy = Arc::<Lossy>::default();
        let mut builder = S3ServiceBuilder::new(Files {
            files,
            keys: Mutex::default(),
            lossy: Arc::clone(&lossy),
        });
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = {
            let _within = runtime.enter();
            TcpListener::from_std(listener)?
        };
        runtime.spawn(accept(listener, builder.build()));
        Ok(Self {
            address,
            folder: folder.to_owned(),
            lossy,
            runtime: Some(runtime),
        })
    }

    /// From now on answers the first conditional put of each object with status 500 after it took effect, so
    /// that clients repeat it. Gives the number of answers lost so far.
    pub async fn lose_answers(&self) -> usize {
        self.lossy.on.store(true, Ordering::SeqCst);
        self.lossy.keys.lock().await.len()
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The folder with the bucket's objects as files.
    #[must_use]
    pub fn objects(&self) -> PathBuf {
        self.folder.join(BUCKET)
    }

    /// The variables by which a client finds it, with its credentials.
    #[must_use]
    pub fn variables(&self) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT", format!("http://{}", self.address)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Also from within another runtime, which must not be blocked.
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, service: S3Service) {
    while let Ok((socket, _)) = listener.accept().await {
        let service = service.clone();
        tokio::spawn(async move {
            let http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            let connection = http.serve_connection(TokioIo::new(socket), service);
            // A client that goes away is no failure of the server.
            drop(connection.await);
        });
    }
}
