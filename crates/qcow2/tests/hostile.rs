//! Any bytes are an error or an image, never a panic, a hang or bytes from nowhere.

mod images;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use images::{run, sh};
use proptest::prelude::*;
use stead_qcow2::{Chain, Error, GuestOffset, Layer, LayerFile, LayerFormat, check};

/// Small files, so nothing may take long.
const PATIENCE: Duration = Duration::from_secs(20);

/// Opens an image and does everything that reads it.
fn use_image(file: File) {
    let start = Instant::now();
    let Ok(layer) = Layer::from_file(file, Path::new("hostile")) else {
        return;
    };
    let disk = layer.virtual_size();
    for extent in layer.extents(GuestOffset(0)).take(10_000) {
        let Ok(extent) = extent else { break };
        assert!(extent.length > 0 && extent.start.0 + extent.length <= disk);
    }
    let _either = layer.internal_snapshots();
    let _either = layer.stored_bitmaps();
    if let Ok(report) = check(&layer) {
        let found = report.corruptions + report.leaks;
        assert_eq!(found > 0, !report.findings.is_empty());
    }
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
}

fn temp_file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().expect("temp file");
    file.write_all_at(bytes, 0).expect("write");
    file
}

/// The bytes of an image with data, zeros, compressed data, an internal snapshot and a bitmap.
fn rich_image(dir: &Path, options: &str) -> Vec<u8> {
    let path = dir.join("rich.qcow2");
    let name = path.display();
    sh(&format!(
        "qemu-img create -q -f qcow2 -o {options} {name} 200k"
    ));
    let io = |commands: &[&str]| {
        let mut args: Vec<String> = Vec::new();
        for command in commands {
            args.extend(["-c".to_owned(), (*command).to_owned()]);
        }
        args.push(name.to_string());
        run("qemu-io", &args);
    };
    io(&["write -P 1 0 64k", "write -c -P 2 64k 64k"]);
    sh(&format!("qemu-img snapshot -c first {name}"));
    if !options.contains("0.10") {
        sh(&format!("qemu-img bitmap --add {name} b0"));
        io(&["write -z 96k 16k"]);
    }
    io(&["write -P 3 32k 1k", "discard 8k 8k"]);
    std::fs::read(&path).expect("read")
}

const KINDS: [&str; 4] = [
    "cluster_size=512",
    "cluster_size=512,compat=0.10",
    "cluster_size=4k,compression_type=zstd,refcount_bits=1",
    "cluster_size=16k,extended_l2=on,refcount_bits=64",
];

/// QEMU's images with bytes changed: the whole of each is small.
fn rich_images() -> Vec<Vec<u8>> {
    KINDS
        .iter()
        // A refcount of one bit allows no internal snapshot.
        .map(|kind| kind.replace("refcount_bits=1", "refcount_bits=8"))
        .map(|kind| rich_image(tempfile::tempdir().expect("temp dir").path(), &kind))
        .collect()
}

#[test]
fn no_changed_image_makes_a_reader_panic_or_hang() {
    let images = rich_images();
    let change = (any::<prop::sample::Index>(), any::<u8>(), any::<bool>());
    let changes = proptest::collection::vec(change, 1..6);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(3000));
    runner
        .run(&(0..images.len(), changes), |(image, changes)| {
            let mut bytes = images[image].clone();
            for (at, byte, in_header) in changes {
                // Half of them in the header, where each one matters.
                let length = if in_header { 112 } else { bytes.len() };
                bytes[at.index(length)] = byte;
            }
            use_image(temp_file(&bytes));
            Ok(())
        })
        .expect("no counterexample");
}

fn header(words: &[u8]) -> Vec<u8> {
    let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
    bytes.extend_from_slice(words);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        use_image(temp_file(&bytes));
        use_image(temp_file(&header(&bytes)));
    }
}

