//! What a message about files must keep to, checked by its receiver before anything is done.

use crate::message::Bytes;

use super::error::MAX_TEXT_BYTES;
use super::{
    Chunk, Content, DigestRequest, Entry, FileAttributes, FileInput, FileReply, FileRequest,
    FileTime, MAX_BLOCK_BYTES, MAX_DATA_BYTES, MAX_FILE_BYTES, MAX_NAME_BYTES, MAX_PAGE_DIGESTS,
    MAX_PAGE_ENTRIES, MAX_PAGE_NAME_BYTES, MAX_PATH_BYTES, MIN_BLOCK_BYTES, Metadata, ReadRequest,
    WriteRequest,
};

/// What is wrong with a message about files.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Bytes that hold no message.
    #[error("bytes that are no message about files: {0}")]
    Encoding(postcard::Error),
    /// A message with more behind it.
    #[error("{bytes} bytes behind a message about files")]
    Excess {
        /// How many.
        bytes: usize,
    },
    /// A path that is not absolute, has a NUL or is too long.
    #[error("{0:?} is no absolute path of at most {MAX_PATH_BYTES} bytes without NUL")]
    Path(Bytes),
    /// What a link says is empty, has a NUL or is too long.
    #[error("{0:?} cannot be what a symlink says")]
    Link(Bytes),
    /// A name that is not one component.
    #[error("{0:?} is no name in a folder")]
    Name(Bytes),
    /// A number beyond its bounds.
    #[error("{what} of {found}, where {least} to {most} is allowed")]
    Number {
        /// What it counts.
        what: &'static str,
        /// What was found.
        found: u64,
        /// The least that is allowed.
        least: u64,
        /// The most that is allowed.
        most: u64,
    },
}

/// Whether bytes are a name in a folder: one component, neither `.` nor `..`.
#[must_use]
pub fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME_BYTES
        && name != b"."
        && name != b".."
        && name.iter().all(|byte| *byte != b'/' && *byte != 0)
}

fn path(path: &Bytes) -> Result<(), Malformed> {
    let bytes = &path.0;
    match bytes.first() == Some(&b'/') && bytes.len() <= MAX_PATH_BYTES && !bytes.contains(&0) {
        true => Ok(()),
        false => Err(Malformed::Path(path.clone())),
    }
}

fn link(target: &Bytes) -> Result<(), Malformed> {
    let bytes = &target.0;
    match !bytes.is_empty() && bytes.len() <= MAX_PATH_BYTES && !bytes.contains(&0) {
        true => Ok(()),
        false => Err(Malformed::Link(target.clone())),
    }
}

fn number(what: &'static str, found: u64, least: u64, most: u64) -> Result<(), Malformed> {
    match (least..=most).contains(&found) {
        true => Ok(()),
        false => Err(Malformed::Number {
            what,
            found,
            least,
            most,
        }),
    }
}

fn count(what: &'static str, found: usize, most: usize) -> Result<(), Malformed> {
    number(what, found as u64, 0, most as u64)
}

fn mode(mode: u32) -> Result<(), Malformed> {
    number("permission bits", u64::from(mode), 0, 0o7777)
}

fn time(time: FileTime) -> Result<(), Malformed> {
    let nanoseconds = u64::from(time.nanoseconds);
    number("nanoseconds", nanoseconds, 0, 999_999_999)
}

fn attributes(attributes: &FileAttributes) -> Result<(), Malformed> {
    attributes.mode.map_or(Ok(()), mode)?;
    attributes.modified.map_or(Ok(()), time)
}

fn metadata(metadata: &Metadata) -> Result<(), Malformed> {
    mode(metadata.mode)?;
    number("length in bytes", metadata.length_bytes, 0, MAX_FILE_BYTES)?;
    time(metadata.modified)
}

fn chunk(chunk: &Chunk) -> Result<(), Malformed> {
    match &chunk.content {
        Content::Data(data) => number(
            "chunk in bytes",
            data.0.len() as u64,
            1,
            MAX_DATA_BYTES as u64,
        )?,
        Content::Hole(length_bytes) => number("hole in bytes", *length_bytes, 1, MAX_FILE_BYTES)?,
    }
    let end = chunk.offset_bytes.saturating_add(chunk.length_bytes());
    number("end of a chunk in bytes", end, 1, MAX_FILE_BYTES)
}

