//! The room where the base lies, watched while QEMU writes to it: a job stands still rather than fail.

use std::path::Path;

use stead_sys::space;
use stead_vmm::Qmp;
use stead_vmm::block_jobs::{self, Job, JobState, Order};

use super::Live;
use crate::error::{MergeError, Result};
use crate::event::Step;
use crate::space::{Place, place_of};

/// A job is paused when its file system has less free than this, in bytes.
const LOW_BYTES: u64 = 32 << 20;
/// How much longer than asked a device is made when it was too short all the same, in bytes.
const MORE_BYTES: u64 = 256 << 20;

/// Watches the room while the job writes.
pub(super) struct Room<'a, 'b> {
    live: &'a Live<'b>,
    /// We have paused it.
    paused: bool,
    told: bool,
    extended: u64,
}

impl<'a, 'b> Room<'a, 'b> {
    pub fn new(live: &'a Live<'b>) -> Self {
        Self {
            live,
            paused: false,
            told: false,
            extended: 0,
        }
    }

    pub fn look(&mut self, qmp: &mut Qmp, job: &Job) -> Result<()> {
        let base = self.live.going.record.base_path();
        let io = |source| MergeError::io("find the room for", &base, source);
        let failed = |error| self.live.interrupted("let the job go on", error);
        let short = block_jobs::lacks_room(qmp, &self.live.job).map_err(failed)?;
        if place_of(&base).map_err(io)? == Place::Device {
            if short {
                self.extend(&base)?;
                block_jobs::try_again(qmp, &self.live.job).map_err(failed)?;
            }
            return Ok(());
        }
        let free = space::available_bytes(&base).map_err(io)?;
        let left = job.total.saturating_sub(job.done);
        let is_low = free < LOW_BYTES && free < left;
        if short || (self.paused && is_low) || (is_low && job.state == JobState::Running) {
            self.tell_once(&base, free);
        }
        if short && !is_low {
            block_jobs::try_again(qmp, &self.live.job).map_err(failed)?;
            self.told = false;
        } else if is_low && !self.paused && !short {
            self.live.tell(qmp, Order::Pause)?;
            self.paused = true;
        } else if self.paused && !is_low {
            self.live.tell(qmp, Order::Resume)?;
            (self.paused, self.told) = (false, false);
        }
        Ok(())
    }

    fn tell_once(&mut self, base: &Path, free: u64) {
        if !self.told {
            self.told = true;
            self.live.going.watch.notice(format!(
                "the merge stands still: {free} bytes are free where {} lies; it goes on when there is room, Ctrl-C ends it",
                base.display()
            ));
        }
    }

    fn extend(&mut self, device: &Path) -> Result<()> {
        let Some(command) = &self.live.request.extend_cmd else {
            self.tell_once(device, 0);
            return Ok(());
        };
        let now = crate::space::device_bytes(device)
            .map_err(|source| MergeError::io("measure", device, source))?;
        self.extended = now.max(self.extended).saturating_add(MORE_BYTES);
        self.live.going.watch.step(Step::Extend);
        crate::run::extend_to(command, device, self.extended)
    }
}
