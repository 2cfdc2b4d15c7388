//! The merge of frozen layers under a VM that runs, by QEMU's own commit, with the same plan and promises.
//!
//! ```text
//!  plan ▶ record ▶ block-commit ▶ pending ▶ bitmaps, one transaction ▶ finalize ▶ read the file ▶ layers removed
//!                   │ no room: it stands still, and goes on when there is some
//! ```
//! Until the job is finalized the disk is read through the merged layers, whatever the base has. QEMU's bitmaps of
//! the base record what the commit writes, so they name at least what the merged layers' do; those that began above
//! the base are made in it from the layers' own. QEMU calls a job complete whether it could store bitmaps or not:
//! only the file says that, and it is read once the base is read-only again. The guest writes to the active layer all
//! the time, which is not looked at.
//!
//! | killed | then |
//! |---|---|
//! | this program | the job stands at *pending* at the latest; the same command goes on with it |
//! | QEMU, before the job was finalized | [`recover`](crate::recover()) forgets the merge; bitmaps of the base that were not saved are named |
//! | QEMU, after that | it proves the base and removes the layers, or names what was lost and keeps them |
//!
//! # Invariants
//! * No layer is removed before the base's *file* was found to have the data and the bitmaps.
//! * A bitmap that could not be kept is named, and the layers that have its bits stay.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use stead_qcow2::LayerFormat;
use stead_sys::durable::Existing;
use stead_sys::space;
use stead_vmm::Qmp;
use stead_vmm::block_jobs::{self, BitmapChange, Commit, Job, JobState, Node, Order};

use crate::bitmaps::{Becomes, text};
use crate::error::{Kind, MergeError, Result, vm};
use crate::event::{Event, Step, Watch};
use crate::layers::identity;
use crate::plan::{MergePlan, MergeRequest, think};
use crate::prove::Proof;
use crate::record::{Phase, Record, RecordedLayer, record_path, remove_unfinished};
use crate::run::{Going, extend};
use crate::space::{Place, place_of};

/// How often the job is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long a job may take to end once it was told to.
const END_WITHIN: Duration = Duration::from_secs(120);
/// A job is paused when its file system has less free than this, in bytes.
const LOW_BYTES: u64 = 32 << 20;
/// How much longer than asked a device is made when it was too short all the same, in bytes.
const MORE_BYTES: u64 = 256 << 20;

/// What a live merge did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LiveReport {
    /// What was planned, and done; none where an earlier command had begun it.
    pub plan: Option<MergePlan>,
    /// Merged layers that were removed.
    pub removed: Vec<std::path::PathBuf>,
    /// Merged layers that are still there, which nothing needs any more.
    pub kept: Vec<std::path::PathBuf>,
}

/// Merges under the VM whose QMP socket is `qmp`, or goes on with what an earlier call has begun there.
///
/// # Durability
/// When this returns `Ok`, the base is synced and read-only again, and what it says was read from its file.
///
/// # Errors
/// When it is refused, cancelled, or the job fails: the chain is as it was. When a bitmap was lost: the error names
/// it, the disk is right, and the merged layers stay.
pub fn run_live(request: &MergeRequest, qmp: &Path, watch: Watch<'_>) -> Result<LiveReport> {
    let mut qmp = block_jobs::connect(qmp).map_err(|error| vm("reach the VM", error))?;
    watch.step(Step::Plan);
    if let Some((path, record)) = begun(request)? {
        let going = Going {
            record,
            path,
            watch,
        };
        let live = Live::new(going, request, None)?;
        if live.is_under_way(&mut qmp)? {
            return live.go_on(&mut qmp);
        }
        live.begin_anew(&mut qmp)?;
    }
    let request = MergeRequest {
        live: true,
        ..request.clone()
    };
    let mut thought = think(&request)?;
    if extend(&request, &thought.plan, watch)? {
        thought = think(&request)?;
    }
    thought.plan.require_allowed()?;
    watch.go_on("merge")?;
    let base = thought.layers.base_file().path.clone();
    let mut record = Record::of(&thought.layers, &thought.plan, request.keep_layers)?;
    record.live = true;
    let going = Going {
        record,
        path: record_path(&base, &request.records)?,
        watch,
    };
    let live = Live::new(going, &request, Some(thought.plan))?;
    let nodes = live.nodes(&mut qmp)?;
    watch.step(Step::Record);
    remove_unfinished(&live.going.path)?;
    live.going.record.write(&live.going.path, Existing::Keep)?;
    live.start(&mut qmp, &nodes)?;
    live.go_on(&mut qmp)
}

