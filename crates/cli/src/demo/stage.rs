//! What the demo does inside the guest, and what it reads back.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stead_engine::{Engine, EngineError, ExecCommand, Kind, Result};

const FILL: &str = include_str!("fill.sh");
const ASK: &str = include_str!("ask.py");
const CHECK: &str = include_str!("check.sh");
const CHANGE: &str = include_str!("change.sh");

/// What a guest holds, read with cold caches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// How many files are hashed.
    pub files: String,
    /// The hash of the list of hashes.
    pub list: String,
    /// Commits in the repository.
    pub commits: String,
    /// The digest of what a process holds in memory only, and its process id.
    pub memory: String,
    faults: Vec<String>,
}

impl Expected {
    /// In what `found` differs; faults that it has of itself count.
    pub fn differences(&self, found: &Self) -> Vec<String> {
        let pairs = [
            ("number of files", &self.files, &found.files),
            ("list of hashes", &self.list, &found.list),
            ("commits", &self.commits, &found.commits),
            ("RAM state", &self.memory, &found.memory),
        ];
        pairs
            .into_iter()
            .filter(|(_, expected, found)| expected != found)
            .map(|(what, expected, found)| format!("{what}: expected {expected}, found {found}"))
            .chain(found.faults.iter().cloned())
            .collect()
    }
}

async fn shell(engine: &Engine, sandbox: &str, script: &str) -> Result<String> {
    run(engine, sandbox, &["sh", "-c", script]).await
}

async fn run(engine: &Engine, sandbox: &str, argv: &[&str]) -> Result<String> {
    let command = ExecCommand {
        argv: argv.iter().map(|word| (*word).to_owned()).collect(),
        ..ExecCommand::default()
    };
    let output = engine.exec_capture(sandbox, command, &[]).await?;
    if !output.success() {
        return Err(EngineError::new(
            Kind::Internal,
            format!("run a step of the demo in {sandbox}"),
            format!(
                "{:?}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        ));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Fills the guest.
pub async fn fill(engine: &Engine, sandbox: &str) -> Result<()> {
    shell(engine, sandbox, FILL).await.map(drop)
}

/// Changes files, history and memory of the guest, and reads it back.
pub async fn change(engine: &Engine, sandbox: &str) -> Result<Expected> {
    shell(engine, sandbox, CHANGE).await?;
    run(engine, sandbox, &["python3", "-c", ASK, "change"]).await?;
    read(engine, sandbox).await
}

/// Drops the guest's caches and reads everything back.
pub async fn read(engine: &Engine, sandbox: &str) -> Result<Expected> {
    let text = shell(engine, sandbox, CHECK).await?;
    let value = |word: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(word)?.strip_prefix(' '))
            .unwrap_or("no answer")
            .trim()
            .to_owned()
    };
    let faults = [
        ("broken", "0"),
        ("fsck", "whole"),
        ("status", "0"),
        ("ext4", "0"),
    ]
    .into_iter()
    .filter(|(word, good)| value(word) != *good)
    .map(|(word, _)| format!("{word}: {}", value(word)))
    .collect();
    let answer = run(engine, sandbox, &["python3", "-c", ASK, "digest"]).await?;
    let words: Vec<&str> = answer.split_whitespace().collect();
    let memory = match words.as_slice() {
        [digest, _asked, pid] => format!("{digest} in process {pid}"),
        _ => format!("no answer: {answer:?}"),
    };
    Ok(Expected {
        files: value("files"),
        list: value("list"),
        commits: value("commits"),
        memory,
        faults,
    })
}

/// Reads several guests at once.
pub async fn read_all(engine: &Engine, sandboxes: &[String]) -> Vec<Result<Expected>> {
    let readers: Vec<_> = sandboxes.iter().map(|name| read(engine, name)).collect();
    futures::future::join_all(readers).await
}

/// Random bytes of each guest.
pub async fn random(engine: &Engine, sandboxes: &[String]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for name in sandboxes {
        all.push(shell(engine, name, "head -c 16 /dev/urandom | sha256sum").await?);
    }
    Ok(all)
}

/// Which byte was flipped.
pub struct Flipped {
    pub object: String,
    pub at: u64,
}

/// The packs of a store, by their paths in it.
pub fn packs(store: &Path) -> Result<BTreeSet<PathBuf>> {
    let files = files_below(&store.join("packs")).map_err(|error| failed("list", store, error))?;
    let inside = |path: PathBuf| path.strip_prefix(store).map(Path::to_owned).unwrap_or(path);
    Ok(files.into_iter().map(|(_, path)| inside(path)).collect())
}

/// Copies a store and flips one bit in the middle of the largest of these packs.
pub fn copy_with_one_byte_flipped(store: &Path, copy: &Path, packs: &[PathBuf]) -> Result<Flipped> {
    stead_sys::durable::remove_tree(copy).map_err(|error| failed("remove", copy, error))?;
    copy_tree(store, copy).map_err(|error| failed("copy the store to", copy, error))?;
    let length = |pack: &PathBuf| fs::metadata(copy.join(pack)).map_or(0, |meta| meta.len());
    let pack = packs
        .iter()
        .max_by_key(|pack| length(pack))
        .ok_or_else(|| {
            EngineError::new(
                Kind::Internal,
                "damage a copy of the store",
                "the checkpoint has no pack of its own",
            )
        })?;
    let at = length(pack) / 2;
    flip(&copy.join(pack), at).map_err(|error| failed("damage", pack, error))?;
    Ok(Flipped {
        object: pack.display().to_string(),
        at,
    })
}

fn failed(what: &str, path: &Path, error: std::io::Error) -> EngineError {
    EngineError::new(Kind::Internal, format!("{what} {}", path.display()), "").because(error)
}

fn flip(path: &Path, at: u64) -> std::io::Result<()> {
    let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 1], at)
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    stead_sys::durable::create_dir(to, 0o700)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            let source = fs::File::open(entry.path())?;
            let copy = stead_sys::durable::create_scratch(&target, 0o600)?;
            stead_sys::copy::clone_or_copy(&source, &copy)?;
        }
    }
    Ok(())
}

fn files_below(folder: &Path) -> std::io::Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.extend(files_below(&entry.path())?);
        } else {
            files.push((entry.metadata()?.len(), entry.path()));
        }
    }
    Ok(files)
}
