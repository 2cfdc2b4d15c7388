//! What a crash may leave: images judged against the two states that they may be in.
#![allow(dead_code, reason = "each test file uses a part")]

use std::path::Path;
use std::sync::Arc;

use stead_qcow2::edit::{EditOptions, Editor, JournalFiles, Recovery, recover_storage};
use stead_qcow2::{Chain, Error, ExtentKind, GuestOffset, Layer, Result, check};
use stead_sim::{History, RecordedDisk};
use stead_sys::storage::Storage;

/// Losses of power that are tried at each call.
pub const LOSSES: u64 = 8;

/// Name, length, content, and where what is defined begins and ends.
pub type ViewState = (Vec<u8>, u64, blake3::Hash, Vec<(u64, bool)>);

/// What the guest and the tools can see of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// The internal snapshots and, last, the active disk.
    views: Vec<ViewState>,
    bitmaps: Vec<(Vec<u8>, bool, bool, Vec<u8>)>,
    backing: Option<Vec<u8>>,
}

pub fn view(name: &[u8], layer: Layer) -> Result<ViewState> {
    let mut defined: Vec<(u64, bool)> = Vec::new();
    for extent in layer.extents(GuestOffset(0)) {
        let extent = extent?;
        let is = extent.kind != ExtentKind::Unallocated;
        if defined.last().is_none_or(|last| last.1 != is) {
            defined.push((extent.start.0, is));
        }
    }
    let chain = Chain::of(layer);
    let mut bytes = vec![0; usize::try_from(chain.len()).expect("small")];
    chain.read_at(0, &mut bytes)?;
    Ok((name.to_vec(), chain.len(), blake3::hash(&bytes), defined))
}

pub fn word(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).expect("small");
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// The bits of a bitmap, by the bytes of the specification.
pub fn bits(bytes: &[u8], table: u64, entries: u32, cluster: u64) -> Vec<u8> {
    let mut found = Vec::new();
    for index in 0..u64::from(entries) {
        let entry = word(bytes, table + index * 8);
        let length = usize::try_from(cluster).expect("small");
        let start = usize::try_from(entry).expect("small");
        match entry {
            0 => found.resize(found.len() + length, 0),
            1 => found.resize(found.len() + length, 0xff),
            _ => found.extend(&bytes[start..start + length]),
        }
    }
    found
}

/// Opens an image, which must be whole. In progress is an error.
pub fn state(bytes: &[u8]) -> Result<State> {
    let disk = Arc::new(RecordedDisk::new(bytes.to_vec()));
    let layer = Layer::from_storage(disk, Path::new("crashed"))?;
    let report = check(&layer)?;
    assert!(report.is_clean(), "{:?}", report.findings);
    let mut views = Vec::new();
    for snapshot in layer.internal_snapshots()? {
        views.push(view(&snapshot.name, layer.view_of(&snapshot)?)?);
    }
    let bitmaps = layer.stored_bitmaps()?.into_iter().map(|bitmap| {
        let cluster = layer.cluster_size().bytes();
        let bits = bits(bytes, bitmap.table.0, bitmap.table_entries, cluster);
        (bitmap.name, bitmap.in_use, bitmap.auto, bits)
    });
    let bitmaps = bitmaps.collect();
    let backing = layer.header().backing.clone().map(|backing| backing.name);
    views.push(view(b"", layer)?);
    Ok(State {
        views,
        bitmaps,
        backing,
    })
}

/// As [`state`], recovering first if the image is in progress: whether it was.
pub fn settled(bytes: &[u8]) -> Result<(State, bool)> {
    match state(bytes) {
        Err(Error::InProgress { .. }) => {
            let disk = Arc::new(RecordedDisk::new(bytes.to_vec()));
            let storage: Arc<dyn Storage> = Arc::clone(&disk) as Arc<dyn Storage>;
            let recovery = recover_storage(storage, Path::new("crashed"), &JournalFiles::Any)?;
            assert_eq!(recovery, Recovery::Finished);
            Ok((state(&disk.bytes())?, true))
        }
        found => Ok((found?, false)),
    }
}

pub fn editor(storage: Arc<dyn Storage>) -> Result<Editor> {
    let options = EditOptions {
        cache_bytes: 1 << 14,
        allow_dirty: false,
    };
    Editor::on_storage(storage, Path::new("image"), options)
}

/// What became of the crash images of one operation.
#[derive(Debug, Default)]
pub struct Tally {
    pub old: u64,
    pub new: u64,
    pub recovered: u64,
}

/// Judges every crash image; the first that is neither state is the error.
pub fn judge(history: &History, old: &State, new: &State) -> std::result::Result<Tally, String> {
    judge_losses(history, (old, new), 0..LOSSES)
}

pub fn judge_losses(
    history: &History,
    (old, new): (&State, &State),
    seeds: std::ops::Range<u64>,
) -> std::result::Result<Tally, String> {
    let mut tally = Tally::default();
    for count in 0..=history.events().len() {
        let losses = seeds
            .clone()
            .map(|seed| history.power_loss(count, seed * 1000 + count as u64));
        for bytes in std::iter::once(history.prefix(count)).chain(losses) {
            let found = std::panic::catch_unwind(|| settled(&bytes));
            let place = format!("after call {count} of {:?}", history.events());
            match found {
                Ok(Ok((found, recovered))) => {
                    if found != *old && found != *new {
                        return Err(format!("another state {place}: {found:?}"));
                    }
                    tally.old += u64::from(found == *old);
                    tally.new += u64::from(found == *new);
                    tally.recovered += u64::from(recovered);
                }
                Ok(Err(error)) => return Err(format!("{error} {place}")),
                Err(_panic) => return Err(format!("not whole {place}")),
            }
        }
    }
    Ok(tally)
}
