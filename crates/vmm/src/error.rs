//! What can go wrong, and what stands afterwards.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::{Difference, DiskChain};

/// The result of this crate's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file, folder or socket could not be used.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// What was tried, for instance `open the RAM file`.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The system refused something that has no path.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// The QEMU program could not be started or is not one we can drive.
    #[error("{} cannot be used as QEMU: {found}", binary.display())]
    Unusable {
        /// The program.
        binary: PathBuf,
        /// What was found.
        found: String,
    },
    /// The QEMU process has ended; the guest is gone.
    #[error("QEMU ({process}) has ended, {status}; its last words: {log_tail}")]
    Died {
        /// The process.
        process: String,
        /// Exit status as far as known.
        status: String,
        /// The end of what it wrote to its log, trimmed.
        log_tail: String,
    },
    /// No process of this name runs (any more).
    #[error("the VM's QEMU process {process} does not run")]
    NotRunning {
        /// The process that was looked for.
        process: String,
    },
    /// QEMU answered a command with an error.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The QMP command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// No answer came in time.
    #[error("QEMU did not answer {command} within {within:?}; it may still carry it out")]
    Unanswered {
        /// The QMP command, or what was waited for.
        command: String,
        /// How long was waited.
        within: Duration,
    },
    /// The QMP connection broke.
    #[error("the QMP connection broke while {doing}: {source}")]
    Connection {
        /// What was being done.
        doing: String,
        /// What the system answered.
        source: io::Error,
    },
    /// QEMU (or whatever listens there) said something that is not QMP.
    #[error("unexpected QMP message while {doing}: {found}")]
    Protocol {
        /// What was being done.
        doing: String,
        /// The beginning of what was found.
        found: String,
    },
    /// The machine description or the launch cannot be carried out as asked.
    #[error("{what}: expected {expected}, found {found}; nothing was started")]
    Description {
        /// Which part of the description.
        what: &'static str,
        /// What is possible.
        expected: String,
        /// What was asked for.
        found: String,
    },
    /// State made elsewhere cannot run here.
    #[error("this worker cannot run the recorded machine: {}", list(.0))]
    Incompatible(Vec<Difference>),
    /// The VM is in another run state than the operation needs.
    #[error("{operation} needs a VM that is {needed}, but it is {found}; nothing was changed")]
    RunState {
        /// The operation.
        operation: &'static str,
        /// The state it needs.
        needed: &'static str,
        /// The state found.
        found: String,
    },
    /// The disks given do not match the disks of the VM.
    #[error("disks: expected {expected}, found {found}; nothing was changed")]
    Disks {
        /// What the VM has.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A frozen layer is still open for writing in QEMU.
    #[error("layer {} of {disk} is still open for writing (node {node}); it must not be read as frozen", path.display())]
    NotFrozen {
        /// The disk.
        disk: String,
        /// QEMU's node.
        node: String,
        /// The layer's file.
        path: PathBuf,
    },
    /// Saving or loading the device state failed in QEMU.
    #[error("{direction} the device state ended as {status}: {reason}")]
    Migration {
        /// `saving` or `loading`.
        direction: &'static str,
        /// QEMU's migration status.
        status: String,
        /// QEMU's reason, or what is known of it.
        reason: String,
    },
    /// The device state stream is longer than allowed.
    #[error("the device state is longer than {limit_bytes} bytes")]
    StateTooLong {
        /// The bound.
        limit_bytes: u64,
    },
    /// The device state stream is damaged or cut off.
    #[error("the device state cannot be used: {0}")]
    Stream(#[from] stead_migration_stream::Error),
    /// The stream did not bring the whole RAM.
    #[error(
        "the stream brought {block_bytes} bytes of RAM less {missing_pages} pages, expected {expected_bytes} bytes"
    )]
    RamIncomplete {
        /// The RAM's size.
        expected_bytes: u64,
        /// The size of the RAM block in the stream.
        block_bytes: u64,
        /// How many of its pages never came.
        missing_pages: u64,
    },
    /// Whoever asked for it does not want it any more.
    #[error("it was broken off: {why}")]
    BrokenOff {
        /// Why.
        why: String,
    },
    /// A capture failed; says what stands.
    #[error(transparent)]
    Capture(Box<CaptureError>),
}

/// A failed capture: where it failed, why, and what stands now.
#[derive(Debug, thiserror::Error)]
#[error(
    "capture failed at the step '{phase}': {source}; {}; {}",
    disks_text(self),
    guest
)]
pub struct CaptureError {
    /// The step that failed.
    pub phase: CapturePhase,
    /// Why.
    pub source: Error,
    /// Whether the disks already write to the new overlays.
    pub disks_switched: bool,
    /// The chains as QEMU has them now; `None` when it could not be asked (see `guest`).
    pub chains: Option<Vec<DiskChain>>,
    /// What the guest does now.
    pub guest: GuestAfter,
}

impl From<CaptureError> for Error {
    fn from(error: CaptureError) -> Self {
        Self::Capture(Box::new(error))
    }
}

/// A step of a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CapturePhase {
    /// Before the pause: overlays opened, capabilities set.
    Prepare,
    /// Stopping the vCPUs.
    Stop,
    /// Switching the disks to the new overlays.
    Snapshot,
    /// Taking the device state.
    State,
    /// Taking the RAM.
    Ram,
    /// Letting the guest go on.
    Resume,
    /// Reopening the frozen layers read-only and proving it.
    Freeze,
    /// Checking the device state that was taken.
    Verify,
}

impl std::fmt::Display for CapturePhase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Prepare => "prepare",
            Self::Stop => "stop the guest",
            Self::Snapshot => "switch the disks",
            Self::State => "take the device state",
            Self::Ram => "take the RAM",
            Self::Resume => "let the guest go on",
            Self::Freeze => "freeze the layers",
            Self::Verify => "check the device state",
        })
    }
}

/// What the guest does after a failed capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestAfter {
    /// It runs on.
    Running,
    /// It stands still, for this reason.
    Stopped(String),
    /// The QEMU process is gone.
    Gone,
}

impl std::fmt::Display for GuestAfter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Running => f.write_str("the guest runs on"),
            Self::Stopped(why) => write!(f, "the guest stands still ({why}): resume or recover it"),
            Self::Gone => f.write_str("the guest is gone"),
        }
    }
}

fn disks_text(error: &CaptureError) -> &'static str {
    if error.disks_switched {
        "the disks write to the new overlays"
    } else {
        "the disks are as before"
    }
}

fn list(differences: &[Difference]) -> String {
    let lines: Vec<String> = differences.iter().map(ToString::to_string).collect();
    lines.join("; ")
}
