//! What state each bitmap of each layer is in, and what becomes of it.

use serde::{Deserialize, Serialize};
use stead_qcow2::ops::commit::{BitmapFate, BitmapOutcome, Chosen};
use stead_qcow2::{Result, StoredBitmap};

use crate::layers::Layers;
use crate::plan::StalePolicy;
use crate::running::Running;

/// Hex digits of a backup's id.
const ID_DIGITS: usize = 32;

/// The state of a bitmap in a layer; see `docs/merge.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BitmapState {
    /// It records writes, was saved, and there is no gap up to the topmost layer that has it.
    Valid,
    /// It does not record writes.
    Disabled,
    /// It was not saved when the image was last used.
    InUse,
    /// It is of a kind, or has flags, that are not known.
    Unknown,
    /// No layer above has it, so what was written there was not noted.
    Stale,
    /// A layer above has it, and one in between has not.
    Hole,
    /// Valid, with another granularity than in the topmost layer that has it.
    Granularity,
}

impl BitmapState {
    /// The word for people and programs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::Disabled => "disabled",
            Self::InUse => "in-use",
            Self::Unknown => "unknown",
            Self::Stale => "stale",
            Self::Hole => "hole",
            Self::Granularity => "granularity",
        }
    }

    /// Somebody could rely on it.
    fn says_something(self) -> bool {
        match self {
            Self::Valid | Self::Disabled | Self::Granularity => true,
            Self::InUse | Self::Unknown | Self::Stale | Self::Hole => false,
        }
    }
}

/// A bitmap in a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapInLayer {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: BitmapState,
    /// One bit stands for so many bytes.
    pub granularity_bytes: u64,
    /// How many bytes it has marked; none where that cannot be read.
    pub dirty_bytes: Option<u64>,
}

/// What becomes of a bitmap in the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Becomes {
    /// The base's and the layers' together.
    Merged,
    /// The layers', in a base that had none.
    Carried,
    /// Everything that the merge changes is marked in the base's.
    Marked,
    /// The base's stays as it is.
    Left,
    /// It was stale and is removed.
    Pruned,
    /// The base does not have it afterwards.
    Dropped,
}

impl Becomes {
    /// The word for people and programs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Merged => "merged",
            Self::Carried => "carried",
            Self::Marked => "marked",
            Self::Left => "left",
            Self::Pruned => "pruned",
            Self::Dropped => "dropped",
        }
    }
}

/// A bitmap's name, what becomes of it, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verdict {
    /// Its name.
    pub name: String,
    /// The name as it is stored.
    #[serde(skip)]
    pub name_bytes: Vec<u8>,
    /// What becomes of it.
    pub becomes: Becomes,
    /// Why.
    pub why: String,
    /// It could have been relied on, and cannot be afterwards.
    pub lost: bool,
    /// Layers above the top go on with it and must not: it is removed there.
    pub void_above: bool,
    /// How many bytes differ that none of the layers' bitmaps names, and are marked too.
    pub unnamed_bytes: u64,
}

/// The bitmaps of all layers, the active one's first.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Bitmaps {
    pub layers: Vec<Vec<StoredBitmap>>,
    pub top: usize,
    pub base: usize,
}

impl Bitmaps {
    /// Those of the files; of a VM's active layer those that QEMU has.
    pub fn read(layers: &Layers, running: Option<&Running>) -> Result<Self> {
        let all = (0..layers.files.len()).map(|index| {
            match (running.filter(|_| index == 0), layers.chain.layer(index)) {
                (Some(running), _) => Ok(running.stored()),
                (None, Some(layer)) => layer.stored_bitmaps(),
                (None, None) => Ok(Vec::new()),
            }
        });
        Ok(Self {
            layers: all.collect::<Result<_>>()?,
            top: layers.top,
            base: layers.base,
        })
    }

    pub fn of(&self, index: usize) -> &[StoredBitmap] {
        &self.layers[index]
    }

    pub fn find(&self, index: usize, name: &[u8]) -> Option<&StoredBitmap> {
        self.layers[index].iter().find(|stored| stored.name == name)
    }

    pub fn any(&self, range: std::ops::Range<usize>, name: &[u8]) -> bool {
        range
            .into_iter()
            .any(|index| self.find(index, name).is_some())
    }

    pub fn state(&self, index: usize, stored: &StoredBitmap) -> BitmapState {
        if stored.in_use {
            return BitmapState::InUse;
        }
        if !stored.is_known() {
            return BitmapState::Unknown;
        }
        if !stored.auto {
            return BitmapState::Disabled;
        }
        if index == 0 || is_a_backups(&stored.name) {
            return BitmapState::Valid;
        }
        let topmost = (0..index).find(|above| self.find(*above, &stored.name).is_some());
        let Some(topmost) = topmost else {
            return BitmapState::Stale;
        };
        if (topmost..index).any(|between| self.find(between, &stored.name).is_none()) {
            return BitmapState::Hole;
        }
        let other = self.find(topmost, &stored.name);
        if other.is_some_and(|other| other.granularity_bits != stored.granularity_bits) {
            return BitmapState::Granularity;
        }
        BitmapState::Valid
    }

