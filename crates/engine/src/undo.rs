//! Taking back what an unfinished job left: one piece of code for a failure now and for a crash before.
//!
//! ```text
//!   kill its QEMU processes ▶ right the captured sandbox's records ▶ drop its sandboxes and lease ▶
//!   drop the job's row ▶ sweep: every file that no record names goes
//! ```
//! Each step may run again after a crash in the middle; the row goes only when all before it is done.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stead_sys::durable;
use stead_sys::lock::{Attempt, FileLock};
use stead_sys::process::ProcessId;
use tracing::{info, warn};

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::job::{CaptureUndo, Job, Undo};
use crate::launch::RAM_FILE;
use crate::records::{JobRow, Records, SandboxDisk, from_json, parse_process};
use crate::{Engine, layers, paths};

/// How long a killed QEMU may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// The job that is to leave nothing but its state.
const HIBERNATE: &str = "hibernate";

impl Engine {
    /// Runs `work` as a job: an error undoes it and keeps its cause.
    pub(crate) async fn undone_on_error<T>(&self, job: &Job, result: Result<T>) -> Result<T> {
        let error = match result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        match self.undo_recorded(job.id()).await {
            Ok(()) => Err(error),
            Err(undo) => {
                warn!(%undo, "undoing failed");
                Err(error.left(format!(
                    "undoing it failed too ({undo}); the next command tries again"
                )))
            }
        }
    }

    /// Ends a job whose result is valid by taking away what it has turned its undoing to.
    pub(crate) async fn complete(&self, job: &Job) -> Result<()> {
        self.undo_recorded(job.id()).await
    }

    /// Undoes what the job's row names. Memory does not count: the transaction that was to turn the
    /// undoing to something else may have failed.
    async fn undo_recorded(&self, job: &str) -> Result<()> {
        match self
            .records
            .jobs()
            .await?
            .into_iter()
            .find(|row| row.id == job)
        {
            Some(row) => self.undo(job, &from_json("job detail", &row.detail)?).await,
            None => Ok(()),
        }
    }

    /// Tidying after a success: when it fails, the operation has succeeded all the same.
    pub(crate) fn only_notice(&self, what_stays: &str, tidied: Result<()>) {
        if let Err(error) = tidied {
            self.watch.notice(format!("{what_stays}: {error}"));
        }
    }

    /// Undoes every job whose process died, unless somebody alive works on its sandbox.
    ///
    /// One that cannot be undone now holds back nothing else: whoever locks its sandbox tries again
    /// and is told why.
    pub(crate) async fn recover(&self) -> Result<()> {
        for job in self.dead_jobs().await? {
            if let Err(error) = self.recover_unless_held(&job).await {
                self.watch.notice(format!(
                    "undoing {} failed: {error}; the next command tries again",
                    job.kind
                ));
            }
        }
        Ok(())
    }

    async fn recover_unless_held(&self, job: &JobRow) -> Result<()> {
        let Some(sandbox) = &job.sandbox else {
            return self.recover_job(job).await;
        };
        let own = format!("recovery, process {}", std::process::id());
        let path = self.lock_path(sandbox);
        match FileLock::attempt(&path, &own).at("lock", &path)? {
            Attempt::Locked(_lock) => self.recover_job(job).await,
            Attempt::HeldBy(holder) => {
                info!(%holder, job = job.id, "left to the holder");
                Ok(())
            }
        }
    }

    /// Undoes the dead jobs of a sandbox whose lock the caller holds.
    pub(crate) async fn recover_locked(&self, sandbox: &str) -> Result<()> {
        for job in self.dead_jobs().await? {
            if job.sandbox.as_deref() == Some(sandbox) {
                self.recover_job(&job).await?;
            }
        }
        Ok(())
    }

    async fn dead_jobs(&self) -> Result<Vec<JobRow>> {
        let mut dead = Vec::new();
        for job in self.records.jobs().await? {
            let owner = parse_process(&job.owner)?;
            let alive = owner.is_alive().map_err(|source| {
                EngineError::internal(format!("look for process {owner}"), "").because(source)
            })?;
            if !alive {
                dead.push(job);
            }
        }
        Ok(dead)
    }

