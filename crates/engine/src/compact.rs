//! Compact: layers that no checkpoint and no other sandbox needs become part of the one above them.
//!
//! ```text
//!  active   ◀ the guest writes here                active
//!  C        ◀ a checkpoint                          C'  (what C, B and A define)
//!  B, A     ◀ their checkpoints were removed        │
//!  D        ◀ a checkpoint                          D
//!  base     ◀ the template's, other sandboxes'      base
//! ```
//! Nothing that exists is written: C' is made beside the others ([`stead_merge::fuse`]), read back and compared, and
//! takes C's name. From then on both ways to read the disk are right, the records say the short one, and what is not
//! needed any more is swept. A running QEMU is told to read C' ([`stead_vmm::Vm::follow_layers`]); the guest is not
//! stopped. Where that fails, it goes on with the files that it has open, which show the same.
//!
//! | killed | the next command finds |
//! |---|---|
//! | before C' has C's name | everything as it was; C' is removed |
//! | after that | C' in C's place: it records that, tells QEMU, and removes B and A |
//!
//! # Invariants
//! * A layer in the chain of another sandbox, or of a template, is neither changed nor removed.
//! * What a checkpoint names stays readable under that name, with the same content.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use sqlx::SqliteConnection;
use stead_sys::durable::{self, Existing};
use stead_sys::space;

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::event::MergeEvents;
use crate::job::{Job, Undo};
use crate::layers;
use crate::materialise::content_of;
use crate::records::{LayerRow, LayerUses, Records, Sandbox, SandboxState};
use crate::sandbox::{vm_error, wrong_state};
use crate::{Engine, blocking, id};

mod groups;
mod report;

use groups::{Group, GroupFiles, groups_in};
pub use report::{CompactReport, CompactedDisk, MergedLayer};

/// A checkpoint after which a disk lies in more layers than this compacts them, unless its caller says another number.
pub const DEPTH_COMPACTED: usize = 16;
/// How often the end of other commands is looked for.
const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_millis(50);
/// Jobs that read no layers but those of their own sandbox.
const HARMLESS: [&str; 6] = ["checkpoint", "hibernate", "start", "rm", "compact", "exec"];

/// A layer whose file is being replaced by one of all that it took in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Replacement {
    /// The layer.
    pub layer: String,
    /// The new file's id, until it takes the layer's name.
    pub made: String,
    /// What the layer stands on from then on.
    pub parent: Option<String>,
}

/// A compaction about to switch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CompactUndo {
    pub sandbox: String,
    pub replacements: Vec<Replacement>,
}

impl Engine {
    /// Merges the layers of a sandbox's disks that no checkpoint of this worker and no other sandbox needs. A running
    /// one runs on. With `dry_run`, only says what would be merged.
    ///
    /// # Durability
    /// When this returns, the new layers are proven and synced, and the records name them.
    ///
    /// # Errors
    /// [`Kind::NoSpace`] before anything is written, when the room may not do; [`Kind::Damaged`] when a layer is not
    /// what it was. The sandbox's disks are as they were.
    pub async fn compact(&self, name: &str, dry_run: bool) -> Result<CompactReport> {
        let (_lock, sandbox) = self.lock_sandbox(name, "compact").await?;
        self.compact_locked(&sandbox, dry_run).await
    }

    /// After a checkpoint: compacts a sandbox that the caller has locked, if a disk lies in more layers than `limit`.
    /// The checkpoint is made already, so what fails here is only told.
    pub(crate) async fn compact_if_deep(&self, sandbox: &str, limit: usize) {
        let compacted = async {
            let sandbox = self.records.sandbox(sandbox).await?;
            for disk in self.records.disks(&sandbox.id).await? {
                if self.records.chain(&disk.layer).await?.len() > limit {
                    self.compact_locked(&sandbox, false).await?;
                    break;
                }
            }
            Ok(())
        };
        self.only_notice("its layers were not compacted", compacted.await);
    }

    async fn compact_locked(&self, sandbox: &Sandbox, dry_run: bool) -> Result<CompactReport> {
        if sandbox.state == SandboxState::Creating {
            return Err(wrong_state("compact", sandbox, "it is being created"));
        }
        let groups = self.groups_of(sandbox).await?;
        let mut report = self.report_of(sandbox, &groups).await?;
        let all: Vec<&Group> = groups.values().flatten().collect();
        if dry_run || all.is_empty() {
            return Ok(report);
        }
        self.check_compact_room(sandbox, &all)?;
        let job = Job::begin(
            &self.records,
            &self.watch,
            "compact",
            Some(&sandbox.id),
            Undo {
                layers: all.iter().map(|group| group.made.clone()).collect(),
                ..Undo::default()
            },
        )
        .await?;
        let mut job = job;
        let switched = self.make_and_switch(&mut job, sandbox, &all).await;
        self.undone_on_error(&job, switched).await?;
        // The rest is told QEMU and swept; it is right without that, too.
        self.only_notice(
            "what was merged is not removed yet",
            self.complete(&job).await,
        );
        self.measure_made(&mut report)?;
        Ok(report)
    }

