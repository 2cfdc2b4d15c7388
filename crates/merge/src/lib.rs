//! Merging layers of a chain into the one below them, with their dirty bitmaps, as one transaction.
//!
//! * [`plan()`] reads the chain and says what a merge would do, what it needs, and why it is refused.
//! * [`run()`] does it: record, commit, proof, the child's new backing name, and only then are layers removed.
//! * [`fuse()`] makes one new file of several layers, for a chain that a running VM has open.
//! * [`run_live()`] does it under a VM that runs, by QEMU's block jobs.
//! * [`recover()`] finishes or undoes what was interrupted.
//!
//! `docs/merge.md` has the steps and what a crash behind each of them leaves.
//!
//! # Invariants
//! * The disk seen through the chain is the same before, after, and between any two steps.
//! * A bitmap says at least what it must: it is kept, or named as gone, and never says less.
//! * No layer is removed before what replaces it was read back and found whole.

#![forbid(unsafe_code)]

mod bitmaps;
mod error;
mod event;
mod fuse;
mod layers;
mod live;
mod open;
mod plan;
mod prove;
mod record;
mod recover;
mod run;
mod running;
mod siblings;
mod space;

pub use bitmaps::{Becomes, BitmapInLayer, BitmapState, Verdict};
pub use error::{Kind, MergeError, Result};
pub use event::{Event, Step, Watch};
pub use fuse::{FuseLayers, Fused, fuse, fuse_needs_bytes};
pub use layers::Role;
pub use live::{LiveReport, run_live};
pub use plan::{LayerInfo, MergePlan, MergeRequest, Refusal, Searched, StalePolicy, plan};
pub use record::record_path;
pub use recover::{Outcome, Recovered, recover};
pub use run::{MergeReport, run};
pub use space::{Place, Space};
