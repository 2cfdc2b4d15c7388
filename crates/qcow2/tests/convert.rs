//! Copies read the same, have nothing that is not needed, and are as long as was predicted.

mod images;

use std::num::NonZero;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use images::{RandomChain, format_name, make_chain, sh};
use stead_qcow2::{
    Backing, Chain, ClusterSize, Compression, Control, ConvertOptions, DataFile, Durability, Error,
    Layer, LayerFormat, NewFiles, NewFormat, Preallocation, Qcow2Options, Target, Verify, Version,
    check, convert, measure, measure_empty, predict,
};
use stead_sys::durable::Existing;

fn new_file(path: &Path) -> Target {
    Target::New {
        path: path.to_owned(),
        mode: 0o600,
        existing: Existing::Keep,
    }
}

/// What is tested here does not depend on syncs, which take their time.
fn options<'a>() -> ConvertOptions<'a> {
    ConvertOptions {
        durability: Durability::Cached,
        ..ConvertOptions::default()
    }
}

const RAW: NewFormat = NewFormat::Raw {
    preallocation: Preallocation::Off,
};

/// A kind of target for each number.
fn kind(number: u64) -> (NewFormat, bool) {
    let bits = [9, 12, 14, 16, 21][usize::try_from(number % 5).expect("small")];
    let mut qcow2 = Qcow2Options {
        cluster_size: ClusterSize::from_bits(bits).expect("valid"),
        ..Qcow2Options::default()
    };
    let compressed = number % 3 == 1;
    match number % 7 {
        0 => return (RAW, false),
        1 => qcow2.compression = Compression::Zstd,
        2 => qcow2.version = Version::V2,
        3 => qcow2.refcount_bits = 1,
        4 => qcow2.refcount_bits = 2,
        5 => qcow2.refcount_bits = 64,
        _ => qcow2.extended_l2 = bits >= 14,
    }
    (NewFormat::Qcow2(qcow2), compressed)
}

fn check_copy(made: &RandomChain, path: &Path, files: NewFiles, format: &NewFormat) {
    let top = made.top();
    let target = match format {
        NewFormat::Raw { .. } => "raw",
        NewFormat::Qcow2(_) => {
            sh(&format!("qemu-img check -q {}", path.display()));
            let layer = Layer::open(path).expect("our own image");
            let report = check(&layer).expect("our own image");
            assert!(report.is_clean(), "{:?}\n{}", report.findings, made.story);
            assert_eq!(report.used_clusters, report.file_clusters);
            "qcow2"
        }
    };
    sh(&format!(
        "qemu-img compare -s -f {} -F {target} {} {}",
        format_name(top.format),
        top.path.display(),
        path.display()
    )
    .replace(" -s ", " "));
    assert_eq!(
        path.metadata().expect("stat").len(),
        files.file_bytes,
        "{}",
        made.story
    );
}

#[test]
fn a_copy_of_a_random_chain_reads_the_same_in_every_format_and_is_as_long_as_predicted() {
    let dir = tempfile::tempdir().expect("temp dir");
    for seed in 31_000_000..31_000_014 {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        let (format, compressed) = kind(seed);
        let options = ConvertOptions {
            format,
            compressed,
            verify: Verify::Content,
            ..options()
        };
        let path = dir.path().join(format!("{seed}.copy"));
        let target = new_file(&path);
        let said = predict(&chain, &target, &options, &Control::default()).expect("predict");
        let files = convert(&chain, &target, &options, &Control::default());
        let files = files.unwrap_or_else(|error| panic!("{error}\n{}", made.story));
        assert_eq!(said, files, "{}", made.story);
        check_copy(&made, &path, files, &options.format);
    }
}

