//! Backups of the disk of a VM that runs and is not ours, by its QMP socket.
//!
//! ```text
//!  clear what a dead backup left ─▶ plan ─▶ QEMU copies, a new bitmap begins ─▶ as any other backup, of that copy
//!                                            │                                   ─▶ record ─▶ old bitmaps go, job dismissed
//!      an error or Ctrl-C: the copy and the new bitmap go, the old one says what it said
//! ```
//! The copy is QEMU's ([`stead_vmm::block_backup`]): the disk at one instant, at which the new bitmap begins. What is backed up
//! is that copy, over the images of the backup that it goes on from.
//!
//! | killed | then |
//! |---|---|
//! | this program | the VM runs on, QEMU's job ends by itself; the next backup into the same place clears it, and the new bitmap if no backup was recorded |
//! | QEMU | no backup, or the backup is there; bitmaps were not saved, so the next one is full |
//!
//! # Invariants
//! * A bitmap is removed only when a backup that its disk has a newer bitmap of is recorded.
//! * The guest's disk is read, and only its bitmaps are changed.

mod stage;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_qcow2::{Bitmap, Chain, GuestOffset, LayerFile};
use stead_sys::readable;
use stead_vmm::Qmp;
use stead_vmm::block_backup;
use stead_vmm::block_jobs::{self, BitmapChange, JobState, Node, NodeBitmap};

use crate::error::{BackupError, Kind, Result};
use crate::event::{Step, Watch};
use crate::make::{BackupReport, Wanted, new_id, refused, require_name, text};
use crate::record::{BackupKind, Facts, bitmap_name, id_in};
use crate::vault::{Ground, Told, Vault};
use stage::{Maker, Names, Source, Stage};

const ATTEMPT: &str = "back up a running disk";
/// One bit stands for so many bytes of what was copied: QEMU copies whole pieces of this size.
const PIECE_BITS: u8 = 16;

/// A backup of a running disk to be made.
#[derive(Debug, Clone)]
pub struct LiveOrder {
    /// The disk's active layer, a qcow2 image.
    pub disk: PathBuf,
    /// The QMP socket of the VM that has it open.
    pub qmp: PathBuf,
    /// The name of the bitmaps.
    pub bitmap: String,
    /// What is wanted.
    pub wanted: Wanted,
    /// The folder that has room for a copy of what is backed up, meanwhile.
    pub staging: PathBuf,
}

fn vm(attempt: &str, source: stead_vmm::Error) -> BackupError {
    BackupError::new(Kind::Vm, attempt, source.to_string()).because(source)
}

/// Makes a backup of the disk of a running VM, in the vault that `open` gives.
///
/// # Durability
/// When this returns `Ok`, the backup has been read back, compared with QEMU's copy, and synced, and after that the bitmaps of
/// earlier ones were removed. The new bitmap is in QEMU's memory, and in the image when QEMU has ended in order.
///
/// # Errors
/// As [`run()`](crate::run()), and when the VM does not answer, does not have the disk, or cannot copy it. The VM runs on.
pub fn run_live<V: Vault>(
    order: &LiveOrder,
    open: impl FnOnce() -> Result<V>,
    watch: Watch<'_>,
) -> Result<BackupReport> {
    require_name(&order.bitmap)?;
    watch.step(Step::Plan);
    let mut qmp = block_jobs::connect(&order.qmp).map_err(|error| vm("reach the VM", error))?;
    let disk = find(&mut qmp, &order.disk)?;
    let vault = open()?;
    let maker = Maker::own(&vault.place(), &new_id()?)?;
    let mut live = Live {
        order,
        watch,
        qmp,
        vault,
        names: maker.names(),
        id: maker.id,
        node: disk.name,
    };
    live.clear_leftovers()?;
    live.run()
}

/// The node that has the disk open for writing.
fn find(qmp: &mut Qmp, disk: &Path) -> Result<Node> {
    let io = |source| BackupError::io("find", disk, source);
    let identity = |path: &Path| readable::identity(&readable::open(path)?);
    let wanted = identity(disk).map_err(io)?;
    let is_it = |node: &Node| {
        let own = node.file.as_deref().and_then(|path| identity(path).ok());
        own == Some(wanted) && node.driver == "qcow2"
    };
    let all = block_jobs::nodes(qmp).map_err(|error| vm("list the VM's disks", error))?;
    let refuse =
        |found: String, next: &str| Err(BackupError::new(Kind::Usage, ATTEMPT, found).next(next));
    match all.into_iter().find(is_it) {
        None => refuse(
            format!(
                "the VM does not have {} open as a qcow2 image",
                disk.display()
            ),
            "give the QMP socket of the VM that runs on this disk, and the disk's active layer",
        ),
        Some(node) if node.read_only => refuse(
            format!("{} is not the layer that the VM writes to", disk.display()),
            "name the active layer",
        ),
        Some(node) => Ok(node),
    }
}

