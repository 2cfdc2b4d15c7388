//! A file or a tree to the guest.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Stat};
use stead_agent_proto::files::{
    Durability, FileAttributes, FileErrorKind, FileKind, FileTime, Metadata, Owner, Replace,
    WriteRequest,
};
use stead_agent_proto::message::Bytes;
use stead_sys::folder::Folder;

use super::blocks::transfer;
use super::error::{CopyError, Locally};
use super::guest::Guest;
use super::path::{join, means_content, means_folder};
use super::progress::{Copied, Listener, Tally};
use super::{CopyOptions, MAX_DEPTH, send};

/// A file or a tree of the host on its way to the guest.
#[derive(Debug)]
pub struct Upload {
    source: PathBuf,
    target: Bytes,
    options: CopyOptions,
    stage: Stage,
    levels: Vec<Level>,
    copied: Copied,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Where it goes is not known yet.
    Resolve,
    /// Levels are walked.
    Walk,
    /// All is written, and may not be on the disk.
    Sync,
    Done,
}

/// A folder that is being copied, or the one that holds the sole file.
#[derive(Debug)]
struct Level {
    folder: Folder,
    local: PathBuf,
    guest: Bytes,
    names: Vec<OsString>,
    // The folder holds only the file that becomes `guest`.
    sole: bool,
    // What the folder in the guest is given once all is in it.
    leave: Option<FileAttributes>,
}

impl Level {
    fn path_of(&self, name: &OsStr) -> Bytes {
        match self.sole {
            true => self.guest.clone(),
            false => join(&self.guest, name.as_bytes()),
        }
    }
}

impl Upload {
    /// Copies `source` of the host to `target` in the guest, as cp(1) does: into it when it is a folder, else under its
    /// name. A source that ends with `/.` is the content of the folder.
    #[must_use]
    pub fn new(source: PathBuf, target: Bytes, options: CopyOptions) -> Self {
        Self {
            source,
            target,
            options,
            stage: Stage::Resolve,
            levels: Vec::new(),
            copied: Copied::default(),
        }
    }

    /// Copies, or goes on with copying after [`CopyError::Channel`].
    ///
    /// # Durability
    /// When this returns, all of it has reached the guest's disk.
    ///
    /// # Errors
    /// [`CopyError`] says at which file it ended. Those before it are whole in the guest.
    pub fn run(
        &mut self,
        guest: &mut Guest<'_>,
        listener: &mut Listener<'_>,
    ) -> Result<Copied, CopyError> {
        if self.stage == Stage::Resolve {
            self.resolve(guest)?;
            self.stage = Stage::Walk;
        }
        while let Some(level) = self.levels.last() {
            match level.names.last().cloned() {
                Some(name) => self.item(guest, &name, listener)?,
                None => self.leave(guest)?,
            }
        }
        if self.stage == Stage::Walk {
            self.stage = Stage::Sync;
        }
        if self.stage == Stage::Sync {
            guest.sync(&self.target)?;
            self.stage = Stage::Done;
        }
        Ok(self.copied)
    }

