//! A merge that was interrupted: finished where its proof holds, else undone.

use std::path::{Path, PathBuf};

use serde::Serialize;
use stead_qcow2::edit::{self, JournalFiles, Recovery};
use stead_qcow2::{Layer, LayerFormat};

use stead_sys::image_lock::Access;

use crate::bitmaps::{Becomes, text};
use crate::error::{Kind, MergeError, Result};
use crate::event::{Step, Watch};
use crate::layers::Layers;
use crate::open::{Opened, editor, lock};
use crate::record::{Phase, RecordedLayer, find, record_path, remove_unfinished};
use crate::run::Going;

/// How a recovery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// No merge was going on.
    NothingToDo,
    /// The merge is finished.
    Finished,
    /// The chain is as it was before; the merge can be run again.
    Undone,
}

/// What a recovery did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Recovered {
    /// How it ended.
    pub outcome: Outcome,
    /// The base of the merge.
    pub base: PathBuf,
    /// Why it was undone.
    pub why: Option<String>,
    /// Bitmaps of the base that were not saved, and say nothing any more.
    pub lost_bitmaps: Vec<String>,
    /// Merged layers that are gone.
    pub removed: Vec<PathBuf>,
    /// Merged layers that are still there.
    pub kept: Vec<PathBuf>,
}

/// Finishes or undoes the merges that `path` takes part in; a folder stands for all images in it. `records` is where
/// records of merges into block devices are kept.
///
/// # Durability
/// When this returns `Ok`, everything is synced.
///
/// # Errors
/// When a file is in use, or cannot be read or written. It can be called again.
pub fn recover(path: &Path, records: &Path, watch: Watch<'_>) -> Result<Vec<Recovered>> {
    let found = find(path, records)?;
    if found.is_empty() {
        return Ok(vec![without_record(path, records)?]);
    }
    let each = found.into_iter().map(|(path, record)| {
        let mut going = Going {
            record,
            path,
            watch,
        };
        let done = going.recover()?;
        remove_unfinished(&going.path)?;
        Ok(done)
    });
    each.collect()
}

/// The engine's own change of a single image, and what was begun of a record.
fn without_record(path: &Path, records: &Path) -> Result<Recovered> {
    let mut outcome = Outcome::NothingToDo;
    if path.exists() && !path.is_dir() {
        // An image that is in use is refused here, so nobody is writing its record.
        outcome = match recover_image(path, &JournalFiles::Nothing)? {
            Recovery::NothingToDo => Outcome::NothingToDo,
            Recovery::Finished => Outcome::Finished,
        };
        remove_unfinished(&record_path(path, records)?)?;
    }
    Ok(Recovered {
        outcome,
        base: path.to_owned(),
        why: None,
        lost_bitmaps: Vec::new(),
        removed: Vec::new(),
        kept: Vec::new(),
    })
}

/// Finishes the engine's own change of one image, which may need no file but `files`: an image may be anybody's, and a
/// record is ours.
fn recover_image(path: &Path, files: &JournalFiles) -> Result<Recovery> {
    edit::recover(path, files).map_err(|error| {
        MergeError::engine("finish the change of an image", error).left("everything is as it was")
    })
}