fn entries(entries: &[Entry]) -> Result<(), Malformed> {
    count("entries of a page", entries.len(), MAX_PAGE_ENTRIES)?;
    let name_bytes = entries.iter().map(|entry| entry.name.0.len()).sum();
    count("bytes of a page's names", name_bytes, MAX_PAGE_NAME_BYTES)?;
    for entry in entries {
        if !is_name(&entry.name.0) {
            return Err(Malformed::Name(entry.name.clone()));
        }
        metadata(&entry.metadata)?;
    }
    Ok(())
}

impl WriteRequest {
    fn check(&self) -> Result<(), Malformed> {
        path(&self.path)?;
        let most = self.length_bytes.unwrap_or(MAX_FILE_BYTES);
        number("length in bytes", most, 0, MAX_FILE_BYTES)?;
        number("resumption in bytes", self.resume_from_bytes, 0, most)?;
        attributes(&self.attributes)
    }
}

impl ReadRequest {
    fn check(&self) -> Result<(), Malformed> {
        path(&self.path)?;
        number("offset in bytes", self.offset_bytes, 0, MAX_FILE_BYTES)
    }
}

impl DigestRequest {
    fn check(&self) -> Result<(), Malformed> {
        path(&self.path)?;
        let (least, most) = (u64::from(MIN_BLOCK_BYTES), u64::from(MAX_BLOCK_BYTES));
        let block_bytes = u64::from(self.block_bytes);
        number("block in bytes", block_bytes, least, most)?;
        let start = self.first_block.saturating_mul(block_bytes);
        number("first block in bytes", start, 0, MAX_FILE_BYTES)
    }
}

impl FileRequest {
    /// Checks all that can be without looking at files.
    ///
    /// # Errors
    /// [`Malformed`] says what the protocol does not allow.
    pub fn check(&self) -> Result<(), Malformed> {
        match self {
            Self::Stat { path: at, .. }
            | Self::List { path: at, .. }
            | Self::Remove { path: at, .. }
            | Self::ReadLink { path: at }
            | Self::Sync { path: at } => path(at),
            Self::Mkdir {
                path: at,
                mode: bits,
                ..
            } => path(at).and_then(|()| mode(*bits)),
            Self::Rename { from, to, .. } => path(from).and_then(|()| path(to)),
            Self::Symlink {
                path: at, target, ..
            } => path(at).and_then(|()| link(target)),
            Self::Read(request) => request.check(),
            Self::Write(request) => request.check(),
            Self::SetAttributes {
                path: at,
                attributes: set,
            } => path(at).and_then(|()| attributes(set)),
            Self::Digest(request) => request.check(),
        }
    }
}

impl FileInput {
    /// Checks all that can be without knowing the transfer.
    ///
    /// # Errors
    /// [`Malformed`] says what the protocol does not allow.
    pub fn check(&self) -> Result<(), Malformed> {
        match self {
            Self::Chunk(next) => chunk(next),
            Self::End { .. } => Ok(()),
        }
    }
}

