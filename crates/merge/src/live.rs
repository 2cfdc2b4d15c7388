//! A merge under a VM that runs, by QEMU's own commit, with the same plan and promises.
//!
//! ```text
//!  plan ▶ record ▶ block-commit ─┬▶ pending ▶ bitmaps, one transaction ▶ finalize ▶ read the file ▶ layers removed
//!                   │            └▶ ready ▶ the switch, where the active layer is merged, too ─────▶ layers removed
//!                   │ no room: it stands still, and goes on when there is some
//! ```
//! Until the job is finalized the disk is read through the merged layers, whatever the base has. QEMU's bitmaps of
//! the base record what the commit writes, so they name at least what the merged layers' do; those that began above
//! the base are made in it from the layers' own. QEMU calls a job complete whether it could store bitmaps or not:
//! only the file says that, and it is read once the base is read-only again. The guest writes to the active layer all
//! the time; where that is merged, too, `switch.rs` has what is different.
//!
//! | killed | then |
//! |---|---|
//! | this program | the job stands at *pending* at the latest; the same command goes on with it |
//! | QEMU, before the job was finalized | [`recover`](crate::recover()) forgets the merge; bitmaps of the base that were not saved are named |
//! | QEMU, after that | it proves the base and removes the layers, or names what was lost and keeps them |
//!
//! # Invariants
//! * No frozen layer is removed before the base's *file* was found to have the data and the bitmaps. The active layer
//!   is removed when QEMU has switched the disk to the base: what the guest writes cannot be compared with anything.
//! * A bitmap that could not be kept is named, and the layers that have its bits stay.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use stead_sys::durable::Existing;
use stead_vmm::Qmp;
use stead_vmm::block_jobs::{self, Commit, Job, JobState, Order};

use crate::bitmaps::text;
use crate::error::{Kind, MergeError, Result, vm};
use crate::event::{Event, Step, Watch};
use crate::layers::identity;
use crate::plan::{MergePlan, MergeRequest, think};
use crate::prove::Proof;
use crate::record::{Phase, Record, RecordedLayer, record_path, remove_unfinished};
use crate::run::{Going, extend};
use crate::running::{self, Running, node_of};

mod bitmaps;
mod room;
mod switch;

use room::Room;

/// How often the job is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long a job may take to end once it was told to.
const END_WITHIN: Duration = Duration::from_secs(120);
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
    /// Bitmaps of the base that QEMU has in its memory and stores when it ends in order; none where the base is not
    /// what the guest writes to.
    pub held: Vec<String>,
}

/// Merges under the VM whose QMP socket the request names, or goes on with what an earlier call has begun there.
///
/// # Durability
/// When this returns `Ok`, the base is synced and read-only again, and what it says was read from its file. Where the
/// active layer was merged, the base had all of it on the disk when the VM was switched; its bitmaps are in QEMU's
/// memory until that ends in order.
///
/// # Errors
/// When it is refused, cancelled, or the job fails: the chain is as it was. When a bitmap was lost: the error names
/// it, the disk is right, and the merged layers stay.
pub fn run_live(request: &MergeRequest, watch: Watch<'_>) -> Result<LiveReport> {
    let Some(socket) = &request.qmp else {
        let found = "no VM is named that is to do it";
        return Err(MergeError::new(Kind::Usage, ATTEMPT, found));
    };
    let mut qmp = connect(socket)?;
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
    let running = Running::ask(&mut qmp, &request.chain)?;
    let mut thought = think(request, Some(&running))?;
    if extend(request, &thought.plan, watch)? {
        thought = think(request, Some(&running))?;
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
    let live = Live::new(going, request, Some(thought.plan))?;
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

/// The connection to the VM behind a socket.
pub(crate) fn connect(socket: &Path) -> Result<Qmp> {
    block_jobs::connect(socket).map_err(|error| vm("reach the VM", error))
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
    /// The base has what the active layer has, and gets what is written from now on, too.
    Ready,
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

    /// The layer that the guest writes to is merged, too: the base becomes the disk.
    fn is_active(&self) -> bool {
        self.going.record.top == 0
    }

    fn nodes(&self, qmp: &mut Qmp) -> Result<Nodes> {
        let all = running::nodes(qmp)?;
        let record = &self.going.record;
        Ok(Nodes {
            active: node_of(&all, &record.layers[0].file())?.name.clone(),
            base: node_of(&all, &record.layers[record.base].file())?
                .name
                .clone(),
            merged: record
                .merged()
                .iter()
                .map(|layer| Ok(node_of(&all, &layer.file())?.name.clone()))
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
            top: (!self.is_active()).then_some(nodes.merged[0].as_str()),
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
        let (all, record) = (running::nodes(qmp)?, &self.going.record);
        // The active layer may be closed by now, where it was merged, too.
        let open = if self.is_active() { record.base } else { 0 };
        node_of(&all, &record.layers[open].file())?;
        let is_over = match self.is_active() {
            true => record.phase != Phase::Begun,
            false => self.going.is_rewired()?,
        };
        Ok(self.look(qmp)?.is_some() || is_over)
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
                Waited::Ready => self.switch(qmp)?,
                Waited::Pending if self.is_active() => {
                    let nodes = self.nodes(qmp)?;
                    self.switch_held(qmp, &nodes)?;
                }
                Waited::Pending => self.finalize(qmp)?,
                Waited::Ended(error) => self.conclude(qmp, error)?,
            }
        }
        if self.is_active() {
            return self.end_switched(qmp);
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
            held: Vec::new(),
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
                    if job.state == JobState::Ready && self.is_active() {
                        return Ok(Waited::Ready);
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
        let left = self.left_as_before()?;
        self.going.forget()?;
        Err(wish.left(left))
    }

    /// What stands when the job has ended without having happened.
    fn left_as_before(&self) -> Result<String> {
        let disk = "the disk is read through all its layers, as before; the base's bitmaps name what was written to it, too";
        let unsaved = self.lost_bitmaps()?;
        Ok(match (unsaved.is_empty(), self.is_active()) {
            (true, _) => disk.to_owned(),
            (false, false) => format!("{disk}; {}", named(&unsaved)),
            // QEMU keeps the base open for writing, once it has been.
            (false, true) => format!(
                "{disk}; they are in QEMU's memory until it ends in order: {}",
                unsaved.join(", ")
            ),
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
        let left = self.left_as_before()?;
        self.going.forget()?;
        Err(MergeError::new(Kind::Vm, ATTEMPT, error).left(left))
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
