//! Bitmaps that are added, removed, enabled, disabled, cleared and merged, each as a whole.

use crate::bitmap::Bitmap as Bits;
use crate::bitmap::BitmapCluster;
use crate::bitmap_read::TableEntry;
use crate::error::{Error, Result};
use crate::header::{to_u64, to_usize};
use crate::units::HostOffset;

use super::bitmaps::{ALL_ONES, Bitmap};
use super::records::BitmapRecord;
use super::transaction::Edit;

/// The most bitmaps that an image can have.
const MAX_BITMAPS: usize = 65_535;
/// How many bytes of bits are written at a time.
const STEP_BYTES: u64 = 4 << 20;

impl Edit<'_> {
    /// The index of the bitmap with this name.
    #[must_use]
    pub fn find_bitmap(&self, name: &[u8]) -> Option<usize> {
        self.bitmaps().position(|record| record.name() == name)
    }

    /// Adds a bitmap with all bits clear, and gives its index.
    ///
    /// # Errors
    /// [`Error::InvalidBitmap`] for a name, a granularity or a size that QEMU does not open; [`Error::Refused`] when
    /// the image is of version 2, or there is one of that name, or no room for one more.
    pub fn add_bitmap(
        &mut self,
        name: &[u8],
        granularity_bits: u8,
        enabled: bool,
    ) -> Result<usize> {
        let operation = "add a bitmap";
        if self.first.raw.version.get() < 3 {
            return Err(self.refused(operation, "images of version 2 have no bitmaps"));
        }
        if self.find_bitmap(name).is_some() {
            let reason = format!("{:?} exists already", String::from_utf8_lossy(name));
            return Err(self.refused(operation, reason));
        }
        if self.bitmaps.len() >= MAX_BITMAPS || self.virtual_size() == 0 {
            let reason = format!(
                "there are {}, and the disk has {} bytes",
                self.bitmaps.len(),
                self.virtual_size()
            );
            return Err(self.refused(operation, reason));
        }
        let mut bits = Bits::new(name, granularity_bits, self.virtual_size())?;
        bits.auto = enabled;
        let mut bitmap = Bitmap::new(BitmapRecord::new(name, granularity_bits, enabled));
        bitmap.before = None;
        bitmap.table = Some(Vec::new());
        bitmap.bits = Some(bits);
        self.bitmaps.push(bitmap);
        self.bitmaps_changed = true;
        Ok(self.bitmaps.len() - 1)
    }

    /// Removes a bitmap, whatever state it is in.
    ///
    /// # Errors
    /// When its table cannot be read or written.
    pub fn remove_bitmap(&mut self, index: usize) -> Result<()> {
        self.release_bits(index)?;
        let record = self.bitmaps.remove(index).record;
        let length = u64::from(record.table_entries()) * 8;
        self.release_bytes(record.table(), length)?;
        self.bitmaps_changed = true;
        Ok(())
    }

    /// Clears all bits.
    ///
    /// # Errors
    /// When the bitmap is not usable ([`Error::BitmapInUse`]), or its table cannot be read.
    pub fn clear_bitmap(&mut self, index: usize) -> Result<()> {
        self.require_usable(index)?;
        let mut bits = self.empty_bits(index)?;
        bits.clear_all();
        self.bitmaps[index].before = None;
        self.bitmaps[index].marks.clear();
        self.set_bits_whole(index, bits)
    }

    /// Says whether the bitmap records writes from now on.
    ///
    /// # Errors
    /// When the bitmap is not usable ([`Error::BitmapInUse`]).
    pub fn enable_bitmap(&mut self, index: usize, enabled: bool) -> Result<()> {
        self.require_usable(index)?;
        let bitmap = &mut self.bitmaps[index];
        bitmap.record.set_enabled(enabled);
        if let Some(bits) = &mut bitmap.bits {
            bits.auto = enabled;
        }
        self.bitmaps_changed = true;
        Ok(())
    }

    /// Marks what `other` has marked, whatever its granularity and length are.
    ///
    /// # Errors
    /// When the bitmap is not usable ([`Error::BitmapInUse`]), or its bits cannot be read.
    pub fn merge_bitmap(&mut self, index: usize, other: &Bits) -> Result<()> {
        let mut bits = self.bitmap_bits(index)?;
        bits.merge(other);
        self.set_bits_whole(index, bits)
    }

    /// What a bitmap says in the new state, as it is now.
    ///
    /// # Errors
    /// When the bitmap is not usable ([`Error::BitmapInUse`]), or its bits cannot be read.
    pub fn bitmap_bits(&mut self, index: usize) -> Result<Bits> {
        self.require_usable(index)?;
        if let Some(bits) = &self.bitmaps[index].bits {
            return Ok(bits.clone());
        }
        let mut bits = self.empty_bits(index)?;
        let size = self.size();
        let table = self.bitmap_table(index)?.to_vec();
        if to_u64(table.len()) != bits.table_entries(size) {
            let reason = format!("its table has {} entries", table.len());
            return Err(self.invalid(index, reason));
        }
        for (cluster, word) in (0..).zip(table) {
            self.go_on()?;
            match TableEntry::decode(word) {
                Some(TableEntry::Clear) => {}
                Some(TableEntry::Full) => bits.load_full_cluster(size, cluster),
                Some(TableEntry::Stored(at)) => {
                    let bytes = self.bits_of(at)?;
                    bits.load_cluster(size, cluster, &bytes);
                }
                None => return Err(self.invalid(index, format!("a table entry is {word:#x}"))),
            }
        }
        Ok(bits)
    }

    fn empty_bits(&self, index: usize) -> Result<Bits> {
        let record = &self.bitmaps[index].record;
        let length = self.virtual_size();
        let mut bits = Bits::new(record.name(), record.granularity_bits(), length)?;
        bits.auto = record.enabled();
        Ok(bits)
    }

    fn invalid(&self, index: usize, reason: String) -> Error {
        let name = self.bitmaps[index].record.name();
        Error::InvalidBitmap {
            name: String::from_utf8_lossy(name).into_owned(),
            reason,
        }
    }

    fn require_usable(&self, index: usize) -> Result<()> {
        let record = &self.bitmaps[index].record;
        if record.in_use() {
            return Err(Error::BitmapInUse {
                path: self.path.clone(),
                name: String::from_utf8_lossy(record.name()).into_owned(),
            });
        }
        if !record.is_known() {
            let reason = "it is of a kind, or has flags or data, that are not known".into();
            return Err(self.invalid(index, reason));
        }
        Ok(())
    }

    /// From now on the bitmap lies in memory.
    fn set_bits_whole(&mut self, index: usize, bits: Bits) -> Result<()> {
        self.release_bits(index)?;
        let bitmap = &mut self.bitmaps[index];
        bitmap.bits = Some(bits);
        self.bitmaps_changed = true;
        Ok(())
    }

    /// Gives up the clusters of its bits; the table itself is given up when it is stored anew.
    fn release_bits(&mut self, index: usize) -> Result<()> {
        if self.bitmaps[index].bits.is_some() {
            return Ok(());
        }
        let words = self.bitmap_table(index)?.to_vec();
        for word in words.into_iter().filter(|word| *word > ALL_ONES) {
            self.release(HostOffset(word), 1)?;
        }
        Ok(())
    }

    /// Writes the bits of a bitmap that lies in memory; its table then has to be written.
    pub(super) fn store_bits(&mut self, index: usize) -> Result<()> {
        let Some(bits) = self.bitmaps[index].bits.take() else {
            return Ok(());
        };
        let table = self.write_bits(&bits)?;
        let bitmap = &mut self.bitmaps[index];
        bitmap.table = Some(table);
        bitmap.changed = true;
        bitmap.bits = Some(bits);
        Ok(())
    }

    /// The table of the bits, which are written where they are neither all clear nor all set.
    fn write_bits(&mut self, bits: &Bits) -> Result<Vec<u64>> {
        let size = self.size();
        let mut mixed = Vec::new();
        let mut table = vec![0; to_usize(bits.table_entries(size))];
        for (index, word) in (0..).zip(&mut table) {
            match bits.cluster(size, index) {
                BitmapCluster::Clear => {}
                BitmapCluster::Full => *word = ALL_ONES,
                BitmapCluster::Mixed => mixed.push(index),
            }
        }
        let most = (STEP_BYTES / size.bytes()).max(1);
        let mut rest = mixed.as_slice();
        while !rest.is_empty() {
            self.go_on()?;
            let (at, count) = self.allocate_up_to(most.min(to_u64(rest.len())))?;
            let (now, later) = rest.split_at(to_usize(count));
            let mut bytes = vec![0; now.len() * size.buffer_len()];
            for ((index, part), place) in now
                .iter()
                .zip(bytes.chunks_exact_mut(size.buffer_len()))
                .zip(0..)
            {
                bits.cluster_bytes(size, *index, part);
                table[to_usize(*index)] = at.0 + (place << size.bits());
            }
            self.write_data(at, &bytes)?;
            rest = later;
        }
        Ok(table)
    }
}
