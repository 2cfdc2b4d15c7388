//! Writing an image: partial until everything is durable, complete by one sector.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_sys::durable::{self, Existing, Partial};
use stead_sys::storage::Storage;

use crate::codec::Encoder;
use crate::control::{Control, is_cancelled};
use crate::error::{Kind, Result, SaveImageError};
use crate::format::Format;
use crate::head::{self, Layout, TEXT_BYTES_MAX};
use crate::header::{HEADER_BYTES, Header, State};
use crate::output::{DirectFile, PayloadSink, write_aligned};
use crate::record::{DiskContent, Record, encode_disks};
use crate::tree::Tree;

/// What a disk writes whole or not at all, in bytes; the header lies in the first of them.
const SECTOR_BYTES: usize = 512;
const _: () = assert!(HEADER_BYTES <= SECTOR_BYTES);
/// How many bytes are taken from a pipe at a time.
const COPY_BYTES: usize = 1 << 20;

/// An image to be written.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// The domain's XML.
    pub xml: String,
    /// libvirt's cookie, XML too.
    pub cookie: Option<String>,
    /// Whether the VM ran, and is to run when it is restored.
    pub was_running: bool,
    /// How the payload is to be stored.
    pub format: Format,
    /// About how many bytes the payload will have; 0 if nobody knows. It decides how finely the hashes name
    /// a damaged range: a mebibyte each if this is right.
    pub payload_bytes: u64,
    /// The permission bits of the file.
    pub mode: u32,
}

/// When the file has its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appears {
    /// From the start, saying that it is partial; there must be no file of that name.
    AtOnce,
    /// When it is complete; until then it has a temporary name in the same folder.
    WhenComplete(Existing),
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Bytes of the whole file.
    pub file_bytes: u64,
    /// Bytes of the payload as it is stored.
    pub payload_bytes: u64,
    /// Bytes of the migration stream.
    pub stream_bytes: u64,
    /// BLAKE3 of the payload as it is stored.
    pub payload_hash: [u8; 32],
}

/// An image being written. Dropping it before [`Writer::finish`] removes the file; the death of the process
/// leaves it, and it says that it is partial.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    place: Place,
    assembly: Option<Assembly>,
}

#[derive(Debug)]
enum Place {
    /// Under its name, and not complete.
    Named,
    /// Under its name, complete.
    Done,
    Hidden(Partial, Existing),
    /// Nothing to look after any more.
    Gone,
}

impl Writer {
    /// Starts an image.
    ///
    /// # Durability
    /// When this returns, a file that says that it is partial is on the disk.
    ///
    /// # Errors
    /// When the texts cannot be in an image, the format is no stream, a file is in the way, or the system
    /// refuses. Nothing is left then.
    pub fn create(
        path: &Path,
        image: &NewImage,
        appears: Appears,
        control: Control,
    ) -> Result<Self> {
        check(image, path)?;
        let failed = |source| failed("create", path, source);
        let (place, file) = open(path, image.mode, appears).map_err(failed)?;
        let mut writer = Self {
            path: path.to_owned(),
            place,
            assembly: None,
        };
        let storage = Arc::new(DirectFile::new(file).map_err(failed)?);
        writer.assembly = Some(Assembly::begin(storage, image, control).map_err(failed)?);
        if appears == Appears::AtOnce {
            durable::sync_parent(path).map_err(failed)?;
        }
        Ok(writer)
    }

    /// Says what the disks hold; may be called until the image is finished.
    ///
    /// # Errors
    /// When the table is too large (about 200 disks) or a name has more than 255 bytes; the image goes on without.
    pub fn set_disks(&mut self, disks: Vec<DiskContent>) -> Result<()> {
        if encode_disks(&disks).is_none() {
            let attempt = format!("record the disks of {}", self.path.display());
            let found = format!("{} disks do not fit, or a name is too long", disks.len());
            return Err(SaveImageError::new(Kind::Usage, attempt, found));
        }
        if let Some(assembly) = &mut self.assembly {
            assembly.disks = disks;
        }
        Ok(())
    }

