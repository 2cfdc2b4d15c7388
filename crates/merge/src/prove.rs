//! The proof: what the top shows is read through the base and compared, and every bitmap with what it must say.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use stead_qcow2::{Bitmap, Chain, Error, GuestOffset, Layer, LayerFile, Result, StoredBitmap};
use stead_sys::spread::spread;

use crate::bitmaps::{Becomes, text};
use crate::event::{Event, Watch};
use crate::record::RecordedBitmap;

/// How many bytes are compared at a time.
const STEP_BYTES: usize = 1 << 20;
/// How many bytes one thread takes at a time.
const PIECE_BYTES: usize = 16 << 20;

/// The files of a merge, the top first, and which of them is the base.
pub(crate) struct Proof<'a> {
    pub files: &'a [LayerFile],
    pub base: usize,
    pub bitmaps: &'a [RecordedBitmap],
    pub watch: Watch<'a>,
}

impl Proof<'_> {
    /// Why the base is not what it should be; `None` when it is.
    pub fn find_fault(&self) -> Result<Option<String>> {
        let top = Chain::open(self.files)?;
        let base = Chain::open(&self.files[self.base..])?;
        if base.len().next_multiple_of(512) != top.len().next_multiple_of(512) {
            return Ok(Some(format!(
                "the base has {} bytes and the top {}",
                base.len(),
                top.len()
            )));
        }
        // Tables are asked first: they are quicker than the data.
        for bitmap in self.bitmaps {
            if let Some(fault) = self.bitmap_fault(bitmap, &top, &base)? {
                return Ok(Some(format!("the bitmap {:?} {fault}", text(&bitmap.name))));
            }
        }
        self.data_fault(&top, &base)
    }

    /// Why what the base shows is not what the top shows.
    pub fn data_fault_in_files(&self) -> Result<Option<String>> {
        let (top, base) = (
            Chain::open(self.files)?,
            Chain::open(&self.files[self.base..])?,
        );
        self.data_fault(&top, &base)
    }

    /// The bitmaps of the base that do not say what they must, and why.
    pub fn bitmap_faults(&self) -> Result<Vec<(String, &'static str)>> {
        let (top, base) = (
            Chain::open(self.files)?,
            Chain::open(&self.files[self.base..])?,
        );
        let mut faults = Vec::new();
        for bitmap in self.bitmaps {
            let fault = self.bitmap_fault(bitmap, &top, &base)?;
            faults.extend(fault.map(|fault| (text(&bitmap.name), fault)));
        }
        Ok(faults)
    }

    fn data_fault(&self, top: &Chain, base: &Chain) -> Result<Option<String>> {
        let comparison = Comparison::new(top, base, self.watch);
        comparison.fault_in(top.allocated(self.base))
    }

    fn bitmap_fault(
        &self,
        wanted: &RecordedBitmap,
        top: &Chain,
        base: &Chain,
    ) -> Result<Option<&'static str>> {
        let Some(layer) = base.layer(0) else {
            return Ok(None);
        };
        let stored = find(layer, &wanted.name)?;
        let fault = match (wanted.becomes, stored) {
            (Becomes::Pruned | Becomes::Dropped, None) => None,
            (Becomes::Pruned | Becomes::Dropped, Some(_)) => Some("is still there"),
            (_, None) => Some("is missing"),
            (Becomes::Left, Some(stored))
                if stored.in_use || !stored.auto || !stored.is_known() =>
            {
                None
            }
            (Becomes::Left, Some(_)) => Some("records writes, and should have been left alone"),
            (_, Some(stored)) if stored.in_use || !stored.is_known() => Some("is not usable"),
            (Becomes::Merged | Becomes::Carried, Some(stored)) if !stored.auto => {
                Some("does not record writes")
            }
            (becomes, Some(stored)) => {
                let bits = layer.read_bitmap(&stored)?;
                let least = match becomes {
                    Becomes::Marked => self.changed(&bits, top)?,
                    Becomes::Merged
                    | Becomes::Carried
                    | Becomes::Left
                    | Becomes::Pruned
                    | Becomes::Dropped => self.together(&bits, top)?,
                };
                let says_enough = says_all_of(&bits, &least);
                (!says_enough).then_some("says less than it must")
            }
        };
        Ok(fault)
    }

    /// What the merged layers' bitmaps of that name say together.
    fn together(&self, like: &Bitmap, top: &Chain) -> Result<Bitmap> {
        let mut all = Bitmap::new(like.name(), like.granularity_bits(), like.disk_length())?;
        for index in 0..self.base {
            let Some(layer) = top.layer(index) else {
                continue;
            };
            let stored = find(layer, like.name())?;
            if let Some(stored) = stored.filter(|stored| !stored.in_use && stored.is_known()) {
                all.merge(&layer.read_bitmap(&stored)?);
            }
        }
        Ok(all)
    }

    /// All that the merged layers define.
    fn changed(&self, like: &Bitmap, top: &Chain) -> Result<Bitmap> {
        let mut all = Bitmap::new(like.name(), like.granularity_bits(), like.disk_length())?;
        let mut next = top.next_allocated(self.base, 0)?;
        while let Some(range) = next {
            all.set(GuestOffset(range.start), range.end - range.start);
            next = match range.end < top.len() {
                true => top.next_allocated(self.base, range.end)?,
                false => None,
            };
        }
        Ok(all)
    }
}

