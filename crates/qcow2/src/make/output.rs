//! The file that a new image is written into: a hidden partial file, or something that is there already.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use stead_sys::direct::{self, ALIGNMENT};
use stead_sys::durable::{Existing, Partial};
use stead_sys::share::{self, Shared};
use stead_sys::space;

use super::options::{Preallocation, Target};
use crate::error::{Error, Result};
use crate::header::{SECTOR_BYTES, to_u64, to_usize};

/// Shorter writes go through the page cache.
const DIRECT_FROM_BYTES: usize = 64 << 10;
/// A new file is made longer by as many bytes at once. A direct write that makes it longer keeps all others waiting.
const GROW_BYTES: u64 = 256 << 20;
/// Zeros are written in pieces of at most this many bytes.
const ZERO_STEP_BYTES: u64 = 1 << 20;

#[derive(Debug)]
enum Place {
    Partial(Partial, Existing),
    There(File),
    /// Nowhere: what is written is dropped.
    Dropped(File),
}

/// A file being written.
#[derive(Debug)]
pub(crate) struct Output {
    place: Place,
    path: PathBuf,
    /// The same file, past the page cache, where that is possible.
    direct: Option<File>,
    /// The length that a new file was given, in bytes. It is that of its content only at the end.
    given: Mutex<u64>,
    /// Whether what is written is to survive lost power.
    synced: bool,
    #[cfg(test)]
    pub fault: super::fault::Fault,
}

impl Output {
    /// Starts writing; for a new file nothing appears yet.
    pub fn create(target: &Target) -> Result<Self> {
        let mut output = Self::create_cached(target)?;
        output.synced = true;
        output.direct = direct::reopen(output.file())
            .map_err(|source| Error::io("open for direct writes", &output.path, source))?;
        Ok(output)
    }

    /// As [`Output::create`], without the syncs that lost power asks for.
    pub fn create_cached(target: &Target) -> Result<Self> {
        let path = target.path();
        let place = match target {
            Target::New { mode, existing, .. } => {
                refuse_existing(path, *existing)?;
                let partial = Partial::create(path, *mode)
                    .map_err(|source| Error::io("create", path, source))?;
                Place::Partial(partial, *existing)
            }
            Target::InPlace { .. } => {
                let opened = OpenOptions::new().read(true).write(true).open(path);
                Place::There(opened.map_err(|source| Error::io("open", path, source))?)
            }
        };
        Ok(Self::of(place, path))
    }

    /// Takes writes and keeps nothing.
    pub fn dropped(path: &Path) -> Result<Self> {
        let file = File::open("/dev/null")
            .map_err(|source| Error::io("open", Path::new("/dev/null"), source))?;
        Ok(Self::of(Place::Dropped(file), path))
    }

