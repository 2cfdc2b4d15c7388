//! Block jobs and dirty bitmaps of a running QEMU, asked for by node.
//!
//! ```text
//!  start_commit ─▶ running ◀──▶ paused (asked, or no room)     finalize         dismiss
//!                     ├──────────▶ pending ───────────────────▶ concluded ─────▶ null
//!                     │ complete      ▲
//!                     ├─▶ ready ──────┘  (where the active layer is committed)
//!                     └─ an error, or cancelled ──────────────▶ concluded with an error
//! ```
//! A commit of the active layer is *ready* when the base has all of it, and what the guest writes from then on goes to
//! both. Told to complete, it holds the disk's requests until it is finalized or cancelled: in *pending* both have the
//! same, and the base's file is flushed.
//!
//! A job is made with `auto-finalize` and `auto-dismiss` off: nothing about the chain changes before it is told to,
//! and its end stays to be read. A job that QEMU calls complete is only that: what its file says is looked at by
//! whoever needs it.
//!
//! # Source
//! QEMU QMP Reference Manual: background jobs; QEMU's docs/interop/bitmaps.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::qmp::Qmp;

/// Where a job is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub enum JobState {
    /// It was made and has not begun.
    Created,
    /// It works.
    Running,
    /// It stands still: somebody asked, or there is no room.
    Paused,
    /// The active layer is mirrored; it can be told to switch.
    Ready,
    /// Ready, and paused.
    Standby,
    /// It waits for others of its transaction.
    Waiting,
    /// Its work is done; nothing of the chain has changed. It waits for [`Order::Finalize`].
    Pending,
    /// It is cleaning up after an error or a cancellation.
    Aborting,
    /// It has ended; its error says how. It waits for [`Order::Dismiss`].
    Concluded,
    /// It is gone.
    Null,
    /// Any other, in QEMU's word.
    Other(String),
}

impl From<String> for JobState {
    fn from(word: String) -> Self {
        match word.as_str() {
            "created" => Self::Created,
            "running" => Self::Running,
            "paused" => Self::Paused,
            "ready" => Self::Ready,
            "standby" => Self::Standby,
            "waiting" => Self::Waiting,
            "pending" => Self::Pending,
            "aborting" => Self::Aborting,
            "concluded" => Self::Concluded,
            "null" => Self::Null,
            _ => Self::Other(word),
        }
    }
}

/// A job, as `query-jobs` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// Where it is.
    #[serde(rename = "status")]
    pub state: JobState,
    /// How much is done, in bytes for block jobs.
    #[serde(rename = "current-progress")]
    pub done: u64,
    /// How much there is in all; it may grow.
    #[serde(rename = "total-progress")]
    pub total: u64,
    /// Why it failed, in QEMU's words.
    pub error: Option<String>,
}

/// A commit of layers into the one below them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit<'a> {
    /// The id that the job gets.
    pub id: &'a str,
    /// The node of the disk's active layer.
    pub active: &'a str,
    /// The node of the topmost layer that is committed; none where the active one is, too.
    pub top: Option<&'a str>,
    /// The node that is committed into.
    pub base: &'a str,
    /// What the header of the layer above the top says is below it, afterwards; none where there is no such layer.
    pub backing_file: Option<&'a str>,
    /// The most bytes a second; 0 for as fast as can be.
    pub bytes_per_second: u64,
}

/// Starts a commit. It stops where there is no room, rather than fail.
///
/// # Errors
/// As [`Qmp::execute`]; nothing was started then.
pub fn start_commit(qmp: &mut Qmp, commit: &Commit<'_>) -> Result<()> {
    let mut arguments = json!({
        "job-id": commit.id,
        "device": commit.active,
        "base-node": commit.base,
        "on-error": "enospc",
        "speed": commit.bytes_per_second,
        "auto-finalize": false,
        "auto-dismiss": false,
    });
    if let Some(top) = commit.top {
        arguments["top-node"] = top.into();
    }
    if let Some(name) = commit.backing_file {
        arguments["backing-file"] = name.into();
    }
    qmp.execute::<Value>("block-commit", arguments).map(drop)
}

/// The job of that id; `None` when there is none.
///
/// # Errors
/// As [`Qmp::execute`].
pub fn job(qmp: &mut Qmp, id: &str) -> Result<Option<Job>> {
    let jobs: Vec<Job> = qmp.execute("query-jobs", json!({}))?;
    Ok(jobs.into_iter().find(|job| job.id == id))
}