    /// What is decided for single bitmaps of the base before the commit's own rules, and which are stale.
    pub fn choose(&self, policy: StalePolicy) -> (Vec<(Vec<u8>, Chosen)>, Vec<String>) {
        let (mut chosen, mut stale) = (self.backups_own(), Vec::new());
        for stored in self.of(self.base) {
            if chosen.iter().any(|(name, _)| *name == stored.name) {
                continue;
            }
            let unusable = stored.in_use || !stored.is_known();
            let above = self.any(0..self.base, &stored.name);
            let merged = self.any(self.top..self.base, &stored.name);
            let disabled = !stored.auto && !unusable;
            let choice = match policy {
                _ if disabled => merged.then_some(Chosen::Mark),
                _ if above => unusable.then_some(Chosen::Leave),
                StalePolicy::Prune => Some(Chosen::Remove),
                StalePolicy::Keep => unusable.then_some(Chosen::Leave),
                StalePolicy::Refuse => {
                    stale.push(text(&stored.name));
                    unusable.then_some(Chosen::Leave)
                }
            };
            chosen.extend(choice.map(|choice| (stored.name.clone(), choice)));
        }
        (chosen, stale)
    }

    /// Bitmaps of the base or of merged layers that stand for themselves: a backup goes on with each.
    fn backups_own(&self) -> Vec<(Vec<u8>, Chosen)> {
        let mut carried: Vec<(Vec<u8>, Chosen)> = Vec::new();
        for stored in (self.top..=self.base).flat_map(|index| self.of(index)) {
            let own = self.find(self.base, &stored.name);
            let says_nothing = own.is_some_and(|own| own.in_use || !own.is_known() || !own.auto);
            let is_new = carried.iter().all(|(name, _)| *name != stored.name);
            if is_a_backups(&stored.name) && !says_nothing && is_new {
                carried.push((stored.name.clone(), Chosen::Carry));
            }
        }
        carried
    }

    /// What the commit made, or would make, of a bitmap.
    pub fn verdict(&self, outcome: &BitmapOutcome, chosen: &[(Vec<u8>, Chosen)]) -> Verdict {
        let name = &outcome.name;
        let choice = chosen.iter().find(|(other, _)| other == name);
        let said = self.say(outcome, choice.map(|(_, choice)| *choice));
        let unnamed_bytes = match outcome.fate {
            BitmapFate::Merged { unnamed_bytes } | BitmapFate::Carried { unnamed_bytes } => {
                unnamed_bytes
            }
            BitmapFate::Marked
            | BitmapFate::Kept
            | BitmapFate::MarkedInstead { .. }
            | BitmapFate::Dropped { .. } => 0,
        };
        self.decided(name, said, unnamed_bytes)
    }

    /// What becomes of a bitmap and why, with what that means for others.
    pub fn decided(
        &self,
        name: &[u8],
        (becomes, why): (Becomes, String),
        unnamed_bytes: u64,
    ) -> Verdict {
        let gone = becomes == Becomes::Dropped;
        let topmost =
            (self.top..=self.base).find_map(|index| Some((index, self.find(index, name)?)));
        let said =
            topmost.is_some_and(|(index, stored)| self.state(index, stored).says_something());
        let began = match is_a_backups(name) {
            true => self.any(self.top..self.base, name),
            false => self.find(self.top, name).is_some(),
        };
        let goes_on = began && self.any(0..self.top, name);
        Verdict {
            name: text(name),
            name_bytes: name.to_vec(),
            becomes,
            why,
            lost: gone && said,
            void_above: gone && goes_on,
            unnamed_bytes,
        }
    }

    fn say(&self, outcome: &BitmapOutcome, choice: Option<Chosen>) -> (Becomes, String) {
        let name = &outcome.name;
        match (choice, &outcome.fate) {
            (Some(Chosen::Remove), _) => (
                Becomes::Pruned,
                "no layer above has it, so what was written there was not noted, and no backup can rely on it".into(),
            ),
            (Some(Chosen::Leave), _) => (Becomes::Left, self.why_left(name)),
            (Some(Chosen::Mark), _) => (
                Becomes::Marked,
                "it is disabled in the base, and merged layers have it: all that the merge changes is marked, and it stays disabled".into(),
            ),
            (Some(Chosen::Carry), BitmapFate::Marked) => (
                Becomes::Marked,
                "a backup goes on with it: all that the merge changes is marked".into(),
            ),
            (Some(Chosen::Carry), BitmapFate::Carried { .. }) => (
                Becomes::Carried,
                "a backup goes on with it: what its lowest layer says, and all that is defined above".into(),
            ),
            (None | Some(Chosen::Carry), BitmapFate::Merged { unnamed_bytes: 0 }) => {
                (Becomes::Merged, "the base and all merged layers have it".into())
            }
            (None | Some(Chosen::Carry), BitmapFate::Merged { unnamed_bytes }) => (
                Becomes::Merged,
                format!("the base and all merged layers have it; {unnamed_bytes} bytes that none of them names differ, and are marked too"),
            ),
            (None, BitmapFate::Carried { unnamed_bytes: 0 }) => {
                (Becomes::Carried, "it began above the base".into())
            }
            (None, BitmapFate::Carried { unnamed_bytes }) => (
                Becomes::Carried,
                format!("it began above the base; {unnamed_bytes} bytes that it does not name differ, and are marked too"),
            ),
            (None, BitmapFate::Marked) if self.any(0..self.top, name) => (
                Becomes::Marked,
                "the merged layers do not have it, one above has: all that the merge changes is marked".into(),
            ),
            (None, BitmapFate::Marked) => (
                Becomes::Marked,
                "no layer above has it, and it is kept as asked: all that the merge changes is marked".into(),
            ),
            (None | Some(Chosen::Carry), BitmapFate::Kept) => (Becomes::Left, self.why_left(name)),
            (None | Some(Chosen::Carry), BitmapFate::MarkedInstead { reason }) => (
                Becomes::Marked,
                format!("{reason}: all that the merge changes is marked"),
            ),
            (None | Some(Chosen::Carry), BitmapFate::Dropped { reason }) => (Becomes::Dropped, reason.clone()),
        }
    }

