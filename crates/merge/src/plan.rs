//! What a merge would do, what it needs, and why it is refused. Nothing is written.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use stead_qcow2::ops::commit::{self, CommitOptions, CommitReport, Incomplete, LongerBase};
use stead_qcow2::{Control, LayerFormat};

use crate::bitmaps::{BitmapInLayer, Bitmaps, Verdict, text};
use crate::error::{Kind, MergeError, Result};
use crate::layers::{Layers, Role};
use crate::open;
use crate::record::record_path;
use crate::running::Running;
use crate::siblings;
use crate::space::{Place, Space};

mod live;
mod room;

/// What becomes of bitmaps of the base that no layer above has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StalePolicy {
    /// They are removed.
    #[default]
    Prune,
    /// They stay, with all that the merge changes marked in them.
    Keep,
    /// The merge is refused.
    Refuse,
}

/// What is to be merged, and how.
#[derive(Debug, Clone, Default)]
pub struct MergeRequest {
    /// The active layer; those below are found by the names in the images.
    pub chain: PathBuf,
    /// The topmost layer that is merged, by file or number; the active one if nothing is said.
    pub top: Option<PathBuf>,
    /// What is merged into, by file or number; the layer below the top if nothing is said.
    pub base: Option<PathBuf>,
    /// What becomes of stale bitmaps.
    pub stale: StalePolicy,
    /// Merged layers are not removed.
    pub keep_layers: bool,
    /// A base that is longer than what the chain shows is cut to that.
    pub cut_base: bool,
    /// Go on although bitmaps are lost that could be relied on.
    pub drop_bitmaps: bool,
    /// Folders that are searched for other children, besides those of the layers.
    pub look_in: Vec<PathBuf>,
    /// Images that are asked, with all below them, whether they stand on what is changed.
    pub siblings: Vec<PathBuf>,
    /// Run by `sh` with a device and its length in bytes, when the device is too short.
    pub extend_cmd: Option<String>,
    /// Where records of merges into block devices are kept.
    pub records: PathBuf,
    /// The QMP socket of the VM that has the chain open: its QEMU is to do it ([`crate::run_live()`]).
    pub qmp: Option<PathBuf>,
    /// The most bytes a second that a live merge moves; 0 for as fast as can be.
    pub bytes_per_second: u64,
}

/// A layer, as the plan shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LayerInfo {
    /// 0 is the active layer.
    pub index: usize,
    /// Its file.
    pub file: PathBuf,
    /// `qcow2` or `raw`.
    pub format: &'static str,
    /// What it is in this merge.
    pub role: Role,
    /// The length of its disk, in bytes.
    pub virtual_bytes: u64,
    /// What the file takes on its file system, in bytes.
    pub file_bytes: u64,
    /// Its bitmaps.
    pub bitmaps: Vec<BitmapInLayer>,
}

/// Where other children were looked for: others are not seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Searched {
    /// The folders.
    pub folders: Vec<PathBuf>,
    /// How many images there were asked.
    pub images: u64,
    /// Images that could not be asked, and why.
    pub unreadable: Vec<(PathBuf, String)>,
}

/// A reason against the merge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Refusal {
    /// Its class.
    pub kind: Kind,
    /// The reason.
    pub reason: String,
    /// What to do about it.
    pub next: Option<String>,
}

/// What a merge would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MergePlan {
    /// All layers, the active one first.
    pub layers: Vec<LayerInfo>,
    /// What becomes of each bitmap of the base and the merged layers; empty where that could not be found.
    pub bitmaps: Vec<Verdict>,
    /// How many bytes of the disk the merged layers define.
    pub data_bytes: u64,
    /// The room that each file needs, the base first.
    pub space: Vec<Space>,
    /// Where other children were looked for.
    pub searched: Searched,
    /// Why it is refused; empty when it is not.
    pub refused: Vec<Refusal>,
}

impl MergePlan {
    /// The first reason against it, as an error.
    ///
    /// # Errors
    /// When it is refused.
    pub fn require_allowed(&self) -> Result<()> {
        let Some(first) = self.refused.first() else {
            return Ok(());
        };
        let mut found = first.reason.clone();
        if let more @ 1.. = self.refused.len() - 1 {
            found.push_str(&format!(" (and {more} more, see `stead merge plan`)"));
        }
        let error = MergeError::new(first.kind, "merge", found);
        Err(match &first.next {
            Some(next) => error.next(next.clone()),
            None => error,
        })
    }

    /// The devices that are too short, and how long they must be.
    pub(crate) fn short_devices(&self) -> Vec<&Space> {
        let short = |space: &&Space| space.place == Place::Device && !space.is_there();
        self.space.iter().filter(short).collect()
    }
}

/// What was decided, with what the run needs of it.
pub(crate) struct Thought {
    pub layers: Layers,
    pub plan: MergePlan,
    pub options: CommitOptions,
    /// Free bytes that the base must leave for the child.
    pub left: u64,
    before: Vec<Stamp>,
    bitmaps: Bitmaps,
}

/// What changes with every write to a file.
type Stamp = (u64, u64, i64, i64);

