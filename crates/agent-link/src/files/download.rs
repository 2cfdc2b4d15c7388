//! A file or a tree from the guest.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use stead_agent_proto::files::{Entry, FileKind, Metadata};
use stead_agent_proto::message::Bytes;
use stead_sys::durable::Existing;
use stead_sys::folder::{Attributes, Folder};
use stead_sys::incoming::Synced;

use super::error::{CopyError, Locally};
use super::fetch::{self, Fetch, Place};
use super::guest::Guest;
use super::path::{join, last, means_content, means_folder};
use super::progress::{Copied, Listener, Tally};
use super::{CopyOptions, MAX_DEPTH};

/// A file or a tree of the guest on its way to the host.
#[derive(Debug)]
pub struct Download {
    source: Bytes,
    target: PathBuf,
    options: CopyOptions,
    resolved: bool,
    levels: Vec<Level>,
    copied: Copied,
}

/// A folder of the host that is being filled.
#[derive(Debug)]
struct Level {
    folder: Folder,
    local: PathBuf,
    guest: Bytes,
    entries: Vec<Entry>,
    // The one entry is the source itself: what it is called here, and whether a link is followed there.
    sole: Option<Sole>,
    // What the folder is given once all is in it.
    leave: Option<Attributes>,
    // It is the first of its file system.
    synced: bool,
}

#[derive(Debug, Clone)]
struct Sole {
    name: OsString,
    follow: bool,
}

/// One name to copy.
struct Item {
    path: Bytes,
    name: OsString,
    follow: bool,
    local: PathBuf,
    metadata: Metadata,
}

impl Level {
    fn item(&self, entry: &Entry) -> Item {
        let (path, name, follow) = match &self.sole {
            Some(sole) => (self.guest.clone(), sole.name.clone(), sole.follow),
            None => {
                let name = OsStr::from_bytes(&entry.name.0).to_owned();
                (join(&self.guest, &entry.name.0), name, false)
            }
        };
        Item {
            path,
            local: self.local.join(&name),
            name,
            follow,
            metadata: entry.metadata,
        }
    }
}

impl Download {
    /// Copies `source` in the guest to `target` of the host, as cp(1) does: into it when it is a folder, else under its
    /// name. A source that ends with `/.` is the content of the folder.
    #[must_use]
    pub fn new(source: Bytes, target: PathBuf, options: CopyOptions) -> Self {
        Self {
            source,
            target,
            options,
            resolved: false,
            levels: Vec::new(),
            copied: Copied::default(),
        }
    }

    /// Copies, or goes on with copying after [`CopyError::Channel`].
    ///
    /// # Durability
    /// When this returns, all of it has reached the host's disk.
    ///
    /// # Errors
    /// [`CopyError`] says at which file it ended. Those before it are whole on the host.
    pub fn run(
        &mut self,
        guest: &mut Guest<'_>,
        listener: &mut Listener<'_>,
    ) -> Result<Copied, CopyError> {
        if !self.resolved {
            self.resolve(guest)?;
            self.resolved = true;
        }
        while let Some(level) = self.levels.last() {
            match level.entries.last().map(|entry| level.item(entry)) {
                Some(item) => self.item(guest, &item, listener)?,
                None => self.leave()?,
            }
        }
        Ok(self.copied)
    }

