//! What the operating system says, as the host is told it.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::Errno;
use stead_agent_proto::files::{FileError, FileErrorKind, Malformed};
use stead_agent_proto::message::Bytes;

/// What stands after an operation that changes nothing, or has not begun to.
pub(super) const UNCHANGED: &str = "nothing was changed";

/// A path of the protocol as one of the operating system.
pub(super) fn as_path(bytes: &Bytes) -> &Path {
    Path::new(OsStr::from_bytes(&bytes.0))
}

/// Says what was attempted and what stands when a system call fails.
pub(super) trait Tried<T> {
    /// Gives the value, or an error; nothing was changed.
    fn tried(self, attempted: &str, path: &Bytes) -> Result<T, FileError>
    where
        Self: Sized,
    {
        self.tried_leaving(attempted, path, UNCHANGED)
    }

    /// Gives the value, or an error that says what is `left`.
    fn tried_leaving(self, attempted: &str, path: &Bytes, left: &str) -> Result<T, FileError>;
}

impl<T, E: Into<io::Error>> Tried<T> for Result<T, E> {
    fn tried_leaving(self, attempted: &str, path: &Bytes, left: &str) -> Result<T, FileError> {
        self.map_err(|source| {
            let source = source.into();
            FileError {
                kind: kind(&source),
                errno: source.raw_os_error().unwrap_or(0),
                attempted: format!("{attempted} {}", as_path(path).display()),
                left: left.to_owned(),
            }
        })
    }
}

/// An error that the operating system has no number for.
pub(super) fn refused(kind: FileErrorKind, attempted: &str, path: &Bytes, left: &str) -> FileError {
    FileError {
        kind,
        errno: 0,
        attempted: format!("{attempted} {}", as_path(path).display()),
        left: left.to_owned(),
    }
}

/// A request that the protocol does not allow.
pub(super) fn malformed(found: &Malformed) -> FileError {
    FileError {
        kind: FileErrorKind::Invalid,
        errno: 0,
        attempted: found.to_string().chars().take(1000).collect(),
        left: UNCHANGED.to_owned(),
    }
}

fn kind(error: &io::Error) -> FileErrorKind {
    match Errno::from_io_error(error) {
        Some(Errno::NOENT) => FileErrorKind::NotFound,
        Some(Errno::EXIST) => FileErrorKind::Exists,
        Some(Errno::NOTDIR) => FileErrorKind::NotAFolder,
        Some(Errno::ISDIR) => FileErrorKind::IsAFolder,
        Some(Errno::NOTEMPTY) => FileErrorKind::NotEmpty,
        Some(Errno::LOOP | Errno::OPNOTSUPP | Errno::NXIO | Errno::NODEV) => FileErrorKind::Special,
        Some(Errno::PERM | Errno::ACCESS) => FileErrorKind::Denied,
        Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => FileErrorKind::NoSpace,
        Some(Errno::ROFS) => FileErrorKind::ReadOnly,
        Some(Errno::WOULDBLOCK) => FileErrorKind::Busy,
        Some(Errno::STALE) => FileErrorKind::Changed,
        Some(Errno::INVAL | Errno::NAMETOOLONG) => FileErrorKind::Invalid,
        None if error.kind() == io::ErrorKind::UnexpectedEof => FileErrorKind::Changed,
        None if error.kind() == io::ErrorKind::InvalidInput => FileErrorKind::Invalid,
        Some(_) | None => FileErrorKind::Other,
    }
}
