//! A folder of backups: which there are, what they stand on, and what an interrupted one left behind.
//!
//! One backup at a time writes into a folder; readers need no lock, since a backup is there when its record is, and
//! whole then.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;
use stead_qcow2::{LayerFile, LayerFormat};
use stead_sys::durable;
use stead_sys::lock::{Attempt, FileLock};
use stead_sys::readable;

use crate::content::Hashes;
use crate::error::{BackupError, Kind, Result};
use crate::record::{BackupKind, Facts, MAX_RECORD_BYTES, Record, is_id};

/// The most backups that one may stand on.
const MAX_CHAIN: usize = 1000;
const LOCK: &str = ".lock";
/// What the names of a backup's files end with. The last is the mark of one that is not done.
const RECORD: &str = ".json";
const HASHES: &str = ".hashes";
const IMAGE: &str = ".qcow2";
const BEGUN: &str = ".begun";
const ENDINGS: [&str; 4] = [RECORD, HASHES, IMAGE, BEGUN];

/// A folder of backups.
#[derive(Debug)]
pub(crate) struct Folder {
    pub path: PathBuf,
    /// What each record says, or why it cannot be used.
    records: BTreeMap<String, std::result::Result<Record, String>>,
    _lock: Option<FileLock>,
}

impl Folder {
    /// Opens a folder for reading.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            records: read_records(path)?,
            _lock: None,
        })
    }

    /// Opens a folder for a new backup: makes it if it is not there, locks it, and removes what has no record.
    pub fn open_for_writing(path: &Path) -> Result<Self> {
        let io = |source| BackupError::io("open the folder", path, source);
        durable::create_dir(path, 0o700).map_err(io)?;
        let holder = format!("stead backup (process {})", std::process::id());
        let lock = match FileLock::attempt(&path.join(LOCK), &holder).map_err(io)? {
            Attempt::Locked(lock) => lock,
            Attempt::HeldBy(holder) => {
                let found = format!("{holder} is writing a backup there");
                return Err(BackupError::new(
                    Kind::Conflict,
                    format!("open the folder {}", path.display()),
                    found,
                )
                .next("wait until it is done"));
            }
        };
        let folder = Self {
            _lock: Some(lock),
            ..Self::open(path)?
        };
        folder.remove_leftovers()?;
        Ok(folder)
    }

    /// Removes what an interrupted backup left. Other files stay, also those of a backup whose record is missing.
    fn remove_leftovers(&self) -> Result<()> {
        let io = |source| BackupError::io("clean the folder", &self.path, source);
        durable::remove_leftovers(&self.path).map_err(io)?;
        for (id, ending) in names(&self.path)? {
            if ending == BEGUN {
                self.end(&id, self.has(&id)).map_err(io)?;
            }
        }
        Ok(())
    }

    /// Marks a backup as not done, before the first of its files is written.
    pub fn begin(&self, id: &str) -> std::io::Result<()> {
        durable::publish(&self.file(id, BEGUN), 0o600, &[], durable::Existing::Keep)
    }

    /// Removes the mark; and, if there is no record, everything else of it before.
    pub fn end(&self, id: &str, recorded: bool) -> std::io::Result<()> {
        if !recorded {
            self.discard(id)?;
        }
        durable::remove_file(&self.file(id, BEGUN))
    }

    fn file(&self, id: &str, ending: &str) -> PathBuf {
        self.path.join(format!("{id}{ending}"))
    }

    pub fn record_file(&self, id: &str) -> PathBuf {
        self.file(id, RECORD)
    }

    pub fn hashes_file(&self, id: &str) -> PathBuf {
        self.file(id, HASHES)
    }

    pub fn image_file(&self, id: &str) -> PathBuf {
        self.file(id, IMAGE)
    }

    /// Removes the files of a backup that has no record.
    pub fn discard(&self, id: &str) -> std::io::Result<()> {
        durable::remove_file(&self.hashes_file(id))?;
        durable::remove_file(&self.image_file(id))
    }

    /// All records by id, and why one cannot be used.
    pub fn records(&self) -> impl Iterator<Item = (&String, &std::result::Result<Record, String>)> {
        self.records.iter()
    }

    pub fn has(&self, id: &str) -> bool {
        self.records.contains_key(id)
    }

    /// The record of a backup, or why it cannot be used.
    pub fn record(&self, id: &str) -> std::result::Result<&Record, String> {
        match self.records.get(id) {
            None => Err(format!(
                "there is no record of the backup {id} in {}",
                self.path.display()
            )),
            Some(Ok(record)) => Ok(record),
            Some(Err(why)) => Err(format!(
                "the record of the backup {id} cannot be used: {why}"
            )),
        }
    }

    /// The backup and what it stands on, down to a full one; or what is missing. Files are there and as long as recorded;
    /// their content is not looked at.
    pub fn chain(&self, id: &str) -> std::result::Result<Vec<&Record>, String> {
        let mut chain = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next {
            if chain.len() == MAX_CHAIN {
                return Err(format!("it stands on more than {MAX_CHAIN} others"));
            }
            let record = self.record(id)?;
            self.require_image(record)?;
            chain.push(record);
            next = record.parent.as_deref();
        }
        Ok(chain)
    }

    fn require_image(&self, record: &Record) -> std::result::Result<(), String> {
        let path = self.image_file(&record.id);
        let found = fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if found.len() == record.image_bytes {
            return Ok(());
        }
        let (path, found, expected) = (path.display(), found.len(), record.image_bytes);
        Err(format!(
            "{path} has {found} bytes, and its record says {expected}"
        ))
    }

    /// The images of a chain of backups, the newest first.
    pub fn images(&self, chain: &[&Record]) -> Vec<LayerFile> {
        let images = chain.iter().map(|record| LayerFile {
            path: self.image_file(&record.id),
            format: LayerFormat::Qcow2,
        });
        images.collect()
    }

    /// The hashes of what a backup shows, as recorded; or why they cannot be used.
    pub fn hashes(&self, record: &Record) -> std::result::Result<Hashes, String> {
        let path = self.hashes_file(&record.id);
        let wrong = |what: &str| format!("{} {what}", path.display());
        let file =
            readable::open(&path).map_err(|error| wrong(&format!("cannot be read: {error}")))?;
        let expected = Hashes::encoded_bytes(record.disk_bytes);
        let mut bytes = Vec::new();
        let read = file.take(expected + 1).read_to_end(&mut bytes);
        read.map_err(|error| wrong(&format!("cannot be read: {error}")))?;
        if blake3::hash(&bytes).to_hex().as_str() != record.content_blake3 {
            return Err(wrong("is not what its record says"));
        }
        Hashes::decode(&bytes, record.disk_bytes).ok_or_else(|| wrong("has another length"))
    }

    /// The one backup whose id begins with `wanted`; `latest` is the newest, where all are of one disk.
    pub fn find(&self, wanted: &str) -> Result<String> {
        let facts = |(id, record): (&String, &std::result::Result<Record, String>)| {
            (id.clone(), record.as_ref().ok().map(Record::facts))
        };
        let all: Vec<_> = self.records().map(facts).collect();
        find(&self.path.display().to_string(), &all, wanted)
    }
}

