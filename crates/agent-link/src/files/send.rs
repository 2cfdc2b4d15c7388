//! One file to the guest.

use std::fs::File;
use std::io;
use std::path::Path;

use stead_agent_proto::files::{
    Chunk, ChunkDigest, Content, Digest, FileErrorKind, FileInput, FileReply, FileRequest,
    MAX_DATA_BYTES, TransferId, WriteRequest, partial_name,
};
use stead_agent_proto::message::Bytes;
use stead_sys::pieces::{Piece, Pieces};

use super::blocks::{BLOCK_BYTES, equal_bytes};
use super::error::{CopyError, Locally};
use super::guest::{Doing, Guest};
use super::progress::Tally;

/// Asks to write and waits until the chunks may come.
pub(super) fn begin(
    guest: &mut Guest<'_>,
    doing: Doing<'_>,
    request: WriteRequest,
) -> Result<(), CopyError> {
    guest.request(doing, FileRequest::Write(request))?;
    let reply = guest.receive(doing)?;
    match reply == FileReply::WriteBegins {
        true => Ok(()),
        false => Err(doing.unexpected(reply.name())),
    }
}

/// Sends a chunk.
pub(super) fn send(
    guest: &mut Guest<'_>,
    doing: Doing<'_>,
    offset_bytes: u64,
    content: Content,
    digest: &mut ChunkDigest,
) -> Result<(), CopyError> {
    let chunk = Chunk {
        offset_bytes,
        content,
    };
    digest.add(&chunk);
    guest.send(doing, FileInput::Chunk(chunk))
}

/// Has the file appear.
pub(super) fn finish(
    guest: &mut Guest<'_>,
    doing: Doing<'_>,
    digest: Digest,
) -> Result<(), CopyError> {
    guest.send_last(doing, FileInput::End { digest })?;
    let reply = guest.receive(doing)?;
    match reply == FileReply::Done {
        true => Ok(()),
        false => Err(doing.unexpected(reply.name())),
    }
}

/// Reads until the buffer is full or the source ends.
pub(super) fn fill(
    source: &mut dyn io::Read,
    buffer: &mut [u8],
    doing: Doing<'_>,
) -> Result<usize, CopyError> {
    let mut length = 0;
    while length < buffer.len() {
        match source.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                let path = String::from_utf8_lossy(&doing.path.0).into_owned();
                return Err(error).locally("read what is to become", path);
            }
        }
    }
    Ok(length)
}

/// Sends a file of the host; goes on with what the guest has of it.
pub(super) fn file(
    guest: &mut Guest<'_>,
    file: File,
    local_path: &Path,
    request: WriteRequest,
    tally: &mut Tally<'_, '_>,
) -> Result<(), CopyError> {
    let partial = partial_path(&request.path, request.transfer);
    let sent = content(guest, file, local_path, request, tally);
    if matches!(sent, Err(CopyError::LocalChanged { .. })) {
        // Nobody will go on with it.
        guest.remove(&partial, false)?;
    }
    sent
}

fn content(
    guest: &mut Guest<'_>,
    file: File,
    local_path: &Path,
    mut request: WriteRequest,
    tally: &mut Tally<'_, '_>,
) -> Result<(), CopyError> {
    let path = request.path.clone();
    let (attempted, path) = ("write", &path);
    let doing = Doing { attempted, path };
    let (hash, length_bytes) = (request.hash, request.length_bytes.unwrap_or(0));
    let kept = kept_bytes(guest, &file, local_path, &request, length_bytes)?;
    request.resume_from_bytes = kept;
    let mut pieces = Pieces::new(file, kept, length_bytes).locally("read", local_path)?;
    begin(guest, doing, request)?;
    tally.resume(kept);
    let mut digest = ChunkDigest::new(hash);
    let mut buffer = vec![0; MAX_DATA_BYTES];
    loop {
        let at = pieces.at();
        let content = match pieces.next(&mut buffer, u64::MAX) {
            Ok(None) => break,
            Ok(Some(Piece::Data(length))) => Content::Data(buffer[..length].into()),
            Ok(Some(Piece::Hole(length))) => Content::Hole(length),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(changed(local_path));
            }
            Err(error) => return Err(error).locally("read", local_path),
        };
        tally.pass(&content)?;
        send(guest, doing, at, content, &mut digest)?;
    }
    let whole = pieces.at() == length_bytes;
    if !whole || !pieces.stood_still().locally("examine", local_path)? {
        return Err(changed(local_path));
    }
    finish(guest, doing, digest.digest())
}

fn changed(local_path: &Path) -> CopyError {
    CopyError::LocalChanged {
        path: local_path.to_owned(),
    }
}

/// How much of the file the guest has kept of an earlier, interrupted transfer.
fn kept_bytes(
    guest: &mut Guest<'_>,
    file: &File,
    local_path: &Path,
    request: &WriteRequest,
    length_bytes: u64,
) -> Result<u64, CopyError> {
    // A short file is sent again sooner than it is asked for.
    if length_bytes < 4 * u64::from(BLOCK_BYTES) {
        return Ok(0);
    }
    let partial = partial_path(&request.path, request.transfer);
    let own = file.try_clone().locally("read", local_path)?;
    match equal_bytes(guest, &partial, own, local_path, length_bytes) {
        Err(CopyError::Guest(error)) if error.kind == FileErrorKind::NotFound => Ok(0),
        other => other,
    }
}

/// Where the guest keeps the partial file of a transfer.
fn partial_path(path: &Bytes, transfer: TransferId) -> Bytes {
    let bytes = &path.0;
    let trimmed = bytes.len() - bytes.iter().rev().take_while(|byte| **byte == b'/').count();
    let folder = bytes[..trimmed].iter().rposition(|byte| *byte == b'/');
    let mut partial = bytes[..folder.map_or(0, |at| at + 1)].to_vec();
    partial.extend_from_slice(partial_name(transfer).as_bytes());
    partial.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_file_lies_beside_its_target() {
        let id = TransferId([0xab; 16]);
        let name = partial_name(id);
        for (path, folder) in [("/a", "/"), ("/a/b", "/a/"), ("/a/b//", "/a/")] {
            let partial = partial_path(&path.into(), id);
            assert_eq!(partial, format!("{folder}{name}").as_str().into(), "{path}");
        }
    }
}
