//! Drives QEMU: starts it, asks it, captures a running VM at one instant and restores it.
//!
//! ```text
//!  Qemu::detect ─▶ Launch ──boot──▶ Vm (stopped) ──resume──▶ Vm (running)
//!                    │                                          │ capture / capture_paused
//!                    └──restore(device state)──▶ Vm (stopped)   ▼
//!                          ▲                                 Captured: device state, RAM file,
//!                          └───────────────────────────────  frozen layers
//! ```
//!
//! Every call blocks and is bounded in time. There is no executor here on purpose: a future that is
//! dropped between *stop* and *go on* would leave a guest standing still. A caller with an executor
//! runs these calls on a thread for blocking work.
//!
//! QEMU is its own process in its own process group. It outlives the program that started it, and
//! [`Vm::connect`] finds it again by folder and [`ProcessId`]. Its folder holds everything that
//! belongs to the process: [`dir::QMP_SOCKET`], the agent sockets, the logs.
//!
//! # What QEMU is trusted for
//! It runs a guest that may have taken it over, so its answers are bounded (message length, event
//! count, stream length) before use. The human monitor is never used.
//!
//! # Sources
//! QEMU QMP Reference Manual; QEMU System Emulation (invocation, virtio, vm-templating); QEMU's
//! docs/devel/migration on the stream and the capability `x-ignore-shared`.
#![forbid(unsafe_code)]

pub mod block_backup;
pub mod block_jobs;
mod capture;
pub mod dir;
mod disks;
mod error;
mod kvm;
mod launch;
mod machine;
mod migration;
mod node_names;
mod process;
mod qemu;
mod qmp;
mod ram_pages;
mod recover;
mod relayer;
mod saved;
mod state_stream;
mod vm;

pub use capture::longest_pause;
pub use capture::{
    CaptureRequest, Captured, CapturedDisks, Moment, NewOverlay, PhaseTimes, RamMethod,
    STATE_BYTES_MAX,
};
pub use disks::{DiskChain, LayerNode};
pub use error::{CaptureError, CapturePhase, Error, GuestAfter, Result};
pub use kvm::KvmProbe;
pub use launch::{Boot, Disk, Launch, Layer, LayerFormat, Ram, RamSharing, RunAs};
pub use machine::{AGENT_PORTS_MAX, Accelerator, Difference, Machine};
pub use process::Exit;
pub use qemu::{CpuModel, MachineType, Qemu, Version};
pub use qmp::{Event, Qmp};
pub use recover::Recovered;
pub use saved::{take_apart, whole_stream};
pub use state_stream::StateFormat;
pub use stead_sys::process::ProcessId;
pub use vm::{RunState, Vm};