    /// Takes the whole migration stream from a pipe or file; returns its bytes.
    ///
    /// # Errors
    /// When reading or writing fails, or the caller cancelled. The image cannot be finished then.
    pub fn copy_from(&mut self, stream: impl Read) -> Result<u64> {
        let path = self.path.clone();
        copy(stream, self).map_err(|source| failed("write", &path, source))
    }

    /// Completes the image.
    ///
    /// # Durability
    /// When this returns `Ok`, the image is on the disk, complete, under its name. Lost power at any moment leaves
    /// a partial image or the complete one, and an earlier file of that name until the new one is complete.
    ///
    /// # Errors
    /// When writing fails; the file is removed then.
    pub fn finish(self) -> Result<Finished> {
        self.finish_checked(|_file| Ok(()))
    }

    /// As [`Writer::finish`]; `check` sees the complete file before it appears.
    pub(crate) fn finish_checked(
        mut self,
        check: impl FnOnce(&File) -> Result<()>,
    ) -> Result<Finished> {
        let path = self.path.clone();
        let failed = |source| failed("complete", &path, source);
        let Some(assembly) = self.assembly.take() else {
            unreachable!("a writer that was created has its assembly until here")
        };
        let finished = assembly.complete().map_err(failed)?;
        match std::mem::replace(&mut self.place, Place::Gone) {
            Place::Hidden(partial, existing) => {
                check(partial.file())?;
                partial.publish(existing).map_err(failed)?;
            }
            Place::Named => {
                self.place = Place::Done;
                durable::sync_parent(&path).map_err(failed)?;
            }
            Place::Done | Place::Gone => unreachable!("finish consumes the writer"),
        }
        Ok(finished)
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.assembly {
            Some(assembly) => assembly.write(bytes),
            None => unreachable!("finish consumes the writer"),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if matches!(self.place, Place::Named) {
            // What stays behind says that it is partial.
            drop(durable::remove_file(&self.path));
        }
    }
}

/// Opens the file that will be the image.
fn open(path: &Path, mode: u32, appears: Appears) -> io::Result<(Place, File)> {
    match appears {
        Appears::AtOnce => Ok((Place::Named, durable::create_scratch(path, mode)?)),
        Appears::WhenComplete(existing) => {
            let partial = Partial::create(path, mode)?;
            let file = partial.file().try_clone()?;
            Ok((Place::Hidden(partial, existing), file))
        }
    }
}

fn failed(attempt: &str, path: &Path, source: io::Error) -> SaveImageError {
    if is_cancelled(&source) {
        let attempt = format!("{attempt} {}", path.display());
        let left = "what was written is removed, nothing else was changed";
        return SaveImageError::new(Kind::Cancelled, attempt, "cancelled").leaving(left);
    }
    let error = SaveImageError::io(attempt, path, source);
    if error.kind() == Kind::Exists {
        return error;
    }
    error.leaving("the new file is removed, nothing else was changed")
}

/// What libvirt could not read back is refused before anything is written.
fn check(image: &NewImage, path: &Path) -> Result<()> {
    let cookie = image.cookie.as_deref().unwrap_or("<");
    let found = if !image.format.is_stream() {
        "the sparse layout is written by QEMU itself"
    } else if image.xml.is_empty() || cookie.is_empty() {
        "the XML is empty"
    } else if image.xml.contains('\0') || cookie.contains('\0') {
        "the XML has a zero byte in it"
    } else if image.xml.len() + cookie.len() > TEXT_BYTES_MAX {
        "the XML is larger than 16 MiB"
    } else {
        return Ok(());
    };
    let attempt = format!("write {}", path.display());
    Err(SaveImageError::new(Kind::Usage, attempt, found))
}

/// Writes a whole image on any storage, which should be empty: for tests of what a crash leaves.
///
/// # Errors
/// As [`Writer::create`] and [`Writer::finish`]; what was written stays.
pub fn write_on(
    storage: Arc<dyn Storage>,
    image: &NewImage,
    stream: impl Read,
    control: Control,
) -> Result<Finished> {
    let path = Path::new("an image");
    check(image, path)?;
    let write = || {
        let mut assembly = Assembly::begin(storage, image, control)?;
        copy(stream, &mut assembly)?;
        assembly.complete()
    };
    write().map_err(|source| failed("write", path, source))
}

fn copy(mut from: impl Read, to: &mut impl Write) -> io::Result<u64> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut copied = 0;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(copied),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(&buffer[..count])?;
        copied += count as u64;
    }
}

