//! Fork, restore and wake: running a checkpoint's proven parts.
//!
//! All three do the same: obtain and prove the parts, put a fresh overlay on each disk, start QEMU
//! with the state loaded, and have the agent acknowledge a new epoch. They differ in whose sandbox
//! it becomes, and in what is taken away afterwards: a restore ends the earlier VM only when the
//! new one is ready.

use std::collections::HashSet;
use std::time::Duration;

use futures::StreamExt;
use serde::Serialize;

use crate::error::{EngineError, Kind, Result};
use crate::fork_policy::ForkPolicy;
use crate::job::{Job, Undo};
use crate::launch::{Identity, Incoming, LaunchPlan, RamPlan, Reason, Running};
use crate::layers;
use crate::materialise::{Cost, Parts};
use crate::records::{LayerRow, Records, Sandbox, SandboxDisk, SandboxState, to_json};
use crate::sandbox::wrong_state;
use crate::store::store_error;
use crate::{Engine, SandboxInfo, id, now};

/// How many forks are started at once, at the most.
const STARTS_AT_ONCE: usize = 16;
/// How long a restored guest's agent may take to acknowledge.
pub(crate) const RESTORE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a guest that boots from a disk-only checkpoint may take.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);

/// A sandbox that runs from a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct RestoreReport {
    /// The sandbox.
    pub sandbox: SandboxInfo,
    /// Bytes of chunks that came from the store, uncompressed.
    pub fetched_bytes: u64,
    /// Bytes taken from other layers of this worker.
    pub reused_bytes: u64,
    /// Bytes compared with the manifest before a vCPU ran.
    pub verified_bytes: u64,
    /// How long that comparison took, in microseconds.
    pub verify_us: u64,
    /// From before QEMU was started to the agent's acknowledgement, in microseconds.
    pub ready_us: u64,
}

/// A checkpoint compared with its manifest.
#[derive(Debug, Clone, Serialize)]
pub struct VerifyReport {
    /// The checkpoint.
    pub id: String,
    /// Bytes compared, in the store.
    pub bytes: u64,
}

/// A sandbox about to run from a checkpoint.
struct Body {
    row: Sandbox,
    identity: Identity,
    launch: String,
    overlays: Vec<LayerRow>,
}

impl Engine {
    /// Starts `count` new sandboxes from a checkpoint: all of them, or none.
    ///
    /// # Errors
    /// See [`Engine::restore`]; forks that had started are taken back.
    pub async fn fork(
        &self,
        checkpoint: &str,
        count: u32,
        name: Option<&str>,
        policy: &ForkPolicy,
    ) -> Result<Vec<RestoreReport>> {
        let names = fork_names(count, name)?;
        policy.check(count)?;
        // Before anything is fetched; who takes a name meanwhile is met when the forks are recorded.
        self.check_free(&names).await?;
        let mut job = Job::begin(&self.records, &self.watch, "fork", None, Undo::default()).await?;
        let forked = self.fork_as(&mut job, checkpoint, &names, policy).await;
        let (cost, made) = self.undone_on_error(&job, forked).await?;
        let mut reports = Vec::new();
        for (id, running) in made {
            reports.push(self.report(&id, cost, &running).await?);
        }
        Ok(reports)
    }

    async fn check_free(&self, names: &[Option<String>]) -> Result<()> {
        let taken: HashSet<String> = self
            .records
            .sandboxes()
            .await?
            .into_iter()
            .map(|sandbox| sandbox.name)
            .collect();
        match names.iter().flatten().find(|name| taken.contains(*name)) {
            Some(name) => Err(EngineError::new(
                Kind::Conflict,
                format!("fork as {name}"),
                "a sandbox of this name exists",
            )
            .left("nothing was fetched or started")
            .next(format!(
                "choose another name, or `stead rm {name}` it first"
            ))),
            None => Ok(()),
        }
    }

