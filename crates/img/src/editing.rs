//! Opening an image to change it in place.

use stead_qcow2::edit::{EditOptions, Editor};

use crate::common;
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::new_image;
use crate::opened::{self, OpenedChain, Sharing};
use crate::reference::Reference;

/// The format of an image that is to be changed. A raw disk that nobody called raw gets a warning: whoever can
/// write it decides what it looks like.
pub(crate) fn format(image: &Reference, console: &mut Console) -> Outcome<Format> {
    let format = opened::format_of(image)?;
    if format == Format::Raw && image.format.is_none() {
        let name = &image.given;
        console.error_line(&format!(
            "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
             What a guest writes at its start can look like another format; say -f raw."
        ))?;
    }
    if image.window.is_some() {
        return Err(opened::not_open(
            image,
            "a part of a file cannot be changed",
        ));
    }
    Ok(format)
}

/// The image, locked and checked.
pub(crate) fn editor(image: &Reference) -> Outcome<Editor> {
    let policy = common::follow_all();
    let opened = Editor::open_following(&image.path, &policy, EditOptions::default());
    opened.map_err(|error| Failure::open(&image.given, &error))
}

/// The disk below the image, which nobody writes to meanwhile, unless that is allowed.
pub(crate) fn below(
    image: &Reference,
    editor: &Editor,
    sharing: Sharing,
) -> Outcome<Option<OpenedChain>> {
    let Some(backing) = &editor.layer().header().backing else {
        return Ok(None);
    };
    let name = String::from_utf8_lossy(&backing.name);
    let format = backing.format.as_deref().map(String::from_utf8_lossy);
    let opened = new_image::below_shared(&image.path, &name, format.as_deref(), sharing);
    let opened = opened
        .map_err(|why| opened::not_open(image, &format!("Could not open backing file: {why}")))?;
    Ok(Some(opened))
}
