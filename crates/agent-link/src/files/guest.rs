//! The guest's files, one operation a call. Every answer is checked before it is used.

use stead_agent_proto::files::{
    ChunkDigest, Content, DigestRequest, Durability, Entry, FileAttributes, FileInput, FileReply,
    FileRequest, HashKind, MAX_DATA_BYTES, MAX_PAGE_DIGESTS, Metadata, ReadRequest, Replace,
    WriteRequest,
};
use stead_agent_proto::message::Bytes;

use super::channel::FileChannel;
use super::error::CopyError;

/// How many entries one folder may have.
pub const MAX_FOLDER_ENTRIES: usize = 1 << 22;

/// The files of one guest.
pub struct Guest<'a> {
    channel: &'a mut dyn FileChannel,
}

impl std::fmt::Debug for Guest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Guest")
    }
}

/// What is done, for errors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Doing<'a> {
    pub(super) attempted: &'static str,
    pub(super) path: &'a Bytes,
}

impl Doing<'_> {
    pub(super) fn unexpected(&self, reply: &'static str) -> CopyError {
        self.protocol(format!("its reply {reply:?} has no place here"))
    }

    pub(super) fn protocol(&self, found: impl Into<String>) -> CopyError {
        CopyError::Protocol {
            attempted: self.attempted,
            path: self.path.clone(),
            found: found.into(),
        }
    }

    fn broken(&self) -> impl FnOnce(super::ChannelError) -> CopyError {
        let (attempted, path) = (self.attempted, self.path.clone());
        move |source| CopyError::Channel {
            attempted,
            path,
            source,
        }
    }

    fn checked(&self, reply: FileReply) -> Result<FileReply, CopyError> {
        if let Err(found) = reply.check() {
            return Err(CopyError::malformed(self.attempted, self.path, &found));
        }
        if let FileReply::Failed(error) = reply {
            return Err(CopyError::Guest(error));
        }
        Ok(reply)
    }
}

impl<'a> Guest<'a> {
    /// The files of the guest at the other end.
    pub fn new(channel: &'a mut dyn FileChannel) -> Self {
        Self { channel }
    }

    pub(super) fn request(
        &mut self,
        doing: Doing<'_>,
        request: FileRequest,
    ) -> Result<(), CopyError> {
        if let Err(found) = request.check() {
            return Err(CopyError::malformed(doing.attempted, doing.path, &found));
        }
        self.channel.request(request).map_err(doing.broken())
    }

    pub(super) fn receive(&mut self, doing: Doing<'_>) -> Result<FileReply, CopyError> {
        let reply = self.channel.receive().map_err(doing.broken())?;
        doing.checked(reply)
    }

    /// Sends what a write takes, unless the guest has ended it.
    pub(super) fn send(&mut self, doing: Doing<'_>, input: FileInput) -> Result<(), CopyError> {
        self.channel.send(input).map_err(doing.broken())?;
        match self.channel.poll().map_err(doing.broken())? {
            None => Ok(()),
            Some(reply) => Err(doing.unexpected(doing.checked(reply)?.name())),
        }
    }

    /// Sends what ends a write. The answer may be there at once, so it is not looked for.
    pub(super) fn send_last(
        &mut self,
        doing: Doing<'_>,
        input: FileInput,
    ) -> Result<(), CopyError> {
        self.channel.send(input).map_err(doing.broken())
    }

    fn ask(&mut self, doing: Doing<'_>, request: FileRequest) -> Result<FileReply, CopyError> {
        self.request(doing, request)?;
        self.receive(doing)
    }

    fn tell(&mut self, doing: Doing<'_>, request: FileRequest) -> Result<(), CopyError> {
        let reply = self.ask(doing, request)?;
        let name = reply.name();
        let FileReply::Done = reply else {
            return Err(doing.unexpected(name));
        };
        Ok(())
    }

    /// What a path stands for.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when it is not there.
    pub fn stat(&mut self, path: &Bytes, follow: bool) -> Result<Metadata, CopyError> {
        let attempted = "examine";
        let doing = Doing { attempted, path };
        let request = FileRequest::Stat {
            path: path.clone(),
            follow,
        };
        let reply = self.ask(doing, request)?;
        let name = reply.name();
        let FileReply::Stat(metadata) = reply else {
            return Err(doing.unexpected(name));
        };
        Ok(metadata)
    }

    /// What is in a folder, page by page, in no order, until `page` says that it is enough. Whether it came to the end.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when it is no folder; [`CopyError::Limit`] when it has more than [`MAX_FOLDER_ENTRIES`].
    pub fn list(
        &mut self,
        path: &Bytes,
        follow: bool,
        page: &mut dyn FnMut(Vec<Entry>) -> bool,
    ) -> Result<bool, CopyError> {
        let attempted = "list";
        let doing = Doing { attempted, path };
        let path = path.clone();
        self.request(doing, FileRequest::List { path, follow })?;
        let mut count = 0;
        loop {
            let reply = self.receive(doing)?;
            let name = reply.name();
            let FileReply::Entries { entries, last } = reply else {
                return Err(doing.unexpected(name));
            };
            if entries.is_empty() && !last {
                return Err(doing.protocol("an empty page that is not the last"));
            }
            count += entries.len();
            if count > MAX_FOLDER_ENTRIES {
                return Err(CopyError::Limit {
                    path: doing.path.clone(),
                    what: "the number of entries of a folder",
                    limit: MAX_FOLDER_ENTRIES as u64,
                });
            }
            if !page(entries) || last {
                return Ok(last);
            }
        }
    }

    /// Makes a folder.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when it cannot be made, or is there and `parents` is not asked for.
    pub fn make_folder(&mut self, path: &Bytes, parents: bool, mode: u32) -> Result<(), CopyError> {
        let attempted = "make the folder";
        let request = FileRequest::Mkdir {
            path: path.clone(),
            parents,
            mode,
        };
        self.tell(Doing { attempted, path }, request)
    }

