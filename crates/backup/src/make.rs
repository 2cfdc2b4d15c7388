//! Making a backup: what is wanted, what can be done, and the steps to it.
//!
//! ```text
//!  lock disk and place ─▶ plan ─▶ copy ─▶ read back ─▶ record ─▶ next bitmap begins, old ones go
//!                                                        │
//!        an error or a crash: no backup, the bitmap says what it said   │ a crash: the backup is there, and the old bitmap,
//!                                                        │ which names more than needed, goes on
//! ```

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Serialize;
use stead_qcow2::Bitmap;

use crate::changes::changed_since;
use crate::disk::{Disk, DiskSource};
use crate::error::{BackupError, Kind, Result};
use crate::event::{Step, Watch};
use crate::into_folder::FolderVault;
use crate::record::{BackupKind, Facts, bitmap_name, id_in, is_id};
use crate::vault::{Ground, Told, Vault};

/// The longest name of bitmaps, in bytes.
const MAX_NAME_BYTES: usize = 256;

/// What the caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// A full backup.
    Full,
    /// An incremental one; where that cannot be, a full one with the reason.
    Incremental,
    /// An incremental one, or none.
    IncrementalOnly,
}

/// A backup to be made, wherever it goes.
#[derive(Debug, Clone)]
pub struct Order {
    /// The disk.
    pub disk: DiskSource,
    /// The name of the bitmaps.
    pub bitmap: String,
    /// What is wanted.
    pub wanted: Wanted,
}

/// A backup to be made in a folder.
#[derive(Debug, Clone)]
pub struct BackupRequest {
    /// The disk.
    pub disk: DiskSource,
    /// The name of the bitmaps.
    pub bitmap: String,
    /// The folder of backups; it is made if it is not there.
    pub to: PathBuf,
    /// What is wanted.
    pub wanted: Wanted,
    /// Whether a full backup is compressed.
    pub compress: bool,
}

/// A backup that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupReport {
    /// What it is.
    pub record: Facts,
    /// Its image, where it is a file.
    pub image: Option<PathBuf>,
    /// The files that the disk was read from, the topmost first.
    pub read: Vec<PathBuf>,
    /// The bitmap that records what changes from now on.
    pub next_bitmap: String,
    /// Bitmaps that were not needed any more and were removed.
    pub removed_bitmaps: Vec<String>,
    /// Bitmaps of that name whose backups are elsewhere; they are left alone.
    pub foreign_bitmaps: Vec<String>,
}

/// The bitmap that is to record from the instant of the backup `id` on, for [`DiskSource::Frozen`].
#[must_use]
pub fn next_bitmap(name: &str, id: &str) -> Vec<u8> {
    bitmap_name(name, id)
}

/// Makes a backup in a folder, of a disk that nobody writes to.
///
/// # Durability
/// When this returns `Ok`, the backup has been read back, compared with the disk, and synced, and after that the next
/// bitmap has begun.
///
/// # Errors
/// When the disk is in use or damaged, the folder cannot be written, there is no room, what was written does not
/// read back right, or an incremental backup alone was wanted and cannot be. The folder then has no new backup
/// and the disk's bitmaps are as they were; but when only the last step failed, the backup is there, and the error says so.
pub fn run(request: &BackupRequest, watch: Watch<'_>) -> Result<BackupReport> {
    let order = Order {
        disk: request.disk.clone(),
        bitmap: request.bitmap.clone(),
        wanted: request.wanted,
    };
    let open = || FolderVault::open(&request.to, request.compress);
    run_into(&order, open, watch)
}

/// Makes a backup in the vault that `open` gives, once the disk is locked.
///
/// # Durability
/// As [`run()`].
///
/// # Errors
/// As [`run()`].
pub fn run_into<V: Vault>(
    order: &Order,
    open: impl FnOnce() -> Result<V>,
    watch: Watch<'_>,
) -> Result<BackupReport> {
    require_name(&order.bitmap)?;
    watch.step(Step::Plan);
    let disk = Disk::open(&order.disk)?;
    let job = Job {
        order,
        watch,
        vault: open()?,
        id: match &order.disk {
            DiskSource::Frozen { id, .. } => required_id(id)?,
            DiskSource::Image(_) | DiskSource::Layers { .. } => new_id()?,
        },
    };
    job.run(disk)
}

