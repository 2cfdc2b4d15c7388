//! Empty images are what QEMU would have made, and clean.

mod images;

use std::path::{Path, PathBuf};

use images::sh;
use serde_json::Value;
use stead_qcow2::{
    Backing, ClusterSize, Compression, Control, DataFile, Error, Layer, LayerFormat, NewFormat,
    Preallocation, Qcow2Options, Target, Version, check, create,
};
use stead_sys::durable::Existing;

fn new_file(path: &Path) -> Target {
    Target::New {
        path: path.to_owned(),
        mode: 0o644,
        existing: Existing::Keep,
    }
}

/// What `qemu-img info` says, without what depends on place and layout.
fn info(path: &Path) -> Value {
    let text = sh(&format!("qemu-img info --output=json {}", path.display()));
    let mut info: Value = serde_json::from_str(&text).expect("JSON");
    let fields = info.as_object_mut().expect("an object");
    fields.remove("filename");
    fields.remove("actual-size");
    info
}

fn qcow2(change: impl FnOnce(&mut Qcow2Options)) -> Qcow2Options {
    let mut options = Qcow2Options::default();
    change(&mut options);
    options
}

/// The options, and the same in QEMU's words.
fn cases() -> Vec<(Qcow2Options, String)> {
    let mut all = vec![(qcow2(|_| ()), String::new())];
    for bits in 9..=21 {
        let size = ClusterSize::from_bits(bits).expect("valid");
        let text = format!("cluster_size={}", size.bytes());
        all.push((qcow2(|o| o.cluster_size = size), text.clone()));
        let v2 = qcow2(|o| (o.cluster_size, o.version) = (size, Version::V2));
        all.push((v2, format!("{text},compat=0.10")));
        let reserved = qcow2(|o| {
            (o.cluster_size, o.preallocation) = (size, Preallocation::Metadata);
        });
        all.push((reserved, format!("{text},preallocation=metadata")));
    }
    for order in 0..=6 {
        let bits = 1 << order;
        let text = format!("refcount_bits={bits},cluster_size=4096,preallocation=metadata");
        let options = qcow2(|o| {
            o.refcount_bits = bits;
            o.cluster_size = ClusterSize::from_bits(12).expect("valid");
            o.preallocation = Preallocation::Metadata;
        });
        all.push((options, text));
    }
    let lazy = qcow2(|o| o.lazy_refcounts = true);
    all.push((lazy, "lazy_refcounts=on".into()));
    let zstd = qcow2(|o| o.compression = Compression::Zstd);
    all.push((zstd, "compression_type=zstd".into()));
    for (kind, text) in [
        (Preallocation::Off, "off"),
        (Preallocation::Metadata, "metadata"),
        (Preallocation::Falloc, "falloc"),
        (Preallocation::Full, "full"),
    ] {
        let plain = qcow2(|o| o.preallocation = kind);
        all.push((plain, format!("preallocation={text}")));
        let extended = qcow2(|o| (o.extended_l2, o.preallocation) = (true, kind));
        all.push((extended, format!("extended_l2=on,preallocation={text}")));
    }
    all
}

#[test]
fn an_empty_image_is_what_qemu_makes_and_clean_with_every_option() {
    let dir = tempfile::tempdir().expect("temp dir");
    for (index, (options, text)) in cases().into_iter().enumerate() {
        // Full room is written, so these are small; one size is not of whole clusters.
        let disk = if index % 2 == 0 { 8 << 20 } else { 5_000_192 };
        let [ours, theirs] =
            ["ours", "theirs"].map(|name| dir.path().join(format!("{name}{index}")));
        let words = if text.is_empty() {
            String::new()
        } else {
            format!("-o {text}")
        };
        sh(&format!(
            "qemu-img create -q -f qcow2 {words} {} {disk}",
            theirs.display()
        ));
        let format = NewFormat::Qcow2(options.clone());
        create(&new_file(&ours), &format, disk, &Control::default()).expect("create");
        assert_eq!(info(&ours), info(&theirs), "{text}");
        sh(&format!("qemu-img check -q {}", ours.display()));
        sh(&format!(
            "qemu-img compare -q {} {}",
            ours.display(),
            theirs.display()
        ));
        let layer = Layer::open(&ours).expect("our own image");
        let report = check(&layer).expect("our own image");
        assert!(report.is_clean(), "{text}: {:?}", report.findings);
        assert_eq!(report.used_clusters, report.file_clusters, "{text}");
        let header = layer.header().clone();
        assert_eq!(
            header.feature_names,
            Layer::open(&theirs)
                .expect("QEMU's image")
                .header()
                .feature_names,
            "{text}"
        );
        if options.preallocation != Preallocation::Off {
            let clusters = header.cluster_size.count_for(disk);
            assert_eq!(report.guest_clusters, clusters, "{text}");
        }
        // QEMU can go on with it.
        let write = format!("write -P 7 {} 64k", disk / 2 / 512 * 512);
        images::run("qemu-io", &["-c".into(), write, ours.display().to_string()]);
        sh(&format!("qemu-img check -q {}", ours.display()));
        for path in [ours, theirs] {
            std::fs::remove_file(path).expect("remove");
        }
    }
}

