//! What commands that change an image in place say at their end: what was done, proven and needed.

use serde_json::{Value, json};
use stead_qcow2::edit::{Done, Plan};
use stead_qcow2::ops::commit::{BitmapFate, BitmapOutcome};

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

/// A bitmap that `whose` image does not keep means a full backup.
pub(crate) fn warn_of_bitmaps(
    whose: &str,
    outcomes: &[BitmapOutcome],
    console: &mut Console,
) -> Outcome<()> {
    for bitmap in outcomes {
        if let BitmapFate::Dropped { reason } = &bitmap.fate {
            let name = String::from_utf8_lossy(&bitmap.name);
            let text = format!("WARNING: {whose} does not keep the bitmap '{name}': {reason}");
            console.error_line(&text)?;
        }
    }
    Ok(())
}

/// What became of bitmaps.
pub(crate) fn bitmaps(outcomes: &[BitmapOutcome]) -> Value {
    outcomes.iter().map(bitmap).collect()
}

fn bitmap(outcome: &BitmapOutcome) -> Value {
    let (fate, reason) = match &outcome.fate {
        BitmapFate::Merged { .. } => ("merged", None),
        BitmapFate::Carried { .. } => ("carried", None),
        BitmapFate::Marked => ("marked", None),
        BitmapFate::Kept => ("kept", None),
        BitmapFate::MarkedInstead { reason } => ("marked", Some(reason)),
        BitmapFate::Dropped { reason } => ("dropped", Some(reason)),
    };
    json!({
        "name": String::from_utf8_lossy(&outcome.name),
        "fate": fate,
        "reason": reason,
    })
}

/// As [`done`], with what became of the image's bitmaps.
pub(crate) fn done_with_bitmaps<T>(
    parsed: &Parsed,
    done: &Done<T>,
    outcomes: &[BitmapOutcome],
    console: &mut Console,
) -> Outcome<()> {
    warn_of_bitmaps("the image", outcomes, console)?;
    if !parsed.has(JSON.id) {
        return Ok(());
    }
    let mut report = as_json(done);
    report["bitmaps"] = bitmaps(outcomes);
    console.line(&json::pretty(&report)?)
}

fn as_json<T>(done: &Done<T>) -> Value {
    json!({
        "outcome": "done",
        "verified": "structure",
        "leaks": done.check.leaks,
        "room": room(&done.room),
    })
}

/// It was done and proven. People get `text`, unless they want quiet.
pub(crate) fn done<T>(
    parsed: &Parsed,
    done: &Done<T>,
    text: &str,
    console: &mut Console,
) -> Outcome<()> {
    if parsed.has(JSON.id) {
        return console.line(&json::pretty(&as_json(done))?);
    }
    if text.is_empty() || parsed.has(common::QUIET.id) {
        return Ok(());
    }
    console.line(text)
}
