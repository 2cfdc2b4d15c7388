//! Layers over a base: the disk as the guest sees it, and what each layer changed.
//!
//! The caller says which files make the chain. The backing name in a header is a path on the machine
//! where the image was made; only [`Chain::open_following`] follows it, as far as it is allowed to.
//!
//! # Disks of different lengths
//! As in QEMU: the chain is as long as its top layer. A layer that ends early is zeros from there on
//! for the layers above it, and what lies below it there is not seen.
//!
//! # Disks one behind the other
//! Several chains can be joined to one disk ([`Chain::join`]), a *section* each. There is then no top layer.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cache::DEFAULT_CACHE_BYTES;
use crate::directory::InternalSnapshot;
use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::following::{OpenPolicy, data_file_of};
use crate::header::{to_u64, to_usize};
use crate::layer::{ExtentKind, Layer};
use crate::raw::RawDisk;
use crate::units::{GuestOffset, HostOffset};

/// The most layers in a chain.
pub const MAX_LAYERS: usize = 1024;

/// The format of a file in a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerFormat {
    /// The file's bytes are the disk's; holes are zeros. Only at the bottom.
    Raw,
    /// A qcow2 image.
    Qcow2,
}

/// A file of a chain, as the caller names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LayerFile {
    /// The file.
    pub path: PathBuf,
    /// Its format. It is never guessed: a guest can write a qcow2 header into a raw disk.
    pub format: LayerFormat,
}

/// A file of a chain, opened.
#[derive(Debug)]
pub(crate) enum Member {
    Raw(RawDisk),
    Qcow2(Box<Layer>),
}

impl Member {
    fn open(file: &LayerFile) -> Result<Self> {
        match file.format {
            LayerFormat::Raw => {
                let file = ImageFile::open(&file.path)?;
                Ok(Self::Raw(RawDisk::whole(file)))
            }
            LayerFormat::Qcow2 => Self::from_layer(Layer::open(&file.path)?),
        }
    }

    /// As [`Member::open`], with the external data file that a qcow2 image needs, if it is given.
    pub fn open_with_data(file: &LayerFile, data: Option<&Path>) -> Result<Self> {
        match (file.format, data) {
            (LayerFormat::Qcow2, Some(data)) => {
                Self::from_layer(Layer::open_with_data(&file.path, data)?)
            }
            (LayerFormat::Raw | LayerFormat::Qcow2, _) => Self::open(file),
        }
    }

    /// As [`Member::open`], with the external data file that the image names, if `follow_data`.
    pub fn open_following(file: &LayerFile, follow_data: bool) -> Result<Self> {
        let data = match (follow_data, file.format) {
            (true, LayerFormat::Qcow2) => {
                data_file_of(&Layer::inspect(&file.path)?, &OpenPolicy::NAMES)?
            }
            (false, _) | (true, LayerFormat::Raw) => None,
        };
        Self::open_with_data(file, data.as_deref())
    }

    pub fn from_layer(layer: Layer) -> Result<Self> {
        layer.require_readable()?;
        if layer.header().corrupt {
            let path = layer.path().to_owned();
            return Err(Error::MarkedCorrupt { path });
        }
        Ok(Self::Qcow2(Box::new(layer)))
    }

    /// The disk's length in bytes.
    pub fn length(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.length(),
            Self::Qcow2(layer) => layer.virtual_size(),
        }
    }
}

