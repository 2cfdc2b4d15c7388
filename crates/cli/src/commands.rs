//! From a command to the engine and back to what is printed.

use std::time::Duration;

use stead_engine::{
    AcceleratorChoice, BuildRequest, CheckpointInfo, CheckpointRequest, CreateRequest, Engine,
    EngineError, ForkPolicy, ImportRequest, Kind, Result, SandboxInfo, Settings, TemplateInfo,
    Watch, Workload,
};

use crate::args::{
    Accelerator, CheckpointCommand, CheckpointCreateArgs, Cli, Command, CompactArgs, CreateArgs,
    ForkArgs, GcArgs, Global, HibernateArgs, RestoreArgs, StopArgs, StoreCommand,
    TemplateBuildArgs, TemplateCommand, TemplateImportArgs,
};
use crate::sessions::{self, Asked};
use crate::size::human;
use crate::{backup, cp, demo, exec, img_manual, logs, manual, merge, print, progress, save};

/// Runs a command and returns the exit status.
pub async fn run(cli: Cli) -> u8 {
    if let Command::Completion { shell } = &cli.command {
        return completion(*shell);
    }
    if let Command::Img { args } = &cli.command {
        return stead_img::run(args, "stead img").0;
    }
    if let Command::Man(args) = &cli.command {
        return manual::run(args);
    }
    let watch = progress::watch(&cli.global);
    if let Some(say) = on_interrupt(&cli.command) {
        cancel_on_interrupt(watch.clone(), say);
    }
    let is_exec = matches!(
        cli.command,
        Command::Exec(_) | Command::Shell(_) | Command::Attach(_)
    );
    match dispatch(cli, watch).await {
        Ok(code) => code,
        Err(error) if is_exec => print::error(&error, exec::status_of(&error)),
        Err(error) => print::error(&error, error.kind().exit_code()),
    }
}

async fn dispatch(cli: Cli, watch: Watch) -> Result<u8> {
    if let Command::Merge(command) = cli.command {
        return merge::run(command, cli.global, watch).await;
    }
    if let Command::Backup(command) = cli.command {
        return backup::run(command, cli.global, watch).await;
    }
    let global = &cli.global;
    if let Command::Save(command) = cli.command {
        let settings = settings(global);
        return save::run(command, settings, watch, global.json).await;
    }
    let settings = settings(global)?;
    if let Command::Demo(args) = &cli.command {
        return demo::run(args, &settings, watch, global.json).await;
    }
    if let Command::Doctor = &cli.command {
        return Ok(doctor(settings, watch, global).await);
    }
    let engine = Engine::open(settings, watch.clone()).await?;
    match cli.command {
        Command::Template(command) => template(&engine, command, global).await,
        Command::Create(args) => create(&engine, args, global).await,
        Command::Exec(args) => exec::run(&engine, args, &watch, global.json).await,
        Command::Shell(args) => exec::shell(&engine, args, &watch).await,
        Command::Attach(args) => exec::attach(&engine, args, &watch).await,
        Command::Sessions(command) => sessions::run(&engine, command, global.json).await,
        Command::Wait(args) => sessions::wait(&engine, &args, global.json).await,
        Command::Cp(args) => cp::copy(&engine, &args, &watch, global.json),
        Command::File(command) => cp::file(&engine, &command, global.json),
        Command::Ls(args) => list(&engine, args.health, global).await,
        Command::Show(args) => {
            let info = engine.sandbox(&args.name).await?;
            let asked = Asked::of(&engine, info, args.health).await?;
            Ok(show_sandbox(&asked, global))
        }
        Command::Logs(args) => logs::run(&engine, &args, &watch, global.json).await,
        Command::Stop(args) => stop(&engine, &args, global).await,
        Command::Start(one) => Ok(named(&engine.start(&one.name).await?, global)),
        Command::Rm(args) => {
            let mut removed = Removed::new(global);
            for name in &args.names {
                removed.take(name, engine.remove(name, args.force).await)?;
            }
            Ok(removed.print())
        }
        Command::Checkpoint(command) => checkpoint(&engine, command, global).await,
        Command::Fork(args) => fork(&engine, &args, global).await,
        Command::Restore(args) => restore(&engine, &args, global).await,
        Command::Hibernate(args) => hibernate(&engine, &args, global).await,
        Command::Wake(one) => {
            let report = engine.wake(&one.name).await?;
            Ok(if global.json {
                print::json(&report)
            } else {
                print::line(&report.sandbox.name)
            })
        }
        Command::Compact(args) => compact(&engine, &args, global).await,
        Command::Store(command) => store(&engine, command, global).await,
        Command::Verify => verify_store(&engine, global).await,
        Command::Gc(args) => gc(&engine, &args, global).await,
        Command::Demo(_)
        | Command::Doctor
        | Command::Completion { .. }
        | Command::Man(_)
        | Command::Merge(_)
        | Command::Save(_)
        | Command::Backup(_)
        | Command::Img { .. } => {
            unreachable!("handled before a worker is opened")
        }
    }
}

