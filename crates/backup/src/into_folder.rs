//! A backup on its way into a folder: the image, the hashes of what it shows, and last the record.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_qcow2::{
    Backing, Bitmap, Chain, Compression, ConvertOptions, Error, ImageOptions, LayerFile,
    LayerFormat, NewFormat, Qcow2Options, Target, convert, write_image,
};
use stead_sys::durable::{self, Existing};
use stead_sys::space;

use crate::content::{CHUNK_BYTES, Hashes, chunk_range, chunks_of};
use crate::error::{BackupError, Kind, Result};
use crate::event::{Step, Watch};
use crate::folder::{Folder, hash_file};
use crate::prove::{self, End, Outcome};
use crate::record::{Facts, Record};
use crate::vault::{Ground, Told, Vault};

/// Permission bits of the files of a backup: a disk's content is its owner's alone.
const MODE: u32 = 0o600;
/// How many bytes are copied between two looks at the caller's wishes.
const STEP_BYTES: u64 = 16 << 20;

/// A folder, locked, and the backup that is being made in it.
#[derive(Debug)]
pub struct FolderVault {
    folder: Folder,
    compress: bool,
    id: String,
    hashes: Option<Hashes>,
}

/// An earlier backup in the folder.
#[derive(Debug)]
pub struct KnownImages {
    parent: Record,
    files: Vec<LayerFile>,
    hashes: Hashes,
}

impl FolderVault {
    /// Opens and locks a folder; it is made if it is not there. What interrupted backups left in it is removed.
    ///
    /// # Errors
    /// When another program backs up into it, or it cannot be read and written.
    pub fn open(path: &Path, compress: bool) -> Result<Self> {
        Ok(Self {
            folder: Folder::open_for_writing(path)?,
            compress,
            id: String::new(),
            hashes: None,
        })
    }

    fn known(&self, id: &str) -> Told<KnownImages> {
        let chain = self.folder.chain(id)?;
        let parent = chain[0].clone();
        let hashes = self.folder.hashes(&parent)?;
        let files = self.folder.images(&chain);
        Chain::open(&files).map_err(|error| error.to_string())?;
        Ok(KnownImages {
            parent,
            files,
            hashes,
        })
    }

    fn own_image(&self) -> PathBuf {
        self.folder.image_file(&self.id)
    }

    fn io(&self, attempt: &str, done: io::Result<()>) -> Result<()> {
        done.map_err(|source| BackupError::io(attempt, &self.folder.path, source))
    }

    fn publish(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let published = durable::publish(path, MODE, bytes, Existing::Keep);
        published.map_err(|source| BackupError::io("write", path, source))
    }

    fn sealed(&self, facts: Facts, hashes: &[u8]) -> Result<Record> {
        let image = self.own_image();
        let (image_bytes, image_blake3) =
            hash_file(&image).map_err(|source| BackupError::io("read back", &image, source))?;
        let content_blake3 = blake3::hash(hashes).to_hex().to_string();
        Ok(Record::of(facts, image_bytes, image_blake3, content_blake3))
    }

    fn write_changed(
        &self,
        disk: &Chain,
        known: &KnownImages,
        changed: &Bitmap,
        watch: Watch<'_>,
    ) -> Result<()> {
        self.require_room(disk, changed)?;
        let options = ImageOptions {
            mode: MODE,
            virtual_size: disk.len(),
            existing: Existing::Keep,
            qcow2: Qcow2Options {
                backing: Some(Backing {
                    name: format!("{}.qcow2", known.parent.id),
                    format: LayerFormat::Qcow2,
                }),
                ..Qcow2Options::default()
            },
        };
        let pieces = self.pieces(changed, watch);
        let written = write_image(&self.own_image(), options, disk, pieces);
        written.map_err(|error| BackupError::engine("copy what changed", error))?;
        Ok(())
    }