impl Going<'_> {
    fn recover(&mut self) -> Result<Recovered> {
        self.finish_changes()?;
        if self.record.live && self.record.child().is_none() {
            return self.recover_active();
        }
        if self.record.live && self.record.phase == Phase::Begun {
            return self.recover_live();
        }
        if self.is_rewired()? || self.removal_began() {
            let child = self.record.child().map(|child| editor(&child.file().path));
            return self.go_on(child.transpose()?, Vec::new());
        }
        if let Some(why) = self.other_chain()? {
            return self.undo(why);
        }
        let layers = self.layers()?;
        let voids = self.record.bitmaps.iter().any(|bitmap| bitmap.void_above);
        let opened = Opened::open(&layers, voids)?;
        self.watch.step(Step::Prove);
        match self.fault(&opened)? {
            Some(why) => self.undo(why),
            None => {
                let (child, above) = opened.into_above();
                self.go_on(child, above)
            }
        }
    }

    /// A merge of a VM whose QEMU is gone: finished if its layer above names the base already.
    fn recover_live(&mut self) -> Result<Recovered> {
        if !self.is_rewired()? {
            let why = "QEMU ended before the layer above named the base".to_owned();
            return self.undo(why);
        }
        let files: Vec<_> = self.record.layers[self.record.top..]
            .iter()
            .map(RecordedLayer::file)
            .collect();
        let proof = crate::prove::Proof {
            files: &files,
            base: self.record.base - self.record.top,
            bitmaps: &self.record.bitmaps,
            watch: self.watch,
        };
        self.watch.step(Step::Prove);
        let read =
            |error| MergeError::engine("read the base back", error).left("all layers are there");
        if let Some(fault) = proof.data_fault_in_files().map_err(read)? {
            return Err(MergeError::new(Kind::Damaged, "read the base back", fault)
                .left("all layers are there; the layer above names the base")
                .next("keep all layers, and see to the storage below the base"));
        }
        let lost = proof.bitmap_faults().map_err(read)?;
        if lost.is_empty() {
            return self.go_on(None, Vec::new());
        }
        self.forget()?;
        let kept = self.record.merged().iter().map(|layer| layer.file().path);
        Ok(Recovered {
            outcome: Outcome::Finished,
            base: self.record.base_path(),
            why: Some("bitmaps were lost; the merged layers are kept with theirs".to_owned()),
            lost_bitmaps: lost.into_iter().map(|(name, _)| name).collect(),
            removed: Vec::new(),
            kept: kept.collect(),
        })
    }

    /// A merge of a VM's active layer, whose QEMU is gone. From the moment that the record says so the base is the
    /// disk: it had all that the active layer had, and may have been written to since, so nothing is compared.
    fn recover_active(&mut self) -> Result<Recovered> {
        if self.record.phase == Phase::Begun {
            let why = "QEMU ended before the disk was switched to the base".to_owned();
            return self.undo(why);
        }
        self.watch.step(Step::Prove);
        let base = self.record.layers[self.record.base].file();
        let _in_use_by_nobody = match base.format {
            LayerFormat::Raw => Some(lock(&base.path, Access::Write)?),
            LayerFormat::Qcow2 => {
                self.require_whole(&base.path)?;
                None
            }
        };
        let lost_bitmaps = self.lost_since_switched()?;
        let mut done = self.go_on(None, Vec::new())?;
        done.lost_bitmaps = lost_bitmaps;
        Ok(done)
    }

    fn require_whole(&self, base: &Path) -> Result<()> {
        let corruptions = editor(base)?.check().corruptions;
        if corruptions == 0 {
            return Ok(());
        }
        let found = format!("a check of the base has {corruptions} findings");
        Err(MergeError::new(Kind::Damaged, "read the base back", found)
            .left("all layers are there; the disk is the base, and may be newer than they are")
            .next("keep all layers, and see to the storage below the base"))
    }

    /// Bitmaps that the base was to have, and that its file does not have so that a backup can go on with them.
    fn lost_since_switched(&self) -> Result<Vec<String>> {
        let file = self.record.layers[self.record.base].file();
        if file.format == LayerFormat::Raw {
            return Ok(Vec::new());
        }
        let stored = Layer::inspect(&file.path).and_then(|layer| layer.stored_bitmaps());
        let stored = stored.map_err(|error| MergeError::engine("read bitmaps", error))?;
        let was_to_be = self.record.bitmaps.iter().filter(|bitmap| {
            matches!(
                bitmap.becomes,
                Becomes::Merged | Becomes::Carried | Becomes::Marked
            )
        });
        let is_usable = |name: &[u8]| stored.iter().any(|own| own.name == name && !own.in_use);
        let lost = was_to_be.filter(|bitmap| !is_usable(&bitmap.name));
        Ok(lost.map(|bitmap| text(&bitmap.name)).collect())
    }

    /// Bitmaps of the base that were to be usable and are marked as not saved.
    pub fn unsaved_bitmaps(&self) -> Result<Vec<String>> {
        let file = self.record.layers[self.record.base].file();
        if file.format == LayerFormat::Raw {
            return Ok(Vec::new());
        }
        let stored = Layer::inspect(&file.path).and_then(|layer| layer.stored_bitmaps());
        let stored = stored.map_err(|error| MergeError::engine("read bitmaps", error))?;
        let unsaved = self.record.bitmaps.iter().filter(|bitmap| {
            let left = bitmap.becomes == Becomes::Left;
            !left
                && stored
                    .iter()
                    .any(|own| own.name == bitmap.name && own.in_use)
        });
        Ok(unsaved.map(|bitmap| text(&bitmap.name)).collect())
    }

    /// Finishes what the engine has begun in an image.
    fn finish_changes(&self) -> Result<()> {
        let raw = self.record.layers[self.record.base].file().format == LayerFormat::Raw;
        let target = if raw {
            self.record.top
        } else {
            self.record.base
        };
        let files = self.record.layers.iter().map(|layer| layer.file().path);
        let files = JournalFiles::Listed(files.collect());
        for (index, layer) in self.record.layers.iter().enumerate() {
            let changed = index == target || index < self.record.top;
            if changed && layer.is_there()? {
                recover_image(&layer.file().path, &files)?;
            }
        }
        Ok(())
    }

    pub fn is_rewired(&self) -> Result<bool> {
        let (Some(child), Some((name, _))) = (self.record.child(), &self.record.backing) else {
            return Ok(false);
        };
        let path = child.file().path;
        let layer = Layer::inspect(&path);
        let layer = layer.map_err(|error| MergeError::engine("read the layer above", error))?;
        let backing = layer.header().backing.as_ref();
        Ok(backing.is_some_and(|backing| backing.name == *name))
    }

    /// Without a child, removing the layers is what comes after the proof, the top first.
    fn removal_began(&self) -> bool {
        self.record.phase == Phase::Proven
            && self.record.child().is_none()
            && self.record.layers[self.record.top].is_gone()
    }

    fn layers(&self) -> Result<Layers> {
        let file = |index: usize| self.record.layers[index].file().path;
        Layers::read(
            &file(0),
            Some(&file(self.record.top)),
            Some(&file(self.record.base)),
        )
    }

    /// Why the chain is not the one of the record any more.
    fn other_chain(&self) -> Result<Option<String>> {
        for layer in &self.record.layers {
            if !layer.is_there()? {
                let path = layer.file().path;
                return Ok(Some(format!(
                    "{} is not the file that it was",
                    path.display()
                )));
            }
        }
        let recorded = self.record.layers.iter().map(RecordedLayer::file);
        let same = match self.layers() {
            Ok(layers) => recorded.eq(layers.files.iter().cloned()),
            Err(error) if error.kind() == Kind::Usage => false,
            Err(error) => return Err(error),
        };
        Ok((!same).then(|| "the chain has other layers now".to_owned()))
    }

    fn go_on(
        &mut self,
        child: Option<stead_qcow2::edit::Editor>,
        above: Vec<stead_qcow2::edit::Editor>,
    ) -> Result<Recovered> {
        let (removed, kept) = self.end(child, above)?;
        Ok(Recovered {
            outcome: Outcome::Finished,
            base: self.record.base_path(),
            why: None,
            lost_bitmaps: Vec::new(),
            removed,
            kept,
        })
    }

    fn undo(&self, why: String) -> Result<Recovered> {
        self.forget()?;
        let kept = self.record.merged().iter().map(|layer| layer.file().path);
        Ok(Recovered {
            outcome: Outcome::Undone,
            base: self.record.base_path(),
            why: Some(why),
            lost_bitmaps: self.unsaved_bitmaps()?,
            removed: Vec::new(),
            kept: kept.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Record;

    #[test]
    fn an_error_names_what_was_tried_what_stands_and_what_to_do() {
        let path = Path::new("/nowhere/at/all.qcow2");
        let nothing = recover(
            path,
            Path::new("/nowhere"),
            Watch {
                tell: &|_| {},
                cancel: None,
            },
        );
        assert_eq!(
            nothing.expect("no record").first().map(|one| one.outcome),
            Some(Outcome::NothingToDo)
        );
        assert!(Record::read(path).is_err_and(|error| error.kind() == Kind::NotFound));
    }
}
