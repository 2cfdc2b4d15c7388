//! `stead demo`: the whole path on a real VM, with every claim checked and listed.
//!
//! Everything lies in a folder of its own (`demo` in the data directory): two workers, each with
//! its own, byte-different build of the base image, and one store between them. Nothing of the
//! user's is touched. The two templates stay, so that a second run need not build them.

mod proof;
mod stage;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stead_engine::{
    AcceleratorChoice, BuildRequest, CheckpointRequest, CreateRequest, Engine, EngineError, Event,
    ForkPolicy, Kind, Result, Settings, TemplateInfo, Watch, Workload,
};

use crate::args::DemoArgs;
use crate::size::human;
use proof::Proofs;
use stage::Expected;

const SOURCE: &str = "demo-source";
const CHECKPOINT: &str = "demo-checkpoint";
/// The store of the two workers, in the demo's folder.
const STORE: &str = "store";
/// A copy of it with one byte flipped, and the worker that is to fetch from it.
const DAMAGED_STORE: &str = "store-damaged";
const DAMAGED_WORKER: &str = "worker-c";

struct Demo<'a> {
    args: &'a DemoArgs,
    root: PathBuf,
    template_cache: PathBuf,
    watch: Watch,
    proofs: Proofs,
}

/// Runs the demo; the exit status is 0 only if everything held.
pub async fn run(args: &DemoArgs, settings: &Settings, watch: Watch, json: bool) -> Result<u8> {
    let mut demo = Demo {
        args,
        root: settings.data_dir.join("demo"),
        template_cache: settings
            .template_cache
            .clone()
            .unwrap_or_else(|| settings.data_dir.join("cache/template")),
        watch,
        proofs: Proofs::new(json),
    };
    let begun = Instant::now();
    let result = demo.play().await;
    let cleaned = demo.clean_up().await;
    // Why the demo failed says more than why it could not be tidied up.
    result.and(cleaned)?;
    Ok(demo.proofs.print(begun.elapsed()))
}

