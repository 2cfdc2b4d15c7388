//! Opening an image: what it is, and everything before its payload.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use crate::codec;
use crate::error::{Kind, Result, SaveImageError};
use crate::format::Format;
use crate::head::HEAD_BYTES_MAX;
use crate::header::{ByteOrder, HEADER_BYTES, Header, Refused, State};
use crate::record::{DiskContent, Record, Unusable, hex};

/// What a file is, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Something else.
    NotSaveImage,
    /// A save image whose writer has not completed it.
    Incomplete {
        /// When it was last written to.
        since: SystemTime,
    },
    /// A save image of a version that is not known.
    NewerVersion(u32),
    /// A save image that says that it is complete. Only [`SaveImage::verify`] proves it.
    Complete,
}

/// Looks at a file's first bytes.
///
/// # Errors
/// When it cannot be read.
pub fn probe(path: &Path) -> Result<Status> {
    let failed = |source| SaveImageError::io("look at", path, source);
    let file = File::open(path).map_err(failed)?;
    let start = read_start(&file).map_err(failed)?;
    let modified = file.metadata().and_then(|data| data.modified());
    let since = modified.map_err(failed)?;
    Ok(match Header::decode(&start) {
        Ok(header) => match header.state {
            State::Complete => Status::Complete,
            State::Partial => Status::Incomplete { since },
        },
        Err(Refused::NotSaveImage) => Status::NotSaveImage,
        Err(Refused::Short(_) | Refused::Version(State::Partial, _)) => {
            Status::Incomplete { since }
        }
        Err(Refused::Version(State::Complete, version)) => Status::NewerVersion(version),
    })
}

