//! How an image names its external data file.
//!
//! QEMU looks for a name that is not absolute in the current folder, this program in the image's: a name in an
//! image must not depend on who looks. So a name is written as it was given only where the two are one folder, and
//! else in full; both then find the file.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::system_words;
use crate::reference;

/// What the image at `image` is to call the data file that the user calls `name`, which starts in the current folder.
///
/// # Errors
/// The text, where the name is none of a file or cannot be written in full.
pub(crate) fn name_for(image: &Path, name: &str) -> Result<String, String> {
    let file = reference::plain_path(OsStr::new(name))?;
    if file.is_absolute() || is_current(image.parent()) {
        return Ok(name.to_owned());
    }
    let full = std::path::absolute(&file).map_err(|error| {
        let why = system_words(&error);
        format!("The data file '{name}' cannot be named in full: {why}")
    })?;
    let text = full.to_str().map(str::to_owned);
    text.ok_or_else(|| {
        format!(
            "The data file '{}' has a name that is not text",
            full.display()
        )
    })
}

/// Whether that folder is the current one.
fn is_current(folder: Option<&Path>) -> bool {
    let folder = match folder {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        Some(_) | None => return true,
    };
    let real = |folder: PathBuf| fs::canonicalize(folder).ok();
    real(folder) == real(PathBuf::from("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_image_in_the_current_folder_keeps_a_short_name() {
        let named = |image: &str, name: &str| name_for(Path::new(image), name).expect("a file");
        assert_eq!(named("image", "data"), "data");
        assert_eq!(named("./image", "a/data"), "a/data");
        assert_eq!(named("/elsewhere/image", "/data"), "/data");
        let full = named("/elsewhere/image", "data");
        assert!(full.starts_with('/') && full.ends_with("/data"), "{full}");
        assert!(name_for(Path::new("image"), "nbd:data").is_err());
    }
}
