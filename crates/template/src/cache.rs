//! What a build keeps for the next one: the packed root file system and the kernel package.
//!
//! ```text
//! <cache>/lock                    held by the build that is under way
//! <cache>/apt/                    apt's index
//! <cache>/plan.json               what apt last made of that index
//! <cache>/rootfs-<key>.tar        a root file system   } each with a record
//! <cache>/kernel-<key>.deb        a kernel package     } of the same name ending in .json
//! <cache>/scratch-<pid>/          a build's working folder; the next build removes what a crash left
//! ```
//! A record is written after its file has reached the disk and holds the file's BLAKE3 hash; a file
//! without a record, or with other content, is made again.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use stead_sys::durable::{self, Existing};
use stead_sys::lock::{Attempt, FileLock};

use crate::Stage;
use crate::apt::Package;
use crate::error::{OnPath, TemplateError};
use crate::progress::{Step, Watch};

/// The longest record that is read, in bytes; one of a thousand packages has about 60 KiB.
const RECORD_BYTES_MAX: u64 = 8 << 20;

/// What is known about a cached file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The BLAKE3 hash of the file, in hexadecimal.
    pub(crate) blake3: String,
    /// What was asked for; of several files made for one wish only the newest is kept.
    pub(crate) wish: String,
    /// What is in it.
    pub(crate) packages: Vec<Package>,
}

/// What apt made of an index: which versions a wish stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// The fingerprint of the index; with another index the plan means nothing.
    pub(crate) index: String,
    /// What was asked for.
    pub(crate) wish: String,
    /// The packages of the root file system.
    pub(crate) packages: Vec<Package>,
    /// The kernel's package.
    pub(crate) kernel: Package,
}

/// The two kinds of cached files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A packed root file system.
    RootFilesystem,
    /// A kernel package.
    Kernel,
}

impl Kind {
    fn affixes(self) -> (&'static str, &'static str) {
        match self {
            Self::RootFilesystem => ("rootfs-", ".tar"),
            Self::Kernel => ("kernel-", ".deb"),
        }
    }
}

/// A cache folder, locked for this build.
#[derive(Debug)]
pub(crate) struct Cache {
    root: PathBuf,
    scratch: PathBuf,
    _lock: FileLock,
}

impl Cache {
    /// Opens the cache at `root`, waiting until no other build uses it.
    pub(crate) fn open(root: &Path, watch: &Watch<'_>) -> Result<Self, TemplateError> {
        durable::create_dir(root, 0o755).on("creating", root)?;
        let root = std::fs::canonicalize(root).on("resolving", root)?;
        let lock = lock(&root.join("lock"), watch)?;
        remove_leftovers(&root)?;
        let scratch = root.join(format!("scratch-{}", std::process::id()));
        durable::create_dir(&scratch, 0o755).on("creating", &scratch)?;
        Ok(Self {
            root,
            scratch,
            _lock: lock,
        })
    }

    /// Where apt works.
    pub(crate) fn apt(&self) -> PathBuf {
        self.root.join("apt")
    }

    /// A new, empty folder for scratch files.
    pub(crate) fn scratch(&self, name: &str) -> Result<PathBuf, TemplateError> {
        let folder = self.scratch.join(name);
        durable::create_dir(&folder, 0o755).on("creating", &folder)?;
        Ok(folder)
    }

    /// Where the file with the content `packages` is or belongs.
    pub(crate) fn place(&self, kind: Kind, wish: &str, packages: &[Package]) -> PathBuf {
        let mut hasher = blake3::Hasher::new_derive_key("steadfast 2026 template cache key");
        hasher.update(wish.as_bytes());
        for package in packages {
            hasher.update(format!("\n{}={}", package.name, package.version).as_bytes());
        }
        let (prefix, suffix) = kind.affixes();
        let key = &hasher.finalize().to_hex()[..32];
        self.root.join(format!("{prefix}{key}{suffix}"))
    }