/// The header's bytes, wherever the descriptor stands: whoever hands one over may have read with it.
fn read_start(file: &File) -> io::Result<Vec<u8>> {
    let mut start = vec![0; HEADER_BYTES];
    let mut filled = 0;
    while filled < HEADER_BYTES {
        match file.read_at(&mut start[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    start.truncate(filled);
    Ok(start)
}

/// The record of an image.
#[derive(Debug)]
pub(crate) enum Recorded {
    /// Written by libvirt, or its XML was edited by libvirt.
    Not,
    /// It is there, and the head is as it was.
    Whole(Box<Record>),
    /// It is there, of a version that is not known.
    Newer(u32),
    /// It is there and cannot be believed.
    Damaged(String),
}

/// An open image that says that it is complete. Its payload was not looked at.
#[derive(Debug)]
pub struct SaveImage {
    path: PathBuf,
    file: Arc<File>,
    header: Header,
    format: Format,
    file_bytes: u64,
    xml: String,
    cookie: Option<String>,
    pub(crate) recorded: Recorded,
}

impl SaveImage {
    /// Opens an image for reading, and reads everything before the payload (128 MiB at most).
    ///
    /// # Errors
    /// Each with a kind of its own: the file is no save image, incomplete (and since when), of a newer version,
    /// shorter than it says, damaged; or cannot be read. Nothing is ever written.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|source| SaveImageError::io("open", path, source))?;
        Self::from_file(file, path)
    }

    /// As [`SaveImage::open`], for a file that is open already; `path` is for messages.
    ///
    /// # Errors
    /// As [`SaveImage::open`].
    pub fn from_file(file: File, path: &Path) -> Result<Self> {
        Opening { file: &file, path }.open(&file)
    }

    /// The file's name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How the payload is stored, by the header.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// The domain's XML.
    #[must_use]
    pub fn xml(&self) -> &str {
        &self.xml
    }

    /// libvirt's cookie.
    #[must_use]
    pub fn cookie(&self) -> Option<&str> {
        self.cookie.as_deref()
    }

    /// Whether the VM ran when it was saved.
    #[must_use]
    pub fn was_running(&self) -> bool {
        self.header.was_running != 0
    }

    /// What the disks held, by the record; empty where there is none.
    #[must_use]
    pub fn disks(&self) -> &[DiskContent] {
        match &self.recorded {
            Recorded::Whole(record) => &record.disks,
            Recorded::Not | Recorded::Newer(_) | Recorded::Damaged(_) => &[],
        }
    }

    /// Bytes of the payload as it is stored.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        self.file_bytes - self.header.payload_at()
    }

    /// The payload as it is stored.
    #[must_use]
    pub fn payload(&self) -> Payload {
        Payload {
            file: self.file.clone(),
            start: self.header.payload_at(),
            length: self.payload_bytes(),
            at: 0,
        }
    }

    /// The migration stream, decompressed while it is read. Nothing of it is verified by reading.
    ///
    /// # Errors
    /// When the payload is of another compression than the header says, or sparse.
    pub fn stream(&self) -> Result<Box<dyn Read + Send>> {
        self.check_compression()?;
        let decoder = codec::decoder(self.format, self.payload()).map_err(|source| {
            SaveImageError::new(Kind::Damaged, self.attempt("decompress"), "").because(source)
        })?;
        decoder.ok_or_else(|| {
            let found = "its pages lie at fixed places (sparse), which is no stream";
            SaveImageError::new(Kind::Unsupported, self.attempt("read the stream of"), found)
        })
    }

    pub(crate) fn check_compression(&self) -> Result<()> {
        let mut start = Vec::new();
        let payload = self.payload();
        payload
            .take(Format::MAGIC_BYTES as u64)
            .read_to_end(&mut start)
            .map_err(|source| SaveImageError::io("read", &self.path, source))?;
        let found = Format::of_payload(&start);
        let expected = self.format;
        let right =
            found == Some(expected) || found == Some(Format::Raw) && expected == Format::Sparse;
        if right {
            return Ok(());
        }
        let attempt = self.attempt("read the payload of");
        let said = expected.name();
        Err(match found {
            Some(other) => {
                let found = format!("the header says {said}, the payload is {}", other.name());
                SaveImageError::new(Kind::WrongCompression, attempt, found)
            }
            None => {
                let found = format!("the header says {said}, the payload begins with {start:02x?}");
                SaveImageError::new(Kind::Damaged, attempt, found)
            }
        })
    }

    pub(crate) fn attempt(&self, what: &str) -> String {
        format!("{what} {}", self.path.display())
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Everything that is known without reading the payload.
    #[must_use]
    pub fn info(&self) -> Info {
        let (record, record_problem) = match &self.recorded {
            Recorded::Not => (None, None),
            Recorded::Whole(record) => (Some(RecordInfo::of(record)), None),
            Recorded::Newer(version) => (None, Some(format!("its record has version {version}"))),
            Recorded::Damaged(reason) => (None, Some(reason.clone())),
        };
        Info {
            path: self.path.clone(),
            version: self.header.version,
            byte_order: match self.header.order {
                ByteOrder::Little => "little",
                ByteOrder::Big => "big",
            },
            format: self.format.name(),
            was_running: self.was_running(),
            xml_bytes: self.xml.len() as u64,
            cookie_bytes: self.cookie.as_ref().map_or(0, |cookie| cookie.len() as u64),
            payload_at: self.header.payload_at(),
            payload_bytes: self.payload_bytes(),
            unproven: self.unproven(record.as_ref()),
            record,
            record_problem,
        }
    }

    /// What `info` cannot say, and why.
    fn unproven(&self, record: Option<&RecordInfo>) -> Vec<String> {
        let mut unproven = vec!["the payload was not read: verify does".to_owned()];
        if record.is_none() {
            unproven.push(
                "no record: verify checks the structure only, and a changed page or register is not found"
                    .to_owned(),
            );
            unproven.push("what the disks held when the VM was saved is not known".to_owned());
        } else if self.disks().is_empty() {
            unproven.push("what the disks held when the VM was saved was not recorded".to_owned());
        }
        unproven
    }
}

/// What is known of an image without reading its payload.
#[derive(Debug, Clone, Serialize)]
pub struct Info {
    /// The file.
    pub path: PathBuf,
    /// The header's version.
    pub version: u32,
    /// The byte order of the host that wrote it.
    pub byte_order: &'static str,
    /// How the payload is stored.
    pub format: &'static str,
    /// Whether the VM ran.
    pub was_running: bool,
    /// Bytes of the XML.
    pub xml_bytes: u64,
    /// Bytes of libvirt's cookie; 0 without one.
    pub cookie_bytes: u64,
    /// Where the payload starts, in bytes.
    pub payload_at: u64,
    /// Bytes of the payload as it is stored.
    pub payload_bytes: u64,
    /// The record, if there is one that can be believed.
    pub record: Option<RecordInfo>,
    /// Why there is none, where there should be one.
    pub record_problem: Option<String>,
    /// What is not proven by what is said here.
    pub unproven: Vec<String>,
}

/// What a record says.
#[derive(Debug, Clone, Serialize)]
pub struct RecordInfo {
    /// Bytes of the payload as it was written.
    pub payload_bytes: u64,
    /// Bytes of the migration stream.
    pub stream_bytes: u64,
    /// BLAKE3 of the payload, in hexadecimal.
    pub payload_hash: String,
    /// BLAKE3 of the migration stream, in hexadecimal.
    pub stream_hash: String,
    /// BLAKE3 of the XML, in hexadecimal.
    pub xml_hash: String,
    /// How finely damage is named, in bytes.
    pub range_bytes: u64,
    /// What the disks held.
    pub disks: Vec<DiskContent>,
}

impl RecordInfo {
    fn of(record: &Record) -> Self {
        Self {
            payload_bytes: record.payload_bytes,
            stream_bytes: record.stream_bytes,
            payload_hash: hex(&record.payload_hash),
            stream_hash: hex(&record.stream_hash),
            xml_hash: hex(&record.xml_hash),
            range_bytes: 1 << record.leaf_log2,
            disks: record.disks.clone(),
        }
    }
}

/// A payload: the bytes of an image behind its head.
#[derive(Debug, Clone)]
pub struct Payload {
    file: Arc<File>,
    start: u64,
    length: u64,
    at: u64,
}

impl Read for Payload {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.length.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let length = bytes.len().min(left);
        let count = self
            .file
            .read_at(&mut bytes[..length], self.start + self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Payload {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = target.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

/// An image being opened.
struct Opening<'a> {
    file: &'a File,
    path: &'a Path,
}

impl Opening<'_> {
    fn open(&self, file: &File) -> Result<SaveImage> {
        let data = file.metadata().map_err(|source| self.io(source))?;
        if !data.is_file() {
            return Err(self.error(Kind::NotSaveImage, "it is no regular file"));
        }
        let start = read_start(self.file).map_err(|source| self.io(source))?;
        let header = Header::decode(&start).map_err(|refused| self.refused(refused))?;
        if header.state == State::Partial {
            return Err(self.incomplete());
        }
        let file_bytes = data.len();
        let format = self.check(&header, file_bytes)?;
        let head = self.read_head(&header)?;
        let (xml, cookie) = self.texts(&header, &head)?;
        let recorded = match Record::read_from(&head) {
            Ok(None) => Recorded::Not,
            Ok(Some(record)) => Recorded::Whole(Box::new(record)),
            Err(Unusable::Version(version)) => Recorded::Newer(version),
            Err(Unusable::Wrong(reason)) => Recorded::Damaged(reason),
        };
        Ok(SaveImage {
            path: self.path.to_owned(),
            file: Arc::new(self.file.try_clone().map_err(|source| self.io(source))?),
            header,
            format,
            file_bytes,
            xml,
            cookie,
            recorded,
        })
    }

    fn io(&self, source: io::Error) -> SaveImageError {
        SaveImageError::io("open", self.path, source)
    }

    fn error(&self, kind: Kind, found: impl Into<String>) -> SaveImageError {
        SaveImageError::new(kind, format!("open {}", self.path.display()), found)
    }

    fn refused(&self, refused: Refused) -> SaveImageError {
        match refused {
            Refused::NotSaveImage => self.error(Kind::NotSaveImage, "it is not a save image"),
            Refused::Short(State::Partial) | Refused::Version(State::Partial, _) => {
                self.incomplete()
            }
            Refused::Short(State::Complete) => self.error(
                Kind::CutOff,
                format!("it ends within its header of {HEADER_BYTES} bytes"),
            ),
            Refused::Version(State::Complete, 0) => {
                self.error(Kind::Damaged, "its header has version 0")
            }
            Refused::Version(State::Complete, version) => self.error(
                Kind::NewerVersion,
                format!("its header has version {version}, and 2 is the newest that is known"),
            ),
        }
    }

    /// Nothing is deleted: its owner decides what it is worth.
    fn incomplete(&self) -> SaveImageError {
        let since = self.file.metadata().and_then(|data| data.modified());
        let since = since
            .ok()
            .and_then(|time| jiff::Timestamp::try_from(time).ok());
        let found = match since {
            Some(time) => format!("the save image is incomplete, and last written at {time:.0}"),
            None => "the save image is incomplete".to_owned(),
        };
        self.error(Kind::Incomplete, found)
            .leaving("nothing was changed or deleted")
    }

    /// The numbers of the header against each other and the file.
    fn check(&self, header: &Header, file_bytes: u64) -> Result<Format> {
        let (data, cookie) = (header.data_length, header.cookie_offset);
        let Some(format) = Format::from_number(header.format) else {
            let found = format!(
                "its payload has format {}, which is not known",
                header.format
            );
            return Err(self.error(Kind::NewerVersion, found));
        };
        if data == 0 || header.payload_at() > HEAD_BYTES_MAX {
            let found = format!("its header says that {data} bytes come before the payload");
            return Err(self.error(Kind::Damaged, found));
        }
        if cookie > data {
            let found = format!("the cookie at {cookie} lies behind the {data} bytes of XML");
            return Err(self.error(Kind::Damaged, found));
        }
        if header.payload_at() >= file_bytes {
            let found = format!(
                "its payload should start at byte {}, and the file has {file_bytes} bytes",
                header.payload_at()
            );
            return Err(self.error(Kind::CutOff, found));
        }
        Ok(format)
    }

    fn read_head(&self, header: &Header) -> Result<Vec<u8>> {
        let mut head = Vec::new();
        let mut start = Payload {
            file: Arc::new(self.file.try_clone().map_err(|source| self.io(source))?),
            start: 0,
            length: header.payload_at(),
            at: 0,
        };
        start
            .read_to_end(&mut head)
            .map_err(|source| self.io(source))?;
        if head.len() as u64 != header.payload_at() {
            return Err(self.error(Kind::CutOff, "the file became shorter while it was read"));
        }
        Ok(head)
    }

    fn texts(&self, header: &Header, head: &[u8]) -> Result<(String, Option<String>)> {
        let data = &head[HEADER_BYTES..];
        let offset = usize::try_from(header.cookie_offset).unwrap_or(data.len());
        if offset == 0 {
            return Ok((self.text("XML", data)?, None));
        }
        let (xml, cookie) = data.split_at(offset.min(data.len()));
        Ok((self.text("XML", xml)?, Some(self.text("cookie", cookie)?)))
    }

    /// The text up to the zero byte that ends it.
    fn text(&self, what: &str, bytes: &[u8]) -> Result<String> {
        let Some(end) = bytes.iter().position(|byte| *byte == 0) else {
            let found = format!("its {what} does not end within {} bytes", bytes.len());
            return Err(self.error(Kind::Damaged, found));
        };
        if end == 0 {
            return Err(self.error(Kind::Damaged, format!("its {what} is empty")));
        }
        String::from_utf8(bytes[..end].to_vec()).map_err(|source| {
            self.error(Kind::Damaged, format!("its {what} is no text"))
                .because(source)
        })
    }
}