#[test]
fn a_copy_over_a_backing_file_holds_only_what_differs_from_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut copied = 0;
    for seed in 32_000_000..32_000_007 {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        let foreign = make_chain(dir.path(), seed + 1_000_000);
        let own_lower = (1..chain.depth()).map(|layers| &made.files[layers..]);
        for (index, lower) in own_lower.chain([&foreign.files[..]]).enumerate() {
            let below = Chain::open(lower).expect("a good chain");
            let (format, compressed) = kind(seed + 1 + index as u64);
            let NewFormat::Qcow2(mut qcow2) = format else {
                continue;
            };
            qcow2.backing = Some(Backing {
                name: lower[0].path.display().to_string(),
                format: lower[0].format,
            });
            let options = ConvertOptions {
                format: NewFormat::Qcow2(qcow2),
                compressed,
                below: Some(&below),
                verify: Verify::Content,
                ..options()
            };
            let path = dir.path().join(format!("{seed}.{index}"));
            if qcow2_name_is_too_long(&options) {
                continue;
            }
            let said = predict(&chain, &new_file(&path), &options, &Control::default());
            let files = convert(&chain, &new_file(&path), &options, &Control::default())
                .unwrap_or_else(|error| panic!("{error}\n{}", made.story));
            assert_eq!(said.expect("predict"), files);
            check_copy(&made, &path, files, &options.format);
            copied += 1;
        }
    }
    assert!(copied > 7, "{copied}");
}

/// A cluster of 512 bytes has no room for a long name; that it is refused is tested elsewhere.
fn qcow2_name_is_too_long(options: &ConvertOptions<'_>) -> bool {
    match &options.format {
        NewFormat::Raw { .. } => false,
        NewFormat::Qcow2(qcow2) => qcow2
            .backing
            .as_ref()
            .is_some_and(|b| b.name.len() > 300 && qcow2.cluster_size == ClusterSize::MIN),
    }
}