pub fn settings(global: &Global) -> Result<Settings> {
    Ok(Settings {
        data_dir: match &global.data_dir {
            Some(dir) => dir.clone(),
            None => Settings::default_data_dir()?,
        },
        store: global.store.clone(),
        wait: Duration::from_secs(global.wait),
        template_cache: global.template_cache.clone(),
    })
}

/// What is said when Ctrl-C asks a command to stop; nothing for one that catches signals itself.
fn on_interrupt(command: &Command) -> Option<&'static str> {
    match command {
        Command::Exec(_)
        | Command::Shell(_)
        | Command::Attach(_)
        | Command::File(_)
        | Command::Img { .. } => None,
        Command::Cp(_) => {
            Some("interrupted; the same command goes on from here (once more to end at once)")
        }
        Command::Save(command) if save::starts_editor(command) => None,
        Command::Ls(_)
        | Command::Show(_)
        | Command::Sessions(_)
        | Command::Wait(_)
        | Command::Logs(_)
        | Command::Stop(_)
        | Command::Verify
        | Command::Doctor
        | Command::Completion { .. }
        | Command::Man(_) => Some("interrupted (once more to end at once)"),
        Command::Gc(_) | Command::Store(_) | Command::Merge(_) => {
            Some("interrupted; ending where nothing is lost (once more to end at once)")
        }
        Command::Template(_)
        | Command::Create(_)
        | Command::Start(_)
        | Command::Rm(_)
        | Command::Checkpoint(_)
        | Command::Fork(_)
        | Command::Restore(_)
        | Command::Hibernate(_)
        | Command::Wake(_)
        | Command::Save(_)
        | Command::Compact(_)
        | Command::Backup(_)
        | Command::Demo(_) => {
            Some("interrupted; undoing what was begun (once more to leave it to the next command)")
        }
    }
}

/// The first Ctrl-C asks the operation to undo itself; the second one ends the program.
pub fn cancel_on_interrupt(watch: Watch, say: &'static str) {
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_err() {
            return;
        }
        watch.notice(say);
        watch.cancel();
        if tokio::signal::ctrl_c().await.is_ok() {
            std::process::exit(Kind::Cancelled.exit_code().into());
        }
    });
}

fn completion(shell: clap_complete::Shell) -> u8 {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut img_manual::whole(), "stead", &mut script);
    print::bytes(&script)
}

/// What a command with several names has removed: told one by one to people, at once to programs.
struct Removed {
    json: bool,
    names: Vec<String>,
}

impl Removed {
    fn new(global: &Global) -> Self {
        Self {
            json: global.json,
            names: Vec::new(),
        }
    }

