//! What host and guest say to each other about files.
//!
//! An operation is one [`FileRequest`] and the [`FileReply`]s to it, each a postcard message in a frame of its
//! own. Only a write takes more from the host: [`FileInput`]s after [`FileReply::WriteBegins`]. Inputs, and replies that
//! are data ([`FileReply::is_data`]), take their encoded length of a stream's credit; no one is longer than
//! [`MAX_CHUNK_BYTES`].
//!
//! ```text
//!  Stat, Mkdir, Remove, Rename, Symlink, ReadLink, SetAttributes, Sync ─▶ one reply
//!  List    ─▶ Entries{last: false}… Entries{last: true}
//!  Digest  ─▶ Digests{last: false}… Digests{last: true}
//!  Read    ─▶ ReadBegins, Chunk…, ReadEnds{digest}
//!  Write   ─▶ WriteBegins ◀─ Chunk…, End{digest} ─▶ Done
//!  any of them, at any time ─▶ Failed, and nothing after it
//! ```
//! Invariants that both sides keep and check ([`FileRequest::check`], [`FileInput::check`],
//! [`FileReply::check`]): paths are absolute, without NUL and at most [`MAX_PATH_BYTES`] long; a name in a list
//! is one component and neither `.` nor `..`; a chunk begins where the one before ended, is never empty and
//! carries at most [`MAX_DATA_BYTES`]. A transfer ends with the digest of its chunks ([`ChunkDigest`]), and
//! what it makes is not visible under its name before.

mod check;
mod digest;
mod encoding;
mod error;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use check::{Malformed, is_name};
pub use digest::{BlockDigests, ChunkDigest, Digest, HashKind};
pub use error::{FileError, FileErrorKind};

use crate::flow::MAX_CHUNK_BYTES;
use crate::message::Bytes;

/// How long a path may be, in bytes.
pub const MAX_PATH_BYTES: usize = 4095;
/// How long a name in a folder may be, in bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// How many entries one [`FileReply::Entries`] holds at most.
pub const MAX_PAGE_ENTRIES: usize = 128;
/// How many bytes of names one [`FileReply::Entries`] holds at most; with what else is said of each
/// entry it takes no more of a stream than a full chunk.
pub const MAX_PAGE_NAME_BYTES: usize = 16 * 1024;
/// What is said of an entry besides its name takes no more than this.
const METADATA_BYTES: usize = 64;
/// What a message of a stream has besides its content: kinds, an offset, a length.
const HEAD_BYTES: usize = 32;
const _: () = {
    assert!(MAX_DATA_BYTES + HEAD_BYTES <= MAX_CHUNK_BYTES);
    assert!(
        MAX_PAGE_NAME_BYTES + MAX_PAGE_ENTRIES * METADATA_BYTES + HEAD_BYTES <= MAX_CHUNK_BYTES
    );
    assert!(MAX_PAGE_DIGESTS * 32 + HEAD_BYTES <= MAX_CHUNK_BYTES);
};
/// How many digests one [`FileReply::Digests`] holds at most.
pub const MAX_PAGE_DIGESTS: usize = 256;
/// The smallest block of a [`FileRequest::Digest`], in bytes.
pub const MIN_BLOCK_BYTES: u32 = 4096;
/// The largest block of a [`FileRequest::Digest`], in bytes.
pub const MAX_BLOCK_BYTES: u32 = 16 * 1024 * 1024;
/// What one chunk carries at most: whole pages, and encoded no more than a stream takes at once.
pub const MAX_DATA_BYTES: usize = MAX_CHUNK_BYTES - 4096;
/// How large a file may be that does not know its size, such as those of /proc, in bytes.
pub const MAX_UNSIZED_BYTES: u64 = 64 * 1024 * 1024;
/// The largest size of a file, in bytes: what a signed offset can say.
pub const MAX_FILE_BYTES: u64 = i64::MAX as u64;

/// Names one transfer of one file: the same again when it is resumed, another for other content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TransferId(pub [u8; 16]);

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TransferId({self})")
    }
}

/// A time as files have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileTime {
    /// Seconds since 1970-01-01 UTC.
    pub seconds: i64,
    /// Nanoseconds after that, below 1 000 000 000.
    pub nanoseconds: u32,
}

/// Whom a file belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// The user's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
}

