//! Files copied between host and guest.
//!
//! ```text
//!  Upload / Download   whole trees: what is next, in which folder; kept over a broken connection
//!    └─ send / fetch   one file: its chunks, their digest, how far an interrupted one had come
//!        └─ Guest      one operation; every answer checked
//!            └─ FileChannel   the connection
//! ```
//! What holds in both directions:
//! 1. **A file appears when it is whole**: every chunk follows the one before, the digest of all is right, and it did not
//!    change while it was read. Until then what had its name keeps it.
//! 2. **A copy whose connection broke goes on** when it is run again over another, at the file at which it
//!    ended, and in it behind the last block that both sides agree on.
//! 3. **What the guest says decides nothing outside of the target**: names are single components, folders of the host
//!    are entered by handles and without following links, and no more is taken than was announced and allowed.
//!
//! All of it blocks: a caller with an executor runs it on a thread of its own.

mod blocks;
mod channel;
mod download;
mod error;
mod fetch;
mod guest;
mod path;
mod progress;
mod send;
mod stream;
mod upload;

pub use channel::{ChannelError, FileChannel};
pub use download::Download;
pub use error::CopyError;
pub use guest::{Guest, MAX_FOLDER_ENTRIES};
pub use progress::{Copied, Listener, Progress};
pub use stead_agent_proto::files::{
    Content, Entry, FileAttributes, FileError, FileErrorKind, FileInput, FileKind, FileReply,
    FileRequest, FileTime, HashKind, Metadata, Owner, Replace,
};
pub use stream::FileStream;
pub use upload::Upload;

/// How deep a tree may be: a folder of each level is held open.
pub const MAX_DEPTH: usize = 256;

/// How files are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyOptions {
    /// Whether owners are copied, and set-user, set-group and sticky bits with them.
    pub owners: bool,
    /// Whether a symlink that is itself the source is followed. Those in a tree never are.
    pub follow: bool,
    /// Whether devices, pipes and sockets are left out; else they end the copy.
    pub skip_special: bool,
    /// What transfers are digested with.
    pub hash: HashKind,
    /// How many bytes of data are copied at most.
    pub limit_bytes: u64,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            owners: false,
            follow: false,
            skip_special: false,
            hash: HashKind::Blake3,
            limit_bytes: u64::MAX,
        }
    }
}

impl CopyOptions {
    fn mode(&self, mode: u32) -> u32 {
        match self.owners {
            true => mode & 0o7777,
            // With another owner, these would give somebody else's rights away.
            false => mode & 0o777,
        }
    }
}