pub(crate) fn require_name(name: &str) -> Result<()> {
    if !name.is_empty() && name.len() <= MAX_NAME_BYTES {
        return Ok(());
    }
    let found = format!(
        "a name has 1 to {MAX_NAME_BYTES} bytes, and this one {}",
        name.len()
    );
    Err(BackupError::new(Kind::Usage, "name the bitmap", found))
}

fn required_id(id: &str) -> Result<String> {
    if is_id(id) {
        return Ok(id.to_owned());
    }
    let found = format!("{id:?} is not an id of 32 hex digits");
    Err(BackupError::new(Kind::Internal, "make a backup", found))
}

/// The reason, where a full backup may be made for it.
pub(crate) fn refused(wanted: Wanted, why: String, watch: Watch<'_>) -> Result<String> {
    if wanted == Wanted::IncrementalOnly {
        return Err(
            BackupError::new(Kind::Conflict, "make an incremental backup", why)
                .next("make a full one (`stead backup full`)"),
        );
    }
    watch.notice(format!("a full backup is made: {why}"));
    Ok(why)
}

/// A fresh id of a backup: 32 random hex digits.
///
/// # Errors
/// When the system has no random bytes.
pub fn new_id() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        BackupError::new(Kind::Internal, "draw random bytes", error.to_string())
    })?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What an incremental backup stands on, and what changed since.
struct Stand<K> {
    parent: String,
    ground: Ground<K>,
    changed: Bitmap,
}

/// What an incremental backup stands on; or why a full one is made, where one was not asked for.
type Base<K> = std::result::Result<Box<Stand<K>>, Option<String>>;

struct Job<'a, V: Vault> {
    order: &'a Order,
    watch: Watch<'a>,
    vault: V,
    id: String,
}

