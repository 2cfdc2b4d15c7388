//! Opening an image to change it in place.

use std::ffi::OsStr;
use std::ops::{Deref, DerefMut};

use stead_qcow2::Error;
use stead_qcow2::edit::{EditOptions, Editor};
use stead_sys::image_lock::ImageLock;

use crate::common::{self, FORMAT};
use crate::console::Console;
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::Parsed;
use crate::new_image;
use crate::opened::{self, OpenedChain, Sharing};
use crate::progress;
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
    Ok((image, format))
}

/// An image that is open for changes.
#[derive(Debug)]
pub(crate) struct OpenedEditor {
    editor: Editor,
    /// That on a file of which the image is a part; else the editor has it.
    _lock: Option<ImageLock>,
}

impl Deref for OpenedEditor {
    type Target = Editor;

    fn deref(&self) -> &Editor {
        &self.editor
    }
}

impl DerefMut for OpenedEditor {
    fn deref_mut(&mut self) -> &mut Editor {
        &mut self.editor
    }
}

/// For which changes an image is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Changes {
    /// Any; the image is marked clean, and its guest data is its own.
    Any,
    /// Of the header and refcounts; a mark that it is dirty goes, and guest data may be in another file.
    Amendments,
}

/// The image, locked and checked, for any change.
pub(crate) fn editor(image: &Reference) -> Outcome<OpenedEditor> {
    editor_for(image, Changes::Any)
}

/// The image, locked and checked.
pub(crate) fn editor_for(image: &Reference, changes: Changes) -> Outcome<OpenedEditor> {
    let options = EditOptions {
        allow_dirty: changes == Changes::Amendments,
        ..EditOptions::default()
    };
    // It is checked whole, which can take a while.
    let options = options.watched(&progress::stoppable());
    let path = &image.path;
    let cannot = |error: Error| Failure::open(&image.given, &error);
    let Some(window) = image.window else {
        let opened = match changes {
            Changes::Any => Editor::open_following(path, &common::follow_all(), options),
            Changes::Amendments => Editor::open_for_amendments(path, options),
        };
        let editor = opened.map_err(cannot)?;
        return Ok(OpenedEditor {
            editor,
            _lock: None,
        });
    };
    let part = window.open_for_changes(path);
    let (storage, lock) = part.map_err(|why| opened::not_open(image, &why))?;
    let opened = match changes {
        Changes::Any => Editor::on_storage(storage, path, options),
        Changes::Amendments => Editor::for_amendments_on(storage, path, options),
    };
    Ok(OpenedEditor {
        editor: opened.map_err(cannot)?,
        _lock: Some(lock),
    })
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
