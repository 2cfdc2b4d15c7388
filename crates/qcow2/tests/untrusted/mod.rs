//! What is done with an image of unknown origin, and what must hold whatever its bytes are: an answer or an error, no
//! panic, nothing written by who only reads, no disk state changed by who repairs. The tests here and the fuzzers in
//! `fuzz/` run the same functions.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod changes;
pub mod memory;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stead_qcow2::{
    Chain, GuestOffset, Header, Layer, LayerFile, LayerFormat, OpenPolicy, check, info, info_chain,
};

/// As many bytes of a disk as are read.
const READ_BYTES: u64 = 128 << 10;
/// As many bitmaps, and internal snapshots, as are looked at.
const DIRECTORY_ENTRIES: usize = 8;
/// As many extents as are walked.
const EXTENTS: usize = 5000;

/// What a fuzzer does with its inputs.
pub struct Target {
    pub name: &'static str,
    /// The folder of the inputs that it begins with.
    pub seeds: &'static str,
    pub run: fn(&[u8]),
}

const fn target(name: &'static str, seeds: &'static str, run: fn(&[u8])) -> Target {
    Target { name, seeds, run }
}

pub const TARGETS: [Target; 7] = [
    target("header", "header", header),
    target("directories", "directories", directories),
    target("image", "image", image),
    target("chain", "chain", chain),
    target("repair", "image", changes::repair),
    target("change", "image", changes::change),
    target("recover", "recover", changes::recover),
];

/// A folder for the files of one input, which are written again for each.
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        Self { dir }
    }

    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        let mut options = File::options();
        options.write(true).create(true).truncate(true);
        let file = options.open(&path).expect("open");
        file.write_all_at(bytes, 0).expect("write");
        path
    }
}

thread_local! {
    static SCRATCH: Scratch = Scratch::new();
}

fn qcow2(path: &Path) -> LayerFile {
    LayerFile {
        path: path.to_owned(),
        format: LayerFormat::Qcow2,
    }
}

/// The first bytes of a file are decoded as a header.
pub fn header(bytes: &[u8]) {
    if let Ok(header) = Header::decode(bytes, Path::new("untrusted")) {
        let bits = header.cluster_size.bits();
        assert!((9..=21).contains(&bits));
        assert!(header.l2_coverage() > 0 && header.refcounts_per_block() > 0);
    }
}

/// The bytes are a snapshot table and a bitmap directory at once; the first byte is how many entries both have.
pub fn directories(bytes: &[u8]) {
    image(&with_directories(bytes));
}

/// An image of one cluster for each table, with the directories behind them.
pub fn with_directories(bytes: &[u8]) -> Vec<u8> {
    const L1: usize = 0x200;
    const REFCOUNTS: usize = 0x400;
    const DIRECTORIES: usize = 0x600;
    let (count, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let mut file = vec![0; DIRECTORIES];
    let mut put = |at: usize, number: &[u8]| file[at..at + number.len()].copy_from_slice(number);
    let word = |number: usize| (number as u64).to_be_bytes();
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &9_u32.to_be_bytes());
    put(24, &word(20 << 10));
    put(36, &1_u32.to_be_bytes());
    put(40, &word(L1));
    put(48, &word(REFCOUNTS));
    put(56, &1_u32.to_be_bytes());
    put(60, &u32::from(*count).to_be_bytes());
    put(64, &word(DIRECTORIES));
    put(88, &word(1));
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(104, &0x2385_2875_u32.to_be_bytes());
    put(108, &24_u32.to_be_bytes());
    put(112, &u32::from(*count).to_be_bytes());
    put(120, &word(rest.len()));
    put(128, &word(DIRECTORIES));
    file.extend(rest);
    file.resize(file.len().next_multiple_of(512) + 512, 0);
    file
}

/// The bytes are opened, checked, mapped and read as an image, and the file is not changed.
pub fn image(bytes: &[u8]) {
    SCRATCH.with(|scratch| {
        let path = scratch.file("image", bytes);
        read_image(&path);
        let now = std::fs::read(&path).expect("read");
        assert!(now == bytes, "reading has changed the image");
    });
}

