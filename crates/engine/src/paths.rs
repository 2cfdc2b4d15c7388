//! Where a worker keeps what: one folder, and for live RAM a memory file system where that is better.

use std::path::{Path, PathBuf};

use crate::error::{EngineError, Kind, Result};
use stead_sys::durable;

/// What to do about a folder that belongs to somebody else.
pub(crate) const NOT_YOURS: &str = "run stead as the folder's user or as root, or name a folder of yours with --data-dir (STEAD_DATA_DIR)";

/// The folder of one worker.
#[derive(Debug, Clone)]
pub struct DataDir {
    root: PathBuf,
}

impl DataDir {
    /// Creates the folders that are missing. VM users may pass through, not list.
    ///
    /// # Errors
    /// When a folder cannot be created.
    pub fn open(root: &Path) -> Result<Self> {
        // One spelling: a QEMU is found by the folder that it works in, as the kernel spells it.
        let root = durable::create_dir(root, 0o711)
            .and_then(|()| std::fs::canonicalize(root))
            .map_err(|source| unusable("create folder", root, source))?;
        let dir = Self { root };
        for (path, mode) in [
            (dir.layers(), 0o711),
            (dir.ram(), 0o711),
            (dir.blobs(), 0o711),
            (dir.runs(), 0o711),
            (dir.locks(), 0o700),
            (dir.cache(), 0o700),
            (dir.builds(), 0o700),
        ] {
            durable::create_dir(&path, mode)
                .map_err(|source| unusable("create folder", &path, source))?;
        }
        Ok(dir)
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The worker's database.
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.root.join("stead.db")
    }

    /// The store used when none is named.
    #[must_use]
    pub fn default_store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// The worker's random id.
    pub(crate) fn worker_id(&self) -> PathBuf {
        self.root.join("worker-id")
    }

    /// The boots of the host in which this folder was used, one a line.
    pub(crate) fn boots(&self) -> PathBuf {
        self.root.join("boots")
    }

    pub(crate) fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Frozen RAM images, named by their content.
    pub(crate) fn ram(&self) -> PathBuf {
        self.root.join("ram")
    }

    /// Kernels, initramfs images and device states, named by their content.
    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    pub(crate) fn runs(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The folder of one QEMU process: sockets, logs, live RAM on a reflink file system.
    pub(crate) fn run(&self, launch: &str) -> PathBuf {
        self.runs().join(launch)
    }

    pub(crate) fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    /// What was left of states that died with their VM: kept for people, used by nobody.
    pub(crate) fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    pub(crate) fn builds(&self) -> PathBuf {
        self.root.join("build")
    }
}

/// The memory file system.
pub(crate) const MEMORY: &str = "/dev/shm";

/// Why a folder cannot be the worker's: mostly another one was meant, or another user.
pub(crate) fn unusable(what: &str, path: &Path, source: std::io::Error) -> EngineError {
    let kind = source.kind();
    let next = if kind == std::io::ErrorKind::PermissionDenied {
        NOT_YOURS
    } else if kind == std::io::ErrorKind::ReadOnlyFilesystem {
        "make its file system writable, or name another folder with --data-dir (STEAD_DATA_DIR)"
    } else {
        "name a folder that can be made and written to with --data-dir (STEAD_DATA_DIR)"
    };
    let error = EngineError::file(&format!("use the data directory: {what}"), path, source);
    if error.kind() == Kind::NoSpace {
        return error;
    }
    error.of_kind(Kind::Usage).next(next)
}

/// Where live RAM lies when the data folder's file system cannot share blocks.
pub(crate) fn memory_folder(launch: &str) -> PathBuf {
    Path::new(MEMORY).join(format!("stead-{launch}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    #[test]
    fn a_folder_that_cannot_be_used_is_a_wrong_request_unless_it_is_full() {
        let error = |kind: ErrorKind| unusable("create folder", Path::new("/data"), kind.into());
        let denied = error(ErrorKind::PermissionDenied);
        assert_eq!(denied.kind(), Kind::Usage, "{denied}");
        assert_eq!(denied.next_step(), NOT_YOURS);
        assert_eq!(error(ErrorKind::NotADirectory).kind(), Kind::Usage);
        assert_ne!(error(ErrorKind::NotADirectory).next_step(), NOT_YOURS);
        assert_eq!(error(ErrorKind::StorageFull).kind(), Kind::NoSpace);
    }
}