    fn resolve(&mut self, guest: &mut Guest<'_>) -> Result<(), CopyError> {
        let bytes = self.source.as_os_str().as_bytes();
        let follows = self.options.follow || means_folder(bytes);
        let content = means_content(bytes);
        let found = match follows {
            true => fs::metadata(&self.source),
            false => fs::symlink_metadata(&self.source),
        }
        .locally("examine", &self.source)?;
        let source = match follows || self.source.file_name().is_none() {
            true => fs::canonicalize(&self.source).locally("find", &self.source)?,
            false => self.source.clone(),
        };
        let there = match guest.stat(&self.target, true) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.guest_kind() == Some(FileErrorKind::NotFound) => None,
            Err(error) => return Err(error),
        };
        let (target, is_new) = self.place(&source, found.is_dir(), content, there)?;
        let level = match found.is_dir() {
            true => self.root_folder(guest, source, target, is_new)?,
            false => sole_file(&source, target)?,
        };
        self.levels.push(level);
        Ok(())
    }

    /// The path that the source becomes, and whether a folder there is new.
    fn place(
        &self,
        source: &Path,
        is_folder: bool,
        content: bool,
        there: Option<Metadata>,
    ) -> Result<(Bytes, bool), CopyError> {
        let wrong = |found| {
            let path = self.target.clone();
            Err(CopyError::Place { path, found })
        };
        match there.map(|found| found.kind) {
            Some(FileKind::Folder) if content => Ok((self.target.clone(), false)),
            Some(FileKind::Folder) => match source.file_name() {
                Some(name) => Ok((join(&self.target, name.as_bytes()), true)),
                None => wrong("the source has no name, and the target is a folder"),
            },
            Some(FileKind::File) if is_folder => wrong("it is a file, and the source a folder"),
            Some(FileKind::File) => Ok((self.target.clone(), true)),
            Some(
                FileKind::Symlink
                | FileKind::Pipe
                | FileKind::Socket
                | FileKind::CharacterDevice
                | FileKind::BlockDevice,
            ) => wrong("it is neither file nor folder"),
            None if !is_folder && means_folder(&self.target.0) => wrong("there is no such folder"),
            None => Ok((self.target.clone(), true)),
        }
    }

    fn root_folder(
        &mut self,
        guest: &mut Guest<'_>,
        source: PathBuf,
        target: Bytes,
        is_new: bool,
    ) -> Result<Level, CopyError> {
        let folder = Folder::open(&source).locally("open the folder", &source)?;
        let stat = rustix::fs::fstat(&folder)
            .map_err(std::io::Error::from)
            .locally("examine", &source)?;
        self.enter(guest, folder, source, target, is_new.then_some(stat))
    }

    /// Makes a folder in the guest; with `stat` it is given the attributes of that once all is in it.
    fn enter(
        &mut self,
        guest: &mut Guest<'_>,
        folder: Folder,
        local: PathBuf,
        target: Bytes,
        stat: Option<Stat>,
    ) -> Result<Level, CopyError> {
        if self.levels.len() == MAX_DEPTH {
            return Err(CopyError::Limit {
                path: target,
                what: "the depth of folders",
                limit: MAX_DEPTH as u64,
            });
        }
        let names = folder.names().locally("list", &local)?;
        if stat.is_some() {
            make_folder(guest, &target)?;
        }
        self.copied.folders += 1;
        Ok(Level {
            folder,
            local,
            guest: target,
            names,
            sole: false,
            leave: stat.map(|stat| attributes(&stat, &self.options)),
        })
    }

    fn level(&mut self) -> &mut Level {
        match self.levels.last_mut() {
            Some(level) => level,
            None => unreachable!("a level is walked"),
        }
    }

    /// Copies one name. It leaves the level only when that is done, so that it is done anew over another connection.
    fn item(
        &mut self,
        guest: &mut Guest<'_>,
        name: &OsStr,
        listener: &mut Listener<'_>,
    ) -> Result<(), CopyError> {
        let level = self.level();
        let (local, path) = (level.local.join(name), level.path_of(name));
        let stat = level.folder.stat(name).locally("examine", &local)?;
        let entered = match kind(&stat) {
            FileKind::Folder => {
                let folder = level
                    .folder
                    .child(name)
                    .locally("open the folder", &local)?;
                Some(self.enter(guest, folder, local, path, Some(stat))?)
            }
            FileKind::File => {
                self.file(guest, name, &local, path, &stat, listener)?;
                None
            }
            FileKind::Symlink => {
                self.link(guest, name, &local, &path, &stat)?;
                None
            }
            FileKind::Pipe
            | FileKind::Socket
            | FileKind::CharacterDevice
            | FileKind::BlockDevice
                if self.options.skip_special =>
            {
                self.copied.skipped += 1;
                None
            }
            kind @ (FileKind::Pipe
            | FileKind::Socket
            | FileKind::CharacterDevice
            | FileKind::BlockDevice) => {
                let path = local.as_os_str().as_bytes().into();
                return Err(CopyError::Special { path, kind });
            }
        };
        self.level().names.pop();
        self.levels.extend(entered);
        Ok(())
    }

    fn file(
        &mut self,
        guest: &mut Guest<'_>,
        name: &OsStr,
        local: &Path,
        path: Bytes,
        stat: &Stat,
        listener: &mut Listener<'_>,
    ) -> Result<(), CopyError> {
        let level = self.level();
        let sole = level.sole;
        let file = level.folder.file(name).locally("open", local)?;
        let length_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        let request = WriteRequest {
            transfer: transfer(&[
                b"send",
                local.as_os_str().as_bytes(),
                &path.0,
                &length_bytes.to_le_bytes(),
                &stat.st_mtime.to_le_bytes(),
                &stat.st_mtime_nsec.to_le_bytes(),
            ]),
            path: path.clone(),
            length_bytes: Some(length_bytes),
            resume_from_bytes: 0,
            attributes: attributes(stat, &self.options),
            replace: Replace::Yes,
            durability: match sole {
                true => Durability::Now,
                false => Durability::WithSync,
            },
            hash: self.options.hash,
        };
        let mut tally = Tally {
            copied: &mut self.copied,
            listener,
            path: &path,
            done_bytes: 0,
            total_bytes: length_bytes,
            limit_bytes: self.options.limit_bytes,
        };
        send::file(guest, file, local, request, &mut tally)?;
        self.copied.files += 1;
        Ok(())
    }

    fn link(
        &mut self,
        guest: &mut Guest<'_>,
        name: &OsStr,
        local: &Path,
        path: &Bytes,
        stat: &Stat,
    ) -> Result<(), CopyError> {
        let target = self.level().folder.link(name);
        let target = target.locally("read the symlink", local)?;
        guest.make_link(path, &target.as_bytes().into(), Replace::Yes)?;
        if self.options.owners {
            let mut attributes = attributes(stat, &self.options);
            attributes.mode = None;
            guest.set_attributes(path, attributes)?;
        }
        self.copied.links += 1;
        Ok(())
    }

    fn leave(&mut self, guest: &mut Guest<'_>) -> Result<(), CopyError> {
        let level = self.level();
        if let Some(attributes) = level.leave {
            guest.set_attributes(&level.guest, attributes)?;
        }
        self.levels.pop();
        Ok(())
    }
}

