//! Where backups go, as making one sees it: a folder, or whatever else can hold one whole or not at all.
//!
//! ```text
//!  begin ─▶ copy_all ────────────────────────────┬─▶ record ─▶ settle
//!     └───▶ copy_changed ─▶ it shows the disk ───┘     │
//!                     └──▶ it does not ─▶ copy_all     │ from here on there is a backup
//!     └──── an error anywhere before ─▶ give_up
//! ```

use std::path::PathBuf;
use std::sync::Arc;

use stead_qcow2::{Bitmap, Chain, LayerFile};

use crate::error::Result;
use crate::event::Watch;
use crate::record::Facts;

/// What can be told, or why not.
pub type Told<T> = std::result::Result<T, String>;

/// An earlier backup that can be built upon.
#[derive(Debug)]
pub struct Ground<G> {
    /// What the vault needs of it.
    pub known: G,
    /// The disk's length then, in bytes.
    pub disk_bytes: u64,
}

/// A place that holds backups, and the one backup that is being made there.
pub trait Vault {
    /// What the vault needs to know of a backup to build upon it.
    type Known;

    /// What people call the place.
    fn place(&self) -> String;

    /// Whether there is a backup of that id, though perhaps a damaged one.
    fn has(&self, id: &str) -> bool;

    /// When that backup was begun, where its record can be read.
    fn time(&self, id: &str) -> Option<String>;

    /// The backup to build upon, or why it cannot be.
    ///
    /// # Errors
    /// When the place cannot be read at all.
    fn ground(&self, id: &str) -> Result<Told<Ground<Self::Known>>>;

    /// The images that show an earlier backup, the topmost first, where they are files.
    fn files(&self, known: &Self::Known) -> Vec<LayerFile>;

    /// Whether an earlier backup has all that a backup of what changed takes over from it, and is whole where what changed
    /// lies. To be asked where the rest of the disk cannot be read again.
    ///
    /// # Errors
    /// When it cannot be read at all, or the caller wants it to end.
    fn is_sound(
        &mut self,
        known: &Self::Known,
        changed: &Bitmap,
        watch: Watch<'_>,
    ) -> Result<Told<()>>;

    /// Begins a backup of that id.
    ///
    /// # Errors
    /// When the place cannot be written.
    fn begin(&mut self, id: &str) -> Result<()>;

    /// Copies the whole disk, and reads it back.
    ///
    /// # Errors
    /// When anything fails, or what is read back is not the disk.
    fn copy_all(&mut self, disk: &Arc<Chain>, watch: Watch<'_>) -> Result<()>;

    /// Copies what changed since an earlier backup, and reads it back; or says why that does not show the disk.
    ///
    /// # Errors
    /// When anything fails.
    fn copy_changed(
        &mut self,
        disk: &Arc<Chain>,
        since: &Ground<Self::Known>,
        changed: &Bitmap,
        watch: Watch<'_>,
    ) -> Result<Told<()>>;

    /// Makes what was copied a backup; gives the facts with what only the place knows.
    ///
    /// # Errors
    /// When it cannot be written. There is no backup then.
    ///
    /// # Durability
    /// When this returns `Ok`, the backup is durable.
    fn record(&mut self, facts: Facts, watch: Watch<'_>) -> Result<Facts>;

    /// Takes away what a backup left that is not to be.
    ///
    /// # Errors
    /// Says what stays and who removes it.
    fn give_up(&mut self) -> Told<()>;

    /// Takes away what only a backup in the making needs.
    ///
    /// # Errors
    /// Says what stays and who removes it.
    fn settle(&mut self) -> Told<()>;

    /// The image of the backup, where it is a file.
    fn image(&self) -> Option<PathBuf>;
}
