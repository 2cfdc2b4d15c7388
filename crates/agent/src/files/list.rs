//! What is in a folder, page by page: a million entries cost one page of memory.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{Dir, Mode, OFlags};
use stead_agent_proto::files::{
    Entry, FileError, FileReply, MAX_PAGE_ENTRIES, MAX_PAGE_NAME_BYTES, is_name,
};
use stead_agent_proto::message::Bytes;
use stead_sys::folder::Folder;

use super::error::{Tried, as_path};
use super::stat::{metadata, place};

const ATTEMPTED: &str = "list";

/// A folder that is being listed.
pub(super) struct Listing {
    path: Bytes,
    folder: Folder,
    entries: Dir,
    // Read, but the page before was full.
    pending: Option<Entry>,
}

impl fmt::Debug for Listing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listing({:?})", self.path)
    }
}

impl Listing {
    pub(super) fn begin(path: &Bytes, follow: bool) -> Result<Self, FileError> {
        let at = as_path(path);
        let folder = match follow || at.file_name().is_none() {
            true => Folder::open(at).tried(ATTEMPTED, path)?,
            false => {
                let (parent, name) = place(ATTEMPTED, path)?;
                parent.child(name).tried(ATTEMPTED, path)?
            }
        };
        // A descriptor of its own, since it has a position.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let entries = rustix::fs::openat(&folder, c".", flags, Mode::empty())
            .and_then(Dir::new)
            .tried(ATTEMPTED, path)?;
        Ok(Self {
            path: path.clone(),
            folder,
            entries,
            pending: None,
        })
    }

    /// The next page.
    pub(super) fn next(&mut self) -> Result<FileReply, FileError> {
        let mut entries = Vec::new();
        let mut name_bytes = 0;
        let last = loop {
            let Some(entry) = self.next_entry().tried(ATTEMPTED, &self.path)? else {
                break true;
            };
            name_bytes += entry.name.0.len();
            if entries.len() == MAX_PAGE_ENTRIES || name_bytes > MAX_PAGE_NAME_BYTES {
                self.pending = Some(entry);
                break false;
            }
            entries.push(entry);
        };
        Ok(FileReply::Entries { entries, last })
    }

    fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        if let Some(entry) = self.pending.take() {
            return Ok(Some(entry));
        }
        for entry in self.entries.by_ref() {
            let name = Bytes::from(entry?.file_name().to_bytes());
            // `.` and `..`; and what the protocol cannot say, which no file system of Linux has.
            if !is_name(&name.0) {
                continue;
            }
            match self.folder.stat(OsStr::from_bytes(&name.0)) {
                Ok(stat) => {
                    let metadata = metadata(&stat);
                    return Ok(Some(Entry { name, metadata }));
                }
                // Removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}
