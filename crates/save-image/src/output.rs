//! Where an image is written: past the page cache where that is possible, hashed on the way.
//!
//! Hashing and writing overlap: a thread writes one piece while the next one is filled and hashed. It writes them
//! in their order, one at a time, and has ended before anything is synced.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use stead_sys::direct::{self, ALIGNMENT, AlignedBuffer};
use stead_sys::storage::{FileStorage, Storage};

use crate::control::Control;
use crate::tree::{Leaves, Tree};

/// How many bytes are hashed and written at a time.
const STEP_BYTES: usize = 4 << 20;
/// How many pieces may wait to be written, besides the one that is being filled.
const WAITING: usize = 2;

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

/// A piece of the payload that is to be written.
#[derive(Debug)]
struct Piece {
    buffer: AlignedBuffer,
    filled: usize,
    at: u64,
}

/// The thread that writes. It ends at its first failure, or when nothing more can come.
#[derive(Debug)]
struct Background {
    /// `None`: nothing more will come.
    pieces: Option<SyncSender<Piece>>,
    /// Buffers that were written and may be filled again.
    empty: Receiver<AlignedBuffer>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Background {
    fn start(storage: Arc<dyn Storage>) -> io::Result<Self> {
        let (pieces, from_sink) = sync_channel::<Piece>(WAITING);
        let (to_sink, empty) = sync_channel(WAITING + 1);
        for _ in 0..WAITING {
            to_sink
                .send(AlignedBuffer::new(STEP_BYTES))
                .map_err(io::Error::other)?;
        }
        let work = move || {
            for piece in from_sink {
                write_blocks(&*storage, &piece.buffer.bytes()[..piece.filled], piece.at)?;
                // The last pieces come back to nobody.
                drop(to_sink.send(piece.buffer));
            }
            Ok(())
        };
        let named = std::thread::Builder::new().name("save-image-write".to_owned());
        Ok(Self {
            pieces: Some(pieces),
            empty,
            thread: Some(named.spawn(work)?),
        })
    }

    /// Hands a piece over and gives a buffer for the next one.
    fn swap(&mut self, piece: Piece) -> io::Result<AlignedBuffer> {
        let sent = self.pieces.as_ref().map(|pieces| pieces.send(piece));
        if let Some(Ok(())) = sent
            && let Ok(buffer) = self.empty.recv()
        {
            return Ok(buffer);
        }
        self.end()?;
        Err(io::Error::other("the thread that writes is gone"))
    }

    /// Waits until everything that was handed over is written, or says why it is not.
    fn end(&mut self) -> io::Result<()> {
        self.pieces = None;
        let Some(thread) = self.thread.take() else {
            return Err(io::Error::other("an earlier write failed"));
        };
        match thread.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Background {
    /// Nothing is written any more once the file is removed.
    fn drop(&mut self) {
        self.pieces = None;
        if let Some(thread) = self.thread.take() {
            // Whoever drops this has an error already, or wants none.
            drop(thread.join());
        }
    }
}

/// Takes the payload as it is to be stored, hashes it and writes it.
#[derive(Debug)]
pub(crate) struct PayloadSink {
    background: Background,
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
    pub fn new(
        storage: Arc<dyn Storage>,
        at: u64,
        tree: Tree,
        control: Control,
    ) -> io::Result<Self> {
        Ok(Self {
            background: Background::start(storage)?,
            at,
            buffer: AlignedBuffer::new(STEP_BYTES),
            filled: 0,
            tree,
            control,
            expected: 0,
        })
    }

    pub fn expect(mut self, bytes: u64) -> Self {
        self.expected = bytes;
        self
    }

    /// Hashes what was filled and hands it over.
    fn write_out(&mut self) -> io::Result<()> {
        self.control.check()?;
        self.tree.update(&self.buffer.bytes()[..self.filled]);
        let piece = Piece {
            buffer: std::mem::replace(&mut self.buffer, AlignedBuffer::new(0)),
            filled: self.filled,
            at: self.at,
        };
        self.at += self.filled as u64;
        self.filled = 0;
        self.buffer = self.background.swap(piece)?;
        self.control.tell(self.tree.total(), self.expected);
        Ok(())
    }

    /// Writes what is left. Nothing is durable yet.
    pub fn finish(mut self) -> io::Result<Leaves> {
        if self.filled > 0 {
            self.write_out()?;
        }
        self.background.end()?;
        Ok(self.tree.finish())
    }
}

impl Write for PayloadSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.filled == STEP_BYTES {
            self.write_out()?;
        }
        if self.buffer.bytes().is_empty() {
            // Compressors write what they have left when they are dropped.
            return Err(io::Error::other("an earlier write failed"));
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
