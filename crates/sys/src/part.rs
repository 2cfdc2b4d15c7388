//! A part of a file as a storage of its own, with room that ends where the part ends.

use std::io;

use crate::storage::{FileStorage, Storage};

/// Bytes of a file from one place to another, which do not grow: what would lie behind the end is refused as on a
/// full disk.
#[derive(Debug)]
pub struct PartStorage {
    whole: FileStorage,
    start: u64,
    length: u64,
}

impl PartStorage {
    /// The `length` bytes of `whole` from `start` on.
    ///
    /// # Errors
    /// When the file ends before them, or the system cannot tell.
    pub fn new(whole: FileStorage, start: u64, length: u64) -> io::Result<Self> {
        let end = start.checked_add(length);
        let there = whole.len()?;
        if end.is_none_or(|end| end > there) {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        Ok(Self {
            whole,
            start,
            length,
        })
    }

    /// Where `length` bytes at `at` lie in the file.
    fn place(&self, at: u64, length: usize, behind: io::ErrorKind) -> io::Result<u64> {
        let end = at.checked_add(length as u64);
        match end {
            Some(end) if end <= self.length => Ok(self.start + at),
            Some(_) | None => Err(io::Error::from(behind)),
        }
    }
}

impl Storage for PartStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.length)
    }

    fn room(&self) -> io::Result<Option<u64>> {
        Ok(Some(self.length))
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let place = self.place(at, bytes.len(), io::ErrorKind::UnexpectedEof)?;
        self.whole.read_exact_at(bytes, place)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let place = self.place(at, bytes.len(), io::ErrorKind::StorageFull)?;
        self.whole.write_all_at(bytes, place)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        match length <= self.length {
            true => Ok(()),
            false => Err(io::Error::from(io::ErrorKind::StorageFull)),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.whole.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_of_the_part_is_read_or_written() {
        let file = tempfile::tempfile().expect("temp file");
        file.set_len(100).expect("longer");
        let whole = FileStorage::new(file.try_clone().expect("the file")).expect("a file");
        let part = PartStorage::new(whole, 10, 20).expect("it lies in the file");
        part.write_all_at(&[7; 20], 0).expect("room");
        let error = part.write_all_at(&[7; 2], 19).expect_err("no room");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let error = part.set_len(21).expect_err("no room");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        part.set_len(0).expect("as a device");
        assert_eq!(part.len().expect("known"), 20);
        let mut bytes = [0; 2];
        let error = part.read_exact_at(&mut bytes, 19).expect_err("the end");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let whole = FileStorage::new(file).expect("a file");
        let mut all = [0; 100];
        whole.read_exact_at(&mut all, 0).expect("read");
        assert!(all[..10].iter().chain(&all[30..]).all(|byte| *byte == 0));
        assert!(all[10..30].iter().all(|byte| *byte == 7));
        assert!(PartStorage::new(whole, 90, 11).is_err());
    }
}
