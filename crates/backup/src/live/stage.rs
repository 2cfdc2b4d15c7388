//! The copy that QEMU makes of a running disk: a file without a name, and what QEMU knows of it.
//!
//! ```text
//!  begin ─▶ QEMU copies ─▶ finish: QEMU has closed the file, which can be read     ─▶ dismiss
//!    └─ an error, or interrupted ─▶ clear          the job stays, concluded
//! ```
//! The file is gone when nobody has it open any more, so a kill leaves none. The job stays in QEMU until the backup is
//! recorded and the bitmaps are in order: its id says who made it and for what, so the next backup can clear what a dead
//! one left.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stead_qcow2::{LayerFile, LayerFormat};
use stead_sys::process::ProcessId;
use stead_sys::{durable, space};
use stead_vmm::Qmp;
use stead_vmm::block_backup::{self, Backup};
use stead_vmm::block_jobs::{self, Job, JobState, Order};

use super::vm;
use crate::error::{BackupError, Kind, Result};
use crate::event::Watch;
use crate::record::is_id;

/// How often a job is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long a job may take to end once it was told to, or to make an empty image.
const END_WITHIN: Duration = Duration::from_secs(120);
/// A copy whose room could not be reserved ends when its file system has less free than this, in bytes.
const LOW_BYTES: u64 = 256 << 20;
/// Room for what the guest writes between the look at the bitmap and the instant, and for small tables, in bytes.
const SPARE_BYTES: u64 = 16 << 20;
/// Tables of an image take at most one byte for so many of the disk.
const TABLE_SHARE: u64 = 2048;
/// The longest name of a node is 31 characters.
const ID_IN_NODE: usize = 24;
const JOB_PREFIX: &str = "stead-backup-";

/// What things of one copy are called in QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    pub job: String,
    format_job: String,
    image: String,
    file: String,
}

/// Who made a job, for a backup of which id into which place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Maker {
    pub process: ProcessId,
    pub place: String,
    pub id: String,
}

/// A short name of a place, for ids of jobs.
pub(super) fn tag(place: &str) -> String {
    blake3::hash(place.as_bytes()).to_hex()[..8].to_owned()
}

impl Maker {
    pub fn own(place: &str, id: &str) -> Result<Self> {
        let process = ProcessId::own();
        let process =
            process.map_err(|source| BackupError::io("look at", Path::new("/proc"), source))?;
        Ok(Self {
            process,
            place: tag(place),
            id: id.to_owned(),
        })
    }

    /// The maker of a job, if it is one of ours.
    pub fn of(job: &str) -> Option<Self> {
        let mut parts = job.strip_prefix(JOB_PREFIX)?.split('-');
        let (process, place, id) = (parts.next()?, parts.next()?, parts.next()?);
        let ends = parts.next().is_none() && is_id(id);
        Some(Self {
            process: process.replacen('.', "@", 1).parse().ok()?,
            place: place.to_owned(),
            id: id.to_owned(),
        })
        .filter(|_| ends)
    }

    pub fn names(&self) -> Names {
        let process = self.process.to_string().replacen('@', ".", 1);
        let job = format!("{JOB_PREFIX}{process}-{}-{}", self.place, self.id);
        let id = &self.id[..ID_IN_NODE];
        Names {
            format_job: format!("{job}-f"),
            job,
            image: format!("stead-{id}"),
            file: format!("stead-f{id}"),
        }
    }
}

/// A disk that is to be copied.
pub(super) struct Source<'a> {
    pub node: &'a str,
    /// The bitmap that says what is copied, and how much it says.
    pub since: Option<(&'a str, u64)>,
    /// The bitmap that begins at the instant.
    pub begins: &'a str,
}

/// A copy, begun.
#[derive(Debug)]
pub(super) struct Stage {
    file: File,
    folder: PathBuf,
    is_reserved: bool,
}

impl Stage {
    /// Lends QEMU a file in `folder`, and begins the copy and the new bitmap at one instant.
    pub fn begin(qmp: &mut Qmp, names: &Names, source: &Source<'_>, folder: &Path) -> Result<Self> {
        let size = block_backup::size_of(qmp, source.node)
            .map_err(|error| vm("ask for the disk's size", error))?;
        let Some(size) = size else {
            let found = format!("the node {} is gone", source.node);
            return Err(BackupError::new(Kind::Vm, "begin the copy", found));
        };
        let file = nameless(folder)?;
        let data = match source.since {
            Some((_, dirty_bytes)) => dirty_bytes,
            None => size.virtual_bytes.min(size.stored_bytes),
        };
        let needed = data
            .saturating_add(size.virtual_bytes / TABLE_SHARE)
            .saturating_add(SPARE_BYTES);
        let is_reserved = reserve(&file, folder, needed)?;
        let stage = Self {
            file,
            folder: folder.to_owned(),
            is_reserved,
        };
        stage.lend(qmp, names)?;
        format(qmp, names, size.virtual_bytes)?;
        let failed = |error| vm("begin the copy", error);
        block_backup::add_image(qmp, &names.image, &names.file).map_err(failed)?;
        let backup = Backup {
            job: &names.job,
            source: source.node,
            target: &names.image,
            since: source.since.map(|(bitmap, _)| bitmap),
            begins: source.begins,
        };
        block_backup::start(qmp, &backup).map_err(failed)?;
        Ok(stage)
    }

    /// QEMU gets an open file of its own: locks belong to that, and go with it.
    fn lend(&self, qmp: &mut Qmp, names: &Names) -> Result<()> {
        let path = self.path();
        let own = File::options().read(true).write(true).open(&path);
        let own = own.map_err(|source| BackupError::io("open again", &path, source))?;
        let lent = qmp
            .lend_descriptor(&names.job, own.as_fd())
            .map_err(|error| vm("lend QEMU a file", error))?;
        block_backup::add_file(qmp, &names.file, &lent)
            .map_err(|error| vm("let QEMU open the file", error))
    }

