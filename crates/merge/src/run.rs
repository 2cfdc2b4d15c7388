//! The merge itself, step by step; `docs/merge.md` has what a crash behind each step leaves.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;
use stead_qcow2::edit::Editor;
use stead_qcow2::ops::bitmap::{self, Action};
use stead_qcow2::ops::rebase::{self, BackingFile};
use stead_qcow2::{Control, Error};
use stead_sys::durable::{self, Existing};
use stead_sys::image_lock::Access;

use crate::error::{Kind, MergeError, Result};
use crate::event::{Step, Watch};
use crate::open::{Opened, lock};
use crate::plan::{MergePlan, MergeRequest, Thought, think};
use crate::prove::Proof;
use crate::record::{Phase, Record, record_path, remove_unfinished};
use crate::space::{Place, place_of};

/// What a merge did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MergeReport {
    /// What was planned, and done.
    pub plan: MergePlan,
    /// The disk's active layer now.
    pub active: PathBuf,
    /// Merged layers that were removed.
    pub removed: Vec<PathBuf>,
    /// Merged layers that are still there, which nothing needs any more.
    pub kept: Vec<PathBuf>,
}

/// Merges.
///
/// # Durability
/// When this returns `Ok`, base and child are changed and synced, and so are the folders of what was removed.
///
/// # Errors
/// When it is refused (then nothing was changed), or a step fails: the error says what stands, and
/// [`recover`](crate::recover()) finishes or undoes what was begun.
pub fn run(request: &MergeRequest, watch: Watch<'_>) -> Result<MergeReport> {
    watch.step(Step::Plan);
    let mut thought = think(request, None)?;
    if extend(request, &thought.plan, watch)? {
        thought = think(request, None)?;
    }
    thought.plan.require_allowed()?;
    for (path, why) in &thought.plan.searched.unreadable {
        let path = path.display();
        watch.notice(format!(
            "whether {path} stands on what is merged was not found: {why}"
        ));
    }
    watch.go_on("merge")?;
    let voids = thought
        .plan
        .bitmaps
        .iter()
        .any(|verdict| verdict.void_above);
    let mut opened = Opened::open(&thought.layers, voids)?;
    thought.require_unchanged(request)?;
    let base = thought.layers.base_file().path.clone();
    let mut going = Going {
        record: Record::of(&thought.layers, &thought.plan, request.keep_layers)?,
        path: record_path(&base, &request.records)?,
        watch,
    };
    watch.step(Step::Record);
    remove_unfinished(&going.path)?;
    going.record.write(&going.path, Existing::Keep)?;
    if let Err(error) = watch.go_on("merge") {
        going.forget()?;
        return Err(error);
    }
    going.commit(&mut opened, &thought)?;
    going.prove(&opened)?;
    let (removed, kept) = going.finish(opened)?;
    Ok(MergeReport {
        active: match thought.layers.top {
            0 => base,
            _ => thought.layers.files[0].path.clone(),
        },
        plan: thought.plan,
        removed,
        kept,
    })
}

/// Has devices extended that are too short, if nothing else stands against the merge: whether it was done.
pub(crate) fn extend(request: &MergeRequest, plan: &MergePlan, watch: Watch<'_>) -> Result<bool> {
    let Some(command) = &request.extend_cmd else {
        return Ok(false);
    };
    let short = plan.short_devices();
    if short.is_empty()
        || plan
            .refused
            .iter()
            .any(|refusal| refusal.kind != Kind::NoSpace)
    {
        return Ok(false);
    }
    for space in short {
        watch.step(Step::Extend);
        extend_to(command, &space.file, space.needed_bytes)?;
    }
    Ok(true)
}

/// Has a device extended.
pub(crate) fn extend_to(command: &str, device: &Path, bytes: u64) -> Result<()> {
    let attempt = format!(
        "extend {} to {bytes} bytes with {command:?}",
        device.display()
    );
    let failed = |found: String| {
        MergeError::new(Kind::NoSpace, &attempt, found)
            .left("the images were not changed; the device may be longer")
            .next("extend the device by hand, and run it again")
    };
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg(format!("{command} \"$@\""))
        .arg("stead-merge");
    shell.arg(device).arg(bytes.to_string());
    // Standard output is for our own result.
    shell
        .stdin(std::process::Stdio::null())
        .stdout(std::io::stderr());
    let status = shell.status().map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        return Err(failed(format!("it ended with {status}")));
    }
    Ok(())
}

/// A merge that is going on, and its record.
pub(crate) struct Going<'a> {
    pub record: Record,
    pub path: PathBuf,
    pub watch: Watch<'a>,
}

