//! A chain becomes one new image: read, looked at and compressed by several threads, placed in order.
//!
//! The result is the same whatever the number of threads, so a dry run ([`predict`]) knows it exactly.
//! Memory is bounded: each thread has one piece of 2 MiB (see [`CHUNK_BYTES`]), and the one table being
//! filled is kept.

use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};

use stead_sys::direct::ALIGNMENT;
use stead_sys::share::Shared;

use super::chunk::{CHUNK_BYTES, Chunk, Job, Taken};
use super::create::{data_target, finish_qcow2};
use super::first::reserves;
use super::layout::Layout;
use super::options::{
    Geometry, NewFormat, Preallocation, Qcow2Options, Target, check_disk, invalid,
};
use super::output::{Output, require_length};
use super::queue::{InTurn, Queue};
use super::{room, verify};
use crate::chain::Chain;
use crate::control::Control;
use crate::error::Result;

/// Zeros of this many bytes become holes when nothing else is said.
pub const DEFAULT_SPARSE_BYTES: u64 = 4096;
/// The most threads.
const MAX_THREADS: usize = 16;

/// How far a new image is verified before it appears. Its tables and refcounts always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Tables and refcounts are read back.
    Structure,
    /// All bytes are read back too and compared with the source.
    Content,
}

/// What has reached the disk when a copy is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Everything: lost power leaves the whole image or none.
    Synced,
    /// Perhaps nothing yet, as with `qemu-img convert`, whose default cache mode is `unsafe`. The image still
    /// appears only when it is whole, and the death of a process loses nothing; lost power may leave a
    /// damaged image under the name.
    Cached,
}

/// How a chain is copied.
#[derive(Debug, Clone)]
pub struct ConvertOptions<'a> {
    /// The format of the new image.
    pub format: NewFormat,
    /// The length of the new disk in bytes; `None`: that of the source. Behind the source's end are zeros.
    pub disk: Option<u64>,
    /// The content of the backing file that `format` names; what is equal there is left out. It must be there
    /// exactly when `format` names one.
    pub below: Option<&'a Chain>,
    /// Zeros are left out in aligned pieces of this many bytes, rounded up to a power of two from 512 B to
    /// 2 MiB, and never less than a cluster (with extended L2 entries, a subcluster); 0: nowhere.
    pub sparse_bytes: u64,
    /// Whether clusters are compressed.
    pub compressed: bool,
    /// How many threads work; `None`: as many as the machine suggests.
    pub threads: Option<NonZero<usize>>,
    /// How far the image is verified before it appears.
    pub verify: Verify,
    /// What has reached the disk at the end.
    pub durability: Durability,
}

impl Default for ConvertOptions<'_> {
    fn default() -> Self {
        Self {
            format: NewFormat::Qcow2(Qcow2Options::default()),
            disk: None,
            below: None,
            sparse_bytes: DEFAULT_SPARSE_BYTES,
            compressed: false,
            threads: None,
            verify: Verify::Structure,
            durability: Durability::Synced,
        }
    }
}

/// How large the files of a new image are, exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewFiles {
    /// The length of the image, in bytes. It never was longer, so this is peak and end.
    pub file_bytes: u64,
    /// The bytes of both files that take room; the rest are holes.
    pub allocated_bytes: u64,
    /// The length of the external data file, in bytes.
    pub data_file_bytes: Option<u64>,
}

/// Copies `source` into a new image.
///
/// # Durability
/// When this returns `Ok`, the image (and its data file) has been verified as asked, and content and names
/// have been synced, if [`Durability::Synced`] was asked for.
///
/// # Errors
/// When the format cannot express the image, there is no room for it, the source cannot be read, the caller
/// cancels, writing fails, or the image does not read back right. There is no new file then, and an earlier
/// one is as it was (see [`Target::InPlace`] for what is written in place).
pub fn convert(
    source: &Chain,
    target: &Target,
    options: &ConvertOptions<'_>,
    control: &Control<'_>,
) -> Result<NewFiles> {
    let plan = Plan::new(source, target, options)?;
    let start = match options.durability {
        Durability::Synced => Output::create,
        Durability::Cached => Output::create_cached,
    };
    let image = start(target)?;
    let data = plan.data_target.as_ref().map(start).transpose()?;
    let shareable = shareable(source, data.as_ref().unwrap_or(&image), &plan)?;
    if !shareable.contains(&true) {
        room::require(source, target, options, &plan, control)?;
    }
    let made = plan.make(shareable, &image, data.as_ref(), control)?;
    verify_all(&plan, &image, data.as_ref(), control)?;
    if let Some(data) = data {
        data.publish()?;
    }
    image.publish()?;
    Ok(made)
}

