//! What is known of a file, what it is given, and when that is on the disk.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Stat};
use rustix::io::Errno;
use stead_agent_proto::files::{
    FileAttributes, FileError, FileErrorKind, FileKind, FileTime, Metadata, Owner,
};
use stead_agent_proto::message::Bytes;
use stead_sys::folder::{Attributes, Folder};

use super::error::{Tried, UNCHANGED, as_path, refused};

const BLOCK_BYTES: u64 = 512;

/// What a path stands for.
pub(super) fn stat(path: &Bytes, follow: bool) -> Result<Metadata, FileError> {
    let flags = match follow {
        true => AtFlags::empty(),
        false => AtFlags::SYMLINK_NOFOLLOW,
    };
    let stat = rustix::fs::statat(CWD, as_path(path), flags).tried("examine", path)?;
    Ok(metadata(&stat))
}

/// What a system call found, in the protocol's words.
pub(super) fn metadata(stat: &Stat) -> Metadata {
    Metadata {
        kind: file_kind(FileType::from_raw_mode(stat.st_mode)),
        mode: stat.st_mode & 0o7777,
        owner: Owner {
            uid: stat.st_uid,
            gid: stat.st_gid,
        },
        length_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        allocated_bytes: u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(BLOCK_BYTES),
        links: stat.st_nlink,
        modified: FileTime {
            seconds: stat.st_mtime,
            // Below 1 000 000 000.
            nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        },
    }
}

// What has no type of its own is as unusual as a device.
fn file_kind(kind: FileType) -> FileKind {
    match kind {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Folder,
        FileType::Symlink => FileKind::Symlink,
        FileType::Fifo => FileKind::Pipe,
        FileType::Socket => FileKind::Socket,
        FileType::CharacterDevice | FileType::Unknown => FileKind::CharacterDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
    }
}

/// What the protocol gives a file, as the system calls take it.
pub(super) fn as_attributes(attributes: &FileAttributes) -> Attributes {
    Attributes {
        mode: attributes.mode,
        owner: attributes.owner.map(|owner| (owner.uid, owner.gid)),
        modified: attributes
            .modified
            .map(|time| (time.seconds, time.nanoseconds)),
    }
}

/// The folder that holds a path's last component, and that component. Links on the way are followed, as the guest's own
/// programs do.
pub(super) fn place<'a>(
    attempted: &str,
    path: &'a Bytes,
) -> Result<(Folder, &'a OsStr), FileError> {
    let at = as_path(path);
    let (Some(parent), Some(name)) = (at.parent(), at.file_name()) else {
        return Err(refused(FileErrorKind::Invalid, attempted, path, UNCHANGED));
    };
    Ok((Folder::open(parent).tried(attempted, path)?, name))
}

/// Gives a file attributes; a link is given them itself.
pub(super) fn set_attributes(path: &Bytes, attributes: &FileAttributes) -> Result<(), FileError> {
    let attempted = "give attributes to";
    let left = "it may have been given some of them";
    let given = as_attributes(attributes);
    if as_path(path) == Path::new("/") {
        let folder = Folder::open(as_path(path)).tried(attempted, path)?;
        return folder
            .set_attributes(&given)
            .tried_leaving(attempted, path, left);
    }
    let (folder, name) = place(attempted, path)?;
    let stat = folder.stat(name).tried(attempted, path)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::Directory => {
            let file = folder.file(name).tried(attempted, path)?;
            stead_sys::folder::set_attributes(&file, &given)
        }
        FileType::Symlink => folder.set_attributes_of(name, &given),
        // To open one for its mode may set something off.
        FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => match given.mode {
            Some(_) => Err(io::Error::from(Errno::OPNOTSUPP)),
            None => folder.set_attributes_of(name, &given),
        },
    }
    .tried_leaving(attempted, path, left)
}

/// Writes all file systems to their disks: below the path, others may be mounted. Of a failure it is known for the one that
/// holds the path.
pub(super) fn sync(path: &Bytes) -> Result<(), FileError> {
    let attempted = "sync the file system of";
    let left = "what was written may not have reached the disk";
    let at = as_path(path);
    let folder = match Folder::open(at) {
        Ok(folder) => folder,
        Err(_no_folder) => place(attempted, path)?.0,
    };
    rustix::fs::sync();
    folder
        .sync_file_system()
        .tried_leaving(attempted, path, left)
}