    async fn recover_job(&self, job: &JobRow) -> Result<()> {
        // One recovery at a time: two commands may have found the same row.
        let path = self.dir.locks().join("recovery");
        let _lock = crate::exclusion::lock(
            &path,
            "this worker",
            "recovery",
            self.settings.wait,
            &self.watch,
        )
        .await?;
        if !self
            .records
            .jobs()
            .await?
            .iter()
            .any(|now| now.id == job.id)
        {
            return Ok(());
        }
        self.watch.notice(format!(
            "undoing {} that stopped at {} (its process is gone)",
            job.kind, job.step
        ));
        let undo: Undo = from_json("job detail", &job.detail)?;
        if let (HIBERNATE, Some(capture)) = (job.kind.as_str(), &undo.capture) {
            self.set_aside(&capture.sandbox, &undo.ram).await?;
        }
        self.undo(&job.id, &undo).await
    }

    async fn undo(&self, job: &str, undo: &Undo) -> Result<()> {
        for launch in &undo.launches {
            self.remove_launch(launch).await?;
        }
        if let Some(capture) = &undo.capture {
            self.undo_capture(capture).await?;
        }
        if let Some(switching) = &undo.compact {
            self.undo_compact(switching).await?;
        }
        if let Some(sandbox) = &undo.follow {
            self.follow(sandbox).await?;
        }
        for sandbox in &undo.sandboxes {
            self.records.remove_sandbox(sandbox).await?;
        }
        if let Some(earlier) = &undo.hibernations {
            let forgotten = self
                .forget_hibernations(&earlier.sandbox, earlier.except.as_deref())
                .await;
            self.only_notice(
                "what it hibernated into earlier stays in the store",
                forgotten,
            );
        }
        if undo.lease
            && let Err(error) = self.remove_own_leases().await
        {
            // What lies here does not wait for the store.
            self.watch.notice(format!(
                "{error}; a lease may stay in the store until this worker's next `stead gc`"
            ));
        }
        let mut tx = self.records.begin().await?;
        Records::remove_job(&mut tx, job).await?;
        tx.commit().await?;
        self.sweep().await
    }

