//! Verification: everything in the store is read and checked, and damage is put down to checkpoints.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::thread;

use bytes::Bytes;

use crate::backend::Listed;
use crate::core::{Core, INDEXES, PACKS, pack_name, pack_path};
use crate::error::{Error, Result};
use crate::hash::Hash;
use crate::index::{KnownPack, Location};
use crate::manifest::{ManifestId, Role};
use crate::pack::{PACK_BYTES_MAX, PackKind, PackTable, PlacedFrame, decode_frame, decode_whole};
use crate::pool::Ordered;
use crate::progress::Progress;
use crate::tree::{ChunkSize, FAN_OUT, Node, TreeRef, child_node, child_span, describe_range};

/// How many reasons are kept for one checkpoint.
const REASONS_MAX: usize = 20;

/// An object that is not what it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedObject {
    /// The object.
    pub object: String,
    /// What was found.
    pub found: String,
}

/// A checkpoint or template that cannot be restored whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedManifest {
    /// The object.
    pub object: String,
    /// Its id, if its name is one.
    pub id: Option<ManifestId>,
    /// What it is for.
    pub role: Role,
    /// What is lost: ranges of trees and why; the first twenty.
    pub reasons: Vec<String>,
    /// How many more there are.
    pub more_reasons: u64,
}

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Packs read.
    pub packs: u64,
    /// Packs that no index object names: left by a publish that did not finish, or still runs.
    pub packs_without_index: u64,
    /// Bytes of packs read.
    pub pack_bytes: u64,
    /// Chunks and nodes checked.
    pub chunks: u64,
    /// Index objects read.
    pub index_objects: u64,
    /// Checkpoints and templates walked.
    pub manifests: u64,
    /// Everything damaged.
    pub damaged_objects: Vec<DamagedObject>,
    /// Every checkpoint and template that is not whole.
    pub damaged_manifests: Vec<DamagedManifest>,
}

impl VerifyReport {
    /// Whether nothing is damaged.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.damaged_objects.is_empty() && self.damaged_manifests.is_empty()
    }

    fn damage(&mut self, object: &str, found: impl Into<String>) {
        self.damaged_objects.push(DamagedObject {
            object: object.to_owned(),
            found: found.into(),
        });
    }
}

/// Frames whose every chunk is what its name says.
type GoodFrames = HashSet<(Hash, u32)>;

/// What checking one pack found.
struct PackCheck {
    object: Listed,
    good: Vec<u32>,
    chunks: u64,
    damage: Vec<String>,
}

impl Core {
    pub(crate) fn verify(&self, progress: &Progress) -> Result<VerifyReport> {
        self.reload_index()?;
        let mut report = VerifyReport::default();
        let tables = self.verify_indexes(&mut report)?;
        let packs = self.io.list(PACKS)?;
        progress.start(packs.iter().map(|pack| pack.bytes).sum());
        let good = self.verify_packs(&packs, &tables, &mut report, progress)?;
        missing_packs(&packs, &tables, &mut report);
        let mut walk = ManifestWalk {
            core: self,
            good: &good,
            whole: HashSet::new(),
        };
        for role in Role::ALL {
            walk.all(role, &mut report)?;
        }
        Ok(report)
    }