    async fn fork_as(
        &self,
        job: &mut Job,
        checkpoint: &str,
        names: &[Option<String>],
        policy: &ForkPolicy,
    ) -> Result<(Cost, Vec<(String, Running)>)> {
        let parts = self.obtain(job, checkpoint).await?;
        let mut bodies = Vec::new();
        for name in names {
            let sandbox = id::short()?;
            let row = new_row(
                &parts,
                &sandbox,
                name.clone().unwrap_or_else(|| sandbox.clone()),
            )?;
            let identity = policy.identity(&row.name, bodies.len(), names.len());
            bodies.push(Body {
                identity,
                ..new_body(&parts, row)?
            });
        }
        job.also(|undo| {
            for body in &bodies {
                undo.launches.push(body.launch.clone());
                undo.sandboxes.push(body.row.id.clone());
                undo.layers
                    .extend(body.overlays.iter().map(|layer| layer.id.clone()));
            }
        })
        .await?;
        job.step("start").await?;
        let mut locks = Vec::new();
        for body in &bodies {
            locks.push(self.lock_new(&body.row, "fork").await?);
            self.insert_with_disks(&body.row, &parts.body.machine, &body.overlays)
                .await?;
        }
        let starts = bodies
            .iter()
            .map(|body| self.start_body(&parts, body, Reason::Fork));
        // All are waited for, so that undoing never races with a start.
        let started: Vec<Result<Running>> = futures::stream::iter(starts)
            .buffered(STARTS_AT_ONCE)
            .collect()
            .await;
        let started = started.into_iter().collect::<Result<Vec<Running>>>()?;
        let mut tx = self.records.begin().await?;
        for (body, running) in bodies.iter().zip(&started) {
            Records::set_running(&mut tx, &body.row.id, &running.incarnation(&body.launch)).await?;
        }
        job.finish(&mut tx).await?;
        tx.commit().await?;
        drop(locks);
        let ids = bodies.into_iter().map(|body| body.row.id);
        Ok((parts.cost, ids.zip(started).collect()))
    }

    /// Puts a sandbox back to a checkpoint. Its present state goes only once the new one is ready.
    ///
    /// # Errors
    /// [`Kind::Damaged`], [`Kind::Incompatible`] and whatever starting may meet; the sandbox is then
    /// as it was, running if it ran.
    pub async fn restore(&self, name: &str, checkpoint: &str) -> Result<RestoreReport> {
        let (_lock, sandbox) = self.lock_sandbox(name, "restore").await?;
        self.replace(&sandbox, checkpoint, "restore", Reason::Restore)
            .await
    }

    /// Starts a hibernated sandbox where it was.
    ///
    /// # Errors
    /// As [`Engine::restore`]; the sandbox stays hibernated.
    pub async fn wake(&self, name: &str) -> Result<RestoreReport> {
        let (_lock, sandbox) = self.lock_sandbox(name, "wake").await?;
        let Some(checkpoint) = sandbox.hibernated_as.clone() else {
            return Err(wrong_state("wake", &sandbox, "it is not hibernated"));
        };
        self.replace(&sandbox, &checkpoint, "wake", Reason::Wake)
            .await
    }

    async fn replace(
        &self,
        sandbox: &Sandbox,
        checkpoint: &str,
        kind: &'static str,
        reason: Reason,
    ) -> Result<RestoreReport> {
        let mut job = Job::begin(
            &self.records,
            &self.watch,
            kind,
            Some(&sandbox.id),
            Undo::default(),
        )
        .await?;
        let replaced = self.replace_as(&mut job, sandbox, checkpoint, reason).await;
        let (cost, running) = self.undone_on_error(&job, replaced).await?;
        self.report(&sandbox.id, cost, &running).await
    }

    async fn replace_as(
        &self,
        job: &mut Job,
        sandbox: &Sandbox,
        checkpoint: &str,
        reason: Reason,
    ) -> Result<(Cost, Running)> {
        let parts = self.obtain(job, checkpoint).await?;
        let row = Sandbox {
            machine: to_json(&parts.body.machine)?,
            ..sandbox.clone()
        };
        let body = new_body(&parts, row)?;
        job.also(|undo| {
            undo.launches.push(body.launch.clone());
            undo.layers
                .extend(body.overlays.iter().map(|layer| layer.id.clone()));
        })
        .await?;
        job.step("start").await?;
        let mut tx = self.records.begin().await?;
        for overlay in &body.overlays {
            Records::insert_layer(&mut tx, overlay).await?;
        }
        tx.commit().await?;
        let running = self.start_body(&parts, &body, reason).await?;
        self.swap(job, sandbox, &body, &parts, &running).await?;
        Ok((parts.cost, running))
    }

    /// The one transaction in which the sandbox becomes the new VM; then the earlier one ends.
    async fn swap(
        &self,
        job: &Job,
        sandbox: &Sandbox,
        body: &Body,
        parts: &Parts,
        running: &Running,
    ) -> Result<()> {
        let earlier = Undo {
            launches: sandbox.launch.clone().into_iter().collect(),
            ..Undo::default()
        };
        let mut tx = self.records.begin().await?;
        Records::set_disks(&mut tx, &sandbox.id, &disks_of(parts, &body.overlays)).await?;
        Records::set_machine(&mut tx, &sandbox.id, &body.row.machine).await?;
        Records::set_running(&mut tx, &sandbox.id, &running.incarnation(&body.launch)).await?;
        Records::set_checkpoint(&mut tx, &sandbox.id, &parts.id.to_string()).await?;
        // From here on, undoing the job means ending the earlier VM.
        job.turn(&mut tx, &earlier).await?;
        tx.commit().await?;
        crate::job::crash_point("restore", "swapped");
        self.complete(job).await
    }

