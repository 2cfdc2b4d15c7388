//! What a change does not touch in the first cluster stays, byte for byte, and a journal keeps it whole.
#![allow(
    clippy::disallowed_methods,
    reason = "images in a temporary folder need not be durable"
)]

mod images;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use images::{run, sh};
use stead_qcow2::edit::{EditOptions, Editor, JournalFiles, Recovery, recover};
use stead_qcow2::{Error, Layer};
use stead_sim::RecordedDisk;
use stead_sys::storage::Storage;

fn create(dir: &Path, options: &str) -> PathBuf {
    let path = dir.join("image");
    sh(&format!(
        "qemu-img create -q -f qcow2 -o {options} {} 1M",
        path.display()
    ));
    run(
        "qemu-io",
        &[
            "-c".into(),
            "write -P 9 0 1M".into(),
            path.display().to_string(),
        ],
    );
    path
}

fn number(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u32::from_be_bytes(
        bytes[at..at + 4].try_into().expect("4 bytes"),
    ))
    .expect("fits")
}

/// The header's extensions by the bytes of the specification.
fn extensions(bytes: &[u8]) -> Vec<(usize, Vec<u8>)> {
    let version = number(bytes, 4);
    let mut at = if version == 2 { 72 } else { number(bytes, 100) };
    let mut found = Vec::new();
    while number(bytes, at) != 0 {
        let length = number(bytes, at + 4);
        found.push((number(bytes, at), bytes[at + 8..at + 8 + length].to_vec()));
        at += 8 + length.next_multiple_of(8);
    }
    found
}

const UNKNOWN: [u8; 32] = *b"\x12\x34\x56\x78\0\0\0\x15an unknown extension\0\0\0\0";

/// Adds an extension that nobody knows in front of the others, and unknown compatible and autoclear bits.
fn make_strange(path: &Path) {
    let mut bytes = std::fs::read(path).expect("read");
    let version = number(&bytes, 4);
    let start = if version == 2 {
        72
    } else {
        number(&bytes, 100)
    };
    let cluster = 1 << number(&bytes, 20);
    let name = number(&bytes, 12);
    assert_eq!(name, 0, "no backing name that would have to move");
    bytes.copy_within(start..cluster - 32, start + 32);
    bytes[start..start + 32].copy_from_slice(&UNKNOWN);
    bytes[start + 4..start + 8].copy_from_slice(&20_u32.to_be_bytes());
    if version == 3 {
        bytes[80] |= 0x40;
        bytes[88] |= 0x20;
    }
    std::fs::write(path, bytes).expect("write");
}

#[test]
fn unknown_extensions_and_names_are_kept_when_everything_moves_and_back() {
    for options in [
        "cluster_size=64k",
        "cluster_size=4k,compat=0.10",
        "cluster_size=1k",
    ] {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = create(dir.path(), options);
        // An update of the header by QEMU adds its table of names, where the cluster has room for it.
        let words = ["amend", "-f", "qcow2", "-o", "lazy_refcounts=on"];
        if !options.contains("0.10") {
            let mut words: Vec<String> = words.map(str::to_owned).to_vec();
            words.push(path.display().to_string());
            run("qemu-img", &words);
        }
        make_strange(&path);
        let before = std::fs::read(&path).expect("read");
        let known = extensions(&before);
        assert_eq!(known[0], (0x1234_5678, b"an unknown extension".to_vec()));
        let long = [b'n'; 600];
        let name = if options.contains("=1k") {
            &long[..200]
        } else {
            &long
        };
        change(&path, Some(name));
        let with_name = std::fs::read(&path).expect("read");
        let mut more = known.clone();
        more.push((0xe279_2aca, b"raw".to_vec()));
        assert_eq!(extensions(&with_name), more, "{options}");
        let backing = Layer::open(&path).expect("whole").header().backing.clone();
        assert_eq!(backing.expect("a name").name, name);
        sh(&format!("qemu-img info -U -f qcow2 {}", path.display()));
        change(&path, None);
        let after = std::fs::read(&path).expect("read");
        assert_eq!(extensions(&after), known, "{options}");
        if !options.contains("0.10") {
            assert_eq!(after[80], before[80], "unknown compatible bits are kept");
            assert_eq!(
                after[88], 0,
                "unknown autoclear bits are cleared by who writes"
            );
        }
        assert!(
            after[1 << 16..] == before[1 << 16..],
            "{options}: more was written"
        );
        sh(&format!("qemu-img check -q -f qcow2 {}", path.display()));
    }
}

