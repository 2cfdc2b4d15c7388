//! `stead merge`: from the command line to the merge and back to what is printed.

use std::path::Path;

use stead_engine::{EngineError, Kind, MergeEvents, Result, Settings, Watch};
use stead_merge::{
    MergeError, MergePlan, MergeReport, MergeRequest, Outcome, Recovered, StalePolicy,
};

use crate::args::{Global, MergeArgs, MergeCommand, MergeRecoverArgs, Stale};
use crate::print;
use crate::size::human;

/// Runs a command of `stead merge` and returns the exit status.
pub async fn run(command: MergeCommand, global: Global, watch: Watch) -> Result<u8> {
    let work = tokio::task::spawn_blocking(move || match command {
        MergeCommand::Plan(args) => plan(args, &global),
        MergeCommand::Run(args) => merge(args, &global, &watch),
        MergeCommand::Recover(args) => recover(&args, &global, &watch),
    });
    match work.await {
        Ok(outcome) => outcome,
        Err(error) => {
            Err(EngineError::new(Kind::Internal, "merge", "it ended early").because(error))
        }
    }
}

fn request(args: MergeArgs, global: &Global) -> Result<MergeRequest> {
    Ok(MergeRequest {
        chain: args.chain,
        top: args.top,
        base: args.base,
        stale: match args.stale {
            Stale::Prune => StalePolicy::Prune,
            Stale::Keep => StalePolicy::Keep,
            Stale::Refuse => StalePolicy::Refuse,
        },
        keep_layers: args.keep_layers,
        cut_base: args.cut_base,
        drop_bitmaps: args.drop_bitmaps,
        look_in: args.look_in,
        siblings: args.siblings,
        extend_cmd: args.extend_cmd,
        records: records(global)?,
        qmp: args.qmp,
        bytes_per_second: args.speed.unwrap_or(0),
    })
}

/// Where records of merges into block devices are kept.
fn records(global: &Global) -> Result<std::path::PathBuf> {
    let data = match &global.data_dir {
        Some(dir) => dir.clone(),
        None => Settings::default_data_dir()?,
    };
    Ok(data.join("merges"))
}

fn plan(args: MergeArgs, global: &Global) -> Result<u8> {
    let plan = stead_merge::plan(&request(args, global)?).map_err(told)?;
    if global.json {
        print::json(&plan);
    } else {
        print_plan(&plan);
    }
    plan.require_allowed().map_err(told)?;
    Ok(0)
}

fn merge(args: MergeArgs, global: &Global, watch: &Watch) -> Result<u8> {
    let request = request(args, global)?;
    let events = MergeEvents::new(watch, "merge");
    let tell = |event| events.tell(event);
    let watching = stead_merge::Watch {
        tell: &tell,
        cancel: Some(watch.wish_to_stop()),
    };
    if request.qmp.is_some() {
        let report = stead_merge::run_live(&request, watching).map_err(told)?;
        return Ok(if global.json {
            print::json(&report)
        } else {
            print_live(&report)
        });
    }
    let report = stead_merge::run(&request, watching).map_err(told)?;
    Ok(if global.json {
        print::json(&report)
    } else {
        print_report(&report)
    })
}

fn recover(args: &MergeRecoverArgs, global: &Global, watch: &Watch) -> Result<u8> {
    let events = MergeEvents::new(watch, "merge");
    let tell = |event| events.tell(event);
    let watching = stead_merge::Watch {
        tell: &tell,
        cancel: None,
    };
    let done = stead_merge::recover(&args.image, &records(global)?, watching).map_err(told)?;
    if global.json {
        return Ok(print::json(&done));
    }
    for one in &done {
        print::line(&recovered(one));
    }
    Ok(0)
}

/// The same error in the engine's words, which have the exit status.
fn told(error: MergeError) -> EngineError {
    let left = error.what_is_left().to_owned();
    EngineError::from(error).left(left)
}

