//! After an interrupted capture: what stands, and the way back to a running guest.
//!
//! The program that captured was killed between *stop* and *cont*. QEMU is left in one of these states:
//!
//! | found | meaning | done |
//! |---|---|---|
//! | running | before *stop*, or after *cont* | overlays that no disk uses are closed |
//! | paused | stopped; disks switched or not | the same, and *cont* |
//! | finish-migrate | state was being saved | saving is cancelled, then the same |
//! | postmigrate | state was saved; disks given up | the same; *cont* takes them back |
//! | io-error | a disk had no room; QEMU waits with the guest's request | the same; *cont* tries it again |
//! | inmigrate, shutdown, other | not an interrupted capture | refused, nothing is changed |

use std::path::PathBuf;

use crate::disks::{self, BlockGraph, DiskChain};
use crate::error::Result;
use crate::migration::{self, Progress};
use crate::vm::{RunState, Vm};

/// What recovery found and what stands now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    /// The state in which the VM was found.
    pub found: RunState,
    /// Whether saving state was in flight and was cancelled.
    pub cancelled_saving: bool,
    /// Files that were opened as overlays and that no disk uses; QEMU has closed them.
    pub unused_overlays: Vec<PathBuf>,
    /// The chains as they really are; all layers below the tops are read-only.
    pub chains: Vec<DiskChain>,
}

impl Vm {
    /// Lets a VM that an interrupted capture left standing still run again, and says where its disks write.
    ///
    /// Can be repeated, and does no harm to a VM that runs.
    ///
    /// # Errors
    /// [`crate::Error::RunState`] when the VM is in a state that no capture leaves behind; else as [`Vm::ask`].
    pub fn recover_running(&mut self) -> Result<Recovered> {
        let recovered = self.recover_steps();
        recovered.map_err(|error| self.explain(error))
    }

    fn recover_steps(&mut self) -> Result<Recovered> {
        let found = self.status()?;
        found.clone().require(
            &[
                RunState::Running,
                RunState::Paused,
                RunState::FinishMigrate,
                RunState::PostMigrate,
                RunState::IoError,
            ],
            "recover an interrupted capture",
            "running, paused, finish-migrate, postmigrate or io-error",
        )?;
        let in_flight = matches!(migration::progress(self.qmp())?, Progress::Active(_));
        self.settle_and_resume()?;
        let unused_overlays = self.close_unused_overlays()?;
        Ok(Recovered {
            found,
            cancelled_saving: in_flight,
            unused_overlays,
            chains: self.freeze_layers()?,
        })
    }

    fn close_unused_overlays(&mut self) -> Result<Vec<PathBuf>> {
        let graph = BlockGraph::query(self.qmp())?;
        let mut paths = Vec::new();
        for layer in graph.unattached()? {
            disks::close_overlay(self.qmp(), &layer.node);
            paths.push(layer.path);
        }
        Ok(paths)
    }
}
