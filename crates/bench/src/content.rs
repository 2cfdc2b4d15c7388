//! What a checkpoint holds, as plain files: to be compressed, copied and compared by other means.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stead_store::{Access, BlobRef, Manifest, ManifestId, Progress, Store};
use stead_sys::{copy, durable};

use crate::error::{BenchError, Doing, Result};

/// The blocks that are looked at.
const BLOCK_BYTES: usize = 4096;
/// What the store cuts disks and RAM into.
const DISK_CHUNK_BYTES: usize = 64 << 10;
const RAM_CHUNK_BYTES: usize = 16 << 10;

/// A checkpoint's parts outside of the store.
#[derive(Debug)]
pub struct Content {
    /// Its name in the store.
    pub id: ManifestId,
    /// Its manifest.
    pub manifest: Manifest,
    /// What the guest sees of its disk.
    pub disk: PathBuf,
    /// Its RAM.
    pub ram: PathBuf,
    /// Its device state.
    pub device_state: Vec<u8>,
    /// Kernel and initial RAM disk.
    pub kernel_and_initrd: [Vec<u8>; 2],
}

/// Opens a store for reading.
///
/// # Errors
/// When it cannot be opened.
pub async fn open_store(store: &Path, cache: &Path) -> Result<Store> {
    Store::open(&store.display().to_string(), cache, Access::ReadOnly)
        .await
        .doing("open the store")
}

impl Content {
    /// Reads a checkpoint of one disk into files in `folder`.
    ///
    /// # Errors
    /// When something of it is missing.
    pub async fn fetch(store: &Store, id: &str, folder: &Path) -> Result<Self> {
        durable::create_dir(folder, 0o700).doing("create a folder")?;
        let doing = "read a checkpoint from the store";
        let (id, manifest) = store.manifest(id).await.doing(doing)?;
        let missing = || BenchError::new(doing, "it lacks a part");
        let content = Self {
            id,
            disk: folder.join("disk"),
            ram: folder.join("ram"),
            device_state: blob(store, manifest.device_state.as_ref()).await?,
            kernel_and_initrd: [
                blob(store, manifest.kernel.as_ref()).await?,
                blob(store, manifest.initrd.as_ref()).await?,
            ],
            manifest,
        };
        let disk = content.manifest.disks.first().ok_or_else(missing)?.tree;
        let ram = content.manifest.ram.ok_or_else(missing)?;
        for (tree, path) in [(disk, &content.disk), (ram, &content.ram)] {
            let file = durable::create_scratch(path, 0o600).doing(doing)?;
            store
                .fetch_tree(&tree, &file, &[], &Progress::silent())
                .await
                .doing(doing)?;
        }
        Ok(content)
    }

    /// Writes the blocks of disk and RAM that are not zero, one after the other; their bytes.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn write_dense(&self, to: &Path) -> Result<u64> {
        self.write_blocks(to, [BLOCK_BYTES; 2], |_| true, &[])
    }

    /// Writes what is the checkpoint's own: each chunk of disk and RAM that is not zero and not on the
    /// `template`'s disk once, then the device state; the bytes.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn write_own(&self, template: &Path, to: &Path) -> Result<u64> {
        let mut seen = HashSet::new();
        each_block(template, DISK_CHUNK_BYTES, |chunk| {
            seen.insert(*blake3::hash(chunk).as_bytes());
            Ok(())
        })?;
        self.write_blocks(
            to,
            [DISK_CHUNK_BYTES, RAM_CHUNK_BYTES],
            |chunk| seen.insert(*blake3::hash(chunk).as_bytes()),
            &self.device_state,
        )
    }

    /// Writes what is different at least: each block of disk and RAM that is not zero once, then the
    /// device state; the bytes.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn write_unique(&self, to: &Path) -> Result<u64> {
        let mut seen = HashSet::new();
        self.write_blocks(
            to,
            [BLOCK_BYTES; 2],
            |block| seen.insert(*blake3::hash(block).as_bytes()),
            &self.device_state,
        )
    }

    fn write_blocks(
        &self,
        to: &Path,
        sizes: [usize; 2],
        mut wanted: impl FnMut(&[u8]) -> bool,
        tail: &[u8],
    ) -> Result<u64> {
        let doing = "write the content of a checkpoint";
        let file = durable::create_scratch(to, 0o600).doing(doing)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let mut bytes = tail.len() as u64;
        for (path, size) in [&self.disk, &self.ram].into_iter().zip(sizes) {
            each_block(path, size, |block| {
                if wanted(block) {
                    bytes += block.len() as u64;
                    return out.write_all(block).doing(doing);
                }
                Ok(())
            })?;
        }
        out.write_all(tail).doing(doing)?;
        let file = out
            .into_inner()
            .map_err(|error| error.into_error())
            .doing(doing)?;
        file.sync_all().doing(doing)?;
        Ok(bytes)
    }
}

async fn blob(store: &Store, name: Option<&BlobRef>) -> Result<Vec<u8>> {
    let doing = "read a checkpoint from the store";
    let name = name.ok_or_else(|| BenchError::new(doing, "it lacks a part"))?;
    store.fetch_blob(name).await.doing(doing)
}

/// Calls `each` with every block of `size` bytes of a file that is not zero.
fn each_block(path: &Path, size: usize, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let doing = "read the content of a checkpoint";
    let file = File::open(path).doing(doing)?;
    let file_bytes = file.metadata().doing(doing)?.len();
    let mut buffer = vec![0; 256 * BLOCK_BYTES];
    let whole = size as u64;
    let mut next = 0;
    for range in copy::data_ranges(&file).doing(doing)? {
        // Data may begin and end within a block.
        let mut at = (range.start / whole * whole).max(next);
        let end = range.end.next_multiple_of(whole).min(file_bytes);
        next = end;
        while at < end {
            let length = buffer
                .len()
                .min(usize::try_from(end - at).unwrap_or(usize::MAX));
            file.read_exact_at(&mut buffer[..length], at).doing(doing)?;
            for block in buffer[..length].chunks(size) {
                if !copy::is_zero(block) {
                    each(block)?;
                }
            }
            at += length as u64;
        }
    }
    Ok(())
}

/// The bytes of the 4 KiB pages in which two files of one length differ.
///
/// # Errors
/// When they cannot be read.
pub fn differing_bytes(one: &Path, other: &Path) -> Result<u64> {
    let doing = "compare two RAM images";
    let (one, other) = (
        File::open(one).doing(doing)?,
        File::open(other).doing(doing)?,
    );
    let length = one.metadata().doing(doing)?.len();
    let (mut a, mut b) = (vec![0; 256 * BLOCK_BYTES], vec![0; 256 * BLOCK_BYTES]);
    let (mut at, mut bytes) = (0, 0);
    while at < length {
        let step = a
            .len()
            .min(usize::try_from(length - at).unwrap_or(usize::MAX));
        one.read_exact_at(&mut a[..step], at).doing(doing)?;
        other.read_exact_at(&mut b[..step], at).doing(doing)?;
        let pages = a[..step]
            .chunks(BLOCK_BYTES)
            .zip(b[..step].chunks(BLOCK_BYTES));
        bytes += pages
            .filter(|(a, b)| a != b)
            .map(|(a, _)| a.len() as u64)
            .sum::<u64>();
        at += step as u64;
    }
    Ok(bytes)
}
