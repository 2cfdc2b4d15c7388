//! Other children of the layers that a merge changes or removes, as far as they can be found.
//!
//! A backing file does not know who stands on it. So the images in some folders are asked what they stand on; one
//! that lies elsewhere and is not named is not seen.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stead_qcow2::{Chain, Layer, LayerFile, OpenPolicy, probe_format};
use stead_sys::readable;

use crate::layers::{Layers, folder, identity};

/// The most files that are looked at in one folder.
const MAX_FILES: usize = 100_000;

type Id = (u64, u64);

/// What the search found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// The folders that were looked into.
    pub folders: Vec<PathBuf>,
    /// How many qcow2 images were asked.
    pub images: u64,
    /// Images that stand on what is changed, and on which layer.
    pub children: Vec<(PathBuf, PathBuf)>,
    /// Images that could not be asked, and why.
    pub unreadable: Vec<(PathBuf, String)>,
}

/// Looks for other children of the base and the merged layers.
pub(crate) fn find(
    layers: &Layers,
    look_in: &[PathBuf],
    siblings: &[PathBuf],
) -> io::Result<Found> {
    let changed = layers.files[layers.top..=layers.base].iter();
    let changed = changed.map(|file| Ok((identity(&file.path)?, file.path.clone())));
    let changed: Vec<(Id, PathBuf)> = changed.collect::<io::Result<_>>()?;
    let own = layers.files.iter().map(|file| identity(&file.path));
    let own: BTreeSet<Id> = own.collect::<io::Result<_>>()?;
    let mut search = Search {
        changed,
        own,
        found: Found::default(),
    };
    let mut folders: BTreeSet<PathBuf> = look_in.iter().cloned().collect();
    for file in &layers.files[layers.top..=layers.base] {
        // Devices lie in folders of devices, which say nothing of who stands on whom.
        if fs::metadata(&file.path)?.is_file() {
            folders.insert(folder(&file.path));
        }
    }
    for folder in folders {
        search.folder(&folder)?;
    }
    for sibling in siblings {
        search.sibling(sibling);
    }
    Ok(search.found)
}

struct Search {
    changed: Vec<(Id, PathBuf)>,
    own: BTreeSet<Id>,
    found: Found,
}

impl Search {
    fn folder(&mut self, folder: &Path) -> io::Result<()> {
        for (count, entry) in fs::read_dir(folder)?.enumerate() {
            if count >= MAX_FILES {
                let why =
                    format!("it has more than {MAX_FILES} files, and the rest was not looked at");
                self.found.unreadable.push((folder.to_owned(), why));
                break;
            }
            let path = entry?.path();
            if fs::metadata(&path).is_ok_and(|found| found.is_file()) {
                self.image(&path);
            }
        }
        self.found.folders.push(folder.to_owned());
        Ok(())
    }

    fn image(&mut self, path: &Path) {
        match self.ask(path) {
            Ok(None) => {}
            Ok(Some(layer)) => self.found.children.push((path.to_owned(), layer)),
            Err(reason) => self.found.unreadable.push((path.to_owned(), reason)),
        }
    }

    /// The layer that an image stands on, if that is one of those.
    fn ask(&mut self, path: &Path) -> Result<Option<PathBuf>, String> {
        let words = |error: io::Error| error.to_string();
        let file = readable::open(path).map_err(words)?;
        if self
            .own
            .contains(&readable::identity(&file).map_err(words)?)
            || !is_qcow2(&file)
        {
            return Ok(None);
        }
        self.found.images += 1;
        let layer = Layer::inspect_file(file, path).map_err(|error| error.to_string())?;
        let Some(backing) = &layer.header().backing else {
            return Ok(None);
        };
        let name = backing.name.strip_prefix(b"file:").unwrap_or(&backing.name);
        if name.starts_with(b"json:") {
            return Err("it names its backing file in a way that is not looked through; give it with --sibling".into());
        }
        let below = folder(path).join(OsStr::from_bytes(name));
        Ok(identity(&below).ok().and_then(|id| self.is_changed(id)))
    }

    fn is_changed(&self, id: Id) -> Option<PathBuf> {
        let found = self.changed.iter().find(|(other, _)| *other == id);
        found.map(|(_, path)| path.clone())
    }

    /// An image that the caller names, with all that lies below it.
    fn sibling(&mut self, path: &Path) {
        match self.ask_chain(path) {
            Ok(Some(layer)) => self.found.children.push((path.to_owned(), layer)),
            Ok(None) => {}
            Err(reason) => self.found.unreadable.push((path.to_owned(), reason)),
        }
    }

    fn ask_chain(&mut self, path: &Path) -> Result<Option<PathBuf>, String> {
        let id = identity(path).map_err(|error| error.to_string())?;
        if self.own.contains(&id) {
            return Ok(None);
        }
        self.found.images += 1;
        let format = probe_format(path).map_err(|error| error.to_string())?;
        let file = LayerFile {
            path: path.to_owned(),
            format,
        };
        let chain = Chain::open_following(&file, &OpenPolicy::NAMES);
        let chain = chain.map_err(|error| error.to_string())?;
        for index in 1..chain.depth() {
            let Some((path, _)) = chain.file(index) else {
                break;
            };
            let id = identity(path).map_err(|error| error.to_string())?;
            if let Some(layer) = self.is_changed(id) {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }
}

fn is_qcow2(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).is_ok() && &magic == b"QFI\xfb"
}
