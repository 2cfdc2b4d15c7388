//! How far two halves of an interrupted transfer agree.

use std::fs::File;
use std::path::Path;

use stead_agent_proto::files::{BlockDigests, DigestRequest, TransferId};
use stead_agent_proto::message::Bytes;
use stead_sys::pieces::{Piece, Pieces};

use super::error::{CopyError, Locally};
use super::guest::Guest;

/// The size of the blocks that are compared; what is behind the last equal one is sent again.
pub(super) const BLOCK_BYTES: u32 = 1024 * 1024;
const BUFFER_BYTES: usize = 64 * 1024;

/// The name of a transfer: the same for the same file, place and state of it.
pub(super) fn transfer(parts: &[&[u8]]) -> TransferId {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let mut id = [0; 16];
    id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    TransferId(id)
}

/// The name of a transfer that cannot be gone on with.
pub(super) fn random_transfer(path: &Bytes) -> Result<TransferId, CopyError> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)
        .map_err(std::io::Error::other)
        .locally(
            "get random bytes to write",
            String::from_utf8_lossy(&path.0).as_ref(),
        )?;
    Ok(TransferId(id))
}

/// Digests of the whole blocks at the beginning of a file on the host, one at a time.
struct LocalBlocks {
    pieces: Pieces,
    blocks: BlockDigests,
    buffer: Vec<u8>,
}

impl LocalBlocks {
    fn new(file: File, length_bytes: u64) -> std::io::Result<Self> {
        Ok(Self {
            pieces: Pieces::new(file, 0, length_bytes)?,
            blocks: BlockDigests::new(BLOCK_BYTES),
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    fn next(&mut self) -> std::io::Result<Option<[u8; 32]>> {
        loop {
            let room = self.blocks.room_bytes();
            let want = usize::try_from(room).map_or(BUFFER_BYTES, |room| room.min(BUFFER_BYTES));
            let full = match self.pieces.next(&mut self.buffer[..want], room)? {
                Some(Piece::Data(length)) => self.blocks.data(&self.buffer[..length]),
                Some(Piece::Hole(length)) => self.blocks.hole(length),
                None => return Ok(None),
            };
            if full.is_some() {
                return Ok(full);
            }
        }
    }
}

/// How many bytes at the beginning of a file in the guest and of one on the host are the same, in whole blocks, looking at no more
/// than the first `length_bytes`.
pub(super) fn equal_bytes(
    guest: &mut Guest<'_>,
    path: &Bytes,
    file: File,
    local_path: &Path,
    length_bytes: u64,
) -> Result<u64, CopyError> {
    let count = length_bytes / u64::from(BLOCK_BYTES);
    let mut local = LocalBlocks::new(file, length_bytes).locally("digest", local_path)?;
    let mut equal = 0;
    let request = DigestRequest {
        path: path.clone(),
        block_bytes: BLOCK_BYTES,
        first_block: 0,
        count,
    };
    guest.digests(request, &mut |digest| {
        let same = local.next().locally("digest", local_path)? == Some(digest);
        equal += u64::from(same);
        Ok(same)
    })?;
    assert!(equal <= count, "no more digests come than were asked for");
    Ok(equal * u64::from(BLOCK_BYTES))
}
