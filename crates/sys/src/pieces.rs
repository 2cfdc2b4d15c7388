//! A file read as pieces of data and holes, in order, and whether it stood still meanwhile.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// So many bytes of data, in the buffer.
    Data(usize),
    /// So many bytes that take no room on the disk and read as zeros.
    Hole(u64),
}

/// What changes when a file does.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    length_bytes: i64,
    modified: (i64, u64),
    changed: (i64, u64),
}

/// Reads a part of a file.
#[derive(Debug)]
pub struct Pieces {
    file: File,
    at: u64,
    end: u64,
    // Data reaches to here; beyond, the file must be asked.
    data_end: u64,
    before: Stamp,
}

impl Pieces {
    /// Reads from `start` to `end`, or to the end of the file if that is nearer.
    ///
    /// # Errors
    /// When the file cannot be examined.
    pub fn new(file: File, start: u64, end: u64) -> io::Result<Self> {
        let before = stamp(&file)?;
        let length = u64::try_from(before.length_bytes).unwrap_or(0);
        let end = end.min(length);
        Ok(Self {
            file,
            at: start.min(end),
            end,
            data_end: 0,
            before,
        })
    }

    /// Where the next piece begins.
    #[must_use]
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Where the last piece ends.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The next piece: data into `buffer`, at most its length, or a hole of at most `hole_limit` bytes; nothing at the end.
    ///
    /// # Errors
    /// When reading fails; [`io::ErrorKind::UnexpectedEof`] when the file has become shorter.
    ///
    /// # Panics
    /// When there is no room in the buffer or no limit: a fault of the caller.
    pub fn next(&mut self, buffer: &mut [u8], hole_limit: u64) -> io::Result<Option<Piece>> {
        assert!(!buffer.is_empty() && hole_limit > 0, "a piece has a length");
        if self.at == self.end {
            return Ok(None);
        }
        if self.at >= self.data_end
            && let Some(hole) = self.hole()?
        {
            let length = hole.min(hole_limit);
            self.at += length;
            return Ok(Some(Piece::Hole(length)));
        }
        let want = usize::try_from(self.data_end - self.at).unwrap_or(usize::MAX);
        let want = want.min(buffer.len());
        match self.file.read_at(&mut buffer[..want], self.at)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            length => {
                self.at += length as u64;
                Ok(Some(Piece::Data(length)))
            }
        }
    }

    /// How long the hole is that begins here; else finds out how far the data goes.
    fn hole(&mut self) -> io::Result<Option<u64>> {
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(self.at)) {
            Ok(data) => data,
            // Holes up to the end of the file.
            Err(Errno::NXIO) => self.end,
            // The file system knows no holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => self.at,
            Err(error) => return Err(error.into()),
        };
        if data > self.at {
            return Ok(Some(data.min(self.end) - self.at));
        }
        self.data_end = match rustix::fs::seek(&self.file, SeekFrom::Hole(self.at)) {
            Ok(hole) if hole > self.at => hole.min(self.end),
            Ok(_) | Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NXIO) => self.end,
            Err(error) => return Err(error.into()),
        };
        Ok(None)
    }

    /// Whether the file is as it was when reading began: length, time of its content and of its attributes.
    ///
    /// # Errors
    /// When the file cannot be examined.
    pub fn stood_still(&self) -> io::Result<bool> {
        Ok(stamp(&self.file)? == self.before)
    }
}

fn stamp(file: &File) -> io::Result<Stamp> {
    let stat = rustix::fs::fstat(file)?;
    Ok(Stamp {
        length_bytes: stat.st_size,
        modified: (stat.st_mtime, stat.st_mtime_nsec),
        changed: (stat.st_ctime, stat.st_ctime_nsec),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_and_holes_come_in_order_and_their_sum_is_the_file() {
        let file = tempfile::tempfile().expect("temp file");
        file.set_len(10 << 20).expect("grow");
        file.write_all_at(&[7; 5000], 4 << 20).expect("write");
        let mut pieces = Pieces::new(file, 100, u64::MAX).expect("pieces");
        let (mut buffer, mut data, mut holes) = (vec![0; 4096], Vec::new(), 0);
        while let Some(piece) = pieces.next(&mut buffer, 3 << 20).expect("read") {
            match piece {
                Piece::Data(length) => data.extend_from_slice(&buffer[..length]),
                Piece::Hole(length) => {
                    assert!(length <= 3 << 20);
                    holes += length;
                }
            }
        }
        assert_eq!(data.len() as u64 + holes, (10 << 20) - 100);
        assert!(holes >= 9 << 20, "the file system keeps holes");
        assert_eq!(data.iter().filter(|byte| **byte == 7).count(), 5000);
        assert!(pieces.stood_still().expect("stat"));
    }

    #[test]
    fn a_file_that_shrinks_or_is_written_is_noticed() {
        let file = tempfile::tempfile().expect("temp file");
        file.write_all_at(&[1; 8192], 0).expect("write");
        let other = file.try_clone().expect("the same file");
        let mut pieces = Pieces::new(file, 0, u64::MAX).expect("pieces");
        let mut buffer = vec![0; 4096];
        pieces.next(&mut buffer, 1).expect("read");
        other.set_len(4096).expect("shrink");
        let error = pieces.next(&mut buffer, 1).expect_err("shorter");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(!pieces.stood_still().expect("stat"));
    }
}