/// How large the files will be that [`convert`] makes of the same arguments: the same work, without writing.
///
/// # Errors
/// As [`convert`].
pub fn predict(
    source: &Chain,
    target: &Target,
    options: &ConvertOptions<'_>,
    control: &Control<'_>,
) -> Result<NewFiles> {
    let plan = Plan::new(source, target, options)?;
    let shareable = match target {
        Target::New { path, mode, .. } => {
            let probe = Target::New {
                path: path.clone(),
                mode: *mode,
                existing: stead_sys::durable::Existing::Replace,
            };
            shareable(source, &Output::create(&probe)?, &plan)?
        }
        Target::InPlace { .. } => vec![false; source.depth()],
    };
    plan.predict(target, shareable, control)
}

/// What is decided before the first byte is read.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    source: &'a Chain,
    options: &'a ConvertOptions<'a>,
    /// The length of the disk to be made.
    pub disk: u64,
    geometry: Option<Geometry>,
    data_target: Option<Target>,
}

impl<'a> Plan<'a> {
    pub fn new(
        source: &'a Chain,
        target: &Target,
        options: &'a ConvertOptions<'a>,
    ) -> Result<Self> {
        let disk = options.disk.unwrap_or(source.len());
        let path = target.path();
        check_disk(path, disk)?;
        let mut plan = Self {
            source,
            options,
            disk,
            geometry: None,
            data_target: None,
        };
        match &options.format {
            NewFormat::Raw { preallocation } => {
                if options.compressed || options.below.is_some() {
                    return invalid(
                        path,
                        "a raw image has no compressed clusters and no backing file",
                    );
                }
                if *preallocation == Preallocation::Metadata {
                    return invalid(path, "a raw image has no metadata to reserve");
                }
            }
            NewFormat::Qcow2(qcow2) => {
                plan.geometry = Some(Geometry::new(path, disk, qcow2)?);
                plan.data_target = data_target(target, qcow2);
                plan.check_qcow2(target, qcow2)?;
            }
        }
        Ok(plan)
    }

    fn check_qcow2(&self, target: &Target, qcow2: &Qcow2Options) -> Result<()> {
        let path = target.path();
        if qcow2.backing.is_some() != self.options.below.is_some() {
            return invalid(
                path,
                "the backing file's name and its content are given together",
            );
        }
        if qcow2.data_file.is_some() && self.options.compressed {
            return invalid(path, "an external data file has no compressed clusters");
        }
        if qcow2.data_file.is_some() && self.data_target.is_none() {
            return invalid(path, "the data file and the image are one file");
        }
        if reserves(qcow2) && self.options.compressed {
            return invalid(path, "compressed clusters have no reserved place");
        }
        Ok(())
    }

    fn qcow2(&self) -> Option<&Qcow2Options> {
        match &self.options.format {
            NewFormat::Raw { .. } => None,
            NewFormat::Qcow2(qcow2) => Some(qcow2),
        }
    }

    /// Zeros left out in pieces of this many bytes.
    fn sparse(&self) -> Option<u64> {
        let bytes = self.options.sparse_bytes.min(CHUNK_BYTES);
        (bytes > 0).then(|| bytes.next_power_of_two().max(512))
    }

    /// The unit that is placed: a cluster, or what can be a hole.
    fn unit(&self) -> u64 {
        match &self.geometry {
            Some(geometry) => geometry.size.bytes(),
            None => self.sparse().unwrap_or(CHUNK_BYTES),
        }
    }

    fn reserve(&self) -> Option<Preallocation> {
        match &self.options.format {
            NewFormat::Raw { preallocation } => Some(*preallocation),
            NewFormat::Qcow2(qcow2) => reserves(qcow2).then_some(qcow2.preallocation),
        }
    }

