//! What a disk holds, by reference: the name that the store would give its content (`docs/store-format.md`, trees of
//! 64 KiB chunks). A save image has it for each of its disks, which are not in the image.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use stead_save_image::DiskContent;
use stead_store::{ChunkSize, FileSource, Hash, Progress, Source, TreeRef};

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::layers::ChainSource;
use crate::records::LayerRow;
use crate::store::store_error;
use crate::{Engine, blocking};

/// How many threads hash a disk.
const THREADS: usize = 2;
/// How long opening the store may take; without it the disk is read whole.
const STORE_WITHIN: Duration = Duration::from_secs(2);

/// The record's words for a tree.
pub(crate) fn content_of_tree(name: &str, tree: &TreeRef) -> DiskContent {
    DiskContent {
        name: name.to_owned(),
        bytes: tree.length_bytes,
        hash: *tree.root.as_bytes(),
    }
}

/// The tree that a record names.
pub(crate) fn tree_of_content(content: &DiskContent) -> TreeRef {
    TreeRef {
        root: Hash::from_bytes(content.hash),
        length_bytes: content.bytes,
        chunk_size: ChunkSize::DISK,
    }
}

/// Reads a disk in a raw file or on a block device: what a save image would record of it under `name`.
///
/// # Errors
/// [`Kind::NotFound`] when it is not there, [`Kind::Cancelled`], or when reading fails.
pub fn disk_content(name: &str, file: &Path, watch: &crate::Watch) -> Result<DiskContent> {
    let unread = |source: std::io::Error| {
        let kind = if source.kind() == std::io::ErrorKind::NotFound {
            Kind::NotFound
        } else {
            Kind::Internal
        };
        EngineError::new(kind, format!("read {}", file.display()), "")
            .because(source)
            .left("nothing was changed")
            .next("name a file that is there and can be read")
    };
    let source = File::open(file).and_then(FileSource::new).map_err(unread)?;
    let progress = crate::store::progress_to(watch.clone(), "compare disk");
    let tree = name_whole(&source, &progress, &format!("read {}", file.display()))?;
    Ok(content_of_tree(name, &tree))
}

/// Reads all of `source` that is not a hole.
pub(crate) fn name_whole(
    source: &dyn Source,
    progress: &Progress,
    attempt: &str,
) -> Result<TreeRef> {
    stead_store::hash_source(source, ChunkSize::DISK, THREADS, progress)
        .map_err(|source| store_error(attempt, source).left("nothing was changed"))
}

/// Names the content of a file that was just written.
pub(crate) fn name_file(file: &File, path: &Path, progress: &Progress) -> Result<TreeRef> {
    let copy = file.try_clone().at("open", path)?;
    let source = FileSource::new(copy).at("read", path)?;
    name_whole(&source, progress, &format!("read {}", path.display()))
}

impl Engine {
    /// Names what a guest sees through `chain`, top first. Only what was written since the store knew the disk is read.
    pub(crate) async fn name_disk(
        &self,
        disk: &str,
        chain: &[LayerRow],
        progress: &Progress,
    ) -> Result<DiskContent> {
        let source = Arc::new(ChainSource::open_rows(&self.dir, chain)?);
        let tree = match self.name_since(chain, &source, progress).await? {
            Some(tree) => tree,
            None => {
                let (progress, attempt) = (progress.clone(), format!("read disk {disk}"));
                blocking(move || name_whole(source.as_ref(), &progress, &attempt)).await?
            }
        };
        Ok(content_of_tree(disk, &tree))
    }

    /// `None` where the store knows nothing of the disk, or cannot be asked.
    async fn name_since(
        &self,
        chain: &[LayerRow],
        source: &Arc<ChainSource>,
        progress: &Progress,
    ) -> Result<Option<TreeRef>> {
        let Ok(Ok(store)) = tokio::time::timeout(STORE_WITHIN, self.store()).await else {
            return Ok(None);
        };
        let Some(base) = self.known_base(store, chain, source).await? else {
            return Ok(None);
        };
        let named = store.name_changed(source.clone(), base, progress).await;
        match named {
            Ok(tree) => Ok(Some(tree)),
            Err(stead_store::Error::Cancelled) => {
                Err(store_error("read a disk", stead_store::Error::Cancelled))
            }
            // Whatever is wrong with the store, the disk itself says what it holds.
            Err(error) => {
                tracing::info!(%error, "the disk is read whole");
                Ok(None)
            }
        }
    }
}
