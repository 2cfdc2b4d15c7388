//! Kernels and initramfs images: whole files under `blobs/`, named by their BLAKE3.

use std::path::{Path, PathBuf};

use stead_sys::durable::{self, Existing};

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::paths::DataDir;

/// The largest kernel or initramfs that is taken, in bytes.
pub(crate) const BLOB_BYTES_MAX: u64 = 256 << 20;

/// Where the blob `name` lies.
pub(crate) fn path_of(dir: &DataDir, name: &str) -> PathBuf {
    dir.blobs().join(name)
}

/// Takes a file in and returns its name and bytes.
pub(crate) fn read_file(path: &Path) -> Result<(String, Vec<u8>)> {
    let length = std::fs::metadata(path).at("read", path)?.len();
    if length > BLOB_BYTES_MAX {
        return Err(EngineError::usage(
            format!("read {}", path.display()),
            format!(
                "it has {length} bytes, more than the {BLOB_BYTES_MAX} that a kernel or initramfs may have"
            ),
        ));
    }
    let bytes = std::fs::read(path).at("read", path)?;
    Ok((name_of(&bytes), bytes))
}

/// The name of a blob with this content.
pub(crate) fn name_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Puts a blob in its place, readable by VMs.
///
/// # Durability
/// The file is whole and synced when this returns.
pub(crate) fn put(dir: &DataDir, bytes: &[u8]) -> Result<String> {
    let name = name_of(bytes);
    let path = path_of(dir, &name);
    if verify(dir, &name).is_err() {
        durable::publish(&path, 0o444, bytes, Existing::Replace).at("write", &path)?;
    }
    Ok(name)
}

/// Reads a blob whole and compares it with its name.
///
/// # Errors
/// [`Kind::Damaged`] when it is missing or has other content.
pub(crate) fn verify(dir: &DataDir, name: &str) -> Result<()> {
    let path = path_of(dir, name);
    let damaged = |found: String| {
        EngineError::new(Kind::Damaged, format!("verify {}", path.display()), found)
            .next("remove the file: the next use fetches it from the store")
    };
    let (found, _) = read_file(&path)
        .map_err(|source| damaged("it cannot be read".to_owned()).because(source))?;
    if found != name {
        return Err(damaged(format!("its content is {found}")));
    }
    Ok(())
}