    /// Takes note of one that is gone; the first failure ends the command and says which were gone before.
    fn take(&mut self, name: &str, outcome: Result<()>) -> Result<()> {
        match outcome {
            Ok(()) => {}
            Err(error) if self.names.is_empty() => return Err(error),
            Err(error) => {
                let gone = self.names.join(", ");
                return Err(error.left(format!("removed before it: {gone}")));
            }
        }
        self.names.push(name.to_owned());
        if !self.json {
            print::line(name);
        }
        Ok(())
    }

    fn print(self) -> u8 {
        if !self.json {
            return 0;
        }
        let removed = self.names.into_iter();
        let all: Vec<_> = removed
            .map(|name| serde_json::json!({ "removed": name }))
            .collect();
        print::json(&all)
    }
}

// ---- templates

async fn template(engine: &Engine, command: TemplateCommand, global: &Global) -> Result<u8> {
    match command {
        TemplateCommand::Build(args) => {
            let info = engine.template_build(&build_request(args)?).await?;
            Ok(template_done(&info, global))
        }
        TemplateCommand::Import(args) => {
            let info = engine.template_import(&import_request(args)).await?;
            Ok(template_done(&info, global))
        }
        TemplateCommand::Ls => {
            let all = engine.templates().await?;
            if global.json {
                return Ok(print::json(&all));
            }
            Ok(print::table(
                ["NAME", "ID", "SIZE", "USED", "CREATED"],
                all.into_iter().map(|t| {
                    [
                        t.name,
                        print::short(&t.id),
                        human(t.disk_bytes),
                        human(t.used_bytes),
                        t.created,
                    ]
                }),
            ))
        }
        TemplateCommand::Show { name } => {
            let info = engine.template(&name).await?;
            if global.json {
                return Ok(print::json(&info));
            }
            Ok(print::fields(&[
                ("name", info.name),
                ("id", info.id),
                ("disk", human(info.disk_bytes)),
                ("used", human(info.used_bytes)),
                ("kernel", info.kernel),
                ("initrd", info.initrd),
                ("cmdline", info.cmdline),
                ("origin", info.origin),
                ("packages", info.packages.join(" ")),
                ("created", info.created),
            ]))
        }
        TemplateCommand::Rm { name } => {
            engine.template_remove(&name).await?;
            Ok(if global.json {
                print::json(&serde_json::json!({ "removed": name }))
            } else {
                print::line(&name)
            })
        }
    }
}

fn template_done(info: &TemplateInfo, global: &Global) -> u8 {
    if global.json {
        print::json(info)
    } else {
        print::line(&format!("{}  {}", info.name, print::short(&info.id)))
    }
}

fn build_request(args: TemplateBuildArgs) -> Result<BuildRequest> {
    Ok(BuildRequest {
        name: args.name,
        suite: args.suite,
        packages: args.packages,
        minimal: args.minimal,
        busybox: args.busybox,
        disk_bytes: args.disk_size,
        agent: match args.agent {
            Some(path) => path,
            None => stead_engine::find_agent()?,
        },
        identity: None,
    })
}

fn import_request(args: TemplateImportArgs) -> ImportRequest {
    ImportRequest {
        name: args.name,
        disk: args.disk,
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.cmdline,
    }
}

// ---- sandboxes

pub fn accelerator(choice: Accelerator) -> AcceleratorChoice {
    match choice {
        Accelerator::Auto => AcceleratorChoice::Auto,
        Accelerator::Kvm => AcceleratorChoice::Kvm,
        Accelerator::Tcg => AcceleratorChoice::Tcg,
    }
}

async fn create(engine: &Engine, args: CreateArgs, global: &Global) -> Result<u8> {
    let info = engine
        .create(&CreateRequest {
            template: args.template,
            name: args.name,
            memory_bytes: args.memory,
            cpus: args.cpus,
            disk_bytes: args.disk_size,
            extra_disks: args.disks,
            accelerator: accelerator(args.accelerator),
            agent: !args.no_agent,
        })
        .await?;
    Ok(named(&info, global))
}

