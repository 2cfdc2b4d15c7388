//! Room for a new file, asked before its first byte.

use std::path::Path;

use stead_sys::space::available_bytes;

use crate::error::{Kind, Result, SaveImageError};

/// Refuses a new file of `needed` bytes beside `path` where there is no room for it.
///
/// Room that others take later is not known here: a file system that fills up midway is an error of the write, and
/// what was begun is removed.
pub(crate) fn require(path: &Path, needed: u64, attempt: &str) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) | None => Path::new("."),
    };
    let has =
        available_bytes(folder).map_err(|source| SaveImageError::io(attempt, path, source))?;
    if needed <= has {
        return Ok(());
    }
    let attempt = format!("{attempt} {}", path.display());
    let found = format!(
        "it needs {needed} bytes, and {} has room for {has}",
        folder.display()
    );
    Err(SaveImageError::new(Kind::NoSpace, attempt, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_is_let_through_and_what_does_not_is_refused_with_both_numbers() {
        require(Path::new("new"), 0, "write").expect("nothing fits anywhere");
        let error = require(Path::new("new"), u64::MAX, "write").expect_err("too much");
        assert_eq!(error.kind(), Kind::NoSpace);
        assert!(error.found().contains("18446744073709551615"), "{error}");
        let error = require(Path::new("/no/such/folder/new"), 1, "write").expect_err("no folder");
        assert_eq!(error.kind(), Kind::NotFound);
    }
}
