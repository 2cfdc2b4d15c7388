//! What was recorded of the disk below is found again, or found to have changed, whoever changed the image.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a test need not be durable"
)]

mod images;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use images::{format_name, layer, make_chain, run, sh};
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::commit::{CommitOptions, commit};
use stead_qcow2::ops::rebase::{self, BackingFile, NewBacking};
use stead_qcow2::ops::{amend, snapshot};
use stead_qcow2::{
    Backing, Chain, CheckReport, ClusterSize, Control, DiskContent, Error, Finding, Layer,
    LayerFormat, NewFormat, Note, OpenPolicy, Qcow2Options, Target, Version, check, check_backing,
    create,
};
use stead_sys::durable::Existing;

const DISK: u64 = 8 << 20;

/// A raw base with data, and overlays of it that record its content.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            dir: tempfile::tempdir().expect("a folder"),
        };
        let base = bench.text("base");
        sh(&format!("qemu-img create -q -f raw {base} {DISK}"));
        bench.io("raw", "base", &["write -P 7 0 1M", "write -P 8 5000k 300k"]);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn io(&self, format: &str, name: &str, commands: &[&str]) {
        let mut args = vec!["-f".to_owned(), format.to_owned()];
        args.extend(commands.iter().flat_map(|c| ["-c".into(), (*c).into()]));
        args.push(self.text(name));
        run("qemu-io", &args);
    }

    fn base(&self) -> Chain {
        Chain::open(&[layer(self.path("base"), LayerFormat::Raw)]).expect("opens")
    }

    fn content(&self) -> DiskContent {
        DiskContent::of(&self.base(), &Control::default()).expect("read")
    }

    /// An overlay of `base` that has its content recorded.
    fn overlay(&self, name: &str, options: Qcow2Options) {
        let options = Qcow2Options {
            backing: Some(Backing {
                name: "base".into(),
                format: LayerFormat::Raw,
            }),
            backing_content: Some(self.content()),
            ..options
        };
        let target = Target::New {
            path: self.path(name),
            mode: 0o600,
            existing: Existing::Keep,
        };
        create(
            &target,
            &NewFormat::Qcow2(options),
            DISK,
            &Control::default(),
        )
        .expect("made");
    }

    fn compare(&self, name: &str) -> CheckReport {
        compare(&self.path(name))
    }

    /// The content below is what was recorded.
    fn holds(&self, name: &str) {
        let report = self.compare(name);
        assert_eq!(report.findings, [], "{name}");
        assert_eq!(report.notes, [], "{name}");
        assert_eq!(report.backing_compared, 1, "{name}");
    }

    /// There is no record.
    fn has_none(&self, name: &str) {
        let layer = Layer::inspect(&self.path(name)).expect("opens");
        assert_eq!(layer.header().backing_record(), None, "{name}");
        assert_eq!(self.compare(name).backing_compared, 0, "{name}");
    }

    fn editor(&self, name: &str) -> Editor {
        Editor::open(&self.path(name), EditOptions::default()).expect("opens")
    }
}

fn compare(path: &Path) -> CheckReport {
    let top = layer(path, LayerFormat::Qcow2);
    let chain = Chain::open_following(&top, &OpenPolicy::NAMES).expect("opens");
    let mut report = check(chain.layer(0).expect("qcow2")).expect("checked");
    check_backing(&chain, &mut report, &Control::default()).expect("compared");
    report
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path);
    let file = file.expect("opens");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("write");
}

#[test]
fn one_flipped_bit_anywhere_below_is_found_and_qemu_finds_none() {
    let bench = Bench::new();
    bench.overlay("top", Qcow2Options::default());
    bench.io("qcow2", "top", &["write -P 9 64k 64k"]);
    bench.holds("top");
    let before = fs::read(bench.path("top")).expect("read");
    for at in [0, 1 << 20, 5_000 << 10, DISK - 1] {
        flip(&bench.path("base"), at);
        let report = bench.compare("top");
        let [
            Finding::BackingContent {
                length,
                recorded_length,
                ..
            },
        ] = report.findings[..]
        else {
            panic!("{at}: {:?}", report.findings);
        };
        assert_eq!((length, recorded_length), (DISK, DISK));
        assert!(!report.is_safe());
        // It exits with 0 and says that all is well.
        sh(&format!("qemu-img check -q {}", bench.text("top")));
        flip(&bench.path("base"), at);
        bench.holds("top");
    }
    assert!(before == fs::read(bench.path("top")).expect("read"));
}

#[test]
fn a_base_of_another_length_is_found() {
    let bench = Bench::new();
    bench.overlay("top", Qcow2Options::default());
    for length in [DISK + 512, DISK - 512] {
        sh(&format!("truncate -s {length} {}", bench.text("base")));
        let report = bench.compare("top");
        let text = report.findings[0].to_string();
        assert!(
            text.contains(&format!("has {length} bytes and not {DISK}")),
            "{text}"
        );
    }
}

