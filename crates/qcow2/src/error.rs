//! What can be wrong with an image, or with what was asked of it.

use std::io;
use std::path::{Path, PathBuf};

use crate::units::{GuestOffset, HostOffset};

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an image could not be read, checked, made or changed.
///
/// Reading never writes, so every error of a reading operation leaves the file as it was. An error
/// while an image is being made leaves no file under the image's name, and an earlier file as it was.
/// An error of a change leaves the image as it was; only [`Error::Switch`] says that it may be as it was to
/// be, or in progress.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file does not start with the magic bytes `QFI\xfb`.
    #[error("{} is not a qcow2 image: it starts with {found:02x?}, not with \"QFI\\xfb\"", path.display())]
    NotQcow2 {
        /// The file.
        path: PathBuf,
        /// Its first bytes, at most four.
        found: Vec<u8>,
    },
    /// The format version is not 2 or 3.
    #[error("{}: qcow2 version {found} is not known (2 and 3 are)", path.display())]
    UnknownVersion {
        /// The file.
        path: PathBuf,
        /// The header's version.
        found: u32,
    },
    /// An incompatible feature bit is set that this reader does not know.
    #[error("{}: the image needs feature {name} (incompatible bit {bit}), which is not known; use a newer version or convert the image", path.display())]
    UnknownFeature {
        /// The file.
        path: PathBuf,
        /// The lowest unknown bit.
        bit: u32,
        /// The name the image's own table gives it, or `unnamed`.
        name: String,
    },
    /// The image is encrypted.
    #[error("{}: the image is encrypted ({method}), which is not supported; decrypt it first, with `qemu-img convert` and its secret", path.display())]
    Encrypted {
        /// The file.
        path: PathBuf,
        /// The encryption method by name.
        method: String,
    },
    /// Guest data lies in another file.
    #[error("{}: guest data lies in an external data file ({name}), which was not given; allow the image to name it, or name it yourself", path.display())]
    ExternalDataFile {
        /// The file.
        path: PathBuf,
        /// The data file's name as the header gives it.
        name: String,
    },
    /// A data file was given to an image that keeps its guest data itself.
    #[error("{}: guest data lies in the image itself, not in {}; open it without a data file", path.display(), data.display())]
    NoExternalData {
        /// The file.
        path: PathBuf,
        /// The data file that was given.
        data: PathBuf,
    },
    /// A name in an image is not followed.
    #[error("{} names {name} as its {what}, which was not opened: {reason}", path.display())]
    NotFollowed {
        /// The image.
        path: PathBuf,
        /// What the name is for.
        what: &'static str,
        /// The name, as the image has it.
        name: String,
        /// Why, and what would change that.
        reason: String,
    },
    /// The file is in a format that there is no reader for.
    #[error("{}: the format {format} is not supported (raw and qcow2 are); convert it with `qemu-img convert`", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// The format, as it is named or as its content shows.
        format: String,
    },
    /// A dirty bitmap was not saved when its image was last used, so it says nothing.
    #[error("{}: the bitmap {name} is in use: it was not saved when the image was last used, so what changed is not known; remove it and make a full backup", path.display())]
    BitmapInUse {
        /// The file.
        path: PathBuf,
        /// The bitmap.
        name: String,
    },
    /// A dirty bitmap cannot be expressed in the format.
    #[error("the bitmap {name} cannot be: {reason}")]
    InvalidBitmap {
        /// The bitmap.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The image is marked corrupt, and its data cannot be trusted.
    #[error("{}: the image is marked corrupt; repair it with `qemu-img check -r all` or use another copy", path.display())]
    MarkedCorrupt {
        /// The file.
        path: PathBuf,
    },
    /// A field of the header, of a header extension or of a directory has a value it must not have.
    #[error("{}: {field} is {found}; expected {expected}", path.display())]
    InvalidField {
        /// The file.
        path: PathBuf,
        /// The field, by the specification's name.
        field: &'static str,
        /// What it says.
        found: u64,
        /// What would be right.
        expected: String,
    },
    /// Something lies, wholly or in part, behind the end of the file.
    #[error("{}: {what} at {at} with {length} bytes ends behind the end of the file, which has {file_length} bytes; the file was cut off or is damaged", path.display())]
    OutOfFile {
        /// The file.
        path: PathBuf,
        /// What lies there.
        what: &'static str,
        /// Where it starts.
        at: HostOffset,
        /// Its length in bytes.
        length: u64,
        /// The file's length in bytes.
        file_length: u64,
    },
    /// A table entry points to a place that is not the start of a cluster.
    #[error("{}: {what} at {at} does not start at a cluster; the image is damaged", path.display())]
    Unaligned {
        /// The file.
        path: PathBuf,
        /// What the entry points to.
        what: &'static str,
        /// Where it points.
        at: HostOffset,
    },
    /// A table entry has bits set that the format reserves, or bits that exclude each other.
    #[error("{}: the {what} for {guest} is {entry:#x}, which is not valid ({reason}); the image is damaged", path.display())]
    InvalidEntry {
        /// The file.
        path: PathBuf,
        /// Which table the entry is in.
        what: &'static str,
        /// The guest offset that the entry describes.
        guest: GuestOffset,
        /// The entry.
        entry: u64,
        /// Why it is not valid.
        reason: &'static str,
    },
    /// Two entries of the active L1 table point to one L2 table.
    #[error("{}: two entries of the L1 table point to {at}; the image is damaged", path.display())]
    SharedL2Table {
        /// The file.
        path: PathBuf,
        /// The L2 table.
        at: HostOffset,
    },
    /// A compressed cluster does not give one cluster of data.
    #[error("{}: the {method} compressed cluster at {at} does not decompress: {reason}; the image is damaged", path.display())]
    Decompress {
        /// The file.
        path: PathBuf,
        /// The compression method.
        method: &'static str,
        /// Where the compressed data starts.
        at: HostOffset,
        /// What the decompressor said.
        reason: String,
    },
    /// The caller asked for bytes that the disk does not have.
    #[error(
        "{} bytes at {start} were asked for, but the disk ends at {disk_length:#x}",
        length
    )]
    OutOfDisk {
        /// The first byte asked for.
        start: GuestOffset,
        /// How many bytes were asked for.
        length: u64,
        /// The disk's length in bytes.
        disk_length: u64,
    },
    /// The layers given do not make a chain.
    #[error("the layers given do not make a chain: {reason}")]
    InvalidChain {
        /// Why not.
        reason: String,
    },
    /// A change of the image was interrupted while its first cluster was being replaced.
    #[error("{}: a change of this image was interrupted; run `stead img recover` on it, which finishes the change (nobody else can open the image before)", path.display())]
    InProgress {
        /// The file.
        path: PathBuf,
    },
    /// Another process has the image open.
    #[error("{}: the image is in use by {holders}; nothing was changed", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
        /// Who has it open.
        holders: String,
    },
    /// The image is marked dirty, so its refcounts may be wrong.
    #[error("{}: the image is marked dirty (its refcounts were not written when it was last used); repair it first; nothing was changed", path.display())]
    MarkedDirty {
        /// The file.
        path: PathBuf,
    },
    /// The image is damaged, and a change could make that worse.
    #[error("{}: the image is damaged ({corruptions} findings, the first: {first}); repair it first; nothing was changed", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How many findings besides leaks a check has.
        corruptions: u64,
        /// The first of them.
        first: String,
    },
    /// What was asked for cannot be done with this image.
    #[error("{}: {operation}: {reason}; nothing was changed", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What was to be done.
        operation: &'static str,
        /// Why not.
        reason: String,
    },
    /// A refcount would become larger than its width allows.
    #[error("{}: the refcount of the cluster at {cluster} would become larger than {most}, the most that refcounts of {bits} bits can say; nothing was changed", path.display())]
    RefcountOverflow {
        /// The file.
        path: PathBuf,
        /// The cluster.
        cluster: HostOffset,
        /// The largest refcount.
        most: u64,
        /// The width of a refcount.
        bits: u32,
    },
    /// There is not enough room for a change, or for a new file.
    #[error("{}: {needed} bytes are needed, {available} are there; nothing was changed", path.display())]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// The bytes that the change takes at its peak beyond what the file occupies, or that a new file needs.
        needed: u64,
        /// The bytes that are there.
        available: u64,
    },
    /// The new state was written beside the old one and did not stand its proof.
    #[error("{}: the new state is not whole ({reason}); it was not switched to, and the image is as it was", path.display())]
    NotProven {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The system failed while the new state was being switched to.
    #[error("{}: {action} failed while the new state was being switched to: {source}; the image is whole, as it was or as it was to be, or it says that it is in progress and `stead img recover` finishes it", path.display())]
    Switch {
        /// The file.
        path: PathBuf,
        /// What failed.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A change in progress cannot be finished.
    #[error("{}: the change in progress cannot be finished: {reason}; the image stays in progress", path.display())]
    Unrecoverable {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The journal of a change in progress names files that the caller did not allow.
    #[error("{}: the change in progress cannot be finished without other files: {}; anybody can write an image that says so, so allow them only if they are its own (`stead img recover --with FILE`, for each); nothing was written, and the image stays in progress", path.display(), crate::edit::listed_files(files))]
    JournalFiles {
        /// The file.
        path: PathBuf,
        /// All that were not allowed.
        files: Vec<crate::edit::JournalFile>,
    },
    /// The image to be made cannot be expressed in the format.
    #[error("the image {} cannot be made: {reason}; nothing was written under its name", path.display())]
    InvalidImage {
        /// The file that was to be made.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The caller wanted the operation to end.
    #[error("{}: cancelled; a new file was not made, and what was there before is as it was", path.display())]
    Cancelled {
        /// The file that was to be made or changed.
        path: PathBuf,
    },
    /// What was written is not what should have been written; the new file was thrown away.
    #[error("the new image {} was read back and is not right: {found}; it was not kept, and the file system or memory may be faulty", path.display())]
    NotVerified {
        /// The file that was to be made.
        path: PathBuf,
        /// What is wrong.
        found: String,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}
