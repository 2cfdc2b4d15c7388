//! A file's content, piece by piece.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use stead_agent_proto::files::{
    Chunk, ChunkDigest, Content, FileError, FileErrorKind, FileReply, MAX_DATA_BYTES,
    MAX_UNSIZED_BYTES, ReadRequest,
};
use stead_agent_proto::message::Bytes;
use stead_sys::folder::Folder;
use stead_sys::pieces::{Piece, Pieces};

use super::error::{Tried, UNCHANGED, as_path, refused};
use super::stat::{metadata, place};

const ATTEMPTED: &str = "read";

/// File systems whose files are made while they are read: proc, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs.
/// What they say of a size is no size.
const UNSIZED: [u64; 7] = [
    0x9fa0,
    0x6265_6572,
    0x0027_e0eb,
    0x6367_7270,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
];

/// A file that is being read.
#[derive(Debug)]
pub(super) struct Reading {
    path: Bytes,
    source: Source,
    digest: ChunkDigest,
}

#[derive(Debug)]
enum Source {
    Sized(Pieces),
    Unsized { file: File, at: u64, end: u64 },
}

/// Opens a regular file for reading. What it is, is looked at before: to open a device may set something off.
pub(super) fn open_file(attempted: &str, path: &Bytes, follow: bool) -> Result<File, FileError> {
    let (folder, name) = place(attempted, path)?;
    let link = folder.stat(name).tried(attempted, path)?;
    let is_link = FileType::from_raw_mode(link.st_mode) == FileType::Symlink;
    let stat = match follow && is_link {
        true => rustix::fs::stat(as_path(path)).tried(attempted, path)?,
        false => link,
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(Errno::ISDIR).tried(attempted, path),
        FileType::Symlink
        | FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => {
            return Err(refused(FileErrorKind::Special, attempted, path, UNCHANGED));
        }
    }
    let file = open_as(&folder, path, follow && is_link).tried(attempted, path)?;
    match file.metadata().tried(attempted, path)?.is_file() {
        true => Ok(file),
        // Another took its name between the two looks.
        false => Err(refused(FileErrorKind::Special, attempted, path, UNCHANGED)),
    }
}

fn open_as(folder: &Folder, path: &Bytes, follow: bool) -> io::Result<File> {
    let at = as_path(path);
    match at.file_name() {
        Some(name) if !follow => folder.file(name),
        Some(_) | None => {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            Ok(rustix::fs::open(at, flags, Mode::empty())?.into())
        }
    }
}

impl Reading {
    /// Opens the file and gives the first reply.
    pub(super) fn begin(request: &ReadRequest) -> Result<(Self, FileReply), FileError> {
        let path = request.path.clone();
        let file = open_file(ATTEMPTED, &path, request.follow)?;
        let stat = rustix::fs::fstat(&file).tried(ATTEMPTED, &path)?;
        let system = rustix::fs::fstatfs(&file).tried(ATTEMPTED, &path)?;
        let metadata = metadata(&stat);
        let start = request.offset_bytes;
        let end = start.saturating_add(request.length_bytes);
        let is_unsized = u64::try_from(system.f_type).is_ok_and(|kind| UNSIZED.contains(&kind));
        if !is_unsized && start > metadata.length_bytes {
            let attempted = "read behind the end of";
            return Err(refused(FileErrorKind::Invalid, attempted, &path, UNCHANGED));
        }
        let source = match is_unsized {
            true => Source::Unsized {
                file,
                at: start,
                end,
            },
            false => Source::Sized(Pieces::new(file, start, end).tried(ATTEMPTED, &path)?),
        };
        let length_bytes = match &source {
            Source::Sized(pieces) => Some(pieces.end() - pieces.at()),
            Source::Unsized { .. } => None,
        };
        let digest = ChunkDigest::new(request.hash);
        let first = FileReply::ReadBegins {
            metadata,
            length_bytes,
        };
        let reading = Self {
            path,
            source,
            digest,
        };
        Ok((reading, first))
    }

    /// The next chunk, or the end.
    pub(super) fn next(&mut self) -> Result<FileReply, FileError> {
        let limit = MAX_DATA_BYTES;
        let chunk = match &mut self.source {
            Source::Sized(pieces) => next_sized(pieces, limit).tried(ATTEMPTED, &self.path)?,
            Source::Unsized { file, at, end } => {
                next_unsized(file, at, *end, limit).tried(ATTEMPTED, &self.path)?
            }
        };
        match chunk {
            Some(chunk) => {
                self.digest.add(&chunk);
                Ok(FileReply::Chunk(chunk))
            }
            None => self.finish(),
        }
    }

    fn finish(&self) -> Result<FileReply, FileError> {
        if let Source::Sized(pieces) = &self.source
            && !pieces.stood_still().tried(ATTEMPTED, &self.path)?
        {
            let kind = FileErrorKind::Changed;
            return Err(refused(kind, ATTEMPTED, &self.path, UNCHANGED));
        }
        Ok(FileReply::ReadEnds {
            digest: self.digest.digest(),
        })
    }
}

fn next_sized(pieces: &mut Pieces, limit: usize) -> io::Result<Option<Chunk>> {
    let mut data = vec![0; limit];
    let offset_bytes = pieces.at();
    let Some(piece) = pieces.next(&mut data, u64::MAX)? else {
        return Ok(None);
    };
    let content = match piece {
        Piece::Data(length) => {
            data.truncate(length);
            Content::Data(data.into())
        }
        Piece::Hole(length) => Content::Hole(length),
    };
    Ok(Some(Chunk {
        offset_bytes,
        content,
    }))
}

fn next_unsized(file: &File, at: &mut u64, end: u64, limit: usize) -> io::Result<Option<Chunk>> {
    let left = end.saturating_sub(*at);
    let want = usize::try_from(left).map_or(limit, |left| left.min(limit));
    let mut data = vec![0; want];
    let length = file.read_at(&mut data, *at)?;
    if length == 0 {
        return Ok(None);
    }
    data.truncate(length);
    let offset_bytes = *at;
    *at += length as u64;
    match *at <= MAX_UNSIZED_BYTES {
        true => Ok(Some(Chunk {
            offset_bytes,
            content: Content::Data(data.into()),
        })),
        false => Err(Errno::FBIG.into()),
    }
}