    async fn start_body(&self, parts: &Parts, body: &Body, reason: Reason) -> Result<Running> {
        for (overlay, parent) in body.overlays.iter().zip(&parts.layers) {
            layers::create_overlay_file(
                &self.dir,
                overlay,
                Some(parent),
                crate::launch::owner(body.row.vm_user),
            )?;
        }
        let incoming = match (&parts.device_state, parts.body.state_format) {
            (Some(state), Some(format)) => Some(Incoming {
                device_state: state.clone(),
                format,
            }),
            _ => None,
        };
        let disks = disks_of(parts, &body.overlays);
        let boots = incoming.is_none();
        self.launch(&LaunchPlan {
            launch: &body.launch,
            sandbox: &body.row,
            machine: &parts.body.machine,
            disks: &disks,
            ram: match &parts.ram {
                Some(image) => RamPlan::Image(image.clone()),
                None => RamPlan::Fresh,
            },
            incoming,
            reason: if boots { Reason::Boot } else { reason },
            identity: body.identity.clone(),
            timeout: if boots { BOOT_TIMEOUT } else { RESTORE_TIMEOUT },
        })
        .await
    }

    async fn report(&self, id: &str, cost: Cost, running: &Running) -> Result<RestoreReport> {
        Ok(RestoreReport {
            sandbox: self.sandbox(id).await?,
            fetched_bytes: cost.fetched_bytes,
            reused_bytes: cost.reused_bytes,
            verified_bytes: cost.verified_bytes,
            verify_us: micros(cost.verify),
            ready_us: micros(running.ready_after),
        })
    }

    /// Reads every byte of a checkpoint in the store and compares it with the manifest.
    ///
    /// # Errors
    /// [`Kind::Damaged`] names the objects and parts.
    pub async fn checkpoint_verify(&self, name: &str) -> Result<VerifyReport> {
        let (id, manifest) = self.manifest(name).await?;
        self.store()
            .await?
            .verify_manifest(id, &self.progress_of("verify"))
            .await
            .map_err(|source| {
                store_error(format!("verify checkpoint {name}"), source).left("nothing was changed")
            })?;
        Ok(VerifyReport {
            id: id.to_string(),
            bytes: manifest
                .trees()
                .iter()
                .map(|(_, tree)| tree.length_bytes)
                .sum(),
        })
    }
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn fork_names(count: u32, name: Option<&str>) -> Result<Vec<Option<String>>> {
    let Some(name) = name else {
        return Ok(vec![None; count as usize]);
    };
    id::check_name("sandbox", name)?;
    if count == 1 {
        return Ok(vec![Some(name.to_owned())]);
    }
    (1..=count)
        .map(|number| {
            let full = format!("{name}-{number}");
            id::check_name("sandbox", &full)?;
            Ok(Some(full))
        })
        .collect()
}

fn new_row(parts: &Parts, id: &str, name: String) -> Result<Sandbox> {
    Ok(Sandbox {
        id: id.to_owned(),
        name,
        state: SandboxState::Creating,
        template: parts
            .manifest
            .lineage
            .template
            .map(|id| id.to_string())
            .unwrap_or_default(),
        machine: to_json(&parts.body.machine)?,
        vm_user: crate::launch::new_vm_user()?,
        epoch: None,
        launch: None,
        process: None,
        ram_sharing: None,
        checkpoint: Some(parts.id.to_string()),
        hibernated_as: None,
        created: now(),
    })
}

fn new_body(parts: &Parts, row: Sandbox) -> Result<Body> {
    let overlays = parts
        .layers
        .iter()
        .map(|layer| {
            Ok(layers::new_overlay(
                &id::long()?,
                layer,
                layer.virtual_bytes,
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Body {
        row,
        identity: Identity::Keep,
        launch: id::long()?,
        overlays,
    })
}

fn disks_of(parts: &Parts, overlays: &[LayerRow]) -> Vec<SandboxDisk> {
    parts
        .manifest
        .disks
        .iter()
        .zip(overlays)
        .map(|(disk, layer)| SandboxDisk {
            disk: disk.id.clone(),
            layer: layer.id.clone(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forks_are_numbered_only_when_there_are_several() {
        assert_eq!(
            fork_names(1, Some("web")).expect("names"),
            [Some("web".to_owned())]
        );
        assert_eq!(
            fork_names(2, Some("web")).expect("names"),
            [Some("web-1".to_owned()), Some("web-2".to_owned())]
        );
        assert_eq!(fork_names(2, None).expect("names"), [None, None]);
        assert!(fork_names(2, Some("../x")).is_err());
    }
}