/// The live merge that an earlier call has begun.
fn begun(request: &MergeRequest) -> Result<Option<(std::path::PathBuf, Record)>> {
    let found = crate::record::find(&request.chain, &request.records)?;
    Ok(found.into_iter().find(|(_, record)| record.live))
}

/// The nodes of a chain.
struct Nodes {
    active: String,
    base: String,
    /// The topmost first.
    merged: Vec<String>,
}

struct Live<'a> {
    going: Going<'a>,
    request: &'a MergeRequest,
    plan: Option<MergePlan>,
    job: String,
}

/// What the waiting came to.
enum Waited {
    /// The data is in the base.
    Pending,
    /// It has ended, with this error.
    Ended(Option<String>),
}

impl<'a> Live<'a> {
    fn new(going: Going<'a>, request: &'a MergeRequest, plan: Option<MergePlan>) -> Result<Self> {
        let base = going.record.base_path();
        let (device, inode) =
            identity(&base).map_err(|source| MergeError::io("find", &base, source))?;
        Ok(Self {
            going,
            request,
            plan,
            job: format!("stead-merge-{device:x}-{inode:x}"),
        })
    }

    fn nodes(&self, qmp: &mut Qmp) -> Result<Nodes> {
        let all = block_jobs::nodes(qmp).map_err(|error| vm("list the VM's disks", error))?;
        let record = &self.going.record;
        Ok(Nodes {
            active: node_of(&all, &record.layers[0])?.name.clone(),
            base: node_of(&all, &record.layers[record.base])?.name.clone(),
            merged: record
                .merged()
                .iter()
                .map(|layer| Ok(node_of(&all, layer)?.name.clone()))
                .collect::<Result<_>>()?,
        })
    }

    fn start(&self, qmp: &mut Qmp, nodes: &Nodes) -> Result<()> {
        self.going.watch.step(Step::Commit);
        let backing = self.going.record.backing.as_ref();
        let backing = backing.map(|(name, _)| text(name));
        let commit = Commit {
            id: &self.job,
            active: &nodes.active,
            top: &nodes.merged[0],
            base: &nodes.base,
            backing_file: backing.as_deref(),
            bytes_per_second: self.request.bytes_per_second,
        };
        let Err(error) = block_jobs::start_commit(qmp, &commit) else {
            return Ok(());
        };
        let read_only = error.to_string().contains("read-only");
        self.going.forget()?;
        let failed = vm("start the commit", error);
        Err(match read_only {
            true => failed.next(
                "QEMU has the layers open in a way that forbids to write to them: let it find them by the images' \
                 headers, or with auto-read-only=on; a sandbox of stead's own has `stead compact`",
            ),
            false => failed,
        })
    }

    /// Whether this VM has come further than the record of what an earlier call wanted.
    fn is_under_way(&self, qmp: &mut Qmp) -> Result<bool> {
        let all = block_jobs::nodes(qmp).map_err(|error| vm("list the VM's disks", error))?;
        node_of(&all, &self.going.record.layers[0])?;
        Ok(self.look(qmp)?.is_some() || self.going.is_rewired()?)
    }

    /// An earlier call died before QEMU had begun, or QEMU did before it had ended: the disk is as it was.
    fn begin_anew(&self, qmp: &mut Qmp) -> Result<()> {
        self.nodes(qmp)?;
        let lost = self.lost_bitmaps()?;
        if !lost.is_empty() {
            self.going.watch.notice(named(&lost));
        }
        self.going.forget()
    }