    /// For each disk what is to be merged, by the disk's name.
    async fn groups_of(&self, sandbox: &Sandbox) -> Result<HashMap<String, Vec<Group>>> {
        let disks = self.records.disks(&sandbox.id).await?;
        let mut tx = self.records.begin().await?;
        let uses = Records::layer_uses(&mut tx).await?;
        drop(tx);
        let mut groups = HashMap::new();
        for disk in disks {
            let found = groups_in(&uses, sandbox, &disk.layer);
            let chain = uses.chain(&disk.layer);
            let found: Vec<Group> = found
                .into_iter()
                .map(|(merged, below)| {
                    let made = id::long()?;
                    let above = chain.iter().take_while(|layer| layer.id != merged[0].id);
                    Ok(Group {
                        made,
                        above: above.cloned().collect(),
                        merged,
                        below,
                    })
                })
                .collect::<Result<_>>()?;
            groups.insert(disk.disk, found);
        }
        Ok(groups)
    }

    /// The files of a group.
    fn files_of(&self, group: &Group) -> GroupFiles {
        let files = |rows: &[LayerRow]| layers::files(&self.dir, rows);
        GroupFiles {
            above: files(&group.above),
            merged: files(&group.merged),
            below: files(&group.below),
        }
    }

    /// Both stand side by side until the switch.
    fn check_compact_room(&self, sandbox: &Sandbox, groups: &[&Group]) -> Result<()> {
        let mut needed = 0;
        for group in groups {
            let files = self.files_of(group);
            needed +=
                stead_merge::fuse_needs_bytes(files.as_layers()).map_err(EngineError::from)?;
        }
        let folder = self.dir.layers();
        let available = space::available_bytes(&folder).at("ask for room on", &folder)?;
        if needed <= available {
            return Ok(());
        }
        let attempt = format!("compact sandbox {}", sandbox.name);
        Err(EngineError::no_space(attempt, &folder, needed, available))
    }

    async fn make_and_switch(
        &self,
        job: &mut Job,
        sandbox: &Sandbox,
        groups: &[&Group],
    ) -> Result<()> {
        job.step("verify").await?;
        self.prove_groups(groups).await?;
        job.step("merge").await?;
        for group in groups {
            self.make(sandbox, group).await?;
        }
        job.step("switch").await?;
        // Whoever touched a file since it was proven may have done so before it was read.
        self.prove_groups(groups).await?;
        let replacements = groups.iter().map(|group| Replacement {
            layer: group.top().id.clone(),
            made: group.made.clone(),
            parent: group.below.first().map(|layer| layer.id.clone()),
        });
        let switching = CompactUndo {
            sandbox: sandbox.id.clone(),
            replacements: replacements.collect(),
        };
        job.also(|undo| undo.compact = Some(switching.clone()))
            .await?;
        let mut tx = self.when_nobody_reads(sandbox, groups).await?;
        for replacement in &switching.replacements {
            self.replace_file(replacement)?;
            crate::job::crash_point("compact", "replaced");
            self.record_replacement(&mut tx, replacement).await?;
        }
        let follow = Undo {
            follow: Some(sandbox.id.clone()),
            ..Undo::default()
        };
        job.turn(&mut tx, &follow).await?;
        tx.commit().await?;
        crate::job::crash_point("compact", "switched");
        Ok(())
    }