/// Whether the block job of that id stands still because there is no room for what it writes.
///
/// # Errors
/// As [`Qmp::execute`].
pub fn lacks_room(qmp: &mut Qmp, id: &str) -> Result<bool> {
    #[derive(Deserialize)]
    struct BlockJob {
        device: String,
        #[serde(rename = "io-status")]
        io_status: String,
    }
    let jobs: Vec<BlockJob> = qmp.execute("query-block-jobs", json!({}))?;
    let is_short = |job: &BlockJob| job.device == id && job.io_status == "nospace";
    Ok(jobs.iter().any(is_short))
}

/// What a job can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// End without having happened.
    Cancel,
    /// Switch the active layer (of a ready one).
    Complete,
    /// Make what was done count.
    Finalize,
    /// Be forgotten.
    Dismiss,
}

impl Order {
    fn command(self) -> &'static str {
        match self {
            Self::Pause => "job-pause",
            Self::Resume => "job-resume",
            Self::Cancel => "job-cancel",
            Self::Complete => "job-complete",
            Self::Finalize => "job-finalize",
            Self::Dismiss => "job-dismiss",
        }
    }
}

/// Tells a job something.
///
/// # Errors
/// As [`Qmp::execute`]; [`Error::Refused`] when the job is not in a state for it.
pub fn tell_job(qmp: &mut Qmp, id: &str, order: Order) -> Result<()> {
    qmp.execute::<Value>(order.command(), json!({ "id": id }))
        .map(drop)
}

/// Lets a block job that stopped for want of room try again: its pause is lifted and its error forgotten.
///
/// # Errors
/// As [`Qmp::execute`].
pub fn try_again(qmp: &mut Qmp, id: &str) -> Result<()> {
    qmp.execute::<Value>("block-job-resume", json!({ "device": id }))
        .map(drop)
}

/// A dirty bitmap of a node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NodeBitmap {
    /// Its name; empty for those that nobody named.
    #[serde(default)]
    pub name: String,
    /// One bit stands for so many bytes.
    #[serde(rename = "granularity")]
    pub granularity_bytes: u64,
    /// How many bytes it has marked.
    #[serde(rename = "count")]
    pub dirty_bytes: u64,
    /// It marks what is written.
    #[serde(rename = "recording")]
    pub is_recording: bool,
    /// It is to be stored in the image when that is closed.
    #[serde(rename = "persistent", default)]
    pub is_persistent: bool,
    /// It was not saved and says nothing.
    #[serde(rename = "inconsistent", default)]
    pub is_inconsistent: bool,
}

/// A node over a file, as QEMU has it open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its driver: `qcow2`, `file`, …
    pub driver: String,
    /// The file below it, where it names one.
    pub file: Option<std::path::PathBuf>,
    /// Whether it is open read-only.
    pub read_only: bool,
    /// Its bitmaps.
    pub bitmaps: Vec<NodeBitmap>,
}

/// All nodes.
///
/// # Errors
/// As [`Qmp::execute`].
pub fn nodes(qmp: &mut Qmp) -> Result<Vec<Node>> {
    #[derive(Deserialize)]
    struct Info {
        #[serde(rename = "node-name")]
        name: Option<String>,
        drv: String,
        file: String,
        ro: bool,
        #[serde(rename = "dirty-bitmaps", default)]
        bitmaps: Vec<NodeBitmap>,
    }
    let all: Vec<Info> = qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
    let named = all.into_iter().filter_map(|info| {
        Some(Node {
            name: info.name?,
            file: file_of(&info.file),
            driver: info.drv,
            read_only: info.ro,
            bitmaps: info.bitmaps,
        })
    });
    Ok(named.collect())
}

/// The file in what QEMU calls a node's file: a path, or `json:` and the node's options.
fn file_of(text: &str) -> Option<std::path::PathBuf> {
    let Some(options) = text.strip_prefix("json:") else {
        return Some(text.into());
    };
    let options: Value = serde_json::from_str(options).ok()?;
    let mut node = &options;
    while let Some(below) = node.get("file") {
        node = below;
    }
    Some(node.get("filename")?.as_str()?.into())
}

