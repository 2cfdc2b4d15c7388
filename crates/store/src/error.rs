//! What can go wrong, on which object, and what stands now.

use std::error::Error as StdError;
use std::io;
use std::ops::Range;

use crate::lease::Lease;

/// The result of a store operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a store operation failed. Nothing that was in the store before was changed by it, except
/// where the text says so.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address names no store.
    #[error(
        "open store {url}: the store is missing (it has no object `steadfast-store`); check the address, or create one there with init"
    )]
    Missing {
        /// The address.
        url: String,
        /// What the folder or the service answered.
        #[source]
        source: Option<Box<object_store::Error>>,
    },
    /// A store is already at the address.
    #[error("create store {url}: a store is already there; it was left as it is")]
    AlreadyThere {
        /// The address.
        url: String,
    },
    /// The address cannot be one of a store.
    #[error("store address {url:?}: {reason}; give a folder, file:///folder or s3://bucket/prefix")]
    BadUrl {
        /// The address.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store was written by a newer version.
    #[error(
        "read {object}: format version {found}, this version reads {supported}; use a newer version"
    )]
    Unsupported {
        /// The object.
        object: String,
        /// Its version.
        found: u32,
        /// The version known here.
        supported: u32,
    },
    /// The store cannot be written to.
    #[error("{attempted}: the store is read-only")]
    ReadOnly {
        /// What was attempted.
        attempted: String,
        /// What the folder or the service answered; none if it was opened read-only.
        #[source]
        source: Option<Box<object_store::Error>>,
    },
    /// The store has no room left.
    #[error(
        "{attempted}: the store is full; checkpoints in it are unchanged; make room (remove checkpoints, then gc) and try again"
    )]
    Full {
        /// What was attempted.
        attempted: String,
        /// What the folder or the service answered.
        #[source]
        source: Box<object_store::Error>,
    },
    /// The service does not accept the credentials.
    #[error("{attempted}: the store refuses the credentials; check the AWS_* variables")]
    Credentials {
        /// What was attempted.
        attempted: String,
        /// What the service answered.
        #[source]
        source: Box<object_store::Error>,
    },
    /// The service overwrites where it was told only to create.
    #[error(
        "open store {url}: it does not honour conditional creation (If-None-Match: *), without which two publishers could lose a checkpoint; it cannot be written to"
    )]
    NoConditionalCreate {
        /// The address.
        url: String,
    },
    /// Any other failure of the folder or the service.
    #[error("{attempted}: the store failed")]
    Backend {
        /// What was attempted.
        attempted: String,
        /// What the folder or the service answered.
        #[source]
        source: Box<object_store::Error>,
    },
    /// An object that others name is not there.
    #[error("read {object}: the object is missing{}", affecting(.affects))]
    ObjectMissing {
        /// The object.
        object: String,
        /// The tree and range that need it, where known.
        affects: Option<Box<str>>,
    },
    /// An object is not what it must be.
    #[error("read {object}: damaged: {found}{}", affecting(.affects))]
    Damaged {
        /// The object.
        object: String,
        /// What was found instead of what was expected.
        found: String,
        /// The tree and range that need it, where known.
        affects: Option<Box<str>>,
    },
    /// A chunk or node is in no pack that the indexes know.
    #[error("find {what} {hash}: no index names a pack with it{}{}; rebuilding the index may find it", unreadable(.damaged_indexes), affecting(.affects))]
    Unknown {
        /// `chunk` or `node`.
        what: &'static str,
        /// Its name.
        hash: crate::Hash,
        /// Index objects that could not be read, which may be the reason.
        damaged_indexes: Vec<String>,
        /// The tree and range that need it, where known.
        affects: Option<Box<str>>,
    },
    /// The content to be published or compared could not be read.
    #[error("read the source at bytes {}..{}", .range.start, .range.end)]
    Source {
        /// Where, in bytes.
        range: Range<u64>,
        /// Why.
        source: io::Error,
    },
    /// The file that content is fetched into could not be written.
    #[error("write the destination at bytes {}..{}; it is incomplete and must not be used", .range.start, .range.end)]
    Destination {
        /// Where, in bytes.
        range: Range<u64>,
        /// Why.
        source: io::Error,
    },
    /// A local file beside the objects failed: the cache, or a temporary file in a folder store.
    #[error("{attempted}")]
    Cache {
        /// What was attempted.
        attempted: String,
        /// Why.
        source: io::Error,
    },
    /// The caller asked for something that cannot be.
    #[error("{attempted}: {reason}; nothing was changed")]
    Invalid {
        /// What was attempted.
        attempted: String,
        /// Why not.
        reason: String,
    },
    /// No checkpoint or template has this name.
    #[error("no checkpoint or template in the store starts with {prefix:?}")]
    NoSuchManifest {
        /// What was looked for.
        prefix: String,
    },
    /// More than one checkpoint or template starts like this.
    #[error("{prefix:?} is ambiguous: {}", .candidates.join(", "))]
    Ambiguous {
        /// What was looked for.
        prefix: String,
        /// What was found.
        candidates: Vec<String>,
    },
    /// The lease of this publish was removed by somebody else.
    #[error(
        "publish: lease {lease} was broken by somebody else, so its packs may be gone; no checkpoint was written; publish again"
    )]
    LeaseLost {
        /// The lease.
        lease: String,
    },
    /// An earlier call on this publish failed or was dropped when content was already on its way.
    #[error(
        "publish: an earlier step failed, so this publish can only be aborted; no checkpoint was written"
    )]
    PublishBroken,
    /// Garbage collection cannot know what is in use.
    #[error("gc: cannot tell what is in use, so nothing was deleted: {}; repair these (a damaged index is rebuilt from the packs) or remove them first", .reasons.join("; "))]
    GcBlocked {
        /// The damaged checkpoints and why.
        reasons: Vec<String>,
    },
    /// Another garbage collection or index rebuild holds the store.
    #[error("{attempted}: {} of {} does so since {}; wait, or break its lock if it is dead", .holder.owner.process, .holder.owner.host, .holder.started)]
    Locked {
        /// What was attempted.
        attempted: String,
        /// Who holds the lock.
        holder: Box<Lease>,
    },
    /// Somebody else removed the lock of a garbage collection or index rebuild while it ran.
    #[error(
        "{attempted}: its lock was broken by somebody else, so another may be running; nothing that was there before was deleted; run it again"
    )]
    LockLost {
        /// What was attempted.
        attempted: String,
    },
    /// The caller's progress callback said stop.
    #[error("cancelled; nothing became visible")]
    Cancelled,
    /// A thread of the store ended abnormally.
    #[error("{attempted}: a worker thread ended abnormally")]
    Worker {
        /// What was attempted.
        attempted: &'static str,
        /// How.
        source: tokio::task::JoinError,
    },
}

