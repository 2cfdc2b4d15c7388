//! A file that is being written: hidden until it is whole.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::FileExt;

use stead_agent_proto::files::{
    Chunk, ChunkDigest, Content, Digest, Durability, FileError, FileErrorKind, FileInput,
    MAX_FILE_BYTES, WriteRequest, partial_name,
};
use stead_sys::incoming::{Incoming, Synced};

use super::error::{Tried, malformed, refused};
use super::names::existing;
use super::stat::{as_attributes, place};
use super::swept::Swept;

const ATTEMPTED: &str = "write";
const LEFT: &str = "the partial file was removed, and what had the name before still has it";

/// A file of which chunks come.
#[derive(Debug)]
pub(super) struct Writing {
    request: WriteRequest,
    incoming: Incoming,
    at: u64,
    digest: ChunkDigest,
}

impl Writing {
    pub(super) fn begin(request: WriteRequest, swept: &Swept) -> Result<Self, FileError> {
        let path = &request.path;
        let (folder, name) = place(ATTEMPTED, path)?;
        swept
            .sweep(&folder)
            .tried("remove left-over partial files beside", path)?;
        let partial = partial_name(request.transfer);
        let keep_bytes = request.resume_from_bytes;
        let incoming = Incoming::begin(&folder, name, OsStr::new(&partial), keep_bytes)
            .tried(ATTEMPTED, path)?;
        Ok(Self {
            at: keep_bytes,
            digest: ChunkDigest::new(request.hash),
            request,
            incoming,
        })
    }

    /// Takes a chunk, or makes the file appear.
    pub(super) fn take(
        mut self: Box<Self>,
        input: FileInput,
    ) -> Result<Option<Box<Self>>, FileError> {
        let taken = match (input.check(), input) {
            (Err(found), _) => Err(malformed(&found)),
            (Ok(()), FileInput::Chunk(chunk)) => self.add(&chunk),
            (Ok(()), FileInput::End { digest }) => match self.check_whole(digest) {
                Ok(()) => return self.publish().map(|()| None),
                Err(error) => Err(error),
            },
        };
        match taken {
            Ok(()) => Ok(Some(self)),
            Err(error) => {
                let path = &self.request.path;
                let removed = self.incoming.abandon();
                removed.tried_leaving("remove the partial file of", path, &error.to_string())?;
                Err(error)
            }
        }
    }

    fn most_bytes(&self) -> u64 {
        self.request.length_bytes.unwrap_or(MAX_FILE_BYTES)
    }

    fn add(&mut self, chunk: &Chunk) -> Result<(), FileError> {
        let end = chunk.offset_bytes.saturating_add(chunk.length_bytes());
        if chunk.offset_bytes != self.at || end > self.most_bytes() {
            let attempted = "take a chunk that does not follow the one before, for";
            return Err(self.refused(FileErrorKind::Invalid, attempted));
        }
        self.digest.add(chunk);
        let written: io::Result<()> = match &chunk.content {
            Content::Data(data) => self.incoming.file().write_all_at(&data.0, self.at),
            // Nothing was ever written there.
            Content::Hole(_) => Ok(()),
        };
        written.tried_leaving(ATTEMPTED, &self.request.path, LEFT)?;
        self.at = end;
        Ok(())
    }

    fn check_whole(&self, digest: Digest) -> Result<(), FileError> {
        if self.request.length_bytes.is_some_and(|due| due != self.at) {
            return Err(self.refused(FileErrorKind::Invalid, "end too early"));
        }
        match digest == self.digest.digest() {
            true => Ok(()),
            false => Err(self.refused(FileErrorKind::Damaged, ATTEMPTED)),
        }
    }

    fn refused(&self, kind: FileErrorKind, attempted: &str) -> FileError {
        refused(kind, attempted, &self.request.path, LEFT)
    }

    fn publish(self) -> Result<(), FileError> {
        let request = self.request;
        let synced = match request.durability {
            Durability::Now => Synced::Now,
            Durability::WithSync => Synced::Later,
        };
        self.incoming
            .publish(
                self.at,
                &as_attributes(&request.attributes),
                existing(request.replace),
                synced,
            )
            .tried_leaving(ATTEMPTED, &request.path, LEFT)
    }
}
