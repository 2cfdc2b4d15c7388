//! Making the disk of a backup again: it gets its name only when every byte of it has the recorded hash.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use stead_qcow2::{
    Chain, ConvertOptions, LayerFile, LayerFormat, NewFormat, Preallocation, Qcow2Options, Target,
    convert,
};
use stead_sys::durable::{self, Existing, Partial, TEMP_PREFIX};

use crate::content::{Hashes, chunk_range};
use crate::error::{BackupError, Kind, Result};
use crate::event::{Step, Watch};
use crate::folder::{Folder, hash_file};
use crate::prove::{End, find_damage};
use crate::record::{Facts, Record};

const MODE: u32 = 0o600;

/// The format of a restored disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RestoreFormat {
    /// A qcow2 image of its own.
    #[default]
    Qcow2,
    /// The bytes of the disk; zeros are holes.
    Raw,
}

/// A disk to be restored.
#[derive(Debug, Clone)]
pub struct RestoreRequest {
    /// The folder of backups, or the store.
    pub from: PathBuf,
    /// The backup: the beginning of its id, or `latest`.
    pub backup: String,
    /// Where the disk is to be.
    pub to: PathBuf,
    /// Its format.
    pub format: RestoreFormat,
    /// Whether an earlier file is replaced.
    pub replace: bool,
}

/// A disk that was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RestoreReport {
    /// The backup that it shows.
    pub record: Facts,
    /// Where it is.
    pub disk: PathBuf,
    /// The backups that it was made of, the newest first.
    pub made_of: Vec<String>,
}

/// Restores a disk.
///
/// # Durability
/// When this returns `Ok`, the disk has been read back whole, every MiB of it has the recorded hash, and it has been synced
/// with its name.
///
/// # Errors
/// When the backup or one that it stands on is missing or damaged (the error names the file), there is no room, or
/// the target is there and may not be replaced. There is no new file then, and an earlier one is as it was.
pub fn restore(request: &RestoreRequest, watch: Watch<'_>) -> Result<RestoreReport> {
    watch.step(Step::Plan);
    require_free(request)?;
    let folder = Folder::open(&request.from)?;
    let id = folder.find(&request.backup)?;
    let damaged = |why: String| {
        let next = format!(
            "`stead backup verify {}` says which backups are whole",
            request.from.display()
        );
        BackupError::new(Kind::Damaged, format!("restore {id}"), why).next(next)
    };
    let chain = folder.chain(&id).map_err(damaged)?;
    let hashes = folder.hashes(chain[0]).map_err(damaged)?;
    let temp = temp_path(&request.to)?;
    let made = make(request, &folder.images(&chain), (&temp, &hashes), watch);
    let damage = made.map_err(|error| match error.kind() {
        Kind::Damaged => error.next(format!(
            "`stead backup verify {}` says which backups are whole",
            request.from.display()
        )),
        Kind::Internal
        | Kind::Usage
        | Kind::NotFound
        | Kind::Conflict
        | Kind::Incompatible
        | Kind::NoSpace
        | Kind::Vm
        | Kind::Store
        | Kind::Cancelled => error,
    })?;
    if let Some(found) = damage {
        remove(&temp)?;
        return Err(damaged(format!("{found}{}", named(&folder, &chain))));
    }
    watch.step(Step::Publish);
    publish(request, &temp)?;
    Ok(RestoreReport {
        record: chain[0].facts(),
        disk: request.to.clone(),
        made_of: chain.iter().map(|record| record.id.clone()).collect(),
    })
}

fn existing(request: &RestoreRequest) -> Existing {
    match request.replace {
        true => Existing::Replace,
        false => Existing::Keep,
    }
}

fn require_free(request: &RestoreRequest) -> Result<()> {
    if request.replace || std::fs::symlink_metadata(&request.to).is_err() {
        return Ok(());
    }
    let found = format!("{} is there already", request.to.display());
    Err(BackupError::new(Kind::Conflict, "restore", found)
        .next("name another file, or give --force to replace it"))
}

/// The hidden name of a disk that is not proven yet, beside the one that it will have.
fn temp_path(to: &Path) -> Result<PathBuf> {
    let Some(name) = to.file_name() else {
        let found = format!("{} names no file", to.display());
        return Err(BackupError::new(Kind::Usage, "restore", found));
    };
    let name = format!(
        "{TEMP_PREFIX}restore-{}-{}",
        std::process::id(),
        name.display()
    );
    Ok(to.with_file_name(name))
}

/// Makes the disk under its hidden name; what is wrong with it, if something is.
fn make(
    request: &RestoreRequest,
    images: &[LayerFile],
    (temp, hashes): (&Path, &Hashes),
    watch: Watch<'_>,
) -> Result<Option<String>> {
    watch.step(Step::Copy);
    copy(request, images, temp, watch)?;
    let format = match request.format {
        RestoreFormat::Qcow2 => LayerFormat::Qcow2,
        RestoreFormat::Raw => LayerFormat::Raw,
    };
    watch.step(Step::Prove);
    let outcome = damage(
        &LayerFile {
            path: temp.to_owned(),
            format,
        },
        hashes,
        watch,
    );
    if outcome.is_err() {
        remove(temp)?;
    }
    outcome
}

