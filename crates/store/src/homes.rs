//! Where a chunk or node may be read: every pack that has it, one after the other.
//!
//! Mostly there is one. There are more where content was stored again because its pack was lost, where two
//! publishes that did not see each other stored the same, and while garbage collection rewrites packs. What
//! one pack does not give, the next may; only when no pack does, what was found in the first is the error.
//!
//! ```text
//!  untried home ─▶ read ─▶ right bytes                       done
//!       ▲           └────▶ missing, cut or damaged ─▶ tried
//!       └─ there is one ◀──────────────────────────────┘
//!          else read the index again (gc may have moved it) ─▶ still none: the error
//! ```

use std::sync::Arc;

use tracing::warn;

use crate::core::{Core, pack_path};
use crate::error::{Error, Result};
use crate::hash::Hash;
use crate::index::{KnownPack, Location};

/// What a frame did not give: its pack is missing, or something in it is damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Loss {
    pack: Hash,
    frame: u32,
    /// What was found instead; nothing where the pack is missing.
    found: Option<Arc<str>>,
}

impl Loss {
    /// What `error`, met while reading a frame, says of the frame.
    ///
    /// # Errors
    /// `error` itself where it says nothing of the frame: another copy would not help.
    pub(crate) fn of(pack: &KnownPack, frame: u32, error: Error) -> Result<Self> {
        Ok(Self {
            pack: pack.name,
            frame,
            found: error.into_loss()?.map(Arc::from),
        })
    }

    /// The error that it is where there is no other copy.
    pub(crate) fn to_error(&self) -> Error {
        let object = pack_path(&self.pack);
        match &self.found {
            Some(found) => Error::damaged(object, &**found),
            None => Error::ObjectMissing {
                object,
                affects: None,
            },
        }
    }
}

/// Where one chunk or node was looked for in vain.
#[derive(Debug, Default)]
pub(crate) struct Tried(Vec<Loss>);

impl Tried {
    pub(crate) fn add(&mut self, loss: Loss) {
        self.0.push(loss);
    }

    fn has(&self, pack: &Hash, frame: u32) -> bool {
        let is_it = |loss: &Loss| loss.pack == *pack && loss.frame == frame;
        self.0.iter().any(is_it)
    }

    /// What was found in the first place, if any was tried.
    pub(crate) fn error(&self) -> Option<Error> {
        self.0.first().map(Loss::to_error)
    }
}

impl Core {
    /// Where a chunk or node is; a place that was not tried.
    pub(crate) fn find(&self, hash: &Hash, tried: &Tried) -> Option<(Arc<KnownPack>, Location)> {
        let index = self.read_index();
        let mut homes = index.homes(hash);
        let (pack, location) = homes.find(|(pack, at)| !tried.has(&pack.name, at.frame))?;
        Some((Arc::clone(pack), location))
    }

    /// [`Core::find`] after reading what is new in the index, or all of it where a place was tried: garbage
    /// collection may have moved what lay there.
    pub(crate) fn look_again(
        &self,
        hash: &Hash,
        tried: &Tried,
    ) -> Result<Option<(Arc<KnownPack>, Location)>> {
        if tried.0.is_empty() {
            self.refresh_index()?;
        } else {
            self.reload_index()?;
        }
        Ok(self.find(hash, tried))
    }

    /// Where a chunk or node is; looks for new index objects if it is unknown.
    pub(crate) fn locate(
        &self,
        what: &'static str,
        hash: &Hash,
    ) -> Result<(Arc<KnownPack>, Location)> {
        let nowhere = Tried::default();
        if let Some(found) = self.find(hash, &nowhere) {
            return Ok(found);
        }
        let found = self.look_again(hash, &nowhere)?;
        found.ok_or_else(|| self.unknown(what, hash))
    }

    /// Remembers that a pack is missing or damaged, so that it is looked into last from now on.
    pub(crate) fn suspect(&self, loss: &Loss) {
        if self.write_index().suspect(loss.pack) {
            warn!(error = %loss.to_error(), "another copy of what it holds is looked for");
        }
    }
}