fn affecting(affects: &Option<Box<str>>) -> String {
    match affects {
        Some(what) => format!("; needed by {what}"),
        None => String::new(),
    }
}

fn unreadable(names: &[String]) -> String {
    if names.is_empty() {
        return String::new();
    }
    format!(" (unreadable: {})", names.join(", "))
}

impl Error {
    /// Says of a damaged or missing object what needs it; an inner statement is kept.
    pub(crate) fn needed_by(mut self, what: impl FnOnce() -> String) -> Self {
        if let Self::Damaged { affects, .. }
        | Self::ObjectMissing { affects, .. }
        | Self::Unknown { affects, .. } = &mut self
            && affects.is_none()
        {
            *affects = Some(what().into_boxed_str());
        }
        self
    }

    /// What was found in the place of an object: something damaged, or nothing.
    ///
    /// # Errors
    /// The error itself where it is of another kind.
    pub(crate) fn into_loss(self) -> Result<Option<String>> {
        if let Self::Damaged { found, .. } = self {
            Ok(Some(found))
        } else if let Self::ObjectMissing { .. } = self {
            Ok(None)
        } else {
            Err(self)
        }
    }

    /// An object that is not what it must be.
    pub(crate) fn damaged(object: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Damaged {
            object: object.into(),
            found: found.into(),
            affects: None,
        }
    }

    /// Sorts an answer of the backend by what its user can do about it.
    pub(crate) fn backend(verb: &str, object: &str, source: object_store::Error) -> Self {
        if matches!(source, object_store::Error::NotFound { .. }) {
            return Self::ObjectMissing {
                object: object.to_owned(),
                affects: None,
            };
        }
        let attempted = format!("{verb} {object}");
        let io_kind = io_kind(&source);
        let source = Box::new(source);
        if matches!(
            *source,
            object_store::Error::PermissionDenied { .. }
                | object_store::Error::Unauthenticated { .. }
        ) {
            return Self::Credentials { attempted, source };
        }
        match io_kind {
            Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                Self::Full { attempted, source }
            }
            Some(io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied) => {
                Self::ReadOnly {
                    attempted,
                    source: Some(source),
                }
            }
            _ => Self::Backend { attempted, source },
        }
    }
}

/// The operating system's error at the root of a backend's, if there is one.
fn io_kind(error: &(dyn StdError + 'static)) -> Option<io::ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        next = error.source();
    }
    None
}
