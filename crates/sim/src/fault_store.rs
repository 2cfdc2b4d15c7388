//! An object store that counts its calls and fails at a chosen one.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// What happens at the chosen call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The call fails without effect; later calls work.
    Before,
    /// The call takes effect and its answer is lost; later calls work.
    After,
    /// The call and all later ones fail without effect, as for a process killed before it.
    KilledBefore,
    /// The call takes effect, its answer is lost, and all later calls fail, as for a process killed
    /// during it.
    KilledAfter,
}

/// An object store with one fault in it. Calls are counted from 1.
#[derive(Debug)]
pub struct FaultStore {
    inner: Arc<dyn ObjectStore>,
    calls: AtomicU64,
    at_call: u64,
    fault: Fault,
    kind: io::ErrorKind,
}

impl fmt::Display for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with a fault at call {}", self.inner, self.at_call)
    }
}

/// Where a call stands in relation to the fault.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Work,
    Fail,
    WorkAndFail,
}

impl FaultStore {
    /// `inner`, with `fault` at call `at_call`; 0 means no fault, so calls are only counted.
    #[must_use]
    pub fn new(inner: Arc<dyn ObjectStore>, at_call: u64, fault: Fault) -> Self {
        Self {
            inner,
            calls: AtomicU64::new(0),
            at_call,
            fault,
            kind: io::ErrorKind::ConnectionReset,
        }
    }

    /// The operating system's error that a failing call reports, instead of a lost connection.
    #[must_use]
    pub fn with_error(mut self, kind: io::ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// How many calls there were.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    fn count(&self) -> Verdict {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        if self.at_call == 0 || call < self.at_call {
            return Verdict::Work;
        }
        let first = call == self.at_call;
        match self.fault {
            Fault::Before if first => Verdict::Fail,
            Fault::After if first => Verdict::WorkAndFail,
            Fault::KilledAfter if first => Verdict::WorkAndFail,
            Fault::Before | Fault::After => Verdict::Work,
            Fault::KilledBefore | Fault::KilledAfter => Verdict::Fail,
        }
    }

    fn error(&self) -> Error {
        Error::Generic {
            store: "FaultStore",
            source: Box::new(io::Error::from(self.kind)),
        }
    }

    async fn call<T>(&self, operation: impl Future<Output = Result<T>>) -> Result<T> {
        match self.count() {
            Verdict::Work => operation.await,
            Verdict::Fail => Err(self.error()),
            Verdict::WorkAndFail => {
                operation.await?;
                Err(self.error())
            }
        }
    }
}

#[async_trait]
impl ObjectStore for FaultStore {
    async fn put_opts(
        &self,
        to: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.call(self.inner.put_opts(to, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.call(self.inner.put_multipart_opts(to, options)).await
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> Result<GetResult> {
        self.call(self.inner.get_opts(from, options)).await
    }

    async fn get_ranges(&self, from: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.call(self.inner.get_ranges(from, ranges)).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        match self.count() {
            Verdict::Work => self.inner.delete_stream(paths),
            Verdict::Fail => stream::iter([Err(self.error())]).boxed(),
            Verdict::WorkAndFail => {
                let error = self.error();
                let mut done = self.inner.delete_stream(paths);
                let all = async move {
                    while let Some(path) = done.next().await {
                        path?;
                    }
                    Err(error)
                };
                stream::once(all).boxed()
            }
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.count() {
            Verdict::Work => self.inner.list(prefix),
            Verdict::Fail | Verdict::WorkAndFail => stream::iter([Err(self.error())]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.call(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.call(self.inner.copy_opts(from, to, options)).await
    }
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    use super::*;

    async fn put_three(fault: Fault) -> (Vec<bool>, Vec<bool>) {
        let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let store = FaultStore::new(Arc::clone(&memory), 2, fault);
        let (mut answered, mut there) = (Vec::new(), Vec::new());
        for name in ["one", "two", "three"] {
            answered.push(store.put(&Path::from(name), "x".into()).await.is_ok());
            there.push(memory.head(&Path::from(name)).await.is_ok());
        }
        assert_eq!(store.calls(), 3);
        (answered, there)
    }

    #[tokio::test]
    async fn each_fault_does_what_it_says() {
        for (fault, answered, there) in [
            (Fault::Before, [true, false, true], [true, false, true]),
            (Fault::After, [true, false, true], [true, true, true]),
            (
                Fault::KilledBefore,
                [true, false, false],
                [true, false, false],
            ),
            (
                Fault::KilledAfter,
                [true, false, false],
                [true, true, false],
            ),
        ] {
            let (a, t) = put_three(fault).await;
            assert_eq!((a, t), (answered.to_vec(), there.to_vec()), "{fault:?}");
        }
    }
}