/// What an incremental backup stands on, and the bitmap that says what changed since.
struct Stand<K> {
    parent: String,
    ground: Ground<K>,
    bitmap: NodeBitmap,
}

/// What QEMU copied.
struct Copied {
    /// Its file, which is there as long as this.
    stage: Stage,
    virtual_bytes: u64,
}

struct Live<'a, V: Vault> {
    order: &'a LiveOrder,
    watch: Watch<'a>,
    qmp: Qmp,
    vault: V,
    id: String,
    names: Names,
    node: String,
}

impl<V: Vault> Live<'_, V> {
    fn run(mut self) -> Result<BackupReport> {
        let (old, foreign) = self.bitmaps()?;
        let stand = self.stand()?;
        self.vault.begin(&self.id)?;
        let record = match self.make(stand) {
            Ok(record) => record,
            Err(error) => return Err(self.undone(error)),
        };
        if let Err(stays) = self.vault.settle() {
            self.watch.notice(stays);
        }
        self.watch.step(Step::Bitmap);
        self.switch(&old)?;
        Ok(BackupReport {
            image: self.vault.image(),
            read: vec![self.order.disk.clone()],
            record,
            next_bitmap: self.next_bitmap(),
            removed_bitmaps: old,
            foreign_bitmaps: foreign,
        })
    }

    fn next_bitmap(&self) -> String {
        text(&bitmap_name(&self.order.bitmap, &self.id))
    }

    /// The bitmaps of the disk's node, as they are now.
    fn node_bitmaps(&mut self) -> Result<Vec<NodeBitmap>> {
        let nodes = block_jobs::nodes(&mut self.qmp);
        let nodes = nodes.map_err(|error| vm("list the VM's disks", error))?;
        let own = nodes.into_iter().find(|node| node.name == self.node);
        Ok(own.map_or_else(Vec::new, |node| node.bitmaps))
    }

    /// The names of bitmaps that this backup makes needless, and of those that belong elsewhere.
    fn bitmaps(&mut self) -> Result<(Vec<String>, Vec<String>)> {
        let all = self.node_bitmaps()?.into_iter().map(|bitmap| bitmap.name);
        let id = |name: &String| id_in(name.as_bytes(), &self.order.bitmap).map(str::to_owned);
        let ours = all.filter(|name| id(name).is_some());
        let is_known = |name: &String| id(name).is_some_and(|id| self.vault.has(&id));
        Ok(ours.partition(is_known))
    }

    /// What an incremental backup can stand on, where one is wanted and possible; else why not.
    fn stand(&mut self) -> Result<std::result::Result<Stand<V::Known>, Option<String>>> {
        if self.order.wanted == Wanted::Full {
            return Ok(Err(None));
        }
        let mut why = Vec::new();
        for (id, bitmap) in self.candidates()? {
            match self.stand_on(&id, bitmap)? {
                Ok(stand) => return Ok(Ok(stand)),
                Err(reason) => why.push(reason),
            }
        }
        if why.is_empty() {
            why.push(format!(
                "the VM's disk has no bitmap {}@… of a backup in {}",
                self.order.bitmap,
                self.vault.place()
            ));
        }
        refused(self.order.wanted, why.join("; "), self.watch)
            .map(Some)
            .map(Err)
    }

    /// Bitmaps of backups in the vault, the newest first.
    fn candidates(&mut self) -> Result<Vec<(String, NodeBitmap)>> {
        let own = self.node_bitmaps()?.into_iter().filter_map(|bitmap| {
            let id = id_in(bitmap.name.as_bytes(), &self.order.bitmap)?.to_owned();
            self.vault.has(&id).then_some((id, bitmap))
        });
        let mut own: Vec<_> = own.collect();
        own.sort_by_key(|(id, _)| std::cmp::Reverse(self.vault.time(id)));
        Ok(own)
    }

    fn stand_on(&mut self, id: &str, bitmap: NodeBitmap) -> Result<Told<Stand<V::Known>>> {
        if bitmap.is_inconsistent || !bitmap.is_recording {
            let why = match bitmap.is_inconsistent {
                true => "it was not saved when the disk was last used",
                false => "it does not record",
            };
            let name = &bitmap.name;
            return Ok(Err(format!("the bitmap {name} cannot be used: {why}")));
        }
        let ground = match self.vault.ground(id)? {
            Ok(ground) => ground,
            Err(why) => return Ok(Err(format!("the backup {id} cannot be built upon: {why}"))),
        };
        let now = self.disk_bytes()?;
        if now != ground.disk_bytes {
            let then = ground.disk_bytes;
            return Ok(Err(format!(
                "the disk has {now} bytes now, and had {then} at the backup {id}"
            )));
        }
        Ok(Ok(Stand {
            parent: id.to_owned(),
            ground,
            bitmap,
        }))
    }

    fn disk_bytes(&mut self) -> Result<u64> {
        let size = block_backup::size_of(&mut self.qmp, &self.node);
        let size = size.map_err(|error| vm("ask for the disk's size", error))?;
        size.map(|size| size.virtual_bytes).ok_or_else(|| {
            let found = format!("the node {} is gone", self.node);
            BackupError::new(Kind::Vm, ATTEMPT, found)
        })
    }

    /// Lets QEMU copy, backs that up, and records it.
    fn make(
        &mut self,
        stand: std::result::Result<Stand<V::Known>, Option<String>>,
    ) -> Result<Facts> {
        let mut facts = self.facts();
        let why_full = match stand {
            Err(why_full) => why_full,
            Ok(stand) => match self.increment(&stand, &mut facts)? {
                Ok(()) => return self.record(facts),
                Err(why) => {
                    let why = refused(self.order.wanted, why, self.watch)?;
                    self.take_back()?;
                    Some(why)
                }
            },
        };
        facts.why_full = why_full;
        let copied = self.copy(None)?;
        let disk = open(&[copied.stage.layer()])?;
        facts.disk_bytes = copied.virtual_bytes;
        facts.changed_bytes = copied.virtual_bytes;
        self.vault.copy_all(&disk, self.watch)?;
        self.record(facts)
    }

    fn facts(&self) -> Facts {
        let disk = std::path::absolute(&self.order.disk);
        let disk = disk.unwrap_or_else(|_| self.order.disk.clone());
        Facts {
            id: self.id.clone(),
            kind: BackupKind::Full,
            parent: None,
            disk: disk.display().to_string(),
            bitmap: self.order.bitmap.clone(),
            time: format!("{:.9}", jiff::Timestamp::now()),
            disk_bytes: 0,
            changed_bytes: 0,
            stored_bytes: 0,
            why_full: None,
        }
    }

    fn record(&mut self, facts: Facts) -> Result<Facts> {
        self.watch.go_on("make a backup")?;
        self.vault.record(facts, self.watch)
    }

    /// Copies what changed since the parent; or why that would not show the disk.
    fn increment(&mut self, stand: &Stand<V::Known>, facts: &mut Facts) -> Result<Told<()>> {
        let copied = self.copy(Some(&stand.bitmap))?;
        let files = std::iter::once(copied.stage.layer());
        let files: Vec<_> = files.chain(self.vault.files(&stand.ground.known)).collect();
        let disk = open(&files)?;
        let changed = defined_by_top(&disk)?;
        // QEMU counts whole bits, also where the disk ends within the last one.
        let NodeBitmap {
            dirty_bytes,
            granularity_bytes,
            ..
        } = stand.bitmap;
        if changed.dirty_bytes() < dirty_bytes.saturating_sub(granularity_bytes) {
            let found = format!(
                "{} bytes, and the bitmap {} named {} before",
                changed.dirty_bytes(),
                stand.bitmap.name,
                stand.bitmap.dirty_bytes
            );
            return Err(BackupError::new(
                Kind::Damaged,
                "look at QEMU's copy",
                found,
            ));
        }
        let ground = &stand.ground;
        if let Err(why) = self.vault.is_sound(&ground.known, &changed, self.watch)? {
            return Ok(Err(why));
        }
        facts.kind = BackupKind::Incremental;
        facts.parent = Some(stand.parent.clone());
        facts.disk_bytes = copied.virtual_bytes;
        facts.changed_bytes = changed.dirty_bytes();
        self.vault.copy_changed(&disk, ground, &changed, self.watch)
    }

    fn copy(&mut self, since: Option<&NodeBitmap>) -> Result<Copied> {
        self.watch.step(Step::Stage);
        let virtual_bytes = self.disk_bytes()?;
        let begins = self.next_bitmap();
        let source = Source {
            node: &self.node,
            since: since.map(|bitmap| (bitmap.name.as_str(), bitmap.dirty_bytes)),
            begins: &begins,
        };
        let stage = Stage::begin(&mut self.qmp, &self.names, &source, &self.order.staging)?;
        stage.finish(&mut self.qmp, &self.names, self.watch)?;
        Ok(Copied {
            stage,
            virtual_bytes,
        })
    }

    /// Takes away the copy and the bitmap that began with it.
    fn take_back(&mut self) -> Result<()> {
        stage::clear(&mut self.qmp, &self.names)?;
        let next = self.next_bitmap();
        if self.node_bitmaps()?.iter().any(|one| one.name == next) {
            self.remove(std::slice::from_ref(&next))?;
        }
        Ok(())
    }

    fn remove(&mut self, bitmaps: &[String]) -> Result<()> {
        let changes: Vec<_> = bitmaps
            .iter()
            .map(|name| BitmapChange::Remove(name))
            .collect();
        block_jobs::change_bitmaps(&mut self.qmp, &self.node, &changes)
            .map_err(|error| vm("remove bitmaps", error))
    }

    /// Takes away what a failed backup left, in QEMU and in the vault.
    fn undone(&mut self, error: BackupError) -> BackupError {
        let mut stays = Vec::new();
        if let Err(left) = self.take_back() {
            stays.push(format!(
                "QEMU's copy is not taken away ({}), and the next backup does it",
                left.found()
            ));
        }
        if let Err(left) = self.vault.give_up() {
            stays.push(left);
        }
        match stays.is_empty() {
            true => error.left("the VM runs on, and its bitmaps are as they were"),
            false => error.left(format!(
                "the VM's disk was not changed; {}",
                stays.join("; ")
            )),
        }
    }

    /// The backup is recorded: what only earlier ones needed goes, and QEMU forgets the job.
    fn switch(&mut self, old: &[String]) -> Result<()> {
        let now = self.node_bitmaps()?;
        let is_there = |name: &&String| now.iter().any(|bitmap| bitmap.name == **name);
        let old: Vec<String> = old.iter().filter(is_there).cloned().collect();
        let done = self
            .remove(&old)
            .and_then(|()| stage::dismiss(&mut self.qmp, &self.names.job));
        done.map_err(|error| {
            let id = &self.id;
            error
                .left(format!("the backup {id} is whole and can be used, and its bitmap records; older bitmaps or QEMU's job stay"))
                .next("make the next backup, which removes them")
        })
    }

    /// Takes away what backups left whose processes are dead. A bitmap goes if no backup was recorded for it, as far
    /// as that is known.
    fn clear_leftovers(&mut self) -> Result<()> {
        let jobs = block_backup::jobs(&mut self.qmp);
        let jobs = jobs.map_err(|error| vm("list the VM's jobs", error))?;
        for job in jobs {
            let id = job.id.strip_suffix("-f").unwrap_or(&job.id);
            let Some(maker) = Maker::of(id) else {
                continue;
            };
            let alive = maker.process.is_alive();
            if alive.map_err(|source| BackupError::io("look at", Path::new("/proc"), source))? {
                continue;
            }
            let ended_well = job.state == JobState::Concluded && job.error.is_none();
            stage::clear(&mut self.qmp, &maker.names())?;
            let is_ours = maker.place == stage::tag(&self.vault.place());
            if !self.vault.has(&maker.id) && (is_ours || !ended_well) {
                self.forget(&maker.id)?;
            }
        }
        Ok(())
    }

    /// Removes the bitmap of a backup that is not to be, from whatever node has it.
    fn forget(&mut self, id: &str) -> Result<()> {
        let nodes = block_jobs::nodes(&mut self.qmp);
        for node in nodes.map_err(|error| vm("list the VM's disks", error))? {
            let own = node.bitmaps.iter().map(|bitmap| &bitmap.name);
            for name in own.filter(|name| name.ends_with(&format!("@{id}"))) {
                let change = [BitmapChange::Remove(name)];
                block_jobs::change_bitmaps(&mut self.qmp, &node.name, &change)
                    .map_err(|error| vm("remove the bitmap of a backup that died", error))?;
            }
        }
        Ok(())
    }
}

fn open(files: &[LayerFile]) -> Result<Arc<Chain>> {
    let chain = Chain::open(files);
    let chain = chain.map_err(|error| BackupError::engine("open QEMU's copy", error))?;
    Ok(Arc::new(chain))
}

/// What the topmost layer defines.
fn defined_by_top(disk: &Chain) -> Result<Bitmap> {
    let failed = |error| BackupError::engine("look at QEMU's copy", error);
    let mut defined = Bitmap::new(b"copied", PIECE_BITS, disk.len()).map_err(failed)?;
    for range in disk.allocated(1) {
        let range = range.map_err(failed)?;
        defined.set(GuestOffset(range.start), range.end - range.start);
    }
    Ok(defined)
}