    /// The record of `file`, if the file is there and has the content that the record names.
    pub(crate) fn checked(
        &self,
        file: &Path,
        step: &Step<'_>,
    ) -> Result<Option<Record>, TemplateError> {
        let Some(record) = read_record(&record_path(file)) else {
            return Ok(None);
        };
        match hash(file, step) {
            Ok(found) if found == record.blake3 => Ok(Some(record)),
            Ok(_) => Ok(None),
            Err(TemplateError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Records `file`, which has been published, and removes older files made for the same wish.
    pub(crate) fn record(
        &self,
        kind: Kind,
        file: &Path,
        wish: &str,
        packages: Vec<Package>,
        step: &Step<'_>,
    ) -> Result<Record, TemplateError> {
        let record = Record {
            blake3: hash(file, step)?,
            wish: wish.to_owned(),
            packages,
        };
        write_json(&record_path(file), &record)?;
        for older in self.made_for(kind, wish)? {
            if older != file {
                durable::remove_file(&record_path(&older)).on("removing", &older)?;
                durable::remove_file(&older).on("removing", &older)?;
            }
        }
        Ok(record)
    }

    /// The plan for `wish`, if it was made from the index with the fingerprint `index`.
    pub(crate) fn plan(&self, index: &str, wish: &str) -> Option<Plan> {
        read_json::<Plan>(&self.root.join("plan.json"))
            .filter(|plan| plan.index == index && plan.wish == wish)
    }

    /// Keeps `plan` for the next build.
    pub(crate) fn keep_plan(&self, plan: &Plan) -> Result<(), TemplateError> {
        write_json(&self.root.join("plan.json"), plan)
    }

    /// The files that were made for `wish`, in whatever versions.
    pub(crate) fn made_for(&self, kind: Kind, wish: &str) -> Result<Vec<PathBuf>, TemplateError> {
        let (prefix, suffix) = kind.affixes();
        let mut found = Vec::new();
        for name in names(&self.root)? {
            let file = self.root.join(&name);
            let is_kind = name.starts_with(prefix) && name.ends_with(suffix);
            if is_kind && read_record(&record_path(&file)).is_some_and(|record| record.wish == wish)
            {
                found.push(file);
            }
        }
        Ok(found)
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next build.
        match durable::remove_tree(&self.scratch) {
            Ok(()) | Err(_) => {}
        }
    }
}

fn lock(path: &Path, watch: &Watch<'_>) -> Result<FileLock, TemplateError> {
    let mut waiting = None;
    let holder = format!("a template build, process {}", std::process::id());
    loop {
        match FileLock::attempt(path, &holder).on("locking", path)? {
            Attempt::Locked(lock) => return Ok(lock),
            Attempt::HeldBy(other) => {
                let step: &Step<'_> = match &waiting {
                    Some(step) => step,
                    None => {
                        let step = watch.begin(Stage::Waiting)?;
                        step.line(&other);
                        waiting.insert(step)
                    }
                };
                step.go_on()?;
                std::thread::sleep(Step::POLL);
            }
        }
    }
}

/// Removes what builds that ended early left behind; called under the lock, so nobody uses it.
fn remove_leftovers(root: &Path) -> Result<(), TemplateError> {
    for name in names(root)? {
        if name.starts_with("scratch-") {
            let path = root.join(name);
            durable::remove_tree(&path).on("removing", &path)?;
        }
    }
    durable::remove_leftovers(root)
        .on("cleaning", root)
        .map(drop)
}

fn names(folder: &Path) -> Result<Vec<String>, TemplateError> {
    std::fs::read_dir(folder)
        .and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
                .collect()
        })
        .on("listing", folder)
}

fn record_path(file: &Path) -> PathBuf {
    file.with_extension("json")
}

fn read_record(path: &Path) -> Option<Record> {
    read_json(path)
}

/// What cannot be read or understood counts as missing: it is made again.
fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let length = std::fs::metadata(path).ok()?.len();
    if length > RECORD_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), TemplateError> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(io::Error::other)
        .on("encoding", path)?;
    durable::publish(path, 0o644, &text, Existing::Replace).on("writing", path)
}