    /// Proves what is known of the layers, where their files were touched since that was done last.
    async fn prove_groups(&self, groups: &[&Group]) -> Result<()> {
        for group in groups {
            let rows: Vec<LayerRow> = group.merged.iter().chain(&group.below).cloned().collect();
            for (depth, row) in rows.iter().enumerate() {
                if let Some(tree) = content_of(row)? {
                    let rows = self.records.chain(&rows[depth].id).await?;
                    self.prove_if_touched(&rows, &tree)
                        .await
                        .map_err(|error| error.left("no layer was merged"))?;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Makes the new file beside the others, whole and compared.
    async fn make(&self, sandbox: &Sandbox, group: &Group) -> Result<()> {
        let files = self.files_of(group);
        let made = layers::path_of(&self.dir, &group.made, layers::QCOW2);
        let (watch, path) = (self.watch.clone(), made.clone());
        blocking(move || {
            let events = MergeEvents::new(&watch, "compact");
            let tell = |event| events.tell(event);
            let watching = stead_merge::Watch {
                tell: &tell,
                cancel: Some(watch.wish_to_stop()),
            };
            stead_merge::fuse(files.as_layers(), (&path, 0o600), watching)
                .map_err(EngineError::from)
        })
        .await
        .map_err(|error| error.left("the sandbox's disks are as they were"))?;
        crate::job::crash_point("compact", "made");
        if group.top().frozen {
            layers::seal(&made)
        } else {
            layers::give_to(&made, crate::launch::owner(sandbox.vm_user))
        }
    }

    /// A transaction in which the layers are still needed by nobody else, and no other command reads them: those that
    /// begin now wait for it, and see the records that it leaves.
    async fn when_nobody_reads(
        &self,
        sandbox: &Sandbox,
        groups: &[&Group],
    ) -> Result<sqlx::Transaction<'static, sqlx::Sqlite>> {
        let begun = std::time::Instant::now();
        let attempt = format!("compact sandbox {}", sandbox.name);
        loop {
            let mut tx = self.records.begin().await?;
            let uses = Records::layer_uses(&mut tx).await?;
            if !self.are_still(sandbox, groups, &uses).await? {
                return Err(EngineError::new(
                    Kind::Conflict,
                    attempt,
                    "another command began to use one of its layers",
                )
                .left("the sandbox's disks are as they were")
                .next("run it again"));
            }
            let Some(reader) = self.reader(&uses)? else {
                return Ok(tx);
            };
            drop(tx);
            self.watch.check(&attempt)?;
            if begun.elapsed() >= self.settings.wait {
                return Err(EngineError::new(
                    Kind::Conflict,
                    attempt,
                    format!("a {reader} is reading layers of this worker"),
                )
                .left("the sandbox's disks are as they were")
                .next("wait for that command, or give --wait a longer time"));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn are_still(
        &self,
        sandbox: &Sandbox,
        groups: &[&Group],
        uses: &LayerUses,
    ) -> Result<bool> {
        let mut now = Vec::new();
        for (_, layer) in uses.disks.iter().filter(|(own, _)| *own == sandbox.id) {
            now.extend(groups_in(uses, sandbox, layer));
        }
        Ok(groups.iter().all(|group| {
            now.iter().any(|(merged, below)| {
                let ids = merged.iter().chain(below).map(|layer| layer.id.as_str());
                merged.len() == group.merged.len() && ids.eq(group.ids())
            })
        }))
    }

    /// The kind of a living command that may be reading layers of other sandboxes.
    fn reader(&self, uses: &LayerUses) -> Result<Option<String>> {
        for job in &uses.jobs {
            let owner = crate::records::parse_process(&job.owner)?;
            let alive = owner.is_alive().at("look for processes in", "/proc")?;
            if alive && !HARMLESS.contains(&job.kind.as_str()) {
                return Ok(Some(job.kind.clone()));
            }
        }
        Ok(None)
    }

    fn replace_file(&self, replacement: &Replacement) -> Result<()> {
        let path = |id: &str| layers::path_of(&self.dir, id, layers::QCOW2);
        let (made, layer) = (path(&replacement.made), path(&replacement.layer));
        durable::move_to(&made, &layer, Existing::Replace).at("replace", &layer)
    }

    async fn record_replacement(
        &self,
        tx: &mut SqliteConnection,
        replacement: &Replacement,
    ) -> Result<()> {
        let file = layers::path_of(&self.dir, &replacement.layer, layers::QCOW2);
        let stamp = layers::stamp(&file)?;
        let parent = replacement.parent.as_deref();
        Records::set_layer_parent(tx, &replacement.layer, parent, &stamp).await
    }

    /// Finishes the switch of an interrupted compaction, as far as its files were replaced.
    pub(crate) async fn undo_compact(&self, switching: &CompactUndo) -> Result<()> {
        let is_replaced = |replacement: &&Replacement| {
            !layers::path_of(&self.dir, &replacement.made, layers::QCOW2).exists()
        };
        let replaced = switching.replacements.iter().filter(is_replaced);
        let mut tx = self.records.begin().await?;
        for replacement in replaced {
            self.record_replacement(&mut tx, replacement).await?;
        }
        tx.commit().await?;
        self.follow(&switching.sandbox).await
    }

    /// Tells the QEMU of a sandbox, if one runs, to read what the records name. One that cannot be told reads on
    /// in what it has open.
    pub(crate) async fn follow(&self, sandbox: &str) -> Result<()> {
        let sandbox = match self.records.sandbox(sandbox).await {
            Ok(sandbox) => self.notice_crash(sandbox).await?,
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        if sandbox.process.is_none() {
            return Ok(());
        }
        let told = self.tell_qemu(&sandbox).await;
        self.only_notice(
            "its QEMU reads on in the earlier files, which show the same; their room is given back when it ends",
            told,
        );
        Ok(())
    }

    async fn tell_qemu(&self, sandbox: &Sandbox) -> Result<()> {
        let mut wanted = Vec::new();
        for disk in self.records.disks(&sandbox.id).await? {
            let rows = self.records.chain(&disk.layer).await?;
            let chain: Vec<_> = rows.iter().rev().map(|row| self.vmm_layer(row)).collect();
            wanted.push((disk.disk, chain));
        }
        let mut vm = self.connect_vm(sandbox).await?;
        let sandbox = sandbox.clone();
        blocking(move || {
            for (disk, chain) in wanted {
                vm.follow_layers(&disk, &chain)
                    .map_err(|source| vm_error("change the layers of", &sandbox, source))?;
            }
            Ok(())
        })
        .await
    }
}
