//! What stands against a merge by a running QEMU, and what that needs.

use std::collections::BTreeSet;

use stead_qcow2::ops::commit::{self, CommitReport};
use stead_qcow2::{Control, LayerFormat};

use super::Thinking;
use crate::bitmaps::{Becomes, text};
use crate::error::{Kind, MergeError, Result};
use crate::open;
use crate::space::{Place, Space, device_bytes, place_of};

const OFFLINE: &str = "stop the VM and merge without --qmp";
/// Images before this version have no bitmaps.
const VERSION_WITH_BITMAPS: u32 = 3;

impl Thinking<'_> {
    /// What QEMU's commit cannot do, or not so that it can be proven.
    pub(super) fn live(&mut self) {
        let [top, base] = [self.layers.top, self.layers.base];
        let length = |index| {
            let chain = self.layers.chain.below(index);
            chain.map_or(0, |chain| chain.len())
        };
        if length(base) != length(top) {
            self.refuse(
                Kind::Conflict,
                "the layers have different lengths, which bitmaps do not survive in QEMU",
                OFFLINE,
            );
        }
    }

    /// The space and the bitmaps of a merge by QEMU.
    pub(super) fn measure_live(&mut self) -> Result<()> {
        if !self.plan.refused.is_empty() {
            return Ok(());
        }
        let is_raw = self.layers.base_file().format == LayerFormat::Raw;
        if !is_raw && self.layers.top > 0 {
            let Some(report) = self.measured()? else {
                return Ok(());
            };
            self.plan.data_bytes = report.defined_bytes;
            self.verdicts(&report);
            self.refuse_untold();
            return self.space(&report, None).map(drop);
        }
        let base = self.layers.chain.layer(self.layers.base);
        let keeps = base.is_some_and(|base| base.header().version >= VERSION_WITH_BITMAPS);
        self.decide(self.bitmaps.running_verdicts(self.request.stale, keeps));
        self.refuse_untold();
        if is_raw {
            return self.raw_space();
        }
        let Some(report) = self.measured()? else {
            return Ok(());
        };
        self.plan.data_bytes = report.defined_bytes;
        self.space(&report, None)?;
        self.room_for_carried();
        Ok(())
    }

    fn measured(&mut self) -> Result<Option<CommitReport>> {
        let quiet = Control::default();
        match commit::measure_in_use(self.layers.committed(), self.options, &quiet) {
            Ok(report) => Ok(Some(report)),
            Err(error) => {
                self.refuse_error(&error);
                Ok(None)
            }
        }
    }

    /// What bitmaps a live merge cannot keep as planned.
    fn refuse_untold(&mut self) {
        let verdicts = self.plan.bitmaps.iter();
        let not = verdicts.filter(|verdict| {
            verdict.void_above || (verdict.becomes == Becomes::Carried && verdict.unnamed_bytes > 0)
        });
        let mut not: BTreeSet<String> = not.map(|verdict| verdict.name.clone()).collect();
        not.extend(self.bitmaps.disabled_in_base().into_iter().map(text));
        if !not.is_empty() {
            let names: Vec<String> = not.into_iter().collect();
            let reason = format!("bitmaps that QEMU cannot be told of: {}", names.join(", "));
            self.refuse(Kind::Conflict, reason, OFFLINE);
        }
    }

    /// The bitmaps that only QEMU's memory has whole are not in what was measured.
    fn room_for_carried(&mut self) {
        let carried = self.plan.bitmaps.iter();
        let carried = carried.filter(|verdict| verdict.becomes == Becomes::Carried);
        let in_active = |name: &[u8]| self.bitmaps.find(0, name);
        let length = self.layers.chain.len();
        let base = self.layers.chain.layer(self.layers.base);
        let cluster_bytes = base.map_or(0, |base| base.cluster_size().bytes());
        let bytes = carried.filter_map(|verdict| {
            let bits = length >> in_active(&verdict.name_bytes)?.granularity_bits.min(63);
            // Its bits, and a table and an entry of the directory in clusters of their own.
            Some(bits.div_ceil(8) + 3 * cluster_bytes)
        });
        let more: u64 = bytes.sum();
        let Some(space) = self.plan.space.first_mut() else {
            return;
        };
        space.needed_bytes = space.needed_bytes.saturating_add(more);
        if !space.is_there() {
            let words = space.words();
            self.refuse(
                Kind::NoSpace,
                words,
                "make room, or extend the device (--extend-cmd)",
            );
        }
    }

    /// A raw file may need as much as is merged, but no more than it has holes.
    fn raw_space(&mut self) -> Result<()> {
        let merged = self.layers.base - self.layers.top;
        let chain = self.layers.chain.below(self.layers.top);
        let Some(chain) = chain else {
            return Ok(());
        };
        for range in chain.allocated(merged) {
            let range = range.map_err(open::engine)?;
            self.plan.data_bytes += range.end - range.start;
        }
        let base = self.layers.base_file().path.clone();
        let io = |source| MergeError::io("find the room for", &base, source);
        let (length, place) = (chain.len(), place_of(&base).map_err(io)?);
        let (needed_bytes, available_bytes) = match place {
            Place::Device => (length, device_bytes(&base).map_err(io)?),
            Place::FileSystem => {
                let there = stead_sys::space::allocated_bytes(&base).map_err(io)?;
                let holes = length.saturating_sub(there);
                let free = stead_sys::space::available_bytes(&base).map_err(io)?;
                (self.plan.data_bytes.min(holes), free)
            }
        };
        let space = Space {
            place,
            peak_bytes: length,
            end_bytes: length,
            needed_bytes,
            available_bytes,
            file: base,
        };
        if !space.is_there() {
            self.refuse(Kind::NoSpace, space.words(), "make room");
        }
        self.plan.space.push(space);
        Ok(())
    }
}
