//! Guest data that goes into new clusters, moved by several threads in large pieces.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::chain::Chain;
use crate::control::Control;
use crate::error::Result;
use crate::header::to_usize;
use crate::spread::spread;
use crate::units::{GuestOffset, HostOffset};

use super::transaction::Edit;

/// The most bytes that one thread moves at a time.
const PIECE_BYTES: u64 = 32 << 20;
/// When as much is waiting, it is moved.
const BATCH_BYTES: u64 = 1 << 30;
/// When as many pieces are waiting, they are moved.
const BATCH_PIECES: usize = 1 << 16;

/// Where the bytes of new clusters come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum From {
    /// From a place of a member's file, in whole clusters.
    Member { member: usize, at: HostOffset },
    /// From the disk as a guest sees it: `length` bytes; the rest of the clusters gets zeros.
    Disk { start: GuestOffset, length: u64 },
    /// Zeros.
    Zeros,
}

/// New clusters and what goes into them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copy {
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
pub(super) struct Copies<'a> {
    disk: Option<&'a Chain>,
    control: &'a Control<'a>,
    waiting: Vec<Copy>,
    waiting_bytes: u64,
    /// Bytes that were moved, or are to be.
    done: AtomicU64,
    /// Bytes that there are in all, where that is known.
    all: u64,
}

impl<'a> Copies<'a> {
    /// Copies from `disk`; `all` is how many bytes there will be, for those who look on.
    pub fn new(disk: Option<&'a Chain>, control: &'a Control<'a>, all: u64) -> Self {
        Self {
            disk,
            control,
            waiting: Vec::new(),
            waiting_bytes: 0,
            done: AtomicU64::new(0),
            all,
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
        self.control.go_on(&edit.path)?;
        match (copy.from, self.disk) {
            (From::Member { member, at }, Some(disk)) => {
                from_member(disk, copy, (member, at), edit)?;
            }
            (From::Disk { start, length }, Some(disk)) => {
                from_disk(disk, copy, (start, length), edit)?;
            }
            (From::Zeros, _) => edit.put_guest(copy.to, &vec![0; to_usize(copy.length)])?,
            (From::Member { .. } | From::Disk { .. }, None) => {
                unreachable!("data comes from a disk")
            }
        }
        let done = self.done.fetch_add(copy.length, Ordering::Relaxed) + copy.length;
        self.control.tell(done, self.all);
        Ok(())
    }
}

fn from_member(disk: &Chain, copy: &Copy, from: (usize, HostOffset), edit: &Edit) -> Result<()> {
    let (member, at) = from;
    if let (Some(file), _length) = disk.member_file(member) {
        return edit.clone_guest(copy.to, file, at.0, copy.length);
    }
    let mut bytes = vec![0; to_usize(copy.length)];
    disk.read_member(member, at.0, &mut bytes)?;
    edit.put_guest(copy.to, &bytes)
}

/// Cluster by cluster: what is read so is small or compressed.
fn from_disk(disk: &Chain, copy: &Copy, from: (GuestOffset, u64), edit: &Edit) -> Result<()> {
    let size = edit.size();
    let mut bytes = vec![0; size.buffer_len()];
    for start in (0..copy.length).step_by(size.buffer_len()) {
        let there = from.1.saturating_sub(start).min(size.bytes());
        let (seen, behind) = bytes.split_at_mut(to_usize(there));
        disk.read_padded(from.0.0 + start, seen)?;
        behind.fill(0);
        edit.put_guest(HostOffset(copy.to.0 + start), &bytes)?;
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
