//! What an image is made like is changed as qemu-img changes it, and every disk state reads as before.
#![allow(
    clippy::disallowed_methods,
    reason = "images in a temporary folder need not be durable"
)]

mod images;

use std::path::{Path, PathBuf};
use std::process::Command;

use images::{editor, layer, make_chain, require_whole, run, sh, text};
use serde_json::Value;
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::amend::{self, Amendments, FormatVersion};
use stead_qcow2::ops::rebase::BackingFile;
use stead_qcow2::{Chain, Control, Error, Layer, LayerFile, LayerFormat};

fn io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f".to_owned(), "qcow2".into(), "-d".into(), "unmap".into()];
    for command in commands {
        args.extend(["-c".to_owned(), (*command).to_owned()]);
    }
    args.push(path.display().to_string());
    run("qemu-io", &args);
}

/// Length and content of every disk state.
fn states(files: &[LayerFile]) -> Vec<(u64, blake3::Hash)> {
    let chain = Chain::open(files).expect("whole");
    let content = |chain: &Chain| {
        let mut bytes = vec![0; usize::try_from(chain.len()).expect("small")];
        chain.read_at(0, &mut bytes).expect("read");
        (chain.len(), blake3::hash(&bytes))
    };
    let top = chain.layer(0).expect("qcow2");
    let mut all = vec![content(&chain)];
    for snapshot in top.internal_snapshots().expect("whole") {
        all.push(content(&chain.view_of(&snapshot).expect("a view")));
    }
    all
}

fn info(path: &Path) -> Value {
    let words = ["info", "--output=json", "-f", "qcow2", text(path)].map(str::to_owned);
    let mut info: Value = serde_json::from_str(&run("qemu-img", &words)).expect("JSON");
    let all = info.as_object_mut().expect("an object");
    for place in ["filename", "actual-size", "children"] {
        all.remove(place);
    }
    info
}

fn qemu_amend(path: &Path, options: &str) -> bool {
    let output = Command::new("qemu-img")
        .args(["amend", "-q", "-f", "qcow2", "-o", options, text(path)])
        .output();
    output.expect("qemu-img is installed").status.success()
}

fn amendments(options: &str) -> Amendments<'static> {
    let mut all = Amendments::default();
    for option in options.split(',') {
        match option.split_once('=').expect("a value") {
            ("compat", "0.10") => all.version = Some(FormatVersion::V2),
            ("compat", "1.1") => all.version = Some(FormatVersion::V3),
            ("lazy_refcounts", value) => all.lazy_refcounts = Some(value == "on"),
            ("refcount_bits", bits) => all.refcount_bits = Some(bits.parse().expect("bits")),
            ("size", size) => all.size = Some(size.parse().expect("bytes")),
            (other, _) => panic!("{other}"),
        }
    }
    all
}

/// Random images of all kinds; where QEMU refuses, so do we, but where it could go on at the cost of what it says.
#[test]
fn random_images_become_what_qemu_makes_of_them() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (mut done, mut refused) = (0, 0);
    let kinds = [
        "compat=0.10",
        "compat=1.1",
        "compat=1.1,lazy_refcounts=on",
        "compat=1.1,refcount_bits=64",
        "refcount_bits=16,compat=0.10",
        "compat=1.1,refcount_bits=2",
        "lazy_refcounts=off",
    ];
    for seed in 61_000_000..61_000_014 {
        let made = make_chain(dir.path(), seed);
        let Some(index) = made
            .files
            .iter()
            .position(|one| one.format == LayerFormat::Qcow2)
        else {
            continue;
        };
        let ours = made.files[index].path.clone();
        let theirs = ours.with_extension("theirs");
        std::fs::copy(&ours, &theirs).expect("copy");
        let options = kinds[usize::try_from(seed % 7).expect("small")];
        let story = format!("{options}\n{}", made.story);
        let before = states(&made.files[index..]);
        let mut one = match editor(&ours) {
            // QEMU 7.2 now and then damages an image itself; see the tests of check.
            Err(Error::Damaged { .. }) => continue,
            opened => opened.expect("whole"),
        };
        let result = amend::amend(&mut one, &amendments(options), None, &Control::default());
        drop(one);
        let qemu = qemu_amend(&theirs, options);
        match result {
            Ok(_) => {
                assert!(qemu, "qemu-img refused\n{story}");
                assert_eq!(info(&ours), info(&theirs), "{story}");
                done += 1;
            }
            Err(error) => {
                assert!(!qemu, "{error}, and qemu-img does it\n{story}");
                refused += 1;
            }
        }
        require_whole(&ours, &story);
        assert_eq!(states(&made.files[index..]), before, "{story}");
    }
    assert!(done > 5 && refused > 0, "{done} done, {refused} refused");
}