fn print_plan(plan: &MergePlan) {
    print_layers(plan);
    print_bitmaps(plan);
    for space in &plan.space {
        print::line(&format!(
            "room: {}: peak {} bytes, afterwards {}; needs {}, has {}{}",
            space.file.display(),
            space.peak_bytes,
            space.end_bytes,
            space.needed_bytes,
            space.available_bytes,
            match space.short_bytes() {
                0 => String::new(),
                short => format!(": {short} too few"),
            }
        ));
    }
    let folders = plan
        .searched
        .folders
        .iter()
        .map(|one| one.display().to_string());
    let folders: Vec<String> = folders.collect();
    print::line(&format!(
        "other children: {} other images looked at, in {}; images elsewhere are not seen (--look-in, --sibling)",
        plan.searched.images,
        folders.join(", ")
    ));
    for (path, why) in &plan.searched.unreadable {
        print::line(&format!("not looked at: {}: {why}", path.display()));
    }
    for refusal in &plan.refused {
        print::line(&format!("refused: {}", refusal.reason));
    }
}

fn print_layers(plan: &MergePlan) {
    print::table(
        ["LAYER", "ROLE", "FORMAT", "DISK", "FILE", "PATH"],
        plan.layers.iter().map(|layer| {
            [
                layer.index.to_string(),
                format!("{:?}", layer.role).to_lowercase(),
                layer.format.to_owned(),
                human(layer.virtual_bytes),
                human(layer.file_bytes),
                layer.file.display().to_string(),
            ]
        }),
    );
    print::line("");
}

fn print_bitmaps(plan: &MergePlan) {
    let rows = plan.layers.iter().flat_map(|layer| {
        layer.bitmaps.iter().map(|bitmap| {
            [
                bitmap.name.clone(),
                layer.index.to_string(),
                bitmap.state.word().to_owned(),
                human(bitmap.granularity_bytes),
                bitmap.dirty_bytes.map_or_else(|| "?".to_owned(), human),
            ]
        })
    });
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return;
    }
    print::table(["BITMAP", "LAYER", "STATE", "GRANULARITY", "DIRTY"], rows);
    print::line("");
    let verdicts = plan.bitmaps.iter();
    let verdicts: Vec<_> = verdicts
        .map(|one| {
            [
                one.name.clone(),
                one.becomes.word().to_owned(),
                one.why.clone(),
            ]
        })
        .collect();
    if !verdicts.is_empty() {
        print::table(["BITMAP", "BECOMES", "WHY"], verdicts);
        print::line("");
    }
}

fn print_verdicts(plan: &MergePlan) {
    for verdict in &plan.bitmaps {
        print::line(&format!(
            "bitmap {}: {}: {}",
            verdict.name,
            verdict.becomes.word(),
            verdict.why
        ));
    }
}

fn names(paths: &[std::path::PathBuf]) -> String {
    let names = paths.iter().map(|path| path.display().to_string());
    names.collect::<Vec<String>>().join(" ")
}

fn print_live(report: &stead_merge::LiveReport) -> u8 {
    if let Some(plan) = &report.plan {
        print_verdicts(plan);
    }
    if !report.kept.is_empty() {
        print::line(&format!("kept: {}", names(&report.kept)));
    }
    if !report.held.is_empty() {
        print::line(&format!(
            "in QEMU's memory until it ends in order: bitmaps {}",
            report.held.join(", ")
        ));
    }
    print::line(&format!("merged, and removed: {}", names(&report.removed)))
}

fn print_report(report: &MergeReport) -> u8 {
    print_verdicts(&report.plan);
    if !report.kept.is_empty() {
        print::line(&format!("kept: {}", names(&report.kept)));
    }
    print::line(&format!(
        "merged {}; the disk is {}",
        human(report.plan.data_bytes),
        Path::new(&report.active).display()
    ))
}

fn recovered(one: &Recovered) -> String {
    let base = one.base.display();
    let lost = match one.lost_bitmaps.is_empty() {
        true => String::new(),
        false => format!(
            "; bitmaps that were not saved and say nothing any more: {}",
            one.lost_bitmaps.join(", ")
        ),
    };
    match one.outcome {
        Outcome::NothingToDo => format!("{base}: no merge is going on"),
        Outcome::Finished => format!("{base}: the merge is finished{lost}"),
        Outcome::Undone => {
            let why = one.why.as_deref().unwrap_or_default();
            format!("{base}: the merge is undone and can be run again ({why}){lost}")
        }
    }
}
