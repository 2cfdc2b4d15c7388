//! Whether a new file fits, asked before it is written.

use std::path::Path;

use stead_sys::space;

use super::convert::{ConvertOptions, dry_run};
use super::measure::bound;
use super::options::Target;
use super::plan::Plan;
use crate::chain::Chain;
use crate::control::Control;
use crate::error::{Error, Result};

/// Fails when the files that `plan` makes do not fit their file system. Blocks that are shared with the source need
/// no room; `shareable` says of which of its members they can be.
///
/// First the bound is taken that the source's tables give, which is cheap. Only if that does not fit are all
/// bytes read to know exactly.
pub(crate) fn require(
    source: &Chain,
    (target, shareable): (&Target, &[bool]),
    options: &ConvertOptions<'_>,
    plan: &Plan<'_>,
    control: &Control<'_>,
) -> Result<()> {
    let path = match target {
        Target::New { path, .. } => path,
        // What is there has its room already, or is a device, whose length is looked at.
        Target::InPlace { .. } => return Ok(()),
    };
    let available = available(path)?;
    // With internal snapshots the active tables are no bound.
    if !plan.has_views() && bound(source, &options.format, plan.disk)? <= available {
        return Ok(());
    }
    let quiet = Control {
        progress: None,
        ..*control
    };
    let exact = dry_run(plan, target, shareable, &quiet)?;
    let needed = exact.allocated_bytes.saturating_sub(exact.shared_bytes);
    if needed <= available {
        return Ok(());
    }
    Err(Error::NoRoom {
        path: path.clone(),
        needed,
        available,
    })
}

fn available(path: &Path) -> Result<u64> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) | None => Path::new("."),
    };
    space::available_bytes(folder)
        .map_err(|source| Error::io("ask for the room of", folder, source))
}