    /// From wherever the job is to the end.
    fn go_on(mut self, qmp: &mut Qmp) -> Result<LiveReport> {
        if self.look(qmp)?.is_some() {
            match self.wait(qmp)? {
                Waited::Pending => self.finalize(qmp)?,
                Waited::Ended(error) => self.conclude(qmp, error)?,
            }
        }
        if !self.going.is_rewired()? {
            let why = "QEMU ended the job, and the layer above does not name the base";
            return Err(MergeError::new(Kind::Conflict, ATTEMPT, why)
                .left("the disk is read through all its layers, as before")
                .next(format!("stop the VM and {}", self.going.recover_with())));
        }
        // Once it is proven layers may be gone, and the proof with them.
        if self.going.record.phase == Phase::Begun {
            self.prove()?;
        }
        let (removed, kept) = self.going.end(None, Vec::new())?;
        Ok(LiveReport {
            plan: self.plan,
            removed,
            kept,
        })
    }

    fn look(&self, qmp: &mut Qmp) -> Result<Option<Job>> {
        block_jobs::job(qmp, &self.job).map_err(|error| self.interrupted("look at the job", error))
    }

    fn tell(&self, qmp: &mut Qmp, order: Order) -> Result<()> {
        block_jobs::tell_job(qmp, &self.job, order)
            .map_err(|error| self.interrupted("tell the job what to do", error))
    }