impl Member {
    /// Whether both are one file, and see the same disk in it.
    fn is_same(&self, other: &Self) -> bool {
        let one_file = |ours: &ImageFile, theirs: &ImageFile| {
            let [ours, theirs] = [ours, theirs].map(|file| {
                let stat = file.file()?.metadata().ok()?;
                Some((stat.dev(), stat.ino()))
            });
            ours.is_some() && ours == theirs
        };
        match (self, other) {
            (Self::Raw(ours), Self::Raw(theirs)) => {
                one_file(ours.file(), theirs.file()) && ours.is_same_part(theirs)
            }
            (Self::Qcow2(ours), Self::Qcow2(theirs)) => {
                one_file(ours.file(), theirs.file())
                    && one_file(ours.data(), theirs.data())
                    && ours.virtual_size() == theirs.virtual_size()
                    && ours.l1() == theirs.l1()
            }
            (Self::Raw(_), Self::Qcow2(_)) | (Self::Qcow2(_), Self::Raw(_)) => false,
        }
    }
}

/// Where the bytes of a piece of the disk come from.
#[derive(Debug, Clone, Copy)]
enum Source {
    Zero,
    /// The member, and where in its disk.
    Raw(usize, u64),
    Layer(usize, ExtentKind),
}

/// A piece of the disk with one source. `depth` is the layer of its section that defines it, or the number of all
/// files when none does.
#[derive(Debug, Clone, Copy)]
struct Piece {
    end: u64,
    source: Source,
    depth: usize,
}

/// How a range of the disk is stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored {
    /// Where the range ends.
    pub end: u64,
    /// The layer that defines it, or the number of all files when none does.
    pub depth: usize,
    pub how: StoredAs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoredAs {
    Zeros,
    /// As it is, from here on in this member's file. A hole there is zeros.
    Plain {
        member: usize,
        at: HostOffset,
    },
    /// As part of a compressed cluster, this many bytes into it.
    Packed {
        member: usize,
        at: HostOffset,
        skip: u64,
    },
}

/// A disk made of layers over a base, open for reading. Usable from several threads. A clone is the same files, opened
/// once.
#[derive(Debug, Clone)]
pub struct Chain {
    members: Vec<Arc<Member>>,
    /// In order; one, but for joined disks.
    sections: Vec<Section>,
}

/// A range of the disk that is a chain of its own.
#[derive(Debug, Clone)]
struct Section {
    bytes: Range<u64>,
    members: Range<usize>,
}

impl Chain {
    /// Opens the chain of `files`, top first.
    ///
    /// Whether the layers belong together is for the caller to know: qcow2 cannot tell.
    ///
    /// # Errors
    /// When there is no file, there are more than [`MAX_LAYERS`], a raw file is not the last one, a
    /// file cannot be opened (see [`Layer::open`]) or is marked corrupt.
    pub fn open(files: &[LayerFile]) -> Result<Self> {
        let invalid = |reason: String| Err(Error::InvalidChain { reason });
        if files.is_empty() || files.len() > MAX_LAYERS {
            return invalid(format!("{} files, expected 1 to {MAX_LAYERS}", files.len()));
        }
        let above_base = &files[..files.len() - 1];
        if let Some(raw) = above_base.iter().find(|f| f.format == LayerFormat::Raw) {
            let path = raw.path.display();
            return invalid(format!(
                "{path} is raw and not the base, so all below it would be hidden"
            ));
        }
        let open = |file| Member::open(file).map(Arc::new);
        let members = files.iter().map(open).collect::<Result<_>>()?;
        Ok(Self::sharing_cache(members))
    }

    /// A part of the file at `path` as a raw disk: `bytes` from `start` on.
    ///
    /// # Errors
    /// When the file cannot be opened or ends before.
    pub fn open_raw_part(path: &Path, start: u64, bytes: u64) -> Result<Self> {
        let raw = RawDisk::part(ImageFile::open(path)?, start, bytes)?;
        Ok(Self::from_members(vec![Member::Raw(raw)]))
    }

    /// The disks one behind the other. What a chain of layers knows (a top with internal snapshots and bitmaps,
    /// what lies below) a joined disk does not have.
    ///
    /// # Errors
    /// When there is no disk, or they have more than [`MAX_LAYERS`] files or 2^63 bytes.
    pub fn join(disks: Vec<Self>) -> Result<Self> {
        let mut joined = Self {
            members: Vec::new(),
            sections: Vec::new(),
        };
        for disk in disks {
            joined.append(disk)?;
        }
        match joined.members.len() {
            1..=MAX_LAYERS => Ok(joined),
            count => Err(Error::InvalidChain {
                reason: format!("{count} files, expected 1 to {MAX_LAYERS}"),
            }),
        }
    }