/// The one backup of `place` whose id begins with `wanted`; `latest` is the newest, where all are of one disk. Of each
/// backup there are the id and, where they can be read, the facts.
///
/// # Errors
/// When there is none, or more than one.
pub fn find(place: &str, all: &[(String, Option<Facts>)], wanted: &str) -> Result<String> {
    if wanted == "latest" {
        return latest(place, all);
    }
    let alike = all.iter().map(|(id, _)| id);
    let alike: Vec<&String> = alike.filter(|id| id.starts_with(wanted)).collect();
    match alike[..] {
        [id] => Ok(id.clone()),
        [] => refuse(
            place,
            Kind::NotFound,
            format!("no backup in {place} has an id that begins with {wanted:?}"),
        ),
        [..] => {
            let found = format!(
                "{} backups have ids that begin with {wanted:?}",
                alike.len()
            );
            refuse(place, Kind::Usage, found)
        }
    }
}

fn latest(place: &str, all: &[(String, Option<Facts>)]) -> Result<String> {
    let mut all: Vec<&Facts> = all.iter().filter_map(|(_, facts)| facts.as_ref()).collect();
    let is_other = |one: &&Facts| (&one.disk, &one.bitmap) != (&all[0].disk, &all[0].bitmap);
    if all.iter().any(is_other) {
        let found = "there are backups of several disks, so say which by its id";
        return refuse(place, Kind::Usage, found.into());
    }
    all.sort_by(|a, b| (&a.time, &a.id).cmp(&(&b.time, &b.id)));
    match all.last() {
        Some(newest) => Ok(newest.id.clone()),
        None => refuse(place, Kind::NotFound, format!("{place} has no backup")),
    }
}

