//! Why a file operation was not done.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How long the text of an error may be, in bytes.
pub(super) const MAX_TEXT_BYTES: usize = 8192;

/// What kind of reason it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FileErrorKind {
    /// There is no such file.
    NotFound,
    /// The name is taken.
    Exists,
    /// A component of the path is no folder, or a link where none is followed.
    NotAFolder,
    /// It is a folder.
    IsAFolder,
    /// The folder is not empty.
    NotEmpty,
    /// Neither file nor folder nor symlink: a device, a pipe, a socket.
    Special,
    /// The permission is missing.
    Denied,
    /// No room is left, or the quota is used up.
    NoSpace,
    /// The file system is read-only.
    ReadOnly,
    /// The file changed while it was read.
    Changed,
    /// The digest of what came is not that of what was sent.
    Damaged,
    /// Another operation writes the same transfer.
    Busy,
    /// The request does not fit the file or the protocol.
    Invalid,
    /// Another error of the operating system.
    Other,
}

impl fmt::Display for FileErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFound => "there is no such file",
            Self::Exists => "the name is taken",
            Self::NotAFolder => "it is no folder",
            Self::IsAFolder => "it is a folder",
            Self::NotEmpty => "the folder is not empty",
            Self::Special => "it is no regular file",
            Self::Denied => "the permission is missing",
            Self::NoSpace => "no room is left",
            Self::ReadOnly => "the file system is read-only",
            Self::Changed => "the file changed meanwhile",
            Self::Damaged => "what came is not what was sent",
            Self::Busy => "another transfer writes it",
            Self::Invalid => "the request does not fit",
            Self::Other => "the system refused",
        })
    }
}

/// Why a file operation was not done, and what stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{attempted}: {kind}{number}; {left}", number = Number(*errno))]
pub struct FileError {
    /// The kind of reason.
    pub kind: FileErrorKind,
    /// The operating system's error number, 0 when there is none.
    pub errno: i32,
    /// What was attempted.
    pub attempted: String,
    /// What stands now.
    pub left: String,
}

struct Number(i32);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            number => write!(f, " (error number {number})"),
        }
    }
}