/// What a file is to be given; what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileAttributes {
    /// Permission bits, at most `0o7777`.
    pub mode: Option<u32>,
    /// The owner.
    pub owner: Option<Owner>,
    /// When its content was last changed.
    pub modified: Option<FileTime>,
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Pipe,
    /// A socket.
    Socket,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Folder => "folder",
            Self::Symlink => "symlink",
            Self::Pipe => "pipe",
            Self::Socket => "socket",
            Self::CharacterDevice => "character device",
            Self::BlockDevice => "block device",
        })
    }
}

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, at most `0o7777`.
    pub mode: u32,
    /// Whom it belongs to.
    pub owner: Owner,
    /// Its length in bytes.
    pub length_bytes: u64,
    /// How many bytes of a disk it takes.
    pub allocated_bytes: u64,
    /// How many names it has.
    pub links: u64,
    /// When its content was last changed.
    pub modified: FileTime,
}

/// One name in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The name: one component.
    pub name: Bytes,
    /// What it stands for; a symlink for itself.
    pub metadata: Metadata,
}

/// What becomes of what already has the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Replace {
    /// It is replaced in one step.
    Yes,
    /// It stays, and the operation fails.
    No,
}

/// When what was written has reached the guest's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Durability {
    /// When the reply is sent.
    Now,
    /// After a later [`FileRequest::Sync`], unless it replaces a file: then as with `Now`, so that lost power leaves
    /// the old one or the new one.
    WithSync,
}

/// How a file is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteRequest {
    /// The file. A symlink at its last component is replaced, not followed.
    pub path: Bytes,
    /// Names the transfer; the partial file of an interrupted one is found by it.
    pub transfer: TransferId,
    /// How long the file will be; when it is not known, at most [`MAX_FILE_BYTES`].
    pub length_bytes: Option<u64>,
    /// How much of the partial file is kept: 0 begins anew, more must be there. Checked before with
    /// [`FileRequest::Digest`] on [`partial_name`].
    pub resume_from_bytes: u64,
    /// What it is given; mode and owner default to those of the file that it replaces, else to 0644 and the agent's.
    pub attributes: FileAttributes,
    /// Whether it may replace another.
    pub replace: Replace,
    /// When it must be on the disk.
    pub durability: Durability,
    /// What the chunks are digested with.
    pub hash: HashKind,
}

/// Which part of a file is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadRequest {
    /// The file.
    pub path: Bytes,
    /// Whether a symlink at the last component is followed.
    pub follow: bool,
    /// Where to begin; at or before the end of the file.
    pub offset_bytes: u64,
    /// How many bytes at most; what lies behind the end of the file is not sent.
    pub length_bytes: u64,
    /// What the chunks are digested with.
    pub hash: HashKind,
}

/// Which blocks of a file are digested.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestRequest {
    /// The file; a symlink at the last component is not followed.
    pub path: Bytes,
    /// The size of a block, [`MIN_BLOCK_BYTES`] to [`MAX_BLOCK_BYTES`]; the last one may be shorter.
    pub block_bytes: u32,
    /// The number of the first block.
    pub first_block: u64,
    /// How many blocks at most; what lies behind the end of the file is left out.
    pub count: u64,
}

/// What the host asks for.
///
/// # Durability
/// A write says when it is on the disk. What else is changed is there after a later [`FileRequest::Sync`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileRequest {
    /// What a path stands for.
    Stat {
        /// The path.
        path: Bytes,
        /// Whether a symlink at the last component is followed.
        follow: bool,
    },
    /// What is in a folder, in no order, page by page.
    List {
        /// The folder.
        path: Bytes,
        /// Whether a symlink at the last component is followed.
        follow: bool,
    },
    /// Makes a folder.
    Mkdir {
        /// The folder.
        path: Bytes,
        /// Whether missing parents are made too, and a folder that is there is no error.
        parents: bool,
        /// The permission bits of new folders, at most `0o7777`.
        mode: u32,
    },
    /// Removes a name.
    Remove {
        /// The name; a symlink is removed itself.
        path: Bytes,
        /// Whether a folder goes with everything in it; else it must be empty.
        recursive: bool,
    },
    /// Gives a file or folder another name in one step.
    Rename {
        /// The old name.
        from: Bytes,
        /// The new name.
        to: Bytes,
        /// Whether it may replace another.
        replace: Replace,
    },
    /// Makes a symlink.
    Symlink {
        /// Its path.
        path: Bytes,
        /// What it says, byte for byte; not looked at.
        target: Bytes,
        /// Whether it may replace what has the name and is no folder.
        replace: Replace,
    },
    /// What a symlink says.
    ReadLink {
        /// The symlink.
        path: Bytes,
    },
    /// A file's content.
    Read(ReadRequest),
    /// A file's new content.
    Write(WriteRequest),
    /// Gives a file attributes.
    SetAttributes {
        /// The file; a symlink is given them itself (it has no mode).
        path: Bytes,
        /// The attributes.
        attributes: FileAttributes,
    },
    /// Digests of a file's blocks.
    Digest(DigestRequest),
    /// Writes all file systems to their disks, and says whether that of a path could be.
    Sync {
        /// The path.
        path: Bytes,
    },
}

