//! `stead backup`: from the command line to the backup and back to what is printed.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use stead_backup::{
    BackupError, BackupReport, BackupRequest, DiskSource, FolderVault, Listed, LiveOrder, Order,
    RestoreFormat, RestoreReport, RestoreRequest, State, Verdict, Wanted, run_live,
};
use stead_engine::{
    Access, BackupDisk, BackupInstant, Engine, EngineError, Event, Kind, Result, StoreBackups,
    StoreVault, Watch, names_a_store,
};

use crate::args::{
    BackupArgs, BackupCommand, BackupLsArgs, BackupRestoreArgs, BackupRmArgs, BackupVerifyArgs,
    DiskFormat, Global,
};
use crate::size::human;
use crate::{commands, print};

/// How many digits of an id are shown to people; any that are unique can be given.
const SHORT_ID: usize = 12;

/// Runs a command of `stead backup` and returns the exit status.
pub async fn run(command: BackupCommand, global: Global, watch: Watch) -> Result<u8> {
    match command {
        BackupCommand::Full(args) => backup(args.common, Wanted::Full, global, watch).await,
        BackupCommand::Incremental(args) => {
            let wanted = match args.no_fallback {
                true => Wanted::IncrementalOnly,
                false => Wanted::Incremental,
            };
            backup(args.common, wanted, global, watch).await
        }
        BackupCommand::Restore(args) => restore(args, global, watch).await,
        BackupCommand::Verify(args) => verify(args, global, watch).await,
        BackupCommand::Ls(args) => list(args, global, watch).await,
        BackupCommand::Rm(args) => remove(args, global, watch).await,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => {
            Err(EngineError::new(Kind::Internal, "backup", "it ended early").because(error))
        }
    }
}

