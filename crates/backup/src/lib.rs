//! Full and incremental backups of disks into a folder (or any other [`Vault`]), by dirty bitmaps that cannot be taken for another's.
//!
//! * [`run()`] makes a backup: of everything, or of what changed since an earlier one.
//! * [`restore()`] makes the disk of a backup again; [`verify()`] reads backups and says what is damaged; [`list()`] lists them.
//!
//! `docs/backup.md` has the files, the order of steps, and what a crash behind each of them leaves.
//!
//! # Invariants
//! * The bitmap that records since a backup has the backup's id in its name, so no backup stands on a bitmap that
//!   began at another time.
//! * A bitmap is removed only when a backup with all that it names is durable, read back and recorded.
//! * A backup without a record is none; the record is written last.
//! * A restored disk gets its name only when every byte of it has the recorded hash.

#![forbid(unsafe_code)]

mod changes;
mod content;
mod disk;
mod error;
mod event;
mod folder;
mod into_folder;
mod live;
mod make;
mod prove;
mod record;
mod remove;
mod restore;
mod vault;
mod verify;

pub use disk::DiskSource;
pub use error::{BackupError, Kind, Result};
pub use event::{Event, Step, Watch};
pub use folder::{Listed, State, find, list, sort};
pub use into_folder::FolderVault;
pub use live::{LiveOrder, run_live};
pub use make::{BackupReport, BackupRequest, Order, Wanted, new_id, next_bitmap, run, run_into};
pub use record::{BackupKind, Facts, is_id};
pub use remove::remove;
pub use restore::{RestoreFormat, RestoreReport, RestoreRequest, restore, restore_with};
pub use vault::{Ground, Told, Vault};
pub use verify::{Verdict, verify};
