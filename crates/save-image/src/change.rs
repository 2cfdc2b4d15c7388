//! Other compression, other XML: a new file that takes the old one's name once it is proven and durable.
//!
//! Nothing is changed in place, not even where it would fit: XML and record lie in different sectors, and a crash
//! between them would leave an image that libvirt restores with half an XML. Where the file system shares
//! blocks, the payload of an edited image is not copied.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use stead_sys::durable::{Existing, Partial};
use stead_sys::share::{self, Shared};
use stead_sys::storage::{FileStorage, Storage};

use crate::control::Control;
use crate::error::{Kind, Result, SaveImageError};
use crate::format::Format;
use crate::head::{self, Layout, TEXT_BYTES_MAX};
use crate::header::{HEADER_BYTES, Header};
use crate::image::{Recorded, SaveImage};
use crate::record::{Record, hex};
use crate::room;
use crate::writer::{Appears, NewImage, Writer};

/// How many bytes of a payload are copied before the wish to stop is looked at.
const COPY_STEP_BYTES: u64 = 16 << 20;

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Bytes of the file before.
    pub bytes_before: u64,
    /// Bytes of the file now.
    pub bytes_after: u64,
    /// Whether the new file has a record.
    pub recorded: bool,
}

/// Writes `from` with another compression as `to`, which may be the same file.
///
/// The source is verified first, and the new image before it appears: its stream is the same, byte for byte. The
/// new one has a record, also where the old one had none; it then vouches for what was converted, not for what was saved.
///
/// # Durability
/// When this returns `Ok`, the new image is on the disk under its name; before, what had that name is untouched.
///
/// # Errors
/// When the source cannot be opened or is not whole, either format is sparse, `to` is in the way (with
/// [`Existing::Keep`]), or the system fails. Nothing is left then.
pub fn convert(
    from: &Path,
    to: &Path,
    format: Format,
    existing: Existing,
    control: &Control,
) -> Result<Change> {
    let source = SaveImage::open(from)?;
    let stream = source.stream()?;
    let report = source.verify(control)?.require_whole()?;
    let image = NewImage {
        xml: source.xml().to_owned(),
        cookie: source.cookie().map(str::to_owned),
        was_running: source.was_running(),
        format,
        payload_bytes: report.stream.as_ref().map_or(0, |stream| stream.bytes),
        mode: mode_of(&source)?,
    };
    if format == Format::Raw {
        // How small another one becomes is only known when it is written.
        let head = Layout::new(&image.xml, image.cookie.as_deref(), image.payload_bytes);
        room::require(to, head.length as u64 + image.payload_bytes, "write")?;
    }
    let mut writer = Writer::create(to, &image, Appears::WhenComplete(existing), control.clone())?;
    writer.set_disks(source.disks().to_vec())?;
    writer.copy_from(stream)?;
    let finished = writer.finish_checked(|file| {
        keep_owner(&source, file)?;
        let copy = file
            .try_clone()
            .map_err(|error| SaveImageError::io("read back", to, error))?;
        let made = SaveImage::from_file(copy, to)?
            .verify(control)?
            .require_whole()?;
        if made.stream_hash == report.stream_hash {
            return Ok(());
        }
        let attempt = format!("convert {} to {}", from.display(), to.display());
        Err(SaveImageError::new(
            Kind::Damaged,
            attempt,
            "the new stream is another one",
        ))
    })?;
    Ok(Change {
        bytes_before: source.header().payload_at() + source.payload_bytes(),
        bytes_after: finished.file_bytes,
        recorded: true,
    })
}

/// Gives the image `path` another XML. The payload is taken over as it is, with its hashes; an image without a
/// record stays without one, since nothing vouches for its payload.
///
/// # Durability
/// When this returns `Ok`, the changed image is on the disk under its name; before, the old one has it.
///
/// # Errors
/// When the image cannot be opened or what lies before its payload is damaged, the XML cannot be in an image, or
/// the system fails. The old image stands then.
pub fn edit_xml(path: &Path, xml: &str, control: &Control) -> Result<Change> {
    let failed = |source| SaveImageError::io("edit the XML of", path, source);
    let path = fs::canonicalize(path).map_err(failed)?;
    let source = SaveImage::open(&path)?;
    let record = usable_record(&source)?;
    check_xml(&source, xml)?;
    let head = new_head(&source, xml, record);
    let partial = Partial::create(&path, mode_of(&source)?).map_err(failed)?;
    keep_owner(&source, partial.file())?;
    let file = partial.file().try_clone().map_err(failed)?;
    let storage = FileStorage::new(file).map_err(failed)?;
    let (from, length) = (source.header().payload_at(), source.payload_bytes());
    let at = head.len() as u64;
    let payload = Shared {
        from,
        to: at,
        length,
    };
    if !share::clone_range(source.file(), storage.file(), payload).map_err(failed)? {
        room::require(&path, at + length, "edit the XML of")?;
        copy_payload(source.file(), &storage, payload, control).map_err(failed)?;
    }
    storage.write_all_at(&head, 0).map_err(failed)?;
    prove(&partial, &source, xml)?;
    partial.publish(Existing::Replace).map_err(failed)?;
    Ok(Change {
        bytes_before: from + length,
        bytes_after: at + length,
        recorded: record.is_some(),
    })
}