fn image(dir: &Path, options: &str) -> PathBuf {
    let path = dir.join("image");
    let base = dir.join("base");
    sh(&format!("qemu-img create -q -f raw {} 3M", text(&base)));
    let args = ["-f", "raw", "-c", "write -P 9 0 3M", text(&base)].map(str::to_owned);
    run("qemu-io", &args);
    let below = text(&base);
    let name = text(&path);
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {below} -F raw -o {options} {name}"
    ));
    io(
        &path,
        &[
            "write -P 1 0 1M",
            "write -z 512k 256k",
            "write -z -u 2M 64k",
        ],
    );
    sh(&format!("qemu-img snapshot -c one {name}"));
    io(&path, &["write -P 2 100k 300k", "write -z 700k 200k"]);
    sh(&format!("qemu-img snapshot -c two {name}"));
    path
}

/// Every width that there is, one after the other, with shared clusters; too narrow ones are refused.
#[test]
fn refcounts_get_every_width_that_can_say_them() {
    for cluster in ["512", "4k", "64k"] {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = image(dir.path(), &format!("cluster_size={cluster}"));
        let files = [
            layer(&path, LayerFormat::Qcow2),
            layer(dir.path().join("base"), LayerFormat::Raw),
        ];
        let before = states(&files);
        for bits in [64, 2, 32, 8, 4, 16] {
            let mut one = editor(&path).expect("whole");
            let wanted = Amendments {
                refcount_bits: Some(bits),
                ..Amendments::default()
            };
            let plan = amend::plan(&one, &wanted, None, &Control::default()).expect("plan");
            let done = amend::amend(&mut one, &wanted, None, &Control::default()).expect("amend");
            assert_eq!(plan, done.room);
            assert_eq!(1 << one.layer().header().refcount_order, bits);
            drop(one);
            assert_eq!(
                std::fs::metadata(&path).expect("stat").len(),
                plan.end_bytes
            );
            require_whole(&path, cluster);
            assert_eq!(states(&files), before, "{cluster} {bits}");
        }
        let bytes = std::fs::read(&path).expect("read");
        for (bits, overflows) in [(1, true), (3, false), (0, false), (128, false)] {
            let wanted = Amendments {
                refcount_bits: Some(bits),
                ..Amendments::default()
            };
            let mut one = editor(&path).expect("whole");
            let error = amend::amend(&mut one, &wanted, None, &Control::default()).expect_err("no");
            assert_eq!(
                matches!(error, Error::RefcountOverflow { .. }),
                overflows,
                "{error}"
            );
            assert!(error.to_string().contains("nothing was changed"), "{error}");
        }
        assert!(std::fs::read(&path).expect("read") == bytes);
    }
}

/// Zeros over a backing file become data, shared as they were; without one they become nothing.
#[test]
fn an_older_version_has_no_zero_clusters_and_reads_the_same() {
    for cluster in ["512", "4k", "64k"] {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = image(dir.path(), &format!("cluster_size={cluster}"));
        let files = [
            layer(&path, LayerFormat::Qcow2),
            layer(dir.path().join("base"), LayerFormat::Raw),
        ];
        let before = states(&files);
        let mut one = editor(&path).expect("whole");
        let down = amendments("compat=0.10");
        let done = amend::amend(&mut one, &down, None, &Control::default()).expect("down");
        assert_eq!(one.layer().header().version, 2);
        drop(one);
        require_whole(&path, cluster);
        assert_eq!(states(&files), before, "{cluster}");
        assert_eq!(
            std::fs::metadata(&path).expect("stat").len(),
            done.room.end_bytes
        );
        // Tables, and one set of zeros for the states that share them: not 1360k.
        assert!(done.room.new_bytes < 1200 << 10, "{:?}", done.room);
        let mut one = editor(&path).expect("whole");
        let up = amendments("compat=1.1,lazy_refcounts=on");
        amend::amend(&mut one, &up, None, &Control::default()).expect("up");
        assert!(one.layer().header().lazy_refcounts());
        drop(one);
        require_whole(&path, cluster);
        assert_eq!(states(&files), before, "{cluster}");
        io(&path, &["write -P 4 0 3M"]);
        require_whole(&path, cluster);
        assert_eq!(states(&files)[1..], before[1..], "{cluster}");
    }
}

#[test]
fn what_the_older_version_cannot_say_is_refused_by_name() {
    for (options, bitmap, expected) in [
        ("extended_l2=on", false, "subclusters"),
        ("compression_type=zstd", false, "zstd"),
        ("refcount_bits=8", false, "8 bits"),
        ("cluster_size=4k", true, "bitmaps"),
    ] {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = image(dir.path(), options);
        if bitmap {
            sh(&format!("qemu-img bitmap --add {} b", text(&path)));
        }
        let bytes = std::fs::read(&path).expect("read");
        let mut one = editor(&path).expect("whole");
        let down = amendments("compat=0.10");
        let error = amend::amend(&mut one, &down, None, &Control::default()).expect_err(options);
        assert!(error.to_string().contains(expected), "{error}");
        drop(one);
        assert!(std::fs::read(&path).expect("read") == bytes, "{options}");
    }
}