    fn append(&mut self, disk: Self) -> Result<()> {
        let (start, first) = (self.len(), self.members.len());
        for section in disk.sections {
            let end = start.checked_add(section.bytes.end);
            let Some(end) = end.filter(|end| *end <= i64::MAX.unsigned_abs()) else {
                let reason = "the disks together have more than 2^63 bytes".into();
                return Err(Error::InvalidChain { reason });
            };
            self.sections.push(Section {
                bytes: start + section.bytes.start..end,
                members: first + section.members.start..first + section.members.end,
            });
        }
        self.members.extend(disk.members);
        Ok(())
    }

    /// Whether it is several disks one behind the other.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.sections.len() > 1
    }

    /// All members together have one cache.
    fn sharing_cache(members: Vec<Arc<Member>>) -> Self {
        let chain = Self::from_shared(members);
        chain.set_cache_bytes(DEFAULT_CACHE_BYTES);
        chain
    }

    fn from_shared(members: Vec<Arc<Member>>) -> Self {
        let section = Section {
            bytes: 0..members[0].length(),
            members: 0..members.len(),
        };
        Self {
            members,
            sections: vec![section],
        }
    }

    /// Keeps at most this many bytes of L2 tables in memory from now on, for all files together;
    /// [`DEFAULT_CACHE_BYTES`] if nothing is said, and never less than one piece of 16 KiB for each file.
    pub fn set_cache_bytes(&self, bytes: u64) {
        let layers = self.members.iter().filter_map(|member| match &**member {
            Member::Raw(_) => None,
            Member::Qcow2(layer) => Some(layer),
        });
        let count = to_u64(layers.clone().count());
        for layer in layers {
            layer.set_cache_bytes(bytes / count);
        }
    }

    /// The layers `above`, top first, over an open layer over the files `below` it.
    pub(crate) fn around(
        above: &[LayerFile],
        base: Member,
        below: &[LayerFile],
        follow_data: bool,
    ) -> Result<Self> {
        let open = |file| Member::open_following(file, follow_data);
        let mut members = above.iter().map(open).collect::<Result<Vec<_>>>()?;
        members.push(base);
        for file in below {
            members.push(open(file)?);
        }
        Self::of_members(members)
    }

    /// A chain of members whose number is not known to be right.
    pub(crate) fn of_members(members: Vec<Member>) -> Result<Self> {
        if members.is_empty() || members.len() > MAX_LAYERS {
            let reason = format!("{} files, expected 1 to {MAX_LAYERS}", members.len());
            return Err(Error::InvalidChain { reason });
        }
        Ok(Self::from_members(members))
    }

    /// An open layer over the files `between` it and the base.
    pub(crate) fn over(
        top: Member,
        between: &[LayerFile],
        base: Member,
        follow_data: bool,
    ) -> Result<Self> {
        let mut members = vec![top];
        for file in between {
            members.push(Member::open_following(file, follow_data)?);
        }
        members.push(base);
        Ok(Self::from_members(members))
    }

    /// An open layer over the files of `below`.
    pub(crate) fn on_top(top: Member, below: &Self) -> Self {
        let mut members = vec![Arc::new(top)];
        members.extend(below.members.iter().map(Arc::clone));
        Self::from_shared(members)
    }

    /// A chain of what was opened and found to fit.
    pub(crate) fn from_members(members: Vec<Member>) -> Self {
        assert!(!members.is_empty(), "a chain has a top");
        Self::sharing_cache(members.into_iter().map(Arc::new).collect())
    }

    /// The disk as it was when `snapshot` of the top layer was made, over the same layers below.
    ///
    /// # Errors
    /// When the top is raw, or there is none, or as [`Layer::view_of`].
    pub fn view_of(&self, snapshot: &InternalSnapshot) -> Result<Self> {
        if self.is_joined() {
            let reason = "several disks in a row have no internal snapshots".into();
            return Err(Error::InvalidChain { reason });
        }
        let Member::Qcow2(top) = &*self.members[0] else {
            let reason = "its top is raw, which has no internal snapshots".into();
            return Err(Error::InvalidChain { reason });
        };
        let view = Member::Qcow2(Box::new(top.view_of(snapshot)?));
        let mut members = self.members.clone();
        members[0] = Arc::new(view);
        Ok(Self::from_shared(members))
    }

    /// The disk below the top `layers` files, over the same files; `None` when nothing is below them.
    #[must_use]
    pub fn below(&self, layers: usize) -> Option<Self> {
        let members = self.members.get(layers..)?.to_vec();
        let some = !members.is_empty() && !self.is_joined();
        some.then(|| Self::from_shared(members))
    }

    /// The path and format of the file at `index`, 0 being the top.
    #[must_use]
    pub fn file(&self, index: usize) -> Option<(&Path, LayerFormat)> {
        Some(match &**self.members.get(index)? {
            Member::Raw(raw) => (raw.file().path(), LayerFormat::Raw),
            Member::Qcow2(layer) => (layer.path(), LayerFormat::Qcow2),
        })
    }

    pub(crate) fn members(&self) -> &[Arc<Member>] {
        &self.members
    }

    /// A chain of one layer that is open already, as if nothing lay below it.
    #[must_use]
    pub fn of(layer: Layer) -> Self {
        Self::from_members(vec![Member::Qcow2(Box::new(layer))])
    }

    /// The disk's length in bytes: that of its top layer, or of all disks that were joined.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.sections.last().map_or(0, |last| last.bytes.end)
    }

    /// Whether the disk has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many files the chain has, with the base, or all chains that were joined.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.members.len()
    }

    /// The qcow2 layer at `index`, 0 being the top; `None` for a raw base or behind it.
    #[must_use]
    pub fn layer(&self, index: usize) -> Option<&Layer> {
        match &**self.members.get(index)? {
            Member::Raw(_) => None,
            Member::Qcow2(layer) => Some(layer),
        }
    }

    /// Reads the disk's bytes from `offset` on, as the guest would.
    ///
    /// # Errors
    /// When the range is not on the disk, a layer cannot be read, or a table or compressed cluster
    /// on the way is not valid. What `bytes` then holds is of no use.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let length = to_u64(bytes.len());
        let end = offset.checked_add(length).filter(|end| *end <= self.len());
        let Some(end) = end else {
            return Err(Error::OutOfDisk {
                start: GuestOffset(offset),
                length,
                disk_length: self.len(),
            });
        };
        let (mut at, mut rest) = (offset, bytes);
        while at < end {
            let piece = self.piece(at, end)?;
            let (here, behind) = rest.split_at_mut(to_usize(piece.end - at));
            self.read_piece(&piece, here)?;
            (at, rest) = (piece.end, behind);
        }
        Ok(())
    }

    /// As [`Chain::read_at`]; what lies behind the end of the disk reads as zeros.
    pub(crate) fn read_padded(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let there = self.len().saturating_sub(offset).min(to_u64(bytes.len()));
        let (data, behind) = bytes.split_at_mut(to_usize(there));
        behind.fill(0);
        if data.is_empty() {
            return Ok(());
        }
        self.read_at(offset, data)
    }

    /// The next range at or after `offset` that may hold something other than zeros; `None` when
    /// only zeros follow. Zero clusters and the holes of a raw base are left out.
    ///
    /// # Errors
    /// When a layer cannot be read or a table entry on the way is not valid.
    pub fn next_data(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let mut found: Option<Range<u64>> = None;
        let mut at = offset;
        while at < self.len() {
            let piece = self.piece(at, self.len())?;
            let data = self.data_in(&piece, at)?;
            let next = data.as_ref().map_or(piece.end, |data| data.end);
            match (&mut found, data) {
                (Some(range), Some(data)) if data.start == range.end => range.end = data.end,
                (Some(_), _) => break,
                (None, data) => found = data,
            }
            at = next;
        }
        Ok(found)
    }

    /// The next range at or after `offset` that the top `layers` files define, with data or with
    /// zeros: what they changed against what lies below them. `None` when nothing follows.
    ///
    /// A layer that is shorter than those above it defines the rest as zeros (see the module).
    ///
    /// # Errors
    /// When a layer cannot be read or a table entry on the way is not valid.
    pub fn next_allocated(&self, layers: usize, offset: u64) -> Result<Option<Range<u64>>> {
        let mut found: Option<Range<u64>> = None;
        let mut at = offset;
        while at < self.len() {
            let piece = self.piece_in(at, self.len(), layers)?;
            let defined = piece.depth < layers.min(self.depth());
            match &mut found {
                Some(range) if defined => range.end = piece.end,
                Some(_) => break,
                None if defined => found = Some(at..piece.end),
                None => {}
            }
            at = piece.end;
        }
        Ok(found)
    }

    /// The first byte at or after `offset` that may be other than zero. Unlike [`Chain::next_data`] it does
    /// not look for the range's end, which may be far.
    pub(crate) fn first_data(&self, offset: u64) -> Result<Option<u64>> {
        let mut at = offset;
        while at < self.len() {
            let piece = self.piece(at, self.len())?;
            if let Some(data) = self.data_in(&piece, at)? {
                return Ok(Some(data.start));
            }
            at = piece.end;
        }
        Ok(None)
    }

    /// The first byte at or after `offset` that the top `layers` files define; see
    /// [`Chain::next_allocated`].
    pub(crate) fn first_allocated(&self, layers: usize, offset: u64) -> Result<Option<u64>> {
        let mut at = offset;
        while at < self.len() {
            let piece = self.piece_in(at, self.len(), layers)?;
            if piece.depth < layers.min(self.depth()) {
                return Ok(Some(at));
            }
            at = piece.end;
        }
        Ok(None)
    }

    /// How the bytes from `offset` on, up to `end` at most, are stored.
    pub(crate) fn stored(&self, offset: u64, end: u64) -> Result<Stored> {
        if offset >= self.len() {
            return Ok(Stored {
                end,
                depth: self.depth(),
                how: StoredAs::Zeros,
            });
        }
        let piece = self.piece(offset, end.min(self.len()))?;
        let how = match piece.source {
            Source::Zero => StoredAs::Zeros,
            Source::Raw(member, at) => StoredAs::Plain {
                member,
                at: self.raw(member).host(at),
            },
            Source::Layer(member, ExtentKind::Data(at)) => StoredAs::Plain { member, at },
            Source::Layer(member, ExtentKind::Compressed { cluster, skip }) => StoredAs::Packed {
                member,
                at: cluster.host,
                skip,
            },
            Source::Layer(_, ExtentKind::Zero | ExtentKind::Unallocated) => {
                unreachable!("a layer is a source only of data")
            }
        };
        Ok(Stored {
            end: piece.end,
            depth: piece.depth,
            how,
        })
    }

    /// The first range from `offset` on, up to `end`, that may be other than zeros and is stored in one way.
    pub(crate) fn next_stored(
        &self,
        offset: u64,
        end: u64,
    ) -> Result<Option<(Range<u64>, StoredAs)>> {
        let (mut at, end) = (offset, end.min(self.len()));
        while at < end {
            let piece = self.piece(at, end)?;
            if let Some(data) = self.data_in(&piece, at)? {
                let how = self.stored(data.start, data.end)?.how;
                return Ok(Some((data, how)));
            }
            at = piece.end;
        }
        Ok(None)
    }

    /// Whether a member of this chain and one of `other` keep their data in the same file.
    pub(crate) fn is_one_file(&self, member: usize, other: &Self, theirs: usize) -> bool {
        let identity = |file: Option<&File>| {
            let stat = file?.metadata().ok()?;
            Some((stat.dev(), stat.ino()))
        };
        let ours = identity(self.member_file(member).0);
        ours.is_some() && ours == identity(other.member_file(theirs).0)
    }

    /// Whether a range comes from the same places in this disk and in `other`, a view of the same files.
    pub(crate) fn is_stored_as_in(&self, other: &Self, range: Range<u64>) -> Result<bool> {
        let mut at = range.start;
        while at < range.end {
            let ours = self.stored(at, range.end)?;
            let theirs = other.stored(at, ours.end)?;
            if ours.how != theirs.how || theirs.end != ours.end {
                return Ok(false);
            }
            at = ours.end;
        }
        Ok(true)
    }

    /// The open file of a member, where it is one, and how long it is.
    pub(crate) fn member_file(&self, member: usize) -> (Option<&File>, u64) {
        let file = self.data_file(member);
        (file.file(), file.length())
    }

    /// Reads bytes of a member's file.
    pub(crate) fn read_member(&self, member: usize, at: u64, bytes: &mut [u8]) -> Result<()> {
        let file = self.data_file(member);
        file.read("guest data", HostOffset(at), bytes)
    }

    fn data_file(&self, member: usize) -> &ImageFile {
        match &*self.members[member] {
            Member::Raw(raw) => raw.file(),
            Member::Qcow2(layer) => layer.data(),
        }
    }

    /// How many top layers this chain has above `below`, when `below` is its lower part: the same files, in the
    /// same views.
    pub(crate) fn layers_above(&self, below: &Self) -> Option<usize> {
        if self.is_joined() || below.is_joined() {
            return None;
        }
        let above = self.depth().checked_sub(below.depth())?;
        let lower = &self.members[above..];
        let mut pairs = lower.iter().zip(&below.members);
        pairs
            .all(|(ours, theirs)| ours.is_same(theirs))
            .then_some(above)
    }

    /// All ranges that the top `layers` files define, in order; see [`Chain::next_allocated`].
    ///
    /// After an error the iterator ends.
    pub fn allocated(&self, layers: usize) -> impl Iterator<Item = Result<Range<u64>>> + '_ {
        self.ranges(move |at| self.next_allocated(layers, at))
    }

    /// All ranges that may hold something other than zeros, in order; see [`Chain::next_data`].
    ///
    /// After an error the iterator ends.
    pub fn data(&self) -> impl Iterator<Item = Result<Range<u64>>> + '_ {
        self.ranges(|at| self.next_data(at))
    }

    fn ranges<'a>(
        &'a self,
        next: impl Fn(u64) -> Result<Option<Range<u64>>> + 'a,
    ) -> impl Iterator<Item = Result<Range<u64>>> + 'a {
        let mut at = Some(0);
        std::iter::from_fn(move || {
            let found = next(at?).transpose();
            at = match &found {
                Some(Ok(range)) => Some(range.end),
                Some(Err(_)) | None => None,
            };
            found
        })
    }

    fn piece(&self, at: u64, end: u64) -> Result<Piece> {
        self.piece_in(at, end, self.depth())
    }

    /// Where the bytes from `at` on come from, up to `end` at most, looking only at the top `layers`.
    fn piece_in(&self, at: u64, end: u64, layers: usize) -> Result<Piece> {
        let behind = |section: &Section| section.bytes.end <= at;
        let section = &self.sections[self.sections.partition_point(behind)];
        let start = section.bytes.start;
        let end = end.min(section.bytes.end) - start;
        let piece = self.piece_of(section, at - start..end, layers)?;
        Ok(Piece {
            end: piece.end + start,
            ..piece
        })
    }

    /// As [`Chain::piece_in`], with offsets that start at the section.
    fn piece_of(&self, section: &Section, bytes: Range<u64>, layers: usize) -> Result<Piece> {
        let Range { start: at, mut end } = bytes;
        let members = section.members.clone();
        for (depth, index) in members.enumerate().take(layers) {
            let member = &self.members[index];
            let length = member.length();
            let zeros = |end| Piece {
                end,
                source: Source::Zero,
                depth,
            };
            if at >= length {
                return Ok(zeros(end));
            }
            end = end.min(length);
            let source = match &**member {
                Member::Raw(raw) if at >= raw.bytes() => return Ok(zeros(end)),
                Member::Raw(raw) => {
                    end = end.min(raw.bytes());
                    Source::Raw(index, at)
                }
                Member::Qcow2(layer) => {
                    let extent = layer.extent_at(GuestOffset(at))?;
                    end = end.min(at + extent.length);
                    match extent.kind {
                        ExtentKind::Unallocated => continue,
                        ExtentKind::Zero => Source::Zero,
                        kind @ (ExtentKind::Data(_) | ExtentKind::Compressed { .. }) => {
                            Source::Layer(index, kind)
                        }
                    }
                }
            };
            return Ok(Piece { end, source, depth });
        }
        Ok(Piece {
            end,
            source: Source::Zero,
            depth: self.members.len(),
        })
    }

    fn read_piece(&self, piece: &Piece, bytes: &mut [u8]) -> Result<()> {
        match piece.source {
            Source::Zero => {
                bytes.fill(0);
                Ok(())
            }
            Source::Raw(index, start) => self.raw(index).read(start, bytes),
            Source::Layer(index, ExtentKind::Data(place)) => {
                self.qcow2(index).read_data(place, bytes)
            }
            Source::Layer(index, ExtentKind::Compressed { cluster, skip }) => {
                self.qcow2(index).read_compressed(cluster, skip, bytes)
            }
            Source::Layer(_, ExtentKind::Zero | ExtentKind::Unallocated) => {
                unreachable!("a layer is a source only of data")
            }
        }
    }

    /// The first range in the piece, from `at` on, that may be other than zeros.
    fn data_in(&self, piece: &Piece, at: u64) -> Result<Option<Range<u64>>> {
        match piece.source {
            Source::Zero => Ok(None),
            Source::Layer(..) => Ok(Some(at..piece.end)),
            Source::Raw(index, start) => {
                let end = start + (piece.end - at);
                let data = self.raw(index).next_data(start, end)?;
                Ok(data.map(|data| data.start - start + at..data.end - start + at))
            }
        }
    }

    fn raw(&self, index: usize) -> &RawDisk {
        match &*self.members[index] {
            Member::Raw(raw) => raw,
            Member::Qcow2(_) => unreachable!("the piece was found in a raw file"),
        }
    }

    fn qcow2(&self, index: usize) -> &Layer {
        match &*self.members[index] {
            Member::Qcow2(layer) => layer,
            Member::Raw(_) => unreachable!("the piece was found in a layer"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_can_be_shared_between_threads() {
        fn shareable<T: Send + Sync>() {}
        shareable::<Chain>();
        shareable::<Layer>();
    }

    #[test]
    fn a_raw_file_above_the_base_and_an_empty_list_are_refused() {
        let file = |format| LayerFile {
            path: PathBuf::from("nowhere"),
            format,
        };
        let list = [file(LayerFormat::Raw), file(LayerFormat::Qcow2)];
        for files in [&list[..], &[]] {
            let error = Chain::open(files).expect_err("no chain");
            assert!(matches!(error, Error::InvalidChain { .. }), "{error}");
        }
    }
}