/// A change of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapChange<'a> {
    /// A new, persistent bitmap that records what is written from now on.
    Add {
        /// Its name.
        name: &'a str,
        /// One bit stands for so many bytes.
        granularity_bytes: u64,
    },
    /// It is gone.
    Remove(&'a str),
    /// Nothing is marked in it.
    Clear(&'a str),
    /// It records from now on.
    Enable(&'a str),
    /// It records no more.
    Disable(&'a str),
    /// What bitmaps of other nodes say is marked in it, too.
    Merge {
        /// The one that is changed.
        into: &'a str,
        /// Nodes and names of the others.
        from: Vec<(&'a str, &'a str)>,
    },
}

impl BitmapChange<'_> {
    fn action(&self, node: &str) -> Value {
        let one = |kind: &str, name: &str| json!({ "type": kind, "data": { "node": node, "name": name } });
        match self {
            Self::Add {
                name,
                granularity_bytes,
            } => json!({ "type": "block-dirty-bitmap-add", "data": {
                "node": node, "name": name, "granularity": granularity_bytes, "persistent": true, "disabled": false,
            } }),
            // Removing is no part of a transaction before QEMU 4.2, and is since.
            Self::Remove(name) => one("block-dirty-bitmap-remove", name),
            Self::Clear(name) => one("block-dirty-bitmap-clear", name),
            Self::Enable(name) => one("block-dirty-bitmap-enable", name),
            Self::Disable(name) => one("block-dirty-bitmap-disable", name),
            Self::Merge { into, from } => {
                let from = from
                    .iter()
                    .map(|(node, name)| json!({ "node": node, "name": name }));
                let from: Vec<Value> = from.collect();
                json!({ "type": "block-dirty-bitmap-merge", "data": {
                    "node": node, "target": into, "bitmaps": from,
                } })
            }
        }
    }
}

/// Changes bitmaps of `node`: all of it or nothing.
///
/// # Durability
/// None: QEMU stores bitmaps when the node is closed or opened read-only, and says nothing when it cannot.
///
/// # Errors
/// As [`Qmp::execute`]; nothing was changed when it is [`Error::Refused`].
pub fn change_bitmaps(qmp: &mut Qmp, node: &str, changes: &[BitmapChange<'_>]) -> Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    let actions: Vec<Value> = changes.iter().map(|change| change.action(node)).collect();
    qmp.execute::<Value>("transaction", json!({ "actions": actions }))
        .map(drop)
}

/// Closes a node that nobody uses any more; whether it could be: one that somebody uses, or that was not opened by
/// its name, is left to QEMU.
///
/// # Errors
/// As [`Qmp::execute`], but for a refusal.
pub fn close_node(qmp: &mut Qmp, node: &str) -> Result<bool> {
    match qmp.execute::<Value>("blockdev-del", json!({ "node-name": node })) {
        Ok(_) => Ok(true),
        Err(Error::Refused { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Connects to a QMP socket of a QEMU that somebody else started.
///
/// # Errors
/// When nobody listens there, or it does not speak QMP.
pub fn connect(socket: &std::path::Path) -> Result<Qmp> {
    let stream = std::os::unix::net::UnixStream::connect(socket).map_err(|source| Error::File {
        what: "connect to the QMP socket",
        path: socket.to_owned(),
        source,
    })?;
    Qmp::negotiate(stream, crate::qmp::ANSWER_WITHIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_a_node_is_found_in_a_path_and_in_options() {
        assert_eq!(file_of("/a,b"), Some("/a,b".into()));
        let options = r#"json:{"backing": {"driver": "qcow2", "file": {"driver": "file", "filename": "/below"}}, "driver": "qcow2", "file": {"driver": "raw", "file": {"driver": "file", "filename": "/own"}}}"#;
        assert_eq!(file_of(options), Some("/own".into()));
        for none in ["json:{}", "json:[", r#"json:{"file": 7}"#] {
            assert_eq!(file_of(none), None, "{none}");
        }
    }

    #[test]
    fn a_job_is_read_with_its_error_and_a_state_that_is_not_known() {
        let told = r#"[{"current-progress": 7, "status": "concluded", "total-progress": 9, "type": "commit", "id": "j", "error": "No space left"},
                       {"current-progress": 0, "status": "dreaming", "total-progress": 0, "type": "other", "id": "k"}]"#;
        let jobs: Vec<Job> = serde_json::from_str(told).expect("jobs");
        assert_eq!(jobs[0].state, JobState::Concluded);
        assert_eq!(jobs[0].error.as_deref(), Some("No space left"));
        assert_eq!(jobs[1].state, JobState::Other("dreaming".to_owned()));
    }
}