/// The same bytes from one thread and from eight.
#[test]
fn the_number_of_threads_does_not_change_a_byte() {
    let dir = tempfile::tempdir().expect("temp dir");
    let made = make_chain(dir.path(), 33_000_003);
    let chain = made.open();
    for (index, compressed) in [false, true].into_iter().enumerate() {
        let mut found: Vec<Vec<u8>> = Vec::new();
        for threads in [1, 3, 8] {
            let options = ConvertOptions {
                compressed,
                threads: NonZero::new(threads),
                ..options()
            };
            let path = dir.path().join(format!("{index}.{threads}"));
            convert(&chain, &new_file(&path), &options, &Control::default()).expect("convert");
            found.push(std::fs::read(&path).expect("read"));
        }
        assert!(found.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn reserved_clusters_of_a_copy_are_all_there_and_read_the_same() {
    let dir = tempfile::tempdir().expect("temp dir");
    let kinds = [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ];
    for (seed, preallocation) in (34_000_000..34_000_003).zip(kinds.into_iter().cycle()) {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        let options = ConvertOptions {
            format: NewFormat::Qcow2(Qcow2Options {
                preallocation,
                extended_l2: seed % 2 == 0,
                ..Qcow2Options::default()
            }),
            verify: Verify::Content,
            ..options()
        };
        let path = dir.path().join(format!("{seed}.copy"));
        let said = predict(&chain, &new_file(&path), &options, &Control::default());
        let files =
            convert(&chain, &new_file(&path), &options, &Control::default()).expect("convert");
        assert_eq!(said.expect("predict"), files);
        check_copy(&made, &path, files, &options.format);
        let report = check(&Layer::open(&path).expect("open")).expect("check");
        assert_eq!(report.guest_clusters, chain.len().div_ceil(65_536));
    }
}

#[test]
fn a_copy_with_an_external_data_file_reads_the_same_and_a_raw_one_alone_does_too() {
    let dir = tempfile::tempdir().expect("temp dir");
    for seed in 40_000_000..40_000_004 {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        let raw = seed % 2 == 0;
        let data = dir.path().join(format!("{seed}.data"));
        let options = ConvertOptions {
            format: NewFormat::Qcow2(Qcow2Options {
                data_file: Some(DataFile {
                    name: data.display().to_string(),
                    path: data.clone(),
                    raw,
                }),
                extended_l2: seed % 3 == 0,
                ..Qcow2Options::default()
            }),
            verify: Verify::Content,
            ..options()
        };
        let path = dir.path().join(format!("{seed}.copy"));
        let said = predict(&chain, &new_file(&path), &options, &Control::default());
        let files =
            convert(&chain, &new_file(&path), &options, &Control::default()).expect("convert");
        assert_eq!(said.expect("predict"), files);
        assert_eq!(files.data_file_bytes, Some(chain.len()));
        let (top, copy) = (made.top(), path.display());
        let format = format_name(top.format);
        sh(&format!("qemu-img check -q {copy}"));
        sh(&format!(
            "qemu-img compare -q -f {format} {} {copy}",
            top.path.display()
        ));
        if raw {
            let expected = images::convert(top, &dir.path().join("expected"));
            assert!(
                std::fs::read(&data).expect("read") == expected,
                "{}",
                made.story
            );
        }
    }
}

#[test]
fn a_raw_file_in_place_holds_the_source_and_nothing_of_what_was_there() {
    let dir = tempfile::tempdir().expect("temp dir");
    for seed in 35_000_000..35_000_002 {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        let path = dir.path().join(format!("{seed}.there"));
        let length = usize::try_from(chain.len()).expect("fits");
        let garbage = vec![0x5a; length];
        stead_sys::durable::publish(&path, 0o600, &garbage, Existing::Keep).expect("write");
        let options = ConvertOptions {
            format: RAW,
            verify: Verify::Content,
            ..options()
        };
        let target = Target::InPlace { path: path.clone() };
        convert(&chain, &target, &options, &Control::default()).expect("convert");
        let expected = images::convert(made.top(), &dir.path().join("expected"));
        assert!(
            std::fs::read(&path).expect("read") == expected,
            "{}",
            made.story
        );
    }
}

#[test]
fn without_sparse_zeros_every_cluster_is_written() {
    let dir = tempfile::tempdir().expect("temp dir");
    let made = make_chain(dir.path(), 36_000_001);
    let chain = made.open();
    let path = dir.path().join("copy");
    let options = ConvertOptions {
        sparse_bytes: 0,
        ..options()
    };
    let files = convert(&chain, &new_file(&path), &options, &Control::default()).expect("convert");
    check_copy(&made, &path, files, &options.format);
    let report = check(&Layer::open(&path).expect("open")).expect("check");
    assert_eq!(report.guest_clusters, chain.len().div_ceil(65_536));
}

/// QEMU counts the tables of a full image, so ours are never longer than it says.
#[test]
fn measures_are_qemus_and_a_copy_is_no_longer() {
    let dir = tempfile::tempdir().expect("temp dir");
    for seed in 37_000_000..37_000_007 {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        let (format, _) = kind(seed);
        let mut words = match &format {
            NewFormat::Raw { .. } => "-O raw".to_owned(),
            NewFormat::Qcow2(options) => format!(
                "-O qcow2 -o cluster_size={},compat={},refcount_bits={},extended_l2={}",
                options.cluster_size.bytes(),
                if options.version == Version::V2 {
                    "0.10"
                } else {
                    "1.1"
                },
                options.refcount_bits,
                if options.extended_l2 { "on" } else { "off" },
            ),
        };
        let top = made.top();
        let empty = sh(&format!(
            "qemu-img measure --output=json {words} --size {}",
            5_u64 << 30
        ));
        words += &format!(" -f {} {}", format_name(top.format), top.path.display());
        let full = sh(&format!("qemu-img measure --output=json {words}"));
        let said = measure(&chain, &format).expect("measure");
        let number = |text: &str, name: &str| {
            let value: serde_json::Value = serde_json::from_str(text).expect("JSON");
            value[name].as_u64()
        };
        assert_eq!(
            number(&full, "required"),
            Some(said.required),
            "{words}\n{}",
            made.story
        );
        assert_eq!(
            number(&full, "fully-allocated"),
            Some(said.fully_allocated),
            "{words}"
        );
        assert_eq!(
            number(&full, "bitmaps"),
            said.bitmaps,
            "{words}\n{}",
            made.story
        );
        let nothing = measure_empty(5_u64 << 30, &format).expect("measure");
        assert_eq!(
            number(&empty, "required"),
            Some(nothing.required),
            "{words}"
        );
        assert_eq!(
            number(&empty, "fully-allocated"),
            Some(nothing.fully_allocated)
        );
        let path = dir.path().join(format!("{seed}.copy"));
        let options = ConvertOptions {
            format,
            ..options()
        };
        let files =
            convert(&chain, &new_file(&path), &options, &Control::default()).expect("convert");
        assert!(files.file_bytes <= said.required, "{words}\n{}", made.story);
    }
}

#[test]
fn bitmaps_are_measured_as_qemu_measures_them() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("disk").display().to_string();
    sh(&format!("qemu-img create -q -f qcow2 {path} 3G"));
    for (name, granularity) in [
        ("one", 65_536),
        ("two-of-another-length", 512),
        ("three", 2 << 20),
    ] {
        sh(&format!(
            "qemu-img bitmap --add -g {granularity} {path} {name}"
        ));
    }
    let chain = Chain::open(&[images::layer(&path, LayerFormat::Qcow2)]).expect("open");
    for size in [4096, 65_536, 2 << 20] {
        let text = sh(&format!(
            "qemu-img measure --output=json -O qcow2 -o cluster_size={size} -f qcow2 {path}"
        ));
        let expected: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let format = NewFormat::Qcow2(Qcow2Options {
            cluster_size: ClusterSize::from_bytes(size).expect("valid"),
            ..Qcow2Options::default()
        });
        let found = measure(&chain, &format).expect("measure");
        assert_eq!(expected["bitmaps"].as_u64(), found.bitmaps, "{size}");
    }
}

#[test]
fn a_cancelled_copy_leaves_nothing_and_progress_only_counts_up_to_one() {
    let dir = tempfile::tempdir().expect("temp dir");
    let made = make_chain(dir.path(), 38_000_000);
    let chain = made.open();
    let before = std::fs::read_dir(dir.path()).expect("list").count();
    let path = dir.path().join("copy");
    let cancel = AtomicBool::new(false);
    let stop = |_| cancel.store(true, Ordering::Relaxed);
    let control = Control {
        cancel: Some(&cancel),
        progress: Some(&stop),
    };
    let options = ConvertOptions {
        threads: NonZero::new(1),
        sparse_bytes: 0,
        ..options()
    };
    let error = convert(&chain, &new_file(&path), &options, &control).expect_err("cancelled");
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), before);
    let told = Mutex::new(Vec::new());
    let tell = |fraction| told.lock().expect("lock").push(fraction);
    let control = Control {
        cancel: None,
        progress: Some(&tell),
    };
    convert(&chain, &new_file(&path), &options, &control).expect("convert");
    let told = told.into_inner().expect("lock");
    assert!(
        told.iter().all(|fraction| (0.0..=1.0).contains(fraction)),
        "{told:?}"
    );
    assert!(
        told.last()
            .is_some_and(|last| (last - 1.0).abs() < f64::EPSILON),
        "{told:?}"
    );
}

#[test]
fn what_cannot_be_is_refused_before_a_file_is_made() {
    let dir = tempfile::tempdir().expect("temp dir");
    let made = make_chain(dir.path(), 39_000_000);
    let chain = made.open();
    let before = std::fs::read_dir(dir.path()).expect("list").count();
    let named = Qcow2Options {
        backing: Some(Backing {
            name: "base".into(),
            format: LayerFormat::Raw,
        }),
        ..Qcow2Options::default()
    };
    let usual = options;
    let cases = [
        ConvertOptions {
            format: RAW,
            compressed: true,
            ..usual()
        },
        ConvertOptions {
            format: RAW,
            below: Some(&chain),
            ..usual()
        },
        ConvertOptions {
            format: NewFormat::Qcow2(named),
            ..usual()
        },
        ConvertOptions {
            below: Some(&chain),
            ..usual()
        },
        ConvertOptions {
            disk: Some(1000),
            ..usual()
        },
    ];
    for options in cases {
        let path = dir.path().join("never");
        let error = convert(&chain, &new_file(&path), &options, &Control::default());
        assert!(
            matches!(error, Err(Error::InvalidImage { .. })),
            "{error:?}"
        );
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), before);
    }
}
