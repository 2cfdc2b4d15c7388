//! `stead-bench`: every promised figure, ours beside the peer's, in one run.
#![forbid(unsafe_code)]

mod channel;
mod content;
mod error;
mod facts;
mod first;
mod fork;
mod groups;
mod growth;
mod image;
mod libvirt;
mod memory;
mod pause;
mod peer;
mod program;
mod qmp;
mod rate;
mod ready;
mod report;
mod save;
mod scratch;
mod worker;
mod workload;

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::Parser;
use clap::builder::PossibleValuesParser;
use stead_engine::ImportRequest;
use stead_sys::durable::{self, Existing};
use stead_template::{BuildSpec, BuiltTemplate, DiskIdentity, Recipe, Watch};
use tokio::signal::unix::{SignalKind, signal};

use crate::error::{BenchError, Doing, Result};
use crate::first::First;
use crate::groups::{GROUPS, Group, How};
use crate::peer::PeerSpec;
use crate::report::Report;
use crate::scratch::Scratch;
use crate::worker::Worker;

/// The template's name.
const TEMPLATE: &str = "bench";
/// The template disk's size in bytes.
const DISK_BYTES: u64 = 2 << 30;

/// Measures every promised figure beside its peer. Needs root, QEMU, xfsprogs, zstd and tar.
#[derive(Debug, Parser)]
#[command(name = "stead-bench")]
struct Arguments {
    /// Where the report goes, in Markdown; the table is printed in any case.
    #[arg(long)]
    out: Option<PathBuf>,
    /// How often each figure is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=50))]
    runs: u8,
    /// Measure each figure once.
    #[arg(long)]
    quick: bool,
    /// Measure images of 4 GiB, not of 1 GiB; takes minutes more.
    #[arg(long)]
    large: bool,
    /// Measure only these.
    #[arg(long, value_delimiter = ',', value_parser = names())]
    only: Vec<String>,
    /// Where template builds keep what the next one can use [default: template-cache in the target folder].
    #[arg(long, env = "STEAD_TEMPLATE_CACHE")]
    template_cache: Option<PathBuf>,
}

/// The names of all groups.
fn names() -> PossibleValuesParser {
    PossibleValuesParser::new(GROUPS.iter().map(|group| group.name))
}

impl Arguments {
    fn wants(&self, group: &Group) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == group.name)
    }
}

/// A run under way, without guests.
#[derive(Debug)]
struct Run {
    runs: usize,
    /// Images are as long as they can be.
    large: bool,
    report: Report,
    begun: Instant,
    scratch: Scratch,
}

impl Run {
    fn say(&self, what: &str) {
        eprintln!("{:>4} s  {what}", self.begun.elapsed().as_secs());
    }
}

/// A run under way, with a template and a worker.
#[derive(Debug)]
struct Bench {
    spec: PeerSpec,
    worker: Worker,
    /// The guest that most figures begin with, once one of them wants it.
    first: Option<Arc<First>>,
    // Last: the others end before their files go.
    run: Run,
}

impl Bench {
    /// The first guest and what was captured of it; prepared when it is asked for.
    async fn first(&mut self) -> Result<Arc<First>> {
        if let Some(first) = &self.first {
            return Ok(Arc::clone(first));
        }
        let first = Arc::new(first::prepare(self).await?);
        Ok(Arc::clone(self.first.insert(first)))
    }
}

impl Deref for Bench {
    type Target = Run;

    fn deref(&self) -> &Run {
        &self.run
    }
}

impl DerefMut for Bench {
    fn deref_mut(&mut self) -> &mut Run {
        &mut self.run
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = tokio::select! {
        result = run(&arguments) => result,
        interrupted = interrupted() => Err(interrupted),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("a target was missed");
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("{}", error.lines());
            ExitCode::from(2)
        }
    }
}

/// Ends when somebody wants the run to end; dropping the run then cleans up.
async fn interrupted() -> BenchError {
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return BenchError::new("listen for signals", "refused");
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    BenchError::new("measure", "interrupted")
}