    /// Makes the records of a sandbox say what its QEMU really writes to, and lets it run on.
    async fn undo_capture(&self, capture: &CaptureUndo) -> Result<()> {
        let sandbox = match self.records.sandbox(&capture.sandbox).await {
            Ok(sandbox) => sandbox,
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let sandbox = self.notice_crash(sandbox).await?;
        let in_use = match sandbox.process {
            Some(_) => Some(self.resume_interrupted(&sandbox).await?),
            None => None,
        };
        let mut tx = self.records.begin().await?;
        let mut disks = Vec::new();
        let mut frozen = Vec::new();
        for (disk, before, after) in &capture.disks {
            let file = layers::path_of(&self.dir, after, layers::QCOW2);
            let switched = match &in_use {
                Some(open) => open.contains(&file),
                // QEMU is gone. If the overlay is there, the guest may have written to it; if it had
                // not yet, the overlay is empty and reads as the layer below. Both are right.
                None => file.exists(),
            };
            if switched {
                Records::freeze_layer(&mut tx, before).await?;
                frozen.push(before);
                // The command may have died before it handed the overlay over.
                layers::give_to(&file, crate::launch::owner(sandbox.vm_user))?;
            }
            disks.push(SandboxDisk {
                disk: disk.clone(),
                layer: if switched { after } else { before }.clone(),
            });
        }
        Records::set_disks(&mut tx, &capture.sandbox, &disks).await?;
        tx.commit().await?;
        self.seal_frozen(&frozen).await
    }

    /// Gives layers that a capture has frozen to us, so that forks may read and nobody may write them.
    async fn seal_frozen(&self, frozen: &[&String]) -> Result<()> {
        for layer in frozen {
            let row = self.base_layer(layer).await?;
            layers::seal(&layers::path_of(&self.dir, &row.id, &row.format))?;
        }
        Ok(())
    }

    /// Kills whatever runs in a run folder and removes the folder.
    pub(crate) async fn remove_launch(&self, launch: &str) -> Result<()> {
        self.end_processes(launch).await?;
        self.remove_port_locks(launch)?;
        let memory = paths::memory_folder(launch);
        durable::remove_tree(&memory).at("remove", &memory)?;
        let folder = self.dir.run(launch);
        durable::remove_tree(&folder).at("remove", &folder)
    }

    /// Kills whatever runs in a run folder and waits for its end; the folder and its logs stay.
    pub(crate) async fn end_processes(&self, launch: &str) -> Result<()> {
        let folder = self.dir.run(launch);
        let begun = Instant::now();
        loop {
            let inside = processes_in(&folder).at("look for processes in", &folder)?;
            if inside.is_empty() {
                return Ok(());
            }
            for process in &inside {
                process.kill().map_err(|source| {
                    EngineError::internal(format!("kill process {process}"), "").because(source)
                })?;
            }
            if begun.elapsed() > KILL_TIMEOUT {
                return Err(EngineError::new(
                    Kind::Vm,
                    format!("end the VM in {}", folder.display()),
                    format!(
                        "it did not end within {} s of SIGKILL",
                        KILL_TIMEOUT.as_secs()
                    ),
                )
                .next("it waits in the kernel, mostly for a disk: see `dmesg`, then try again"));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Removes every file of the data folder that no record names.
    ///
    /// The folders are listed *before* the records are read: a file is named in a record before it
    /// is created, so a file that was seen and is then not named is nobody's.
    pub(crate) async fn sweep(&self) -> Result<()> {
        let files = [self.dir.layers(), self.dir.ram(), self.dir.blobs()]
            .iter()
            .map(|folder| names_in(folder).at("list", folder))
            .collect::<Result<Vec<_>>>()?
            .concat();
        let launches = names_in(&self.dir.runs()).at("list", self.dir.runs())?;
        let memory = self.memory_folders()?;
        let staged = staged_in(&memory)?;
        let builds = names_in(&self.dir.builds()).at("list", self.dir.builds())?;
        self.records.forget_unused_layers().await?;
        let named = self.named().await?;
        for path in files
            .into_iter()
            .chain(staged)
            .filter(|path| !named.has_file(path))
        {
            info!(path = %path.display(), "sweep");
            durable::remove_file(&path).at("remove", &path)?;
        }
        for path in builds.into_iter().filter(|path| !named.has_file(path)) {
            durable::remove_tree(&path).at("remove", &path)?;
        }
        for path in launches {
            let launch = file_name(&path);
            if !named.words.contains(&launch) {
                self.remove_launch(&launch).await?;
            }
        }
        for path in memory {
            let launch = file_name(&path).trim_start_matches("stead-").to_owned();
            if !named.words.contains(&launch) {
                durable::remove_tree(&path).at("remove", &path)?;
            }
        }
        Ok(())
    }

    /// The folders of this worker's VMs on the memory file system.
    pub(crate) fn memory_folders(&self) -> Result<Vec<PathBuf>> {
        let folder = Path::new(paths::MEMORY);
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let ours = |path: &PathBuf| {
            file_name(path).starts_with("stead-")
                && fs::read_link(path.join(MEMORY_OWNER))
                    .is_ok_and(|owner| owner == self.dir.root())
        };
        let all = names_in(folder).at("list", folder)?;
        Ok(all.into_iter().filter(ours).collect())
    }

    async fn named(&self) -> Result<Named> {
        let mut named = Named::default();
        for job in self.records.jobs().await? {
            let undo: Undo = from_json("job detail", &job.detail)?;
            named.words.extend(undo.launches);
            named.words.extend(undo.layers);
            named.words.extend(undo.ram);
            named.words.extend(undo.blobs);
            named.words.extend(undo.builds);
        }
        for layer in self.records.layers().await? {
            named.words.insert(layer.id);
        }
        for sandbox in self.records.sandboxes().await? {
            let machine = self.machine_of(&sandbox)?;
            named.words.extend(sandbox.launch);
            named.words.insert(machine.kernel);
            named.words.insert(machine.initrd);
        }
        for template in self.records.templates().await? {
            named.words.insert(template.kernel);
            named.words.insert(template.initrd);
        }
        for (_, ram) in self.records.local_checkpoints().await? {
            named.words.extend(ram);
        }
        Ok(named)
    }
}

/// A link in a memory folder that says which worker it belongs to.
pub(crate) const MEMORY_OWNER: &str = "worker";

/// Names that records refer to; a file is named by its name without the ending.
#[derive(Debug, Default)]
pub(crate) struct Named {
    words: HashSet<String>,
}

impl Named {
    pub(crate) fn only(names: &[String]) -> Self {
        Self {
            words: names.iter().cloned().collect(),
        }
    }

    pub(crate) fn has_file(&self, path: &Path) -> bool {
        let stem = path
            .file_stem()
            .map(|stem| stem.to_string_lossy().into_owned())
            .unwrap_or_default();
        // A file that is being written belongs to the job that names it.
        let word = match stem.strip_prefix(durable::TEMP_PREFIX) {
            Some(rest) => rest.splitn(3, '-').nth(2).unwrap_or_default().to_owned(),
            None => stem,
        };
        self.words.contains(&word)
    }
}

pub(crate) fn names_in(folder: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect()
}

/// What captures have staged in memory folders: everything but the live RAM.
pub(crate) fn staged_in(folders: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut staged = Vec::new();
    for folder in folders {
        match names_in(folder) {
            Ok(paths) => staged.extend(paths),
            // Its VM was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).at("list", folder),
        }
    }
    staged.retain(|path| ![MEMORY_OWNER, RAM_FILE].contains(&file_name(path).as_str()));
    Ok(staged)
}

pub(crate) fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// The QEMUs whose working directory is `folder`: one of ours works in its run folder. So does, for a moment,
/// a process of this program that is about to become one. Anybody else there, a shell for instance, is not meant.
fn processes_in(folder: &Path) -> io::Result<Vec<ProcessId>> {
    let own = fs::read_link("/proc/self/exe")?;
    let is_meant = |pid: i32| match fs::read_link(format!("/proc/{pid}/exe")) {
        Ok(exe) => exe == own || is_qemu(&exe),
        // One that is ending has no program any more, and its files still.
        Err(_) => true,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let works_there = fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == folder);
        if works_there
            && is_meant(pid)
            && let Ok(process) = ProcessId::of(pid)
        {
            found.push(process);
        }
    }
    Ok(found)
}

/// Whether a program is a QEMU, also one that was replaced by a newer version meanwhile.
fn is_qemu(exe: &Path) -> bool {
    file_name(exe).starts_with("qemu-system-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_is_found_by_the_folder_it_works_in_and_a_bystander_is_not() {
        let dir = tempfile::tempdir().expect("temp dir");
        let start = |program: &str, args: &[&str]| {
            std::process::Command::new(program)
                .args(args)
                .current_dir(dir.path())
                .spawn()
                .expect("spawn")
        };
        let mut bystander = start("sleep", &["60"]);
        let mut qemu = start(
            "qemu-system-x86_64",
            &["-M", "none", "-S", "-display", "none"],
        );
        let found = loop {
            let found = processes_in(dir.path()).expect("search");
            // Between fork and exec it is this very program.
            if fs::read_link(format!("/proc/{}/exe", qemu.id())).is_ok_and(|exe| is_qemu(&exe)) {
                break found;
            }
        };
        for child in [&mut bystander, &mut qemu] {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].pid.unsigned_abs(), qemu.id());
    }

    #[test]
    fn an_unfinished_file_belongs_to_the_job_that_names_it() {
        let named = Named {
            words: HashSet::from(["abc".to_owned()]),
        };
        assert!(named.has_file(Path::new("layers/abc.qcow2")));
        assert!(named.has_file(Path::new("layers/.partial-12-0-abc.qcow2")));
        assert!(!named.has_file(Path::new("layers/.partial-12-0-abd.qcow2")));
        assert!(!named.has_file(Path::new("layers/abd.raw")));
    }
}
