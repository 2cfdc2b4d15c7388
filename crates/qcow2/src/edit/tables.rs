//! Clusters of tables kept in memory: a set number of bytes, the least used go.
//!
//! A table that is changed lies in a cluster that the transaction allocated, never where the old state has
//! something ([`super::Edit`] sees to that). It is written there when its room is needed, or at the end.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stead_sys::storage::Storage;

use crate::error::{Error, Result};
use crate::header::{be_u64, to_u64, to_usize};
use crate::units::{ClusterSize, HostOffset};

/// The fewest clusters that are kept, so that what one step needs fits: 16 MiB where clusters have 2 MiB.
const MIN_CLUSTERS: usize = 8;
/// Neighbouring clusters are written together up to this many bytes.
const WRITE_BYTES: usize = 4 << 20;
/// Of at most so many bytes, what is there already is looked for, and not written.
const SPARED_BYTES: usize = 1 << 20;
/// What a file system writes at once.
const BLOCK_BYTES: usize = 4096;

#[derive(Debug)]
struct Kept {
    bytes: Box<[u8]>,
    changed: bool,
    /// Asked for since the hand of the clock came by.
    used: bool,
}

/// The cache of tables, in whole clusters.
#[derive(Debug)]
pub(super) struct Tables {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    size: ClusterSize,
    most: usize,
    kept: HashMap<HostOffset, Kept>,
    clock: VecDeque<HostOffset>,
}

impl Tables {
    /// Keeps at most `bytes` of tables.
    pub fn new(storage: Arc<dyn Storage>, path: &Path, size: ClusterSize, bytes: u64) -> Self {
        let most = usize::try_from(bytes / size.bytes()).unwrap_or(usize::MAX);
        Self {
            storage,
            path: path.to_owned(),
            size,
            most: most.max(MIN_CLUSTERS),
            kept: HashMap::new(),
            clock: VecDeque::new(),
        }
    }

    /// The table at `at`.
    pub fn get(&mut self, at: HostOffset) -> Result<&[u8]> {
        Ok(&self.load(at)?.bytes)
    }

    /// Word `index` of the table at `at`.
    pub fn word(&mut self, at: HostOffset, index: u64) -> Result<u64> {
        let start = to_usize(index) * 8;
        Ok(be_u64(&self.get(at)?[start..]))
    }

    /// The table at `at`, to be changed. The caller owns that cluster.
    pub fn change(&mut self, at: HostOffset) -> Result<&mut [u8]> {
        let kept = self.load(at)?;
        kept.changed = true;
        Ok(&mut kept.bytes)
    }

    /// Sets word `index` of the table at `at`. The caller owns that cluster.
    pub fn set_word(&mut self, at: HostOffset, index: u64, word: u64) -> Result<()> {
        let start = to_usize(index) * 8;
        self.change(at)?[start..start + 8].copy_from_slice(&word.to_be_bytes());
        Ok(())
    }

    /// Puts a new table at `at`, a cluster that the caller owns.
    pub fn put(&mut self, at: HostOffset, bytes: Box<[u8]>) -> Result<()> {
        assert!(bytes.len() == self.size.buffer_len(), "a whole cluster");
        self.kept.remove(&at);
        self.keep(at, bytes, true)
    }

    /// Writes everything that was changed, in order of places.
    pub fn flush(&mut self) -> Result<()> {
        let changed = self.kept.iter().filter(|(_, kept)| kept.changed);
        let mut places: Vec<HostOffset> = changed.map(|(at, _)| *at).collect();
        places.sort_unstable();
        let mut run: Option<(HostOffset, Vec<u8>)> = None;
        for at in places {
            let Some(kept) = self.kept.get_mut(&at) else {
                unreachable!("the place was just found")
            };
            kept.changed = false;
            match &mut run {
                Some((start, bytes))
                    if start.0 + to_u64(bytes.len()) == at.0 && bytes.len() < WRITE_BYTES =>
                {
                    bytes.extend_from_slice(&kept.bytes);
                }
                run => {
                    if let Some((start, bytes)) = run.replace((at, kept.bytes.to_vec())) {
                        write(&self.storage, &self.path, start, &bytes)?;
                    }
                }
            }
        }
        match run {
            Some((start, bytes)) => write(&self.storage, &self.path, start, &bytes),
            None => Ok(()),
        }
    }