    fn job(&self, shareable: Vec<bool>) -> Job<'a> {
        let (source, below) = (self.source, self.options.below);
        let geometry = self.geometry.as_ref();
        Job {
            source,
            below,
            layers_above: below.and_then(|below| source.layers_above(below)),
            unit: self.unit(),
            sparse: self.sparse(),
            compression: self
                .qcow2()
                .filter(|_| self.options.compressed)
                .map(|qcow2| qcow2.compression),
            subclusters: geometry.is_some_and(|geometry| geometry.extended_l2),
            zeros_are_data: geometry
                .is_some_and(|geometry| geometry.says_zeros() && !geometry.has_zero_entries()),
            reserve: self.reserve(),
            shareable,
        }
    }

    /// The first place from `at` on where there is something to do.
    fn find(&self, job: &Job<'_>, zeros_matter: bool, at: u64) -> Result<Option<u64>> {
        if let Some(layers) = job.layers_above
            && self.disk <= self.source.len()
        {
            return self.source.first_allocated(layers, at);
        }
        if zeros_matter || job.below.is_some() || job.sparse.is_none() {
            return Ok(Some(at));
        }
        self.source.first_data(at)
    }

    pub fn predict(
        &self,
        target: &Target,
        shareable: Vec<bool>,
        control: &Control<'_>,
    ) -> Result<NewFiles> {
        let nowhere = Output::dropped(target.path())?;
        let data = self.data_target.as_ref().map(|_| &nowhere);
        self.make(shareable, &nowhere, data, control)
    }

    /// Reads everything and writes it to `image`, or guest data to `data`.
    fn make(
        &self,
        shareable: Vec<bool>,
        image: &Output,
        data: Option<&Output>,
        control: &Control<'_>,
    ) -> Result<NewFiles> {
        let job = self.job(shareable);
        let guest = data.unwrap_or(image);
        match &self.geometry {
            Some(_) => image.begin_in_place()?,
            None => require_length(image, self.disk)?,
        }
        if self.geometry.is_none() || data.is_some() {
            guest.set_length(self.disk)?;
        }
        let layout = self.geometry.clone().map(Layout::new);
        let (layout, taken) = self.run(&job, layout, guest, image, control)?;
        let file_bytes = match (layout, self.qcow2()) {
            (Some(layout), Some(qcow2)) => finish_qcow2(layout, qcow2, image)?,
            (Some(_) | None, _) => self.disk,
        };
        let allocated_bytes = match (&self.geometry, data) {
            (Some(_), None) => file_bytes - taken.reserved,
            (Some(_), Some(_)) => file_bytes + taken.written,
            (None, _) => taken.written,
        };
        control.tell(1, 1);
        Ok(NewFiles {
            file_bytes,
            allocated_bytes,
            data_file_bytes: data.map(|_| self.disk),
        })
    }

    fn run(
        &self,
        job: &Job<'_>,
        layout: Option<Layout>,
        guest: &Output,
        image: &Output,
        control: &Control<'_>,
    ) -> Result<(Option<Layout>, Taken)> {
        let zeros_matter = !guest.starts_empty()
            || job
                .reserve
                .is_some_and(|reserve| reserve != Preallocation::Off)
            || self.qcow2().is_some_and(reserves);
        let queue = Queue::new(self.disk, CHUNK_BYTES, |at| {
            self.find(job, zeros_matter, at)
        });
        let order = InTurn::new(layout);
        let (written, reserved) = (AtomicU64::new(0), AtomicU64::new(0));
        let work = || {
            let _guard = order.guard();
            let mut chunk = Chunk::new(job, image.path())?;
            while !order.is_stopped() {
                control.go_on(image.path())?;
                let Some(piece) = queue.take()? else { break };
                let end = piece.range.end;
                chunk.load(piece.range)?;
                let placed = order.take_turn(piece.turn, |layout| match layout {
                    Some(layout) => chunk.place(layout),
                    None => {
                        chunk.place_raw();
                        Ok(())
                    }
                })?;
                if placed.is_none() {
                    break;
                }
                let taken = chunk.taken();
                written.fetch_add(taken.written, Ordering::Relaxed);
                reserved.fetch_add(taken.reserved, Ordering::Relaxed);
                chunk.write(guest, image)?;
                control.tell(end, self.disk);
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            for _ in 0..threads(self.options.threads) {
                scope.spawn(|| {
                    if let Err(error) = work() {
                        order.stop(error);
                    }
                });
            }
        });
        let taken = Taken {
            written: written.into_inner(),
            reserved: reserved.into_inner(),
        };
        Ok((order.finish()?, taken))
    }
}

/// Twice as many threads as processors, so that while some write others read.
pub(crate) fn threads(wanted: Option<NonZero<usize>>) -> usize {
    let usual = || match std::thread::available_parallelism() {
        Ok(processors) => processors.get() * 2,
        Err(_unknown) => 4,
    };
    wanted
        .map_or_else(usual, NonZero::get)
        .clamp(1, MAX_THREADS)
}

/// The members of the chain whose blocks the new file can share, found by trying; what was tried is undone.
fn shareable(source: &Chain, output: &Output, plan: &Plan<'_>) -> Result<Vec<bool>> {
    let possible = output.starts_empty()
        && !plan.options.compressed
        && plan.options.below.is_none()
        && plan.unit().is_multiple_of(ALIGNMENT);
    let mut found = Vec::new();
    for member in 0..source.depth() {
        let (file, length) = source.member_file(member);
        let range = Shared {
            from: 0,
            to: 0,
            length: ALIGNMENT,
        };
        found.push(possible && length >= ALIGNMENT && output.share(file, range)?);
    }
    output.set_length(0)?;
    Ok(found)
}

fn verify_all(
    plan: &Plan<'_>,
    image: &Output,
    data: Option<&Output>,
    control: &Control<'_>,
) -> Result<()> {
    if plan.geometry.is_some() {
        verify::structure(image)?;
    }
    match plan.options.verify {
        Verify::Structure => Ok(()),
        Verify::Content => {
            let made = match plan.geometry {
                Some(_) => verify::Made::qcow2(image, data, plan.options.below)?,
                None => verify::Made::raw(image),
            };
            let threads = threads(plan.options.threads);
            verify::content(plan.source, &made, plan.disk, threads, control)
        }
    }
}