    /// What changed, in pieces, with the caller's wishes looked at between them.
    fn pieces<'a>(
        &'a self,
        changed: &'a Bitmap,
        watch: Watch<'a>,
    ) -> impl Iterator<Item = stead_qcow2::Result<Range<u64>>> + 'a {
        let cut = |range: Range<u64>| {
            let count = (range.end - range.start).div_ceil(STEP_BYTES);
            (0..count).map(move |index| {
                let start = range.start + index * STEP_BYTES;
                start..(start + STEP_BYTES).min(range.end)
            })
        };
        let (total, mut done) = (changed.dirty_bytes(), 0);
        changed.dirty_ranges().flat_map(cut).map(move |piece| {
            if watch.wants_to_stop() {
                return Err(Error::Cancelled {
                    path: self.own_image(),
                });
            }
            done += piece.end - piece.start;
            watch.progress(done, total);
            Ok(piece)
        })
    }

    /// Refuses what cannot fit: the file system has less room than the changed bytes that are not zeros.
    fn require_room(&self, disk: &Chain, changed: &Bitmap) -> Result<()> {
        let needed = data_bytes(disk, changed);
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
}

impl Vault for FolderVault {
    type Known = KnownImages;

    fn place(&self) -> String {
        self.folder.path.display().to_string()
    }

    fn has(&self, id: &str) -> bool {
        self.folder.has(id)
    }

    fn time(&self, id: &str) -> Option<String> {
        let record = self.folder.record(id).ok()?;
        Some(record.time.clone())
    }

    fn ground(&self, id: &str) -> Result<Told<Ground<KnownImages>>> {
        let known = self.known(id);
        Ok(known.map(|known| Ground {
            disk_bytes: known.parent.disk_bytes,
            known,
        }))
    }

    fn files(&self, known: &KnownImages) -> Vec<LayerFile> {
        known.files.clone()
    }

    fn is_sound(
        &mut self,
        known: &KnownImages,
        changed: &Bitmap,
        watch: Watch<'_>,
    ) -> Result<Told<()>> {
        let engine = |error| BackupError::engine("read the earlier backup", error);
        let chunks: BTreeSet<usize> = changed
            .dirty_ranges()
            .flat_map(|range| chunks_of(&range))
            .collect();
        let chunks: Vec<usize> = chunks.into_iter().collect();
        let earlier = Chain::open(&known.files).map_err(engine)?;
        let found = prove::find_damage(&earlier, &chunks, &known.hashes, watch);
        Ok(match found {
            Ok(End::All) => Ok(()),
            Ok(End::Stopped) => return Err(interrupted()),
            Ok(End::At(chunk)) => {
                let (id, at) = (&known.parent.id, chunk_range(chunk, earlier.len()));
                let (start, end) = (at.start, at.end);
                Err(format!(
                    "the backup {id} is damaged from {start:#x} to {end:#x}"
                ))
            }
            Err(error) => Err(error.to_string()),
        })
    }

    fn begin(&mut self, id: &str) -> Result<()> {
        id.clone_into(&mut self.id);
        self.io("write to", self.folder.begin(id))
    }