/// The bytes are two images, one over the other; the first two bytes say how long the upper one is.
pub fn chain(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk() else {
        return;
    };
    let length = usize::from(u16::from_be_bytes(*head)).min(rest.len());
    let (top, below) = rest.split_at(length);
    SCRATCH.with(|scratch| {
        let below = scratch.file("below", below);
        let top = scratch.file("image", top);
        for format in [LayerFormat::Qcow2, LayerFormat::Raw] {
            let below = LayerFile {
                path: below.clone(),
                format,
            };
            if let Ok(chain) = Chain::open(&[qcow2(&top), below]) {
                use_chain(&chain);
            }
        }
        let listed = stead_qcow2::Follow::Listed(vec![below]);
        let policy = OpenPolicy {
            follow: listed,
            probe: true,
        };
        let _either = info_chain(&qcow2(&top), &policy);
        if let Ok(chain) = Chain::open_following(&qcow2(&top), &policy) {
            use_chain(&chain);
        }
    });
}

/// Everything that reads the image at `path`; names in it are followed to nothing. Whether it opened.
pub fn read_image(path: &Path) -> bool {
    let file = qcow2(path);
    let _either = info(&file);
    let _either = info_chain(&file, &OpenPolicy::NOTHING);
    let Ok(layer) = Layer::inspect(path) else {
        return false;
    };
    if let Ok(report) = check(&layer) {
        let found = report.corruptions + report.leaks;
        assert_eq!(found > 0, !report.findings.is_empty());
    }
    use_bitmaps(&layer);
    use_layer(&layer);
    let chain = Chain::open_following(&file, &OpenPolicy::NOTHING);
    let chain = chain.or_else(|_| Chain::open(&[file]));
    if let Ok(chain) = &chain {
        use_chain(chain);
    }
    let snapshots = layer.internal_snapshots().unwrap_or_default();
    for snapshot in snapshots.iter().take(DIRECTORY_ENTRIES) {
        if let Some(Ok(view)) = chain.as_ref().ok().map(|chain| chain.view_of(snapshot)) {
            use_chain(&view);
        }
        if let Ok(view) = layer.view_of(snapshot) {
            use_layer(&view);
        }
    }
    true
}

fn use_bitmaps(layer: &Layer) {
    let stored = layer.stored_bitmaps().unwrap_or_default();
    for stored in stored.iter().take(DIRECTORY_ENTRIES) {
        if let Ok(bitmap) = layer.read_bitmap(stored) {
            let ranges = bitmap.dirty_ranges().take(1000);
            let ends: Vec<u64> = ranges.map(|range| range.end).collect();
            assert!(ends.is_sorted() && ends.iter().all(|end| *end <= bitmap.disk_length()));
        }
    }
}

fn use_layer(layer: &Layer) {
    let disk = layer.virtual_size();
    for extent in layer.extents(GuestOffset(0)).take(EXTENTS) {
        let Ok(extent) = extent else { break };
        assert!(extent.length > 0 && extent.start.0 + extent.length <= disk);
    }
    let mut state = vec![0; usize::try_from(layer.vm_state_bytes().min(65_536)).expect("small")];
    let _either = layer.read_vm_state(0, &mut state);
}

fn use_chain(chain: &Chain) {
    let mut end = 0;
    for entry in chain.map(0).take(EXTENTS) {
        let Ok(entry) = entry else { break };
        assert!(entry.start == end && entry.length > 0);
        end += entry.length;
        assert!(end <= chain.len());
    }
    let mut bytes = vec![0; usize::try_from(chain.len().min(READ_BYTES)).expect("small")];
    let _either = chain.read_at(0, &mut bytes);
    let middle = chain.len() / 2;
    let rest = usize::try_from((chain.len() - middle).min(65_536)).expect("small");
    bytes.resize(rest, 0);
    let _either = chain.read_at(middle, &mut bytes);
}
