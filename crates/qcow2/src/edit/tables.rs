//! Clusters of tables kept in memory: a set number of bytes, the least used go.
//!
//! A table that is changed lies in a cluster that the transaction allocated, never where the old state has
//! something ([`super::Edit`] sees to that). It is written there when its room is needed, or at the end.

use std::collections::{HashMap, VecDeque};
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
    storage
        .write_all_at(bytes, at.0)
        .map_err(|source| Error::io("write a table of", path, source))
}