impl<V: Vault> Job<'_, V> {
    fn run(mut self, mut disk: Disk) -> Result<BackupReport> {
        let next = bitmap_name(&self.order.bitmap, &self.id);
        let (old, foreign) = self.bitmaps(&disk)?;
        let base = self.base(&disk)?;
        disk.plan_switch(&next, &old)?;
        let record = match self.make(&disk, base) {
            Ok(record) => record,
            Err(error) => return Err(self.undone(error)),
        };
        if let Err(stays) = self.vault.settle() {
            self.watch.notice(stays);
        }
        self.watch.step(Step::Bitmap);
        disk.switch(&next, &old).map_err(|error| {
            error
                .left(format!("the backup {} is whole and can be used; the disk's bitmaps are as they were, so the next incremental backup stands on an earlier one, or is a full one", self.id))
                .next("see to the disk, and make the next backup")
        })?;
        Ok(BackupReport {
            image: self.vault.image(),
            read: disk.files(),
            record,
            next_bitmap: text(&next),
            removed_bitmaps: old.iter().map(|name| text(name)).collect(),
            foreign_bitmaps: foreign,
        })
    }

    /// Takes away what a failed backup left.
    fn undone(&mut self, error: BackupError) -> BackupError {
        match self.vault.give_up() {
            Ok(()) => error,
            Err(stays) => error.left(format!("the disk was not changed; {stays}")),
        }
    }

    /// The disk's bitmaps that this backup makes needless, and those that belong elsewhere.
    fn bitmaps(&self, disk: &Disk) -> Result<(Vec<Vec<u8>>, Vec<String>)> {
        let ours = disk.bitmaps()?.into_iter().filter_map(|bitmap| {
            let known = self.vault.has(id_in(&bitmap, &self.order.bitmap)?);
            Some((bitmap, known))
        });
        let (old, foreign): (Vec<_>, Vec<_>) = ours.partition(|(_, known)| *known);
        let name = |(name, _): (Vec<u8>, bool)| name;
        let foreign = foreign.into_iter().map(|one| text(&name(one)));
        Ok((old.into_iter().map(name).collect(), foreign.collect()))
    }

    /// What an incremental backup can stand on, where one is wanted and possible; else why not.
    fn base(&self, disk: &Disk) -> Result<Base<V::Known>> {
        if self.order.wanted == Wanted::Full {
            return Ok(Err(None));
        }
        match self.find_base(disk)? {
            Ok(stand) => Ok(Ok(Box::new(stand))),
            Err(why) => refused(self.order.wanted, why, self.watch)
                .map(Some)
                .map(Err),
        }
    }

    fn find_base(&self, disk: &Disk) -> Result<Told<Stand<V::Known>>> {
        let mut why = Vec::new();
        for id in self.candidates(disk)? {
            match self.base_on(disk, &id)? {
                Ok(stand) => {
                    if !why.is_empty() {
                        let why = why.join("; ");
                        self.watch
                            .notice(format!("it stands on the earlier backup {id}: {why}"));
                    }
                    return Ok(Ok(stand));
                }
                Err(reason) => why.push(reason),
            }
        }
        Ok(Err(match why.is_empty() {
            true => self.why_none(disk)?,
            false => why.join("; "),
        }))
    }

    /// The backups in the vault since which a bitmap of the disk says it records; the newest first.
    fn candidates(&self, disk: &Disk) -> Result<Vec<String>> {
        let mut ids = BTreeSet::new();
        for layer in (0..disk.chain.depth()).filter_map(|index| disk.chain.layer(index)) {
            let stored = layer.stored_bitmaps();
            let stored = stored.map_err(|error| BackupError::engine("read the bitmaps", error))?;
            let own = stored
                .iter()
                .filter_map(|one| id_in(&one.name, &self.order.bitmap));
            ids.extend(own.filter(|id| self.vault.has(id)).map(str::to_owned));
        }
        let mut ids: Vec<String> = ids.into_iter().collect();
        ids.sort_by_key(|id| std::cmp::Reverse(self.vault.time(id)));
        Ok(ids)
    }

    fn why_none(&self, disk: &Disk) -> Result<String> {
        let name = &self.order.bitmap;
        if disk.bitmaps_are_void() {
            return Ok("the image was changed by a program that does not know bitmaps, so all it had are void".into());
        }
        let (_, foreign) = self.bitmaps(disk)?;
        let place = self.vault.place();
        Ok(match foreign.is_empty() {
            true => format!("the disk has no bitmap {name}@… of a backup in {place}"),
            false => format!(
                "the disk has {}, which belong to backups that are not in {place}",
                foreign.join(", ")
            ),
        })
    }

    fn base_on(&self, disk: &Disk, id: &str) -> Result<Told<Stand<V::Known>>> {
        let ground = match self.vault.ground(id)? {
            Ok(ground) => ground,
            Err(why) => return Ok(Err(format!("the backup {id} cannot be built upon: {why}"))),
        };
        let name = bitmap_name(&self.order.bitmap, id);
        let told = changed_since(&disk.chain, &name, ground.disk_bytes);
        let told = told.map_err(|error| BackupError::engine("read the bitmaps", error))?;
        Ok(told
            .map(|changed| Stand {
                parent: id.to_owned(),
                ground,
                changed,
            })
            .map_err(|why| format!("the bitmap {} cannot be used: {why}", text(&name))))
    }

    /// Copies, proves and records.
    fn make(&mut self, disk: &Disk, base: Base<V::Known>) -> Result<Facts> {
        let time = format!("{:.9}", jiff::Timestamp::now());
        self.vault.begin(&self.id)?;
        let mut facts = Facts {
            id: self.id.clone(),
            kind: BackupKind::Full,
            parent: None,
            disk: disk.name.clone(),
            bitmap: self.order.bitmap.clone(),
            time,
            disk_bytes: disk.chain.len(),
            changed_bytes: disk.chain.len(),
            stored_bytes: 0,
            why_full: None,
        };
        match self.copy_changed(disk, base)? {
            Ok((parent, changed_bytes)) => {
                facts.kind = BackupKind::Incremental;
                facts.parent = Some(parent);
                facts.changed_bytes = changed_bytes;
            }
            Err(why_full) => {
                self.vault.copy_all(&disk.chain, self.watch)?;
                facts.why_full = why_full;
            }
        }
        self.watch.go_on("make a backup")?;
        self.vault.record(facts, self.watch)
    }

    /// Copies what changed: the parent and how many bytes were looked at; or why all must be copied.
    fn copy_changed(
        &mut self,
        disk: &Disk,
        base: Base<V::Known>,
    ) -> Result<std::result::Result<(String, u64), Option<String>>> {
        let stand = match base {
            Ok(stand) => *stand,
            Err(why_full) => return Ok(Err(why_full)),
        };
        let copied =
            self.vault
                .copy_changed(&disk.chain, &stand.ground, &stand.changed, self.watch)?;
        match copied {
            Ok(()) => Ok(Ok((stand.parent, stand.changed.dirty_bytes()))),
            Err(why) => refused(self.order.wanted, why, self.watch)
                .map(Some)
                .map(Err),
        }
    }
}

pub(crate) fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
