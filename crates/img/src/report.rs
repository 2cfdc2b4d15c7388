//! What commands that change an image in place say at their end: what was done, proven and needed.

use serde_json::{Value, json};
use stead_qcow2::edit::{Done, Plan};

use crate::common;
use crate::console::Console;
use crate::failure::Outcome;
use crate::getopt::{Opt, Parsed};
use crate::json;

pub(crate) const DRY_RUN: Opt = Opt::flag("dry-run", "", &["dry-run"]);
pub(crate) const JSON: Opt = Opt::flag("json", "", &["json"]);

/// The room of a change.
pub(crate) fn room(plan: &Plan) -> Value {
    json!({
        "needed-bytes": plan.new_bytes,
        "peak-bytes": plan.peak_bytes,
        "end-bytes": plan.end_bytes,
    })
}

/// Nothing was done; this is the room that it would take.
pub(crate) fn planned(parsed: &Parsed, plan: &Plan, console: &mut Console) -> Outcome<()> {
    if parsed.has(JSON.id) {
        let report = json!({ "outcome": "not-begun", "room": room(plan) });
        return console.line(&json::pretty(&report)?);
    }
    console.line(&room_line(plan))
}

/// The room of a change, for people.
pub(crate) fn room_line(plan: &Plan) -> String {
    format!(
        "needs {} free bytes; the file would have {} bytes, at most {} meanwhile",
        plan.new_bytes, plan.end_bytes, plan.peak_bytes
    )
}

/// It was done and proven. People get `text`, unless they want quiet.
pub(crate) fn done<T>(
    parsed: &Parsed,
    done: &Done<T>,
    text: &str,
    console: &mut Console,
) -> Outcome<()> {
    if parsed.has(JSON.id) {
        let report = json!({
            "outcome": "done",
            "verified": "structure",
            "leaks": done.check.leaks,
            "room": room(&done.room),
        });
        return console.line(&json::pretty(&report)?);
    }
    if text.is_empty() || parsed.has(common::QUIET.id) {
        return Ok(());
    }
    console.line(text)
}