    fn resolve(&mut self, guest: &mut Guest<'_>) -> Result<(), CopyError> {
        let content = means_content(&self.source.0);
        let follow = self.options.follow || means_folder(&self.source.0);
        let metadata = guest.stat(&self.source, follow)?;
        let is_folder = metadata.kind == FileKind::Folder;
        let there = match fs::metadata(&self.target) {
            Ok(found) => Some(found),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).locally("examine", &self.target),
        };
        let level = match (there.map(|found| found.is_dir()), is_folder) {
            (Some(true), true) if content => self.root_folder(guest)?,
            (Some(true), _) => match last(&self.source) {
                Some(name) => {
                    let name = OsStr::from_bytes(name).to_owned();
                    self.sole(&self.target, name, metadata, follow)?
                }
                None => return self.wrong("the source has no name, and the target is a folder"),
            },
            (Some(false), true) => return self.wrong("it is no folder, and the source is one"),
            (None, false) if means_folder(self.target.as_os_str().as_bytes()) => {
                return self.wrong("there is no such folder");
            }
            (Some(false) | None, _) => match self.target.file_name() {
                Some(name) => self.sole(parent(&self.target), name.to_owned(), metadata, follow)?,
                None => return self.wrong("it has no name"),
            },
        };
        self.levels.push(level);
        Ok(())
    }

    fn wrong(&self, found: &'static str) -> Result<(), CopyError> {
        let path = self.target.as_os_str().as_bytes().into();
        Err(CopyError::Place { path, found })
    }

    fn sole(
        &self,
        folder: &Path,
        name: OsString,
        metadata: Metadata,
        follow: bool,
    ) -> Result<Level, CopyError> {
        let entry = Entry {
            name: name.as_bytes().into(),
            metadata,
        };
        Ok(Level {
            folder: Folder::open(folder).locally("open the folder", folder)?,
            local: folder.to_owned(),
            guest: self.source.clone(),
            entries: vec![entry],
            sole: Some(Sole { name, follow }),
            leave: None,
            synced: false,
        })
    }

    fn root_folder(&mut self, guest: &mut Guest<'_>) -> Result<Level, CopyError> {
        let entries = list(guest, &self.source, true)?;
        self.copied.folders += 1;
        let target = self.target.clone();
        Ok(Level {
            folder: Folder::open(&target).locally("open the folder", &target)?,
            local: target,
            guest: self.source.clone(),
            entries,
            sole: None,
            leave: None,
            synced: true,
        })
    }

    fn level(&mut self) -> &mut Level {
        match self.levels.last_mut() {
            Some(level) => level,
            None => unreachable!("a level is walked"),
        }
    }

    /// Copies one entry. It leaves the level only when that is done, so that it is done anew over another connection.
    fn item(
        &mut self,
        guest: &mut Guest<'_>,
        item: &Item,
        listener: &mut Listener<'_>,
    ) -> Result<(), CopyError> {
        let entered = match item.metadata.kind {
            FileKind::Folder => Some(self.enter(guest, item)?),
            FileKind::File => {
                self.file(guest, item, listener)?;
                None
            }
            FileKind::Symlink => {
                self.link(guest, item)?;
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
                let path = item.path.clone();
                return Err(CopyError::Special { path, kind });
            }
        };
        self.level().entries.pop();
        self.levels.extend(entered);
        Ok(())
    }

    fn enter(&mut self, guest: &mut Guest<'_>, item: &Item) -> Result<Level, CopyError> {
        if self.levels.len() == MAX_DEPTH {
            return Err(CopyError::Limit {
                path: item.path.clone(),
                what: "the depth of folders",
                limit: MAX_DEPTH as u64,
            });
        }
        let entries = list(guest, &item.path, item.follow)?;
        let leave = Some(self.attributes(&item.metadata));
        let level = self.level();
        let folder = level
            .folder
            .make_child(&item.name)
            .locally("make the folder", &item.local)?;
        let synced = level.sole.is_some() || device(&folder, item)? != device(&level.folder, item)?;
        self.copied.folders += 1;
        Ok(Level {
            folder,
            local: item.local.clone(),
            guest: item.path.clone(),
            entries,
            sole: None,
            leave,
            synced,
        })
    }

    fn file(
        &mut self,
        guest: &mut Guest<'_>,
        item: &Item,
        listener: &mut Listener<'_>,
    ) -> Result<(), CopyError> {
        let attributes = self.attributes(&item.metadata);
        let Some(level) = self.levels.last() else {
            unreachable!("a level is walked");
        };
        let fetch = Fetch {
            path: &item.path,
            follow: item.follow,
            metadata: item.metadata,
            attributes,
            hash: self.options.hash,
            synced: match level.sole.is_some() {
                true => Synced::Now,
                false => Synced::Later,
            },
        };
        let place = Place {
            folder: &level.folder,
            name: &item.name,
            path: &item.local,
        };
        let mut tally = Tally {
            copied: &mut self.copied,
            listener,
            path: &item.path,
            done_bytes: 0,
            total_bytes: item.metadata.length_bytes,
            limit_bytes: self.options.limit_bytes,
        };
        fetch::file(guest, fetch, place, &mut tally)?;
        self.copied.files += 1;
        Ok(())
    }

    fn link(&mut self, guest: &mut Guest<'_>, item: &Item) -> Result<(), CopyError> {
        let target = guest.read_link(&item.path)?;
        let mut attributes = self.attributes(&item.metadata);
        attributes.mode = None;
        let target = OsStr::from_bytes(&target.0);
        let level = self.level();
        level
            .folder
            .make_link(&item.name, target, &attributes, Existing::Replace)
            .locally("make the symlink", &item.local)?;
        if level.sole.is_some() {
            level.folder.sync().locally("sync", &item.local)?;
        }
        self.copied.links += 1;
        Ok(())
    }

    fn leave(&mut self) -> Result<(), CopyError> {
        let level = self.level();
        if let Some(attributes) = &level.leave {
            level
                .folder
                .set_attributes(attributes)
                .locally("give attributes to", &level.local)?;
        }
        if level.synced {
            level
                .folder
                .sync_file_system()
                .locally("sync the file system of", &level.local)?;
        }
        self.levels.pop();
        Ok(())
    }

    fn attributes(&self, metadata: &Metadata) -> Attributes {
        let (owner, modified) = (metadata.owner, metadata.modified);
        Attributes {
            mode: Some(self.options.mode(metadata.mode)),
            owner: self.options.owners.then_some((owner.uid, owner.gid)),
            modified: Some((modified.seconds, modified.nanoseconds)),
        }
    }
}

fn device(folder: &Folder, item: &Item) -> Result<u64, CopyError> {
    folder.device().locally("examine", &item.local)
}

fn list(guest: &mut Guest<'_>, path: &Bytes, follow: bool) -> Result<Vec<Entry>, CopyError> {
    let mut entries = Vec::new();
    guest.list(path, follow, &mut |page| {
        entries.extend(page);
        true
    })?;
    Ok(entries)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}