    fn verify_indexes(&self, report: &mut VerifyReport) -> Result<BTreeMap<Hash, PackTable>> {
        let mut tables = BTreeMap::new();
        for object in self.io.list(INDEXES)? {
            report.index_objects += 1;
            match self.fetch_index_object(&object) {
                Ok((_, packs)) => {
                    tables.extend(packs.into_iter().map(|pack| (pack.name, pack.table)));
                }
                Err(Error::Damaged { object, found, .. }) => report.damage(&object, found),
                Err(Error::ObjectMissing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(tables)
    }

    fn verify_packs(
        &self,
        packs: &[Listed],
        tables: &BTreeMap<Hash, PackTable>,
        report: &mut VerifyReport,
        progress: &Progress,
    ) -> Result<GoodFrames> {
        let threads = self.tuning().threads;
        let mut good = GoodFrames::new();
        thread::scope(|scope| {
            let work = move |object: &Listed| self.verify_pack(object, tables);
            let mut pool = Ordered::new(scope, threads, work);
            let mut packs = packs.iter();
            loop {
                while pool.in_flight() < threads.max(1) {
                    let Some(object) = packs.next() else { break };
                    pool.submit(object);
                }
                if pool.in_flight() == 0 {
                    return Ok(good);
                }
                let check = pool.take()?;
                progress.advance(check.object.bytes)?;
                note_pack(check, tables, report, &mut good);
            }
        })
    }

    fn verify_pack(
        &self,
        object: &Listed,
        tables: &BTreeMap<Hash, PackTable>,
    ) -> Result<PackCheck> {
        let mut check = PackCheck {
            object: object.clone(),
            good: Vec::new(),
            chunks: 0,
            damage: Vec::new(),
        };
        let Some(name) = pack_name(object) else {
            let found = "its name and place are not those of a pack; no reader looks here";
            check.damage.push(found.to_owned());
            return Ok(check);
        };
        let bytes = match self.io.get(&object.path, PACK_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(Error::Damaged { found, .. }) => {
                check.damage.push(found);
                return Ok(check);
            }
            // Deleted by a gc since it was listed; whoever needs it is told by the walk.
            Err(Error::ObjectMissing { .. }) => return Ok(check),
            Err(error) => return Err(error),
        };
        check_pack(&bytes, name, tables.get(&name), &mut check);
        Ok(check)
    }
}

fn note_pack(
    check: PackCheck,
    tables: &BTreeMap<Hash, PackTable>,
    report: &mut VerifyReport,
    good: &mut GoodFrames,
) {
    report.packs += 1;
    report.pack_bytes += check.object.bytes;
    report.chunks += check.chunks;
    for found in check.damage {
        report.damage(&check.object.path, found);
    }
    let Some(name) = pack_name(&check.object) else {
        return;
    };
    if !tables.contains_key(&name) {
        report.packs_without_index += 1;
    }
    good.extend(check.good.into_iter().map(|frame| (name, frame)));
}

/// Checks a whole pack. Where its own table is damaged, the index's copy still tells which of its
/// frames are whole.
fn check_pack(bytes: &Bytes, name: Hash, indexed: Option<&PackTable>, check: &mut PackCheck) {
    let found = Hash::of(bytes);
    if found != name {
        check
            .damage
            .push(format!("its content has the name {found}"));
    }
    let own = decode_whole(bytes);
    match (&own, indexed) {
        (Err(found), _) => check.damage.push((*found).to_owned()),
        (Ok(own), Some(indexed)) if own != indexed => {
            let found = "its table is not the one that the index has";
            check.damage.push(found.to_owned());
        }
        (Ok(_), _) => {}
    }
    let Some(table) = indexed.or(own.as_ref().ok()) else {
        return;
    };
    for frame in table.placed_frames() {
        let (start, end) = (frame.range.start as usize, frame.range.end as usize);
        let stored = if end <= bytes.len() {
            bytes.slice(start..end)
        } else {
            Bytes::new()
        };
        let number = frame.number;
        match check_frame(table.kind, &frame, stored) {
            Ok(()) => check.good.push(number),
            Err(found) => check.damage.push(format!("frame {number}: {found}")),
        }
        check.chunks += frame.chunks.len() as u64;
    }
}

/// Whether a frame and each chunk in it is what the table says.
///
/// # Errors
/// Says what is not.
pub(crate) fn check_frame(
    kind: PackKind,
    frame: &PlacedFrame<'_>,
    stored: Bytes,
) -> Result<(), String> {
    let raw = decode_frame(frame.entry, stored)?;
    for (expected, bytes) in frame.pieces(&raw) {
        let found = kind.hash(bytes);
        if found != expected {
            return Err(format!("holds {found} where its table says {expected}"));
        }
        if kind == PackKind::Nodes {
            Node::decode(bytes)?;
        }
    }
    Ok(())
}

fn missing_packs(packs: &[Listed], tables: &BTreeMap<Hash, PackTable>, report: &mut VerifyReport) {
    let there: HashSet<Hash> = packs.iter().filter_map(pack_name).collect();
    for name in tables.keys().filter(|name| !there.contains(name)) {
        report.damage(&pack_path(name), "the pack is missing");
    }
}

/// Follows manifests down to their chunks.
struct ManifestWalk<'a> {
    core: &'a Core,
    good: &'a GoodFrames,
    /// Full nodes below which everything is whole; they need not be followed again.
    whole: HashSet<(Hash, ChunkSize)>,
}

/// What is lost of one manifest.
#[derive(Default)]
struct Losses {
    reasons: Vec<String>,
    more: u64,
}

impl Losses {
    fn add(&mut self, what: impl FnOnce() -> String) {
        if self.reasons.len() < REASONS_MAX {
            self.reasons.push(what());
        } else {
            self.more += 1;
        }
    }

    fn count(&self) -> u64 {
        self.reasons.len() as u64 + self.more
    }
}

impl ManifestWalk<'_> {
    fn all(&mut self, role: Role, report: &mut VerifyReport) -> Result<()> {
        for listed in self.core.manifests(role)? {
            report.manifests += 1;
            let mut losses = Losses::default();
            match &listed.manifest {
                Err(found) => {
                    report.damage(&listed.object, found.clone());
                    losses.add(|| found.clone());
                }
                Ok(manifest) => {
                    for (what, tree) in manifest.trees() {
                        self.tree(&what, &tree, &mut losses)?;
                    }
                }
            }
            if losses.count() > 0 {
                report.damaged_manifests.push(DamagedManifest {
                    object: listed.object,
                    id: listed.id,
                    role,
                    reasons: losses.reasons,
                    more_reasons: losses.more,
                });
            }
        }
        Ok(())
    }

    fn tree(&mut self, what: &str, tree: &TreeRef, losses: &mut Losses) -> Result<()> {
        if tree.root.is_zero() {
            return Ok(());
        }
        let place = Place {
            what,
            tree,
            level: tree.root_level(),
            first: 0,
        };
        self.node(&tree.root, place, losses)
    }

    /// Follows one node; what is lost below it is told, and the rest is followed all the same.
    fn node(&mut self, hash: &Hash, place: Place<'_>, losses: &mut Losses) -> Result<()> {
        let full =
            place.first + place.span() <= place.tree.length_bytes / place.tree.chunk_size.bytes();
        let key = (*hash, place.tree.chunk_size);
        if full && self.whole.contains(&key) {
            return Ok(());
        }
        if let Err(reason) = self.is_good(hash) {
            losses.add(|| place.lost("node", hash, &reason));
            return Ok(());
        }
        let node = match child_node(self.core, place.tree, hash, place.level, place.first) {
            Ok(node) => node,
            Err(
                error @ (Error::Damaged { .. }
                | Error::ObjectMissing { .. }
                | Error::Unknown { .. }),
            ) => {
                losses.add(|| place.lost("node", hash, &error.to_string()));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let before = losses.count();
        for (at, child) in &node.children {
            let first = place.first + u64::from(*at) * child_span(place.level);
            let place = Place { first, ..place };
            if place.level == 0 {
                self.chunk(child, place, losses);
            } else {
                let level = place.level - 1;
                self.node(child, Place { level, ..place }, losses)?;
            }
        }
        if full && losses.count() == before {
            self.whole.insert(key);
        }
        Ok(())
    }

    fn chunk(&self, hash: &Hash, place: Place<'_>, losses: &mut Losses) {
        let needed = place.tree.chunk_bytes(place.first);
        let reason = match self.is_good(hash) {
            Ok(bytes) if u64::from(bytes) == needed => return,
            Ok(bytes) => format!("{bytes} bytes where {needed} are needed"),
            Err(reason) => reason,
        };
        let place = Place {
            level: u8::MAX,
            ..place
        };
        losses.add(|| place.lost("chunk", hash, &reason));
    }

    /// The length of a chunk or node that can be read from one of the packs that have it.
    fn is_good(&self, hash: &Hash) -> Result<u32, String> {
        let index = self.core.read_index();
        let mut homes = index.homes(hash);
        let (pack, first) = homes.next().ok_or("no index names a pack with it")?;
        let is_good =
            |(pack, at): &(&Arc<KnownPack>, Location)| self.good.contains(&(pack.name, at.frame));
        let mut all = std::iter::once((pack, first)).chain(homes);
        match all.find(is_good) {
            Some((_, location)) => Ok(location.bytes),
            None => Err(format!(
                "frame {} of pack {} is damaged or missing",
                first.frame, pack.name
            )),
        }
    }
}

/// Where in a tree a walk is.
#[derive(Clone, Copy)]
struct Place<'a> {
    what: &'a str,
    tree: &'a TreeRef,
    /// The level of the node; [`u8::MAX`] for a chunk.
    level: u8,
    /// The first chunk.
    first: u64,
}

impl Place<'_> {
    /// How many chunks lie here.
    fn span(&self) -> u64 {
        match self.level {
            u8::MAX => 1,
            level => FAN_OUT.saturating_mul(child_span(level)),
        }
    }

    fn lost(&self, kind: &str, hash: &Hash, reason: &str) -> String {
        let range = describe_range(self.tree, self.first, self.span());
        format!("{}: {range}: {kind} {hash}: {reason}", self.what)
    }
}
