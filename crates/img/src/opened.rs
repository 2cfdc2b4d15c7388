//! Opening what a reference names, under the locks that keep writers away.

use std::io;
use std::ops::Range;
use std::path::Path;

use stead_qcow2::{Chain, Error, Layer, LayerFile, OpenPolicy, probe_format};
use stead_sys::image_lock::{Access, Attempt, Holder, ImageLock};
use stead_sys::readable;

use crate::common::{self, CACHE_SIZE, FORCE_SHARE};
use crate::failure::{Failure, Outcome, system_words};
use crate::format::Format;
use crate::getopt::Parsed;
use crate::open_error;
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
    Layer::inspect(&reference.path).map_err(|error| Failure::open(&reference.given, &error))
}

/// A disk: an image and those below it, locked for reading.
#[derive(Debug)]
pub(crate) struct OpenedChain {
    /// The disk.
    pub chain: Chain,
    /// The top image's format.
    pub format: Format,
    #[expect(dead_code, reason = "they are held, not used")]
    locks: Vec<ReadLock>,
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

/// As [`chain`]. The error is only the reason: its first line in qemu-img's words, ours below.
pub(crate) fn chain_or_why(
    reference: &Reference,
    sharing: Sharing,
    policy: &OpenPolicy,
) -> Result<OpenedChain, String> {
    if reference.window.is_some() {
        return Err("a part of a file (offset, size) is known to info, convert and dd only".into());
    }
    open_chain(reference, sharing, policy)
}

/// As [`chain`], and the part of the disk that the reference names, if it is not all of it.
pub(crate) fn part(
    reference: &Reference,
    sharing: Sharing,
    policy: &OpenPolicy,
) -> Outcome<(OpenedChain, Option<Range<u64>>)> {
    let cannot = |why: String| not_open(reference, &why);
    let opened = open_chain(reference, sharing, policy).map_err(cannot)?;
    let Some(window) = reference.window else {
        return Ok((opened, None));
    };
    let size = window.bytes_of(opened.chain.len()).map_err(cannot)?;
    let part = window.offset..window.offset + size;
    Ok((opened, Some(part)))
}

fn open_chain(
    reference: &Reference,
    sharing: Sharing,
    policy: &OpenPolicy,
) -> Result<OpenedChain, String> {
    let format = format_or_why(reference)?;
    let mut locks = vec![lock_for_reading(&reference.path, sharing)?];
    let top = LayerFile {
        path: reference.path.clone(),
        format: format.into(),
    };
    let chain = Chain::open_following(&top, policy);
    let chain = chain.map_err(|error| chain_words(reference, &error))?;
    for index in 1..chain.depth() {
        let Some((path, _)) = chain.file(index) else {
            unreachable!("the chain is that deep");
        };
        locks.push(lock_for_reading(path, sharing).map_err(|why| below(&why))?);
    }
    Ok(OpenedChain {
        chain,
        format,
        locks,
    })
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
    let (first, more) = why.split_once('\n').unwrap_or((why, ""));
    Failure::new(format!("Could not open '{}': {first}", reference.given)).with_more(more)
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
