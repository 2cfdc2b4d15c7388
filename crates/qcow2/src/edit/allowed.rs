//! Which files a recovery may open.
//!
//! A journal names the files that the change takes its data from, and one that it may write to. Its hash proves that
//! it is whole, and not who wrote it: anybody can make an image that says it is in progress and names any file of this
//! machine. So none of them is opened, or even looked at, unless the caller allows it; and all of them are
//! allowed before the first byte is written.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

use super::in_place::Journal;

/// How many files an error names.
const NAMED: usize = 16;

/// Which files besides the image a recovery may read and write. The default is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum JournalFiles {
    /// None. A journal that needs another file is an error.
    #[default]
    Nothing,
    /// These, whatever they are called in the journal; they are opened by these paths.
    Listed(Vec<PathBuf>),
    /// Those that lie, links followed, in the folder of the image. All of them can be written to then.
    InFolder,
    /// All: for an image that nobody else can have written.
    Any,
}

/// A file that a journal names, and that was not allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalFile {
    /// Its path, as the journal has it.
    pub path: PathBuf,
    /// Whether the change writes to it, too.
    pub written: bool,
}

/// A path in quotes: it is untrusted, and could hold what a terminal obeys.
impl fmt::Display for JournalFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.written { "writes to" } else { "reads" };
        write!(f, "it {verb} {:?}", self.path)
    }
}

/// The files, for an error.
pub(crate) fn listed(files: &[JournalFile]) -> String {
    let named = files.iter().take(NAMED).map(ToString::to_string);
    let mut text = named.collect::<Vec<_>>().join(", ");
    if let Some(more) = files.len().checked_sub(NAMED).filter(|more| *more > 0) {
        text.push_str(&format!(", and {more} more"));
    }
    text
}

impl JournalFiles {
    /// Has the journal of the image at `image` name every file by the path that the caller allowed; the target is not
    /// looked at when the caller opened it (`target_is_open`).
    pub(super) fn admit(
        &self,
        journal: &mut Journal,
        image: &Path,
        target_is_open: bool,
    ) -> Result<()> {
        let layers = journal.layers.iter_mut();
        let layers = layers.map(|layer| (&mut layer.file.path, false));
        let target = journal.target.iter_mut().filter(|_| !target_is_open);
        let target = target.map(|target| (&mut target.path, true));
        let mut refused: Vec<JournalFile> = Vec::new();
        // What is written comes first, since that is what a user must see.
        for (path, written) in target.chain(layers) {
            match self.place(path, image) {
                Some(allowed) => *path = allowed,
                None if refused.iter().any(|file| file.path == *path) => {}
                None => refused.push(JournalFile {
                    path: path.clone(),
                    written,
                }),
            }
        }
        if refused.is_empty() {
            return Ok(());
        }
        Err(Error::JournalFiles {
            path: image.to_owned(),
            files: refused,
        })
    }

    /// Where to open the file that a journal calls `named`, if that is allowed.
    fn place(&self, named: &Path, image: &Path) -> Option<PathBuf> {
        match self {
            Self::Nothing => None,
            Self::Any => Some(named.to_owned()),
            Self::Listed(files) => {
                let own = |file: &&PathBuf| file.as_path() == named || is_same(file, named);
                files.iter().find(own).cloned()
            }
            Self::InFolder => {
                let (image, named) = (fs::canonicalize(image).ok()?, fs::canonicalize(named).ok()?);
                (image.parent() == named.parent()).then_some(named)
            }
        }
    }
}

/// Whether two names lead to one path.
fn is_same(a: &Path, b: &Path) -> bool {
    match (fs::canonicalize(a), fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        // What cannot be found is not allowed.
        (Ok(_) | Err(_), Ok(_) | Err(_)) => false,
    }
}