#[test]
fn the_hash_of_a_disk_depends_on_nothing_but_what_a_guest_sees() {
    let dir = tempfile::tempdir().expect("a folder");
    for seed in 0..12 {
        let chain = make_chain(dir.path(), seed);
        let content = DiskContent::of(&chain.open(), &Control::default()).expect("read");
        let top = chain.top();
        let from = format_name(top.format);
        let copies = ["raw", "qcow2 -S 0", "qcow2 -c"].map(|how| {
            let to = dir.path().join("copy");
            let path = top.path.display();
            sh(&format!(
                "qemu-img convert -f {from} -O {how} {path} {}",
                to.display()
            ));
            let format = if how == "raw" {
                LayerFormat::Raw
            } else {
                LayerFormat::Qcow2
            };
            let copy = Chain::open(&[layer(&to, format)]).expect("opens");
            let found = DiskContent::of(&copy, &Control::default()).expect("read");
            // Another byte, another hash.
            if how == "raw" {
                flip(&to, copy.len() / 2);
                let other = DiskContent::of(&copy, &Control::default()).expect("read");
                assert_ne!(other.hash, found.hash, "{}", chain.story);
            }
            found
        });
        assert_eq!(copies, [content; 3], "{}", chain.story);
    }
}

#[test]
fn qemu_keeps_the_record_whenever_it_writes_the_header() {
    let bench = Bench::new();
    bench.overlay("top", Qcow2Options::default());
    bench.overlay(
        "old",
        Qcow2Options {
            version: Version::V2,
            ..Qcow2Options::default()
        },
    );
    let (top, old) = (bench.text("top"), bench.text("old"));
    sh(&format!("qemu-img amend -o lazy_refcounts=on {top}"));
    sh(&format!("qemu-img amend -o compat=1.1 {old}"));
    for image in ["top", "old"] {
        bench.holds(image);
        let path = bench.text(image);
        sh(&format!("qemu-img snapshot -c one {path}"));
        bench.io("qcow2", image, &["write -P 3 2M 100k"]);
        bench.holds(image);
        sh(&format!("qemu-img bitmap --add {path} b"));
        bench.io("qcow2", image, &["write -P 3 3M 100k"]);
        bench.holds(image);
        sh(&format!("qemu-img snapshot -d one {path}"));
        sh(&format!("qemu-img resize -q {path} 16M"));
        sh(&format!("qemu-img check -q -r all {path}"));
        bench.holds(image);
        sh(&format!("qemu-img rebase -u -b base -F raw {path}"));
        bench.holds(image);
    }
}

#[test]
fn a_backing_file_renamed_by_qemu_is_compared_and_is_damage_only_under_the_recorded_name() {
    let bench = Bench::new();
    bench.overlay("top", Qcow2Options::default());
    let (top, base) = (bench.text("top"), bench.text("base"));
    sh(&format!("cp {base} {base}2"));
    sh(&format!("qemu-img rebase -u -b base2 -F raw {top}"));
    bench.holds("top");
    flip(&bench.path("base2"), 100);
    let report = bench.compare("top");
    assert!(report.is_clean(), "{:?}", report.findings);
    assert!(
        matches!(report.notes[..], [Note::BackingRecordOutdated { .. }]),
        "{:?}",
        report.notes
    );
    sh(&format!("qemu-img rebase -u -b base -F raw {top}"));
    bench.holds("top");
    // Without a backing file the record says nothing.
    let line = ["rebase", "-b", "", &top].map(str::to_owned);
    run("qemu-img", &line);
    assert_eq!(bench.compare("top").backing_compared, 0);
}

#[test]
fn our_operations_keep_the_record_while_it_is_true_and_else_drop_or_renew_it() {
    let bench = Bench::new();
    let quiet = Control::default();
    bench.overlay("top", Qcow2Options::default());
    bench.io("qcow2", "top", &["write -P 9 0 128k"]);
    snapshot::create(
        &mut bench.editor("top"),
        &stead_qcow2::edit::SnapshotName {
            name: b"s".to_vec(),
            date_seconds: 1,
            date_nanoseconds: 0,
        },
    )
    .expect("made");
    bench.holds("top");
    let amendments = amend::Amendments {
        size: Some(2 * DISK),
        lazy_refcounts: Some(true),
        ..Default::default()
    };
    let base = bench.base();
    amend::amend(&mut bench.editor("top"), &amendments, Some(&base), &quiet).expect("amended");
    bench.holds("top");
    // Another name for the same content: still compared.
    let second = bench.path("second");
    fs::copy(bench.path("base"), &second).expect("copied");
    flip(&second, 6 << 20);
    let file = BackingFile {
        name: b"second",
        format: Some(b"raw"),
    };
    rebase::rename(&mut bench.editor("top"), Some(file)).expect("renamed");
    assert_eq!(bench.compare("top").notes.len(), 1);
    let file = BackingFile {
        name: b"base",
        ..file
    };
    rebase::rename(&mut bench.editor("top"), Some(file)).expect("renamed");
    bench.holds("top");
    // Another disk below: the record goes, or is made anew.
    let disk = Chain::open(&[layer(&second, LayerFormat::Raw)]).expect("opens");
    let mut new = NewBacking {
        file: BackingFile {
            name: b"second",
            format: Some(b"raw"),
        },
        disk: &disk,
        content: None,
    };
    rebase::rebase(&mut bench.editor("top"), Some(&base), Some(&new), &quiet).expect("rebased");
    bench.has_none("top");
    new.content = Some(DiskContent::of(&disk, &quiet).expect("read"));
    rebase::rebase(&mut bench.editor("top"), Some(&disk), Some(&new), &quiet).expect("rebased");
    bench.holds("top");
    rebase::flatten(&mut bench.editor("top"), Some(&disk), &quiet).expect("flattened");
    bench.has_none("top");
}

