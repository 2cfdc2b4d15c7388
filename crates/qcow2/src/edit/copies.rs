//! Guest data that goes into new clusters, moved by several threads in large pieces.

use std::sync::atomic::{AtomicU64, Ordering};

use stead_sys::spread::spread;

use crate::chain::Chain;
use crate::control::{Control, Moving};
use crate::error::Result;
use crate::header::to_usize;
use crate::units::{GuestOffset, HostOffset};

use super::transaction::Edit;

/// The most bytes that one thread moves at a time.
const PIECE_BYTES: u64 = 32 << 20;
/// When as much is waiting, it is moved.
const BATCH_BYTES: u64 = 1 << 30;
/// When as many pieces are waiting, they are moved.
const BATCH_PIECES: usize = 1 << 16;
/// Of what stays in memory: whenever so many bytes more were moved, one thread has them put on the disk while the
/// others go on.
const WRITTEN_OUT_BYTES: u64 = 64 << 20;

/// Where the bytes of new clusters come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum From {
    /// From a place of a member's file, in whole clusters.
    Member { member: usize, at: HostOffset },
    /// From the disk as a guest sees it: `length` bytes; the rest of the clusters gets zeros.
    Disk { start: GuestOffset, length: u64 },
    /// Zeros.
    Zeros,
}

/// New clusters and what goes into them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Copy {
    pub to: HostOffset,
    pub length: u64,
    pub from: From,
}

impl Copy {
    /// The part from `start` on with at most [`PIECE_BYTES`].
    fn piece(&self, start: u64) -> Self {
        let length = PIECE_BYTES.min(self.length - start);
        let from = match self.from {
            From::Member { member, at } => From::Member {
                member,
                at: HostOffset(at.0 + start),
            },
            From::Disk {
                start: disk,
                length,
            } => From::Disk {
                start: GuestOffset(disk.0 + start),
                length: length.saturating_sub(start),
            },
            From::Zeros => From::Zeros,
        };
        Self {
            to: HostOffset(self.to.0 + start),
            length,
            from,
        }
    }
}

/// Copies that wait to be made.
#[derive(Debug)]
pub(crate) struct Copies<'a> {
    disk: Option<&'a Chain>,
    watcher: Watcher<'a>,
    waiting: Vec<Copy>,
    waiting_bytes: u64,
    /// Bytes that were moved, or are to be.
    done: AtomicU64,
    /// What was moved is read again soon, so it stays in memory.
    stays: bool,
}

/// Who is told what was moved.
#[derive(Debug, Clone, Copy)]
enum Watcher<'a> {
    /// Is told what was moved of all.
    Whole(&'a Control<'a>, u64),
    /// Adds it to what else is moved.
    Part(&'a Moving<'a>),
}

impl<'a> Copies<'a> {
    /// Copies from `disk`; `all` is how many bytes there will be, for those who look on.
    pub fn new(disk: Option<&'a Chain>, control: &'a Control<'a>, all: u64) -> Self {
        Self {
            disk,
            watcher: Watcher::Whole(control, all),
            waiting: Vec::new(),
            waiting_bytes: 0,
            done: AtomicU64::new(0),
            stays: false,
        }
    }

    /// Copies from `disk` as a part of what `moving` is told of; what they make is read back soon.
    pub fn to_read(disk: &'a Chain, moving: &'a Moving<'a>) -> Self {
        Self {
            disk: Some(disk),
            watcher: Watcher::Part(moving),
            waiting: Vec::new(),
            waiting_bytes: 0,
            done: AtomicU64::new(0),
            stays: true,
        }
    }

    /// How many bytes there were so far.
    pub fn bytes(&self) -> u64 {
        self.done.load(Ordering::Relaxed) + self.waiting_bytes
    }

    /// Adds a copy to clusters that the transaction took. It is made before [`Copies::finish`] returns.
    pub fn add(&mut self, copy: Copy, edit: &mut Edit) -> Result<()> {
        edit.require_unseen(copy.to, copy.length)?;
        if let (From::Member { member, at }, Some(disk)) = (copy.from, self.disk)
            && let (Some(file), _length) = disk.member_file(member)
        {
            edit.note_shared(copy.to, file, at.0, copy.length)?;
        }
        self.waiting_bytes += copy.length;
        match self.waiting.last_mut() {
            Some(last) if follows(last, &copy) => last.length += copy.length,
            Some(_) | None => self.waiting.push(copy),
        }
        if self.waiting_bytes >= BATCH_BYTES || self.waiting.len() >= BATCH_PIECES {
            self.finish(edit)?;
        }
        Ok(())
    }