/// A piece of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Where it lies in the file.
    pub offset_bytes: u64,
    /// What it holds.
    pub content: Content,
}

/// What a piece of a file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// Bytes, 1 to [`MAX_DATA_BYTES`].
    Data(Bytes),
    /// This many zeros that take no room on the disk, at least 1.
    Hole(u64),
}

impl Chunk {
    /// How long the piece is.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        match &self.content {
            Content::Data(data) => data.0.len() as u64,
            Content::Hole(length_bytes) => *length_bytes,
        }
    }
}

/// What the host sends after [`FileReply::WriteBegins`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileInput {
    /// The next piece of the file.
    Chunk(Chunk),
    /// There is no more; the file may appear when the digest is right.
    End {
        /// The digest of the chunks.
        digest: Digest,
    },
}

/// What the guest answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileReply {
    /// It was not done, or not to its end. The last reply.
    Failed(FileError),
    /// It was done. The last reply.
    Done,
    /// To a stat. The last reply.
    Stat(Metadata),
    /// To a read of a symlink: what it says. The last reply.
    Link(Bytes),
    /// To a list.
    Entries {
        /// Some entries; may be none.
        entries: Vec<Entry>,
        /// Whether these are the last, and this the last reply.
        last: bool,
    },
    /// To a digest.
    Digests {
        /// The digests of the next blocks.
        digests: Vec<[u8; 32]>,
        /// Whether these are the last, and this the last reply.
        last: bool,
    },
    /// To a read, before its first chunk.
    ReadBegins {
        /// What is known of the file.
        metadata: Metadata,
        /// How many bytes will come; not known for files that are made while they are read (/proc), which are at
        /// most [`MAX_UNSIZED_BYTES`] long.
        length_bytes: Option<u64>,
    },
    /// The next piece of what is read.
    Chunk(Chunk),
    /// All that was to be read has been sent, and the file did not change meanwhile. The last reply.
    ReadEnds {
        /// The digest of the chunks.
        digest: Digest,
    },
    /// To a write: the chunks may come.
    WriteBegins,
}

impl FileReply {
    /// Whether nothing comes after it.
    #[must_use]
    pub fn is_last(&self) -> bool {
        match self {
            Self::Failed(_)
            | Self::Done
            | Self::Stat(_)
            | Self::Link(_)
            | Self::ReadEnds { .. } => true,
            Self::Entries { last, .. } | Self::Digests { last, .. } => *last,
            Self::ReadBegins { .. } | Self::Chunk(_) | Self::WriteBegins => false,
        }
    }

    /// Whether it goes as data of the stream, which takes credit. What there is one of in an operation does not.
    #[must_use]
    pub fn is_data(&self) -> bool {
        match self {
            Self::Chunk(_) | Self::Entries { .. } | Self::Digests { .. } => true,
            Self::Failed(_)
            | Self::Done
            | Self::Stat(_)
            | Self::Link(_)
            | Self::ReadBegins { .. }
            | Self::ReadEnds { .. }
            | Self::WriteBegins => false,
        }
    }

    /// What it is, for errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Failed(_) => "failed",
            Self::Done => "done",
            Self::Stat(_) => "stat",
            Self::Link(_) => "link",
            Self::Entries { .. } => "entries",
            Self::Digests { .. } => "digests",
            Self::ReadBegins { .. } => "read begins",
            Self::Chunk(_) => "chunk",
            Self::ReadEnds { .. } => "read ends",
            Self::WriteBegins => "write begins",
        }
    }
}

/// What the name of a partial file starts with; the transfer follows in hexadecimal.
pub const PARTIAL_PREFIX: &str = ".stead-partial-";

/// The name that the file of an unfinished transfer has, beside the file that it will become.
#[must_use]
pub fn partial_name(transfer: TransferId) -> String {
    format!("{PARTIAL_PREFIX}{transfer}")
}