    fn wait(&self, qmp: &mut Qmp) -> Result<Waited> {
        let mut room = Room::new(self);
        loop {
            let Some(job) = self.look(qmp)? else {
                return Ok(Waited::Ended(Some("it is gone".to_owned())));
            };
            let progress = Event::Progress {
                done: job.done,
                total: job.total,
            };
            (self.going.watch.tell)(progress);
            match job.state {
                JobState::Pending => return Ok(Waited::Pending),
                JobState::Concluded => return Ok(Waited::Ended(job.error)),
                JobState::Null => return Ok(Waited::Ended(None)),
                JobState::Running | JobState::Paused | JobState::Standby | JobState::Ready => {
                    if let Err(wish) = self.going.watch.go_on("merge") {
                        return self.cancel(qmp, wish);
                    }
                    room.look(qmp, &job)?;
                }
                JobState::Created | JobState::Waiting | JobState::Aborting | JobState::Other(_) => {
                }
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Until it is finalized a job can be ended as if it had not been: what the base has is hidden.
    fn cancel<T>(&self, qmp: &mut Qmp, wish: MergeError) -> Result<T> {
        self.tell(qmp, Order::Cancel)?;
        let ended = self.wait_concluded(qmp)?;
        if ended.is_some() {
            self.tell(qmp, Order::Dismiss)?;
        }
        let lost = self.lost_bitmaps()?;
        self.going.forget()?;
        let left = "the disk is read through all its layers, as before; the base's bitmaps name what was written to it, too";
        Err(match lost.is_empty() {
            true => wish.left(left),
            false => wish.left(format!(
                "the disk is read through all its layers, as before; {}",
                named(&lost)
            )),
        })
    }

    fn wait_concluded(&self, qmp: &mut Qmp) -> Result<Option<Job>> {
        let begun = Instant::now();
        loop {
            let job = self.look(qmp)?;
            let is_over = job
                .as_ref()
                .is_none_or(|job| job.state == JobState::Concluded || job.state == JobState::Null);
            if is_over {
                return Ok(job);
            }
            if begun.elapsed() > END_WITHIN {
                let found = format!("the job did not end within {} s", END_WITHIN.as_secs());
                return Err(MergeError::new(Kind::Vm, ATTEMPT, found)
                    .left("the disk is right either way")
                    .next("run it again"));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Makes the bitmaps, and then the commit count.
    fn finalize(&self, qmp: &mut Qmp) -> Result<()> {
        self.going.watch.step(Step::Bitmaps);
        let nodes = self.nodes(qmp)?;
        self.make_bitmaps(qmp, &nodes)?;
        self.going.watch.step(Step::Finalize);
        self.tell(qmp, Order::Finalize)?;
        let error = self.wait_concluded(qmp)?.and_then(|job| job.error);
        self.conclude(qmp, error)
    }

    /// Reads how it ended, and lets QEMU forget it.
    fn conclude(&self, qmp: &mut Qmp, error: Option<String>) -> Result<()> {
        if self.look(qmp)?.is_some() {
            self.tell(qmp, Order::Dismiss)?;
        }
        let Some(error) = error else {
            return Ok(());
        };
        let lost = self.lost_bitmaps()?;
        self.going.forget()?;
        Err(MergeError::new(Kind::Vm, ATTEMPT, error).left(format!(
            "the disk is read through all its layers, as before; {}",
            named(&lost)
        )))
    }

    fn make_bitmaps(&self, qmp: &mut Qmp, nodes: &Nodes) -> Result<()> {
        let all = block_jobs::nodes(qmp).map_err(|error| vm("list the VM's disks", error))?;
        let in_node = |node: &str, name: &str| {
            let node = all.iter().find(|one| one.name == node)?;
            node.bitmaps.iter().find(|bitmap| bitmap.name == name)
        };
        let names = self.going.record.bitmaps.iter();
        let names = names.map(|bitmap| (text(&bitmap.name), bitmap.becomes));
        let names: Vec<(String, Becomes)> = names.collect();
        let mut changes = Vec::new();
        for (name, becomes) in &names {
            let own = in_node(&nodes.base, name);
            let sources = nodes.merged.iter().filter_map(|node| {
                let found = in_node(node, name).filter(|bitmap| !bitmap.is_inconsistent)?;
                Some((node.as_str(), found.granularity_bytes))
            });
            let sources: Vec<(&str, u64)> = sources.collect();
            match (becomes, own, sources.first()) {
                (Becomes::Pruned | Becomes::Dropped, Some(_), _) => {
                    changes.push(BitmapChange::Remove(name));
                }
                (Becomes::Carried, None, Some((_, granularity_bytes))) => {
                    changes.push(BitmapChange::Add {
                        name,
                        granularity_bytes: *granularity_bytes,
                    });
                    let from = sources.iter().map(|(node, _)| (*node, name.as_str()));
                    changes.push(BitmapChange::Merge {
                        into: name,
                        from: from.collect(),
                    });
                }
                // The base's own have recorded all that was committed; what is made already is not made again.
                (
                    Becomes::Pruned
                    | Becomes::Dropped
                    | Becomes::Carried
                    | Becomes::Merged
                    | Becomes::Marked
                    | Becomes::Left,
                    _,
                    _,
                ) => {}
            }
        }
        block_jobs::change_bitmaps(qmp, &nodes.base, &changes).map_err(|error| {
            vm("make the bitmaps in the base", error)
                .left("the data is in the base and does not count yet; the disk is read as before")
                .next("run it again, or cancel the job in QEMU")
        })
    }

    /// Reads the base's file, which nobody writes to any more: data first, then what each bitmap says.
    fn prove(&self) -> Result<()> {
        self.going.watch.step(Step::Prove);
        let read = |error| {
            MergeError::engine("read the base back", error)
                .left("the disk is read through the base; all layers are there")
                .next("run it again")
        };
        let files: Vec<_> = self.going.record.layers[self.going.record.top..]
            .iter()
            .map(RecordedLayer::file)
            .collect();
        let proof = Proof {
            files: &files,
            base: self.going.record.base - self.going.record.top,
            bitmaps: &self.going.record.bitmaps,
            watch: self.going.watch,
        };
        if let Some(fault) = proof.data_fault_in_files().map_err(read)? {
            return Err(MergeError::new(Kind::Damaged, "read the base back", fault)
                .left("all layers are there; the VM reads the base already")
                .next("stop the VM, keep all layers, and see to the storage below the base"));
        }
        let lost = proof.bitmap_faults().map_err(read)?;
        if lost.is_empty() {
            return Ok(());
        }
        self.going.forget()?;
        Err(lost_error(&lost))
    }

    /// Bitmaps of the base that its file does not have as the guest's backups need them.
    fn lost_bitmaps(&self) -> Result<Vec<String>> {
        self.going.unsaved_bitmaps()
    }

    fn interrupted(&self, attempt: &str, source: stead_vmm::Error) -> MergeError {
        vm(attempt, source)
            .left("the disk is right whether the job goes on or not")
            .next(format!(
                "run it again while the VM runs; else {}",
                self.going.recover_with()
            ))
    }
}

/// The error of a merge whose data is whole and some bitmaps are not.
pub(crate) fn lost_error(lost: &[(String, &'static str)]) -> MergeError {
    let each: Vec<String> = lost
        .iter()
        .map(|(name, fault)| format!("{name:?} {fault}"))
        .collect();
    let found = format!(
        "bitmaps were lost on the way into the base: {}",
        each.join(", ")
    );
    MergeError::new(Kind::Damaged, "read the bitmaps of the base back", found)
        .left("the data is merged and right; the merged layers are still there, with their bitmaps; nothing needs them for the disk")
        .next("make a full backup of this disk, and remove these bitmaps in all its layers")
}

fn named(lost: &[String]) -> String {
    match lost.is_empty() {
        true => "its bitmaps are there".to_owned(),
        false => format!(
            "bitmaps of the base that were not saved and say nothing any more: {}",
            lost.join(", ")
        ),
    }
}

const ATTEMPT: &str = "merge under the running VM";

/// The node that reads and writes a layer's format.
fn node_of<'a>(all: &'a [Node], layer: &RecordedLayer) -> Result<&'a Node> {
    let file = layer.file();
    let io = |source| MergeError::io("find", &file.path, source);
    let wanted = identity(&file.path).map_err(io)?;
    let driver = match file.format {
        LayerFormat::Qcow2 => "qcow2",
        LayerFormat::Raw => "raw",
    };
    let is_it = |node: &&Node| {
        let own = node.file.as_deref().and_then(|path| identity(path).ok());
        node.driver == driver && own == Some(wanted)
    };
    all.iter().find(is_it).ok_or_else(|| {
        let found = format!("the VM does not have {} open", file.path.display());
        MergeError::new(Kind::Usage, ATTEMPT, found)
            .next("give the QMP socket of the VM that runs on this disk")
    })
}

/// Watches the room while the job writes.
struct Room<'a, 'b> {
    live: &'a Live<'b>,
    /// We have paused it.
    paused: bool,
    told: bool,
    extended: u64,
}

impl<'a, 'b> Room<'a, 'b> {
    fn new(live: &'a Live<'b>) -> Self {
        Self {
            live,
            paused: false,
            told: false,
            extended: 0,
        }
    }

    fn look(&mut self, qmp: &mut Qmp, job: &Job) -> Result<()> {
        let base = self.live.going.record.base_path();
        let io = |source| MergeError::io("find the room for", &base, source);
        let failed = |error| self.live.interrupted("let the job go on", error);
        let short = block_jobs::lacks_room(qmp, &self.live.job).map_err(failed)?;
        if place_of(&base).map_err(io)? == Place::Device {
            if short {
                self.extend(&base)?;
                block_jobs::try_again(qmp, &self.live.job).map_err(failed)?;
            }
            return Ok(());
        }
        let free = space::available_bytes(&base).map_err(io)?;
        let left = job.total.saturating_sub(job.done);
        let is_low = free < LOW_BYTES && free < left;
        if short || (self.paused && is_low) || (is_low && job.state == JobState::Running) {
            self.tell_once(&base, free);
        }
        if short && !is_low {
            block_jobs::try_again(qmp, &self.live.job).map_err(failed)?;
            self.told = false;
        } else if is_low && !self.paused && !short {
            self.live.tell(qmp, Order::Pause)?;
            self.paused = true;
        } else if self.paused && !is_low {
            self.live.tell(qmp, Order::Resume)?;
            (self.paused, self.told) = (false, false);
        }
        Ok(())
    }

    fn tell_once(&mut self, base: &Path, free: u64) {
        if !self.told {
            self.told = true;
            self.live.going.watch.notice(format!(
                "the merge stands still: {free} bytes are free where {} lies; it goes on when there is room, Ctrl-C ends it",
                base.display()
            ));
        }
    }

    fn extend(&mut self, device: &Path) -> Result<()> {
        let Some(command) = &self.live.request.extend_cmd else {
            self.tell_once(device, 0);
            return Ok(());
        };
        let now = crate::space::device_bytes(device)
            .map_err(|source| MergeError::io("measure", device, source))?;
        self.extended = now.max(self.extended).saturating_add(MORE_BYTES);
        self.live.going.watch.step(Step::Extend);
        crate::run::extend_to(command, device, self.extended)
    }
}