fn change(path: &Path, backing: Option<&[u8]>) {
    let mut editor = Editor::open(path, EditOptions::default()).expect("open");
    let name = backing.map(|name| (name, Some(&b"raw"[..])));
    let done = editor.apply(|edit| {
        edit.set_backing(name);
        Ok(())
    });
    done.expect("change");
}

/// An image in progress is refused by reader and writer, and its file is recovered under its lock.
#[test]
fn an_image_in_progress_is_refused_until_it_is_recovered() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = create(dir.path(), "cluster_size=4k");
    let disk = Arc::new(RecordedDisk::new(std::fs::read(&path).expect("read")));
    let storage: Arc<dyn Storage> = Arc::clone(&disk) as Arc<dyn Storage>;
    let mut editor = Editor::on_storage(storage, &path, EditOptions::default()).expect("open");
    let done = editor.apply(|edit| {
        edit.set_backing(Some((&[b'n'; 900], None)));
        Ok(())
    });
    assert!(done.expect("change").room.journal);
    let history = disk.history();
    let mut refused = 0;
    for count in 0..=history.events().len() {
        std::fs::write(&path, history.prefix(count)).expect("write");
        let read = Layer::open(&path);
        let in_progress = matches!(read, Err(Error::InProgress { .. }));
        assert!(in_progress || read.is_ok());
        let expected = if in_progress {
            let error = Editor::open(&path, EditOptions::default()).expect_err("refused");
            assert!(error.to_string().contains("stead img recover"), "{error}");
            refused += 1;
            Recovery::Finished
        } else {
            Recovery::NothingToDo
        };
        assert_eq!(
            recover(&path, &JournalFiles::Nothing).expect("recover"),
            expected
        );
        let header = Layer::open(&path).expect("whole").header().clone();
        assert!(!in_progress || header.backing.is_some());
        assert_eq!(
            recover(&path, &JournalFiles::Nothing).expect("recover"),
            Recovery::NothingToDo
        );
    }
    assert!(refused > 2, "{refused}");
}

/// A damaged journal is told from a whole one, and nothing is done.
#[test]
fn a_journal_with_any_other_byte_is_not_followed() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = create(dir.path(), "cluster_size=1k");
    let disk = Arc::new(RecordedDisk::new(std::fs::read(&path).expect("read")));
    let storage: Arc<dyn Storage> = Arc::clone(&disk) as Arc<dyn Storage>;
    let mut editor = Editor::on_storage(storage, &path, EditOptions::default()).expect("open");
    let done = editor.apply(|edit| {
        edit.set_backing(Some((&[b'n'; 700], None)));
        Ok(())
    });
    done.expect("change");
    let history = disk.history();
    let marked = (0..history.events().len())
        .map(|count| history.prefix(count))
        .find(|bytes| {
            let disk = Arc::new(RecordedDisk::new(bytes.clone()));
            matches!(
                Layer::from_storage(disk, &path),
                Err(Error::InProgress { .. })
            )
        });
    let marked = marked.expect("a journal is needed");
    let journal = marked
        .windows(8)
        .rposition(|bytes| bytes == b"STEADJNL")
        .expect("a journal");
    for at in [
        journal,
        journal + 9,
        journal + 30,
        journal + 100,
        journal + 1000,
    ] {
        let mut bytes = marked.clone();
        bytes[at] ^= 4;
        std::fs::write(&path, &bytes).expect("write");
        let error = recover(&path, &JournalFiles::Nothing).expect_err("damaged");
        assert!(matches!(error, Error::Unrecoverable { .. }), "{error}");
        assert!(std::fs::read(&path).expect("read") == bytes);
    }
    // Any change of the marked sector is refused, or recovered to the same.
    for at in 0..512 {
        let mut bytes = marked.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).expect("write");
        if let Ok(Recovery::NothingToDo) | Err(_) = recover(&path, &JournalFiles::Nothing) {
            assert!(std::fs::read(&path).expect("read") == bytes, "byte {at}");
        }
    }
}
