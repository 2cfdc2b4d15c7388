//! Opening an image to change it in place.

use std::ffi::OsStr;

use stead_qcow2::edit::{EditOptions, Editor};

use crate::common::{self, FORMAT};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::Parsed;
use crate::new_image;
use crate::opened::{self, OpenedChain};
use crate::reference::Reference;

/// The image that `name` means by the options `-f` and `--image-opts`, and its format. A raw disk that nobody called raw gets a warning: whoever can
/// write it decides what it looks like.
pub(crate) fn image(
    parsed: &Parsed,
    name: &OsStr,
    console: &mut Console,
) -> Outcome<(Reference, Format)> {
    let image = common::image(parsed, name, FORMAT.id)?;
    let format = opened::format_of(&image)?;
    if format == Format::Raw && image.format.is_none() {
        let name = &image.given;
        console.error_line(&format!(
            "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
             What a guest writes at its start can look like another format; say -f raw."
        ))?;
    }
    if image.window.is_some() {
        return Err(opened::not_open(
            &image,
            "a part of a file cannot be changed",
        ));
    }
    Ok((image, format))
}

/// The image, locked and checked.
pub(crate) fn editor(image: &Reference) -> Outcome<Editor> {
    let opened = Editor::open(&image.path, EditOptions::default());
    opened.map_err(|error| Failure::open(&image.given, &error))
}

/// The disk below the image, which nobody writes to meanwhile.
pub(crate) fn below(image: &Reference, editor: &Editor) -> Outcome<Option<OpenedChain>> {
    let Some(backing) = &editor.layer().header().backing else {
        return Ok(None);
    };
    let name = String::from_utf8_lossy(&backing.name);
    let format = backing.format.as_deref().map(String::from_utf8_lossy);
    let opened = new_image::below_locked(&image.path, &name, format.as_deref());
    let opened = opened
        .map_err(|why| opened::not_open(image, &format!("Could not open backing file: {why}")))?;
    Ok(Some(opened))
}
