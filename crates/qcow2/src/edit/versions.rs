//! The version of the format, and the feature bits that only version 3 has.

use crate::control::Control;
use crate::error::Result;
use crate::header::{
    AUTOCLEAR_RAW_DATA, COMPATIBLE_LAZY_REFCOUNTS, Compression, extension, incompatible,
};

use super::transaction::Edit;

const OPERATION: &str = "change the version of the format";

impl Edit<'_> {
    /// The version of the format that the new state has: 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.first.raw.version.get()
    }

    /// Writes the image in version 3.
    pub fn upgrade(&mut self) {
        if self.version() >= 3 {
            return;
        }
        self.first.set_version(3);
        // What version 3 demands of every snapshot entry.
        let size = self.virtual_size();
        for record in &mut self.snapshots {
            if record.virtual_size().is_none() {
                record.set_virtual_size(size);
                self.snapshots_changed = true;
            }
        }
    }

    /// Writes the image in version 2: clusters of zeros become data, or nothing where nothing lies below.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] when the image has what version 2 cannot say; [`crate::Error::Cancelled`]; or when
    /// a table or data cannot be read or written.
    pub fn downgrade(&mut self, control: &Control<'_>) -> Result<()> {
        if self.version() < 3 {
            return Ok(());
        }
        if let Some(reason) = self.beyond_version_2() {
            return Err(self.refused(OPERATION, format!("version 2 has no {reason}")));
        }
        self.expand_zeros(control)?;
        self.first.set_version(2);
        Ok(())
    }

    /// What the image has that version 2 has not.
    fn beyond_version_2(&self) -> Option<String> {
        let header = self.old.header();
        if header.extended_l2 {
            return Some("subclusters".into());
        }
        if header.compression != Compression::Zlib {
            return Some(format!("compression by {}", header.compression.name()));
        }
        if self.counts.order != 4 {
            return Some(format!(
                "refcounts of {} bits, only of 16",
                1 << self.counts.order
            ));
        }
        if self.bitmaps().next().is_some() || header.bitmaps.is_some() {
            return Some("bitmaps".into());
        }
        let other = incompatible::DIRTY | incompatible::COMPRESSION;
        if self.first.raw.incompatible.get() & !other != 0 {
            return Some("feature that the image uses".into());
        }
        self.snapshots_beyond_version_2()
    }

    fn snapshots_beyond_version_2(&self) -> Option<String> {
        let size = self.virtual_size();
        for record in &self.snapshots {
            let name = String::from_utf8_lossy(record.name());
            if record.virtual_size().is_some_and(|own| own != size) {
                return Some(format!(
                    "room for the length of internal snapshot {name:?}, which is not the disk's"
                ));
            }
            if record.vm_state_bytes() > u64::from(u32::MAX) {
                return Some(format!(
                    "room for the VM state of internal snapshot {name:?}, above 4 GiB"
                ));
            }
        }
        None
    }

    /// Lets refcounts be written late, or not; version 2 cannot.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] when the image is of version 2.
    pub fn set_lazy_refcounts(&mut self, lazy: bool) -> Result<()> {
        if lazy && self.version() < 3 {
            let reason = "only version 3 (compat=1.1) has lazy refcounts";
            return Err(self.refused("set lazy refcounts", reason));
        }
        let others = self.first.raw.compatible.get() & !COMPATIBLE_LAZY_REFCOUNTS;
        let bit = if lazy { COMPATIBLE_LAZY_REFCOUNTS } else { 0 };
        self.first.raw.compatible.set(others | bit);
        Ok(())
    }

    /// Names another external data file; the content is the caller's care.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] when the image keeps guest data itself.
    pub fn set_data_file(&mut self, name: &[u8]) -> Result<()> {
        if self.shape().external_data.is_none() {
            let reason = "the image keeps guest data itself";
            return Err(self.refused("name an external data file", reason));
        }
        let name = Some(name.to_vec());
        self.first.set_extension(extension::EXTERNAL_DATA, name);
        Ok(())
    }

    /// Says whether the external data file, read alone, is the guest's disk. That can be taken back, but not be
    /// said of an image of which it was not.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] when it was not.
    pub fn set_data_file_raw(&mut self, raw: bool) -> Result<()> {
        let bits = self.first.raw.autoclear.get();
        let is = self.shape().external_data.is_some() && bits & AUTOCLEAR_RAW_DATA != 0;
        if raw && !is {
            let reason = "an image that exists cannot promise that its data file is raw";
            return Err(self.refused("make the data file raw", reason));
        }
        if !raw {
            self.first.raw.autoclear.set(bits & !AUTOCLEAR_RAW_DATA);
        }
        Ok(())
    }

    /// Takes the marks away that refcounts, or anything, may be wrong. The proof before the switch shows that they are not.
    pub fn mark_clean(&mut self) {
        let marks =
            self.first.raw.incompatible.get() & !(incompatible::DIRTY | incompatible::CORRUPT);
        self.first.raw.incompatible.set(marks);
    }
}
