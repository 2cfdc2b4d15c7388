//! Empty images, as `qemu-img create` makes them.

use std::fs::File;
use std::ops::Range;

use stead_sys::durable::Existing;

use super::first::reserves;
use super::layout::{Extras, Layout};
use super::options::{
    Geometry, NewFormat, Preallocation, Qcow2Options, Target, check_disk, invalid,
};
use super::output::{Output, require_length};
use super::verify;
use crate::control::Control;
use crate::error::Result;

/// How many clusters are reserved between two looks at the caller's wishes.
const STEP_CLUSTERS: u64 = 4096;
/// How many bytes of reserved clusters are taken at once.
const MOST_RUN_BYTES: u64 = 64 << 20;

/// Makes an empty image of `disk` bytes, a multiple of 512.
///
/// With an external data file, both are made whole, and then that appears first and the image last.
///
/// # Durability
/// When this returns `Ok`, the image and its name have been synced.
///
/// # Errors
/// When the format cannot express what was asked for, there is no room, the target is there and may not
/// be replaced, the caller cancels, or writing fails. There is no new file then (see [`Target::InPlace`]).
pub fn create(
    target: &Target,
    format: &NewFormat,
    disk: u64,
    control: &Control<'_>,
) -> Result<File> {
    match format {
        NewFormat::Raw { preallocation } => create_raw(target, *preallocation, disk, control),
        NewFormat::Qcow2(options) => create_qcow2(target, options, disk, control),
    }
}

fn create_raw(
    target: &Target,
    preallocation: Preallocation,
    disk: u64,
    control: &Control<'_>,
) -> Result<File> {
    let output = write_raw(target, preallocation, disk, control)?;
    control.tell(1, 1);
    output.publish()
}

/// An empty raw image that is not there yet.
fn write_raw(
    target: &Target,
    preallocation: Preallocation,
    disk: u64,
    control: &Control<'_>,
) -> Result<Output> {
    let path = target.path();
    check_disk(path, disk)?;
    if preallocation == Preallocation::Metadata {
        return invalid(path, "a raw image has no metadata to reserve");
    }
    let output = Output::create(target)?;
    require_length(&output, disk)?;
    output.set_length(disk)?;
    if !output.starts_empty() {
        output.write_zeros(0, disk)?;
    }
    reserve_room(&output, preallocation, disk, control)?;
    Ok(output)
}

/// Takes the room of a disk that reads as zeros.
fn reserve_room(
    output: &Output,
    preallocation: Preallocation,
    disk: u64,
    control: &Control<'_>,
) -> Result<()> {
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => output.reserve(0, disk),
        Preallocation::Full => {
            let mut done = 0;
            while done < disk {
                control.go_on(output.path())?;
                output.fill_zeros(done, MOST_RUN_BYTES.min(disk - done))?;
                done += MOST_RUN_BYTES;
                control.tell(done, disk);
            }
            Ok(())
        }
    }
}

fn create_qcow2(
    target: &Target,
    options: &Qcow2Options,
    disk: u64,
    control: &Control<'_>,
) -> Result<File> {
    let geometry = Geometry::new(target.path(), disk, options)?;
    let data = write_data_file(target, options, disk, control)?;
    let output = Output::create(target)?;
    output.begin_in_place()?;
    let mut layout = Layout::new(geometry);
    if reserves(options) {
        reserve_clusters(&mut layout, options, &output, control)?;
    }
    finish_qcow2(layout, options, &Extras::default(), &output)?;
    verify::structure(&output)?;
    control.tell(1, 1);
    if let Some(data) = data {
        data.publish()?;
    }
    output.publish()
}

/// The data file beside a new image, not there yet.
fn write_data_file(
    target: &Target,
    options: &Qcow2Options,
    disk: u64,
    control: &Control<'_>,
) -> Result<Option<Output>> {
    let Some(data) = &options.data_file else {
        return Ok(None);
    };
    let beside = data_target(target, options);
    let Some(beside) = beside else {
        return invalid(&data.path, "the data file and the image are one file");
    };
    let preallocation = match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => Preallocation::Off,
        full @ (Preallocation::Falloc | Preallocation::Full) => full,
    };
    write_raw(&beside, preallocation, disk, control).map(Some)
}

/// Where the data file of a new image is made; `None` when it would be the image itself.
pub(crate) fn data_target(target: &Target, options: &Qcow2Options) -> Option<Target> {
    let data = options.data_file.as_ref()?;
    let (mode, existing) = match target {
        Target::New { mode, existing, .. } => (*mode, *existing),
        Target::InPlace { .. } => (0o644, Existing::Keep),
    };
    (data.path != target.path()).then(|| Target::New {
        path: data.path.clone(),
        mode,
        existing,
    })
}

/// Gives every cluster its place, and takes the room that was asked for.
fn reserve_clusters(
    layout: &mut Layout,
    options: &Qcow2Options,
    output: &Output,
    control: &Control<'_>,
) -> Result<()> {
    let (disk, size) = (layout.geometry().disk, layout.geometry().size);
    let clusters = size.count_for(disk);
    let take_room = |run: &Range<u64>| {
        if options.data_file.is_some() {
            return Ok(());
        }
        output.take_room(options.preallocation, run.start, run.end - run.start)
    };
    let mut run = 0..0;
    for cluster in 0..clusters {
        let host = layout.reserve(cluster << size.bits())?;
        if host != run.end || run.end - run.start >= MOST_RUN_BYTES {
            take_room(&run)?;
            run = host..host;
        }
        run.end += size.bytes();
        if cluster % STEP_CLUSTERS == 0 {
            control.go_on(output.path())?;
            control.tell(cluster, clusters);
            write_complete(layout, output)?;
        }
    }
    take_room(&run)?;
    write_complete(layout, output)
}

pub(crate) fn write_complete(layout: &mut Layout, output: &Output) -> Result<()> {
    for (at, bytes) in layout.take_complete() {
        output.write(at, &bytes)?;
    }
    Ok(())
}

/// Writes what is left of an image; the header reaches the disk after everything it points to.
pub(crate) fn finish_qcow2(
    layout: Layout,
    options: &Qcow2Options,
    extras: &Extras<'_>,
    output: &Output,
) -> Result<u64> {
    let mut first = Vec::new();
    let length = layout.finish(options, extras, |at, bytes| {
        if at == 0 {
            first = bytes.to_vec();
            return Ok(());
        }
        output.write(at, bytes)
    })?;
    require_length(output, length)?;
    output.set_length(length)?;
    if !output.starts_empty() {
        output.sync()?;
    }
    output.write(0, &first)?;
    Ok(length)
}
