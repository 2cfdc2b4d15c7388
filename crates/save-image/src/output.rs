//! Where an image is written: past the page cache where that is possible, hashed on the way.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use stead_sys::direct::{self, ALIGNMENT, AlignedBuffer};
use stead_sys::storage::{FileStorage, Storage};

use crate::control::Control;
use crate::tree::{Leaves, Tree};

/// How many bytes are hashed and written at a time.
const STEP_BYTES: usize = 2 << 20;

/// A file whose aligned writes go past the page cache; the others, through a descriptor of their own, do not.
#[derive(Debug)]
pub(crate) struct DirectFile {
    file: FileStorage,
    direct: Option<File>,
}

impl DirectFile {
    pub fn new(file: File) -> io::Result<Self> {
        Ok(Self {
            direct: direct::reopen(&file)?,
            file: FileStorage::new(file)?,
        })
    }
}

impl Storage for DirectFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        if let Some(direct) = &self.direct
            && direct::is_aligned(at, bytes)
        {
            match direct.write_all_at(bytes, at) {
                // Blocks that are larger than usual: the page cache knows them.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                done => return done,
            }
        }
        self.file.write_all_at(bytes, at)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

/// Writes all of `bytes` at `at`, a multiple of [`ALIGNMENT`], by way of aligned memory.
pub(crate) fn write_aligned(storage: &dyn Storage, bytes: &[u8], at: u64) -> io::Result<()> {
    let mut buffer = AlignedBuffer::new(STEP_BYTES.min(bytes.len()));
    let mut place = at;
    for piece in bytes.chunks(STEP_BYTES) {
        let aligned = &mut buffer.bytes_mut()[..piece.len()];
        aligned.copy_from_slice(piece);
        write_blocks(storage, aligned, place)?;
        place += piece.len() as u64;
    }
    Ok(())
}

/// Writes whole blocks in one call and what is left in another.
fn write_blocks(storage: &dyn Storage, bytes: &[u8], at: u64) -> io::Result<()> {
    let whole = bytes.len() / ALIGNMENT as usize * ALIGNMENT as usize;
    let (blocks, rest) = bytes.split_at(whole);
    if !blocks.is_empty() {
        storage.write_all_at(blocks, at)?;
    }
    if !rest.is_empty() {
        storage.write_all_at(rest, at + whole as u64)?;
    }
    Ok(())
}

/// Takes the payload as it is to be stored, hashes it and writes it.
#[derive(Debug)]
pub(crate) struct PayloadSink {
    storage: Arc<dyn Storage>,
    /// Where the buffer's first byte belongs.
    at: u64,
    buffer: AlignedBuffer,
    filled: usize,
    tree: Tree,
    control: Control,
    /// What the payload will have in about, in bytes, to tell how far it is.
    expected: u64,
}

impl PayloadSink {
    pub fn new(storage: Arc<dyn Storage>, at: u64, tree: Tree, control: Control) -> Self {
        Self {
            storage,
            at,
            buffer: AlignedBuffer::new(STEP_BYTES),
            filled: 0,
            tree,
            control,
            expected: 0,
        }
    }

    pub fn expect(mut self, bytes: u64) -> Self {
        self.expected = bytes;
        self
    }

    fn write_out(&mut self) -> io::Result<()> {
        self.control.check()?;
        let bytes = &self.buffer.bytes()[..self.filled];
        self.tree.update(bytes);
        write_blocks(&*self.storage, bytes, self.at)?;
        self.at += self.filled as u64;
        self.filled = 0;
        self.control.tell(self.tree.total(), self.expected);
        Ok(())
    }

    /// Writes what is left. Nothing is durable yet.
    pub fn finish(mut self) -> io::Result<Leaves> {
        if self.filled > 0 {
            self.write_out()?;
        }
        Ok(self.tree.finish())
    }
}

impl Write for PayloadSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.filled == STEP_BYTES {
            self.write_out()?;
        }
        let count = bytes.len().min(STEP_BYTES - self.filled);
        self.buffer.bytes_mut()[self.filled..self.filled + count].copy_from_slice(&bytes[..count]);
        self.filled += count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