    /// Makes all copies that wait.
    pub fn finish(&mut self, edit: &mut Edit) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        let bytes = std::mem::take(&mut self.waiting_bytes);
        if edit.is_plan() {
            self.done.fetch_add(bytes, Ordering::Relaxed);
            return Ok(());
        }
        let pieces = waiting.iter().flat_map(|copy| {
            let step = to_usize(PIECE_BYTES);
            (0..copy.length)
                .step_by(step)
                .map(|start| copy.piece(start))
        });
        spread(bytes, pieces, || (), |(), piece| self.make(&piece, edit))
    }

    fn make(&self, copy: &Copy, edit: &Edit) -> Result<()> {
        match self.watcher {
            Watcher::Whole(control, _) => control.go_on(&edit.path)?,
            Watcher::Part(moving) => moving.go_on(&edit.path)?,
        }
        match (copy.from, self.disk) {
            (From::Member { member, at }, Some(disk)) => {
                self.copy_member(disk, copy, (member, at), edit)?;
            }
            (From::Disk { start, length }, Some(disk)) => {
                from_disk(disk, copy, (start, length), edit)?;
            }
            (From::Zeros, _) => edit.put_guest(copy.to, &vec![0; to_usize(copy.length)])?,
            (From::Member { .. } | From::Disk { .. }, None) => {
                unreachable!("data comes from a disk")
            }
        }
        let before = self.done.fetch_add(copy.length, Ordering::Relaxed);
        let done = before + copy.length;
        match self.watcher {
            Watcher::Whole(control, all) => control.tell(done, all),
            Watcher::Part(moving) => moving.moved(copy.length),
        }
        if self.stays && before / WRITTEN_OUT_BYTES < done / WRITTEN_OUT_BYTES {
            edit.sync_guest()?;
        }
        Ok(())
    }

    fn copy_member(
        &self,
        disk: &Chain,
        copy: &Copy,
        (member, at): (usize, HostOffset),
        edit: &Edit,
    ) -> Result<()> {
        match disk.member_file(member) {
            (Some(file), _length) if self.stays => {
                edit.clone_guest_to_read(copy.to, file, at.0, copy.length)
            }
            (Some(file), _length) => edit.clone_guest(copy.to, file, at.0, copy.length),
            (None, _length) => {
                let mut bytes = vec![0; to_usize(copy.length)];
                disk.read_member(member, at.0, &mut bytes)?;
                edit.put_guest(copy.to, &bytes)
            }
        }
    }
}

/// Cluster by cluster: what is read so is small or compressed.
fn from_disk(disk: &Chain, copy: &Copy, from: (GuestOffset, u64), edit: &Edit) -> Result<()> {
    let size = edit.size();
    let mut buffer = vec![0; size.buffer_len()];
    for start in (0..copy.length).step_by(size.buffer_len()) {
        let length = size.bytes().min(copy.length - start);
        let bytes = &mut buffer[..to_usize(length)];
        let there = from.1.saturating_sub(start).min(length);
        let (seen, behind) = bytes.split_at_mut(to_usize(there));
        disk.read_padded(from.0.0 + start, seen)?;
        behind.fill(0);
        edit.put_guest(HostOffset(copy.to.0 + start), bytes)?;
    }
    Ok(())
}

/// Whether `next` goes on where `last` ends, in both files.
fn follows(last: &Copy, next: &Copy) -> bool {
    if last.to.0 + last.length != next.to.0 {
        return false;
    }
    match (last.from, next.from) {
        (
            From::Member { member, at },
            From::Member {
                member: other,
                at: there,
            },
        ) => member == other && at.0 + last.length == there.0,
        (From::Zeros, From::Zeros) => last.length < PIECE_BYTES,
        (From::Member { .. } | From::Disk { .. } | From::Zeros, _) => false,
    }
}