#[test]
fn a_backing_file_is_named_as_qemu_names_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let base = dir.path().join("base.raw");
    sh(&format!("qemu-img create -q -f raw {} 1M", base.display()));
    for (index, (version, compat)) in [(Version::V2, "0.10"), (Version::V3, "1.1")]
        .into_iter()
        .enumerate()
    {
        for extended in [false, true] {
            if extended && version == Version::V2 {
                continue;
            }
            let name = |who: &str| dir.path().join(format!("{who}{index}{extended}"));
            let (ours, theirs) = (name("ours"), name("theirs"));
            let prealloc = if extended {
                Preallocation::Metadata
            } else {
                Preallocation::Off
            };
            let options = qcow2(|o| {
                o.version = version;
                o.extended_l2 = extended;
                o.preallocation = prealloc;
                o.backing = Some(Backing {
                    name: "base.raw".into(),
                    format: LayerFormat::Raw,
                });
            });
            create(
                &new_file(&ours),
                &NewFormat::Qcow2(options),
                3 << 20,
                &Control::default(),
            )
            .expect("create");
            let more = if extended {
                ",extended_l2=on,preallocation=metadata"
            } else {
                ""
            };
            sh(&format!(
                "qemu-img create -q -f qcow2 -o compat={compat}{more} -b base.raw -F raw {} 3M",
                theirs.display()
            ));
            assert_eq!(info(&ours), info(&theirs));
            sh(&format!("qemu-img check -q {}", ours.display()));
            sh(&format!(
                "qemu-img compare -q {} {}",
                ours.display(),
                theirs.display()
            ));
        }
    }
}

#[test]
fn an_external_data_file_is_made_beside_the_image_and_named_as_qemu_names_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    for (raw, word) in [(false, "off"), (true, "on")] {
        let path = |name: &str| dir.path().join(format!("{name}-{word}"));
        let (ours, theirs, data) = (path("ours"), path("theirs"), path("data"));
        let name = format!("data-{word}");
        sh(&format!(
            "qemu-img create -q -f qcow2 -o data_file={},data_file_raw={word} {} 5000192",
            data.display(),
            theirs.display()
        ));
        std::fs::remove_file(&data).expect("remove");
        let options = qcow2(|o| {
            o.data_file = Some(DataFile {
                name: data.display().to_string(),
                path: data.clone(),
                raw,
            });
        });
        create(
            &new_file(&ours),
            &NewFormat::Qcow2(options),
            5_000_192,
            &Control::default(),
        )
        .expect("create");
        assert_eq!(info(&ours), info(&theirs), "{name}");
        assert_eq!(data.metadata().expect("stat").len(), 5_000_192);
        sh(&format!("qemu-img check -q {}", ours.display()));
        let write = "write -P 7 1M 64k".to_owned();
        images::run("qemu-io", &["-c".into(), write, ours.display().to_string()]);
        sh(&format!("qemu-img check -q {}", ours.display()));
        if raw {
            let bytes = std::fs::read(&data).expect("read");
            assert_eq!(bytes[1 << 20..][..65_536], [7; 65_536]);
        }
    }
}

