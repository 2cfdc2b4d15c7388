//! What a check found, as it is told to people and programs.

use serde_json::json as json_value;
use stead_qcow2::edit::Plan;
use stead_qcow2::{CheckReport, Finding, HostOffset, Layer, Note, ops};

use crate::common::Output;
use crate::console::Console;
use crate::failure::Outcome;
use crate::json;
use crate::reference::Reference;
use crate::report;
use crate::tree::Tree;

/// What a repair did.
#[derive(Debug, Default)]
pub(super) struct Repaired {
    leaks: u64,
    corruptions: u64,
    /// Marks (dirty, corrupt) that went.
    marks: bool,
    /// The names of bitmaps that were dropped.
    pub dropped_bitmaps: Vec<String>,
    /// Internal snapshots, and how many bytes they got back.
    pub restored: Vec<(String, u64)>,
}

impl Repaired {
    pub fn of(done: &ops::repair::Repaired) -> Self {
        let (before, after) = (&done.before, &done.after);
        let marks = |report: &CheckReport| (report.marked_dirty, report.marked_corrupt);
        Self {
            leaks: before.leaks.saturating_sub(after.leaks),
            corruptions: before.corruptions.saturating_sub(after.corruptions),
            marks: marks(before) != marks(after),
            dropped_bitmaps: done.dropped_bitmaps.clone(),
            restored: Vec::new(),
        }
    }

    /// Whether findings were made right.
    fn is_counted(&self) -> bool {
        self.leaks + self.corruptions > 0
    }

    /// Whether the image was changed.
    pub fn is_something(&self) -> bool {
        let bitmaps = !self.dropped_bitmaps.is_empty();
        self.is_counted() || self.marks || bitmaps || !self.restored.is_empty()
    }

    fn tree(&self) -> Tree {
        let text = |name: &String| Tree::from(name.as_str());
        let restored = self
            .restored
            .iter()
            .map(|(name, bytes)| Tree::Map(vec![("name", text(name)), ("bytes", (*bytes).into())]));
        let outcome = match self.is_something() {
            true => "done",
            false => "nothing-to-do",
        };
        Tree::Map(vec![
            ("outcome", outcome.into()),
            ("marks-cleared", self.marks.into()),
            (
                "dropped-bitmaps",
                Tree::List(self.dropped_bitmaps.iter().map(text).collect()),
            ),
            ("restored-snapshots", Tree::List(restored.collect())),
        ])
    }
}

/// What was made right, for people.
pub(super) fn repaired(done: &Repaired) -> String {
    let mut text = String::new();
    for (name, bytes) in &done.restored {
        text.push_str(&format!(
            "The internal snapshot '{name}' got {bytes} bytes back from the active disk.\n"
        ));
    }
    if done.is_counted() {
        text.push_str(&format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
             Double checking the fixed image now...\n",
            done.leaks, done.corruptions
        ));
    }
    text
}

/// The room that a repair would take, step by step.
pub(super) fn plan(output: Output, rooms: &[Option<Plan>]) -> Outcome<String> {
    let all: Vec<&Plan> = rooms.iter().flatten().collect();
    if output == Output::Json {
        let outcome = match all.is_empty() {
            true => "nothing-to-do",
            false => "not-begun",
        };
        let room: Vec<_> = all.iter().map(|plan| report::room(plan)).collect();
        let value = json_value!({ "outcome": outcome, "room": room });
        return Ok(json::pretty(&value)? + "\n");
    }
    if all.is_empty() {
        return Ok("There is nothing to repair.\n".to_owned());
    }
    let lines = all.iter().map(|plan| report::room_line(plan) + "\n");
    Ok(lines.collect())
}

/// What is wrong, on standard error.
pub(super) fn findings(layer: &Layer, report: &CheckReport, console: &mut Console) -> Outcome<()> {
    for finding in &report.findings {
        console.error_line(&finding_line(layer, finding))?;
    }
    let told = u64::try_from(report.findings.len()).unwrap_or(u64::MAX);
    let all = report.corruptions.saturating_add(report.leaks);
    if all > told {
        console.error_line(&format!("and {} more of these", all - told))?;
    }
    if report.marked_corrupt {
        console.error_line("The image is marked corrupt: somebody found it damaged before.")?;
    }
    Ok(())
}

