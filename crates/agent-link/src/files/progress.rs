//! How far a copy is.

use std::ops::ControlFlow;

use stead_agent_proto::files::Content;
use stead_agent_proto::message::Bytes;

use super::error::CopyError;

/// What was copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Regular files.
    pub files: u64,
    /// Folders.
    pub folders: u64,
    /// Symlinks.
    pub links: u64,
    /// Devices, pipes and sockets that were left out, as asked.
    pub skipped: u64,
    /// Bytes of data that were sent.
    pub data_bytes: u64,
    /// Bytes of holes that were not.
    pub hole_bytes: u64,
    /// Bytes that an earlier, interrupted copy had sent.
    pub resumed_bytes: u64,
}

/// How far a copy is.
#[derive(Debug)]
pub struct Progress<'a> {
    /// The file in the guest that is being copied.
    pub path: &'a Bytes,
    /// How many bytes of it are done.
    pub done_bytes: u64,
    /// How many it has.
    pub total_bytes: u64,
    /// What was copied so far.
    pub copied: Copied,
}

/// Hears how far a copy is, often, and may end it.
pub type Listener<'a> = dyn FnMut(&Progress<'_>) -> ControlFlow<()> + 'a;

/// Counts for one file, and tells.
pub(super) struct Tally<'a, 'l> {
    pub(super) copied: &'a mut Copied,
    pub(super) listener: &'a mut Listener<'l>,
    pub(super) path: &'a Bytes,
    pub(super) done_bytes: u64,
    pub(super) total_bytes: u64,
    pub(super) limit_bytes: u64,
}

impl Tally<'_, '_> {
    /// Notes that so much was there before.
    pub(super) fn resume(&mut self, bytes: u64) {
        self.done_bytes = bytes;
        self.copied.resumed_bytes += bytes;
    }

    /// Notes a piece, before it is written.
    pub(super) fn pass(&mut self, content: &Content) -> Result<(), CopyError> {
        let (data, hole) = match content {
            Content::Data(data) => (data.0.len() as u64, 0),
            Content::Hole(length) => (0, *length),
        };
        self.copied.data_bytes = self.copied.data_bytes.saturating_add(data);
        self.copied.hole_bytes = self.copied.hole_bytes.saturating_add(hole);
        self.done_bytes = self.done_bytes.saturating_add(data).saturating_add(hole);
        if self.copied.data_bytes > self.limit_bytes {
            return Err(CopyError::Limit {
                path: self.path.clone(),
                what: "the number of bytes",
                limit: self.limit_bytes,
            });
        }
        let progress = Progress {
            path: self.path,
            done_bytes: self.done_bytes,
            total_bytes: self.total_bytes,
            copied: *self.copied,
        };
        match (self.listener)(&progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(CopyError::Interrupted),
        }
    }
}
