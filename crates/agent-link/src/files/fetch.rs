//! One file from the guest.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use stead_agent_proto::files::{
    Chunk, ChunkDigest, Content, FileErrorKind, FileKind, FileReply, FileRequest, HashKind,
    MAX_UNSIZED_BYTES, Metadata, ReadRequest, partial_name,
};
use stead_agent_proto::message::Bytes;
use stead_sys::durable::Existing;
use stead_sys::folder::{Attributes, Folder};
use stead_sys::incoming::{Incoming, Synced};

use super::blocks::{BLOCK_BYTES, equal_bytes, transfer};
use super::error::{CopyError, Locally};
use super::guest::{Doing, Guest};
use super::progress::Tally;

/// Reads a file or a part of it. Each chunk is checked: it begins where the one before ended, and no more comes than was
/// announced. That all of it is right is known when this returns.
pub(super) fn read(
    guest: &mut Guest<'_>,
    request: ReadRequest,
    begun: &mut dyn FnMut(&Metadata) -> Result<(), CopyError>,
    sink: &mut dyn FnMut(&Chunk) -> Result<(), CopyError>,
) -> Result<Metadata, CopyError> {
    let (path, start, hash) = (request.path.clone(), request.offset_bytes, request.hash);
    let (attempted, path) = ("read", &path);
    let doing = Doing { attempted, path };
    guest.request(doing, FileRequest::Read(request))?;
    let reply = guest.receive(doing)?;
    let FileReply::ReadBegins {
        metadata,
        length_bytes: announced,
    } = reply
    else {
        return Err(doing.unexpected(reply.name()));
    };
    begun(&metadata)?;
    let most = start.saturating_add(announced.unwrap_or(MAX_UNSIZED_BYTES));
    let (mut at, mut own) = (start, ChunkDigest::new(hash));
    let digest = loop {
        let reply = guest.receive(doing)?;
        let name = reply.name();
        if let FileReply::ReadEnds { digest } = reply {
            break digest;
        }
        let FileReply::Chunk(chunk) = reply else {
            return Err(doing.unexpected(name));
        };
        let end = chunk.offset_bytes.saturating_add(chunk.length_bytes());
        if chunk.offset_bytes != at || end > most {
            let offset = chunk.offset_bytes;
            let found = format!("a chunk from {offset} to {end} where {at} to {most} was due");
            return Err(doing.protocol(found));
        }
        own.add(&chunk);
        sink(&chunk)?;
        at = end;
    };
    if announced.is_some() && at != most {
        return Err(doing.protocol(format!("the end at {at} where {most} was announced")));
    }
    match digest == own.digest() {
        true => Ok(metadata),
        false => Err(CopyError::Damaged { path: path.clone() }),
    }
}

/// Where a file goes on the host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) folder: &'a Folder,
    pub(super) name: &'a OsStr,
    /// For errors only.
    pub(super) path: &'a Path,
}

/// What a file is fetched as.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fetch<'a> {
    pub(super) path: &'a Bytes,
    pub(super) follow: bool,
    pub(super) metadata: Metadata,
    pub(super) attributes: Attributes,
    pub(super) hash: HashKind,
    pub(super) synced: Synced,
}

/// Fetches a file into a folder of the host; goes on with what there is of it.
pub(super) fn file(
    guest: &mut Guest<'_>,
    fetch: Fetch<'_>,
    to: Place<'_>,
    tally: &mut Tally<'_, '_>,
) -> Result<(), CopyError> {
    let partial = partial_name(name_of(&fetch));
    let partial = OsStr::new(&partial);
    let kept = kept_bytes(guest, &fetch, to, partial)?;
    let incoming = Incoming::begin(to.folder, to.name, partial, kept).locally("write", to.path)?;
    tally.resume(kept);
    let request = ReadRequest {
        path: fetch.path.clone(),
        follow: fetch.follow,
        offset_bytes: kept,
        length_bytes: u64::MAX,
        hash: fetch.hash,
    };
    let mut end = kept;
    let read = read(
        guest,
        request,
        &mut |found| same(&fetch, found),
        &mut |chunk| {
            tally.pass(&chunk.content)?;
            end = chunk.offset_bytes + chunk.length_bytes();
            match &chunk.content {
                Content::Data(data) => incoming
                    .file()
                    .write_all_at(&data.0, chunk.offset_bytes)
                    .locally("write", to.path),
                Content::Hole(_) => Ok(()),
            }
        },
    );
    match read {
        Ok(_) => incoming
            .publish(end, &fetch.attributes, Existing::Replace, fetch.synced)
            .locally("write", to.path),
        Err(error) => {
            if !keeps_partial(&error) {
                incoming
                    .abandon()
                    .locally("remove the partial file of", to.path)?;
            }
            Err(error)
        }
    }
}

/// What came so far is right when nothing but the connection, or the wish to go on, ended it.
fn keeps_partial(error: &CopyError) -> bool {
    error.is_broken_channel() || matches!(error, CopyError::Interrupted)
}

/// The file is still the one that was listed.
fn same(fetch: &Fetch<'_>, found: &Metadata) -> Result<(), CopyError> {
    let (listed, path) = (&fetch.metadata, fetch.path);
    let same = found.kind == FileKind::File
        && found.length_bytes == listed.length_bytes
        && found.modified == listed.modified;
    match same {
        true => Ok(()),
        false => Err(CopyError::GuestChanged { path: path.clone() }),
    }
}

fn name_of(fetch: &Fetch<'_>) -> stead_agent_proto::files::TransferId {
    let metadata = &fetch.metadata;
    transfer(&[
        b"fetch",
        &fetch.path.0,
        &metadata.length_bytes.to_le_bytes(),
        &metadata.modified.seconds.to_le_bytes(),
        &metadata.modified.nanoseconds.to_le_bytes(),
    ])
}

/// How much of the file an earlier, interrupted transfer has left here.
fn kept_bytes(
    guest: &mut Guest<'_>,
    fetch: &Fetch<'_>,
    to: Place<'_>,
    partial: &OsStr,
) -> Result<u64, CopyError> {
    let file = match to.folder.file(partial) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error).locally("read the partial file of", to.path),
    };
    let found = file
        .metadata()
        .locally("examine the partial file of", to.path)?;
    if !found.is_file() || found.len() < u64::from(BLOCK_BYTES) {
        return Ok(0);
    }
    // A symlink that is followed is not digested through.
    if fetch.follow && guest.stat(fetch.path, false)?.kind == FileKind::Symlink {
        return Ok(0);
    }
    match equal_bytes(guest, fetch.path, file, to.path, found.len()) {
        Err(CopyError::Guest(error)) if error.kind == FileErrorKind::NotFound => {
            Err(CopyError::GuestChanged {
                path: fetch.path.clone(),
            })
        }
        other => other,
    }
}
