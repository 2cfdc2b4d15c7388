//! Every state of the disk that a crash or a fault can leave.
#![allow(
    clippy::disallowed_methods,
    reason = "tests make files that nobody needs after them"
)]

mod common;

use std::sync::Arc;

use common::{Scratch, new_image, stream, streams, whole};
use stead_save_image::{Control, Format, Kind, write_on};
use stead_sim::disk::{DiskFault, Event, FaultDisk, History, RecordedDisk};

/// How many writes [`LARGE_MIB`] take, at 4 MiB each.
const LARGE_WRITES: u64 = 4;
/// The memory in a payload of several writes.
const LARGE_MIB: usize = 15;

fn recorded(format: Format) -> History {
    recorded_of(format, stream())
}

fn recorded_of(format: Format, stream: &[u8]) -> History {
    let disk = Arc::new(RecordedDisk::new(Vec::new()));
    write_on(disk.clone(), &new_image(format), stream, Control::silent()).expect("write");
    disk.history()
}

/// A payload of several writes.
fn recorded_large() -> History {
    let history = recorded_of(Format::Raw, &streams::large(LARGE_MIB));
    let writes = history
        .events()
        .iter()
        .filter(|event| **event != Event::Sync);
    // The head, the payload (its last blocks apart), the record, the sector that completes it.
    assert!(writes.count() as u64 >= LARGE_WRITES + 3);
    history
}

#[test]
fn a_writer_killed_in_the_middle_of_a_payload_leaves_a_partial_image() {
    let scratch = Scratch::new();
    let history = recorded_large();
    let count = history.events().len();
    for events in 0..=count {
        let seen = look(&scratch, &history.prefix(events));
        let expected = if events < count - 1 {
            Seen::Refused
        } else {
            Seen::Whole
        };
        assert_eq!(seen, expected, "{events} of {count}");
    }
}

#[test]
fn power_lost_in_the_middle_of_a_payload_leaves_a_partial_image_or_the_whole_one() {
    let scratch = Scratch::new();
    let history = recorded_large();
    for count in 0..=history.events().len() {
        for seed in 0..6 {
            let seen = look(&scratch, &history.power_loss(count, seed));
            assert!(!matches!(seen, Seen::Lie(_)), "{count} {seed}: {seen:?}");
        }
    }
}

#[test]
fn the_test_of_a_payload_can_fail_when_it_is_not_synced_before_the_record() {
    let scratch = Scratch::new();
    let careless = recorded_large().without_sync(2).without_sync(1);
    let count = careless.events().len() - 1;
    let lies = (0..40).filter(|seed| {
        let seen = look(&scratch, &careless.power_loss(count, *seed));
        matches!(&seen, Seen::Lie(text) if text.contains("payload"))
    });
    assert!(
        lies.count() > 0,
        "no seed shows a payload that is not there"
    );
}

#[test]
fn a_disk_that_fails_in_the_middle_of_a_payload_is_told_and_leaves_an_image_that_is_not_complete() {
    let scratch = Scratch::new();
    let (image, stream) = (new_image(Format::Raw), streams::large(LARGE_MIB));
    for fault in [DiskFault::NoSpace, DiskFault::Io, DiskFault::Killed] {
        // The head and its sync come before.
        for at_call in 3..3 + LARGE_WRITES {
            let inner = Arc::new(RecordedDisk::new(Vec::new()));
            let disk = Arc::new(FaultDisk::new(inner.clone(), at_call, fault));
            let error = write_on(disk, &image, &stream[..], Control::silent());
            let expected = if fault == DiskFault::NoSpace {
                Kind::NoSpace
            } else {
                Kind::Io
            };
            assert_eq!(error.expect_err("a fault").kind(), expected, "{at_call}");
            assert_eq!(look(&scratch, &inner.bytes()), Seen::Refused, "{at_call}");
            let syncs = inner.history();
            let syncs = syncs.events().iter().filter(|event| **event == Event::Sync);
            assert_eq!(syncs.count(), 1, "nothing is synced after a failed write");
        }
    }
}

/// What a file says of itself after a crash.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// Refused as what it is.
    Refused,
    Whole,
    /// It says that it is complete, and is not.
    Lie(String),
}

fn look(scratch: &Scratch, bytes: &[u8]) -> Seen {
    let path = scratch.put("crashed", bytes);
    match whole(&path) {
        Ok(()) => Seen::Whole,
        // Not even the first sector, or the one that says that it is partial.
        Err(error) if matches!(error.kind(), Kind::Incomplete | Kind::NotSaveImage) => {
            Seen::Refused
        }
        Err(error) => Seen::Lie(error.to_string()),
    }
}

#[test]
fn a_writer_killed_after_any_write_leaves_a_partial_image_or_the_whole_one() {
    let scratch = Scratch::new();
    for format in [Format::Zstd, Format::Raw] {
        let history = recorded(format);
        let count = history.events().len();
        let seen: Vec<Seen> = (0..=count)
            .map(|events| look(&scratch, &history.prefix(events)))
            .collect();
        // The write that completes it, and its sync, are the last two calls.
        assert!(
            seen[..count - 1].iter().all(|seen| *seen == Seen::Refused),
            "{seen:?}"
        );
        assert_eq!(seen[count - 1..], [Seen::Whole, Seen::Whole]);
    }
}

#[test]
fn power_lost_at_any_moment_leaves_a_partial_image_or_the_whole_one() {
    let scratch = Scratch::new();
    let history = recorded(Format::Zstd);
    for count in 0..=history.events().len() {
        for seed in 0..12 {
            let seen = look(&scratch, &history.power_loss(count, seed));
            assert!(!matches!(seen, Seen::Lie(_)), "{count} {seed}: {seen:?}");
        }
    }
}

#[test]
fn the_power_loss_test_can_fail_when_a_sync_is_missing() {
    let scratch = Scratch::new();
    let history = recorded(Format::Zstd);
    let syncs = history
        .events()
        .iter()
        .filter(|event| **event == Event::Sync)
        .count();
    assert_eq!(syncs, 4, "head, payload, record, completion");
    // Without the syncs of payload and record, the completing sector can be there before what it speaks of.
    let careless = history.without_sync(2).without_sync(1);
    let count = careless.events().len() - 1;
    let lies = (0..60).filter(|seed| {
        matches!(
            look(&scratch, &careless.power_loss(count, *seed)),
            Seen::Lie(_)
        )
    });
    assert!(lies.count() > 0, "no seed shows the missing sync");
}

#[test]
fn a_disk_that_is_full_or_fails_at_any_call_leaves_an_image_that_is_not_complete() {
    let scratch = Scratch::new();
    let image = new_image(Format::Zstd);
    for fault in [DiskFault::NoSpace, DiskFault::Io, DiskFault::Killed] {
        for at_call in 1.. {
            let inner = Arc::new(RecordedDisk::new(Vec::new()));
            let disk = Arc::new(FaultDisk::new(inner.clone(), at_call, fault));
            let outcome = write_on(disk.clone(), &image, stream(), Control::silent());
            if disk.calls() < at_call {
                outcome.expect("no fault was met");
                break;
            }
            let error = outcome.expect_err("a fault");
            let expected = if fault == DiskFault::NoSpace {
                Kind::NoSpace
            } else {
                Kind::Io
            };
            assert_eq!(error.kind(), expected);
            let seen = look(&scratch, &inner.bytes());
            // Only the very last sync can fail over an image that is all there.
            let last = disk.calls() == at_call && seen == Seen::Whole;
            assert!(
                last || seen == Seen::Refused,
                "{fault:?} at {at_call}: {seen:?}"
            );
        }
    }
}
