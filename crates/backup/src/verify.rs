//! Reading backups whole: every file against its record, and what each shows against its hashes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;
use stead_qcow2::{Chain, check};

use crate::content::{chunk_range, chunks_of};
use crate::error::{BackupError, Kind, Result};
use crate::event::{Step, Watch};
use crate::folder::{Folder, hash_file};
use crate::prove::{End, find_damage};
use crate::record::{BackupKind, Record};

/// What reading a backup found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verdict {
    /// The backup's id.
    pub id: String,
    /// Whether its disk can be restored, as it was.
    pub whole: bool,
    /// What is wrong, file by file.
    pub damage: Vec<String>,
}

/// Reads a backup and those that it stands on, or all in the folder.
///
/// Every byte of every file is read. An incremental backup is read through its parents where it differs from them; the
/// rest is as whole as its parent is.
///
/// # Errors
/// When there is no such backup, the folder cannot be read or the caller cancels. Damage is no error: it is in the verdicts.
pub fn verify(folder: &Path, backup: Option<&str>, watch: Watch<'_>) -> Result<Vec<Verdict>> {
    watch.step(Step::Plan);
    let folder = Folder::open(folder)?;
    let ids = match backup {
        Some(wanted) => below(&folder, &folder.find(wanted)?),
        None => folder.records().map(|(id, _)| id.clone()).collect(),
    };
    watch.step(Step::Prove);
    let mut own = BTreeMap::new();
    for id in &ids {
        watch.go_on("verify")?;
        own.insert(id.clone(), damage_of(&folder, id, watch)?);
    }
    Ok(ids.iter().map(|id| verdict(&folder, id, &own)).collect())
}

/// A backup and all that it stands on, as far as there are records.
fn below(folder: &Folder, id: &str) -> Vec<String> {
    let mut ids = Vec::new();
    let mut next = Some(id.to_owned());
    while let Some(id) = next.filter(|id| !ids.contains(id)) {
        next = folder
            .record(&id)
            .ok()
            .and_then(|record| record.parent.clone());
        ids.push(id);
    }
    ids
}

/// What is wrong with a backup, by its own files and those that it stands on.
fn verdict(folder: &Folder, id: &str, own: &BTreeMap<String, Vec<String>>) -> Verdict {
    let mut damage = own.get(id).cloned().unwrap_or_default();
    for parent in below(folder, id).iter().skip(1) {
        if own.get(parent).is_none_or(|damage| !damage.is_empty()) {
            damage.push(format!(
                "{parent}, which it stands on, is damaged or missing"
            ));
        }
    }
    Verdict {
        id: id.to_owned(),
        whole: damage.is_empty(),
        damage,
    }
}

fn damage_of(folder: &Folder, id: &str, watch: Watch<'_>) -> Result<Vec<String>> {
    let record = match folder.record(id) {
        Ok(record) => record,
        Err(why) => return Ok(vec![why]),
    };
    let mut damage = Vec::new();
    let image = folder.image_file(id);
    match hash_file(&image) {
        Ok((_, hash)) if hash == record.image_blake3 => {}
        Ok((bytes, _)) if bytes != record.image_bytes => {
            damage.push(format!(
                "{} has {bytes} bytes, and its record says {}",
                image.display(),
                record.image_bytes
            ));
        }
        Ok(_) => damage.push(format!("{} is not what was written", image.display())),
        Err(error) => damage.push(format!("{}: {error}", image.display())),
    }
    if let Some(why) = content_damage(folder, record, watch)? {
        damage.push(why);
    }
    Ok(damage)
}

/// What is wrong with what a backup shows where its own image defines it.
fn content_damage(folder: &Folder, record: &Record, watch: Watch<'_>) -> Result<Option<String>> {
    let hashes = match folder.hashes(record) {
        Ok(hashes) => hashes,
        Err(why) => return Ok(Some(why)),
    };
    let Ok(chain) = folder.chain(&record.id) else {
        // Said of the file that is missing or cut.
        return Ok(None);
    };
    let read = || {
        let disk = Chain::open(&folder.images(&chain))?;
        if disk.len() != record.disk_bytes {
            return Ok(Err(format!(
                "its image is of a disk of {} bytes",
                disk.len()
            )));
        }
        if let Some(layer) = disk.layer(0)
            && let corruptions @ 1.. = check(layer)?.corruptions
        {
            return Ok(Err(format!(
                "a check of its image has {corruptions} findings"
            )));
        }
        let chunks = own_chunks(&disk, record.kind)?;
        Ok(Ok((
            find_damage(&disk, &chunks, &hashes, watch)?,
            disk.len(),
        )))
    };
    let outcome: stead_qcow2::Result<_> = read();
    Ok(match outcome {
        Ok(Ok((End::All, _))) => None,
        Ok(Ok((End::At(chunk), length))) => {
            let at = chunk_range(chunk, length);
            Some(format!(
                "what it shows from {:#x} to {:#x} is not what was backed up",
                at.start, at.end
            ))
        }
        Ok(Ok((End::Stopped, _))) => {
            return Err(BackupError::new(Kind::Cancelled, "verify", "interrupted"));
        }
        Ok(Err(why)) => Some(why),
        Err(error) => Some(error.to_string()),
    })
}

/// The chunks that a full backup shows, or that an incremental one's own image defines a part of.
fn own_chunks(disk: &Chain, kind: BackupKind) -> stead_qcow2::Result<Vec<usize>> {
    if kind == BackupKind::Full {
        return Ok(chunks_of(&(0..disk.len())).collect());
    }
    let mut chunks = BTreeSet::new();
    for range in disk.allocated(1) {
        chunks.extend(chunks_of(&range?));
    }
    Ok(chunks.into_iter().collect())
}
