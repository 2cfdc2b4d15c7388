//! Bitmaps that a running QEMU has in its memory, and what becomes of bitmaps where only QEMU can say.
//!
//! The file of the active layer does not have what its bitmaps say: QEMU stores them when it closes it. So of that
//! layer QEMU is asked. What becomes of bitmaps is decided here where the active layer is merged, or the base is raw:
//! the base's own record all that QEMU writes to it, and the layers' are carried over as they are.

use std::path::Path;

use stead_qcow2::{HostOffset, LayerFile, LayerFormat, StoredBitmap};
use stead_vmm::Qmp;
use stead_vmm::block_jobs::{self, Node, NodeBitmap};

use crate::bitmaps::{Becomes, BitmapState, Bitmaps, Verdict, is_a_backups};
use crate::error::{Kind, MergeError, Result, vm};
use crate::layers::identity;
use crate::plan::StalePolicy;

/// What QEMU says of the disk's active layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Running {
    pub bitmaps: Vec<NodeBitmap>,
}

impl Running {
    /// Asks the VM that has `active` open.
    pub fn ask(qmp: &mut Qmp, active: &Path) -> Result<Self> {
        let all = nodes(qmp)?;
        let file = LayerFile {
            path: active.to_owned(),
            format: LayerFormat::Qcow2,
        };
        let bitmaps = node_of(&all, &file)?.bitmaps.iter();
        Ok(Self {
            bitmaps: bitmaps.filter(|one| one.is_persistent).cloned().collect(),
        })
    }

    /// As a file would have them, were they saved now.
    pub fn stored(&self) -> Vec<StoredBitmap> {
        let stored = self.bitmaps.iter().map(|bitmap| StoredBitmap {
            name: bitmap.name.clone().into_bytes(),
            table: HostOffset(0),
            table_entries: 0,
            in_use: bitmap.is_inconsistent,
            auto: bitmap.is_recording,
            granularity_bits: u8::try_from(bitmap.granularity_bytes.max(1).ilog2())
                .unwrap_or(u8::MAX),
            flags: u32::from(bitmap.is_inconsistent) | u32::from(bitmap.is_recording) << 1,
            kind: 1,
            extra: Vec::new(),
        });
        stored.collect()
    }

    /// How many bytes a bitmap has marked.
    pub fn dirty_bytes(&self, name: &[u8]) -> Option<u64> {
        let found = self
            .bitmaps
            .iter()
            .find(|one| one.name.as_bytes() == name)?;
        (!found.is_inconsistent).then_some(found.dirty_bytes)
    }
}

/// All nodes of the VM.
pub(crate) fn nodes(qmp: &mut Qmp) -> Result<Vec<Node>> {
    block_jobs::nodes(qmp).map_err(|error| vm("list the VM's disks", error))
}

/// The node that reads and writes a layer's format.
pub(crate) fn node_of<'a>(all: &'a [Node], layer: &LayerFile) -> Result<&'a Node> {
    let io = |source| MergeError::io("find", &layer.path, source);
    let wanted = identity(&layer.path).map_err(io)?;
    let driver = match layer.format {
        LayerFormat::Qcow2 => "qcow2",
        LayerFormat::Raw => "raw",
    };
    let is_it = |node: &&Node| node.driver == driver && is_over(node, wanted);
    all.iter().find(is_it).ok_or_else(|| {
        let found = format!("the VM does not have {} open", layer.path.display());
        MergeError::new(Kind::Usage, "merge under the running VM", found)
            .next("give the QMP socket of the VM that runs on this disk")
    })
}

/// Whether a node stands over the file of that identity.
pub(crate) fn is_over(node: &Node, wanted: (u64, u64)) -> bool {
    node.file.as_deref().and_then(|path| identity(path).ok()) == Some(wanted)
}

impl Bitmaps {
    /// What becomes of every bitmap when QEMU merges the active layer, too, or into a raw base. `base_keeps` says
    /// whether the base can have bitmaps.
    pub fn running_verdicts(&self, policy: StalePolicy, base_keeps: bool) -> Vec<Verdict> {
        let mut names: Vec<&[u8]> = Vec::new();
        for index in std::iter::once(self.base).chain(self.top..self.base) {
            for stored in self.of(index) {
                if !names.contains(&stored.name.as_slice()) {
                    names.push(&stored.name);
                }
            }
        }
        let verdicts = names.into_iter().map(|name| {
            let (becomes, why) = match self.find(self.base, name) {
                Some(own) => self.of_the_base(own, policy),
                None => self.of_the_layers(name, base_keeps),
            };
            self.decided(name, (becomes, why), 0)
        });
        verdicts.collect()
    }

    /// Bitmaps that do not record in the base and must have marked what is merged: QEMU cannot do that.
    pub fn disabled_in_base(&self) -> Vec<&[u8]> {
        let own = self.of(self.base).iter();
        let disabled = own.filter(|own| {
            let usable = !own.in_use && own.is_known();
            usable && !own.auto && self.any(self.top..self.base, &own.name)
        });
        disabled.map(|own| own.name.as_slice()).collect()
    }

    fn of_the_base(&self, own: &StoredBitmap, policy: StalePolicy) -> (Becomes, String) {
        let name = &own.name;
        let (above, unusable) = (self.any(0..self.base, name), own.in_use || !own.is_known());
        let stands_for_itself = is_a_backups(name) && !unusable;
        let is_stale = !above && !stands_for_itself && (unusable || own.auto);
        if is_stale && policy == StalePolicy::Prune {
            return (
                Becomes::Pruned,
                "no layer above has it, so no backup can rely on it".into(),
            );
        }
        if unusable || (!own.auto && !above) {
            return (Becomes::Left, self.why_left(name));
        }
        let mut merged = self.top..self.base;
        let whole = merged.all(|index| self.is_whole(index, name));
        match whole {
            true => (
                Becomes::Merged,
                "the base and all merged layers have it".into(),
            ),
            false => (
                Becomes::Marked,
                "not all merged layers have it whole: all that the merge writes is marked".into(),
            ),
        }
    }

    fn of_the_layers(&self, name: &[u8], base_keeps: bool) -> (Becomes, String) {
        let dropped = |why: &str| (Becomes::Dropped, why.to_owned());
        let mut merged = self.top..self.base;
        let end = merged.find(|index| self.find(*index, name).is_none());
        let end = end.unwrap_or(self.base);
        if !base_keeps {
            return dropped("the base is of a format that has no bitmaps");
        }
        if end == self.top || self.any(end..self.base, name) {
            return dropped("a layer above one that has it does not have it");
        }
        if !(self.top..end).all(|index| self.is_whole(index, name)) {
            return dropped("in one of the layers it was not saved, or does not record writes");
        }
        (Becomes::Carried, "it began above the base".into())
    }

    fn is_whole(&self, index: usize, name: &[u8]) -> bool {
        let Some(stored) = self.find(index, name) else {
            return false;
        };
        match self.state(index, stored) {
            BitmapState::Valid | BitmapState::Granularity => true,
            BitmapState::Disabled
            | BitmapState::InUse
            | BitmapState::Unknown
            | BitmapState::Stale
            | BitmapState::Hole => false,
        }
    }
}