    /// Where this process finds the file.
    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// The image, once QEMU has closed it.
    pub fn layer(&self) -> LayerFile {
        LayerFile {
            path: self.path(),
            format: LayerFormat::Qcow2,
        }
    }

    /// Waits until QEMU has copied everything, and lets it close the file.
    pub fn finish(&self, qmp: &mut Qmp, names: &Names, watch: Watch<'_>) -> Result<()> {
        loop {
            let Some(job) = look(qmp, &names.job)? else {
                let found = "QEMU's job is gone";
                return Err(BackupError::new(Kind::Vm, "copy the disk", found));
            };
            watch.progress(job.done, job.total);
            if job.state == JobState::Concluded {
                return match job.error {
                    None => close(qmp, names),
                    Some(error) => Err(BackupError::new(Kind::Vm, "copy the disk", error)),
                };
            }
            watch.go_on("make a backup")?;
            self.require_room()?;
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// What QEMU cannot write for want of room it may tell the guest, so it is not let come to that.
    fn require_room(&self) -> Result<()> {
        if self.is_reserved {
            return Ok(());
        }
        let free = space::available_bytes(&self.folder);
        let free =
            free.map_err(|source| BackupError::io("ask for room in", &self.folder, source))?;
        if free >= LOW_BYTES {
            return Ok(());
        }
        let found = format!("{} has only {free} bytes left", self.folder.display());
        Err(BackupError::new(Kind::NoSpace, "copy the disk", found)
            .next("make room there, or name another folder with --staging"))
    }
}

fn nameless(folder: &Path) -> Result<File> {
    durable::nameless(folder).map_err(|source| {
        BackupError::io("make a file without a name in", folder, source)
            .next("name a folder of another file system with --staging")
    })
}

/// Whether room could be reserved; where the file system cannot, it has at least that much.
fn reserve(file: &File, folder: &Path, bytes: u64) -> Result<bool> {
    let io = |source| {
        BackupError::io("reserve room in", folder, source).next(format!(
            "make room for {bytes} bytes there, or name another folder with --staging"
        ))
    };
    if space::reserve(file, 0, bytes).map_err(io)? {
        return Ok(true);
    }
    let free = space::available_bytes(folder).map_err(io)?;
    if free >= bytes.saturating_add(LOW_BYTES) {
        return Ok(false);
    }
    Err(io(std::io::ErrorKind::StorageFull.into()))
}

fn look(qmp: &mut Qmp, job: &str) -> Result<Option<Job>> {
    block_jobs::job(qmp, job).map_err(|error| vm("look at QEMU's job", error))
}

fn format(qmp: &mut Qmp, names: &Names, bytes: u64) -> Result<()> {
    block_backup::start_format(qmp, &names.format_job, &names.file, bytes)
        .map_err(|error| vm("make an image for the copy", error))?;
    match end(qmp, &names.format_job)? {
        None => Ok(()),
        Some(error) => Err(BackupError::new(
            Kind::Vm,
            "make an image for the copy",
            error,
        )),
    }
}

/// Waits for the end of a job and lets QEMU forget it; its error.
fn end(qmp: &mut Qmp, id: &str) -> Result<Option<String>> {
    let begun = Instant::now();
    loop {
        let Some(job) = look(qmp, id)? else {
            return Ok(None);
        };
        if job.state == JobState::Concluded {
            dismiss(qmp, id)?;
            return Ok(job.error);
        }
        if begun.elapsed() > END_WITHIN {
            let found = format!("the job {id} does not end");
            return Err(BackupError::new(Kind::Vm, "wait for QEMU", found));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Lets QEMU forget a job that has ended.
pub(super) fn dismiss(qmp: &mut Qmp, id: &str) -> Result<()> {
    block_jobs::tell_job(qmp, id, Order::Dismiss).map_err(|error| vm("dismiss QEMU's job", error))
}

/// Lets QEMU close the file, as far as it has it.
fn close(qmp: &mut Qmp, names: &Names) -> Result<()> {
    let failed = |error| vm("let QEMU close the copy", error);
    for name in [&names.image, &names.file] {
        let nodes = block_jobs::nodes(qmp).map_err(failed)?;
        if nodes.iter().any(|node| node.name == *name) {
            block_backup::remove_node(qmp, name).map_err(failed)?;
        }
    }
    qmp.take_back_descriptors(&names.job).map_err(failed)
}

/// Takes a copy away, however far it is.
pub(super) fn clear(qmp: &mut Qmp, names: &Names) -> Result<()> {
    for id in [&names.format_job, &names.job] {
        let Some(job) = look(qmp, id)? else {
            continue;
        };
        if job.state != JobState::Concluded
            && let Err(error) = block_jobs::tell_job(qmp, id, Order::Cancel)
        {
            // It may have ended by itself just then; if not, waiting for its end says so.
            tracing::debug!(%error, id, "a job cannot be cancelled");
        }
        end(qmp, id)?;
    }
    close(qmp, names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_of_a_job_says_who_made_it_for_which_backup_where() {
        let id = "0123456789abcdef0123456789abcdef";
        let maker = Maker::own("/backups", id).expect("own process");
        let names = maker.names();
        assert_eq!(Maker::of(&names.job), Some(maker));
        assert_eq!(Maker::of(&names.format_job), None);
        for node in [&names.image, &names.file] {
            assert!(node.len() <= 31, "{node}");
        }
        for wrong in ["", "stead-backup-", "stead-backup-1.2-x-y", "drive-backup"] {
            assert_eq!(Maker::of(wrong), None, "{wrong}");
        }
    }
}