/// Every length is an error or the same bytes as the whole image gives.
#[test]
fn an_image_cut_off_anywhere_never_gives_wrong_bytes() {
    let mut refused = 0;
    let mut read = 0;
    for bytes in rich_images() {
        let whole = content(temp_file(&bytes)).expect("a good image");
        for length in (0..bytes.len()).step_by(512) {
            match content(temp_file(&bytes[..length])) {
                Ok(found) => {
                    assert!(found == whole, "wrong bytes at length {length}");
                    read += 1;
                }
                Err(Error::Io { source, .. }) => panic!("a read behind the end: {source}"),
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 100, "{refused} refused, {read} read");
}

/// The guest's bytes, through the file itself.
fn content(file: File) -> stead_qcow2::Result<Vec<u8>> {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    let copy = stead_sys::durable::create_scratch(&path, 0o600).expect("create");
    stead_sys::copy::sparse(&file, &copy).expect("copy");
    let chain = Chain::open(&[LayerFile {
        path,
        format: LayerFormat::Qcow2,
    }])?;
    let mut bytes = vec![0; usize::try_from(chain.len()).expect("fits")];
    chain.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// Where, and what to.
type Change<'a> = (usize, &'a [u8]);

/// A header that asks for what would take memory or time without bound.
fn claims(changes: &[Change<'_>]) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut bytes = rich_image(dir.path(), "cluster_size=64k");
    for (at, change) in changes {
        bytes[*at..*at + change.len()].copy_from_slice(change);
    }
    bytes
}

#[test]
fn claims_without_bound_are_refused_before_memory_is_taken() {
    let huge = u64::MAX.to_be_bytes();
    let many = u32::MAX.to_be_bytes();
    let cases: [(&str, &[Change<'_>]); 12] = [
        ("size", &[(24, &huge)]),
        (
            "size",
            &[(24, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])],
        ),
        ("cluster_bits", &[(20, &many)]),
        ("cluster_bits", &[(20, &[0, 0, 0, 8])]),
        ("l1_size", &[(36, &many)]),
        ("L1 table", &[(36, &[0, 0x3f, 0xff, 0xff])]),
        ("l1_table_offset", &[(40, &huge)]),
        ("refcount_table_offset", &[(48, &huge)]),
        ("refcount_table_clusters", &[(56, &many)]),
        ("nb_snapshots", &[(60, &many)]),
        ("refcount_order", &[(96, &[0, 0, 0, 7])]),
        ("header_length", &[(100, &many)]),
    ];
    for (name, changes) in cases {
        let file = temp_file(&claims(changes));
        let error = Layer::from_file(file, Path::new("claims")).expect_err(name);
        assert!(error.to_string().contains(name), "{name}: {error}");
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let open = |changes: &[Change<'_>]| {
        let file = temp_file(&claims(changes));
        Layer::from_file(file, Path::new("image")).expect_err("refused")
    };
    let error = open(&[(72, &[0x80])]);
    assert!(
        matches!(error, Error::UnknownFeature { bit: 63, .. }),
        "{error}"
    );
    let error = open(&[(32, &[0, 0, 0, 2])]);
    assert!(
        matches!(&error, Error::Encrypted { method, .. } if method.starts_with("LUKS")),
        "{error}"
    );
    let error = open(&[(79, &[4])]);
    assert!(matches!(error, Error::ExternalDataFile { .. }), "{error}");
    let error = open(&[(4, &[0, 0, 0, 4])]);
    assert!(
        matches!(error, Error::UnknownVersion { found: 4, .. }),
        "{error}"
    );
    let error = open(&[(0, b"QCOW")]);
    assert!(matches!(error, Error::NotQcow2 { .. }), "{error}");
}

/// The table of names in the image is used for a feature that is not known.
#[test]
fn an_unknown_feature_is_called_by_the_name_the_image_gives_it() {
    let mut bytes = claims(&[(72 + 7, &[1 << 5])]);
    let row = bytes.windows(10).position(|row| row == b"dirty bit\0");
    let row = row.expect("QEMU writes the table") - 2;
    bytes[row..row + 14].copy_from_slice(b"\0\x05time travel\0");
    let error = Layer::from_file(temp_file(&bytes), Path::new("image")).expect_err("unknown");
    let Error::UnknownFeature { bit, name, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!((*bit, name.as_str()), (5, "time travel"));
}

#[test]
fn a_dirty_image_is_read_and_a_corrupt_one_is_in_no_chain() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    for (bit, refused) in [(1, false), (2, true)] {
        let bytes = claims(&[(79, &[bit])]);
        stead_sys::durable::publish(&path, 0o600, &bytes, stead_sys::durable::Existing::Replace)
            .expect("write");
        let layer = Layer::open(&path).expect("a layer can be looked at");
        assert_eq!(
            (layer.header().dirty, layer.header().corrupt),
            (!refused, refused)
        );
        let files = [LayerFile {
            path: path.clone(),
            format: LayerFormat::Qcow2,
        }];
        match Chain::open(&files) {
            Ok(_) => assert!(!refused),
            Err(error) => assert!(
                refused && matches!(error, Error::MarkedCorrupt { .. }),
                "{error}"
            ),
        }
        assert!(!check(&layer).expect("readable").is_clean());
    }
}

/// The backing name is a path of another machine: it is told and never opened.
#[test]
fn a_backing_name_is_reported_and_not_followed() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("overlay");
    sh(&format!(
        "qemu-img create -q -u -f qcow2 -b /nowhere/at/all.img -F raw {} 1M",
        path.display()
    ));
    let layer = Layer::open(&path).expect("the backing file is not needed");
    let backing = layer.header().backing.clone().expect("it has a name");
    assert_eq!(backing.name, b"/nowhere/at/all.img");
    assert_eq!(backing.format.as_deref(), Some(&b"raw"[..]));
}

/// An image whose tables all point at one another costs no more than its length.
#[test]
fn an_l2_table_used_twice_is_refused() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut bytes = rich_image(dir.path(), "cluster_size=512");
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().expect("8 bytes"));
    let l1 = usize::try_from(l1).expect("fits");
    let entries = bytes[39];
    assert!(entries >= 2, "{entries} L1 entries");
    let entry: [u8; 8] = bytes[l1..l1 + 8].try_into().expect("8 bytes");
    assert_ne!(entry, [0; 8]);
    bytes[l1 + 8..l1 + 16].copy_from_slice(&entry);
    let error = Layer::from_file(temp_file(&bytes), Path::new("image")).expect_err("refused");
    assert!(matches!(error, Error::SharedL2Table { .. }), "{error}");
}

/// A file that shrinks under an open layer is an error at the first byte that is gone.
#[test]
fn a_file_cut_off_while_it_is_open_is_an_error() {
    let dir = tempfile::tempdir().expect("temp dir");
    let bytes = rich_image(dir.path(), "cluster_size=64k");
    let path = dir.path().join("open");
    let file = stead_sys::durable::create_scratch(&path, 0o600).expect("create");
    file.write_all_at(&bytes, 0).expect("write");
    let files = [LayerFile {
        path,
        format: LayerFormat::Qcow2,
    }];
    let mut found = vec![0; 200 << 10];
    let mut refused = 0;
    for length in (0..bytes.len() as u64).rev().step_by(16 << 10) {
        let chain = Chain::open(&files).expect("whole when it is opened");
        file.set_len(length).expect("cut off");
        let result = chain.read_at(0, &mut found);
        refused += u64::from(matches!(result, Err(Error::Io { .. })));
        file.write_all_at(&bytes, 0).expect("whole again");
    }
    assert!(refused > 10, "{refused}");
}
