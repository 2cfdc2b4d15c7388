//! A copy of a running disk as it was at one instant, by QEMU's backup job.
//!
//! ```text
//!  lend a file ─▶ format ─▶ one transaction: the job begins, and a new bitmap ─▶ concluded ─▶ nodes removed
//! ```
//! The job copies what the guest is about to overwrite before it is overwritten, so what it copies is the disk of the
//! instant of the transaction. The new bitmap is added while the disk stands still for the job, so it records from that
//! instant on. The bitmap that says what to copy is not changed, whatever becomes of the job: meanwhile a successor records for it,
//! which is joined with it at the end.
//!
//! # Source
//! QEMU QMP Reference Manual: `blockdev-backup`, `transaction`, `blockdev-create`; QEMU's docs/interop/bitmaps.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::block_jobs::Job;
use crate::error::Result;
use crate::qmp::Qmp;

/// One bit of a new bitmap stands for so many bytes.
const GRANULARITY_BYTES: u64 = 64 << 10;

/// A copy to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup<'a> {
    /// The id that the job gets.
    pub job: &'a str,
    /// The node of the disk's active layer.
    pub source: &'a str,
    /// The node that is written.
    pub target: &'a str,
    /// The bitmap of the source that says what is copied; without one, everything is.
    pub since: Option<&'a str>,
    /// The persistent bitmap that begins at the instant.
    pub begins: &'a str,
}

/// Starts the copy, and begins the bitmap: both at one instant, or neither. The job's end stays to be read.
///
/// # Errors
/// As [`Qmp::execute`]; nothing was started when it is [`Error::Refused`](crate::Error::Refused).
pub fn start(qmp: &mut Qmp, backup: &Backup<'_>) -> Result<()> {
    let mut job = json!({
        "job-id": backup.job,
        "device": backup.source,
        "target": backup.target,
        "sync": "full",
        "auto-dismiss": false,
        "on-source-error": "report",
        "on-target-error": "report",
    });
    if let Some(bitmap) = backup.since {
        job["sync"] = "bitmap".into();
        job["bitmap"] = bitmap.into();
        job["bitmap-mode"] = "never".into();
    }
    let begins = json!({
        "node": backup.source,
        "name": backup.begins,
        "granularity": GRANULARITY_BYTES,
        "persistent": true,
    });
    // The job first: its disk stands still from then until the transaction is done.
    let actions = json!([
        { "type": "blockdev-backup", "data": job },
        { "type": "block-dirty-bitmap-add", "data": begins },
    ]);
    qmp.execute::<Value>("transaction", json!({ "actions": actions }))
        .map(drop)
}

/// All jobs.
///
/// # Errors
/// As [`Qmp::execute`].
pub fn jobs(qmp: &mut Qmp) -> Result<Vec<Job>> {
    qmp.execute("query-jobs", json!({}))
}

/// Adds the node `name` over an open file that QEMU knows by `path`.
///
/// # Errors
/// As [`Qmp::execute`].
pub fn add_file(qmp: &mut Qmp, name: &str, path: &str) -> Result<()> {
    let node = json!({ "driver": "file", "node-name": name, "filename": path });
    qmp.execute::<Value>("blockdev-add", node).map(drop)
}

/// Starts a job that makes the node `file` an empty qcow2 image of a disk of `bytes`.
///
/// # Errors
/// As [`Qmp::execute`].
pub fn start_format(qmp: &mut Qmp, job: &str, file: &str, bytes: u64) -> Result<()> {
    let options = json!({ "driver": "qcow2", "file": file, "size": bytes });
    let arguments = json!({ "job-id": job, "options": options });
    qmp.execute::<Value>("blockdev-create", arguments).map(drop)
}

/// Adds the node `name` that reads and writes the image in the node `file`.
///
/// # Errors
/// As [`Qmp::execute`].
pub fn add_image(qmp: &mut Qmp, name: &str, file: &str) -> Result<()> {
    let node = json!({ "driver": "qcow2", "node-name": name, "file": file });
    qmp.execute::<Value>("blockdev-add", node).map(drop)
}

/// Removes a node, which is closed then.
///
/// # Errors
/// As [`Qmp::execute`].
pub fn remove_node(qmp: &mut Qmp, name: &str) -> Result<()> {
    qmp.execute::<Value>("blockdev-del", json!({ "node-name": name }))
        .map(drop)
}

/// How large a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSize {
    /// What the guest sees, in bytes.
    pub virtual_bytes: u64,
    /// What its files take, all layers together, as far as is known.
    pub stored_bytes: u64,
}

/// The size of the disk that the node `name` shows; `None` when there is no such node.
///
/// # Errors
/// As [`Qmp::execute`].
pub fn size_of(qmp: &mut Qmp, name: &str) -> Result<Option<DiskSize>> {
    #[derive(Deserialize)]
    struct Image {
        #[serde(rename = "virtual-size")]
        virtual_bytes: u64,
        #[serde(rename = "actual-size", default)]
        stored_bytes: u64,
        #[serde(rename = "backing-image")]
        below: Option<Box<Image>>,
    }
    #[derive(Deserialize)]
    struct Info {
        #[serde(rename = "node-name")]
        name: Option<String>,
        image: Image,
    }
    let all: Vec<Info> = qmp.execute("query-named-block-nodes", json!({ "flat": false }))?;
    let found = all
        .into_iter()
        .find(|info| info.name.as_deref() == Some(name));
    Ok(found.map(|info| {
        let virtual_bytes = info.image.virtual_bytes;
        let mut stored_bytes = 0_u64;
        let mut next = Some(&info.image);
        while let Some(image) = next {
            stored_bytes = stored_bytes.saturating_add(image.stored_bytes);
            next = image.below.as_deref();
        }
        DiskSize {
            virtual_bytes,
            stored_bytes,
        }
    }))
}