fn sole_file(source: &Path, target: Bytes) -> Result<Level, CopyError> {
    let (Some(parent), Some(name)) = (source.parent(), source.file_name()) else {
        unreachable!("only a folder has no name");
    };
    let parent = match parent.as_os_str().is_empty() {
        true => Path::new("."),
        false => parent,
    };
    Ok(Level {
        folder: Folder::open(parent).locally("open the folder", parent)?,
        local: parent.to_owned(),
        guest: target,
        names: vec![name.to_owned()],
        sole: true,
        leave: None,
    })
}

/// Makes a folder that only the agent may enter until all is in it; one that is there will do.
fn make_folder(guest: &mut Guest<'_>, path: &Bytes) -> Result<(), CopyError> {
    let error = match guest.make_folder(path, false, 0o700) {
        Err(error) if error.guest_kind() == Some(FileErrorKind::Exists) => error,
        made => return made,
    };
    match guest.stat(path, false)?.kind {
        FileKind::Folder => Ok(()),
        FileKind::File
        | FileKind::Symlink
        | FileKind::Pipe
        | FileKind::Socket
        | FileKind::CharacterDevice
        | FileKind::BlockDevice => Err(error),
    }
}

fn attributes(stat: &Stat, options: &CopyOptions) -> FileAttributes {
    FileAttributes {
        mode: Some(options.mode(stat.st_mode)),
        owner: options.owners.then_some(Owner {
            uid: stat.st_uid,
            gid: stat.st_gid,
        }),
        modified: Some(FileTime {
            seconds: stat.st_mtime,
            // Below 1 000 000 000.
            nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        }),
    }
}

fn kind(stat: &Stat) -> FileKind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Folder,
        FileType::Symlink => FileKind::Symlink,
        FileType::Fifo => FileKind::Pipe,
        FileType::Socket => FileKind::Socket,
        FileType::CharacterDevice | FileType::Unknown => FileKind::CharacterDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
    }
}