/// Copies what images show to a hidden name.
fn copy(
    request: &RestoreRequest,
    images: &[LayerFile],
    temp: &Path,
    watch: Watch<'_>,
) -> Result<()> {
    let engine = |error| BackupError::engine("restore the disk", error);
    let backup = Chain::open(images).map_err(engine)?;
    let format = match request.format {
        RestoreFormat::Qcow2 => NewFormat::Qcow2(Qcow2Options::default()),
        RestoreFormat::Raw => NewFormat::Raw {
            preallocation: Preallocation::Off,
        },
    };
    let target = Target::New {
        path: temp.to_owned(),
        mode: MODE,
        existing: Existing::Replace,
    };
    let options = ConvertOptions {
        format,
        ..ConvertOptions::default()
    };
    let total = backup.len();
    let progress = |fraction: f64| watch.progress_of(fraction, total);
    convert(&backup, &target, &options, &watch.control(&progress)).map_err(engine)?;
    Ok(())
}

fn damage(disk: &LayerFile, hashes: &Hashes, watch: Watch<'_>) -> Result<Option<String>> {
    let engine = |error| BackupError::engine("read the restored disk back", error);
    let disk = Chain::open(std::slice::from_ref(disk)).map_err(engine)?;
    let all: Vec<usize> = (0..hashes.len()).collect();
    if disk.len().div_ceil(crate::content::CHUNK_BYTES) != all.len() as u64 {
        return Ok(Some(format!(
            "the image is of a disk of {} bytes",
            disk.len()
        )));
    }
    match find_damage(&disk, &all, hashes, watch).map_err(engine)? {
        End::All => Ok(None),
        End::At(chunk) => {
            let at = chunk_range(chunk, disk.len());
            Ok(Some(format!(
                "the bytes from {:#x} to {:#x} are not those that were backed up",
                at.start, at.end
            )))
        }
        End::Stopped => {
            watch.go_on("restore")?;
            Ok(None)
        }
    }
}

/// Which files of the chain are not what their records say, as an addition to a sentence.
fn named(folder: &Folder, chain: &[&Record]) -> String {
    let wrong = chain.iter().filter(|record| {
        let found = hash_file(&folder.image_file(&record.id));
        !found.is_ok_and(|(_, hash)| hash == record.image_blake3)
    });
    let wrong: Vec<String> = wrong
        .map(|record| folder.image_file(&record.id).display().to_string())
        .collect();
    match wrong.is_empty() {
        true => String::new(),
        false => format!("; damaged: {}", wrong.join(", ")),
    }
}

fn remove(temp: &Path) -> Result<()> {
    durable::remove_file(temp).map_err(|source| BackupError::io("remove", temp, source))
}

fn publish(request: &RestoreRequest, temp: &Path) -> Result<()> {
    durable::move_to(temp, &request.to, existing(request)).or_else(|source| {
        remove(temp)?;
        Err(BackupError::io("publish", &request.to, source))
    })
}

/// Restores a disk that is kept some other way than as images: `fill` writes its bytes into an empty file, and `damage`
/// says of what was made of them what is wrong with it, if something is.
///
/// # Durability
/// As [`restore()`].
///
/// # Errors
/// As [`restore()`], and those of `fill` and `damage`. An image needs the room of the bytes beside its own meanwhile.
pub fn restore_with(
    request: &RestoreRequest,
    record: Facts,
    fill: impl FnOnce(&File) -> Result<()>,
    damage: impl FnOnce(Arc<Chain>) -> Result<Option<String>>,
    watch: Watch<'_>,
) -> Result<RestoreReport> {
    require_free(request)?;
    let io = |source| BackupError::io("write", &request.to, source);
    watch.step(Step::Copy);
    let raw = Partial::create(&request.to, MODE).map_err(io)?;
    fill(raw.file())?;
    let bytes = LayerFile {
        path: raw.temp_path().to_owned(),
        format: LayerFormat::Raw,
    };
    match request.format {
        RestoreFormat::Raw => {
            proven(&bytes, &record, damage, watch)?;
            watch.step(Step::Publish);
            raw.publish(existing(request)).map_err(io)?;
        }
        RestoreFormat::Qcow2 => {
            let temp = temp_path(&request.to)?;
            copy(request, &[bytes], &temp, watch)?;
            drop(raw);
            let image = LayerFile {
                path: temp.clone(),
                format: LayerFormat::Qcow2,
            };
            proven(&image, &record, damage, watch)
                .or_else(|error| remove(&temp).and(Err(error)))?;
            watch.step(Step::Publish);
            publish(request, &temp)?;
        }
    }
    Ok(RestoreReport {
        made_of: vec![record.id.clone()],
        record,
        disk: request.to.clone(),
    })
}

fn proven(
    disk: &LayerFile,
    record: &Facts,
    damage: impl FnOnce(Arc<Chain>) -> Result<Option<String>>,
    watch: Watch<'_>,
) -> Result<()> {
    watch.step(Step::Prove);
    let chain = Chain::open(std::slice::from_ref(disk));
    let chain = chain.map_err(|error| BackupError::engine("read the restored disk back", error))?;
    match damage(Arc::new(chain))? {
        None => Ok(()),
        Some(why) => {
            let attempt = format!("restore {}", record.id);
            Err(BackupError::new(Kind::Damaged, attempt, why))
        }
    }
}