    fn of(place: Place, path: &Path) -> Self {
        Self {
            place,
            path: path.to_owned(),
            direct: None,
            given: Mutex::new(0),
            synced: false,
            #[cfg(test)]
            fault: super::fault::Fault::planned(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> &File {
        match &self.place {
            Place::Partial(partial, _) => partial.file(),
            Place::There(file) | Place::Dropped(file) => file,
        }
    }

    /// Whether what is not written reads as zeros.
    pub fn starts_empty(&self) -> bool {
        match self.place {
            Place::Partial(..) | Place::Dropped(_) => true,
            Place::There(_) => false,
        }
    }

    fn is_dropped(&self) -> bool {
        match self.place {
            Place::Dropped(_) => true,
            Place::Partial(..) | Place::There(_) => false,
        }
    }

    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        if self.is_dropped() {
            return Ok(());
        }
        #[cfg(test)]
        let spoiled = self.fault.spoiled(bytes);
        #[cfg(test)]
        let bytes = spoiled.as_deref().unwrap_or(bytes);
        let long = bytes.len() >= DIRECT_FROM_BYTES && direct::is_aligned(at, bytes);
        let file = match &self.direct {
            Some(direct) if long => {
                self.grow(at + to_u64(bytes.len()))?;
                direct
            }
            Some(_) | None => self.file(),
        };
        self.step("write", || file.write_all_at(bytes, at))
    }

    /// Writes `memory[range]`, which may begin and end anywhere in the file: whole blocks past the page cache,
    /// what is left at both ends through it.
    ///
    /// The bytes are moved in `memory`, down by less than [`ALIGNMENT`], so that both lie alike; there must be as
    /// many before them that are not needed any more.
    pub fn write_packed(
        &self,
        at: u64,
        memory: &mut direct::AlignedBuffer,
        range: Range<usize>,
    ) -> Result<()> {
        let alignment = to_usize(ALIGNMENT);
        let (length, within) = (range.len(), to_usize(at % ALIGNMENT));
        if self.direct.is_none() || length < DIRECT_FROM_BYTES + 2 * alignment {
            return self.write(at, &memory.bytes()[range]);
        }
        let down = (range.start + alignment - within) % alignment;
        let start = range.start - down;
        memory.bytes_mut().copy_within(range, start);
        let bytes = &memory.bytes()[start..start + length];
        let (first, rest) = bytes.split_at((alignment - within) % alignment);
        let (whole, last) = rest.split_at(rest.len() / alignment * alignment);
        let whole_at = at + to_u64(first.len());
        for (at, part) in [
            (at, first),
            (whole_at, whole),
            (whole_at + to_u64(whole.len()), last),
        ] {
            if !part.is_empty() {
                self.write(at, part)?;
            }
        }
        Ok(())
    }

    /// Makes a new file long enough for a write up to `end`, and more.
    fn grow(&self, end: u64) -> Result<()> {
        let Place::Partial(partial, _) = &self.place else {
            return Ok(());
        };
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        if end > *given {
            let length = end.next_multiple_of(GROW_BYTES);
            self.step("set the length of", || partial.file().set_len(length))?;
            *given = length;
        }
        Ok(())
    }

    /// Reads what was written.
    pub fn read_back(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        self.step("read back", || self.file().read_exact_at(bytes, at))
    }

    /// Shares blocks of `from`; `false` where that is not possible.
    pub fn share(&self, from: &File, range: Shared) -> Result<bool> {
        if self.is_dropped() {
            return Ok(true);
        }
        self.step("share blocks with", || {
            share::clone_range(from, self.file(), range)
        })
    }

    /// Makes a range read as zeros that may hold something else.
    pub fn write_zeros(&self, at: u64, length: u64) -> Result<()> {
        if self.is_dropped() {
            return Ok(());
        }
        let punched = self.step("punch a hole into", || {
            space::punch(self.file(), at, length)
        })?;
        if punched {
            return Ok(());
        }
        self.fill_zeros(at, length)
    }

    /// Writes zeros, so that the room is taken.
    pub fn fill_zeros(&self, at: u64, length: u64) -> Result<()> {
        let zeros = direct::AlignedBuffer::new(to_usize(ZERO_STEP_BYTES.min(length)));
        let mut done = 0;
        while done < length {
            let step = ZERO_STEP_BYTES.min(length - done);
            self.write(at + done, &zeros.bytes()[..to_usize(step)])?;
            done += step;
        }
        Ok(())
    }

    /// Reserves room, or takes it by writing zeros where the file system cannot reserve.
    pub fn reserve(&self, at: u64, length: u64) -> Result<()> {
        if self.is_dropped()
            || self.step("reserve room for", || {
                space::reserve(self.file(), at, length)
            })?
        {
            return Ok(());
        }
        self.fill_zeros(at, length)
    }

    /// Takes the room of a range that is to read as zeros and was not written yet.
    pub fn take_room(&self, preallocation: Preallocation, at: u64, length: u64) -> Result<()> {
        match (preallocation, self.starts_empty()) {
            (_, _) if length == 0 => Ok(()),
            (Preallocation::Off | Preallocation::Metadata, true) => Ok(()),
            (Preallocation::Off | Preallocation::Metadata, false) => self.write_zeros(at, length),
            (Preallocation::Falloc, true) => self.reserve(at, length),
            (Preallocation::Falloc, false) | (Preallocation::Full, _) => {
                self.fill_zeros(at, length)
            }
        }
    }

    /// What is written in place is no image any more, until its header is written.
    pub fn begin_in_place(&self) -> Result<()> {
        if self.starts_empty() {
            return Ok(());
        }
        self.fill_zeros(0, SECTOR_BYTES)?;
        self.sync()
    }

    /// Sets the length of a new file; one in place only grows, and a device stays as it is.
    pub fn set_length(&self, length: u64) -> Result<()> {
        match &self.place {
            Place::Dropped(_) => Ok(()),
            Place::Partial(partial, _) => {
                let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
                self.step("set the length of", || partial.file().set_len(length))?;
                *given = length;
                Ok(())
            }
            Place::There(file) => self.step("set the length of", || {
                let stat = file.metadata()?;
                if stat.is_file() && stat.len() < length {
                    return file.set_len(length);
                }
                Ok(())
            }),
        }
    }

    pub fn sync(&self) -> Result<()> {
        if !self.synced {
            return Ok(());
        }
        self.step("sync", || self.file().sync_all())
    }

    /// Lets a new file appear under its name.
    ///
    /// # Durability
    /// When this returns `Ok`, content, name and folder entry have been synced, but for
    /// [`Output::create_cached`].
    pub fn publish(self) -> Result<File> {
        self.sync()?;
        let path = self.path;
        match self.place {
            Place::Partial(partial, existing) => match self.synced {
                true => partial.publish(existing),
                false => partial.publish_unsynced(existing),
            }
            .map_err(|source| Error::io("publish", &path, source)),
            Place::There(file) | Place::Dropped(file) => Ok(file),
        }
    }

    fn step<T>(&self, action: &'static str, work: impl FnOnce() -> io::Result<T>) -> Result<T> {
        #[cfg(test)]
        self.fault
            .before()
            .map_err(|source| Error::io(action, &self.path, source))?;
        work().map_err(|source| Error::io(action, &self.path, source))
    }
}

/// Publishing refuses too; here it costs nothing yet.
fn refuse_existing(path: &Path, existing: Existing) -> Result<()> {
    if existing == Existing::Keep && path.symlink_metadata().is_ok() {
        let source = io::Error::from(io::ErrorKind::AlreadyExists);
        return Err(Error::io("create", path, source));
    }
    Ok(())
}

/// The length of a file or block device, in bytes.
pub(crate) fn length_of(file: &File, path: &Path) -> Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
        .map_err(|source| Error::io("find the length of", path, source))
}

/// Fails when `bytes` would not fit into what is written in place.
pub(crate) fn require_length(output: &Output, bytes: u64) -> Result<()> {
    let stat = output
        .file()
        .metadata()
        .map_err(|source| Error::io("look at", output.path(), source))?;
    if output.starts_empty() || stat.is_file() {
        return Ok(());
    }
    let available = length_of(output.file(), output.path())?;
    if available < bytes {
        return Err(Error::NoRoom {
            path: output.path().to_owned(),
            needed: bytes,
            available,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_pieces_lie_where_they_were_put_and_touch_nothing_else() {
        let folder = tempfile::tempdir().expect("temp dir");
        let target = Target::New {
            path: folder.path().join("image"),
            mode: 0o600,
            existing: Existing::Keep,
        };
        let output = Output::create(&target).expect("create");
        let alignment = to_usize(ALIGNMENT);
        // In turn short, long, and long with ends in the middle of a block, each where the last one ended.
        let lengths = [5, 70_000, 300_001, DIRECT_FROM_BYTES, 4091, 200_000, 90_113];
        let mut memory = direct::AlignedBuffer::new(alignment + lengths.iter().sum::<usize>());
        let mut random = 1_u32;
        for byte in memory.bytes_mut() {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = random.to_be_bytes()[0];
        }
        let wanted = memory.bytes()[alignment..].to_vec();
        for start in [0, 4096, 70_001] {
            let (mut from, mut at) = (alignment, start);
            let mut copy = direct::AlignedBuffer::new(memory.bytes().len());
            copy.bytes_mut().copy_from_slice(memory.bytes());
            output.set_length(0).expect("cut");
            for length in lengths {
                let piece = from..from + length;
                output
                    .write_packed(at, &mut copy, piece)
                    .expect("write a piece");
                (from, at) = (from + length, at + to_u64(length));
            }
            output.set_length(at + 10).expect("set the length");
            let mut found = vec![1; to_usize(at) + 10];
            output.read_back(0, &mut found).expect("read");
            let (before, rest) = found.split_at(to_usize(start));
            assert!(before.iter().all(|byte| *byte == 0), "{start}");
            assert!(rest[..wanted.len()] == wanted, "{start}");
            assert!(rest[wanted.len()..].iter().all(|byte| *byte == 0));
        }
    }
}
