//! Disks that lose what was not synced, that fail at a chosen call, and that die at one.
//!
//! [`RecordedDisk`] keeps every write, length and sync. From its [`History`] come the images that a crash can
//! leave: after the death of a process everything up to some call ([`History::prefix`]); after a loss of
//! power everything up to the last sync, and of what came later any sectors ([`History::power_loss`]).
//!
//! What is taken for granted of a disk: a sector of [`SECTOR_BYTES`] bytes is written whole or not at all,
//! and what was synced stays. Nothing is taken for granted of the order of what was not synced.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_sys::storage::Storage;

/// What a disk writes whole or not at all, in bytes.
pub const SECTOR_BYTES: usize = 512;

/// One call that changes a disk.
#[derive(Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes were written.
    Write {
        /// Where, in bytes.
        at: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// The length was set, in bytes.
    SetLen(u64),
    /// Everything before was synced.
    Sync,
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write { at, bytes } => write!(f, "write {:#x}+{:#x}", at, bytes.len()),
            Self::SetLen(length) => write!(f, "set_len {length:#x}"),
            Self::Sync => write!(f, "sync"),
        }
    }
}

#[derive(Debug)]
struct Recorded {
    now: Vec<u8>,
    events: Vec<Event>,
}

/// A disk in memory that records what is done to it.
#[derive(Debug)]
pub struct RecordedDisk {
    initial: Vec<u8>,
    recorded: Mutex<Recorded>,
}

impl RecordedDisk {
    /// A disk that holds `bytes`, all of them synced.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            recorded: Mutex::new(Recorded {
                now: bytes.clone(),
                events: Vec::new(),
            }),
            initial: bytes,
        }
    }

    /// What was done to it so far.
    #[must_use]
    pub fn history(&self) -> History {
        History {
            initial: self.initial.clone(),
            events: self.recorded().events.clone(),
        }
    }

    /// What it holds now, synced or not.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.recorded().now.clone()
    }

    fn recorded(&self) -> MutexGuard<'_, Recorded> {
        // Every event is applied whole, so a panic elsewhere spoils nothing.
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn length(bytes: &[u8]) -> u64 {
    bytes.len() as u64
}

/// A disk in memory is never longer than memory.
fn place(at: u64) -> usize {
    usize::try_from(at).expect("a disk in memory")
}

impl Storage for RecordedDisk {
    fn len(&self) -> io::Result<u64> {
        Ok(length(&self.recorded().now))
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let recorded = self.recorded();
        let end = at.checked_add(length(bytes));
        match end.filter(|end| *end <= length(&recorded.now)) {
            Some(end) => bytes.copy_from_slice(&recorded.now[place(at)..place(end)]),
            None => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
        }
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut recorded = self.recorded();
        let event = Event::Write {
            at,
            bytes: bytes.to_vec(),
        };
        apply(&mut recorded.now, &event);
        recorded.events.push(event);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut recorded = self.recorded();
        let event = Event::SetLen(length);
        apply(&mut recorded.now, &event);
        recorded.events.push(event);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.recorded().events.push(Event::Sync);
        Ok(())
    }
}

fn apply(bytes: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write { at, bytes: written } => put(bytes, *at, written),
        Event::SetLen(length) => bytes.resize(place(*length), 0),
        Event::Sync => {}
    }
}

fn put(bytes: &mut Vec<u8>, at: u64, written: &[u8]) {
    let (start, end) = (place(at), place(at) + written.len());
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[start..end].copy_from_slice(written);
}

/// What was done to a disk, and what it held before.
#[derive(Debug, Clone)]
pub struct History {
    initial: Vec<u8>,
    events: Vec<Event>,
}

impl History {
    /// The calls, in order.
    #[must_use]
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The same without its syncs numbered `which` (from 0), as if the program had left them out.
    #[must_use]
    pub fn without_sync(&self, which: usize) -> Self {
        let mut syncs = 0;
        let kept = self.events.iter().filter(|event| {
            let left_out = **event == Event::Sync && syncs == which;
            syncs += usize::from(**event == Event::Sync);
            !left_out
        });
        Self {
            initial: self.initial.clone(),
            events: kept.cloned().collect(),
        }
    }

    /// The disk after the first `count` calls, as the death of the process leaves it.
    #[must_use]
    pub fn prefix(&self, count: usize) -> Vec<u8> {
        let mut bytes = self.initial.clone();
        for event in &self.events[..count] {
            apply(&mut bytes, event);
        }
        bytes
    }

    /// A disk that a loss of power after the first `count` calls can leave: everything that was synced, and
    /// of every later call any sectors. The same `seed` gives the same disk.
    #[must_use]
    pub fn power_loss(&self, count: usize, seed: u64) -> Vec<u8> {
        let done = &self.events[..count];
        let synced = done.iter().rposition(|event| *event == Event::Sync);
        let synced = synced.map_or(0, |sync| sync + 1);
        let mut bytes = self.prefix(synced);
        let mut chance = Chance::new(seed);
        for event in &done[synced..] {
            match event {
                Event::Write { at, bytes: written } => {
                    lose_sectors(&mut bytes, *at, written, &mut chance);
                }
                Event::SetLen(_) => {
                    if chance.survives() {
                        apply(&mut bytes, event);
                    }
                }
                Event::Sync => {}
            }
        }
        bytes
    }
}

