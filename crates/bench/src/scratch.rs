//! Where everything lies while it is measured, and how nothing of it is left.
//!
//! One folder under `target`, with a second file system in it: XFS, which shares blocks, in a file
//! that is mounted. Dropping [`Scratch`] ends the VMs that work in it, unmounts and removes it. A run
//! that was killed is cleaned up after by the next one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use stead_sys::durable;
use stead_sys::lock::{Attempt, FileLock};
use stead_sys::process::ProcessId;

use crate::error::{BenchError, Doing, Result};
use crate::program;

/// The XFS file's size in bytes; it is sparse.
const XFS_BYTES: u64 = 12 << 30;
/// How long ended VMs may take to go.
const END_WITHIN: Duration = Duration::from_secs(10);

/// The scratch folder of a run.
#[derive(Debug)]
pub struct Scratch {
    root: PathBuf,
    _lock: FileLock,
}

impl Scratch {
    /// Makes an empty one in `target`; what a killed run has left there is taken away first.
    ///
    /// # Errors
    /// When another run is under way, or the folder cannot be made.
    pub fn create(target: &Path) -> Result<Self> {
        durable::create_dir(target, 0o755).doing("create the target folder")?;
        let lock =
            match FileLock::attempt(&target.join("bench.lock"), "stead-bench").doing("lock")? {
                Attempt::Locked(lock) => lock,
                Attempt::HeldBy(who) => {
                    return Err(BenchError::new(
                        "begin",
                        format!("another run is under way: {who}"),
                    ));
                }
            };
        let scratch = Self {
            root: target.join("bench"),
            _lock: lock,
        };
        scratch.clear()?;
        durable::create_dir(&scratch.root, 0o711).doing("create the scratch folder")?;
        Ok(scratch)
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Makes and mounts XFS with this name; gives its folder.
    ///
    /// # Errors
    /// When `mkfs.xfs` or `mount` fail.
    pub async fn mount_xfs(&self, name: &str) -> Result<PathBuf> {
        let (image, folder) = (self.path(&format!("{name}.img")), self.path(name));
        let file = durable::create_scratch(&image, 0o600).doing("create the XFS file")?;
        file.set_len(XFS_BYTES).doing("size the XFS file")?;
        durable::create_dir(&folder, 0o711).doing("create the XFS folder")?;
        let image = image.display().to_string();
        program::run("mkfs.xfs", &["-q", "-m", "reflink=1", &image]).await?;
        let at = folder.display().to_string();
        program::run("mount", &["-t", "xfs", "-o", "loop", &image, &at]).await?;
        Ok(folder)
    }

    /// Unmounts it and gives its room back.
    ///
    /// # Errors
    /// When it is in use.
    pub fn unmount_xfs(&self, name: &str) -> Result<()> {
        unmount_below(&self.path(name))?;
        durable::remove_file(&self.path(&format!("{name}.img"))).doing("remove the XFS file")
    }

    fn clear(&self) -> Result<()> {
        end_processes_in(&self.root)?;
        unmount_below(&self.root)?;
        for folder in memory_folders_of(&self.root) {
            durable::remove_tree(&folder).doing("remove a VM's memory")?;
        }
        durable::remove_tree(&self.root).doing("remove the scratch folder")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            eprintln!("clean up {}: {}", self.root.display(), error.lines());
        }
    }
}

/// Ends every process whose working folder lies below `root`: VMs that this run started.
fn end_processes_in(root: &Path) -> Result<()> {
    let begun = Instant::now();
    loop {
        let pids = processes_in(root)?;
        if pids.is_empty() {
            return Ok(());
        }
        for pid in pids {
            // One that is gone by itself is as good as ended.
            if let Ok(process) = ProcessId::of(pid) {
                process.kill().doing("end a VM")?;
            }
        }
        if begun.elapsed() > END_WITHIN {
            return Err(BenchError::new("end the VMs of this run", "they do not go"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn processes_in(root: &Path) -> Result<Vec<i32>> {
    let entries = fs::read_dir("/proc").doing("list the processes")?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(root))
        })
        .collect())
}

fn unmount_below(root: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").doing("list the mounts")?;
    let ours = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|at| Path::new(at).starts_with(root));
    for at in ours {
        let output = Command::new("umount")
            .arg(at)
            .output()
            .doing("run umount")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(BenchError::new(format!("unmount {at}"), said));
        }
    }
    Ok(())
}

/// Folders on the memory file system that belong to a worker below `root`.
fn memory_folders_of(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/dev/shm") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            fs::read_link(path.join("worker")).is_ok_and(|owner| owner.starts_with(root))
        })
        .collect()
}