/// Measures, prints and writes; whether every target held.
async fn run(arguments: &Arguments) -> Result<bool> {
    if !rustix::process::geteuid().is_root() {
        return Err(BenchError::new(
            "measure",
            "only root can mount and build templates",
        ));
    }
    let report = measure(arguments).await?;
    println!("{}", report.table());
    if let Some(out) = &arguments.out {
        let text = report.markdown();
        durable::publish(out, 0o644, text.as_bytes(), Existing::Replace)
            .doing("write the report")?;
    }
    Ok(report.rows.iter().all(|row| row.held() != Some(false)))
}

async fn measure(arguments: &Arguments) -> Result<Report> {
    let mut run = begin(arguments).await?;
    let wanted = || GROUPS.iter().filter(|group| arguments.wants(group));
    for group in wanted() {
        if let How::Alone(measure) = group.how {
            measure(&mut run).await?;
        }
    }
    let mut guests = wanted().filter_map(|group| match group.how {
        How::Alone(_) => None,
        How::OfGuests(measure) => Some(measure),
    });
    if let Some(first) = guests.next() {
        let mut bench = with_guests(arguments, run).await?;
        first(&mut bench).await?;
        for measure in guests {
            measure(&mut bench).await?;
        }
        run = bench.run;
    }
    let took = format!("{} s", run.begun.elapsed().as_secs());
    run.report.facts.push(("the run took", took));
    Ok(std::mem::take(&mut run.report))
}

/// An empty scratch folder and report.
async fn begin(arguments: &Arguments) -> Result<Run> {
    let begun = Instant::now();
    let target = target_dir()?;
    let runs = if arguments.quick {
        1
    } else {
        usize::from(arguments.runs)
    };
    Ok(Run {
        runs,
        large: arguments.large,
        report: Report {
            facts: facts::of_machine(&target, runs).await?,
            ..Report::default()
        },
        begun,
        scratch: Scratch::create(&target)?,
    })
}

/// Builds the template and opens the worker on the plain file system.
async fn with_guests(arguments: &Arguments, mut run: Run) -> Result<Bench> {
    let cache = match &arguments.template_cache {
        Some(cache) => cache.clone(),
        None => target_dir()?.join("template-cache"),
    };
    let template = build_template(&run.scratch.path("template"), &cache)?;
    let (data, store) = (run.scratch.path("worker"), run.scratch.path("store"));
    let worker = Worker::open(&data, &store, &cache).await?;
    let request = ImportRequest {
        name: TEMPLATE.to_owned(),
        disk: template.disk.clone(),
        kernel: template.vmlinuz.clone(),
        initrd: template.initrd.clone(),
        cmdline: template.cmdline.clone(),
    };
    worker
        .engine
        .template_import(&request)
        .await
        .doing("publish the template")?;
    let like = worker.boot(TEMPLATE, "model").await?;
    worker
        .engine
        .remove("model", true)
        .await
        .doing("remove a sandbox")?;
    run.report.facts.push(facts::of_guest(&like));
    run.say("the template and a worker are there");
    Ok(Bench {
        spec: PeerSpec { template, like },
        worker,
        first: None,
        run,
    })
}

fn build_template(out: &Path, cache: &Path) -> Result<BuiltTemplate> {
    let agent = stead_engine::find_agent().doing("find the guest agent")?;
    let spec = BuildSpec {
        recipe: Recipe::default(),
        size_bytes: DISK_BYTES,
        identity: DiskIdentity::from_seed(TEMPLATE.as_bytes()),
        agent: &agent,
        cache,
        out,
    };
    let cancel = AtomicBool::new(false);
    let watch = Watch::new(&|_| {}, &cancel);
    stead_template::build(&spec, &watch).doing("build the template")
}

/// The folder that holds the builds.
fn target_dir() -> Result<PathBuf> {
    let own = std::env::current_exe().doing("find the own program")?;
    own.ancestors()
        .nth(2)
        .map(Path::to_owned)
        .ok_or_else(|| BenchError::new("find the target folder", own.display().to_string()))
}
