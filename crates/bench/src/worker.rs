//! Our side: a worker, its sandboxes, and what its operations took.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use stead_engine::{
    AcceleratorChoice, CaptureReport, CheckpointRequest, CreateRequest, Engine, Event, ExecCommand,
    ForkPolicy, RestoreReport, SandboxInfo, Settings, Watch,
};

use crate::error::{BenchError, Doing, Result};
use crate::memory::MEMORY_BYTES;

/// How long a command waits for another one.
const WAIT: Duration = Duration::from_secs(60);
/// What the kernel counts a process's start time in, in milliseconds (USER_HZ is 100 on every Linux on x86).
const TICK_MS: u64 = 10;

/// A worker and its store.
#[derive(Debug)]
pub struct Worker {
    /// The engine.
    pub engine: Engine,
    /// The store's folder.
    pub store: PathBuf,
    steps: Steps,
}

/// When which step of an operation began.
type Steps = Arc<Mutex<Vec<(String, Instant)>>>;

/// Forks that have answered a command.
#[derive(Debug)]
pub struct Forks {
    /// What the engine says of each.
    pub reports: Vec<RestoreReport>,
    /// From the start of the first QEMU process until every fork had answered its first command.
    pub answered: Duration,
    /// The whole command: from the call to all forks being ready.
    pub command: Duration,
    /// The command's parts, in order, and the first exec.
    pub parts: Vec<(String, Duration)>,
}

impl Worker {
    /// Opens a worker in `data` with its store in `store`, which is made if it is missing.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub async fn open(data: &Path, store: &Path, template_cache: &Path) -> Result<Self> {
        let steps = Steps::default();
        let seen = Arc::clone(&steps);
        let watch = Watch::new(move |event| {
            if let Event::Step { step, .. } = event {
                let mut steps = seen.lock().unwrap_or_else(PoisonError::into_inner);
                steps.push((step, Instant::now()));
            }
        });
        let settings = Settings {
            data_dir: data.to_owned(),
            store: Some(store.display().to_string()),
            wait: WAIT,
            template_cache: Some(template_cache.to_owned()),
        };
        let engine = Engine::open(settings, watch).await.doing("open a worker")?;
        if !store.exists() {
            engine.init_store().await.doing("make a store")?;
        }
        Ok(Self {
            engine,
            store: store.to_owned(),
            steps,
        })
    }

    /// Creates and boots a sandbox.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn boot(&self, template: &str, name: &str) -> Result<SandboxInfo> {
        let request = CreateRequest {
            template: template.to_owned(),
            name: Some(name.to_owned()),
            memory_bytes: MEMORY_BYTES,
            cpus: 1,
            disk_bytes: None,
            extra_disks: Vec::new(),
            accelerator: AcceleratorChoice::Auto,
            agent: true,
        };
        self.engine.create(&request).await.doing("boot a sandbox")
    }

    /// Runs a shell script in a sandbox; it must succeed.
    ///
    /// # Errors
    /// When it fails.
    pub async fn shell(&self, sandbox: &str, script: &str) -> Result<()> {
        self.exec(sandbox, &["sh", "-c", script]).await
    }

    /// Runs a command in a sandbox; it must succeed.
    ///
    /// # Errors
    /// When it fails.
    pub async fn exec(&self, sandbox: &str, argv: &[&str]) -> Result<()> {
        let command = ExecCommand {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            ..ExecCommand::default()
        };
        let doing = "run a command in a sandbox";
        let output = self
            .engine
            .exec_capture(sandbox, command, b"")
            .await
            .doing(doing)?;
        if output.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(BenchError::new(doing, said))
    }

    /// Takes a checkpoint of a running sandbox.
    ///
    /// # Errors
    /// When that fails.
    pub async fn checkpoint(&self, sandbox: &str) -> Result<CaptureReport> {
        self.engine
            .checkpoint_create(sandbox, &CheckpointRequest::default())
            .await
            .doing("take a checkpoint")
    }

    /// Forks a checkpoint and runs `true` in each fork.
    ///
    /// # Errors
    /// When a fork does not start or answer.
    pub async fn fork(&self, checkpoint: &str, count: u32) -> Result<Forks> {
        self.take_steps();
        let begun = Instant::now();
        let reports = self
            .engine
            .fork(checkpoint, count, None, &ForkPolicy::default())
            .await
            .doing("fork")?;
        let ready = Instant::now();
        let mut parts = parts_of(begun, self.take_steps(), ready);
        let commands = reports
            .iter()
            .map(|report| self.exec(&report.sandbox.id, &["true"]));
        join_all(commands)
            .await
            .into_iter()
            .collect::<Result<Vec<()>>>()?;
        let now = since_boot();
        parts.push(("then the first exec".to_owned(), ready.elapsed()));
        let mut oldest = now;
        for report in &reports {
            oldest = oldest.min(started_at(pid_of(report)?)?);
        }
        Ok(Forks {
            answered: now.saturating_sub(oldest),
            command: ready - begun,
            parts,
            reports,
        })
    }

    /// Removes forks.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub async fn remove(&self, forks: &Forks) -> Result<()> {
        for report in &forks.reports {
            self.engine
                .remove(&report.sandbox.id, true)
                .await
                .doing("remove a fork")?;
        }
        Ok(())
    }

    fn take_steps(&self) -> Vec<(String, Instant)> {
        std::mem::take(&mut self.steps.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The process id of a fork.
///
/// # Errors
/// When it does not run.
pub fn pid_of(report: &RestoreReport) -> Result<i32> {
    report
        .sandbox
        .pid
        .ok_or_else(|| BenchError::new("look at a fork", "it does not run"))
}

fn parts_of(
    begun: Instant,
    steps: Vec<(String, Instant)>,
    ended: Instant,
) -> Vec<(String, Duration)> {
    let mut parts = Vec::new();
    let (mut name, mut since) = ("begin".to_owned(), begun);
    for (next, at) in steps {
        parts.push((name, at - since));
        (name, since) = (next, at);
    }
    parts.push((name, ended - since));
    parts
}

fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(now).unwrap_or_default()
}

/// When a process was started, since the host's boot. The kernel gives 1/100 s and rounds down, so what
/// is measured from here is up to 10 ms too long.
fn started_at(pid: i32) -> Result<Duration> {
    let doing = "ask when a process was started";
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).doing(doing)?;
    // The name, in parentheses, may hold anything; field 22 is the 20th behind it.
    let ticks = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.split(' ').nth(19)?.parse::<u64>().ok())
        .ok_or_else(|| BenchError::new(doing, stat.clone()))?;
    Ok(Duration::from_millis(ticks.saturating_mul(TICK_MS)))
}
