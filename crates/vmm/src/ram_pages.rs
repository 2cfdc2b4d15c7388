//! Pages of RAM, in the order in which they come, into a sparse file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use stead_migration_stream::{PAGE_BYTES, Page};

/// How much is written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// Writes pages into a file that was empty, leaves zero pages as holes, and knows which pages came.
pub(crate) struct PageWriter {
    file: File,
    pages: u64,
    /// A bit for each page that came.
    came: Vec<u64>,
    /// Pages in a row that wait to be written, and where they begin.
    waiting: Vec<u8>,
    waiting_at: u64,
}

impl PageWriter {
    /// Makes `file`, which must be empty, `memory_bytes` long.
    pub(crate) fn new(file: File, memory_bytes: u64) -> io::Result<Self> {
        file.set_len(memory_bytes)?;
        let pages = memory_bytes / PAGE_BYTES as u64;
        let words = usize::try_from(pages.div_ceil(64)).map_err(io::Error::other)?;
        Ok(Self {
            file,
            pages,
            came: vec![0; words],
            waiting: Vec::with_capacity(BUFFER_BYTES),
            waiting_at: 0,
        })
    }

    /// Takes the page at `offset`.
    pub(crate) fn put(&mut self, offset: u64, page: Page<'_>) -> io::Result<()> {
        let came_before = self.mark(offset)?;
        match page {
            Some(bytes) => self.put_bytes(offset, bytes),
            None if came_before => self.put_bytes(offset, &[0; PAGE_BYTES]),
            None => Ok(()),
        }
    }

    /// Writes what waits and gives how many pages never came.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.flush()?;
        let came: u64 = self
            .came
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        Ok(self.pages - came)
    }

    /// Notes that a page came; whether it had before.
    fn mark(&mut self, offset: u64) -> io::Result<bool> {
        let page = offset / PAGE_BYTES as u64;
        if page >= self.pages || !offset.is_multiple_of(PAGE_BYTES as u64) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("offset {offset} is not that of one of {} pages", self.pages),
            ));
        }
        let word = &mut self.came[usize::try_from(page / 64).map_err(io::Error::other)?];
        let bit = 1 << (page % 64);
        let before = *word & bit != 0;
        *word |= bit;
        Ok(before)
    }

    fn put_bytes(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let follows = self.waiting_at + self.waiting.len() as u64 == offset;
        if !follows || self.waiting.len() + bytes.len() > BUFFER_BYTES {
            self.flush()?;
            self.waiting_at = offset;
        }
        self.waiting.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.waiting, self.waiting_at)?;
        self.waiting.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_BYTES as u64;

    fn page(byte: u8) -> [u8; PAGE_BYTES] {
        [byte; PAGE_BYTES]
    }

    #[test]
    fn the_last_of_two_contents_counts_even_if_it_is_zeros() {
        let file = tempfile::tempfile().expect("temp file");
        let mut writer = PageWriter::new(file.try_clone().expect("clone"), 4 * PAGE).expect("new");
        writer.put(0, Some(&page(1))).expect("put");
        writer.put(PAGE, Some(&page(2))).expect("put");
        writer.put(0, None).expect("put");
        writer.put(3 * PAGE, Some(&page(3))).expect("put");
        writer.put(PAGE, Some(&page(4))).expect("put");
        writer.put(2 * PAGE, None).expect("put");
        assert_eq!(writer.finish().expect("finish"), 0);
        for (at, expected) in [0, 4, 0, 3].into_iter().enumerate() {
            let mut found = page(9);
            file.read_exact_at(&mut found, at as u64 * PAGE)
                .expect("read");
            assert_eq!(found, page(expected), "page {at}");
        }
    }

    #[test]
    fn pages_that_never_came_are_counted_and_foreign_ones_refused() {
        let file = tempfile::tempfile().expect("temp file");
        let mut writer = PageWriter::new(file, 100 * PAGE).expect("new");
        for at in 0..99 {
            writer.put(at * PAGE, None).expect("put");
        }
        assert!(writer.put(100 * PAGE, None).is_err(), "behind the end");
        assert!(writer.put(7, None).is_err(), "not aligned");
        assert!(writer.put(u64::MAX, None).is_err(), "far behind the end");
        assert_eq!(writer.finish().expect("finish"), 1);
    }

    #[test]
    fn zero_pages_take_no_room() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().expect("temp file");
        let kept = file.try_clone().expect("clone");
        let mut writer = PageWriter::new(file, 4096 * PAGE).expect("new");
        for at in 0..4096 {
            writer.put(at * PAGE, None).expect("put");
        }
        writer.put(0, Some(&page(1))).expect("put");
        assert_eq!(writer.finish().expect("finish"), 0);
        let used = kept.metadata().expect("stat").blocks() * 512;
        assert!(used < 64 * PAGE, "{used} bytes used");
    }
}