fn refuse(place: &str, kind: Kind, found: String) -> Result<String> {
    let next = format!("`stead backup ls {place}` lists them");
    Err(BackupError::new(kind, "find the backup", found).next(next))
}

/// The length and BLAKE3 hash of a file.
pub(crate) fn hash_file(path: &Path) -> io::Result<(u64, String)> {
    let file: File = readable::open(path)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file)?;
    Ok((hasher.count(), hasher.finalize().to_hex().to_string()))
}

/// The names of backups' files: id and ending.
fn names(folder: &Path) -> Result<Vec<(String, &'static str)>> {
    let io = |source| BackupError::io("read the folder", folder, source);
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        let name = name.to_string_lossy();
        let ending = ENDINGS.into_iter().find(|ending| name.ends_with(ending));
        if let Some(ending) = ending
            && let Some(id) = name.strip_suffix(ending)
            && is_id(id)
        {
            found.push((id.to_owned(), ending));
        }
    }
    Ok(found)
}

/// All backups by their files; one that was begun and has no record is none.
fn read_records(folder: &Path) -> Result<BTreeMap<String, std::result::Result<Record, String>>> {
    let names = names(folder)?;
    let begun: Vec<&String> = names
        .iter()
        .filter(|(_, ending)| *ending == BEGUN)
        .map(|(id, _)| id)
        .collect();
    let mut records = BTreeMap::new();
    for (id, ending) in &names {
        if *ending == RECORD {
            let record = read_record(&folder.join(format!("{id}{RECORD}")), id);
            records.insert(id.clone(), record);
        } else if !begun.contains(&id) {
            let missing = || Err("it is missing".to_owned());
            records.entry(id.clone()).or_insert_with(missing);
        }
    }
    Ok(records)
}

fn read_record(path: &Path, id: &str) -> std::result::Result<Record, String> {
    let mut bytes = Vec::new();
    let file = readable::open(path).map_err(|error| error.to_string())?;
    let read = file.take(MAX_RECORD_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_RECORD_BYTES {
        return Err(format!("it has more than {MAX_RECORD_BYTES} bytes"));
    }
    Record::decode(&bytes, id)
}

/// Whether a backup could be restored, as far as its record and the lengths of its files tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state", content = "why")]
pub enum State {
    /// Everything is there; whether it is whole says `verify`.
    Complete,
    /// A file is missing or cut, or a record is damaged; its own or one that it stands on.
    Broken(String),
}

/// A backup in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Listed {
    /// Its id.
    pub id: String,
    /// What it is, where its record can be read.
    pub record: Option<Facts>,
    /// Whether it could be restored.
    #[serde(flatten)]
    pub state: State,
    /// How many backups it stands on.
    pub depth: usize,
}

/// The backups in a folder, oldest first.
///
/// # Errors
/// When the folder cannot be read.
pub fn list(folder: &Path) -> Result<Vec<Listed>> {
    let folder = Folder::open(folder)?;
    let mut all: Vec<Listed> = folder
        .records()
        .map(|(id, record)| listed(&folder, id, record))
        .collect();
    sort(&mut all);
    Ok(all)
}

/// Puts a list into the order of time.
pub fn sort(all: &mut [Listed]) {
    all.sort_by_key(|one| {
        let time = one.record.as_ref().map(|record| record.time.clone());
        let later = one
            .record
            .as_ref()
            .map(|record| record.kind != BackupKind::Full);
        (time, later, one.id.clone())
    });
}

fn listed(folder: &Folder, id: &str, record: &std::result::Result<Record, String>) -> Listed {
    let chain = folder.chain(id);
    let depth = chain.as_ref().map_or(0, |chain| chain.len() - 1);
    Listed {
        id: id.to_owned(),
        record: record.as_ref().ok().map(Record::facts),
        state: match chain {
            Ok(_) => State::Complete,
            Err(why) => State::Broken(why),
        },
        depth,
    }
}