#[test]
fn a_commit_into_the_base_takes_the_record_of_what_was_below_away() {
    for empty_top in [false, true] {
        let bench = Bench::new();
        bench.overlay("top", Qcow2Options::default());
        bench.io("qcow2", "top", &["write -P 9 0 128k"]);
        bench.holds("top");
        let files = [
            layer(bench.path("top"), LayerFormat::Qcow2),
            layer(bench.path("base"), LayerFormat::Raw),
        ];
        let options = CommitOptions {
            empty_top,
            ..CommitOptions::default()
        };
        commit(&files, &options, &Control::default()).expect("committed");
        bench.has_none("top");
    }
    // A commit that is refused changes nothing.
    let bench = Bench::new();
    bench.overlay("top", Qcow2Options::default());
    bench.io("qcow2", "top", &["write -P 9 0 128k"]);
    sh(&format!("truncate -s {} {}", 2 * DISK, bench.text("base")));
    let before = fs::read(bench.path("top")).expect("read");
    let files = [
        layer(bench.path("top"), LayerFormat::Qcow2),
        layer(bench.path("base"), LayerFormat::Raw),
    ];
    let error =
        commit(&files, &CommitOptions::default(), &Control::default()).expect_err("longer base");
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert!(before == fs::read(bench.path("top")).expect("read"));
}

#[test]
fn a_comparison_is_cancelled_and_a_record_of_another_kind_is_kept_and_not_understood() {
    let bench = Bench::new();
    bench.overlay("top", Qcow2Options::default());
    let top = layer(bench.path("top"), LayerFormat::Qcow2);
    let chain = Chain::open_following(&top, &OpenPolicy::NAMES).expect("opens");
    let cancel = AtomicBool::new(true);
    let control = Control {
        cancel: Some(&cancel),
        progress: None,
    };
    let error = check_backing(&chain, &mut CheckReport::default(), &control);
    assert!(matches!(error, Err(Error::Cancelled { .. })));
    cancel.store(false, Ordering::Relaxed);
    check_backing(&chain, &mut CheckReport::default(), &control).expect("compared");
    // Every byte of the record matters, or makes it one that is not known: never a panic.
    let bytes = fs::read(bench.path("top")).expect("read");
    let at = bytes
        .windows(4)
        .position(|word| word == b"STBC")
        .expect("the record")
        + 8;
    for byte in 0..80 {
        flip(&bench.path("top"), (at + byte) as u64);
        let report = bench.compare("top");
        assert!(
            report.backing_compared == 0
                || report.findings.len() + report.notes.len() == 1
                || (16..48).contains(&byte),
            "byte {byte}: {report:?}"
        );
        flip(&bench.path("top"), (at + byte) as u64);
    }
    bench.holds("top");
    // Where only the last image was opened, what is below cannot be compared.
    let alone = Chain::open(&[top]).expect("opens");
    let error = check_backing(&alone, &mut CheckReport::default(), &Control::default());
    assert!(matches!(error, Err(Error::InvalidChain { .. })));
}

#[test]
fn a_first_cluster_without_room_for_a_record_is_refused_by_name() {
    let bench = Bench::new();
    let path = bench.path("tiny");
    let options = Qcow2Options {
        cluster_size: ClusterSize::from_bytes(512).expect("512"),
        backing: Some(Backing {
            name: "n".repeat(300),
            format: LayerFormat::Raw,
        }),
        backing_content: Some(bench.content()),
        ..Qcow2Options::default()
    };
    let target = Target::New {
        path: path.clone(),
        mode: 0o600,
        existing: Existing::Keep,
    };
    let error = create(
        &target,
        &NewFormat::Qcow2(options),
        1 << 20,
        &Control::default(),
    );
    let error = error.expect_err("no room").to_string();
    assert!(error.contains("do not fit the first cluster"), "{error}");
    assert!(!path.exists());
}
