//! Which folders were looked through for left-over partial files lately.
//!
//! A folder with a million files must not be looked through for each of them that is written.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use stead_agent_proto::files::PARTIAL_PREFIX;
use stead_sys::folder::Folder;

/// How long a partial file that nobody writes is kept for the host to go on with.
pub const LEFT_OVER_AFTER: Duration = Duration::from_secs(24 * 3600);
const AGAIN_AFTER: Duration = Duration::from_secs(3600);
const MAX_FOLDERS: usize = 64;
const MAX_ENTRIES: usize = 10_000;

/// Folders and when they were looked through, the last one at the end.
#[derive(Debug, Default)]
pub(super) struct Swept {
    folders: Mutex<VecDeque<(u64, u64, Instant)>>,
}

impl Swept {
    /// Removes what is left over in a folder, unless that was done within the hour.
    pub(super) fn sweep(&self, folder: &Folder) -> io::Result<()> {
        let stat = rustix::fs::fstat(folder)?;
        if self.is_due(stat.st_dev, stat.st_ino, Instant::now()) {
            stead_sys::incoming::sweep(folder, PARTIAL_PREFIX, LEFT_OVER_AFTER, MAX_ENTRIES)?;
        }
        Ok(())
    }

    fn is_due(&self, device: u64, inode: u64, now: Instant) -> bool {
        let mut folders = self.folders.lock().unwrap_or_else(PoisonError::into_inner);
        let is_same = |found: &&(u64, u64, Instant)| (found.0, found.1) == (device, inode);
        if let Some((_, _, at)) = folders.iter().find(is_same)
            && now.duration_since(*at) < AGAIN_AFTER
        {
            return false;
        }
        folders.retain(|found| !is_same(&found));
        if folders.len() == MAX_FOLDERS {
            folders.pop_front();
        }
        folders.push_back((device, inode, now));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_due_once_an_hour_and_few_are_remembered() {
        let swept = Swept::default();
        let now = Instant::now();
        assert!(swept.is_due(1, 1, now));
        assert!(!swept.is_due(1, 1, now));
        assert!(swept.is_due(1, 1, now + AGAIN_AFTER));
        for inode in 0..1000 {
            swept.is_due(2, inode, now);
        }
        let count = swept.folders.lock().expect("not poisoned").len();
        assert_eq!(count, MAX_FOLDERS);
    }
}