/// Copies a payload where its blocks cannot be shared.
fn copy_payload(
    source: &fs::File,
    storage: &FileStorage,
    payload: Shared,
    control: &Control,
) -> io::Result<()> {
    let mut done = 0;
    while done < payload.length {
        control.check()?;
        let step = COPY_STEP_BYTES.min(payload.length - done);
        storage.copy_from(source, payload.from + done, payload.to + done, step)?;
        done += step;
        control.tell(done, payload.length);
    }
    control.check()
}

fn usable_record(source: &SaveImage) -> Result<Option<&Record>> {
    let attempt = source.attempt("edit the XML of");
    match &source.recorded {
        Recorded::Not => Ok(None),
        Recorded::Whole(record) => Ok(Some(record)),
        Recorded::Newer(version) => {
            let found = format!("its record has version {version}, which is not known");
            Err(SaveImageError::new(Kind::NewerVersion, attempt, found))
        }
        Recorded::Damaged(reason) => {
            Err(SaveImageError::new(Kind::Damaged, attempt, reason.clone()))
        }
    }
}

fn check_xml(source: &SaveImage, xml: &str) -> Result<()> {
    let cookie = source.cookie().map_or(0, str::len);
    let found = if !xml.contains("<domain") {
        "this is no domain's XML: it has no element <domain>"
    } else if xml.contains('\0') {
        "the XML has a zero byte in it"
    } else if xml.len() + cookie > TEXT_BYTES_MAX {
        "the XML is larger than 16 MiB"
    } else if !source.format().is_stream() {
        "the pages of a sparse image lie at fixed places and cannot be moved"
    } else {
        return Ok(());
    };
    let attempt = source.attempt("edit the XML of");
    Err(SaveImageError::new(Kind::Usage, attempt, found))
}

/// Everything before the payload, complete: nothing sees the file before it is durable.
fn new_head(source: &SaveImage, xml: &str, record: Option<&Record>) -> Vec<u8> {
    let cookie = source.cookie();
    let layout = Layout::new(xml, cookie, source.payload_bytes());
    let small = |place: usize| u32::try_from(place).expect("a head is small");
    let header = Header {
        data_length: small(layout.length - HEADER_BYTES),
        cookie_offset: cookie.map_or(0, |_| small(xml.len() + 1)),
        ..*source.header()
    };
    let mut head = head::bytes(&header, xml, cookie, &layout);
    if let Some(old) = record {
        let record = Record {
            record_at: layout.record_at as u64,
            payload_at: layout.length as u64,
            leaves_at: layout.leaves_at as u64,
            disks_at: layout.disks_at as u64,
            xml_bytes: small(xml.len()),
            xml_hash: *blake3::hash(xml.as_bytes()).as_bytes(),
            ..old.clone()
        };
        record.put_into(&mut head);
    }
    head
}

/// Reads the new image back: its texts, and that its head agrees with its record.
fn prove(partial: &Partial, source: &SaveImage, xml: &str) -> Result<()> {
    let path = source.path();
    let copy = partial.file().try_clone();
    let copy = copy.map_err(|error| SaveImageError::io("read back", path, error))?;
    let made = SaveImage::from_file(copy, path)?;
    let same = made.xml() == xml
        && made.cookie() == source.cookie()
        && made.payload_bytes() == source.payload_bytes()
        && std::mem::discriminant(&made.recorded) == std::mem::discriminant(&source.recorded);
    if same {
        return Ok(());
    }
    let attempt = source.attempt("edit the XML of");
    let found = format!(
        "the new file does not read back ({})",
        hex(blake3::hash(xml.as_bytes()).as_bytes())
    );
    Err(SaveImageError::new(Kind::Damaged, attempt, found))
}

fn mode_of(source: &SaveImage) -> Result<u32> {
    let data = source.file().metadata();
    let data = data.map_err(|error| SaveImageError::io("look at", source.path(), error))?;
    Ok(data.permissions().mode() & 0o777)
}

/// The new file belongs to whom the old one belonged: another user's QEMU may have to read it.
fn keep_owner(source: &SaveImage, file: &fs::File) -> Result<()> {
    let give = || {
        let (old, new) = (source.file().metadata()?, file.metadata()?);
        if (old.uid(), old.gid()) == (new.uid(), new.gid()) {
            return Ok(());
        }
        fchown(file, Some(old.uid()), Some(old.gid()))
    };
    give().map_err(|error| SaveImageError::io("keep the owner of", source.path(), error))
}