impl Going<'_> {
    /// Removes the record: nothing is going on any more.
    pub fn forget(&self) -> Result<()> {
        let removed = durable::remove_file(&self.path);
        removed.map_err(|source| MergeError::io("remove the record", &self.path, source))
    }

    pub fn recover_with(&self) -> String {
        format!(
            "run `stead merge recover {}`",
            self.record.base_path().display()
        )
    }

    fn commit(&self, opened: &mut Opened, thought: &Thought) -> Result<()> {
        self.watch.step(Step::Commit);
        let total = thought.plan.data_bytes;
        let progress = |fraction: f64| self.watch.progress_of(fraction, total);
        let control = Control {
            cancel: self.watch.cancel,
            progress: Some(&progress),
        };
        let (layers, options) = (&thought.layers, &thought.options);
        let Err(error) = opened.commit(layers, options, thought.left, &control) else {
            return Ok(());
        };
        let begun = matches!(error, Error::Switch { .. } | Error::Unrecoverable { .. });
        let failed = MergeError::engine("commit into the base", error);
        if begun {
            return Err(failed
                .left(
                    "the layers are as they were; the base is whole or says that it is in progress",
                )
                .next(self.recover_with()));
        }
        match self.forget() {
            Ok(()) => Err(failed),
            Err(_stays) => Err(failed
                .left("the images were not changed; the record of the merge stays")
                .next(self.recover_with())),
        }
    }

    /// Why the base is not what it should be.
    pub fn fault(&self, opened: &Opened) -> Result<Option<String>> {
        if let corruptions @ 1.. = opened.base_corruptions() {
            return Ok(Some(format!(
                "a check of the base has {corruptions} findings"
            )));
        }
        let files = self.record.layers[self.record.top..].iter();
        let files: Vec<_> = files.map(crate::record::RecordedLayer::file).collect();
        let proof = Proof {
            files: &files,
            base: self.record.base - self.record.top,
            bitmaps: &self.record.bitmaps,
            watch: self.watch,
        };
        proof.find_fault().map_err(|error| {
            MergeError::engine("read the base back", error)
                .left("all layers are there, and the disk is what it was")
                .next(self.recover_with())
        })
    }

    fn prove(&mut self, opened: &Opened) -> Result<()> {
        self.watch.step(Step::Prove);
        let Some(fault) = self.fault(opened)? else {
            return Ok(());
        };
        self.forget()?;
        Err(MergeError::new(Kind::Damaged, "read the base back", fault)
            .left("all layers are there, and the disk seen through them is what it was; no layer was removed")
            .next("keep the layers, see to the storage below the base, and run `stead img check` on it"))
    }

    /// Everything behind the proof: what was removed, and what is still there.
    pub fn finish(&mut self, opened: Opened) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        let (child, above) = opened.into_above();
        self.end(child, above)
    }

    /// As [`Going::finish`], with what is above the top.
    pub fn end(
        &mut self,
        child: Option<Editor>,
        above: Vec<Editor>,
    ) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        let next = self.recover_with();
        self.finish_with(child, above).map_err(|error| {
            error
                .left("the base has everything; the chain shows what it did, with the layers that are still there")
                .next(next)
        })
    }

    fn finish_with(
        &mut self,
        child: Option<Editor>,
        above: Vec<Editor>,
    ) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        if self.record.phase != Phase::Proven {
            self.record.phase = Phase::Proven;
            self.record.write(&self.path, Existing::Replace)?;
        }
        let mut child = child;
        for mut editor in above {
            self.void(&mut editor)?;
        }
        if let Some(child) = &mut child {
            self.void(child)?;
            self.rewire(child)?;
        }
        // The child is locked until nothing below it changes any more.
        let outcome = self.remove_layers()?;
        drop(child);
        self.watch.step(Step::Finish);
        self.forget()?;
        Ok(outcome)
    }

    /// Removes bitmaps from a layer that would look whole without what is dropped below it.
    fn void(&self, editor: &mut Editor) -> Result<()> {
        let stored = editor.layer().stored_bitmaps();
        let stored = stored.map_err(|error| MergeError::engine("read bitmaps", error))?;
        let broken = self
            .record
            .bitmaps
            .iter()
            .filter(|bitmap| bitmap.void_above);
        let broken = broken.filter(|bitmap| stored.iter().any(|own| own.name == bitmap.name));
        let steps: Vec<bitmap::Step<'_>> = broken
            .map(|broken| bitmap::Step {
                bitmap: &broken.name,
                action: Action::Remove,
            })
            .collect();
        if steps.is_empty() {
            return Ok(());
        }
        self.watch
            .step(Step::Void(editor.layer().path().to_owned()));
        let changed = bitmap::change(editor, &steps);
        changed.map_err(|error| MergeError::engine("remove broken bitmaps", error))?;
        Ok(())
    }

    fn rewire(&self, child: &mut Editor) -> Result<()> {
        let Some((name, format)) = &self.record.backing else {
            return Ok(());
        };
        let path = child.layer().path().to_owned();
        self.watch.step(Step::Rewire(path));
        let file = BackingFile {
            name,
            format: Some(format),
        };
        let renamed = rebase::rename(child, Some(file));
        renamed.map_err(|error| MergeError::engine("let the layer above name the base", error))?;
        Ok(())
    }

    fn remove_layers(&self) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        let (mut removed, mut kept) = (Vec::new(), Vec::new());
        for layer in self.record.merged() {
            let path = layer.file().path;
            if layer.is_gone() {
                removed.push(path);
                continue;
            }
            let why = match self.record.keep_layers {
                true => Some("it was to be kept".to_owned()),
                false if !layer.is_there()? => Some("another file has its name now".to_owned()),
                false => self.remove_layer(&path)?,
            };
            match why {
                None => removed.push(path),
                Some(why) => {
                    if !self.record.keep_layers {
                        self.watch.notice(format!(
                            "{} is not needed any more and was not removed: {why}",
                            path.display()
                        ));
                    }
                    kept.push(path);
                }
            }
        }
        Ok((removed, kept))
    }

    /// Removes a layer, or says why not.
    fn remove_layer(&self, path: &Path) -> Result<Option<String>> {
        let io = |source| MergeError::io("remove", path, source);
        if place_of(path).map_err(io)? == Place::Device {
            return Ok(Some("it is a block device".into()));
        }
        let lock = match lock(path, Access::Write) {
            Ok(lock) => lock,
            Err(error) => return Ok(Some(error.found().to_owned())),
        };
        self.watch.step(Step::Remove(path.to_owned()));
        durable::remove_file(path).map_err(io)?;
        drop(lock);
        Ok(None)
    }
}