fn hash(file: &Path, step: &Step<'_>) -> Result<String, TemplateError> {
    step.go_on()?;
    let mut hasher = blake3::Hasher::new();
    let open = File::open(file).on("opening", file)?;
    hasher.update_reader(open).on("reading", file)?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::disallowed_methods,
        reason = "scratch files of a test need not last"
    )]

    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn package(version: &str) -> Vec<Package> {
        vec![Package {
            name: "git".to_owned(),
            version: version.to_owned(),
        }]
    }

    fn step() -> Step<'static> {
        Watch::silent()
            .begin(Stage::CheckCache)
            .expect("not cancelled")
    }

    fn filled(cache: &Cache, version: &str) -> PathBuf {
        let file = cache.place(Kind::RootFilesystem, "wish", &package(version));
        std::fs::write(&file, format!("content {version}")).expect("write");
        cache
            .record(
                Kind::RootFilesystem,
                &file,
                "wish",
                package(version),
                &step(),
            )
            .expect("record");
        file
    }

    #[test]
    fn a_changed_cut_or_missing_file_is_not_taken_from_the_cache() {
        let folder = tempfile::tempdir().expect("temp dir");
        let cache = Cache::open(folder.path(), &Watch::silent()).expect("cache");
        let file = filled(&cache, "1");
        assert_eq!(
            cache
                .checked(&file, &step())
                .expect("check")
                .expect("cached")
                .packages,
            package("1")
        );
        for damage in [&b"content 2"[..], b"content", b""] {
            std::fs::write(&file, damage).expect("damage");
            assert_eq!(cache.checked(&file, &step()).expect("check"), None);
        }
        std::fs::remove_file(&file).expect("remove");
        assert_eq!(cache.checked(&file, &step()).expect("check"), None);
    }

    #[test]
    fn a_damaged_record_counts_as_none() {
        let folder = tempfile::tempdir().expect("temp dir");
        let cache = Cache::open(folder.path(), &Watch::silent()).expect("cache");
        let file = filled(&cache, "1");
        let record = record_path(&file);
        let whole = std::fs::read(&record).expect("record");
        for length in 0..whole.len() {
            std::fs::write(&record, &whole[..length]).expect("cut");
            assert_eq!(
                cache.checked(&file, &step()).expect("check"),
                None,
                "cut to {length}"
            );
        }
    }

    #[test]
    fn a_newer_file_takes_the_place_of_older_ones_for_the_same_wish() {
        let folder = tempfile::tempdir().expect("temp dir");
        let cache = Cache::open(folder.path(), &Watch::silent()).expect("cache");
        let (old, new) = (filled(&cache, "1"), filled(&cache, "2"));
        assert!(!old.exists() && !record_path(&old).exists());
        assert_eq!(
            cache.made_for(Kind::RootFilesystem, "wish").expect("list"),
            [new]
        );
        assert!(
            cache
                .made_for(Kind::Kernel, "wish")
                .expect("list")
                .is_empty()
        );
    }

    #[test]
    fn a_plan_counts_for_its_index_and_wish_only() {
        let folder = tempfile::tempdir().expect("temp dir");
        let cache = Cache::open(folder.path(), &Watch::silent()).expect("cache");
        assert_eq!(cache.plan("index", "wish"), None);
        let plan = Plan {
            index: "index".to_owned(),
            wish: "wish".to_owned(),
            packages: package("1"),
            kernel: package("2").remove(0),
        };
        cache.keep_plan(&plan).expect("keep");
        assert_eq!(cache.plan("index", "wish"), Some(plan));
        assert_eq!(cache.plan("newer index", "wish"), None);
        assert_eq!(cache.plan("index", "another wish"), None);
    }

    #[test]
    fn what_a_crash_left_is_removed_by_the_next_build() {
        let folder = tempfile::tempdir().expect("temp dir");
        let left = folder.path().join("scratch-1/tree");
        std::fs::create_dir_all(&left).expect("left");
        let cache = Cache::open(folder.path(), &Watch::silent()).expect("cache");
        assert!(!left.exists());
        let scratch = cache.scratch("x").expect("scratch");
        drop(cache);
        assert!(!scratch.exists());
    }

    #[test]
    fn a_second_build_waits_and_can_be_stopped() {
        let folder = tempfile::tempdir().expect("temp dir");
        let first = Cache::open(folder.path(), &Watch::silent()).expect("cache");
        let (cancel, waiting) = (AtomicBool::new(false), AtomicBool::new(false));
        let report = |progress: crate::Progress<'_>| {
            if progress == crate::Progress::Stage(Stage::Waiting) {
                waiting.store(true, Ordering::Relaxed);
                cancel.store(true, Ordering::Relaxed);
            }
        };
        let error = Cache::open(folder.path(), &Watch::new(&report, &cancel))
            .expect_err("held and cancelled");
        assert!(
            matches!(
                error,
                TemplateError::Cancelled {
                    stage: Stage::Waiting
                }
            ),
            "{error}"
        );
        assert!(waiting.load(Ordering::Relaxed));
        drop(first);
        Cache::open(folder.path(), &Watch::silent()).expect("free again");
    }
}
