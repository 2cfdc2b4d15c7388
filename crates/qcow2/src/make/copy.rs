//! The copying: every view of the source, by several threads, into one layout.
//!
//! Internal snapshots come first, in their order, and the active disk last, so that when its entries are written it
//! is known what they share. A view uses the clusters of an earlier one where both come from the same places
//! of the source.

use std::sync::{Mutex, PoisonError};

use super::chunk::{CHUNK_BYTES, Chunk, Earlier, Job, Taken};
use super::convert::{NewFiles, threads};
use super::create::{finish_qcow2, write_complete};
use super::first::{narrow, reserves};
use super::kept::{View, snapshot_table};
use super::layout::{ALL_SUBCLUSTERS, Extras, Layout, SnapshotTable};
use super::options::Preallocation;
use super::output::{Output, require_length};
use super::plan::Plan;
use super::queue::{Pipeline, Queue, Task};
use crate::control::Control;
use crate::error::Result;
use crate::header::{to_u64, to_usize};

/// With how many views before it, the nearest, a view is compared.
const MOST_EARLIER_VIEWS: usize = 16;

/// How many pieces are on their way for each thread; a piece takes up to 4 MiB of memory.
const BUFFERS_PER_THREAD: usize = 3;

/// Where the bytes go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Files<'a> {
    pub image: &'a Output,
    /// The external data file.
    pub data: Option<&'a Output>,
    /// Where tables of views go, to be read again: the image, but in a dry run.
    pub tables: &'a Output,
}

impl<'a> Files<'a> {
    fn guest(&self) -> &'a Output {
        self.data.unwrap_or(self.image)
    }
}

/// Copies everything that `plan` says.
pub(crate) fn all(
    plan: &Plan<'_>,
    shareable: &[bool],
    files: Files<'_>,
    control: &Control<'_>,
) -> Result<NewFiles> {
    let image = files.image;
    match &plan.geometry {
        Some(_) => image.begin_in_place()?,
        None => require_length(image, plan.disk)?,
    }
    if plan.geometry.is_none() || files.data.is_some() {
        files.guest().set_length(plan.disk)?;
    }
    let mut copy = Copy {
        plan,
        files,
        control,
        taken: Taken::default(),
        done: 0,
    };
    let file_bytes = match (plan.geometry.clone(), plan.qcow2()) {
        (Some(geometry), Some(qcow2)) => {
            let (layout, tables) = copy.views(Layout::new(geometry), shareable)?;
            let extras = Extras {
                snapshots: snapshot_table(&plan.kept.views, &tables),
                snapshot_count: narrow(to_u64(tables.len())),
                bitmaps: &plan.kept.bitmaps,
            };
            finish_qcow2(layout, qcow2, &extras, image)?
        }
        (Some(_) | None, _) => {
            copy.run(&plan.active_job(shareable, &[]), None, plan.disk)?;
            plan.disk
        }
    };
    control.tell(1, 1);
    Ok(made(plan, &files, copy.taken, file_bytes))
}

fn made(plan: &Plan<'_>, files: &Files<'_>, taken: Taken, file_bytes: u64) -> NewFiles {
    let kept = &plan.kept;
    NewFiles {
        file_bytes,
        allocated_bytes: match (&plan.geometry, files.data) {
            (Some(_), None) => file_bytes - taken.reserved,
            (Some(_), Some(_)) => file_bytes + taken.written,
            (None, _) => taken.written,
        },
        shared_bytes: taken.shared,
        data_file_bytes: files.data.map(|_| plan.disk),
        kept_snapshots: kept.views.len(),
        kept_bitmaps: kept.bitmaps.iter().map(|b| b.name().to_vec()).collect(),
        dropped_bitmaps: kept.dropped.clone(),
    }
}

/// A copy on its way.
struct Copy<'a> {
    plan: &'a Plan<'a>,
    files: Files<'a>,
    control: &'a Control<'a>,
    taken: Taken,
    /// Bytes of the disks that were copied before the current one.
    done: u64,
}

