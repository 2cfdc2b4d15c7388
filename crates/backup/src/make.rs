//! Making a backup: what is wanted, what can be done, and the steps to it.
//!
//! ```text
//!  lock disk and folder ─▶ plan ─▶ copy ─▶ read back ─▶ hashes ─▶ record ─▶ next bitmap begins, old ones go
//!                                                                 │
//!           an error or a crash: no backup, the bitmap says what it said   │ a crash: the backup is there, and the old bitmap,
//!                                                                 │ which names more than needed, goes on
//! ```

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Serialize;
use stead_qcow2::{
    Backing, Bitmap, Chain, Compression, ConvertOptions, Error, ImageOptions, LayerFormat,
    NewFormat, Qcow2Options, Target, convert, write_image,
};
use stead_sys::durable::{self, Existing};
use stead_sys::{readable, space};

use crate::changes::changed_since;
use crate::content::{CHUNK_BYTES, Hashes, chunks_of};
use crate::disk::{Disk, DiskSource};
use crate::error::{BackupError, Kind, Result};
use crate::event::{Step, Watch};
use crate::folder::Folder;
use crate::prove::{self, Outcome};
use crate::record::{BackupKind, Record, bitmap_name, id_in, is_id};

/// Permission bits of the files of a backup: a disk's content is its owner's alone.
const MODE: u32 = 0o600;
/// How many bytes are copied between two looks at the caller's wishes.
const STEP_BYTES: u64 = 16 << 20;
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

/// A backup to be made.
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
    /// Its record.
    pub record: Record,
    /// Its image.
    pub image: PathBuf,
    /// The files that the disk was read from, the topmost first.
    pub read: Vec<PathBuf>,
    /// The bitmap that records what changes from now on.
    pub next_bitmap: String,
    /// Bitmaps that were not needed any more and were removed.
    pub removed_bitmaps: Vec<String>,
    /// Bitmaps of that name whose backups are not in the folder; they are left alone.
    pub foreign_bitmaps: Vec<String>,
}

/// The bitmap that is to record from the instant of the backup `id` on, for [`DiskSource::Frozen`].
#[must_use]
pub fn next_bitmap(name: &str, id: &str) -> Vec<u8> {
    bitmap_name(name, id)
}

/// Makes a backup of a disk that nobody writes to.
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
    require_name(&request.bitmap)?;
    require_folder(&request.to)?;
    watch.step(Step::Plan);
    let disk = Disk::open(&request.disk)?;
    let folder = Folder::open_for_writing(&request.to)?;
    let job = Job {
        request,
        watch,
        folder,
        id: match &request.disk {
            DiskSource::Frozen { id, .. } => required_id(id)?,
            DiskSource::Image(_) | DiskSource::Layers { .. } => new_id()?,
        },
    };
    job.run(disk)
}

fn require_name(name: &str) -> Result<()> {
    if !name.is_empty() && name.len() <= MAX_NAME_BYTES {
        return Ok(());
    }
    let found = format!(
        "a name has 1 to {MAX_NAME_BYTES} bytes, and this one {}",
        name.len()
    );
    Err(BackupError::new(Kind::Usage, "name the bitmap", found))
}

/// A store is named by a URL, and has backups of another kind.
fn require_folder(to: &Path) -> Result<()> {
    if !to.to_string_lossy().contains("://") {
        return Ok(());
    }
    let found = format!("{} is a store, and backups go into a folder", to.display());
    Err(BackupError::new(Kind::Usage, "make a backup", found)
        .next("`stead checkpoint create --disk-only` puts a sandbox's disks into the store, and only what it does not have yet"))
}

fn required_id(id: &str) -> Result<String> {
    if is_id(id) {
        return Ok(id.to_owned());
    }
    let found = format!("{id:?} is not an id of 32 hex digits");
    Err(BackupError::new(Kind::Internal, "make a backup", found))
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

/// What an incremental backup stands on.
struct Ground {
    parent: Record,
    files: Vec<stead_qcow2::LayerFile>,
    hashes: Hashes,
    changed: Bitmap,
}

/// What was copied and proven.
struct Copied {
    kind: BackupKind,
    parent: Option<String>,
    changed_bytes: u64,
    hashes: Hashes,
    why_full: Option<String>,
}

struct Job<'a> {
    request: &'a BackupRequest,
    watch: Watch<'a>,
    folder: Folder,
    id: String,
}

