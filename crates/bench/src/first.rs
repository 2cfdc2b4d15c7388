//! The guest that most figures begin with: filled, captured once by us and once by the peer.

use std::path::{Path, PathBuf};

use crate::content::{self, Content};
use crate::error::{Doing, Result};
use crate::{Bench, program, workload};

/// The sandbox, which runs on until [`end`].
pub const SANDBOX: &str = "first";
/// The peer's internal snapshot.
pub const TAG: &str = "c1";

/// One instant of both guests.
#[derive(Debug)]
pub struct First {
    /// The checkpoint.
    pub checkpoint: String,
    /// Its content.
    pub content: Content,
    /// The bytes of the whole store after it.
    pub stored_bytes: u64,
    /// The bytes that the store grew by.
    pub grown_bytes: u64,
    /// The peer's disk with the internal snapshot [`TAG`]; nothing runs on it.
    pub image: PathBuf,
    /// Where the peer's folder and files are.
    pub folder: PathBuf,
}

/// Boots and fills both guests and captures both.
///
/// # Errors
/// When anything of it fails.
pub async fn prepare(bench: &Bench) -> Result<First> {
    bench.say("boot and fill both guests, capture both");
    let folder = bench.scratch.path("first");
    stead_sys::durable::create_dir(&folder, 0o711).doing("create a folder")?;
    let image = folder.join("peer.qcow2");
    bench.spec.create_image(&image).await?;
    bench.worker.boot(crate::TEMPLATE, SANDBOX).await?;
    let mut peer = bench.spec.boot(&folder.join("peer"), &image).await?;
    bench.worker.shell(SANDBOX, workload::FILL).await?;
    peer.shell(workload::FILL).await?;
    peer.savevm(TAG).await?;
    peer.quit().await?;
    let before = program::bytes_below(&bench.worker.store)?;
    let checkpoint = bench.worker.checkpoint(SANDBOX).await?.checkpoint.id;
    let stored_bytes = program::bytes_below(&bench.worker.store)?;
    let store = content::open_store(&bench.worker.store, &folder.join("cache")).await?;
    let content = Content::fetch(&store, &checkpoint, &folder.join("content")).await?;
    Ok(First {
        checkpoint,
        content,
        stored_bytes,
        grown_bytes: stored_bytes.saturating_sub(before),
        image,
        folder,
    })
}

/// Ends the guest, if there is one: what is measured from here on is to be alone.
///
/// # Errors
/// When it cannot be removed.
pub async fn end(bench: &Bench) -> Result<()> {
    if bench.first.is_none() {
        return Ok(());
    }
    let removed = bench.worker.engine.remove(SANDBOX, true).await;
    removed.map(drop).doing("remove a sandbox")
}

/// Copies a file, leaving zeros out.
///
/// # Errors
/// When `cp` fails.
pub async fn copy(from: &Path, to: &Path) -> Result<()> {
    let arguments = ["--sparse=always".as_ref(), from.as_os_str(), to.as_os_str()];
    program::run("cp", &arguments).await?;
    Ok(())
}
