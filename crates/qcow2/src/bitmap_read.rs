//! Persistent dirty bitmaps, read from an image.
//!
//! A bitmap that says nothing is not given: one that is marked in use was not saved, so what its bits are
//! is an accident.

use crate::bitmap::{Bitmap, table_entries};
use crate::directory::StoredBitmap;
use crate::error::{Error, Result};
use crate::header::to_usize;
use crate::layer::Layer;
use crate::units::HostOffset;

/// Words of a table that are read at a time.
const STEP_WORDS: u64 = 64 << 10;
/// Bits 9 to 55 of a table entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An entry of a bitmap's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TableEntry {
    Clear,
    Full,
    Stored(HostOffset),
}

impl TableEntry {
    /// `None`: the entry is not valid.
    pub fn decode(word: u64) -> Option<Self> {
        match (word, word & OFFSET) {
            (0, _) => Some(Self::Clear),
            (1, _) => Some(Self::Full),
            (word, offset) if word == offset => Some(Self::Stored(HostOffset(offset))),
            _ => None,
        }
    }
}

impl Layer {
    /// Reads the bits of a persistent dirty bitmap of the active state.
    ///
    /// Bits behind the end of the disk are dropped; [`check`](crate::check()) reports them.
    ///
    /// # Errors
    /// When the bitmap is in use ([`Error::BitmapInUse`]) or of a kind that is not known, its table does
    /// not fit the disk or is not valid, or the file cannot be read.
    pub fn read_bitmap(&self, stored: &StoredBitmap) -> Result<Bitmap> {
        if stored.in_use {
            return Err(Error::BitmapInUse {
                path: self.path().to_owned(),
                name: String::from_utf8_lossy(&stored.name).into_owned(),
            });
        }
        let mut bitmap = self.empty_bitmap(stored)?;
        self.for_each_entry(stored, |index, word| self.load(&mut bitmap, index, word))?;
        Ok(bitmap)
    }

    /// The bitmap without bits, once all that is said about it was found right.
    fn empty_bitmap(&self, stored: &StoredBitmap) -> Result<Bitmap> {
        if !stored.is_known() {
            let (kind, flags) = (u64::from(stored.kind), u64::from(stored.flags));
            let expected = "a dirty bitmap (type 1) without unknown flags or extra data";
            return Err(self.bitmap_field("bitmap type and flags", kind << 32 | flags, expected));
        }
        let disk = self.header().virtual_size;
        let mut bitmap = Bitmap::new(&stored.name, stored.granularity_bits, disk)?;
        bitmap.auto = stored.auto;
        let needed = table_entries(disk, stored.granularity_bits, self.cluster_size());
        if u64::from(stored.table_entries) != needed {
            let found = u64::from(stored.table_entries);
            let expected = format!("{needed} for the virtual size and its granularity");
            return Err(self.bitmap_field("bitmap_table_size", found, expected));
        }
        Ok(bitmap)
    }

    fn bitmap_field(&self, field: &'static str, found: u64, expected: impl Into<String>) -> Error {
        Error::InvalidField {
            path: self.path().to_owned(),
            field,
            found,
            expected: expected.into(),
        }
    }

    fn load(&self, bitmap: &mut Bitmap, index: u64, word: u64) -> Result<()> {
        let size = self.cluster_size();
        match TableEntry::decode(word) {
            Some(TableEntry::Clear) => Ok(()),
            Some(TableEntry::Full) => {
                bitmap.load_full_cluster(size, index);
                Ok(())
            }
            Some(TableEntry::Stored(at)) if size.offset_in(at.0) == 0 => {
                let mut bytes = vec![0; size.buffer_len()];
                self.file().read("the bits of a bitmap", at, &mut bytes)?;
                bitmap.load_cluster(size, index, &bytes);
                Ok(())
            }
            Some(TableEntry::Stored(_)) | None => {
                Err(self.bitmap_field("bitmap table entry", word, "0, 1 or the start of a cluster"))
            }
        }
    }

    /// Calls `each` with every entry of the bitmap's table, in order, until it fails.
    pub(crate) fn for_each_entry(
        &self,
        stored: &StoredBitmap,
        mut each: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let count = u64::from(stored.table_entries);
        let what = "the table of a bitmap";
        self.file().require(what, stored.table, count * 8)?;
        let mut done = 0;
        while done < count {
            let step = STEP_WORDS.min(count - done);
            let at = HostOffset(stored.table.0 + done * 8);
            let words = self.file().read_words(what, at, to_usize(step))?;
            for (index, word) in (done..).zip(words) {
                each(index, word)?;
            }
            done += step;
        }
        Ok(())
    }
}
