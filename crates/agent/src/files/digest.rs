//! Digests of a file's blocks.

use stead_agent_proto::files::{
    BlockDigests, DigestRequest, FileError, FileReply, MAX_PAGE_DIGESTS,
};
use stead_agent_proto::message::Bytes;
use stead_sys::pieces::{Piece, Pieces};

use super::error::Tried;
use super::read::open_file;

const ATTEMPTED: &str = "digest";
/// After hashing so many bytes, a page is sent though it is not full.
const PAGE_WORK_BYTES: u64 = 4 * 1024 * 1024;
const BUFFER_BYTES: usize = 64 * 1024;

/// A file that is being digested.
#[derive(Debug)]
pub(super) struct Digesting {
    path: Bytes,
    pieces: Pieces,
    blocks: BlockDigests,
    buffer: Vec<u8>,
}

impl Digesting {
    pub(super) fn begin(request: &DigestRequest) -> Result<Self, FileError> {
        let path = request.path.clone();
        let file = open_file(ATTEMPTED, &path, false)?;
        let block_bytes = u64::from(request.block_bytes);
        let start = request.first_block.saturating_mul(block_bytes);
        let end = start.saturating_add(request.count.saturating_mul(block_bytes));
        let pieces = Pieces::new(file, start, end).tried(ATTEMPTED, &path)?;
        Ok(Self {
            path,
            pieces,
            blocks: BlockDigests::new(request.block_bytes),
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    /// The next page, of one digest at least unless it is the last.
    pub(super) fn next(&mut self) -> Result<FileReply, FileError> {
        let mut digests = Vec::new();
        let mut hashed_bytes = 0;
        while digests.len() < MAX_PAGE_DIGESTS
            && (digests.is_empty() || hashed_bytes < PAGE_WORK_BYTES)
        {
            let room = self.blocks.room_bytes();
            let want = usize::try_from(room).map_or(BUFFER_BYTES, |room| room.min(BUFFER_BYTES));
            let piece = self
                .pieces
                .next(&mut self.buffer[..want], room)
                .tried(ATTEMPTED, &self.path)?;
            let full = match piece {
                Some(Piece::Data(length)) => {
                    hashed_bytes += length as u64;
                    self.blocks.data(&self.buffer[..length])
                }
                Some(Piece::Hole(length)) => self.blocks.hole(length),
                None => {
                    digests.extend(self.blocks.last());
                    let last = true;
                    return Ok(FileReply::Digests { digests, last });
                }
            };
            digests.extend(full);
        }
        let last = false;
        Ok(FileReply::Digests { digests, last })
    }
}