#[test]
fn several_amendments_are_one_change() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = image(dir.path(), "cluster_size=4k,compat=0.10");
    let base = dir.path().join("base");
    let below = Chain::open(&[layer(&base, LayerFormat::Raw)]).expect("whole");
    let files = [
        layer(&path, LayerFormat::Qcow2),
        layer(&base, LayerFormat::Raw),
    ];
    let before = states(&files);
    let wanted = Amendments {
        size: Some(5 << 20),
        backing: Some(Some(BackingFile {
            name: text(&base).as_bytes(),
            format: Some(b"raw"),
        })),
        ..amendments("compat=1.1,lazy_refcounts=on,refcount_bits=32")
    };
    let mut one = editor(&path).expect("whole");
    amend::amend(&mut one, &wanted, Some(&below), &Control::default()).expect("amend");
    drop(one);
    require_whole(&path, "");
    let after = states(&files);
    assert_eq!(after[1..], before[1..]);
    assert_eq!(after[0].0, 5 << 20);
    let info = info(&path);
    let specific = &info["format-specific"]["data"];
    assert_eq!(specific["refcount-bits"], 32);
    assert_eq!(specific["lazy-refcounts"], true);
    assert_eq!(specific["compat"], "1.1");
}

/// The data file itself is never opened, and its image keeps everything else.
#[test]
fn an_image_with_a_data_file_gets_another_name_for_it_as_from_qemu() {
    let dir = tempfile::tempdir().expect("temp dir");
    let [ours, theirs, data] = ["ours", "theirs", "data"].map(|name| dir.path().join(name));
    let (name, data) = (text(&ours), text(&data));
    sh(&format!(
        "qemu-img create -q -f qcow2 -o data_file={data},data_file_raw=on {name} 3M"
    ));
    io(&ours, &["write -P 5 0 1M"]);
    std::fs::copy(&ours, &theirs).expect("copy");
    let other = format!("{data}.other");
    std::fs::copy(data, &other).expect("copy");
    let options = format!("data_file={other},data_file_raw=off,lazy_refcounts=on,refcount_bits=32");
    assert!(qemu_amend(&theirs, &options));
    let wanted = Amendments {
        data_file: Some(other.as_bytes()),
        data_file_raw: Some(false),
        ..amendments("lazy_refcounts=on,refcount_bits=32")
    };
    assert!(matches!(editor(&ours), Err(Error::ExternalDataFile { .. })));
    let open = || Editor::open_for_amendments(&ours, EditOptions::default()).expect("whole");
    // What needs the tables is refused.
    let grow = amendments("size=4194304");
    let error = amend::amend(&mut open(), &grow, None, &Control::default()).expect_err("refused");
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    // Nothing can be below a raw data file; qemu-img refuses it, too.
    let below = Amendments {
        backing: Some(Some(BackingFile {
            name: b"below",
            format: Some(b"raw"),
        })),
        ..Amendments::default()
    };
    assert!(!qemu_amend(&theirs, "backing_file=below,backing_fmt=raw"));
    let error = amend::amend(&mut open(), &below, None, &Control::default()).expect_err("refused");
    assert!(
        error.to_string().contains("nothing can be below"),
        "{error}"
    );
    let keep = amendments("lazy_refcounts=off");
    amend::amend(&mut open(), &keep, None, &Control::default()).expect("amend");
    let raw = |path: &Path| {
        let layer = Layer::inspect(path).expect("whole");
        layer
            .header()
            .external_data
            .clone()
            .expect("a data file")
            .raw
    };
    assert!(
        raw(&ours),
        "a change of something else took the promise back"
    );
    amend::amend(&mut open(), &wanted, None, &Control::default()).expect("amend");
    assert!(!raw(&ours));
    assert_eq!(info(&ours), info(&theirs));
    let (ours, theirs) = (text(&ours), text(&theirs));
    sh(&format!("qemu-img check -q -f qcow2 {ours}"));
    sh(&format!(
        "qemu-img compare -q -f qcow2 -F qcow2 {ours} {theirs}"
    ));
    let again = Amendments {
        data_file_raw: Some(true),
        ..Amendments::default()
    };
    let error = amend::amend(&mut open(), &again, None, &Control::default()).expect_err("refused");
    assert!(error.to_string().contains("cannot promise"), "{error}");
}