/// Runs `work` with events going to `watch`.
fn watched<T>(
    watch: &Watch,
    work: impl FnOnce(stead_backup::Watch<'_>) -> stead_backup::Result<T>,
) -> Result<T> {
    let step = Mutex::new(String::new());
    let tell = |event| pass_on(watch, &step, event);
    let watching = stead_backup::Watch {
        tell: &tell,
        cancel: Some(watch.wish_to_stop()),
    };
    work(watching).map_err(told)
}

/// Opens the engine, for a place that is a store or a disk that is a sandbox's.
async fn engine(global: &Global, watch: &Watch) -> Result<Engine> {
    Engine::open(commands::settings(global)?, watch.clone()).await
}

/// The backups in the store that `place` names; none where it is a folder.
async fn store(
    place: &Path,
    access: Access,
    global: &Global,
    watch: &Watch,
) -> Result<Option<StoreBackups>> {
    if !names_a_store(place) {
        return Ok(None);
    }
    let engine = engine(global, watch).await?;
    let url = place.to_string_lossy();
    engine.backups(&url, access).await.map(Some)
}

/// An image's backup, or those of a sandbox's disks.
async fn backup(args: BackupArgs, wanted: Wanted, global: Global, watch: Watch) -> Result<u8> {
    if args.qmp.is_some() || args.disk.exists() {
        let report = image(args, wanted, &global, watch).await?;
        return Ok(match global.json {
            true => print::json(&report),
            false => print_report(&report),
        });
    }
    let reports = sandbox(args, wanted, &global, watch).await?;
    if global.json {
        return Ok(print::json(&reports));
    }
    for report in &reports {
        print_report(report);
    }
    Ok(0)
}

/// The backup of an image that nobody uses, or of the disk of a VM that is not ours.
async fn image(
    args: BackupArgs,
    wanted: Wanted,
    global: &Global,
    watch: Watch,
) -> Result<BackupReport> {
    let engine = match names_a_store(&args.to) {
        true => Some(engine(global, &watch).await?),
        false => None,
    };
    let vault = vault(engine.as_ref(), &args, args.qmp.is_some()).await?;
    let Some(qmp) = args.qmp.clone() else {
        let one = vec![(DiskSource::Image(args.disk.clone()), vault)];
        let mut reports = blocking(move || make_all(&args, one, wanted, &watch)).await?;
        return Ok(reports.remove(0));
    };
    let data = engine.map(|engine| engine.data_dir().root().to_owned());
    let order = LiveOrder {
        disk: args.disk.clone(),
        qmp,
        bitmap: args.bitmap.clone(),
        wanted,
        staging: args.staging.clone().or(data).unwrap_or(args.to.clone()),
    };
    let make = move || {
        watched(&watch, |watch| match vault {
            Some(vault) => run_live(&order, || Ok(vault), watch),
            None => {
                let open = || FolderVault::open(&args.to, !args.no_compress);
                run_live(&order, open, watch)
            }
        })
    };
    blocking(make).await
}

/// Where a disk's backup goes, if that is a store.
async fn vault(
    engine: Option<&Engine>,
    args: &BackupArgs,
    crash_consistent: bool,
) -> Result<Option<StoreVault>> {
    let Some(engine) = engine.filter(|_| names_a_store(&args.to)) else {
        return Ok(None);
    };
    let url = args.to.to_string_lossy();
    let vault = engine.backup_vault(&url, crash_consistent).await?;
    Ok(Some(vault))
}

/// Backs up disks one after the other, each into its vault or the folder.
fn make_all(
    args: &BackupArgs,
    disks: Vec<(DiskSource, Option<StoreVault>)>,
    wanted: Wanted,
    watch: &Watch,
) -> Result<Vec<BackupReport>> {
    let made = disks.into_iter().map(|(disk, vault)| {
        watched(watch, |watch| match vault {
            Some(vault) => {
                let bitmap = args.bitmap.clone();
                let order = Order {
                    disk,
                    bitmap,
                    wanted,
                };
                stead_backup::run_into(&order, || Ok(vault), watch)
            }
            None => stead_backup::run(&request(args, disk, wanted), watch),
        })
    });
    made.collect()
}

fn request(args: &BackupArgs, disk: DiskSource, wanted: Wanted) -> BackupRequest {
    BackupRequest {
        disk,
        bitmap: args.bitmap.clone(),
        to: args.to.clone(),
        wanted,
        compress: !args.no_compress,
    }
}

/// Takes one instant of all disks of a sandbox, and backs them up one after the other.
async fn sandbox(
    args: BackupArgs,
    wanted: Wanted,
    global: &Global,
    watch: Watch,
) -> Result<Vec<BackupReport>> {
    let named = args.disk.display().to_string();
    let (name, only) = match named.split_once(':') {
        Some((name, disk)) => (name.to_owned(), Some(disk.to_owned())),
        None => (named, None),
    };
    let engine = engine(global, &watch).await?;
    // A store that cannot be written is found out before the instant is taken.
    vault(Some(&engine), &args, false).await?;
    let ids = Ids::default();
    let begin = |disk: &str| {
        let wanted = only.as_deref().is_none_or(|only| only == disk);
        wanted.then(|| stead_backup::next_bitmap(&args.bitmap, &ids.of(disk)))
    };
    let instant = engine.backup_instant(&name, &begin).await?;
    let mut disks = Vec::new();
    for disk in &instant.disks {
        if only.as_deref().is_none_or(|only| only == disk.disk) {
            let vault = vault(Some(&engine), &args, instant.crash_consistent).await?;
            disks.push((source(&instant, disk, &ids), vault));
        }
    }
    if disks.is_empty() {
        let found = format!(
            "the sandbox {name} has no disk {}",
            only.unwrap_or_default()
        );
        return Err(EngineError::new(Kind::NotFound, "back up", found));
    }
    blocking(move || {
        // The sandbox stays ours until the last disk is done.
        let reports = make_all(&args, disks, wanted, &watch);
        drop(instant);
        reports
    })
    .await
}

fn source(instant: &BackupInstant, disk: &BackupDisk, ids: &Ids) -> DiskSource {
    let name = format!("{}:{}", instant.sandbox, disk.disk);
    let layers = disk.layers.clone();
    match instant.frozen {
        true => DiskSource::Frozen {
            name,
            layers,
            id: ids.of(&disk.disk),
        },
        false => DiskSource::Layers { name, layers },
    }
}

/// The id of each disk's backup.
#[derive(Default)]
struct Ids(Mutex<HashMap<String, String>>);

impl Ids {
    /// The same for a disk each time; without random bytes the empty id, under which nothing can be published.
    fn of(&self, disk: &str) -> String {
        let mut ids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || stead_backup::new_id().unwrap_or_default();
        ids.entry(disk.to_owned()).or_insert_with(new).clone()
    }
}

async fn restore(args: BackupRestoreArgs, global: Global, watch: Watch) -> Result<u8> {
    let store = store(&args.from, Access::ReadOnly, &global, &watch).await?;
    let request = RestoreRequest {
        from: args.from,
        backup: args.backup,
        to: args.to,
        format: match args.format {
            DiskFormat::Qcow2 => RestoreFormat::Qcow2,
            DiskFormat::Raw => RestoreFormat::Raw,
        },
        replace: args.force,
    };
    let work = move || {
        watched(&watch, |watch| match &store {
            Some(store) => store.restore(&request, watch),
            None => stead_backup::restore(&request, watch),
        })
    };
    let report = blocking(work).await?;
    Ok(match global.json {
        true => print::json(&report),
        false => print_restored(&report),
    })
}

async fn verify(args: BackupVerifyArgs, global: Global, watch: Watch) -> Result<u8> {
    let verdicts = match store(&args.folder, Access::ReadOnly, &global, &watch).await? {
        Some(store) => store.verify(args.backup.as_deref()).await?,
        None => {
            let read = move || {
                let backup = args.backup.as_deref();
                watched(&watch, |watch| {
                    stead_backup::verify(&args.folder, backup, watch)
                })
            };
            blocking(read).await?
        }
    };
    if global.json {
        print::json(&verdicts);
    } else {
        print_verdicts(&verdicts);
    }
    let damaged = verdicts.iter().filter(|verdict| !verdict.whole).count();
    if damaged == 0 {
        return Ok(0);
    }
    let found = format!("{damaged} of {} backups are damaged", verdicts.len());
    Err(EngineError::new(Kind::Damaged, "verify backups", found)
        .left("nothing was changed; the others can be restored")
        .next("make a full backup (`stead backup full`)"))
}

async fn list(args: BackupLsArgs, global: Global, watch: Watch) -> Result<u8> {
    let all = match store(&args.folder, Access::ReadOnly, &global, &watch).await? {
        Some(store) => store.list(),
        None => blocking(move || stead_backup::list(&args.folder).map_err(told)).await?,
    };
    Ok(match global.json {
        true => print::json(&all),
        false => print_list(&all),
    })
}

async fn remove(args: BackupRmArgs, global: Global, watch: Watch) -> Result<u8> {
    let id = match store(&args.folder, Access::ReadWrite, &global, &watch).await? {
        Some(store) => store.remove(&args.backup).await?,
        None => {
            let work = move || stead_backup::remove(&args.folder, &args.backup).map_err(told);
            blocking(work).await?
        }
    };
    Ok(match global.json {
        true => print::json(&id),
        false => print::line(&format!("removed {id}")),
    })
}

fn pass_on(watch: &Watch, step: &Mutex<String>, event: stead_backup::Event) {
    let mut now = step.lock().unwrap_or_else(PoisonError::into_inner);
    watch.tell(match event {
        stead_backup::Event::Step(step) => {
            *now = step.to_string();
            Event::Step {
                job: "backup".to_owned(),
                step: step.to_string(),
            }
        }
        stead_backup::Event::Progress { done, total } => Event::Progress {
            what: now.clone(),
            done,
            total,
        },
        stead_backup::Event::Notice(text) => Event::Notice { text },
    });
}

/// The same error in the engine's words, which have the exit status.
fn told(error: BackupError) -> EngineError {
    let left = error.what_is_left().to_owned();
    EngineError::from(error).left(left)
}

fn short(id: &str) -> String {
    id.chars().take(SHORT_ID).collect()
}

fn print_report(report: &BackupReport) -> u8 {
    let record = &report.record;
    if let Some(why) = &record.why_full {
        print::line(&format!("full, because {why}"));
    }
    for bitmap in &report.foreign_bitmaps {
        print::line(&format!(
            "left alone: the bitmap {bitmap}, whose backup is not in this place"
        ));
    }
    print::line(&format!(
        "{} {} ({} looked at, {} stored)",
        record.kind.word(),
        record.id,
        human(record.changed_bytes),
        human(record.stored_bytes)
    ))
}

fn print_restored(report: &RestoreReport) -> u8 {
    print::line(&format!(
        "restored {} of {} to {}",
        short(&report.record.id),
        report.record.time,
        report.disk.display()
    ))
}

fn print_verdicts(verdicts: &[Verdict]) {
    for verdict in verdicts {
        let word = if verdict.whole { "whole" } else { "damaged" };
        print::line(&format!("{}  {word}", verdict.id));
        for what in &verdict.damage {
            print::line(&format!("  {what}"));
        }
    }
}

fn print_list(all: &[Listed]) -> u8 {
    let rows = all.iter().map(|one| {
        let of = |value: &dyn Fn(&stead_backup::Facts) -> String| {
            one.record.as_ref().map_or_else(|| "?".to_owned(), value)
        };
        [
            short(&one.id),
            of(&|record| record.kind.word().to_owned()),
            of(&|record| {
                record
                    .parent
                    .as_deref()
                    .map_or_else(|| "-".to_owned(), short)
            }),
            of(&|record| record.time.chars().take(19).collect()),
            of(&|record| human(record.stored_bytes)),
            of(&|record| record.bitmap.clone()),
            match &one.state {
                State::Complete => "complete".to_owned(),
                State::Broken(why) => format!("broken: {why}"),
            },
            of(&|record| record.disk.clone()),
        ]
    });
    print::table(
        [
            "ID", "KIND", "PARENT", "TIME", "STORED", "BITMAP", "STATE", "DISK",
        ],
        rows,
    )
}