impl Job<'_> {
    fn run(self, mut disk: Disk) -> Result<BackupReport> {
        let next = bitmap_name(&self.request.bitmap, &self.id);
        let (old, foreign) = self.bitmaps(&disk)?;
        let ground = self.ground(&disk)?;
        disk.plan_switch(&next, &old)?;
        let record = match self.make(&disk, ground) {
            Ok(record) => record,
            Err(error) => return Err(self.undone(error)),
        };
        if let Err(stays) = self.folder.end(&self.id, true) {
            let id = &self.id;
            self.watch.notice(format!(
                "the mark {id}.begun stays in the folder ({stays}); the next backup removes it"
            ));
        }
        self.watch.step(Step::Bitmap);
        disk.switch(&next, &old).map_err(|error| {
            error
                .left(format!("the backup {} is whole and can be used; the disk's bitmaps are as they were, so the next incremental backup stands on an earlier one, or is a full one", self.id))
                .next("see to the disk, and make the next backup")
        })?;
        Ok(BackupReport {
            image: self.folder.image_file(&self.id),
            read: disk.files(),
            record,
            next_bitmap: text(&next),
            removed_bitmaps: old.iter().map(|name| text(name)).collect(),
            foreign_bitmaps: foreign,
        })
    }

    /// Takes away what a failed backup left in the folder.
    fn undone(&self, error: BackupError) -> BackupError {
        match self.folder.end(&self.id, false) {
            Ok(()) => error,
            Err(stays) => error.left(format!("the disk was not changed; files of {} stay in the folder ({stays}), and the next backup removes them", self.id)),
        }
    }

    /// The disk's bitmaps that this backup makes needless, and those that belong elsewhere.
    fn bitmaps(&self, disk: &Disk) -> Result<(Vec<Vec<u8>>, Vec<String>)> {
        let ours = disk.bitmaps()?.into_iter().filter_map(|bitmap| {
            let known = self.folder.has(id_in(&bitmap, &self.request.bitmap)?);
            Some((bitmap, known))
        });
        let (old, foreign): (Vec<_>, Vec<_>) = ours.partition(|(_, known)| *known);
        let name = |(name, _): (Vec<u8>, bool)| name;
        let foreign = foreign.into_iter().map(|one| text(&name(one)));
        Ok((old.into_iter().map(name).collect(), foreign.collect()))
    }

    /// What an incremental backup can stand on, where one is wanted and possible; else why not.
    fn ground(&self, disk: &Disk) -> Result<std::result::Result<Box<Ground>, Option<String>>> {
        if self.request.wanted == Wanted::Full {
            return Ok(Err(None));
        }
        match self.find_ground(disk)? {
            Ok(ground) => Ok(Ok(Box::new(ground))),
            Err(why) => self.refused(why).map(Some).map(Err),
        }
    }

    /// The reason, where a full backup may be made for it.
    fn refused(&self, why: String) -> Result<String> {
        if self.request.wanted == Wanted::IncrementalOnly {
            return Err(
                BackupError::new(Kind::Conflict, "make an incremental backup", why)
                    .next("make a full one (`stead backup full`)"),
            );
        }
        self.watch.notice(format!("a full backup is made: {why}"));
        Ok(why)
    }

    fn find_ground(&self, disk: &Disk) -> Result<std::result::Result<Ground, String>> {
        let mut why = Vec::new();
        for id in self.candidates(disk)? {
            match self.ground_of(disk, &id)? {
                Ok(ground) => {
                    if !why.is_empty() {
                        let why = why.join("; ");
                        self.watch
                            .notice(format!("it stands on the earlier backup {id}: {why}"));
                    }
                    return Ok(Ok(ground));
                }
                Err(reason) => why.push(reason),
            }
        }
        Ok(Err(match why.is_empty() {
            true => self.why_none(disk)?,
            false => why.join("; "),
        }))
    }

    /// The backups in the folder since which a bitmap of the disk says it records; the newest first.
    fn candidates(&self, disk: &Disk) -> Result<Vec<String>> {
        let mut ids = BTreeSet::new();
        for layer in (0..disk.chain.depth()).filter_map(|index| disk.chain.layer(index)) {
            let stored = layer.stored_bitmaps();
            let stored = stored.map_err(|error| BackupError::engine("read the bitmaps", error))?;
            let own = stored
                .iter()
                .filter_map(|one| id_in(&one.name, &self.request.bitmap));
            ids.extend(own.filter(|id| self.folder.has(id)).map(str::to_owned));
        }
        let mut ids: Vec<String> = ids.into_iter().collect();
        let time = |id: &String| {
            self.folder
                .record(id)
                .ok()
                .map(|record| record.time.clone())
        };
        ids.sort_by_key(|id| std::cmp::Reverse(time(id)));
        Ok(ids)
    }

    fn why_none(&self, disk: &Disk) -> Result<String> {
        let name = &self.request.bitmap;
        if disk.bitmaps_are_void() {
            return Ok("the image was changed by a program that does not know bitmaps, so all it had are void".into());
        }
        let (_, foreign) = self.bitmaps(disk)?;
        let folder = self.folder.path.display();
        Ok(match foreign.is_empty() {
            true => format!("the disk has no bitmap {name}@… of a backup in {folder}"),
            false => format!(
                "the disk has {}, which belong to backups that are not in {folder}",
                foreign.join(", ")
            ),
        })
    }

    fn ground_of(&self, disk: &Disk, id: &str) -> Result<std::result::Result<Ground, String>> {
        let chain = match self.folder.chain(id) {
            Ok(chain) => chain,
            Err(why) => return Ok(Err(format!("the backup {id} cannot be built upon: {why}"))),
        };
        let parent = chain[0].clone();
        let hashes = match self.folder.hashes(&parent) {
            Ok(hashes) => hashes,
            Err(why) => return Ok(Err(format!("the backup {id} cannot be built upon: {why}"))),
        };
        let files = self.folder.images(&chain);
        if let Err(error) = Chain::open(&files) {
            return Ok(Err(format!(
                "the backup {id} cannot be built upon: {error}"
            )));
        }
        let name = bitmap_name(&self.request.bitmap, id);
        let told = changed_since(&disk.chain, &name, parent.disk_bytes);
        let told = told.map_err(|error| BackupError::engine("read the bitmaps", error))?;
        Ok(told
            .map(|changed| Ground {
                parent,
                files,
                hashes,
                changed,
            })
            .map_err(|why| format!("the bitmap {} cannot be used: {why}", text(&name))))
    }

    /// Copies, proves and records.
    fn make(
        &self,
        disk: &Disk,
        ground: std::result::Result<Box<Ground>, Option<String>>,
    ) -> Result<Record> {
        let time = format!("{:.9}", jiff::Timestamp::now());
        self.io("write to", self.folder.begin(&self.id))?;
        let copied = match ground {
            Err(why_full) => self.full(disk, why_full)?,
            Ok(ground) => match self.incremental(disk, &ground)? {
                Ok(copied) => copied,
                Err(why) => {
                    let why = self.refused(why)?;
                    self.io("clean", self.folder.discard(&self.id))?;
                    self.full(disk, Some(why))?
                }
            },
        };
        self.watch.step(Step::Hashes);
        let hashes = copied.hashes.encode();
        self.publish(&self.folder.hashes_file(&self.id), &hashes)?;
        let record = self.record(disk, &copied, &hashes, time)?;
        self.watch.go_on("make a backup")?;
        self.watch.step(Step::Record);
        let bytes = record.encode().map_err(|error| {
            BackupError::new(Kind::Internal, "write the record", error.to_string())
        })?;
        self.publish(&self.folder.record_file(&self.id), &bytes)?;
        Ok(record)
    }

    fn io(&self, attempt: &str, done: io::Result<()>) -> Result<()> {
        done.map_err(|source| BackupError::io(attempt, &self.folder.path, source))
    }

    fn publish(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let published = durable::publish(path, MODE, bytes, Existing::Keep);
        published.map_err(|source| BackupError::io("write", path, source))
    }

    fn record(&self, disk: &Disk, copied: &Copied, hashes: &[u8], time: String) -> Result<Record> {
        let image = self.folder.image_file(&self.id);
        let (image_bytes, image_blake3) =
            hash_file(&image).map_err(|source| BackupError::io("read back", &image, source))?;
        Ok(Record {
            version: Record::version(),
            id: self.id.clone(),
            kind: copied.kind,
            parent: copied.parent.clone(),
            disk: disk.name.clone(),
            bitmap: self.request.bitmap.clone(),
            time,
            disk_bytes: disk.chain.len(),
            changed_bytes: copied.changed_bytes,
            image_bytes,
            image_blake3,
            content_blake3: blake3::hash(hashes).to_hex().to_string(),
            why_full: copied.why_full.clone(),
        })
    }

    fn full(&self, disk: &Disk, why_full: Option<String>) -> Result<Copied> {
        self.watch.step(Step::Copy);
        let image = self.folder.image_file(&self.id);
        let target = Target::New {
            path: image.clone(),
            mode: MODE,
            existing: Existing::Keep,
        };
        let options = ConvertOptions {
            format: NewFormat::Qcow2(Qcow2Options {
                compression: Compression::Zstd,
                ..Qcow2Options::default()
            }),
            compressed: self.request.compress,
            ..ConvertOptions::default()
        };
        let total = disk.chain.len();
        let progress = |fraction: f64| self.watch.progress_of(fraction, total);
        let made = convert(
            &disk.chain,
            &target,
            &options,
            &self.watch.control(&progress),
        );
        made.map_err(|error| BackupError::engine("copy the disk", error))?;
        let whole = chunks_of(&(0..total)).collect();
        let files = [qcow2_file(image)];
        match self.prove(disk, &files, &whole, Hashes::of_zeros(total))? {
            Ok(hashes) => Ok(Copied {
                kind: BackupKind::Full,
                parent: None,
                changed_bytes: total,
                hashes,
                why_full,
            }),
            Err(at) => Err(BackupError::new(
                Kind::Damaged,
                "read the backup back",
                format!(
                    "the bytes from {:#x} to {:#x} are not those of the disk",
                    at.start, at.end
                ),
            )
            .left("the disk was not changed, and there is no new backup")
            .next("see to the storage below the folder and the disk")),
        }
    }

    /// The incremental backup; or why it would not show the disk.
    fn incremental(
        &self,
        disk: &Disk,
        ground: &Ground,
    ) -> Result<std::result::Result<Copied, String>> {
        self.watch.step(Step::Copy);
        let (total, image) = (disk.chain.len(), self.folder.image_file(&self.id));
        let changed_bytes = ground.changed.dirty_bytes();
        self.require_room(disk, &ground.changed)?;
        let options = ImageOptions {
            mode: MODE,
            virtual_size: total,
            existing: Existing::Keep,
            qcow2: Qcow2Options {
                backing: Some(Backing {
                    name: format!("{}.qcow2", ground.parent.id),
                    format: LayerFormat::Qcow2,
                }),
                ..Qcow2Options::default()
            },
        };
        let written = write_image(
            &image,
            options,
            &disk.chain,
            self.pieces(&ground.changed, changed_bytes),
        );
        written.map_err(|error| BackupError::engine("copy what changed", error))?;
        let files: Vec<_> = std::iter::once(qcow2_file(image))
            .chain(ground.files.iter().cloned())
            .collect();
        let mut chunks: BTreeSet<usize> = ground
            .changed
            .dirty_ranges()
            .flat_map(|range| chunks_of(&range))
            .collect();
        if ground.parent.disk_bytes != total {
            let cut = ground.parent.disk_bytes.min(total);
            chunks.extend(chunks_of(&(cut..total.min(cut + CHUNK_BYTES))));
        }
        let known = ground.hashes.clone().resized(total);
        let proven = self.prove(disk, &files, &chunks, known)?;
        Ok(match proven {
            Ok(hashes) => Ok(Copied {
                kind: BackupKind::Incremental,
                parent: Some(ground.parent.id.clone()),
                changed_bytes,
                hashes,
                why_full: None,
            }),
            Err(at) => Err(format!(
                "over the backup {} the disk would not be shown from {:#x} to {:#x}: that backup is damaged, or the bitmap does not name all that changed",
                ground.parent.id, at.start, at.end
            )),
        })
    }

    /// What changed, in pieces, with the caller's wishes looked at between them.
    fn pieces<'a>(
        &'a self,
        changed: &'a Bitmap,
        total: u64,
    ) -> impl Iterator<Item = stead_qcow2::Result<Range<u64>>> + 'a {
        let cut = |range: Range<u64>| {
            let count = (range.end - range.start).div_ceil(STEP_BYTES);
            (0..count).map(move |index| {
                let start = range.start + index * STEP_BYTES;
                start..(start + STEP_BYTES).min(range.end)
            })
        };
        let mut done = 0;
        changed.dirty_ranges().flat_map(cut).map(move |piece| {
            if self.watch.wants_to_stop() {
                return Err(Error::Cancelled {
                    path: self.folder.image_file(&self.id),
                });
            }
            done += piece.end - piece.start;
            self.watch.progress(done, total);
            Ok(piece)
        })
    }

    /// Refuses what cannot fit: the file system has less room than the changed bytes that are not zeros.
    fn require_room(&self, disk: &Disk, changed: &Bitmap) -> Result<()> {
        let needed = data_bytes(&disk.chain, changed);
        let needed = needed.map_err(|error| BackupError::engine("read the disk", error))?;
        let available = space::available_bytes(&self.folder.path);
        let available = available
            .map_err(|source| BackupError::io("ask for room in", &self.folder.path, source))?;
        if needed <= available {
            return Ok(());
        }
        let found = format!(
            "at least {needed} bytes are needed in {}, and there are {available}",
            self.folder.path.display()
        );
        Err(BackupError::new(
            Kind::NoSpace,
            "make an incremental backup",
            found,
        ))
    }

    /// Reads the backup back: the hashes of the content, or where it is not the disk.
    fn prove(
        &self,
        disk: &Disk,
        files: &[stead_qcow2::LayerFile],
        chunks: &BTreeSet<usize>,
        known: Hashes,
    ) -> Result<std::result::Result<Hashes, Range<u64>>> {
        self.watch.step(Step::Prove);
        let engine = |error| BackupError::engine("read the backup back", error);
        let backup = Chain::open(files).map_err(engine)?;
        assert!(
            backup.len() == disk.chain.len(),
            "a backup is as long as its disk"
        );
        match prove::compare(&disk.chain, &backup, chunks, known, self.watch).map_err(engine)? {
            Outcome::Alike(hashes) => Ok(Ok(hashes)),
            Outcome::Differs(at) => Ok(Err(at)),
            Outcome::Stopped => Err(BackupError::new(
                Kind::Cancelled,
                "make a backup",
                "interrupted",
            )),
        }
    }
}

/// How many of the changed bytes may be other than zeros.
fn data_bytes(disk: &Chain, changed: &Bitmap) -> stead_qcow2::Result<u64> {
    let mut bytes = 0;
    for range in changed.dirty_ranges() {
        let mut at = range.start;
        while at < range.end {
            let Some(data) = disk.next_data(at)? else {
                return Ok(bytes);
            };
            bytes += data.end.min(range.end).saturating_sub(data.start);
            at = data.end;
        }
    }
    Ok(bytes)
}

fn qcow2_file(path: PathBuf) -> stead_qcow2::LayerFile {
    stead_qcow2::LayerFile {
        path,
        format: LayerFormat::Qcow2,
    }
}

pub(crate) fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// The length and BLAKE3 hash of a file.
pub(crate) fn hash_file(path: &Path) -> io::Result<(u64, String)> {
    let file: File = readable::open(path)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok((hasher.count(), hasher.finalize().to_hex().to_string()))
}
