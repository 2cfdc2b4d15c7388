//! What the commands print.

use serde::Serialize;
use stead_agent_link::Bytes;
use stead_agent_link::files::{Copied, Metadata};

/// What `stead cp --json` prints.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub struct CopiedReport {
    files: u64,
    folders: u64,
    links: u64,
    pub(super) skipped: u64,
    data_bytes: u64,
    hole_bytes: u64,
    resumed_bytes: u64,
}

impl From<Copied> for CopiedReport {
    fn from(copied: Copied) -> Self {
        Self {
            files: copied.files,
            folders: copied.folders,
            links: copied.links,
            skipped: copied.skipped,
            data_bytes: copied.data_bytes,
            hole_bytes: copied.hole_bytes,
            resumed_bytes: copied.resumed_bytes,
        }
    }
}

/// What `stead file ls --json` and `stead file stat --json` print of a file.
#[derive(Debug, Serialize)]
pub(super) struct FileReport {
    name: String,
    kind: String,
    mode: String,
    uid: u32,
    gid: u32,
    length_bytes: u64,
    allocated_bytes: u64,
    modified_seconds: i64,
    modified_nanoseconds: u32,
    target: Option<String>,
}

impl FileReport {
    pub(super) fn new(name: &Bytes, metadata: &Metadata, target: Option<&Bytes>) -> Self {
        let text = |bytes: &Bytes| String::from_utf8_lossy(&bytes.0).into_owned();
        Self {
            name: text(name),
            kind: metadata.kind.to_string(),
            mode: format!("{:04o}", metadata.mode),
            uid: metadata.owner.uid,
            gid: metadata.owner.gid,
            length_bytes: metadata.length_bytes,
            allocated_bytes: metadata.allocated_bytes,
            modified_seconds: metadata.modified.seconds,
            modified_nanoseconds: metadata.modified.nanoseconds,
            target: target.map(text),
        }
    }

    /// One line for people; what a terminal would obey is shown as it is written in Rust.
    pub(super) fn line(&self) -> String {
        let target = match &self.target {
            Some(target) => format!(" -> {}", target.escape_debug()),
            None => String::new(),
        };
        format!(
            "{} {:4} {:>5} {:>5} {:>12} {}{target}",
            self.mode,
            self.kind,
            self.uid,
            self.gid,
            self.length_bytes,
            self.name.escape_debug()
        )
    }
}
