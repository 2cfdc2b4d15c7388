//! A small disk in memory, which is full behind [`CAPACITY_BYTES`].

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use stead_sys::storage::Storage;

/// As long as a disk in memory can become, in bytes.
pub const CAPACITY_BYTES: u64 = 4 << 20;

#[derive(Debug)]
pub struct Memory(Mutex<Vec<u8>>);

impl Memory {
    pub fn new(bytes: &[u8]) -> Self {
        Self(Mutex::new(bytes.to_vec()))
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.now().clone()
    }

    fn now(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a range, if the disk can be so long.
fn end(at: u64, length: usize) -> io::Result<usize> {
    let end = at.checked_add(length as u64);
    let end = end.filter(|end| *end <= CAPACITY_BYTES);
    let end = end.ok_or_else(|| io::Error::from(io::ErrorKind::StorageFull))?;
    Ok(usize::try_from(end).expect("small"))
}

impl Storage for Memory {
    fn len(&self) -> io::Result<u64> {
        Ok(self.now().len() as u64)
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let now = self.now();
        let end = end(at, bytes.len())?;
        let found = now.get(end - bytes.len()..end);
        bytes.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut now = self.now();
        let end = end(at, bytes.len())?;
        let length = now.len().max(end);
        now.resize(length, 0);
        now[end - bytes.len()..end].copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.now().resize(end(length, 0)?, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