fn named(info: &SandboxInfo, global: &Global) -> u8 {
    if global.json {
        print::json(info)
    } else {
        print::line(&info.name)
    }
}

async fn list(engine: &Engine, health: bool, global: &Global) -> Result<u8> {
    let sandboxes = engine.sandboxes().await?.into_iter();
    let all =
        futures::future::try_join_all(sandboxes.map(|sandbox| Asked::of(engine, sandbox, health)))
            .await?;
    if global.json {
        return Ok(print::json(&all));
    }
    Ok(print::table(
        [
            "NAME",
            "ID",
            "STATE",
            "MEMORY",
            "CPUS",
            "ACCEL",
            "CHECKPOINT",
            "CREATED",
        ],
        all.into_iter().map(|asked| {
            let state = asked.state();
            let s = asked.sandbox;
            [
                s.name,
                s.id,
                state,
                human(s.memory_bytes),
                s.cpus.to_string(),
                s.accelerator,
                s.checkpoint
                    .as_deref()
                    .map(print::short)
                    .unwrap_or_default(),
                s.created,
            ]
        }),
    ))
}

fn show_sandbox(asked: &Asked, global: &Global) -> u8 {
    if global.json {
        return print::json(asked);
    }
    let info = &asked.sandbox;
    let reason = asked
        .health
        .as_ref()
        .and_then(|health| health.reason.clone());
    let mut rows = vec![
        ("name", info.name.clone()),
        ("id", info.id.clone()),
        ("state", asked.state()),
        ("template", print::short(&info.template)),
        ("memory", human(info.memory_bytes)),
        ("cpus", info.cpus.to_string()),
        (
            "machine",
            format!(
                "{} {} {}",
                info.machine_type, info.cpu_model, info.accelerator
            ),
        ),
        ("created", info.created.clone()),
    ];
    let optional = [
        ("why", reason),
        ("pid", info.pid.map(|pid| pid.to_string())),
        ("epoch", info.epoch.clone()),
        ("checkpoint", info.checkpoint.clone()),
        ("hibernated as", info.hibernated_as.clone()),
    ];
    rows.extend(
        optional
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    for disk in &info.disks {
        rows.push((
            "disk",
            format!(
                "{} {} in {} layers, {}",
                disk.name,
                human(disk.size_bytes),
                disk.layers,
                disk.file.display()
            ),
        ));
    }
    print::fields(&rows)
}

async fn stop(engine: &Engine, args: &StopArgs, global: &Global) -> Result<u8> {
    let info = engine
        .stop(&args.name, Duration::from_secs(args.timeout), args.force)
        .await?;
    Ok(named(&info, global))
}

// ---- state

async fn checkpoint(engine: &Engine, command: CheckpointCommand, global: &Global) -> Result<u8> {
    match command {
        CheckpointCommand::Create(args) => checkpoint_create(engine, args, global).await,
        CheckpointCommand::Ls => checkpoint_list(engine, global).await,
        CheckpointCommand::Show(one) => {
            let info = engine.checkpoint(&one.name).await?;
            Ok(show_checkpoint(&info, global))
        }
        CheckpointCommand::Verify(one) => {
            let report = engine.checkpoint_verify(&one.name).await?;
            Ok(if global.json {
                print::json(&report)
            } else {
                print::line(&format!(
                    "{} is whole: {} compared with its manifest",
                    one.name,
                    human(report.bytes)
                ))
            })
        }
        CheckpointCommand::Rm { names, force } => {
            let mut removed = Removed::new(global);
            for name in &names {
                removed.take(name, engine.checkpoint_remove(name, force).await)?;
            }
            Ok(removed.print())
        }
    }
}

async fn compact(engine: &Engine, args: &CompactArgs, global: &Global) -> Result<u8> {
    let report = engine.compact(&args.name, args.dry_run).await?;
    if global.json {
        return Ok(print::json(&report));
    }
    let rows = report.disks.iter().map(|disk| {
        let [before, now] = disk.merged.iter().fold([0, 0], |[before, now], one| {
            [before + one.bytes_before, now + one.bytes]
        });
        [
            disk.name.clone(),
            disk.layers_before.to_string(),
            disk.layers.to_string(),
            human(before),
            if args.dry_run {
                String::new()
            } else {
                human(now)
            },
        ]
    });
    Ok(print::table(
        ["DISK", "LAYERS", "MERGED TO", "TOOK", "TAKES"],
        rows,
    ))
}

fn workload(crash_consistent: bool) -> Workload {
    match crash_consistent {
        true => Workload::RunsOn,
        false => Workload::StandsStill,
    }
}

async fn checkpoint_create(
    engine: &Engine,
    args: CheckpointCreateArgs,
    global: &Global,
) -> Result<u8> {
    let request = CheckpointRequest {
        name: args.name,
        disk_only: args.disk_only,
        workload: workload(args.crash_consistent),
        compact_above: Some(args.compact_above),
    };
    let made = engine.checkpoint_create(&args.sandbox, &request).await?;
    if global.json {
        return Ok(print::json(&made));
    }
    Ok(print::line(&format!(
        "{}  {}  {} stored, guest stopped {:.1} ms",
        print::short(&made.checkpoint.id),
        made.checkpoint.kind,
        human(made.stored_bytes),
        made.pause.paused_us as f64 / 1000.0,
    )))
}

async fn checkpoint_list(engine: &Engine, global: &Global) -> Result<u8> {
    let all = engine.checkpoints().await?;
    if global.json {
        return Ok(print::json(&all));
    }
    Ok(print::table(
        ["NAME", "ID", "KIND", "SANDBOX", "STATE", "HERE", "CREATED"],
        all.into_iter().map(|c| {
            [
                c.name.unwrap_or_default(),
                print::short(&c.id),
                c.kind,
                c.sandbox,
                c.damage
                    .map_or("ready".to_owned(), |why| format!("damaged: {why}")),
                if c.local { "yes" } else { "no" }.to_owned(),
                c.created,
            ]
        }),
    ))
}

fn show_checkpoint(info: &CheckpointInfo, global: &Global) -> u8 {
    if global.json {
        return print::json(info);
    }
    let mut rows = vec![
        ("id", info.id.clone()),
        ("name", info.name.clone().unwrap_or_default()),
        ("kind", info.kind.clone()),
        ("created", info.created.clone()),
        ("sandbox", info.sandbox.clone()),
        ("template", print::short(&info.template)),
        ("parent", info.parent.clone().unwrap_or_default()),
        ("producer", info.producer.clone()),
    ];
    for disk in &info.disks {
        rows.push((
            "disk",
            format!(
                "{} {} content {}",
                disk.name,
                human(disk.size_bytes),
                disk.content
            ),
        ));
    }
    if let Some(ram) = &info.ram {
        rows.push((
            "ram",
            format!("{} content {}", human(ram.size_bytes), ram.content),
        ));
    }
    if let Some(bytes) = info.unique_bytes {
        rows.push(("unique", human(bytes)));
    }
    if let Some(why) = &info.damage {
        rows.push(("damaged", why.clone()));
    }
    print::fields(&rows)
}

async fn fork(engine: &Engine, args: &ForkArgs, global: &Global) -> Result<u8> {
    let policy = match args.keep_identity {
        true => ForkPolicy::Keep,
        false => ForkPolicy::Change {
            hostname: args.hostname.clone(),
            clear: args.clear.clone(),
        },
    };
    let reports = engine
        .fork(&args.checkpoint, args.count, args.name.as_deref(), &policy)
        .await?;
    if global.json {
        return Ok(print::json(&reports));
    }
    let names: Vec<&str> = reports.iter().map(|r| r.sandbox.name.as_str()).collect();
    Ok(print::line(&names.join("\n")))
}

async fn restore(engine: &Engine, args: &RestoreArgs, global: &Global) -> Result<u8> {
    let report = engine.restore(&args.name, &args.checkpoint).await?;
    Ok(if global.json {
        print::json(&report)
    } else {
        print::line(&report.sandbox.name)
    })
}

async fn hibernate(engine: &Engine, args: &HibernateArgs, global: &Global) -> Result<u8> {
    let name = &args.name;
    let made = engine
        .hibernate(name, workload(args.crash_consistent))
        .await?;
    Ok(if global.json {
        print::json(&made)
    } else {
        print::line(&format!(
            "{name}  {} stored as {}",
            human(made.stored_bytes),
            print::short(&made.checkpoint.id)
        ))
    })
}

// ---- store and host

async fn store(engine: &Engine, command: StoreCommand, global: &Global) -> Result<u8> {
    match command {
        StoreCommand::Init => {
            let url = engine.init_store().await?;
            Ok(if global.json {
                print::json(&serde_json::json!({ "store": url }))
            } else {
                print::line(&url)
            })
        }
        StoreCommand::RebuildIndex => rebuild_index(engine, global).await,
    }
}

async fn rebuild_index(engine: &Engine, global: &Global) -> Result<u8> {
    let report = engine.rebuild_index().await?;
    if global.json {
        print::json(&report);
    } else {
        print::line(&format!(
            "{} packs with {} chunks are in the index",
            report.packs, report.chunks
        ));
    }
    Ok(damaged(
        "rebuild the store's index",
        &report.damaged,
        global,
    ))
}

async fn verify_store(engine: &Engine, global: &Global) -> Result<u8> {
    let report = engine.scrub().await?;
    if global.json {
        print::json(&report);
    } else {
        print::line(&format!(
            "{} objects, {} read; {} damaged",
            report.objects,
            human(report.bytes),
            report.damaged.len()
        ));
    }
    Ok(damaged("verify the store", &report.damaged, global))
}

/// The end of a command that reports damage: each object as a line for people, and the error.
fn damaged(attempt: &str, damaged: &[String], global: &Global) -> u8 {
    let Some(first) = damaged.first() else {
        return 0;
    };
    if !global.json {
        for line in damaged {
            print::line(&format!("damaged: {line}"));
        }
    }
    let found = format!(
        "{} objects are damaged, the first is {first}",
        damaged.len()
    );
    let error = EngineError::new(Kind::Damaged, attempt, found)
        .left("checkpoints that are not named by the report are whole; nothing was changed")
        .next("bring the objects back from a copy of the store, or remove the checkpoints that they hit; `stead store rebuild-index` repairs a damaged index");
    print::error(&error, error.kind().exit_code())
}

async fn gc(engine: &Engine, args: &GcArgs, global: &Global) -> Result<u8> {
    let report = engine.gc(args.dry_run, &args.break_lease).await?;
    if global.json {
        return Ok(print::json(&report));
    }
    let verb = if args.dry_run { "would free" } else { "freed" };
    print::line(&format!(
        "{verb} {} in {} objects",
        human(report.freed_bytes),
        report.removed_objects
    ));
    for lease in &report.waiting_for {
        print::line(&format!("waits for: {lease}"));
    }
    Ok(0)
}

async fn doctor(settings: Settings, watch: Watch, global: &Global) -> u8 {
    let report = stead_engine::doctor(settings, watch).await;
    if global.json {
        print::json(&report);
    } else {
        for finding in &report.findings {
            print::line(&format!(
                "{:5} {:12} {}",
                finding.advice.word(),
                finding.what,
                finding.found
            ));
            if let Some(next) = &finding.next {
                print::line(&format!("{:18} next: {next}", ""));
            }
        }
    }
    if report.usable() { 0 } else { 1 }
}