    fn load(&mut self, at: HostOffset) -> Result<&mut Kept> {
        if !self.kept.contains_key(&at) {
            let mut bytes = vec![0; self.size.buffer_len()].into_boxed_slice();
            self.storage
                .read_exact_at(&mut bytes, at.0)
                .map_err(|source| Error::io("read a table of", &self.path, source))?;
            self.keep(at, bytes, false)?;
        }
        match self.kept.get_mut(&at) {
            Some(kept) => {
                kept.used = true;
                Ok(kept)
            }
            None => unreachable!("it was just kept"),
        }
    }

    fn keep(&mut self, at: HostOffset, bytes: Box<[u8]>, changed: bool) -> Result<()> {
        while self.kept.len() >= self.most {
            self.drop_one()?;
        }
        self.clock.push_back(at);
        self.kept.insert(
            at,
            Kept {
                bytes,
                changed,
                used: true,
            },
        );
        Ok(())
    }

    /// Goes round until it finds one that was not used since the last round.
    fn drop_one(&mut self) -> Result<()> {
        while let Some(at) = self.clock.pop_front() {
            let Some(kept) = self.kept.get_mut(&at) else {
                continue;
            };
            if kept.used {
                kept.used = false;
                self.clock.push_back(at);
                continue;
            }
            if kept.changed {
                write(&self.storage, &self.path, at, &kept.bytes)?;
            }
            self.kept.remove(&at);
            return Ok(());
        }
        unreachable!("what is kept is on the clock")
    }
}

fn write(storage: &Arc<dyn Storage>, path: &Path, at: HostOffset, bytes: &[u8]) -> Result<()> {
    write_new(storage.as_ref(), at, bytes)
        .map_err(|source| Error::io("write a table of", path, source))
}

/// Writes tables into clusters that no state refers to. Of a few clusters, blocks that have those bytes already are not
/// written, as where a new table has zeros behind its few entries; the room for them is taken all the same.
///
/// # Errors
/// When reading or writing fails, or there is no room.
pub(super) fn write_new(storage: &dyn Storage, at: HostOffset, bytes: &[u8]) -> io::Result<()> {
    let few = (BLOCK_BYTES + 1..=SPARED_BYTES).contains(&bytes.len());
    if !few || !storage.reserve(at.0, to_u64(bytes.len()))? {
        return storage.write_all_at(bytes, at.0);
    }
    let mut there = vec![0; bytes.len()];
    storage.read_exact_at(&mut there, at.0)?;
    let starts = (0..bytes.len()).step_by(BLOCK_BYTES);
    let blocks = starts.map(|start| start..bytes.len().min(start + BLOCK_BYTES));
    let mut run = 0..0;
    for block in blocks.filter(|block| bytes[block.clone()] != there[block.clone()]) {
        if block.start != run.end {
            storage.write_all_at(&bytes[run.clone()], at.0 + to_u64(run.start))?;
            run = block.start..block.start;
        }
        run.end = block.end;
    }
    storage.write_all_at(&bytes[run.clone()], at.0 + to_u64(run.start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use stead_sys::storage::FileStorage;

    #[test]
    fn a_new_table_has_its_bytes_whatever_was_there_and_takes_its_room() {
        let file = tempfile::tempfile().expect("temp file");
        let storage = FileStorage::new(file).expect("a file");
        let old: Vec<u8> = (0..300_000_u32).map(|n| (n / 4096 % 3) as u8).collect();
        storage.write_all_at(&old, 0).expect("write");
        let mut expected = old.clone();
        // Over old bytes, across the end, and behind it.
        for (place, length) in [(8192, 65536), (262_144, 65536), (1 << 20, 65536)] {
            let mut table = vec![0; length];
            table[..100].fill(7);
            table[20_000..30_000].fill(1);
            table[length - 1] = 9;
            write_new(&storage, HostOffset(place as u64), &table).expect("write");
            expected.resize(expected.len().max(place + length), 0);
            expected[place..place + length].copy_from_slice(&table);
        }
        let mut found = vec![9; expected.len()];
        storage.read_exact_at(&mut found, 0).expect("read");
        assert!(found == expected);
        assert_eq!(storage.len().expect("length"), to_u64(expected.len()));
    }
}
