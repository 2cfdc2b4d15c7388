//! A text changed in the user's editor.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use stead_engine::{EngineError, Kind, Result};
use stead_sys::durable;

/// What is started where nobody says otherwise.
const USUAL_EDITOR: &str = "vi";

/// A text in a file of its own, which goes away with this unless it is kept.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    keep: bool,
}

impl Draft {
    /// Puts `text` where an editor finds it; nobody else can read it.
    pub fn new(text: &str) -> Result<Self> {
        let name = format!("stead-{}.xml", std::process::id());
        let path = std::env::temp_dir().join(name);
        let draft = |mut file: File| -> io::Result<Self> {
            let path = path.clone();
            let draft = Self { path, keep: false };
            file.write_all(text.as_bytes())?;
            Ok(draft)
        };
        durable::create_scratch(&path, 0o600)
            .and_then(draft)
            .map_err(|source| failed("write", &path, source))
    }

    /// Lets the user change it, and gives what it is then. Blocks until the editor has ended.
    pub fn edit(&self) -> Result<String> {
        let editor = editor();
        let attempt = format!("edit with {}", editor.display());
        // A shell, since the variable may hold arguments.
        let mut script = editor;
        script.push(" \"$1\"");
        let ended = Command::new("sh")
            .args(["-c".into(), script, "sh".into(), self.path.clone().into()])
            .status();
        let ended = ended.map_err(|source| failed("start an editor for", &self.path, source))?;
        if !ended.success() {
            let found = format!("it ended with {ended}");
            return Err(EngineError::new(Kind::Usage, attempt, found)
                .left("nothing was changed")
                .next("say which editor to use with EDITOR, or give the new XML with --xml"));
        }
        fs::read_to_string(&self.path).map_err(|source| failed("read", &self.path, source))
    }

    /// Leaves the text where it is.
    pub fn keep(mut self) -> PathBuf {
        self.keep = true;
        self.path.clone()
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.keep {
            // An editor may have taken it away.
            drop(durable::remove_file(&self.path));
        }
    }
}

/// As `virsh save-image-edit` chooses it.
fn editor() -> OsString {
    let named = ["VISUAL", "EDITOR"].iter().filter_map(std::env::var_os);
    let mut named = named.filter(|name| !name.is_empty());
    named.next().unwrap_or_else(|| USUAL_EDITOR.into())
}

fn failed(attempt: &str, path: &Path, source: io::Error) -> EngineError {
    EngineError::new(Kind::Internal, format!("{attempt} {}", path.display()), "")
        .because(source)
        .left("nothing was changed")
        .next("see what the system says, or give the new XML with --xml")
}
