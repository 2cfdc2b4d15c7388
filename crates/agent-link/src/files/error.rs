//! Why files were not copied, and what stands then.

use std::io;
use std::path::PathBuf;

use stead_agent_proto::files::{FileError, FileErrorKind, FileKind, Malformed};
use stead_agent_proto::message::Bytes;

use super::channel::ChannelError;

/// Why files were not copied. Files that were copied before stay, whole; the one at which it ended is not visible
/// under its name.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The connection broke. The copy can be gone on with over another.
    #[error(
        "{attempted} {path:?}: the connection to the agent broke; files that were copied before are whole, and the copy can be gone on with",
        path = path
    )]
    Channel {
        /// What was attempted.
        attempted: &'static str,
        /// The file in the guest.
        path: Bytes,
        /// Why it broke.
        source: ChannelError,
    },
    /// The guest could not.
    #[error("in the guest: {0}")]
    Guest(FileError),
    /// The guest said what the protocol does not allow.
    #[error("{attempted} {path:?}: the guest broke the protocol: {found}; nothing of it was used")]
    Protocol {
        /// What was attempted.
        attempted: &'static str,
        /// The file in the guest.
        path: Bytes,
        /// What it said.
        found: String,
    },
    /// The host could not.
    #[error("{attempted} {path}; what had the name before still has it", path = path.display())]
    Local {
        /// What was attempted.
        attempted: &'static str,
        /// The file on the host.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file on the host changed while it was read.
    #[error(
        "send {path}: it changed meanwhile; what had the name in the guest before still has it. Copy it when nothing writes it",
        path = path.display()
    )]
    LocalChanged {
        /// The file on the host.
        path: PathBuf,
    },
    /// The file in the guest is not what it was said to be a moment before.
    #[error(
        "fetch {path:?}: it changed meanwhile; what had the name on the host before still has it. Copy it when nothing writes it"
    )]
    GuestChanged {
        /// The file in the guest.
        path: Bytes,
    },
    /// The digest of what came is not that of what was sent.
    #[error(
        "fetch {path:?}: what came is not what was sent; it was thrown away, and what had the name on the host before still has it. Try again"
    )]
    Damaged {
        /// The file in the guest.
        path: Bytes,
    },
    /// A device, pipe or socket.
    #[error("copy {path:?}: it is a {kind}, which is not copied; leave it out or skip such files")]
    Special {
        /// The file, on whichever side.
        path: Bytes,
        /// What it is.
        kind: FileKind,
    },
    /// More than was allowed.
    #[error("copy {path:?}: {what} is above the limit of {limit}; nothing of it was used")]
    Limit {
        /// Where.
        path: Bytes,
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// Source and target do not go together.
    #[error("copy {path:?}: {found}; nothing was changed")]
    Place {
        /// The target.
        path: Bytes,
        /// Why it cannot be the target.
        found: &'static str,
    },
    /// Somebody asked for the end.
    #[error(
        "copying was interrupted; files that were copied before are whole, and the same command goes on with the one at which it ended"
    )]
    Interrupted,
}

impl CopyError {
    /// Whether the copy can be gone on with over another connection.
    #[must_use]
    pub fn is_broken_channel(&self) -> bool {
        matches!(self, Self::Channel { .. })
    }

    /// What the guest said when it refused.
    #[must_use]
    pub fn guest_kind(&self) -> Option<FileErrorKind> {
        match self {
            Self::Guest(error) => Some(error.kind),
            Self::Channel { .. }
            | Self::Protocol { .. }
            | Self::Local { .. }
            | Self::LocalChanged { .. }
            | Self::GuestChanged { .. }
            | Self::Damaged { .. }
            | Self::Special { .. }
            | Self::Limit { .. }
            | Self::Place { .. }
            | Self::Interrupted => None,
        }
    }

    pub(super) fn malformed(attempted: &'static str, path: &Bytes, found: &Malformed) -> Self {
        Self::Protocol {
            attempted,
            path: path.clone(),
            found: found.to_string(),
        }
    }
}

/// Says what was attempted when a system call on the host fails.
pub(super) trait Locally<T> {
    fn locally(self, attempted: &'static str, path: impl Into<PathBuf>) -> Result<T, CopyError>;
}

impl<T> Locally<T> for io::Result<T> {
    fn locally(self, attempted: &'static str, path: impl Into<PathBuf>) -> Result<T, CopyError> {
        self.map_err(|source| CopyError::Local {
            attempted,
            path: path.into(),
            source,
        })
    }
}