    fn copy_all(&mut self, disk: &Arc<Chain>, watch: Watch<'_>) -> Result<()> {
        watch.step(Step::Copy);
        let image = self.own_image();
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
            compressed: self.compress,
            ..ConvertOptions::default()
        };
        let total = disk.len();
        let progress = |fraction: f64| watch.progress_of(fraction, total);
        convert(disk, &target, &options, &watch.control(&progress))
            .map_err(|error| BackupError::engine("copy the disk", error))?;
        let whole = chunks_of(&(0..total)).collect();
        let zeros = Hashes::of_zeros(total);
        match prove(disk, &[qcow2_file(image)], &whole, zeros, watch)? {
            Ok(hashes) => self.hashes = Some(hashes),
            Err(at) => return Err(not_the_disk(&at)),
        }
        Ok(())
    }

    fn copy_changed(
        &mut self,
        disk: &Arc<Chain>,
        since: &Ground<KnownImages>,
        changed: &Bitmap,
        watch: Watch<'_>,
    ) -> Result<Told<()>> {
        watch.step(Step::Copy);
        let Ground { known, disk_bytes } = since;
        self.write_changed(disk, known, changed, watch)?;
        let own = std::iter::once(qcow2_file(self.own_image()));
        let files: Vec<_> = own.chain(known.files.iter().cloned()).collect();
        let mut chunks: BTreeSet<usize> = changed
            .dirty_ranges()
            .flat_map(|range| chunks_of(&range))
            .collect();
        let total = disk.len();
        if *disk_bytes != total {
            let cut = total.min(*disk_bytes);
            chunks.extend(chunks_of(&(cut..total.min(cut + CHUNK_BYTES))));
        }
        let hashes = known.hashes.clone().resized(total);
        Ok(match prove(disk, &files, &chunks, hashes, watch)? {
            Ok(hashes) => {
                self.hashes = Some(hashes);
                Ok(())
            }
            Err(at) => {
                self.io("clean", self.folder.discard(&self.id))?;
                let (id, start, end) = (&known.parent.id, at.start, at.end);
                Err(format!(
                    "over the backup {id} the disk would not be shown from {start:#x} to {end:#x}: that backup is damaged, or the bitmap does not name all that changed"
                ))
            }
        })
    }

    fn record(&mut self, facts: Facts, watch: Watch<'_>) -> Result<Facts> {
        let Some(hashes) = &self.hashes else {
            unreachable!("what is recorded was copied and proven");
        };
        watch.step(Step::Hashes);
        let hashes = hashes.encode();
        self.publish(&self.folder.hashes_file(&self.id), &hashes)?;
        let record = self.sealed(facts, &hashes)?;
        watch.go_on("make a backup")?;
        watch.step(Step::Record);
        let bytes = record.encode().map_err(|error| {
            BackupError::new(Kind::Internal, "write the record", error.to_string())
        })?;
        self.publish(&self.folder.record_file(&self.id), &bytes)?;
        Ok(record.facts())
    }

    fn give_up(&mut self) -> Told<()> {
        self.folder.end(&self.id, false).map_err(|stays| {
            let id = &self.id;
            format!("files of {id} stay in the folder ({stays}), and the next backup removes them")
        })
    }

    fn settle(&mut self) -> Told<()> {
        self.folder.end(&self.id, true).map_err(|stays| {
            let id = &self.id;
            format!("the mark {id}.begun stays in the folder ({stays}); the next backup removes it")
        })
    }

    fn image(&self) -> Option<PathBuf> {
        Some(self.own_image())
    }
}

fn not_the_disk(at: &Range<u64>) -> BackupError {
    let (start, end) = (at.start, at.end);
    let found = format!("the bytes from {start:#x} to {end:#x} are not those of the disk");
    BackupError::new(Kind::Damaged, "read the backup back", found)
        .left("the disk was not changed, and there is no new backup")
        .next("see to the storage below the folder and the disk")
}

/// Reads the backup back: the hashes of the content, or where it is not the disk.
fn prove(
    disk: &Chain,
    files: &[LayerFile],
    chunks: &BTreeSet<usize>,
    known: Hashes,
    watch: Watch<'_>,
) -> Result<std::result::Result<Hashes, Range<u64>>> {
    watch.step(Step::Prove);
    let engine = |error| BackupError::engine("read the backup back", error);
    let backup = Chain::open(files).map_err(engine)?;
    assert!(
        backup.len() == disk.len(),
        "a backup is as long as its disk"
    );
    match prove::compare(disk, &backup, chunks, known, watch).map_err(engine)? {
        Outcome::Alike(hashes) => Ok(Ok(hashes)),
        Outcome::Differs(at) => Ok(Err(at)),
        Outcome::Stopped => Err(interrupted()),
    }
}

fn interrupted() -> BackupError {
    BackupError::new(Kind::Cancelled, "make a backup", "interrupted")
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

fn qcow2_file(path: PathBuf) -> LayerFile {
    LayerFile {
        path,
        format: LayerFormat::Qcow2,
    }
}