fn stamps(layers: &Layers) -> Result<Vec<Stamp>> {
    let stamp = |path: &Path| {
        let found = fs::metadata(path).map_err(|source| MergeError::io("look at", path, source))?;
        Ok((found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
    };
    layers.files.iter().map(|file| stamp(&file.path)).collect()
}

impl Thought {
    /// An error when a file is not what it was when the plan was made. Called under the locks.
    pub fn require_unchanged(&self, request: &MergeRequest) -> Result<()> {
        let now = Layers::read(
            &request.chain,
            request.top.as_deref(),
            request.base.as_deref(),
        )?;
        let bitmaps = Bitmaps::read(&now, None).map_err(open::engine)?;
        let same = now.files == self.layers.files && bitmaps == self.bitmaps;
        if same && stamps(&now)? == self.before {
            return Ok(());
        }
        let found = "a layer was changed while the plan was made";
        Err(MergeError::new(Kind::Conflict, "merge", found).next("run it again"))
    }
}

/// Says what a merge would do.
///
/// # Errors
/// When the chain cannot be read, or the layers that are named do not make a merge. What stands against a merge
/// otherwise is in the plan.
pub fn plan(request: &MergeRequest) -> Result<MergePlan> {
    let Some(socket) = &request.qmp else {
        return Ok(think(request, None)?.plan);
    };
    let mut qmp = crate::live::connect(socket)?;
    let running = Running::ask(&mut qmp, &request.chain)?;
    Ok(think(request, Some(&running))?.plan)
}

/// As [`plan`]; `running` is what the VM says that is to do it.
pub(crate) fn think(request: &MergeRequest, running: Option<&Running>) -> Result<Thought> {
    let layers = Layers::read(
        &request.chain,
        request.top.as_deref(),
        request.base.as_deref(),
    )?;
    let before = stamps(&layers)?;
    let bitmaps = Bitmaps::read(&layers, running).map_err(open::engine)?;
    let (chosen, stale) = bitmaps.choose(request.stale);
    let options = CommitOptions {
        base: layers.base - layers.top,
        empty_top: false,
        longer_base: match request.cut_base {
            true => LongerBase::Cut,
            false => LongerBase::Refuse,
        },
        incomplete: Incomplete::Mark,
        chosen,
        ..CommitOptions::default()
    };
    let infos = (0..layers.files.len()).map(|index| info(&layers, (&bitmaps, running), index));
    let mut thinking = Thinking {
        request,
        plan: MergePlan {
            layers: infos.collect::<Result<_>>()?,
            bitmaps: Vec::new(),
            data_bytes: 0,
            space: Vec::new(),
            searched: Searched::default(),
            refused: Vec::new(),
        },
        layers: &layers,
        bitmaps: &bitmaps,
        options: &options,
    };
    thinking.record()?;
    thinking.stale(&stale);
    thinking.children()?;
    thinking.snapshots()?;
    thinking.length();
    let left = match running {
        Some(_) => {
            thinking.live();
            thinking.measure_live()?;
            0
        }
        None => thinking.measure()?,
    };
    Ok(Thought {
        plan: thinking.plan,
        layers,
        options,
        left,
        before,
        bitmaps,
    })
}

fn info(
    layers: &Layers,
    (bitmaps, running): (&Bitmaps, Option<&Running>),
    index: usize,
) -> Result<LayerInfo> {
    let file = &layers.files[index];
    let chain = layers.chain.below(index);
    let in_layer = |stored: &stead_qcow2::StoredBitmap| {
        let state = bitmaps.state(index, stored);
        BitmapInLayer {
            name: text(&stored.name),
            state,
            granularity_bytes: 1_u64
                .checked_shl(stored.granularity_bits.into())
                .unwrap_or(0),
            dirty_bytes: match running.filter(|_| index == 0) {
                Some(running) => running.dirty_bytes(&stored.name),
                None => stored_dirty_bytes(layers, index, stored),
            },
        }
    };
    let file_bytes = stead_sys::space::allocated_bytes(&file.path);
    Ok(LayerInfo {
        index,
        file: file.path.clone(),
        format: match file.format {
            LayerFormat::Raw => "raw",
            LayerFormat::Qcow2 => "qcow2",
        },
        role: layers.role(index),
        virtual_bytes: chain.map_or(0, |chain| chain.len()),
        file_bytes: file_bytes.map_err(|source| MergeError::io("look at", &file.path, source))?,
        bitmaps: bitmaps.of(index).iter().map(in_layer).collect(),
    })
}

/// How many bytes a bitmap has marked by what its file says.
fn stored_dirty_bytes(
    layers: &Layers,
    index: usize,
    stored: &stead_qcow2::StoredBitmap,
) -> Option<u64> {
    let bits = layers.chain.layer(index)?.read_bitmap(stored);
    bits.ok().map(|bits| bits.dirty_bytes())
}

struct Thinking<'a> {
    request: &'a MergeRequest,
    layers: &'a Layers,
    bitmaps: &'a Bitmaps,
    options: &'a CommitOptions,
    plan: MergePlan,
}

impl Thinking<'_> {
    fn refuse(&mut self, kind: Kind, reason: impl Into<String>, next: impl Into<String>) {
        self.plan.refused.push(Refusal {
            kind,
            reason: reason.into(),
            next: Some(next.into()),
        });
    }

    fn refuse_error(&mut self, error: &stead_qcow2::Error) {
        let refusal = Refusal {
            kind: Kind::of(error),
            reason: error.to_string(),
            next: stead_qcow2::next_step_after(error),
        };
        if !self.plan.refused.contains(&refusal) {
            self.plan.refused.push(refusal);
        }
    }

    fn record(&mut self) -> Result<()> {
        let base = &self.layers.base_file().path;
        let record = record_path(base, &self.request.records)?;
        if record.exists() {
            let base = base.display();
            self.refuse(
                Kind::Conflict,
                format!("an earlier merge into {base} was not ended"),
                format!("run `stead merge recover {base}`"),
            );
        }
        Ok(())
    }

    fn stale(&mut self, names: &[String]) {
        if !names.is_empty() {
            let names = names.join(", ");
            self.refuse(
                Kind::Conflict,
                format!("stale bitmaps in the base: {names}"),
                "use --stale prune to remove them, or --stale keep",
            );
        }
    }

    fn children(&mut self) -> Result<()> {
        let base = &self.layers.base_file().path;
        let found = siblings::find(self.layers, &self.request.look_in, &self.request.siblings);
        let found =
            found.map_err(|source| MergeError::io("look for other children of", base, source))?;
        for (image, layer) in &found.children {
            self.refuse(
                Kind::Conflict,
                format!(
                    "{} stands on {}, and would show other bytes or nothing afterwards",
                    image.display(),
                    layer.display()
                ),
                format!("rebase or remove {} first", image.display()),
            );
        }
        for sibling in &self.request.siblings {
            if let Some((_, why)) = found.unreadable.iter().find(|(path, _)| path == sibling) {
                self.refuse(
                    Kind::Conflict,
                    format!(
                        "whether {} stands on what is merged cannot be found: {why}",
                        sibling.display()
                    ),
                    "make it readable, or leave it out if it is no image",
                );
            }
        }
        self.plan.searched = Searched {
            folders: found.folders,
            images: found.images,
            unreadable: found.unreadable,
        };
        Ok(())
    }

    fn snapshots(&mut self) -> Result<()> {
        if self.request.keep_layers {
            return Ok(());
        }
        for index in self.layers.top..self.layers.base {
            let Some(layer) = self.layers.chain.layer(index) else {
                continue;
            };
            let snapshots = layer.internal_snapshots().map_err(open::engine)?;
            if !snapshots.is_empty() {
                let path = layer.path().display().to_string();
                self.refuse(
                    Kind::Conflict,
                    format!(
                        "{path} has {} internal snapshots, which would go with it",
                        snapshots.len()
                    ),
                    format!(
                        "delete them (stead img snapshot -d NAME {path}), or use --keep-layers"
                    ),
                );
            }
        }
        Ok(())
    }

    fn length(&mut self) {
        let length = |index: usize| {
            self.layers
                .chain
                .below(index)
                .map_or(0, |chain| chain.len())
        };
        let (top, base) = (length(self.layers.top), length(self.layers.base));
        if base > top && !self.request.cut_base {
            let name = self.layers.base_file().path.display().to_string();
            self.refuse(
                Kind::Conflict,
                format!("{name} has {base} bytes, and what is merged into it {top}"),
                "use --cut-base to cut off what the chain does not show",
            );
        }
    }

    /// The space and the bitmaps, from the commit's own plan: what the base must leave free for the child.
    fn measure(&mut self) -> Result<u64> {
        let child = self.child();
        let measured = commit::measure(self.layers.committed(), self.options, &Control::default());
        let report = match measured {
            Ok(report) => report,
            Err(error) => {
                // What is said already is not said again in other words.
                if self.plan.refused.is_empty() {
                    self.refuse_error(&error);
                }
                return Ok(0);
            }
        };
        self.plan.data_bytes = report.defined_bytes;
        self.verdicts(&report);
        self.space(&report, child)
    }

    fn verdicts(&mut self, report: &CommitReport) {
        let verdicts = report.bitmaps.iter();
        let verdicts = verdicts.map(|outcome| self.bitmaps.verdict(outcome, &self.options.chosen));
        self.decide(verdicts.collect());
    }

    /// Takes what becomes of each bitmap into the plan, and refuses to lose one unless that is wanted.
    fn decide(&mut self, verdicts: Vec<Verdict>) {
        self.plan.bitmaps = verdicts;
        let lost = self.plan.bitmaps.iter().filter(|verdict| verdict.lost);
        let lost: Vec<String> = lost
            .map(|one| format!("{} ({})", one.name, one.why))
            .collect();
        if !lost.is_empty() && !self.request.drop_bitmaps {
            self.refuse(
                Kind::Conflict,
                format!("bitmaps would be lost: {}", lost.join("; ")),
                "use --drop-bitmaps to go on without them; the next backup is a full one then",
            );
        }
    }
}