/// Notes in full when asked for. A possible loss is seen in every image whose disk was written since a snapshot
/// was made, so by itself it is only counted.
pub(super) fn notes(report: &CheckReport, all: bool, console: &mut Console) -> Outcome<()> {
    let possible = |note: &&Note| matches!(note, Note::PossibleLoss { .. });
    for note in report.notes.iter().filter(|note| all || !possible(note)) {
        console.error_line(&format!("Note: {note}"))?;
    }
    let hidden = report.notes.iter().filter(possible).count();
    if hidden > 0 && !all {
        console.error_line(&format!(
            "Note: {hidden} internal snapshots have no data where the active disk has some; if the image was \
             flattened with `rebase -b \"\"`, see --notes"
        ))?;
    }
    Ok(())
}

/// A finding, in qemu-img's words where it has words for it.
fn finding_line(layer: &Layer, finding: &Finding) -> String {
    let number = |cluster: &HostOffset| cluster.0 >> layer.cluster_size().bits();
    if let Finding::Leak {
        cluster,
        refcount,
        references,
    } = finding
    {
        let number = number(cluster);
        return format!("Leaked cluster {number} refcount={refcount} reference={references}");
    }
    if let Finding::RefcountTooLow {
        cluster,
        refcount,
        references,
    } = finding
    {
        let number = number(cluster);
        return format!("ERROR cluster {number} refcount={refcount} reference={references}");
    }
    format!("ERROR {finding}")
}

fn total_clusters(layer: &Layer) -> u64 {
    layer.cluster_size().count_for(layer.virtual_size())
}

/// The result for people.
pub(super) fn human(layer: &Layer, report: &CheckReport) -> String {
    let mut text = String::new();
    if report.corruptions == 0 && report.leaks == 0 {
        text.push_str("No errors were found on the image.\n");
    }
    if report.corruptions > 0 {
        let count = report.corruptions;
        text.push_str(&format!(
            "\n{count} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n"
        ));
    }
    if report.leaks > 0 {
        let count = report.leaks;
        text.push_str(&format!(
            "\n{count} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n"
        ));
    }
    text.push_str(&allocation(layer, report));
    text.push_str(&format!("Image end offset: {}\n", report.image_end.0));
    text
}

fn allocation(layer: &Layer, report: &CheckReport) -> String {
    let total = total_clusters(layer);
    let used = report.guest_clusters;
    if total == 0 {
        return String::new();
    }
    let percent = |part: u64, of: u64| 100.0 * part as f64 / of.max(1) as f64;
    format!(
        "{used}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
        percent(used, total),
        percent(report.fragmented_clusters, used),
        percent(report.compressed_clusters, used),
    )
}

/// The result for programs, with what a repair did, and whether what lies below was compared.
pub(super) fn json(
    image: &Reference,
    layer: &Layer,
    report: &CheckReport,
    repaired: Option<&Repaired>,
    backing: bool,
) -> Tree {
    let mut parts = vec![
        ("image-end-offset", report.image_end.0.into()),
        ("total-clusters", total_clusters(layer).into()),
        ("check-errors", 0.into()),
        ("allocated-clusters", report.guest_clusters.into()),
        ("filename", image.given.as_str().into()),
        ("format", "qcow2".into()),
    ];
    for (name, count) in [
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        (
            "corruptions-fixed",
            repaired.map_or(0, |done| done.corruptions),
        ),
        ("leaks-fixed", repaired.map_or(0, |done| done.leaks)),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if count > 0 {
            parts.push((name, count.into()));
        }
    }
    let more_is_known = repaired.is_some() || backing;
    if !report.findings.is_empty() || !report.notes.is_empty() || more_is_known {
        let told = |text: String| Tree::from(text);
        let findings = report
            .findings
            .iter()
            .map(|f| told(f.to_string()))
            .collect();
        let notes = report
            .notes
            .iter()
            .map(|note| told(note.to_string()))
            .collect();
        let mut more = vec![
            ("findings", Tree::List(findings)),
            ("notes", Tree::List(notes)),
            ("marked-dirty", report.marked_dirty.into()),
            ("marked-corrupt", report.marked_corrupt.into()),
        ];
        if backing {
            more.push(("backing-compared", report.backing_compared.into()));
        }
        more.extend(repaired.map(|done| ("repair", done.tree())));
        parts.push(("stead", Tree::Map(more)));
    }
    Tree::Map(parts)
}
