//! What an image is made like, changed afterwards: version, refcounts, length and the name of the backing file, in
//! one change.

use crate::chain::Chain;
use crate::control::Control;
use crate::edit::{Done, Edit, Editor, Plan};
use crate::error::{Error, Result};

use super::rebase::{BackingFile, require_name};

/// A version of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FormatVersion {
    /// Version 2, which QEMU calls `compat=0.10`.
    V2,
    /// Version 3, which QEMU calls `compat=1.1`.
    V3,
}

/// What is to be other than it is; what is `None` stays.
#[derive(Debug, Clone, Copy, Default)]
pub struct Amendments<'a> {
    /// The version.
    pub version: Option<FormatVersion>,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// The width of a refcount: 1, 2, 4, 8, 16, 32 or 64 bits.
    pub refcount_bits: Option<u64>,
    /// The virtual disk's length, in bytes.
    pub size: Option<u64>,
    /// The backing file's name, or that there is none; contents are not looked at (see
    /// [`super::rebase::rename`]).
    pub backing: Option<Option<BackingFile<'a>>>,
    /// The external data file's name, in an image that has one ([`Editor::open_for_amendments`]); the file is not
    /// looked at.
    pub data_file: Option<&'a [u8]>,
    /// Whether the external data file, read alone, is the disk: that can only be taken back.
    pub data_file_raw: Option<bool>,
}

/// Makes all amendments, or none. `below` is the disk of the backing files, needed to grow an image that has one.
///
/// # Durability
/// As [`Editor::apply`].
///
/// # Errors
/// [`Error::Refused`] when the image has what the version cannot say, or a value is none that there is;
/// [`Error::RefcountOverflow`] when a refcount does not fit; [`Error::Cancelled`]; else as [`Editor::apply`].
pub fn amend(
    editor: &mut Editor,
    amendments: &Amendments<'_>,
    below: Option<&Chain>,
    control: &Control<'_>,
) -> Result<Done<()>> {
    if let Some(backing) = amendments.backing {
        require_name(editor.layer(), backing)?;
    }
    editor.apply_with(control, |edit| change(edit, amendments, below, control))
}

/// How much room [`amend`] needs; nothing is written.
///
/// # Errors
/// As [`amend`].
pub fn plan(
    editor: &Editor,
    amendments: &Amendments<'_>,
    below: Option<&Chain>,
    control: &Control<'_>,
) -> Result<Plan> {
    if let Some(backing) = amendments.backing {
        require_name(editor.layer(), backing)?;
    }
    editor.plan_with(control, |edit| change(edit, amendments, below, control))
}

fn change(
    edit: &mut Edit,
    amendments: &Amendments<'_>,
    below: Option<&Chain>,
    control: &Control<'_>,
) -> Result<()> {
    if amendments.version == Some(FormatVersion::V3) {
        edit.upgrade();
    }
    if let Some(size) = amendments.size {
        edit.resize(size, below)?;
    }
    // From here on, what is below is what the new name says.
    if let Some(backing) = amendments.backing {
        edit.set_backing(backing.map(|file| (file.name, file.format)));
    }
    if let Some(bits) = amendments.refcount_bits {
        let order = refcount_order(edit, bits, amendments.version)?;
        edit.set_refcount_order(order)?;
    }
    if amendments.version == Some(FormatVersion::V2) {
        edit.downgrade(control)?;
    }
    if let Some(lazy) = amendments.lazy_refcounts {
        edit.set_lazy_refcounts(lazy)?;
    }
    if let Some(name) = amendments.data_file {
        edit.set_data_file(name)?;
    }
    if let Some(raw) = amendments.data_file_raw {
        edit.set_data_file_raw(raw)?;
    }
    edit.mark_clean();
    Ok(())
}

fn refcount_order(edit: &Edit, bits: u64, version: Option<FormatVersion>) -> Result<u32> {
    let refused = |reason: String| Error::Refused {
        path: edit.old().path().to_owned(),
        operation: "change the width of refcounts",
        reason,
    };
    if !bits.is_power_of_two() || bits > 64 {
        return Err(refused(format!(
            "{bits} is none of 1, 2, 4, 8, 16, 32 and 64 bits"
        )));
    }
    if bits != 16 && (edit.version() < 3 || version == Some(FormatVersion::V2)) {
        return Err(refused("version 2 has refcounts of 16 bits only".into()));
    }
    Ok(bits.trailing_zeros())
}
