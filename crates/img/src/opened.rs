//! Opening what a reference names, under the locks that keep writers away.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use stead_qcow2::{Chain, Error, ImageInfo, Layer, LayerFile, OpenPolicy};
use stead_qcow2::{info, info_layer, probe_format};
use stead_sys::image_lock::{Access, Attempt, Holder, ImageLock};
use stead_sys::readable;

use crate::common::{self, CACHE_SIZE, FORCE_SHARE, FORMAT};
use crate::console::Console;
use crate::failure::{Failure, Outcome, system_words};
use crate::format::Format;
use crate::getopt::Parsed;
use crate::open_error;
use crate::part::Window;
use crate::reference::Reference;

/// Whether others may write an image while it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Nobody writes it meanwhile; else it is not opened.
    Locked,
    /// Somebody may, so what is read may be torn (`-U`).
    Shared,
}

impl Sharing {
    /// What the command line says.
    pub fn of(parsed: &Parsed) -> Self {
        if parsed.has(FORCE_SHARE.id) {
            Self::Shared
        } else {
            Self::Locked
        }
    }
}

/// Keeps writers away until dropped.
#[derive(Debug)]
pub(crate) struct ReadLock(#[expect(dead_code, reason = "it is held, not used")] Option<ImageLock>);

/// Locks the file at `path` for reading. The error is the reason, in qemu-img's words.
pub(crate) fn lock_for_reading(path: &Path, sharing: Sharing) -> Result<ReadLock, String> {
    if sharing == Sharing::Shared {
        return Ok(ReadLock(None));
    }
    let shown = path.display();
    let cannot = |error: &io::Error| format!("Could not open '{shown}': {}", system_words(error));
    let file = readable::open(path).map_err(|error| cannot(&error))?;
    match ImageLock::attempt(&file, Access::Read) {
        Ok(Attempt::Locked(lock)) => Ok(ReadLock(Some(lock))),
        Ok(Attempt::HeldBy(holders)) => {
            Err(held("Failed to get shared \"write\" lock", path, &holders))
        }
        Err(error) => Err(format!(
            "Could not lock '{shown}': {}",
            system_words(&error)
        )),
    }
}

/// Who has an image in use.
pub(crate) fn held(what: &str, path: &Path, holders: &[Holder]) -> String {
    let shown = path.display();
    let names: Vec<String> = holders.iter().map(ToString::to_string).collect();
    let by = match names.is_empty() {
        true => String::new(),
        false => format!("\nIt is open in {}.", names.join(", ")),
    };
    format!("{what}\nIs another process using the image [{shown}]?{by}")
}

/// The format of the image: the stated one, else what the file's first bytes say.
pub(crate) fn format_of(reference: &Reference) -> Outcome<Format> {
    format_or_why(reference).map_err(|why| not_open(reference, &why))
}

fn format_or_why(reference: &Reference) -> Result<Format, String> {
    require_file(&reference.path)?;
    if let Some(format) = reference.format {
        return Ok(format);
    }
    match probe_format(&reference.path) {
        Ok(format) => Ok(format.into()),
        Err(Error::UnknownFormat { format, .. }) => Err(format!(
            "Unknown driver '{format}' (what the file looks like); give -f raw if it is a raw disk"
        )),
        Err(error) => Err(open_error::words(&error).0),
    }
}

/// The header and directories of one qcow2 image; nothing that it names is opened.
pub(crate) fn inspect(reference: &Reference) -> Outcome<Layer> {
    let path = &reference.path;
    let layer = match reference.window {
        None => Layer::inspect(path),
        Some(window) => {
            let part = window.open(path).map_err(|why| not_open(reference, &why))?;
            Layer::inspect_storage(part, path)
        }
    };
    layer.map_err(|error| Failure::open(&reference.given, &error))
}

/// What an image says of itself; nothing that it names is opened.
pub(crate) fn describe(reference: &Reference, format: Format) -> Outcome<ImageInfo> {
    let cannot = |error: Error| Failure::open(&reference.given, &error);
    if format == Format::Qcow2 && reference.window.is_some() {
        let layer = inspect(reference)?;
        let mut found = info_layer(&layer).map_err(cannot)?;
        let taken = stead_sys::space::allocated_bytes(&reference.path);
        found.actual_size = taken.map_err(|error| not_open(reference, &system_words(&error)))?;
        return Ok(found);
    }
    let file = LayerFile {
        path: reference.path.clone(),
        format: format.into(),
    };
    let mut found = info(&file).map_err(cannot)?;
    if let Some(window) = reference.window {
        let size = window.bytes_of(found.file_length);
        let size = size.map_err(|why| not_open(reference, &why))?;
        found.virtual_size = size.next_multiple_of(512);
    }
    Ok(found)
}

/// A disk: an image and those below it, locked for reading.
#[derive(Debug)]
pub(crate) struct OpenedChain {
    /// The disk.
    pub chain: Chain,
    /// The top image's format.
    pub format: Format,
    /// Keep writers away from all of them.
    pub locks: Vec<ReadLock>,
}

impl OpenedChain {
    /// The same, with as much memory for tables as the command line says.
    pub fn with_cache_of(self, parsed: &Parsed) -> Outcome<Self> {
        if let Some(text) = common::text(parsed, CACHE_SIZE.id) {
            self.chain
                .set_cache_bytes(common::size(&text, "cache size")?);
        }
        Ok(self)
    }
}

/// Opens the disk whose top image is `reference`.
pub(crate) fn chain(
    reference: &Reference,
    sharing: Sharing,
    policy: OpenPolicy,
) -> Outcome<OpenedChain> {
    chain_or_why(reference, sharing, &policy).map_err(|why| not_open(reference, &why))
}

/// What most commands that only read begin with: the one image that is named, by the options `-f` and
/// `--image-opts`.
pub(crate) fn operand(parsed: &Parsed, console: &Console) -> Outcome<Reference> {
    let name = common::one_operand(parsed, console.program())?;
    common::image(parsed, name, FORMAT.id)
}

/// The disk that `name` means, by the options of `format_id`, `-U`, `--no-follow` and `--cache-size`.
pub(crate) fn disk(
    parsed: &Parsed,
    name: &OsStr,
    format_id: &str,
) -> Outcome<(Reference, OpenedChain)> {
    let image = common::image(parsed, name, format_id)?;
    let opened = chain(&image, Sharing::of(parsed), common::policy(parsed))?;
    Ok((image, opened.with_cache_of(parsed)?))
}

/// As [`chain`]. The error is only the reason: its first line in qemu-img's words, ours below.
pub(crate) fn chain_or_why(
    reference: &Reference,
    sharing: Sharing,
    policy: &OpenPolicy,
) -> Result<OpenedChain, String> {
    let format = format_or_why(reference)?;
    let mut locks = vec![lock_for_reading(&reference.path, sharing)?];
    let open = || match reference.window {
        None => whole(reference, format, policy),
        Some(window) => part(reference, window, format, policy),
    };
    let chain = open()?;
    for (index, path) in (0..chain.depth()).flat_map(|index| files(&chain, index)) {
        let lock = lock_for_reading(path, sharing);
        locks.push(lock.map_err(|why| if index == 0 { why } else { below(&why) })?);
    }
    // What was read before the locks were had may be old by now.
    let chain = match sharing {
        Sharing::Locked => open()?,
        Sharing::Shared => chain,
    };
    Ok(OpenedChain {
        chain,
        format,
        locks,
    })
}

fn whole(reference: &Reference, format: Format, policy: &OpenPolicy) -> Result<Chain, String> {
    let top = LayerFile {
        path: reference.path.clone(),
        format: format.into(),
    };
    let chain = Chain::open_following(&top, policy);
    chain.map_err(|error| chain_words(reference, &error))
}

fn part(
    reference: &Reference,
    window: Window,
    format: Format,
    policy: &OpenPolicy,
) -> Result<Chain, String> {
    let path = &reference.path;
    let chain = match format {
        Format::Raw => {
            let bytes = window.bytes_in(path)?;
            Chain::open_raw_part(path, window.offset, bytes)
        }
        Format::Qcow2 => Chain::follow_storage(window.open(path)?, path, policy),
    };
    chain.map_err(|error| chain_words(reference, &error))
}

/// The files of one image of a chain that are not locked yet: itself, unless it is the top, and its external data file.
fn files(chain: &Chain, index: usize) -> impl Iterator<Item = (usize, &Path)> {
    let own = chain
        .file(index)
        .filter(|_| index > 0)
        .map(|(path, _)| path);
    let layer = chain
        .layer(index)
        .filter(|layer| layer.header().external_data.is_some());
    let data = layer.map(Layer::data_path);
    own.into_iter().chain(data).map(move |path| (index, path))
}

fn below(why: &str) -> String {
    format!("Could not open backing file: {why}")
}

/// Whether it is the image itself that does not open, or one below.
fn chain_words(reference: &Reference, error: &Error) -> String {
    let (first, more) = open_error::words(error);
    let first = match open_error::image(error) {
        Some(path) if path != reference.path => below(&first),
        Some(_) | None => first,
    };
    match more.is_empty() {
        true => first,
        false => format!("{first}\n{more}"),
    }
}

/// The failure to open. The first line of `why` is in qemu-img's words; the others stand below.
pub(crate) fn not_open(reference: &Reference, why: &str) -> Failure {
    Failure::lines(&format!("Could not open '{}': ", reference.given), why)
}

/// Locks what `reference` names for reading.
pub(crate) fn lock(reference: &Reference, sharing: Sharing) -> Outcome<ReadLock> {
    lock_for_reading(&reference.path, sharing).map_err(|why| not_open(reference, &why))
}

/// There is such a file, and it is no folder.
fn require_file(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let metadata = std::fs::metadata(path)
        .map_err(|error| format!("Could not open '{shown}': {}", system_words(&error)))?;
    if metadata.is_dir() {
        return Err(format!(
            "'file' driver requires '{shown}' to be a regular file"
        ));
    }
    Ok(())
}