impl FileReply {
    /// Checks all that can be without knowing the request: the guest may be hostile.
    ///
    /// # Errors
    /// [`Malformed`] says what the protocol does not allow.
    pub fn check(&self) -> Result<(), Malformed> {
        match self {
            Self::Failed(error) => {
                let text_bytes = error.attempted.len().saturating_add(error.left.len());
                count("bytes of an error", text_bytes, 2 * MAX_TEXT_BYTES)
            }
            Self::Done | Self::ReadEnds { .. } | Self::WriteBegins => Ok(()),
            Self::Stat(found) => metadata(found),
            Self::Link(target) => link(target),
            Self::Entries { entries: all, .. } => entries(all),
            Self::Digests { digests, .. } => {
                count("digests of a page", digests.len(), MAX_PAGE_DIGESTS)
            }
            Self::ReadBegins {
                metadata: found,
                length_bytes,
            } => {
                metadata(found)?;
                let length_bytes = length_bytes.unwrap_or(0);
                number("length in bytes", length_bytes, 0, MAX_FILE_BYTES)
            }
            Self::Chunk(next) => chunk(next),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_is_one_component_and_nothing_that_leads_elsewhere() {
        for good in ["a", "..a", "...", "-", " ", "a\nb", "é"] {
            assert!(is_name(good.as_bytes()), "{good:?}");
        }
        let long = "x".repeat(256);
        for bad in ["", ".", "..", "a/b", "/", "a\0", "../a", long.as_str()] {
            assert!(!is_name(bad.as_bytes()), "{bad:?}");
        }
    }

    #[test]
    fn paths_that_are_not_absolute_or_hold_nul_are_refused() {
        let long = "/".repeat(MAX_PATH_BYTES + 1);
        for bad in ["", "etc", "../x", "/a\0b", long.as_str()] {
            let stat = FileRequest::Stat {
                path: bad.into(),
                follow: false,
            };
            assert!(stat.check().is_err(), "{bad:?}");
            let rename = FileRequest::Rename {
                from: "/a".into(),
                to: bad.into(),
                replace: super::super::Replace::Yes,
            };
            assert!(rename.check().is_err(), "{bad:?}");
        }
        let longest = "/".repeat(MAX_PATH_BYTES);
        let list = FileRequest::List {
            path: longest.as_str().into(),
            follow: false,
        };
        list.check().expect("allowed");
    }

    #[test]
    fn a_chunk_that_is_empty_too_large_or_ends_beyond_a_file_is_refused() {
        let of = |offset_bytes, content| {
            FileInput::Chunk(Chunk {
                offset_bytes,
                content,
            })
            .check()
        };
        let data = |length: usize| Content::Data(vec![1; length].into());
        of(0, data(MAX_DATA_BYTES)).expect("a full chunk");
        of(0, Content::Hole(MAX_FILE_BYTES)).expect("a file that is one hole");
        assert!(of(0, data(0)).is_err());
        assert!(of(0, data(MAX_DATA_BYTES + 1)).is_err());
        assert!(of(0, Content::Hole(0)).is_err());
        assert!(of(1, Content::Hole(MAX_FILE_BYTES)).is_err());
        assert!(of(u64::MAX, data(1)).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_something_that_is_checked_or_to_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(request) = FileRequest::decode(&bytes) {
                prop_assert_eq!(FileRequest::decode(&request.encode()), Ok(request));
            }
            if let Ok(FileInput::Chunk(chunk)) = FileInput::decode(&bytes) {
                prop_assert!(chunk.offset_bytes + chunk.length_bytes() <= MAX_FILE_BYTES);
            }
            if let Ok(reply) = FileReply::decode(&bytes) {
                prop_assert_eq!(FileReply::decode(&reply.encode()), Ok(reply));
            }
        }
    }

    #[test]
    fn a_byte_behind_a_message_is_refused() {
        let mut bytes = FileReply::Done.encode();
        FileReply::decode(&bytes).expect("as it was");
        bytes.push(0);
        assert_eq!(
            FileReply::decode(&bytes),
            Err(Malformed::Excess { bytes: 1 })
        );
    }

    #[test]
    fn the_fullest_message_is_no_longer_than_a_stream_takes() {
        let metadata = Metadata {
            kind: super::super::FileKind::BlockDevice,
            mode: 0o7777,
            owner: super::super::Owner {
                uid: u32::MAX,
                gid: u32::MAX,
            },
            length_bytes: u64::MAX,
            allocated_bytes: u64::MAX,
            links: u64::MAX,
            modified: FileTime {
                seconds: i64::MIN,
                nanoseconds: 999_999_999,
            },
        };
        let entry = Entry {
            name: vec![b'n'; MAX_PAGE_NAME_BYTES / MAX_PAGE_ENTRIES].into(),
            metadata,
        };
        let page = FileReply::Entries {
            entries: vec![entry; MAX_PAGE_ENTRIES],
            last: false,
        };
        let digests = FileReply::Digests {
            digests: vec![[255; 32]; MAX_PAGE_DIGESTS],
            last: false,
        };
        let chunk = Chunk {
            offset_bytes: MAX_FILE_BYTES,
            content: Content::Data(vec![1; MAX_DATA_BYTES].into()),
        };
        for reply in [page, digests, FileReply::Chunk(chunk)] {
            assert!(reply.is_data());
            assert!(reply.encode().len() <= crate::flow::MAX_CHUNK_BYTES);
        }
    }
}
