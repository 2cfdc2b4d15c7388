//! What is left of a hibernation that died with its VM: kept for people, used by nobody.
//!
//! A VM's memory that was being taken is not whole without the manifest, so nothing wakes from it, and the VM boots from
//! its disks. It is told of and kept all the same, wherever it was:
//!
//! ```text
//!   ram/ of the data directory        ──▶ moved to quarantine/
//!   memory file system, not durable   ──▶ copied to quarantine/, then removed
//!                                         no room there: moved to a folder of its own on the memory file system
//! ```
//! The live RAM of the VM is not meant: of a VM that crashes nothing but its disks is promised.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use stead_sys::durable::{self, Existing, Partial};
use stead_sys::{copy, space};

use crate::error::{AtFile, Kind, Result};
use crate::records::Sandbox;
use crate::undo::Named;
use crate::{Engine, paths, undo};

impl Engine {
    /// Sets aside the memory named `ram` of a hibernation whose process died, when the VM is gone too.
    ///
    /// # Durability
    /// When this returns, what was set aside in the data directory is durable.
    ///
    /// # Errors
    /// When a file cannot be moved; it is where it was, and the next command tries again.
    pub(crate) async fn set_aside(&self, sandbox: &str, ram: &[String]) -> Result<()> {
        let sandbox = match self.records.sandbox(sandbox).await {
            Ok(sandbox) => self.notice_crash(sandbox).await?,
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        if sandbox.process.is_some() {
            return Ok(());
        }
        let named = Named::only(ram);
        let files = undo::names_in(&self.dir.ram()).at("list", self.dir.ram())?;
        for file in files.iter().filter(|file| named.has_file(file)) {
            let to = self.quarantined(&sandbox, file)?;
            let since = last_written(file);
            durable::move_to(file, &to, Existing::Keep).at("set aside", file)?;
            self.tell(&sandbox, &since, &to);
        }
        let staged = undo::staged_in(&self.memory_folders()?)?;
        for file in staged.iter().filter(|file| named.has_file(file)) {
            let since = last_written(file);
            let to = self.out_of_memory(&sandbox, file)?;
            self.tell(&sandbox, &since, &to);
        }
        Ok(())
    }

    /// Where a file is kept, in a folder that is there.
    fn quarantined(&self, sandbox: &Sandbox, file: &Path) -> Result<PathBuf> {
        let folder = self.dir.quarantine();
        durable::create_dir(&folder, 0o700).at("create folder", &folder)?;
        Ok(folder.join(kept_name(sandbox, file)))
    }

    /// Takes a file off the memory file system, or out of the way there.
    fn out_of_memory(&self, sandbox: &Sandbox, file: &Path) -> Result<PathBuf> {
        let to = self.quarantined(sandbox, file)?;
        // One recovery at a time: what is unfinished here was left by one that died.
        let folder = self.dir.quarantine();
        durable::remove_leftovers(&folder).at("tidy", &folder)?;
        let needs = space::allocated_bytes(file).at("measure", file)?;
        let has = space::available_bytes(&folder).at("ask for room on", &folder)?;
        let copied = if needs < has {
            copy_durably(file, &to)
        } else {
            Err(io::ErrorKind::StorageFull.into())
        };
        match copied {
            Ok(()) => {
                durable::remove_file(file).at("remove", file)?;
                Ok(to)
            }
            Err(error) => {
                self.watch.notice(format!(
                    "{} cannot be copied to {}: {error}",
                    file.display(),
                    folder.display()
                ));
                let folder = Path::new(paths::MEMORY).join(format!("stead-kept-{}", sandbox.id));
                durable::create_dir(&folder, 0o700).at("create folder", &folder)?;
                let to = folder.join(kept_name(sandbox, file));
                durable::move_to(file, &to, Existing::Keep).at("set aside", file)?;
                Ok(to)
            }
        }
    }

    fn tell(&self, sandbox: &Sandbox, since: &str, kept: &Path) {
        self.watch.notice(format!(
            "the state that {0} was hibernating into is incomplete{since}, and its VM is gone: it is set aside in \
             {1}, nothing was deleted; `stead start {0}` boots it from its disks",
            sandbox.name,
            kept.display()
        ));
    }
}

/// Copies again what an earlier copy, which died before it removed `from`, has copied already.
fn copy_durably(from: &Path, to: &Path) -> io::Result<()> {
    let partial = Partial::create(to, 0o600)?;
    copy::sparse(&File::open(from)?, partial.file())?;
    partial.publish(Existing::Replace).map(drop)
}

/// The name of an unfinished file begins with a dot, so that nobody takes it for whole: here everything is unfinished.
fn kept_name(sandbox: &Sandbox, file: &Path) -> String {
    let name = undo::file_name(file);
    format!("{}-{}", sandbox.id, name.trim_start_matches('.'))
}

/// Since when, as words; none when the file does not say.
fn last_written(file: &Path) -> String {
    let at = fs::metadata(file).and_then(|meta| meta.modified());
    let at = at.map(jiff::Timestamp::try_from);
    match at {
        Ok(Ok(at)) => format!(" since {at}"),
        Ok(Err(_)) | Err(_) => String::new(),
    }
}