fn find(layer: &Layer, name: &[u8]) -> Result<Option<StoredBitmap>> {
    let all = layer.stored_bitmaps()?;
    Ok(all.into_iter().find(|stored| stored.name == name))
}

fn says_all_of(bits: &Bitmap, least: &Bitmap) -> bool {
    let mut both = bits.clone();
    both.merge(least);
    both.dirty_bytes() == bits.dirty_bytes()
}

/// Two disks that are compared range by range, by several threads.
pub(crate) struct Comparison<'a> {
    disks: [&'a Chain; 2],
    watch: Watch<'a>,
    /// How far it is: the end of the hindmost range that was begun.
    reached: AtomicU64,
}

/// Why a comparison ends early.
enum End {
    Fault(String),
    Failed(Error),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl<'a> Comparison<'a> {
    /// Of what `top` shows with what is to show the same.
    pub fn new(top: &'a Chain, other: &'a Chain, watch: Watch<'a>) -> Self {
        Self {
            disks: [top, other],
            watch,
            reached: AtomicU64::new(0),
        }
    }

    /// Why they are not the same in one of `ranges`, which come in order; where both say zeros, nothing is read.
    pub fn fault_in(
        &self,
        ranges: impl Iterator<Item = Result<Range<u64>>> + Send,
    ) -> Result<Option<String>> {
        let own = || {
            (
                self.disks.map(Side::new),
                [(); 2].map(|()| vec![0; STEP_BYTES]),
            )
        };
        let pieces = ranges.flat_map(pieces);
        let end = spread(u64::MAX, pieces, own, |(sides, buffers), piece| {
            self.compare(sides, buffers, piece?)
        });
        match end {
            Ok(()) => Ok(None),
            Err(End::Fault(fault)) => Ok(Some(fault)),
            Err(End::Failed(error)) => Err(error),
        }
    }

    fn compare(
        &self,
        sides: &mut [Side<'_>; 2],
        buffers: &mut [Vec<u8>; 2],
        piece: Range<u64>,
    ) -> std::result::Result<(), End> {
        let mut at = piece.start;
        while at < piece.end {
            let [one, other] = sides;
            at = at.max(one.data_from(at)?.min(other.data_from(at)?));
            if at >= piece.end {
                break;
            }
            let left = usize::try_from(piece.end - at).unwrap_or(usize::MAX);
            let length = left.min(STEP_BYTES);
            for (side, buffer) in sides.iter().zip(buffers.iter_mut()) {
                side.chain.read_at(at, &mut buffer[..length])?;
            }
            if buffers[0][..length] != buffers[1][..length] {
                return Err(End::Fault(format!(
                    "what is read back from {at:#x} on is not what the top shows"
                )));
            }
            at += length as u64;
            self.tell(at);
        }
        Ok(())
    }

    fn tell(&self, at: u64) {
        let done = self.reached.fetch_max(at, Ordering::Relaxed).max(at);
        let total = self.disks[0].len();
        (self.watch.tell)(Event::Progress { done, total });
    }
}

/// A range, or why there is none, in pieces for one thread each.
fn pieces(range: Result<Range<u64>>) -> impl Iterator<Item = Result<Range<u64>>> {
    let (range, error) = match range {
        Ok(range) => (range, None),
        Err(error) => (0..0, Some(error)),
    };
    let end = range.end;
    let starts = range.step_by(PIECE_BYTES);
    let pieces =
        starts.map(move |start| Ok(start..end.min(start.saturating_add(PIECE_BYTES as u64))));
    pieces.chain(error.map(Err))
}

/// A disk, and where it next has data.
struct Side<'a> {
    chain: &'a Chain,
    /// From where on `known` is the next data.
    asked: u64,
    known: Range<u64>,
}

impl<'a> Side<'a> {
    fn new(chain: &'a Chain) -> Self {
        Self {
            chain,
            asked: 0,
            known: 0..0,
        }
    }

    /// The first byte at or after `at` that may be other than zero.
    fn data_from(&mut self, at: u64) -> Result<u64> {
        if !(self.asked..self.known.end).contains(&at) {
            self.asked = at;
            let end = self.chain.len();
            self.known = match at < end {
                true => self.chain.next_data(at)?.unwrap_or(u64::MAX - 1..u64::MAX),
                false => u64::MAX - 1..u64::MAX,
            };
        }
        Ok(self.known.start.max(at))
    }
}