#[test]
fn a_disk_of_64_tib_is_made_and_one_byte_more_is_refused() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("large");
    let format = NewFormat::Qcow2(qcow2(|_| ()));
    let most = stead_qcow2::MAX_VIRTUAL_BYTES;
    let refused = create(&new_file(&path), &format, most + 512, &Control::default());
    assert!(
        matches!(refused, Err(Error::InvalidImage { .. })),
        "{refused:?}"
    );
    assert!(!path.exists());
    create(&new_file(&path), &format, most, &Control::default()).expect("create");
    sh(&format!("qemu-img check -q {}", path.display()));
}

#[test]
fn a_raw_image_has_its_length_and_the_room_that_was_asked_for() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().expect("temp dir");
    for (kind, full) in [
        (Preallocation::Off, false),
        (Preallocation::Falloc, true),
        (Preallocation::Full, true),
    ] {
        let path = dir.path().join(format!("{kind:?}"));
        let format = NewFormat::Raw {
            preallocation: kind,
        };
        create(&new_file(&path), &format, 3 << 20, &Control::default()).expect("create");
        let stat = path.metadata().expect("stat");
        assert_eq!(stat.len(), 3 << 20);
        assert_eq!(stat.blocks() * 512 >= 3 << 20, full, "{kind:?}");
    }
}

/// Options that exclude each other, each with a word of the reason.
#[test]
fn what_qemu_refuses_is_refused_with_the_reason_before_a_file_is_made() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("never");
    let small = ClusterSize::from_bits(13).expect("valid");
    let backing = Backing {
        name: "base".into(),
        format: LayerFormat::Raw,
    };
    let cases: [(Qcow2Options, &str, &str); 6] = [
        (
            qcow2(|o| o.refcount_bits = 3),
            "refcount_bits=3",
            "refcounts",
        ),
        (
            qcow2(|o| (o.version, o.refcount_bits) = (Version::V2, 8)),
            "compat=0.10,refcount_bits=8",
            "version 3",
        ),
        (
            qcow2(|o| (o.version, o.lazy_refcounts) = (Version::V2, true)),
            "compat=0.10,lazy_refcounts=on",
            "version 3",
        ),
        (
            qcow2(|o| (o.version, o.compression) = (Version::V2, Compression::Zstd)),
            "compat=0.10,compression_type=zstd",
            "version 3",
        ),
        (
            qcow2(|o| (o.extended_l2, o.cluster_size) = (true, small)),
            "extended_l2=on,cluster_size=8k",
            "16 KiB",
        ),
        (
            qcow2(|o| (o.backing, o.preallocation) = (Some(backing), Preallocation::Metadata)),
            "preallocation=metadata,backing_file=base,backing_fmt=raw",
            "backing file",
        ),
    ];
    for (options, text, word) in cases {
        let format = NewFormat::Qcow2(options);
        let error =
            create(&new_file(&path), &format, 1 << 20, &Control::default()).expect_err("refused");
        assert!(error.to_string().contains(word), "{text}: {error}");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
        let theirs = dir.path().join("theirs");
        let args = format!("create -u -f qcow2 -o {text} {} 1M", theirs.display());
        let output = std::process::Command::new("qemu-img")
            .args(args.split_whitespace())
            .output()
            .expect("run");
        assert!(!output.status.success(), "QEMU takes {text}");
        if theirs.exists() {
            std::fs::remove_file(&theirs).expect("remove");
        }
    }
}

#[test]
fn an_image_in_place_starts_clean_whatever_was_there() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path: PathBuf = dir.path().join("device");
    let garbage = vec![0xa5; 12 << 20];
    stead_sys::durable::publish(&path, 0o600, &garbage, Existing::Keep).expect("write");
    for kind in [
        Preallocation::Off,
        Preallocation::Metadata,
        Preallocation::Full,
    ] {
        let format = NewFormat::Qcow2(qcow2(|o| o.preallocation = kind));
        let target = Target::InPlace { path: path.clone() };
        create(&target, &format, 4 << 20, &Control::default()).expect("create");
        sh(&format!("qemu-img check -q {}", path.display()));
        let raw = dir.path().join("raw");
        let bytes = images::convert(&images::layer(&path, LayerFormat::Qcow2), &raw);
        assert!(bytes.iter().all(|byte| *byte == 0), "{kind:?}");
        assert_eq!(path.metadata().expect("stat").len(), 12 << 20);
    }
}