impl Demo<'_> {
    async fn play(&mut self) -> Result<()> {
        let (a, b) = self.workers().await?;
        self.remove_earlier(&a, &b).await?;
        let (template_a, template_b) = self.templates(&a, &b).await?;
        self.proofs.held(
            "the second worker has its own, byte-different base image",
            template_a.id != template_b.id && template_a.disk_content != template_b.disk_content,
            format!(
                "{} and {}",
                short(&template_a.disk_content),
                short(&template_b.disk_content)
            ),
        );
        let mut expected = self.source(&a, &template_a).await?;
        let before = stage::packs(&self.root.join(STORE))?;
        self.checkpoint(&a).await?;
        let own = stage::packs(&self.root.join(STORE))?;
        let own: Vec<PathBuf> = own.difference(&before).cloned().collect();
        let (first, second) = self.halves();
        let after = self.change(&a, &expected).await?;
        self.forks(&a, "same worker", first, &mut expected).await?;
        self.forks(&b, "second worker", second, &mut expected)
            .await?;
        self.source_goes_on(&a, &after).await?;
        self.hibernate_and_wake(&a, &after).await?;
        self.damage(&own).await
    }

    fn halves(&self) -> (u32, u32) {
        let second = self.args.forks / 2;
        (self.args.forks - second, second)
    }

    async fn worker(&self, name: &str, store: &str) -> Result<Engine> {
        self.worker_watched(name, store, self.watch.clone()).await
    }

    async fn worker_watched(&self, name: &str, store: &str, watch: Watch) -> Result<Engine> {
        Engine::open(
            Settings {
                data_dir: self.root.join(name),
                store: Some(self.root.join(store).display().to_string()),
                wait: Duration::from_secs(30),
                template_cache: Some(self.template_cache.clone()),
            },
            watch,
        )
        .await
    }

    async fn workers(&self) -> Result<(Engine, Engine)> {
        let a = self.worker("worker-a", STORE).await?;
        match a.init_store().await {
            Ok(_) => {}
            Err(error) if error.kind() == Kind::Conflict => {}
            Err(error) => return Err(error),
        }
        let b = self.worker("worker-b", STORE).await?;
        Ok((a, b))
    }

    /// What a demo that was stopped half-way left.
    async fn remove_earlier(&self, a: &Engine, b: &Engine) -> Result<()> {
        for worker in [a, b] {
            for sandbox in worker.sandboxes().await? {
                worker.remove(&sandbox.id, true).await?;
            }
        }
        for checkpoint in a.checkpoints().await? {
            a.checkpoint_remove(&checkpoint.id, true).await?;
        }
        Ok(())
    }

    async fn templates(&mut self, a: &Engine, b: &Engine) -> Result<(TemplateInfo, TemplateInfo)> {
        let begun = Instant::now();
        let first = self.template(a, 1).await?;
        let second = self.template(b, 2).await?;
        self.proofs
            .step("templates on both workers", begun.elapsed(), {
                format!(
                    "{} each, {} used",
                    human(first.disk_bytes),
                    human(first.used_bytes)
                )
            });
        Ok((first, second))
    }

    async fn template(&self, worker: &Engine, identity: u8) -> Result<TemplateInfo> {
        match worker.template(&self.args.template).await {
            Ok(info) => Ok(info),
            Err(error) if error.kind() == Kind::NotFound => {
                worker
                    .template_build(&BuildRequest {
                        busybox: false,
                        name: self.args.template.clone(),
                        suite: None,
                        packages: Vec::new(),
                        minimal: false,
                        disk_bytes: 2 << 30,
                        agent: stead_engine::find_agent()?,
                        identity: Some([identity; 16]),
                    })
                    .await
            }
            Err(error) => Err(error),
        }
    }

    async fn source(&mut self, a: &Engine, template: &TemplateInfo) -> Result<Expected> {
        let begun = Instant::now();
        a.create(&CreateRequest {
            template: template.id.clone(),
            name: Some(SOURCE.to_owned()),
            memory_bytes: 512 << 20,
            cpus: 1,
            disk_bytes: None,
            extra_disks: Vec::new(),
            accelerator: AcceleratorChoice::Auto,
            agent: true,
        })
        .await?;
        self.proofs.step(
            "boot to the agent's answer",
            begun.elapsed(),
            "512 MiB, 1 CPU".to_owned(),
        );
        let begun = Instant::now();
        stage::fill(a, SOURCE).await?;
        let expected = stage::read(a, SOURCE).await?;
        self.proofs.step(
            "fill: git repository, files, a process with state in RAM",
            begun.elapsed(),
            format!(
                "{} files hashed, {} commits",
                expected.files, expected.commits
            ),
        );
        Ok(expected)
    }

    async fn checkpoint(&mut self, a: &Engine) -> Result<()> {
        let begun = Instant::now();
        let made = a
            .checkpoint_create(
                SOURCE,
                &CheckpointRequest {
                    name: Some(CHECKPOINT.to_owned()),
                    ..CheckpointRequest::default()
                },
            )
            .await?;
        self.proofs.step(
            "checkpoint, durable in the store",
            begun.elapsed(),
            format!(
                "guest stopped {:.1} ms, {} stored",
                made.pause.paused_us as f64 / 1000.0,
                human(made.stored_bytes)
            ),
        );
        Ok(())
    }

    async fn change(&mut self, a: &Engine, before: &Expected) -> Result<Expected> {
        let begun = Instant::now();
        let after = stage::change(a, SOURCE).await?;
        self.proofs.held(
            "the source goes on and changes",
            after.list != before.list
                && after.memory != before.memory
                && after.commits != before.commits,
            format!("{:.1} s", begun.elapsed().as_secs_f64()),
        );
        Ok(after)
    }

    async fn forks(
        &mut self,
        worker: &Engine,
        which: &str,
        count: u32,
        expected: &mut Expected,
    ) -> Result<()> {
        let begun = Instant::now();
        let reports = worker
            .fork(CHECKPOINT, count, Some("demo-fork"), &ForkPolicy::default())
            .await?;
        let ready = begun.elapsed();
        let fetched: u64 = reports.first().map_or(0, |report| report.fetched_bytes);
        let reused: u64 = reports.first().map_or(0, |report| report.reused_bytes);
        self.proofs.step(
            &format!("{count} forks on the {which}, all ready"),
            ready,
            format!(
                "{} from the store, {} found on the worker",
                human(fetched),
                human(reused)
            ),
        );
        let begun = Instant::now();
        let names: Vec<String> = reports.iter().map(|r| r.sandbox.name.clone()).collect();
        let answers = stage::read_all(worker, &names).await;
        for (name, answer) in names.iter().zip(answers) {
            let answer = answer?;
            let differences = expected.differences(&answer);
            self.proofs.held(
                &format!("{name} on the {which} equals the checkpoint, caches cold"),
                differences.is_empty(),
                if differences.is_empty() {
                    format!(
                        "{} files, git fsck, RAM digest, no ext4 error",
                        answer.files
                    )
                } else {
                    differences.join("; ")
                },
            );
        }
        self.proofs.step(
            &format!("check of the {count} forks"),
            begun.elapsed(),
            String::new(),
        );
        let random = stage::random(worker, &names).await?;
        let distinct: std::collections::HashSet<&String> = random.iter().collect();
        self.proofs.held(
            &format!("forks on the {which} draw different random numbers"),
            distinct.len() == names.len(),
            format!("{} of {} distinct", distinct.len(), names.len()),
        );
        for name in &names {
            worker.remove(name, true).await?;
        }
        Ok(())
    }

    async fn source_goes_on(&mut self, a: &Engine, after: &Expected) -> Result<()> {
        let now = stage::read(a, SOURCE).await?;
        let differences = after.differences(&now);
        self.proofs.held(
            "the source kept its own changes, caches cold",
            differences.is_empty(),
            differences.join("; "),
        );
        Ok(())
    }

    async fn hibernate_and_wake(&mut self, a: &Engine, after: &Expected) -> Result<()> {
        let begun = Instant::now();
        let made = a.hibernate(SOURCE, Workload::StandsStill).await?;
        self.proofs.step(
            "hibernate, durable in the store",
            begun.elapsed(),
            format!("{} stored", human(made.stored_bytes)),
        );
        let begun = Instant::now();
        a.wake(SOURCE).await?;
        self.proofs
            .step("wake to the agent's answer", begun.elapsed(), String::new());
        let now = stage::read(a, SOURCE).await?;
        let differences = after.differences(&now);
        self.proofs.held(
            "the woken VM is as it was, caches cold",
            differences.is_empty(),
            differences.join("; "),
        );
        Ok(())
    }

    /// One flipped byte in a copy of the store, in a pack that only this checkpoint needs: a worker that
    /// must fetch it is told, and starts no QEMU.
    async fn damage(&mut self, packs: &[PathBuf]) -> Result<()> {
        let (store, copy) = (self.root.join(STORE), self.root.join(DAMAGED_STORE));
        let flipped = stage::copy_with_one_byte_flipped(&store, &copy, packs)?;
        let started = Arc::new(AtomicBool::new(false));
        let seen = started.clone();
        let watch = Watch::new(move |event| {
            let starts = matches!(event, Event::Step { step, .. } if step == "start");
            seen.fetch_or(starts, Ordering::SeqCst);
        });
        let worker = self
            .worker_watched(DAMAGED_WORKER, DAMAGED_STORE, watch)
            .await?;
        let begun = Instant::now();
        let (held, found) = match worker
            .fork(CHECKPOINT, 1, None, &ForkPolicy::default())
            .await
        {
            Ok(_) => (false, "a fork was started".to_owned()),
            Err(error) => (
                error.kind() == Kind::Damaged
                    && !started.load(Ordering::SeqCst)
                    && worker.sandboxes().await?.is_empty(),
                error.to_string(),
            ),
        };
        self.proofs.held(
            "a flipped byte in the store is refused before a vCPU runs",
            held,
            format!("byte {} of {}: {found}", flipped.at, flipped.object),
        );
        self.proofs.step("refusal", begun.elapsed(), String::new());
        Ok(())
    }

    async fn clean_up(&self) -> Result<()> {
        if self.args.keep {
            return Ok(());
        }
        let (a, b) = self.workers().await?;
        self.remove_earlier(&a, &b).await?;
        a.gc(false, &[]).await?;
        b.gc(false, &[]).await?;
        if self.root.join(DAMAGED_STORE).is_dir() {
            // Where the refusal failed, a VM runs there.
            let c = self.worker(DAMAGED_WORKER, DAMAGED_STORE).await?;
            for sandbox in c.sandboxes().await? {
                c.remove(&sandbox.id, true).await?;
            }
        }
        for folder in [DAMAGED_STORE, DAMAGED_WORKER] {
            let path = self.root.join(folder);
            stead_sys::durable::remove_tree(&path).map_err(|error| {
                EngineError::new(Kind::Internal, format!("remove {}", path.display()), "")
                    .because(error)
            })?;
        }
        Ok(())
    }
}

fn short(content: &str) -> String {
    content.chars().take(12).collect()
}
