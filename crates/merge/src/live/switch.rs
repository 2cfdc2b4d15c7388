//! The switch of a VM from its active layer to the base.
//!
//! ```text
//!  ready ── complete ──▶ pending: QEMU holds the disk's requests; active layer and base have the same
//!                          bitmaps made in the base, and looked at
//!                          the record says *switched*, synced          ◀ from here on the base is the disk
//!                        ── finalize ──▶ the guest goes on, in the base
//! ```
//! Everything that was written before *pending* is in both, so a bitmap that is made there from the layers' own misses
//! nothing, and what is written afterwards the base's bitmaps record themselves. QEMU has flushed the base by then: if
//! it dies between the record and the switch, both are right, and if it dies behind it, only the base is.
//!
//! | killed | then |
//! |---|---|
//! | this program, before *pending* | the guest runs on, written to both; the same command goes on |
//! | this program, at *pending* | the guest waits for its disk until the same command goes on |
//! | QEMU, before the record says *switched* | the active layer is the disk, and [`recover`](crate::recover()) forgets the merge |
//! | QEMU, after that | the base is the disk; `recover` removes the layers, and names bitmaps that were not saved |
//!
//! # Invariants
//! * The record never says *switched* while QEMU may write to the active layer, but where it refused the switch.
//! * At *pending* nothing waits but for QEMU and for the record to be synced.

use std::time::{Duration, Instant};

use stead_sys::durable::Existing;
use stead_vmm::Qmp;
use stead_vmm::block_jobs::{self, JobState, Order};

use super::{ATTEMPT, END_WITHIN, Live, LiveReport, Nodes, vm};
use crate::error::{Kind, MergeError, Result};
use crate::event::Step;
use crate::layers::identity;
use crate::record::{Phase, RecordedLayer};
use crate::running::{self, is_over, node_of};

/// How often a job is looked at that holds the guest's requests.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

impl Live<'_> {
    /// Has QEMU hold the disk, and switches it.
    pub(super) fn switch(&mut self, qmp: &mut Qmp) -> Result<()> {
        self.going.watch.step(Step::Bitmaps);
        let nodes = self.nodes(qmp)?;
        self.tell(qmp, Order::Complete)?;
        let begun = Instant::now();
        loop {
            let state = self.look(qmp)?.map(|job| (job.state, job.error));
            match state {
                Some((JobState::Pending, _)) => return self.switch_held(qmp, &nodes),
                Some((JobState::Concluded, error)) => return self.conclude(qmp, error),
                None => return self.conclude(qmp, Some("it is gone".to_owned())),
                Some(_) if begun.elapsed() > END_WITHIN => {
                    let found = "QEMU did not come to the end of what the guest writes";
                    return Err(MergeError::new(Kind::Vm, ATTEMPT, found)
                        .left("the disk is right either way, and written to both layers")
                        .next("run it again"));
                }
                Some(_) => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }

    /// At *pending*: the guest waits for its disk.
    pub(super) fn switch_held(&mut self, qmp: &mut Qmp, nodes: &Nodes) -> Result<()> {
        if self.going.record.phase == Phase::Begun
            && let Err(error) = self.commit_to_base(qmp, nodes)
        {
            return self.give_up(qmp, nodes, error);
        }
        self.tell(qmp, Order::Finalize)?;
        self.going.watch.step(Step::Finalize);
        let error = self.wait_concluded(qmp)?.and_then(|job| job.error);
        if error.is_some() {
            self.set_phase(Phase::Begun)?;
            self.remove_added(qmp, nodes)?;
        }
        self.conclude(qmp, error)
    }

    /// The bitmaps, and the record that makes the base the disk.
    fn commit_to_base(&mut self, qmp: &mut Qmp, nodes: &Nodes) -> Result<()> {
        self.make_bitmaps(qmp, nodes)?;
        let faults = self.not_in_base(qmp, nodes)?;
        if !faults.is_empty() {
            let each = faults.iter();
            let each: Vec<String> = each
                .map(|(name, fault)| format!("{name:?} {fault}"))
                .collect();
            let found = format!("bitmaps in the base, in QEMU: {}", each.join(", "));
            return Err(MergeError::new(Kind::Vm, ATTEMPT, found));
        }
        self.set_phase(Phase::Switched)
    }

    fn set_phase(&mut self, phase: Phase) -> Result<()> {
        self.going.record.phase = phase;
        self.going.record.write(&self.going.path, Existing::Replace)
    }

    /// Lets the guest go on in the active layer.
    fn give_up(&mut self, qmp: &mut Qmp, nodes: &Nodes, error: MergeError) -> Result<()> {
        // Whether the record says *switched* is not known when writing it failed, and must be before anybody writes.
        self.going.forget().map_err(|gone| {
            gone.left("the guest waits for its disk, and nothing was lost")
                .next("see to the storage below the record, then run it again")
        })?;
        self.tell(qmp, Order::Cancel)?;
        if self.wait_concluded(qmp)?.is_some() {
            self.tell(qmp, Order::Dismiss)?;
        }
        self.remove_added(qmp, nodes)?;
        Err(error.left(self.left_as_before()?))
    }

    /// Behind the switch: the old layers are closed and removed.
    pub(super) fn end_switched(mut self, qmp: &mut Qmp) -> Result<LiveReport> {
        let all = running::nodes(qmp)?;
        let record = &self.going.record;
        let base = node_of(&all, &record.layers[record.base].file())?;
        if record.phase == Phase::Begun || base.read_only {
            let found = "the VM does not write to the base";
            return Err(MergeError::new(Kind::Conflict, ATTEMPT, found)
                .left("no layer was removed")
                .next(format!("stop the VM and {}", self.going.recover_with())));
        }
        for layer in record.merged() {
            close(qmp, layer)?;
        }
        let held = self.held(qmp)?;
        let (removed, kept) = self.going.end(None, Vec::new())?;
        if !kept.is_empty() {
            self.going.watch.notice(
                "the VM writes to the base now: do not start another from the layers that are kept",
            );
        }
        Ok(LiveReport {
            plan: self.plan,
            removed,
            kept,
            held,
        })
    }
}

/// Closes what the VM still has open of a layer, as far as its nodes were opened by name; QEMU closes others itself.
fn close(qmp: &mut Qmp, layer: &RecordedLayer) -> Result<()> {
    let Ok(wanted) = identity(&layer.file().path) else {
        // It was removed by an earlier call.
        return Ok(());
    };
    let failed = |error| vm("close the merged layers", error);
    let all = running::nodes(qmp)?;
    let over = all.iter().filter(|node| is_over(node, wanted));
    let (formats, files): (Vec<_>, Vec<_>) =
        over.partition(|node| node.driver == "qcow2" || node.driver == "raw");
    for node in formats.into_iter().chain(files) {
        block_jobs::close_node(qmp, &node.name).map_err(failed)?;
    }
    Ok(())
}