    pub fn why_left(&self, name: &[u8]) -> String {
        let own = self.find(self.base, name);
        if own.is_some_and(|own| own.in_use) {
            "it was not saved when the base was last used and says nothing; it stays so that the ones above are not taken for whole. Make a full backup and remove it in all layers".into()
        } else if own.is_some_and(|own| !own.is_known()) {
            "it is of a kind that is not known, and is not touched".into()
        } else {
            "it is disabled: it says what had changed until then, and nothing of this merge".into()
        }
    }
}

/// Whether it is a bitmap that one backup began and that names all since then: `NAME@` and the backup's id. Layers
/// above need not have it, so it is not stale without them (`docs/backup.md`).
pub(crate) fn is_a_backups(name: &[u8]) -> bool {
    let digit = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    let Some(at) = name.len().checked_sub(ID_DIGITS) else {
        return false;
    };
    let (start, id) = name.split_at(at);
    start.ends_with(b"@") && id.iter().all(digit)
}

pub(crate) fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use stead_qcow2::HostOffset;

    fn stored(name: &str, granularity_bits: u8, (in_use, auto): (bool, bool)) -> StoredBitmap {
        StoredBitmap {
            name: name.into(),
            table: HostOffset(0),
            table_entries: 1,
            in_use,
            auto,
            granularity_bits,
            flags: u32::from(in_use) | u32::from(auto) << 1,
            kind: 1,
            extra: Vec::new(),
        }
    }

    fn on(name: &str) -> StoredBitmap {
        stored(name, 16, (false, true))
    }

    #[test]
    fn a_bitmap_is_stale_without_a_layer_above_and_has_a_hole_where_one_between_lacks_it() {
        let bitmaps = Bitmaps {
            layers: vec![
                vec![on("all"), on("hole"), stored("fine", 12, (false, true))],
                vec![on("all"), on("fine")],
                vec![
                    on("all"),
                    on("hole"),
                    on("fine"),
                    on("stale"),
                    stored("dead", 16, (true, true)),
                    stored("off", 16, (false, false)),
                ],
            ],
            top: 1,
            base: 2,
        };
        let states = bitmaps.of(2).iter();
        let states: Vec<_> = states.map(|stored| bitmaps.state(2, stored)).collect();
        use BitmapState::{Disabled, Granularity, Hole, InUse, Stale, Valid};
        assert_eq!(states, [Valid, Hole, Granularity, Stale, InUse, Disabled]);
        let (chosen, refused) = bitmaps.choose(StalePolicy::Prune);
        let remove = |name: &str| (name.as_bytes().to_vec(), Chosen::Remove);
        assert_eq!(chosen, [remove("stale"), remove("dead")]);
        assert!(refused.is_empty());
        let (chosen, refused) = bitmaps.choose(StalePolicy::Keep);
        assert_eq!(chosen, [(b"dead".to_vec(), Chosen::Leave)]);
        assert!(refused.is_empty());
        assert_eq!(bitmaps.choose(StalePolicy::Refuse).1, ["stale", "dead"]);
    }

    #[test]
    fn the_bitmap_of_a_backup_is_never_stale_and_another_with_an_at_sign_is() {
        let id = "0123456789abcdef".repeat(2);
        let names = [
            format!("daily@{id}"),
            format!("daily{id}"),
            "a@b".to_owned(),
        ];
        let bitmaps = Bitmaps {
            layers: vec![Vec::new(), names.iter().map(|name| on(name)).collect()],
            top: 0,
            base: 1,
        };
        let states = bitmaps.of(1).iter();
        let states: Vec<_> = states.map(|stored| bitmaps.state(1, stored)).collect();
        use BitmapState::{Stale, Valid};
        assert_eq!(states, [Valid, Stale, Stale]);
        for policy in [StalePolicy::Prune, StalePolicy::Refuse] {
            let (chosen, _) = bitmaps.choose(policy);
            assert_eq!(chosen[0], (names[0].clone().into_bytes(), Chosen::Carry));
        }
        assert_eq!(bitmaps.choose(StalePolicy::Refuse).1.len(), 2);
    }
}