    /// Removes a name, with `recursive` a folder with all that is in it.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when it cannot be removed.
    pub fn remove(&mut self, path: &Bytes, recursive: bool) -> Result<(), CopyError> {
        let attempted = "remove";
        let request = FileRequest::Remove {
            path: path.clone(),
            recursive,
        };
        self.tell(Doing { attempted, path }, request)
    }

    /// Gives a file or folder another name in one step.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when it cannot be renamed.
    pub fn rename(&mut self, from: &Bytes, to: &Bytes, replace: Replace) -> Result<(), CopyError> {
        let attempted = "rename";
        let request = FileRequest::Rename {
            from: from.clone(),
            to: to.clone(),
            replace,
        };
        let path = from;
        self.tell(Doing { attempted, path }, request)
    }

    /// Makes a symlink.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when it cannot be made.
    pub fn make_link(
        &mut self,
        path: &Bytes,
        target: &Bytes,
        replace: Replace,
    ) -> Result<(), CopyError> {
        let attempted = "make the symlink";
        let request = FileRequest::Symlink {
            path: path.clone(),
            target: target.clone(),
            replace,
        };
        self.tell(Doing { attempted, path }, request)
    }

    /// What a symlink says.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when it is none.
    pub fn read_link(&mut self, path: &Bytes) -> Result<Bytes, CopyError> {
        let attempted = "read the symlink";
        let doing = Doing { attempted, path };
        let reply = self.ask(doing, FileRequest::ReadLink { path: path.clone() })?;
        let name = reply.name();
        let FileReply::Link(target) = reply else {
            return Err(doing.unexpected(name));
        };
        Ok(target)
    }

    /// Gives a file attributes; a symlink is given them itself.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when one is refused.
    pub fn set_attributes(
        &mut self,
        path: &Bytes,
        attributes: FileAttributes,
    ) -> Result<(), CopyError> {
        let attempted = "give attributes to";
        let request = FileRequest::SetAttributes {
            path: path.clone(),
            attributes,
        };
        self.tell(Doing { attempted, path }, request)
    }

    /// Has the guest write its file systems to their disks.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when that of `path` cannot be.
    pub fn sync(&mut self, path: &Bytes) -> Result<(), CopyError> {
        let attempted = "sync the file system of";
        let path_sent = path.clone();
        self.tell(
            Doing { attempted, path },
            FileRequest::Sync { path: path_sent },
        )
    }

    /// Digests of a file's blocks, one after the other, until `take` says that it is enough.
    pub(super) fn digests(
        &mut self,
        request: DigestRequest,
        take: &mut dyn FnMut([u8; 32]) -> Result<bool, CopyError>,
    ) -> Result<(), CopyError> {
        let (attempted, path, mut left) = ("digest", request.path.clone(), request.count);
        let path = &path;
        let doing = Doing { attempted, path };
        self.request(doing, FileRequest::Digest(request))?;
        loop {
            let reply = self.receive(doing)?;
            let name = reply.name();
            let FileReply::Digests { digests, last } = reply else {
                return Err(doing.unexpected(name));
            };
            assert!(digests.len() <= MAX_PAGE_DIGESTS, "the reply was checked");
            left = match left.checked_sub(digests.len() as u64) {
                Some(left) if last || !digests.is_empty() => left,
                Some(_) | None => return Err(doing.protocol("more digests than were asked for")),
            };
            for digest in digests {
                if !take(digest)? {
                    return Ok(());
                }
            }
            if last {
                return Ok(());
            }
        }
    }

    /// Passes a file's content on, from its beginning to its end; `sink` gets data and the lengths of holes. What it got is
    /// known to be whole only when this returns.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when it cannot be read or changes meanwhile; [`CopyError::Damaged`]; what `sink` gives.
    pub fn read(
        &mut self,
        path: &Bytes,
        sink: &mut dyn FnMut(&Content) -> Result<(), CopyError>,
    ) -> Result<Metadata, CopyError> {
        let request = ReadRequest {
            path: path.clone(),
            follow: true,
            offset_bytes: 0,
            length_bytes: u64::MAX,
            hash: HashKind::Blake3,
        };
        super::fetch::read(self, request, &mut |_| Ok(()), &mut |chunk| {
            sink(&chunk.content)
        })
    }

    /// Writes a file with what `source` reads, to its end. It appears when it is whole.
    ///
    /// # Errors
    /// [`CopyError::Guest`] when it cannot be written, [`CopyError::Local`] when `source` fails; then what had the name
    /// still has it.
    pub fn write(
        &mut self,
        path: &Bytes,
        source: &mut dyn std::io::Read,
        attributes: FileAttributes,
        replace: Replace,
    ) -> Result<u64, CopyError> {
        let attempted = "write";
        let doing = Doing { attempted, path };
        let hash = HashKind::Blake3;
        let request = WriteRequest {
            path: path.clone(),
            transfer: super::blocks::random_transfer(path)?,
            length_bytes: None,
            resume_from_bytes: 0,
            attributes,
            replace,
            durability: Durability::Now,
            hash,
        };
        super::send::begin(self, doing, request)?;
        let mut digest = ChunkDigest::new(hash);
        let mut at = 0;
        let mut buffer = vec![0; MAX_DATA_BYTES];
        loop {
            let length = super::send::fill(source, &mut buffer, doing)?;
            if length == 0 {
                super::send::finish(self, doing, digest.digest())?;
                return Ok(at);
            }
            let content = Content::Data(buffer[..length].into());
            super::send::send(self, doing, at, content, &mut digest)?;
            at += length as u64;
        }
    }
}
