//! A decompressed stream that can be read twice, and its end first: what a walk needs.
//!
//! The first pass goes through the whole stream, hashes it and keeps its end; the second one decompresses it
//! again. Memory is bounded by the end that is kept, however long the stream is.

use std::io::{self, Read, Seek, SeekFrom};

use crate::control::Control;

/// How much of the end is kept, in bytes: more than the longest description of a stream, 16 MiB.
const TAIL_BYTES: usize = (16 << 20) + 4096;
const STEP_BYTES: usize = 1 << 20;

type Stream = Box<dyn Read + Send>;

/// A stream of known length that starts anew when it is told to.
pub(crate) struct Replay<F> {
    open: F,
    length: u64,
    hash: [u8; 32],
    tail: Vec<u8>,
    control: Control,
    at: u64,
    /// The stream, and how much of it was read.
    pass: Option<(Stream, u64)>,
}

impl<F: FnMut() -> io::Result<Stream>> Replay<F> {
    /// Reads the stream once.
    pub fn new(mut open: F, control: &Control) -> io::Result<Self> {
        let mut stream = open()?;
        let mut hasher = blake3::Hasher::new();
        let (mut tail, mut length) = (Vec::new(), 0);
        let mut buffer = vec![0; STEP_BYTES];
        loop {
            control.check()?;
            let count = stream.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            hasher.update(&buffer[..count]);
            tail.extend_from_slice(&buffer[..count]);
            length += count as u64;
            control.tell(length, 0);
            if tail.len() >= 2 * TAIL_BYTES {
                tail.drain(..tail.len() - TAIL_BYTES);
            }
        }
        Ok(Self {
            open,
            length,
            hash: *hasher.finalize().as_bytes(),
            tail,
            control: control.clone(),
            at: 0,
            pass: None,
        })
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// Reads from the kept end, if the place lies there.
    fn read_tail(&mut self, bytes: &mut [u8]) -> Option<usize> {
        let tail_at = self.length - self.tail.len() as u64;
        let skip = usize::try_from(self.at.checked_sub(tail_at)?).ok()?;
        let left = self.tail.get(skip..).unwrap_or_default();
        let count = left.len().min(bytes.len());
        bytes[..count].copy_from_slice(&left[..count]);
        self.at += count as u64;
        Some(count)
    }
}

impl<F: FnMut() -> io::Result<Stream>> Read for Replay<F> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if let Some(count) = self.read_tail(bytes) {
            return Ok(count);
        }
        self.control.check()?;
        let (mut stream, from) = match self.pass.take() {
            Some(pass) if pass.1 <= self.at => pass,
            Some(_) | None => ((self.open)()?, 0),
        };
        let skip = self.at - from;
        let skipped = io::copy(&mut stream.by_ref().take(skip), &mut io::sink())?;
        if skipped < skip {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let count = stream.read(bytes)?;
        self.at += count as u64;
        self.pass = Some((stream, self.at));
        Ok(count)
    }
}

impl<F> Seek for Replay<F> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_longer_than_what_is_kept_reads_the_same_from_its_end_and_from_its_start() {
        let bytes: Vec<u8> = (0..50_000_000_u32).map(|n| (n >> 3) as u8).collect();
        let open = || Ok(Box::new(io::Cursor::new(bytes.clone())) as Stream);
        let mut replay = Replay::new(open, &Control::silent()).expect("read");
        assert_eq!(replay.length(), bytes.len() as u64);
        assert_eq!(replay.hash(), *blake3::hash(&bytes).as_bytes());
        for at in [49_999_000, 0, 1000, 20_000_000, 40_000_000] {
            replay.seek(SeekFrom::Start(at)).expect("seek");
            let mut found = vec![0; 1000];
            replay.read_exact(&mut found).expect("read");
            assert_eq!(found, bytes[at as usize..at as usize + 1000], "{at}");
        }
        replay.seek(SeekFrom::Start(0)).expect("seek");
        let mut all = Vec::new();
        replay.read_to_end(&mut all).expect("read");
        assert!(all == bytes);
    }
}