fn lose_sectors(bytes: &mut Vec<u8>, at: u64, written: &[u8], chance: &mut Chance) {
    let mut start = 0;
    while start < written.len() {
        // To the end of the sector that the byte lies in.
        let within = place(at + start as u64) % SECTOR_BYTES;
        let end = (start + SECTOR_BYTES - within).min(written.len());
        if chance.survives() {
            put(bytes, at + start as u64, &written[start..end]);
        }
        start = end;
    }
}

/// Whether a sector survives: some losses take nearly all, some nearly nothing.
struct Chance {
    state: u64,
    of_256: u64,
}

impl Chance {
    fn new(seed: u64) -> Self {
        let mut chance = Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            of_256: 0,
        };
        let often = [8, 64, 128, 192, 248];
        chance.of_256 = often[place(chance.next() % often.len() as u64)];
        chance
    }

    /// xorshift64*
    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    fn survives(&mut self) -> bool {
        self.next() % 256 < self.of_256
    }
}

/// What happens at the chosen call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFault {
    /// There is no room (`ENOSPC`); half of a write is done. Later calls work.
    NoSpace,
    /// The device fails (`EIO`), without effect; later calls work.
    Io,
    /// This call and all later ones fail without effect, as for a process killed before it.
    Killed,
}

/// A disk with one fault in it. Calls that change it (writes, lengths, syncs) are counted from 1.
#[derive(Debug)]
pub struct FaultDisk {
    inner: Arc<dyn Storage>,
    calls: AtomicU64,
    at_call: u64,
    fault: DiskFault,
}

impl FaultDisk {
    /// `inner` with `fault` at call `at_call`; 0 means no fault, so calls are only counted.
    #[must_use]
    pub fn new(inner: Arc<dyn Storage>, at_call: u64, fault: DiskFault) -> Self {
        Self {
            inner,
            calls: AtomicU64::new(0),
            at_call,
            fault,
        }
    }

    /// How many calls changed the disk, or were to.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// The error that this call has, if it is the one.
    fn fault(&self) -> Option<io::Error> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let now = match self.fault {
            DiskFault::NoSpace | DiskFault::Io => call == self.at_call,
            DiskFault::Killed => self.at_call > 0 && call >= self.at_call,
        };
        now.then(|| match self.fault {
            DiskFault::NoSpace => io::Error::from(io::ErrorKind::StorageFull),
            DiskFault::Io => io::Error::from_raw_os_error(5),
            DiskFault::Killed => io::Error::other("killed"),
        })
    }
}

impl Storage for FaultDisk {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.inner.read_exact_at(bytes, at)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let Some(error) = self.fault() else {
            return self.inner.write_all_at(bytes, at);
        };
        if self.fault == DiskFault::NoSpace {
            // A sector is whole or not there.
            let half = (bytes.len() / 2) & !(SECTOR_BYTES - 1);
            self.inner.write_all_at(&bytes[..half], at)?;
        }
        Err(error)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.fault().map_or_else(|| self.inner.set_len(length), Err)
    }

    fn sync(&self) -> io::Result<()> {
        self.fault().map_or_else(|| self.inner.sync(), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> RecordedDisk {
        let disk = RecordedDisk::new(vec![0; 4096]);
        disk.write_all_at(&[1; 2048], 0).expect("write");
        disk.sync().expect("sync");
        disk.write_all_at(&[2; 2048], 1024).expect("write");
        disk.set_len(3000).expect("cut");
        disk
    }

    #[test]
    fn a_loss_of_power_keeps_what_was_synced_and_any_sectors_of_the_rest() {
        let history = written().history();
        let (mut kept, mut lost) = (0, 0);
        for seed in 0..50 {
            let bytes = history.power_loss(4, seed);
            assert!(bytes[..1024].iter().all(|byte| *byte == 1));
            assert!(bytes.len() == 4096 || bytes.len() == 3000);
            for sector in bytes[1024..3000].chunks(SECTOR_BYTES) {
                assert!(
                    sector.iter().all(|byte| *byte == sector[0]),
                    "half a sector"
                );
                kept += u32::from(sector[0] == 2);
                lost += u32::from(sector[0] != 2);
            }
            assert_eq!(bytes, history.power_loss(4, seed));
        }
        assert!(kept > 50 && lost > 50, "{kept} kept, {lost} lost");
    }

    #[test]
    fn without_its_sync_a_write_can_be_lost() {
        let history = written().history().without_sync(0);
        assert_eq!(history.events().len(), 3);
        let lost = (0..50).any(|seed| history.power_loss(3, seed)[0] == 0);
        assert!(lost);
    }

    #[test]
    fn a_prefix_is_the_disk_after_so_many_calls() {
        let disk = written();
        let history = disk.history();
        assert_eq!(history.prefix(0), vec![0; 4096]);
        assert_eq!(history.prefix(1)[2047..2049], [1, 0]);
        assert_eq!(history.prefix(4), disk.bytes());
        assert_eq!(disk.bytes().len(), 3000);
    }

    #[test]
    fn a_fault_strikes_at_its_call() {
        let run = |at_call, fault| {
            let inner = Arc::new(RecordedDisk::new(Vec::new()));
            let disk = FaultDisk::new(inner, at_call, fault);
            let results = [
                disk.write_all_at(&[1; 1024], 0).is_ok(),
                disk.sync().is_ok(),
                disk.set_len(10).is_ok(),
            ];
            assert_eq!(disk.calls(), 3);
            results
        };
        assert_eq!(run(0, DiskFault::Killed), [true; 3]);
        assert_eq!(run(2, DiskFault::Io), [true, false, true]);
        assert_eq!(run(1, DiskFault::NoSpace), [false, true, true]);
        assert_eq!(run(2, DiskFault::Killed), [true, false, false]);
    }
}