/// The order of writes and syncs that makes an image.
struct Assembly {
    storage: Arc<dyn Storage>,
    header: Header,
    layout: Layout,
    xml: String,
    cookie: Option<String>,
    disks: Vec<DiskContent>,
    encoder: Encoder<PayloadSink>,
    /// What was written to the encoder; for a raw payload, the sink hashes the same bytes.
    stream: Option<blake3::Hasher>,
    stream_bytes: u64,
    control: Control,
}

impl std::fmt::Debug for Assembly {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Assembly")
            .field("header", &self.header)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl Assembly {
    /// Writes everything before the payload, marked partial, and makes it durable.
    fn begin(storage: Arc<dyn Storage>, image: &NewImage, control: Control) -> io::Result<Self> {
        let cookie = image.cookie.as_deref();
        let layout = Layout::new(&image.xml, cookie, image.payload_bytes);
        let number = |place: usize| u32::try_from(place).map_err(io::Error::other);
        let cookie_at = cookie.map_or(Ok(0), |_| number(image.xml.len() + 1))?;
        let data = number(layout.length - HEADER_BYTES)?;
        let header = Header::new(data, image.was_running, image.format.number(), cookie_at);
        let head = head::bytes(&header, &image.xml, cookie, &layout);
        write_aligned(&*storage, &head, 0)?;
        storage.sync()?;
        let tree = Tree::new(layout.leaf_room);
        let sink = PayloadSink::new(storage.clone(), layout.length as u64, tree, control.clone())?
            .expect(image.payload_bytes);
        let Some(encoder) = Encoder::new(image.format, sink)? else {
            unreachable!("formats that are no streams were refused")
        };
        Ok(Self {
            storage,
            header,
            layout,
            xml: image.xml.clone(),
            cookie: image.cookie.clone(),
            disks: Vec::new(),
            encoder,
            stream: (image.format != Format::Raw).then(blake3::Hasher::new),
            stream_bytes: 0,
            control,
        })
    }

    /// Payload durable, then the record durable, then the header complete and durable.
    fn complete(self) -> io::Result<Finished> {
        self.control.check()?;
        let leaves = self.encoder.finish()?.finish()?;
        self.storage.sync()?;
        let stream_hash = match &self.stream {
            Some(hasher) => *hasher.finalize().as_bytes(),
            None => leaves.root,
        };
        let cookie = self.cookie.as_deref();
        let header = Header {
            state: State::Complete,
            ..self.header
        };
        let mut head = head::bytes(&header, &self.xml, cookie, &self.layout);
        let record = Record {
            leaf_log2: leaves.leaf_log2,
            record_at: self.layout.record_at as u64,
            payload_at: self.layout.length as u64,
            payload_bytes: leaves.total,
            stream_bytes: self.stream_bytes,
            xml_bytes: u32::try_from(self.xml.len()).map_err(io::Error::other)?,
            cookie_bytes: u32::try_from(cookie.map_or(0, str::len)).map_err(io::Error::other)?,
            xml_hash: *blake3::hash(self.xml.as_bytes()).as_bytes(),
            payload_hash: leaves.root,
            stream_hash,
            leaves_at: self.layout.leaves_at as u64,
            leaves: leaves.hashes,
            disks_at: self.layout.disks_at as u64,
            disks: self.disks,
        };
        record.put_into(&mut head);
        let from = self.layout.disks_at;
        write_aligned(&*self.storage, &head[from..], from as u64)?;
        self.storage.sync()?;
        self.storage.write_all_at(&head[..SECTOR_BYTES], 0)?;
        self.storage.sync()?;
        Ok(Finished {
            file_bytes: record.payload_at + record.payload_bytes,
            payload_bytes: record.payload_bytes,
            stream_bytes: record.stream_bytes,
            payload_hash: record.payload_hash,
        })
    }
}

impl Write for Assembly {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.control.check()?;
        let count = self.encoder.write(bytes)?;
        if let Some(hasher) = &mut self.stream {
            hasher.update(&bytes[..count]);
        }
        self.stream_bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
