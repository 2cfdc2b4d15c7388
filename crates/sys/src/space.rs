//! Room on a file system, asked before the first write.

use std::io;
use std::path::Path;

/// Bytes that an unprivileged process may still write on the file system that holds `path`.
///
/// # Errors
/// When the file system cannot be asked.
pub fn available_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes that a file really occupies, holes not counted.
///
/// # Errors
/// When the file cannot be asked.
pub fn allocated_bytes(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path)?.blocks().saturating_mul(512))
}