impl Copy<'_> {
    /// All views, the active one last; tells where the L1 tables of the others are.
    fn views(
        &mut self,
        mut layout: Layout,
        shareable: &[bool],
    ) -> Result<(Layout, Vec<SnapshotTable>)> {
        let plan = self.plan;
        let mut earlier: Vec<Earlier<'_>> = Vec::new();
        let mut tables = Vec::new();
        for view in &plan.kept.views {
            let table = self.snapshot(&mut layout, view, shareable, &earlier)?;
            tables.push(table.clone());
            let chain = &view.chain;
            earlier.insert(0, Earlier { chain, table });
            earlier.truncate(MOST_EARLIER_VIEWS);
        }
        let job = plan.active_job(shareable, &earlier);
        match self.run(&job, Some(layout), plan.disk)? {
            Some(layout) => Ok((layout, tables)),
            None => unreachable!("the layout that was given comes back"),
        }
    }

    fn snapshot(
        &mut self,
        layout: &mut Layout,
        view: &View,
        shareable: &[bool],
        earlier: &[Earlier<'_>],
    ) -> Result<SnapshotTable> {
        let plan = self.plan;
        let geometry = layout.geometry().clone();
        let disk_entries = geometry.l1_entries_for(view.chain.len())?;
        let vm_state = view.snapshot.vm_state_bytes;
        let coverage = geometry.l2_coverage();
        let vm_state_start = disk_entries * coverage;
        // The two together are bounded as one disk would be.
        let entries = geometry.l1_entries_for(vm_state_start.saturating_add(vm_state))?;
        layout.begin_snapshot(entries);
        let job = plan.view_job(view, shareable, earlier);
        let taken = std::mem::replace(layout, Layout::new(geometry));
        match self.run(&job, Some(taken), view.chain.len())? {
            Some(back) => *layout = back,
            None => unreachable!("the layout that was given comes back"),
        }
        self.vm_state(layout, view, vm_state_start)?;
        let table = layout.end_snapshot()?;
        write_complete(layout, self.files.tables)?;
        Ok(table)
    }

    /// The VM state of an internal snapshot, which lies behind its disk.
    fn vm_state(&mut self, layout: &mut Layout, view: &View, start: u64) -> Result<()> {
        let Some(top) = view.chain.layer(0) else {
            unreachable!("a view has a qcow2 layer");
        };
        let size = layout.geometry().size;
        let length = top.vm_state_bytes();
        let mut cluster = vec![0; size.buffer_len()];
        let mut at = 0;
        while at < length {
            self.control.go_on(self.image().path())?;
            let there = size.bytes().min(length - at);
            let (state, behind) = cluster.split_at_mut(to_usize(there));
            top.read_vm_state(at, state)?;
            behind.fill(0);
            let host = layout.data(start + at, ALL_SUBCLUSTERS)?;
            self.files.image.write(host, &cluster)?;
            self.taken.written += size.bytes();
            at += size.bytes();
        }
        write_complete(layout, self.files.tables)
    }

    /// One disk of `disk` bytes.
    fn run(&mut self, job: &Job<'_>, layout: Option<Layout>, disk: u64) -> Result<Option<Layout>> {
        let queue = Queue::new(disk, CHUNK_BYTES, |at| self.find(job, disk, at));
        let threads = threads(self.plan.options.threads);
        let buffers =
            (0..threads * BUFFERS_PER_THREAD).map(|_| Chunk::new(job, self.image().path()));
        let pipeline = Pipeline::new(layout, buffers.collect::<Result<_>>()?);
        let taken = Mutex::new(Taken::default());
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let _guard = pipeline.guard();
                    if let Err(error) = self.work(&queue, &pipeline, &taken) {
                        pipeline.stop(error);
                    }
                });
            }
        });
        let taken = taken.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.taken.add(taken);
        self.done += disk;
        pipeline.finish()
    }

    /// What each thread does.
    fn work(
        &self,
        queue: &Queue<impl Fn(u64) -> Result<Option<u64>>>,
        pipeline: &Pipeline<Option<Layout>, Chunk<'_>>,
        taken: &Mutex<Taken>,
    ) -> Result<()> {
        loop {
            self.control.go_on(self.image().path())?;
            match pipeline.next() {
                Task::Done => return Ok(()),
                Task::Write(mut chunk) => {
                    chunk.write(self.files.guest(), self.files.tables)?;
                    self.control.tell(self.done + chunk.end(), self.all());
                    pipeline.written(chunk);
                }
                Task::Load(mut chunk) => {
                    let Some(piece) = queue.take()? else {
                        pipeline.drained(chunk);
                        continue;
                    };
                    chunk.load(piece.range, self.plan.geometry.as_ref(), self.files.tables)?;
                    pipeline.loaded(piece.turn, chunk, |layout, chunk| {
                        match layout {
                            Some(layout) => chunk.place(layout)?,
                            None => chunk.place_raw(),
                        }
                        let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
                        taken.add(chunk.taken());
                        Ok(())
                    })?;
                }
            }
        }
    }

    fn image(&self) -> &Output {
        self.files.image
    }

    /// The bytes of all disks.
    fn all(&self) -> u64 {
        let views = self.plan.kept.views.iter().map(|view| view.chain.len());
        views.fold(self.plan.disk, u64::saturating_add)
    }

    /// The first place from `at` on where there is something to do.
    fn find(&self, job: &Job<'_>, disk: u64, at: u64) -> Result<Option<u64>> {
        let shift = job.window.start;
        if let Some(layers) = job.layers_above
            && shift == 0
            && disk <= job.source.len()
        {
            return job.source.first_allocated(layers, at);
        }
        let reserves = job
            .reserve
            .is_some_and(|reserve| reserve != Preallocation::Off)
            || self.plan.qcow2().is_some_and(reserves);
        let zeros_matter = reserves || !self.files.guest().starts_empty();
        if zeros_matter || job.below.is_some() || job.sparse.is_none() {
            return Ok(Some(at));
        }
        let found = job.source.first_data(at + shift)?;
        Ok(found.map(|found| found - shift))
    }
}
