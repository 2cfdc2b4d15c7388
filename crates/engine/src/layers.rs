//! Layer files: where they lie, who may read them, and what a guest sees through a chain of them.
//!
//! A layer is a raw base (a template's disk, or a disk rebuilt from the store) or a qcow2 overlay.
//! Its file never moves: QEMU may hold it open. While a guest writes to it, it belongs to that VM's
//! user and nobody else may read it; once frozen it belongs to us and nobody may write it.

use std::io;
use std::ops::Range;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use stead_qcow2::{Chain, ClusterSize, LayerFile, LayerFormat};
use stead_store::Source;

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::paths::DataDir;
use crate::records::{LayerRow, Records};

/// The deepest chain that is opened, in layers.
pub(crate) const DEPTH_MAX: usize = 200;
/// A deeper chain is not put under new sandboxes: its content is rebuilt as one layer instead.
pub(crate) const DEPTH_REUSED_MAX: usize = 64;

/// The format word of a raw base.
pub(crate) const RAW: &str = "raw";
/// The format word of an overlay.
pub(crate) const QCOW2: &str = "qcow2";

/// The file of a layer.
pub(crate) fn path_of(dir: &DataDir, id: &str, format: &str) -> PathBuf {
    dir.layers().join(format!("{id}.{format}"))
}

/// The row of a new overlay over `parent` that a guest will write to.
pub(crate) fn new_overlay(id: &str, parent: &LayerRow, virtual_bytes: i64) -> LayerRow {
    LayerRow {
        id: id.to_owned(),
        format: QCOW2.to_owned(),
        parent: Some(parent.id.clone()),
        virtual_bytes,
        frozen: false,
        content: None,
        stamp: None,
    }
}

/// Creates the overlay's file for the user `vm_user` (when we are root).
///
/// # Errors
/// When the file cannot be created.
pub(crate) fn create_overlay_file(
    dir: &DataDir,
    overlay: &LayerRow,
    parent: Option<&LayerRow>,
    vm_user: Option<u32>,
) -> Result<PathBuf> {
    let path = path_of(dir, &overlay.id, QCOW2);
    let backing = parent.map(|parent| {
        (
            format!("{}.{}", parent.id, parent.format),
            format_of(parent),
        )
    });
    stead_qcow2::create_overlay(
        &path,
        0o600,
        bytes(overlay)?,
        backing
            .as_ref()
            .map(|(name, format)| (name.as_str(), *format)),
        ClusterSize::DEFAULT,
    )
    .map_err(|source| {
        EngineError::new(
            kind_of(&source),
            format!("create overlay {}", path.display()),
            "",
        )
        .because(source)
    })?;
    give_to(&path, vm_user)?;
    Ok(path)
}

/// Hands a file or folder to a VM's user; nothing to do when we are not root.
pub(crate) fn give_to(path: &Path, vm_user: Option<u32>) -> Result<()> {
    match vm_user {
        Some(user) => chown(path, Some(user), Some(user)).at("hand to the VM's user", path),
        None => Ok(()),
    }
}

/// Takes a frozen file back: ours, readable by VMs, writable by nobody.
pub(crate) fn seal(path: &Path) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        chown(path, Some(0), Some(0)).at("take back", path)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o444)).at("seal", path)
}

/// What a file looks like from outside: which it is, its length, and when it was last changed.
///
/// A write moves the time of the last status change, which no system call sets back. So a file with the
/// stamp that it had when its content was proven has that content still, unless somebody turned the clock
/// back or wrote below the file system.
pub(crate) fn stamp(path: &Path) -> Result<String> {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(path).at("look at", path)?;
    Ok(format!(
        "{}:{}:{}:{}.{:09}:{}.{:09}",
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec()
    ))
}

/// The size a guest sees.
pub(crate) fn bytes(layer: &LayerRow) -> Result<u64> {
    u64::try_from(layer.virtual_bytes).map_err(|source| {
        EngineError::internal(format!("read the size of layer {}", layer.id), "").because(source)
    })
}

fn format_of(layer: &LayerRow) -> LayerFormat {
    if layer.format == RAW {
        LayerFormat::Raw
    } else {
        LayerFormat::Qcow2
    }
}

/// The files of a chain, top first.
pub(crate) fn files(dir: &DataDir, chain: &[LayerRow]) -> Vec<LayerFile> {
    chain
        .iter()
        .map(|layer| LayerFile {
            path: path_of(dir, &layer.id, &layer.format),
            format: format_of(layer),
        })
        .collect()
}

/// What a guest sees through the layers of a chain.
pub(crate) struct ChainSource {
    chain: Chain,
    /// The size of the guest's disk: a top overlay may be larger than its base.
    length: u64,
    /// The layers' files, top first.
    files: Vec<PathBuf>,
}

impl ChainSource {
    /// Opens the chain whose top layer is `top`.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when a file is missing or not a whole image.
    pub(crate) async fn open(records: &Records, dir: &DataDir, top: &str) -> Result<Self> {
        let rows = records.chain(top).await?;
        Self::open_rows(dir, &rows)
    }

    pub(crate) fn open_rows(dir: &DataDir, rows: &[LayerRow]) -> Result<Self> {
        let layers = files(dir, rows);
        Self::open_files(&layers).map_err(|source| {
            EngineError::new(
                Kind::Damaged,
                format!(
                    "open the layers of {}",
                    rows.first().map_or("no disk", |row| &row.id)
                ),
                "",
            )
            .because(source)
            .next("move the damaged file away if it is of a checkpoint: the next use rebuilds it; a sandbox goes back with `stead restore`")
        })
    }

    /// Opens layers that are not this worker's, top first.
    ///
    /// # Errors
    /// When a file is missing or not a whole image.
    pub(crate) fn open_files(layers: &[LayerFile]) -> stead_qcow2::Result<Self> {
        let chain = Chain::open(layers)?;
        Ok(Self {
            length: chain.len(),
            chain,
            files: layers.iter().map(|layer| layer.path.clone()).collect(),
        })
    }

    /// Guest ranges that the top `depth` layers define: what differs from the layers below.
    pub(crate) fn changed(&self, depth: usize) -> Result<Vec<Range<u64>>> {
        self.chain
            .allocated(depth)
            .collect::<std::result::Result<_, _>>()
            .map_err(|source| {
                EngineError::new(Kind::Damaged, "list what a layer changed", "").because(source)
            })
    }
}

impl ChainSource {
    /// The files that what a guest reads in `range` comes from, top first.
    pub(crate) fn read_from(&self, range: &Range<u64>) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut covered = 0;
        for (depth, file) in (1..).zip(&self.files) {
            let now = if depth == self.files.len() {
                range.end.saturating_sub(range.start)
            } else {
                overlap(&self.changed(depth)?, range)
            };
            if now > covered {
                found.push(file.clone());
            }
            covered = now;
        }
        Ok(found)
    }
}

/// How many bytes of `range` lie in `ranges`, which do not overlap.
fn overlap(ranges: &[Range<u64>], range: &Range<u64>) -> u64 {
    let within = |other: &Range<u64>| {
        let start = other.start.max(range.start);
        other.end.min(range.end).saturating_sub(start)
    };
    ranges.iter().map(within).sum()
}

impl Source for ChainSource {
    fn len(&self) -> u64 {
        self.length
    }

    fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.chain.next_data(at).map_err(io::Error::other)
    }

    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.chain.read_at(at, buffer).map_err(io::Error::other)
    }
}

pub(crate) fn kind_of(error: &stead_qcow2::Error) -> Kind {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::StorageFull
        {
            return Kind::NoSpace;
        }
        cause = error.source();
    }
    Kind::Internal
}
